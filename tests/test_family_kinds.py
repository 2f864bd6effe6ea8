"""Kinds of families that stopped or misled the scripts once, each against transformers itself.

The commands run to their end, in forks of one process that has imported everything, kinds_driver.py: a run
costs a second or two.
"""

import json

import pytest
import torch
import transformers
from family_kinds import (
    FULL, LENGTHS, QUANTISED, SEQ_LEN, check_against, check_rollouts, check_trained, documents_of, load,
    loss_sum, make_kind, open_driver, padded, pieces, quantise, refusal, reinforce_once, train_once,
    write_texts,
)
from helpers import read_metrics
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("kinds")


@pytest.fixture(scope="module")
def ask():
    with open_driver() as ask:
        yield ask


@pytest.fixture(scope="module")
def model_of(base):
    """The folder of a kind's model, made once."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = make_kind(kind, base)
        return made[kind]

    return make


@pytest.fixture(scope="module")
def tokenizer(model_of):
    return transformers.AutoTokenizer.from_pretrained(model_of("llama"))


@pytest.fixture(scope="module")
def train(ask, base, model_of, tokenizer):
    """`train_once` with a kind's model and documents of these lengths: (folder, result, documents)."""
    done = {}

    def run(kind, *flags, lengths=LENGTHS):
        key = (kind, *flags, *lengths)
        if key not in done:
            folder = base / f"train-{len(done)}"
            folder.mkdir()
            texts = documents_of(tokenizer, lengths)
            result = train_once(ask, folder, model_of(kind), texts, *flags)
            done[key] = folder, result, pieces(tokenizer, texts)
        return done[key]

    return run


@pytest.fixture(scope="module")
def reinforce(ask, base, model_of):
    """`reinforce_once` with a kind's model: (folder, result)."""

    def run(kind):
        folder = base / f"reinforce-{kind}"
        folder.mkdir()
        return folder, reinforce_once(ask, folder, model_of(kind))

    return run


# ----------------------------------------------------------------------------------------------------
# 1. How a family is built: blocks, decoder, buffers


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
def test_blocks_inside_blocks_are_sharded_once(train, model_of, kind):
    folder, result, documents = train(kind, "--no-packing")
    check_against(model_of(kind), folder, result, documents)


@pytest.mark.parametrize("kind", ["zamba", "zamba2"])
def test_a_block_shared_by_layers_trains_right_or_is_refused(train, model_of, kind):
    folder, result, documents = train(kind, "--no-packing")
    if result.returncode:
        assert "share" in refusal(result)
    else:
        check_against(model_of(kind), folder, result, documents)


def test_decoder_that_base_model_prefix_does_not_name(train, reinforce, model_of):
    folder, result, documents = train("llama4_text", "--batch-size", 2, lengths=FULL)
    check_against(model_of("llama4_text"), folder, result, documents)
    assert "whole logits" not in result.stdout
    folder, result = reinforce("llama4_text")
    check_rollouts(model_of("llama4_text"), folder, result)


# Falcon-H1's decoder fills its layers' buffers; RWKV computes with its parameters where it initialises them.
@pytest.mark.parametrize("kind", ["falcon_h1", "rwkv"])
def test_buffers_are_filled_whoever_fills_them(train, model_of, kind):
    folder, result, documents = train(kind, "--no-packing")
    check_against(model_of(kind), folder, result, documents)


# ----------------------------------------------------------------------------------------------------
# 2. Packing: documents that see each other are refused in one line, whatever the reason


@pytest.mark.parametrize("kind", ["bloom", "mamba"])
def test_family_that_takes_no_mask_is_refused_for_packing_like_any_other(train, kind):
    line = refusal(train("mamba2")[1])
    assert "--no-packing" in line
    assert refusal(train(kind)[1]) == line


def test_family_that_takes_no_mask_trains_without_packing(train, model_of):
    folder, result, documents = train("bloom", "--no-packing")
    check_against(model_of("bloom"), folder, result, documents)


def test_padding_does_not_switch_rotary_factors(train, model_of):
    lengths = [16] * 5  # four fill a sample, the fifth stands in front of 49 tokens of padding
    folder, result, documents = train("longrope", "--batch-size", 2, lengths=lengths)
    source = load(model_of("longrope"))
    with torch.no_grad():
        ids = documents[0][0]
        short = source(ids, use_cache=False).logits
        long = source(torch.nn.functional.pad(ids, (0, SEQ_LEN - 16)), use_cache=False).logits[:, :16]
    assert not torch.allclose(short, long, rtol=1e-2), "the factors make no difference"
    check_against(model_of("longrope"), folder, result, documents)


# ----------------------------------------------------------------------------------------------------
# 3. bf16: what transformers keeps in fp32


BIASED = ["deepseek_v3", "glm4_moe", "ernie4_5_moe", "hunyuan_v1_moe"]


@pytest.mark.parametrize("kind", [*BIASED, "mamba2"])
def test_bf16_step_computes_as_transformers_does(ask, base, model_of, tokenizer, kind):
    folder, batch = base / f"bf16-{kind}", padded(pieces(tokenizer, documents_of(tokenizer, LENGTHS)))
    folder.mkdir()
    torch.save(batch, folder / "batch.pt")
    flags = [] if kind in BIASED else ["--no-packing"]
    argv = ["--hf-model", model_of(kind), "--seq-len", SEQ_LEN, "--loss-chunk-tokens", 24, *flags]
    result = ask(folder, argv, call="bf16_step")
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["masters"] == ["torch.float32"]

    source = load(model_of(kind), torch.bfloat16)
    logits = source(batch["input_ids"], use_cache=False).logits.float().flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"].flatten())
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-3)
    expected.backward()
    grads = [param.grad.float() for param in source.parameters() if param.grad is not None]
    assert found["norm"] == pytest.approx(torch.nn.utils.get_total_norm(grads).item(), rel=2e-2)
    held = {name: str(tensor.dtype) for name, tensor in source.state_dict().items()}
    kept = {name for name, dtype in held.items() if dtype == "torch.float32"}
    assert bool(kept) == (kind in BIASED)
    assert kept <= found["computed"].keys()
    assert {name: found["computed"][name] for name in held if name in found["computed"]} == {
        name: dtype for name, dtype in held.items() if name in found["computed"]}


@pytest.mark.parametrize("kind", BIASED)
def test_bf16_export_is_what_transformers_saves(train, base, model_of, kind):
    folder, result, _ = train(kind, "--mixed-precision", "--batch-size", 2, lengths=FULL)
    assert result.returncode == 0, result.stdout + result.stderr
    load(model_of(kind), torch.bfloat16).save_pretrained(base / f"saved-{kind}")
    expected = load_file(base / f"saved-{kind}" / "model.safetensors")
    found = load_file(folder / "run" / "hf" / "model.safetensors")
    assert "torch.float32" in map(str, {tensor.dtype for tensor in expected.values()})
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in expected.items()}
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# ----------------------------------------------------------------------------------------------------
# 4. Loss: a soft cap under another name, a loss of the router


def test_soft_cap_under_an_unknown_name_is_found_token_by_token(train, model_of):
    folder, result, documents = train("xlstm", "--no-packing", lengths=[16, 48, 32, 48])
    check_against(model_of("xlstm"), folder, result, documents, loss=1e-6)
    assert result.stdout.count("whole logits") == 1


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "jetmoe"])
def test_loss_of_the_router_is_in_training_and_not_in_evaluation(train, model_of, kind):
    folder, result, documents = train(
        kind, "--no-packing", "--eval-split", "texts.jsonl", lengths=[24] * 4)  # nothing is padded
    model, ids = load(model_of(kind)), torch.cat([ids for ids, _ in documents])
    out = model(ids, labels=ids, use_cache=False)
    total, count = loss_sum(model, documents)
    alone = (total / count).item()
    assert out.loss.item() == pytest.approx(alone + 0.5 * out.aux_loss.item(), rel=1e-6)
    check_trained(folder, result, out.loss, model, shown=alone)  # train/loss is cross-entropy alone
    row = read_metrics(folder / "run")[-1]
    assert row["eval/loss"] == pytest.approx(alone, rel=1e-5)


# ----------------------------------------------------------------------------------------------------
# 5. Local rollouts


HYBRIDS = ["qwen3_next", "jamba", "bamba", "lfm2", "falcon_h1", "mamba2"]


@pytest.mark.parametrize("kind", ["llama", "falcon", *HYBRIDS])
def test_rollouts_are_right(reinforce, model_of, kind):
    folder, result = reinforce(kind)
    check_rollouts(model_of(kind), folder, result)


def test_rollouts_of_a_family_without_such_a_cache_are_refused_before_training(reinforce):
    folder, result = reinforce("rwkv")
    assert "--rollouts" in refusal(result, "train_gsm8k_fsdp2.py")
    assert not list((folder / "run").glob("*.jsonl"))


# ----------------------------------------------------------------------------------------------------
# 6. Quantised weights


@pytest.mark.parametrize("script", ["train_llm", "train_gsm8k_fsdp2"])
@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_weights_are_refused(ask, base, model_of, method, script):
    folder = base / f"{script}-{method}"
    folder.mkdir()
    quantise(model_of("llama"), folder / "source", method)
    write_texts(folder / "texts.jsonl", ["seven small pencils"] * 8)
    (folder / "questions.jsonl").write_text(json.dumps({"question": "1+2?", "answer": "#### 3"}) + "\n")
    flags = {"train_llm": ["--hf-model", "source", "--dataset", "texts.jsonl", "--seq-len", SEQ_LEN],
             "train_gsm8k_fsdp2": ["--model", "source", "--dataset", "questions.jsonl", "--eval-limit", 0,
                                   "--max-new-tokens", 8, "--train-steps", 1,
                                   "--max-prompt-tokens", 200]}
    result = ask(folder, [*flags[script], "--device", "cpu", "--checkpoint-dir", "run"], script=script)
    line = refusal(result, script + ".py")
    assert "quantised" in line
    assert "rank 0 loads" not in result.stdout
