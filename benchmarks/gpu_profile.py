"""Where a step of train_llm.py spends the device's time: the kernels by time, and how long the device idles.

    python benchmarks/gpu_profile.py [--first 5] [--steps 3] [--out FILE] -- FLAGS OF train_llm.py

Runs train_llm.py itself in this process, flags and all, and records --steps steps from step --first on, with
kernels only, so that the host is not slowed down by the recording of its own work. --max-steps must reach
beyond the last of them. Idle is the share of the time from the first kernel to the end of the last in which
no kernel and no copy runs. On a CPU it shows the operators instead, to try this file.
"""

import argparse
import itertools
import json
import re
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_llm  # noqa: E402

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
FAMILIES = {  # the first pattern that is found in a kernel's name
    "attention": r"flash|fmha|cudnn.*(sdpa|attention)|attention",
    "matmul": r"gemm|nvjet|cutlass|matmul|aten::(mm|addmm|bmm)\b|linear",
    "optimizer and norms of gradients": r"multi_tensor|adam|foreach",
    "fused by Inductor": r"^triton_",
    "copies": r"memcpy|memset|copy|cat_|CatArray|split_with_sizes",
}


def family(name: str) -> str:
    return next((key for key, words in FAMILIES.items() if re.search(words, name, re.IGNORECASE)), "other")


def device_events(trace: dict) -> list[dict]:
    """Of a Chrome trace: what ran on the GPU; where there is none, the CPU's operators."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    found = [event for event in events if event.get("cat") in ON_DEVICE]
    return found or [event for event in events if event.get("cat") == "cpu_op"]


def busy_us(events: list[dict]) -> float:
    """Microseconds in which at least one event runs: streams overlap."""
    busy, end = 0.0, float("-inf")
    for start, stop in sorted((event["ts"], event["ts"] + event["dur"]) for event in events):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy


def describe(trace: dict, steps: int, limit: int = 25) -> str:
    """The text: idle share, families, the `limit` longest kernels."""
    events = device_events(trace)
    if not events:
        return "nothing was recorded"
    on_gpu = events[0]["cat"] in ON_DEVICE
    whole = max(event["ts"] + event["dur"] for event in events) - min(event["ts"] for event in events)
    total = sum(event["dur"] for event in events)
    by_name, by_family = defaultdict(list), defaultdict(float)
    for event in events:
        by_name[event["name"]].append(event["dur"])
        by_family[family(event["name"])] += event["dur"]
    lines = [f"{steps} steps, {whole / steps / 1000:.1f} ms a step, "
             f"{len(events) / steps:,.0f} {'kernels and copies' if on_gpu else 'operators'} a step; "
             f"idle {1 - busy_us(events) / whole:.1%}"]
    if not on_gpu:
        lines.append("(no GPU: these are the CPU's operators, and one inside another counts twice)")
    lines += ["", "   share   ms a step"]
    for name, us in sorted(by_family.items(), key=lambda item: -item[1]):
        lines.append(f"  {us / total:6.1%}  {us / steps / 1000:10.2f}  {name}")
    lines += ["", "   share   ms a step   calls a step"]
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:limit]
    for name, times in longest:
        lines.append(f"  {sum(times) / total:6.1%}  {sum(times) / steps / 1000:10.2f}  "
                     f"{len(times) / steps:10.1f}  {name[:110]}")
    return "\n".join(lines)


def record_steps(first: int, steps: int, flags: list[str]) -> dict:
    """Run train_llm.py with `flags`; the Chrome trace of some of its steps."""
    cuda = torch.cuda.is_available() and "cpu" not in flags
    recorder = profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU])
    done = itertools.count(1)

    def after_step(*_) -> None:
        step = next(done)
        if step in (first - 1, first + steps - 1) and cuda:
            torch.cuda.synchronize()
        if step == first - 1:
            recorder.start()
        elif step == first + steps - 1:
            recorder.stop()

    register_optimizer_step_post_hook(after_step)  # so that the script's loop needs no change
    sys.argv = ["train_llm.py", *flags]
    train_llm.main()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorder.export_chrome_trace(str(path))
        return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--first", type=int, default=5, help="the first step that is recorded, from 2 on")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the text to this file, too")
    parser.add_argument("flags", nargs="+", metavar="FLAG", help="of train_llm.py, after --")
    args = parser.parse_args()
    text = describe(record_steps(args.first, args.steps, args.flags), args.steps)
    print(text, flush=True)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
