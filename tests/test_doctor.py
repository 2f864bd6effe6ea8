"""tools/doctor.py, with faults that are real: missing ranks, foreign ports, unshared folders, slow links.

Ranks are started by hand, so that each can have arguments, variables and namespaces of its own.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time

import netns
import pytest
import slurm_cluster
from helpers import REPO, TORCHRUN_VARIABLES, run_script
from quick_runs import free_port

DOCTOR = REPO / "tools/doctor.py"
# The free space of the machine that tests must not decide what they find.
QUICK = ["--need-gib", "0.05", "--timeout", "60"]


def start(*args, prefix=(), python=(sys.executable,), doctor=DOCTOR, **variables):
    """One process of the doctor, with an environment in which no launcher has set anything."""
    left_out = (*TORCHRUN_VARIABLES, "NODE_RANK", "NNODES", "GLOO_SOCKET_IFNAME")
    env = {name: value for name, value in os.environ.items()
           if name not in left_out and not name.startswith("SLURM")}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1", **variables}
    command = [*prefix, *python, str(doctor), *map(str, args)]
    return subprocess.Popen(command, env=env, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def start_rank(rank, world, *args, port, **options):
    place = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return start(*args, **{name: str(value) for name, value in place.items()} | options)


def finish(*processes, timeout=120):
    """(exit code, stdout, stderr) of each; no end within the timeout is a failure."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]


def need(*tokens):
    """Skips where a command that the test stands on does not work here, as without root."""
    tried = subprocess.run(tokens, capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"{' '.join(tokens)}: {tried.stderr.strip()}")


def in_namespace(*lines):
    """What starts a program with mounts and a host name of its own, after these lines of shell."""
    script = "; ".join(["set -e", *lines, 'exec "$@"'])
    return ["unshare", "--mount", "--uts", "--propagation", "private", "sh", "-c", script, "sh"]


def verdict(output):
    """The lines from the verdict on."""
    lines = output.splitlines()
    return lines[next(i for i, line in enumerate(lines) if re.match(r"ready|NOT ready", line)):]


# ----------------------------------------------------------------------------------------------------
# 1. Nothing wrong

def test_one_process_alone(tmp_path):
    folder = tmp_path / "runs" / "big"
    [(code, output, errors)] = finish(start(*QUICK, "--checkpoint-dir", folder))
    assert code == 0, output + errors
    assert output.startswith("doctor: 1 processes, nodes: ")
    assert f"checkpoints: {folder}, " in output and verdict(output) == ["ready"]
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_two_processes_by_torchrun(tmp_path):
    (tmp_path / "kept").touch()
    result = run_script([*QUICK, "--checkpoint-dir", tmp_path], nproc=2, script="tools/doctor.py",
                        env={"CUDA_VISIBLE_DEVICES": ""})
    assert re.search(r"all-reduce by gloo: \d.* GB/s", result.stdout)
    assert re.search(r"links within nodes: median \d.* slowest \d.* from rank [01] to [01]", result.stdout)
    assert verdict(result.stdout) == ["ready"]
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.slow
def test_nproc_gives_the_exit_code_without_a_traceback(tmp_path):
    args = ["--need-gib", "1e9", "--nproc", 2, "--checkpoint-dir", tmp_path]
    [(code, output, errors)] = finish(start(*args))
    assert code == 1 and "Traceback" not in errors, errors
    lines = verdict(output)
    assert lines[0] == "NOT ready"
    assert re.match(r" x \S+ \(rank 0, 1\): \d+ GiB are free in \S+, --need-gib is 1e\+09", lines[1])


def test_a_python_without_torch(tmp_path):
    """It goes on with the .venv beside the launchers; without one, a line names the Python to use."""
    doctor = tmp_path / "tools" / "doctor.py"
    doctor.parent.mkdir()
    shutil.copy(DOCTOR, doctor)
    shutil.copy(REPO / "train_llm.py", tmp_path)
    options = {"python": (sys.executable, "-S"), "doctor": doctor}
    [(code, _, errors)] = finish(start(**options))
    assert code == 1 and len(errors.splitlines()) == 1
    assert "cannot import torch or train_llm.py" in errors and str(tmp_path / ".venv/bin/python") in errors
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    [(code, output, errors)] = finish(start(*QUICK, "--checkpoint-dir", tmp_path / "run", **options))
    assert (code, verdict(output)) == (0, ["ready"]), errors


# ----------------------------------------------------------------------------------------------------
# 2. Rendezvous

def test_reasons_why_rank_0_is_not_reached():
    """A name that does not exist, a port where nobody listens, an address that rank 0 does not have."""
    port = free_port()
    unknown = start_rank(1, 2, "--timeout", 4, port=port, MASTER_ADDR="no-such-host.invalid")
    by_hand = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    nobody = start("--timeout", 4, **by_hand)
    by_hand |= {"NODE_RANK": "0", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": str(free_port())}
    foreign = start("--timeout", 4, **by_hand)
    expected = {unknown: "MASTER_ADDR=no-such-host.invalid does not resolve on ",
                nobody: f"nothing listens on localhost:{port} (127.0.0.1, this machine itself)",
                foreign: "MASTER_ADDR=192.0.2.1 is 192.0.2.1, but "}
    for (code, output, errors), text in zip(finish(*expected), expected.values()):
        assert (code, output) == (1, "")
        [line] = errors.splitlines()
        assert line.startswith("doctor: NOT ready: ") and text in line


@pytest.mark.slow
def test_a_port_that_another_program_has():
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and never says a word
        port = server.getsockname()[1]
        first, second = finish(*(start_rank(rank, 2, *QUICK, port=port) for rank in (0, 1)))
    assert first[0] == second[0] == 1
    assert re.search(rf"port {port} on \S+, rank 0's machine, is taken by another program", first[2])
    assert f"another program answers on 127.0.0.1:{port}" in second[2]


def test_variables_that_are_missing_or_wrong():
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    bad = {"set MASTER_ADDR to an address of rank 0's machine": {"NNODES": "2", "NODE_RANK": "0"},
           "no rank 2 among 2 processes": {"RANK": "2", "WORLD_SIZE": "2", **address},
           "invalid literal for int": {"RANK": "0", "WORLD_SIZE": "2", **address, "MASTER_PORT": "x"}}
    for text, variables in bad.items():
        [(code, _, errors)] = finish(start(**variables))
        assert code == 1 and text in errors and len(errors.splitlines()) == 1


@pytest.mark.slow
def test_by_srun_on_a_real_slurm(tmp_path):
    """Its node names lead nowhere, and a line says so; with an address in MASTER_ADDR it runs."""
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    address = slurm_cluster.own_address()
    with slurm_cluster.slurm_cluster(tmp_path / "slurm", names=("n1", "n2")) as variables:
        srun = ["srun", "--nodes=2", "--ntasks-per-node=1"]
        args = [*QUICK, "--checkpoint-dir", tmp_path / "run"]
        [(code, output, errors)] = finish(start(*args, prefix=srun, **variables))
        assert code == 1 and "MASTER_ADDR=n1 does not resolve on " in errors, output + errors
        [(code, output, errors)] = finish(start(*args, prefix=srun, **variables, MASTER_ADDR=address))
    assert code == 0, output + errors
    assert "2 processes" in output and "all-reduce by gloo" in output


@pytest.mark.slow
def test_missing_ranks_are_named(tmp_path):
    port, args = free_port(), [*QUICK, "--timeout", "12", "--checkpoint-dir", tmp_path]
    began = time.monotonic()
    first, third = finish(*(start_rank(rank, 4, *args, port=port) for rank in (0, 2)))
    assert time.monotonic() - began < 60
    assert first[0] == third[0] == 1 and third[1] == "" and "all-reduce" not in first[1]
    assert verdict(first[1])[1].startswith(" x ? (rank 1, 3): no answer within 12 s at 'start'")


@pytest.mark.slow
def test_a_rank_that_stops_answering_is_named(tmp_path):
    """Its nvidia-smi stops it."""
    driver = tmp_path / "bin" / "nvidia-smi"
    driver.parent.mkdir()
    driver.write_text("#!/bin/sh\nkill -STOP $PPID\n")
    driver.chmod(0o755)
    port, args = free_port(), [*QUICK, "--checkpoint-dir", tmp_path]
    first = start_rank(0, 2, *args, port=port)
    second = start_rank(1, 2, *args, port=port, PATH=f"{driver.parent}:{os.environ['PATH']}")
    [(code, output, _)] = finish(first)
    second.kill()
    second.communicate()
    assert code == 1
    pattern = r" x \S+ \(rank 1\): no answer within 25 s at 'versions and GPUs'"
    assert any(re.match(pattern, line) for line in verdict(output)), output


# ----------------------------------------------------------------------------------------------------
# 3. Differences between ranks, disks and links

@pytest.mark.slow
def test_another_source_and_another_folder(tmp_path):
    """Rank 1 has a copy of the project with a changed script, and a folder of its own."""
    other, port, folders = tmp_path / "other", free_port(), [tmp_path / "a", tmp_path / "b"]
    (other / "tools").mkdir(parents=True)
    shutil.copy(DOCTOR, other / "tools")
    (other / "train_llm.py").write_text((REPO / "train_llm.py").read_text() + "# changed\n")
    folders[1].mkdir()
    doctors = (DOCTOR, other / "tools/doctor.py")
    ranks = [start_rank(rank, 2, *QUICK, "--checkpoint-dir", folders[rank], port=port, doctor=doctors[rank])
             for rank in (0, 1)]
    (code, output, errors), (code_1, output_1, _) = finish(*ranks)
    assert (code, code_1, output_1) == (1, 1, ""), output + errors
    text = "\n".join(verdict(output))
    assert re.search(r"x \S+ \(rank 1\): source is \w+, elsewhere \w+: make all nodes the same", text)
    assert re.search(rf"x \S+ \(rank 1\): {folders[1]} is not rank 0's folder", text)
    assert not list(folders[0].iterdir()) and not list(folders[1].iterdir())


@pytest.mark.slow
def test_full_and_read_only_disks(tmp_path):
    """Two nodes by their host names, each with a tmpfs of its own in the same place."""
    need(*in_namespace(f"mount -t tmpfs none {tmp_path}"), "true")
    port, args = free_port(), ["--timeout", "60", "--need-gib", "0", "--checkpoint-dir", tmp_path]
    full = in_namespace("hostname n1", f"mount -t tmpfs -o size=64k none {tmp_path}")
    read_only = in_namespace("hostname n2", f"mount -t tmpfs -o ro none {tmp_path}")
    ranks = [start_rank(rank, 2, *args, port=port, prefix=prefix, GLOO_SOCKET_IFNAME="lo")
             for rank, prefix in enumerate((full, read_only))]
    (code, output, _), (code_1, _, _) = finish(*ranks)
    assert code == code_1 == 1
    text = "\n".join(verdict(output))
    assert re.search(r"x n1 \(rank 0\): checkpoint folder: .*No space left on device", text)
    assert f"x n2 (rank 1): {tmp_path} is not rank 0's folder" in text


def on_two_machines(machines, tmp_path, interfaces):
    """The doctor's results on both, with their host names n1 and n2."""
    port, args = free_port(), [*QUICK, "--checkpoint-dir", tmp_path]
    ranks = []
    for i, machine in enumerate(machines):
        prefix = [*machine.command(), *in_namespace(f"hostname n{i + 1}")]
        ranks.append(start_rank(i, 2, *args, port=port, prefix=prefix, MASTER_ADDR=machines[0].address,
                                GLOO_SOCKET_IFNAME=interfaces[i]))
    return finish(*ranks, timeout=200)


@pytest.mark.slow
def test_a_slow_link_is_named(tmp_path):
    """From the second machine to the first one; then without an interface that gloo may use."""
    if reason := netns.missing():
        pytest.skip(reason)
    need(*in_namespace("hostname n1"), "true")
    with netns.two_machines() as machines:
        names = [f"fsdp{os.getpid()}-{i}" for i in (1, 2)]
        need("tc", "-n", machines[1].name, "qdisc", "add", "dev", names[1], "root", "tbf", "rate", "40mbit",
             "burst", "64k", "latency", "100ms")
        (code, output, errors), _ = on_two_machines(machines, tmp_path, names)
        assert code == 1, output + errors
        assert re.search(r"links between nodes: median .*, slowest 0.00\d+ from rank 1 to 0", output)
        assert verdict(output)[1].startswith(" x n2, n1 (rank 1, 0): 0.00")
        (code, output, errors), _ = on_two_machines(machines, tmp_path, ["lo", "lo"])
        assert code == 1 and "GLOO_SOCKET_IFNAME names the interface between the nodes" in verdict(output)[1]


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    [(code, output, errors)] = finish(start(*QUICK, "--checkpoint-dir", tmp_path, CUDA_VISIBLE_DEVICES="0"))
    assert code == 0, output + errors
    assert re.search(r"1 GPUs, \d+ GiB or more are free on each", output) and "NCCL: " in output
