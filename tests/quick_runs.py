"""Runs of a script without the seconds that importing torch and transformers takes, for many small runs.

multiprocessing's fork server imports them once; each run is a fork of it that executes the script as
__main__, with its own arguments, environment, folder, output and exit code. What depends on the start itself
(what --help imports, torchrun, a script alone in a folder) is tested with real processes, by run_script.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from helpers import REPO, TORCHRUN_VARIABLES

PRELOADED = [
    "torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.distributed.checkpoint.staging",
    "torch.distributed.device_mesh", "torch.distributed.tensor", "transformers", "datasets", "yaml", "tqdm",
    "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
]


def _server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # no effect once it runs
    return context


def _execute(argv, cwd, env, output):
    """The life of one fork: never returns to multiprocessing's own exit handlers."""
    os.setsid()
    for name, number in (("stdout", 1), ("stderr", 2)):
        descriptor = os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False, errors=errors)
                              for number, errors in ((1, "strict"), (2, "backslashreplace")))
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = argv
    sys.path.insert(0, os.path.dirname(argv[0]))  # as the interpreter does
    import torch

    torch.set_num_threads(1)
    code = 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):  # as the interpreter does
            print(error.code, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def quick_runs(args, envs, cwd=None, timeout=120, script="train_llm.py"):
    """One run for each dict of `envs`, all at the same time: a job's ranks. Returns a CompletedProcess each.

    `script` is a path within the repository or an absolute one.
    """
    base = {key: value for key, value in os.environ.items()
            if key not in TORCHRUN_VARIABLES and not key.startswith("SLURM_")}
    base |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    argv = [str(REPO / script), *map(str, args)]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"{folder}/{number}" for number in range(len(envs))]
        processes = [_server().Process(target=_execute, args=(argv, str(cwd or folder), base | env, output))
                     for env, output in zip(envs, outputs)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        late = [process for process in processes if process.is_alive()]
        for process in late:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
        results = [subprocess.CompletedProcess(argv, process.exitcode, *(
            Path(f"{output}.{name}").read_text() for name in ("stdout", "stderr")))
            for process, output in zip(processes, outputs)]
        for result, output in zip(results, outputs):
            result.said_at = os.path.getmtime(f"{output}.stderr")  # when its last error was written
    assert not late, "\n".join([f"no end after {timeout} s", *(r.stdout + r.stderr for r in results)])
    return results


def quick_run(args, code=0, env=None, **options):
    """One run that must end with the exit code `code`."""
    [result] = quick_runs(args, [env or {}], **options)
    assert result.returncode == code, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def free_port():
    with socket.socket() as server:
        server.bind(("", 0))
        return server.getsockname()[1]


def quick_ranks(args, nproc, code=0, **options):
    """One job of `nproc` processes on this machine, with torchrun's variables (one alone has none); rank 0's
    result first. `code` is what each of them must end with; None: anything."""
    common = {"WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc, "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": free_port()}
    envs = [{key: str(value) for key, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
            for rank in range(nproc)]
    results = quick_runs(args, envs if nproc > 1 else [{}], **options)
    assert code is None or {result.returncode for result in results} == {code}, "\n".join(
        f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}" for result in results)
    return results


def error_line(result, code=1, script="train_llm.py"):
    """The one line that an error is; asserts the exit code, and that nothing else stands with it."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == code and "Traceback" not in result.stderr, result.stderr
    assert len(lines) == 1 and lines[0].startswith(f"{script}: error: "), lines
    return lines[0].removeprefix(f"{script}: error: ")
