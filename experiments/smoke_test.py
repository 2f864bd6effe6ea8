"""Check in less than two minutes that every implementation trains, saves, resumes and measures itself.

    python experiments/smoke_test.py               # on one and on two processes
    python experiments/smoke_test.py --nproc 4 --device cuda

Straight and resumed runs are compared with DDP: losses must agree to 1e-5. All runs on N processes share one
process group, because starting Python takes longer than training so small a model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

SMALL = ("--vocab-size 64 --embed-dim 32 --num-layers 2 --num-heads 2 --ff-hidden-dim 64 --seq-len 16 "
         "--batch-size 4 --max-steps 4 --log-every 1 --save-every 2 --grad-accum 2").split()
IMPLS = ("ddp", "manual", "fsdp1", "fsdp2")


def run_all(file: Path) -> None:
    """One of the processes: a list of argument lists of train_sharding.py, one after the other."""
    import train_sharding  # before torch, which reads variables that it sets
    import torch
    import torch.distributed as dist
    if dist.is_torchelastic_launched():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=1))  # a hang ends
    for argv in json.loads(file.read_text()):
        train_sharding.main(argv)


def find_problems(folder: Path, nproc: int) -> list[str]:
    """What is wrong with the metrics and checkpoints that the runs have left."""
    problems, curves = [], {}
    for name in [*IMPLS, *(f"{impl}_resumed" for impl in IMPLS)]:
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        logs = [row for row in rows if row["event"] == "log"]
        curves[name] = {row["step"]: row["train/loss"] for row in logs}
        measured = ("perf/tokens_per_s", "perf/peak_mem_gib", "train/grad_norm", "time/collectives_s")
        if not all(row[key] > 0 for row in logs for key in measured) or rows[-1]["event"] != "end":
            problems.append(f"{name}: a measurement is missing")
        traffic = sum(row[f"comm/{kind}_mib"] for row in logs
                      for kind in ("all_gather", "reduce_scatter", "all_reduce"))
        if (traffic > 0) != (nproc > 1):
            problems.append(f"{name}: {traffic:.3f} MiB moved on {nproc} processes")
    for name, curve in curves.items():
        expected = curves["ddp"]
        if any(abs(loss - expected[step]) > 1e-5 * expected[step] for step, loss in curve.items()):
            problems.append(f"{name}: losses {list(curve.values())} differ from {list(expected.values())}")
        if len(curve) != (2 if name.endswith("resumed") else 4):
            problems.append(f"{name}: {len(curve)} steps were logged")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--nproc", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="cpu")
    parser.add_argument("--runs", type=Path, help=argparse.SUPPRESS)  # this is one of the processes
    args = parser.parse_args()
    if args.runs:
        return run_all(args.runs)
    failed = False
    for nproc in args.nproc:
        with tempfile.TemporaryDirectory() as name:
            folder, started, runs = Path(name), time.perf_counter(), []
            for impl in IMPLS:
                common = [*SMALL, "--impl", impl, "--device", args.device]
                runs.append([*common, "--metrics-path", f"{folder}/{impl}.jsonl", "--ckpt-dir",
                             f"{folder}/{impl}"])
                runs.append([*common, "--metrics-path", f"{folder}/{impl}_resumed.jsonl",
                             "--resume", f"{folder}/{impl}/step_000002"])
            (folder / "runs.json").write_text(json.dumps(runs))
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
            command = [sys.executable, *(torchrun if nproc > 1 else [])]
            print(f"{nproc} processes: {len(runs)} runs …", flush=True)
            done = subprocess.run([*command, __file__, "--runs", str(folder / "runs.json")], check=False,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            problems = find_problems(folder, nproc) if done.returncode == 0 else [done.stdout[-3000:]]
            print("\n".join(problems) or f"{nproc} processes: {', '.join(IMPLS)} train, save, resume and "
                  f"agree ({time.perf_counter() - started:.0f} s)", flush=True)
            failed |= bool(problems)
    sys.exit(failed)


if __name__ == "__main__":
    main()
