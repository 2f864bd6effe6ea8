"""Stopped and resumed is the same run, bit for bit; on another number of processes, the same up to rounding.

A stop is a copy of a run's folder with one checkpoint of its middle alone: what a killed run leaves behind.
All runs on texts have 8 samples a step, however these are divided, and are compared with one run on one
process.
"""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import (
    ENGLISH, make_hf_model, make_tokenizer, read_checkpoint, read_metrics, write_gsm8k_like,
)
from quick_runs import quick_ranks
from safetensors.torch import load_file

import train_llm

STEPS, STOP, SEQ_LEN = 20, 8, 32
slow = pytest.mark.slow


# ----------------------------------------------------------------------------------------------------
# 1. Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tokenizers and data sets, and a GPT-2 whose dropout makes every random state count."""
    folder = tmp_path_factory.mktemp("resume")
    make_tokenizer(folder / "tokenizer", 500)
    texts = [" ".join(ENGLISH[(5 * i + j) % 4] for j in range(1 + i % 4)) for i in range(50)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    write_gsm8k_like(folder / "chats.jsonl", 90)
    make_hf_model("gpt2", folder / "gpt2")  # its output layer is tied to the embeddings
    config = json.loads((folder / "gpt2" / "config.json").read_text())
    config |= {"attn_pdrop": 0.2, "embd_pdrop": 0.1, "resid_pdrop": 0.2}
    (folder / "gpt2" / "config.json").write_text(json.dumps(config))
    return folder


def train(folder, flags, run, nproc=1, check=True):
    """Run the script with `flags` and what all runs here share, in `folder`/`run`; a CompletedProcess."""
    return quick_ranks([
        "--seq-len", SEQ_LEN, "--max-steps", STEPS, "--warmup-steps", 3, "--max-lr", 1e-3, "--min-lr", 1e-4,
        "--checkpoint-interval", 4, "--keep-checkpoints", 0, "--log-interval", 1, "--no-export", "--seed", 3,
        "--device", "cpu", "--no-mixed-precision", "--no-compile", "--data-cache", folder / "cache",
        "--checkpoint-dir", folder / run, *flags,
    ], nproc, code=0 if check else None, timeout=300)[0]


def scratch(folder, batch_size, accumulation=1):
    return [
        "--from-scratch", "--model-size", "test", "--vocab-size", 512, "--tokenizer", folder / "tokenizer",
        "--dataset", folder / "texts.jsonl", "--batch-size", batch_size, "--grad-accum-steps", accumulation,
    ]


def step_folder(run_dir, step):
    return run_dir / "checkpoints" / f"step_{step:06d}"


def stop(folder, run, step, copy):
    """The folder of a run that was killed after the checkpoint of `step`, while it wrote the next one."""
    shutil.copytree(step_folder(folder / run, step), step_folder(folder / copy, step))
    for name in ("config.yaml", "env.json"):
        shutil.copy(folder / run / name, folder / copy)
    partial_save = step_folder(folder / copy, step + 4).with_suffix(".partial")
    partial_save.mkdir()
    (partial_save / "__7_0.distcp").write_bytes(b"cut")
    step_folder(folder / copy, 999_999).mkdir()  # nothing in it: a pruning that was cut short
    return folder / copy


def losses(run_dir, first=1):
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(first, STEPS + 1))
    return torch.tensor([row["train/loss"] for row in rows], dtype=torch.float64)


def largest_difference(run_dir, straight, first=1):
    """Of the losses, relative; and the counts of samples and tokens are the same."""
    counts = [[(row["step"], row["samples"], row["train/tokens"]) for row in read_metrics(path)
               if row["step"] >= first] for path in (run_dir, straight)]
    assert counts[0] == counts[1]
    return float((losses(run_dir, first) / losses(straight)[first - 1:] - 1).abs().max())


def assert_same_losses_and_norms(run_dir, straight):
    """Up to rounding. A wrong norm would clip wrongly, which the losses alone might hide."""
    assert largest_difference(run_dir, straight) < 1e-5
    norms, expected = ([row["train/grad_norm"] for row in read_metrics(path)] for path in (run_dir, straight))
    assert norms == pytest.approx(expected, rel=1e-5)
    assert max(norms) > 1.0  # --grad-clip has had something to do


def assert_same_run(resumed, straight):
    """Every row and every checkpoint after the stop, to the last bit."""
    after = [row for row in read_metrics(straight) if row["step"] > STOP]
    rows = read_metrics(resumed)
    assert len(rows) == len(after) == STEPS - STOP
    for row, expected in zip(rows, after):
        for key in ("step", "samples", "train/loss", "train/lr", "train/grad_norm", "train/tokens"):
            assert row[key] == expected[key], (key, row["step"])
    for path in train_llm.checkpoints_in(resumed / "checkpoints"):
        tensors = read_checkpoint(path)
        expected = read_checkpoint(straight / "checkpoints" / path.name)
        assert tensors.keys() == expected.keys()
        assert {name.partition(".")[0] for name in tensors} == {"model", "optim", "random"}
        for name in tensors:
            assert torch.equal(tensors[name], expected[name]), (path.name, name)
        assert (path / "progress.json").read_text() == (straight / "checkpoints" / path.name /
                                                        "progress.json").read_text()


@pytest.fixture(scope="module")
def straight(folder):
    """The run that others are compared with: one process, no stop."""
    train(folder, scratch(folder, 4, 2), "straight")
    return folder / "straight"


# ----------------------------------------------------------------------------------------------------
# 2. The same number of processes: the same bits


def test_one_process(folder, straight):
    resumed = stop(folder, "straight", STOP, "one")
    out = train(folder, scratch(folder, 4, 2), "one").stdout
    # The stop is in the middle of an epoch, which ends in the middle of a later step.
    num_samples = int(re.search(r"one pass over (\d+) sequences", out)[1])
    assert STOP * 8 < num_samples < STEPS * 8
    assert num_samples % 8
    assert "resumed" in out and f"{STOP * 8} samples seen" in out
    assert_same_run(resumed, straight)
    # What the kill left behind is gone, and is not taken for a part of the save that was made again.
    assert not list((resumed / "checkpoints").glob("*.partial"))
    assert not list((resumed / "checkpoints").glob("*/__7_0.distcp"))
    assert [path.name for path in train_llm.checkpoints_in(resumed / "checkpoints")] == [
        f"step_{step:06d}" for step in (8, 12, 16, 20)]


def test_two_processes_with_dropout_tied_embeddings_and_chats(folder):
    flags = ["--hf-model", folder / "gpt2", "--dataset", folder / "chats.jsonl", "--batch-size", 2,
             "--seq-len", 128]
    train(folder, flags, "dropout", nproc=2)
    resumed = stop(folder, "dropout", STOP, "dropout-resumed")
    train(folder, [*flags, "--keep-checkpoints", 2], "dropout-resumed", nproc=2)
    assert_same_run(resumed, folder / "dropout")
    assert [path.name for path in train_llm.checkpoints_in(resumed / "checkpoints")] == [
        "step_000016", "step_000020"]
    tensors = read_checkpoint(step_folder(resumed, STEPS))
    assert "model.transformer.wte.weight" in tensors
    assert not any("lm_head" in name for name in tensors)  # tied: saved once
    # Each process has a random state of its own, and dropout has moved it on.
    early = read_checkpoint(step_folder(folder / "dropout", 4))
    states = {bytes(saved[f"random.cpu_{rank}"].numpy()) for saved in (early, tensors) for rank in (0, 1)}
    assert len(states) == 4


@slow
def test_tied_embeddings_are_tied_after_a_resume(folder):
    """The export of a resumed run, in which transformers would show an output layer that went its own way."""
    make_hf_model("llama", folder / "tied", tie=True)
    flags = ["--hf-model", folder / "tied", "--dataset", folder / "texts.jsonl", "--batch-size", 8]
    train(folder, flags, "tied-straight")
    resumed = stop(folder, "tied-straight", STOP, "tied-resumed")
    out = train(folder, [*flags, "--export"], "tied-resumed").stdout
    assert "reloaded: logits within" in out
    assert_same_run(resumed, folder / "tied-straight")
    exported = load_file(resumed / "hf" / "model.safetensors")
    assert "lm_head.weight" not in exported
    assert json.loads((resumed / "hf" / "config.json").read_text())["tie_word_embeddings"] is True
    assert torch.equal(exported["model.embed_tokens.weight"],
                       read_checkpoint(step_folder(resumed, STEPS))["model.model.embed_tokens.weight"])


@slow
def test_streaming(folder):
    flags = [*scratch(folder, 2), "--streaming"]
    train(folder, flags, "streaming", nproc=2)
    resumed = stop(folder, "streaming", STOP, "streaming-resumed")
    train(folder, flags, "streaming-resumed", nproc=2)
    assert_same_run(resumed, folder / "streaming")
    states = []
    for run in (resumed, folder / "streaming"):
        states.append({"0": "", "1": ""})
        dcp.load({"stream": states[-1]}, checkpoint_id=step_folder(run, STEPS), no_dist=True)
    assert states[0] == states[1] and all(json.loads(text)["library"] for text in states[0].values())


# ----------------------------------------------------------------------------------------------------
# 3. Another number of processes, another way of sharding: the same losses


def test_from_one_process_to_two_and_back(folder, straight):
    """--resume with a folder of another run leaves that one as it is."""
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    kept = shutil.copytree(step_folder(straight, STOP), folder / "kept-for-later")  # under a name of its own
    train(folder, [*scratch(folder, 4, 1), "--resume", kept], "two", nproc=2)
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*")} == before
    assert largest_difference(folder / "two", straight, STOP + 1) < 1e-5

    stop(folder, "two", 12, "back")
    train(folder, [*scratch(folder, 1, 8), "--no-async-checkpoint"], "back")
    assert largest_difference(folder / "back", straight, 13) < 1e-5
    final, expected = (read_checkpoint(step_folder(path, STEPS)) for path in (folder / "back", straight))
    for name in (name for name in final if name.startswith("model.")):
        assert (final[name] - expected[name]).abs().max() < 1e-4 * expected[name].abs().max(), name


def test_an_epoch_is_an_epoch_whatever_the_batch(folder):
    """Counted in samples: each is seen once, but for the last batch's rest; the rate goes on where it was."""
    flags = [*scratch(folder, 1), "--dataset", folder / "texts.jsonl", "--no-packing"]
    quick_ranks(epoch_flags(folder, flags, "epoch"), 1)
    rows = read_metrics(folder / "epoch")
    num_samples = rows[-1]["samples"]
    assert num_samples == len(rows) > 100
    for name, size, nproc in (("epoch-4", 4, 1), ("epoch-3-2", 3, 2)):
        stop(folder, "epoch", 20, name)
        out = quick_ranks(epoch_flags(folder, [*flags, "--batch-size", size], name), nproc)[0].stdout
        later, per_step = read_metrics(folder / name), size * nproc
        assert f"batch_size 1 -> {size}" in out and ("processes 1 -> 2" in out) == (nproc == 2)
        assert 0 <= later[-1]["samples"] - num_samples < per_step
        assert [row["samples"] for row in later] == [20 + per_step * (i + 1) for i in range(len(later))]
        before = {row["samples"]: row["train/lr"] for row in rows}
        for row in later[:-1]:  # the rate of the update that began at this sample, within one step of it
            began = row["samples"] - per_step
            assert before[min(num_samples, began + 2 * per_step)] <= row["train/lr"] * 1.0001
            assert row["train/lr"] <= before[max(1, began - per_step)] * 1.0001


def epoch_flags(folder, flags, run):
    return ["--seq-len", SEQ_LEN, "--warmup-steps", 0, "--max-lr", 1e-3, "--min-lr", 1e-4, "--log-interval",
            1, "--checkpoint-interval", 20, "--keep-checkpoints", 0, "--no-export", "--device", "cpu",
            "--no-mixed-precision", "--data-cache", folder / "cache", "--checkpoint-dir", folder / run,
            *flags]


def test_replicas_without_shards(folder, straight):
    train(folder, [*scratch(folder, 4), "--hsdp-shard-size", 1], "replicas", nproc=2)
    assert_same_losses_and_norms(folder / "replicas", straight)


@slow
def test_two_replicas_of_two_shards(folder, straight):
    train(folder, [*scratch(folder, 2), "--hsdp-shard-size", 2], "hsdp", nproc=4)
    assert_same_losses_and_norms(folder / "hsdp", straight)


def test_reducing_after_every_micro_batch(folder, straight):
    train(folder, [*scratch(folder, 1, 4), "--reduce-every-micro-batch"], "reduced", nproc=2)
    assert_same_losses_and_norms(folder / "reduced", straight)


# ----------------------------------------------------------------------------------------------------
# 4. Less memory, the same numbers


def test_activation_checkpointing(folder, straight):
    """The saving itself is in the next test."""
    modes = ("full", "selective")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda mode: train(
            folder, [*scratch(folder, 4, 2), "--activation-checkpointing", mode], mode), modes))
    for mode in modes:
        assert largest_difference(folder / mode, straight) < 1e-6


def test_activation_checkpointing_recomputes():
    """Matrix products in forward and backward: all of the block's forward again, or none of them."""
    from torch.utils.flop_counter import FlopCounterMode

    config = train_llm.decoder_config(train_llm.MODEL_SIZES["test"])
    x = torch.randn(2, 16, config.hidden_size)
    rotary = train_llm.rotary_table(torch.arange(16)[None], config.head_dim, 1e4, torch.float32)
    flops, grads = {}, {}
    for mode in ("none", "full", "selective"):
        torch.manual_seed(0)
        block = train_llm.Block(config)
        if mode != "none":
            train_llm.recompute_in_backward(block, selective=mode == "selective")
        with FlopCounterMode(display=False) as counter:
            block(x, rotary, None, None).square().sum().backward()
        flops[mode] = counter.get_total_flops()
        grads[mode] = torch.cat([p.grad.flatten() for p in block.parameters()])
    assert torch.equal(grads["none"], grads["full"])
    assert torch.equal(grads["none"], grads["selective"])
    assert flops["none"] == flops["selective"] < flops["full"]


@slow
def test_offloading_on_the_cpu(folder, straight):
    train(folder, [*scratch(folder, 4), "--cpu-offload"], "offloaded", nproc=2)
    assert_same_losses_and_norms(folder / "offloaded", straight)


# ----------------------------------------------------------------------------------------------------
# 5. What is refused, and what is finished


def snapshot(run_dir):
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_finished_and_refused(folder, straight):
    """A finished run says so; another model, and a new run in a used folder, are refused in one line.

    None of them changes anything.
    """
    before = snapshot(straight / "checkpoints"), (straight / "metrics.jsonl").read_bytes()
    flags = scratch(folder, 4, 2)
    longer = ["--max-steps", STEPS + 1]
    texts = (folder / "texts.jsonl").read_text()
    (folder / "fewer.jsonl").write_text(texts[texts.index("\n") + 1:])
    cases = {
        "finished": flags,
        "none": [*flags, "--resume", "none"],
        "vocabulary": [*flags, "--vocab-size", 576, *longer],
        "size": [*flags, "--model-size", "quickstart", *longer],
        "seed": [*flags, "--seed", 4, *longer],
        "length": [*flags, "--seq-len", SEQ_LEN + 1, *longer],
        "data": [*flags, "--dataset", folder / "fewer.jsonl", *longer],
        "family": ["--hf-model", folder / "gpt2", "--dataset", folder / "texts.jsonl", *longer],
    }
    # One after another: a run folder is locked.
    outs = {case: train(folder, arguments, run="straight", check=False) for case, arguments in cases.items()}
    assert (snapshot(straight / "checkpoints"), (straight / "metrics.jsonl").read_bytes()) == before

    assert outs["finished"].returncode == 0
    assert f"this run is finished: {step_folder(straight, STEPS)}" in outs["finished"].stdout
    for case in cases.keys() - {"finished"}:
        message = {"none": "--resume none: ", "vocabulary": "is a checkpoint of another model: "}.get(
            case, " is of another run (")
        assert outs[case].returncode == 1, case
        errors = [line for line in outs[case].stderr.splitlines() if line.strip()]
        assert len(errors) == 1, outs[case].stderr
        assert errors[0].startswith("train_llm.py: error: ") and message in errors[0]
        assert "step_000020" in errors[0] and "--checkpoint-dir" in errors[0]
