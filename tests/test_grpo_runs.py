"""Runs of train_gsm8k_fsdp2.py: local rollouts on 1, 2 and 3 processes, with the real command.

The policy answers with any digit (grpo_models.py), so that groups of answers earn different rewards.
"""

import contextlib
import fcntl
import functools
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import quick_runs
import torch
import train_gsm8k_fsdp2 as script
import yaml
from grpo_models import flags, make_policy, make_questions
from helpers import (
    REPO, TORCHRUN_VARIABLES, documented_metrics, read_checkpoint, read_metrics, run_script,
)
from quick_runs import quick_ranks, quick_run
from safetensors.torch import load_file

SCRIPT = "train_gsm8k_fsdp2.py"
error_line = functools.partial(quick_runs.error_line, script=SCRIPT)
STEPS, STOP = 6, 3
slow = pytest.mark.slow


# ----------------------------------------------------------------------------------------------------
# 1. Runs, and what is compared of them


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The untrained policy, its questions, and such that have two sums, or no number that it ever says."""
    folder = tmp_path_factory.mktemp("grpo")
    torch.set_num_threads(1)
    make_policy(folder / "policy")
    make_questions(folder / "questions")
    make_questions(folder / "two_sums", sums=(3, 7))
    make_questions(folder / "impossible", num_train=10, sums=(123456,))
    return folder


def train(place, run, nproc=1, *more, code=0):
    """Run the script in `place`/`run`; rank 0's CompletedProcess."""
    args = flags(place, run, nproc, "--checkpoint-interval", STOP, "--keep-checkpoints", 0, *more)
    if nproc == 1:
        return quick_run(args, code=code, script=SCRIPT)
    return quick_ranks(args, nproc, code=code, script=SCRIPT)[0]


@pytest.fixture(scope="module")
def straight(place):
    """The run that others are compared with: two processes, no stop, all kinds of evaluation."""
    result = train(place, "straight", 2, *EVALUATED)
    (place / "straight.out").write_text(result.stdout)
    return place / "straight"


def test_a_run_that_never_had_anything_to_learn_from(place):
    """No answer is ever right: no value stands for what was not measured, and the end says so."""
    out = train(place, "nothing", 1, "--dataset", place / "impossible", "--train-steps", 2, "--no-export",
                "--format-reward", 0).stdout
    for row in read_metrics(place / "nothing"):
        assert row["rollout/groups"] == 0
        assert not {"train/loss", "train/entropy", "train/grad_norm"} & set(row)
    assert out.count("nothing to train on") == 2 and out.count("nothing was learnt: in no step") == 1
    assert "--- first question\n" in out and "--- a right answer: none yet\n--- a wrong answer\n" in out


@pytest.fixture(scope="module")
def alone(place):
    """The same on one process."""
    train(place, "alone", 1, "--no-export")
    return place / "alone"


EVALUATED = ["--eval-limit", 16, "--eval-first", "--eval-every", 3]


def steps_of(run_dir):
    """{step: row}; of a step that stands there twice, the later one."""
    return {row["step"]: row for row in read_metrics(run_dir) if "rollout/groups" in row}


def evaluations_of(run_dir):
    return {row["step"]: row for row in read_metrics(run_dir) if "eval/accuracy" in row}


def is_measured(key):
    """Seconds and bytes are new in each run."""
    return key.startswith(("time/", "perf/")) or key == "eval/time_s"


def log_rows(run_dir, rank):
    log = run_dir / script.ROLLOUT_LOG.format(rank=rank)
    return [json.loads(line) for line in log.read_text().splitlines()]


def rollouts_of(run_dir):
    """{step: groups}; of a step that was done again the later one."""
    found = {}
    for path in run_dir.glob(script.ROLLOUT_LOG.format(rank="*")):
        for row in log_rows(run_dir, re.search(r"rank(\d+)", path.name)[1]):
            step = row.pop("step")
            found.setdefault(step, {})[row["position"]] = script.Group(**row)
    for groups in found.values():
        for group in groups.values():
            group.completions = [script.Completion(**completion) for completion in group.completions]
    return {step: [group for _, group in sorted(groups.items())] for step, groups in found.items()}


def groups_of(run_dir):
    return [group for _, groups in sorted(rollouts_of(run_dir).items()) for group in groups]


def saved(run_dir, step=STEPS):
    return read_checkpoint(run_dir / "checkpoints" / f"step_{step:06d}")


def updates_made(run_dir, step):
    """As the optimizer has counted them, for each parameter."""
    return {float(tensor) for name, tensor in saved(run_dir, step).items() if name.endswith(".step")}


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


def assert_same_rows(found, expected, prefix=""):
    """To the last bit, but for what is measured."""
    assert found.keys() == expected.keys()
    for step, row in expected.items():
        for key, value in row.items():
            if key.startswith(prefix) and not is_measured(key):
                assert found[step][key] == value, (step, key)


def assert_same_run(run_dir, expected, last=STEPS):
    assert_same_rows(steps_of(run_dir), steps_of(expected))
    assert_same_rows(evaluations_of(run_dir), evaluations_of(expected))
    assert rollouts_of(run_dir) == rollouts_of(expected)
    assert_same_tensors(saved(run_dir, last), saved(expected, last))
    last_progress = f"checkpoints/step_{last:06d}/progress.json"
    assert (run_dir / last_progress).read_text() == (expected / last_progress).read_text()


def assert_close_run(run_dir, expected, first=1):
    """The same up to rounding, as on another number of processes."""
    assert [(g.position, g.question, [c.ids for c in g.completions]) for g in groups_of(run_dir)] == [
        (g.position, g.question, [c.ids for c in g.completions]) for g in groups_of(expected)]
    rows, others = steps_of(run_dir), steps_of(expected)
    assert max(rows) == max(others)
    for step in range(first, max(others) + 1):
        for key in (key for key in others[step] if not is_measured(key)):
            # Percentiles of the ratio are read from bins of 0.1 %.
            rel = 2e-3 if "ratio" in key else 1e-5
            assert rows[step][key] == pytest.approx(others[step][key], rel=rel, abs=1e-6), (step, key)
    found, wanted = saved(run_dir, max(others)), saved(expected, max(others))
    for name in (name for name in wanted if name.startswith("model.")):
        # A bias of the keys has no effect on attention: its gradient is rounding, which Adam makes large.
        if not name.endswith("k_proj.bias"):
            assert (found[name] - wanted[name]).norm() < 1e-5 * wanted[name].norm(), name


def stopped_copy(run_dir, copy, step=STOP):
    """What a run leaves behind that was killed after the checkpoint of `step`, in the middle of step + 2."""
    shutil.copytree(run_dir / "checkpoints" / f"step_{step:06d}", copy / "checkpoints" / f"step_{step:06d}")
    for log in run_dir.glob("*.jsonl"):
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        kept = [row for row in rows if row["step"] <= step + ("rollouts" in log.name) + 1]
        (copy / log.name).write_text("".join(json.dumps(row) + "\n" for row in kept))
    (copy / "checkpoints" / f"step_{step + 3:06d}.partial").mkdir()
    return copy


# ----------------------------------------------------------------------------------------------------
# 2. The record, the model, the evaluation: one run


def test_record(straight):
    """Documented metrics and no others; the run folder; a config that means the same again."""
    rows = read_metrics(straight)
    assert set().union(*rows) == documented_metrics(SCRIPT)
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for row in rows
               for value in row.values())
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    assert sorted(evaluations_of(straight)) == [0, 3, 6]
    assert {path.name for path in straight.iterdir()} == {
        "config.yaml", "command.txt", SCRIPT, "env.json", "metrics.jsonl", "summary.json", "checkpoints",
        "hf", "lock", *(script.ROLLOUT_LOG.format(rank=rank) for rank in (0, 1))}
    assert json.loads((straight / "env.json").read_text())["world_size"] == 2
    summary, steps = json.loads((straight / "summary.json").read_text()), steps_of(straight)
    evaluation = evaluations_of(straight)
    assert summary["step"] == STEPS and summary["samples"] == 8 * STEPS
    assert summary["train/loss"] == steps[STEPS]["train/loss"]
    assert summary["eval/accuracy"] == evaluation[STEPS]["eval/accuracy"]
    assert summary["best_accuracy"] == max(row["eval/accuracy"] for row in evaluation.values())
    args = script.parse_args(["--config", str(straight / "config.yaml")])
    given = {key: value for key, value in vars(args).items() if value is not None}
    assert given == yaml.safe_load((straight / "config.yaml").read_text())
    assert given["system_prompt"] == "" and given["eval_first"] is True and given["clip_high"] == 0.2


def test_metrics_are_those_of_the_log(straight):
    """Recomputed from the rollouts that the run logged."""
    rollouts, steps, tokens = rollouts_of(straight), steps_of(straight), 0
    assert sorted(rollouts) == sorted(steps) == list(range(1, STEPS + 1))
    for step, groups in rollouts.items():
        row, completions = steps[step], [c for group in groups for c in group.completions]
        right = [correct for group in groups for correct in group.correct]
        lengths = torch.tensor([len(c.ids) for c in completions], dtype=torch.float64)
        is_right = torch.tensor(right)
        trained = [group for group in groups if len(set(group.rewards)) > 1]
        tokens += sum(len(c.ids) for group in trained for c in group.completions)
        expected = {
            "samples": 8 * step, "rollout/accuracy": sum(right) / 64,
            "rollout/reward_mean": sum(sum(group.rewards) for group in groups) / 64,
            "rollout/zero_variance_frac": 1 - len(trained) / 8, "rollout/groups": len(trained),
            "rollout/length_mean": float(lengths.mean()), "rollout/version_lag": 0,
            "rollout/length_right": float(lengths[is_right].mean()),
            "rollout/length_wrong": float(lengths[~is_right].mean()),
            "rollout/truncated_frac": sum(c.finish == "length" for c in completions) / 64,
            "train/tokens": tokens, "train/skipped_updates": 0, "train/lr": 1e-3, "train/clip_frac": 0,
            "train/ref_kl": 0, "train/mismatch_kl": 0, "sync/probe_error": 0,
        }
        assert {key: row[key] for key in expected} == pytest.approx(expected, abs=1e-9)
        assert 0 < len(trained) < 8 and row["train/grad_norm"] > 0
        assert 0 < row["train/entropy"] < math.log(105)
        assert all(group.version == step - 1 for group in groups)


def test_exported_model_answers_as_the_evaluation_says(place, straight):
    """transformers reloads it, generates greedily, and is judged by itself; its weights are the last ones."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(straight / "hf")
    tokenizer = AutoTokenizer.from_pretrained(straight / "hf")
    tensors = {name.removeprefix("model."): tensor for name, tensor in saved(straight).items()
               if name.startswith("model.")}
    assert_same_tensors(dict(model.named_parameters()), tensors)
    before = load_file(place / "policy/model.safetensors")
    assert any(not torch.equal(before[name], tensor) for name, tensor in tensors.items())
    assert 0 <= answers_right(model, tokenizer, place / "questions/test.jsonl") / 16 == evaluations_of(
        straight)[STEPS]["eval/accuracy"]
    for row in evaluations_of(straight).values():
        assert row["eval/questions"] == 16 and row["eval/accuracy_low"] <= row["eval/accuracy"]
        assert row["eval/accuracy"] <= row["eval/accuracy_high"]


def answers_right(model, tokenizer, path):
    """Of the file's questions, each asked by itself."""
    right = 0
    for row in map(json.loads, path.read_text().splitlines()):
        asked = tokenizer(f"Question: {row['question']}\nAnswer:", return_tensors="pt")
        ids = model.generate(**asked, do_sample=False, max_new_tokens=12, pad_token_id=tokenizer.pad_token_id)
        text = tokenizer.decode(ids[0, asked["input_ids"].shape[1]:], skip_special_tokens=True)
        gold = script.parse_number(script.final_answer(row["answer"]))
        right += script.reward(text, gold, True, 0.0)[1]
    return right


@slow
def test_tied_embeddings_and_a_chat_template(place):
    """They are one tensor in checkpoint and export, also after a resume; the export has the template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_policy(place / "tied", tied=True)
    (place / "chat.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
                                      "{% if add_generation_prompt %}[answer] {% endif %}")
    more = ["--model", place / "tied", "--chat-template", place / "chat.jinja",
            "--system-prompt", "Be brief."]
    train(place, "chat", 2, *more)
    run = stopped_copy(place / "chat", place / "chat_resumed")
    train(place, "chat_resumed", 2, *more)
    assert_same_run(run, place / "chat")
    exported = load_file(run / "hf/model.safetensors")
    assert "lm_head.weight" not in exported
    assert_same_tensors(exported, {name.removeprefix("model."): tensor for name, tensor in saved(run).items()
                                   if name.startswith("model.")})
    model, tokenizer = (auto.from_pretrained(run / "hf") for auto in (AutoModelForCausalLM, AutoTokenizer))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.chat_template == (place / "chat.jinja").read_text()
    questions = [json.loads(line)["question"] for line in (place / "questions/train.jsonl").open()]
    for group in groups_of(run):
        assert tokenizer.decode(group.prompt_ids) == (
            f"[system] Be brief.\n[user] {questions[group.question]}\n[answer] ")


# ----------------------------------------------------------------------------------------------------
# 3. Stopped and resumed


def test_resumed_is_the_same_run(place, straight):
    run = stopped_copy(straight, place / "resumed")
    result = train(place, "resumed", 2, *EVALUATED)
    assert f"resumed    {run / 'checkpoints/step_000003'}: step 3, 24 samples seen" in result.stdout
    assert_same_run(run, straight)
    assert not list((run / "checkpoints").glob("*.partial"))
    # A second time: finished, and nothing is written again.
    before = (run / "metrics.jsonl").read_text()
    assert "this run is finished" in train(place, "resumed", 2, *EVALUATED).stdout
    assert (run / "metrics.jsonl").read_text() == before


@slow
def test_from_one_process_to_two_and_back(place, alone, straight):
    """The same questions, the same training up to rounding; and straight runs on one and two are the same."""
    assert_close_run(alone, straight)
    run = stopped_copy(alone, place / "to_two")
    train(place, "to_two", 2, "--no-export")
    assert_close_run(run, alone)
    run = stopped_copy(straight, place / "to_one")
    train(place, "to_one", 1, "--no-export")
    assert_close_run(run, alone)


def launch(place, run, *more):
    """The real command, which starts two processes by itself."""
    env = {key: value for key, value in os.environ.items() if key not in TORCHRUN_VARIABLES}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    args = flags(place, run, 2, "--nproc", 2, *more)
    with open(place / f"{run}.log", "a") as log:
        return subprocess.Popen([sys.executable, str(REPO / SCRIPT), *map(str, args)], env=env, stdout=log,
                                stderr=log, start_new_session=True)


def wait_for_step(run_dir, ended, step):
    """Until a row of `step` or a later one stands there; an error if `ended()` says something before."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        path = run_dir / "metrics.jsonl"
        whole_lines = path.read_text().split("\n")[:-1] if path.exists() else []
        if any(json.loads(line)["step"] >= step for line in whole_lines):
            return
        assert ended() is None, f"ended ({ended()}) before step {step}"
        time.sleep(0.02)
    raise AssertionError(f"step {step} has not come")


@slow
def test_killed_stopped_and_resumed(place):
    """SIGKILL of all at once, SIGTERM to the launcher, then a STOP file: the straight run, bit for bit."""
    more = ["--train-steps", 60, "--checkpoint-interval", 2, "--no-export"]
    run, processes = place / "stops", []
    try:
        processes.append(launch(place, "stops", *more))
        wait_for_step(run, processes[-1].poll, 5)
        os.killpg(processes[-1].pid, signal.SIGKILL)
        processes[-1].wait()
        assert script.checkpoints_in(run / "checkpoints")
        processes.append(launch(place, "stops", *more))
        wait_for_step(run, processes[-1].poll, 12)
        processes[-1].terminate()
        assert processes[-1].wait(120) == 128 + signal.SIGTERM
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    text = (place / "stops.log").read_text()
    assert text.count("resumed    ") == 1 and "stopped (SIGTERM)" in text and "Exit code 143" in text
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(train, place, "stops", 2, *more, code=script.STOPS["STOP file"])
        wait_for_step(run, lambda: ended.exception() if ended.done() else None, max(steps_of(run)) + 3)
        (run / "STOP").touch()
        assert "stopped (STOP file)" in ended.result().stdout
    assert train(place, "stops", 2, *more, code=1).stderr.count("exists: remove it to train") == 1
    (run / "STOP").unlink()
    assert max(steps_of(run)) < 60
    train(place, "stops", 2, *more)
    train(place, "unstopped", 2, *more)
    assert_same_run(run, place / "unstopped", last=60)


@slow
def test_killed_after_the_last_checkpoint(place, straight):
    """The evaluation and the export are made up for, and nothing is trained."""
    run = shutil.copytree(straight, place / "unexported")
    shutil.rmtree(run / "hf")
    rows = [row for row in read_metrics(run) if not ("eval/accuracy" in row and row["step"] == STEPS)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(place, "unexported", 2, *EVALUATED)
    assert_same_run(run, straight)
    assert len(read_metrics(run)) == len(read_metrics(straight))
    assert_same_tensors(*(load_file(path / "hf/model.safetensors") for path in (run, straight)))


@slow
@pytest.mark.parametrize("more", [
    ["--hsdp-shard-size", 1], ["--micro-batch-tokens", 100, "--reduce-every-micro-batch"],
    ["--cpu-offload", "--activation-checkpointing", "none", "--no-reshard-after-forward"],
], ids=["replicas", "micro_batches", "offload"])
def test_other_ways_of_sharding(place, alone, more):
    run = more[0].strip("-")
    train(place, run, 2, "--no-export", *more)
    assert_close_run(place / run, alone)


# ----------------------------------------------------------------------------------------------------
# 4. The global order


@slow
def test_every_question_once_an_epoch(place):
    """10 questions, 6 a step over all processes, three epochs."""
    asked = {}
    for nproc in (1, 2, 3):
        run = f"order_{nproc}"
        train(place, run, nproc, "--limit", 10, "--batch-size", 6 // nproc, "--group-size", 2,
              "--train-steps", 5, "--no-export", "--max-lr", 0)
        logs = [log_rows(place / run, rank) for rank in range(nproc)]
        positions = [{row["position"] for row in rows} for rows in logs]
        assert all(len(found) == 30 // nproc for found in positions)
        assert set().union(*positions) == set(range(30))
        asked[nproc] = {row["position"]: row["question"] for rows in logs for row in rows}
        for epoch in range(3):
            assert sorted(asked[nproc][10 * epoch + i] for i in range(10)) == list(range(10))
        assert [row["samples"] for row in steps_of(place / run).values()] == [6, 12, 18, 24, 30]
    assert asked[1] == asked[2] == asked[3]
    orders = [[asked[1][10 * epoch + i] for i in range(10)] for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]
    assert all(asked[1][p] == script.sample_at(p, 10, seed=3) for p in range(30))
    assert (place / "order_1/metrics.jsonl").exists() and not (place / "order_1/hf").exists()


# ----------------------------------------------------------------------------------------------------
# 5. What is trained on


@slow
def test_groups_without_variance(place):
    few = ["--group-size", 4, "--no-export", "--train-steps", 3, "--zero-variance"]
    train(place, "drop", 1, *few, "drop")
    train(place, "keep", 1, *few, "keep")
    drop, keep = steps_of(place / "drop"), steps_of(place / "keep")
    assert [row["rollout/groups"] for row in keep.values()] == [8, 8, 8]
    for step, groups in rollouts_of(place / "drop").items():
        assert drop[step]["rollout/groups"] == sum(len(set(group.rewards)) > 1 for group in groups)
    # The same answers in the first step: what is left out is left out of the denominator, too.
    assert drop[1]["rollout/accuracy"] == keep[1]["rollout/accuracy"]
    share = drop[1]["rollout/groups"] / 8
    assert 0 < share < 1
    assert keep[1]["train/grad_norm"] == pytest.approx(share * drop[1]["train/grad_norm"], rel=1e-4)


def test_steps_without_variance_change_nothing(place):
    """No update, also not by momentum, and no error after ten of them."""
    train(place, "none", 2, "--dataset", place / "impossible", "--group-size", 2, "--train-steps", 12,
          "--max-new-tokens", 4, "--weight-decay", 0.1)
    rows, before = steps_of(place / "none"), load_file(place / "policy/model.safetensors")
    assert [row["train/skipped_updates"] for row in rows.values()] == list(range(1, 13))
    assert {row["train/tokens"] for row in rows.values()} == {0}
    assert not [row for row in rows.values() if {"train/loss", "train/grad_norm"} & set(row)]
    assert {row["rollout/groups"] for row in rows.values()} == {0}
    assert_same_tensors(load_file(place / "none/hf/model.safetensors"), before)
    assert updates_made(place / "none", 12) == {0}


@slow
def test_some_steps_without_variance(place):
    """One question a step: where its answers earn the same, weights and optimizer are those before."""
    train(place, "some", 1, "--batch-size", 1, "--group-size", 4, "--train-steps", 8, "--no-export",
          "--checkpoint-interval", 1, "--dataset", place / "two_sums", "--seed", 5)
    rows, skipped = steps_of(place / "some"), 0
    for step in range(2, 9):
        names = {name for name in saved(place / "some", step) if not name.startswith("random.")}
        before, after = saved(place / "some", step - 1), saved(place / "some", step)
        is_same = all(torch.equal(before[name], after[name]) for name in names)
        assert is_same == (rows[step]["rollout/groups"] == 0)
        assert rows[step]["train/skipped_updates"] - rows[step - 1]["train/skipped_updates"] == is_same
        skipped += is_same
    assert 0 < skipped < 7


@slow
def test_truncated_answers(place):
    """With --mask-truncated nothing is learnt from them, though they count in their group's mean."""
    common = ["--max-new-tokens", 5, "--train-steps", 1, "--no-export", "--zero-variance", "keep"]
    train(place, "masked", 1, *common, "--mask-truncated")
    train(place, "unmasked", 1, *common)
    assert rollouts_of(place / "masked") == rollouts_of(place / "unmasked")
    [row], [other] = steps_of(place / "masked").values(), steps_of(place / "unmasked").values()
    completions = [c for group in groups_of(place / "masked") for c in group.completions]
    assert 0 < row["rollout/truncated_frac"] == sum(c.finish == "length" for c in completions) / 64
    assert row["train/tokens"] == sum(len(c.ids) for c in completions if c.finish == "stop")
    assert other["train/tokens"] == sum(len(c.ids) for c in completions)
    assert row["train/grad_norm"] != other["train/grad_norm"]


@slow
def test_several_updates_and_the_reference(place):
    more = ["--updates-per-batch", 2, "--kl-coef", 0.1, "--no-export", "--train-steps", 4, "--clip-low", 0.05,
            "--clip-high", 0.05]
    for nproc in (1, 2):
        train(place, f"twice_{nproc}", nproc, *more)
    assert_close_run(place / "twice_2", place / "twice_1")
    rows = steps_of(place / "twice_2")
    assert all(row["train/ref_kl"] > 0 and row["train/mismatch_kl"] < 1e-9 for row in rows.values())
    assert any(row["train/clip_frac"] > 0 for row in rows.values())
    assert rows[4]["train/ref_kl"] > rows[1]["train/ref_kl"]
    assert all(row["train/ratio_p01"] < row["train/ratio_p99"] for row in rows.values())
    assert all(row["time/logprob_s"] > 0 for row in rows.values())
    assert updates_made(place / "twice_2", 4) == {8}
    # Resumed: the reference is still the first model, not the one that the checkpoint holds.
    run = stopped_copy(place / "twice_2", place / "twice_resumed")
    train(place, "twice_resumed", 2, *more)
    assert_same_run(run, place / "twice_2", last=4)


@slow
def test_reward_for_the_form(place):
    from transformers import AutoTokenizer

    train(place, "form", 1, "--format-reward", 0.25, "--train-steps", 2, "--no-export")
    tokenizer = AutoTokenizer.from_pretrained(place / "policy")
    in_form = []
    for group in groups_of(place / "form"):
        for completion, value, correct in zip(group.completions, group.rewards, group.correct):
            text = tokenizer.decode(completion.ids, skip_special_tokens=True)
            in_form.append(completion.finish == "stop" and bool(
                re.fullmatch(r"[^#]*####[^#\n]*[^#\s][^#\n]*\s*", text)))
            assert value == correct + 0.25 * in_form[-1], text
    assert 0.5 < sum(in_form) / len(in_form) < 1
    for row in steps_of(place / "form").values():
        assert row["rollout/accuracy"] < row["rollout/reward_mean"] <= row["rollout/accuracy"] + 0.25


# ----------------------------------------------------------------------------------------------------
# 6. It learns


@slow
@pytest.mark.parametrize("loss", script.CLIP)
def test_it_learns(place, loss):
    """Two sums out of all digits, a tenth right at first; 40 steps from the same policy."""
    run = place / f"learn_{loss}"
    train(place, run.name, 1, "--dataset", place / "two_sums", "--loss", loss, "--train-steps", 40,
          "--no-export")
    accuracy = [row["rollout/accuracy"] for row in steps_of(run).values()]
    assert sum(accuracy[:3]) / 3 < 0.2
    assert sum(accuracy[-5:]) / 5 > sum(accuracy[:3]) / 3 + 0.2, accuracy


# ----------------------------------------------------------------------------------------------------
# 7. Evaluation


@slow
def test_evaluation_is_the_same_on_any_number_of_processes(place):
    """13 questions of a file of its own, in uneven parts; the untrained policy's answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines = (place / "two_sums/train.jsonl").read_text().splitlines(keepends=True)
    (place / "held_out.jsonl").write_text("".join(lines[:13]))
    found = {}
    for nproc in (1, 2, 3):
        run = f"evaluated_{nproc}"
        train(place, run, nproc, "--batch-size", 1, "--train-steps", 1, "--max-lr", 0, "--no-export",
              "--eval-first", "--eval-split", place / "held_out.jsonl", "--eval-limit", 30,
              "--rollout-batch", 1 + 7 * nproc)
        rows = evaluations_of(place / run)
        assert sorted(rows) == [0, 1]
        found[nproc] = {key: value for key, value in rows[0].items() if key not in ("step", "eval/time_s")}
        assert found[nproc] == {key: rows[1][key] for key in found[nproc]}
    assert found[1] == found[2] == found[3] and found[1]["eval/questions"] == 13
    policy = [auto.from_pretrained(place / "policy") for auto in (AutoModelForCausalLM, AutoTokenizer)]
    assert answers_right(*policy, place / "held_out.jsonl") / 13 == found[1]["eval/accuracy"]


@slow
def test_evaluation_can_be_left_out_or_cut(place):
    train(place, "unevaluated", 1, "--train-steps", 1, "--no-export", "--eval-every", 1, "--eval-first")
    assert not evaluations_of(place / "unevaluated")
    assert json.loads((place / "unevaluated/summary.json").read_text())["best_accuracy"] is None
    train(place, "cut", 1, "--train-steps", 2, "--no-export", "--eval-limit", 5)
    assert {step: row["eval/questions"] for step, row in evaluations_of(place / "cut").items()} == {2: 5}
    # An evaluation changes nothing of the training.
    assert_same_rows({1: steps_of(place / "cut")[1]}, steps_of(place / "unevaluated"))


# ----------------------------------------------------------------------------------------------------
# 8. Bad input

BAD_FLAGS = {
    "--batch-size 0": "--batch-size must be at least 1, not 0",
    "--updates-per-batch 0": "--updates-per-batch must be at least 1, not 0",
    "--max-new-tokens -1": "--max-new-tokens must be at least 1, not -1",
    "--vllm-timeout nan": "--vllm-timeout must be at least 1, not nan",
    "--limit 0": "--limit must be at least 1, not 0",
    "--kl-coef -1": "--kl-coef must be at least 0, not -1.0",
    "--tis-cap nan": "--tis-cap must be at least 0, not nan",
    "--eval-limit -1": "--eval-limit must be at least 0, not -1",
    "--min-lr 1": "--min-lr 1.0 is above --max-lr 1e-06: lower --min-lr as well",
    "--group-size 1": "--group-size must be at least 2, not 1: a group is compared with itself",
    "--temperature 0": "--temperature must be above 0, not 0.0: what does not differ teaches nothing",
    "--temperature nan": "--temperature must be above 0, not nan: what does not differ teaches nothing",
    "--async-depth 1": "--async-depth 1 needs --rollouts vllm: these processes cannot generate and train at "
                       "once",
    "--warmup-steps 51": "--warmup-steps 51 is more than --train-steps 50",
    "--model ./nowhere": "--model ./nowhere: no such file or folder",
    "--dataset ./rows.jsonl": "--dataset ./rows.jsonl: no such file or folder",
    "--chat-template no.jinja": "--chat-template no.jinja: no such file",
    "--resume run/step": "--resume run/step: not a checkpoint (a folder such as RUN/checkpoints/step_001000)",
    "--gpu-ranks 0-3": "--gpu-ranks 0-3: expected numbers with commas, such as 0,2,3",
    "--loss ppo": "argument --loss: invalid choice: 'ppo'",
    "--async-depth 2": "argument --async-depth: invalid choice: 2",
    "--train-step 3": "unrecognized arguments: --train-step 3",
}


@pytest.mark.parametrize("line", BAD_FLAGS)
def test_bad_flags(capsys, tmp_path, monkeypatch, line):
    """One line, exit code 2, the same from a config file."""
    monkeypatch.chdir(tmp_path)
    flag, value = line.split()
    (tmp_path / "config.yaml").write_text(f"{flag[2:]}: '{value}'\n")
    for argv in ([flag, value], ["--config", "config.yaml"]):
        with pytest.raises(SystemExit) as ended:
            script.parse_args(argv)
        message, pointer = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and pointer == f"{SCRIPT}: --help lists all flags"
        assert message.replace(f"{flag}={value}", line).startswith(f"{SCRIPT}: error: {BAD_FLAGS[line]}")


def test_several_problems_are_reported_together(capsys):
    with pytest.raises(SystemExit):
        script.parse_args("--group-size 1 --temperature -1 --async-depth 1 --batch-size 0".split())
    assert len(capsys.readouterr().err.splitlines()) == 5


def test_clip_and_end_of_the_learning_rate_follow_other_flags():
    for loss, clip in script.CLIP.items():
        args = script.parse_args(["--loss", loss, "--max-lr", "1e-5"])
        assert (args.clip_low, args.clip_high) == clip and args.min_lr == 1e-5
    args = script.parse_args(["--loss", "gspo", "--clip-low", "0", "--min-lr", "0"])
    assert args.clip_low == args.min_lr == 0 and args.clip_high == 4e-4


def refused(place, *more):
    """The message of what is found before any process group exists."""
    args = script.parse_args(list(map(str, flags(place, "refused", 1, *more))))
    with pytest.raises(script.UserError) as raised:
        script.fetch(args.model)
        tokenizer = script.load_tokenizer(args)
        script.load_questions(args, tokenizer, args.dataset_split, args.limit, print)
        script.load_questions(args, tokenizer, args.eval_split, args.eval_limit, print)
        script.end_tokens(tokenizer, script.fetch(args.model))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_questions_and_models_that_do_not_do(place, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question": "1+1?", "answer": "two"}\n')
    assert refused(place, "--dataset", tmp_path).startswith(
        f"{tmp_path}/train.jsonl:1: no number to compare with")
    assert refused(place, "--dataset", tmp_path, "--dataset-split", "none").startswith(
        f"--dataset {tmp_path} holds no questions of 'none'")
    assert refused(place, "--max-prompt-tokens", 5) == "--max-prompt-tokens 5 leaves no question of 'train'"
    assert refused(place, "--eval-limit", 4, "--eval-split", tmp_path / "no.jsonl").startswith(
        f"{tmp_path / 'no.jsonl'}: FileNotFoundError")
    assert refused(place, "--eval-limit", 4, "--dataset", place / "questions/train.jsonl").startswith(
        f"--dataset {place / 'questions/train.jsonl'} is one file without a split 'test'")
    assert "no such folder" in refused(place, "--model", "nobody/nothing-at-all")
    (tmp_path / "empty").mkdir()
    assert refused(place, "--model", tmp_path / "empty").startswith(
        f"no usable tokenizer in {tmp_path / 'empty'}")
    endless = shutil.copytree(place / "policy", tmp_path / "endless")
    for name in ("tokenizer_config.json", "generation_config.json"):
        found = json.loads((endless / name).read_text())
        (endless / name).write_text(json.dumps({k: v for k, v in found.items() if not k.startswith("eos")}))
    if script.load_tokenizer(script.parse_args(["--model", str(endless)])).eos_token_id is None:
        assert refused(place, "--model", endless).startswith(f"{endless}: no end-of-text token")


@slow
def test_errors_of_real_runs(place, alone, tmp_path):
    """One line from one process of two, the right exit code, and no run folder that looks like a run."""
    result = run_script(flags(place, "bad", 2, "--nproc", 2, "--hsdp-shard-size", 3), check=False,
                        script=SCRIPT)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.count("--hsdp-shard-size 3 does not divide the 2 processes") == 1
    empty = tmp_path / "empty"
    shutil.copytree(place / "policy", empty, ignore=lambda *_: ["model.safetensors"])
    message = error_line(train(place, "bad", 1, "--model", empty, code=1))
    assert str(empty) in message
    message = error_line(train(place, "bad", 1, "--dataset", place / "questions/train.jsonl", "--limit", 4,
                               "--eval-limit", 1, code=1))
    assert "is one file without a split 'test'" in message
    shutil.copytree(alone / "checkpoints", place / "other/checkpoints")
    make_policy(tmp_path / "small", tied=True)
    other = ["--model", tmp_path / "small", "--train-steps", 7]
    message = error_line(train(place, "other", 1, *other, code=1))
    assert "is of another run (model " in message and "train_steps" not in message
    newest = place / "other/checkpoints/step_000006"
    message = error_line(train(place, "other", 1, *other, "--resume", newest, code=1))
    assert "is a checkpoint of another model: " in message
    assert not (place / "bad/checkpoints").exists() and not (place / "bad/metrics.jsonl").exists()


# ----------------------------------------------------------------------------------------------------
# 9. The console


@slow
def test_loggers_and_levels(place):
    """--logger decides how a step is shown, --log-level how much is said."""
    from transformers import AutoTokenizer

    short = ["--train-steps", 2, "--group-size", 2, "--no-export", "--eval-limit", 2]
    said = {}
    for name, more in {"print": [], "none": ["--logger", "none"], "quiet": ["--log-level", "WARNING"],
                       "debug": ["--log-level", "DEBUG"], "rich": ["--logger", "rich"]}.items():
        result = train(place, f"say_{name}", 1, *short, *more)
        assert not result.stderr, result.stderr
        said[name] = result.stdout
    assert len(re.findall(r"^step +[12]/2 ", said["print"], re.M)) == 2
    assert said["print"].count("held-out accuracy") == 1 and "questions  64 of 'train'" in said["print"]
    assert not re.search(r"^step +\d+/2 ", said["none"], re.M) and not said["quiet"]
    [group] = [group for group in rollouts_of(place / "say_debug")[1] if group.position == 0]
    tokenizer = AutoTokenizer.from_pretrained(place / "policy")
    assert f"--- first question\n{tokenizer.decode(group.prompt_ids)}" in said["debug"]
    assert (said["print"].count("--- a right answer"), said["debug"].count("--- a right answer")) == (1, 2)
    assert not re.search(r"^step +\d+/2 ", said["rich"], re.M)
    assert_same_rows(steps_of(place / "say_rich"), steps_of(place / "say_quiet"))


@slow
def test_rich_panel(place):
    """On a terminal it is drawn anew each step."""
    pytest.importorskip("rich")
    args = list(map(str, flags(place, "panel", 1, "--train-steps", 2, "--no-export", "--logger", "rich")))
    shown = on_terminal([str(REPO / SCRIPT), *args])
    assert all(text in shown for text in ("step 1 of 2", "step 2 of 2", "reward_mean", "time"))
    assert shown.index("step 1 of 2") < shown.index("step 2 of 2") and not re.search(r"step +\d+/2 ", shown)


def test_rich_panel_without_the_package(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(SystemExit):
        script.parse_args(["--logger", "rich"])
    assert "--logger rich needs the rich package: python -m pip install rich" in capsys.readouterr().err


def on_terminal(command):
    """All that a Python command shows on a terminal of 40 lines of 110 columns; it must end with 0."""
    ours, its = os.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 110, 0, 0))
    env = {key: value for key, value in os.environ.items() if key not in TORCHRUN_VARIABLES}
    process = subprocess.Popen([sys.executable, *command], stdin=its, stdout=its, stderr=its,
                               env=env | {"OMP_NUM_THREADS": "1", "TERM": "xterm"}, start_new_session=True)
    os.close(its)
    shown = b""
    with open(ours, "rb", buffering=0) as terminal, contextlib.suppress(OSError):  # EIO: closed by its end
        while piece := terminal.read(1 << 16):
            shown += piece
    assert process.wait(60) == 0, shown
    return shown.decode()
