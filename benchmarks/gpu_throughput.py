"""Tokens/s, MFU and peak memory of train_llm.py from scratch, by model size, on the GPUs of this machine.

    python benchmarks/gpu_throughput.py [--sizes 350M 1B 3B] [--steps 60] [-- further flags of train_llm.py]

Each size trains on the standard library's sources for --steps steps; a figure is the median of the logged
rows after the first third. A size that runs out of memory is a row too. Prints the README's table, with
device, versions and commit.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
BATCH_SIZES = {"125M": 32, "350M": 16, "1B": 8, "3B": 4}  # sequences of 2048; for all other sizes one


def measure(size: str, steps: int, further: list[str], folder: Path) -> str:
    """A row of the table."""
    run = folder / size
    command = [sys.executable, str(ROOT / "train_llm.py"), "--from-scratch", "--model-size", size,
               "--batch-size", str(BATCH_SIZES.get(size, 1)), "--max-steps", str(steps), "--log-interval",
               "5", "--no-export", "--checkpoint-interval", "1000000", "--checkpoint-dir", str(run), *further]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        return f"| {size} | {done.stderr.strip().splitlines()[-1]} | | | |"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["step"] > steps / 3]
    figures = [statistics.median(row[key] for row in rows) for key in
               ("perf/tokens_per_s_per_gpu", "perf/mfu", "perf/peak_mem_gib", "time/step_s")]
    return "| {} | {:,.0f} | {:.1%} | {:.1f} | {:.3f} |".format(size, *figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["350M", "1B", "3B"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("further", nargs="*", help="flags of train_llm.py, after --")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_throughput.py: error: torch sees no GPU here")
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True,
                         text=True)
    print(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}, commit "
          f"{git.stdout.strip()}, sequence 2048, flags: {' '.join(args.further) or 'none'}\n")
    print("| model | tokens/s per GPU | MFU | peak GiB | s a step |\n|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            print(measure(size, args.steps, args.further, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
