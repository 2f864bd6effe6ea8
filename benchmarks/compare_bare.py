"""train_llm.py against a bare FSDP2 loop: CPU seconds, wall seconds, start-up and memory, on 2 CPU processes.

    python benchmarks/compare_bare.py [--precision fp32|bf16] [--rounds 5] [--steps 60]

The two run in turns, A B B A A B …, on the same model and tokens, in the same precision, which is measured
(observe.py); the first loss must be the same. Each figure is a median over the runs; a run's step cost is its
median over the steps after the first 10, CPU seconds summed over ranks. Start-up is from process start to the
end of the first optimizer step (slower rank), memory the larger rank's peak until the last step. Prints the
README's table.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
NPROC, SEQ_LEN, BATCH_SIZE = 2, 256, 4
OURS = {"fp32": "--no-mixed-precision", "bf16": "--mixed-precision"}
COMPUTED_IN = {"fp32": ["float32"], "bf16": ["bfloat16"]}
SAME_LOSS = {"fp32": 1e-5, "bf16": 1e-4}  # relative; the two add up in different orders


def run(script: str, arguments: list, folder: Path, precision: str) -> dict:
    """One observed run: {cpu_s, wall_s, start_s, peak_mib}, and its output and threads."""
    out = folder / "observed"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(NPROC),
               str(ROOT / "benchmarks/observe.py"), str(out), str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    ranks = [json.loads(path.read_text()) for path in sorted(out.glob("rank*.json"))]
    if any(rank["computed_in"] != COMPUTED_IN[precision] for rank in ranks):
        sys.exit(f"{script} computed in {', '.join(ranks[0]['computed_in'])}, not in {precision}: nothing to "
                 "compare (a CPU without native bf16 computes in fp32)")

    def per_step(key: str) -> list[float]:
        return [statistics.median(b - a for a, b in zip(r[key][10:], r[key][11:])) for r in ranks]

    return {"cpu_s": sum(per_step("cpu_s")), "wall_s": max(per_step("wall_s")),
            "start_s": max(r["start_s"][0] for r in ranks), "peak_mib": max(r["peak_mib"][-1] for r in ranks),
            "output": done.stdout, "threads": ranks[0]["threads"]}


def check_losses(bare_output: str, run_dir: Path, precision: str) -> tuple[float, float]:
    """First loss of both sides; ends where they differ, for then they computed different things."""
    found = re.findall(r"^rank \d+ step 1 loss (\S+)$", bare_output, re.MULTILINE)
    assert len(found) == NPROC, bare_output
    bare = statistics.mean(map(float, found))  # each rank has as many tokens
    ours = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])["train/loss"]
    if not abs(ours - bare) <= SAME_LOSS[precision] * bare:
        sys.exit(f"the first losses differ: bare loop {bare:.6f}, train_llm.py {ours:.6f}")
    return bare, ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--precision", choices=list(OURS), default="fp32", help="of both sides")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    shape = ["--model-size", "quickstart", "--vocab-size", 8192, "--seq-len", SEQ_LEN,
             "--batch-size", BATCH_SIZE]
    data = ["--dataset", "data_cache/stdlib", "--tokenizer", "data_cache/stdlib_tokenizer"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make = [sys.executable, str(ROOT / "tools/make_stdlib_data.py"), "--vocab-size", "8192"]
        subprocess.run(make, cwd=folder, check=True)
        ours = ["--from-scratch", *shape, *data, "--max-steps", args.steps, "--no-export",
                "--warmup-steps", 10, "--checkpoint-interval", 0, OURS[args.precision]]
        # The first run makes the tokens; every measured run finds them.
        run("train_llm.py", [*ours, "--checkpoint-dir", "warm"], folder, args.precision)
        tokens = next((folder / "data_cache").glob("pack-*.arrow"))
        bare = [*shape, "--steps", args.steps, "--tokens", tokens, "--precision", args.precision]
        found = {"bare loop": [], "train_llm.py": []}
        for number in tqdm(range(2 * args.rounds), desc="runs", disable=not sys.stderr.isatty()):
            if number % 4 in (0, 3):
                found["bare loop"].append(run("benchmarks/bare_fsdp2.py", bare, folder, args.precision))
            else:
                arguments = [*ours, "--checkpoint-dir", f"run{number}"]
                found["train_llm.py"].append(run("train_llm.py", arguments, folder, args.precision))
        losses = check_losses(found["bare loop"][0]["output"], folder / "warm", args.precision)
    measures = {"cpu_s": "CPU seconds a step, both ranks", "wall_s": "wall seconds a step",
                "start_s": "seconds to the end of step 1", "peak_mib": "peak memory a rank, MiB"}
    a, b = ({key: statistics.median(row[key] for row in rows) for key in measures} for rows in found.values())
    print(f"| {args.precision} | bare loop | train_llm.py | ratio |\n|---|---:|---:|---:|")
    for key, label in measures.items():
        print(f"| {label} | {a[key]:.3f} | {b[key]:.3f} | {b[key] / a[key]:.3f} |")
    threads = found["bare loop"][0]["threads"]
    print(f"\nmedians of {args.rounds} alternating runs each, {args.steps} steps of "
          f"{NPROC * BATCH_SIZE * SEQ_LEN:,} tokens, {NPROC} processes of {threads} thread; both sides in "
          f"{args.precision}, first loss {losses[0]:.6f} and {losses[1]:.6f}; torch "
          f"{importlib.metadata.version('torch')}, Python {platform.python_version()}")


if __name__ == "__main__":
    main()
