"""benchmarks/on_gpu.sh: its rehearsal on the CPU, failing stages, an early end, its figures."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import psutil
import pytest
from helpers import REPO, make_tokenizer

sys.path.insert(0, str(REPO / "benchmarks"))

SCRIPT = REPO / "benchmarks" / "on_gpu.sh"


def start(tmp_path, *stages, script=SCRIPT, **variables):
    """The script under way; its results go to tmp_path/out, what it makes below tmp_path/work."""
    (tmp_path / "work").mkdir()
    environment = {key: value for key, value in os.environ.items() if key not in ("OUT", "REAL_MODEL")}
    environment |= {"OUT": str(tmp_path / "out"), "TMPDIR": str(tmp_path / "work"), "PYTHON": sys.executable,
                    "ON_GPU_DEVICE": "cpu", "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(["bash", str(script), *stages], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def results(folder):
    return {row["stage"]: row for row in json.loads((folder / "out" / "results.json").read_text())}


@pytest.mark.slow
def test_a_stage_that_fails_is_named_and_the_next_one_goes_on(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    for split in ("train", "test"):
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text("this is not JSON\n")
    model = make_tokenizer(tmp_path / "model")
    (model / "model.safetensors").touch()  # never read: the data come first
    running = start(tmp_path, "smollm2", "1B", "profile", GSM8K_DIR=str(tmp_path / "gsm8k"),
                    REAL_MODEL=str(model))
    output, _ = running.communicate(timeout=600)
    assert running.returncode == 1, output
    table = (tmp_path / "out" / "table.md").read_text()
    found = results(tmp_path)
    # The failure, with the reason.
    assert found["smollm2-inputs"]["status"] == "failed" and "smollm2-sft" not in found
    assert "train.jsonl:1: not JSON" in table.partition("## Failures")[2]
    # The others.
    for stage in ("peak", "texts", "inputs", "1B", "profile"):
        assert found[stage]["status"] == "ok", output
    assert found["1B"]["steps"] == 9 and found["1B"]["tokens_per_s"] > 0
    assert "REHEARSAL" in table and "\n| 1B | " in table.partition("## Training")[2]
    assert "aten::mm" in table.partition("## Profile")[2]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.jsonl", "results.json", "table.md", "profile.txt", "logs.tgz"}
    assert not list((tmp_path / "work").iterdir())
    again = subprocess.run(["bash", str(SCRIPT)], env=os.environ | {"OUT": str(tmp_path / "out")},
                           capture_output=True, text=True)
    assert again.returncode == 2 and "holds results of an earlier run" in again.stderr


@pytest.mark.slow
def test_ended_early_it_still_makes_the_table_and_leaves_nothing_running(tmp_path):
    running = start(tmp_path, "probe")
    for line in running.stdout:
        if "probe starts" in line:
            break
    time.sleep(1)
    started = psutil.Process(running.pid).children(recursive=True)
    assert any("gpu_probe.py" in " ".join(process.cmdline()) for process in started)
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 143, output
    assert not psutil.wait_procs(started, timeout=10)[1]
    assert "# " in (tmp_path / "out" / "table.md").read_text() and results(tmp_path)["header"]["rehearsal"]


@pytest.mark.slow
def test_without_the_real_model_its_stage_is_left_out_by_name(tmp_path):
    elsewhere = tmp_path / "checkout"  # where no data lie beside the script
    elsewhere.mkdir()
    (elsewhere / "benchmarks").symlink_to(REPO / "benchmarks")
    running = start(tmp_path, "smollm2", script=elsewhere / "benchmarks" / "on_gpu.sh", GSM8K_DIR="")
    output, _ = running.communicate(timeout=120)
    assert running.returncode == 0, output
    assert "| smollm2 | left out |  | GSM8K: not there; model: not there |" in output


def pack_wheel(name, folder):
    """An installed package of pure Python as a wheel again."""
    distribution = importlib.metadata.distribution(name)
    with zipfile.ZipFile(folder / f"{name}-{distribution.version}-py3-none-any.whl", "w") as wheel:
        for file in distribution.files:
            if file.suffix != ".pyc" and ".." not in file.parts:
                wheel.write(distribution.locate_file(file), str(file))


@pytest.mark.slow
def test_a_python_without_datasets_takes_it_from_wheels(tmp_path):
    checkout, hidden = tmp_path / "checkout", tmp_path / "hidden/datasets"
    for name in ("benchmarks", "tools", "train_llm.py"):
        checkout.mkdir(exist_ok=True)
        (checkout / name).symlink_to(REPO / name)
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('as if it were not installed')\n")
    options = {"script": checkout / "benchmarks/on_gpu.sh", "PYTHONPATH": str(hidden.parent)}
    (tmp_path / "none").mkdir()
    running = start(tmp_path / "none", "1B", **options)
    output, _ = running.communicate(timeout=120)
    assert running.returncode == 2 and "has no datasets, on_gpu_data no wheels of it" in output
    assert not list((tmp_path / "none/work").iterdir())
    (checkout / "on_gpu_data").mkdir()
    for name in ("datasets", "dill", "multiprocess"):
        pack_wheel(name, checkout / "on_gpu_data")
    running = start(tmp_path, "1B", **options)
    output, _ = running.communicate(timeout=600)
    assert running.returncode == 0, output
    assert results(tmp_path)["1B"]["status"] == "ok"


def test_an_unknown_stage_is_refused(tmp_path):
    running = start(tmp_path, "1B", "2B")
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 2 and "no stage is called 2B" in output
    assert not (tmp_path / "out").exists()


def test_shares_of_the_measured_peak(tmp_path):
    """1B: 7.5e9 FLOPs a token at 60,000 tokens/s are 450 TFLOP/s, 60 % of 750."""
    import gpu_table
    speed = {"status": "ok", "s": 1, "notes": [], "peak_gib": 40.0, "step_s": 0.5, "first_step_s": 20.0,
             "first_loss": 10.0, "last_loss": 9.0, "steps": 25}
    rows = [
        {"stage": "probe", "check": "matmul 8192 bf16", "value": 750.0, "unit": "TFLOP/s"},
        {"stage": "probe", "check": "matmul 4096 bf16", "value": 600.0, "unit": "TFLOP/s"},
        {"stage": "inputs", "made": "1B", "s": 1, "flops_per_token": 7.5e9},
        {"stage": "1B", "tokens_per_s": 60000.0, "mfu": 0.455, **speed},
        {"stage": "sft", "tokens_per_s": 40000.0, **speed},
        {"stage": "sft-unmasked", "tokens_per_s": 46000.0, **speed},
        {"stage": "smoke", "tokens_per_s": 1.0, **speed},
        {"stage": "3B", "status": "failed", "s": 3, "exit": 1, "notes": [], "end": ["a", "out of memory"]},
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert gpu_table.write(tmp_path) is False  # a stage failed
    table = (tmp_path / "table.md").read_text()
    assert "| 1B | 60,000 | 45.5% | 60.0% | 40.0 | 0.500 | 20.0 |" in table
    assert "| sft | 40,000 |  |  | 40.0 |" in table and "takes 1.150 times as long" in table
    assert "| smoke |" not in table.partition("## Training")[2]  # the tests ran beside it
    assert "| 3B | failed | 3 | out of memory |" in table


def test_figures_are_medians_after_the_first_third(tmp_path):
    import gpu_table
    rows = [{"step": step, "time/step_s": seconds, "train/loss": 5.0 - step, "perf/peak_mem_gib": step,
             "perf/tokens_per_s_per_gpu": 100 / seconds} for step, seconds in
            ((1, 30.0), (2, 1.0), (3, 4.0), (4, 2.0), (5, 5.0), (6, 4.0))]
    lines = [json.dumps(row) for row in [*rows, {"step": 6, "eval/loss": 0.25}]]
    lines += ['{"step": 7, "tra']  # a kill cut this one off
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    found = gpu_table.figures(tmp_path)
    assert found["step_s"] == 4.0 and found["tokens_per_s"] == 25.0 and found["steps"] == 6
    assert found["first_step_s"] == 30.0 and found["peak_gib"] == 6 and found["eval_loss"] == 0.25
    assert gpu_table.figures(tmp_path / "nowhere") == {}


def test_what_the_tests_and_a_resume_say():
    import gpu_table
    log = ("[gw1] [ 20%] FAILED tests/test_gpu.py::test_b[x] \n"
           "FAILED tests/test_gpu.py::test_b[x] - AssertionError\n"
           "====== 1 failed, 13 passed, 2 skipped in 90.12s (0:01:30) ======\n")
    assert gpu_table.notes(log) == ["1 failed, 13 passed, 2 skipped in 90.12s (0:01:30)",
                                    "test_gpu.py::test_b[x]"]


def test_the_profile_counts_time_in_which_nothing_runs():
    """Two streams: [0, 40) and [20, 60), then nothing until [80, 100): 20 of 100 us idle."""
    from gpu_profile import describe
    events = [("nvjet_tst_128x256", 0, 40, "kernel"), ("triton_poi_fused_silu", 20, 40, "kernel"),
              ("Memcpy DtoD", 80, 20, "gpu_memcpy"), ("aten::mm", 0, 1000, "cpu_op")]
    trace = {"traceEvents": [{"ph": "X", "name": name, "ts": ts, "dur": dur, "cat": cat}
                             for name, ts, dur, cat in events] + [{"ph": "M", "name": "process_name"}]}
    lines = describe(trace, steps=1).splitlines()
    assert lines[0] == "1 steps, 0.1 ms a step, 3 kernels and copies a step; idle 20.0%"
    assert [line.split() for line in lines[3:6]] == [
        ["40.0%", "0.04", "matmul"], ["40.0%", "0.04", "fused", "by", "Inductor"],
        ["20.0%", "0.02", "copies"]]
    assert "aten::mm" not in "\n".join(lines)
