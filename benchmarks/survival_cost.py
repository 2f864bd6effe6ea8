"""What it costs to survive: step time, what a save holds up, and memory over many saves, on 2 CPU processes.

    python benchmarks/survival_cost.py steps --before 057e073 [--rounds 6] [--steps 150]
    python benchmarks/survival_cost.py saves [--rounds 3]
    python benchmarks/survival_cost.py memory [--saves 50]

steps: train_llm.py against its version in the git commit --before (057e073 is the last one without signals,
lock and record), in turns A B B A, on the same model and tokens. Medians over the runs of the
median step after the first 10; CPU seconds are summed over the ranks.

saves: a state of 500 MB, saved every 20 steps, by --no-async-checkpoint, by --async-checkpoint, and not at
all, in turns. What a save costs is the time of 40 steps with two saves, less that of the run without, halved.
"standing still" is the part of it in which the loop waits; in the rest, steps are slower because the writing
takes processor time from them.

memory: resident memory of both ranks after each of many asynchronous saves of 500 MB.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
BIG = ["--model-size", "quickstart", "--vocab-size", 160000, "--seq-len", 64, "--batch-size", 1]


def run(folder: Path, name: str, arguments: list, script: Path = ROOT / "train_llm.py") -> list[dict]:
    """One observed run on 2 processes in folder/name; what observe.py found of each rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               ROOT / "benchmarks/observe.py", folder / name / "observed", script, "--from-scratch",
               "--no-export", "--warmup-steps", 1, "--tokenizer", folder / "stdlib_tokenizer", "--dataset",
               folder / "stdlib",
               "--data-cache", folder / "cache", "--checkpoint-dir", folder / name, *arguments]
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return [json.loads(path.read_text()) for path in sorted((folder / name / "observed").glob("rank*.json"))]


def make_tokenizer(folder: Path) -> None:
    """The standard library's sources, and a tokenizer of them."""
    make = [sys.executable, ROOT / "tools/make_stdlib_data.py", "--folder", folder, "--vocab-size", "8192"]
    subprocess.run(list(map(str, make)), check=True)


def turns(names: list[str], rounds: int) -> list[str]:
    """A B C, C B A, A B C …: so that no one of them always comes first."""
    order = [name for number in range(rounds) for name in (names if number % 2 == 0 else names[::-1])]
    return tqdm(order, desc="runs", disable=not sys.stderr.isatty())


def compare_steps(folder: Path, before: str, rounds: int, steps: int) -> None:
    old = folder / "before" / "train_llm.py"
    old.parent.mkdir()
    old.write_bytes(subprocess.run(["git", "-C", ROOT, "show", f"{before}:train_llm.py"], check=True,
                                   stdout=subprocess.PIPE).stdout)
    scripts = {"before": old, "now": ROOT / "train_llm.py"}
    arguments = ["--model-size", "quickstart", "--vocab-size", 8192, "--seq-len", 256, "--batch-size", 4,
                 "--max-steps", steps, "--checkpoint-interval", 100000]
    found = {name: {"cpu_s": [], "wall_s": []} for name in scripts}
    for number, name in enumerate(turns(list(scripts), rounds)):
        ranks = run(folder, f"steps{number}", arguments, scripts[name])
        for key, values in found[name].items():
            per_rank = [statistics.median(b - a for a, b in zip(r[key][10:], r[key][11:-1])) for r in ranks]
            values.append(sum(per_rank) if key == "cpu_s" else max(per_rank))
    print(f"| a step, medians of {rounds} alternating runs | {before} | now | ratio |\n|---|---:|---:|---:|")
    for key, label in (("cpu_s", "CPU seconds, both ranks"), ("wall_s", "wall seconds")):
        a, b = (statistics.median(found[name][key]) for name in scripts)
        print(f"| {label} | {a:.4f} | {b:.4f} | {b / a:.3f} |")
    print("each run:", json.dumps(found))


def compare_saves(folder: Path, rounds: int) -> None:
    kinds = {"none": ["--checkpoint-interval", 100000],
             "sync": ["--checkpoint-interval", 20, "--no-async-checkpoint"],
             "async": ["--checkpoint-interval", 20, "--async-checkpoint"]}
    spans, still = {name: [] for name in kinds}, {name: [] for name in kinds}
    for number, name in enumerate(turns(list(kinds), rounds)):
        arguments = [*BIG, "--max-steps", 62, "--keep-checkpoints", 1, "--log-interval", 1, *kinds[name]]
        ranks = run(folder, f"saves{number}", arguments)
        # From the end of step 20 to the end of step 60's update: the saves of steps 20 and 40.
        spans[name].append(max(rank["wall_s"][59] - rank["wall_s"][19] for rank in ranks))
        metrics = folder / f"saves{number}/metrics.jsonl"
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        still[name].append(sum(row["time/checkpoint_s"] for row in rows if 20 < row["step"] <= 60))
        size = sum(path.stat().st_size for path in (folder / f"saves{number}").rglob("*.distcp"))
        subprocess.run(["rm", "-r", folder / f"saves{number}"], check=True)
    base = statistics.median(spans["none"])
    print(f"state of {size / 1e6:.0f} MB, a step without saves {base / 40:.3f} s, medians of {rounds} runs\n")
    print("| seconds a save | all it costs | of which standing still |\n|---|---:|---:|")
    costs = {}
    for name in ("sync", "async"):
        costs[name] = [(statistics.median(spans[name]) - base) / 2, statistics.median(still[name]) / 2]
        print(f"| {name} | {costs[name][0]:.3f} | {costs[name][1]:.3f} |")
    (cost, wait), (sync_cost, sync_wait) = costs["async"], costs["sync"]
    print(f"| async / sync | {cost / sync_cost:.3f} | {wait / sync_wait:.3f} |")
    print("each run:", json.dumps({"span_s": spans, "standing_still_s": still}))


def watch_memory(folder: Path, saves: int) -> None:
    arguments = [*BIG, "--max-steps", 2 * saves + 2, "--checkpoint-interval", 2, "--keep-checkpoints", 1]
    ranks = run(folder, "memory", arguments)
    print("| resident MiB after save | " + " | ".join(f"rank {rank}" for rank in range(len(ranks))) + " |")
    print("|---:|" + "---:|" * len(ranks))
    for save in sorted({1, 2, 5, *range(10, saves + 1, 10)}):
        found = (f"{rank['resident_mib'][2 * save + 1]:.0f}" for rank in ranks)
        print(f"| {save} | {' | '.join(found)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["steps", "saves", "memory"])
    parser.add_argument("--before", default="057e073", help="commit of the older train_llm.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--saves", type=int, default=50)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tokenizer(folder)
        # Tokens are made here, in a run that does not count.
        run(folder, "warm", [*BIG, "--max-steps", 1])
        if args.what == "steps":
            compare_steps(folder, args.before, args.rounds, args.steps)
        elif args.what == "saves":
            compare_saves(folder, args.rounds)
        else:
            watch_memory(folder, args.saves)


if __name__ == "__main__":
    main()
