"""Supervised fine-tuning: which tokens of a conversation are trained, and that wrong masks are refused."""

import json
import re
from itertools import groupby

import pytest
import train_llm
from helpers import (
    BOS, CHAT_TEMPLATES, CHAT_TOKENS, EOS, documents_in, gsm8k_folder, make_tokenizer, read_metrics,
    write_gsm8k_like,
)
from quick_runs import error_line, quick_run

# Tokens that a family's own tokenizer has as special ones, like make_tokenizer's.
SPECIAL = {
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "zephyr": ["<|user|>", "<|assistant|>", "<|system|>"],
}
WITH_BOS = ("llama2", "llama3", "gemma")

SINGLE = [("user", "How many apples?"), ("assistant", "36, because\n3 * 12 = 36.")]
SYSTEM = [("system", "Be brief."), *SINGLE]
MULTI = [*SINGLE, ("user", "Are you sure?"), ("assistant", "Yes!"), ("user", "Thanks.")]
# Contents with white space around them, which some templates strip and others keep.
SPACES = [("user", " Hi  "), ("assistant", "  Hello you. \n")]
# The answer occurs in the question, too: a search for its text would find the wrong place.
ECHO = [("user", "Say Yes!"), ("assistant", "Yes!"), ("user", "Yes!"), ("assistant", "Yes!")]

# A conversation's tokens as text, the trained ones in [[ ]]: written out by hand for each family.
QWEN_DEFAULT = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
CHATML_SINGLE = ("<|im_start|>user\nHow many apples?<|im_end|>\n"
                 "<|im_start|>assistant\n[[36, because\n3 * 12 = 36.<|im_end|>]]\n")
CHATML_SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n" + CHATML_SINGLE
CHATML_MULTI = (CHATML_SINGLE + "<|im_start|>user\nAre you sure?<|im_end|>\n"
                "<|im_start|>assistant\n[[Yes!<|im_end|>]]\n<|im_start|>user\nThanks.<|im_end|>\n")
CHATML_SPACES = "<|im_start|>user\n Hi  <|im_end|>\n<|im_start|>assistant\n[[  Hello you. \n<|im_end|>]]\n"
CHATML_ECHO = ("<|im_start|>user\nSay Yes!<|im_end|>\n<|im_start|>assistant\n[[Yes!<|im_end|>]]\n"
               "<|im_start|>user\nYes!<|im_end|>\n<|im_start|>assistant\n[[Yes!<|im_end|>]]\n")
LLAMA2_SINGLE = "<|startoftext|>[INST] How many apples? [/INST][[ 36, because\n3 * 12 = 36. <|endoftext|>]]"
LLAMA3_SINGLE = ("<|start_header_id|>user<|end_header_id|>\n\nHow many apples?<|eot_id|>"
                 "<|start_header_id|>assistant<|end_header_id|>\n\n[[36, because\n3 * 12 = 36.<|eot_id|>]]")
GEMMA_SINGLE = ("<start_of_turn>user\nHow many apples?<end_of_turn>\n"
                "<start_of_turn>model\n[[36, because\n3 * 12 = 36.<end_of_turn>]]\n")
ZEPHYR_SINGLE = ("<|user|>\nHow many apples?<|endoftext|>\n"
                 "<|assistant|>\n[[36, because\n3 * 12 = 36.<|endoftext|>]]\n")
EXPECTED = {
    "chatml_generation": {
        "single": CHATML_SINGLE, "system": CHATML_SYSTEM, "multi": CHATML_MULTI, "spaces": CHATML_SPACES,
        "echo": CHATML_ECHO,
    },
    "qwen2": {
        "single": QWEN_DEFAULT + CHATML_SINGLE, "system": CHATML_SYSTEM, "multi": QWEN_DEFAULT + CHATML_MULTI,
        "spaces": QWEN_DEFAULT + CHATML_SPACES, "echo": QWEN_DEFAULT + CHATML_ECHO,
    },
    "llama2": {
        "single": LLAMA2_SINGLE,
        "system": LLAMA2_SINGLE.replace("[INST] ", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n"),
        "multi": LLAMA2_SINGLE + "<|startoftext|>[INST] Are you sure? [/INST][[ Yes! <|endoftext|>]]"
                                 "<|startoftext|>[INST] Thanks. [/INST]",
        "spaces": "<|startoftext|>[INST] Hi [/INST][[ Hello you. <|endoftext|>]]",
        "echo": "<|startoftext|>[INST] Say Yes! [/INST][[ Yes! <|endoftext|>]]"
                "<|startoftext|>[INST] Yes! [/INST][[ Yes! <|endoftext|>]]",
    },
    "llama3": {
        "single": BOS + LLAMA3_SINGLE,
        "system": f"{BOS}<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>{LLAMA3_SINGLE}",
        "multi": f"{BOS}{LLAMA3_SINGLE}<|start_header_id|>user<|end_header_id|>\n\nAre you sure?<|eot_id|>"
                 "<|start_header_id|>assistant<|end_header_id|>\n\n[[Yes!<|eot_id|>]]"
                 "<|start_header_id|>user<|end_header_id|>\n\nThanks.<|eot_id|>",
        "spaces": f"{BOS}<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
                  "<|start_header_id|>assistant<|end_header_id|>\n\n[[Hello you.<|eot_id|>]]",
        "echo": f"{BOS}<|start_header_id|>user<|end_header_id|>\n\nSay Yes!<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n[[Yes!<|eot_id|>]]"
                "<|start_header_id|>user<|end_header_id|>\n\nYes!<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n[[Yes!<|eot_id|>]]",
    },
    "gemma": {
        "single": BOS + GEMMA_SINGLE,
        "multi": f"{BOS}{GEMMA_SINGLE}<start_of_turn>user\nAre you sure?<end_of_turn>\n"
                 "<start_of_turn>model\n[[Yes!<end_of_turn>]]\n<start_of_turn>user\nThanks.<end_of_turn>\n",
        "spaces": f"{BOS}<start_of_turn>user\nHi<end_of_turn>\n"
                  "<start_of_turn>model\n[[Hello you.<end_of_turn>]]\n",
        "echo": f"{BOS}<start_of_turn>user\nSay Yes!<end_of_turn>\n"
                "<start_of_turn>model\n[[Yes!<end_of_turn>]]\n"
                "<start_of_turn>user\nYes!<end_of_turn>\n<start_of_turn>model\n[[Yes!<end_of_turn>]]\n",
    },
    "zephyr": {
        "single": ZEPHYR_SINGLE, "system": "<|system|>\nBe brief.<|endoftext|>\n" + ZEPHYR_SINGLE,
        "multi": ZEPHYR_SINGLE + "<|user|>\nAre you sure?<|endoftext|>\n"
                                 "<|assistant|>\n[[Yes!<|endoftext|>]]\n"
                                 "<|user|>\nThanks.<|endoftext|>\n",
        "spaces": "<|user|>\n Hi  <|endoftext|>\n<|assistant|>\n[[  Hello you. \n<|endoftext|>]]\n",
        "echo": "<|user|>\nSay Yes!<|endoftext|>\n<|assistant|>\n[[Yes!<|endoftext|>]]\n"
                "<|user|>\nYes!<|endoftext|>\n<|assistant|>\n[[Yes!<|endoftext|>]]\n",
    },
}
CONVERSATIONS = {"single": SINGLE, "system": SYSTEM, "multi": MULTI, "spaces": SPACES, "echo": ECHO}


def messages(turns):
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """{template: folder of a tokenizer that has it}; None is a base model's, without a chat template."""
    from transformers import AutoTokenizer

    base = tmp_path_factory.mktemp("tokenizers")
    folders = {}
    for name in (None, *CHAT_TEMPLATES):
        folders[name] = make_tokenizer(base / str(name), chat_template=name, bos=name in WITH_BOS)
        if name in SPECIAL:
            tokenizer = AutoTokenizer.from_pretrained(folders[name])
            tokenizer.add_special_tokens({"additional_special_tokens": [*CHAT_TOKENS, *SPECIAL[name]]})
            tokenizer.save_pretrained(folders[name])
    return folders


def flags_for(folder, tokenizer, dataset, *more):
    return [str(token) for token in (
        "--from-scratch", "--model-size", "test", "--tokenizer", tokenizer, "--dataset", dataset,
        "--data-cache", folder / "cache", "--seq-len", 128, "--batch-size", 2, "--max-steps", 2,
        "--max-lr", 1e-3, "--min-lr", 1e-4, "--log-interval", 1, "--checkpoint-dir", folder / "run",
        "--no-export", "--device", "cpu", *more)]


def write_rows(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def marked(tokenizer, ids, flags):
    """Tokens as text, trained runs in [[ ]]."""
    text, end = "", 0
    for is_trained, run in groupby(flags):
        start, end = end, end + len(list(run))
        piece = tokenizer.decode(ids[start:end], skip_special_tokens=False,
                                 clean_up_tokenization_spaces=False)
        text += f"[[{piece}]]" if is_trained else piece
    return text


def trained_rows(args):
    """The documents of a data set as the training has them on disk, as text with trained runs in [[ ]]."""
    tokenizer = train_llm.load_tokenizer(args)
    return [marked(tokenizer, *document) for document in documents_in(train_llm.prepare_data(args))]


# ----------------------------------------------------------------------------------------------------
# 1. Masks

@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_exactly_the_assistant_is_trained(tokenizers, tmp_path, template):
    names = list(EXPECTED[template])
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": messages(CONVERSATIONS[name])}
                                                 for name in names])
    args = train_llm.parse_args(flags_for(tmp_path, tokenizers[template], path))
    assert dict(zip(names, trained_rows(args))) == EXPECTED[template]
    # Tokens, and not only their text: as the template's text is encoded by itself, BOS not doubled.
    tokenizer = train_llm.load_tokenizer(args)
    for name, (ids, _) in zip(names, documents_in(train_llm.prepare_data(args))):
        text = EXPECTED[template][name].replace("[[", "").replace("]]", "")
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert (ids[0] == tokenizer.bos_token_id) == (template in WITH_BOS)


def test_every_template_is_covered():
    assert set(EXPECTED) == set(CHAT_TEMPLATES)
    for template, expected in EXPECTED.items():
        assert set(CONVERSATIONS) - set(expected) == ({"system"} if template == "gemma" else set())


def test_generation_tags_and_prefixes_agree(tokenizers):
    """The same ChatML with its tags and without them: one mask."""
    from transformers import AutoTokenizer

    tagged = AutoTokenizer.from_pretrained(tokenizers["chatml_generation"])
    plain = AutoTokenizer.from_pretrained(tokenizers["chatml_generation"])
    plain.chat_template = re.sub(r"{% (end)?generation %}", "", tagged.chat_template)
    assert "generation %" in tagged.chat_template and "generation %" not in plain.chat_template
    for turns in CONVERSATIONS.values():
        by_tags = train_llm.render_chat(tagged, messages(turns), None)
        by_prefix = train_llm.render_chat(plain, messages(turns), None)
        assert by_tags == by_prefix and by_tags[1]


@pytest.mark.parametrize("template", ["qwen2", "llama3", "zephyr", "chatml_generation"])
def test_a_conversation_that_the_assistant_opens(tokenizers, template):
    """Headers and a system turn of the template's own are not trained there either."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizers[template])
    text, [(start, stop)] = train_llm.render_chat(
        tokenizer, messages([("assistant", "First."), ("user", "ok")]), None)
    end = {"qwen2": "<|im_end|>", "llama3": "<|eot_id|>", "zephyr": EOS,
           "chatml_generation": "<|im_end|>"}[template]
    assert text[start:stop] == f"First.{end}"


def test_row_forms_are_the_same_conversation(tokenizers, tmp_path):
    question, answer = (content for _, content in SINGLE)
    rows = [
        {"messages": messages(SINGLE)},
        {"prompt": question, "completion": answer},
        {"prompt": messages(SINGLE[:1]), "completion": messages(SINGLE[1:])},
        {"question": question, "answer": answer, "id": 7},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    args = train_llm.parse_args(flags_for(tmp_path, tokenizers["chatml_generation"], path))
    assert trained_rows(args) == [CHATML_SINGLE] * 4
    system = write_rows(tmp_path / "system.jsonl", [
        {"prompt": messages(SYSTEM[:2]), "completion": messages(SYSTEM[2:])},
        {"prompt": messages(MULTI[:-2]), "completion": messages(MULTI[-2:])},
    ])
    args = train_llm.parse_args(flags_for(tmp_path, tokenizers["chatml_generation"], system))
    assert trained_rows(args) == [CHATML_SYSTEM, CHATML_MULTI]


def test_rows_of_parquet_and_csv(tokenizers, tmp_path):
    import datasets

    pairs = [{"question": f"{i} and {i}?", "answer": f"It is\n{2 * i}."} for i in range(5)]
    chats = [{"messages": messages([("user", row["question"]), ("assistant", row["answer"])])}
             for row in pairs]
    datasets.Dataset.from_list(pairs).to_csv(tmp_path / "rows.csv", index=False)
    datasets.Dataset.from_list(chats).to_parquet(tmp_path / "rows.parquet")
    found = [trained_rows(train_llm.parse_args(flags_for(tmp_path, tokenizers["zephyr"], tmp_path / name)))
             for name in ("rows.csv", "rows.parquet")]
    assert found[0] == found[1]
    assert found[0][3] == "<|user|>\n3 and 3?<|endoftext|>\n<|assistant|>\n[[It is\n6.<|endoftext|>]]\n"


def test_base_model_without_a_chat_template(tokenizers, tmp_path):
    """Contents on lines of their own, an end token after each answer."""
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": messages(turns)}
                                                for turns in (SINGLE, SYSTEM, MULTI)])
    args = train_llm.parse_args(flags_for(tmp_path, tokenizers[None], path))
    single = "How many apples?\n[[36, because\n3 * 12 = 36.<|endoftext|>]]"
    assert trained_rows(args) == [single, "Be brief.\n" + single,
                                  single + "Are you sure?\n[[Yes!<|endoftext|>]]Thanks.\n"]


def test_a_template_from_a_file(tokenizers, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text(CHAT_TEMPLATES["zephyr"])
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": messages(SINGLE)}])
    args = train_llm.parse_args(flags_for(tmp_path, tokenizers["qwen2"], path, "--chat-template", template))
    assert trained_rows(args) == [ZEPHYR_SINGLE]


def test_show_batch_prints_what_is_trained(tokenizers, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": messages(turns)} for turns in (SINGLE, ECHO)])
    flags = flags_for(tmp_path, tokenizers["chatml_generation"], path, "--seq-len", 256)
    documents = [text.replace("[[", "⟦").replace("]]", "⟧") for text in (CHATML_SINGLE, CHATML_ECHO)]
    args = train_llm.parse_args(flags)
    found = documents_in(train_llm.prepare_data(args))
    num_tokens, num_trained = (sum(map(count, part)) for count, part in zip((len, sum), zip(*found)))

    shown = quick_run(flags, script="tools/show_batch.py").stdout
    # Two samples to a micro-batch, of one that there is.
    assert shown.count("=== sample 0 of 1\n--- document 1 of 2, ") == 2
    assert all(shown.count(document) == 2 for document in documents)
    assert f"--- padding, {256 - num_tokens} tokens\n" in shown
    share, padding = num_trained / 256, (256 - num_tokens) / 256
    assert shown.endswith(f"=== 512 tokens, {2 * num_trained} trained ({share:.1%}), "
                          f"{2 * (256 - num_tokens)} padding ({padding:.1%})\n")

    one = quick_run(["--sample", 0, *flags], script="tools/show_batch.py").stdout
    *sample, _ = one.splitlines()
    assert one.count("=== sample 0 of 1") == 1 and sample == shown.splitlines()[:len(sample)]
    late = quick_run(["--sample", 1, *flags], code=1, script="tools/show_batch.py")
    assert late.stderr == "show_batch.py: error: --sample 1: the data has samples 0 to 0\n"
    quick_run(["--bogus", *flags], code=2, script="tools/show_batch.py")


def test_show_batch_of_plain_text_and_of_a_stream(tokenizers, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": f"{i} " + "seven small pencils " * 3}
                                                for i in range(9)])
    for more in ((), ("--mask-documents",), ("--streaming",)):
        shown = quick_run(flags_for(tmp_path, tokenizers[None], path, "--seq-len", 40, "--batch-size",
                                    1, *more),
                          script="tools/show_batch.py").stdout
        assert shown.count("=== sample") == 1 and "--- document 2 of" in shown and EOS in shown
        num_tokens, num_trained = map(int, re.search(r"=== (\d+) tokens, (\d+) trained", shown).groups())
        num_documents = int(re.search(r"--- document 1 of (\d+)", shown)[1])
        # In one stream a document's first token is a target, too; told apart, each has one less.
        assert num_tokens == 40 and 40 - num_documents <= num_trained <= (41 - num_documents if more else 40)
        assert (num_trained == 40) == (not more)


# ----------------------------------------------------------------------------------------------------
# 2. What is refused: one line, exit code 1

def refused(tmp_path, tokenizer, rows, *more):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    message = error_line(quick_run(flags_for(tmp_path, tokenizer, path, *more), code=1))
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    return message.replace(str(path), "FILE").replace(" (--bad-rows skip leaves out one in a hundred)", "")


def with_template(tmp_path, template):
    path = tmp_path / "template.jinja"
    path.write_text(template)
    return "--chat-template", path


GOOD = {"messages": messages(SINGLE)}
REFUSED_TEMPLATES = {
    "no token is trained":
        "{% for m in messages %}{{ m['content'] + eos_token }}{% if false %}{% generation %}"
        "{% endgeneration %}{% endif %}{% endfor %}",
    "every token is trained":
        "{% generation %}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
        "{% endgeneration %}",
    "no end token is ever trained":
        "{% for m in messages %}{{ '<|im_start|>' }}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
        "{{ eos_token }}{% endfor %}",
}


@pytest.mark.parametrize("problem", REFUSED_TEMPLATES)
def test_masks_that_are_wrong(tokenizers, tmp_path, problem):
    flags = with_template(tmp_path, REFUSED_TEMPLATES[problem])
    message = refused(tmp_path, tokenizers["qwen2"], [GOOD] * 3, *flags)
    assert message.startswith("FILE (train): ") and problem in message


def test_no_end_token_by_prefixes(tokenizers, tmp_path):
    flags = with_template(tmp_path,
                          "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
                                    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    assert "no end token is ever trained" in refused(tmp_path, tokenizers["qwen2"], [GOOD] * 3, *flags)


def test_doubled_beginning_token(tokenizers, tmp_path):
    flags = with_template(tmp_path, "{{ bos_token }}" + CHAT_TEMPLATES["llama3"])
    message = refused(tmp_path, tokenizers["llama3"], [GOOD], *flags)
    assert message.startswith("FILE:1: two beginning-of-text tokens")
    # Plain text that brings its own, before which the tokenizer puts one.
    message = refused(tmp_path, tokenizers["llama3"], [{"text": "fine"}, {"text": BOS + "not so"}])
    assert message.startswith("FILE:2: two beginning-of-text tokens")


def test_template_that_refuses_a_role(tokenizers, tmp_path):
    rows = [GOOD, "", {"messages": messages(SYSTEM)}]
    message = refused(tmp_path, tokenizers["gemma"], rows)
    assert message == "FILE:3: TemplateError: System role not supported"
    message = refused(tmp_path, tokenizers["llama2"], [{"messages": messages([SINGLE[0], *SINGLE])}])
    assert message.startswith("FILE:1: TemplateError: Conversation roles must alternate")


MALFORMED = {
    "bad_json": (['{"messages": [}'], "FILE:3: not JSON ("),
    "no_object": (["[1, 2]"], "FILE:3: expected a JSON object, found list"),
    "no_assistant": ([{"messages": messages([("user", "Hi")])}], "FILE:3: no message of role 'assistant'"),
    "empty_messages": ([{"messages": []}], "FILE:3: expected messages as a list of objects"),
    "messages_are_text": ([{"messages": "Hi"}], "FILE:3: expected messages as a list of objects"),
    "messages_are_null": ([{"messages": None}], "FILE:3: expected messages as a list of objects"),
    "content_is_bool": ([{"messages": [{"role": "user", "content": True}]}],
                        "FILE:3: expected messages as a list"),
    "no_content": ([{"messages": [{"role": "assistant"}]}], "FILE:3: expected messages as a list of objects"),
    "answer_is_null": ([{"question": "1 + 1?", "answer": None}],
                       "FILE:3: expected messages as a list of objects"),
    "text_among_chats": ([{"text": "Hi"}], "FILE:3: chats and plain texts in one data set"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_rows(tokenizers, tmp_path, kind):
    rows, expected = MALFORMED[kind]
    assert refused(tmp_path, tokenizers["chatml_generation"], [GOOD, GOOD, *rows, GOOD]).startswith(expected)


def test_a_bad_row_that_another_process_finds(tokenizers, tmp_path):
    """From twenty thousand rows on several processes tokenise, where there are several cores."""
    rows = [{"text": f"{i} pencils"} for i in range(25_000)]
    assert refused(tmp_path, tokenizers[None], [*rows, "{"]).startswith("FILE:25001: not JSON (")


def test_empty_data_and_missing_columns(tokenizers, tmp_path):
    tokenizer = tokenizers["chatml_generation"]
    for rows in ([], [""] * 3):
        message = refused(tmp_path, tokenizer, rows)
        assert message == "--dataset FILE (train): no document at all"
    message = refused(tmp_path, tokenizer, [{"body": "Hi", "title": "x"}])
    assert message.startswith("FILE:1: no text in column 'text'; the row has: body, title. Name one with")
    message = refused(tmp_path, tokenizer, [GOOD], "--text-column", "body")
    assert message.startswith("FILE:1: no text in column 'body'; the row has: messages.")
    message = refused(tmp_path, tokenizer, [{"body": 3}], "--text-column", "body")
    assert message.startswith("FILE:1: no text in column 'body'; the row has: body.")
    message = refused(tmp_path, tokenizer, [GOOD], "--eval-split", write_rows(tmp_path / "none.jsonl", []))
    assert message.endswith("none.jsonl): no document at all")
    message = refused(tmp_path, tokenizer, [GOOD] * 3, "--eval-fraction", 1e-9)
    assert message == "--eval-fraction 1e-09 holds out nothing, or all, of 3 documents: change it"


def test_text_that_is_no_utf8(tokenizers, tmp_path):
    path = tmp_path / "latin1.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    message = error_line(quick_run(flags_for(tmp_path, tokenizers[None], path), code=1))
    assert message.startswith(f"{path}:2: ")


def test_data_of_a_single_token(tokenizers, tmp_path):
    """There is nothing to predict."""
    path = write_rows(tmp_path / "rows.jsonl", [{"text": ""}])
    error_line(quick_run(flags_for(tmp_path, tokenizers[None], path), code=1))


@pytest.mark.parametrize("packing", ["--packing", "--no-packing"])
def test_answers_beyond_seq_len(tokenizers, tmp_path, packing):
    """Cut away, they leave nothing to train: refused where no row has more, else without harm."""
    late = {"question": "why? " * 100, "answer": "Because."}
    flags = [packing, "--seq-len", 64, "--batch-size", 1]
    path = write_rows(tmp_path / "late.jsonl", [late] * 3)
    result = quick_run(flags_for(tmp_path, tokenizers["qwen2"], path, *flags), code=1)
    assert "--seq-len" in error_line(result)
    path = write_rows(tmp_path / "mixed.jsonl", [late] * 6 + [{"question": "1 + 1?", "answer": "2"}])
    quick_run(flags_for(tmp_path, tokenizers["qwen2"], path, *flags, "--checkpoint-dir", tmp_path / "mixed",
                        "--max-steps", 7))
    rows = read_metrics(tmp_path / "mixed")
    assert rows[-1]["train/skipped_steps"] == 0
    assert all(0 < row["train/loss"] < 10 for row in rows)


# ----------------------------------------------------------------------------------------------------
# 3. Whole runs

def test_fine_tuning_learns_to_answer_and_stop(tmp_path):
    """One conversation, learnt by heart: the model writes the answer, then the end token."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer", vocab_size=320)
    path = write_rows(tmp_path / "rows.jsonl", [{"question": "How many?", "answer": "Exactly 36."}])
    quick_run(flags_for(
        tmp_path, tokenizer, path, "--seq-len", 32, "--max-steps", 40, "--max-lr", 1e-2, "--min-lr", 1e-3,
        "--log-interval", 20, "--export"))
    assert read_metrics(tmp_path / "run")[-1]["train/loss"] < 0.05
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = (auto.from_pretrained(tmp_path / "run/hf")
                        for auto in (AutoModelForCausalLM, AutoTokenizer))
    prompt = tokenizer("How many?\n", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=30, do_sample=False)
    assert tokenizer.decode(written[0]) == f"How many?\nExactly 36.{EOS}"


def test_gsm8k_like_rows(tokenizers, tmp_path):
    path = write_gsm8k_like(tmp_path / "rows.jsonl", 30)
    args = train_llm.parse_args(flags_for(tmp_path, tokenizers["qwen2"], path, "--seq-len", 256))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert trained_rows(args) == [
        f"{QWEN_DEFAULT}<|im_start|>user\n{row['question']}<|im_end|>\n"
        f"<|im_start|>assistant\n[[{row['answer']}<|im_end|>]]\n" for row in rows]


@pytest.mark.slow
def test_gsm8k(tokenizers, tmp_path):
    """All of GSM8K with its test split held out, a few steps: rows, masks and counts."""
    folder = gsm8k_folder()
    if folder is None:
        pytest.skip("GSM8K is not on this machine (GSM8K_DIR)")
    flags = flags_for(tmp_path, tokenizers["chatml_generation"], folder, "--eval-split", "test", "--seq-len",
                      512, "--max-steps", 3, "--batch-size", 4)
    args = train_llm.parse_args(flags)
    data, tokenizer = train_llm.prepare_data(args), train_llm.load_tokenizer(args)
    for part, name in (("train", "train"), ("eval", "test")):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        documents = documents_in(data, part)
        assert len(documents) == len(rows) == {"train": 7473, "test": 1319}[name]
        for i in (*range(40), len(rows) // 2, len(rows) - 1):
            shown, whole = marked(tokenizer, *documents[i]), (
                f"<|im_start|>user\n{rows[i]['question']}<|im_end|>\n"
                f"<|im_start|>assistant\n[[{rows[i]['answer']}<|im_end|>]]\n")
            is_cut = len(documents[i][0]) > 512
            assert whole.startswith(shown.removesuffix("]]")) if is_cut else shown == whole
    # Evaluating all of the test split would take a minute: a file of its first rows stands in for it.
    few = write_rows(tmp_path / "few.jsonl", (folder / "test.jsonl").read_text().splitlines()[:20])
    result = quick_run([*flags, "--eval-split", few], timeout=200)
    metrics = read_metrics(tmp_path / "run")
    assert [row["step"] for row in metrics if "train/loss" in row] == [1, 2, 3]
    assert metrics[-1]["eval/tokens"] > 1000 and "read " in result.stdout and "7,473 rows" in result.stdout
