"""train_gsm8k_fsdp2.py with a real vLLM server on the CPU: its weights follow the trainer's, whoever dies."""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import vllm_server as vllm
from grpo_models import flags, make_policy, make_questions
from helpers import REPO, read_checkpoint, read_metrics
from quick_runs import free_port, quick_ranks

pytestmark = pytest.mark.slow
SCRIPT = "train_gsm8k_fsdp2.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    vllm.vllm_python()
    folder = tmp_path_factory.mktemp("vllm")
    vllm.with_sampling_defaults(make_policy(folder / "policy"))
    make_questions(folder / "questions")
    vllm.with_sampling_defaults(make_policy(folder / "tied_policy", tied=True))
    vllm.randomise(folder / "policy", folder / "random")
    vllm.make_random_model(folder / "tied", "large", tied=True)
    vllm.make_random_model(folder / "parallel", "small", tied=True)
    return folder


@pytest.fixture(scope="module")
def servers(folder):
    """By name. Some are launched while others are tested: a start takes one core for half a minute."""
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
    print("seconds of a push", sorted(row["seconds"] for row in found["rows"])[pushes // 2])


# ----------------------------------------------------------------------------------------------------
# 1. Weights follow

def test_pushes_to_a_tied_model_without_growth(servers):
    server = vllm.ready(servers["tied"])
    found = push(server, 1, 25, mode=str(server.process.pid))
    check_rows(found, 25)
    for early, late in zip(found["rows"][9]["memory"], found["rows"][24]["memory"]):
        print("MB after 10 and 25 pushes", early, late)
        assert late - early < 100, (early, late)  # the model has 20 MB: 15 lost ones were 300


def test_three_processes_push_to_a_tied_model(servers):
    server = vllm.ready(servers["tied"])
    check_rows(push(server, 3, 20), 20)
    assert vllm.version(server) == [20]
    vllm.stop(server)
    vllm.launch(servers["parallel"])


def test_two_processes_push_to_an_untied_model(servers):
    server = vllm.ready(servers["untied"])
    check_rows(push(server, 2, 20), 20)
    assert vllm.version(server) == [20]


# ----------------------------------------------------------------------------------------------------
# 2. Whole runs

def run_flags(folder, server, run, nproc, *more):
    return flags(folder, run, nproc, "--rollouts", "vllm", "--vllm-port", server.port, "--train-steps", 4,
                 "--eval-limit", 16, "--vllm-timeout", 60, *more)


def rollouts(run_dir):
    """(its group's row, completion) of each."""
    groups = [json.loads(line) for path in sorted(run_dir.glob("fsdp2_gsm8k_rollouts.rank*.jsonl"))
              for line in path.read_text().splitlines()]
    return [(group, completion) for group in groups for completion in group["completions"]]


def true_logprobs(model_folder, rows):
    """transformers' logprobs of logged completions at temperature 0.7."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    for group, completion in rows:
        prompt, ids = group["prompt_ids"], completion["ids"]
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
        out = model.generate(ids, do_sample=False, max_new_tokens=12, repetition_penalty=1.0, pad_token_id=0,
                             top_k=None, top_p=None, temperature=None)
        text = tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True)
        gold = script.parse_number(script.final_answer(row["answer"]))
        right += script.reward(text, gold, True, 0.0)[1]
    return right / len(rows)


def test_on_policy_run(servers, folder):
    server = vllm.ready(servers["untied"])
    run_dir = folder / "on_policy"
    quick_ranks(run_flags(folder, server, "on_policy", 2, "--eval-first", "--temperature", 0.7), 2,
                timeout=300, script=SCRIPT)
    rows = read_metrics(run_dir)
    steps = [row for row in rows if "rollout/groups" in row]
    assert [row["rollout/version_lag"] for row in steps] == [0] * 4
    assert max(row["train/mismatch_kl"] for row in steps) < 1e-6
    assert max(row["sync/probe_error"] for row in steps) < 1e-4
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 4]
    assert rows[-1]["eval/accuracy"] == greedy_accuracy(run_dir / "hf", folder / "questions/test.jsonl")
    assert vllm.version(server) == [4]
    print("steps", [(row["time/step_s"], row["time/sync_s"], row["time/generate_s"]) for row in steps])
    logged = rollouts(run_dir)
    assert len(logged) == 4 * 8 * 8 and {group["version"] for group, _ in logged} == {0, 1, 2, 3}
    # What the server says it drew, and how likely it was, is what the model would say of these very ids.
    first = [(group, completion) for group, completion in logged if group["step"] == 1]
    for (_, completion), expected in zip(first, true_logprobs(folder / "policy", first)):
        assert completion["logprobs"] == pytest.approx(expected, abs=1e-4)


def test_asynchronous_run(servers, folder):
    server = vllm.ready(servers["untied"])
    quick_ranks(run_flags(folder, server, "async", 2, "--async-depth", 1, "--eval-every", 2), 2, timeout=300,
                script=SCRIPT)
    steps = [row for row in read_metrics(folder / "async") if "rollout/groups" in row]
    assert [row["rollout/version_lag"] for row in steps] == [0, 1, 1, 1]
    assert steps[0]["train/mismatch_kl"] < 1e-6 < steps[-1]["train/mismatch_kl"]
    assert {(group["step"], group["version"]) for group, _ in rollouts(folder / "async")} == {
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
    print(found["error"])  # of the worker's deadline or of the trainer's own, whichever comes first
    assert "goes on from the newest checkpoint" in found["error"] and "\n" not in found["error"]
    assert vllm.ask(server, vllm.PROMPTS[0], timeout=20)[0] == before[0]
    assert vllm.version(server) == [1]
    check_rows(push(server, 1, 2), 2)


def test_tensor_parallel_server(servers):
    """What one worker answers must not be lost when another one fails."""
    server = vllm.ready(servers["parallel"])
    for name in ("no dev mode", "no receiver"):
        vllm.launch(servers[name])
    check_rows(push(server, 2, 20), 20)
    assert vllm.version(server) == [20, 20]
    for mode, code in (("half", -signal.SIGKILL), ("silent", 0)):
        push(server, 1, 1, mode=mode, code=code)
        check_rows(push(server, 1, 3), 3)
        assert vllm.version(server) == [3, 3]
    vllm.stop(server)


# ----------------------------------------------------------------------------------------------------
# 4. Set-ups that cannot work

def error_of(results):
    """The one line that rank 0 ends with; where it waited for another rank, the one of that rank."""
    for result in results:
        assert "Traceback" not in result.stderr, result.stderr
        errors = [line for line in result.stderr.splitlines() if "error:" in line]
        assert len(errors) == 1 and errors[0].startswith(f"{SCRIPT}: error: "), result.stderr
        print(errors[0])
        if "another rank ended: its own last line says why" not in errors[0]:
            return errors[0]
    raise AssertionError("no rank says why")


def test_wrong_servers(servers, folder):
    for name, words in (("no dev mode", "VLLM_SERVER_DEV_MODE=1"), ("no receiver", "--worker-extension-cls")):
        server = vllm.ready(servers[name])
        args = run_flags(folder, server, "refused", 1)
        assert words in error_of(quick_ranks(args, 1, code=1, timeout=200, script=SCRIPT))
        vllm.stop(server)


def test_server_of_another_model(servers, folder):
    server = vllm.ready(servers["untied"])
    for model, words in (("tied_policy", "serves other weights"), ("tied", "hidden_size 64, not 256")):
        args = run_flags(folder, server, f"other_{model}", 1, "--model", folder / model)
        assert words in error_of(quick_ranks(args, 1, code=1, timeout=200, script=SCRIPT))
    check_rows(push(server, 1, 1), 1)  # the right one is still welcome


# ----------------------------------------------------------------------------------------------------
# 5. The server dies

def num_running(server):
    """Requests that the server is answering."""
    for line in vllm.call(server, "/metrics")[1].splitlines():
        if line.startswith("vllm:num_requests_running"):
            return float(line.split()[-1])
    return 0.0


def wait_for(condition, job, timeout=180):
    """Poll; fails when the job ends first."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert not job.done(), job.result()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def newest_step(run_dir):
    return max((int(path.name[5:]) for path in run_dir.glob("checkpoints/step_??????")), default=0)


def test_server_killed(servers, folder):
    """While it answers, and the second time while it has nothing to do."""
    server, run_dir = vllm.ready(servers["untied"]), folder / "killed"
    # Random weights seldom say the end token, so that most of a step's time is generation.
    args = run_flags(folder, server, "killed", 2, "--model", folder / "random", "--max-new-tokens", 180,
                     "--vllm-timeout", 8, "--train-steps", 40, "--checkpoint-interval", 1, "--eval-limit", 0,
                     "--zero-variance", "keep")
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(quick_ranks, args, 2, code=1, timeout=300, script=SCRIPT)
        wait_for(lambda: newest_step(run_dir) >= 2, job)
        wait_for(lambda: num_running(server) > 0, job)
        vllm.stop(server, signal.SIGKILL)
        killed = time.monotonic()
        error = error_of(job.result())
        print("ended after", time.monotonic() - killed)
        assert time.monotonic() - killed < 60  # 8 s and what a busy machine needs
        assert "vLLM at 127.0.0.1" in error and "goes on from the newest checkpoint" in error
        saved = newest_step(run_dir)
        assert read_metrics(run_dir)[-1]["step"] - saved in (0, 1)

        vllm.ready(server)
        job = pool.submit(quick_ranks, args, 2, code=1, timeout=300, script=SCRIPT)
        wait_for(lambda: newest_step(run_dir) > saved, job)
        wait_for(lambda: num_running(server) > 0, job)
        wait_for(lambda: num_running(server) == 0, job)
        vllm.stop(server, signal.SIGKILL)
        assert "vLLM at 127.0.0.1" in error_of(job.result())
    # The second start brought the checkpoint's weights to the server, which had those of its folder.
    resumed = [row for row in read_metrics(run_dir) if row["step"] == saved + 1][-1]
    assert resumed["sync/probe_error"] < 1e-4 and resumed["train/mismatch_kl"] < 1e-6
    assert {group["version"] for group, _ in rollouts(run_dir) if group["step"] == saved + 1} == {saved}
    assert len(read_checkpoint(run_dir / "checkpoints" / f"step_{newest_step(run_dir):06d}")) > 10


# ----------------------------------------------------------------------------------------------------
# 6. examples/run_gsm8k.sh

def run_gsm8k(args, **env):
    """The command and its environment, without the variables of other tests."""
    others = ("VLLM", "CUDA", "NPROC", "PYTHONPATH")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(others)}
    python = env.pop("VLLM_PYTHON", None) or vllm.vllm_python()
    port = str(free_port())
    return subprocess.Popen(
        ["bash", str(REPO / "examples/run_gsm8k.sh"), *map(str, args)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=clean | {"VLLM_PYTHON": python, "PYTHON": sys.executable, "VLLM_PORT": port, "NPROC": "1",
                     "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **env})


def example_flags(folder, run, *more):
    return flags(folder, run, 1, "--train-steps", 40, "--eval-limit", 4, *more)


@contextlib.contextmanager
def nothing_left_of(process):
    """Whatever it has started by the time the list is filled must be gone at the end."""
    import psutil

    family = []
    try:
        yield lambda: family.extend(psutil.Process(process.pid).children(recursive=True))
        assert not [member for member in family if member.is_running()]
    finally:
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_example_stopped_and_started_again(folder):
    run_dir, args = folder / "example", example_flags(folder, "example")
    process = run_gsm8k(args)
    with nothing_left_of(process) as note_family:
        deadline = time.monotonic() + 300
        while not (run_dir / "metrics.jsonl").is_file() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        note_family()
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 143, stdout + stderr
        assert "stopped (SIGTERM)" in stdout
    stopped_at = newest_step(run_dir)
    assert 0 < stopped_at < 40
    process = run_gsm8k(args)
    with nothing_left_of(process) as note_family:
        first = process.stderr.readline() + process.stderr.readline()
        assert "vLLM answers on port" in first, first
        note_family()
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stdout + stderr
    assert newest_step(run_dir) == 40 and (run_dir / "hf").is_dir() and (run_dir / "vllm.log").is_file()
    steps = [row["step"] for row in read_metrics(run_dir) if "rollout/groups" in row]
    assert steps == list(range(1, 41))


def test_example_with_a_training_that_fails(folder):
    """Which is also how raw logprobs, vLLM's default, are found out."""
    args = example_flags(folder, "raw", "--temperature", 0.7)
    process = run_gsm8k(args, VLLM_ARGS="--logprobs-mode raw_logprobs")
    with nothing_left_of(process) as note_family:
        assert "starting vLLM" in process.stderr.readline()
        note_family()
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 1, stdout + stderr
        assert "--logprobs-mode processed_logprobs" in stderr and "Traceback" not in stderr, stderr


def test_example_whose_server_does_not_start(folder):
    process = run_gsm8k(example_flags(folder, "no_server"), VLLM_ARGS="--no-such-flag")
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 1 and "vLLM did not start" in stderr and "--no-such-flag" in stderr, stderr


def test_example_says_what_is_wrong(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = [
            ([], {"VLLM_PORT": port}, 1, f"port {port} is taken"),
            (["--max-lr", "x"], {}, 2, "--max-lr"),
            ([], {"CUDA_VISIBLE_DEVICES": "3", "DRY_RUN": "1"}, 2, "no GPU is left"),
            ([], {"VLLM_PYTHON": sys.executable}, 2, "has no vLLM"),
        ]
        for more, env, code, words in cases:
            device = ["--device", "auto"] if "CUDA_VISIBLE_DEVICES" in env else []
            process = run_gsm8k(example_flags(folder, "wrong", *device, *more), **env)
            stdout, stderr = process.communicate(timeout=60)
            assert process.returncode == code and words in stderr and "Traceback" not in stderr, stderr


def test_example_shares_out_the_gpus():
    args = ["--model", "some/model", "--max-prompt-tokens", 100, "--max-new-tokens", 300]
    process = run_gsm8k(args, DRY_RUN="1", CUDA_VISIBLE_DEVICES="4,5,6,7", VLLM_GPUS="6,4", NPROC="",
                        VLLM_PYTHON=sys.executable, VLLM_ARGS="--max-num-seqs 7")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    serve, train = (shlex.split(line) for line in stdout.splitlines())
    assert {"CUDA_VISIBLE_DEVICES=6,4", "VLLM_SERVER_DEV_MODE=1", f"PYTHONPATH={REPO}"} <= set(serve)
    joined = " ".join(serve)
    for part in ("--model some/model", "--tensor-parallel-size 2", "--dtype bfloat16", "--max-model-len 400",
                 "--host 127.0.0.1", "--logprobs-mode processed_logprobs", "--max-num-seqs 7",
                 "--worker-extension-cls train_gsm8k_fsdp2.WeightReceiver"):
        assert part in joined
    assert "CUDA_VISIBLE_DEVICES=5,7" in train and train[-6:-4] == ["--rollouts", "vllm"]
