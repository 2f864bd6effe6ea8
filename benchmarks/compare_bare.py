"""train_llm.py against a bare FSDP2 loop: CPU seconds, wall seconds, start-up and memory, on 2 CPU processes.

    python benchmarks/compare_bare.py [--rounds 5] [--steps 60]

The two run in turns, A B B A A B …, on the same model and tokens. Each figure is a median over the runs; a
run's step cost is its median over the steps after the first 10, CPU seconds summed over ranks. Start-up is
from process start to the end of the first optimizer step (slower rank), memory the larger rank's peak until
the last step. Prints the README's table.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, arguments: list, folder: Path) -> dict[str, float]:
    """One observed run on 2 processes: {cpu_s, wall_s, start_s, peak_mib}."""
    out = folder / "observed"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(ROOT / "benchmarks/observe.py"), str(out), str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    ranks = [json.loads(path.read_text()) for path in sorted(out.glob("rank*.json"))]

    def per_step(key: str) -> list[float]:
        return [statistics.median(b - a for a, b in zip(r[key][10:], r[key][11:])) for r in ranks]

    return {"cpu_s": sum(per_step("cpu_s")), "wall_s": max(per_step("wall_s")),
            "start_s": max(r["start_s"][0] for r in ranks), "peak_mib": max(r["peak_mib"][-1] for r in ranks)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    shape = ["--model-size", "quickstart", "--vocab-size", 8192, "--seq-len", 256, "--batch-size", 4]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = ["--from-scratch", *shape, "--max-steps", args.steps, "--no-export", "--warmup-steps", 10,
                "--checkpoint-interval", 100000]
        # The first run makes the tokenizer and the tokens; every measured run finds them.
        run("train_llm.py", [*ours, "--checkpoint-dir", "warm"], folder)
        tokens = next((folder / "data_cache").glob("tokens-*[0-9a-f]/meta.json")).parent
        bare = [*shape, "--steps", args.steps, "--tokens", tokens]
        found = {"bare loop": [], "train_llm.py": []}
        for number in tqdm(range(2 * args.rounds), desc="runs", disable=not sys.stderr.isatty()):
            if number % 4 in (0, 3):
                found["bare loop"].append(run("benchmarks/bare_fsdp2.py", bare, folder))
            else:
                arguments = [*ours, "--checkpoint-dir", f"run{number}"]
                found["train_llm.py"].append(run("train_llm.py", arguments, folder))
    a, b = ({key: statistics.median(row[key] for row in rows) for key in rows[0]} for rows in found.values())
    print("| | bare loop | train_llm.py | ratio |\n|---|---:|---:|---:|")
    for key, label in (("cpu_s", "CPU seconds a step, both ranks"), ("wall_s", "wall seconds a step"),
                       ("start_s", "seconds to the end of step 1"), ("peak_mib", "peak memory a rank, MiB")):
        print(f"| {label} | {a[key]:.3f} | {b[key]:.3f} | {b[key] / a[key]:.3f} |")
    print(f"\nmedians of {args.rounds} alternating runs each, {args.steps} steps, 2 processes of 1 thread")


if __name__ == "__main__":
    main()
