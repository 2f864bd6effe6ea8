"""What test_fuzz.py draws: each function makes a case from random numbers, the place and an empty folder."""

import dataclasses
import json
import math
import os
import re
import shutil

import grpo_models
import pyarrow.parquet
import train_gsm8k_fsdp2
import train_llm
from helpers import read_metrics

LLM, GRPO, HUGE = train_llm, train_gsm8k_fsdp2, "9" * 24
STEPS = ["--schedule", "constant", "--warmup-steps", 0, "--checkpoint-interval", 2, "--keep-checkpoints", 0]


@dataclasses.dataclass
class Case:
    what: str  # was done
    args: list
    names: tuple[str, ...]  # one of them stands in the last line of a failure
    script: object = LLM
    must_fail: bool | None = None  # None: may end either way
    rows: dict | None = None  # {step: loss} of a success
    env: dict = dataclasses.field(default_factory=dict)
    before: str = ""  # Python that its process runs first


def flags_for(script, place, folder):
    """Of two steps in folder/run."""
    if script is GRPO:
        return grpo_models.flags(place, folder / "run", 1, "--train-steps", 2, "--no-export")
    return ["--from-scratch", "--model-size", "test", "--tokenizer", place / "tokenizer", "--dataset",
            place / "rows.jsonl", "--data-cache", "cache", "--seq-len", 128, "--batch-size", 2,
            "--max-steps", 2, "--log-interval", 1, "--device", "cpu", "--checkpoint-dir", "run",
            "--no-export"]


def losses(run_dir):
    return {row["step"]: row.get("train/loss", 0.0) for row in read_metrics(run_dir) if "time/step_s" in row}


VALUES = ["", " ", "abc", "nan", "inf", "-1", "0", "1", "3", "1.5", HUGE, "-" + HUGE, "~/x", "/dev/null",
          "true", "/proc/x/y", "./no.jsonl", "é", "\udcff", "a\nb", "x" * 5000, "None", "[1]", "0x10", "٣"]
# More processes, compilers, waiting: not in a test that must be quick.
NOT_DRAWN = "help nproc compile stall_timeout gpu_ranks model_size wandb config system_prompt".split()


def flags(rng, place, folder):
    script = rng.choice([LLM, LLM, GRPO])
    known = [action for action in script.build_parser()._actions if action.dest not in NOT_DRAWN]
    given = [f"{rng.choice(action.option_strings)}={rng.choice(VALUES)}"
             for action in rng.sample(known, rng.choice([1, 1, 2]))]
    names = filter(None, re.split("=|/y$", "=".join(given)))
    return Case(repr(given), [*flags_for(script, place, folder), *given], tuple(names), script)


CONFIG_LINES = [
    "seed: 3", "max_lr: 1e-3", "max-lr: 2e-3", "max_lr: .inf", "seed: 2024-13-45", "seed: 2024-01-02", "~: 1",
    "packing: maybe", "packing: ~", "seed: [1]", "seed: {a: 1}", "max_lr: 0x_", "config: x.yaml",
    "seed: !!python/object/apply:os.getcwd []", "<<: *nothing", "? [a, b]\n: c", "12: 3", "- x", "\tseed: 1",
    'seed: "\\ud800"', "dataset: ''", f"seed: {HUGE}", "seed: " + "[" * 3000, "{" * 3000, "\x00", "", "null",
    "seed: 1\n---\nseed: 2", "a: &a [x, x]\nb: &b [*a, *a]"]


def config(rng, place, folder):
    path, lines = folder / "odd config.yaml", rng.sample(CONFIG_LINES, rng.choice([1, 1, 2]))
    encoded = "\n".join(lines).encode(rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16"]))
    path.write_bytes(encoded + rng.choice([b"\n", b"\n", b"\n\xff\xfe: \x80\n"]))
    names = [f"--{line.partition(':')[0].replace('_', '-')}" for line in lines]
    return Case(repr(lines)[:300], [*flags_for(LLM, place, folder), "--config", path],
                (str(path), "--None", *names))


KINDS = [
    {"text": "A small model learns one word after another."}, {"prompt": "3+4?", "completion": "7"},
    {"messages": [{"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "7"}]},
    {"question": "3+4?", "answer": "#### 7"}]
ODD = [None, "", 5, True, [], {}, [5], [[]], {"role": 5}, "\ud800", "x\0y", "é" * 3000, {"a": {"b": None}},
       [{"role": "assistant"}], [{"role": "assistant", "content": None}], math.nan, 10**400]
RAW = [b"{", b"{}", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"text": "\xe9"}', b"[" * 100_000, b"\x00" * 50,
       b'{"text": ' + b"9" * 5000 + b"}", b"{'text': 'x'}", b'{"text": "a", "text": 5}']


def rows(rng, place, folder):
    """Good rows, and an odd one among them."""
    script, kind = rng.choice([*((LLM, kind) for kind in KINDS), (GRPO, KINDS[-1])])
    row, how = json.loads(json.dumps(kind)), rng.random()
    target = rng.choice([row, *row.get("messages", ())])
    key = rng.choice([*target, rng.choice(["text", "prompt", "tools"])])
    target[key] = rng.choice(ODD)
    if how < 0.15:
        del target[key]
    odd = json.dumps(row).encode() if how < 0.7 else rng.choice(RAW)
    lines, number, path = [json.dumps(kind).encode()] * 20, rng.randint(1, 20), folder / "odd rows.jsonl"
    path.write_bytes(b"\n".join([*lines[1:number], odd, *lines[number:]]) + b"\n")
    options = rng.choice([[], ["--streaming"], ["--eval-split", path]]) if script is LLM else []
    args = [*flags_for(script, place, folder), "--dataset", path, *options]
    return Case(f"{kind} {odd[:200]!r} {options}", args, (f"{path}:{number}:", "no token is trained"), script)


def files(rng, place, folder):
    """A file, or a folder, that is no data set, or half of one."""
    path = folder / f"x{rng.choice(['.parquet', '.parquet', '.csv', '.jsonl', '.txt', '.JSONL', '.gz', ''])}"
    texts = [f"{i} pencils, and a word" for i in range(50)]
    path.write_text("text\n" + "".join(json.dumps({"text": text}) + "\n" for text in texts))
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    what = rng.choice(["cut", "empty", "noise", "zeros", "folder", "fifo", "dangling", "whole", "by a fifo"])
    if what == "cut":
        os.truncate(path, rng.randrange(path.stat().st_size))
    elif what in ("noise", "zeros", "empty"):
        path.write_bytes({"noise": rng.randbytes(3000), "zeros": bytes(3000), "empty": b""}[what])
    elif what == "by a fifo":
        (folder / "set").mkdir()
        path.rename(folder / "set" / path.name)
        path = folder / "set"
        os.mkfifo(path / "train.jsonl")
    elif what != "whole":
        path.unlink()
        {"folder": os.mkdir, "fifo": os.mkfifo, "dangling": lambda p: os.symlink("nowhere", p)}[what](path)
    script = rng.choice([LLM, LLM, GRPO])
    return Case(f"{path.name} {what}", [*flags_for(script, place, folder), "--dataset", path], (str(path),),
                script, must_fail=what in ("empty", "fifo", "dangling") or None)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
CONFIG_CHANGES = [(key, value) for key, values in {
    "num_hidden_layers": [3, 0, "x", -1], "hidden_size": [32, 63, 0, "64", None], "model_type": ["no", "t5"],
    "num_attention_heads": [3, 0, 8, None], "vocab_size": [100, 0, 513, 10**13], "eos_token_id": ["x", []],
    "max_position_embeddings": [4, 0, None], "rope_parameters": [5, {"rope_type": "no"}], "dtype": ["no", 5],
    "hidden_act": ["no", None], "num_key_value_heads": [1, 3, 0], "auto_map": [{"AutoConfig": "x.Y"}],
    "quantization_config": [{"quant_method": "gptq"}, 5]}.items() for value in values]


def model(rng, place, folder):
    """A model's folder with a file cut, changed or gone."""
    script, name = rng.choice([(LLM, "llama"), (LLM, "llama"), (GRPO, "policy")])
    target, must_fail = shutil.copytree(place / name, folder / "a model"), None
    path = target / rng.choice(["config.json", "config.json", "tokenizer.json", "tokenizer_config.json",
                                "generation_config.json", *["model.safetensors"] * 4])
    data, (key, value) = path.read_bytes(), rng.choice(CONFIG_CHANGES)
    what = rng.choice(["cut", "gone", "folder", POINTER, "flip", "longer"] + (path.suffix == ".json") * [
        "[]", "null", "{}", '"x"', "[" * 10**5] + (path.name == "config.json") * ["change"] * 20)
    if what == "change":
        path.write_text(json.dumps(json.loads(data) | {key: value}))
        what = f"{key}: {value}"
    elif what == "flip":
        where = rng.randrange(min(800, len(data)))
        path.write_bytes(data[:where] + rng.randbytes(1) + data[where + 1:])
    elif what in ("cut", "longer"):
        path.write_bytes(data[:rng.randrange(len(data))] if what == "cut" else data + b"\n" + bytes(63))
    elif what in ("gone", "folder"):
        path.unlink()
        _ = what == "folder" and path.mkdir()
    else:
        path.write_text(what)
    if path.suffix == ".safetensors" and what != "flip" or key == "hidden_size" and what.startswith(key):
        must_fail = True
    args = [flag for flag in flags_for(script, place, folder) if flag != "--from-scratch"]
    args += ["--hf-model", target, "--tokenizer", target] if script is LLM else ["--model", target]
    return Case(f"{name}/{path.name} {what[:60]}", args, (str(target), "the model", "parameters"), script,
                must_fail)


def checkpoint(rng, place, folder):
    """The newest of two checkpoints damaged; a run that goes on has the rows of one that nobody touched."""
    newest = shutil.copytree(place / "4", folder / "run") / "checkpoints/step_000004"
    path = rng.choice([path for path in sorted(newest.iterdir()) if path.suffix != ".py"])
    what = rng.choice(["cut", "zeros", "flip", "progress", "gone", "fifo", "folder", "renamed"])
    size, data = path.stat().st_size, bytearray(path.read_bytes())
    if what in ("cut", "zeros"):
        os.truncate(path, rng.randrange(size))
        os.truncate(path, size if what == "zeros" else path.stat().st_size)
    elif what == "flip" and path.name in (".metadata", "config.yaml"):
        data[rng.randrange(size)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif what == "progress":
        (newest / "progress.json").write_text(rng.choice(["", "{", "{}", "[]", "null", "5", "\xff\0", *(
            f'{{"step": {step}' + "}" for step in ("999999", '"4"', "NaN", "-1", '4, "samples": "x"'))]))
    elif what in ("gone", "fifo", "folder"):
        path.unlink()
        _ = {"gone": str, "fifo": os.mkfifo, "folder": os.mkdir}[what](path)
    elif what == "renamed":
        newest = newest.rename(newest.with_name(rng.choice(["step_x", "step_000007", "step_٤", "best"])))
    return Case(f"{path.name} {what}", [*flags_for(LLM, place, folder), *STEPS, "--max-steps", 6],
                (f"checkpoints/{newest.name}",), rows=losses(place / "6"))


def environment(rng, place, folder):
    """Variables of a launcher that is not there; outputs that nobody reads."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    right, before = ("0", "1", "0", "0", "1", "127.0.0.1"), ""
    env = dict(zip(names, right)) | {rng.choice(names[:-1]): rng.choice(["", "abc", "-1", "1.5", " 0", HUGE])}
    env |= rng.choice([{}, {"MASTER_ADDR": "no.invalid"}, {"TORCHELASTIC_USE_AGENT_STORE": "True"}])
    env.pop(rng.choice([*names, "nothing"]), None)
    if rng.random() < 0.5:
        env, before = {}, rng.choice([
            "os.dup2(os.open('/dev/full', 1), 1)", "os.dup2(os.open('/dev/full', 1), 2)",
            "os.close(1); sys.stdout = None", "os.close(2); sys.stderr = None",
            "reader, writer = os.pipe(); os.dup2(writer, 1); os.close(reader)"])
    return Case(f"{before or env}", [*flags_for(LLM, place, folder), *STEPS, "--max-steps", 6],
                (*names, ":"), must_fail=False if before else None, rows=losses(place / "6"), env=env,
                before=before)


DRAWS = [flags, config, rows, files, model, checkpoint, environment]
