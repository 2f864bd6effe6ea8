"""Run a training script unchanged and record what each optimizer step costs, for every rank.

    torchrun --nproc_per_node 2 benchmarks/observe.py OUT_FOLDER SCRIPT.py [its arguments]

A hook that PyTorch calls after every optimizer step notes wall time, CPU time of the process (all threads)
and resident memory, so that scripts which know nothing of it are measured alike. Writes OUT_FOLDER/rankN.json
with five lists, one entry a step: start_s (since the process started), wall_s, cpu_s, peak_mib, resident_mib;
end_peak_mib, the peak of the whole process; and what a comparison must hold equal: computed_in, the types
that linear layers gave out during the first step, and threads.
"""

import atexit
import json
import os
import resource
import runpy
import sys
import time
from pathlib import Path


def process_start() -> float:
    """When this process was started, in seconds since the epoch (Linux: field 22 of /proc/self/stat)."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1].startswith("-"):
        print(__doc__)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    folder, script = Path(sys.argv[1]), sys.argv[2]
    started = process_start()
    record = {"start_s": [], "wall_s": [], "cpu_s": [], "peak_mib": [], "resident_mib": []}

    import torch
    from torch.nn.modules.module import register_module_forward_hook
    from torch.optim.optimizer import register_optimizer_step_post_hook
    computed_in = set()

    def after_forward(module: torch.nn.Module, _, output: object) -> None:
        if isinstance(module, torch.nn.Linear):
            computed_in.add(str(output.dtype).removeprefix("torch."))

    def after_step(*_) -> None:
        forward_hook.remove()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        record["start_s"].append(time.time() - started)
        record["wall_s"].append(time.perf_counter())
        record["cpu_s"].append(time.process_time())
        record["peak_mib"].append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        record["resident_mib"].append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)

    def write() -> None:
        end_peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        record.update(computed_in=sorted(computed_in), threads=torch.get_num_threads(),
                      end_peak_mib=end_peak_mib)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank{os.environ.get('RANK', 0)}.json").write_text(json.dumps(record))

    forward_hook = register_module_forward_hook(after_forward)
    register_optimizer_step_post_hook(after_step)
    atexit.register(write)
    sys.argv = sys.argv[2:]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
