"""SmolLM2-135M-Instruct (tools/make_smollm2.py) and real GSM8K for tests, and mixtures of experts whose
routing flips by rounding.

    REAL_MODEL=FOLDER    the model; tests/run.sh --all makes it; without it tests are skipped
"""

import json
import os
import shutil
from pathlib import Path

from helpers import GATED, gsm8k_folder, make_tokenizer

SEQ_LEN = 256
# Turns in front of each question, so that answers are a few tokens long, end, and are in form now and then:
# GRPO needs rewards that differ. This model solves 1 % of GSM8K.
SHOTS = [
    ("Tom has 3 apples and buys 4 more. How many apples has he?", "#### 7"),
    ("A pen costs 2 dollars. How much do 5 pens cost?", "#### 10"),
]
TURN = "<|im_start|>{role}\n{content}<|im_end|>\n"
EXPERTS = dict(GATED, num_hidden_layers=16, num_experts_per_tok=2)
MIXTURES = {
    "mixtral": ("MixtralConfig", dict(EXPERTS, num_local_experts=8)),
    "qwen3_moe": ("Qwen3MoeConfig", dict(EXPERTS, num_experts=8, moe_intermediate_size=64, head_dim=16,
                                         norm_topk_prob=True)),
}


def real_model():
    import pytest

    folder = os.environ.get("REAL_MODEL")
    if not folder or gsm8k_folder() is None:
        pytest.skip("needs a real model (bash tests/run.sh --all makes it, or REAL_MODEL names it) and GSM8K")
    return Path(folder)


def computes_bf16():
    """Whether the scripts compute in bf16 here; where a CPU only imitates it, they take fp32."""
    import torch
    import train_llm

    return train_llm.compute_dtype(True, torch.device("cpu")) == torch.bfloat16


def first_layers(source, folder, num_layers):
    """A model of the real one's first layers: real weights, quick enough for bf16 that is imitated."""
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(source, folder)
    model = AutoModelForCausalLM.from_pretrained(source, num_hidden_layers=num_layers, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def make_mixture(name, folder):
    """A random mixture of 8 experts in 16 layers, so far from zero that rounding changes who is asked."""
    import torch
    import transformers

    make_tokenizer(folder, 500)
    config_class, arguments = MIXTURES[name]
    config = getattr(transformers, config_class)(**arguments, vocab_size=512, initializer_range=0.1,
                                                 bos_token_id=0, eos_token_id=0, pad_token_id=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


# ----------------------------------------------------------------------------------------------------
# GSM8K

def gsm8k_rows(split="train"):
    return [json.loads(line) for line in (gsm8k_folder() / f"{split}.jsonl").read_text().splitlines()]


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_chat(row):
    return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]


def short_questions(count):
    """Rows with the shortest questions."""
    return sorted(gsm8k_rows(), key=lambda row: len(row["question"]))[:count]


def short_rows(tokenizer, count):
    """Rows whose chats are just over 96 tokens: two of them fit in a pack of SEQ_LEN, three do not."""
    fitting = []
    for row in gsm8k_rows():
        if len(row["question"]) + len(row["answer"]) < 400:
            num_tokens = len(tokenizer.apply_chat_template(as_chat(row), return_dict=False))
            fitting += [row] if SEQ_LEN // 3 < num_tokens <= SEQ_LEN // 2 else []
        if len(fitting) == count:
            return fitting
    raise AssertionError(f"only {len(fitting)} rows are as short")


def chat_pieces(tokenizer, rows):
    """[(ids (1, T), labels (T,) of the next tokens)] of each chat: the answer's tokens are trained, and the
    end of its turn."""
    import torch

    pieces = []
    for row in rows:
        chat = as_chat(row)
        ids = tokenizer.apply_chat_template(chat, return_dict=False)
        prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False)
        assert ids[:len(prompt)] == prompt and tokenizer.decode(ids[-2:]) == "<|im_end|>\n"
        # The line break behind the end token is the template's, not the assistant's.
        labels = [-100] * (len(prompt) - 1) + ids[len(prompt):-1] + [-100] * 2
        pieces.append((torch.tensor([ids]), torch.tensor(labels)))
    return pieces


def chat_loss(model, tokenizer, rows):
    """Mean loss of the trained tokens by transformers alone, chat by chat."""
    import torch

    total = count = 0
    for ids, labels in chat_pieces(tokenizer, rows):
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0].float()
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += (labels != -100).sum().item()
    return total / count


def write_few_shot_template(path):
    turns = "".join(TURN.format(role=role, content=content) for shot in SHOTS
                    for role, content in zip(("user", "assistant"), shot))
    path.write_text(
        turns + "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
    return path
