"""Small trainings that run on several machines or go through a fault: data, arguments, comparisons."""

import json

import torch
from helpers import ENGLISH, REPO, make_tokenizer, read_checkpoint, read_metrics
from quick_runs import quick_ranks

STEPS = 16
SAMPLES = 8  # a step, however they are divided among processes


def prepare(folder):
    """A tokenizer, texts, and prodded.py: the script, but it executes AT_STEP at the end of each step."""
    make_tokenizer(folder / "tokenizer", 500)
    texts = [" ".join(ENGLISH[(5 * i + j) % 4] for j in range(1 + i % 4)) for i in range(50)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    line = '        is_last, every = step == total_steps, args.checkpoint_interval\n'
    source = (REPO / "train_llm.py").read_text()
    assert source.count(line) == 1
    added = '        exec(os.environ.get("AT_STEP", ""))\n'
    (folder / "prodded.py").write_text(source.replace(line, line + added))
    return folder


def flags_for(folder, run, nproc, *more):
    """Arguments of a run on `nproc` processes, in folder/run."""
    return [str(token) for token in (
        "--from-scratch", "--model-size", "test", "--tokenizer", folder / "tokenizer", "--dataset",
        folder / "texts.jsonl", "--data-cache", folder / "cache", "--seq-len", 32,
        "--batch-size", SAMPLES // nproc, "--max-steps", STEPS, "--warmup-steps", 3, "--max-lr", 1e-3,
        "--log-interval", 1, "--checkpoint-interval", 4, "--device", "cpu", "--no-export",
        "--no-mixed-precision", "--no-compile", "--checkpoint-dir", folder / run, *more)]


def straight_run(folder, nproc):
    """The run that nothing happens to, made once; returns its folder."""
    name = f"straight-{nproc}"
    if not (folder / name).exists():
        quick_ranks(flags_for(folder, name, nproc), nproc, timeout=300)
    return folder / name


def rows_by_step(run_dir):
    return {row["step"]: row for row in read_metrics(run_dir) if "train/loss" in row}


def assert_losses_as(run_dir, straight):
    """Up to the rounding of sums that were taken in another order."""
    found, expected = rows_by_step(run_dir), rows_by_step(straight)
    assert found.keys() == expected.keys() == set(range(1, STEPS + 1))
    for step, row in expected.items():
        assert abs(found[step]["train/loss"] / row["train/loss"] - 1) < 1e-5, step
        assert found[step]["samples"] == row["samples"]


def assert_same_state(run_dir, straight):
    """Weights, optimizer and random states and progress after the last step, to the last bit."""
    folder, other = (path / f"checkpoints/step_{STEPS:06d}" for path in (run_dir, straight))
    tensors, expected = read_checkpoint(folder), read_checkpoint(other)
    assert tensors.keys() == expected.keys() and any(name.startswith("optim.") for name in tensors)
    for name in expected:
        assert torch.equal(tensors[name], expected[name]), name
    progress, wanted = (json.loads((path / "progress.json").read_text()) for path in (folder, other))
    assert progress == wanted


def assert_same_bits(run_dir, straight):
    """The same state in the end, and each step's loss on the way."""
    assert_same_state(run_dir, straight)
    found, rows = rows_by_step(run_dir), rows_by_step(straight)
    assert {step: row["train/loss"] for step, row in found.items()} == {
        step: row["train/loss"] for step, row in rows.items()}
