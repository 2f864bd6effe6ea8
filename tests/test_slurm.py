"""launch_slurm.sh on a real SLURM: trainings on two nodes, preemption, time limit, dead ranks, how jobs end.

Where the question is only how a job ends, its script is a few lines that wait for a signal or end as told.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import slurm_cluster
from cluster_runs import STEPS, assert_losses_as, assert_same_bits, flags_for, prepare, straight_run
from helpers import REPO, TORCHRUN_VARIABLES, read_metrics

import train_llm

LAUNCHER = REPO / "launch_slurm.sh"
slow = pytest.mark.slow
own_variables = ("HF_MODEL", "USE_HF_MODEL", "BATCH_SIZE", "GRAD_ACCUM_STEPS", "MAX_RESTARTS", "LOG_DIR")

# Prints what it was given, then ends as its arguments say, or 0.3 s after a signal with 128 and its number.
SCRIPT = """
import json, os, signal, sys, time
names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
         "SLURM_PROCID", "SLURM_RESTART_COUNT", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
got = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, _: got.append(number))
print(json.dumps({name: os.environ.get(name) for name in names}), flush=True)
seconds, codes = float(sys.argv[1]), [int(code) for code in sys.argv[2:]]
end = time.monotonic() + seconds
while time.monotonic() < end and not got:
    time.sleep(0.05)
if got:
    time.sleep(0.3)
    sys.exit(128 + got[0])
code = codes[int(os.environ["RANK"]) % len(codes)]
if code == 137:
    os.kill(os.getpid(), signal.SIGKILL)
if code:
    print("the reason of", os.environ["RANK"], flush=True)
time.sleep(0 if code else 60 * max(codes))
sys.exit(code)
"""


# ----------------------------------------------------------------------------------------------------
# 1. The cluster and its jobs

@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes; gives SLURM's variables."""
    reason = slurm_cluster.missing()
    if reason:
        pytest.skip(reason)
    with slurm_cluster.slurm_cluster(tmp_path_factory.mktemp("slurm")) as variables:
        yield variables


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("jobs"))


@pytest.fixture
def place(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def environment(**more):
    left_out = (*TORCHRUN_VARIABLES, *own_variables)
    inherited = {name: value for name, value in os.environ.items()
                 if name not in left_out and not name.startswith(("SLURM", "SBATCH"))}
    return {**inherited, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def call(cluster, *command, cwd=None, **env):
    result = subprocess.run([str(token) for token in command], cwd=cwd, env=environment(**cluster, **env),
                            text=True, capture_output=True)
    assert result.returncode == 0, f"{command}: {result.stderr}"
    return result.stdout.strip()


def submit(cluster, cwd, *args, options=(), launcher=LAUNCHER, **env):
    """The number of the new job."""
    return call(cluster, "sbatch", "--parsable", *options, launcher, *args, cwd=cwd, **env)


def facts(cluster, job):
    return dict(re.findall(r"(\w+)=(\S*)", call(cluster, "scontrol", "show", "job", job)))


def wait_for(condition, what, timeout=150):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what() if callable(what) else what}: not within {timeout} s"
        time.sleep(0.1)


def printed(cwd, job):
    path = cwd / f"slurm-{job}.out"
    return path.read_text() if path.exists() else ""


def wait_for_end(cluster, cwd, job, timeout=200):
    """(state, exit code of the launcher) of a job that has ended for good."""
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    wait_for(lambda: facts(cluster, job)["JobState"] in ended and
             not call(cluster, "squeue", "--noheader", "--job", job),
             lambda: f"end of job {job}: {printed(cwd, job)}", timeout)
    found = facts(cluster, job)
    return found["JobState"], int(found["ExitCode"].split(":")[0])


def log(cwd, job, rank=0, attempt=0):
    return cwd / "logs" / job / f"attempt_{attempt}" / f"rank_{rank}.log"


def wait_for_ranks(cwd, job, attempt=0, ranks=2):
    """Until each has printed its first line."""
    logs = [log(cwd, job, rank, attempt) for rank in range(ranks)]
    wait_for(lambda: all(path.exists() and "\n" in path.read_text() for path in logs),
             lambda: f"ranks of job {job}: {printed(cwd, job)}")


# ----------------------------------------------------------------------------------------------------
# 2. Without SLURM: the command

@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """A folder with the launcher, and with scripts that are empty: dry runs take any flag, and are quick."""
    folder = tmp_path_factory.mktemp("beside")
    (folder / "tools").mkdir()
    for name in (LAUNCHER.name, "tools/check_flags.py"):
        shutil.copy(REPO / name, folder / name)
    (folder / "train_llm.py").touch()
    (folder / "with_nodes.py").write_text('add("--nodes")')
    return folder


def dry_run(folder, *args, code=0, **env):
    result = subprocess.run(["bash", folder / LAUNCHER.name, *args], env=environment(DRY_RUN="1", **env),
                            text=True, capture_output=True, timeout=60)
    assert result.returncode == code, result.stderr
    return shlex.split(result.stdout), result.stderr


def arguments(folder, *args, **env):
    """What the script would get."""
    tokens, _ = dry_run(folder, *args, **env)
    return tokens[tokens.index(str(folder / "train_llm.py")) + 1:]


def test_the_command_outside_of_a_job(beside):
    args = ["--name", "two words", "--empty", ""]
    env = {"SLURM_NNODES": "3", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_CPUS_PER_NODE": "64(x2),32"}
    tokens, notes = dry_run(beside, *args, **env)
    assert "not in a SLURM job" in notes and tokens[-len(args):] == args
    assert {"--kill-on-bad-exit=1", "--nodes=3", "--ntasks=24", "--ntasks-per-node=8", "--gres=gpu:8",
            "--cpus-per-task=4"} <= set(tokens)
    assert "WORLD_SIZE=24" in tokens and "LOCAL_WORLD_SIZE=8" in tokens
    result = subprocess.run(["bash", LAUNCHER, "--x"], env=environment(), text=True, capture_output=True)
    assert result.returncode == 2 and "start this with 'sbatch launch_slurm.sh" in result.stderr


def test_the_variables_of_the_launcher(beside):
    assert arguments(beside) == ["--config", str(beside / "configs/train_llm/quickstart.yaml")]
    every = {"USE_HF_MODEL": "true", "HF_MODEL": "a/b", "BATCH_SIZE": "2", "GRAD_ACCUM_STEPS": "8"}
    assert arguments(beside, "--x", **every) == [
        "--hf-model", "a/b", "--batch-size", "2", "--grad-accum-steps", "8", "--x"]
    assert arguments(beside, "--x", HF_MODEL="a/b") == ["--hf-model", "a/b", "--x"]
    assert arguments(beside, "--x", USE_HF_MODEL="false", HF_MODEL="a/b") == ["--from-scratch", "--x"]
    # What the command line says wins; of two equal flags the script takes the last one.
    assert arguments(beside, "--hf-model=c", HF_MODEL="a/b", USE_HF_MODEL="true") == ["--hf-model=c"]
    assert arguments(beside, "--from-scratch", HF_MODEL="a/b") == ["--from-scratch"]
    assert arguments(beside, "--config", "x.yaml", USE_HF_MODEL="false") == ["--config", "x.yaml"]
    assert arguments(beside, "--batch-size", "4", BATCH_SIZE="2") == [
        "--batch-size", "2", "--batch-size", "4"]
    assert "needs HF_MODEL" in dry_run(beside, "--x", code=1, USE_HF_MODEL="true")[1]
    assert "true or false" in dry_run(beside, "--x", code=2, USE_HF_MODEL="maybe")[1]
    assert "MAX_RESTARTS is a number" in dry_run(beside, "--x", code=2, MAX_RESTARTS="some")[1]
    assert "there is no script" in dry_run(beside, "absent.py", code=2)[1]


@pytest.mark.parametrize("args", ["--nodes 4", "--nodes=4", "-N 4", "-N4", "--time 1:00:00", "-t 5", "-p gpu",
                                  "--x 1 --partition=gpu", "--gpus-per-node 8", "train_llm.py --gres=gpu:8"])
def test_options_of_sbatch_behind_the_launchers_name(beside, args):
    tokens, notes = dry_run(beside, *args.split(), code=2)
    [option] = re.findall(r"launch: (-\S+) is an option of sbatch: put it before the launcher's name", notes)
    assert option in args and not tokens


def test_a_script_may_have_a_flag_that_sbatch_has(beside):
    assert dry_run(beside, "with_nodes.py", "--nodes", "4")[0][-2:] == ["--nodes", "4"]
    dry_run(beside, "with_nodes.py", "--nodes", "4", "--time", "5", code=2)


@pytest.mark.parametrize("name", [
    "SLURM_NNODES", "SLURM_GPUS_ON_NODE", "SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK",
    "SLURM_CPUS_ON_NODE", "SLURM_JOB_CPUS_PER_NODE", "SLURM_RESTART_COUNT", "SLURM_JOB_ID", "MAX_RESTARTS"])
def test_no_variable_is_executed_as_bash_calculates(beside, tmp_path, name):
    for value in (f"PATH[$(touch {tmp_path}/x)]", "08", "1e3", "-1", "9" * 20, "1(x"):
        tokens, notes = dry_run(beside, "--x", code=2, **{name: value})
        assert f"launch: {name} is a " in notes and notes.count("\n") == 1 and not tokens
    assert not (tmp_path / "x").exists()
    assert "must be above 0" in dry_run(beside, code=2, SLURM_NTASKS_PER_NODE="0")[1]


def test_help():
    shown = subprocess.run(["bash", LAUNCHER, "--help"], text=True, capture_output=True, check=True).stdout
    assert "Usage:" in shown and "DRY_RUN=1" in shown and "set -euo" not in shown
    assert "\n    #SBATCH --nodes=2\n" in shown
    lines = [line for line in LAUNCHER.read_text().splitlines() if line.startswith("#SBATCH")]
    assert not [line for line in lines if re.search("partition|account|gpus|gres|qos", line)]


# ----------------------------------------------------------------------------------------------------
# 3. How jobs end

def test_variables_and_exit_code_0(cluster, place):
    """From a copy of the launcher, as sbatch makes one; the script is found beside the original."""
    copied = place / "a project"
    copied.mkdir()
    shutil.copy(LAUNCHER, copied)
    shutil.move(place / "script.py", copied)
    job = submit(cluster, place, "script.py", 0.1, 0, launcher=copied / "launch_slurm.sh",
                 options=["--ntasks-per-node=2"])
    assert wait_for_end(cluster, place, job) == ("COMPLETED", 0)
    seen = [eval(log(place, job, rank).read_text(), {"null": None}) for rank in range(4)]
    assert [(one["RANK"], one["LOCAL_RANK"], one["GROUP_RANK"]) for one in seen] == [
        ("0", "0", "0"), ("1", "1", "0"), ("2", "0", "1"), ("3", "1", "1")]
    assert all((one["WORLD_SIZE"], one["LOCAL_WORLD_SIZE"]) == ("4", "2") for one in seen)
    [(head, port)] = {(one["MASTER_ADDR"], one["MASTER_PORT"]) for one in seen}
    assert head == slurm_cluster.own_address()  # the nodes have no names in DNS
    assert 20000 <= int(port) < 32100
    assert "srun --kill-on-bad-exit=1" in printed(place, job) and "finished" in printed(place, job)


def test_one_process_for_each_gpu(cluster, place):
    """The job asks for none, but takes whole nodes, with all that they have."""
    job = submit(cluster, place, "script.py", 0.1, 0, options=["--partition=gpu"], OMP_NUM_THREADS="")
    assert wait_for_end(cluster, place, job) == ("COMPLETED", 0), printed(place, job)
    seen = [eval(log(place, job, rank).read_text(), {"null": None}) for rank in range(4)]
    assert [(one["RANK"], one["LOCAL_RANK"], one["CUDA_VISIBLE_DEVICES"], one["OMP_NUM_THREADS"])
            for one in seen] == [("0", "0", "0,1", "1"), ("1", "1", "0,1", "1"),
                                 ("2", "0", "0,1", "1"), ("3", "1", "0,1", "1")]


@pytest.mark.parametrize("codes, expected", [((1, 0), 1), ((0, 2), 2), ((3, 3), 3)])
def test_errors_end_the_job_with_the_code_of_the_first(cluster, place, codes, expected):
    """srun itself returns 143 here, the code of the rank that it ended because another one failed."""
    job = submit(cluster, place, "script.py", 0.1, *codes)
    assert wait_for_end(cluster, place, job) == ("FAILED", expected)
    shown, (first, *_) = printed(place, job), [rank for rank in (0, 1) if codes[rank]]
    if expected != 3:
        assert f"the reason of {first}" in shown and f"exit code {expected}, rank {first} first" in shown
    assert facts(cluster, job)["Restarts"] == "0"


def test_an_option_of_sbatch_in_the_wrong_place_ends_the_job(cluster, place):
    job = submit(cluster, place, "script.py", "--nodes", 4)
    assert wait_for_end(cluster, place, job) == ("FAILED", 2)
    assert "--nodes is an option of sbatch" in printed(place, job) and not (place / "logs").exists()


def test_a_rank_that_is_killed_every_time(cluster, place):
    """Started again in the same job, each time on another port, until MAX_RESTARTS."""
    job = submit(cluster, place, "script.py", 0.1, 0, 137, MAX_RESTARTS="2")
    assert wait_for_end(cluster, place, job) == ("FAILED", 137)
    shown = printed(place, job)
    assert shown.count("srun --kill-on-bad-exit=1") == 3 and "started 3 times" in shown
    assert len(set(re.findall(r"MASTER_PORT=(\d+)", shown))) == 3
    assert facts(cluster, job)["Restarts"] == "0"


def test_scancel_ends_a_job_for_good(cluster, place):
    job = submit(cluster, place, "script.py", 300, 0)
    wait_for_ranks(place, job)
    call(cluster, "scancel", job)
    assert wait_for_end(cluster, place, job)[0] == "CANCELLED"
    time.sleep(7)  # longer than it takes for a requeued job to start again
    assert facts(cluster, job)["JobState"] == "CANCELLED" and facts(cluster, job)["Restarts"] == "0"


def test_an_interrupt_ends_a_job_and_a_refused_requeue_says_so(cluster, place):
    jobs = [submit(cluster, place, "script.py", 300, 0, options=["--nodes=1", *more])
            for more in ([], ["--no-requeue"])]
    for job, name in zip(jobs, ("INT", "USR1")):
        wait_for_ranks(place, job, ranks=1)
        call(cluster, "scancel", f"--signal={name}", job)
    assert wait_for_end(cluster, place, jobs[0]) == ("FAILED", 130)
    assert wait_for_end(cluster, place, jobs[1]) == ("FAILED", 138)
    assert "the same line goes on from there" in printed(place, jobs[0])
    assert "SLURM has refused that" in printed(place, jobs[1])


@slow
def test_signals_to_the_batch_shell_reach_the_ranks_and_requeue(cluster, place):
    """SIGTERM is what preemption sends to it; a signal while the step is only being created is not lost."""
    job = submit(cluster, place, "script.py", 300, 0)
    wait_for_ranks(place, job)
    call(cluster, "scancel", "--batch", "--signal=TERM", job)
    wait_for(lambda: "MASTER_ADDR" in printed(place, job).partition("requeued")[2], "second start")
    call(cluster, "scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: facts(cluster, job)["Restarts"] == "2" and
             facts(cluster, job)["JobState"] == "RUNNING", lambda: f"third start: {printed(place, job)}")
    wait_for_ranks(place, job, attempt=2)
    call(cluster, "scancel", job)
    assert wait_for_end(cluster, place, job)[0] == "CANCELLED"
    shown = printed(place, job)
    assert shown.count("the job is requeued") == 2
    assert "stopped (exit code 143): the job is requeued" in shown and "SIGUSR1: the training saves" in shown


# ----------------------------------------------------------------------------------------------------
# 4. Real trainings

def newest_step(run_dir):
    folders = train_llm.checkpoints_in(run_dir / "checkpoints") if run_dir.exists() else []
    return int(folders[-1].name.split("_")[1]) if folders else 0


@slow
def test_training_on_two_nodes(cluster, folder):
    job = submit(cluster, folder, *flags_for(folder, "two", 2))
    assert wait_for_end(cluster, folder, job) == ("COMPLETED", 0), printed(folder, job)
    assert "step      16/16" in log(folder, job).read_text()
    assert_losses_as(folder / "two", straight_run(folder, 1))


@slow
def test_a_preemption_and_a_time_limit(cluster, folder):
    """Stopped twice and requeued, by nobody; the last bit is that of the run that nothing happened to.

    SLURM looks at the limit, which is a minute at least, every 30 s, so that its signal comes 5 to 35 s after
    the start. The ten last steps take 5 s each until the second restart: no earlier start finishes before the
    signal, and the two steps that a stop takes, with the save, end well before the limit.
    """
    slow_steps = ('time.sleep(0 if int(os.environ.get("SLURM_RESTART_COUNT", "0")) >= 2 '
                  'else 5 if step > 6 else 0.5)')
    job = submit(cluster, folder, folder / "prodded.py", *flags_for(folder, "preempted", 2),
                 options=["--time=1", "--signal=B:USR1@25"], AT_STEP=slow_steps)
    wait_for(lambda: newest_step(folder / "preempted") >= 4, lambda: f"checkpoint: {printed(folder, job)}")
    call(cluster, "scancel", "--signal=USR1", job)
    assert wait_for_end(cluster, folder, job) == ("COMPLETED", 0), printed(folder, job)
    restarts = int(facts(cluster, job)["Restarts"])
    # SLURM may send its signal up to a minute early: to a start that has not begun to train, or to the last.
    assert restarts >= 2 and printed(folder, job).count("the job is requeued") == restarts
    assert "resumed " in log(folder, job, 0, restarts).read_text()
    rows = read_metrics(folder / "preempted")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))  # no step was done twice
    assert_same_bits(folder / "preempted", straight_run(folder, 2))


@slow
def test_a_rank_that_is_killed_once(cluster, folder):
    kill = (f"if step == 10 and ranks.rank == 1 and not os.path.exists({str(folder / 'died')!r}):\n"
            f"    finish_save(saver); open({str(folder / 'died')!r}, 'w').close(); os.kill(os.getpid(), 9)")
    job = submit(cluster, folder, folder / "prodded.py", *flags_for(folder, "killed", 2), AT_STEP=kill)
    assert wait_for_end(cluster, folder, job) == ("COMPLETED", 0), printed(folder, job)
    assert facts(cluster, job)["Restarts"] == "0"
    assert "a process was killed: all start again" in printed(folder, job)
    assert "resumed" in log(folder, job).read_text()
    assert_same_bits(folder / "killed", straight_run(folder, 2))
