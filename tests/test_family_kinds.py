"""Kinds of families that stopped or misled the scripts once, each against transformers itself.

The commands run to their end, in forks of one process that has imported everything, kinds_driver.py: a run costs
a second or two. First loss and gradients come from metrics.jsonl and from Adam's first moment in the checkpoint.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from family_kinds import (
    ENDS, QUANTISED, SEQ_LEN, documents_of, make_kind, padded, pieces, quantise, write_texts,
)
from helpers import REPO, TORCHRUN_VARIABLES, read_checkpoint, read_metrics
from safetensors.torch import load_file

LENGTHS = [9, 23, 40, 17, 31, 12]  # of the documents, in tokens
FULL = [20, 44, 30, 34]  # fill two samples: no document is cut
MAX_NEW_TOKENS = 14


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("kinds")


@pytest.fixture(scope="module")
def model_of(base):
    """Folder of the small random model of a kind, made once."""
    made = {}
    return lambda kind: made.setdefault(kind, None) or made.update({kind: make_kind(kind, base)}) or made[kind]


@pytest.fixture(scope="module")
def tokenizer(model_of):
    return transformers.AutoTokenizer.from_pretrained(model_of("llama"))


@pytest.fixture(scope="module")
def ask(base):
    """Sends a request to kinds_driver.py; a CompletedProcess when it has ended."""
    env = {key: value for key, value in os.environ.items() if key not in TORCHRUN_VARIABLES}
    driver = subprocess.Popen(
        [sys.executable, str(REPO / "tests" / "kinds_driver.py")], text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, env=env | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})

    def send(folder, argv, **request):
        folder.mkdir(exist_ok=True)
        request |= {"cwd": str(folder), "argv": list(map(str, argv))}
        driver.stdin.write(json.dumps(request) + "\n")
        driver.stdin.flush()
        code = int(driver.stdout.readline())
        texts = [(folder / name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(argv, code, *texts)

    yield send
    driver.stdin.close()
    driver.wait(60)


@pytest.fixture(scope="module")
def train(ask, base, model_of, tokenizer):
    """Runs train_llm.py once for each kind and flags, for one step that sees all documents and changes nothing."""
    done = {}

    def run(kind, *flags, lengths=LENGTHS):
        key = "-".join(map(str, [kind, *flags, *lengths])).replace("/", "_")
        if key not in done:
            folder = base / f"train-{len(done)}"
            folder.mkdir()
            texts = documents_of(tokenizer, lengths)
            write_texts(folder / "texts.jsonl", texts)
            result = ask(folder, [
                "--hf-model", model_of(kind), "--dataset", "texts.jsonl", "--data-cache", base / "cache",
                "--checkpoint-dir", "run", "--seq-len", SEQ_LEN, "--batch-size", len(lengths),
                "--max-steps", 1, "--warmup-steps", 0, "--max-lr", 0, "--grad-clip", 0, "--no-mixed-precision",
                "--loss-chunk-tokens", 24, "--device", "cpu", *flags], script="train_llm")
            done[key] = folder, result, pieces(tokenizer, texts)
        return done[key]

    return run


@pytest.fixture(scope="module")
def reinforce(ask, base, model_of):
    """Runs train_gsm8k_fsdp2.py once for each kind: one step with local rollouts."""
    done, questions = {}, base / "questions.jsonl"
    rows = [{"question": "Tom has 3 pencils" + " and 4 more" * more + "?", "answer": "#### 7"} for more in range(4)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(kind):
        if kind not in done:
            folder = base / f"reinforce-{kind}"
            result = ask(folder, [
                "--model", model_of(kind), "--dataset", questions, "--checkpoint-dir", "run",
                "--system-prompt", "", "--prompt-format", "plain", "--max-prompt-tokens", 64, "--batch-size", 4, "--group-size", 3,
                "--max-new-tokens", MAX_NEW_TOKENS, "--train-steps", 1, "--zero-variance", "keep",
                "--eval-limit", 0, "--device", "cpu", "--no-mixed-precision", "--no-export"],
                script="train_gsm8k_fsdp2")
            done[kind] = folder, result
        return done[kind]

    return run


def load(folder, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits_of(model, ids):
    """Of transformers, for a document or two; xLSTM takes only multiples of its chunk."""
    chunk = model.config.chunk_size if model.config.model_type == "xlstm" else 1
    padded = torch.nn.functional.pad(ids, (0, -ids.shape[1] % chunk))
    return model(padded, use_cache=False).logits[:, :ids.shape[1]].float()


def loss_sum(model, documents):
    """Summed loss of transformers' logits, each document by itself, and the number of trained tokens."""
    losses = [torch.nn.functional.cross_entropy(
        logits_of(model, ids)[0].double(), labels, ignore_index=-100, reduction="sum")
        for ids, labels in documents]
    return sum(losses), sum((labels != -100).sum().item() for _, labels in documents)


def check_trained(folder, result, expected, model, loss=1e-5, grads=1e-4):
    """A finished run whose loss and gradients are those of `expected`, the mean loss of transformers' `model`."""
    assert result.returncode == 0, result.stdout + result.stderr
    expected.backward()
    row = read_metrics(folder / "run")[0]
    assert row["train/loss"] == pytest.approx(expected.item(), rel=loss)
    saved = read_checkpoint(folder / "run" / "checkpoints" / "step_000001")
    names = {name: param.grad for name, param in model.named_parameters(remove_duplicate=False)}
    found = {key: 10 * value for key, value in saved.items() if key.endswith(".exp_avg")}  # 1 / (1 - beta1)
    assert found, sorted(saved)
    largest = max(grad.abs().max() for grad in names.values() if grad is not None)
    for key, value in found.items():
        name = next(name for name in names if key.split(".exp_avg")[0].endswith(name))
        grad = names[name] if names[name] is not None else torch.zeros_like(value)
        assert (value - grad).abs().max() <= grads * largest, name


def check_against(source, folder, result, documents, loss=1e-5):
    """`check_trained` with the loss of transformers' logits, each document by itself."""
    model = load(source)
    total, count = loss_sum(model, documents)
    check_trained(folder, result, total / count, model, loss)


def refusal(result, script="train_llm.py"):
    """The one line on stderr, warnings of transformers aside."""
    assert result.returncode == 1, result.stdout + result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip() and "[transformers]" not in line]
    assert len(lines) == 1 and lines[0].startswith(f"{script}: error: "), result.stderr
    return lines[0]


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


def test_buffers_that_a_parent_fills(train, model_of):
    folder, result, documents = train("falcon_h1", "--no-packing")
    check_against(model_of("falcon_h1"), folder, result, documents)


# ----------------------------------------------------------------------------------------------------
# 2. Packing: documents that see each other are refused in one line, whatever the reason


@pytest.mark.parametrize("kind", ["bloom", "mamba"])
def test_family_that_takes_no_mask_is_refused_for_packing_like_any_other(train, kind):
    line = refusal(train("rwkv")[1])
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


@pytest.mark.parametrize("kind", [*BIASED, "mamba2", "minimax"])
def test_bf16_step_computes_as_transformers_does(ask, base, model_of, tokenizer, kind):
    folder, batch = base / f"bf16-{kind}", padded(pieces(tokenizer, documents_of(tokenizer, LENGTHS)))
    folder.mkdir()
    torch.save(batch, folder / "batch.pt")
    flags = [] if kind in BIASED else ["--no-packing"]
    result = ask(folder, ["--hf-model", model_of(kind), "--seq-len", SEQ_LEN, "--loss-chunk-tokens", 24, *flags],
                 call="bf16_step")
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["masters"] == ["torch.float32"]

    source = load(model_of(kind), torch.bfloat16)
    logits = source(batch["input_ids"], use_cache=False).logits.float().flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"].flatten())
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-3)
    held = {name: str(tensor.dtype) for name, tensor in source.state_dict().items()}
    kept = {name for name, dtype in held.items() if dtype == "torch.float32"}
    assert bool(kept) == (kind in BIASED)
    assert kept <= found["computed"].keys()
    assert {name: found["computed"][name] for name in held if name in found["computed"]} == {
        name: dtype for name, dtype in held.items() if name in found["computed"]}


@pytest.mark.parametrize("kind", BIASED)
def test_bf16_export_is_what_transformers_saves(train, base, model_of, kind):
    folder, result, _ = train(kind, "--export-dtype", "bfloat16", "--batch-size", 2, lengths=FULL)
    assert result.returncode == 0, result.stdout + result.stderr
    load(model_of(kind), torch.bfloat16).save_pretrained(base / f"saved-{kind}")
    expected, found = (load_file(path / "model.safetensors") for path in (base / f"saved-{kind}", folder / "run/hf"))
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


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_loss_of_the_router_is_in_training_and_not_in_evaluation(train, model_of, kind):
    folder, result, documents = train(
        kind, "--no-packing", "--eval-split", "texts.jsonl", lengths=[24] * 4)  # nothing is padded
    model, ids = load(model_of(kind)), torch.cat([ids for ids, _ in documents])
    out = model(ids, labels=ids, use_cache=False)
    total, count = loss_sum(model, documents)
    alone = (total / count).item()
    assert out.loss.item() == pytest.approx(alone + 0.5 * out.aux_loss.item(), rel=1e-6)
    check_trained(folder, result, out.loss, model)
    row = read_metrics(folder / "run")[-1]
    assert row["eval/loss"] == pytest.approx(alone, rel=1e-5)


# ----------------------------------------------------------------------------------------------------
# 5. Local rollouts


@pytest.mark.parametrize("kind", ["llama", "qwen3_next", "jamba", "bamba", "lfm2", "falcon_h1", "mamba2"])
def test_rollouts_of_linear_attention_are_right(reinforce, model_of, kind):
    folder, result = reinforce(kind)
    check_rollouts(model_of(kind), folder, result)


def test_rollouts_of_a_family_without_such_a_cache_are_refused_before_training(reinforce):
    folder, result = reinforce("rwkv")
    assert "--rollouts" in refusal(result, "train_gsm8k_fsdp2.py")
    assert not list((folder / "run").glob("*.jsonl"))


def check_rollouts(source, folder, result):
    """Logged logprobs against a full forward of transformers, each completion by itself."""
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [json.loads(line) for path in (folder / "run").glob("*rollouts.rank*.jsonl") for line in path.open()]
    model, lengths = load(source), {len(row["completion_ids"]) for row in rows}
    assert len(rows) == 12 and len(lengths) > 3, "rows that end alike prove little"
    assert len({len(row["prompt_ids"]) for row in rows}) == 4
    for row in rows:
        ids, start = torch.tensor([row["prompt_ids"] + row["completion_ids"]]), len(row["prompt_ids"])
        with torch.no_grad():
            logprobs = torch.log_softmax(logits_of(model, ids)[0, start - 1:-1], dim=-1)
        expected = logprobs.gather(1, ids[0, start:, None])[:, 0]
        assert (torch.tensor(row["logprobs"]) - expected).abs().max() < 1e-4
        is_end = row["completion_ids"][-1] in ENDS
        assert is_end or len(row["completion_ids"]) == MAX_NEW_TOKENS
    assert read_metrics(folder / "run")[0]["train/mismatch_kl"] < 1e-6


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
                                   "--prompt-format", "plain", "--max-new-tokens", 8, "--train-steps", 1,
                                   "--max-prompt-tokens", 200]}
    result = ask(folder, [*flags[script], "--device", "cpu", "--checkpoint-dir", "run"], script=script)
    line = refusal(result, script + ".py")
    assert "quantised" in line
    assert "rank 0 loads" not in result.stdout
