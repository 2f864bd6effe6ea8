"""What happens to a run on a cluster, done to real runs: signals, dead ranks, full disks, damaged files.

Most runs are of a copy of the script that executes the text of AT_STEP at the end of each step, in the loop,
so that a fault comes at an exact moment. Each test says what the user sees and checks that nothing is lost:
where a run goes on, its weights and optimizer states are those of a run without the fault, bit for bit.

    FAULT_TABLE=faults.md bash tests/run.sh tests/test_survival.py

also writes the README's table of faults, what the user sees, and seconds from the fault until it is seen.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import cluster_runs
import psutil
import pytest
from cluster_runs import STEPS, assert_same_bits, assert_same_state
from helpers import mounted, read_metrics, run_script
from quick_runs import free_port, quick_run, quick_runs

import train_llm

slow = pytest.mark.slow
# In front of AT_STEP: lets it note when the fault comes.
STRIKE = "strike = lambda: Path(os.environ['STRUCK']).write_text(repr(time.time()))\n"


# ----------------------------------------------------------------------------------------------------
# 1. Runs

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tokenizer, texts and the script that can be prodded."""
    return cluster_runs.prepare(tmp_path_factory.mktemp("survival"))


def flags_for(place, run_dir, *more, nproc=2):
    return cluster_runs.flags_for(place, run_dir, nproc, "--keep-checkpoints", "0", *more)


def prod(place, run_dir, *more, at_step="", code=0, nproc=2, env=None):
    """A run of the copy on `nproc` ranks; returns their results."""
    envs = [{"AT_STEP": STRIKE + at_step, "STRUCK": str(run_dir.parent / "struck"), **(env or {})}]
    if nproc > 1:
        common = {"WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc, "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": free_port()}
        envs = [{**envs[0], **{key: str(value) for key, value in common.items()}, "RANK": str(rank),
                 "LOCAL_RANK": str(rank)} for rank in range(nproc)]
    results = quick_runs(flags_for(place, run_dir, *more, nproc=nproc), envs, script=place / "prodded.py")
    codes = [result.returncode for result in results]
    expected = code if isinstance(code, list) else [code] * nproc
    shown = "\n".join(f"{r.returncode}\n{r.stdout}\n{r.stderr}" for r in results)
    assert code is None or codes == expected, shown
    assert all("Traceback" not in result.stderr for result in results), results[0].stderr
    return results


def table_row(fault, struck, result, seen):
    """A row of the table: `seen` is in what rank 0 wrote last; `struck` is a time or the file with one."""
    assert seen in result.stderr, result.stderr
    seconds = result.said_at - (struck if isinstance(struck, float) else float(struck.read_text()))
    assert 0 < seconds < 90
    if "FAULT_TABLE" in os.environ:
        with open(os.environ["FAULT_TABLE"], "a") as file:
            file.write(f"| {fault} | {seen.strip()} | {seconds:.1f} |\n")


def last_error(result):
    line = [line for line in result.stderr.splitlines() if line.strip()][-1]
    assert line.startswith("prodded.py: error: "), result.stderr
    return line.removeprefix("prodded.py: error: ")


@pytest.fixture(scope="module")
def straight(place):
    """The run that nothing happens to, on two ranks."""
    prod(place, place / "straight")
    return place / "straight"


def checkpoint(run_dir, step):
    return run_dir / "checkpoints" / f"step_{step:06d}"


# ----------------------------------------------------------------------------------------------------
# 2. Asked to stop

@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138)])
def test_a_signal_to_one_rank_stops_all(place, straight, tmp_path, name, code):
    """Also to a rank that is not the first; it saves the step under way, and the run goes on from there."""
    kill = f"step == 6 and ranks.rank == 1 and os.kill(os.getpid(), signal.{name}); time.sleep(0.05)"
    first = prod(place, tmp_path / "run", at_step=kill, code=code)[0]
    [stopped] = [line for line in first.stdout.splitlines() if line.startswith("stopped (")]
    saved = train_llm.checkpoints_in(tmp_path / "run/checkpoints")[-1]
    assert stopped.startswith(f"stopped ({name}): {saved} is saved") and stopped.endswith(f"Exit code {code}")
    assert 6 <= int(saved.name[5:]) <= 9 and not list(saved.parent.glob("*.partial"))
    again = prod(place, tmp_path / "run")[0]
    assert f"resumed    {saved}: step" in again.stdout
    assert_same_bits(tmp_path / "run", straight)


def test_stop_file(place, straight, tmp_path):
    stop = tmp_path / "run/STOP"
    touch = f"step == 5 and open({str(stop)!r}, 'w').close(); step >= 5 and time.sleep(0.3)"
    result = prod(place, tmp_path / "run", at_step=touch, code=3)[0]
    assert "stopped (STOP file)" in result.stdout and "remove that file" in result.stdout
    before = train_llm.checkpoints_in(tmp_path / "run/checkpoints")
    # While it stands there nothing starts, so that a supervisor's restart does not undo the wish.
    assert last_error(prod(place, tmp_path / "run", code=1)[0]) == f"{stop} exists: remove it to train"
    assert train_llm.checkpoints_in(tmp_path / "run/checkpoints") == before
    stop.unlink()
    prod(place, tmp_path / "run")
    assert_same_state(tmp_path / "run", straight)


def test_a_signal_during_the_export_ends_at_once(place, tmp_path):
    """All is saved then, and an export may take minutes; the same command makes it."""
    script = tmp_path / "ended.py"
    line = "    save_torch_state_dict(tensors, folder, "
    source = (place / "prodded.py").read_text()
    assert source.count(line) == 1
    script.write_text(source.replace(line, "    os.kill(os.getpid(), signal.SIGTERM)\n" + line))
    flags = [*flags_for(place, tmp_path / "run", nproc=1), "--export"]
    quick_run(flags, code=-signal.SIGTERM, script=script)
    assert checkpoint(tmp_path / "run", STEPS).is_dir() and not (tmp_path / "run/hf").exists()
    assert "reloaded" in quick_run(flags, script=place / "prodded.py").stdout


@slow
def test_a_second_interrupt_ends_at_once(place, tmp_path):
    twice = ("if step == 6:\n"
             "    pid = os.getpid()\n"
             "    subprocess.Popen(['sh', '-c', f'sleep 1; kill -INT {pid}; sleep 2; kill -INT {pid}'])\n"
             "    time.sleep(1000)")
    result = prod(place, tmp_path / "run", at_step=twice, code=130, nproc=1)[0]
    said = "SIGINT: after this step or the next the run is saved, and ends; again ends it at once"
    assert said in result.stderr
    assert last_error(result) == "interrupted twice: ended at once"
    assert [path.name for path in train_llm.checkpoints_in(tmp_path / "run/checkpoints")] == ["step_000004"]


@slow
def test_an_evaluation_that_a_stop_cut_off_is_made_up_for(place, tmp_path):
    flags = ["--eval-split", place / "texts.jsonl", "--eval-interval", 8]
    prod(place, tmp_path / "straight", *flags, nproc=1)
    kill = "step == 8 and os.kill(os.getpid(), signal.SIGTERM); step == 8 and time.sleep(0.3)"
    prod(place, tmp_path / "run", *flags, at_step=kill, code=143, nproc=1)
    prod(place, tmp_path / "run", *flags, nproc=1)
    evaluations = [[(row["step"], row["eval/loss"]) for row in read_metrics(tmp_path / name)
                    if "eval/loss" in row] for name in ("straight", "run")]
    assert evaluations[0] == evaluations[1] and [step for step, _ in evaluations[0]] == [8, 16]
    best = [json.loads((checkpoint(tmp_path / name, STEPS) / "progress.json").read_text())["best_eval_loss"]
            for name in ("straight", "run")]
    assert best[0] == best[1] == evaluations[0][0][1]


# ----------------------------------------------------------------------------------------------------
# 3. Ranks that die, hang, or never come

def test_a_rank_killed_in_a_collective(place, straight, tmp_path):
    """The other one is in the backward's collectives when rank 1 is killed after its forward."""
    kill = "if step == 6 and ranks.rank == 1: strike(), os.kill(os.getpid(), signal.SIGKILL)"
    results = prod(place, tmp_path / "run", at_step=kill, code=[1, -9])
    assert last_error(results[0]).startswith("another rank ended: its own last line says why")
    table_row("a rank killed in a collective", tmp_path / "struck", results[0],
              "another rank ended: its own last line says why, or the kernel's log if it was killed; the "
              "same command goes on from the newest checkpoint")
    prod(place, tmp_path / "run")
    assert_same_state(tmp_path / "run", straight)


@slow
def test_a_rank_that_hangs_shows_its_stacks(place, tmp_path):
    """So does the one that waits for it; both end, whatever they are in."""
    hang = "if step == 6 and ranks.rank == 1: strike(), time.sleep(1000)"
    results = prod(place, tmp_path / "run", "--stall-timeout", 4, at_step=hang, code=None)
    assert results[1].returncode == -signal.SIGALRM
    assert results[0].returncode in (-signal.SIGALRM, 1)  # 1: the other's end was seen first
    for result in results:
        assert "Timeout (0:00:04)!" in result.stderr
    assert 'File "<string>", line 2 in <module>' in results[1].stderr  # AT_STEP's
    assert " in main\n" in results[0].stderr
    table_row("a rank hung in a sleep, `--stall-timeout 4`: stacks of each rank", tmp_path / "struck",
              results[0], "Timeout (0:00:04)!")


@slow
def test_torchrun_brings_a_dead_rank_back(place, straight, tmp_path):
    """torchrun's PET_MAX_RESTARTS: all ranks start again, from the last checkpoint."""
    marker = tmp_path / "killed"
    kill = (f"if step == 10 and ranks.rank == 1 and not os.path.exists({str(marker)!r}):\n"
            f"    open({str(marker)!r}, 'w').close()\n    os.kill(os.getpid(), signal.SIGKILL)")
    flags = flags_for(place, tmp_path / "run", "--nproc", 2)
    restarts = {"PET_MAX_RESTARTS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    result = run_script(flags, env={"AT_STEP": kill, **restarts}, script=place / "prodded.py")
    assert marker.exists() and "resumed    " in result.stdout
    assert_same_state(tmp_path / "run", straight)
    marker.unlink()
    failed = run_script(flags_for(place, tmp_path / "none", "--nproc", 2), env={"AT_STEP": kill},
                        script=place / "prodded.py", check=False)
    assert failed.returncode == 1
    assert "another rank ended" in failed.stderr


@slow
@pytest.mark.parametrize("to_launcher, code", [("SIGTERM", 143), ("SIGUSR1", 138), ("SIGKILL", -9)])
def test_signals_to_the_launcher(place, straight, tmp_path, to_launcher, code):
    """torchrun, in the process that the user started, passes them on; the ranks do not outlive it."""
    ready = tmp_path / "ready"
    wait = f"step == 6 and open({str(ready)!r}, 'w').close(); step >= 6 and time.sleep(0.3)"
    command = [sys.executable, str(place / "prodded.py"), *flags_for(place, tmp_path / "run", "--nproc", 2)]
    env = {**os.environ, "AT_STEP": wait, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not ready.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(getattr(signal, to_launcher))
    out, _ = process.communicate(timeout=120)
    assert process.returncode == code
    assert len(ranks) >= 2 and not psutil.wait_procs(ranks, timeout=20)[1]
    assert ("stopped (" in out) == (to_launcher != "SIGKILL")
    prod(place, tmp_path / "run")
    assert_same_state(tmp_path / "run", straight)


def test_rendezvous_that_cannot_work(place, tmp_path):
    def alone(**env):
        variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", **env}
        [result] = quick_runs(flags_for(place, tmp_path / "run"), [variables], script=place / "prodded.py")
        assert result.returncode == 1
        return result

    started = time.time()
    result = alone(MASTER_ADDR="head.invalid", MASTER_PORT="29511")
    table_row("rendezvous host that does not resolve", started, result,
              "no rendezvous at head.invalid:29511 ([Errno -2] Name or service not known)")
    with socket.create_server(("", 0)) as server:
        port, started = server.getsockname()[1], time.time()
        result = alone(MASTER_PORT=str(port))
    message = last_error(result)
    assert message.startswith(f"no rendezvous at 127.0.0.1:{port} (") and "tools/doctor.py" in message
    table_row("port taken", started, result, "EADDRINUSE")


# ----------------------------------------------------------------------------------------------------
# 4. Checkpoints and disks

DAMAGES = {
    "truncated": lambda f: os.truncate(f / "__0_0.distcp", 1000),
    "missing": lambda f: (f / "__1_0.distcp").unlink(),
    "index": lambda f: os.truncate(f / ".metadata", 10),
    "progress": lambda f: (f / "progress.json").write_text("{"),
}


@pytest.mark.parametrize("kind", [
    pytest.param(kind, marks=[] if kind == "truncated" else slow) for kind in DAMAGES])
def test_a_damaged_checkpoint_is_named_with_the_one_before(place, straight, tmp_path, kind):
    """Nothing is touched; without it, as the line says, the run goes on from the one before."""
    run_dir = tmp_path / "run"
    for step in (8, 12):
        shutil.copytree(checkpoint(straight, step), checkpoint(run_dir, step))
    DAMAGES[kind](checkpoint(run_dir, 12))
    started = time.time()
    result = prod(place, run_dir, code=1)[0]
    message = last_error(result)
    assert message.startswith(f"{checkpoint(run_dir, 12)} cannot be read (")
    assert message.endswith(f"): remove it to go on from {checkpoint(run_dir, 8)}")
    if kind == "truncated":
        table_row("newest checkpoint truncated", started, result, "remove it to go on from")
    shutil.rmtree(checkpoint(run_dir, 12))
    assert f"resumed    {checkpoint(run_dir, 8)}: step 8" in prod(place, run_dir)[0].stdout
    assert_same_state(run_dir, straight)


@pytest.mark.parametrize("flag", [
    "--async-checkpoint", pytest.param("--no-async-checkpoint", marks=slow)])
def test_a_disk_that_fills_up_and_is_emptied(place, straight, tmp_path, flag):
    """The save of step 8 fails, that of step 12 is there again. Rows are lost meanwhile, no state is."""
    with mounted(tmp_path / "disk", "size=20m") as disk:
        fill = (f"fill = {str(disk / 'fill')!r}\n"
                "if step == 6 and ranks.is_main:\n"
                "    finish = wait_for_copy(saver), saver.saving.result(), strike()\n"
                "    with contextlib.suppress(OSError), open(fill, 'wb') as file:\n"
                "        while True: file.write(bytes(4096)); file.flush()\n"
                "if step == 11 and ranks.is_main: saver.saving.result(); os.remove(fill)")
        results = prod(place, disk / "run", flag, at_step=fill if "no" not in flag else fill.replace(
            "wait_for_copy(saver), saver.saving.result(), strike()", "strike()").replace(
            "saver.saving.result(); ", ""))
        said = results[0].stderr
        assert said.count("could not be saved") == 1
        table_row(f"disk full, `{flag}` (the run goes on)", tmp_path / "disk/struck", results[0],
                  "step 8 could not be saved (OSError: [Errno 28] No space left on device; 0 MiB are free)")
        assert f"The newest good checkpoint is {checkpoint(disk / 'run', 4)}" in said
        assert "metrics.jsonl lacks 1 rows: No space left on device" in said
        assert "could not be saved" not in results[1].stderr
        assert [path.name for path in train_llm.checkpoints_in(disk / "run/checkpoints")] == [
            "step_000004", "step_000012", "step_000016"]
        assert not list((disk / "run/checkpoints").glob("*.partial"))
        assert_same_state(disk / "run", straight)
        steps = [row["step"] for row in read_metrics(disk / "run")]
        assert set(range(1, STEPS + 1)) - set(steps) < set(range(6, 12)) and steps[-1] == STEPS


@slow
def test_a_folder_that_is_read_only_for_a_while(place, straight, tmp_path):
    """As a file system that fails once; also for the run that its first save hits."""
    with mounted(tmp_path / "run/checkpoints", "size=50m") as disk:
        remount = (f"disk = {str(disk)!r}\n"
                   "if step in (2, 6) and ranks.is_main:\n"
                   "    mode = 'ro' if step == 2 else 'rw'\n"
                   "    subprocess.run(['mount', '-o', f'remount,{mode}', disk], check=True)\n"
                   "if step == 2 and ranks.is_main: strike()")
        results = prod(place, tmp_path / "run", "--no-async-checkpoint", at_step=remount)
        said = results[0].stderr
        table_row("checkpoint folder read-only (the run goes on)", tmp_path / "struck", results[0],
                  "step 4 could not be saved (OSError: [Errno 30] Read-only file system")
        assert "newest good checkpoint is none" in said and said.count("could not be saved") == 1
        assert_same_state(tmp_path / "run", straight)


@slow
def test_a_second_run_on_the_folder_is_refused(place, straight, tmp_path):
    """In half a minute, and the first one is not disturbed; a run that was just killed is waited for."""
    wait = f"if step == 6:\n    while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.1)"
    first = threading.Thread(target=prod, args=(place, tmp_path / "run"), kwargs={"at_step": wait})
    first.start()
    try:
        while not (tmp_path / "run/checkpoints/step_000004").exists():
            time.sleep(0.1)
        started = time.time()
        second = prod(place, tmp_path / "run", "--max-steps", STEPS + 1, code=1, nproc=1)[0]
        table_row("second run on the folder (it waits 20 s for the first to end)", started, second,
                  "give this one another --checkpoint-dir, or end that")
    finally:
        (tmp_path / "go").touch()
        first.join()
    assert f"{tmp_path / 'run'} is in use by another run: waiting 20 s for its end" in second.stderr
    assert f"{tmp_path / 'run'} is in use by another run: give this one another" in last_error(second)
    assert_same_state(tmp_path / "run", straight)
