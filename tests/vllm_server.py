"""A real vLLM server, models for it, and as a program a trainer that does nothing but push random weights.

    VLLM_PYTHON=FOLDER/bin/python    the Python of an environment that has vLLM; without it tests are skipped
    RANK=0 WORLD_SIZE=1 … python tests/vllm_server.py MODEL PORT PUSHES RESULT.json [MODE]     see `push`
"""

import contextlib
import dataclasses
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from helpers import REPO
from quick_runs import free_port

START_S = 300.0  # until a server must answer; 20 to 40 s on an idle machine
PROMPTS = ([5, 6, 7], [9] * 40, [30, 20, 10, 40, 50, 60, 70])  # the long one fills blocks of the prefix cache
SHAPES = {
    "small": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                  intermediate_size=128),
    "large": dict(hidden_size=256, num_hidden_layers=7, num_attention_heads=8, num_key_value_heads=4,
                  intermediate_size=640),
}
# What a request leaves out, vLLM takes from here, as it does with the files of instruct models.
DEFAULTS = {"do_sample": True, "top_k": 2, "top_p": 0.5, "temperature": 0.3, "repetition_penalty": 1.5}


# ----------------------------------------------------------------------------------------------------
# 1. Models

def make_random_model(folder, shape, tied):
    """Save a random Qwen2 in fp32 with a tokenizer to `folder`, which it returns. large: 20 MB."""
    from grpo_models import make_digit_tokenizer
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_digit_tokenizer(folder)
    model = Qwen2ForCausalLM(Qwen2Config(
        **SHAPES[shape], vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    set_random_weights(model, 0)
    model.save_pretrained(folder)
    return with_sampling_defaults(folder)


def randomise(source, folder):
    """A copy of a model with random weights."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(source, folder)
    model = AutoModelForCausalLM.from_pretrained(source)
    set_random_weights(model, 0)
    model.save_pretrained(folder)


def with_sampling_defaults(folder):
    path = Path(folder) / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | DEFAULTS))
    return Path(folder)


def set_random_weights(model, seed):
    """Weights from a seed, so far from zero that the likeliest token is clearly the likeliest."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    spread = 1.6 / model.config.hidden_size ** 0.5
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 1:
                param.uniform_(0.8, 1.2, generator=generator)
            else:
                param.normal_(0.0, spread, generator=generator)


# ----------------------------------------------------------------------------------------------------
# 2. Servers

@dataclasses.dataclass
class VllmServer:
    model: Path
    log: Path
    flags: tuple = ()
    dev_mode: bool = True
    port: int = dataclasses.field(default_factory=free_port)
    process: subprocess.Popen | None = None


def vllm_python():
    import pytest

    return os.environ.get("VLLM_PYTHON") or pytest.skip(
        "needs vLLM: bash tests/run.sh --all makes an environment for it, or VLLM_PYTHON names one")


def launch(server):
    """Start it, as examples/run_gsm8k.sh does, and do not wait; returns it."""
    command = [
        vllm_python(), "-m", "vllm.entrypoints.openai.api_server", "--model", server.model,
        "--host", "127.0.0.1", "--port", server.port, "--dtype", "float32", "--max-model-len", 256,
        "--max-num-seqs", 64, "--enforce-eager", "--kv-cache-memory-bytes", "64M", *server.flags]
    env = os.environ | {
        "VLLM_SERVER_DEV_MODE": str(int(server.dev_mode)), "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    with open(server.log, "ab") as log:
        server.process = subprocess.Popen(list(map(str, command)), env=env, stdin=subprocess.DEVNULL,
                                          stdout=log, stderr=log, start_new_session=True)
    return server


def ready(server):
    """Wait until it answers; returns it. Raises AssertionError with the end of its log."""
    if server.process is None:
        launch(server)
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.process.poll() is None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if call(server, "/health", timeout=5)[0] == 200:
                return server
        time.sleep(0.2)
    raise AssertionError(f"vLLM did not start\n{server.log.read_text()[-5000:]}")


def stop(server, how=signal.SIGTERM):
    """End it with all its processes."""
    if server.process is None:
        return
    with contextlib.suppress(ProcessLookupError):
        if how == signal.SIGKILL:
            os.killpg(server.process.pid, how)
        else:
            server.process.send_signal(how)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()
    server.process = None


def call(server, path, body=None, timeout=60):
    """(status, JSON or text) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout)
    try:
        data = None if body is None else json.dumps(body)
        headers = {"Content-Type": "application/json"}
        connection.request("GET" if body is None else "POST", path, data, headers)
        response = connection.getresponse()
        text = response.read().decode()
    finally:
        connection.close()
    try:
        return response.status, json.loads(text)
    except ValueError:
        return response.status, text


def ask(server, prompt, timeout=60):
    """(ids, logprobs) of a greedy continuation by 12 tokens."""
    status, answer = call(server, "/v1/completions", {
        "model": str(server.model), "prompt": list(prompt), "max_tokens": 12, "temperature": 0, "logprobs": 0,
        "repetition_penalty": 1, "ignore_eos": True, "return_token_ids": True}, timeout)
    assert status == 200, answer
    return answer["choices"][0]["token_ids"], answer["choices"][0]["logprobs"]["token_logprobs"]


def version(server):
    """Of the weights, on each worker."""
    status, answer = call(server, "/collective_rpc", {"method": "call_weights", "args": ["weights_version"]})
    assert status == 200, answer
    return [worker["version"] for worker in answer["results"]]


def resident_mb(pid):
    """Memory of a process and all its children."""
    import psutil

    process = psutil.Process(pid)
    return sum(p.memory_info().rss for p in [process, *process.children(recursive=True)]) / 1e6


# ----------------------------------------------------------------------------------------------------
# 3. A trainer that does nothing but push

def agreement(script, server, twin):
    """The largest difference between the server's logprobs and transformers', drawn at temperature 0.7 and
    greedily, and by how much a greedy token falls short of transformers' likeliest one."""
    import torch

    error = shortfall = 0.0
    jobs = []
    for prompt in PROMPTS:
        for temperature, n in ((0.0, 1), (0.7, 2)):
            sampling = script.Sampling(temperature, 12, [0])
            job = server.pool.submit(script.complete, server, prompt, n, sampling)
            jobs.append((prompt, temperature, job))
    for prompt, temperature, job in jobs:
        for found in job.result():
            with torch.no_grad():
                logits = twin(torch.tensor([prompt + found.ids])).logits[0, len(prompt) - 1:-1]
            logprobs = torch.log_softmax(logits / (temperature or 1.0), -1)
            mine = logprobs.gather(1, torch.tensor(found.ids)[:, None])[:, 0]
            error = max(error, float((mine - torch.tensor(found.logprobs)).abs().max()))
            if temperature == 0:
                shortfall = max(shortfall, float((logprobs.max(-1).values - mine).max()))
    return error, shortfall


def die_in(script, mode):
    """Make the script's own push end this process: half way through the stream, or with the server paused; or
    fall silent half way."""
    broadcast, rpc = script.broadcast, script.rpc

    def send_first_tensor(group, tensor, timeout_s, call):
        broadcast(group, tensor, timeout_s, call)
        if mode == "silent":
            time.sleep(3 * timeout_s)
            return
        os.kill(os.getpid(), signal.SIGKILL)

    def never_swap(server, method, *args, **options):
        if method == "swap_weights":
            os.kill(os.getpid(), signal.SIGKILL)
        return rpc(server, method, *args, **options)

    if mode == "paused":
        script.rpc = never_swap
    else:
        script.broadcast = send_first_tensor


def push(model, port, pushes, result, mode=""):
    """Push random weights `pushes` times as versions 1, 2, …, and compare server and transformers each time.

    `mode` half, silent or paused: the last of one push more goes wrong there, see `die_in`. With a number as
    the mode, which is the server's process, memory is noted."""
    sys.path.insert(0, str(REPO))
    import torch
    import train_gsm8k_fsdp2 as script
    import transformers

    args = script.parse_args([
        "--model", model, "--vllm-port", port, "--device", "cpu", "--no-mixed-precision", "--vllm-timeout",
        "4" if mode == "silent" else "60", "--max-prompt-tokens", "64", "--max-new-tokens", "12"])
    ranks = script.read_ranks(args)
    mesh = script.init_distributed(args, ranks)
    policy = script.load_policy(args, Path(model), mesh, torch.float32, ranks)
    twin = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    server = script.open_server(args, ranks)
    rows = []
    found = {"rows": rows}
    for number in range(1, int(pushes) + 1 + bool(mode and not mode.isdigit())):
        set_random_weights(twin, number)
        whole = dict(twin.named_parameters())
        for name, param in policy.named_parameters():
            script.fill(param, whole[name].detach())
        if number > int(pushes):
            die_in(script, mode)
        started = time.perf_counter()
        try:
            script.push_weights(server, policy, torch.float32, number, ranks)
        except script.UserError as error:
            found["error"] = str(error)
            break
        seconds = time.perf_counter() - started
        error, shortfall = agreement(script, server, twin) if ranks.is_main else (0.0, 0.0)
        memory = [resident_mb(int(mode)), resident_mb(os.getpid())] if mode.isdigit() else None
        rows.append({"seconds": seconds, "error": error, "shortfall": shortfall, "memory": memory})
        torch.distributed.barrier()
    if ranks.is_main:
        Path(result).write_text(json.dumps(found))
    os._exit(0)  # at once, as a trainer ends: the wire's threads are not waited for


if __name__ == "__main__":
    push(*sys.argv[1:])
