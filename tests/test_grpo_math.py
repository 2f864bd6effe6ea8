"""Logprobs, rollouts, advantages and losses of train_gsm8k_fsdp2.py (sections 4, 6, 8), function by function.

What is compared with is never the script's own code: per-token loops over Python numbers written from the
papers' formulas, transformers' own logits and `generate`, published values.
"""

import copy
import itertools
import math
import os
import random
import zlib

import pytest
import torch
import train_gsm8k_fsdp2 as script
from grpo_models import flags, make_digit_tokenizer, make_policy, make_questions
from helpers import TORCHRUN_VARIABLES, read_checkpoint, read_metrics
from quick_runs import quick_ranks
from train_gsm8k_fsdp2 import Completion, Group, Sampling, Sequence, UserError

V = 61
LOSSES = ["grpo", "dapo", "dr_grpo", "gspo"]
CPU = torch.device("cpu")
SIZES = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
             intermediate_size=48, max_position_embeddings=128, initializer_range=0.2, pad_token_id=None,
             attention_dropout=0.0)
# Family: (configuration class of transformers, its arguments). GPT-2 has neither RMS norms nor rotary tables,
# which transformers computes in fp32 always: its copy in fp64 is exact to fp64.
FAMILIES = {
    "gpt2": ("GPT2Config", dict(vocab_size=V, n_embd=32, n_layer=2, n_head=2, n_positions=128, attn_pdrop=0.0,
                                embd_pdrop=0.0, resid_pdrop=0.0, initializer_range=0.2)),
    "qwen2": ("Qwen2Config", dict(SIZES, tie_word_embeddings=False)),
    "qwen2_tied": ("Qwen2Config", dict(SIZES, tie_word_embeddings=True)),
    "qwen2_window": ("Qwen2Config", dict(
        SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "mistral": ("MistralConfig", dict(SIZES, sliding_window=4)),
    "gemma2": ("Gemma2Config", dict(SIZES, head_dim=16, query_pre_attn_scalar=16, sliding_window=6,
                                    final_logit_softcapping=2.0)),
    "granite": ("GraniteConfig", dict(SIZES, logits_scaling=3.0)),
    "cohere": ("CohereConfig", dict(SIZES, logit_scale=0.25)),
    # Its head has a bias.
    "phi": ("PhiConfig", dict(SIZES, num_key_value_heads=2, resid_pdrop=0.0, embd_pdrop=0.0)),
}


def attach(model, chunk):
    script.attach_logprobs(model)
    model.chunk = chunk


def make_model(family, seed=0):
    import transformers

    name, arguments = FAMILIES[family]
    config = getattr(transformers, name)(**arguments, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, param in model.named_parameters():
            if name.endswith("bias"):  # zero in a new model, where a forgotten one would not show
                torch.nn.init.normal_(param, std=0.3)
    return model


def parse(*flags):
    return script.parse_args([str(flag) for flag in flags])


def close(found, expected, bound):
    """Largest difference at most `bound` of the largest expected value."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    difference = (torch.as_tensor(found, dtype=torch.float64) - expected).abs().max()
    return bool(difference <= bound * expected.abs().max())


def far(found, expected):
    """Length of the difference over the expected length."""
    return ((found - expected).norm() / expected.norm()).item()


def gradients(model):
    """All in one, in fp64; a tied parameter stands there once."""
    return torch.cat([param.grad.double().flatten() for param in model.parameters()])


@torch.no_grad()
def logprobs_of(model, prompt_ids, completion_ids, temperature):
    """Of each token of a completion, by the logits of a plain transformers model, the sequence by itself."""
    logits = model(torch.tensor([prompt_ids + completion_ids])).logits[0, len(prompt_ids) - 1:-1].double()
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    return logprobs[torch.arange(len(completion_ids)), completion_ids].tolist()


# ----------------------------------------------------------------------------------------------------
# 1. Advantages and losses against loops over tokens

def naive_advantages(rewards, kind):
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((value - mean) ** 2 for value in rewards) / (len(rewards) - 1))
    return [(value - mean) / (1 if kind == "dr_grpo" else std + 1e-4) for value in rewards]


def naive_surrogate(ratio, advantage, low, high):
    """PPO's min(r A, clip(r) A), by cases; (value, whether it is the clipped one)."""
    if advantage > 0 and ratio > 1 + high:
        return (1 + high) * advantage, True
    if advantage < 0 and ratio < 1 - low:
        return (1 - low) * advantage, True
    return ratio * advantage, False


def naive_sequence(kind, tokens, advantage, low, high, kl_coef, cap):
    """(summed loss of a sequence's tokens, how many are clipped). `tokens`: now, old, sampler, reference."""
    weights = [min(math.exp(old - sampler), cap) if cap else 1.0 for _, old, sampler, _ in tokens]
    if kind == "gspo":  # one ratio and one clip for the sequence: the loss of each token is the same
        mean_log_ratio = sum(now - old for now, old, _, _ in tokens) / len(tokens)
        value, is_clipped = naive_surrogate(mean_log_ratio.exp(), advantage, low, high)
        loss, num_clipped = -sum(weights) * value, is_clipped * len(tokens)
    else:
        loss = num_clipped = 0
        for weight, (now, old, _, _) in zip(weights, tokens):
            value, is_clipped = naive_surrogate((now - old).exp(), advantage, low, high)
            loss, num_clipped = loss - weight * value, num_clipped + is_clipped
    for now, _, _, reference in tokens:
        loss = loss + kl_coef * ((reference - now).exp() - (reference - now) - 1)
    return loss, num_clipped


def naive_loss(kind, groups, low, high, kl_coef, cap, max_tokens):
    """(loss, share of clipped tokens) of groups [(rewards, completions)]; a completion is None (masked) or a
    list of tokens (logprob now, old, sampler's, reference's), the first of them a tensor with gradient."""
    total, num_sequences, num_tokens, num_clipped = 0, 0, 0, 0
    for rewards, completions in groups:
        for advantage, tokens in zip(naive_advantages(rewards, kind), completions):
            if tokens is None:
                continue
            loss, clipped = naive_sequence(kind, tokens, advantage, low, high, kl_coef, cap)
            num_sequences, num_tokens = num_sequences + 1, num_tokens + len(tokens)
            num_clipped += clipped
            if kind in ("grpo", "gspo"):
                loss = loss / len(tokens)
            elif kind == "dr_grpo":
                loss = loss / max_tokens
            total = total + loss
    return total / (num_tokens if kind == "dapo" else num_sequences), num_clipped / num_tokens


def random_groups(seed=0, num_groups=5, group_size=4):
    """Groups with completions of 1 to 9 tokens without logprobs yet; one group has no variance."""
    rng, groups = random.Random(seed), []
    for position in range(num_groups):
        prompt = [rng.randrange(V) for _ in range(rng.randint(1, 6))]
        group = Group(position, position, 0, prompt, [])
        for sample in range(group_size):
            ids = [rng.randrange(V) for _ in range(rng.randint(1, 9))]
            group.completions.append(Completion(ids, [], "length" if rng.random() < 0.25 else "stop"))
            group.rewards.append(1.0 if position == 0 else rng.choice([0.0, 1.0, 1.1]))
            group.correct.append(group.rewards[-1] >= 1)
        groups.append(group)
    assert any(map(script.has_variance, groups)) and not all(map(script.has_variance, groups))
    return groups


@pytest.mark.parametrize("kind", LOSSES)
def test_group_advantages(kind):
    generator = torch.Generator().manual_seed(1)
    rewards = torch.rand(7, 5, dtype=torch.float64, generator=generator).round(decimals=1)
    rewards[3] = 0.5  # without variance: all advantages are 0
    found = script.group_advantages(rewards, kind)
    expected = torch.tensor([naive_advantages(row, kind) for row in rewards.tolist()], dtype=torch.float64)
    assert close(found, expected, 1e-12) and not found[3].any()


def test_importance_weights():
    old = torch.tensor([-1.0, -1.0, -1.0, -60.0], dtype=torch.float64)
    sampler = torch.tensor([-1.0, -1.5, -3.0, -0.1], dtype=torch.float64)
    found = script.importance_weights(old, sampler, 2.0).tolist()
    assert found == pytest.approx([1.0, math.exp(0.5), 2.0, math.exp(-59.9)], rel=1e-12)
    assert script.importance_weights(old, sampler, 0).tolist() == [1.0] * 4


@pytest.mark.parametrize("kl_coef, cap", [(0.0, 0.0), (0.0, 1.3), (0.2, 1.3)])
@pytest.mark.parametrize("kind", LOSSES)
def test_policy_loss_against_a_loop(kind, kl_coef, cap):
    """Loss and gradient in fp64; clipped on both sides and left alone where the clip does not bite."""
    generator = torch.Generator().manual_seed(2)
    groups = random_groups(seed=3, num_groups=9)
    kept = [c.finish == "stop" for group in groups for c in group.completions]
    lengths = [len(c.ids) for group in groups for c in group.completions]
    num = sum(lengths)
    advantages = script.group_advantages(torch.tensor([g.rewards for g in groups], dtype=torch.float64), kind)
    counted = torch.tensor(kept).repeat_interleave(torch.tensor(lengths))

    def near(logprobs, scale):
        return logprobs + scale * torch.randn(num, dtype=torch.float64, generator=generator)

    old = -3 * torch.rand(num, dtype=torch.float64, generator=generator)
    low, high = script.CLIP[kind]
    now = near(old, 1e-3 if kind == "gspo" else 0.4).requires_grad_()
    sampler, reference = near(old, 0.3), near(old, 0.3)
    sequence = torch.arange(sum(kept)).repeat_interleave(
        torch.tensor([length for length, keep in zip(lengths, kept) if keep]))
    batch = {"old_logprobs": old[counted], "weights": script.importance_weights(old, sampler, cap)[counted],
             "advantages": advantages.flatten().repeat_interleave(torch.tensor(lengths))[counted],
             "sequence": sequence, "num_sequences": torch.tensor(sum(kept)),
             "ref_logprobs": reference[counted], "counted": torch.ones(len(sequence), dtype=torch.float64)}
    loss_sum, found = script.policy_loss(kind, now[counted], batch, (low, high), kl_coef, 20)
    loss = loss_sum / (len(sequence) if kind == "dapo" else sum(kept))
    grad, = torch.autograd.grad(loss, now)

    leaf = now.detach().requires_grad_()
    tokens = iter(zip(leaf, old.tolist(), sampler.tolist(), reference.tolist()))
    flat = [list(itertools.islice(tokens, length)) for length in lengths]
    flat = [completion if keep else None for completion, keep in zip(flat, kept)]
    naive = [(group.rewards, flat[4 * i:4 * i + 4]) for i, group in enumerate(groups)]
    expected, clipped_frac = naive_loss(kind, naive, low, high, kl_coef, cap, 20)
    expected_grad, = torch.autograd.grad(expected, leaf)
    assert close(loss.detach(), expected.detach(), 1e-12) and close(grad, expected_grad, 1e-12)
    assert found["clipped"].double().mean().item() == pytest.approx(clipped_frac)

    ratio, positive = found["ratio"], batch["advantages"] > 0
    for outside, clips in ((ratio > 1 + high, positive), (ratio < 1 - low, batch["advantages"] < 0)):
        assert (outside & clips & found["clipped"]).any() and not (outside & clips & ~found["clipped"]).any()
        assert (outside & ~clips).any() and not (outside & ~clips & found["clipped"]).any()
    if cap:
        assert (batch["weights"] == cap).any() and (batch["weights"] < 1).any()


def with_sampler_logprobs(groups, model, temperature):
    """The groups as a sampler would have drawn them that differs from the trainer, more than any real one."""
    rng = random.Random(4)
    for group in groups:
        for completion in group.completions:
            exact = logprobs_of(model, group.prompt_ids, completion.ids, temperature)
            completion.logprobs = [value + rng.gauss(0, 0.3) for value in exact]
    return groups


def micro_batches(groups, args, world_size=2):
    """Of all ranks, one after another: gradients add up over them as they do over processes."""
    sequences = script.to_sequences(script.choose_groups(groups, args.zero_variance), args.loss,
                                    args.mask_truncated)
    hands = script.deal(sequences, world_size, args.micro_batch_tokens)
    return [script.collate(hand, CPU) for hand in itertools.chain(*hands)]


def summed_gradients(model, batches, args):
    """(loss, gradient, totals) of an update before the optimizer, as main() puts them together."""
    totals = torch.zeros(6 + script.RATIO_BINS, dtype=torch.float64)
    model.zero_grad()
    losses = [backward(script.micro_batch_loss(model, batch, args, totals)) for batch in batches]
    count = sum(script.loss_denominator(batch, args.loss) for batch in batches)
    return torch.stack(losses).double().sum() / count, gradients(model) / count, totals


def backward(loss):
    loss.backward()
    return loss.detach()


def naive_tokens(model, group, completion, temperature):
    """[(logprob, entropy)] with gradient, one sequence at a time, by transformers' logits."""
    ids = torch.tensor([group.prompt_ids + completion.ids])
    logits = model(ids).logits[0, len(group.prompt_ids) - 1:-1]
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    return [(row[token], -(row.exp() * row).sum().item()) for row, token in zip(logprobs, completion.ids)]


def models_for(kind):
    """(flags, model, a reference somewhat away from it, groups) of a batch with everything in it."""
    args = parse("--loss", kind, "--updates-per-batch", 3, "--kl-coef", 0.05, "--tis-cap", 1.3,
                 "--temperature", 0.7, "--mask-truncated", "--zero-variance", "keep", "--max-new-tokens", 12,
                 "--micro-batch-tokens", 60)
    model, reference = make_model("gpt2"), make_model("gpt2")
    with torch.no_grad():
        for param in reference.parameters():
            param.add_(0.005 * torch.randn(param.shape, generator=torch.Generator().manual_seed(5)))
    return args, model, reference, with_sampler_logprobs(random_groups(), model, args.temperature)


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_and_gradients_through_a_model(kind):
    """Three updates on a batch: at each, loss, gradient and statistics against fp64 and loops."""
    args, model, reference, groups = models_for(kind)
    # The script's own part, from the logits on, stays in fp32.
    model, reference = model.double(), reference.double()
    exact, exact_reference = copy.deepcopy(model), copy.deepcopy(reference)
    attach(model, 7)
    attach(reference, 7)
    batches = micro_batches(groups, args)
    script.add_old_logprobs(model, reference, batches, args)
    old = [[logprobs_of(exact, g.prompt_ids, c.ids, 0.7) for c in g.completions] for g in groups]
    first = [[logprobs_of(exact_reference, g.prompt_ids, c.ids, 0.7) for c in g.completions] for g in groups]

    for update in range(3):
        loss, grad, totals = summed_gradients(model, batches, args)
        tokens = [[naive_tokens(exact, g, c, 0.7) for c in g.completions] for g in groups]
        naive = [(g.rewards, [None if c.finish == "length" else
                              list(zip([now for now, _ in tokens[i][j]], old[i][j], c.logprobs, first[i][j]))
                              for j, c in enumerate(g.completions)]) for i, g in enumerate(groups)]
        expected, clipped_frac = naive_loss(kind, naive, args.clip_low, args.clip_high, 0.05, 1.3, 12)
        exact.zero_grad()
        expected.backward()
        assert abs(loss - expected.item()) < 1e-6
        assert close(grad, gradients(exact), 1e-6) and far(grad, gradients(exact)) < 1e-6

        kept = [token for _, completions in naive for c in completions for token in c or ()]
        entropies = [entropy for i, g in enumerate(groups) for j, c in enumerate(g.completions)
                     for _, entropy in tokens[i][j] if c.finish == "stop"]
        check_stats(script.update_stats(totals.tolist()), kept, entropies, clipped_frac)
        assert clipped_frac == 0 if update == 0 else 0 < clipped_frac < 1
        step_both(model, exact, grad, 0.1 if kind == "gspo" else 0.5)


@pytest.mark.parametrize("kind", LOSSES)
def test_in_fp32_the_error_is_that_of_the_model(kind):
    """A model in fp32 has an error of its own, about 1e-6: chunks and micro-batches add nothing to it."""
    args, model, reference, groups = models_for(kind)
    grads = {}
    for name in ("script", "plain", "exact"):
        # As main() calls them: with `rows`, and each a copy, which `attach_logprobs` changes.
        pair = [copy.deepcopy(each).to(torch.float64 if name == "exact" else torch.float32)
                for each in (model, reference)]
        calls = pair if name == "script" else [WithLogprobs(each) for each in pair]
        if name == "script":
            for each in pair:
                attach(each, 7)
        batches = micro_batches(groups, args)
        script.add_old_logprobs(*calls, batches, args)
        with torch.no_grad():
            for param in pair[0].parameters():  # the policy moves, its old logprobs stay
                param.add_(0.003 * torch.randn(param.shape, generator=torch.Generator().manual_seed(13)))
        grads[name] = summed_gradients(calls[0], batches, args)[1]
    assert far(grads["script"], grads["exact"]) < 5e-7 + 1.5 * far(grads["plain"], grads["exact"]) < 1e-5


class WithLogprobs(torch.nn.Module):
    """The call of `attach_logprobs` by transformers' whole logits, in the model's own precision."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, rows, targets, temperature):
        logprobs = torch.log_softmax(self.model(input_ids).logits.flatten(0, 1)[rows] / temperature, dim=-1)
        return logprobs[torch.arange(len(rows)), targets], -(logprobs.exp() * logprobs).sum(-1).detach()


def step_both(model, exact, grad, length):
    """Go `length` against the gradient; both models have bitwise the same parameters."""
    with torch.no_grad():
        parts = (grad * length / grad.norm()).split([param.numel() for param in model.parameters()])
        for param, twin, part in zip(model.parameters(), exact.parameters(), parts):
            param -= part.view_as(param)
            twin.copy_(param)


def check_stats(stats, tokens, entropies, clipped_frac):
    def mean(values):
        return sum(values) / len(tokens)

    mismatches = [old - sampler for _, old, sampler, _ in tokens]
    to_reference = [first - now.item() for now, _, _, first in tokens]
    expected = {"train/entropy": mean(entropies), "train/clip_frac": clipped_frac,
                "train/mismatch_kl": mean(math.exp(d) - d - 1 for d in mismatches),
                "train/tis_capped_frac": mean(math.exp(d) > 1.3 for d in mismatches),
                "train/ref_kl": mean(math.exp(d) - d - 1 for d in to_reference)}
    assert 0 < expected["train/tis_capped_frac"] < 1
    ratios = sorted(math.exp(min(1, max(-1, now.item() - sampler))) for now, _, sampler, _ in tokens)
    for percent in (1, 50, 99):
        expected[f"train/ratio_p{percent:02d}"] = ratios[math.ceil(percent / 100 * len(ratios)) - 1]
    assert stats.keys() == expected.keys()
    for key, value in expected.items():
        assert stats[key] == pytest.approx(value, rel=1e-3 if "ratio" in key else 2e-5, abs=1e-7), key


def test_one_update_a_batch_needs_no_old_logprobs():
    """Then the policy before the batch is the policy: ratio 1, nothing clipped, and only advantages count."""
    args = parse("--zero-variance", "keep", "--tis-cap", 0)
    model = make_model("gpt2")
    groups = with_sampler_logprobs(random_groups(), model, 1.0)
    model = model.double()
    exact = copy.deepcopy(model)
    attach(model, 512)
    batches = micro_batches(groups, args, world_size=1)
    script.add_old_logprobs(model, None, batches, args)
    assert not any({"old_logprobs", "ref_logprobs"} & batch.keys() for batch in batches)
    loss, grad, totals = summed_gradients(model, batches, args)
    plain = sum(-advantage * sum(now for now, _ in naive_tokens(exact, group, c, 1.0)) / len(c.ids) / 20
                for group in groups
                for advantage, c in zip(naive_advantages(group.rewards, "grpo"), group.completions))
    plain.backward()
    assert far(grad, gradients(exact)) < 1e-6
    stats = script.update_stats(totals.tolist())
    assert stats["train/clip_frac"] == stats["train/ref_kl"] == 0
    assert stats["train/tis_capped_frac"] == 0  # without a cap


def test_an_update_that_is_not_finite_is_counted_and_not_a_crash():
    """The optimizer leaves such an update out: what comes before it has to live until then."""
    batch = script.collate([Sequence([1, 2, 3], 1, [-1.0, -1.0], 1.0)], CPU)
    totals = torch.zeros(6 + script.RATIO_BINS, dtype=torch.float64)
    logprobs = torch.tensor([math.nan, -1.0], requires_grad=True)
    loss = script.micro_batch_loss(lambda *call: (logprobs, torch.zeros(2)), batch, parse(), totals)
    loss.backward()
    assert not torch.isfinite(loss)


# ----------------------------------------------------------------------------------------------------
# 2. However the sequences are split

def random_sequences(num, seed=0, longest=30):
    rng = random.Random(seed)
    found = []
    for _ in range(num):
        num_prompt, num_new = rng.randint(1, longest // 2), rng.randint(1, longest // 2)
        found.append(Sequence([rng.randrange(V) for _ in range(num_prompt + num_new)], num_prompt,
                              [-3 * rng.random() for _ in range(num_new)], rng.gauss(0, 1)))
    return found


@pytest.mark.parametrize("num_sequences", [0, 1, 2, 7, 40])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_deal(world_size, num_sequences):
    sequences = random_sequences(num_sequences)
    for max_tokens in (1, 35, 100, 10**6):
        hands = script.deal(sequences, world_size, max_tokens)
        assert len(hands) == world_size and len({len(hand) for hand in hands}) == 1 and hands[0]
        dealt = [s for hand in hands for micro_batch in hand for s in micro_batch]
        assert sorted(map(id, dealt)) == sorted(map(id, sequences))
        for micro_batch in itertools.chain(*hands):
            padded = len(micro_batch) * max((len(s.ids) for s in micro_batch), default=0)
            assert padded <= max_tokens or len(micro_batch) == 1
        counts = [sum(map(len, hand)) for hand in hands]
        assert max(counts) - min(counts) <= 1
        # To and fro: no rank has more to do than another by more than one sequence.
        lengths = [sum(len(s.ids) for micro_batch in hand for s in micro_batch) for hand in hands]
        assert max(lengths) - min(lengths) <= max((len(s.ids) for s in sequences), default=0)
        # As few as the budget allows where one rank has everything that fits.
        if max_tokens == 10**6:
            assert len(hands[0]) == 1


def test_collate():
    sequences = random_sequences(9)
    batch = script.collate(sequences, CPU)
    tokens, found = [], 0
    for i, sequence in enumerate(sequences):
        assert batch["input_ids"][i, :len(sequence.ids)].tolist() == sequence.ids
        for t in range(sequence.num_prompt, len(sequence.ids)):
            row = batch["rows"][found].item()
            # A token is predicted by what stands in front of it.
            assert divmod(row, batch["input_ids"].shape[1]) == (i, t - 1)
            logprob = sequence.sampler_logprobs[t - sequence.num_prompt]
            tokens.append((sequence.ids[t], i, sequence.advantage, logprob))
            found += 1
    keys = ("targets", "sequence", "advantages", "sampler_logprobs")
    assert torch.equal(torch.stack([batch[key].double() for key in keys], 1), torch.tensor(tokens).double())
    assert batch["count"].tolist() == [9, found] and batch["counted"].tolist() == [1.0] * found


@pytest.mark.parametrize("kind", LOSSES)
def test_split_order_padding_and_ranks_do_not_matter(kind):
    args = parse("--loss", kind, "--updates-per-batch", 2, "--kl-coef", 0.05, "--temperature", 0.7,
                 "--max-new-tokens", 15)
    model, reference = make_model("qwen2_tied"), make_model("qwen2_tied", seed=1)
    attach(model, 16)
    attach(reference, 16)
    sequences, found = random_sequences(13), []
    generator = torch.Generator().manual_seed(6)
    shift = [0.01 * torch.randn(param.shape, generator=generator) for param in model.parameters()]
    splits = [(1, 10**6), (1, 1), (1, 70), (2, 70), (3, 10**6), (5, 35), (16, 100)]
    for i, (world_size, max_tokens) in enumerate(splits):
        random.Random(i).shuffle(sequences)
        hands = script.deal(sequences, world_size, max_tokens)
        batches = [script.collate(hand, CPU) for hand in itertools.chain(*hands)]
        script.add_old_logprobs(model, reference, batches, args)
        with torch.no_grad():  # away from the old policy for the update, and back
            for param, change in zip(model.parameters(), shift):
                param += change
        found.append(summed_gradients(model, batches, args))
        with torch.no_grad():
            for param, change in zip(model.parameters(), shift):
                param -= change
    loss, grad, totals = found[0]
    assert 0 < totals[2] < totals[0]  # some are clipped, some are not
    for other_loss, other_grad, other_totals in found[1:]:
        assert abs(other_loss - loss) < 1e-6 * abs(loss)
        assert far(other_grad, grad) < 1e-6
        assert close(other_totals[:6], totals[:6], 1e-6)


def test_empty_micro_batches_do_not_count():
    args = parse("--kl-coef", 0.1)
    model = make_model("qwen2")
    attach(model, 16)
    for kind in LOSSES:
        args.loss = kind
        batches = [script.collate([], CPU)]
        script.add_old_logprobs(model, model, batches, args)
        batches[0]["ref_logprobs"] -= 1.0
        totals = torch.zeros(6 + script.RATIO_BINS, dtype=torch.float64)
        model.zero_grad()
        assert backward(script.micro_batch_loss(model, batches[0], args, totals)) == 0
        assert script.loss_denominator(batches[0], kind) == 0
        assert not totals.any() and not gradients(model).any()
        assert script.update_stats(totals.tolist()) == {}


STEPS = 3


def run_on(folder, world_size, kind):
    """(rows of metrics, {name: tensor} of the last weights) of the real command on 6 questions a step."""
    run = f"{kind}-{world_size}"
    more = ["--batch-size", 6 // world_size, "--train-steps", STEPS, "--loss", kind, "--updates-per-batch", 2,
            "--kl-coef", 0.1, "--max-lr", 3e-4, "--temperature", 1.2, "--mask-truncated", "--no-export",
            "--micro-batch-tokens", 400 // world_size, "--keep-checkpoints", 1]
    quick_ranks(flags(folder, run, world_size, *more), world_size, cwd=folder, timeout=300,
                script="train_gsm8k_fsdp2.py")
    saved = read_checkpoint(folder / run / "checkpoints" / f"step_{STEPS:06d}")
    weights = {key: value for key, value in saved.items() if key.startswith("model.")}
    return read_metrics(folder / run), weights


@pytest.fixture(scope="module")
def folder_of_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    make_policy(folder / "policy")
    make_questions(folder / "questions")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind, world_sizes", [("grpo", (1, 2, 3)), ("dapo", (1, 3)), ("dr_grpo", (1, 2)),
                                               ("gspo", (1, 3))])
def test_number_of_processes_does_not_matter(folder_of_runs, kind, world_sizes):
    runs = [run_on(folder_of_runs, world_size, kind) for world_size in world_sizes]
    rows, weights = runs[0]
    assert len(rows) == STEPS and any(row.get("train/grad_norm", 0) > 0 for row in rows)
    assert any(row.get("train/clip_frac", 0) > 0 for row in rows) or kind != "gspo"
    from safetensors.torch import load_file

    before = load_file(folder_of_runs / "policy" / "model.safetensors")
    moved = max((weights["model." + key] - before[key]).abs().max().item() for key in before
                if "model." + key in weights)
    assert moved > 3e-4  # about as far as the learning rate allows, and far above the bound
    for other_rows, other_weights in runs[1:]:
        assert other_weights.keys() == weights.keys()
        far = {key: (other_weights[key] - weights[key]).abs().max().item() for key in weights}
        # A bias on all keys changes no attention: its gradient is rounding, which Adam makes a step of.
        assert not {key: value for key, value in far.items() if value > 1e-5 and "k_proj.bias" not in key}
        for row, other in zip(rows, other_rows, strict=True):
            assert row.keys() == other.keys()
            for key in row:
                if not key.startswith(("time/", "perf/")):
                    assert other[key] == pytest.approx(row[key], rel=1e-4, abs=1e-5), (key, row["step"])


# ----------------------------------------------------------------------------------------------------
# 3. Logprobs

@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("has_bias", [False, True])
def test_chunked_logprobs_against_fp64(chunk, has_bias):
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    hidden, weight, targets = draw(30, 16), draw(V, 16), torch.randint(V, (30,), generator=generator)
    bias, upstream, grads = draw(V) if has_bias else None, draw(30), []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight, bias) if x is not None]
        if dtype is torch.float32:
            functions = {name: getattr(script, name)
                         for name in ("to_logits", "head_logprobs", "logits_gradient")}
            options = {"scale": 0.5, "cap": 3.0, "temperature": 0.7}
            tensors = [*leaves, *[None] * (not has_bias), targets]
            logprobs, entropy = script.ChunkedLogprobs.apply(*tensors, functions, options, chunk)
            assert not entropy.requires_grad
        else:
            logits = 0.5 * (leaves[0] @ leaves[1].T + (leaves[2] if has_bias else 0))
            p = torch.softmax(3 * torch.tanh(logits / 3) / 0.7, dim=-1)
            logprobs, entropy = p[torch.arange(30), targets].log(), -(p * p.log()).sum(-1)
        grads.append([logprobs.detach(), entropy.detach(),
                      *torch.autograd.grad((upstream.to(dtype) * logprobs).sum(), leaves)])
    for found, expected in zip(*grads, strict=True):
        assert close(found, expected, 1e-6)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "qwen2_tied", "gemma2", "granite", "cohere", "phi"])
def test_logprobs_against_transformers(family):
    """Values, entropies and all gradients, tied and untied, with what families do to their logits."""
    model = make_model(family)
    exact = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(8)
    ids = torch.randint(V, (3, 12), generator=generator)
    # Not all positions: a prompt stands in front, padding behind.
    rows = torch.cat([torch.arange(2, 11), torch.arange(12, 17), torch.arange(30, 35)])
    targets, upstream = ids.flatten()[rows + 1], torch.randn(len(rows), generator=generator)
    expected = torch.log_softmax(exact(ids).logits.flatten(0, 1)[rows] / 0.7, dim=-1)
    entropies = -(expected.exp() * expected).sum(-1).detach()
    expected = expected[torch.arange(len(rows)), targets]
    (upstream * expected).sum().backward()
    # Norms and rotary tables are in fp32 also in the fp64 copy: an error that plain fp32 has, too.
    plain = copy.deepcopy(model)
    values = torch.log_softmax(plain(ids).logits.flatten(0, 1)[rows] / 0.7, dim=-1)
    (upstream * values[torch.arange(len(rows)), targets]).sum().backward()
    error = far(gradients(plain), gradients(exact))
    for chunk in (1, 7, 1000):
        twin = copy.deepcopy(model)
        attach(twin, chunk)
        logprobs, entropy = twin(ids, rows, targets, 0.7)
        (upstream * logprobs).sum().backward()
        assert close(logprobs.detach(), expected.detach(), 1e-6) and close(entropy, entropies, 1e-6)
        assert far(gradients(twin), gradients(exact)) < 5e-7 + 1.5 * error < 1e-5
        assert torch.equal(twin(ids), model(ids).logits)  # without rows: the logits


@pytest.fixture(scope="module")
def alone():
    """(mesh, ranks) of a process group of this process alone; FSDP works as it does among many."""
    for name in TORCHRUN_VARIABLES:
        assert name not in os.environ
    ranks = script.Ranks(0, 0, 1, CPU)
    yield script.init_distributed(parse("--device", "cpu"), ranks), ranks
    torch.distributed.destroy_process_group()


def sharded(model, mesh):
    attach(model, 7)
    args = parse("--activation-checkpointing", "none", "--no-compile")
    script.shard_model(model, args, mesh, torch.float32)
    return model


@pytest.mark.parametrize("family", ["qwen2_tied", "gemma2", "granite", "cohere", "phi"])
def test_prove_logprobs_lets_known_families_pass(alone, family, capsys):
    mesh, ranks = alone
    model = sharded(make_model(family), mesh)
    script.prove_logprobs(model, ranks)
    assert not model.whole_logits and not capsys.readouterr().out


def test_prove_logprobs_falls_back_to_whole_logits(alone, capsys):
    mesh, ranks = alone
    model = make_model("qwen2")
    exact, inner = copy.deepcopy(model), model.forward

    def forward(**call):  # as a model with an idea of its own would
        output = inner(**call)
        output.logits = output.logits - output.logits.pow(2) / 9
        return output

    model.forward = forward
    model = sharded(model, mesh)
    script.prove_logprobs(model, ranks)
    assert model.whole_logits and "whole logits" in capsys.readouterr().out
    ids = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(9))
    rows = torch.tensor([1, 3, 10, 16])
    logits = exact(ids).logits.flatten(0, 1)[rows]
    expected = torch.log_softmax((logits - logits.pow(2) / 9) / 0.7, dim=-1)
    logprobs, _ = model(ids, rows, ids.flatten()[rows + 1], 0.7)
    assert close(logprobs.detach(), expected[range(4), ids.flatten()[rows + 1]].detach(), 1e-5)


def test_prove_logprobs_refuses_broken_weights(alone):
    mesh, ranks = alone
    model = make_model("qwen2")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] = math.nan
    with pytest.raises(UserError, match="not finite"):
        script.prove_logprobs(sharded(model, mesh), ranks)


# ----------------------------------------------------------------------------------------------------
# 4. Local rollouts

ENDS = [3, 11, 17, 29, 40]


def make_generator(family):
    generator = make_model(family)
    generator.whole_logits = False
    return generator


def random_prompts(num, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(V) for _ in range(rng.randint(1, 12))] for _ in range(num)]


def sample(generator, prompts, n, seeds, sampling):
    uniform = script.uniforms(seeds, n, sampling.max_new_tokens, CPU)
    return script.generate(generator, prompts, n, uniform, sampling)


def check_completions(generator, prompts, completions, n, sampling):
    """Lengths, ends, and logprobs against a plain forward of each sequence by itself."""
    assert len(completions) == len(prompts) * n
    for i, completion in enumerate(completions):
        ids = completion.ids
        ended = [token in sampling.ends for token in ids]
        assert 1 <= len(ids) <= sampling.max_new_tokens and not any(ended[:-1])
        assert completion.finish == ("stop" if ended[-1] else "length")
        assert ended[-1] or len(ids) == sampling.max_new_tokens
        expected = logprobs_of(generator, prompts[i // n], ids, sampling.temperature or 1.0)
        assert completion.logprobs == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_tied", "qwen2_window", "mistral", "gemma2", "granite",
                                    "gpt2"])
def test_greedy_is_what_transformers_generates(family):
    """Prompts of many lengths side by side; three with a window of 4 to 6 tokens, less than most prompts."""
    generator, prompts = make_generator(family), random_prompts(12)
    endless = sample(generator, prompts, 1, [0] * 12, Sampling(0.0, 20, [V + 3]))
    greedy = Sampling(0.0, 20, [endless[2].ids[4], endless[7].ids[9]])
    found = sample(generator, prompts, 1, [0] * 12, greedy)
    check_completions(generator, prompts, found, 1, greedy)
    assert "stop" in {completion.finish for completion in found}
    for prompt, completion in zip(prompts, found):
        ids = torch.tensor([prompt])
        generated = generator.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                       max_new_tokens=20, eos_token_id=greedy.ends, pad_token_id=0)
        assert completion.ids == generated[0, len(prompt):].tolist()


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("family", ["qwen2_tied", "mistral", "gpt2"])
def test_sampled_logprobs_are_those_of_a_plain_forward(family, temperature):
    generator, prompts = make_generator(family), random_prompts(6)
    sampling = Sampling(temperature, 20, ENDS)
    found = sample(generator, prompts, 5, list(range(6)), sampling)
    check_completions(generator, prompts, found, 5, sampling)
    assert len({tuple(completion.ids) for completion in found}) > 25


def test_whole_logits_generate_the_same():
    generator, prompts = make_generator("gemma2"), random_prompts(4)
    sampling = Sampling(1.0, 20, ENDS)
    found = sample(generator, prompts, 3, [5, 6, 7, 8], sampling)
    generator.whole_logits = True
    again = sample(generator, prompts, 3, [5, 6, 7, 8], sampling)
    assert [c.ids for c in again] == [c.ids for c in found]
    check_completions(generator, prompts, again, 3, sampling)


def test_when_half_of_the_rows_have_ended_the_rest_goes_on_alone():
    for family in ("qwen2_tied", "mistral"):
        generator, prompts = make_generator(family), random_prompts(8)
        sampling, sizes = Sampling(1.0, 40, ENDS), []
        hook = generator.base_model.register_forward_pre_hook(
            lambda module, args, call: sizes.append(tuple(call["input_ids"].shape)), with_kwargs=True)
        found = sample(generator, prompts, 4, list(range(8)), sampling)
        hook.remove()
        check_completions(generator, prompts, found, 4, sampling)
        assert sizes[0] == (8, max(map(len, prompts))) and sizes[1] == (32, 1)  # prompts are read once
        rows = [size for size, _ in sizes[1:]]
        assert len(rows) + 1 == max(len(completion.ids) for completion in found)
        lengths = [len(completion.ids) for completion in found]
        for t, size in enumerate(rows, 1):
            num_running = sum(length > t for length in lengths)
            assert num_running <= size < 2 * num_running
        assert len(set(rows)) >= 4


def test_limits_of_length():
    generator, prompts = make_generator("qwen2"), random_prompts(5)
    for max_new_tokens in (1, 2):
        found = sample(generator, prompts, 2, [1] * 5, Sampling(1.0, max_new_tokens, list(range(0, V, 2))))
        check_completions(generator, prompts, found, 2, Sampling(1.0, max_new_tokens, list(range(0, V, 2))))
    everything = sample(generator, prompts, 2, [1] * 5, Sampling(1.0, 9, list(range(V))))
    assert all(len(c.ids) == 1 and c.finish == "stop" for c in everything)
    nothing = sample(generator, prompts, 2, [1] * 5, Sampling(1.0, 9, [V + 3]))
    assert all(len(c.ids) == 9 and c.finish == "length" for c in nothing)


def test_a_completion_depends_on_its_prompt_and_seed_only(alone, tmp_path):
    """In the company of others, in another order, alone, and for any --rollout-batch."""
    make_model("qwen2_tied").save_pretrained(tmp_path)
    tokenizer, (mesh, ranks) = make_digit_tokenizer(tmp_path), alone
    args = parse("--model", tmp_path, "--device", "cpu", "--no-mixed-precision", "--no-compile",
                 "--max-prompt-tokens", 40, "--max-new-tokens", 20)
    model = script.load_policy(args, tmp_path, mesh, torch.float32, ranks)
    script.load_hf_weights(model, tmp_path, False, ranks)
    script.prove_logprobs(model, ranks)
    sampler = script.open_sampler(args, model, tmp_path, tokenizer, torch.float32, ranks)
    sampling = Sampling(1.0, 20, ENDS)
    prompts, seeds = random_prompts(9), [zlib.crc32(b"%d" % i) for i in range(9)]

    def completions(order, batch):
        sampler.batch = batch
        waiting = script.start_completions(sampler, [prompts[i] for i in order], 3, [seeds[i] for i in order],
                                           sampling)
        return {i: wait() for i, wait in zip(order, waiting, strict=True)}

    expected = completions(range(9), 1000)
    forward, back = list(range(9)), list(range(8, -1, -1))
    orders = [(forward, 1), (forward, 7), (back, 6), ([4], 1000), ([7, 2, 5], 1000)]
    for order, batch in orders:
        for i, group in completions(order, batch).items():
            assert [c.ids for c in group] == [c.ids for c in expected[i]]
            for completion, other in zip(group, expected[i]):
                assert completion.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    check_completions(make_generator("qwen2_tied"), prompts, sum(expected.values(), []), 3, sampling)
    seeds[0] += 1
    again = completions([0, 1], 1000)
    assert [c.ids for c in again[0]] != [c.ids for c in expected[0]]
    assert [c.ids for c in again[1]] == [c.ids for c in expected[1]]
    # The generator has borrowed the policy's weights for the while, and does not keep them alive.
    assert completions([], 8) == {}
    assert script.find_blocks(model)[0].self_attn.q_proj.weight.device_mesh == mesh


def test_a_seed_gives_its_prompt_the_same_numbers_in_any_company():
    alone_in = script.uniforms([7], 3, 11, CPU)
    together = script.uniforms([1, 7, 1], 3, 11, CPU)
    assert together.shape == (9, 11) and torch.equal(together[3:6], alone_in)
    assert torch.equal(together[:3], together[6:]) and not torch.equal(together[:3], alone_in)
    assert 0 <= together.min() and together.max() < 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_draws_follow_the_distribution(temperature):
    generator = torch.Generator().manual_seed(10)
    logits, num = 2 * torch.randn(50, generator=generator), 200_000
    p = torch.softmax(logits.double() / temperature, dim=-1)
    tokens, logprobs = script.draw_tokens(logits.expand(num, 50), temperature,
                                          torch.rand(num, generator=generator))
    assert close(logprobs, p.log()[tokens], 1e-6)
    counts = torch.bincount(tokens, minlength=50)
    # Rare tokens are one class, or the statistic would not have its distribution.
    rare = p * num < 10
    counts, means = (torch.cat([x[~rare], x[rare].sum()[None]]).double() for x in (counts, p * num))
    statistic = ((counts - means)[means > 0] ** 2 / means[means > 0]).sum().item()
    freedom = len(counts) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)
    # With numbers at equal distances each token comes as often as it should, but for one.
    tokens, _ = script.draw_tokens(logits.expand(num, 50), temperature, (torch.arange(num) + 0.5) / num)
    assert (torch.bincount(tokens, minlength=50) - p * num).abs().max() < 1.5


def test_draws_at_the_ends_of_the_interval():
    ends = torch.tensor([0.0, 1 - 2**-24])
    logits = torch.tensor([-math.inf, -math.inf, 0.0, 1.0, -2.0, -math.inf]).expand(2, 6)
    tokens, logprobs = script.draw_tokens(logits, 1.0, ends)
    assert tokens.tolist() == [2, 4] and torch.isfinite(logprobs).all()
    one_hot = torch.full((2, 7), -1e4)
    one_hot[:, 3] = 1e4
    tokens, logprobs = script.draw_tokens(one_hot, 0.5, ends)
    assert tokens.tolist() == [3, 3] and logprobs.tolist() == [0.0, 0.0]
    # A real vocabulary, whose last rows belong to no token: nothing impossible is ever drawn.
    wide = torch.randn(16, 150_000, generator=torch.Generator().manual_seed(11))
    wide[:, -1000:] = -80.0
    for value in (0.0, 0.5, 1 - 2**-24):
        tokens, logprobs = script.draw_tokens(wide, 1.0, torch.full((16,), value))
        assert (tokens < 149_000).all() and (logprobs > -25).all()
    greedy, logprobs = script.draw_tokens(wide, 0.0, torch.full((16,), 0.9))
    assert torch.equal(greedy, wide.argmax(-1))
    assert close(logprobs, torch.log_softmax(wide.double(), -1).max(-1).values, 1e-6)
    in_bf16, _ = script.draw_tokens(wide.bfloat16(), 1.0, torch.full((16,), 0.5))
    assert torch.equal(in_bf16, script.draw_tokens(wide.bfloat16().float(), 1.0, torch.full((16,), 0.5))[0])


# ----------------------------------------------------------------------------------------------------
# 5. Statistics, groups, and the log of rollouts

def test_percentiles_of_the_ratio():
    log_ratios = torch.randn(5000, generator=torch.Generator().manual_seed(12)) * 0.2
    totals = torch.zeros(6 + script.RATIO_BINS, dtype=torch.float64)
    for part in log_ratios.split(700):
        batch = script.collate([Sequence([1] * (len(part) + 1), 1, [-2.0] * len(part), 1.0)], CPU)
        found = part - 2.0, torch.full((len(part),), 0.25)
        script.micro_batch_loss(lambda *call: found, batch, parse(), totals)  # noqa: B023, called at once
    stats = script.update_stats(totals.tolist())
    ordered = log_ratios.sort().values
    for percent in (1, 50, 99):
        expected = ordered[5000 * percent // 100 - 1].exp().item()
        assert stats[f"train/ratio_p{percent:02d}"] == pytest.approx(expected, rel=6e-4)
    assert stats["train/entropy"] == pytest.approx(0.25)


def test_wilson_interval():
    """Newcombe 1998 (Statistics in Medicine 17, table I), the score method without continuity correction."""
    published = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611),
                 (1, 29): (0.0061, 0.1718)}
    for (num_right, num), interval in published.items():
        assert script.wilson_interval(num_right, num) == pytest.approx(interval, abs=6e-5)
        low, high = script.wilson_interval(num - num_right, num)  # of what is not right
        assert (1 - high, 1 - low) == pytest.approx(interval, abs=6e-5)


def test_choose_groups():
    groups = random_groups(num_groups=8)
    differing = [group for group in groups if len(set(group.rewards)) > 1]
    assert script.choose_groups(groups, "keep") == groups
    assert script.choose_groups(groups, "drop") == differing and len(differing) > 3
    assert script.choose_groups([], "drop") == [] and script.to_sequences([], "grpo", False) == []


def test_truncated_answers_are_left_out_of_the_loss_and_stay_in_the_baseline():
    groups = with_sampler_logprobs(random_groups(), make_model("gpt2"), 1.0)
    everything = script.to_sequences(groups, "grpo", False)
    masked = script.to_sequences(groups, "grpo", True)
    finishes = [c.finish for group in groups for c in group.completions]
    assert 0 < len(masked) < len(everything) == len(finishes)
    assert masked == [s for s, finish in zip(everything, finishes) if finish == "stop"]
    advantages = [a for group in groups for a in naive_advantages(group.rewards, "grpo")]
    assert [s.advantage for s in everything] == pytest.approx(advantages, abs=1e-5)
    for sequence, (group, completion) in zip(everything, [(g, c) for g in groups for c in g.completions]):
        assert sequence.ids == group.prompt_ids + completion.ids
        assert sequence.num_prompt == len(group.prompt_ids)
        assert sequence.sampler_logprobs == completion.logprobs
