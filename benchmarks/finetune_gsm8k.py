"""A real instruct model, fine-tuned on GSM8K's training questions: held-out loss and accuracy.

    python tools/make_smollm2.py smollm2                   # SmolLM2-135M-Instruct; any chat model will do
    python benchmarks/finetune_gsm8k.py smollm2 --gsm8k FOLDER --out runs/gsm8k_sft --minutes 50

FOLDER holds GSM8K's train.jsonl and test.jsonl (question, answer). Flags that are not this program's go to
train_llm.py: --compile, --no-mixed-precision … (a CPU with AMX trains SmolLM2 in half the time with
--compile, which needs a C compiler). Stages, each a run of the scripts that users run:

    before    train_llm.py, a few steps at a learning rate of 0: the loss of the first --questions test
              questions, and the pace of a step; then train_gsm8k_fsdp2.py --train-steps 0: their accuracy
    training  train_llm.py: one epoch, or as many steps as fit into --minutes at that pace, or --steps
    after     the same loss and accuracy

The model is asked alike in training and evaluation: SYSTEM below, then the question. This is checked token
by token before anything runs. Accuracy is exact match of the number behind the last ####, greedy, and an
answer that is cut at --max-new-tokens counts as wrong. Writes OUT/result.json and OUT/result.md after each
stage; the same command goes on after an interruption, also in the middle of the training.
"""

import argparse
import json
import math
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SYSTEM = "Reason step by step. End with one more line: #### and the final answer, one number."
PACE_STEPS = 4  # the first one, which is slower, does not count


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("model", help="folder of a chat model in Hugging Face format")
    add("--gsm8k", required=True, metavar="FOLDER", help="with train.jsonl and test.jsonl")
    add("--out", default="runs/gsm8k_sft", metavar="FOLDER", help="default: %(default)s")
    add("--minutes", type=float, default=50.0, help="of training, at the most; default: %(default)s")
    add("--steps", type=int, help="of training, in place of --minutes")
    add("--epochs", type=float, default=1.0, help="the most that is trained; default: %(default)s")
    add("--questions", type=int, default=200, help="test questions, for loss and accuracy; default: 200")
    add("--max-new-tokens", type=int, default=320, help="of an answer; default: 320, which 99 %% of the "
        "test set's own answers need not")
    add("--max-lr", type=float, default=3e-4, help="default: %(default)s")
    add("--batch-size", type=int, default=4, help="packed sequences a step and process; default: 4")
    add("--seq-len", type=int, default=512, help="default: %(default)s")
    add("--nproc", type=int, help="if not given: 1, on a CPU 2")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto")
    return parser


# ------------------------------------------------------------------------------------------------
# Data: the same conversations for training, held-out loss and accuracy

def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_data(args: argparse.Namespace, folder: Path) -> None:
    """train.jsonl and test.jsonl as chats with SYSTEM, of the test questions the first --questions."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, limit in (("train", None), ("test", args.questions)):
        chats = [{"messages": to_messages(row)} for row in read_rows(Path(args.gsm8k) / f"{split}.jsonl")]
        lines = [json.dumps(chat) + "\n" for chat in chats[:limit]]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def to_messages(row: dict) -> list[dict]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]}]


def check_prompts(args: argparse.Namespace, num_rows: int = 100) -> None:
    """What train_llm.py leaves untrained of a chat is, token by token, what train_gsm8k_fsdp2.py asks."""
    from transformers import AutoTokenizer

    import train_gsm8k_fsdp2
    import train_llm
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if not tokenizer.chat_template:
        sys.exit(f"{args.model}: its tokenizer has no chat template: this benchmark is about chat models")
    for row in read_rows(Path(args.gsm8k) / "train.jsonl")[:num_rows]:
        text, [(start, _)] = train_llm.render_chat(tokenizer, to_messages(row), None)
        ids = tokenizer(text[:start], add_special_tokens=False)["input_ids"]
        asked = train_gsm8k_fsdp2.render_prompt(tokenizer, row["question"], SYSTEM)
        if ids != asked:
            sys.exit("training and evaluation ask differently: "
                     f"{text[:start]!r} and {tokenizer.decode(asked)!r}")


def steps_of_an_epoch(flags: list[str], samples_per_step: int) -> int:
    import train_llm
    args = train_llm.parse_args(flags)
    data = train_llm.prepare_data(args)
    train_set, *_ = train_llm.open_datasets(args, data)
    return math.ceil(len(train_set) / samples_per_step)


# ------------------------------------------------------------------------------------------------
# Runs of the two scripts

def run(script: str, flags: list, notes: Path) -> None:
    """Adds {seconds, cpu_s, load} of this run to `notes`: cpu_s of all its processes, load the machine's
    average number of processes that wanted a core. Ends with the script's exit code if that is not 0."""
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    print(f"\n{'-' * 100}\n{' '.join(command)}", flush=True)
    loads, over = [os.getloadavg()[0]], threading.Event()

    def watch() -> None:
        while not over.wait(15):
            loads.append(os.getloadavg()[0])

    watcher, started = threading.Thread(target=watch, daemon=True), time.perf_counter()
    watcher.start()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        code = subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}).returncode
    except KeyboardInterrupt:  # the script has had it, too, and has saved
        code = 130
    over.set()
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    note = {"seconds": time.perf_counter() - started, "cpu_s": cpu_s, "load": statistics.mean(loads)}
    with notes.open("a") as file:
        file.write(json.dumps(note) + "\n")
    if code:
        print(f"\n{script} ended with exit code {code}; the same command goes on from here", file=sys.stderr)
        sys.exit(code)


def metric_rows(folder: Path, key: str) -> list[dict]:
    """Rows with this key, one a step: a step that was repeated after a resume counts once, the later row."""
    path = folder / "metrics.jsonl"
    rows = read_rows(path) if path.exists() else []
    return list({row["step"]: row for row in rows if key in row}.values())


def training_flags(args: argparse.Namespace, more: list[str], folder: Path) -> list[str]:
    data = Path(args.out) / "data"
    return [*map(str, [
        "--hf-model", args.model, "--dataset", data / "train.jsonl", "--eval-split", data / "test.jsonl",
        "--data-cache", data / "tokens", "--seq-len", args.seq_len, "--batch-size", args.batch_size,
        "--device", args.device, "--nproc", args.nproc, "--weight-decay", 0.0, "--checkpoint-dir", folder]),
        *more]


def measure_loss_and_pace(args: argparse.Namespace, more: list[str]) -> dict:
    """Held-out loss of the untouched model by train_llm.py's own evaluation, after steps at a rate of 0 (of
    which weights know nothing, decay included: it is multiplied with the rate)."""
    folder = Path(args.out) / "before_loss"
    shutil.rmtree(folder, ignore_errors=True)
    flags = [*training_flags(args, more, folder), "--max-lr", "0", "--max-steps", PACE_STEPS,
             "--log-interval", 1, "--checkpoint-interval", 0, "--no-export"]
    run("train_llm.py", flags, Path(args.out) / "before_loss.notes.jsonl")
    steps, evaluation = metric_rows(folder, "time/step_s"), metric_rows(folder, "eval/loss")[-1]
    return {"loss": evaluation["eval/loss"], "tokens": evaluation["eval/tokens"],
            "eval_s": evaluation["eval/time_s"], "first_batch_loss": steps[0]["train/loss"],
            "step_s": statistics.median(row["time/step_s"] for row in steps[1:])}


def measure_accuracy(args: argparse.Namespace, model: Path, name: str, more: list[str]) -> dict:
    """Exact match by train_gsm8k_fsdp2.py's own evaluation, without training."""
    folder = Path(args.out) / name
    shutil.rmtree(folder, ignore_errors=True)
    precision = [flag for flag in more if flag.endswith("mixed-precision")]
    flags = ["--model", model, "--dataset", args.gsm8k, "--limit", 1, "--train-steps", 0,
             "--eval-split", "test", "--eval-limit", args.questions, "--max-new-tokens", args.max_new_tokens,
             "--system-prompt", SYSTEM, "--rollouts", "local",
             "--device", args.device, "--nproc", args.nproc, "--checkpoint-dir", folder,
             "--checkpoint-interval", 0, "--no-export", *precision]
    run("train_gsm8k_fsdp2.py", flags, Path(args.out) / f"{name}.notes.jsonl")
    found = metric_rows(folder, "eval/accuracy")[-1]
    return {key.removeprefix("eval/"): value for key, value in found.items() if key != "step"}


def plan_steps(args: argparse.Namespace, more: list[str], step_s: float) -> dict:
    flags = training_flags(args, more, Path(args.out) / "train")
    one_epoch = steps_of_an_epoch(flags, args.batch_size * args.nproc)
    fitting = max(1, int(60 * args.minutes / step_s))
    steps = args.steps or min(math.ceil(args.epochs * one_epoch), fitting)
    return {"steps": steps, "steps_per_epoch": one_epoch}


def train(args: argparse.Namespace, more: list[str], steps: int) -> dict:
    folder, notes = Path(args.out) / "train", Path(args.out) / "train.notes.jsonl"
    flags = [*training_flags(args, more, folder), "--max-lr", args.max_lr, "--max-steps", steps,
             "--warmup-steps", min(20, steps // 10), "--log-interval", 1, "--eval-interval",
             max(1, math.ceil(steps / 4)), "--checkpoint-interval", max(1, min(50, steps // 4)),
             "--keep-checkpoints", 1]
    run("train_llm.py", flags, notes)
    rows, evaluations = metric_rows(folder, "time/step_s"), metric_rows(folder, "eval/loss")
    parts, environment = read_rows(notes), json.loads((folder / "env.json").read_text())
    step_s = statistics.median(row["time/step_s"] for row in rows)
    return {"step_s": step_s, "tokens_per_s": args.batch_size * args.nproc * args.seq_len / step_s,
            "seconds": sum(row["time/step_s"] for row in rows),
            "cpu_s": sum(part["cpu_s"] for part in parts), "load": parts[-1]["load"], "runs": len(parts),
            "peak_mem_gib": max(row["perf/peak_mem_gib"] for row in rows),
            "first_loss": rows[0]["train/loss"], "samples": rows[-1]["samples"],
            "last_loss": statistics.mean(row["train/loss"] for row in rows[-10:]),
            "eval_losses": {row["step"]: row["eval/loss"] for row in evaluations}, **environment}


# ------------------------------------------------------------------------------------------------
# Result: JSON and a table

def describe_machine(args: argparse.Namespace, more: list[str]) -> dict:
    import torch

    import train_llm
    cuda = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")] or [platform.processor()]
    kind = torch.cuda.get_device_name(device) if cuda else f"{os.cpu_count()} cores of {names[0]}"
    dtype = train_llm.compute_dtype("--no-mixed-precision" not in more, device)
    return {"device": kind, "precision": f"{str(dtype).removeprefix('torch.')} compute, float32 masters"}


def percent(found: dict) -> str:
    return f"{found['accuracy']:.1%} ({found['accuracy_low']:.1%} to {found['accuracy_high']:.1%})"


def table(result: dict) -> str:
    """Markdown of what is known so far."""
    loss, accuracy = result.get("before_loss"), result.get("before_accuracy")
    plan, trained, after = result.get("plan"), result.get("train"), result.get("after_accuracy")
    steps = plan["steps"] if plan else 0
    epochs = f" steps, {steps / plan['steps_per_epoch']:.2f} epochs" if plan else ""
    lines = [f"| | before | after {steps}{epochs} |", "|---|---:|---:|"]

    def line(label: str, *cells: str | None) -> None:
        lines.append(f"| {label} | " + " | ".join(cell or "" for cell in cells) + " |")

    last = list(trained["eval_losses"].values())[-1] if trained else None
    if loss:
        label = f"held-out loss, {loss['tokens']:,} answer tokens"
        line(label, f"{loss['loss']:.4f}", last and f"{last:.4f}")
    if accuracy:
        line(f"exact match, {accuracy['questions']} test questions, greedy (95 % interval)",
             percent(accuracy), after and percent(after))
        line("answers cut", *(found and f"{found['truncated_frac']:.1%}" for found in (accuracy, after)))
        line("tokens an answer", *(found and f"{found['length_mean']:.0f}" for found in (accuracy, after)))
    if trained:
        load = trained["load"]
        lines += ["", "| training | |", "|---|---:|"]
        line("seconds a step, median", f"{trained['step_s']:.2f}")
        line("tokens a second", f"{trained['tokens_per_s']:,.0f}")
        line("CPU seconds a step, all processes, start and evaluations in", f"{trained['cpu_s'] / steps:.1f}")
        line("minutes, quarterly evaluations included", f"{trained['seconds'] / 60:.1f}")
        line("load average of the machine meanwhile (this run's own processes too)", f"{load:.1f}")
        line("peak memory of rank 0, GiB", f"{trained['peak_mem_gib']:.2f}")
        line("loss of the first step, mean of the last ten",
             f"{trained['first_loss']:.4f}, {trained['last_loss']:.4f}")
        dirty = " with changes" if trained["dirty"] else ""
        lines += ["", f"{result['machine']['precision']}; {result['machine']['device']}, "
                  f"{trained['world_size']} process(es); torch {trained['torch']}, transformers "
                  f"{trained['transformers']}; commit {(trained['commit'] or 'unknown')[:7]}{dirty}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    args, more = build_parser().parse_known_args()
    sys.path.insert(0, str(ROOT))
    args.model, args.gsm8k = (str(Path(path).resolve()) for path in (args.model, args.gsm8k))
    out = Path(args.out)
    write_data(args, out / "data")
    check_prompts(args)
    machine = describe_machine(args, more)
    args.nproc = args.nproc or (2 if "cores" in machine["device"] else 1)
    settings = {key: value for key, value in vars(args).items() if key not in ("minutes", "out")}
    path = out / "result.json"
    result = json.loads(path.read_text()) if path.exists() else {
        "settings": settings, "flags": more, "machine": machine, "system_prompt": SYSTEM}
    if (result["settings"], result["flags"]) != (settings, more):
        sys.exit(f"{path} is of other settings: {result['settings']} {result['flags']}; give another --out")
    stages = {
        "before_loss": lambda: measure_loss_and_pace(args, more),
        "plan": lambda: plan_steps(args, more, result["before_loss"]["step_s"]),
        "before_accuracy": lambda: measure_accuracy(args, Path(args.model), "before_accuracy", more),
        "train": lambda: train(args, more, result["plan"]["steps"]),
        "after_accuracy": lambda: measure_accuracy(args, out / "train/hf", "after_accuracy", more),
    }
    for name, stage in stages.items():
        if name not in result:
            result[name] = stage()
            path.write_text(json.dumps(result, indent=1) + "\n")
            (out / "result.md").write_text(table(result))
    print("\n" + table(result))


if __name__ == "__main__":
    main()
