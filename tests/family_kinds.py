"""Small random models, one for each kind of trouble that a family of transformers can make, runs of the
scripts with them, and what transformers itself computes.

test_family_kinds.py and sweep_families.py share all of it.
"""

import contextlib
import functools
import json
import os
import random
import shutil
import subprocess
import sys

import torch
from helpers import REPO, TORCHRUN_VARIABLES, make_tokenizer, read_checkpoint, read_metrics
from safetensors.torch import load_file, save_file

SEQ_LEN = 64
VOCAB = 512
MAX_NEW_TOKENS = 14
LENGTHS = [9, 23, 40, 17, 31, 12]  # of the documents, in tokens
FULL = [20, 44, 30, 34]  # fill two samples: no document is cut
ENDS = list(range(0, VOCAB, 8))  # so many ends that rollouts of random models are of every length

SIZES = dict(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, max_position_embeddings=256,
             initializer_range=0.1, bos_token_id=0, eos_token_id=0, pad_token_id=None)
GATED = dict(SIZES, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
             attention_dropout=0.0)
EXPERTS = dict(GATED, head_dim=16, moe_intermediate_size=32, num_experts_per_tok=2)
BIASED = dict(EXPERTS, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1)
STATE = dict(mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1, mamba_chunk_size=16)
TWICE = ["mamba", "hybrid"] * 2

# Family: (configuration class of transformers, its arguments).
KINDS = {
    # Modules that are not to be split, one inside the other
    "mamba": ("MambaConfig", dict(SIZES, state_size=8)),
    "falcon_mamba": ("FalconMambaConfig", dict(SIZES, state_size=8)),
    "zamba": ("ZambaConfig", dict(
        GATED, num_hidden_layers=4, layers_block_type=TWICE, attn_layer_period=2, attn_layer_offset=1,
        mamba_d_state=8, mamba_dt_rank=4, n_mamba_heads=2)),
    "zamba2": ("Zamba2Config", dict(
        GATED, num_hidden_layers=4, layers_block_type=TWICE, mamba_d_state=8, n_mamba_heads=8,
        mamba_ngroups=1, num_mem_blocks=1, chunk_size=16, use_mem_rope=True)),
    # The decoder is not where base_model_prefix says
    "llama4_text": ("Llama4TextConfig", dict(
        GATED, intermediate_size_mlp=128, head_dim=16, num_local_experts=4, num_experts_per_tok=1,
        interleave_moe_layer_step=2, attention_chunk_size=64)),
    # A parent fills its children's buffers, and the head has a multiplier
    "falcon_h1": ("FalconH1Config", dict(
        GATED, **STATE, head_dim=16, mamba_d_ssm=64, mamba_n_heads=4, lm_head_multiplier=0.5,
        embedding_multiplier=2.0, ssm_multipliers=[1.5, 0.5, 0.7, 0.8, 0.9])),
    # Takes no mask of (B, 1, T, T)
    "bloom": ("BloomConfig", dict(
        vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.1, hidden_dropout=0.0,
        attention_dropout=0.0, bos_token_id=0, eos_token_id=0)),
    # Routers, or their biases, in fp32 whatever the rest is in
    "deepseek_v3": ("DeepseekV3Config", dict(
        BIASED, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=16,
        qk_nope_head_dim=16, v_head_dim=16)),
    "glm4_moe": ("Glm4MoeConfig", BIASED),
    "ernie4_5_moe": ("Ernie4_5_MoeConfig", dict(
        GATED, moe_intermediate_size=32, moe_num_experts=4, moe_k=2, moe_layer_start_index=1,
        moe_num_shared_experts=1)),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", dict(GATED, head_dim=16, num_experts=4, moe_topk=2)),
    # The residual stream in fp32 whatever the head is in; buffers in bf16
    "mamba2": ("Mamba2Config", dict(
        SIZES, state_size=16, num_heads=8, head_dim=16, n_groups=1, chunk_size=16, expand=2)),
    "minimax": ("MiniMaxConfig", dict(
        GATED, head_dim=16, num_local_experts=4, num_experts_per_tok=2, block_size=16,
        layer_types=["linear_attention", "full_attention"])),
    # Rotary factors that depend on the largest position of the batch
    "longrope": ("Phi3Config", dict(
        GATED, original_max_position_embeddings=32, resid_pdrop=0.0, embd_pdrop=0.0, rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32,
            "short_factor": [1.0] * 8, "long_factor": [4.0] * 8})),
    # A soft cap under a name of its own, so mild that a sum of losses hardly shows it
    "xlstm": ("xLSTMConfig", dict(
        vocab_size=VOCAB, hidden_size=64, embedding_dim=64, num_hidden_layers=2, num_heads=4, chunk_size=16,
        mode="train", output_logit_soft_cap=30.0, bos_token_id=0, eos_token_id=0, pad_token_id=None)),
    # Linear attention beside full attention, or without any
    "qwen3_next": ("Qwen3NextConfig", dict(
        EXPERTS, num_experts=4, shared_expert_intermediate_size=32, linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"])),
    "jamba": ("JambaConfig", dict(
        GATED, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        num_experts=4, mamba_d_state=8, mamba_dt_rank=4)),
    "bamba": ("BambaConfig", dict(GATED, **STATE, attn_layer_indices=[1], mamba_n_heads=8)),
    "lfm2": ("Lfm2Config", dict(GATED, layer_types=["conv", "full_attention"], block_multiple_of=16)),
    "rwkv": ("RwkvConfig", dict(
        vocab_size=VOCAB, context_length=256, hidden_size=64, num_hidden_layers=2, attention_hidden_size=64,
        intermediate_size=128, bos_token_id=0, eos_token_id=0)),
    # Asks for its attention by the name "sdpa", and takes whatever else for the slow one
    "falcon": ("FalconConfig", dict(
        vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2,
        new_decoder_architecture=True, alibi=False, bias=False, attention_dropout=0.0, hidden_dropout=0.0,
        initializer_range=0.1, bos_token_id=0, eos_token_id=0)),
    # A loss of the router beside that of the tokens
    "mixtral": ("MixtralConfig", dict(
        GATED, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
        router_aux_loss_coef=0.5)),
    "qwen3_moe": ("Qwen3MoeConfig", dict(
        EXPERTS, num_experts=4, output_router_logits=True, router_aux_loss_coef=0.5)),
    "jetmoe": ("JetMoeConfig", dict(
        SIZES, num_key_value_heads=2, kv_channels=16, intermediate_size=128, attention_dropout=0.0,
        num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, aux_loss_coef=0.5)),
    # None of it
    "llama": ("LlamaConfig", GATED),
}


# ----------------------------------------------------------------------------------------------------
# 1. Models


def make_kind(kind, base, seed=0):
    """Save the model of KINDS in fp32, with a tokenizer, to `base`/`kind`; returns that folder."""
    return make_model(base / kind, *KINDS[kind], seed)


def make_model(folder, name, arguments, seed=0):
    import transformers

    shutil.copytree(tokenizer_folder(folder.parent), folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = getattr(transformers, name)(**arguments)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for key, tensor in model.state_dict(keep_vars=True).items():
                # Some families begin with zeros here: then no expert is better than another.
                if key.endswith(("gate.weight", "wg.weight")):
                    tensor.normal_(std=0.2)
                if "e_score_correction_bias" in key:
                    tensor.normal_(std=0.02)
    model.generation_config.eos_token_id = ENDS
    model.save_pretrained(folder)
    return folder


@functools.cache
def tokenizer_folder(base):
    make_tokenizer(base / "tokenizer", VOCAB - 12)
    return base / "tokenizer"


def scaled(tensors, name, weight, dtype):
    """FP8 or int8 with a scale beside it: the weight keeps its name and its shape."""
    scale = weight.abs().max() / (448 if dtype.is_floating_point else 127)
    quotient = weight / scale
    tensors[name] = (quotient if dtype.is_floating_point else quotient.round()).to(dtype)
    return scale


def as_fp8(tensors, name, weight):
    tensors[name + "_scale_inv"] = scaled(tensors, name, weight, torch.float8_e4m3fn).reshape(1, 1)


def as_int8(tensors, name, weight):
    tensors[name + "_scale"] = scaled(tensors, name, weight, torch.int8).reshape(1)


def as_gptq(tensors, name, weight):
    """Eight numbers of 4 bits in an int32; no tensor has the weight's name."""
    stem, (rows, columns) = name.removesuffix("weight"), weight.shape
    tensors[stem + "qweight"] = torch.randint(2**31, (columns // 8, rows), dtype=torch.int32)
    tensors[stem + "qzeros"] = torch.randint(2**31, (1, rows // 8), dtype=torch.int32)
    tensors[stem + "scales"] = torch.rand(1, rows).half()


def as_nf4(tensors, name, weight):
    """As bitsandbytes writes it: two numbers a byte, in one column."""
    tensors[name] = torch.randint(256, (weight.numel() // 2, 1), dtype=torch.uint8)
    tensors[name + ".absmax"] = torch.rand(weight.numel() // 64)
    tensors[name + ".quant_map"] = torch.linspace(-1, 1, 16)


QUANTISED = {
    # (what becomes of a projection's weight, quantization_config or None where it was left out)
    "fp8": (as_fp8, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}),
    "fp8_leftover": (as_fp8, None), "int8_leftover": (as_int8, None), "gptq_leftover": (as_gptq, None),
    "nf4_leftover": (as_nf4, None),
}


def quantise(source, folder, method):
    """A copy of a model's folder with its projections in the form of QUANTISED."""
    shutil.copytree(source, folder)
    change, quantization_config = QUANTISED[method]
    tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            change(tensors, name, weight)
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if quantization_config:
        config["quantization_config"] = quantization_config
        (folder / "model.safetensors").write_bytes(b"")  # nothing that could be read
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# ----------------------------------------------------------------------------------------------------
# 2. Documents


def documents_of(tokenizer, lengths):
    """One text for each length: so many tokens, the end token that training adds among them."""
    rng, texts = random.Random(0), []
    words = "seven small pencils cost three dollars each and Tom gives away what is left of them".split()
    for length in lengths:
        while True:
            text = " ".join(rng.choices(words, k=rng.randint(1, length)))
            if len(tokenizer(text, add_special_tokens=False)["input_ids"]) == length - 1:
                texts.append(text)
                break
    return texts


def write_texts(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def pieces(tokenizer, texts):
    """[(input_ids (1, T), labels (T,))], a document each: labels are the next tokens, -100 at the end."""
    found = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        found.append((torch.tensor([ids]), torch.tensor([*ids[1:], -100])))
    return found


def padded(documents):
    """The documents as rows of one batch, padded on the right."""
    width = max(ids.shape[1] for ids, _ in documents)
    pad = torch.nn.functional.pad
    ids = [pad(ids[0], (0, width - ids.shape[1])) for ids, _ in documents]
    labels = [pad(labels, (0, width - len(labels)), value=-100) for _, labels in documents]
    return {"input_ids": torch.stack(ids), "labels": torch.stack(labels)}


# ----------------------------------------------------------------------------------------------------
# 3. Runs of the scripts


@contextlib.contextmanager
def open_driver():
    """Starts kinds_driver.py; yields a function that sends a request and returns a CompletedProcess."""
    env = {key: value for key, value in os.environ.items() if key not in TORCHRUN_VARIABLES}
    driver = subprocess.Popen(
        [sys.executable, str(REPO / "tests" / "kinds_driver.py")], text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, env=env | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})

    def ask(folder, argv, **request):
        folder.mkdir(exist_ok=True)
        request |= {"cwd": str(folder), "argv": list(map(str, argv))}
        driver.stdin.write(json.dumps(request) + "\n")
        driver.stdin.flush()
        code = driver.stdout.readline()
        assert code, f"kinds_driver.py has ended: {driver.wait(10)}"
        texts = [(folder / name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(argv, int(code), *texts)

    try:
        yield ask
    finally:
        driver.stdin.close()
        driver.wait(60)


def train_once(ask, folder, source, texts, *flags):
    """train_llm.py in `folder`/run: one step that sees all texts and, its rate being 0, changes nothing."""
    write_texts(folder / "texts.jsonl", texts)
    return ask(folder, [
        "--hf-model", source, "--dataset", "texts.jsonl", "--data-cache", folder.parent / "cache",
        "--checkpoint-dir", "run", "--seq-len", SEQ_LEN, "--batch-size", len(texts), "--max-steps", 1,
        "--warmup-steps", 0, "--max-lr", 0, "--grad-clip", 0, "--no-mixed-precision",
        "--loss-chunk-tokens", 24, "--device", "cpu", *flags], script="train_llm")


def reinforce_once(ask, folder, source):
    """train_gsm8k_fsdp2.py in `folder`/run: one step, 3 local rollouts of each of 4 prompts."""
    rows = [{"question": "Tom has 3 pencils" + " and 4 more" * i + "?", "answer": "#### 7"} for i in range(4)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ask(folder, [
        "--model", source, "--dataset", "questions.jsonl", "--checkpoint-dir", "run", "--system-prompt", "",
        "--max-prompt-tokens", 64, "--batch-size", 4, "--group-size", 3,
        "--max-new-tokens", MAX_NEW_TOKENS, "--train-steps", 1, "--zero-variance", "keep", "--eval-limit", 0,
        "--device", "cpu", "--no-mixed-precision", "--no-export"], script="train_gsm8k_fsdp2")


def refusal(result, script="train_llm.py"):
    """The one line on stderr, warnings of transformers aside."""
    assert result.returncode == 1, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip() and "[transformers]" not in line]
    assert len(lines) == 1 and lines[0].startswith(f"{script}: error: "), result.stderr
    return lines[0]


# ----------------------------------------------------------------------------------------------------
# 4. What transformers computes


def load(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits_of(model, ids):
    """Of one document; xLSTM takes only multiples of its chunk."""
    chunk = model.config.chunk_size if model.config.model_type == "xlstm" else 1
    padded_ids = torch.nn.functional.pad(ids, (0, -ids.shape[1] % chunk))
    return model(padded_ids, use_cache=False).logits[:, :ids.shape[1]].float()


def loss_sum(model, documents):
    """Summed loss of transformers' logits, each document by itself, and the number of trained tokens."""
    losses = [torch.nn.functional.cross_entropy(
        logits_of(model, ids)[0].double(), labels, ignore_index=-100, reduction="sum")
        for ids, labels in documents]
    return sum(losses), sum((labels != -100).sum().item() for _, labels in documents)


def check_against(source, folder, result, documents, loss=1e-5):
    """`check_trained` with the loss of transformers' logits, each document by itself."""
    model = load(source)
    total, count = loss_sum(model, documents)
    check_trained(folder, result, total / count, model, loss)


def check_trained(folder, result, expected, model, loss=1e-5, grads=1e-4, shown=None):
    """A finished run, with the gradients of `expected`, the mean loss of transformers' `model`, and with its
    value, or `shown`, as train/loss.

    The gradients are read from Adam's first moment in the checkpoint."""
    assert result.returncode == 0, result.stdout + result.stderr
    expected.backward()
    found = read_metrics(folder / "run")[0]["train/loss"]
    shown = expected.item() if shown is None else shown
    assert abs(found - shown) <= loss * abs(shown), (found, shown)
    saved = read_checkpoint(folder / "run" / "checkpoints" / "step_000001")
    suffix, params = ".exp_avg", model.named_parameters(remove_duplicate=False)
    moments = {key.removesuffix(suffix): value for key, value in saved.items() if key.endswith(suffix)}
    expected_grads = {name: param.grad for name, param in params}
    largest = max(grad.abs().max() for grad in expected_grads.values() if grad is not None)
    assert moments and largest > 0
    for key, moment in moments.items():
        name = next(name for name in expected_grads if key.endswith("." + name))
        grad = expected_grads[name] if expected_grads[name] is not None else torch.zeros_like(moment)
        difference = (10 * moment - grad).abs().max()  # 1 / (1 - beta1)
        assert difference <= grads * largest, f"{name}: gradient {difference / largest:.1e} off"


def check_rollouts(source, folder, result):
    """Logged logprobs against a full forward of transformers, each completion by itself."""
    assert result.returncode == 0, result.stdout + result.stderr
    logs = (folder / "run").glob("*rollouts.rank*.jsonl")
    groups = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    rows = [(group["prompt_ids"], completion) for group in groups for completion in group["completions"]]
    model, lengths = load(source), {len(completion["ids"]) for _, completion in rows}
    assert len(rows) == 12 and len(lengths) > 2, "rows that end alike prove little"
    assert len({len(prompt) for prompt, _ in rows}) == 4
    for prompt, completion in rows:
        ids, start = torch.tensor([prompt + completion["ids"]]), len(prompt)
        with torch.no_grad():
            logprobs = torch.log_softmax(logits_of(model, ids)[0, start - 1:-1], dim=-1)
        expected = logprobs.gather(1, ids[0, start:, None])[:, 0]
        error = (torch.tensor(completion["logprobs"]) - expected).abs().max()
        assert error < 1e-4, f"logprobs {error:.1e} off"
        assert completion["ids"][-1] in ENDS or len(completion["ids"]) == MAX_NEW_TOKENS
    assert read_metrics(folder / "run")[0]["train/mismatch_kl"] < 1e-6
