"""A small policy that answers "3+4?" with "#### d", d any digit, and such questions: the tests' GRPO runs."""

import json
import random
import string
from pathlib import Path

EOS, BOS = "<eos>", "<bos>"
PROMPT = "Question: {question}\nAnswer:"  # without a chat template and a system prompt
OPENINGS = ("", "", "so ")  # in front of the answer, so that completions are 4 or 7 tokens long
LEARNING_RATE = 5e-3


def make_policy(folder, tied=False, seed=0):
    """Save a Qwen2 of 64 x 2 layers with its tokenizer to `folder`; returns `folder`. Takes about 2 seconds.

    A token is a character, or ####. EOS is also the padding, and a BOS of its own is put in front of each
    text. Nearly all completions are "#### d" and EOS, some of them with "so " in front; each digit d has
    about the same chance.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_digit_tokenizer(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=128, max_position_embeddings=256, tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config).float()
    teach(model, tokenizer, random.Random(seed))
    model.save_pretrained(folder)
    return Path(folder)


def make_digit_tokenizer(folder):
    """Bytes, as transformers reads a Qwen2 tokenizer whatever its file says, and #### in one piece."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = sorted(byte_level.pre_tokenize_str(letter)[0][0] for letter in string.printable)
    tokens = [EOS, BOS, *letters, "##", "####"]
    numbers = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(numbers, [("#", "#"), ("##", "##")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokens.index(BOS))])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, bos_token=BOS,
                                      model_max_length=256)
    wrapped.save_pretrained(folder)
    return wrapped


def teach(model, tokenizer, rng, steps=100, batch=32):
    """A plain loop over random questions with random answers: the form, and nothing about sums."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / steps)
        # All of a batch begin alike, so that nothing must be padded in the middle.
        opening = OPENINGS[step % len(OPENINGS)]
        texts = [PROMPT.format(question=f"{rng.randint(0, 9)}+{rng.randint(0, 9)}?")
                 + f"{opening}#### {rng.randint(0, 9)}{EOS}" for _ in range(batch)]
        ids = torch.tensor(tokenizer(texts)["input_ids"])
        num_learnt = len(opening) + len(["####", " ", "d", EOS])
        logits = model(ids[:, :-1], logits_to_keep=num_learnt).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -num_learnt:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def make_questions(folder, num_train=64, num_test=16, sums=range(10)):
    """Write train.jsonl and test.jsonl: sums of one digit, in GSM8K's form; returns `folder`.

    Ten sums take a policy hundreds of steps; with two of them it is at 50 % right after 40."""
    rng, folder = random.Random(0), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", num_train), ("test", num_test)):
        with open(folder / f"{split}.jsonl", "w") as file:
            for _ in range(count):
                total = rng.choice(sums)
                a = rng.randint(0, total)
                row = {"question": f"{a}+{total - a}?", "answer": f"{a}+{total - a}={total}\n#### {total}"}
                file.write(json.dumps(row) + "\n")
    return folder


def flags(folder, run, nproc, *more):
    """Of a small run in `folder`/`run` on `nproc` processes, with `folder`/policy and `folder`/questions.

    fp32 also where the processor has bf16, 8 questions a step over all processes, 8 answers each; `more`
    wins."""
    folder = Path(folder)
    return [
        "--model", folder / "policy", "--dataset", folder / "questions", "--checkpoint-dir", folder / run,
        "--system-prompt", "", "--max-prompt-tokens", 64, "--max-new-tokens", 12,
        "--batch-size", 8 // nproc, "--group-size", 8, "--train-steps", 6, "--max-lr", 1e-3,
        "--eval-limit", 0, "--seed", 3, "--device", "cpu", "--no-mixed-precision", "--no-compile", *more,
    ]
