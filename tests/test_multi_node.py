"""launch_multi_node.sh: the command it makes, what it says in seconds, trainings over two network namespaces.

The trainings are real; the two machines share a host name, a loopback address that leads nowhere, and a disk.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time

import netns
import pytest
from cluster_runs import STEPS, assert_losses_as, assert_same_bits, flags_for, prepare, straight_run
from helpers import REPO, TORCHRUN_VARIABLES
from quick_runs import free_port

import train_llm

LAUNCHER = REPO / "launch_multi_node.sh"
slow = pytest.mark.slow
UNCHECKED = "tools/plan_memory.py"  # has no parse_args: a dry run takes any flag, and is quick


def environment(**more):
    """Of a shell that no other launcher or torchrun has set up."""
    left_out = (*TORCHRUN_VARIABLES, "NODE_RANK", "NNODES", "NPROC_PER_NODE", "GLOO_SOCKET_IFNAME")
    inherited = {name: value for name, value in os.environ.items()
                 if name not in left_out and not name.startswith("SLURM")}
    return {**inherited, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def launch(*args, cwd=None, code=0, **env):
    result = subprocess.run([LAUNCHER, *args], cwd=cwd, env=environment(**env), stdin=subprocess.DEVNULL,
                            text=True, capture_output=True, timeout=60)
    assert result.returncode == code, result.stdout + result.stderr
    return result


def dry_run(*args, **env):
    """(variables in front, tokens) of the command that would run, and the whole result."""
    result = launch(*args, DRY_RUN="1", **env)
    [line] = result.stdout.splitlines()
    tokens = shlex.split(line)
    start = tokens.index(sys.executable)
    return dict(token.split("=", 1) for token in tokens[:start]), tokens[start:], result


def option(tokens, name):
    return tokens[tokens.index(name) + 1]


def own_address():
    """An address of this machine that is not 127.x; without one, what needs it is skipped."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but 127.x")
        return probe.getsockname()[0]


# ----------------------------------------------------------------------------------------------------
# 1. The command

def test_static(tmp_path):
    address, port = own_address(), str(free_port())
    args = [UNCHECKED, "--name", "two words", "--empty", ""]
    env, tokens, result = dry_run(*args, NODE_RANK="0", NNODES="3", MASTER_PORT=port, NPROC_PER_NODE="4",
                                  cwd=tmp_path, SHUTDOWN_TIMEOUT="90", RDZV_TIMEOUT="77")
    assert tokens[:3] == [sys.executable, "-m", "torch.distributed.run"]
    for name, value in {"--nnodes": "3", "--node-rank": "0", "--master-addr": address, "--master-port": port,
                        "--nproc-per-node": "4", "--max-restarts": "0", "--rdzv-conf": "timeout=77"}.items():
        assert option(tokens, name) == value
    assert "SIGUSR1" in option(tokens, "--signals-to-handle").split(",")
    assert env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "90"
    assert tokens[-5:] == [str(REPO / UNCHECKED), *args[1:]]
    # The line for the other machines is complete, but for each one's own number.
    shown = result.stderr.split("with their number as NODE_RANK: ")[1].splitlines()[0]
    assert shlex.split(shown) == ["NODE_RANK=1", "NNODES=3", f"MASTER_ADDR={address}", f"MASTER_PORT={port}",
                                  str(LAUNCHER), *args]
    env = environment(NODE_RANK="0", MASTER_PORT=port, DRY_RUN="1")
    result = subprocess.run(["bash", LAUNCHER.name, UNCHECKED], cwd=REPO, env=env, text=True,
                            capture_output=True)
    assert f" ./{LAUNCHER.name} {UNCHECKED}\n" in result.stderr


def test_elastic():
    address, port = own_address(), str(free_port())
    _, tokens, _ = dry_run(UNCHECKED, MASTER_ADDR=address, MASTER_PORT=port, NNODES="1:4", MAX_RESTARTS="2")
    assert option(tokens, "--max-restarts") == "2"
    assert option(tokens, "--nnodes") == "1:4" and "--node-rank" not in tokens
    assert option(tokens, "--rdzv-backend") == "c10d"
    assert option(tokens, "--rdzv-endpoint") == f"{address}:{port}"
    # Decided by the addresses of this machine, not by its name.
    assert option(tokens, "--local-addr") == address
    assert option(tokens, "--rdzv-conf").startswith("is_host=1,")
    env = {"MASTER_ADDR": address, "IS_HOST": "0", "LOCAL_ADDR": "10.9.8.7", "RDZV_ID": "b"}
    _, tokens, _ = dry_run(UNCHECKED, **env)
    assert option(tokens, "--local-addr") == "10.9.8.7" and option(tokens, "--rdzv-id") == "b"
    assert option(tokens, "--rdzv-conf").startswith("is_host=0,")


def test_defaults():
    own_address()
    env, tokens, result = dry_run(NODE_RANK="0", MASTER_PORT=str(free_port()), OMP_NUM_THREADS="")
    assert "NNODES is not set: 2 machines" in result.stderr and "no GPU" in result.stderr
    cores = len(os.sched_getaffinity(0))
    assert option(tokens, "--nnodes") == "2"
    assert option(tokens, "--nproc-per-node") == str(2 if cores > 1 else 1)
    assert env["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    assert tokens[-2:] == ["--config", str(REPO / "configs/train_llm/quickstart.yaml")]
    env = {"NODE_RANK": "0", "MASTER_PORT": str(free_port()), "CUDA_VISIBLE_DEVICES": "0,1,5"}
    _, tokens, _ = dry_run(UNCHECKED, **env)
    assert option(tokens, "--nproc-per-node") == "3"


def test_scripts_and_help(tmp_path):
    own_address()
    env = {"NODE_RANK": "0", "MASTER_PORT": str(free_port())}
    _, tokens, _ = dry_run(UNCHECKED, "--x", cwd=tmp_path, **env)
    assert tokens[-2:] == [str(REPO / UNCHECKED), "--x"]
    (tmp_path / "own.py").touch()
    assert launch("own.py", cwd=tmp_path, DRY_RUN="1", **env).stdout.split()[-1] == "own.py"
    assert "there is no script" in launch("absent.py", code=2, **env).stderr
    shown = launch("--help").stdout
    assert "Usage:" in shown and "DRY_RUN=1" in shown and "#" not in shown and "set -euo" not in shown


# ----------------------------------------------------------------------------------------------------
# 2. Mistakes: one line, in seconds

@pytest.mark.parametrize("env, code, message", [
    ({"MASTER_ADDR": "no-such-host.invalid"}, 1, "MASTER_ADDR=no-such-host.invalid does not resolve"),
    ({"MASTER_ADDR": "no-such-host.invalid", "NODE_RANK": "1"}, 1, "does not resolve on this machine"),
    ({"MASTER_ADDR": "localhost", "NODE_RANK": "0"}, 1, "which on each machine means that machine"),
    ({"MASTER_ADDR": "127.0.1.1", "NODE_RANK": "0"}, 1, "which on each machine means that machine"),
    ({"NODE_RANK": "one"}, 2, "NODE_RANK is a number from 0, not 'one'"),
    ({"NODE_RANK": "-1"}, 2, "NODE_RANK is a number from 0, not '-1'"),
    ({"NODE_RANK": "2", "NNODES": "2"}, 2, "the machines are numbered 0 to 1"),
    ({"NODE_RANK": "1"}, 2, "NODE_RANK=1 needs MASTER_ADDR"),
    ({"NODE_RANK": "0", "NNODES": "1:2"}, 2, "NNODES=1:2 is elastic"),
    ({"NODE_RANK": "0", "MAX_RESTARTS": "1"}, 2, "MAX_RESTARTS needs the elastic rendezvous"),
    ({"NODE_RANK": "0", "NNODES": "two"}, 2, "NNODES is a number of machines, or MIN:MAX, not 'two'"),
    ({"NODE_RANK": "0", "NPROC_PER_NODE": "0"}, 2, "NPROC_PER_NODE is a number above 0, not '0'"),
    ({"NODE_RANK": "0", "MASTER_PORT": "99999"}, 2, "ports end at 65535"),
    ({}, 2, "give this machine its number with NODE_RANK"),
    ({"PYTHON": "/nowhere/python"}, 1, "no /nowhere/python here"),
])
def test_mistakes(env, code, message):
    result = launch("--x", code=code, **env)
    assert message in result.stderr and "Traceback" not in result.stderr and not result.stdout


def test_a_port_that_is_taken():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for env in ({"NODE_RANK": "0"}, {"MASTER_ADDR": own_address()}):
            result = launch("--x", code=1, MASTER_PORT=port, **env)
            assert f"port {port} is taken on this machine" in result.stderr


def test_a_head_that_never_comes():
    env = {"NODE_RANK": "1", "MASTER_ADDR": own_address(), "MASTER_PORT": str(free_port())}
    result = launch("--x", code=1, RDZV_TIMEOUT="2", **env)
    place = f"{env['MASTER_ADDR']} port {env['MASTER_PORT']}"
    assert f"waiting for machine 0: nothing answers at {place} yet" in result.stderr
    assert "nothing has answered" in result.stderr and "firewall" in result.stderr


# ----------------------------------------------------------------------------------------------------
# 3. Real trainings on two machines

@pytest.fixture(scope="module")
def machines():
    reason = netns.missing()
    if reason:
        pytest.skip(reason)
    with netns.two_machines() as machines:
        yield machines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("multi_node"))


@pytest.fixture(scope="module")
def straight(folder):
    """Of one process."""
    return straight_run(folder, 1)


def start(machine, args, log, **env):
    """The launcher on a machine, one process each; what it prints goes to `log`."""
    with open(log, "w") as file:
        return subprocess.Popen(
            machine.command(LAUNCHER, *args), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True, env=environment(MASTER_ADDR="10.77.0.1", NPROC_PER_NODE="1", **env))


def finish(processes, logs, codes=(0, 0), timeout=240):
    deadline = time.monotonic() + timeout
    try:
        found = [process.wait(max(1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    texts = [log.read_text() for log in logs]
    assert tuple(found) == tuple(codes), "\n----\n".join(text[-4000:] for text in texts)
    return texts


def wait_for(condition, what, timeout=120):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"no {what} in {timeout} s"
        time.sleep(0.1)


def newest_step(run_dir):
    folders = train_llm.checkpoints_in(run_dir / "checkpoints") if run_dir.exists() else []
    return int(folders[-1].name.split("_")[1]) if folders else 0


@slow
def test_static_training(machines, folder, straight):
    """Machine 1 comes first, and says what it waits for."""
    logs = [folder / f"static-{rank}.log" for rank in (0, 1)]
    args = flags_for(folder, "static", 2)
    second = start(machines[1], args, logs[1], NODE_RANK="1", NNODES="2")
    note = "waiting for machine 0: nothing answers at 10.77.0.1 port 29500"
    wait_for(lambda: note in logs[1].read_text(), "note")
    first = start(machines[0], args, logs[0], NODE_RANK="0", NNODES="2")
    finish([first, second], logs)
    assert_losses_as(folder / "static", straight)


@slow
def test_elastic_training_with_a_process_that_dies(machines, folder, straight):
    """Neither machine has a number; both start again together, from the last checkpoint."""
    logs = [folder / f"elastic-{rank}.log" for rank in (0, 1)]
    flag = folder / "died"
    kill = (f"if step == 10 and ranks.rank == 1 and not os.path.exists({str(flag)!r}):\n"
            f"    finish_save(saver); open({str(flag)!r}, 'w').close(); os.kill(os.getpid(), 9)")
    args = [folder / "prodded.py", *flags_for(folder, "elastic", 2)]
    processes = [start(machine, args, log, NNODES="2", MAX_RESTARTS="1", AT_STEP=kill)
                 for machine, log in zip(machines, logs)]
    texts = finish(processes, logs)
    assert flag.exists() and any("resumed" in text for text in texts)
    assert_losses_as(folder / "elastic", straight)
    assert_same_bits(folder / "elastic", folder / "static")


@slow
def test_a_signal_to_one_machine_saves_on_both(machines, folder, straight):
    logs = [folder / f"signal-{rank}.log" for rank in (0, 1)]
    args = [folder / "prodded.py", *flags_for(folder, "signal", 2)]
    env = {"NNODES": "2", "AT_STEP": "time.sleep(0.3)"}
    processes = [start(machine, args, log, NODE_RANK=str(rank), **env)
                 for rank, (machine, log) in enumerate(zip(machines, logs))]
    wait_for(lambda: newest_step(folder / "signal") >= 4, "checkpoint")
    processes[1].send_signal(signal.SIGUSR1)  # the launcher has become torchrun
    texts = finish(processes, logs, codes=(1, 1))
    assert any("stopped (SIGUSR1)" in text for text in texts)
    assert 4 < newest_step(folder / "signal") < STEPS
    processes = [start(machine, args, log, NODE_RANK=str(rank), NNODES="2")
                 for rank, (machine, log) in enumerate(zip(machines, logs))]
    finish(processes, logs)
    assert_same_bits(folder / "signal", folder / "static")
