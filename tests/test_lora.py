"""LoRA: losses, adapters and gradients are those of PEFT, the frozen weights cost what they should, and
exports load."""

import json
import shutil
import subprocess
import sys
import zlib
from types import SimpleNamespace

import embedding_models as em
import pytest
import real_model as real
import torch
import torch.nn.functional as F
import train_llm
from helpers import REPO, make_hf_model, read_checkpoint, read_metrics, run_script
from model_runs import pieces_of, training_flags, write_documents
from quick_runs import error_line, quick_ranks, quick_run
from safetensors.torch import load_file
from test_embedding import check_gradients, run_driver

sys.path.insert(0, str(REPO / "tools"))
FLAGS = ["--lora-rank", 4, "--max-lr", "1e-2", "--min-lr", "1e-2", "--max-steps", 4]
EMBEDDER = "examples/train_embedding_fsdp2.py"
ATTENTION, MLP = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}


def first_adapters(model, seed=0):
    """What `init_lora` promises: A uniform within 1 / sqrt(inputs), each drawn from its name; B zero."""
    for name, param in model.named_parameters():
        if ".lora_" in name:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            bound = param.shape[1] ** -0.5 if ".lora_A." in name else 0.0
            param.data.uniform_(-bound, bound, generator=generator)


def train_with_peft(source, pieces, targets, rank, lr, num_steps):
    """(model, losses): PEFT's layers, transformers' logits, torch's AdamW on all pieces, each by itself."""
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).train()
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=sorted(targets))
    peft.inject_adapter_in_model(config, model)
    first_adapters(model)
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.1), []
    count = sum((labels != -100).sum().item() for _, labels in pieces)
    for _ in range(num_steps):
        optimizer.zero_grad()
        losses.append(0.0)
        for ids, labels in pieces:
            logits = model(ids, use_cache=False).logits[0]
            loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / count
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return model, losses


def losses_of(run_dir):
    return [row["train/loss"] for row in read_metrics(run_dir) if "train/loss" in row]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """{family: folder with a model in source/ and texts.jsonl}, made when asked for."""
    made = {}

    def place(family):
        if family not in made:
            from transformers import AutoTokenizer
            made[family] = tmp_path_factory.mktemp(family)
            source = make_hf_model(family, made[family] / "source", tie=family == "llama")
            write_documents(made[family] / "texts.jsonl", AutoTokenizer.from_pretrained(source))
        return made[family]

    return place


def flags_for(place, run_dir, nproc, *more):
    return ["--hf-model", place / "source", *training_flags(place, nproc), *FLAGS, "--mask-documents",
            "--checkpoint-dir", run_dir, *more]


# ----------------------------------------------------------------------------------------------------
# 1. Against PEFT

# Experts' weights are no linear layers, and a router is not trained. Mixtral goes through the broadcast.
@pytest.mark.parametrize("family, targets, nproc", [
    ("llama", ATTENTION | MLP, 1), ("llama", ATTENTION | MLP, 2), ("mixtral", ATTENTION, 2)])
def test_losses_and_adapters_are_those_of_peft(places, tmp_path, family, targets, nproc):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = places(family)
    pieces = pieces_of(place / "texts.jsonl", AutoTokenizer.from_pretrained(place / "source"))
    wanted, losses = train_with_peft(place / "source", pieces, targets, 4, 1e-2, 4)
    result = quick_ranks(flags_for(place, tmp_path, nproc), nproc)[0]
    assert losses_of(tmp_path) == pytest.approx(losses, rel=1e-5) and losses[-1] < 0.95 * losses[0]
    config = json.loads((tmp_path / "hf/adapter_config.json").read_text())
    assert {path.rpartition(".")[2] for path in config["target_modules"]} == targets
    assert config["base_model_name_or_path"] == str(place / "source")
    assert "reloaded: logits within" in result.stdout and "with --lora-merge puts" in result.stdout
    base = AutoModelForCausalLM.from_pretrained(place / "source")
    loaded = PeftModel.from_pretrained(base, tmp_path / "hf")
    found = {name.removeprefix("base_model.model."): param for name, param in loaded.named_parameters()}
    for name, param in wanted.named_parameters():
        assert torch.allclose(found[name], param, rtol=1e-3, atol=2e-5), name


@pytest.mark.slow
def test_a_real_model(tmp_path):
    """SmolLM2 on GSM8K in fp32: loss as PEFT's, and AdamW's states less than full fine-tuning."""
    from transformers import AutoTokenizer

    source = real.real_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = real.short_rows(tokenizer, 4)
    real.write_rows(tmp_path / "chats.jsonl", rows)
    flags = ["--hf-model", source, "--dataset", tmp_path / "chats.jsonl", "--data-cache", tmp_path / "cache",
             "--seq-len", real.SEQ_LEN, "--batch-size", 2, "--max-steps", 3, "--max-lr", "1e-3", "--min-lr",
             "1e-3", "--warmup-steps", 0, "--log-interval", 1, "--checkpoint-interval", 0, "--device", "cpu",
             "--no-compile", "--no-mixed-precision", "--checkpoint-dir"]
    env = {"MALLOC_MMAP_THRESHOLD_": "1048576"}  # or most of what is resident are holes in the heap
    run_script([*flags, tmp_path / "lora", "--lora-rank", 8], timeout=600, env=env)
    run_script([*flags, tmp_path / "full", "--no-export"], timeout=600, env=env)
    _, losses = train_with_peft(source, real.chat_pieces(tokenizer, rows), ATTENTION | MLP, 8, 1e-3, 3)
    assert losses_of(tmp_path / "lora") == pytest.approx(losses, rel=1e-5) and losses[-1] < 0.95 * losses[0]
    lora, full = (max(row["perf/peak_mem_gib"] for row in read_metrics(tmp_path / name) if "perf/peak_mem_gib"
                      in row) for name in ("lora", "full"))
    print(f"peak memory: LoRA {lora:.2f} GiB, full fine-tuning {full:.2f} GiB; losses {losses}")
    # The states are 1.0 GiB, those of the adapters 0.02. So small a model's gradients, 0.5 GiB, fit in the
    # memory that the activations leave in the backward.
    assert full - lora > 0.9


@pytest.mark.slow
def test_gradients_of_an_embedding_model(tmp_path):
    """Two ranks with a gradient cache against the whole batch, with adapters whose B is not zero."""
    model = str(em.make_embedder("qwen3", tmp_path / "qwen3"))
    specs = [{"name": f"lora_{case}", "model": model, "case": case, "flags": ["--lora-rank", "4"]}
             for case in ("cached", "matryoshka", "temperature")]
    for spec, found in zip(specs, run_driver(tmp_path, specs).values()):
        check_gradients(found, spec)
        assert all(".lora_" in name or "scale" in name for name in found["gradients"])


# ----------------------------------------------------------------------------------------------------
# 2. What is frozen costs nothing

def build(source):
    """(model on the meta device, args)."""
    args = SimpleNamespace(hf_model=str(source), trust_remote_code=False, seq_len=64, lora_rank=4,
                           lora_alpha=None, lora_targets=None, lora_dropout=0.0)
    return train_llm.build_model(args, source, 1), args


def test_plan_memory_counts_what_a_run_has(places):
    from plan_memory import memory_gib, sizes_of_hf

    model, args = build(places("llama") / "source")
    train_llm.add_lora(model, args, args.hf_model, "CAUSAL_LM", torch.bfloat16)
    nbytes = sum(param.numel() * train_llm.bytes_each(param) for param in model.parameters())
    sizes = sizes_of_hf(train_llm, args.hf_model, False)
    assert memory_gib(sizes, 1, 64, None, "full", lora_rank=4)["states"] * 2**30 == nbytes


def test_frozen_weights_are_in_the_compute_precision_and_have_no_gradient(places):
    model, args = build(places("mixtral") / "source")
    model.fp32_names = {"model.layers.0.mlp.gate.weight"}  # as some families have their routers
    train_llm.add_lora(model, args, "somebody/mixtral", "CAUSAL_LM", torch.bfloat16)
    for name, param in model.named_parameters():
        is_adapter = ".lora_" in name
        assert param.is_meta and param.requires_grad == is_adapter, name
        in_fp32 = is_adapter or name in model.fp32_names
        assert param.dtype == (torch.float32 if in_fp32 else torch.bfloat16), name
        assert train_llm.bytes_each(param) == (16 if is_adapter else 4 if in_fp32 else 2)


def test_a_frozen_head_has_no_gradient_and_none_is_kept():
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 5, 8, requires_grad=True), torch.nn.Linear(8, 11)
    labels = torch.randint(11, (2, 5))
    loss, _ = train_llm.chunked_loss(hidden, labels, head, train_llm.head_loss, 3)
    loss.backward()
    wanted, hidden.grad = hidden.grad.clone(), None
    head.requires_grad_(False)
    loss, _ = train_llm.chunked_loss(hidden, labels, head, train_llm.head_loss, 3)
    assert [tensor.shape for tensor in loss.grad_fn.saved_tensors] == [(10, 8)]
    loss.backward()
    assert torch.equal(hidden.grad, wanted)


def test_checkpoints_hold_the_adapters_alone_and_resume_on_other_ranks(places, tmp_path):
    place = places("llama")
    quick_ranks(flags_for(place, tmp_path / "straight", 2, "--checkpoint-interval", 2), 2)
    middle = tmp_path / "straight/checkpoints/step_000002"
    names = {name for name in read_checkpoint(middle) if not name.startswith("random.")}
    assert names and all(".lora_" in name for name in names)
    made = subprocess.run([sys.executable, REPO / "tools/export_hf.py", middle, tmp_path / "adapter"],
                          capture_output=True, text=True)
    assert made.returncode == 0 and "LoRA's adapters" in made.stdout, made.stderr
    found = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {f"model.{name.removeprefix('base_model.model.').replace('.weight', '.default.weight')}"
            for name in found} == {name for name in names if name.startswith("model.")}
    shutil.copytree(middle, tmp_path / "other/checkpoints/step_000002")
    quick_run(flags_for(place, tmp_path / "other", 1, "--checkpoint-interval", 2))
    assert losses_of(tmp_path / "other") == pytest.approx(losses_of(tmp_path / "straight")[2:], rel=1e-5)
    again = quick_run(flags_for(place, tmp_path / "other", 1, "--lora-rank", 2), code=1)
    assert "is of another run" in error_line(again) and "lora_rank 4 -> 2" in error_line(again)


# ----------------------------------------------------------------------------------------------------
# 3. Exports, and flags

def test_the_merged_export_is_the_model_with_its_adapters(places, tmp_path):
    """In the names of the family's files, on two ranks, of a run that has ended; layers that are named."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    place, more = places("mixtral"), ["--lora-targets", "q_proj,v_proj", "--lora-alpha", 3]
    quick_ranks(flags_for(place, tmp_path / "run", 2, *more), 2)
    shutil.copytree(tmp_path / "run/hf", tmp_path / "adapter")
    result = quick_ranks(flags_for(place, tmp_path / "run", 2, *more, "--lora-merge"), 2)[0]
    assert "reloaded: logits within" in result.stdout and "--hf-model" in result.stdout.split("next ")[1]
    again = quick_ranks(flags_for(place, tmp_path / "run", 2, *more, "--lora-merge"), 2)[0]
    assert "this run is finished" in again.stdout
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run/hf")
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "source"),
                                        tmp_path / "adapter")
    assert sum(".lora_A." in name for name, _ in adapter.named_parameters()) == 4
    ids = torch.arange(2, 42)[None]
    with torch.no_grad():
        found, wanted, before = merged(ids).logits, adapter(ids).logits, adapter.unload()(ids).logits
    assert torch.allclose(found, wanted, atol=1e-4) and not torch.allclose(found, before, atol=1e-2)


@pytest.mark.slow
def test_an_embedding_model(tmp_path):
    """Adapter and merged export give SentenceTransformer the same embeddings; resumed from its checkpoint."""
    from sentence_transformers import SentenceTransformer

    em.make_embedder("bert", tmp_path / "bert")
    em.write_pairs(tmp_path / "pairs.jsonl", em.make_pairs(16))
    flags = ["--model", tmp_path / "bert", "--dataset", tmp_path / "pairs.jsonl", "--device", "cpu",
             "--no-mixed-precision", "--max-steps", 4, "--batch-size", 4, "--seq-len", 64, "--lora-rank", 4,
             "--max-lr", "1e-2", "--learn-temperature", "--checkpoint-interval", 2, "--log-interval", 1,
             "--checkpoint-dir"]
    result = quick_ranks([*flags, tmp_path / "adapter"], 2, script=EMBEDDER)[0]
    assert "SentenceTransformer loads it" in result.stdout
    in_bf16 = quick_run([*flags, tmp_path / "bf16", "--mixed-precision"], script=EMBEDDER)
    assert "SentenceTransformer loads it" in in_bf16.stdout
    quick_ranks([*flags, tmp_path / "merged", "--lora-merge"], 2, script=EMBEDDER)
    texts = [row["query"] for row in em.make_pairs(5)]
    adapter, merged, before = (SentenceTransformer(str(folder), device="cpu").encode(
        texts, convert_to_tensor=True) for folder in (tmp_path / "adapter/hf", tmp_path / "merged/hf",
                                                      tmp_path / "bert"))
    assert torch.allclose(adapter, merged, atol=1e-5) and not torch.allclose(adapter, before, atol=1e-2)
    shutil.copytree(tmp_path / "adapter/checkpoints/step_000002", tmp_path / "other/checkpoints/step_000002")
    quick_run([*flags, tmp_path / "other", "--batch-size", 8], script=EMBEDDER)
    assert losses_of(tmp_path / "other") == pytest.approx(losses_of(tmp_path / "adapter")[2:], rel=1e-5)


@pytest.mark.parametrize("script", ["train_llm.py", EMBEDDER])
@pytest.mark.parametrize("flags, message", [
    (["--lora-alpha", 8], "need --lora-rank"),
    (["--lora-rank", 0], "--lora-rank must be at least 1, not 0"),
    (["--lora-rank", 4, "--lora-dropout", 1], "--lora-dropout must be at least 0 and below 1"),
])
def test_flags_that_cannot_work(script, flags, message):
    result = quick_run(flags, code=2, script=script)
    assert message in result.stderr


def test_layers_that_are_not_there_or_cannot_have_adapters(places, tmp_path):
    """The chunked loss would not see those of the head; GPT-2's layers are no nn.Linear."""
    for family, target, message in (("llama", "query", "Target modules {'query'} not found"),
                                    ("llama", "q_proj,lm_head", "of the blocks only"),
                                    ("gpt2", "c_attn", "of the blocks only")):
        result = quick_run(flags_for(places(family), tmp_path, 1, "--lora-targets", target), code=1)
        last = result.stderr.splitlines()[-1]  # PEFT warns of a tied head
        assert last.startswith("train_llm.py: error: --lora-targets: ") and message in last
    scratch = quick_run(["--from-scratch", "--tokenizer", REPO, "--dataset", REPO, "--lora-rank", 4], code=2)
    assert "needs --hf-model" in scratch.stderr
