"""Look at all nodes before a long run: one table, one verdict, in under a minute.

    python tools/doctor.py                                               # this machine; --nproc 8: as eight
    ./launch_single_node.sh tools/doctor.py --checkpoint-dir runs/big    # one process a GPU
    torchrun ... tools/doctor.py --checkpoint-dir runs/big               # with the training's own launch line
    srun --ntasks-per-node 8 python tools/doctor.py --checkpoint-dir runs/big
    NNODES=2 NODE_RANK=0 MASTER_ADDR=n1 python tools/doctor.py           # one process a node, no torchrun

Started by a launcher in place of a training script, it checks: MASTER_ADDR and its port; clocks; equal
versions, source and environment; GPUs, their free memory and who else uses them; cores, limits, /dev/shm; the
checkpoint folder's space, speed and locks, and whether all nodes see the same one; all-reduce and all-gather
over all ranks; the bandwidth of single links. It ends with "ready", "ready, with N warnings" or "NOT ready"
and what to do, exit code 0 or 1. Equal nodes share a row. Nothing waits for ever: each stage has a deadline
and names who is missing.

torchrun looks for MASTER_ADDR itself before it starts any script. Where it does not get that far, the last of
the lines above, on each node, says why.

Contents: 1 Arguments and deadlines, 2 Rendezvous, 3 Messages between ranks, 4 One process and its machine,
5 Checkpoint folder, 6 Links, 7 Findings, 8 Table, 9 The stages in their order.
"""

import argparse
import contextlib
import errno
import faulthandler
import fcntl
import hashlib
import importlib.metadata
import ipaddress
import json
import math
import os
import platform
import queue
import re
import resource
import socket
import statistics
import struct
import subprocess
import sys
import textwrap
import threading
import time
import uuid
import warnings
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TextIO

# torch's own lines about a failed connection are stack traces; this program says the same in one sentence.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
try:
    import torch
    import torch.distributed as dist

    # The address, port and device that a training would use are those that are looked at.
    from train_llm import UserError, read_ranks, relaunch_under_torchrun
except (ImportError, OSError) as import_error:  # OSError: a shared library of torch's
    sys.exit(f"doctor: NOT ready: {socket.gethostname()}: Python cannot load torch or {ROOT}/train_llm.py: "
             f"{import_error}; install requirements.txt there")

GIB, MIB = 2**30, 2**20
WIDTH = 110
# Seconds that a stage may take. What is behind them usually takes one to five.
CLOCK_S, MACHINE_S, FOLDER_S, GROUP_S, ROUND_S = 10, 25, 25, 30, 15
WORD_S = 60  # for a word of rank 0's, who may first wait for all others
MAX_LINES = 12  # findings of a kind that are shown
FEW_RANKS = 8  # up to here every pair of ranks is measured, one after the other on each node


# ----------------------------------------------------------------------------------------------------
# 1. Arguments and deadlines

def parse_args() -> Namespace:
    parser = argparse.ArgumentParser(prog="doctor.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint-dir", metavar="DIR", default="checkpoints",
        help="the run's folder (default: checkpoints)")
    add("--need-gib", type=float, default=10.0, help="space that the run wants there (default: 10)")
    add("--timeout", type=float, default=30.0, help="seconds to wait for all ranks (default: 30)")
    add("--device", choices=["auto", "cpu"], default="auto", help="cpu: gloo links, GPUs are left alone")
    add("--nproc", type=int, metavar="N", help="start N processes on this machine (default: one)")
    add("--quick", action="store_true", help="smaller files and messages, neighbouring ranks only")
    args = parser.parse_args()
    # What train_llm.py's functions want to know besides.
    args.hsdp_shard_size, args.gpu_ranks, args.stop_signals, args.max_restarts = None, None, "", 0
    return args


def limited(seconds: float, function: Callable, *args):
    """The function's result. Raises TimeoutError after so many seconds and leaves its thread behind, because
    a file system, driver or name server that hangs cannot be interrupted."""
    outcome = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put((function(*args), None))
        except Exception as error:  # raised again below, in the thread that waits
            outcome.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        value, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no end after {seconds:g} s") from None
    if error is not None:
        raise error
    return value


def note(text: str) -> None:
    print(f"doctor: {text}", file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


# ----------------------------------------------------------------------------------------------------
# 2. Rendezvous: from the launcher's variables to a store that all ranks reach

@dataclass
class Job:
    """This process among the others, before it has spoken to any of them."""
    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    several_nodes: bool  # as far as the launcher's variables say so
    host: str = ""  # MASTER_ADDR; empty: one process, no rendezvous
    port: int = 0
    has_agent: bool = False  # torchrun's agent serves the store; else rank 0 does
    addresses: list[str] = field(default_factory=list)  # of MASTER_ADDR

    @property
    def me(self) -> str:
        return socket.gethostname()


def read_job(args: Namespace) -> Job:
    """From torchrun's or srun's variables, from NNODES and NODE_RANK (one process a node), or alone."""
    env = os.environ
    by_srun = "RANK" not in env and int(env.get("SLURM_STEP_NUM_TASKS") or 1) > 1
    if not by_srun and "RANK" not in env and "NODE_RANK" in env and "NNODES" in env:
        env.update(RANK=env["NODE_RANK"], WORLD_SIZE=env["NNODES"], LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        env.setdefault("MASTER_PORT", "29500")
    try:
        if by_srun:  # what torchrun would set; rank 0 is on the first node
            host = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
            if re.search(r"[\[,]", host):  # a compressed list: n[01-04]
                host = subprocess.check_output(["scontrol", "show", "hostnames", host], text=True).split()[0]
            port = 20000 + (int(env["SLURM_JOB_ID"]) + int(env["SLURM_STEP_ID"])) % 20000  # another a step
            env |= {"MASTER_ADDR": env.get("MASTER_ADDR", host), "LOCAL_RANK": env["SLURM_LOCALID"],
                    "MASTER_PORT": env.get("MASTER_PORT", str(port)), "RANK": env["SLURM_PROCID"],
                    "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"]}
        ranks = limited(MACHINE_S, read_ranks, args)
    except TimeoutError:
        raise UserError("the CUDA driver does not answer: try nvidia-smi on this node, reboot it") from None
    except (OSError, subprocess.SubprocessError, KeyError, ValueError) as error:
        raise UserError(f"the launcher's variables make no sense: {type(error).__name__}: {error}") from error
    here = int(env.get("LOCAL_WORLD_SIZE") or ranks.world_size)
    several = here < ranks.world_size or int(env.get("SLURM_STEP_NUM_NODES") or 1) > 1
    job = Job(ranks.rank, ranks.local_rank, ranks.world_size, ranks.device, several)
    if "RANK" not in env:
        return job
    if lacking := [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not env.get(name)]:
        raise UserError(f"RANK is set but {', '.join(lacking)} is not: use a launcher, or set them all")
    if not env["MASTER_PORT"].isdigit() or not 0 < int(env["MASTER_PORT"]) < 65536:
        raise UserError(f"MASTER_PORT={env['MASTER_PORT']} is no port: set a number from 1024 to 65535")
    job.host, job.port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    job.has_agent = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return job


def addresses(host: str, seconds: float = 10) -> list[str]:
    """The IP addresses of a name, as this machine sees them. Raises OSError (TimeoutError is one)."""
    found = limited(seconds, lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
    return list(dict.fromkeys(entry[4][0] for entry in found))


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def resolve_master(job: Job) -> list[str]:
    try:
        found = addresses(job.host)
    except TimeoutError:
        raise UserError(f"MASTER_ADDR={job.host}: no name server answers on {job.me} within 10 s; mend its "
                        "DNS, or use the IP address of rank 0's machine") from None
    except OSError as error:
        raise UserError(f"MASTER_ADDR={job.host} does not resolve on {job.me} ({error.strerror}); use the IP "
                        "address of rank 0's machine, or mend DNS or /etc/hosts here") from None
    if job.several_nodes and job.rank and all(map(is_loopback, found)) and not runs_beside_rank_0():
        raise UserError(f"MASTER_ADDR={job.host} is {found[0]} on {job.me}, this machine itself, but there "
                        "are several nodes; set it to an address of rank 0's machine that the others reach")
    return found


def runs_beside_rank_0() -> bool:
    env = os.environ
    return (env.get("GROUP_RANK") or env.get("SLURM_NODEID") or env.get("NODE_RANK") or "0") == "0"


def serve_store(job: Job) -> dist.Store | None:
    """Rank 0, where no torchrun does it: the store's server. Raises UserError where the port is not free."""
    if job.rank or job.has_agent:
        return None
    try:
        # By hand first, because this names the reason; torch's own error is a page.
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", job.port))
        return limited(10, lambda: dist.TCPStore("localhost", job.port, is_master=True,
                                                 wait_for_workers=False, timeout=timedelta(seconds=10)))
    except (OSError, RuntimeError) as error:
        taken = getattr(error, "errno", 0) == errno.EADDRINUSE
        reason = f"is taken{port_owner(job.port)}" if taken else f"cannot be opened: {one_line(error)}"
        raise UserError(f"port {job.port} on {job.me}, rank 0's machine, {reason}; "
                        "set another MASTER_PORT on all nodes, or end that program") from None


def port_owner(port: int) -> str:
    """' by NAME (process N)' as far as /proc shows it to this user."""
    lines = read_text("/proc/net/tcp").splitlines()[1:] + read_text("/proc/net/tcp6").splitlines()[1:]
    # The second column ends in the port, 0A is LISTEN, the tenth is the socket's inode.
    rows = [row for row in map(str.split, lines) if row[3] == "0A" and int(row[1].split(":")[1], 16) == port]
    sockets = {f"socket:[{row[9]}]" for row in rows}
    for link in Path("/proc").glob("[0-9]*/fd/*") if sockets else []:
        try:
            if os.readlink(link) in sockets:
                pid = link.parts[2]
                return f" by {read_text(f'/proc/{pid}/comm').strip()} (process {pid})"
        except OSError:
            continue  # closed meanwhile, or another user's
    return ""


def read_text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def reach_port(job: Job, found: list[str], seconds: float) -> None:
    """Returns once something accepts a connection. Raises UserError with the reason that was seen last."""
    # An agent listens before it starts its workers; rank 0 may still be importing torch.
    patience = min(seconds, 5) if job.has_agent else seconds
    start, told, target = time.monotonic(), False, f"{job.host}:{job.port}"
    while True:
        left = patience - (time.monotonic() - start)
        try:
            socket.create_connection((job.host, job.port), timeout=max(1, min(5, left))).close()
            return
        except OSError as error:
            cause = error
        if time.monotonic() - start > patience:
            break
        if not told and time.monotonic() - start > 10 and job.local_rank == 0:
            note(f"{job.me} is still waiting for {target} ({one_line(cause)})")
            told = True
        time.sleep(0.3)
    if isinstance(cause, ConnectionRefusedError):
        hint = ", which is this machine itself" if is_loopback(found[0]) else ""
        raise UserError(f"nothing listens on {target} ({found[0]}{hint}), tried from {job.me} for "
                        f"{patience:.0f} s; start rank 0 there, and give all nodes the same MASTER_ADDR and "
                        "MASTER_PORT")
    raise UserError(f"no way from {job.me} to {target} ({found[0]}) in {patience:.0f} s: {one_line(cause)}; "
                    "open TCP between the nodes, or set MASTER_ADDR to an address that all nodes reach")


def open_store(job: Job, seconds: float) -> tuple[dist.Store | None, list[dist.Store]]:
    """(rank 0's server, two connections: collectives must not wait behind the messages of section 3)."""
    if not job.host:
        return None, [dist.HashStore()] * 2
    job.addresses = resolve_master(job)
    server = serve_store(job)
    reach_port(job, job.addresses, seconds if job.rank else min(seconds, 5))

    def connect() -> dist.Store:
        return dist.TCPStore(job.host, job.port, is_master=False, wait_for_workers=False,
                             timeout=timedelta(seconds=10))

    try:
        stores = [limited(8, connect) for _ in range(2)]
    except (TimeoutError, RuntimeError):
        raise UserError(f"what answers on {job.host}:{job.port} is not torch's store, says {job.me}: another "
                        "program has that port; set another MASTER_PORT on all nodes") from None
    # A port that two jobs share must not mix their messages, nor a restart by torchrun those of the last try.
    run = os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("SLURM_JOB_ID") or ""
    prefix = f"doctor/{run}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    return server, [dist.PrefixStore(prefix, store) for store in stores]


# ----------------------------------------------------------------------------------------------------
# 3. Messages between ranks, through the store: no collective runs before all have answered

def post(store: dist.Store, key: str, value: object) -> None:
    store.set(key, json.dumps(value))


def fetch(store: dist.Store, key: str, seconds: float):
    """Raises UserError where nobody posted it in time, or the store is gone."""
    end = time.monotonic() + seconds
    while True:
        try:
            # In short pieces, because Ctrl-C is not noticed inside.
            store.wait([key], timedelta(seconds=max(0.01, min(1.0, end - time.monotonic()))))
            return json.loads(store.get(key))
        except dist.DistStoreError:
            if time.monotonic() > end:
                raise UserError(f"rank 0 says nothing more (waiting for {key!r}); its own output says why"
                                ) from None
        except RuntimeError:
            raise UserError(f"the connection to rank 0 is lost (waiting for {key!r}); its own output says why"
                            ) from None


def collect(store: dist.Store, stage: str, ranks: list[int], seconds: float) -> dict[int, object]:
    """Rank 0: what the ranks posted as STAGE/RANK, without those that did not in time."""
    end, found, waiting = time.monotonic() + seconds, {}, list(ranks)
    while waiting:
        for rank in [rank for rank in waiting if store.check([f"{stage}/{rank}"])]:
            found[rank] = json.loads(store.get(f"{stage}/{rank}"))
        waiting = [rank for rank in waiting if rank not in found]
        show_progress(stage, len(found), len(ranks))
        if time.monotonic() > end:
            break
        # Rarer questions where there are many to ask.
        time.sleep(0.02 + len(waiting) / 5000 if waiting else 0)
    return found


STAGES = {"hello": "waiting for all ranks", "clock": "clocks", "machine": "machines and versions",
          "folder": "checkpoint folder", "group": "all ranks together", "link": "links"}


def show_progress(stage: str, done: int, total: int) -> None:
    """A bar that overwrites itself; where stderr is no terminal nothing, the table is the output."""
    if sys.stderr.isatty() and stage in STAGES:
        bar = "#" * (20 * done // max(1, total))
        text = f"\rdoctor: [{bar:20}] {STAGES[stage]} {done}/{total}\x1b[K"
        print(text, end="", file=sys.stderr, flush=True)


def say_hello(job: Job) -> dict:
    """Who and where this process is. Containers may share a host name: kernel and network count as well."""
    try:
        network = os.readlink("/proc/self/ns/net")
    except OSError:
        network = ""
    boot = read_text("/proc/sys/kernel/random/boot_id").strip()
    address = local_address(job)
    return {"host": job.me, "machine": f"{job.me} {boot} {network}", "pid": os.getpid(), "address": address,
            "interface": interface_of(address), "local_rank": job.local_rank}


def local_address(job: Job) -> str:
    """The address from which this machine reaches rank 0; no packet is sent for it."""
    if not job.host:
        return "127.0.0.1"
    info = socket.getaddrinfo(job.host, job.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(info[0], info[1]) as probe:
        probe.connect(info[4])
        return probe.getsockname()[0]


def interface_of(address: str) -> str:
    """The name of the network interface with this IPv4 address, '' if it is not found."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                # 0x8915 is SIOCGIFADDR: the address stands behind the name and the address family.
                found = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # an interface without an IPv4 address
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return ""


def measure_clocks(store: dist.Store, nodes: list[list[int]], rank: int) -> dict[int, tuple[float, float]]:
    """On rank 0 {first rank of a node: (seconds that its clock is ahead, what this may be off by)}, else {}.

    As NTP does it: the other clock is read between two readings of one's own; the quickest of several
    exchanges bounds the error best."""
    offsets, end = {}, time.monotonic() + CLOCK_S
    for done, leader in enumerate([ranks[0] for ranks in nodes[1:]]):
        if rank not in (0, leader):
            continue
        best = (0.0, math.inf)
        try:
            for i in range(8):
                sample = exchange_time(store, f"clock/{leader}/{i}", rank, end)
                best = min(best, sample, key=lambda pair: pair[1])
        except UserError:
            pass  # this node answers no more; the next stage names it
        if rank == 0 and best[1] < math.inf:
            offsets[leader] = best
        show_progress("clock", done + 1, len(nodes) - 1)
    return offsets


def exchange_time(store: dist.Store, key: str, rank: int, end: float) -> tuple[float, float]:
    left = max(0.1, end - time.monotonic())
    if rank:
        fetch(store, key + "/ask", left)
        post(store, key, time.time())
        return 0.0, math.inf
    before = time.time()
    post(store, key + "/ask", 0)
    theirs = fetch(store, key, left)
    after = time.time()
    return theirs - (before + after) / 2, (after - before) / 2


# ----------------------------------------------------------------------------------------------------
# 4. One process and its machine

# Differences in these decide nothing, or are meant: they are as many as there are machines.
OWN_VARIABLES = {"CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TORCH_CPP_LOG_LEVEL"}
NAMED_VARIABLES = {"TZ", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "HF_HOME", "HF_HUB_OFFLINE"}


def examine_machine(job: Job, quick: bool) -> dict:
    """What this process finds by itself; every part has its own deadline, so that one that hangs is named."""
    parts = {"versions": find_versions, "environment": find_environment, "host": lambda: find_host(job),
             "gpu": lambda: find_gpu(job.device), "compute": lambda: measure_compute(job.device, quick)}
    report, end = {"errors": []}, time.monotonic() + MACHINE_S - 5
    for name, part in parts.items():
        try:
            report[name] = limited(max(1, end - time.monotonic()), part)
        except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
            report["errors"].append(f"{name}: {one_line(error)}")
    if "versions" in report and (driver := report.get("gpu", {}).get("driver")):
        report["versions"]["driver"] = driver
    return report


def find_versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        found["transformers"] = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        found["transformers"] = "none"
    if torch.version.cuda:
        found |= {"CUDA": torch.version.cuda, "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
    digest = hashlib.sha256()
    for path in [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("tools/*.py"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return found | {"source": digest.hexdigest()[:10]}


def ask_driver(query: str) -> list[list[str]]:
    """Rows of nvidia-smi; none where there is no driver. Raises SubprocessError where it hangs or fails."""
    command = ["nvidia-smi", f"--query-{query}", "--format=csv,noheader,nounits"]
    try:
        rows = subprocess.run(command, capture_output=True, text=True, timeout=15, check=True).stdout
    except FileNotFoundError:
        return []
    return [[cell.strip() for cell in row.split(",")] for row in rows.splitlines() if row.strip()]


def find_environment() -> dict[str, str]:
    prefixes = ("NCCL_", "GLOO_", "TORCH_", "CUDA_", "OMP_", "MKL_", "KMP_", "UCX_", "FI_")
    return {name: value for name, value in sorted(os.environ.items())
            if name not in OWN_VARIABLES and (name.startswith(prefixes) or name in NAMED_VARIABLES)}


def find_host(job: Job) -> dict:
    """Cores as a mask, because the ranks of a node may share them; sizes in GiB, None where not known."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    quota = read_text("/sys/fs/cgroup/cpu.max").split()
    available = re.search(r"MemAvailable:\s+(\d+) kB", read_text("/proc/meminfo"))
    limit, used = (read_text(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    free = [int(available[1]) * 1024] if available else []
    free += [int(limit) - int(used)] if limit.isdigit() and used.isdigit() else []
    shm = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return {
        "cores": hex(sum(1 << core for core in cores)), "threads": torch.get_num_threads(),
        "quota": int(quota[0]) / int(quota[1]) if quota and quota[0].isdigit() else None,
        "free_gib": min(free) / GIB if free else None,
        "shm_gib": shm.f_blocks * shm.f_frsize / GIB if shm else None,
        "nofile": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "memlock_gib": None if memlock == resource.RLIM_INFINITY else memlock / GIB,
        "infiniband": os.path.isdir("/sys/class/infiniband") and bool(os.listdir("/sys/class/infiniband")),
        "own_name": judge_own_name(job), "names_interface": "GLOO_SOCKET_IFNAME" in os.environ,
    }


def judge_own_name(job: Job) -> str:
    """'works', or what is wrong with the address that this machine's own name leads to."""
    try:
        own = addresses(job.me, 5)
    except OSError:
        return "does not resolve on itself"
    if all(map(is_loopback, own)):
        return f"leads to {own[0]} on itself"
    return "works" if any(map(is_bindable, own)) else "leads to an address that it has not"


def is_bindable(address: str) -> bool:
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.bind((address, 0))
        return True
    except OSError:
        return False


def find_gpu(device: torch.device) -> dict:
    """The GPU of this process, how many it sees, and the processes that the driver knows on it."""
    cards = ask_driver("gpu=driver_version")
    found = {"on_machine": len(cards), "driver": cards[0][0] if cards else "", "visible": 0}
    if device.type != "cuda":
        # Hidden on purpose, or unknown to this build of torch?
        return found | {"hidden": os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")}
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    identity = str(getattr(properties, "uuid", "")) or f"{socket.gethostname()} {device}"
    users = ask_driver("compute-apps=gpu_uuid,pid,process_name")
    # Of a process in another container its number is of no use, its name is.
    users = [[int(row[1]), row[2]] for row in users
             if len(row) == 3 and identity in row[0] and row[1].isdigit()]
    return found | {"visible": torch.cuda.device_count(), "name": properties.name.removeprefix("NVIDIA "),
                    "uuid": identity, "index": device.index, "free_gib": free / GIB, "total_gib": total / GIB,
                    "users": users}


def measure_compute(device: torch.device, quick: bool) -> float:
    """TFLOP/s of a matrix product; a throttled GPU holds all others up."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a, product = torch.randn(size, size, device=device, dtype=dtype), None
    count, best, end = 0, math.inf, time.monotonic() + (0.2 if quick else 0.5)
    while count < 3 or time.monotonic() < end:
        wait_for(device)
        start = time.perf_counter()
        product = a @ a
        wait_for(device)
        best, count = min(best, time.perf_counter() - start), count + 1
    del product
    return 2 * size**3 / best / 1e12


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ----------------------------------------------------------------------------------------------------
# 5. Checkpoint folder: the same one everywhere, with space, speed and locks

@contextlib.contextmanager
def shared_token(folder: Path, rank: int) -> Iterator[dict | None]:
    """Rank 0 makes the folder, puts a file there for the others to find, and holds a lock on it while inside;
    what was made is removed again. Yields what the others must know, None to them."""
    if rank:
        yield None
        return
    found = {"token": uuid.uuid4().hex[:12], "path": str(folder), "lock": "none"}
    path, made, lock = folder / f".doctor-{found['token']}", [], None
    try:
        made, lock = limited(FOLDER_S / 2, place_token, folder, path)
        found["lock"] = "held" if lock else "none"
    except OSError as error:  # TimeoutError is one
        found["error"] = error.strerror or f"the file system does not answer ({error})"
    yield found
    with contextlib.suppress(OSError):  # not empty any more, or it hangs
        limited(5, remove_all, path, made)


def place_token(folder: Path, path: Path) -> tuple[list[Path], TextIO | None]:
    """(the folders that had to be made, the locked file or None)."""
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("tools/doctor.py looks for this file from all nodes, then removes it\n")
    lock = path.open()
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return made, None  # a file system without locks
    return made, lock


def remove_all(path: Path, folders: list[Path]) -> None:
    path.unlink(missing_ok=True)
    for folder in folders:
        folder.rmdir()


def examine_folder(folder: Path, token: dict, write_mib: int) -> dict:
    """What one rank sees; with write_mib, the first of its node, it writes as well."""
    found = {"path": str(folder), "exists": folder.is_dir(), "seen": None, "lock": "none",
             "type": file_system(folder)}
    path = folder / f".doctor-{token['token']}"
    # NFS clients keep an answer "no such file" for seconds; a listing asks the server again.
    for _ in range(0 if "error" in token else 10):
        found["seen"] = found["exists"] and path.name in os.listdir(folder)
        if found["seen"]:
            break
        time.sleep(0.5)
    if found["seen"] and token["lock"] == "held":
        found["lock"] = try_lock(path)
    if found["exists"] and write_mib:
        found |= measure_writes(folder, write_mib)
    return found


def try_lock(path: Path) -> str:
    """'held' as it should be, since rank 0 has it; 'ignored' where that is not seen here."""
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return "ignored"
        except BlockingIOError:
            return "held"
        except OSError:
            return "none"


def file_system(folder: Path) -> str:
    """Its type, of the mount with the longest path; '' where /proc does not tell."""
    best, kind = -1, ""
    for line in read_text("/proc/self/mountinfo").splitlines():
        fields, _, rest = line.partition(" - ")
        point = fields.split()[4].replace("\\040", " ")
        if len(point) >= best and Path(os.path.realpath(folder)).is_relative_to(point):
            best, kind = len(point), rest.split()[0]
    return kind


def measure_writes(folder: Path, max_mib: int) -> dict:
    """Free space, and MB/s to a file that is unlinked before it is written, so that a kill leaves nothing.

    Each piece is followed by fsync, or the page cache would be measured. Pieces grow until one takes a
    quarter of a second: a fast file system is not judged by fsync's own time, a slow one not kept long."""
    space = os.statvfs(folder)
    found = {"free_gib": space.f_bavail * space.f_frsize / GIB}
    block, piece, written, rates = os.urandom(16 * MIB), 1, 0, {}
    end, path = time.monotonic() + (3 if max_mib > 64 else 1), folder / f".doctor-{uuid.uuid4().hex[:12]}"
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        try:
            os.unlink(path)
            while written < max_mib and time.monotonic() < end:
                start = time.perf_counter()
                for offset in range(0, piece, 16):
                    write_all(descriptor, block[:min(16, piece - offset) * MIB])
                os.fsync(descriptor)
                seconds, written = time.perf_counter() - start, written + piece
                size, total = rates.get(piece, (0, 0.0))
                rates[piece] = (size + piece, total + seconds)
                piece = min(64, 2 * piece) if seconds < 0.25 else piece
        finally:
            os.close(descriptor)
    except OSError as error:
        found["error"] = f"{error.strerror} after {written} MiB" if written else error.strerror or str(error)
    if rates:
        size, total = rates[max(rates)]
        found["write_mb_s"] = size * MIB / 1e6 / max(total, 1e-9)
    return found


def write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view):]


def check_folder(folder: Path, token: dict, rank: int, write_mib: int) -> dict:
    """This rank's part, with a deadline. `seen` is None where nothing can be said about it."""
    unknown = {"path": str(folder), "exists": True, "seen": None, "lock": "none", "type": ""}
    if rank == 0 and "error" in token:
        return unknown | {"error": token["error"]}
    try:
        return limited(FOLDER_S - 5, examine_folder, folder, token, write_mib)
    except OSError as error:  # TimeoutError is one
        return unknown | {"error": error.strerror or f"the file system does not answer ({error})"}


# ----------------------------------------------------------------------------------------------------
# 6. Links: NCCL between GPUs, gloo on CPUs

def open_group(job: Job, store: dist.Store) -> None:
    """The deadline of the group is longer than this program's own, which say more."""
    # FSDP2 of torch 2.11 to 2.13 gathers with this function, which 2.13 wants to rename.
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor`", FutureWarning)
    dist.init_process_group("nccl" if job.device.type == "cuda" else "gloo", rank=job.rank,
                            world_size=job.world_size, store=dist.PrefixStore("group", store),
                            timeout=timedelta(seconds=4 * GROUP_S))


COLLECTIVES = {"all-reduce": 2, "all-gather": 1}  # how often the bytes go over each rank's link


def measure_group(job: Job, max_bytes: int) -> dict:
    """Bus bandwidth in GB/s of all-reduce and all-gather (all ranks); `wrong` lists wrong results.

    The bus bandwidth is what each rank's link carries, so that it can be compared between numbers of ranks:
    (n-1)/n of the gathered bytes, and twice that for a reduction, which scatters before it gathers."""
    world, found = job.world_size, {"wrong": []}
    for name, factor in COLLECTIVES.items():
        size, seconds = 256 * 1024, 0.0
        while True:
            count = size // 4 // world * world
            seconds = min(time_collective(job, name, count, found["wrong"]) for _ in range(2))
            # All ranks go on, or none: the slowest one's time decides.
            slowest = torch.tensor([seconds], device=job.device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            seconds = slowest.item()
            if seconds > 0.1 or size >= max_bytes:
                break
            size *= 4
        found[name] = factor * (world - 1) / world * 4 * count / seconds / 1e9
        found[f"{name} MiB"] = 4 * count / MIB
    return found


def time_collective(job: Job, name: str, count: int, wrong: list[str]) -> float:
    """Seconds of one collective over `count` floats; appends its name to `wrong` if a value is."""
    part = count // job.world_size
    data = torch.full((count if name == "all-reduce" else part,), job.rank + 1.0, device=job.device)
    gathered = torch.empty(count, device=job.device)
    wait_for(job.device)
    start = time.perf_counter()
    if name == "all-reduce":
        dist.all_reduce(data)
    else:
        dist.all_gather_into_tensor(gathered, data)
    wait_for(job.device)
    seconds = time.perf_counter() - start
    if name == "all-reduce":
        right = (data == job.world_size * (job.world_size + 1) / 2).all()
    else:
        expected = torch.arange(1.0, job.world_size + 1, device=job.device)
        right = (gathered.view(job.world_size, part) == expected[:, None]).all()
    if not right.item() and name not in wrong:
        wrong.append(name)
    return seconds


def wanted_links(nodes: list[list[int]], quick: bool) -> list[tuple[int, int]]:
    """Pairs of ranks, the most telling first.

    Few ranks: each pair. Many: neighbouring ranks of each node; each rank with its like on the next node, so
    that every network card takes part; nodes that are 2, 4, 8, … apart. Quick: neighbours alone."""
    ranks = [rank for node in nodes for rank in node]
    if len(ranks) <= FEW_RANKS and not quick:
        return [(a, b) for i, a in enumerate(ranks) for b in ranks[i + 1:]]
    inside = [pair for node in nodes for pair in zip(node, node[1:])]
    hops = [1] if quick else [2**i for i in range(max(1, math.ceil(math.log2(len(nodes) + 1))))]
    between = {}
    for hop in hops:
        for i, node in enumerate(nodes):
            other = nodes[(i + hop) % len(nodes)]
            for a, b in list(zip(node, other))[:None if hop == 1 and not quick else 1]:
                between[min(a, b), max(a, b)] = None
    return [*(pair for pair in between if pair[0] != pair[1]), *inside]


def schedule(links: list[tuple[int, int]], nodes: list[list[int]]) -> list[list[tuple[int, int]]]:
    """Rounds of links that do not disturb one another: a rank, and a node, have one partner at a time."""
    node_of = {rank: i for i, node in enumerate(nodes) for rank in node}
    rounds, busy = [], []
    for a, b in links:
        crossing = node_of[a] != node_of[b]
        uses = {a, b} | ({("node", node_of[a]), ("node", node_of[b])} if crossing else set())
        if not crossing and len(node_of) <= FEW_RANKS:
            uses.add(("inside", node_of[a]))
        place = next((i for i, used in enumerate(busy) if not used & uses), len(rounds))
        if place == len(rounds):
            rounds.append([])
            busy.append(set())
        rounds[place].append((a, b))
        busy[place] |= uses
    return rounds


def measure_link(job: Job, pair: tuple[int, int], max_bytes: int) -> float:
    """GB/s from this rank to its partner; both take turns (both ranks of the pair)."""
    buffer = torch.zeros(max_bytes // 4, device=job.device)
    header = torch.zeros(1, dtype=torch.int64, device=job.device)
    partner, rate = pair[0] + pair[1] - job.rank, 0.0
    for sender in pair:
        if sender == job.rank:
            rate = send_growing(job.device, partner, buffer, header)
        else:
            receive_all(partner, buffer, header)
    return rate


def send_growing(device: torch.device, partner: int, buffer: torch.Tensor, header: torch.Tensor) -> float:
    """Messages of growing size, until one takes long enough to be measured; the answer ends each."""
    count, seconds = min(64 * 1024, buffer.numel()), 0.0
    while True:
        times = []
        for _ in range(2):
            dist.send(header.fill_(count), partner)
            wait_for(device)
            start = time.perf_counter()
            dist.send(buffer[:count], partner)
            dist.recv(header, partner)
            wait_for(device)
            times.append(time.perf_counter() - start)
        seconds = min(times)
        if seconds > 0.05 or count == buffer.numel():
            dist.send(header.fill_(0), partner)
            wait_for(device)
            return 4 * count / seconds / 1e9
        count = min(4 * count, buffer.numel())


def receive_all(partner: int, buffer: torch.Tensor, header: torch.Tensor) -> None:
    while True:
        dist.recv(header, partner)
        count = int(header.item())
        if not count:
            return
        dist.recv(buffer[:count], partner)
        dist.send(header, partner)


def attempt(job: Job, store: dist.Store, stage: str, seconds: float, function: Callable[[], object]) -> None:
    """Runs the function with a deadline and posts {'value'} or {'error'} as STAGE/RANK."""
    def on_device() -> object:
        if job.device.type == "cuda":
            torch.cuda.set_device(job.device)  # each thread has its own
        return function()

    try:
        result = {"value": limited(seconds, on_device)}
    except (OSError, RuntimeError, ValueError) as error:
        result = {"error": one_line(error)}
    post(store, f"{stage}/{job.rank}", result)


def check_links(job: Job, quick: bool, stores: list[dist.Store], nodes: list[list[int]]) -> dict:
    """All ranks. What is returned is whole on rank 0: see note_results."""
    store, ranks, cuda = stores[0], list(range(job.world_size)), job.device.type == "cuda"
    found = {"group": {}, "links": {}, "failed": {}, "wrong": [], "left out": 0}
    size = (16 if quick or not cuda else 256) * MIB
    steps = {"open": lambda: open_group(job, stores[1]), "group": lambda: measure_group(job, size)}
    for stage, step in steps.items():
        attempt(job, store, stage, GROUP_S, step)
        if job.rank == 0:
            note_results(found, stage, collect(store, stage, ranks, GROUP_S + 3), ranks)
            post(store, f"{stage}/go", not found["failed"])
        if not fetch(store, f"{stage}/go", WORD_S):
            return found
    rounds, size = schedule(wanted_links(nodes, quick), nodes), (8 if quick else 64 if cuda else 16) * MIB
    end = time.monotonic() + (6 if quick else 20)
    for i, pairs in enumerate(rounds):
        stage, pair = f"link {i}", next((pair for pair in pairs if job.rank in pair), None)
        if job.rank == 0:
            show_progress("link", i, len(rounds))
            post(store, f"{stage}/go", time.monotonic() < end and not found["failed"])
        if not fetch(store, f"{stage}/go", WORD_S):
            found["left out"] = sum(map(len, rounds[i:]))
            break
        if pair:
            attempt(job, store, stage, ROUND_S, lambda pair=pair: measure_link(job, pair, size))
        if job.rank == 0:
            members = [rank for pair in pairs for rank in pair]
            note_results(found, stage, collect(store, stage, members, ROUND_S + 3), members)
    return found


def note_results(found: dict, stage: str, results: dict[int, dict], expected: list[int]) -> None:
    """Rank 0 sorts what was posted into `found`: rates, {(from, to): GB/s}, {rank: error}, what is wrong."""
    for i, rank in enumerate(expected):
        result = results.get(rank, {"error": "no answer"})
        # The members of a round stand in pairs, one behind the other.
        partner = expected[i ^ 1] if stage.startswith("link ") else None
        if "error" in result:
            names = {"open": "connecting all ranks", "group": "all-reduce"}
            tried = names.get(stage, f"link with rank {partner}")
            found["failed"][rank] = f"{tried} failed: {result['error']}"
        elif partner is not None:
            found["links"][rank, partner] = result["value"]
        elif stage == "group":
            found["group"] = found["group"] or result["value"]
            found["wrong"] += [(rank, operation) for operation in result["value"]["wrong"]]


# ----------------------------------------------------------------------------------------------------
# 7. Findings: what of all this is a warning, what a problem, and what to do

@dataclass
class Finding:
    """Those with the same text are shown as one; {} in it stands for the range of their values."""
    bad: bool
    ranks: tuple[int, ...]
    what: str
    do: str
    value: float | None = None
    place: str = ""  # said in place of the ranks


def problem(ranks: Iterable[int], what: str, do: str, value: float | None = None) -> Finding:
    return Finding(True, tuple(ranks), what, do, value)


def warning(ranks: Iterable[int], what: str, do: str, value: float | None = None) -> Finding:
    return Finding(False, tuple(ranks), what, do, value)


@dataclass
class Survey:
    """All that rank 0 knows in the end. A rank that did not come is in no node."""
    job: Job
    args: Namespace
    nodes: list[list[int]]
    labels: list[str]  # the nodes' names
    hellos: dict[int, dict]
    missing: list[Finding]
    clocks: dict[int, tuple[float, float]] = field(default_factory=dict)
    machines: dict[int, dict] = field(default_factory=dict)
    folders: dict[int, dict] = field(default_factory=dict)
    links: dict = field(default_factory=dict)

    def part(self, name: str) -> dict[int, dict]:
        """One part of the ranks' reports, of those that have it."""
        return {rank: report[name] for rank, report in sorted(self.machines.items()) if name in report}

    def beside(self, rank: int) -> list[int]:
        """The ranks of its node: what the first of them finds out about the machine counts for all."""
        return next(node for node in self.nodes if rank in node)


def judge(survey: Survey) -> list[Finding]:
    """All findings, those with the same text merged, problems first."""
    found = list(survey.missing)
    for check in (judge_nodes, judge_equal, judge_gpus, judge_hosts, judge_folder, judge_group, judge_links):
        found += check(survey)
    merged = defaultdict(list)
    for finding in found:
        merged[finding.bad, finding.what, finding.do, finding.place].append(finding)
    result = []
    for (bad, what, do, place), same in merged.items():
        ranks = tuple(sorted({rank for finding in same for rank in finding.ranks}))
        values = [finding.value for finding in same if finding.value is not None]
        what = what.replace("{}", span(values)) if values else what
        result.append(Finding(bad, ranks, what, do, place=place or where(survey, ranks)))
    return sorted(result, key=lambda finding: not finding.bad)


def judge_nodes(survey: Survey) -> Iterator[Finding]:
    """Clocks, names and addresses."""
    job, nodes = survey.job, survey.nodes
    for leader, (offset, error) in survey.clocks.items():
        off = abs(offset) - error
        if off > 10:
            yield problem(survey.beside(leader), "its clock is {} s off rank 0's", "start chrony or ntpd: "
                          "torchrun's c10d rendezvous takes a node that is 15 s off for dead", offset)
        elif off > 0.5:
            yield warning(survey.beside(leader), "its clock is {} s off rank 0's",
                          "start chrony or ntpd there", offset)
    if len(nodes) == 1:
        return
    hosts = Counter(survey.hellos[node[0]]["host"] for node in nodes)
    for host, count in hosts.items():
        same = [rank for node in nodes for rank in node if survey.hellos[rank]["host"] == host]
        if count > 1:
            yield warning(same, f"{count} nodes call themselves {host}", "torchrun's c10d rendezvous takes "
                          "them for one machine: give each its own host name, or --local-addr")
    if job.addresses and all(map(is_loopback, job.addresses)):
        yield warning(nodes[0], f"MASTER_ADDR={job.host} is {job.addresses[0]} on rank 0's own machine",
                      "torchrun's c10d rendezvous may not find its host: name an address that other machines "
                      "reach, in MASTER_ADDR or in /etc/hosts")
    for rank, host in survey.part("host").items():
        if host["own_name"] != "works" and not host["names_interface"]:
            interface = survey.hellos[rank]["interface"] or "the one that reaches the others"
            yield problem([rank], f"its host name {host['own_name']}, and gloo offers that to the others",
                          f"set GLOO_SOCKET_IFNAME={interface}, or mend /etc/hosts")


def judge_equal(survey: Survey) -> Iterator[Finding]:
    """What should be the same everywhere; the value of most ranks is taken for the right one."""
    for rank, report in survey.machines.items():
        for error in report["errors"]:
            is_driver = error.startswith(("gpu", "compute"))
            yield problem([rank], f"could not look at {error}", "a GPU driver that hangs or fails wants a "
                          "reboot of the node" if is_driver else "see to it on that node")
    advice = {"versions": "install the same version", "environment": "set it alike on all nodes"}
    for part, otherwise in advice.items():
        reports = survey.part(part)
        for name in sorted({name for report in reports.values() for name in report}):
            values = {rank: report.get(name, "not set") for rank, report in reports.items()}
            do = {"source": "copy the same files to all nodes"}.get(name, otherwise)
            important = part == "versions" and name not in ("driver", "transformers")
            yield from compare_values(name, values, important, do)


def compare_values(name: str, values: dict[int, str], important: bool, do: str) -> Iterator[Finding]:
    usual = Counter(values.values()).most_common(1)[0][0]
    others = sorted(set(values.values()) - {usual})
    if len(others) > 3:
        ranks = [rank for rank in values if values[rank] != usual]
        what = f"{name} has {len(others)} values, elsewhere {shorten(usual)}"
        yield Finding(important, tuple(ranks), what, do)
        return
    for value in others:
        ranks = [rank for rank in values if values[rank] == value]
        # The third number of Python's version does not matter to a run.
        bad = important and (name != "python" or value.split(".")[:2] != usual.split(".")[:2])
        yield Finding(bad, tuple(ranks), f"{name} is {shorten(value)}, elsewhere {shorten(usual)}", do)


def shorten(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."


def judge_gpus(survey: Survey) -> Iterator[Finding]:
    """GPUs that are invisible, shared, in use by others, not looked at, or slow."""
    gpus = survey.part("gpu") if survey.args.device == "auto" else {}
    with_gpu = [rank for rank, gpu in gpus.items() if gpu["visible"]]
    for rank, gpu in gpus.items():
        if not gpu["visible"] and with_gpu:
            yield problem([rank], "no GPU is visible, other ranks have one",
                          "see nvidia-smi and CUDA_VISIBLE_DEVICES there")
        elif not gpu["visible"] and gpu["on_machine"] and not gpu["hidden"]:
            yield problem([rank], "the machine has {} GPUs, torch sees none",
                          "install a CUDA build of torch that fits the driver", gpu["on_machine"])
    owners = defaultdict(list)
    for rank in with_gpu:
        owners[gpus[rank]["uuid"]].append(rank)
    doctors = {hello["pid"] for hello in survey.hellos.values()}
    for ranks in owners.values():
        gpu = gpus[ranks[0]]
        if len(ranks) > 1:
            yield problem(ranks, f"{len(ranks)} ranks are on one GPU (cuda:{gpu['index']})",
                          "start one process a GPU; LOCAL_RANK, or srun --gpus-per-task, tells them apart")
        elif gpu["total_gib"] - gpu["free_gib"] > 2:  # our own context takes about half a GiB
            names = [f"{Path(name).name} (process {pid})" for pid, name in gpu["users"] if pid not in doctors]
            who = ", ".join(names) or "somebody else"
            yield warning(ranks, f"GPU {gpu['index']} is in use by {who}: {{}} GiB are free of "
                          f"{gpu['total_gib']:.0f}", "end that program, or take another GPU", gpu["free_gib"])
    for node in survey.nodes:
        visible = {gpus[rank]["visible"] for rank in node if rank in gpus}
        if len(visible) == 1 and max(visible) > len(node):
            yield warning(node, f"{max(visible)} GPUs are visible, {len(node)} looked at",
                          "start one process a GPU to look at all")
    speeds = {rank: flops for rank, flops in survey.part("compute").items() if rank in with_gpu}
    usual = statistics.median(speeds.values()) if len(speeds) > 2 else 0.0
    for rank in [rank for rank, flops in speeds.items() if flops < 0.8 * usual]:
        yield warning([rank], f"computes at {{}} TFLOP/s, the others at {usual:.3g}, and holds them up",
                      "see nvidia-smi -q -d PERFORMANCE,TEMPERATURE there", speeds[rank])


def judge_hosts(survey: Survey) -> Iterator[Finding]:
    """Cores, limits, shared memory: a line only where one of them will be felt."""
    hosts, gpus = survey.part("host"), survey.part("gpu")
    for node in survey.nodes:
        ranks = [rank for rank in node if rank in hosts]
        cores, threads = node_cores(hosts, ranks), sum(hosts[rank]["threads"] for rank in ranks)
        if threads > max(cores, len(ranks)):
            yield warning(ranks, f"{threads} threads of {len(ranks)} processes on {cores:g} cores",
                          f"set OMP_NUM_THREADS={max(1, int(cores / len(ranks)))}")
        if any(gpus.get(rank, {}).get("visible") for rank in ranks) and cores < 2 * len(ranks):
            yield warning(ranks, f"{cores:g} cores for {len(ranks)} processes with GPUs",
                          "ask for more (srun --cpus-per-task): loading and saving run beside the training")
    for rank, host in hosts.items():
        if 0 <= host["nofile"] < 4096:
            yield warning([rank], "only {} files may be open at once", "ulimit -n 65536", host["nofile"])
        if host["infiniband"] and host["memlock_gib"] is not None:
            yield warning([rank], "only {} GiB of memory may be locked, and InfiniBand locks its buffers",
                          "ulimit -l unlimited (slurmd: LimitMEMLOCK=infinity)", host["memlock_gib"])
        if host["shm_gib"] is not None and host["shm_gib"] < 1:
            yield warning([rank], "/dev/shm has only {} GiB, and NCCL and data loaders use it",
                          "docker run --ipc=host, or --shm-size 8g", host["shm_gib"])


def node_cores(hosts: dict[int, dict], ranks: list[int]) -> float:
    """Cores that the ranks of a node have together; a container's quota may allow less."""
    mask = 0
    for rank in ranks:
        mask |= int(hosts[rank]["cores"], 16)
    quotas = [hosts[rank]["quota"] for rank in ranks if hosts[rank]["quota"]]
    return min([bin(mask).count("1"), *quotas])


def judge_folder(survey: Survey) -> Iterator[Finding]:
    folders, need = survey.folders, survey.args.need_gib
    for rank, found in folders.items():
        path = found["path"]
        if "error" in found:
            yield problem(survey.beside(rank), f"cannot use {path}: {found['error']}",
                          "make room, mend the mount or its rights, or choose another --checkpoint-dir")
        elif found.get("free_gib", need) < need:
            yield problem(survey.beside(rank), f"{{}} GiB are free in {path}, --need-gib is {need:g}",
                          "make room, or choose another --checkpoint-dir", found["free_gib"])
        if found["seen"] is False:
            what = f"{path} is not the folder that rank 0 sees" if found["exists"] else f"{path} is not there"
            yield problem([rank], what, f"all nodes write a checkpoint into one folder: mount rank 0's "
                          f"{folders[0]['path']} there")
    speeds = {rank: found["write_mb_s"] for rank, found in folders.items() if "write_mb_s" in found}
    usual = statistics.median(speeds.values()) if len(speeds) > 2 else 0.0
    for rank, mb_s in speeds.items():
        if mb_s < usual / 2:
            yield warning(survey.beside(rank), f"writes {{}} MB/s, the others {usual:.0f}",
                          "look at its mount and network", mb_s)
        elif mb_s < 20:
            yield warning(survey.beside(rank), "writes only {} MB/s",
                          "saves will take long: use a faster disk", mb_s)
    seen = {rank: found["lock"] for rank, found in folders.items() if found["seen"]}
    if ignored := [rank for rank, lock in seen.items() if rank and lock == "ignored"]:
        yield warning(ignored, "does not see a file lock that rank 0 holds; nor would a second run's rank 0",
                      "mount it with locks across nodes (Lustre: -o flock; NFS: without local_lock)")
    if without := [rank for rank, lock in seen.items() if lock == "none"]:
        yield warning(without, "no file locks in the checkpoint folder",
                      "take care that no second run uses it")


def judge_group(survey: Survey) -> Iterator[Finding]:
    links, cuda = survey.links, survey.job.device.type == "cuda"
    for rank, error in sorted(links.get("failed", {}).items()):
        do = "NCCL_DEBUG=INFO says more" if cuda else "open all TCP ports between the nodes"
        yield problem([rank], error, f"{do}; {'NCCL' if cuda else 'GLOO'}_SOCKET_IFNAME names the interface")
    for rank, operation in links.get("wrong", []):
        yield problem([rank], f"{operation} gives a wrong result",
                      "leave that node out: its GPU, memory or network is broken")


def judge_links(survey: Survey) -> Iterator[Finding]:
    """Each link against the median of its kind. A problem below a tenth of it, a warning below half."""
    node_of = {rank: i for i, node in enumerate(survey.nodes) for rank in node}
    for kind, rates in links_by_kind(survey).items():
        usual = statistics.median_high(rates.values())
        slow = {link: rate for link, rate in rates.items() if rate < usual / 2}
        if kind == "within" and survey.job.device.type == "cpu":
            continue  # that is how busy the cores are
        touched = Counter(node for link in rates for node in {node_of[rank] for rank in link})
        slow_nodes = Counter(node for link in slow for node in {node_of[rank] for rank in link})
        # Half of a node's links, because a card may be slow in one direction alone. The worst node first:
        # what is explained by it is no longer held against its neighbours.
        for node, _ in slow_nodes.most_common() if len(touched) > 2 else []:
            own = {link: rate for link, rate in slow.items() if node in map(node_of.get, link)}
            if len(own) < 2 or len(own) < touched[node] / 2:
                continue
            slow = {link: rate for link, rate in slow.items() if link not in own}
            place = {"within": "within it", "between": "between it and others"}[kind]
            do = {"within": "see nvidia-smi topo -m and nvidia-smi nvlink -s there",
                  "between": "look at its network card, cable and switch port, or leave it out"}[kind]
            yield Finding(min(own.values()) < usual / 10, tuple(survey.nodes[node]),
                          f"{len(own)} of {touched[node]} directions {place} carry {speed(*own.values())}, "
                          f"usual is {speed(usual)}", do)
        for link, rate in sorted(slow.items(), key=lambda item: item[1]):
            what = f"carries {speed(rate)}, usual {kind} nodes is {speed(usual)}"
            yield Finding(rate < usual / 10, link, what, place=arrow(survey, link),
                          do="look at the cables and switches on its way, or leave one node out")
        if kind == "between" and survey.job.device.type == "cuda" and usual < 5:
            yield warning(node_of, f"links between nodes carry {speed(usual)}, as Ethernet does",
                          "if there is InfiniBand: NCCL_DEBUG=INFO shows why NCCL does not use it")


def links_by_kind(survey: Survey) -> dict[str, dict[tuple[int, int], float]]:
    node_of = {rank: i for i, node in enumerate(survey.nodes) for rank in node}
    kinds = defaultdict(dict)
    for (a, b), rate in survey.links.get("links", {}).items():
        kinds["within" if node_of[a] == node_of[b] else "between"][a, b] = rate
    return kinds


# ----------------------------------------------------------------------------------------------------
# 8. Table: equal nodes share a row, and only what differs is said

def number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def span(values: Iterable[float | None], form: Callable[[float], str] = number) -> str:
    """'3' or '3..5', equal if they look equal; '-' where there is nothing."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, high = form(min(known)), form(max(known))
    # A unit that both have is said once.
    unit = re.search(r"[^\d.]*$", high)[0]
    return low if low == high else f"{low.removesuffix(unit) if unit else low}..{high}"


def size(gib: float) -> str:
    return f"{gib * 1024:.0f}M" if gib < 1 else f"{gib:.0f}G" if gib < 10000 else f"{gib / 1024:.0f}T"


def speed(*gb_s: float) -> str:
    return span(gb_s, lambda rate: f"{rate:.3g} GB/s" if rate >= 1 else f"{rate * 1000:.3g} MB/s")


def arrow(survey: Survey, link: tuple[int, int]) -> str:
    label = {rank: survey.labels[i] for i, node in enumerate(survey.nodes) for rank in node}
    first, second = (label[rank] for rank in link)
    if first == second:
        return f"rank {link[0]} -> {link[1]} ({first})"
    return f"rank {link[0]} ({first}) -> {link[1]} ({second})"


def compress(names: list[str]) -> str:
    """n1, n2, n3, gpu7 as 'gpu7,n[1-3]': numbers at the end of a name, in ranges, leading zeros kept."""
    split = [re.fullmatch(r"(.*?)(\d*)(\D*)", name).groups() for name in names]
    padded = {(prefix, len(digits), suffix) for prefix, digits, suffix in split if re.match("0.", digits)}
    groups = defaultdict(set)
    for prefix, digits, suffix in split:
        width = len(digits) if (prefix, len(digits), suffix) in padded else 0
        groups[prefix, width, suffix].add(int(digits) if digits else None)
    parts = []
    for (prefix, width, suffix), numbers in groups.items():
        ranges = "" if None in numbers else ranges_of(sorted(numbers), width)
        parts.append(prefix + (f"[{ranges}]" if len(numbers) > 1 else ranges) + suffix)
    return ",".join(sorted(parts))


def ranges_of(numbers: list[int], width: int = 0) -> str:
    """1, 2, 3, 7 as '1-3,7'."""
    runs = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{low:0{width}d}" + (f"-{high:0{width}d}" if high > low else "") for low, high in runs)


def where(survey: Survey, ranks: tuple[int, ...]) -> str:
    """'all nodes', 'n[3-4]', or 'rank 3 (n1)' where not all ranks of the nodes are meant."""
    touched = [i for i, node in enumerate(survey.nodes) if set(node) & set(ranks)]
    names = compress([survey.labels[i] for i in touched])
    if set(ranks) != {rank for i in touched for rank in survey.nodes[i]}:
        return f"rank{'s' * (len(ranks) > 1)} {ranges_of(sorted(ranks))}" + (f" ({names})" if names else "")
    return "all nodes" if len(touched) == len(survey.nodes) > 1 else names


# Cores, threads and TFLOP/s are those of one process.
HEADER = ["", "node", "num", "procs", "device", "GPU free", "RAM free", "cores", "threads", "clock ms",
          "disk", "write MB/s", "TFLOP/s"]


def table_rows(survey: Survey, findings: list[Finding]) -> list[list[str]]:
    """A row for each group of nodes that are equal in kind and in what was found."""
    groups = defaultdict(list)
    for node in range(len(survey.nodes)):
        groups[node_kind(survey, findings, node)].append(node)
    gpus, hosts, speeds = survey.part("gpu"), survey.part("host"), survey.part("compute")
    rows = []
    for (mark, procs, device, cores, threads, _), members in groups.items():
        leaders = [survey.nodes[node][0] for node in members]
        ranks = [rank for node in members for rank in survey.nodes[node]]
        folders = [survey.folders.get(rank, {}) for rank in leaders]
        # Rank 0's clock is the one that the others are compared with.
        clocks = [1000 * {0: (0.0, 0.0), **survey.clocks}[rank][0] for rank in leaders
                  if rank == 0 or rank in survey.clocks]
        rows.append([
            mark, compress([survey.labels[node] for node in members]), str(len(members)), procs, device,
            span([gpus[rank].get("free_gib") for rank in ranks if rank in gpus], size),
            span([hosts[rank]["free_gib"] for rank in leaders if rank in hosts], size), cores, threads,
            span(clocks, lambda ms: f"{round(ms, 1) + 0.0:.1f}"),  # + 0.0 makes -0.0 a 0.0
            span([found.get("free_gib") for found in folders], size),
            span([found.get("write_mb_s") for found in folders], "{:.0f}".format),
            span([speeds[rank] for rank in ranks if rank in speeds]),
        ])
    return rows


def node_kind(survey: Survey, findings: list[Finding], node: int) -> tuple:
    """(mark, processes, device, cores, threads, what was found here and not on all nodes)."""
    ranks, hosts, gpus = survey.nodes[node], survey.part("host"), survey.part("gpu")
    mine = [finding for finding in findings if set(finding.ranks) & set(ranks)]
    mark = "x" if any(finding.bad for finding in mine) else "!" if mine else ""
    names = Counter(gpus[rank].get("name", "CPU") for rank in ranks if rank in gpus)
    device = ", ".join(name if name == "CPU" else f"{count} {name}" for name, count in names.items()) or "?"
    known = [rank for rank in ranks if rank in hosts]
    cores = f"{node_cores(hosts, known) / len(known):.3g}" if known else "-"
    own = tuple(finding.what for finding in mine
                if not all(set(finding.ranks) & set(others) for others in survey.nodes))
    return mark, str(len(ranks)), device[:18], cores, span([hosts[rank]["threads"] for rank in known]), own


def print_table(survey: Survey, findings: list[Finding]) -> None:
    rows = [HEADER, *table_rows(survey, findings)]
    # Columns that say nothing are left out: the number of nodes where each has a row, GPU memory on CPUs.
    dull = {"num": {"1"}, "": {""}, "GPU free": {"-"}}
    keep = [i for i, name in enumerate(HEADER) if {row[i] for row in rows[1:]} - dull.get(name, set())]
    rows = [[row[i] for i in keep] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(keep))]
    # Long lists of nodes give way; what they say stands below in full.
    names = keep.index(HEADER.index("node"))
    spare = WIDTH - 2 * (len(widths) - 1) - sum(widths)
    gap, spare = (2, spare) if spare >= 0 else (1, spare + len(widths) - 1)
    widths[names] = min(widths[names], max(12, widths[names] + spare))
    for row in rows:
        if len(row[names]) > widths[names]:
            row[names] = row[names][:widths[names] - 3] + "..."
        # Words to the left, numbers to the right.
        cells = [cell.ljust(width) if HEADER[i] in ("", "node", "device") else cell.rjust(width)
                 for i, cell, width in zip(keep, row, widths)]
        print((" " * gap).join(cells).rstrip()[:WIDTH])


def print_notes(survey: Survey) -> None:
    """What is the same everywhere, the folder, the network."""
    versions = survey.part("versions")
    same = [f"{name} {value}" for name, value in next(iter(versions.values()), {}).items()
            if all(report.get(name) == value for report in versions.values())]
    say(f"same on all: {', '.join(same) or 'nothing'}")
    folder = survey.folders.get(0, {"seen": None})
    if folder["seen"]:
        who = "seen by all" if all(found["seen"] for found in survey.folders.values()) else "NOT seen by all"
        locks = "without locks" if folder["lock"] == "none" else "locks work"
        say(f"checkpoints: {folder['path']} ({folder['type'] or 'unknown file system'}), {who}, {locks}")
    if group := survey.links.get("group"):
        parts = [f"{name} {speed(group[name])} ({group[f'{name} MiB']:.3g} MiB)" for name in COLLECTIVES]
        backend = "NCCL" if survey.job.device.type == "cuda" else "gloo"
        say(f"all {survey.job.world_size} ranks, {backend}, bus bandwidth: {', '.join(parts)}")
    for kind, rates in links_by_kind(survey).items():
        link, usual = min(rates, key=rates.get), statistics.median_high(rates.values())
        say(f"links {kind} nodes: {len(rates)} directions, median {speed(usual)}, slowest "
              f"{arrow(survey, link)} {speed(rates[link])}")
    if survey.links.get("left out"):
        say(f"links left out for want of time: {survey.links['left out']}")


def say(line: str) -> None:
    """Prints a line, broken where it is too wide; what follows stands in the column of the advice."""
    print(textwrap.fill(line, WIDTH, subsequent_indent=" " * 5, break_long_words=False,
                        break_on_hyphens=False))


def print_report(survey: Survey, seconds: float) -> int:
    """Everything; returns the exit code."""
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)  # the progress bar
    job, findings = survey.job, judge(survey)
    count = sum(map(len, survey.nodes))
    whole = count == job.world_size
    processes = plural(count, "process") if whole else f"{count} of {job.world_size} processes"
    at = f", MASTER_ADDR={job.host}, port {job.port}" if job.host else ""
    print(f"doctor: {plural(len(survey.nodes), 'node')}, {processes}{at}, looked at in {seconds:.0f} s")
    print_table(survey, findings)
    print_notes(survey)
    bad = [finding for finding in findings if finding.bad]
    mild = [finding for finding in findings if not finding.bad]
    warnings_of = f", {'' if bad else 'with '}{plural(len(mild), 'warning')}" if mild else ""
    print((f"NOT ready: {plural(len(bad), 'problem')}" if bad else "ready") + warnings_of)
    for mark, group in (("x", bad), ("!", mild)):
        for finding in group[:MAX_LINES]:
            say(f" {mark} {finding.place}: {finding.what}")
            say(f"     {finding.do}")
        if len(group) > MAX_LINES:
            say(f" {mark} and {len(group) - MAX_LINES} more")
    sys.stdout.flush()
    return int(bool(bad))


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "es" if noun.endswith("s") else "s")


# ----------------------------------------------------------------------------------------------------
# 9. The stages in their order

def sort_nodes(hellos: dict[int, dict]) -> tuple[list[list[int]], list[str]]:
    """(ranks of each node, by first rank; the nodes' names, with the address where two are alike)."""
    machines = defaultdict(list)
    for rank in sorted(hellos):
        machines[hellos[rank]["machine"]].append(rank)
    nodes = sorted(machines.values())
    first = [hellos[node[0]] for node in nodes]
    hosts = [hello["host"].split(".")[0] for hello in first]
    return nodes, [host if hosts.count(host) == 1 else f"{host}/{hello['address']}"
                   for host, hello in zip(hosts, first)]


def find_missing(stage: str, expected: Iterable[int], found: dict, seconds: float) -> list[Finding]:
    """One finding for the ranks that did not post in this stage, if there are any."""
    absent = [rank for rank in expected if rank not in found]
    if not absent:
        return []
    if stage != "hello":
        return [problem(absent, f"no answer within {seconds:.0f} s at '{STAGES[stage]}'", "see what was "
                        "printed there; killed, or held up by a driver or a file system that hangs")]
    # Nobody knows their hosts; the place in the launcher's order helps to find them.
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE") or 0)
    nodes = ranges_of(sorted({rank // per_node for rank in absent})) if per_node else ""
    place = f" (NODE_RANK {nodes})" if nodes else ""
    return [problem(absent, f"did not come within {seconds:.0f} s{place}", "see what was printed there: not "
                    "started, another MASTER_ADDR or MASTER_PORT, or no way to rank 0")]


def meet(job: Job, args: Namespace, store: dist.Store) -> tuple[Survey | None, list[list[int]]]:
    """All ranks say hello, and rank 0 says who came: (rank 0's survey or None, ranks of each node)."""
    post(store, f"hello/{job.rank}", say_hello(job))
    survey = None
    if job.rank == 0:
        hellos = collect(store, "hello", list(range(job.world_size)), args.timeout)
        nodes, labels = sort_nodes(hellos)
        missing = find_missing("hello", range(job.world_size), hellos, args.timeout)
        survey = Survey(job, args, nodes, labels, hellos, missing)
        post(store, "nodes", nodes)
    nodes = fetch(store, "nodes", args.timeout + WORD_S)
    if not any(job.rank in node for node in nodes):
        raise UserError(f"rank {job.rank} came too late: rank 0 waited {args.timeout:g} s; raise --timeout")
    return survey, nodes


def gather(job: Job, store: dist.Store, survey: Survey | None, stage: str, value: dict) -> dict:
    """Posts this rank's part; rank 0 gets everybody's and notes who is missing, the others get {}."""
    post(store, f"{stage}/{job.rank}", value)
    if survey is None:
        return {}
    seconds = {"machine": MACHINE_S, "folder": FOLDER_S}[stage]
    lost = {rank for finding in survey.missing for rank in finding.ranks}
    expected = sorted(survey.hellos.keys() - lost)
    found = collect(store, stage, expected, seconds)
    survey.missing += find_missing(stage, expected, found, seconds)
    return found


def look_at_nodes(job: Job, args: Namespace, store: dist.Store, survey: Survey | None, nodes: list[list[int]]
                  ) -> None:
    """Every stage in front of the links (all ranks). What was found goes into rank 0's survey."""
    clocks = measure_clocks(store, nodes, job.rank)
    machines = gather(job, store, survey, "machine", examine_machine(job, args.quick))
    folder, leads = Path(args.checkpoint_dir).absolute(), job.rank in [node[0] for node in nodes]
    with shared_token(folder, job.rank) as token:
        if token:
            post(store, "token", token)
        token = token or fetch(store, "token", WORD_S)
        write_mib = (64 if args.quick else 256) if leads else 0
        folders = gather(job, store, survey, "folder", check_folder(folder, token, job.rank, write_mib))
    if survey:
        survey.clocks, survey.machines, survey.folders = clocks, machines, folders


def links_can_work(survey: Survey) -> bool:
    """With a rank missing, or an address that is no use, a collective could only wait for its deadline."""
    findings = [*judge_nodes(survey), *judge_gpus(survey)]
    return survey.job.world_size > 1 and not survey.missing and not any(finding.bad for finding in findings)


def diagnose(job: Job, args: Namespace) -> int:
    """All stages (all ranks); returns the exit code, the same on every rank."""
    start = time.monotonic()
    server, stores = open_store(job, args.timeout)
    store = stores[0]
    survey, nodes = meet(job, args, store)
    look_at_nodes(job, args, store, survey, nodes)
    if survey:
        post(store, "links", links_can_work(survey))
    links = check_links(job, args.quick, stores, nodes) if fetch(store, "links", WORD_S) else {}
    if survey is None:
        code = fetch(store, "verdict", WORD_S)
        post(store, f"bye/{job.rank}", 0)
        return code
    survey.links = links
    code = print_report(survey, time.monotonic() - start)
    post(store, "verdict", code)
    if server:  # it ends with this process: the others read the verdict first
        collect(store, "bye", sorted(survey.machines.keys() - {0}), 3)
    return code


def main() -> None:
    args = parse_args()
    if args.nproc:
        relaunch_under_torchrun(args)
    # Should every other deadline fail, as under a driver that hangs with Python's lock held.
    faulthandler.dump_traceback_later(2 * args.timeout + 240, exit=True)
    try:
        code = diagnose(read_job(args), args)
    except (UserError, dist.DistError) as error:
        code = 1
        # One line a node. The others wait a moment, or torchrun would end this one before it has spoken.
        if int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0) == 0:
            lost = f"the connection to rank 0 is lost: {one_line(error)}"
            note(f"NOT ready: {error if isinstance(error, UserError) else lost}")
        else:
            time.sleep(2)
    except KeyboardInterrupt:
        code = 130
    # Without Python's own end, which would wait for threads that are stuck.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
