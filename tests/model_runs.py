"""Trained runs and reference computations that test files share; a pytest process makes each run once."""

import functools
import json
import random
import tempfile
from pathlib import Path

import torch
from helpers import HF_FAMILIES, make_hf_model, make_tokenizer
from quick_runs import quick_ranks

SEQ_LEN = 64
NUM_SAMPLES = 4  # one optimizer step of `training_flags` sees all of the data, so that the order is no matter
SCRATCH = "from_scratch"


@functools.cache
def workplace():
    """A folder that lives as long as this process."""
    return tempfile.TemporaryDirectory(prefix="model_runs_")


def write_documents(path, tokenizer):
    """Texts of unequal lengths whose tokens, an end token after each text, fill NUM_SAMPLES samples."""
    rng, stream, texts = random.Random(0), [], []
    words = "seven small pencils cost three dollars each and Tom gives away what is left of them".split()
    while len(stream) <= (NUM_SAMPLES - 1) * SEQ_LEN + 1:
        texts.append(" ".join(rng.choices(words, k=rng.randint(4, 20))))
        stream += tokenizer(texts[-1], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert len(stream) - 1 <= NUM_SAMPLES * SEQ_LEN, "the last text is too long"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def pieces_of(path, tokenizer):
    """[(input_ids, labels)]: one document, or the part of it within a sample, at a time; -100 is untrained.

    Documents stand one after another in one stream that is cut every SEQ_LEN tokens. A document's last token
    has no label; the last token in front of a cut has one if the document goes on behind it.
    """
    pieces, position = [], 0
    for line in path.read_text().splitlines():
        text = json.loads(line)["text"]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        labels = [*ids[1:], -100]
        cuts = [cut - position for cut in range(0, position + len(ids), SEQ_LEN) if cut > position]
        for start, end in zip([0, *cuts], [*cuts, len(ids)]):
            pieces.append((torch.tensor([ids[start:end]]), torch.tensor(labels[start:end])))
        position += len(ids)
    return pieces


@torch.no_grad()
def loss_of(model, pieces):
    """(loss a trained token of transformers' logits, number of trained tokens), each piece by itself."""
    total = count = 0
    for input_ids, labels in pieces:
        logits = model(input_ids, use_cache=False).logits[0].double()
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += (labels != -100).sum().item()
    return total / count, count


def training_flags(folder, nproc):
    """Two steps of the whole data in RUN = folder / "run"; fp32 also where the processor has bf16."""
    return [
        "--dataset", folder / "texts.jsonl", "--data-cache", folder / "cache",
        "--checkpoint-dir", folder / "run", "--seq-len", SEQ_LEN, "--batch-size", NUM_SAMPLES // nproc,
        "--max-steps", 2, "--log-interval", 1, "--warmup-steps", 0, "--max-lr", 1e-3,
        "--loss-chunk-tokens", 48, "--device", "cpu", "--no-mixed-precision",
    ]


def trained(family, nproc=1, tie=None, dtype="float32", export_dtype="float32"):
    """A folder with texts.jsonl, the untrained model in source/ and the run of the real command in run/."""
    return train_once(family, nproc, tie, dtype, export_dtype)


@functools.cache  # which tells f(1) from f(x=1), hence the function around it
def train_once(family, nproc, tie, dtype, export_dtype):
    from transformers import AutoTokenizer

    folder = Path(workplace().name) / f"{family}-{nproc}-{tie}-{dtype}-{export_dtype}"
    folder.mkdir()
    source = folder / "source"
    if family in HF_FAMILIES:
        make_hf_model(family, source, dtype=dtype, tie=tie)
        flags = ["--hf-model", source]
    else:
        assert family == SCRATCH
        make_tokenizer(source)
        flags = ["--from-scratch", "--model-size", "test", "--tokenizer", source]
    write_documents(folder / "texts.jsonl", AutoTokenizer.from_pretrained(source))
    flags += training_flags(folder, nproc)
    if export_dtype == "bfloat16":  # where the processor computes in it
        flags.append("--mixed-precision")
    quick_ranks(flags, nproc, cwd=folder, timeout=300)
    return folder
