"""Plain functions that the tests share: run a script, read its metrics, make tokenizers, models and data.

torch and transformers are imported inside the functions that need them: the tests of the launchers and of the
style start in a moment, and a test process that only starts others stays small.
"""

import contextlib
import functools
import inspect
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent

# ----------------------------------------------------------------------------------------------------
# 1. Running scripts and reading what they wrote

# Set by a torchrun around this process; a script that finds them believes that it is one of its ranks.
TORCHRUN_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
)


def run_script(args, nproc=1, cwd=None, env=None, timeout=300, check=True, script="train_llm.py"):
    """Run a script of this repository, by torchrun for nproc > 1; `env` adds to the environment.

    Returns a CompletedProcess with `stdout` and `stderr` as text. Raises AssertionError with the end of both
    when it takes longer than `timeout` seconds, or, with `check`, when it does not exit with 0.
    """
    command = [sys.executable]
    if nproc > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    command += [str(REPO / script), *map(str, args)]
    variables = {key: value for key, value in os.environ.items() if key not in TORCHRUN_VARIABLES}
    variables |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})}
    process = subprocess.Popen(
        command, cwd=cwd, env=variables, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
        problem = f"exit code {process.returncode}" if check and process.returncode else ""
    except subprocess.TimeoutExpired:
        # The whole group: torchrun's workers would outlive it and keep the cores busy for the tests to come.
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        problem = f"no end after {timeout} s"
    if problem:
        tails = [f"--- end of {name} ---\n{text[-6000:]}" for name, text in
                 (("stdout", stdout), ("stderr", stderr))]
        raise AssertionError("\n".join([f"{problem}: {' '.join(command)}", *tails]))
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def read_metrics(run_dir):
    """The rows of a run's metrics.jsonl, in the order they were written."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def read_checkpoint(folder):
    """{name: whole tensor} of a checkpoint, read in this process alone: model.*, optim.* and random.*."""
    import warnings

    import torch
    import torch.distributed.checkpoint as dcp

    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(found.size, dtype=found.properties.dtype) for name, found in saved.items()
               if hasattr(found, "size")}  # else a text, not a tensor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is no process group: none is wanted
        dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


@contextlib.contextmanager
def mounted(folder, options):
    """A small file system in memory on `folder`, or a skipped test where this user cannot mount one."""
    import pytest

    folder.mkdir(parents=True)
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("cannot mount a tmpfs here: needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# ----------------------------------------------------------------------------------------------------
# 2. Tokenizers and chat templates

EOS, BOS = "<|endoftext|>", "<|startoftext|>"
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]


def _one_line(template):
    """Joins the lines of a template, whose line breaks are layout; those that belong to the text are \\n."""
    return "".join(line.strip() for line in template.strip().splitlines())


# Each in the manner of a family that is in wide use, and each different where implementations go wrong.
CHAT_TEMPLATES = {
    # The template itself says what the assistant generates, the end of its turn included.
    "chatml_generation": _one_line(r"""
        {% for message in messages %}
            {% if message['role'] == 'assistant' %}
                {{ '<|im_start|>assistant\n' }}
                {% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
                {{ '\n' }}
            {% else %}
                {{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
            {% endif %}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
    """),
    # Qwen2: says nothing of what is generated, and puts in a system turn of its own where there is none.
    "qwen2": _one_line(r"""
        {% for message in messages %}
            {% if loop.first and message['role'] != 'system' %}
                {{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
            {% endif %}
            {{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
    """),
    # Llama 2: the system turn goes inside the first user turn, contents are stripped, no generation prompt.
    "llama2": _one_line(r"""
        {% if messages[0]['role'] == 'system' %}
            {% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}
            {% set turns = messages[1:] %}
        {% else %}
            {% set system = '' %}
            {% set turns = messages %}
        {% endif %}
        {% for message in turns %}
            {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
                {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
            {% endif %}
            {% if message['role'] == 'user' %}
                {% set content = system + message['content'] if loop.first else message['content'] %}
                {{ bos_token }}{{ '[INST] ' + content.strip() + ' [/INST]' }}
            {% else %}
                {{ ' ' + message['content'].strip() + ' ' + eos_token }}
            {% endif %}
        {% endfor %}
    """),
    # Llama 3: begins with BOS itself, so that a tokenizer that adds one too makes two.
    "llama3": _one_line(r"""
        {% for message in messages %}
            {% set header = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' %}
            {% set content = header + message['content'] | trim + '<|eot_id|>' %}
            {% if loop.first %}{{ bos_token }}{% endif %}{{ content }}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
    """),
    # Gemma: calls the assistant "model", and refuses a system turn.
    "gemma": _one_line(r"""
        {{ bos_token }}
        {% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
        {% for message in messages %}
            {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
                {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
            {% endif %}
            {% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
            {{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
    """),
    # Zephyr: every turn, also the user's, ends with EOS.
    "zephyr": _one_line(r"""
        {% for message in messages %}
            {{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}
            {% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}
        {% endfor %}
    """),
}

ENGLISH = [
    "A shop sells pencils for 3 dollars each. How many dollars do 12 pencils cost?",
    "The answer is 36, because 12 times 3 is 36. Thank you for asking such a clear question!",
    "Tom has 15 apples and gives 4 of them to each of his 3 friends. He has 15 - 3 * 4 = 3 apples left.",
    "Once upon a time there was a small model that learned one word after another.",
    "<|user|> <|assistant|> <|system|> [INST] [/INST] <<SYS>> <</SYS>> <start_of_turn>model <end_of_turn>",
    "<|start_header_id|>assistant<|end_header_id|> <|eot_id|> You are a helpful assistant. user model system",
]


def make_tokenizer(folder, vocab_size=512, chat_template=None, bos=False, texts=None):
    """Train a byte-level BPE tokenizer on `texts` and save it to `folder` as Hugging Face does; returns it.

    EOS is <|endoftext|> and also the padding, as in many real ones; with `bos`, <|startoftext|> is put in
    front of every encoded text. `chat_template` is a key of CHAT_TEMPLATES or a template.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    texts = texts or [*ENGLISH * 20, inspect.getsource(textwrap), inspect.getsource(json)]
    special = [EOS, *([BOS] if bos else []), *CHAT_TOKENS]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, bos_token=BOS if bos else None,
        additional_special_tokens=CHAT_TOKENS, model_max_length=256,
    )
    wrapped.chat_template = CHAT_TEMPLATES.get(chat_template, chat_template)
    wrapped.save_pretrained(folder)
    return folder


# ----------------------------------------------------------------------------------------------------
# 3. Models

# Head size 16, and half as many key-value heads as heads where the family can do that.
SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256)
GATED = dict(SIZES, num_key_value_heads=2, intermediate_size=128, attention_dropout=0.0)
FALCON = dict(SIZES, alibi=False, bias=False, parallel_attn=True, attention_dropout=0.0, hidden_dropout=0.0)


def _rope(theta, **more):
    return {"rope_type": "default", "rope_theta": theta, **more}


# Family: (configuration class of transformers, its arguments).
HF_FAMILIES = {
    "llama": ("LlamaConfig", GATED),
    "codellama": ("LlamaConfig", dict(GATED, rope_parameters=_rope(1e6))),
    "mistral": ("MistralConfig", dict(GATED, sliding_window=16)),
    "mistral_full": ("MistralConfig", dict(GATED, sliding_window=None)),
    "mixtral": ("MixtralConfig", dict(GATED, num_local_experts=4, num_experts_per_tok=2)),
    "falcon_7b": ("FalconConfig", dict(FALCON, multi_query=True, new_decoder_architecture=False)),
    "falcon_40b": ("FalconConfig", dict(FALCON, num_kv_heads=2, new_decoder_architecture=True)),
    "phi": ("PhiConfig", dict(
        SIZES, intermediate_size=128, attention_dropout=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
        rope_parameters=_rope(1e4, partial_rotary_factor=0.5),
    )),
    "qwen2": ("Qwen2Config", GATED),
    "qwen3": ("Qwen3Config", dict(GATED, head_dim=16)),
    "gemma3": ("Gemma3TextConfig", dict(
        GATED, head_dim=16, query_pre_attn_scalar=16, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )),
    "gpt2": ("GPT2Config", dict(
        n_embd=64, n_layer=2, n_head=4, n_positions=256, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )),
}


def make_hf_model(family, folder, vocab_size=512, seed=0, dtype="float32", tie=None):
    """Save a small random model of a family in HF_FAMILIES, with a tokenizer, to `folder`; returns `folder`.

    `tie` ties the output layer to the embeddings; None leaves it as the family has it. The tokenizer is
    make_tokenizer's own default and can be replaced by another call of it on the same folder.
    """
    import torch
    import transformers

    # Real models' embeddings have more rows than the tokenizer has tokens, too: a mix-up of the two shows.
    make_tokenizer(folder, vocab_size - 12)
    end = transformers.AutoTokenizer.from_pretrained(folder).eos_token_id
    name, arguments = HF_FAMILIES[family]
    # Five times as far from zero as usual, or the first logits of so narrow a model would be all but equal,
    # and a comparison of two models would prove nothing.
    config = getattr(transformers, name)(
        **arguments, vocab_size=vocab_size, initializer_range=0.1, bos_token_id=end, eos_token_id=end,
        pad_token_id=None, **({} if tie is None else {"tie_word_embeddings": tie}),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder


# ----------------------------------------------------------------------------------------------------
# 4. Data

PROBLEMS = [
    ("{name} buys {a} boxes with {b} {thing} each and gives {c} {thing} away. How many are left?",
     "There are {a} * {b} = {ab} {thing}.\n{ab} - {c} = {result} are left.", lambda a, b, c: a * b - c),
    ("{name} has {a} {thing}, finds {b} more on Monday and {c} more on Tuesday. How many are there now?",
     "On Monday there are {a} + {b} = {a_b}.\nOn Tuesday {a_b} + {c} = {result}.", lambda a, b, c: a + b + c),
    ("A shop sells {thing} at {a} dollars each. {name} takes {b} and has a voucher of {c} dollars. "
     "How many dollars does {name} pay?",
     "{b} {thing} cost {a} * {b} = {ab} dollars.\nWith the voucher it is {ab} - {c} = {result}.",
     lambda a, b, c: a * b - c),
    ("{name} packs {a} {thing} an hour for {b} hours, then {c} more. How many {thing} is that in total?",
     "In {b} hours {name} packs {a} * {b} = {ab}.\n{ab} + {c} = {result}.", lambda a, b, c: a * b + c),
]
NAMES = ["Ada", "Bilal", "Chen", "Dora", "Emeka", "Freya", "Goro", "Hana"]
THINGS = ["apples", "pencils", "marbles", "stickers", "books", "cards"]


def write_gsm8k_like(path, n):
    """Write n word problems as lines of {"question", "answer"}, GSM8K's form; the same n gives the same file.

    An answer is two lines of working and then '#### ' with the number. Returns `path`.
    """
    rng = random.Random(0)
    with open(path, "w") as file:
        for i in range(n):
            question, answer, solve = PROBLEMS[i % len(PROBLEMS)]
            a, b, c = rng.randint(3, 30), rng.randint(3, 30), rng.randint(1, 9)
            words = {"name": rng.choice(NAMES), "thing": rng.choice(THINGS), "a": a, "b": b, "c": c}
            words |= {"ab": a * b, "a_b": a + b, "result": solve(a, b, c)}
            row = {"question": question.format(**words),
                   "answer": answer.format(**words) + f"\n#### {words['result']}"}
            file.write(json.dumps(row) + "\n")
    return path


def gsm8k_folder():
    """The folder with GSM8K's train.jsonl and test.jsonl, or None: no test downloads anything."""
    folder = Path(os.environ.get("GSM8K_DIR") or REPO.parent / "shared" / "data" / "gsm8k")
    return folder if folder.is_dir() else None


@functools.cache
def option_lines(program):
    """The lines of a Python program's --help that introduce an option, in front of what is said about it."""
    shown = subprocess.run([sys.executable, str(program), "--help"], cwd=REPO, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr[-3000:]
    lines = re.findall(r"^ {1,4}(-.*?)(?:  .*)?$", shown.stdout, re.MULTILINE)
    return [line for line in lines if not line.startswith("-h")]


def documents_in(data, split="train"):
    """[(token ids, 1 where trained; [] of plain text)] of the documents that `prepare_data` found."""
    found = []
    for tokens, _ in data[split]:
        found += [(row["ids"], row["trained"]) for row in tokens]
    return found


def documented_metrics(script):
    """The keys that docs/metrics.md explains for this script."""
    section = (REPO / "docs/metrics.md").read_text().partition(f"\n## {script}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))
