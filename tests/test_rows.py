"""Rows as people have them: forms of chats, tools, templates, tokenizers, bad and long rows, mixtures."""

import json
import random
import shutil
from collections import Counter

import fuzz_inputs
import pytest
import torch
import train_llm
from helpers import CHAT_TEMPLATES, documents_in, make_hf_model, make_tokenizer
from quick_runs import error_line, quick_run
from test_sft import marked

ASKED = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n[[4<|im_end|>]]\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    make_tokenizer(folder / "tokenizer", chat_template="chatml_generation")
    make_tokenizer(folder / "plain")
    return folder


def turns(*contents, **more):
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": content} | more.get(role, {}) for role, content in zip(roles, contents)]


def write_rows(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def flags_for(place, *datasets, tokenizer="tokenizer", more=()):
    return [str(token) for token in (
        "--from-scratch", "--model-size", "test", "--tokenizer", place / tokenizer, "--dataset", *datasets,
        "--data-cache", place / "cache", "--seq-len", 256, "--device", "cpu", *more)]


def prepare(place, rows, *more, tokenizer="tokenizer", name="rows.jsonl"):
    """(arguments, what `prepare_data` found) of rows, which may be a file."""
    folder = place / f"data{len(list(place.iterdir()))}"
    folder.mkdir()
    path = write_rows(folder / name, rows) if isinstance(rows, list) else rows
    args = train_llm.parse_args(flags_for(place, path, tokenizer=tokenizer, more=more))
    return args, train_llm.prepare_data(args)


def shown(place, rows, *more, **options):
    """The documents as text, trained tokens in [[ ]]."""
    args, data = prepare(place, rows, *more, **options)
    tokenizer = train_llm.load_tokenizer(args)
    return [marked(tokenizer, *document) for document in documents_in(data)]


def template_file(place, text):
    path = place / f"template{len(list(place.iterdir()))}.jinja"
    path.write_text(text)
    return "--chat-template", path


# ----------------------------------------------------------------------------------------------------
# 1. Forms of a chat

FORMS = {
    "messages": {"messages": turns("2+2?", "4")},
    "text_parts": {"messages": [{"role": role, "content": [{"type": "text", "text": text}]}
                                for role, text in (("user", "2+2?"), ("assistant", "4"))]},
    "json_text": {"messages": json.dumps(turns("2+2?", "4"))},
    "sharegpt": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    "sharegpt_json": {"conversations": json.dumps([{"from": "human", "value": "2+2?"},
                                                   {"from": "gpt", "value": "4"}])},
    "alpaca": {"instruction": "2+2?", "input": "", "output": "4"},
    "question_and_a_number": {"question": "2+2?", "answer": 4},
    "prompt": {"prompt": turns("2+2?"), "completion": "4"},
}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_same_chat(place, form, suffix):
    if suffix == "parquet":
        import datasets
        datasets.Dataset.from_list([FORMS[form]] * 2).to_parquet(place / f"{form}.parquet")
        assert shown(place, place / f"{form}.parquet") == [ASKED] * 2
    else:
        assert shown(place, [FORMS[form]]) == [ASKED]


def test_the_input_of_an_instruction(place):
    assert shown(place, [{"instruction": "add", "input": "2+2?", "output": "4"}]) == [
        ASKED.replace("2+2?", "add\n\n2+2?")]


TOOLS = ("{% if tools %}{{ '<|im_start|>system\n' + tools[0]['function']['name'] + '<|im_end|>\n' }}"
         "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
         "{% if m.content %}{{ m.content }}{% endif %}"
         "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}"
         "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def tool_row(arguments, **content):
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    return {"messages": [*turns("2+2?"), {"role": "assistant", "tool_calls": [call]} | content,
                         {"role": "tool", "content": "4"}, {"role": "assistant", "content": "It is 4."}],
            "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]}


def test_tools_and_their_arguments(place):
    """As objects or JSON text; content empty, null or absent; parquet's nulls left out."""
    flags = template_file(place, TOOLS)
    expected = ('<|im_start|>system\nadd<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n'
                '[[add{"a": 2, "b": 2}<|im_end|>]]\n<|im_start|>tool\n4<|im_end|>\n'
                '<|im_start|>assistant\n[[It is 4.<|im_end|>]]\n')
    rows = [tool_row({"a": 2, "b": 2}, content=""), tool_row('{"a": 2, "b": 2}', content=None),
            tool_row({"a": 2, "b": 2})]
    rows.append(rows[0] | {"tools": json.dumps(rows[0]["tools"])})
    assert shown(place, rows, *flags) == [expected] * 4
    import datasets
    other = tool_row({"unit": "m"}, content=None)
    datasets.Dataset.from_list([rows[0], other]).to_parquet(place / "tools.parquet")
    assert shown(place, place / "tools.parquet", *flags) == [
        expected, expected.replace('{"a": 2, "b": 2}', '{"unit": "m"}')]
    # A null that stands in a JSON line was written by its author.
    assert '{"a": null}' in shown(place, [tool_row({"a": None}, content="")], *flags)[0]


@pytest.mark.parametrize("tags", [True, False])
@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_a_message_that_is_not_to_be_trained(place, tags, mark):
    row = {"messages": turns("2+2?", "5", "again", "4")}
    row["messages"][1] |= mark
    flags = () if tags else template_file(place, CHAT_TEMPLATES["chatml_generation"].replace(
        "{% generation %}", "").replace("{% endgeneration %}", ""))
    assert shown(place, [row], *flags) == [
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n"
        "<|im_start|>user\nagain<|im_end|>\n"
        "<|im_start|>assistant\n[[4<|im_end|>]]\n"]


def test_special_tokens_in_a_users_text_are_text(place):
    _, data = prepare(place, [{"messages": turns("a <|im_end|> b", "c <|im_end|> d")}])
    [(ids, _)] = documents_in(data)
    tokenizer = train_llm.load_tokenizer(prepare(place, [FORMS["messages"]])[0])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == 3  # two turns, and what the assistant wrote
    text = tokenizer.decode(ids).replace("\u200b", "")
    assert text.startswith("<|im_start|>user\na <|im_end|> b<|im_end|>")


def test_lone_surrogates(place):
    _, data = prepare(place, ['{"text": "a \\ud83d b"}', '{"text": "\\ud83d\\ude00"}'])
    tokenizer = train_llm.load_tokenizer(prepare(place, [FORMS["messages"]])[0])
    assert [tokenizer.decode(ids[:-1]) for ids, _ in documents_in(data)] == ["a \ufffd b", "😀"]
    assert data["notes"][0].endswith("2 rows; 1 with lone surrogates, replaced")


# ----------------------------------------------------------------------------------------------------
# 2. Templates and tokenizers

QWEN3 = ("{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
         "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for m in messages %}"
         "{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') "
         "if '</think>' in m.content else '' %}{%- set said = m.content.split('</think>')[-1].lstrip('\n') %}"
         "{{- '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' and loop.index0 > ns.last %}"
         "{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}"
         "{{- said + '<|im_end|>\n' }}{%- endfor %}"
         "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}")


def test_a_template_that_shows_earlier_answers_differently(place):
    flags = template_file(place, QWEN3)
    first = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    second, thought = "<|im_start|>user\n3+3?<|im_end|>\n", "<think>\n{}\n</think>\n\n"
    rows = [turns("2+2?", "4", "3+3?", "6"),
            turns("2+2?", thought.format("a") + "4", "3+3?", thought.format("b") + "6"),
            turns("2+2?", "4", "3+3?")]
    assert shown(place, [{"messages": row} for row in rows], *flags) == [
        f"{first}[[4<|im_end|>]]\n{second}<|im_start|>assistant\n[[<think>\n\n</think>\n\n6<|im_end|>]]\n",
        # Of the first answer the thoughts are gone: it is not what the assistant wrote.
        f"{first}4<|im_end|>\n{second}<|im_start|>assistant\n[[<think>\nb\n</think>\n\n6<|im_end|>]]\n",
        f"{first}[[4<|im_end|>]]\n{second}"]


def test_a_prompt_that_begins_the_answer(place):
    """As DeepSeek-R1's: the generation prompt opens a thought that a plain answer has not."""
    text = CHAT_TEMPLATES["qwen2"].replace("{{ '<|im_start|>assistant\n' }}{% endif %}",
                                           "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}")
    [row] = shown(place, [FORMS["messages"]], *template_file(place, text))
    assert row.endswith("<|im_start|>assistant\n[[4<|im_end|>]]\n")


@pytest.mark.parametrize("where", ["folder", "config"])
def test_named_templates(place, tmp_path, where):
    folder = shutil.copytree(place / "plain", tmp_path / "named")
    named = {"default": CHAT_TEMPLATES["chatml_generation"], "tool_use": TOOLS}
    if where == "folder":
        (folder / "chat_template.jinja").write_text(named["default"])
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates/tool_use.jinja").write_text(TOOLS)
    else:
        path = folder / "tokenizer_config.json"
        listed = [{"name": name, "template": text} for name, text in named.items()]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": listed}))
    rows = [FORMS["messages"], tool_row({"a": 2}, content="")]
    plain, with_tools = shown(place, rows, tokenizer=folder)
    assert plain == ASKED and with_tools.startswith("<|im_start|>system\nadd<|im_end|>\n")
    # Another template of that name is another set of tokens.
    if where == "folder":
        (folder / "additional_chat_templates/tool_use.jinja").write_text(TOOLS.replace("system", "tools"))
        path = write_rows(tmp_path / "rows.jsonl", rows)
        args = train_llm.parse_args(flags_for(place, path, tokenizer=folder))
        ids = documents_in(train_llm.prepare_data(args))[1][0]
        assert train_llm.load_tokenizer(args).decode(ids).startswith("<|im_start|>tools\nadd")


CHARACTERS = """
import json, os
from transformers.tokenization_python import PythonBackend
class CharTokenizer(PythonBackend):
    vocab_files_names = {"vocab_file": "vocab.json"}
    model_input_names = ["input_ids", "attention_mask"]
    def __init__(self, vocab_file=None, **options):
        self.known = json.load(open(vocab_file)) if vocab_file else {"<e>": 0}
        self.names = {number: text for text, number in self.known.items()}
        options.setdefault("eos_token", "<e>")
        super().__init__(**options)
    @property
    def vocab_size(self): return len(self.known)
    def get_vocab(self): return dict(self.known)
    def _tokenize(self, text, **options): return list(text)
    def _convert_token_to_id(self, token): return self.known.get(token, 1)
    def _convert_id_to_token(self, number): return self.names.get(number, "?")
"""


def test_a_tokenizer_without_a_fast_version(place):
    """Trains on texts; for chats one line says what is missing."""
    folder = place / "characters"
    folder.mkdir()
    (folder / "tokenization_chars.py").write_text(CHARACTERS)
    vocabulary = {text: number for number, text in enumerate(["<e>", "?", *"abc 2+4"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "CharTokenizer", "eos_token": "<e>",
         "auto_map": {"AutoTokenizer": ["tokenization_chars.CharTokenizer", None]}}))
    _, data = prepare(place, [{"text": "abc"}], "--trust-remote-code", tokenizer=folder)
    assert documents_in(data) == [([2, 3, 4, 0], [])]
    with pytest.raises(train_llm.UserError, match="chats need a tokenizer with a fast version"):
        prepare(place, [FORMS["messages"]], "--trust-remote-code", tokenizer=folder)


def test_the_vocabulary_counts_by_what_occurs(place, tmp_path):
    """A tokenizer of more tokens than the embedding has rows is right until the data hold one of them."""
    from transformers import AutoTokenizer

    model = make_hf_model("llama", tmp_path / "model", vocab_size=320)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(321 - len(tokenizer))])
    tokenizer.save_pretrained(model)
    for text, code in (("fine", 0), ("<extra12>", 1)):
        rows = write_rows(tmp_path / f"{code}.jsonl", [{"text": f"{text} {text}"}] * 3)
        result = quick_run(["--hf-model", model, "--dataset", rows, "--max-steps", 1, "--no-export",
                            "--seq-len", 16, "--device", "cpu"], code=code, cwd=tmp_path)
        if code:
            assert "embeds 320 tokens, the data hold token 320: use its own tokenizer" in error_line(result)
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)


# ----------------------------------------------------------------------------------------------------
# 3. Long and bad rows

def test_chats_longer_than_a_sequence(place):
    """Cut or dropped by choice; what is refused is decided by what is left."""
    long = [{"messages": turns(f"count {i}", "one two three four " * 30)} for i in range(6)]
    rows = [*long, FORMS["messages"]]
    args, data = prepare(place, rows, "--seq-len", 64)
    assert data["notes"][0].endswith("7 rows; 6 cut to --seq-len")
    args.mask_documents = True
    assert len(train_llm.open_datasets(args, data)[0]) == 7
    args, data = prepare(place, rows, "--seq-len", 64, "--long-chats", "drop")
    assert data["notes"][0].endswith("7 rows; 6 left out as longer than --seq-len")
    args.mask_documents = True
    [sample] = train_llm.open_datasets(args, data)[0]
    assert (sample["labels"] != train_llm.IGNORE).sum() == 2
    for choice, said in (("cut", "no end token is ever trained"), ("drop", "no token is trained")):
        with pytest.raises(train_llm.UserError, match=f"{said}.*--seq-len 64 cuts 6 of 6 chats"):
            prepare(place, long, "--seq-len", 64, "--long-chats", choice)


BAD = ["{", "[1]", '{"text": 5}', '{"other": "x"}', '{"text": "caf\udce9"}', '{"messages": []}']


@pytest.mark.parametrize("bad", BAD)
def test_bad_rows(place, tmp_path, bad):
    """Named by file and line, or left out, counted and listed while they are few."""
    good = ['{"text": "a document"}'] * 200
    lines = [line.encode("utf-8", "surrogateescape") for line in [*good[:7], bad, *good]]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(train_llm.UserError, match=f"^{path}:8: "):
        prepare(place, path)
    _, data = prepare(place, path, "--bad-rows", "skip")
    assert len([ids for ids, _ in documents_in(data) if ids]) == 207
    assert "208 rows; 1 bad rows left out, see " in data["notes"][0]
    listed = (data["notes"][0].rpartition("see ")[2])
    assert open(listed).read().startswith(f"{path}:8: ")
    # Tokens that were made with skip do not hide the bad row from stop.
    with pytest.raises(train_llm.UserError, match=f"^{path}:8: "):
        prepare(place, path)
    path.write_bytes(b"\n".join([*lines[:7], *[lines[7]] * 3, *lines[8:]]))
    with pytest.raises(train_llm.UserError, match=f"^{path}:8: .*3 of 210 rows are bad"):
        prepare(place, path, "--bad-rows", "skip")


def test_a_bad_row_of_a_table_is_named_by_its_number(place):
    import datasets
    table = datasets.Dataset.from_dict({"text": ["fine", "fine", None]})
    table.to_parquet(place / "table.parquet")
    with pytest.raises(train_llm.UserError, match=r"table.parquet \(train\) row 2: no text in column 'text'"):
        prepare(place, place / "table.parquet")


# ----------------------------------------------------------------------------------------------------
# 4. Several data sets

def mixed(place, tmp_path, *weights, seq_len=64):
    """Samples of two passes of a mixture of 30 and 10 documents, each of one sample; counted by document."""
    names = [write_rows(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i} one two three four five six"}
                                                     for i in range(count)])
             for name, count in (("a", 30), ("b", 10))]
    entries = [f"{name}:{weight}" if weight else name for name, weight in zip(names, weights)]
    args = train_llm.parse_args(flags_for(place, *entries, more=["--seq-len", seq_len, "--no-packing"]))
    data = train_llm.prepare_data(args)
    args.mask_documents = False
    train_set, _ = train_llm.open_datasets(args, data)
    passes = [[tuple(train_set.sample(train_llm.sample_at(p, len(train_set), 0), p // len(train_set))
                     ["input_ids"].tolist()) for p in range(n * len(train_set), (n + 1) * len(train_set))]
              for n in range(6)]
    sources = [{tuple(ids[:seq_len]) for ids, _ in documents_in({"train": [part]})} for part in data["train"]]
    shares = [[sum(sample in source for sample in samples) for source in sources] for samples in passes]
    return train_set, shares, passes


def test_a_mixture_without_weights_takes_each_sample_once(place, tmp_path):
    train_set, shares, passes = mixed(place, tmp_path, None, None)
    assert len(train_set) == 40 and shares == [[30, 10]] * 6
    assert all(len(set(samples)) == 40 for samples in passes)


def test_weights_are_shares_of_the_samples(place, tmp_path):
    train_set, shares, passes = mixed(place, tmp_path, 0.3, 0.7)
    assert train_set.counts == [12, 28] and shares == [[12, 28]] * 6
    # Over the passes each sample of a part is taken as often as any other, give or take one.
    found = Counter(sample for samples in passes for sample in samples)
    counts = sorted(found.values())
    assert Counter(counts) == {2: 18, 3: 12, 16: 2, 17: 8}
    assert len({sample for sample in passes[0]}) == 12 + 10  # no document of the larger part twice in a pass


def test_weights_from_a_file_and_back(place, tmp_path):
    for name in ("a b.jsonl", "c.jsonl"):
        write_rows(tmp_path / name, [{"text": name}])
    a, c = tmp_path / "a b.jsonl", tmp_path / "c.jsonl"
    given = train_llm.parse_args(flags_for(place, f"{a}:0.7", f"{c}:.3"))
    assert train_llm.dataset_names(given) == [(str(a), 0.7), (str(c), 0.3)]
    for datasets, expected in ((given.dataset, [(str(a), 0.7), (str(c), 0.3)]), (a, [(str(a), None)]),
                               (f"{c}:1 {c}:2", [(str(c), 1.0), (str(c), 2.0)])):
        config = tmp_path / "config.yaml"
        config.write_text(f"from-scratch: true\ntokenizer: a/b\ndataset: {json.dumps(str(datasets))}\n")
        assert train_llm.dataset_names(train_llm.parse_args(["--config", str(config)])) == expected


@pytest.mark.parametrize("entries", [["a/a:0.5", "b/b"], ["a/a:0", "b/b:1"]])
def test_weights_that_mean_nothing(entries, capsys):
    with pytest.raises(SystemExit):
        train_llm.parse_args(["--from-scratch", "--tokenizer", "a/b", "--dataset", *entries])
    assert "give all of them a weight above 0, or none" in capsys.readouterr().err


def test_weights_of_streams_are_refused(capsys):
    with pytest.raises(SystemExit):
        train_llm.parse_args(["--from-scratch", "--tokenizer", "a/b", "--streaming", "--dataset", "a/a:1"])
    assert "--streaming goes with neither --bad-rows skip nor weights" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------
# 5. Whatever a file holds

def problem_of(case):
    """What a case of fuzz_inputs breaks: each failure is a UserError that names the file or the row."""
    args = train_llm.parse_args([str(token) for token in case.args])
    try:
        data = train_llm.prepare_data(args)
        args.mask_documents = True
        train_llm.open_datasets(args, data)
        if args.streaming:
            next(train_llm.streamed_batches(args, train_llm.Ranks(0, 0, 1, torch.device("cpu")), {}))
    except train_llm.UserError as error:
        return "" if any(name in str(error) for name in case.names) else f"names nothing: {error}"
    return "accepted" if case.must_fail else ""


@pytest.mark.slow
def test_500_malformed_rows_and_files(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(place / "rows.jsonl", [FORMS["messages"]])
    faults, number, tried = [], 0, 0
    while tried < 500:
        number += 1
        folder = tmp_path / str(number)
        folder.mkdir()
        case = (fuzz_inputs.rows if number % 5 else fuzz_inputs.files)(random.Random(number), place, folder)
        if case.script is not train_llm:
            continue
        tried += 1
        try:
            problem = problem_of(case)
        except SystemExit:  # a flag's: nothing of that name is there
            said = capsys.readouterr().err
            problem = "" if any(name in said for name in case.names) else said
        faults += [f"case {number}: {case.what[:200]}: {problem}"] * bool(problem)
        shutil.rmtree(folder)
    assert not faults, "\n".join(faults)
