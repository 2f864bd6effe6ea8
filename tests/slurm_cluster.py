"""A real SLURM on this machine: munged, slurmctld, and one slurmd for each of a few node names.

    with slurm_cluster(folder) as env:        # env: SLURM_CONF, which sbatch, srun and the others read
        subprocess.run(["sinfo"], env=os.environ | env)

It needs root and Debian's packages slurm-wlm and munge. Everything is written below `folder`, on ports of its
own, so that it disturbs no other SLURM; the nodes are known by their addresses, so that /etc/hosts stays as
it is. The daemons are children of this process and end with the context.

    python tests/slurm_cluster.py FOLDER      the same by hand, until Ctrl-C
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")

# A requeued job starts again only when the credential of its last start has expired (2 minutes by default);
# KillWait (30 s by default) passes between SIGTERM and SIGKILL. Both are short here: tests should be quick.
CONFIG = """\
ClusterName=tests
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,requeue_setup_env_fail
ReturnToService=2
SlurmdParameters=config_overrides
KillWait={kill_wait}
SlurmdTimeout=60
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP
PartitionName=gpu Nodes={gpu_names} MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr={address} Port={port} CPUs={cpus} State=UNKNOWN{more}"


def missing():
    """Why no cluster can be started here, in words; None where it can."""
    if os.geteuid() != 0:
        return "the SLURM of the tests is started by root only"
    absent = [name for name in PROGRAMS if not shutil.which(name)]
    return f"{', '.join(absent)} not found: bash tests/run.sh --all installs SLURM" if absent else None


def free_ports(count):
    """Below the range from which the kernel takes those of outgoing connections."""
    sockets = [socket.socket() for _ in range(count)]
    ports, candidate = [], 10_000 + os.getpid() % 10_000
    while len(ports) < count:
        with contextlib.suppress(OSError):
            sockets[len(ports)].bind(("", candidate))
            ports.append(candidate)
        candidate += 1
    for listening in sockets:
        listening.close()
    return ports


def own_address():
    """An address of this machine that is not 127.x, if it has one: what real nodes know each other by."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # reserved for documentation; nothing is sent
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def write_config(folder, names, gpu_names, cpus, kill_wait):
    """GPUs are links to other devices: SLURM hands them out and numbers them, and nothing opens them."""
    host, address = socket.gethostname().split(".")[0], own_address()
    port, *ports = free_ports(1 + len(names + gpu_names))
    nodes = "\n".join(
        NODE.format(name=name, host=host, address=address, port=node_port, cpus=cpus,
                    more=" Gres=gpu:2" if name in gpu_names else "")
        for name, node_port in zip(names + gpu_names, ports))
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(
        host=host, address=address, port=port, folder=folder, nodes=nodes, kill_wait=kill_wait,
        names=",".join(names), gpu_names=",".join(gpu_names)))
    for index, device in enumerate(("/dev/null", "/dev/zero")):
        (folder / f"gpu{index}").symlink_to(device)
    (folder / "gres.conf").write_text(
        f"NodeName={','.join(gpu_names)} Name=gpu Flags=nvidia_gpu_env File={folder}/gpu[0-1]\n")
    return config


def wait_until_idle(names, env, daemons, timeout=60):
    deadline = time.monotonic() + timeout
    while True:
        shown = subprocess.run(["sinfo", "--noheader", "--Node", "--format=%N %T"], env=env, text=True,
                               capture_output=True)
        if shown.returncode == 0 and shown.stdout.splitlines() == [f"{name} idle" for name in names]:
            return
        ended = [daemon.args[0] for daemon in daemons if daemon.poll() is not None]
        if ended or time.monotonic() > deadline:
            raise AssertionError(f"no cluster; ended: {ended}; sinfo: {shown.stdout}{shown.stderr}")
        time.sleep(0.1)


@contextlib.contextmanager
def slurm_cluster(folder, names=("n1", "n2"), gpu_names=("g1", "g2"), cpus=4, kill_wait=5):
    """The daemons, for as long as the context lasts; yields the variables that SLURM's commands need.

    The nodes `names` are those of the default partition, `gpu_names` of the partition gpu, with two each."""
    folder = Path(folder)
    all_names = (*names, *gpu_names)
    for name in ("munge", "state", *(f"spool-{name}" for name in all_names)):
        (folder / name).mkdir(parents=True, exist_ok=True)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    config = write_config(folder, names, gpu_names, cpus, kill_wait)
    variables = {"SLURM_CONF": str(config)}
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | variables
    commands = [
        # --force: the folders of tests are closed to other users, which munged would refuse.
        ["munged", "--foreground", "--force", f"--socket={folder}/munge/socket", f"--key-file={key}",
         f"--pid-file={folder}/munge/pid", f"--seed-file={folder}/munge/seed"],
        ["slurmctld", "-D", "-i"],
        *(["slurmd", "-D", "-N", name] for name in all_names),
    ]
    daemons = []
    try:
        for command in commands:
            with open(folder / f"{command[0]}-{command[-1]}.log".replace("/", "_"), "ab") as log:
                # Sessions of their own: a Ctrl-C in the terminal would end them before their jobs.
                daemons.append(subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log,
                                                stderr=log, start_new_session=True))
            while command[0] == "munged" and not (folder / "munge" / "socket").exists():
                time.sleep(0.02)
        wait_until_idle(sorted(all_names), env, daemons)
        yield variables
    finally:
        stop(daemons, env)


def stop(daemons, env):
    """First the jobs, because a slurmd leaves those that run alone; then the daemons, munged last."""
    if daemons and all(daemon.poll() is None for daemon in daemons):
        subprocess.run(["scancel", "--user=root"], env=env, capture_output=True)
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline and subprocess.run(
                ["squeue", "--noheader"], env=env, capture_output=True).stdout.strip():
            time.sleep(0.1)
    for daemon in reversed(daemons):
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the context, so the daemons
    with slurm_cluster(Path(sys.argv[1]).resolve()) as started, contextlib.suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={started['SLURM_CONF']}", flush=True)
        signal.pause()
