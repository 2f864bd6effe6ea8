"""Prove for your script, arguments and machine that stopping and resuming changes nothing.

    python tools/verify_resume.py train_llm.py --hf-model MODEL --dataset my_texts.jsonl
    python tools/verify_resume.py --steps 40 --stop-by SIGKILL my_copy.py --config my.yaml
    python tools/verify_resume.py --nproc 2 --resume-nproc 1 train_llm.py --hf-model MODEL --dataset my.jsonl

Flags in front of the script are this program's, those behind it the script's. It runs --steps steps straight;
runs them again, stops that run in the middle and resumes it; then it compares every logged value but the
timings, and every tensor of the last checkpoint: weights, optimizer, random states. On the same number of
processes all must agree to the last bit, on another one within --tolerance (dropout differs there). What a
script keeps neither in metrics.jsonl nor in its checkpoints is not seen. Works with each training script here
and with edited copies; the processes are started without torchrun. Needs room for about 5 checkpoints.

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

import user_script  # noqa: F401  (before torch: it finds a Python that has it)

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

READ_AT_ONCE = 8  # tensors: each read parses the checkpoint's whole index
OWN_FLAGS = ("--max-steps", "--nproc", "--gpu-ranks", "--checkpoint-dir", "--resume", "--no-export")


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
    parser.add_argument("--stop-by", choices=["SIGTERM", "SIGINT", "SIGUSR1", "SIGKILL"], default="SIGTERM",
                        help="default SIGTERM; SIGKILL leaves the run no time to save")
    parser.add_argument("--nproc", type=int, metavar="N", help="processes; default: one per GPU, else 1")
    parser.add_argument("--resume-nproc", type=int, metavar="N", help="processes of the resumed run; "
                        "--batch-size and --grad-accum-steps are adapted; default: as many")
    parser.add_argument("--tolerance", type=float, metavar="X", help="largest relative difference; default "
                        "0, with another --resume-nproc 1e-3 (bf16 needs about 3e-2 there)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="new folder in which both runs stay")
    parser.add_argument("script", type=Path, help="train_llm.py or a copy")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own")
    args = parser.parse_args(argv)
    own = [word for word in args.arguments if word.split("=")[0] in OWN_FLAGS]
    if own:
        parser.error(f"{', '.join(own)} behind the script: leave out what this program sets by itself")
    if not args.script.is_file():
        parser.error(f"there is no script {args.script}")
    if args.steps < 6:  # it is stopped in the middle, and may do two more steps before it obeys
        parser.error("--steps must be at least 6")
    if args.keep and args.keep.exists() and (not args.keep.is_dir() or any(args.keep.iterdir())):
        parser.error(f"--keep {args.keep} already holds something: name a new folder")
    on_cpu = re.search(r"--device[= ]cpu\b", " ".join(args.arguments))
    args.nproc = args.nproc or (1 if on_cpu else max(1, torch.cuda.device_count()))
    args.resume_nproc = args.resume_nproc or args.nproc
    if min(args.nproc, args.resume_nproc) < 1:
        parser.error("--nproc and --resume-nproc must be at least 1")
    if args.tolerance is None:
        args.tolerance = 0.0 if args.resume_nproc == args.nproc else 1e-3
    return args


def script_flags(args: argparse.Namespace) -> list[str]:
    """What both runs get behind the user's arguments, so that it also wins over a --config file."""
    # Often enough that one checkpoint is complete by the SIGKILL even where it is written slowly.
    interval = max(1, args.steps // 6) if args.stop_by == "SIGKILL" else args.steps
    return ["--max-steps", str(args.steps), "--checkpoint-interval", str(interval), "--keep-checkpoints", "2",
            "--log-interval", "1", "--no-export", "--deterministic"]


def flags_for(nproc: int, resume_nproc: int, run_dir: Path) -> list[str]:
    """--batch-size and --grad-accum-steps with which another number of processes takes the same samples."""
    if nproc == resume_nproc:
        return []
    import yaml
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    if config.get("streaming"):
        raise CannotTell("--streaming resumes exactly on the same number of processes only")
    samples = config["batch_size"] * config["grad_accum_steps"] * nproc
    if samples % resume_nproc:
        raise CannotTell(f"a step's {samples} sequences cannot be divided among {resume_nproc} processes")
    share = samples // resume_nproc
    batch_size = max(size for size in range(1, config["batch_size"] + 1) if share % size == 0)
    return ["--batch-size", str(batch_size), "--grad-accum-steps", str(share // batch_size)]


# ----------------------------------------------------------------------------------------------------
# 2. Runs

@contextlib.contextmanager
def started(script: Path, arguments: list[str], nproc: int, folder: Path, log: Path) -> Iterator[Run]:
    """The script on `nproc` processes of this machine; whatever happens, none of them outlives the block."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    threads = max(1, (os.cpu_count() or 1) // nproc)
    common = {"OMP_NUM_THREADS": str(threads)} | os.environ | {
        "WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port}
    command = [sys.executable, str(script), *arguments, "--checkpoint-dir", str(folder)]
    print(f"starts {script} on {nproc} process(es); its output goes to {log}", flush=True)
    run = Run(folder, log)
    read_new_rows(run)
    run.rows.clear()  # what earlier starts wrote is theirs
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
    kill = os.killpg if number == signal.SIGKILL else os.kill
    for process in run.processes:
        with contextlib.suppress(ProcessLookupError):
            if process.poll() is None:  # else its number may be another's by now
                kill(process.pid, number)


def read_new_rows(run: Run) -> None:
    """Takes in the whole lines that metrics.jsonl has got since the last call."""
    with contextlib.suppress(FileNotFoundError), (run.folder / "metrics.jsonl").open("rb") as file:
        file.seek(run.offset)
        text = file.read()
        text = text[:text.rfind(b"\n") + 1]
        run.offset += len(text)
        run.rows += [json.loads(line) for line in text.splitlines()]


def wait(run: Run, until: Callable[[], bool] = lambda: False) -> list[int] | None:
    """Follow a run until `until()`, then None, or to its end: the processes' exit codes.

    A process that fails while others go on ends them all, after the seconds that they may need to say why."""
    failed_at = None
    while True:
        ended = [process.poll() for process in run.processes]
        read_new_rows(run)
        if None not in ended:
            return ended
        if until():
            return None
        if failed_at is None and any(ended):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() > failed_at + 60:
            send(run, signal.SIGKILL)
        time.sleep(0.002)  # steps may take few milliseconds, and the stop should hit the middle


def require(run: Run, codes: list[int], wanted: int, what: str) -> None:
    """Rank 0's exit code is `wanted`, the others' that or 0."""
    if codes[0] == wanted and all(code in (0, wanted) for code in codes):
        return
    tail = "\n".join(run.log.read_text(errors="replace").splitlines()[-15:])
    raise CannotTell(f"{what} (exit codes {codes}, wanted {wanted}). The end of what it printed:\n{tail}")


def newest_checkpoint(folder: Path) -> Path | None:
    complete = folder.glob("checkpoints/step_*[0-9]/.metadata")
    return max((path.parent for path in complete), default=None)


def run_stopped(args: argparse.Namespace, flags: list[str], folder: Path) -> Run:
    """The second run, up to its stop."""
    number, is_kill = getattr(signal, args.stop_by), args.stop_by == "SIGKILL"
    with started(args.script, flags, args.nproc, folder / "resumed", folder / "stopped.log") as run:
        codes = wait(run, until=lambda: bool(run.rows) and run.rows[-1]["step"] >= args.steps // 2
                     and (not is_kill or newest_checkpoint(run.folder) is not None))
        if codes is None:
            send(run, number)
            codes = wait(run)
        if run.rows and run.rows[-1]["step"] >= args.steps:
            raise CannotTell(f"the run finished before {args.stop_by} had an effect: use more --steps")
        require(run, codes, -number if is_kill else 128 + number, f"no save and end after {args.stop_by}")
    return run


# ----------------------------------------------------------------------------------------------------
# 3. Comparing rows of metrics

def by_step(rows: list[dict], evaluations: bool = False) -> dict[int, dict]:
    """{step: {key: value}} of the training's rows, or of the evaluations', without timings; of several rows
    of a step the last one counts."""
    return {row["step"]: {key: value for key, value in row.items()
                          if not key.startswith(("perf/", "time/")) and not key.endswith("_s")}
            for row in rows if ("samples" not in row) == evaluations}


def relative_difference(a: object, b: object) -> float:
    """0 for equal values (nan equals nan), inf where something other than a float differs."""
    if a == b or (a != a and b != b):
        return 0.0
    if not (isinstance(a, float) and isinstance(b, float)) or not math.isfinite(a - b):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def compare_rows(straight: dict, other: dict, tolerance: float) -> tuple[list[tuple], float]:
    """[(step, key, value, other value)] of what differs, step by step in the rows' order; largest difference
    of the rest."""
    found, largest = [], 0.0
    for step in sorted(other):
        expected, values = straight.get(step, {}), other[step]
        for key in [*expected, *(key for key in values if key not in expected)]:
            a, b = expected.get(key, "nothing"), values.get(key, "nothing")
            difference = relative_difference(a, b)
            if difference > tolerance:
                found.append((step, key, a, b))
            else:
                largest = max(largest, difference)
    return found, largest


def describe_rows(differences: list[tuple]) -> str:
    """The first difference in full, and the names of the other quantities that differ."""
    step, key, a, b = differences[0]
    others = sorted({name for _, name, _, _ in differences} - {key})
    return f"step {step}, {key}: {a} straight, {b} then" + (f"; also {', '.join(others)}" if others else "")


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


def as_bytes(value: object) -> Tensor:
    """One dimension of uint8, of any dtype: NaNs and negative zeros count as they are."""
    if isinstance(value, Tensor):
        return value.contiguous().reshape(-1).view(torch.uint8)
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def tensor_difference(a: object, b: object) -> tuple[float, str]:
    """(0 if all bytes are equal, else the norm of the difference over that of `a`, inf if not comparable;
    what differs)."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        is_equal = type(a) is type(b) and torch.equal(as_bytes(a), as_bytes(b))
        return 0.0 if is_equal else math.inf, f"{a!r:.200} straight, {b!r:.200} resumed"
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return math.inf, f"{a.dtype} {tuple(a.shape)} straight, {b.dtype} {tuple(b.shape)} resumed"
    if torch.equal(as_bytes(a), as_bytes(b)):
        return 0.0, ""
    gap = a.double() - b.double()
    text = f"{int((a != b).sum()):,} of {a.numel():,} elements differ, at most by {gap.abs().max():.3g}"
    relative = float(gap.norm() / a.double().norm()) if a.is_floating_point() else math.inf
    # The smallest number where only the sign of a zero differs.
    return (relative or math.ulp(0.0)) if math.isfinite(relative) else math.inf, text


def compare_checkpoints(straight: Path, resumed: Path, tolerance: float, same_nproc: bool) -> dict:
    """{count, differences: [name: what], largest, digest}; the digest is the sha256 of `straight`. Random
    states belong to a rank: on another number of ranks they are left out."""
    saved_a, saved_b = (dcp.FileSystemReader(path).read_metadata().state_dict_metadata
                        for path in (straight, resumed))
    either = [name for name in saved_a | saved_b if same_nproc or not name.startswith("random.")]
    names = [name for name in either if name in saved_a and name in saved_b]
    differences = [f"{name}: in one checkpoint only" for name in set(either) - set(names)]
    digest, largest = hashlib.sha256(), 0.0
    for start in range(0, len(names), READ_AT_ONCE):
        group = names[start:start + READ_AT_ONCE]
        read_a, read_b = read_group(straight, saved_a, group), read_group(resumed, saved_b, group)
        for name in group:
            digest.update(name.encode() + as_bytes(read_a[name]).numpy().tobytes())
            difference, text = tensor_difference(read_a[name], read_b[name])
            if difference > tolerance:
                differences.append(f"{name}: {text}")
            else:
                largest = max(largest, difference)
    return {"count": len(names), "differences": differences, "largest": largest, "digest": digest.hexdigest()}


# ----------------------------------------------------------------------------------------------------
# 5. Verdict

def compare_runs(straight: Run, stopped: Run, resumed: Run, tolerance: float) -> tuple[list[tuple], float]:
    """As compare_rows: of the training what follows the resume; the evaluations of both starts, because that
    of the step of the stop may be made before the stop, after the resume, or twice."""
    found, largest = compare_rows(by_step(straight.rows), by_step(resumed.rows), tolerance)
    expected, then = by_step(straight.rows, True), by_step(stopped.rows + resumed.rows, True)
    then = {step: then.get(step, {}) for step in expected.keys() | then.keys()}
    more, largest_more = compare_rows(expected, then, tolerance)
    return found + more, max(largest, largest_more)


def verdict(args: argparse.Namespace, straight: Run, stopped: Run, resumed: Run, resumed_from: int) -> int:
    """Print what was proven, or what differs first; the exit code."""
    how = f"{args.steps} steps, stopped by {args.stop_by} after step {max(by_step(stopped.rows))}"
    how += f", resumed from step {resumed_from} on {args.resume_nproc} process(es)"
    steps = list(by_step(resumed.rows))
    if steps != list(range(resumed_from + 1, args.steps + 1)):
        print(f"resume is not exact: {how}: the resumed run has rows of steps {steps[:5]} and on")
        return 1
    differences, largest = compare_runs(straight, stopped, resumed, args.tolerance)
    same_nproc = args.resume_nproc == args.nproc
    tensors = compare_checkpoints(newest_checkpoint(straight.folder), newest_checkpoint(resumed.folder),
                                  args.tolerance, same_nproc)
    if differences or tensors["differences"]:
        print(f"resume is not exact: {how}")
        if differences:
            print(f"first difference: {describe_rows(differences)}")
        if found := tensors["differences"]:
            print(f"last checkpoint: {len(found)} of {tensors['count']} tensors, the first is {found[0]}")
        if not same_nproc:
            print("On another number of processes bf16 rounds and dropout draws otherwise: try "
                  "--no-mixed-precision behind the script, or --tolerance 3e-2 in front of it")
        return 1
    largest = max(largest, tensors["largest"])
    result = f"within {largest:.1e} relative" if largest else "bitwise"
    print(f"resume proven: {how}: {result} ({len(steps)} steps' values; {tensors['count']} tensors, "
          f"sha256 {tensors['digest'][:16]})")
    return 0


def prove(args: argparse.Namespace, folder: Path) -> int:
    flags = [*args.arguments, *script_flags(args)]
    with started(args.script, flags, args.nproc, folder / "straight", folder / "straight.log") as straight:
        require(straight, wait(straight), 0, "the straight run failed")
    more = flags_for(args.nproc, args.resume_nproc, straight.folder)
    if more:
        print(f"{args.resume_nproc} instead of {args.nproc} processes: resumed with {' '.join(more)}")
    stopped = run_stopped(args, flags, folder)
    # What differs before the stop is no matter of the resume.
    differences, _ = compare_rows(by_step(straight.rows), by_step(stopped.rows), 0.0)
    if differences:
        print("not repeatable: two starts of the same command differ before the stop: "
              f"{describe_rows(differences)}. Is a random state not seeded, or Python's hash() used?")
        return 1
    checkpoint = newest_checkpoint(stopped.folder)
    if checkpoint is None:
        raise CannotTell(f"the run ended after {args.stop_by} as it should, but left no checkpoint")
    flags = [*args.arguments, *more, *script_flags(args)]
    with started(args.script, flags, args.resume_nproc, folder / "resumed", folder / "resumed.log") as run:
        require(run, wait(run), 0, "the resumed run failed")
    return verdict(args, straight, stopped, run, int(checkpoint.name[5:]))


def main() -> None:
    args = parse_args(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes started here end, too
    try:
        with tempfile.TemporaryDirectory(prefix="verify_resume-") as temporary:
            folder = args.keep or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            sys.exit(prove(args, folder))
    except CannotTell as error:
        sys.exit(f"verify_resume.py: error: {error}")


if __name__ == "__main__":
    main()
