"""What a run ends with generates as its source does; tools/export_hf.py makes the same of a checkpoint."""

import json
import os
import shutil

import pytest
import real_model as real
from helpers import make_hf_model, run_script
from model_runs import SCRATCH, trained, training_flags, write_documents
from quick_runs import quick_run

TOOL = "tools/export_hf.py"
# Arguments of `trained`: runs that test_families.py looks at too, so that a pytest of both makes each once.
RUNS = {
    "from scratch": dict(family=SCRATCH, nproc=1, export_dtype="float32"),
    "from scratch, bf16, 2 processes": dict(family=SCRATCH, nproc=2, export_dtype="bfloat16"),
    "llama, tied": dict(family="llama", nproc=1, tie=True, dtype="bfloat16"),
    "mixtral": dict(family="mixtral", nproc=2, tie=None, dtype="float32"),
    "gpt2, tied": dict(family="gpt2", nproc=1, tie=None, dtype="float32"),
}


def checkpoint_of(folder):
    return folder / "run" / "checkpoints" / "step_000002"


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", RUNS)
def test_tool_writes_what_the_run_wrote(name, tmp_path):
    arguments = RUNS[name]
    folder = trained(**arguments)
    dtype = arguments.get("export_dtype", "float32") if real.computes_bf16() else "float32"
    # The default is float32.
    flags = [] if dtype == "float32" else ["--dtype", dtype]
    result = run_script([checkpoint_of(folder), tmp_path / "hf", *flags], script=TOOL, cwd=folder)
    assert "reloaded: logits within" in result.stdout
    ours, theirs = files_of(tmp_path / "hf"), files_of(folder / "run" / "hf")
    assert ours.keys() == theirs.keys() and "model.safetensors" in ours
    assert [file for file in ours if ours[file] != theirs[file]] == []
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_refuses_what_is_no_checkpoint_and_a_full_folder(tmp_path):
    folder = trained(**RUNS["from scratch"])
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("do not overwrite")
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint_of(folder), broken)
    config = broken / "config.yaml"
    config.write_text(config.read_text().replace("model_size: test", "model_size: quickstart"))
    for arguments, code, words in [
        ([folder / "run", tmp_path / "hf"], 1, "is not a checkpoint"),
        ([checkpoint_of(folder), full], 1, "already holds something"),
        ([broken, tmp_path / "hf"], 1, "another model"),
        ([checkpoint_of(folder)], 2, "required: folder"),
    ]:
        result = run_script(arguments, script=TOOL, cwd=folder, check=False)
        assert result.returncode == code and words in result.stderr, result.stdout + result.stderr
        if code == 1:
            assert result.stderr.startswith("export_hf.py: error: ") and result.stderr.count("\n") == 1
    assert files_of(full) == {"mine.txt": b"do not overwrite"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "full"]


def test_the_export_generates_as_its_source(tmp_path):
    """Ends, sampling and cache as the source's files want them; the tokenizer's end ends it, too."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, hf = make_hf_model("llama", tmp_path / "source"), tmp_path / "run/hf"
    tokenizer = AutoTokenizer.from_pretrained(source)
    write_documents(tmp_path / "texts.jsonl", tokenizer)
    first, end = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(source)
    wanted = {"eos_token_id": [first, 7], "pad_token_id": first, "do_sample": True, "temperature": 0.7}
    (source / "generation_config.json").write_text(json.dumps(wanted))
    old_umask = os.umask(0o022)
    try:
        quick_run(["--hf-model", source, *training_flags(tmp_path, 1)], cwd=tmp_path)
    finally:
        os.umask(old_umask)
    config = json.loads((hf / "config.json").read_text())
    generation = json.loads((hf / "generation_config.json").read_text())
    assert generation == wanted | {"eos_token_id": [first, 7, end]}
    assert config["eos_token_id"] == [first, end] and config["use_cache"] is True
    assert config["dtype"] == "float32" and "quantization_config" not in config
    assert {path.stat().st_mode & 0o777 for path in hf.iterdir()} == {0o644}
    model, fed = AutoModelForCausalLM.from_pretrained(hf), []
    hook = lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape[1])  # noqa: E731
    model.register_forward_pre_hook(hook, with_kwargs=True)
    prompt = tokenizer("How many apples?", return_tensors="pt")
    model.generate(**prompt, max_new_tokens=8, min_new_tokens=8)
    assert sum(fed) == prompt["input_ids"].shape[1] + 7  # each token once: the cache is used
