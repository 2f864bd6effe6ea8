"""train_gsm8k_fsdp2.py with a real vLLM server on the CPU: its weights follow the trainer's, whoever dies."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import vllm_server as vllm
from grpo_models import flags, make_policy, make_questions
from helpers import REPO, read_metrics
from quick_runs import free_port, quick_ranks, quick_runs

pytestmark = pytest.mark.slow
SCRIPT = "train_gsm8k_fsdp2.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    vllm.vllm_python()
    folder = tmp_path_factory.mktemp("vllm")
    vllm.with_sampling_defaults(make_policy(folder / "policy"))
    make_questions(folder / "questions")
    vllm.make_random_model(folder / "tied", "large", tied=True)
    vllm.make_random_model(folder / "parallel", "small", tied=True)
    return folder


@pytest.fixture(scope="module")
def servers(folder):
    """By name, all started and none waited for: two cores start several in little more time than one."""
    processed = ("--logprobs-mode", "processed_logprobs")
    receiver = ("--worker-extension-cls", "train_gsm8k_fsdp2.WeightReceiver")
    made = {
        "tied": vllm.VllmServer(folder / "tied", folder / "tied.log", (*processed, *receiver)),
        "untied": vllm.VllmServer(folder / "policy", folder / "untied.log", (*processed, *receiver)),
        "parallel": vllm.VllmServer(folder / "parallel", folder / "parallel.log",
                                    (*processed, *receiver, "--tensor-parallel-size", 2)),
        "no receiver": vllm.VllmServer(folder / "policy", folder / "no_receiver.log", processed),
        "no dev mode": vllm.VllmServer(folder / "policy", folder / "no_dev_mode.log", (*processed, *receiver),
                                       dev_mode=False),
    }
    try:
        for name in ("tied", "untied"):
            vllm.launch(made[name])
        yield made
    finally:
        for server in made.values():
            vllm.stop(server, signal.SIGKILL)


def push(server, nproc, pushes, mode="", code=0):
    """The rows and the error of tests/vllm_server.py's trainer."""
    result = server.log.parent / f"pushes_{time.monotonic_ns()}.json"
    quick_ranks([server.model, server.port, pushes, result, mode], nproc, code=code, timeout=300,
                script="tests/vllm_server.py")
    return json.loads(result.read_text()) if code == 0 else None


def check_rows(found, pushes):
    """Greedy output and logprobs were transformers' after each push."""
    assert "error" not in found and len(found["rows"]) == pushes
    assert max(row["error"] for row in found["rows"]) < 1e-4
    assert max(row["shortfall"] for row in found["rows"]) < 1e-4
    print("push: median", sorted(row["seconds"] for row in found["rows"])[pushes // 2], "s, largest difference",
          max(row["error"] for row in found["rows"]))


# ----------------------------------------------------------------------------------------------------
# 1. Weights follow

def test_fifty_pushes_to_a_tied_model_without_growth(servers):
    server = vllm.ready(servers["tied"])
    found = push(server, 1, 50, mode=str(server.process.pid))
    check_rows(found, 50)
    for early, late in zip(found["rows"][9]["memory"], found["rows"][49]["memory"]):
        print("memory after 10 and 50 pushes", early, late)
        assert late - early < 30, (early, late)


@pytest.mark.parametrize("name, nproc", [("tied", 3), ("untied", 2)])
def test_server_follows(servers, name, nproc):
    server = vllm.ready(servers[name])
    check_rows(push(server, nproc, 20), 20)
    assert vllm.version(server) == [20]


def test_tensor_parallel_server_follows(servers):
    server = vllm.ready(servers["parallel"])
    check_rows(push(server, 2, 20), 20)
    assert vllm.version(server) == [20, 20]
    for mode in ("half", "silent"):
        push(server, 1, 1, mode=mode, code=-signal.SIGKILL if mode == "half" else 0)
        check_rows(push(server, 1, 3), 3)
        assert vllm.version(server) == [3, 3]
    vllm.stop(server)


# ----------------------------------------------------------------------------------------------------
# 2. Whole runs

def run_flags(folder, server, run, nproc, *more):
    return flags(folder, run, nproc, "--rollouts", "vllm", "--vllm-port", server.port, "--train-steps", 4,
                 "--eval-limit", 16, "--vllm-timeout", 60, "--sync-timeout", 60, *more)


def rollouts(run_dir):
    return [json.loads(line) for path in sorted(run_dir.glob("fsdp2_gsm8k_rollouts.rank*.jsonl"))
            for line in path.read_text().splitlines()]


def true_logprobs(model_folder, rows):
    """transformers' logprobs of logged completions at temperature 0.7."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    for row in rows:
        prompt, ids = row["prompt_ids"], row["completion_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1] / 0.7
        yield torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()


def greedy_accuracy(model_folder, questions):
    """Of an exported model, by transformers alone."""
    import torch
    import train_gsm8k_fsdp2 as script
    import transformers
    from grpo_models import PROMPT

    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    right = 0
    for row in rows:
        ids = torch.tensor([tokenizer(PROMPT.format(question=row["question"]))["input_ids"]])
        out = model.generate(ids, do_sample=False, max_new_tokens=12, top_k=None, top_p=None, temperature=None,
                             repetition_penalty=1.0, pad_token_id=0)
        text = tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True)
        right += script.is_right(text, script.parse_number(script.final_answer(row["answer"])))
    return right / len(rows)


def test_on_policy_run(servers, folder):
    server = vllm.ready(servers["untied"])
    quick_ranks(run_flags(folder, server, "on_policy", 2, "--eval-first", "--temperature", 0.7), 2, timeout=300,
                script=SCRIPT)
    rows = read_metrics(folder / "on_policy")
    steps = [row for row in rows if "train/loss" in row]
    assert [row["rollout/version_lag"] for row in steps] == [0] * 4
    assert max(row["train/mismatch_kl"] for row in steps) < 1e-6
    assert max(row["sync/probe_error"] for row in steps) < 1e-4
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 4]
    assert rows[-1]["eval/accuracy"] == greedy_accuracy(folder / "on_policy/hf", folder / "questions/test.jsonl")
    assert vllm.version(server) == [4]
    print("steps", [(row["time/step_s"], row["time/sync_s"], row["time/generate_s"]) for row in steps])
    logged = rollouts(folder / "on_policy")
    assert len(logged) == 4 * 8 * 8 and {row["version"] for row in logged} == {0, 1, 2, 3}
    # What the server says it drew, and how likely it was, is what the model would say of these very ids.
    first = [row for row in logged if row["step"] == 1]
    for row, expected in zip(first, true_logprobs(folder / "policy", first)):
        assert row["logprobs"] == pytest.approx(expected, abs=1e-4)


def test_asynchronous_run(servers, folder):
    server = vllm.ready(servers["untied"])
    quick_ranks(run_flags(folder, server, "async", 2, "--async-depth", 1, "--eval-every", 2), 2, timeout=300,
                script=SCRIPT)
    steps = [row for row in read_metrics(folder / "async") if "train/loss" in row]
    assert [row["rollout/version_lag"] for row in steps] == [0, 1, 1, 1]
    assert steps[0]["train/mismatch_kl"] < 1e-6 < steps[-1]["train/mismatch_kl"]
    assert {(row["step"], row["version"]) for row in rollouts(folder / "async")} == {
        (1, 0), (2, 0), (3, 1), (4, 2)}


# ----------------------------------------------------------------------------------------------------
# 3. The trainer dies

@pytest.mark.parametrize("mode", ["half", "paused"])
def test_trainer_killed_in_a_push(servers, mode):
    server = vllm.ready(servers["untied"])
    push(server, 1, 1)
    before = [vllm.ask(server, prompt) for prompt in vllm.PROMPTS]
    push(server, 1, 1, mode=mode, code=-signal.SIGKILL)
    if mode == "paused":
        assert vllm.call(server, "/is_paused")[1] == {"is_paused": True}
    else:
        for prompt, (ids, logprobs) in zip(vllm.PROMPTS, before):
            now = vllm.ask(server, prompt, timeout=20)
            assert now[0] == ids and now[1] == pytest.approx(logprobs, abs=1e-6)
    assert vllm.version(server) == [1]
    check_rows(push(server, 1, 3), 3)


def test_trainer_falls_silent_in_a_push(servers):
    """As when its machine is gone: nobody closes the connection."""
    server = vllm.ready(servers["untied"])
    push(server, 1, 1)
    before = vllm.ask(server, vllm.PROMPTS[0])
    found = push(server, 1, 1, mode="silent")
    print(found["error"])
    assert "serves the weights that it had" in found["error"] and "\n" not in found["error"]
    assert vllm.ask(server, vllm.PROMPTS[0], timeout=20)[0] == before[0]
    assert vllm.version(server) == [1]
    check_rows(push(server, 1, 2), 2)
