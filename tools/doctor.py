"""Look at all nodes before a long run: names, port, versions, GPUs, the checkpoint folder, every link.

    python tools/doctor.py                                               # this machine; --nproc 8: as eight
    ./launch_single_node.sh tools/doctor.py --checkpoint-dir runs/big    # one process a GPU
    torchrun ... tools/doctor.py --checkpoint-dir runs/big               # with the training's own launch line
    srun --ntasks-per-node 8 python tools/doctor.py --checkpoint-dir runs/big
    NNODES=2 NODE_RANK=0 MASTER_ADDR=n1 python tools/doctor.py           # one process a node, no torchrun

It ends with "ready", "ready, with N warnings" or "NOT ready", and exit code 0 or 1. Below stands a line for
each problem (x) and warning (!), with what to do. Each stage has a deadline and names the ranks that are
missing. torchrun itself needs MASTER_ADDR. Where that fails, the last of these lines, on each node, says why.
"""

import argparse
import contextlib
import faulthandler
import hashlib
import importlib.metadata
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

# torch logs stack traces about a failed connection; this program says the same in one sentence.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
ROOT = Path(__file__).resolve().parent.parent
VENV_PYTHON = str(ROOT / ".venv/bin/python")
sys.path.insert(0, str(ROOT))
try:
    import torch
    import torch.distributed as dist

    from train_llm import Ranks, UserError, first_line, read_ranks, relaunch_under_torchrun
except (ImportError, OSError) as import_error:  # OSError: a shared library of torch
    if os.access(VENV_PYTHON, os.X_OK) and sys.executable != VENV_PYTHON:
        os.execv(VENV_PYTHON, [VENV_PYTHON, *sys.argv])
    sys.exit(f"doctor: NOT ready: {sys.executable} on {socket.gethostname()} cannot import torch or "
             f"train_llm.py ({import_error}); use a Python with requirements.txt installed, as {VENV_PYTHON}")

GIB, MIB = 2**30, 2**20
HOST = socket.gethostname()
LOOK_S, FOLDER_S, LINKS_S = 25, 20, 60  # deadlines; healthy nodes need one to five seconds
MAX_SHOWN = 12  # ranks in a line


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="doctor.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint-dir", default="checkpoints", help="the run's folder (default: checkpoints)")
    add("--need-gib", type=float, default=10.0, help="free space that the run needs there (default: 10)")
    add("--timeout", type=float, default=30.0, help="seconds to wait for all ranks (default: 30)")
    add("--device", choices=["auto", "cpu"], default="auto", help="cpu: test links with gloo, ignore GPUs")
    add("--nproc", type=int, metavar="N", help="start N processes on this machine (default: one)")
    parser.set_defaults(hsdp_shard_size=None, gpu_ranks=None)  # train_llm.py's functions read these
    return parser.parse_args()


def limited(seconds: float, function: Callable, *args):
    """The function's result. After the deadline this raises TimeoutError and leaves the thread behind: a file
    system, driver or name server that hangs cannot be interrupted."""
    try:
        return futures.ThreadPoolExecutor(1).submit(function, *args).result(timeout=seconds)
    except futures.TimeoutError:
        raise TimeoutError(f"no answer within {seconds:g} s") from None


# ----------------------------------------------------------------------------------------------------
# 1. Rendezvous and stages: each rank does the same, and all learn the results and who has none

def read_job(args: argparse.Namespace) -> Ranks:
    """From torchrun's or srun's variables, from NNODES and NODE_RANK (one process a node), or alone."""
    env = os.environ
    try:
        if "RANK" not in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            names = subprocess.check_output(["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]],
                                            text=True, timeout=20)
            env.setdefault("MASTER_ADDR", names.split()[0])
            env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
            env |= {"RANK": env["SLURM_PROCID"], "LOCAL_RANK": env["SLURM_LOCALID"],
                    "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"]}
        elif "RANK" not in env and "NODE_RANK" in env and "NNODES" in env:
            env |= {"RANK": env["NODE_RANK"], "WORLD_SIZE": env["NNODES"]}
            env.setdefault("MASTER_PORT", "29500")
        if "RANK" in env and not (env.get("MASTER_ADDR") and 0 < int(env.get("MASTER_PORT", 0)) < 65536):
            raise ValueError("set MASTER_ADDR to an address of rank 0's machine, MASTER_PORT below 65536")
        return limited(LOOK_S, read_ranks, args)
    except TimeoutError:
        raise UserError(f"the CUDA driver of {HOST} does not answer: reboot the machine") from None
    except (KeyError, ValueError, OSError, subprocess.SubprocessError) as error:
        raise UserError(f"cannot use the launcher's variables: {first_line(error)}") from None


def reach_rank_0(host: str, port: int, seconds: float, serves: bool) -> None:
    """Returns once something accepts a connection. Raises UserError with the last reason that was seen."""
    try:
        address = limited(10, socket.getaddrinfo, host, port)[0][4][0]
    except OSError as error:
        raise UserError(f"MASTER_ADDR={host} does not resolve on {HOST} ({error.strerror or error}): use the "
                        "IP address of rank 0's machine, or repair DNS or /etc/hosts here") from None
    end, error = time.monotonic() + seconds, None
    while time.monotonic() < end:
        try:
            socket.create_connection((host, port), timeout=min(5, seconds)).close()
            return
        except OSError as last_error:
            error = last_error
            time.sleep(0.3)
    if serves:
        raise UserError(f"MASTER_ADDR={host} is {address}, but {HOST}, where rank 0 runs, does not answer "
                        "there: set MASTER_ADDR to an address of this machine on all nodes")
    target = f"{host}:{port} ({address}{', this machine itself' if address.startswith('127.') else ''})"
    if isinstance(error, ConnectionRefusedError):
        raise UserError(f"nothing listens on {target}, tried from {HOST} for {seconds:.0f} s: start rank 0 "
                        "there, and give all nodes the same MASTER_ADDR and MASTER_PORT")
    raise UserError(f"{HOST} cannot reach {target} within {seconds:.0f} s ({first_line(error)}): open TCP "
                    "between the nodes, or set MASTER_ADDR to an address that all nodes reach")


def open_store(job: Ranks, seconds: float) -> tuple[dist.Store | None, dist.Store]:
    """(rank 0's server, this rank's connection). torchrun has a server of its own."""
    if "RANK" not in os.environ:
        return None, dist.HashStore()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = job.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        server = limited(10, dist.TCPStore, "localhost", port, None, True) if serves else None
    except (OSError, RuntimeError) as error:
        reason = "is taken by another program" if "EADDRINUSE" in str(error) else first_line(error)
        raise UserError(f"port {port} on {HOST}, rank 0's machine, {reason}: find it with `ss -ltnp` and end "
                        "it, or set another MASTER_PORT on all nodes") from None
    reach_rank_0(host, port, 5 if serves else seconds, serves)
    try:
        store = limited(8, dist.TCPStore, host, port)
    except (OSError, RuntimeError):
        raise UserError(f"another program answers on {host}:{port}, as seen from {HOST}: set another "
                        "MASTER_PORT on all nodes") from None
    # A restart by torchrun must not read the messages of the try before.
    return server, dist.PrefixStore(f"doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def fetch(store: dist.Store, key: str, seconds: float) -> object:
    try:
        limited(seconds + 1, store.wait, [key], timedelta(seconds=seconds))
        return json.loads(store.get(key))
    except (OSError, RuntimeError):
        raise UserError(f"{HOST} has lost rank 0 (waiting for '{key}'): see rank 0's own output") from None


@dataclass
class Survey:
    job: Ranks
    store: dist.Store
    findings: dict[tuple[str, str], list[int]]  # (mark, text): ranks; x is a problem, ! a warning

    def add(self, mark: str, rank: int, text: str) -> None:
        self.findings.setdefault((mark, text), []).append(rank)

    def say(self, line: str) -> None:
        if self.job.rank == 0:
            print(line, flush=True)

    def count(self, mark: str) -> int:
        return sum(found == mark for found, _ in self.findings)

    def run(self, stage: str, seconds: float, function: Callable, *args) -> list[dict]:
        """The function's result on each rank, the same list on all ranks: what they decide by it is the same,
        too. A rank that fails or does not answer in time is a problem, and its result is {}."""
        job, store = self.job, self.store
        try:
            result = limited(seconds, function, *args)
        except (OSError, RuntimeError, ValueError, ImportError, subprocess.SubprocessError) as error:
            result = {"findings": [("x", f"{stage}: {first_line(error)[:200]}")]}
        store.set(f"{stage}/{job.rank}", json.dumps(result))
        if job.rank == 0:
            results, end = [None] * job.world_size, time.monotonic() + seconds + 2
            while None in results and time.monotonic() < end:
                time.sleep(0.02 + results.count(None) / 5000)  # rarer questions where there are many to ask
                for rank, known in enumerate(results):
                    if known is None and store.check([f"{stage}/{rank}"]):
                        results[rank] = json.loads(store.get(f"{stage}/{rank}"))
            store.set(f"{stage}/all", json.dumps(results))
        results = fetch(store, f"{stage}/all", 2 * seconds + 60)  # rank 0 may wait for others first
        for rank, result in enumerate(results):
            if result is None:
                self.add("x", rank, f"no answer within {seconds:g} s at '{stage}': not started, cut off from "
                         "rank 0, dead, or held up by a driver or file system; see its own output")
            for mark, text in (result or {}).get("findings", []):
                self.add(mark, rank, text)
        return [result or {} for result in results]


# ----------------------------------------------------------------------------------------------------
# 2. What each rank looks at

def ask_driver(query: str) -> list[str]:
    """Lines of nvidia-smi; none where there is no driver. Raises SubprocessError where it hangs or fails."""
    command = ["nvidia-smi", f"--query-{query}", "--format=csv,noheader,nounits"]
    found = shutil.which("nvidia-smi")
    return subprocess.check_output(command, text=True, timeout=15).splitlines() if found else []


def look(device: torch.device) -> dict:
    """Versions, and the GPU of this process."""
    source = b"".join(path.read_bytes() for path in sorted(ROOT.glob("*.py")))
    versions = {"python": ".".join(map(str, sys.version_info[:2])), "torch": torch.__version__,
                "transformers": importlib.metadata.version("transformers"),
                "source": hashlib.sha256(source).hexdigest()[:10], "GPUs": "none"}
    cards = ask_driver("gpu=driver_version")
    if device.type != "cuda":
        meant = torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        text = f"{len(cards)} GPUs are here, torch sees none: install a CUDA build of torch for this driver"
        return {"versions": versions, "findings": [("x", text)] if cards and not meant else []}
    properties = torch.cuda.get_device_properties(device)
    versions |= {"NCCL": ".".join(map(str, torch.cuda.nccl.version())), "driver": "".join(cards[:1]),
                 "GPUs": f"{torch.cuda.device_count()} x {properties.name}"}
    free, total = (size / GIB for size in torch.cuda.mem_get_info(device))
    users = [line.split(", ", 1)[1] for line in ask_driver("compute-apps=gpu_uuid,pid,process_name")
             if str(properties.uuid) in line and f" {os.getpid()}," not in line]
    text = f"{free:.0f} of {total:.0f} GiB are free on its GPU: end what uses it ({'; '.join(users) or '?'})"
    return {"versions": versions, "gpu": str(properties.uuid), "free_gib": free,
            "findings": [("!", text)] if total - free > 2 else []}  # this program takes about half a GiB


def check_folder(folder: Path, token: str, rank: int, need_gib: float) -> dict:
    """Rank 0 makes the folder and a file; the others look for that. All write, and look at the free space."""
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / token).touch()
    # NFS clients keep an answer "no such file" for seconds; a listing asks the server again.
    end = time.monotonic() + FOLDER_S / 2
    while not (folder.is_dir() and token in os.listdir(folder)):
        if time.monotonic() > end:
            what = "is not rank 0's folder" if folder.is_dir() else "does not exist"
            return {"findings": [("x", f"{folder} {what}: mount one shared folder there on all nodes")]}
        time.sleep(0.5)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(MIB))
        os.fsync(file.fileno())
    free = shutil.disk_usage(folder).free / GIB
    text = f"{free:.0f} GiB are free in {folder}, --need-gib is {need_gib:g}: make room, or use another disk"
    return {"free_gib": free, "findings": [("x", text)] if free < need_gib else []}


def timed(device: torch.device, function: Callable, *args) -> float:
    """Seconds until the device has done it."""
    start = time.perf_counter()
    function(*args)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def reduce_all(job: Ranks, store: dist.Store) -> dict:
    """Opens the group; an all-reduce's bus bandwidth (all ranks): 2 (n-1)/n of the bytes cross each link."""
    cuda, world = job.device.type == "cuda", job.world_size
    # A connection to the store of its own: messages must not wait behind collectives.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store.clone(), rank=job.rank,
                            world_size=world, timeout=timedelta(seconds=4 * LINKS_S))
    dist.all_reduce(torch.ones(1))  # beside NCCL, gloo serves what is in host memory
    data = torch.ones((64 if cuda else 2) * MIB, device=job.device)
    timed(job.device, dist.all_reduce, data)  # opens connections
    return {"gb_s": 2 * (world - 1) / world * data.nbytes / timed(job.device, dist.all_reduce, data) / 1e9}


def measure_link(job: Ranks, rings: list[list[int]]) -> dict:
    """GB/s to this rank from the one before it in its ring (all ranks of the ring)."""
    ring = next((ring for ring in rings if job.rank in ring), [])
    if len(ring) < 2:
        return {}
    size, place = len(ring), ring.index(job.rank)
    before, after = ring[place - 1], ring[(place + 1) % size]
    data = torch.zeros((16 if job.device.type == "cuda" else 2) * MIB, device=job.device)
    # Neighbours take turns, so that a rank is at one end of one link at a time.
    turns = [2 if size % 2 and link == size - 1 else link % 2 for link in range(size)]
    for turn in range(3):
        if turns[place] == turn:
            dist.send(data[:1], after)  # opens the connection
            dist.send(data, after)
        elif turns[place - 1] == turn:
            timed(job.device, dist.recv, data[:1], before)
            seconds = timed(job.device, dist.recv, data, before)
    return {"from": before, "gb_s": data.nbytes / seconds / 1e9}


def compare_versions(survey: Survey, versions: list[dict[str, str]]) -> None:
    usual = {}
    for name in ("python", "torch", "transformers", "source", "NCCL", "driver", "GPUs"):
        values = [found.get(name, "none") for found in versions]
        usual[name] = Counter(values).most_common(1)[0][0]
        for rank, value in enumerate(values):
            if value != usual[name]:
                survey.add("!" if name in ("transformers", "driver") else "x", rank,
                           f"{name} is {value}, elsewhere {usual[name]}: make all nodes the same")
    survey.say(", ".join(f"{name} {value}" for name, value in usual.items()))


def look_at_nodes(survey: Survey, args: argparse.Namespace, token: str) -> None:
    looks = survey.run("versions and GPUs", LOOK_S, look, survey.job.device)
    if not all(looks):
        return  # each stage would wait for the lost rank
    if all("versions" in report for report in looks):
        compare_versions(survey, [report["versions"] for report in looks])
    gpus = Counter(report["gpu"] for report in looks if "gpu" in report)
    if gpus:
        free = min(report["free_gib"] for report in looks if "gpu" in report)
        survey.say(f"{len(gpus)} GPUs, {free:.0f} GiB or more are free on each")
    for rank, report in enumerate(looks):
        if gpus[report.get("gpu")] > 1:
            survey.add("x", rank, "shares a GPU with another rank: give each its own LOCAL_RANK, one a GPU")
    folder = Path(args.checkpoint_dir).absolute()
    found = survey.run("checkpoint folder", FOLDER_S, check_folder, folder, token, survey.job.rank,
                       args.need_gib)
    with contextlib.suppress(OSError):
        limited(5, (folder / token).unlink)
    if "free_gib" in found[0]:
        survey.say(f"checkpoints: {folder}, {found[0]['free_gib']:.0f} GiB are free")


def look_at_links(survey: Survey, nodes: list[list[int]]) -> None:
    job, name = survey.job, "NCCL" if survey.job.device.type == "cuda" else "gloo"
    stage = f"all-reduce by {name} ({name.upper()}_SOCKET_IFNAME names the interface between the nodes)"
    sums = survey.run(stage, LINKS_S, reduce_all, job, survey.store)
    if survey.count("x"):
        return
    survey.say(f"all-reduce by {name}: {min(result['gb_s'] for result in sums):.3g} GB/s bus bandwidth")
    # Each rank with the next of its node, and with its like on the next node.
    for kind, rings in (("within", nodes), ("between", list(zip(*nodes)))):
        results = survey.run(f"links {kind} nodes", LINKS_S, measure_link, job, rings)
        links = [(link["gb_s"], link["from"], rank) for rank, link in enumerate(results) if "from" in link]
        if not links:
            continue
        usual, (slowest, a, b) = statistics.median_high(links)[0], min(links)
        survey.say(f"links {kind} nodes: median {usual:.3g} GB/s, slowest {slowest:.3g} from rank {a} to {b}")
        for rate, sender, receiver in sorted(links):
            # Within a node, CPU ranks measure how busy the cores are.
            if rate < usual / 2 and (kind == "between" or name == "NCCL"):
                text = (f"{rate:.3g} GB/s from rank {sender} to rank {receiver}, usual is {usual:.3g}: check "
                        "network card, cable and switch port")
                for rank in (sender, receiver):
                    survey.add("x" if rate < usual / 10 else "!", rank, text)


def diagnose(job: Ranks, args: argparse.Namespace) -> int:
    """All stages (all ranks); returns the exit code, the same on every rank."""
    server, store = open_store(job, args.timeout)
    survey = Survey(job, store, {})
    hellos = survey.run("start", args.timeout, lambda: {"host": HOST.split(".")[0], "time": time.time()})
    hosts = [hello.get("host", "?") for hello in hellos]
    nodes = {host: [rank for rank in range(job.world_size) if hosts[rank] == host] for host in hosts}
    survey.say(f"doctor: {job.world_size} processes, nodes: {', '.join(nodes)}")
    if not survey.findings:
        look_at_nodes(survey, args, f".doctor-{hellos[0]['time']}")
    if job.world_size > 1 and not survey.count("x"):
        look_at_links(survey, list(nodes.values()))
    bad, mild = survey.count("x"), survey.count("!")
    survey.say("NOT ready" if bad else f"ready, with {mild} warning{'s' * (mild > 1)}" if mild else "ready")
    for (mark, text), ranks in sorted(survey.findings.items(), reverse=True):  # x before !
        names = ", ".join(dict.fromkeys(hosts[rank] for rank in ranks[:MAX_SHOWN]))
        numbers = ", ".join(map(str, ranks[:MAX_SHOWN])) + ", ..." * (len(ranks) > MAX_SHOWN)
        survey.say(f" {mark} {names} (rank {numbers}): {text}")
    # No rank ends before rank 0 has printed, or torchrun would end that; rank 0's server ends last.
    survey.run("end", 2, dict)
    time.sleep(1 if server else 0)
    return int(bad > 0)


def main() -> None:
    args = parse_args()
    if args.nproc:
        relaunch_under_torchrun(args)
    # Should every other deadline fail, as under a driver that hangs with Python's lock held.
    faulthandler.dump_traceback_later(2 * args.timeout + 600, exit=True)
    try:
        code = diagnose(read_job(args), args)
    except (UserError, dist.DistError) as error:
        code = 1
        # One line a node. The others wait a moment, or torchrun would end this one before it has spoken.
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            print(f"doctor: NOT ready: {first_line(error)}", file=sys.stderr, flush=True)
        else:
            time.sleep(2)
    except KeyboardInterrupt:
        code = 130
    os._exit(code)  # Python's own end would wait for threads that are stuck


if __name__ == "__main__":
    main()
