"""train_llm.py against transformers' Trainer, fine-tuning SmolLM2-135M on the CPU: start, step cost, memory.

    python benchmarks/compare_trainer.py [--rounds 3] [--steps 9] [--nproc 1] [--threads 1]

Needs the accelerate package and .real-model (tests/real_model.py fetches it). The two run in turns, A B B A
A B …, on the same rows, in fp32, with fused AdamW, the same learning rate and clipping, and without compile;
the losses of the first steps must agree. Both save the model and the optimizer 3 steps before the end and at
the end, train_llm.py asynchronously, from a copy. With --nproc 2 train_llm.py shards; Trainer is plain data
parallel (DDP), because accelerate 1.15 has no FSDP on the CPU.

Each figure is a median over the runs (observe.py measures). Start-up is from process start to the end of the
first optimizer step (slower rank), in seconds and in CPU seconds, which a busy machine disturbs less. CPU
seconds a step are the median over the steps from the third to the first save, summed over ranks. Memory is
the larger rank's peak: until the first save, and until the process ends. Prints the table.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / ".real-model/SmolLM2-135M-Instruct"
SEQ_LEN, BATCH_SIZE, IGNORE = 256, 2, -100
AFTER_SAVE = 3  # steps
SAME_LOSS = 1e-4  # absolute; the two add up in different orders
MEASURES = {"start_s": "seconds to the end of step 1", "start_cpu_s": "CPU seconds to the end of step 1",
            "cpu_s": "CPU seconds a step, all ranks", "before_mib": "peak memory a rank before a save, MiB",
            "saved_mib": "peak memory a rank with saves, MiB", "added_mib": "of which the saves added, MiB"}


def train_with_trainer(options: dict) -> None:
    """The other side, as its manual says, on rows that are there already."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
    ids, labels = torch.load(options["rows"]).unbind()
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels)]
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    trainer = Trainer(model=model, train_dataset=rows, args=TrainingArguments(
        output_dir=options["folder"], use_cpu=True, per_device_train_batch_size=BATCH_SIZE,
        max_steps=options["steps"], learning_rate=2e-5, lr_scheduler_type="constant", weight_decay=0.1,
        adam_beta2=0.95, max_grad_norm=1.0, optim="adamw_torch_fused", train_sampling_strategy="sequential",
        save_strategy="steps", save_steps=options["save_step"], logging_steps=1, report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False))
    trainer.train()
    if trainer.is_world_process_zero():
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        (Path(options["folder"]) / "losses.json").write_text(json.dumps(losses))


def write_texts(path: Path, count: int) -> None:
    """Documents of SEQ_LEN tokens, with their end: each fills a row of both sides."""
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.model_max_length = int(1e30)
    texts = []
    for source in sorted(Path(os.__file__).parent.glob("*.py")):
        ids = tokenizer(source.read_text(encoding="utf-8"))["input_ids"]
        pieces = [ids[i:i + SEQ_LEN - 1] for i in range(0, len(ids) - SEQ_LEN, SEQ_LEN)]
        decoded = tokenizer.batch_decode(pieces)
        again = tokenizer(decoded)["input_ids"] if pieces else []
        texts += [text for text, before, after in zip(decoded, pieces, again) if before == after]
        if len(texts) >= count:
            break
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:count]))


def write_rows(flags: list, path: Path, count: int) -> None:
    """The rows that train_llm.py trains on, in its order, with labels as transformers' models shift them."""
    sys.path.insert(0, str(ROOT))
    import torch

    import train_llm
    args = train_llm.parse_args([str(flag) for flag in flags])
    args.mask_documents = True
    dataset, *_ = train_llm.open_datasets(args, train_llm.prepare_data(args))
    samples = [dataset[train_llm.sample_at(i, len(dataset), 0)] for i in range(count)]
    ids, labels = (torch.stack([sample[key] for sample in samples]) for key in ("input_ids", "labels"))
    assert (labels[:, -1] == IGNORE).all()
    torch.save(torch.stack([ids, torch.cat([torch.full((count, 1), IGNORE), labels[:, :-1]], 1)]), path)


def run(script: Path, arguments: list, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """The measures of one observed run."""
    out = folder / "observed"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable]
    if args.nproc > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.nproc)]
    command += [str(ROOT / "benchmarks/observe.py"), str(out), str(script), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": str(args.threads), "CUDA_VISIBLE_DEVICES": "",
                               "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    ranks = [json.loads(path.read_text()) for path in sorted(out.glob("rank*.json"))]
    if any(rank["computed_in"] != ["float32"] or rank["threads"] != args.threads for rank in ranks):
        sys.exit(f"{script} computed in {ranks[0]['computed_in']} with {ranks[0]['threads']} threads")
    first_save = args.steps - AFTER_SAVE

    def step_cost(cpu_s: list[float]) -> float:
        return statistics.median(b - a for a, b in zip(cpu_s[1:first_save], cpu_s[2:first_save]))

    before, saved = (max(values) for values in zip(*(
        (rank["peak_mib"][first_save - 1], rank["end_peak_mib"]) for rank in ranks)))
    return {"start_s": max(rank["start_s"][0] for rank in ranks),
            "start_cpu_s": max(rank["cpu_s"][0] for rank in ranks),
            "cpu_s": sum(step_cost(rank["cpu_s"]) for rank in ranks),
            "before_mib": before, "saved_mib": saved, "added_mib": saved - before}


def check_losses(folder: Path) -> tuple[float, float]:
    """The first loss of both; ends where the first three differ, for then they computed different things."""
    rows = (folder / "ours/metrics.jsonl").read_text().splitlines()
    ours = [json.loads(row)["train/loss"] for row in rows]
    theirs = json.loads((folder / "theirs/losses.json").read_text())
    for step, (a, b) in enumerate(zip(ours[:3], theirs[:3], strict=True), 1):
        if not abs(a - b) <= SAME_LOSS:
            sys.exit(f"the losses of step {step} differ: train_llm.py {a:.6f}, Trainer {b:.6f}")
    return ours[0], theirs[0]


def prepare(folder: Path, args: argparse.Namespace) -> dict[str, tuple[Path, list]]:
    """Texts, tokens and rows; the name of each side with its script and arguments."""
    num_rows, first_save = args.steps * BATCH_SIZE * args.nproc, args.steps - AFTER_SAVE
    write_texts(folder / "texts.jsonl", 4 * num_rows)
    ours = ["--hf-model", MODEL, "--dataset", "texts.jsonl", "--seq-len", SEQ_LEN, "--batch-size", BATCH_SIZE,
            "--schedule", "constant", "--warmup-steps", 0, "--no-mixed-precision", "--no-export",
            "--log-interval", 1, "--device", "cpu", "--checkpoint-dir", "ours"]
    # The first run makes the tokens; every measured run finds them.
    warm = [*ours, "--max-steps", 1, "--checkpoint-interval", 0]
    subprocess.run([sys.executable, ROOT / "train_llm.py", *map(str, warm)], cwd=folder, check=True,
                   stdout=subprocess.DEVNULL)
    texts = ["--dataset", folder / "texts.jsonl", "--data-cache", folder / "data_cache"]
    write_rows([*ours, *texts], folder / "rows.pt", num_rows)
    theirs = {"rows": str(folder / "rows.pt"), "folder": str(folder / "theirs"), "steps": args.steps,
              "save_step": first_save}
    ours += ["--max-steps", args.steps, "--checkpoint-interval", first_save]
    return {"Trainer": (Path(__file__).resolve(), ["trainer", json.dumps(theirs)]),
            "train_llm.py": (ROOT / "train_llm.py", ours)}


def main() -> None:
    if sys.argv[1:2] == ["trainer"]:
        return train_with_trainer(json.loads(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--nproc", type=int, default=1, help="processes of each side")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    args = parser.parse_args()
    if args.steps < 4 + AFTER_SAVE:
        sys.exit(f"--steps must be at least {4 + AFTER_SAVE}")
    if not MODEL.is_dir():
        sys.exit(f"{MODEL}: no such folder; tests/real_model.py fetches the model")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sides, found = prepare(folder, args), {"Trainer": [], "train_llm.py": []}
        for number in tqdm(range(2 * args.rounds), desc="runs", disable=not sys.stderr.isatty()):
            side = "Trainer" if number % 4 in (0, 3) else "train_llm.py"
            shutil.rmtree(folder / ("theirs" if side == "Trainer" else "ours"), ignore_errors=True)
            script, arguments = sides[side]
            found[side].append(run(script, arguments, folder, args))
        losses = check_losses(folder)
    a, b = ({key: statistics.median(row[key] for row in rows) for key in MEASURES} for rows in found.values())
    print("| fp32 | Trainer | train_llm.py | ratio |\n|---|---:|---:|---:|")
    for key, label in MEASURES.items():
        # Trainer stands still while it saves, and so copies nothing.
        ratio = "" if key == "added_mib" else f"{b[key] / a[key]:.2f}"
        print(f"| {label} | {a[key]:,.2f} | {b[key]:,.2f} | {ratio} |")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}"
                         for name in ("torch", "transformers", "accelerate"))
    print(f"\nmedians of {args.rounds} alternating runs each, {args.steps} steps of "
          f"{BATCH_SIZE * args.nproc} x {SEQ_LEN} tokens, {args.nproc} processes of {args.threads} thread"
          f"{'; train_llm.py shards, Trainer does not (DDP)' if args.nproc > 1 else ''}; first loss "
          f"{losses[1]:.6f} and {losses[0]:.6f}; {versions}, Python {platform.python_version()}")


if __name__ == "__main__":
    main()
