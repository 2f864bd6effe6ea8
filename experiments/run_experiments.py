"""Run a list of sharding experiments, several seeds each, in shuffled order, so that they can be compared.

    python experiments/run_experiments.py --launcher "torchrun --standalone --nproc_per_node=2" \\
        --output-dir artifacts/experiments --execute

Without --execute it writes the configs only. It goes on when an experiment fails. Stop it with Ctrl-C
or SIGTERM; the same command goes on with what is not finished. Then look at the results:

    python experiments/analyze_metrics.py --experiment-dir artifacts/experiments --baseline ddp_fp32

Files of the output folder for each run NAME_seedN: configs/NAME_seedN.json, NAME_seedN_metrics.jsonl (one
row a logged step), NAME_seedN.log (what it printed); sweep.json says what was run where and in which order.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent / "train_sharding.py"
# EDIT: {name: what differs from BASE}. The control repeats the baseline: the two differ by noise only.
EXPERIMENTS = {
    "ddp_fp32": {"fsdp": {"impl": "ddp"}},
    "control_ddp_fp32": {"fsdp": {"impl": "ddp"}},
    "ddp_bf16": {"fsdp": {"impl": "ddp"}, "runtime": {"precision": "bf16"}},
    "manual_fp32": {"fsdp": {"impl": "manual"}},
    "manual_fp32_no_prefetch": {"fsdp": {"impl": "manual", "prefetch": False}},
    "manual_bf16": {"fsdp": {"impl": "manual"}, "runtime": {"precision": "bf16"}},
    "fsdp2_fp32": {"fsdp": {"impl": "fsdp2"}},
    "fsdp2_bf16": {"fsdp": {"impl": "fsdp2"}, "runtime": {"precision": "bf16"}},
    "fsdp2_fp32_recompute": {"fsdp": {"impl": "fsdp2", "activation_checkpoint": True}},
    "fsdp2_fp32_no_reshard": {"fsdp": {"impl": "fsdp2", "sharding": "SHARD_GRAD_OP"}},
    "fsdp2_fp32_prefetch": {"fsdp": {"impl": "fsdp2", "prefetch": True}},
    "fsdp2_fp32_no_prefetch": {"fsdp": {"impl": "fsdp2", "prefetch": False}},
    "fsdp2_fp32_compile": {"fsdp": {"impl": "fsdp2"}, "runtime": {"compile": True}},
    "fsdp1_fp32": {"fsdp": {"impl": "fsdp1", "limit_all_gathers": True}},
    "fsdp1_fp32_unlimited": {"fsdp": {"impl": "fsdp1", "limit_all_gathers": False}},
}
BASE = {
    "model": {"vocab_size": 512, "embed_dim": 256, "num_layers": 4, "num_heads": 4, "ff_hidden_dim": 1024},
    "data": {"seq_len": 128, "batch_size": 4},
    "optim": {"lr": 1e-3, "warmup_steps": 10},
    "runtime": {"max_steps": 40, "log_every": 5},
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--launcher", default="torchrun --standalone --nproc_per_node=2",
                        help="what starts the processes of one run (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--execute", action="store_true", help="run them; otherwise only write the configs")
    parser.add_argument("--experiments", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS),
                        metavar="NAME", help=f"some of: {', '.join(EXPERIMENTS)}")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each experiment (default: %(default)s)")
    parser.add_argument("--max-steps", type=int, metavar="N", help="steps of each run (default: 40)")
    parser.add_argument("--config", type=Path, metavar="FILE",
                        help="JSON or YAML sections that replace values of all experiments")
    parser.add_argument("--timeout", type=float, default=1800, metavar="SECONDS", help="for one run")
    args = parser.parse_args()
    if args.seeds < 1 or (args.max_steps is not None and args.max_steps < 1):
        parser.error("--seeds and --max-steps must be at least 1")
    if args.config and not args.config.is_file():
        parser.error(f"--config {args.config}: no such file")
    return args


def write_configs(args: argparse.Namespace) -> list[str]:
    """Write a config for each run; returns their names in the order in which they are to run.

    The order is random, but the same again: the machine's slow hours hit all experiments alike."""
    import yaml
    given = yaml.safe_load(args.config.read_text()) if args.config else {}
    runs = [(name, seed) for name in args.experiments for seed in range(args.seeds)]
    random.Random(0).shuffle(runs)
    folder = args.output_dir / "configs"
    folder.mkdir(parents=True, exist_ok=True)
    for name, seed in runs:
        run, config = f"{name}_seed{seed}", {}
        steps = {"max_steps": args.max_steps} if args.max_steps else {}
        own = {"seed": seed, "metrics_path": str(args.output_dir / f"{run}_metrics.jsonl")}
        for layer in (BASE, given, {"runtime": steps}, EXPERIMENTS[name], {"runtime": own}):
            for section, values in layer.items():
                config[section] = config.get(section, {}) | values
        text = json.dumps(config, indent=1)
        path = folder / f"{run}.json"
        if path.exists() and path.read_text() != text and is_finished(args.output_dir, run):
            sys.exit(f"run_experiments.py: error: {path} was run with other settings: choose another "
                     "--output-dir, or remove this one")
        path.write_text(text)
    return [f"{name}_seed{seed}" for name, seed in runs]


def is_finished(folder: Path, run: str) -> bool:
    path = folder / f"{run}_metrics.jsonl"
    return path.is_file() and '"event": "end"' in path.read_text()


def execute(command: list[str], log: Path, timeout: float) -> tuple[int, str]:
    """(exit code, last line of the output) of a run. All its processes end with it, also at Ctrl-C."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            code = process.wait(timeout)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            process.send_signal(signal.SIGTERM)  # a launcher passes it on to its processes
            process.wait()
            if isinstance(error, KeyboardInterrupt):
                raise
            return -1, f"no end after {timeout:g} s"
    errors = [line.strip() for line in log.read_text(errors="replace").splitlines() if "rror:" in line]
    return code, errors[0] if errors else ""


def write_sweep(args: argparse.Namespace, runs: list[str]) -> None:
    import torch
    git = ["git", "-C", str(SCRIPT.parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = shutil.which("git") and subprocess.run(git, capture_output=True, text=True, check=False).stdout
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    (args.output_dir / "sweep.json").write_text(json.dumps({
        "command": shlex.join(["python", "experiments/run_experiments.py", *sys.argv[1:]]),
        "commit": (commit or "").strip(), "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "device": device, "torch": torch.__version__, "launcher": args.launcher, "runs": runs}, indent=1))


def main() -> None:
    from tqdm import tqdm
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the run under way, as Ctrl-C does
    args = parse_args()
    runs = write_configs(args)
    if not args.execute:
        print(f"{len(runs)} configs in {args.output_dir / 'configs'}; --execute runs them")
        return
    launcher = shlex.split(args.launcher)
    if launcher[0] == "torchrun":  # of this Python, whatever else is on the PATH
        launcher[:1] = [sys.executable, "-m", "torch.distributed.run"]
    write_sweep(args, runs)
    left = [run for run in runs if not is_finished(args.output_dir, run)]
    failed = []
    bar = tqdm(left, desc="experiments", unit="run", initial=len(runs) - len(left), total=len(runs))
    for run in bar:
        bar.set_postfix_str(run)
        (args.output_dir / f"{run}_metrics.jsonl").unlink(missing_ok=True)  # half a run
        command = [*launcher, str(SCRIPT), "--config", str(args.output_dir / "configs" / f"{run}.json")]
        try:
            code, reason = execute(command, args.output_dir / f"{run}.log", args.timeout)
        except KeyboardInterrupt:
            bar.close()
            sys.exit("run_experiments.py: stopped; the same command goes on with what is not finished")
        if code:
            failed.append(run)
            bar.write(f"{run} failed (exit code {code}): {reason or 'see its log'}", file=sys.stdout)
    bar.close()
    print(f"{len(runs) - len(failed)} of {len(runs)} runs finished; now: python "
          f"experiments/analyze_metrics.py --experiment-dir {args.output_dir} --baseline ddp_fp32")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
