"""Make the quickstart's data, from what every Python has: the sources of its own standard library.

    python tools/make_stdlib_data.py [--folder data_cache] [--vocab-size 4096]

Writes FOLDER/stdlib/sources.jsonl, one {"text"} row for each file (some 10 MB; tests and code tables are left
out), and FOLDER/stdlib_tokenizer, a byte-level BPE tokenizer trained on them. Does nothing where both are
there. The launchers call it before configs/train_llm/quickstart.yaml.
"""

import argparse
import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import user_script  # noqa: F401, a Python that has torch

END = "<|endoftext|>"
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}


def source_files() -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(sysconfig.get_paths()["stdlib"]):
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT]  # not walked at all
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def write_sources(folder: Path) -> None:
    with (folder / "sources.jsonl").open("w", encoding="utf-8") as file:
        for path in source_files():
            file.write(json.dumps({"text": path.read_text(encoding="utf-8", errors="replace")}) + "\n")


def train_tokenizer(folder: Path, vocab_size: int) -> None:
    """Byte-level BPE, saved as a Hugging Face tokenizer folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in source_files())
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty()))
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END).save_pretrained(folder)


def make(folder: Path, write, *args: object) -> None:
    """A folder written whole, or not at all; several processes may try."""
    if folder.exists():
        return
    partial = folder.with_name(f"{folder.name}.{os.uname().nodename}.{os.getpid()}")
    partial.mkdir(parents=True)
    write(partial, *args)
    try:
        partial.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(partial)
    print(f"made {folder}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("data_cache"))
    parser.add_argument("--vocab-size", type=int, default=4096)
    args = parser.parse_args()
    make(args.folder / "stdlib", write_sources)
    make(args.folder / "stdlib_tokenizer", train_tokenizer, args.vocab_size)


if __name__ == "__main__":
    main()
