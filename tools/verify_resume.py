"""Prove for your script, arguments and machine that stopping and resuming changes nothing.

    python tools/verify_resume.py train_llm.py --from-scratch --model-size test --dataset my_texts.jsonl
    python tools/verify_resume.py --steps 40 --stop-by SIGKILL my_copy.py --config my.yaml
    python tools/verify_resume.py --nproc 2 --resume-nproc 1 train_llm.py --hf-model MODEL --dataset my.jsonl

The flags in front of the script are this program's, those behind it the script's. It runs --steps steps
straight; runs them again, stops that run in the middle and resumes it; then it compares every logged value of
every step but the timings, and every tensor of the last checkpoint: weights, optimizer, random states. On the
same number of processes all must agree to the last bit, on another one within --tolerance (dropout differs
there by its nature). What a script keeps neither in metrics.jsonl nor in its checkpoints is not seen.

Works with each training script here and with edited copies: they take --checkpoint-dir and --max-steps and
write metrics.jsonl and checkpoints/step_000100. The processes are started here without torchrun, each with
torchrun's variables. Needs room for about 5 checkpoints in the system's temporary folder or in --keep's.

Exit codes: 0 proven, 1 something differs or a run failed, 2 wrong arguments.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from tqdm import tqdm

READ_GIB = 0.5  # tensors are read in groups of this size: each read parses the checkpoint's whole index
# Set by this program, or in the way of it; the second part of each says what to do instead.
OWN_FLAGS = {
    "--max-steps": "--steps N in front of the script sets it",
    "--nproc": "--nproc N goes in front of the script",
    "--gpu-ranks": "set CUDA_VISIBLE_DEVICES instead",
    "--wandb": "these runs are no experiments",
} | dict.fromkeys(("--checkpoint-dir", "--checkpoint-interval", "--keep-checkpoints", "--log-interval",
                   "--resume", "--export", "--no-export"), "it is set here")
# Causes before effects: where several values of a step differ, the first of these is named.
CAUSES_FIRST = ("step", "samples", "train/tokens", "train/lr", "train/loss", "train/grad_norm")


class CannotTell(Exception):
    """The proof could not be made: shown as one line, exit code 1."""


@dataclass
class Run:
    """The processes of one start of the script, and what has been read of its metrics.jsonl."""
    folder: Path
    log: Path
    processes: list[subprocess.Popen] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)
    offset: int = 0


# ----------------------------------------------------------------------------------------------------
# 1. Arguments

def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="verify_resume.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="steps in all; default 20")
    parser.add_argument("--stop-after", type=int, metavar="K", help="stop once step K is done; default: half")
    parser.add_argument("--stop-by", default="SIGTERM", metavar="SIGNAL", help="SIGTERM (default) or another "
                        "of the script's --stop-signals, after which it saves; SIGKILL: no warning, to go on "
                        "from a checkpoint some steps before")
    parser.add_argument("--nproc", type=int, metavar="N", help="processes; default: one per GPU, else 1")
    parser.add_argument("--resume-nproc", type=int, metavar="N", help="processes of the resumed run; "
                        "--batch-size and --grad-accum-steps are adapted; default: as many")
    parser.add_argument("--tolerance", type=float, metavar="X", help="largest relative difference; default "
                        "0, with another --resume-nproc 1e-3 (bf16 needs about 3e-2 there)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="new folder in which both runs stay")
    parser.add_argument("script", type=Path, help="train_llm.py or a copy")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own")
    args = parser.parse_args(argv)
    given = [word.split("=")[0] for word in args.arguments]
    for flag in filter(OWN_FLAGS.get, given):
        parser.error(f"{flag} behind the script: leave it out ({OWN_FLAGS[flag]})")
    if not args.script.is_file():
        parser.error(f"there is no script {args.script}")
    if args.steps < 4:
        parser.error("--steps must be at least 4")
    args.stop_after = args.stop_after or args.steps // 2
    if not 2 <= args.stop_after <= args.steps - 2:
        parser.error(f"--stop-after must be between 2 and {args.steps - 2}, not {args.stop_after}")
    if not isinstance(getattr(signal, args.stop_by, None), signal.Signals):
        parser.error(f"--stop-by {args.stop_by}: no signal of this system; SIGTERM, SIGINT, SIGUSR1, SIGKILL")
    if args.keep and args.keep.exists() and (not args.keep.is_dir() or any(args.keep.iterdir())):
        parser.error(f"--keep {args.keep} already holds something: name a new folder")
    if "RANK" in os.environ:
        parser.error("start this without torchrun or srun: it starts the processes itself")
    if args.nproc is None:
        on_cpu = re.search(r"--device[= ]cpu\b", " ".join(args.arguments))
        args.nproc = 1 if on_cpu else max(1, torch.cuda.device_count())
    args.resume_nproc = args.resume_nproc or args.nproc
    if min(args.nproc, args.resume_nproc) < 1:
        parser.error("--nproc and --resume-nproc must be at least 1")
    if args.tolerance is None:
        args.tolerance = 0.0 if args.resume_nproc == args.nproc else 1e-3
    return args


def script_flags(args: argparse.Namespace) -> list[str]:
    """What both runs get behind the user's arguments, so that it also wins over a --config file."""
    interval = args.steps
    if args.stop_by == "SIGKILL":
        # Often enough that one checkpoint is complete by --stop-after even where it is written slowly.
        interval = max(1, args.stop_after // 3)
    return ["--max-steps", str(args.steps), "--checkpoint-interval", str(interval), "--keep-checkpoints", "2",
            "--log-interval", "1", "--no-export", "--deterministic"]


def flags_for(nproc: int, resume_nproc: int, run_dir: Path) -> list[str]:
    """--batch-size and --grad-accum-steps with which another number of processes takes the same samples."""
    if nproc == resume_nproc:
        return []
    import yaml
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    if config.get("streaming"):
        raise CannotTell("--streaming resumes exactly on the same number of processes only: leave "
                         "--resume-nproc out")
    samples = config["batch_size"] * config["grad_accum_steps"] * nproc
    if samples % resume_nproc:
        raise CannotTell(f"a step's {samples} sequences cannot be divided among {resume_nproc} processes: "
                         "choose another --resume-nproc, or another --batch-size behind the script")
    share = samples // resume_nproc
    batch_size = max(size for size in range(1, config["batch_size"] + 1) if share % size == 0)
    return ["--batch-size", str(batch_size), "--grad-accum-steps", str(share // batch_size)]


# ----------------------------------------------------------------------------------------------------
# 2. Runs

def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@contextlib.contextmanager
def started(script: Path, arguments: list[str], nproc: int, folder: Path, log: Path) -> Iterator[Run]:
    """The script on `nproc` processes of this machine; whatever happens, none of them outlives the block."""
    threads = max(1, (os.cpu_count() or 1) // nproc)
    common = {"OMP_NUM_THREADS": str(threads)} | os.environ | {
        "WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(script), *arguments, "--checkpoint-dir", str(folder)]
    run = Run(folder, log)
    with contextlib.suppress(FileNotFoundError):
        run.offset = (folder / "metrics.jsonl").stat().st_size  # what earlier starts wrote is theirs
    try:
        with log.open("a") as output:
            for rank in range(nproc):
                # Sessions of their own: Ctrl-C is for this program, which then ends them.
                run.processes.append(subprocess.Popen(
                    command, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=output,
                    stderr=output, stdin=subprocess.DEVNULL, start_new_session=True))
        yield run
    finally:
        send(run, signal.SIGKILL)
        for process in run.processes:
            process.wait()


def send(run: Run, number: int) -> None:
    """A signal to each process that lives, SIGKILL also to what it has started."""
    for process in run.processes:
        if process.poll() is not None:
            continue  # its number may be another's by now
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)


def read_new_rows(run: Run) -> list[dict]:
    """Whole lines that metrics.jsonl has got since the last call."""
    path = run.folder / "metrics.jsonl"
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(run.offset)
        text = file.read()
    text = text[:text.rfind(b"\n") + 1]
    run.offset += len(text)
    rows = [json.loads(line) for line in text.splitlines()]
    run.rows += rows
    return rows


def wait(run: Run, bar: tqdm, until: Callable[[], bool] = lambda: False) -> list[int] | None:
    """Follow a run until `until()`, then None, or to its end: the processes' exit codes.

    A process that fails while others go on ends them all, after the seconds that they may need to say why."""
    failed_at = None
    while True:
        ended = [process.poll() for process in run.processes]
        for row in read_new_rows(run):
            bar.n = max(bar.n, row["step"])
        bar.refresh()
        if None not in ended:
            return ended
        if until():
            return None
        if failed_at is None and any(ended):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() > failed_at + 60:
            send(run, signal.SIGKILL)
        time.sleep(0.002)  # steps may take few milliseconds, and the stop should hit the middle


def require(run: Run, codes: list[int] | None, wanted: int, what: str) -> None:
    """Rank 0's exit code is `wanted`, the others' that or 0."""
    if codes[0] == wanted and all(code in (0, wanted) for code in codes):
        return
    lines = [line.rstrip() for line in run.log.read_text(errors="replace").splitlines() if line.strip()]
    tail = "\n".join("    " + line for line in lines[-15:])
    raise CannotTell(f"{what} (exit codes {codes}, wanted {wanted}). The end of what it printed:\n{tail}")


def open_bar(args: argparse.Namespace, what: str) -> tqdm:
    return tqdm(total=args.steps, desc=f"{what:9s}", unit="step", leave=True, disable=not sys.stderr.isatty(),
                bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps {elapsed}")


def run_straight(args: argparse.Namespace, folder: Path) -> tuple[Run, list[str]]:
    """The run without a stop; also the flags that the resumed one needs, asked for as early as can be."""
    flags = [*args.arguments, *script_flags(args)]
    log = folder / "straight.log"
    with open_bar(args, "straight") as bar, started(
            args.script, flags, args.nproc, folder / "straight", log) as run:
        codes = wait(run, bar, until=lambda: bool(run.rows))  # config.yaml stands there by then
        if codes is None:
            more = flags_for(args.nproc, args.resume_nproc, run.folder)
            codes = wait(run, bar)
        require(run, codes, 0, "the straight run failed")
    return run, more


def newest_checkpoint(folder: Path) -> Path | None:
    found = [path for path in folder.glob("checkpoints/step_*") if path.name[5:].isdigit()
             and (path / ".metadata").is_file()]
    return max(found, key=lambda path: int(path.name[5:]), default=None)


def run_stopped(args: argparse.Namespace, folder: Path) -> Run:
    """The second run, up to its stop."""
    flags = [*args.arguments, *script_flags(args)]
    number, is_kill = getattr(signal, args.stop_by), args.stop_by == "SIGKILL"

    def time_to_stop() -> bool:
        far = bool(run.rows) and run.rows[-1]["step"] >= args.stop_after
        return far and (not is_kill or newest_checkpoint(run.folder) is not None)

    with open_bar(args, "stopped") as bar, started(
            args.script, flags, args.nproc, folder / "resumed", folder / "stopped.log") as run:
        codes = wait(run, bar, until=time_to_stop)
        if codes is None:
            send(run, number)
            codes = wait(run, bar)
        if run.rows and run.rows[-1]["step"] >= args.steps:
            raise CannotTell(f"the run was finished before {args.stop_by} had an effect: its steps are too "
                             f"short for {args.steps}; give --steps {10 * args.steps}")
        if is_kill:
            require(run, [-abs(code) for code in codes], -number, "the run failed before it was killed")
        else:
            require(run, codes, 128 + number, f"the script did not save and end after {args.stop_by}")
    return run


def run_resumed(args: argparse.Namespace, folder: Path, more: list[str]) -> Run:
    """The second run again, by the same command, to its end."""
    flags = [*args.arguments, *more, *script_flags(args)]
    with open_bar(args, "resumed") as bar, started(
            args.script, flags, args.resume_nproc, folder / "resumed", folder / "resumed.log") as run:
        require(run, wait(run, bar), 0, "the resumed run failed")
    return run


# ----------------------------------------------------------------------------------------------------
# 3. Comparing rows of metrics

def by_step(rows: list[dict]) -> dict[int, dict]:
    """{step: {key: value}} without timings; a step may have several rows (evaluation), a later one counts."""
    merged = {}
    for row in rows:
        kept = {key: value for key, value in row.items()
                if not key.startswith(("perf/", "time/")) and not key.endswith("_s")}
        merged.setdefault(row["step"], {}).update(kept)
    return merged


def relative_difference(a: object, b: object) -> float:
    """0 for equal values (nan equals nan), inf where something other than a float differs."""
    if a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)):
        return 0.0
    if not (isinstance(a, float) and isinstance(b, float)) or not math.isfinite(a - b):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def compare_rows(straight: dict[int, dict], other: dict[int, dict], tolerance: float
                 ) -> tuple[list[tuple], float]:
    """[(step, key, value, other value)] of what differs, first step and cause first; largest difference."""
    found, largest = [], 0.0
    for step in sorted(other):
        expected, values = straight.get(step, {}), other[step]
        keys = sorted(expected.keys() | values.keys(), key=lambda key: (
            CAUSES_FIRST.index(key) if key in CAUSES_FIRST else len(CAUSES_FIRST), key))
        for key in keys:
            a, b = expected.get(key, "nothing"), values.get(key, "nothing")
            difference = relative_difference(a, b)
            if difference > tolerance:
                found.append((step, key, a, b))
            else:
                largest = max(largest, difference)
    return found, largest


def describe_rows(differences: list[tuple]) -> str:
    """The first difference in full, then from which step on other quantities differ."""
    step, key, a, b = differences[0]
    first_steps = {}
    for later, name, _, _ in differences:
        first_steps.setdefault(name, later)
    others = [f"{name} from step {first}" for name, first in first_steps.items() if name != key]
    also = f"; also {', '.join(others)}" if others else ""
    return f"step {step}, {key}: {a} straight, {b} then{also}"


# ----------------------------------------------------------------------------------------------------
# 4. Comparing checkpoints, a group of tensors at a time

def read_group(path: Path, saved: dict, names: list[str]) -> dict[str, object]:
    """Whole tensors, and what else was saved as it is, read in this process alone."""
    group = {name: torch.empty(saved[name].size, dtype=saved[name].properties.dtype)
             if isinstance(saved[name], TensorStorageMetadata) else None for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group: none is wanted
        dcp.load(group, checkpoint_id=path, no_dist=True)
    return group


def groups(saved: dict, names: list[str]) -> Iterator[list[str]]:
    group, size = [], 0
    for name in names:
        entry = saved[name]
        is_tensor = isinstance(entry, TensorStorageMetadata)
        nbytes = entry.size.numel() * entry.properties.dtype.itemsize if is_tensor else 0
        if group and size + nbytes > READ_GIB * 2**30:
            yield group
            group, size = [], 0
        group.append(name)
        size += nbytes
    if group:
        yield group


def as_bytes(value: object) -> Tensor:
    """One dimension of uint8, of any dtype: NaNs and negative zeros count as they are."""
    if isinstance(value, Tensor):
        return value.contiguous().reshape(-1).view(torch.uint8)
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def describe_tensors(a: object, b: object) -> str:
    """Where two values differ first, and what stands there."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return f"{a!r:.200} straight, {b!r:.200} resumed"
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype} {tuple(a.shape)} straight, {b.dtype} {tuple(b.shape)} resumed"
    number = int((as_bytes(a) != as_bytes(b)).nonzero()[0]) // a.element_size()
    index = [int(i) for i in torch.unravel_index(torch.tensor(number), a.shape)]
    count = int((a != b).sum())
    return (f"{count:,} of {a.numel():,} elements, the first at {index}: {a[tuple(index)].item()} straight, "
            f"{b[tuple(index)].item()} resumed")


def tensor_difference(a: object, b: object) -> float:
    """0 if all bytes are equal, else the norm of the difference over that of `a`; inf if not comparable."""
    x, y = as_bytes(a), as_bytes(b)
    same_kind = type(a) is type(b) and (not isinstance(a, Tensor) or (a.shape, a.dtype) == (b.shape, b.dtype))
    if same_kind and torch.equal(x, y):
        return 0.0
    if not same_kind or not isinstance(a, Tensor) or not a.is_floating_point():
        return math.inf
    norm, difference = a.double().norm(), (a.double() - b.double()).norm()
    return float(difference / norm) if norm > 0 and math.isfinite(difference) else math.inf


def compare_checkpoints(straight: Path, resumed: Path, tolerance: float, same_nproc: bool) -> dict:
    """{count, differences: [name: where], largest, digest}; the digest is of names, types, shapes and bytes
    of `straight`. Random states belong to a rank: on another number of ranks they are left out."""
    saved_a, saved_b = (dcp.FileSystemReader(path).read_metadata().state_dict_metadata
                        for path in (straight, resumed))
    if not same_nproc:
        saved_a, saved_b = ({name: entry for name, entry in saved.items() if not name.startswith("random.")}
                            for saved in (saved_a, saved_b))
    differences = [f"{name}: only in the {which} run's checkpoint" for which, mine, others in
                   (("straight", saved_a, saved_b), ("resumed", saved_b, saved_a))
                   for name in mine if name not in others]
    digest, largest = hashlib.sha256(), 0.0
    names = [name for name in saved_a if name in saved_b]
    bar = tqdm(total=len(names), desc="comparing", unit="tensor", disable=not sys.stderr.isatty())
    for group in groups(saved_a, names):
        read_a, read_b = read_group(straight, saved_a, group), read_group(resumed, saved_b, group)
        for name in group:
            a, b = read_a[name], read_b[name]
            digest.update(f"{name} {getattr(a, 'dtype', '')} {tuple(getattr(a, 'shape', ()))}\n".encode())
            digest.update(as_bytes(a).numpy())
            difference = tensor_difference(a, b)
            if difference > tolerance:
                differences.append(f"{name}: {describe_tensors(a, b)}")
            else:
                largest = max(largest, difference)
            bar.update()
    bar.close()
    return {"count": len(names), "differences": differences, "largest": largest, "digest": digest.hexdigest()}


# ----------------------------------------------------------------------------------------------------
# 5. Verdict

def is_repeatable(straight: Run, stopped: Run) -> bool:
    """Two starts of the same command: what differs before the stop is no matter of the resume."""
    differences, _ = compare_rows(by_step(straight.rows), by_step(stopped.rows), 0.0)
    if differences:
        print(f"not repeatable: two starts of the same command differ before the stop: "
              f"{describe_rows(differences)}. Look for what is not seeded, Python's hash() of a string, or "
              "GPU kernels that are not deterministic")
    return not differences


def verdict(args: argparse.Namespace, straight: Run, stopped: Run, resumed: Run, resumed_from: int) -> int:
    """Print what was proven, or what differs first; the exit code."""
    expected, after = by_step(straight.rows), by_step(resumed.rows)
    how = f"{args.steps} steps, stopped by {args.stop_by} after step {stopped.rows[-1]['step']}"
    processes = f"{args.resume_nproc} process{'es' * (args.resume_nproc > 1)}"
    how += f", resumed from step {resumed_from} on {processes}"
    wanted = set(range(resumed_from + 1, args.steps + 1))
    if set(after) != wanted:
        missing, extra = (sorted(steps)[:5] for steps in (wanted - set(after), set(after) - wanted))
        what = f"began again with step {min(extra)}" if extra else f"has no rows of steps {missing}"
        print(f"resume is not exact: {how}: the checkpoint holds {resumed_from} steps, and the resumed run "
              f"{what}")
        return 1
    differences, largest = compare_rows(expected, after, args.tolerance)
    same_nproc = args.resume_nproc == args.nproc
    tensors = compare_checkpoints(newest_checkpoint(straight.folder), newest_checkpoint(resumed.folder),
                                  args.tolerance, same_nproc)
    if differences or tensors["differences"]:
        print(f"resume is not exact: {how}")
        if differences:
            print(f"first difference: {describe_rows(differences)}")
        if tensors["differences"]:
            title = "last checkpoint" if differences else "first difference"
            print(f"{title}: {len(tensors['differences'])} of {tensors['count']} tensors, the first is "
                  f"{tensors['differences'][0]}")
        if not same_nproc:
            print(f"These are above --tolerance {args.tolerance:g}. On another number of processes bf16 "
                  "rounds and dropout draws otherwise: try --no-mixed-precision behind the script, or "
                  "--tolerance 3e-2")
        return 1
    largest = max(largest, tensors["largest"])
    result = f"within {largest:.1e} relative" if largest else "bitwise"
    print(f"resume proven: {how}: {result} ({len(after)} steps' values; {tensors['count']} tensors, sha256 "
          f"{tensors['digest'][:16]})")
    return 0


def prove(args: argparse.Namespace, folder: Path) -> int:
    straight, more = run_straight(args, folder)
    if more:
        print(f"{args.resume_nproc} instead of {args.nproc} processes: resumed with {' '.join(more)}")
    stopped = run_stopped(args, folder)
    if not is_repeatable(straight, stopped):
        return 1
    checkpoint = newest_checkpoint(stopped.folder)
    if checkpoint is None:
        raise CannotTell(f"the run ended after {args.stop_by} as it should, but left no checkpoint")
    resumed = run_resumed(args, folder, more)
    return verdict(args, straight, stopped, resumed, int(checkpoint.name[5:]))


def main() -> None:
    args = parse_args(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes started here end, too
    try:
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
            sys.exit(prove(args, args.keep))
        with tempfile.TemporaryDirectory(prefix="verify_resume-") as name:
            sys.exit(prove(args, Path(name)))
    except CannotTell as error:
        sys.exit(f"verify_resume.py: error: {error}")


if __name__ == "__main__":
    main()
