"""tools/doctor.py, with faults that are real: missing ranks, foreign ports, unshared folders, slow links.

Ranks are started by hand, so that each can have arguments, variables and namespaces of its own.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace

import netns
import psutil
import pytest
import slurm_cluster
from helpers import REPO, TORCHRUN_VARIABLES, run_script
from quick_runs import free_port

DOCTOR = [sys.executable, str(REPO / "tools/doctor.py")]
# What the machine that tests has must not decide what they find.
QUICK = ["--quick", "--need-gib", "0.05", "--timeout", "60"]


def start(*args, prefix=(), **variables):
    """One process of the doctor, with an environment in which no launcher has set anything."""
    left_out = (*TORCHRUN_VARIABLES, "NODE_RANK", "NNODES", "GLOO_SOCKET_IFNAME", "TZ")
    env = {name: value for name, value in os.environ.items()
           if name not in left_out and not name.startswith("SLURM")}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1", **variables}
    return subprocess.Popen([*prefix, *DOCTOR, *map(str, args)], env=env, text=True, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def start_rank(rank, world, *args, port, prefix=(), **variables):
    place = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **variables}
    return start(*args, prefix=prefix, **{name: str(value) for name, value in place.items()})


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


def verdict(output):
    """The lines from the verdict on, each finding in one line."""
    lines = re.sub(r"\n {5}", " ", output).splitlines()
    at = next(i for i, line in enumerate(lines) if re.match(r"ready|NOT ready", line))
    return lines[at:]


# ----------------------------------------------------------------------------------------------------
# 1. Nothing wrong

def test_one_process_alone(tmp_path):
    folder = tmp_path / "runs" / "big"
    [(code, output, errors)] = finish(start(*QUICK, "--checkpoint-dir", folder))
    assert code == 0, output + errors
    assert output.startswith("doctor: 1 node, 1 process, ")
    assert f"checkpoints: {folder} (" in output and "seen by all, locks work" in output
    assert verdict(output)[0].startswith("ready")
    assert all(len(line) <= 110 for line in output.splitlines())
    assert not list(tmp_path.iterdir()), "what was made for the test is gone again"


@pytest.mark.slow
def test_two_processes_by_torchrun(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "kept").touch()
    result = run_script([*QUICK, "--checkpoint-dir", folder], nproc=2, script="tools/doctor.py",
                        env={"CUDA_VISIBLE_DEVICES": ""})
    assert result.stdout.startswith("doctor: 1 node, 2 processes, MASTER_ADDR=")
    assert re.search(r"all 2 ranks, gloo, bus bandwidth: all-reduce \d.*, all-gather \d", result.stdout)
    assert re.search(r"links within nodes: 2 directions, median \d.*slowest rank [01] -> [01]", result.stdout)
    assert verdict(result.stdout)[0].startswith("ready")
    assert [path.name for path in folder.iterdir()] == ["kept"]


@pytest.mark.slow
def test_nproc_gives_the_exit_code_without_a_traceback(tmp_path):
    args = ["--quick", "--need-gib", "1e9", "--nproc", 2, "--checkpoint-dir", tmp_path]
    [(code, output, errors)] = finish(start(*args))
    assert code == 1 and "Traceback" not in errors
    lines = verdict(output)
    assert lines[0].startswith("NOT ready: 1 problem")
    assert re.match(r" x \S+: \S+ GiB are free in \S+, --need-gib is 1e\+09 make room", lines[1])


# ----------------------------------------------------------------------------------------------------
# 2. Rendezvous

def test_reasons_why_rank_0_is_not_reached():
    """Three at once: a name that does not exist, a port where nobody listens, a loopback address."""
    port = free_port()
    unknown = start_rank(1, 2, "--timeout", 4, port=port, MASTER_ADDR="no-such-host.invalid")
    nobody = start_rank(1, 2, "--timeout", 4, port=port)
    loopback = start("--timeout", 4, NNODES="2", NODE_RANK="1", MASTER_ADDR="localhost")
    expected = {unknown: "MASTER_ADDR=no-such-host.invalid does not resolve on ",
                nobody: f"nothing listens on 127.0.0.1:{port} (127.0.0.1, which is this machine itself)",
                loopback: "this machine itself, but there are several nodes"}
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
    assert re.search(rf"port {port} on \S+, rank 0's machine, is taken", first[2])
    if os.path.isdir("/proc/self/fd"):
        assert f"(process {os.getpid()})" in first[2]
    assert f"what answers on 127.0.0.1:{port} is not torch's store" in second[2]


def test_variables_that_are_missing_or_wrong():
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    bad = {"MASTER_ADDR, MASTER_PORT is not": {"RANK": "0", "WORLD_SIZE": "2"},
           "RANK=2 is outside WORLD_SIZE=2": {"RANK": "2", "WORLD_SIZE": "2", **address},
           "MASTER_PORT=x is no port": {"RANK": "0", "WORLD_SIZE": "2", **address, "MASTER_PORT": "x"}}
    for (code, _, errors), text in zip(finish(*(start(**variables) for variables in bad.values())), bad):
        assert code == 1 and text in errors and len(errors.splitlines()) == 1


@pytest.mark.slow
def test_by_srun_on_a_real_slurm(tmp_path):
    """Its node names lead nowhere, which is said; with an address in MASTER_ADDR the same command runs."""
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    address = slurm_cluster.own_address()
    with slurm_cluster.slurm_cluster(tmp_path / "slurm", names=("n1", "n2")) as variables:
        srun = ["srun", "--nodes=2", "--ntasks-per-node=1"]
        args = [*QUICK, "--checkpoint-dir", tmp_path / "run"]
        [(code, output, errors)] = finish(start(*args, prefix=srun, **variables))
        assert code == 1 and errors.count("MASTER_ADDR=n1 does not resolve on ") == 2, output + errors
        [(code, output, errors)] = finish(start(*args, prefix=srun, **variables, MASTER_ADDR=address))
    assert code == 0, output + errors
    assert "2 processes, MASTER_ADDR=" in output and "all 2 ranks, gloo" in output


@pytest.mark.slow
def test_missing_ranks_are_named(tmp_path):
    port, args = free_port(), [*QUICK, "--timeout", "12", "--checkpoint-dir", tmp_path]
    began = time.monotonic()
    first, third = finish(*(start_rank(rank, 4, *args, port=port) for rank in (0, 2)))
    assert time.monotonic() - began < 60
    assert first[0] == third[0] == 1 and third[1] == ""
    assert "2 of 4 processes" in first[1] and "all 4 ranks" not in first[1]
    assert verdict(first[1])[1].startswith(" x ranks 1,3: did not come within 12 s")


@pytest.mark.slow
def test_a_rank_that_stops_answering_is_named(tmp_path):
    port, args = free_port(), [*QUICK, "--checkpoint-dir", tmp_path]
    first, second = (start_rank(rank, 3, *args, port=port) for rank in (0, 1))
    # Rank 1 has said hello, or is about to, once it holds its two connections to rank 0.
    deadline = time.monotonic() + 60
    while len(psutil.Process(second.pid).net_connections()) < 2:
        assert time.monotonic() < deadline and second.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    second.send_signal(signal.SIGSTOP)
    third = start_rank(2, 3, *args, port=port)
    (code, output, _), (code_2, _, _) = finish(first, third)
    second.kill()
    second.communicate()
    assert code == code_2 == 1
    pattern = r" x rank 1 \(\S+\): no answer within 25 s at 'machines and versions'"
    assert re.match(pattern, verdict(output)[1])


# ----------------------------------------------------------------------------------------------------
# 3. Differences between ranks

@pytest.mark.slow
def test_different_environments(tmp_path):
    port, args = free_port(), [*QUICK, "--checkpoint-dir", tmp_path]
    first = start_rank(0, 2, *args, port=port)
    second = start_rank(1, 2, *args, port=port, OMP_NUM_THREADS="64", TZ="Asia/Tokyo")
    (code, output, errors), (code_1, output_1, _) = finish(first, second)
    assert (code, code_1, output_1) == (0, 0, ""), output + errors
    lines = verdict(output)
    assert re.fullmatch(r"ready, with \d+ warnings", lines[0])
    text = "\n".join(lines)
    assert re.search(r"! rank 1 \(\S+\): OMP_NUM_THREADS is 64, elsewhere 1 ", text)
    assert re.search(r"! rank 1 \(\S+\): TZ is Asia/Tokyo, elsewhere not set ", text)
    assert re.search(r": \d+ threads of 2 processes on \S+ cores set OMP_NUM_THREADS=", text)


@pytest.mark.slow
def test_folders_that_are_not_the_same(tmp_path):
    port, folders = free_port(), [tmp_path / name for name in ("a", "b", "c")]
    folders[1].mkdir()
    ranks = [start_rank(rank, 3, *QUICK, "--checkpoint-dir", folder, port=port)
             for rank, folder in enumerate(folders)]
    results = finish(*ranks)
    assert [code for code, _, _ in results] == [1, 1, 1]
    text = "\n".join(verdict(results[0][1]))
    assert re.search(rf"x rank 1 \(\S+\): {folders[1]} is not the folder that rank 0 sees", text)
    assert re.search(rf"x rank 2 \(\S+\): {folders[2]} is not there", text)
    assert "NOT seen by all" in results[0][1]
    assert [path.name for path in tmp_path.iterdir()] == ["b"] and not list(folders[1].iterdir())


def in_namespace(*lines):
    """What starts a program with mounts and a host name of its own, after these lines of shell."""
    script = "; ".join(["set -e", *lines, 'exec "$@"'])
    return ["unshare", "--mount", "--uts", "--propagation", "private", "sh", "-c", script, "sh"]


@pytest.mark.slow
def test_full_and_read_only_disks(tmp_path):
    """Two nodes by their host names, each with a tmpfs of its own in the same place."""
    need(*in_namespace(f"mount -t tmpfs none {tmp_path}"), "true")
    port, args = free_port(), [*QUICK, "--checkpoint-dir", tmp_path]
    full = in_namespace("hostname n1", f"mount -t tmpfs -o size=2m none {tmp_path}")
    read_only = in_namespace("hostname n2", f"mount -t tmpfs -o ro none {tmp_path}")
    ranks = [start_rank(rank, 2, *args, port=port, prefix=prefix, GLOO_SOCKET_IFNAME="lo")
             for rank, prefix in enumerate((full, read_only))]
    (code, output, _), (code_1, _, _) = finish(*ranks)
    assert code == code_1 == 1
    text = "\n".join(verdict(output))
    assert re.search(rf"x n1: cannot use {tmp_path}: No space left on device after \d MiB", text)
    assert f"x n2: cannot use {tmp_path}: Read-only file system" in text
    assert f"x n2: {tmp_path} is not the folder that rank 0 sees" in text
    assert re.search(r"^x  n1 .*^x  n2 ", output, re.MULTILINE | re.DOTALL)


def join_machines(names):
    """Namespaces of which each two are joined by a wire of their own; n2 sends to n3 at 40 Mbit/s."""
    for name in names:
        netns.ip("netns", "add", name)
        netns.ip("-n", name, "link", "set", "lo", "up")
    for a in (1, 2, 3):
        for b in range(a + 1, 4):
            first, second = names[a - 1], names[b - 1]
            netns.ip("-n", first, "link", "add", f"to{b}", "type", "veth", "peer", "name", f"to{a}",
                     "netns", second)
            for name, own, other in ((first, a, b), (second, b, a)):
                netns.ip("-n", name, "addr", "add", f"10.77.0.{own}/32", "dev", f"to{other}")
                netns.ip("-n", name, "link", "set", f"to{other}", "up")
                netns.ip("-n", name, "route", "add", f"10.77.0.{other}/32", "dev", f"to{other}")
    need("tc", "-n", names[1], "qdisc", "add", "dev", "to3", "root", "tbf", "rate", "40mbit", "burst", "64k",
         "latency", "100ms")


@pytest.mark.slow
def test_a_slow_link_is_named(tmp_path):
    if reason := netns.missing():
        pytest.skip(reason)
    need(*in_namespace("hostname n1"), "true")
    names = [f"doctor-{os.getpid()}-{index}" for index in (1, 2, 3)]
    try:
        join_machines(names)
        port, ranks = free_port(), []
        for i, name in enumerate(names):
            prefix = ["ip", "netns", "exec", name, *in_namespace(f"hostname n{i + 1}")]
            ranks.append(start_rank(i, 3, *QUICK[1:], "--checkpoint-dir", tmp_path, port=port, prefix=prefix,
                                    MASTER_ADDR="10.77.0.1", GLOO_SOCKET_IFNAME="to2" if i == 0 else "to1"))
        (code, output, errors), *_ = finish(*ranks)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
    assert code == 1, output + errors
    slowest = r"links between nodes: 6 directions, .* slowest rank 1 \(n2\) -> 2 \(n3\) [345][.\d]* MB/s"
    assert re.search(slowest, output)
    assert verdict(output)[1].startswith(" x rank 1 (n2) -> 2 (n3): carries ")


@pytest.mark.slow
def test_without_a_usable_host_name_it_says_what_to_set(tmp_path):
    """Two namespaces: the host name leads to an address that neither has, as on nodes set up badly."""
    if reason := netns.missing():
        pytest.skip(reason)
    with netns.two_machines() as machines:
        port, args = free_port(), [*QUICK, "--checkpoint-dir", tmp_path]
        ranks = [start_rank(i, 2, *args, port=port, prefix=machine.command(), MASTER_ADDR=machines[0].address)
                 for i, machine in enumerate(machines)]
        (code, output, _), _ = finish(*ranks)
    assert code == 1 and "2 nodes, 2 processes" in output
    text = "\n".join(verdict(output))
    assert re.search(r"x \S+10\.77\.0\.1: its host name .*set GLOO_SOCKET_IFNAME=fsdp", text)
    assert re.search(r"! all nodes: 2 nodes call themselves \S+ ", text)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    [(code, output, errors)] = finish(start(*QUICK, "--checkpoint-dir", tmp_path, CUDA_VISIBLE_DEVICES="0"))
    assert code == 0, output + errors
    assert re.search(r"1 \S.*\d+G", output) and "NCCL" in output and "driver" in output


# ----------------------------------------------------------------------------------------------------
# 4. What is made of what was found, on numbers of nodes that no test can start

@pytest.fixture
def doctor(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "tools"))
    import doctor
    return doctor


def big_survey(doctor, num_nodes=64, per_node=8):
    """What rank 0 knows of a healthy cluster of GPUs."""
    import torch

    world = num_nodes * per_node
    nodes = [list(range(i * per_node, (i + 1) * per_node)) for i in range(num_nodes)]
    labels = [f"n{i + 1:02d}" for i in range(num_nodes)]
    job = doctor.Job(0, 0, world, torch.device("cuda", 0), True, "n01", 29500, False, ["10.0.0.1"])
    args = Namespace(device="auto", need_gib=10.0, timeout=30.0, checkpoint_dir="/fs/run")
    hellos = {rank: {"host": labels[i], "machine": labels[i], "pid": 1000 + rank, "address": f"10.0.0.{i}",
                     "interface": "eth0", "local_rank": rank % per_node}
              for i, node in enumerate(nodes) for rank in node}
    survey = doctor.Survey(job, args, nodes, labels, hellos, [])
    survey.clocks = {node[0]: (i * 1e-5, 1e-4) for i, node in enumerate(nodes) if i}
    versions = {"python": "3.12.3", "torch": "2.13.0", "transformers": "5.23.0", "CUDA": "13.0",
                "NCCL": "2.28.3", "source": "0123456789", "driver": "580.65.06"}
    host = {"cores": hex(2**192 - 1), "threads": 1, "quota": None, "free_gib": 1900.0, "shm_gib": 1000.0,
            "nofile": 65536, "memlock_gib": None, "infiniband": True, "own_name": "works",
            "names_interface": False}
    gpu = {"on_machine": 8, "driver": "580", "visible": 8, "hidden": False, "name": "H200",
           "total_gib": 140.0, "users": []}
    folder = {"path": "/fs/run", "exists": True, "seen": True, "lock": "held", "type": "lustre"}
    for rank in range(world):
        own = {"index": rank % per_node, "uuid": f"GPU-{rank}", "free_gib": 139.0 + rank / world / 2}
        survey.machines[rank] = {"errors": [], "versions": dict(versions), "host": dict(host),
                                 "gpu": gpu | own, "environment": {"NCCL_DEBUG": "WARN"},
                                 "compute": 690.0 + rank % 7}
        survey.folders[rank] = dict(folder)
        if rank % per_node == 0:
            survey.folders[rank] |= {"free_gib": 120000.0, "write_mb_s": 1500.0 + rank}
    rates = {}
    for a, b in doctor.wanted_links(nodes, quick=False):
        rate = 400.0 if a // per_node == b // per_node else 45.0
        rates |= {(a, b): rate + a % 5, (b, a): rate + b % 5}
    group = {"all-reduce": 180.0, "all-reduce MiB": 256.0, "all-gather": 175.0, "all-gather MiB": 256.0}
    survey.links = {"group": group, "links": rates, "failed": {}, "wrong": [], "left out": 0}
    return survey


def test_sixty_four_equal_nodes_are_one_row(doctor, capsys):
    assert doctor.print_report(big_survey(doctor), 30.0) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 12 and max(map(len, lines)) <= 110 and lines[-1] == "ready"
    assert lines[2].startswith("n[01-64]") and "8 H200" in lines[2] and "1500..2004" in lines[2]


def test_among_sixty_four_nodes_only_what_differs_is_said(doctor, capsys):
    survey = big_survey(doctor)
    for rank in survey.nodes[16]:
        survey.machines[rank]["versions"] |= {"torch": "2.11.0", "driver": "570.1"}
    for node in survey.nodes[20:40]:
        for rank in node:
            survey.folders[rank]["seen"] = False
    for link in survey.links["links"]:
        if link[0] // 8 == 62 and link[1] // 8 != 62:  # a card that sends badly
            survey.links["links"][link] = 2.0
    survey.links["links"][8, 16] = 3.0
    survey.machines[40]["gpu"] |= {"free_gib": 90.0, "users": [[777, "/usr/bin/python3"]]}
    survey.machines[91]["compute"] = 410.0
    survey.machines[99]["gpu"]["uuid"] = "GPU-98"
    survey.clocks[80] = (12.3, 0.001)
    survey.folders[88]["write_mb_s"] = 30.0
    for report in survey.machines.values():
        report["host"]["nofile"] = 1024
    assert doctor.print_report(survey, 30.0) == 1
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 110 and len(output.splitlines()) < 50
    lines = verdict(output)
    assert lines[0] == "NOT ready: 6 problems, 5 warnings"
    expected = ["x n11: its clock is 12.3 s off", "x n17: torch is 2.11.0, elsewhere 2.13.0",
                "x ranks 98-99 (n13): 2 ranks are on one GPU", "x n[21-40]: /fs/run is not the folder",
                "x n63: 25 of 50 directions between it and others carry 2 GB/s",
                "x rank 8 (n02) -> 16 (n03): carries 3 GB/s", "! n17: driver is 570.1, elsewhere 580.65.06",
                "! rank 40 (n06): GPU 0 is in use by python3 (process 777): 90 GiB are free of 140",
                "! rank 91 (n12): computes at 410 TFLOP/s", "! all nodes: only 1024 files",
                "! n12: writes 30 MB/s"]
    for text in expected:
        assert any(line.startswith(" " + text) for line in lines), text


@pytest.mark.parametrize(("names", "text"), [
    (["n1", "n2", "n3", "n10"], "n[1-3,10]"), (["n01", "n02", "gpu7"], "gpu7,n[01-02]"), (["alpha"], "alpha"),
    (["n0", "n1"], "n[0-1]"), (["a1b", "a2b"], "a[1-2]b"), (["x", "y"], "x,y"),
])
def test_names_are_compressed(doctor, names, text):
    assert doctor.compress(names) == text


@pytest.mark.parametrize(("num_nodes", "per_node"), [
    (1, 2), (1, 8), (2, 1), (3, 1), (2, 4), (2, 8), (5, 3), (64, 8),
])
def test_each_link_is_measured_once_and_none_beside_another_of_its_node(doctor, num_nodes, per_node):
    nodes = [list(range(i * per_node, (i + 1) * per_node)) for i in range(num_nodes)]
    links = doctor.wanted_links(nodes, quick=False)
    rounds = doctor.schedule(links, nodes)
    assert sorted(link for pairs in rounds for link in pairs) == sorted(set(links)) == sorted(links)
    assert {rank for link in links for rank in link} == set(range(num_nodes * per_node))
    for pairs in rounds:
        ranks = [rank for pair in pairs for rank in pair]
        crossing = [rank // per_node for a, b in pairs if a // per_node != b // per_node for rank in (a, b)]
        assert len(ranks) == len(set(ranks)) and len(crossing) == len(set(crossing))
    assert len(rounds) <= 30
