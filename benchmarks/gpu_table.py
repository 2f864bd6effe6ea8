"""The results of on_gpu.sh: a line of results.jsonl for each stage that ends, and the table at the end.

    python benchmarks/gpu_table.py start FOLDER                  header; prints cuda or cpu
    python benchmarks/gpu_table.py add FOLDER STAGE CODE SECONDS RUN LOG
    python benchmarks/gpu_table.py leave-out FOLDER STAGE REASON
    python benchmarks/gpu_table.py write FOLDER                  table.md, results.json

FOLDER holds results.jsonl; RUN is the folder of a training run, whose metrics.jsonl is read; LOG is what the
stage printed. A figure is the median of the rows after the first third of the run's steps.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMED_OUT = (124, 137)  # of timeout: ended, or killed because that did not help
END_LINES = 15  # of a failed stage's log that are shown
# What is kept of a run's rows, if they have it: key in metrics.jsonl, name in the results.
FIGURES = {
    "perf/tokens_per_s_per_gpu": "tokens_per_s", "perf/mfu": "mfu", "time/step_s": "step_s",
    "perf/completion_tokens_per_s": "completion_tokens_per_s", "time/generate_s": "generate_s",
    "time/logprob_s": "logprob_s", "time/train_s": "train_s", "train/mismatch_kl": "mismatch_kl",
    "rollout/reward_mean": "reward", "rollout/length_mean": "length",
    "rollout/truncated_frac": "truncated",
}


def append(folder: Path, row: dict) -> None:
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_results(folder: Path) -> list[dict]:
    path = folder / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ------------------------------------------------------------------------------------------------
# start

def start(folder: Path) -> None:
    """The header: device, versions, commit, time."""
    import torch
    wanted = os.environ.get("ON_GPU_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    git = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True,
                         text=True)
    header = {
        "stage": "header", "device": wanted, "rehearsal": wanted != "cuda",
        "name": f"{os.cpu_count()} CPU cores", "memory_gib": None,
        "torch": torch.__version__, "cuda": torch.version.cuda, "transformers": version("transformers"),
        "python": sys.version.split()[0], "commit": os.environ.get("ON_GPU_COMMIT") or git.stdout.strip(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }
    if wanted == "cuda":
        properties = torch.cuda.get_device_properties(0)
        header |= {"name": f"{torch.cuda.device_count()} x {properties.name}",
                   "memory_gib": round(properties.total_memory / 2**30, 1),
                   "cudnn": torch.backends.cudnn.version()}
    append(folder, header)
    print(wanted)


# ------------------------------------------------------------------------------------------------
# add

def read_rows(run: Path) -> list[dict]:
    """Of metrics.jsonl; a line that a kill cut off is left out."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]


def figures(run: Path) -> dict:
    """Medians of a run's training rows after the first third, first and last loss, largest memory."""
    every = read_rows(run)
    rows = [row for row in every if "time/step_s" in row]
    if not rows:
        return {}
    steady = [row for row in rows if row["step"] > rows[-1]["step"] / 3]
    found = {name: statistics.median(row[key] for row in steady)
             for key, name in FIGURES.items() if all(key in row for row in steady)}
    found |= {"steps": rows[-1]["step"], "first_step_s": rows[0]["time/step_s"],
              "peak_gib": max(row["perf/peak_mem_gib"] for row in rows),
              "first_loss": rows[0]["train/loss"], "last_loss": rows[-1]["train/loss"],
              "checkpoint_s": max(row.get("time/checkpoint_s", 0.0) for row in rows)}
    for row in every:
        found |= {key.replace("/", "_"): row[key] for key in ("eval/loss", "eval/accuracy") if key in row}
    return found


def notes(log: str) -> list[str]:
    """What a log says beside the metrics: the tests' summary, the export's error, one loss each side of a
    resume."""
    found = re.findall(r"^=*\s*(\d+ (?:passed|failed|skipped|error).*?)\s*=*$", log, re.MULTILINE)[-1:]
    found += sorted(set(re.findall(r"(?:FAILED|ERROR) (?:\S*/)?(test_\S+)", log)))
    found += re.findall(r"reloaded: (logits within \S+)", log)
    return found


def seam(run: Path, log: str) -> list[str]:
    """Where a run was resumed, and the losses on both sides."""
    resumed = re.search(r"^resumed\s+\S+/step_(\d+)", log, re.MULTILINE)
    if not resumed:
        return []
    losses = {row["step"]: row["train/loss"] for row in read_rows(run) if "train/loss" in row}
    step = int(resumed[1])
    before, after = (f"{losses[n]:.4f}" if n in losses else "?" for n in (step, step + 1))
    return [f"resumed behind step {step}, loss {before} there and {after} in the next step"]


def add(folder: Path, stage: str, code: int, seconds: int, run: Path, log: Path) -> None:
    text = log.read_text(errors="replace").replace("\r", "\n") if log.exists() else ""
    status = "ok" if code == 0 else "out of time" if code in TIMED_OUT else "failed"
    row = {"stage": stage, "status": status, "s": seconds, "exit": code,
           "notes": [*notes(text), *seam(run, text)], **figures(run)}
    if code:
        row["end"] = [line for line in text.splitlines() if line.strip()][-END_LINES:]
    append(folder, row)
    told = f"{stage}: {status} after {seconds} s; {summary(row)}"
    print(told, *row.get("end", ()), sep="\n    | ", flush=True)


def leave_out(folder: Path, stage: str, reason: str) -> None:
    append(folder, {"stage": stage, "status": "left out", "notes": [reason]})
    print(f"{stage}: left out: {reason}", flush=True)


# ------------------------------------------------------------------------------------------------
# write

def peak_tflops(results: list[dict]) -> float | None:
    """The measured matmul peak: of the largest matrices."""
    found = [row["value"] for row in results if str(row.get("check")).startswith("matmul")]
    return next((value for value in found if isinstance(value, float)), None)


def show(value, form: str = "") -> str:
    return "" if value is None else format(value, form)


def is_timed(row: dict) -> bool:
    """Whether its speed is a measurement: nothing ran beside it, no profiler within."""
    return "tokens_per_s" in row and not row["stage"].startswith(("smoke", "smollm2", "profile"))


def summary(row: dict) -> str:
    """One cell of text on what a stage found."""
    parts = [*row["notes"]]
    if is_timed(row):
        parts.append(f"{row['tokens_per_s']:,.0f} tokens/s a GPU")
    if "first_loss" in row and "completion_tokens_per_s" not in row:
        parts.append(f"loss {row['first_loss']:.4f} to {row['last_loss']:.4f} in step {row['steps']}")
    if row["stage"].startswith("smoke") and "checkpoint_s" in row:
        parts.append(f"the loop stood still for {row['checkpoint_s']:.2f} s in the step after a save")
    if "eval_loss" in row:
        parts.append(f"held-out loss {row['eval_loss']:.4f}")
    if "completion_tokens_per_s" in row:
        parts.append(f"{row['completion_tokens_per_s']:,.0f} completion tokens/s, mismatch_kl "
                     f"{row['mismatch_kl']:.1e}, reward {row['reward']:.3f}")
    if "eval_accuracy" in row:
        parts.append(f"held-out accuracy {row['eval_accuracy']:.1%}")
    return "; ".join(parts)


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def stage_lines(results: list[dict]) -> list[str]:
    lines = ["| stage | result | s | |", "|---|---|---:|---|"]
    for row in (row for row in results if "status" in row):
        what = summary(row)
        if row.get("end"):
            what = "; ".join(filter(None, [what, row["end"][-1][:160]]))
        lines.append(f"| {row['stage']} | {row['status']} | {show(row.get('s'))} | {cell(what)} |")
    return lines


def speed_lines(results: list[dict]) -> list[str]:
    """Runs of train_llm.py, with the share of the measured peak."""
    flops = {row["made"]: row["flops_per_token"] for row in results if "flops_per_token" in row}
    peak, found = peak_tflops(results), {}
    lines = [f"Measured matmul peak in bf16: {show(peak, ',.4g') or 'none'} TFLOP/s. FLOPs of a token: 6 x "
             "matmul parameters + 6 x layers x hidden size x length. MFU: of the data sheet's peak.", "",
             "| run | tokens/s a GPU | MFU | of the measured peak | peak GiB | s a step | s of step 1 |",
             "|---|---:|---:|---:|---:|---:|---:|"]
    for row in filter(is_timed, results):
        name, speed = row["stage"], row["tokens_per_s"]
        share = speed * flops[name] / (peak * 1e12) if peak and flops.get(name) else None
        found[name] = speed
        lines.append(f"| {name} | {speed:,.0f} | {show(row.get('mfu'), '.1%')} | {show(share, '.1%')} | "
                     f"{row['peak_gib']:.1f} | {row['step_s']:.3f} | {row['first_step_s']:.1f} |")
    if {"sft", "sft-unmasked"} <= found.keys():
        factor = found["sft-unmasked"] / found["sft"]
        lines += ["", f"Keeping documents apart takes {factor:.3f} times as long (sft against sft-unmasked)."]
    return lines if found else []


def grpo_lines(results: list[dict]) -> list[str]:
    names = {"completion_tokens_per_s": ",.0f", "step_s": ".2f", "generate_s": ".2f", "logprob_s": ".2f",
             "train_s": ".2f", "peak_gib": ".1f", "length": ".0f", "truncated": ".0%", "reward": ".3f",
             "mismatch_kl": ".1e"}
    rows = [row for row in results if "completion_tokens_per_s" in row]
    lines = ["| run | " + " | ".join(names).replace("_", " ") + " |", "|---|" + "---:|" * len(names)]
    lines += [f"| {row['stage']} | " + " | ".join(show(row.get(name), form) for name, form in names.items())
              + " |" for row in rows]
    return lines if rows else []


def probe_value(row: dict) -> str:
    value = row["value"]
    return f"{value:,.4g} {row['unit']}".strip() if isinstance(value, float) else cell(value)[:100]


def probe_lines(results: list[dict]) -> list[str]:
    rows = [row for row in results if "check" in row]
    lines = ["| check | |", "|---|---:|"]
    lines += [f"| {row['check']} | {probe_value(row)} |" for row in rows
              if row["unit"] != "ms" or not row["check"].startswith("attention")]
    return lines if rows else []


def attention_lines(results: list[dict]) -> list[str]:
    """Milliseconds, a line for each length and shape, a column for each kernel."""
    table, kernels = {}, {}  # insertion order is the order of the probe
    for row in results:
        shape, _, kernel = str(row.get("check")).partition(": ")
        if kernel and shape.startswith("attention"):
            kernels[kernel] = True
            table.setdefault(shape, {})[kernel] = show(row["value"], ".2f") if row["unit"] else "refused"
    lines = ["| forward and backward, ms | " + " | ".join(kernels) + " |", "|---|" + "---:|" * len(kernels)]
    lines += [f"| {shape} | " + " | ".join(times.get(kernel, "") for kernel in kernels) + " |"
              for shape, times in table.items()]
    return lines if table else []


def failure_lines(results: list[dict]) -> list[str]:
    lines = []
    for row in results:
        if row.get("end"):
            lines += [f"{row['stage']}, exit code {row['exit']}:", "", "```", *row["end"], "```", ""]
    return lines


def write(folder: Path) -> bool:
    """Whether no stage failed."""
    results = read_results(folder)
    header = next((row for row in results if row["stage"] == "header"), None)
    title = "# No device was found out" if header is None else (
        f"# {header['name']}, torch {header['torch']}, transformers {header['transformers']}, Python "
        f"{header['python']}, commit {header['commit'] or 'unknown'}, {header['date']}")
    lines = [title, ""]
    if header and header["rehearsal"]:
        lines += ["**REHEARSAL on a CPU with tiny sizes: the figures below mean nothing.**", ""]
    profile = folder / "profile.txt"
    sections = {
        "Stages": stage_lines(results), "Training": speed_lines(results), "GRPO": grpo_lines(results),
        "Device": probe_lines(results), "Attention": attention_lines(results),
        "Failures": failure_lines(results),
        "Profile": ["```", *profile.read_text().splitlines(), "```"] if profile.exists() else []}
    for name, content in sections.items():
        lines += [f"## {name}", "", *content, ""] if content else []
    (folder / "table.md").write_text("\n".join(lines))
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return not any(row.get("status") in ("failed", "out of time") for row in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    actions = parser.add_subparsers(dest="action", required=True, metavar="start, add, leave-out or write")
    arguments = {"start": (), "add": ("stage", "code", "seconds", "run", "log"),
                 "leave-out": ("stage", "reason"), "write": ()}
    types = {"folder": Path, "code": int, "seconds": int, "run": Path, "log": Path}
    for action, names in arguments.items():
        one = actions.add_parser(action)
        for name in ("folder", *names):
            one.add_argument(name, type=types.get(name, str))
    args = vars(parser.parse_args())
    action = {"start": start, "add": add, "leave-out": leave_out, "write": write}[args.pop("action")]
    if action(**args) is False:
        sys.exit(1)


if __name__ == "__main__":
    main()
