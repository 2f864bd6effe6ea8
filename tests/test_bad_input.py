"""What a user gets wrong, and what goes wrong around a run: one clear line, an exit code, nothing lost."""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import train_llm
import yaml
from helpers import (
    REPO, TORCHRUN_VARIABLES, documented_metrics, make_hf_model, make_tokenizer, mounted, read_checkpoint,
    read_metrics, run_script, write_gsm8k_like,
)
from quick_runs import error_line, free_port, quick_ranks, quick_run

SCRIPTS = sorted(path.name for path in REPO.glob("*.py"))
SCRATCH = ["--from-scratch", "--model-size", "test", "--tokenizer", "a/b", "--dataset", "a/b"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tokenizer, a data set, a Hugging Face model and a cache."""
    folder = tmp_path_factory.mktemp("bad_input")
    make_tokenizer(folder / "tokenizer")
    write_gsm8k_like(folder / "rows.jsonl", 30)
    make_hf_model("llama", folder / "llama")
    return folder


def flags_for(place, run_dir, *more, model=None):
    source = ["--hf-model", model] if model else [*SCRATCH, "--tokenizer", place / "tokenizer"]
    return [str(token) for token in (
        *source, "--dataset", place / "rows.jsonl", "--data-cache", place / "cache", "--seq-len", 64,
        "--text-column", "answer", "--batch-size", 2, "--max-steps", 2, "--max-lr", 1e-3, "--min-lr", 1e-4,
        "--log-interval", 1,
        "--checkpoint-dir", run_dir, "--no-export", "--device", "cpu", *more)]


def usage_errors(args, **options):
    """The lines of a usage error: exit code 2, no traceback, no standard output, one pointer to --help."""
    result = quick_run(args, code=2, **options)
    *lines, pointer = result.stderr.splitlines()
    assert pointer == "train_llm.py: --help lists all flags" and not result.stdout
    assert all(line.startswith("train_llm.py: error: ") for line in lines), lines
    return [line.removeprefix("train_llm.py: error: ") for line in lines]


def config_file(tmp_path, text, name="config.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


# ----------------------------------------------------------------------------------------------------
# 1. Flags and configs

BAD_FLAGS = {  # flag and value, and what the message says of them
    ("max-stepz", "5"): "unrecognized arguments: --max-stepz=5",
    ("max-step", "5"): "unrecognized arguments: --max-step=5",  # an abbreviation is no flag
    ("max-steps", "many"): "argument --max-steps: invalid int value: 'many'",
    ("batch-size", "1.5"): "argument --batch-size: invalid int value: '1.5'",
    ("max-lr", "fast"): "argument --max-lr: invalid float value: 'fast'",
    ("model-size", "8B"): "argument --model-size: invalid choice: '8B'",
    ("batch-size", "0"): "--batch-size must be at least 1, not 0",
    ("grad-accum-steps", "-1"): "--grad-accum-steps must be at least 1, not -1",
    ("max-lr", "-1.0"): "--max-lr must be at least 0, not -1.0",
    ("max-lr", "nan"): "--max-lr must be at least 0, not nan",
    ("eval-fraction", "1.5"): "--eval-fraction must be at least 0 and below 1",
    ("gpu-ranks", "0-3"): "--gpu-ranks 0-3: expected numbers with commas, such as 0,2,3",
}


@pytest.mark.parametrize("flag, value", BAD_FLAGS, ids=map("=".join, BAD_FLAGS))
def test_same_message_from_either_source(tmp_path, flag, value):
    expected = BAD_FLAGS[flag, value]
    by_flag = usage_errors([*SCRATCH, f"--{flag}={value}"])
    assert by_flag[0].startswith(expected)
    for key in {flag, flag.replace("-", "_")}:
        path = config_file(tmp_path, f"from_scratch: true\ntokenizer: a/b\ndataset: a/b\n{key}: {value}\n")
        assert usage_errors(["--config", path]) == by_flag


def test_several_problems_are_reported_together():
    lines = usage_errors(["--batch-size", 0, "--seq-len", 0, "--eval-interval", 5, "--min-lr", 1,
                          "--dataset", "./nowhere.jsonl"])
    for part in ("--batch-size must be", "--seq-len must be",
                 "choose one: --hf-model NAME_OR_FOLDER or --from-scratch",
                 "--eval-interval and --keep-best need something held out",
                 "--min-lr 1.0 is above",
                 "--dataset ./nowhere.jsonl: no such file or folder"):
        assert sum(part in line for line in lines) == 1, (part, lines)
    assert len(lines) == 6


def test_files_that_are_missing(tmp_path):
    lines = usage_errors([*SCRATCH, "--dataset", "rows.jsonl", "--tokenizer", "./tok", "--chat-template",
                          "t.jinja", "--eval-split", "held.jsonl", "--resume", "run/checkpoints/step_000010"],
                          cwd=tmp_path)
    assert [line.split(":")[0] for line in lines] == [
        "--tokenizer ./tok", "--chat-template t.jinja", "--resume run/checkpoints/step_000010",
        "--dataset rows.jsonl", "--eval-split held.jsonl"]
    [line] = usage_errors(["--hf-model", "/no/such/model", "--dataset", "a/b"])
    assert line == "--hf-model /no/such/model: no such file or folder"
    assert usage_errors(["--hf-model", "a", *SCRATCH])[0].startswith("choose one")
    assert not list(tmp_path.iterdir())  # nothing was begun


BROKEN_CONFIGS = {
    "missing": (None, ": No such file or directory"),
    "list": ("- a\n- b\n", ": expected lines of the form 'flag-name: value'"),
    "empty": ("", ": expected lines of the form 'flag-name: value'"),
    "syntax": ("a: [1\n", " is neither YAML nor JSON: "),
    "nested": ("optimizer:\n  max_lr: 1\n", ": optimizer must be one value, not a dict"),
    "unknown": ("from_scratch: true\nmodel_sise: test\n", "unrecognized arguments: --model-sise=test"),
    "switch": ("from_scratch: maybe\n",
               "argument --from-scratch/--no-from-scratch: ignored explicit argument 'maybe'"),
}


@pytest.mark.parametrize("kind", BROKEN_CONFIGS)
def test_broken_configs(tmp_path, kind):
    text, expected = BROKEN_CONFIGS[kind]
    path = tmp_path / "none.yaml" if text is None else config_file(tmp_path, text)
    [line] = usage_errors(["--config", path])
    assert expected in line and "\n" not in line


def test_config_that_is_no_text(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes("dataset: café\n".encode("latin-1"))  # as some editors save it
    [line] = usage_errors(["--config", path])
    assert line.startswith(f"--config {path}")


def test_config_values_and_precedence(tmp_path):
    text = ("from-scratch: true\ntokenizer: a/b\ndataset: a/b\nmax_lr: 3e-3\nmin_lr: 1e-5\n"
            "packing: false\nbatch-size: 7\n"
            "dataset_config: null\n")
    for path in (config_file(tmp_path, text),
                 config_file(tmp_path, json.dumps(yaml.safe_load(text) | {"max_lr": 3e-3}), "config.json")):
        args = train_llm.parse_args(["--config", str(path), "--seq-len", "96"])
        assert (args.max_lr, args.min_lr, args.packing, args.from_scratch) == (3e-3, 1e-5, False, True)
        assert (args.batch_size, args.seq_len, args.max_steps, args.dataset_config) == (7, 96, None, None)
        for order in (["--config", str(path), "--batch-size", "2", "--packing"],
                      ["--batch-size", "2", "--packing", "--config", str(path)]):
            args = train_llm.parse_args(order)
            assert (args.batch_size, args.packing, args.max_lr, args.grad_accum_steps) == (2, True, 3e-3, 1)
    assert train_llm.parse_args(SCRATCH).batch_size == 4  # the default, under the file


# ----------------------------------------------------------------------------------------------------
# 2. Sizes that do not fit

def test_sizes_that_do_not_fit(place, tmp_path):
    def failed(*more, **options):
        message = error_line(quick_run(flags_for(place, tmp_path / "run", *more, **options), code=1))
        assert not (tmp_path / "run").exists()
        return message

    model = place / "llama"
    assert failed("--seq-len", 512, model=model) == (
        f"--seq-len 512: {model} knows 256 positions; use --seq-len 256")
    assert failed("--vocab-size", 100) == "--vocab-size 100: the tokenizer has 512 tokens"
    flags = flags_for(place, tmp_path / "run", "--warmup-steps", 3)
    assert usage_errors(flags) == ["--warmup-steps 3 is more than the run's 2 steps"]
    larger = make_tokenizer(tmp_path / "larger", vocab_size=600)
    assert failed("--tokenizer", larger, model=model) == (
        f"{model} embeds 512 tokens, the data hold token 562: use its own tokenizer")


def test_a_batch_larger_than_the_data_goes_round_again(place, tmp_path):
    quick_run(flags_for(place, tmp_path / "run", "--batch-size", 70, "--max-steps", 1))
    [row] = read_metrics(tmp_path / "run")
    assert row["samples"] == 70 and math.isfinite(row["train/loss"])


def test_models_that_cannot_be_loaded(place, tmp_path):
    (tmp_path / "empty").mkdir()
    flags = flags_for(place, tmp_path / "run", model=tmp_path / "empty")
    assert "no usable tokenizer" in error_line(quick_run(flags, code=1))
    tokenizer_only = make_tokenizer(tmp_path / "tokenizer_only")
    message = error_line(quick_run(flags_for(place, tmp_path / "run", model=tokenizer_only), code=1))
    assert message.startswith(f"--hf-model {tokenizer_only}: ")


# ----------------------------------------------------------------------------------------------------
# 3. Folders and disks

def test_folders_that_cannot_be_written(place, tmp_path):
    file = tmp_path / "a_file"
    file.write_text("")
    assert usage_errors(flags_for(place, file / "run")) == [
        f"--checkpoint-dir {file / 'run'}: cannot write to {file}; choose another folder"]
    flags = flags_for(place, tmp_path / "run", "--data-cache", file / "cache")
    assert "Not a directory" in error_line(quick_run(flags, code=1)) and not (tmp_path / "run").exists()
    assert "/proc/run" in error_line(quick_run(flags_for(place, "/proc/run"), code=1))


def test_read_only_folder(place, tmp_path):
    with mounted(tmp_path / "disk", "ro") as disk:
        assert usage_errors(flags_for(place, disk / "run")) == [
            f"--checkpoint-dir {disk / 'run'}: cannot write to {disk}; choose another folder"]


@pytest.mark.parametrize("mode", ["async", "sync", "two_ranks"])
def test_full_disk(place, tmp_path, mode):
    """A checkpoint here is 2 MB: two fit. Training goes on without the others and fails when its last step
    cannot be saved either; on a larger disk it goes on from the second."""
    def start(args, code):
        return quick_ranks(args, 2, code=code) if mode == "two_ranks" else [quick_run(args, code=code)]

    with mounted(tmp_path / "disk", "size=5m") as disk:
        flags = flags_for(place, disk / "run", "--max-steps", 6, "--checkpoint-interval", 1,
                          "--async-checkpoint" if mode == "async" else "--no-async-checkpoint")
        result = start(flags, code=1)[0]
        kept = train_llm.checkpoints_in(disk / "run/checkpoints")
        assert [path.name for path in kept] == ["step_000001", "step_000002"]
        assert "Traceback" not in result.stderr
        *said, last = [line for line in result.stderr.splitlines() if line]
        said = [line for line in said if not line.startswith(f"{disk}/run/metrics.jsonl cannot be written")]
        assert [line.split(" (")[0] for line in said] == [
            f"step {step} could not be saved" for step in (3, 4, 5, 6)]
        assert all("; 0 MiB are free)" in line and f"checkpoint is {kept[-1]}" in line for line in said)
        assert last.startswith("train_llm.py: error: could not save step 6 (")
        assert "): make room, then start the same command again" in last
        assert last.endswith(f"goes on from {kept[-1]}")
        for path in kept:
            assert all(torch.isfinite(tensor).all() for tensor in read_checkpoint(path).values())
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        result = start(flags, code=0)[0]
        assert f"resumed    {kept[-1]}: step 2" in result.stdout
        assert train_llm.checkpoints_in(disk / "run/checkpoints")[-1].name == "step_000006"
        assert not list((disk / "run/checkpoints").glob("*.partial"))


def test_disk_full_before_training(place, tmp_path):
    """While tokenising, and while the run's first files are written."""
    with mounted(tmp_path / "disk", "size=40k") as disk:
        (disk / "fill").write_bytes(bytes(24 << 10))
        message = error_line(quick_run(flags_for(place, tmp_path / "run", "--data-cache", disk / "cache"),
                                       code=1))
        assert "No space left on device" in message
        message = error_line(quick_run(flags_for(place, disk / "run"), code=1))
        assert "No space left on device" in message


# ----------------------------------------------------------------------------------------------------
# 4. Processes and devices

def test_gpu_ranks_against_the_environment(place, tmp_path):
    flags = flags_for(place, tmp_path / "run", "--device", "auto", "--gpu-ranks", "0,1")
    assert usage_errors(flags, env={"CUDA_VISIBLE_DEVICES": "2"}) == [
        "--gpu-ranks 0,1 and CUDA_VISIBLE_DEVICES=2 disagree: unset one of them"]
    [line] = usage_errors(flags_for(place, tmp_path / "run", "--device", "auto", "--gpu-ranks", "93"))
    assert line == "--gpu-ranks 93: only 0 of these GPUs exist here"


def test_cuda_where_there_is_none(place, tmp_path):
    [line] = usage_errors(flags_for(place, tmp_path / "run", "--device", "cuda"),
                          env={"CUDA_VISIBLE_DEVICES": ""})
    assert line.startswith("--device cuda: torch sees no GPU here; use --device cpu")


@pytest.mark.slow
def test_nproc_reports_once(place, tmp_path):
    """Started plainly with --nproc 2: what all processes find wrong is said once."""
    flags = flags_for(place, tmp_path / "run", "--nproc", 2)
    result = run_script([*flags, "--hsdp-shard-size", 3], check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.count("--hsdp-shard-size 3 does not divide the 2 processes") == 1
    result = run_script([*flags, "--text-column", "nothing"], check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.count("no text in column 'nothing'") == 1 and result.stderr.count("error") == 1


def test_nproc_relaunch_trains(place, tmp_path):
    run_script(flags_for(place, tmp_path / "run", "--nproc", 2))
    assert json.loads((tmp_path / "run/env.json").read_text())["world_size"] == 2
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2]


def test_a_model_larger_than_the_memory_is_refused_at_once(place, tmp_path):
    flags = flags_for(place, tmp_path / "run", "--model-size", "70B", "--no-export")
    assert re.search(r"69.5B parameters, gradients and AdamW states take 1035 GiB a process, \d+ are free: ",
                     error_line(quick_run(flags, code=1)))


def test_srun_without_the_launcher_is_refused(place, tmp_path):
    """Each of its processes would train alone. One task of a step is a run of its own."""
    env = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}
    result = quick_run(flags_for(place, tmp_path / "run"), code=2, env=env)
    assert "use launch_slurm.sh" in result.stderr and not (tmp_path / "run").exists()
    quick_run(flags_for(place, tmp_path / "alone"), env=env | {"SLURM_STEP_NUM_TASKS": "1"})
    assert json.loads((tmp_path / "alone/env.json").read_text())["world_size"] == 1


def test_accelerate_launch(place, tmp_path):
    if not importlib.util.find_spec("accelerate"):
        pytest.skip("accelerate is not installed")
    env = {key: value for key, value in os.environ.items() if key not in TORCHRUN_VARIABLES}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--main_process_port", str(free_port()),
               str(REPO / "train_llm.py")]
    subprocess.run([*command, *flags_for(place, tmp_path / "run")], check=True, env=env, timeout=200)
    assert json.loads((tmp_path / "run/env.json").read_text())["world_size"] == 2


# ----------------------------------------------------------------------------------------------------
# 5. A script by itself

@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_quick(script, tmp_path):
    """It explains the flags from a copy in an empty folder, and imports of the large packages torch only."""
    shutil.copy(REPO / script, tmp_path)
    program = (f"import json, runpy, sys; sys.argv = ['{script}', '--help']\n"
               "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
               "except SystemExit as end: print(json.dumps([end.code, sorted(sys.modules)]))")
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, text=True, capture_output=True,
                            check=True)
    *text, last = result.stdout.splitlines()
    code, modules = json.loads(last)
    assert code == 0 and text[0].startswith(f"usage: {script}") and "--checkpoint-dir" in result.stdout
    assert not result.stderr and max(map(len, text)) <= 110
    late = {"transformers", "datasets", "tokenizers", "torch.distributed.fsdp",
            "torch.distributed.checkpoint",
            "torch.distributed.run", "yaml"}  # not tqdm: torch itself imports it
    assert "torch" in modules and not late & set(modules)


def test_the_script_alone_trains(place, tmp_path):
    """Copied by itself into an empty folder, with a text beside it, and with hardly a flag."""
    shutil.copy(REPO / "train_llm.py", tmp_path)
    (tmp_path / "my text.txt").write_text("A small model learns one word after another.\n" * 200)
    env = {key: value for key, value in os.environ.items() if key not in (*TORCHRUN_VARIABLES, "PYTHONPATH")}
    command = [sys.executable, "train_llm.py", *SCRATCH, "--tokenizer", str(place / "tokenizer"),
               "--dataset", "my text.txt", "--seq-len", "64", "--max-steps", "3", "--device", "cpu"]
    result = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True, timeout=200,
                            check=False)
    assert result.returncode == 0, result.stderr
    found = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert found == {"config.yaml", "command.txt", "train_llm.py", "env.json", "metrics.jsonl",
                     "summary.json",
                     "checkpoints", "hf", "lock"}
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {
        "train_llm.py", "my text.txt", "checkpoints", "data_cache"}
    assert "reloaded: logits within" in result.stdout
    # A second time: finished, which is said, and nothing is written again.
    before = (tmp_path / "checkpoints/metrics.jsonl").read_text()
    again = quick_run(command[2:], script=tmp_path / "train_llm.py", cwd=tmp_path)
    assert "this run is finished" in again.stdout
    assert (tmp_path / "checkpoints/metrics.jsonl").read_text() == before


# ----------------------------------------------------------------------------------------------------
# 6. The record, and steps that are not finite

def test_metrics_are_those_that_are_documented(place, tmp_path):
    quick_run(flags_for(place, tmp_path / "run", "--eval-fraction", 0.2, "--max-steps", 3, 
                        "--eval-interval", 1))
    rows = read_metrics(tmp_path / "run")
    on_a_gpu_only = {"perf/mfu"}
    assert set().union(*rows) == documented_metrics("train_llm.py") - on_a_gpu_only
    assert [row["step"] for row in rows] == [1, 1, 2, 2, 3, 3]
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for row in rows
               for value in row.values())
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["step"] == 3 and summary["eval/loss"] == rows[-1]["eval/loss"]
    assert summary["train/loss"] == rows[-2]["train/loss"]
    # The resolved configuration is a config again, and means the same.
    config = tmp_path / "run/config.yaml"
    saved = vars(train_llm.parse_args(["--config", str(config)]))
    assert saved["eval_fraction"] == 0.2 and saved["max_lr"] == 1e-3 and saved["export"] is False
    given = {key: value for key, value in saved.items() if value is not None}
    assert given == yaml.safe_load(config.read_text())
    quick_run(["--config", config, "--checkpoint-dir", tmp_path / "again"])
    again = read_metrics(tmp_path / "again")
    assert [row.get("train/loss") for row in again] == [row.get("train/loss") for row in rows]


def test_steps_that_are_not_finite_stop_the_run(place, tmp_path):
    """A learning rate that no model survives: after the first update no step is finite."""
    for world_size in (1, 2):
        run_dir = tmp_path / f"run_{world_size}"
        flags = flags_for(place, run_dir, "--max-lr", 1e11, "--min-lr", 1e11, "--warmup-steps", 0,
                          "--max-steps", 20, "--checkpoint-interval", 1, "--keep-checkpoints", 0,
                          "--max-bad-steps", 3, "--seed", 5, "--no-async-checkpoint")
        results = quick_ranks(flags, 2, code=1) if world_size == 2 else [quick_run(flags, code=1)]
        message = error_line(results[0])
        assert message.startswith("3 steps in a row had a gradient that is not finite")
        rows = read_metrics(run_dir)
        assert [row["train/skipped_steps"] for row in rows] == [0, 1, 2, 3]
        for step in (2, 3, 4):
            line = f"no update in step {step}: its gradient is not finite\n"
            assert "".join(result.stdout for result in results).count(line) == 1
        # Skipped is skipped: weights and optimizer states are those of the last good update, bit for bit.
        first, *later = train_llm.checkpoints_in(run_dir / "checkpoints")
        good = read_checkpoint(first)
        assert len(later) >= 2
        for path in later:
            found = read_checkpoint(path)
            for name, tensor in good.items():
                if not name.startswith("random."):
                    assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("world_size", [1, 2])
def test_one_bad_step_is_skipped_and_training_goes_on(place, tmp_path, world_size):
    """A model whose embedding of one token is infinite: the step that meets it is bad, no other."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    model = shutil.copytree(place / "llama", tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(model)
    [poison] = tokenizer("~", add_special_tokens=False)["input_ids"]
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][poison] = math.inf
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} pencils {'~' if i == 11 else ''} and more"}) + "\n"
                            for i in range(16)))
    run_dir = tmp_path / "run"
    flags = flags_for(place, run_dir, "--dataset", path, "--text-column", "text", "--no-packing",
                      "--batch-size", 4 // world_size,
                      "--max-steps", 4, "--log-interval", 4, "--max-bad-steps", 2, "--warmup-steps", 0,
                      model=model)
    result = quick_ranks(flags, world_size)[0]
    order = [train_llm.sample_at(p, 16, 0) for p in range(16)]
    bad_step = order.index(11) // 4 + 1
    [line] = [line for line in result.stdout.splitlines() if line.startswith("no update")]
    assert line == f"no update in step {bad_step}: its gradient is not finite"
    assert read_metrics(run_dir)[-1]["train/skipped_steps"] == 1
    saved = read_checkpoint(run_dir / "checkpoints/step_000004")
    steps = {float(tensor) for name, tensor in saved.items() if name.endswith(".step")}
    assert steps == {3.0}  # updates that were made
    rows = torch.isfinite(saved["model.model.embed_tokens.weight"]).all(dim=1)
    assert not rows[poison] and rows.sum() == len(rows) - 1
    assert all(torch.isfinite(tensor).all() for name, tensor in saved.items()
               if not name.endswith("model.embed_tokens.weight"))




@pytest.mark.parametrize("line, min_lr", [
    ("--hf-model meta-llama/Llama-2-7b-hf --batch-size 4 --grad-accum-steps 2 --max-lr 2e-5 --warmup-steps "
     "100 --max-steps 10000 --checkpoint-dir checkpoints/llama2 --mixed-precision", 2e-6),
    ("--hf-model mistralai/Mistral-7B-v0.1 --seq-len 4096 --batch-size 2 --grad-accum-steps 4", 2e-6),
    ("--from-scratch --tokenizer a/b --model-size 13B --vocab-size 32000 --max-lr 3e-4", 3e-5),
    ("--from-scratch --tokenizer a/b --max-lr 2e-5 --min-lr 1e-5", 1e-5),
])
def test_a_low_learning_rate_lowers_its_end_too(line, min_lr):
    assert train_llm.parse_args([*line.split(), "--dataset", "a/b"]).min_lr == pytest.approx(min_lr)
