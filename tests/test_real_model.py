"""A real instruct model on real GSM8K: SFT, GRPO, a vLLM server that follows it, and what the proofs at load
say of it and of faults built into it, in fp32 and bf16.

Random small models hide rounding. The bounds here are measured on real weights; comments say what rounding
and what a fault came to. It needs what REAL_MODEL and VLLM_PYTHON name: tests/run.sh --all makes both.
"""

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import real_model as real
import vllm_server as vllm
from helpers import REPO, read_metrics
from quick_runs import quick_ranks, quick_run

pytestmark = pytest.mark.slow
GRPO = "train_gsm8k_fsdp2.py"
DTYPES = ("float32", "bfloat16")
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
PRECISION = {"float32": ["--no-mixed-precision"], "bfloat16": []}
TIMEOUT_S = 600  # some fifty times what a run takes on an idle machine


@pytest.fixture(scope="module")
def model():
    return real.real_model()


@pytest.fixture(scope="module")
def tokenizer(model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return tmp_path_factory.mktemp("real")


def load(folder, dtype="float32"):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype, dtype)).eval()


def in_both(function, *args):
    """[function(dtype, …)] of DTYPES, at the same time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(DTYPES, pool.map(lambda dtype: function(dtype, *args), DTYPES)))


def test_the_model_itself(model, tokenizer):
    """tools/make_smollm2.py: weights, configuration, tokenizer, template; made once."""
    command = [sys.executable, str(REPO / "tools/make_smollm2.py"), str(model)]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0 and made.stdout == f"{model} is there already\n", made.stderr
    whole = load(model, "auto")
    assert str(whole.dtype) == "torch.bfloat16" and whole.num_parameters() == 134_515_008
    assert whole.lm_head.weight is whole.model.embed_tokens.weight
    assert len(tokenizer) == whole.config.vocab_size == 49_152
    text = "He paid $12.50  for\n\n3 pens, didn't he?"
    pieces = [tokenizer.decode(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) == text and pieces[3:8] == ["1", "2", ".", "5", "0"] and "\n\n" in pieces
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True,
                                         tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert whole.generation_config.eos_token_id == tokenizer.eos_token_id == end


# ----------------------------------------------------------------------------------------------------
# 1. SFT

NUM_STEPS = 3


def fine_tune(dtype, model, folder):
    """Four short chats, two in each of the two packs of a step's batch: each step sees all of the data. The
    learning rates leave the model its other answers: bf16 rounds most of the first updates away."""
    run_dir = folder / f"sft_{dtype}"
    lr = 2e-5 if dtype == "bfloat16" and real.computes_bf16() else 4e-6
    return run_dir, quick_run(
        ["--hf-model", model, "--dataset", folder / "chats.jsonl", "--data-cache", folder / f"cache_{dtype}",
         "--seq-len", real.SEQ_LEN, "--batch-size", 2, "--max-steps", NUM_STEPS, "--max-lr", lr, "--min-lr",
         lr, "--warmup-steps", 0, "--log-interval", 1, "--checkpoint-interval", 0, "--checkpoint-dir",
         run_dir, "--device", "cpu", "--no-compile", *PRECISION[dtype]], timeout=TIMEOUT_S)


@pytest.fixture(scope="module")
def tuned(model, tokenizer, folder):
    """{dtype: (folder of the run, its result)}."""
    real.write_rows(folder / "chats.jsonl", real.short_rows(tokenizer, 4))
    return in_both(fine_tune, model, folder)


@each_dtype
def test_fine_tuning(tuned, model, tokenizer, dtype):
    run_dir, result = tuned[dtype]
    rows = read_metrics(run_dir)
    losses = [row["train/loss"] for row in rows]
    expected = real.chat_loss(load(model), tokenizer, real.short_rows(tokenizer, 4))
    error = abs(losses[0] - expected) / expected
    print(dtype, losses, expected, error)
    if dtype == "bfloat16" and not real.computes_bf16():
        assert "computed in float32" in result.stdout
        dtype = "float32"
    # Rounding: 1.5e-7 and 1.6e-3 (transformers' own bf16: 2.0e-3). Logits times 0.9: 1.8e-2; a leak: 0.16.
    assert error < {"float32": 1e-5, "bfloat16": 5e-3}[dtype]
    assert rows[0]["samples"] == 2 and len(losses) == NUM_STEPS
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.95 * losses[0]


@each_dtype
def test_exported_model_answers(tuned, model, dtype):
    """With nothing but what its folder says: template, end token, generation settings."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = tuned[dtype][0] / "hf"
    tokenizer, exported = AutoTokenizer.from_pretrained(hf), AutoModelForCausalLM.from_pretrained(hf)
    chat = [{"role": "user", "content": "What is 2 + 2?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt",
                                           return_dict=True)
    ids = exported.generate(**prompt, max_new_tokens=40)[0, prompt["input_ids"].shape[1]:].tolist()
    print(dtype, tokenizer.decode(ids))
    assert "4" in tokenizer.decode(ids)
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>") and len(ids) < 40
    assert generation_settings(hf) == generation_settings(model)


def generation_settings(folder):
    settings = json.loads((folder / "generation_config.json").read_text())
    return {key: value for key, value in settings.items() if key != "transformers_version"}


# ----------------------------------------------------------------------------------------------------
# 2. GRPO, which samples by itself

NUM_QUESTIONS, GROUP, ANSWER = 2, 4, 7  # about a third of the answers is cut, so that rewards differ


def grpo(dtype, model, folder, run, *more):
    """Three steps of two questions; answers in form are rewarded, since so small a model solves next to none.
    Returns the rows of the steps."""
    quick_run(
        ["--model", model, "--dataset", folder / "questions", "--chat-template", folder / "few_shot.jinja",
         "--system-prompt", "", "--format-reward", 0.1, "--batch-size", NUM_QUESTIONS, "--group-size", GROUP,
         "--max-prompt-tokens", 200, "--max-new-tokens", ANSWER, "--train-steps", 3, "--max-lr", 1e-5,
         "--checkpoint-interval", 0, "--checkpoint-dir", folder / run, "--device", "cpu", "--no-compile",
         "--activation-checkpointing", "none", "--zero-variance", "keep", *PRECISION[dtype], *more],
        timeout=TIMEOUT_S, script=GRPO)
    rows = [row for row in read_metrics(folder / run) if "train/loss" in row]
    print(run, [[row[f"train/{key}"] for key in ("mismatch_kl", "ratio_p01", "ratio_p99", "grad_norm")]
                for row in rows])
    assert len(rows) == 3 and any(row["train/grad_norm"] > 0 for row in rows)
    return rows


@pytest.fixture(scope="module")
def questions(folder):
    rows = real.short_questions(8)
    real.write_rows(folder / "questions/train.jsonl", rows)
    real.write_rows(folder / "questions/test.jsonl", rows[:2])
    real.write_few_shot_template(folder / "few_shot.jinja")
    return folder


@pytest.fixture(scope="module")
def local_runs(model, questions):
    return in_both(lambda dtype: grpo(dtype, model, questions, f"grpo_{dtype}", "--eval-limit", 0))


@each_dtype
def test_grpo(local_runs, dtype):
    check_mismatch(local_runs[dtype], dtype)


def check_mismatch(rows, dtype):
    """Between the sampler and the trainer, which here have the same weights."""
    assert [row["rollout/version_lag"] for row in rows] == [0, 0, 0]
    exact = dtype == "float32" or not real.computes_bf16()
    # Rounding: 1e-11 and 3.5e-3. A cache whose positions are off by one: 2e-2.
    assert max(row["train/mismatch_kl"] for row in rows) < (1e-8 if exact else 1e-2)
    assert max(row["train/tis_capped_frac"] for row in rows) == 0


# ----------------------------------------------------------------------------------------------------
# 3. GRPO with a vLLM server that serves the model and follows it

@pytest.fixture(scope="module")
def servers(model, folder):
    """{dtype: a server of the real model}; bf16 only where the trainer computes in it, too."""
    vllm.vllm_python()
    flags = ("--logprobs-mode", "processed_logprobs", "--worker-extension-cls",
             "train_gsm8k_fsdp2.WeightReceiver", "--kv-cache-memory-bytes", "256M")
    made = {dtype: vllm.VllmServer(model, folder / f"vllm_{dtype}.log", (
        *flags, "--dtype", dtype if real.computes_bf16() else "float32")) for dtype in DTYPES}
    try:
        for server in made.values():
            vllm.launch(server)
        yield {dtype: vllm.ready(server) for dtype, server in made.items()}
    finally:
        for server in made.values():
            vllm.stop(server, signal.SIGKILL)


@pytest.fixture(scope="module")
def served_runs(model, questions, servers):
    return in_both(lambda dtype: grpo(
        dtype, model, questions, f"served_{dtype}", "--rollouts", "vllm", "--vllm-port", servers[dtype].port,
        "--eval-limit", 1, "--vllm-timeout", TIMEOUT_S))


@each_dtype
def test_grpo_with_vllm(served_runs, servers, folder, tokenizer, dtype):
    import torch

    check_mismatch(served_runs[dtype], dtype)
    print("probe errors", [row["sync/probe_error"] for row in served_runs[dtype]])
    # The evaluation behind the last step has given the server the exported weights.
    assert vllm.version(servers[dtype]) == [3]
    question = real.short_questions(9)[8]["question"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False)
    ids, logprobs = vllm.ask(servers[dtype], prompt, timeout=TIMEOUT_S)

    def difference(model_folder):
        exported = load(model_folder, dtype if real.computes_bf16() else "float32")
        with torch.no_grad():
            logits = exported(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1].float()
        found = torch.log_softmax(logits, -1)
        mine = found.gather(1, torch.tensor(ids)[:, None])[:, 0]
        error = (mine - torch.tensor(logprobs)).abs().mean().item()
        return error, (found.max(-1).values - mine).max().item()

    (error, shortfall), (before, _) = map(difference, (folder / f"served_{dtype}/hf", real.real_model()))
    print(dtype, "error", error, "shortfall", shortfall, "with the weights of before", before)
    exact = dtype == "float32" or not real.computes_bf16()
    # Rounding: 4e-6 and 1e-2; with the weights of before the three steps 2e-2 in fp32.
    assert error < (1e-4 if exact else 0.05) and shortfall < (1e-4 if exact else 0.3)
    assert before > 1e-3 or not exact


# ----------------------------------------------------------------------------------------------------
# 4. Faults: each proof finds the one that it is for, and says nothing without

def proofs(mode, dtype, folder, *args):
    """What tests/faults_driver.py found."""
    result = folder / f"{mode}_{dtype}_{args[0].name}.json"
    quick_ranks([mode, result, dtype, *args], 1, timeout=TIMEOUT_S, script="tests/faults_driver.py")
    return json.loads(result.read_text())


@pytest.fixture(scope="module")
def loaded(model, folder):
    """{dtype: what the proofs said of the real model}. Where bf16 is imitated, of its first layers."""
    few = model if real.computes_bf16() else real.first_layers(model, folder / "first_layers", 6)
    sources = {"float32": model, "bfloat16": few}
    return in_both(lambda dtype: proofs("faults", dtype, folder, sources[dtype], folder / f"proofs_{dtype}"))


def test_all_is_well_without_a_fault(loaded):
    for dtype in DTYPES:
        check_no_alarm(loaded[dtype])
        assert loaded[dtype]["export"]["none"]["error"] is None
    # That there was rounding to be told from a leak.
    assert loaded["bfloat16"]["kernel by mask"]["noise"] > 0.01


def check_no_alarm(found):
    for name in ("own kernel", "kernel by mask"):
        assert found[name]["packing"]["none"]["error"] is None
    for name in ("loss", "logprobs"):
        assert not found[name]["none"]["whole_logits"] and found[name]["none"]["said"] == ""
    assert found["rollouts"]["none"]["error"] is None


@each_dtype
def test_leaks_between_documents(loaded, dtype):
    for name in ("own kernel", "kernel by mask"):
        packing = loaded[dtype][name]["packing"]
        for fault in ("positions ignored", "second row leaks"):
            assert "see each other" in packing[fault]["error"]


@each_dtype
def test_heads_of_their_own(loaded, dtype):
    for proof, words in (("loss", "the loss uses whole logits"), ("logprobs", "whole logits are used")):
        for fault in ("scale 0.9", "cap 20"):
            found = loaded[dtype][proof][fault]
            assert found["whole_logits"] and words in found["said"]
            assert found["mended"] < 1e-5 and found["left"] > 1e-2


@each_dtype
def test_caches_that_work_in_another_way(loaded, dtype):
    for fault in ("padding is seen", "next position is one too far"):
        assert "its cache works in another way" in loaded[dtype]["rollouts"][fault]["error"]


@each_dtype
def test_damaged_exports(loaded, dtype):
    found = loaded[dtype]["export"]
    print(dtype, {name: proof["error"] for name, proof in found.items()})
    for fault in ("tensor of another layer", "rope_theta 1,000", "tie lost"):
        assert "is not the trained model: logits: off by " in found[fault]["error"]


@pytest.fixture(scope="module")
def pushed(servers, model, folder):
    return in_both(lambda dtype: proofs("push", dtype, folder, model, servers[dtype].port))


@each_dtype
def test_pushes_of_other_weights(pushed, dtype):
    found = pushed[dtype]
    print(dtype, {name: proof.get("value", proof["error"]) for name, proof in found.items()})
    for name in ("none", "changed", "mended"):
        assert found[name]["error"] is None
    for name in ("block of another layer", "stale"):
        assert "serves other weights than were sent" in found[name]["error"]


@pytest.mark.parametrize("name", real.MIXTURES)
def test_mixtures_raise_no_alarm(folder, name):
    """Rounding sends tokens to other experts, whose logits differ in each digit."""
    made = real.make_mixture(name, folder / name)
    found = proofs("load", "bfloat16", folder, made, folder / f"proofs_{name}")
    check_no_alarm(found)
    assert found["kernel by mask"]["noise"] > 0.01 and found["kernel by mask"]["largest"] > 0.1
