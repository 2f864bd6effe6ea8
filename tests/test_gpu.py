"""What only a CUDA GPU can show: bf16, compiled blocks, attention kernels, memory, asynchronous saves.

Quick under pytest-xdist (-n 5): what several tests need is made once for all its processes. GPU_TEST_SECONDS
limits each run of a script.
"""

import contextlib
import fcntl
import json
import os
import re

import grpo_models
import pytest
import torch
import torch.nn.functional as F
import train_gsm8k_fsdp2
import train_llm
from helpers import REPO, make_hf_model, make_tokenizer, read_metrics, run_script, write_gsm8k_like
from torch._dynamo.utils import counters

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
RANKS = train_llm.Ranks(0, 0, 1, DEVICE)
RUN_SECONDS = int(os.environ.get("GPU_TEST_SECONDS", 300))
COMMON = ["--from-scratch", "--model-size", "125M", "--vocab-size", 2048, "--seq-len", 512, "--batch-size", 4,
          "--text-column", "answer", "--max-steps", 20, "--log-interval", 1, "--warmup-steps", 2,
          "--device", "cuda", "--no-export"]
EXACT = ["--no-compile", "--deterministic"]
VOCAB = 512
# Lengths of the documents in two packs of 256 tokens; the second is padded.
PACKS = [[100, 37, 119], [5, 200]]


# ----------------------------------------------------------------------------------------------------
# 1. Runs of the scripts

@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder that all processes of pytest-xdist share, with a tokenizer and data."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "gpu"
    folder.mkdir(exist_ok=True)

    def make():
        make_tokenizer(folder / "tokenizer", vocab_size=2000)
        write_gsm8k_like(folder / "data.jsonl", 2000)
        return True

    made_once(folder, "inputs", make)
    return folder


def made_once(folder, name, make):
    """What make() gives (JSON). The first process that needs it makes it, the others wait for it."""
    result = folder / f"{name}.once.json"
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            try:
                found = {"value": make()}
            except AssertionError as error:
                found = {"error": str(error)}
            result.write_text(json.dumps(found))
    found = json.loads(result.read_text())
    assert "value" in found, found["error"]
    return found["value"]


def flags_for(place, name):
    return [*COMMON, "--tokenizer", place / "tokenizer", "--dataset", place / "data.jsonl",
            "--data-cache", place / "cache", "--checkpoint-dir", place / name]


def train(place, name, *flags):
    """Losses of the training rows of one run."""
    run_script([*flags_for(place, name), *flags], timeout=RUN_SECONDS)
    return [row["train/loss"] for row in read_metrics(place / name) if "train/loss" in row]


def plain_losses(place):
    """Of a run in bf16 without compile, in place/plain."""
    flags = ["--no-compile", "--checkpoint-interval", 0]
    return made_once(place, "plain", lambda: train(place, "plain", *flags))


def straight_losses(place):
    """Of a deterministic run that nobody stopped; its step 10 is in place/straight/checkpoints."""
    flags = [*EXACT, "--checkpoint-interval", 10, "--keep-checkpoints", 0]
    return made_once(place, "straight", lambda: train(place, "straight", *flags))


def test_a_stop_signal_saves_and_the_run_goes_on_bitwise(place):
    """The stop comes after the step that the signal meets, or the next; the run then goes on bitwise."""
    script = place / "stopping" / "train_llm.py"
    script.parent.mkdir()
    line = '        is_last, every = step == total_steps, args.checkpoint_interval\n'
    kill = '        step == 8 and os.kill(os.getpid(), signal.SIGUSR1)\n'
    source = (REPO / "train_llm.py").read_text()
    assert source.count(line) == 1
    script.write_text(source.replace(line, line + kill))
    stopped = run_script([*flags_for(place, "stopped"), *EXACT], script=script, check=False,
                         timeout=RUN_SECONDS)
    assert stopped.returncode == 138 and "stopped (SIGUSR1)" in stopped.stdout, stopped.stderr[-3000:]
    assert train(place, "stopped", *EXACT) == straight_losses(place)


def test_resume_from_an_asynchronous_checkpoint_is_bitwise(place):
    straight = straight_losses(place)
    again = place / "again" / "checkpoints"
    again.mkdir(parents=True)
    (place / "straight" / "checkpoints" / "step_000010").rename(again / "step_000010")
    assert train(place, "again", *EXACT) == straight[10:]


@pytest.mark.parametrize("more", [["--no-compile"], ["--compile"], ["--no-compile", "--cpu-offload"]],
                         ids=" ".join)
def test_grpo_samples_as_it_trains(tmp_path, more):
    """bf16 with a key-value cache against bf16 in one forward: the sampler's mismatch stays small, also with
    questions of different length, which stand side by side."""
    grpo_models.make_policy(tmp_path / "policy")
    grpo_models.make_questions(tmp_path / "questions")
    path = tmp_path / "questions" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["question"] = "0" * (number % 7) + row["question"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_script([*grpo_models.flags(tmp_path, "run", 1), "--device", "cuda", "--mixed-precision", *more,
                "--kl-coef", 0.01, "--checkpoint-interval", 0, "--no-export"],
               script="train_gsm8k_fsdp2.py", timeout=RUN_SECONDS)
    rows = [row for row in read_metrics(tmp_path / "run") if "train/mismatch_kl" in row]
    assert len(rows) == 6 and all(row["train/mismatch_kl"] < 1e-2 for row in rows)  # not so with NaN
    assert any(row["train/grad_norm"] > 0 for row in rows)


def test_hf_model_exports_in_bf16(place):
    model = make_hf_model("llama", place / "llama")
    data = write_gsm8k_like(place / "chats.jsonl", 200)
    run_script(["--hf-model", model, "--dataset", data, "--seq-len", 128, "--max-steps", 4, "--data-cache",
                place / "cache", "--checkpoint-dir", place / "hf", "--device", "cuda",
                "--checkpoint-interval", 0], timeout=RUN_SECONDS)
    assert json.loads((place / "hf" / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_bf16_follows_fp32(place):
    fp32 = train(place, "fp32", "--no-compile", "--no-mixed-precision", "--checkpoint-interval", 0)
    bf16 = plain_losses(place)
    assert bf16[0] == pytest.approx(fp32[0], rel=2e-3)
    assert bf16[-1] == pytest.approx(fp32[-1], rel=2e-2)
    assert bf16[-1] < 0.8 * bf16[0]


@pytest.mark.parametrize("flags", [
    ["--compile"], ["--compile", "--activation-checkpointing", "full"],
    ["--no-compile", "--activation-checkpointing", "selective"], ["--no-compile", "--no-use-flash-attn"],
    ["--no-compile", "--cpu-offload"],
], ids=lambda flags: "".join(flags))
def test_option_trains_as_plain_bf16(place, flags):
    losses = train(place, "option" + "".join(flags), *flags, "--checkpoint-interval", 0)
    plain = plain_losses(place)
    assert losses[0] == pytest.approx(plain[0], rel=2e-3)
    assert losses[-1] == pytest.approx(plain[-1], rel=2e-2)


def test_metrics_have_mfu_and_memory(place):
    plain_losses(place)
    row = read_metrics(place / "plain")[-1]
    assert row["perf/peak_mem_gib"] > 0.5
    if "H200" in torch.cuda.get_device_name() or "H100" in torch.cuda.get_device_name():
        assert 0 < row["perf/mfu"] < 1


# ----------------------------------------------------------------------------------------------------
# 2. Models in this process

@pytest.fixture(scope="module")
def mesh():
    """Of a process group of this process alone."""
    args = train_llm.parse_args("--from-scratch --tokenizer a/b --dataset a/b --device cuda".split())
    yield train_llm.init_distributed(args, RANKS)
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def own_settings():
    """What a test switches in torch ends with it."""
    yield
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch._dynamo.reset()
    counters.clear()


def own_decoder():
    """The model of train_llm.py, so far from zero that attention matters."""
    torch.manual_seed(0)
    model = train_llm.CausalLM(train_llm.decoder_config((4, 128, 4, 2, 256), VOCAB)).to(DEVICE)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.1) if param.dim() > 1 else None
    return model


def hf_model(family, folder):
    from transformers import AutoModelForCausalLM

    folder = make_hf_model(family, folder, VOCAB)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)


def make(family, folder):
    """A model for train_llm.py in fp32, the same each time."""
    if family == "own":
        return own_decoder()
    model = hf_model(family, folder)
    train_llm.attach_chunked_loss(model)
    return model


def shard(model, mesh, *flags, script=train_llm, dtype=torch.bfloat16):
    needed = ["--from-scratch", "--tokenizer", "a/b", "--dataset", "a/b"] if script is train_llm else []
    args = script.parse_args([*needed, "--device", "cuda", "--no-compile", *flags])
    script.shard_model(model, args, mesh, dtype)
    return model


def pieces(lengths, seed):
    """(input_ids, labels) of documents."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(VOCAB, (length + 1,), generator=generator) for length in lengths]
    return [(ids[:-1], ids[1:]) for ids in drawn]


def joined(found, length):
    """Documents side by side in a sample, padded to `length`; each keeps the label of its last token."""
    ids, labels = (torch.cat(parts) for parts in zip(*found))
    positions, short = torch.cat([torch.arange(len(ids)) for ids, _ in found]), max(0, length - len(ids))
    return {"input_ids": F.pad(ids, (0, short)), "labels": F.pad(labels, (0, short), value=train_llm.IGNORE),
            "position_ids": F.pad(positions, (0, short))}


def packed_batch(packs, seq_len, device=DEVICE):
    samples = [joined(pieces(lengths, seed), seq_len) for seed, lengths in enumerate(packs)]
    return train_llm.collate(samples, device, True, seq_len)


def gradients(model):
    """All of them in one vector, in fp32."""
    grads = [param.grad for param in model.parameters()]
    return torch.cat([(g.full_tensor() if hasattr(g, "full_tensor") else g).flatten().float() for g in grads])


def alone_gradients(model):
    """Of the documents of PACKS, each by itself: what packed training must give."""
    for seed, lengths in enumerate(PACKS):
        for ids, labels in pieces(lengths, seed):
            model(ids[None].to(DEVICE), labels=labels[None].to(DEVICE))[0].backward()
    return gradients(model)


def distance(found, exact):
    return float((found - exact).norm() / exact.norm())


def packed_gradients(model, batch):
    model.zero_grad()
    model(**batch).backward()
    return gradients(model)


@contextlib.contextmanager
def operators():
    """The set of the operators that run within; filled at the end."""
    found = set()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield found
    found.update(event.key for event in profile.key_averages())


def attention_operators(found):
    """The forward's only; `scaled_dot_product_attention` itself, which chooses among them, is none."""
    names = (name.split("::")[-1] for name in found)
    return {name for name in names if re.match("_scaled_dot_product_|_varlen_attn", name)
            and "backward" not in name}


# ----------------------------------------------------------------------------------------------------
# 3. Documents in a pack

VARLEN = ["own", "llama", "qwen2", "qwen3", "mistral", "gemma3", "phi", "gpt2"]


@pytest.mark.parametrize("family", [*VARLEN, "falcon_7b"])
def test_packed_documents_are_trained_as_if_alone(mesh, tmp_path, family):
    """Two packs of ragged documents in bf16, by variable-length attention and by a mask, each against the
    documents by themselves in fp32. Mistral, and Gemma in every second layer, look back 16 tokens."""
    exact = alone_gradients(make(family, tmp_path))
    batch, errors, used = packed_batch(PACKS, 256), {}, {}
    for name, is_varlen in (("varlen", True), ("mask", False)):
        torch.backends.cuda.enable_flash_sdp(True)
        model = shard(make(family, tmp_path), mesh)
        if family == "own":
            torch.backends.cuda.enable_flash_sdp(is_varlen)
        else:
            train_llm.prove_packing(model, RANKS, can_use_varlen=is_varlen)
        with operators() as found:
            grads = packed_gradients(model, batch)
        assert torch.isfinite(grads).all()
        errors[name], used[name] = distance(grads, exact), attention_operators(found)
    unmasked = shard(make(family, tmp_path), mesh)
    leak = distance(packed_gradients(unmasked, {key: batch[key] for key in ("input_ids", "labels")}), exact)
    print(family, errors, f"leak {leak:.3g}", used)
    assert (used["varlen"] == {"_varlen_attn"}) == (family in VARLEN), used
    assert used["mask"] and "_varlen_attn" not in used["mask"]
    assert errors["varlen"] < 1.5 * errors["mask"] and errors["mask"] < leak / 5


@pytest.mark.parametrize("family", ["own", "llama"])
def test_packed_documents_need_no_mask_in_memory(mesh, family):
    """Two packs of 16,384 tokens: a mask of as many rows and columns, in bytes, would be 512 MiB."""
    T = 16384
    if family == "own":
        model = train_llm.CausalLM(train_llm.decoder_config((1, 64, 2, 1, 128), VOCAB)).to(DEVICE)
    else:
        from transformers import LlamaConfig, LlamaForCausalLM
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=VOCAB, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, use_cache=False,
            num_key_value_heads=1, intermediate_size=128, max_position_embeddings=T)).to(DEVICE)
        train_llm.attach_chunked_loss(model)
    shard(model, mesh)
    if family != "own":
        train_llm.prove_packing(model, RANKS, can_use_varlen=True)
    batch = packed_batch([[700] * 23, [5000, 9000, 2000]], T)
    model(**batch).backward()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(**batch).backward()
    assert torch.cuda.max_memory_allocated() - before < 2 * T * T


@pytest.mark.parametrize("family", ["own", "llama"])
def test_a_packed_step_never_waits_for_the_gpu(mesh, tmp_path, family):
    model, batch = shard(make(family, tmp_path), mesh), packed_batch(PACKS, 256)
    if family != "own":
        train_llm.prove_packing(model, RANKS, can_use_varlen=True)
    model(**batch).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**batch).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_lengths_are_multiples_of_128():
    batch = packed_batch([[100, 30], [5]], 512)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 512)  # packs are full
    bounds = batch["cu_seqlens"]
    assert bounds.dtype == torch.int32 and bounds.device == batch["input_ids"].device == DEVICE
    unpacked = [joined(pieces([length], 0), 0) for length in (100, 130)]
    assert train_llm.collate(unpacked, DEVICE, True, 512)["input_ids"].shape == (2, 256)
    assert train_llm.collate(unpacked, DEVICE, True, 200)["input_ids"].shape == (2, 200)
    sequence = train_gsm8k_fsdp2.Sequence([1] * 40, 10, [0.0] * 30, 1.0)
    assert train_gsm8k_fsdp2.collate([sequence], DEVICE, 512)["input_ids"].shape == (1, 128)


# ----------------------------------------------------------------------------------------------------
# 4. Compiled blocks, kernels, one device

@pytest.mark.parametrize("family", ["own", "llama"])
def test_recomputation_keeps_compile_and_saves_memory(mesh, tmp_path, family):
    """Inductor's one graph for all blocks in each mode, on packed documents, against eager fp32."""
    batch, peaks, errors = packed_batch([[1000, 300, 748], [2048]] * 4, 2048), {}, {}
    exact = packed_gradients(shard(make(family, tmp_path), mesh, dtype=torch.float32), batch)
    for mode in ("eager", "none", "full", "selective"):
        torch._dynamo.reset()
        counters.clear()
        flags = [] if mode == "eager" else ["--compile", "--activation-checkpointing", mode]
        model = shard(make(family, tmp_path), mesh, *flags)
        if family != "own":
            train_llm.prove_packing(model, RANKS, can_use_varlen=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            model(**batch).backward()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            errors[mode] = distance(packed_gradients(model, batch), exact)
        peaks[mode] = torch.cuda.max_memory_allocated() - before
        graphs = counters["stats"]["unique_graphs"]
        assert graphs == (mode != "eager") and not counters["graph_break"], (mode, dict(counters))
    print(family, "MiB:", {mode: peak >> 20 for mode, peak in peaks.items()}, "errors:", errors)
    assert peaks["full"] < peaks["selective"] < peaks["none"]
    assert max(errors.values()) < 1.5 * errors["eager"]


def test_grpo_compiles_blocks_and_head(mesh, tmp_path):
    """With recomputation, as it is by default; logprobs and gradients against eager fp32."""
    script, rows = train_gsm8k_fsdp2, torch.arange(300, device=DEVICE)
    ids = torch.randint(VOCAB, (4, 256), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ways = {"exact": (torch.float32, "--no-compile"), "eager": (torch.bfloat16, "--no-compile"),
            "compiled": (torch.bfloat16, "--compile")}
    found, grads = {}, {}
    for name, (dtype, flag) in ways.items():
        model = hf_model("qwen2", tmp_path)
        script.attach_logprobs(model, compiled=flag == "--compile")
        shard(model, mesh, flag, script=script, dtype=dtype)
        for temperature in (1.0, 0.7):
            model.zero_grad()
            logprobs, _ = model(ids, rows, ids.flatten()[rows + 1], temperature)
            logprobs.sum().backward()
        found[name], grads[name] = logprobs.detach(), gradients(model)
    assert counters["stats"]["unique_graphs"] >= 4, dict(counters)  # a block, and the head's three functions
    for values in (found, grads):
        error = {name: distance(values[name], values["exact"]) for name in ("eager", "compiled")}
        assert error["compiled"] < 1.5 * error["eager"], error


def test_no_use_flash_attn_takes_another_kernel(mesh):
    ids = torch.randint(VOCAB, (2, 256), device=DEVICE)
    used = {}
    for flag in ("--use-flash-attn", "--no-use-flash-attn"):
        model = shard(own_decoder(), mesh, flag)
        with operators() as found:
            model(ids, labels=ids)[0].backward()
        used[flag] = attention_operators(found)
    flash, other = used.values()
    assert flash and other and not flash & other, used
    assert not any("flash" in name or "cudnn" in name for name in other), used


def test_one_gpu_keeps_blocks_whole_between_forward_and_backward(mesh):
    """No resharding, no collectives, no division: the gradients are those of the plain model, bit for bit."""
    from torch.distributed.tensor import DTensor

    batch = {"input_ids": (ids := torch.randint(VOCAB, (2, 256), device=DEVICE)), "labels": ids}
    expected = packed_gradients(own_decoder(), batch)
    model = shard(own_decoder(), mesh, dtype=torch.float32)
    is_sharded = [all(isinstance(param, DTensor) for param in model.parameters())]
    with operators() as found:
        loss = model(**batch)
        is_sharded.append(any(isinstance(param, DTensor) for param in model.parameters()))
        loss.backward()
        is_sharded.append(all(isinstance(param, DTensor) for param in model.parameters()))
    assert is_sharded == [True, False, True]
    assert not [name for name in found if name.startswith("c10d::") or "nccl" in name.lower()]
    torch.testing.assert_close(gradients(model), expected, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------
# 5. Local rollouts

PROMPT_LENGTHS = [3, 17, 40, 1, 64, 9]


def test_prompts_of_different_length_are_sampled_as_they_are_trained(mesh, tmp_path):
    """No NaN behind padding, no cuDNN kernel, and in bf16 logprobs no further from fp32's than those of one
    whole forward in bf16 are."""
    from transformers import AutoTokenizer

    script = train_gsm8k_fsdp2
    folder = make_hf_model("qwen2", tmp_path / "model", VOCAB)
    args = script.parse_args(list(map(str, [
        "--model", folder, "--device", "cuda", "--no-compile", "--max-prompt-tokens", 64,
        "--max-new-tokens", 24, "--temperature", 0.8])))
    tokenizer, whole = AutoTokenizer.from_pretrained(folder), {}
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]
    for dtype in (torch.bfloat16, torch.float32):
        model = script.load_policy(args, folder, mesh, dtype, RANKS)
        script.load_hf_weights(model, folder, False, RANKS)
        script.prove_filled(model)
        sampler = script.open_sampler(args, model, folder, tokenizer, dtype, RANKS)
        if dtype == torch.bfloat16:
            with operators() as found:
                waiting = script.start_completions(sampler, prompts, 4, list(range(6)), sampler.sampling)
            sampled = [(prompt, c) for prompt, wait in zip(prompts, waiting) for c in wait()]
            batch = script.collate([script.Sequence(prompt + c.ids, len(prompt), c.logprobs, 0.0)
                                    for prompt, c in sampled], DEVICE)
        with torch.no_grad():
            call = batch["input_ids"], batch["rows"], batch["targets"], args.temperature
            whole[dtype] = model(*call)[0]
    assert attention_operators(found) and not [name for name in found if "cudnn" in name.lower()], found
    error = {name: float((logprobs - whole[torch.float32]).abs().mean()) for name, logprobs in (
        ("sampler", batch["sampler_logprobs"]), ("trainer", whole[torch.bfloat16]))}
    print(error)
    assert torch.isfinite(batch["sampler_logprobs"]).all()
    assert error["sampler"] < 1.5 * error["trainer"], error
