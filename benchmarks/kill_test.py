"""One training that is killed again and again, and must end as if nobody had touched it.

    python benchmarks/kill_test.py                              # 100 kills, about 20 minutes on 2 cores
    python benchmarks/kill_test.py --kills 20 --target rank --restart-by torchrun

A small model trains on 2 CPU processes and saves in the background every few steps. SIGKILL ends one rank,
all processes, or the launcher alone, while they start, while they save, or in a step, chosen by chance. Then
the same command starts the training again, as a user or a supervisor would (after the launcher's death half
the time at once, while its ranks still end). With --restart-by torchrun a killed rank is brought back by
torchrun (PET_MAX_RESTARTS), and nothing here starts anything.

After every kill: all tensors of each published checkpoint can be read; no process is left; the training goes
on with the step after the newest checkpoint, at most two intervals back (one, and the steps during the save
that the kill interrupted). Each row of metrics, and at the end every tensor of the last checkpoint, equals
the straight run's to the last bit.

Writes report.json and report.md into --folder. Needs the psutil package. Exit codes: 0 all of this holds, 1
it does not (the folder shows what was found), 2 wrong arguments.
"""

import argparse
import heapq
import inspect
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import textwrap
import time
import typing
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from verify_resume import by_step, compare_checkpoints, compare_rows, describe_rows, read_group  # noqa: E402

INTERVAL = 10  # steps between checkpoints; a step takes about 30 ms, a save about 100 ms
TARGETS = {"rank": 0.5, "all": 0.25, "launcher": 0.25}  # of the mixed kills
MOMENTS = {"start": 0.2, "save": 0.45, "step": 0.35}
MARKER = "KILL_TEST_RUN"  # in the environment of every process of a start, whoever its parent is by now
STEP_FOLDER = re.compile(r"step_\d+")


class Broken(Exception):
    """What must hold does not: shown as one line, exit code 1."""


@dataclass
class Job:
    """One start of the training."""
    process: subprocess.Popen
    marker: str
    started: float
    log: Path


@dataclass
class Kill:
    """What is known of one kill; written to report.json."""
    number: int
    target: str
    moment: str
    step: int = 0  # logged last before it
    saving: bool = False  # a save was in progress: its .partial folder existed
    cut: bool = False  # a save, of then or begun by what still lived, was left behind unfinished
    checkpoints: int = 0  # published afterwards, and read
    newest: int = 0  # step of the newest checkpoint afterwards
    at_s: float = 0.0  # since this program's start
    end_s: float = 0.0  # until the last process that had to end was gone
    checks_s: float = 0.0  # of this program, while nothing ran
    lost_s: float = 0.0  # until the next step was done, or the next kill came, and for steps done twice


@dataclass
class State:
    """The training under test, over all its starts."""
    args: argparse.Namespace
    folder: Path
    rng: random.Random
    command: list[str]
    straight: dict[int, dict]  # the rows of the straight run
    offset: int = 0  # read of metrics.jsonl
    step: int = 0  # logged last
    rows_of_start: int = 0  # logged since the present start or the last kill
    expected: int = 0  # the step before the next row
    step_s: list[float] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)


# ----------------------------------------------------------------------------------------------------
# 1. Arguments

def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kill_test.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of targets and moments")
    parser.add_argument("--target", choices=["mixed", *TARGETS], default="mixed")
    parser.add_argument("--restart-by", choices=["user", "torchrun"], default="user",
                        help="torchrun: with --target rank only")
    parser.add_argument("--steps", type=int, help="of the training; default: 10 for each kill, at least 100")
    parser.add_argument("--script", type=Path, default=ROOT / "train_llm.py", help="or an edited copy of it")
    parser.add_argument("--folder", type=Path, default=Path("runs/kill_test"), help="new folder of it all")
    args = parser.parse_args(argv)
    if args.kills < 1:
        parser.error("--kills must be at least 1")
    if args.restart_by == "torchrun" and args.target != "rank":
        parser.error("--restart-by torchrun needs --target rank: the launcher must live to restart it")
    if not args.script.is_file():
        parser.error(f"there is no script {args.script}")
    if args.folder.exists() and any(args.folder.iterdir()):
        parser.error(f"--folder {args.folder} already holds something: name a new folder")
    args.steps = args.steps or max(100, 10 * args.kills)
    if args.steps < 3 * INTERVAL:
        parser.error(f"--steps must be at least {3 * INTERVAL}")
    return args


def training_command(args: argparse.Namespace, run_dir: Path) -> list[str]:
    data = args.folder / "data.jsonl"
    if not data.exists():
        rows = [{"text": inspect.getsource(module)} for module in (argparse, heapq, json, textwrap, typing)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tool = [sys.executable, str(ROOT / "tools/make_stdlib_data.py"), "--folder", str(args.folder)]
        subprocess.run([*tool, "--vocab-size", "512"], check=True, stdout=subprocess.DEVNULL)
    flags = {
        "--nproc": 2, "--model-size": "test", "--tokenizer": args.folder / "stdlib_tokenizer",
        "--dataset": data, "--seq-len": 64,
        "--batch-size": 8, "--device": "cpu", "--data-cache": args.folder / "data_cache",
        "--max-steps": args.steps, "--warmup-steps": 10, "--checkpoint-interval": INTERVAL,
        "--log-interval": 1, "--checkpoint-dir": run_dir,
    }
    if args.restart_by == "torchrun":
        os.environ |= {"PET_MAX_RESTARTS": str(args.kills), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    words = [str(word) for pair in flags.items() for word in pair]
    return [sys.executable, str(args.script), "--from-scratch", "--no-mixed-precision",
            "--no-compile", "--no-export", *words]


# ----------------------------------------------------------------------------------------------------
# 2. Processes

def start(command: list[str], log: Path) -> Job:
    marker = uuid.uuid4().hex
    env = os.environ | {MARKER: marker, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("a") as output:
        output.write(f"\n=== start {marker}\n")
        output.flush()
        process = subprocess.Popen(command, env=env, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
                                   start_new_session=True)
    return Job(process, marker, time.monotonic(), log)


def processes_of(job: Job) -> list[psutil.Process]:
    """Every living process with this start's marker, also one whose parent is gone."""
    found = []
    for process in psutil.process_iter():
        try:
            is_ours = process.environ().get(MARKER) == job.marker
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):  # gone, or another user's
            continue
    return found


def ranks_of(job: Job) -> dict[int, psutil.Process]:
    """The launcher's children that are ranks, by number; it gives them their number in the environment."""
    ranks = {}
    try:
        for process in psutil.Process(job.process.pid).children():
            number = process.environ().get("LOCAL_RANK")
            if number is not None:
                ranks[int(number)] = process
    except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
        pass  # one ended meanwhile: the next look shows
    return ranks


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_all(job: Job) -> None:
    for process in processes_of(job):
        process.kill()
    job.process.wait()


def kill(state: State, job: Job, record: Kill) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """SIGKILL; returns the processes that must end because of it, and rank 0, if there was one."""
    everybody, ranks = processes_of(job), ranks_of(job)
    if record.target == "rank":
        victims = [state.rng.choice(list(ranks.values()))]
    elif record.target == "launcher":
        victims = [psutil.Process(job.process.pid)]
    else:
        victims = state.rng.sample(everybody, len(everybody))
    record.saving, record.at_s = is_saving(state.folder), time.monotonic()
    for process in victims:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass  # ended a moment ago, because of the one before
    must_end = list(ranks.values()) if state.args.restart_by == "torchrun" else everybody
    return must_end, [ranks[0]] if 0 in ranks else []


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Raises Broken."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise Broken(f"{what} after {seconds:.0f} s")
        time.sleep(0.02)


# ----------------------------------------------------------------------------------------------------
# 3. What the run shows

def look(state: State) -> None:
    """Take in new rows of metrics.jsonl: each equals the straight run's, and follows the one before."""
    path = state.folder / "metrics.jsonl"
    if not path.is_file():
        return
    with path.open("rb") as file:
        file.seek(state.offset)
        text = file.read()
    text = text[:text.rfind(b"\n") + 1]
    state.offset += len(text)
    for line in text.splitlines():
        row = json.loads(line)
        if row["step"] != state.expected + 1:
            raise Broken(f"a row of step {row['step']} where that of step {state.expected + 1} was due")
        differences, _ = compare_rows(state.straight, by_step([row]), 0.0)
        if differences:
            raise Broken(f"not the straight run: {describe_rows(differences)}")
        state.rows_of_start += 1
        count_loss(state)
        state.step = state.expected = row["step"]
        state.step_s.append(row["time/step_s"])


def count_loss(state: State) -> None:
    """What the last kill has cost; called when the next step is done, or the next kill is due."""
    if state.kills and not state.kills[-1].lost_s:
        last = state.kills[-1]
        repeated_s = (last.step - last.newest) * statistics.median(state.step_s or [0.0])
        last.lost_s = time.monotonic() - last.at_s - last.checks_s + repeated_s


def published(folder: Path) -> list[Path]:
    """All folders that bear a published checkpoint's name, oldest first."""
    found = [path for path in folder.glob("checkpoints/*") if STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def newest_step(folder: Path) -> int:
    return max((int(path.name[5:]) for path in published(folder)), default=0)


def is_saving(folder: Path) -> bool:
    return any(folder.glob("checkpoints/*.partial"))


def verify_checkpoint(path: Path) -> None:
    """Reads all its tensors. Raises Broken, if it is still there."""
    import torch.distributed.checkpoint as dcp
    try:
        saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        if len(read_group(path, saved, list(saved))) < 10:
            raise Broken(f"{path}: hardly any tensors in it")
    except (OSError, ValueError, RuntimeError, dcp.CheckpointException) as error:
        if path.exists():  # else a run that goes on has just removed it, as the oldest one
            raise Broken(f"{path}: {type(error).__name__}: {error}") from error


def check_after(state: State, record: Kill) -> None:
    """Checkpoints are whole, and the newest is not far behind."""
    found = published(state.folder)
    for path in found:
        verify_checkpoint(path)
    record.checkpoints = len(found)
    record.cut = is_saving(state.folder)
    if record.step - record.newest >= 2 * INTERVAL:
        raise Broken(f"killed after step {record.step}, but the newest checkpoint is of step {record.newest}")


# ----------------------------------------------------------------------------------------------------
# 4. The test

def draw_plan(args: argparse.Namespace, rng: random.Random) -> list[Kill]:
    """Targets and moments of all kills, so that the same seed means the same plan, whatever the timing."""
    plan = []
    for number in range(1, args.kills + 1):
        [target] = rng.choices(list(TARGETS), TARGETS.values())
        [moment] = rng.choices(list(MOMENTS), MOMENTS.values())
        plan.append(Kill(number, target if args.target == "mixed" else args.target, moment))
    return plan


def moment_has_come(state: State, job: Job, record: Kill) -> Callable[[], bool]:
    """When to kill, drawn by chance: a function that says so."""
    rng, seen = state.rng, []
    if record.moment == "start":
        # For a rank the delay counts from the moment that there is one.
        delay = rng.uniform(0.0, 3.0) if record.target == "rank" else rng.uniform(0.1, 6.0)

        def has_started() -> bool:
            if not seen and (record.target != "rank" or ranks_of(job)):
                seen.append(time.monotonic())
            return state.rows_of_start > 0 or bool(seen) and time.monotonic() - seen[0] > delay
        return has_started
    # Near the end of the steps no kill may come later than the next checkpoint, or they would not last.
    is_short = state.args.steps - state.expected < 4 * INTERVAL
    if record.moment == "step" or is_short:
        rows = rng.randint(1, INTERVAL // 2 if is_short else 2 * INTERVAL)
        return lambda: state.rows_of_start >= rows
    rows, wait_s = rng.randint(1, INTERVAL), rng.uniform(0, 0.12)

    def is_in_a_save() -> bool:
        if not seen and state.rows_of_start >= rows and is_saving(state.folder):
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() - seen[0] >= wait_s
    return is_in_a_save


def await_moment(state: State, job: Job, record: Kill) -> None:
    has_come, began = moment_has_come(state, job, record), time.monotonic()
    while not has_come() or record.target == "rank" and not ranks_of(job):
        look(state)
        if job.process.poll() is not None:
            raise Broken(f"the training ended by itself with exit code {job.process.returncode} after step "
                         f"{state.step}, before kill {record.number}; see {job.log}")
        if time.monotonic() - began > 300:
            raise Broken(f"no step in 300 s after step {state.step}; see {job.log}")
        time.sleep(0.002)


def kill_once(state: State, job: Job, record: Kill) -> Job:
    """Wait for the moment, kill, see how it ends, check what is left; returns the job that goes on."""
    await_moment(state, job, record)
    count_loss(state)
    must_end, writer = kill(state, job, record)
    at_once = state.args.restart_by == "user" and record.target == "launcher" and state.rng.random() < 0.5
    following = start(state.command, job.log) if at_once else job
    try:
        by_torchrun = state.args.restart_by == "torchrun"
        gone = (lambda: not any(map(is_alive, must_end))) if by_torchrun else lambda: not processes_of(job)
        left = f"kill {record.number} of {record.target}: processes of the training are left"
        # Rank 0 alone writes rows and publishes, and the next start waits for its end: what stands there now
        # is the killed job's, even while another one is starting and other ranks are still ending.
        wait_until(lambda: not any(map(is_alive, writer)), 60, left)
        look(state)
        record.step, state.rows_of_start = state.step, 0
        record.newest = state.expected = newest_step(state.folder)
        wait_until(gone, 60, left)
        record.end_s = time.monotonic() - record.at_s
        checks_began = time.monotonic()
        check_after(state, record)
        if not by_torchrun and job.process.wait() == 0:
            raise Broken(f"kill {record.number} of {record.target}: the launcher ended with exit code 0")
        if following is job and not by_torchrun:
            record.checks_s = time.monotonic() - checks_began
            following = start(state.command, job.log)
    except Broken:
        for left in (job, following):
            end_all(left)
        raise
    following.started = time.monotonic()
    state.kills.append(record)
    return following


def run_straight(args: argparse.Namespace) -> float:
    """The run that nobody kills; its seconds."""
    job = start(training_command(args, args.folder / "straight"), args.folder / "straight.log")
    try:
        if job.process.wait() != 0:
            raise Broken(f"the straight run failed: see {job.log}")
    finally:
        end_all(job)
    return time.monotonic() - job.started


def run_killed(state: State, plan: list[Kill]) -> float:
    """All kills, then to the end; the seconds of it."""
    began = time.monotonic()
    job = start(state.command, state.args.folder / "killed.log")
    try:
        for record in tqdm(plan, desc="kills", disable=not sys.stderr.isatty()):
            job = kill_once(state, job, record)
        while job.process.poll() is None:
            look(state)
            time.sleep(0.02)
        look(state)
        if job.process.returncode != 0 or state.step != state.args.steps:
            raise Broken(f"the last start ended with exit code {job.process.returncode} after step "
                         f"{state.step}; see {job.log}")
        if processes_of(job):
            raise Broken("the training has ended, but processes of it are left")
    finally:
        end_all(job)
    return time.monotonic() - began


def check_end(args: argparse.Namespace, state: State) -> str:
    """The last checkpoint is the straight run's to the bit; its sha256."""
    for path in published(state.folder):
        verify_checkpoint(path)
    if is_saving(state.folder):
        raise Broken("a .partial folder is left at the end")
    last = f"checkpoints/step_{args.steps:06d}"
    result = compare_checkpoints(args.folder / "straight" / last, state.folder / last, 0.0, same_nproc=True)
    if result["differences"]:
        raise Broken(f"last checkpoint: {len(result['differences'])} of {result['count']} tensors differ, "
                     f"the first is {result['differences'][0]}")
    return result["digest"]


# ----------------------------------------------------------------------------------------------------
# 5. Report

def figures(kills: list[Kill]) -> dict[str, float]:
    lost, ends = [k.lost_s for k in kills], [k.end_s for k in kills]
    repeated = [k.step - k.newest for k in kills]
    return {
        "kills": len(kills), "saving": sum(k.saving or k.cut for k in kills),
        "cut": sum(k.cut for k in kills),
        "end_median_s": statistics.median(ends), "end_max_s": max(ends),
        "repeated_mean_steps": statistics.mean(repeated), "repeated_max_steps": max(repeated),
        "lost_mean_s": statistics.mean(lost), "lost_median_s": statistics.median(lost),
        "lost_max_s": max(lost), "lost_sum_s": sum(lost),
    }


def markdown(summary: dict) -> str:
    lines = ["| killed | kills | hit a save | and cut it | s until all had ended, median (max) | steps done "
             "twice, mean (max) | s lost, mean | median | max |", "|---|" + "---:|" * 8]
    for name, f in summary["by_target"].items():
        lines.append(
            f"| {name} | {f['kills']} | {f['saving']} | {f['cut']} | {f['end_median_s']:.1f} "
            f"({f['end_max_s']:.1f}) | {f['repeated_mean_steps']:.1f} ({f['repeated_max_steps']}) | "
            f"{f['lost_mean_s']:.1f} | {f['lost_median_s']:.1f} | {f['lost_max_s']:.1f} |")
    lines.append(
        f"\n{summary['steps']} steps of {summary['step_ms']:.0f} ms, saved every {INTERVAL}; restarted by "
        f"{summary['restart_by']}; seed {summary['seed']}. {summary['straight_s']:.0f} s straight, "
        f"{summary['killed_s']:.0f} s with the kills, {summary['by_target']['total']['lost_sum_s']:.0f} s of "
        f"them lost. All published checkpoints were read after each kill ({summary['checks']} readings); all "
        f"rows and the last checkpoint (sha256 {summary['sha256'][:16]}) are the straight run's to the bit.")
    return "\n".join(lines)


def summarise(state: State, straight_s: float, killed_s: float, digest: str) -> dict:
    args, kills = state.args, state.kills
    targets = {name: [k for k in kills if k.target == name] for name in TARGETS}
    moments = {name: [k for k in kills if k.moment == name] for name in MOMENTS}
    return {
        "steps": args.steps, "seed": args.seed, "restart_by": args.restart_by, "straight_s": straight_s,
        "killed_s": killed_s, "step_ms": 1000 * statistics.median(state.step_s), "sha256": digest,
        "checks": sum(k.checkpoints for k in kills),
        "by_target": {name: figures(found) for name, found in (targets | {"total": kills}).items() if found},
        "by_moment": {name: figures(found) for name, found in moments.items() if found},
        "kills": [asdict(k) for k in kills],
    }


def main() -> None:
    args = parse_args(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the training ends, too
    args.folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    plan = draw_plan(args, rng)
    try:
        straight_s = run_straight(args)
        text = (args.folder / "straight/metrics.jsonl").read_text()
        straight = by_step([json.loads(line) for line in text.splitlines()])
        run_dir = args.folder / "killed"
        state = State(args, run_dir, rng, training_command(args, run_dir), straight)
        killed_s = run_killed(state, plan)
        summary = summarise(state, straight_s, killed_s, check_end(args, state))
    except Broken as error:
        sys.exit(f"kill_test.py: error: {error} (--seed {args.seed}, {args.folder})")
    (args.folder / "report.json").write_text(json.dumps(summary, indent=1) + "\n")
    (args.folder / "report.md").write_text(markdown(summary) + "\n")
    print(markdown(summary))


if __name__ == "__main__":
    main()
