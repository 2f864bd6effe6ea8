"""What the data section of train_llm.py costs: tokens a CPU second against `datasets.map`, memory, reading.

    python benchmarks/data_speed.py --tokenizer FOLDER [--megabytes 8 32]

Texts are pieces of 3,000 characters of the standard library's sources. Each side and size runs in a process
of its own. CPU seconds are those of the process and its children, the imports too, so that a busy machine
counts less; memory is the largest resident set; batch_ms is for one batch of 16 x 2,048 tokens.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def write_texts(path: Path, megabytes: int) -> None:
    rng, size = random.Random(0), 0
    sources = [p.read_text(errors="replace") for p in sorted(Path(statistics.__file__).parent.glob("*.py"))]
    sources = [text for text in sources if len(text) > 3000]
    with path.open("w") as file:
        while size < megabytes << 20:
            text = rng.choice(sources)
            start = rng.randrange(len(text) - 2999)
            size += file.write(json.dumps({"text": text[start:start + 3000]}) + "\n")


def bare(path: Path, tokenizer: str) -> dict:
    """load_dataset and map, as its documentation writes them."""
    import datasets
    from transformers import AutoTokenizer
    encode = AutoTokenizer.from_pretrained(tokenizer)
    rows = datasets.load_dataset("json", data_files=str(path), split="train",
                                 cache_dir=str(path.parent / "bare"))
    tokens = rows.map(lambda batch: {"input_ids": encode(batch["text"])["input_ids"]}, batched=True,
                      remove_columns=rows.column_names)
    return {"tokens": sum(map(len, tokens.with_format("numpy")["input_ids"]))}


def ours(path: Path, tokenizer: str) -> dict:
    """Reading, tokenising with its checks, packing; then the time of a batch."""
    import torch
    sys.path.insert(0, str(ROOT))
    import train_llm
    args = train_llm.parse_args(["--hf-model", tokenizer, "--dataset", str(path), "--batch-size", "16",
                                 "--device", "cpu", "--data-cache", str(path.parent / "ours")])
    data = train_llm.prepare_data(args)
    args.mask_documents = True
    train_set, *_ = train_llm.open_datasets(args, data)
    ranks, times = train_llm.Ranks(0, 0, 1, torch.device("cpu")), []
    batches = train_llm.ordered_batches(train_set, args, ranks, 0)
    for _ in range(50):
        started = time.process_time()
        next(batches)
        times.append(1000 * (time.process_time() - started))
    return {"tokens": sum(data["train"][0][0]["length"]), "batch_ms": statistics.median(times),
            "fastest_batch_ms": min(times)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        name, path = args.side.split(":")
        found = {"bare": bare, "ours": ours}[name](Path(path), args.tokenizer)
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        found["cpu_s"] = sum(usage.ru_utime + usage.ru_stime for usage in used)
        found["peak_mib"] = max(usage.ru_maxrss for usage in used) / 1024
        print(json.dumps(found))
        return
    for megabytes in args.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "texts.jsonl"
            write_texts(path, megabytes)
            for name in ("bare", "ours"):
                side = ["--tokenizer", args.tokenizer, "--side", f"{name}:{path}"]
                command = [sys.executable, __file__, *side]
                done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
                found = json.loads(done.stdout.splitlines()[-1])
                found["tokens_per_cpu_s"] = found["tokens"] / found["cpu_s"]
                shown = ", ".join(f"{key} {value:,.2f}" for key, value in found.items())
                print(f"{megabytes} MB {name}: {shown}", flush=True)


if __name__ == "__main__":
    main()
