"""The real command against a plain PyTorch loop: every loss, every gradient and the weights of 20 steps.

The loop here shares nothing with the script but the initial weights and the order of samples: one process,
whole logits, F.cross_entropy, for-loop AdamW, clipping and schedule by their formulas, the models of
transformers, and batches that are tokenised and packed a second time. Each document goes through the model
alone, so that neither padding nor a neighbour in a pack could have an influence; the script must agree
although it pads and packs.
"""

import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import ENGLISH, make_hf_model, make_tokenizer, read_checkpoint, read_metrics
from quick_runs import quick_ranks

import train_llm

STEPS, WARMUP, MAX_LR, MIN_LR, DECAY, SEED, BATCH = 20, 3, 1e-3, 1e-4, 0.1, 7, 8
BETAS, EPS, IGNORE = (0.9, 0.95), 1e-8, -100
VOCAB, SEQ_LEN = 512, 64
slow = pytest.mark.slow


# ----------------------------------------------------------------------------------------------------
# 1. Data, written a second time


def write_texts(path):
    """Texts from one to some hundred words, so that several end in one sequence and one spans several."""
    rows = [{"text": " ".join(ENGLISH[(3 * i + j) % 4] for j in range(1 + i * i % 7))} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_chats(path):
    """Chats with few to hundreds of trained tokens; two whose prompt alone fills a sequence, two whose answer
    is cut, and every seventh with two answers."""
    rows = []
    for i in range(45):
        question = " ".join([ENGLISH[i % 3]] * (8 if i in (11, 30) else 1))
        answer = " ".join(f"{ENGLISH[(i + j) % 4].split()[j % 5]} {i * j}" for j in range(1 + i * i % 17))
        answer = " ".join([answer] * (20 if i in (3, 25) else 1))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if i % 7 == 0:
            messages += [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "It is so."}]
        if i % 5 == 0:
            messages.insert(0, {"role": "system", "content": "Be brief."})
        rows.append({"messages": messages})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text_stream(tokenizer, path, split_documents):
    """Sequences of SEQ_LEN tokens cut from all texts in a row; each a list of (input ids, labels).

    With `split_documents`, a sequence is what it holds of each document; nothing is learned across an end.
    """
    ids, labels, ends = [], [], set()
    for line in path.read_text().splitlines():
        document = [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
        ids += document
        labels += [*document[1:], IGNORE]
        ends.add(len(ids))
    if not split_documents:
        labels = [*ids[1:], IGNORE]
    samples = []
    for start in range(0, len(ids) - 1, SEQ_LEN):
        stop = min(start + SEQ_LEN, len(ids) - 1)
        cuts = [start, *(end for end in sorted(ends) if split_documents and start < end < stop), stop]
        samples.append([(ids[a:b], labels[a:b]) for a, b in zip(cuts, cuts[1:])])
    return samples


def chat_documents(tokenizer, path, default_system):
    """(input ids, labels) of each chat in ChatML: the assistant's words and the end of its turn are trained.

    Each part is tokenised alone: special tokens and line breaks stand between them, which no token spans.
    """
    documents = []
    for line in path.read_text().splitlines():
        messages = json.loads(line)["messages"]
        if default_system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": "You are a helpful assistant."}, *messages]
        ids, targets = [], []
        for message in messages:
            trained = message["role"] == "assistant"
            parts = (f"<|im_start|>{message['role']}\n", message["content"] + "<|im_end|>", "\n")
            for number, part in enumerate(parts):
                piece = tokenizer(part, add_special_tokens=False)["input_ids"]
                ids += piece
                targets += piece if trained and number == 1 else [IGNORE] * len(piece)
        labels = [*targets[1:], IGNORE][:SEQ_LEN]
        if set(labels) != {IGNORE}:  # else the prompt alone fills the sequence: nothing to train on
            documents.append((ids[:SEQ_LEN], labels))
    return documents


def best_fit(documents):
    """Best-fit decreasing, looking at every open bin; of equally tight ones, that which was filled last."""
    bins = []  # [room, when it was filled last, documents]
    for time, i in enumerate(sorted(range(len(documents)), key=lambda i: (-len(documents[i][0]), i))):
        size = len(documents[i][0])
        fitting = [bin_ for bin_ in bins if bin_[0] >= size]
        if fitting:
            chosen = min(fitting, key=lambda bin_: (bin_[0], -bin_[1]))
        else:
            chosen = [SEQ_LEN, time, []]
            bins.append(chosen)
        chosen[0] -= size
        chosen[1] = time
        chosen[2].append(documents[i])
    return [bin_[2] for bin_ in bins]


# ----------------------------------------------------------------------------------------------------
# 2. The plain loop


def scratch_model():
    """transformers' Llama with the weights that the script's own model starts with."""
    c = train_llm.decoder_config(train_llm.MODEL_SIZES["test"], VOCAB, SEQ_LEN)
    start = train_llm.CausalLM(c)
    train_llm.init_from_scratch(start, SEED, torch.device("cpu"))
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=192, vocab_size=VOCAB, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(start.state_dict(), strict=False)
    assert not missing and not unexpected
    return model


def hf_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").train()


def rate(t):
    """Learning rate of update t = 1, 2, …: linear warm-up, then half a cosine, the last at the smallest."""
    if t <= WARMUP:
        return MAX_LR * t / WARMUP
    progress = (t - 1 - WARMUP) / (STEPS - 1 - WARMUP)
    return MIN_LR + (MAX_LR - MIN_LR) * 0.5 * (1 + math.cos(math.pi * progress))


def train_plainly(model, samples, grad_clip):
    """Rows of {loss, norm, tokens, gradients as the optimizer saw them}, and the final weights by name."""
    named = dict(model.named_parameters())
    embeddings = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    decayed = [p for p in named.values() if p.ndim == 2 and p not in embeddings]
    others = [p for p in named.values() if p.ndim != 2 or p in embeddings]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, foreach=False, fused=False)
    rows = []
    for t in range(1, STEPS + 1):
        loss_sum, count = 0.0, 0
        for position in range((t - 1) * BATCH, t * BATCH):
            for ids, labels in samples[train_llm.sample_at(position, len(samples), SEED)]:
                logits = model(input_ids=torch.tensor([ids])).logits[0]
                labels = torch.tensor(labels)
                loss_sum = loss_sum + F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
                count += int((labels != IGNORE).sum())
        loss = loss_sum / count
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in named.values()))
        if grad_clip and norm > grad_clip:
            for p in named.values():
                p.grad *= grad_clip / norm
        for group in optimizer.param_groups:
            group["lr"] = rate(t)
        optimizer.step()
        rows.append({"loss": loss.item(), "norm": norm, "tokens": count,
                     "grads": {name: p.grad.clone() for name, p in named.items()}})
    return rows, {name: p.detach().clone() for name, p in named.items()}


# ----------------------------------------------------------------------------------------------------
# 3. The command against the loop


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """{kind: (flags of the command, function that makes the model, samples)}."""
    folder = tmp_path_factory.mktemp("reference")
    load = transformers.AutoTokenizer.from_pretrained
    texts, chats = write_texts(folder / "texts.jsonl"), write_chats(folder / "chats.jsonl")
    plain, qwen = (make_tokenizer(folder / "plain", 500, bos=True),
                   make_tokenizer(folder / "qwen", 500, chat_template="qwen2"))
    gpt2, llama = make_hf_model("gpt2", folder / "gpt2"), make_hf_model("llama", folder / "llama", seed=1)
    make_tokenizer(gpt2, 500, chat_template="chatml_generation")
    scratch = ["--from-scratch", "--model-size", "test", "--vocab-size", VOCAB, "--tokenizer"]
    return {
        "text": ([*scratch, plain, "--dataset", texts], scratch_model,
                 text_stream(load(plain), texts, False)),
        "masked text, Llama": (["--hf-model", llama, "--dataset", texts], lambda: hf_model(llama),
                               text_stream(load(llama), texts, True)),
        "packed chats, tied GPT-2": (["--hf-model", gpt2, "--dataset", chats], lambda: hf_model(gpt2),
                                     best_fit(chat_documents(load(gpt2), chats, False))),
        "single chats": ([*scratch, qwen, "--dataset", chats, "--no-packing"], scratch_model,
                         [[document] for document in chat_documents(load(qwen), chats, True)]),
    }, folder


@pytest.fixture(scope="module")
def references(kinds):
    """What the plain loop gives for (kind, grad_clip), computed once."""
    known = {}

    def get(kind, grad_clip):
        if (kind, grad_clip) not in known:
            _, make_model, samples = kinds[0][kind]
            known[kind, grad_clip] = train_plainly(make_model(), samples, grad_clip)
        return known[kind, grad_clip]

    return get


def run_command(flags, run_dir, nproc, batch_size, accumulation, grad_clip):
    quick_ranks([
        *flags, "--seq-len", SEQ_LEN, "--batch-size", batch_size, "--grad-accum-steps", accumulation,
        "--max-steps", STEPS, "--warmup-steps", WARMUP, "--max-lr", MAX_LR, "--min-lr", MIN_LR,
        "--weight-decay", DECAY, "--grad-clip", grad_clip, "--seed", SEED, "--loss-chunk-tokens", 24,
        "--device", "cpu", "--no-mixed-precision", "--no-compile", "--checkpoint-dir", run_dir,
        "--data-cache", run_dir.parent / "cache", "--checkpoint-interval", 1, "--keep-checkpoints", 0,
        "--log-interval", 1, "--no-export",
    ], nproc, timeout=300)
    return read_metrics(run_dir), [run_dir / "checkpoints" / f"step_{t:06d}" for t in range(1, STEPS + 1)]


# Processes x --batch-size x --grad-accum-steps is BATCH in all; a --grad-clip of 0.3 clips every step.
@pytest.mark.parametrize(("kind", "nproc", "batch_size", "accumulation", "grad_clip"), [
    pytest.param("text", 1, 8, 1, 0.0, marks=slow),
    ("text", 2, 1, 4, 0.0),
    ("text", 2, 2, 2, 0.3),
    pytest.param("text", 1, 2, 4, 0.0, marks=slow),
    pytest.param("text", 2, 4, 1, 0.0, marks=slow),
    pytest.param("masked text, Llama", 2, 1, 4, 0.0, marks=slow),
    ("packed chats, tied GPT-2", 2, 1, 4, 0.0),
    pytest.param("packed chats, tied GPT-2", 1, 2, 4, 0.0, marks=slow),
    pytest.param("packed chats, tied GPT-2", 1, 8, 1, 0.3, marks=slow),
    pytest.param("packed chats, tied GPT-2", 2, 4, 1, 0.0, marks=slow),
    ("single chats", 1, 8, 1, 0.0),
    pytest.param("single chats", 2, 1, 4, 0.0, marks=slow),
    pytest.param("single chats", 1, 2, 4, 0.0, marks=slow),
    pytest.param("single chats", 2, 4, 1, 0.0, marks=slow),
])
def test_the_command_is_the_plain_loop(kinds, references, kind, nproc, batch_size, accumulation, grad_clip):
    run_dir = kinds[1] / f"{kind}-{nproc}-{batch_size}-{accumulation}-{grad_clip}".replace(" ", "-")
    expected, weights = references(kind, grad_clip)
    rows, checkpoints = run_command(kinds[0][kind][0], run_dir, nproc, batch_size, accumulation, grad_clip)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))

    residuals = [row["train/loss"] / e["loss"] - 1 for row, e in zip(rows, expected)]
    assert max(map(abs, residuals)) < 1e-5
    assert abs(sum(residuals) / STEPS) < 2e-6  # not merely close, but not shifted to one side
    assert [row["train/grad_norm"] for row in rows] == pytest.approx([e["norm"] for e in expected], rel=1e-5)
    rates = [rate(t) for t in range(1, STEPS + 1)]
    assert [row["train/lr"] for row in rows] == pytest.approx(rates, rel=1e-12)
    tokens = [e["tokens"] for e in expected]
    assert [row["train/tokens"] for row in rows] == [sum(tokens[:t]) for t in range(1, STEPS + 1)]
    assert [row["samples"] for row in rows] == [BATCH * t for t in range(1, STEPS + 1)]

    # Each checkpoint's first moment is 0.9 times the last one's plus 0.1 times the gradient.
    moments = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
    for path, e in zip(checkpoints, expected):
        saved = read_checkpoint(path)
        largest = max(float(grad.abs().max()) for grad in e["grads"].values())
        for name, grad in e["grads"].items():
            before, moments[name] = moments[name], saved[f"optim.{name}.exp_avg"].double()
            error = ((moments[name] - BETAS[0] * before) / (1 - BETAS[0]) - grad).abs().max()
            assert error < 1e-5 * largest, f"{path.name}: gradient of {name}"

    # Entries whose gradient is zero but for rounding (the bias of GPT-2's keys cancels in the softmax) are
    # left out: Adam makes whole steps of a rounding error's sign. They are few, and the losses include them.
    assert {name for name in saved if name.startswith("model.")} == {f"model.{name}" for name in weights}
    start, num_left_out = dict(kinds[0][kind][1]().named_parameters()), 0
    for name, weight in weights.items():
        difference = saved[f"model.{name}"] - weight
        rounding = (saved[f"optim.{name}.exp_avg_sq"].sqrt() < 1e-7 * largest) & (difference != 0)
        difference.masked_fill_(rounding, 0)
        assert difference.norm() < 1e-4 * (weight - start[name]).norm(), name
        num_left_out += int(rounding.sum())
    assert num_left_out < 1e-2 * sum(weight.numel() for weight in weights.values())


# ----------------------------------------------------------------------------------------------------
# 4. The formulas by themselves


@pytest.mark.parametrize(("step", "expected"), [
    (0, 1e-4), (1, 2e-4), (9, 1e-3),  # warm-up by a tenth of the largest rate an update
    (10, 1e-3), (60, 5.5e-4), (110, 1e-4),  # cosine: its ends and its middle
    (35, 1e-4 + 4.5e-4 * (1 + math.sqrt(0.5))), (85, 1e-4 + 4.5e-4 * (1 - math.sqrt(0.5))),
    (200, 1e-4),  # beyond the end it stays
])
def test_learning_rate_has_known_values(step, expected):
    assert train_llm.learning_rate(step, 111, 10, 1e-3, 1e-4) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("total", [1, 2, 3, 10])
@pytest.mark.parametrize("warmup", [0, 1, 2, 10])
def test_learning_rate_of_short_runs_stays_in_bounds(total, warmup):
    rates = [train_llm.learning_rate(step, total, min(warmup, total), 1e-3, 1e-4) for step in range(total)]
    assert all(0 < value <= 1e-3 for value in rates)
    assert rates[min(warmup, total - 1)] == 1e-3 or warmup >= total  # the peak comes right after the warm-up
    if total - min(warmup, total) > 1:
        assert rates[-1] == pytest.approx(1e-4)


def head_case(bias, seed=0):
    """Hidden states (B, T, D), head, and labels (B, T) of which a third is not trained."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 7, 16, generator=generator)
    head = torch.nn.Linear(16, 50, bias=bias)
    for param in head.parameters():
        param.data.normal_(generator=generator)
    labels = torch.randint(0, 50, (3, 7), generator=generator)
    labels.view(-1)[::3] = IGNORE
    return hidden, head, labels


def loss_and_gradients(loss_of, hidden, head):
    """The loss, and the gradients of 0.37 times it: what multiplies a loss must reach the gradients."""
    hidden = hidden.clone().requires_grad_()
    loss = loss_of(hidden)
    return loss, torch.autograd.grad(0.37 * loss, [hidden, *head.parameters()])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 7, 20, 21, 1000])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.25, 0.0), (1.0, 5.0), (2.0, 3.0)])
def test_chunked_loss_is_the_whole_loss(bias, chunk, scale, cap):
    hidden, head, labels = head_case(bias)

    def whole(hidden):
        logits = head(hidden).double() * scale
        logits = cap * torch.tanh(logits / cap) if cap else logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")

    def chunked(hidden):
        def loss_fn(*inputs):
            return train_llm.head_loss(*inputs, scale=scale, cap=cap)

        return train_llm.chunked_loss(hidden, labels, head, loss_fn, chunk)[0]

    expected, expected_grads = loss_and_gradients(whole, hidden, head)
    loss, grads = loss_and_gradients(chunked, hidden, head)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert grad.shape == expected_grad.shape
        assert (grad - expected_grad).abs().max() < 2e-6 * expected_grad.abs().max()
    with torch.no_grad():  # as in an evaluation
        torch.testing.assert_close(chunked(hidden), loss.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_chunked_loss_without_a_single_trained_token(bias):
    hidden, head, labels = head_case(bias)
    labels.fill_(IGNORE)
    loss, grads = loss_and_gradients(
        lambda h: train_llm.chunked_loss(h, labels, head, train_llm.head_loss, 4)[0], hidden, head)
    assert loss == 0
    assert all(torch.count_nonzero(grad) == 0 for grad in grads)  # zeros, not NaN


def test_chunked_loss_of_a_head_that_is_not_trained():
    hidden, head, labels = head_case(True)
    whole = partial(F.cross_entropy, target=labels.flatten(), ignore_index=IGNORE, reduction="sum")
    _, (expected, *_) = loss_and_gradients(lambda h: whole(head(h).flatten(0, 1)), hidden, head)
    head.requires_grad_(False)
    hidden.requires_grad_()
    train_llm.chunked_loss(hidden, labels, head, train_llm.head_loss, 4)[0].mul(0.37).backward()
    torch.testing.assert_close(hidden.grad, expected)
    assert head.weight.grad is None


def test_chunked_loss_of_bf16_logits_is_summed_in_fp32():
    hidden, head, labels = head_case(True)
    hidden, head = hidden.bfloat16(), head.bfloat16()
    with torch.no_grad():
        loss, _ = train_llm.chunked_loss(hidden, labels, head, train_llm.head_loss, 4)
        logits = torch.cat([head(rows) for rows in hidden.flatten(0, 1).split(4)]).double()
    expected = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


# What is decayed, by a look at the names: the matrices of the blocks, and an output layer of its own.
@pytest.mark.parametrize(("make_model", "is_decayed"), [
    (scratch_model, lambda name: "proj" in name or "lm_head" in name),
    (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2)),
     lambda name: "c_" in name and name.endswith("weight")),
])
def test_weight_decay_is_on_matrices_only(make_model, is_decayed):
    model = make_model()
    optimizer = train_llm.build_optimizer(model, SimpleNamespace(weight_decay=0.3, max_lr=1e-3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert len(decay) == len(named) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert {name: decay[id(p)] for name, p in named.items()} == {
        name: 0.3 if is_decayed(name) else 0.0 for name in named}
    assert {group["betas"] for group in optimizer.param_groups} == {BETAS}
