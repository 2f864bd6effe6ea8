"""Data: every format gives the same tokens, once; samples, packs and the global order; held-out loss."""

import argparse
import gzip
import json
import math
import os
import random
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
import torch
import train_llm
from helpers import (
    CHAT_TEMPLATES, EOS, REPO, documents_in, make_hf_model, make_tokenizer, read_metrics, write_gsm8k_like,
)
from quick_runs import quick_ranks, quick_run

IGNORE = train_llm.IGNORE
SEQ_LEN = 64


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tokenizer; caches and data sets of single tests go beside it."""
    folder = tmp_path_factory.mktemp("data")
    make_tokenizer(folder / "tokenizer")
    make_tokenizer(folder / "larger", vocab_size=600)
    make_tokenizer(folder / "chat_tokenizer", chat_template="chatml_generation")
    return folder


def sentences(n, seed=0, longest=40):
    """n different texts of 1 to `longest` words."""
    rng = random.Random(seed)
    words = "seven small pencils cost three dollars each and Tom gives away what is left of them".split()
    return [f"{i}: " + " ".join(rng.choices(words, k=rng.randint(1, longest))) for i in range(n)]


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts_file(path, texts, column="text"):
    return write_jsonl(path, [{column: text} for text in texts])


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def make_args(place, dataset, *flags, tokenizer="tokenizer", cache="cache"):
    return train_llm.parse_args([str(token) for token in (
        "--from-scratch", "--model-size", "test", "--tokenizer", place / tokenizer, "--dataset", dataset,
        "--data-cache", place / cache, "--seq-len", SEQ_LEN, "--device", "cpu", *flags)])


def open_data(args):
    """(train, held out or None) as the training opens them."""
    data = train_llm.prepare_data(args)
    train_set, eval_sets = train_llm.open_datasets(args, data)
    return train_set, eval_sets.get("eval")


def tokens_of(args, split="train"):
    """The token ids of each document of a split."""
    return [ids for ids, _ in documents_in(train_llm.prepare_data(args), split)]


def expected_documents(place, texts):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place / "tokenizer")
    end = tokenizer.convert_tokens_to_ids(EOS)
    return [[*tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in texts]


# ----------------------------------------------------------------------------------------------------
# 1. Formats

def write_format(kind, folder, texts, column):
    """The same texts as a data set of some kind; returns what --dataset takes."""
    import datasets

    folder.mkdir()
    rows = [{"id": i, column: text} for i, text in enumerate(texts)]
    table, half = datasets.Dataset.from_list(rows), len(rows) // 2
    if kind == "jsonl":
        return write_jsonl(folder / "rows.jsonl", rows)
    if kind == "jsonl_with_blank_lines":
        path = folder / "rows.jsonl"
        path.write_text("\n" + "\n\n".join(json.dumps(row) for row in rows))
        return path
    if kind in ("jsonl.gz", "jsonl.zst", "JSONL", "ndjson", "array.json"):
        path, lines = folder / f"rows.{kind}", "".join(json.dumps(row) + "\n" for row in rows).encode()
        lines = json.dumps(rows, indent=1).encode() if kind == "array.json" else lines
        path.write_bytes(gzip.compress(lines) if kind == "jsonl.gz" else lines)
        if kind == "jsonl.zst":
            path.write_bytes(pyarrow.compress(lines, "zstd", asbytes=True))
        return path
    if kind == "arrow":
        table.save_to_disk(folder / "saved")
        return next((folder / "saved").glob("*.arrow")).rename(folder / "rows.arrow")
    if kind == "csv.gz":
        path = folder / "rows.csv"
        table.to_csv(path, index=False)
        (folder / "rows.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
        return folder / "rows.csv.gz"
    if kind == "parquet":
        table.to_parquet(folder / "rows.parquet")
        return folder / "rows.parquet"
    if kind == "csv":
        table.to_csv(folder / "rows.csv", index=False)
        return folder / "rows.csv"
    if kind == "folder_of_txt":
        for i, text in enumerate(texts):
            (folder / f"{i:04d}.txt").write_text(text)
        return folder
    if kind == "folder_of_parquet_shards":
        for number, part in enumerate((rows[:half], rows[half:])):
            name = f"train-{number:05d}-of-00002.parquet"
            datasets.Dataset.from_list(part).to_parquet(folder / name)
        return folder
    if kind == "saved_dataset":
        table.save_to_disk(folder / "saved")
        return folder / "saved"
    if kind == "saved_dataset_dict":
        datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(folder / "saved")
        return folder / "saved"
    raise ValueError(kind)


KINDS = ["jsonl", "jsonl_with_blank_lines", "jsonl.gz", "jsonl.zst", "JSONL", "ndjson", "array.json", "arrow",
         "parquet", "csv", "csv.gz", "folder_of_txt", "folder_of_parquet_shards", "saved_dataset",
         "saved_dataset_dict"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_format_gives_the_same_tokens(place, tmp_path, kind):
    texts = ["Tom has 15 apples.\nHe gives 4 away, \"all\" of them, at once.", "ünïcödé, ☃ and a\ttab",
             *sentences(20)]
    expected = expected_documents(place, texts)
    columns = [("text", [])]
    if kind != "folder_of_txt":
        columns.append(("body", ["--text-column", "body"]))
    for column, flags in columns:
        dataset = write_format(kind, tmp_path / column, texts, column)
        assert tokens_of(make_args(place, dataset, *flags)) == expected


def test_text_column_wins_over_a_conversation(place, tmp_path):
    rows = [{"question": f"How many? {i}", "answer": f"{i} of them."} for i in range(8)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    expected = expected_documents(place, [row["answer"] for row in rows])
    assert tokens_of(make_args(place, path, "--text-column", "answer")) == expected


def test_folder_with_splits(place, tmp_path):
    train, test = sentences(12), sentences(7, seed=1)
    texts_file(tmp_path / "my data" / "train.jsonl", train)
    texts_file(tmp_path / "my data" / "test.jsonl", test)
    folder = tmp_path / "my data"
    args = make_args(place, folder, "--eval-split", "test")
    assert tokens_of(args) == expected_documents(place, train)
    assert tokens_of(args, "eval") == expected_documents(place, test)
    args = make_args(place, folder, "--dataset-split", "test")
    assert tokens_of(args) == expected_documents(place, test)
    with pytest.raises(train_llm.UserError, match=r"no file of split 'validation' among its 2 data files"):
        open_data(make_args(place, folder, "--eval-split", "validation"))


NAMES = {  # name of a file: the split that it is of; the others are for training
    "train.jsonl": "train", "train-00001-of-00003.parquet": "train", "my_train.csv": "train",
    "data.train.jsonl.gz": "train", "train/part0.txt": "train", "Test.JSONL": "test",
    "gsm8k-test-00000-of-00001.parquet": "test", "validation/a.csv": "validation",
    "how to train a dog.txt": None, "unit test guide.txt": None, "val d'isere.txt": None,
    "eval of poems.txt": None, "history of rome.txt": None, "untested.txt": None, "latest.txt": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_split(name):
    found = train_llm.split_words(Path(name)) & {"train", "test", "validation", "val", "eval"}
    assert found == ({NAMES[name]} if NAMES[name] else set())


def read_note(place, folder, *flags):
    data = train_llm.prepare_data(make_args(place, folder, *flags))
    [note] = data["notes"]
    return len(documents_in(data)), note.partition("): ")[2]


def test_a_folder_of_all_sorts(place, tmp_path):
    """Each file is read once, or counted among those that are not."""
    row = json.dumps({"text": "a document"}) + "\n"
    texts = ["how to train a dog", "val d'isere", "history of rome"]
    for number in range(4):
        (tmp_path / f"part{number}.jsonl.gz").write_bytes(gzip.compress(row.encode()))
    for name in ("part4.jsonl", "UPPER.JSONL", ".hidden.jsonl"):
        (tmp_path / name).write_text(row)
    for name in texts:
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints/part4-checkpoint.jsonl").write_text(row)
    (tmp_path / "README.md").write_text("words")
    os.mkfifo(tmp_path / "fifo.jsonl")
    assert read_note(place, tmp_path) == (
        9, "9 of 12 files, 2 hidden, 1 of another kind, 70 tokens in 9 rows")
    (tmp_path / "train.jsonl").write_text(row)
    assert read_note(place, tmp_path) == (
        1, "1 of 13 files, 2 hidden, 1 of another kind, 9 of another split, 7 tokens in 1 rows")


def test_a_folder_of_lines_and_tables(place, tmp_path):
    texts_file(tmp_path / "rows.jsonl", ["one"])
    (tmp_path / "rows.csv").write_text("text\ntwo\n")
    with pytest.raises(train_llm.UserError, match="JSON or texts beside tables: name them one by one"):
        open_data(make_args(place, tmp_path))


def test_what_is_not_there(place, tmp_path, capsys):
    for name in (tmp_path / "nothing", "missing/", "rows.JSONL", "./x", "a/b/c"):
        with pytest.raises(SystemExit):
            make_args(place, name)
        assert f"--dataset {name}: no such file or folder" in capsys.readouterr().err
    with pytest.raises(train_llm.UserError, match="my_texts .*: no such file or folder, and the hub"):
        open_data(make_args(place, "my_texts"))


def test_eval_split_of_a_saved_dataset_and_of_a_file(place, tmp_path):
    import datasets

    train, test = sentences(9), sentences(5, seed=1)
    tables = {name: datasets.Dataset.from_dict({"text": texts})
              for name, texts in (("train", train), ("test", test))}
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "saved")
    held_out_file = texts_file(tmp_path / "other.jsonl", test)
    for flags in ((tmp_path / "saved", "--eval-split", "test"),
                  (texts_file(tmp_path / "rows.jsonl", train), "--eval-split", held_out_file)):
        args = make_args(place, *flags)
        assert tokens_of(args) == expected_documents(place, train)
        assert tokens_of(args, "eval") == expected_documents(place, test)


def test_a_long_text_file_is_one_document(place, tmp_path):
    text = "\n".join(sentences(18_000, longest=12))  # longer than two of the pieces that it is read in
    assert len(text) > 600_000
    path = tmp_path / "book.txt"
    path.write_text(text)
    tokens = [token for ids in tokens_of(make_args(place, path)) for token in ids]
    end = expected_documents(place, [""])[0][0]
    assert tokens.count(end) == 1 and tokens[-1] == end
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(place / "tokenizer").decode(tokens[:-1]) == text


def test_a_vocabulary_beyond_16_bits(place, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place / "tokenizer")
    tokenizer.add_tokens([f"<{i}>" for i in range(66_000)])
    tokenizer.save_pretrained(tmp_path / "large")
    path = texts_file(tmp_path / "rows.jsonl", ["<65999> and <3>", "<65000>"])
    train_set, _ = open_data(make_args(tmp_path, path, tokenizer="large"))
    ids = [tokenizer.convert_tokens_to_ids(f"<{i}>") for i in (65999, 3, 65000)]
    flat = [token for ids in tokens_of(make_args(tmp_path, path, tokenizer="large")) for token in ids]
    assert max(ids) > 1 << 16 and [token for token in flat if token in ids] == ids
    assert train_set[0]["input_ids"].tolist()[:len(flat) - 1] == flat[:-1]


def test_eval_fraction_holds_out_documents_for_good(place, tmp_path):
    texts = sentences(400)
    path = texts_file(tmp_path / "rows.jsonl", texts)
    parts = {}
    for seed in (0, 1):
        args = make_args(place, path, "--eval-fraction", "0.2", "--seed", seed)
        train, held_out = ([tuple(ids) for ids in tokens_of(args, split)] for split in ("train", "eval"))
        assert not set(train) & set(held_out)
        assert sorted(train + held_out) == sorted(map(tuple, expected_documents(place, texts)))
        # Drawn document by document: 80 of 400, with a standard deviation of 8.
        assert 48 < len(held_out) < 112
        parts[seed] = set(held_out)
    assert parts[0] != parts[1]


# ----------------------------------------------------------------------------------------------------
# 2. Tokenised once

def token_files(cache):
    return sorted(path.name for path in cache.glob("encode-*.arrow"))


def test_tokens_are_found_again(place, tmp_path):
    texts = sentences(10)
    path, cache = texts_file(tmp_path / "rows.jsonl", texts), tmp_path / "cache"

    def identity(*flags, dataset=path, **options):
        return train_llm.prepare_data(make_args(place, dataset, *flags, cache=cache, **options))["identity"]

    first = identity()
    [file] = token_files(cache)
    written = (cache / file).stat()
    assert identity("--seq-len", 32, "--batch-size", 3, "--no-packing", "--seed", 5) == first
    kept = (cache / file).stat()
    assert token_files(cache) == [file]
    assert (kept.st_ino, kept.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)  # not tokenised again
    # The same bytes under another name, and another time, are the same data.
    assert identity(dataset=shutil.copy(path, tmp_path / "copy.jsonl")) == first
    os.utime(path, (1e9, 1e9))
    assert identity() == first
    texts[3] += "!"
    others = [identity(dataset=texts_file(path, texts)), identity(tokenizer="larger"),
              identity("--eval-fraction", 0.5), identity("--eval-fraction", 0.5, "--seed", 1)]
    assert len({first, *others}) == 5


def shown(script, place, path, *flags):
    """What tools/show_batch.py prints of a script's first samples."""
    return quick_run([
        script, "--from-scratch", "--model-size", "test", "--tokenizer", place / "chat_tokenizer",
        "--dataset", path, "--data-cache", path.parent / "cache", "--seq-len", SEQ_LEN, "--batch-size", 1,
        *flags],
        script="tools/show_batch.py").stdout


def test_an_edit_of_the_script_changes_the_tokens(place, tmp_path):
    """At the `EDIT:` mark of the section, in any function that it calls, and in a template."""
    path, source = write_jsonl(tmp_path / "rows.jsonl", [chat("How many?", "Three.")]), REPO / "train_llm.py"
    before = shown(source, place, path)
    for number, (old, new) in enumerate([
            ('            return row[name] or []\n',
             '            return [{"role": "system", "content": "EDITED"}, *row[name]]\n'),
            ("    return text, spans\n\n\n", '    return text + "EDITED", spans\n\n\n')]):
        assert source.read_text().count(old) == 1
        copy = tmp_path / f"copy{number}.py"
        copy.write_text(source.read_text().replace(old, new))
        flags = ["--chat-template", tmp_path / "plain.jinja"] if number else []
        tags = re.compile("{% (end)?generation %}")
        (tmp_path / "plain.jinja").write_text(tags.sub("", CHAT_TEMPLATES["chatml_generation"]))
        assert "EDITED" in shown(copy, place, path, *flags) and "EDITED" not in before
    assert shown(source, place, path) == before
    (tmp_path / "mine.jinja").write_text(CHAT_TEMPLATES["chatml_generation"].replace(">assistant", ">EDITED"))
    assert "EDITED" in shown(source, place, path, "--chat-template", tmp_path / "mine.jinja")


def test_an_interrupted_tokenisation_is_done_again(place, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "one"}, {"other": 1}])
    args = make_args(place, path, cache=tmp_path / "cache")
    with pytest.raises(train_llm.UserError, match="rows.jsonl:2: no text in column 'text'"):
        train_llm.prepare_data(args)
    assert not token_files(tmp_path / "cache")
    texts_file(path, ["one", "two!"])
    assert len(tokens_of(args)) == 2


def test_processes_that_start_together_tokenise_once(place, tmp_path):
    path = texts_file(tmp_path / "rows.jsonl", sentences(60))
    quick_ranks([
        "--from-scratch", "--model-size", "test", "--tokenizer", place / "tokenizer", "--dataset", path,
        "--data-cache", tmp_path / "cache", "--seq-len", SEQ_LEN, "--max-steps", 2, "--checkpoint-dir",
        tmp_path / "run", "--no-export", "--device", "cpu"], 2)
    assert len(token_files(tmp_path / "cache")) == 1 and len(list((tmp_path / "cache").glob("pack-*"))) == 1


# ----------------------------------------------------------------------------------------------------
# 3. Samples

@pytest.fixture(scope="module")
def texts_path(place):
    return texts_file(place / "texts.jsonl", sentences(61))


@pytest.fixture(scope="module")
def chats_path(place):
    """Chats of all lengths; some are longer than SEQ_LEN, and one has its answer beyond it."""
    texts = sentences(80, longest=9)
    rows = [chat(texts[i], texts[i + 1]) for i in range(0, 78, 2)]
    return write_jsonl(place / "chats.jsonl", [*rows, chat("why? " * 40, "Because."), *(
        chat(f"{i}?", "Because it is so. " * i) for i in range(8, 12))])


def test_stream_every_token_is_a_target_once(place, texts_path):
    train_set, _ = open_data(make_args(place, texts_path, "--no-mask-documents"))
    stream = [token for document in expected_documents(place, sentences(61)) for token in document]
    samples = [train_set[i] for i in range(len(train_set))]
    assert all(len(sample[key]) == SEQ_LEN for sample in samples for key in sample)
    inputs = [token for sample in samples for token in sample["input_ids"].tolist()]
    labels = [token for sample in samples for token in sample["labels"].tolist()]
    padding = len(samples) * SEQ_LEN - (len(stream) - 1)
    assert 0 <= padding < SEQ_LEN
    assert inputs == stream[:-1] + [0] * padding
    assert labels == stream[1:] + [IGNORE] * padding
    positions = [place for sample in samples for place in sample["position_ids"].tolist()]
    assert positions == [i % SEQ_LEN for i in range(len(positions) - padding)] + [0] * padding


def test_stream_with_masked_documents(place, texts_path):
    train_set, _ = open_data(make_args(place, texts_path, "--mask-documents"))
    documents = expected_documents(place, sentences(61))
    stream = [(d, p, token) for d, document in enumerate(documents) for p, token in enumerate(document)]
    num_targets = 0
    for i in range(len(train_set)):
        sample = {key: value.tolist() for key, value in train_set[i].items()}
        for t in range(SEQ_LEN):
            at = i * SEQ_LEN + t
            if at >= len(stream) - 1:
                assert (sample["input_ids"][t], sample["labels"][t]) == (0, IGNORE)
                continue
            document, place_in_document, token = stream[at]
            assert sample["input_ids"][t] == token
            # Positions start again where a document does, and at the sample's beginning.
            assert sample["position_ids"][t] == min(place_in_document, t)
            follows = stream[at + 1][0] == document
            assert sample["labels"][t] == (stream[at + 1][2] if follows else IGNORE)
            num_targets += follows
    assert num_targets == len(stream) - len(documents)


def test_pieces_of_texts_without_packing(place, texts_path):
    args = make_args(place, texts_path, "--no-packing")
    train_set, _ = open_data(args)
    expected = []
    for ids in expected_documents(place, sentences(61)):
        targets = [*ids[1:], IGNORE]
        starts = [start for start in range(0, len(ids), SEQ_LEN) if len(ids) - start > 1]
        expected += [(ids[start:start + SEQ_LEN], targets[start:start + SEQ_LEN]) for start in starts]
    samples = [{key: value.tolist() for key, value in train_set[i].items()} for i in range(len(train_set))]
    assert [(sample["input_ids"], sample["labels"]) for sample in samples] == expected
    assert all(sample["position_ids"] == list(range(len(sample["input_ids"]))) for sample in samples)
    batch = train_llm.collate([train_set[i] for i in range(3)], args, torch.device("cpu"))
    longest = max(len(expected[i][0]) for i in range(3))
    for i in range(3):
        ids, labels = expected[i]
        short = longest - len(ids)
        assert batch["input_ids"][i].tolist() == ids + [0] * short
        assert batch["labels"][i].tolist() == labels + [IGNORE] * short


def chat_pieces(place, path, length=SEQ_LEN):
    """[(ids, labels)] of each chat, cut to `length`, from the template written out."""
    from transformers import AutoTokenizer

    tokenizer, pieces = AutoTokenizer.from_pretrained(place / "chat_tokenizer"), []
    for line in path.read_text().splitlines():
        question, answer = (message["content"] for message in json.loads(line)["messages"])
        parts = [(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", 0),
                 (f"{answer}<|im_end|>", 1),
                 ("\n", 0)]
        encoded = [(tokenizer(text, add_special_tokens=False)["input_ids"], flag) for text, flag in parts]
        ids = [token for tokens, _ in encoded for token in tokens]
        flags = [flag for tokens, flag in encoded for _ in tokens]
        labels = [token if flag else IGNORE for token, flag in zip(ids[1:], flags[1:])] + [IGNORE]
        pieces.append((tuple(ids[:length]), tuple(labels[:length])))
    return pieces


def split_at_positions(sample):
    """[(ids, labels)] of a sample, cut where its positions start again; padding stays behind the last."""
    ids, labels, positions = (sample[key].tolist() for key in ("input_ids", "labels", "position_ids"))
    last = max(t for t, position in enumerate(positions) if position)
    starts = [t for t, position in enumerate(positions[:last]) if position == 0]
    return [(tuple(ids[a:b]), tuple(labels[a:b])) for a, b in zip(starts, [*starts[1:], len(ids)])]


def test_packed_chats(place, chats_path):
    pieces = chat_pieces(place, chats_path)
    # A chat whose prompt alone fills a sample has nothing to train and is left out.
    expected = Counter(piece for piece in pieces if set(piece[1]) != {IGNORE})
    assert sum(expected.values()) == len(pieces) - 1
    num_cut = sum(len(ids) > SEQ_LEN for ids, _ in chat_pieces(place, chats_path, 1000))
    assert 2 < num_cut < 20
    for flags in ((), ("--no-packing",)):
        args = make_args(place, chats_path, *flags, tokenizer="chat_tokenizer")
        train_set, _ = open_data(args)
        assert args.mask_documents
        found = Counter()
        for i in range(len(train_set)):
            sample = train_set[i]
            *whole, (ids, labels) = split_at_positions(sample)
            found.update(whole)
            if flags:
                assert not whole
                found[ids, labels] += 1
                continue
            assert len(sample["input_ids"]) == SEQ_LEN
            # What follows the last document of a pack is padding.
            [piece] = [p for p in expected if (ids[:len(p[0])], labels[:len(p[1])]) == p
                       and set(ids[len(p[0]):]) <= {0} and set(labels[len(p[1]):]) <= {IGNORE}]
            found[piece] += 1
        assert found == expected
        [note] = train_llm.prepare_data(args)["notes"]
        assert f"; {num_cut - 1} cut to --seq-len; 1 left out with nothing to train" in note
        assert (len(train_set) < 36) == (not flags)


# ----------------------------------------------------------------------------------------------------
# 4. Packs

def reference_best_fit(sizes, capacity):
    """Best-fit decreasing, the slow and plain way: how much room each bin has left."""
    rooms = []
    for size in sorted(sizes, reverse=True):
        fitting = [b for b, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=lambda b: rooms[b])] -= size
        else:
            rooms.append(capacity - size)
    return rooms


@pytest.mark.parametrize("capacity, low, high, excess", [
    (2048, 1, 700, 0.002), (2048, 1, 2048, 0.01), (64, 2, 20, 0.005), (100, 100, 100, 0.0), (10, 1, 1, 0.0),
])
def test_pack_best_fit(capacity, low, high, excess):
    rng = random.Random(0)
    sizes = [rng.randint(low, high) for _ in range(1500)]
    packs = train_llm.pack_best_fit(sizes, capacity)
    assert sorted(i for pack in packs for i in pack) == list(range(len(sizes)))
    rooms = [capacity - sum(sizes[i] for i in pack) for pack in packs]
    assert min(rooms) >= 0
    assert sorted(rooms) == sorted(reference_best_fit(sizes, capacity))
    lower_bound = max(math.ceil(sum(sizes) / capacity), sum(size > capacity / 2 for size in sizes))
    assert len(packs) - lower_bound <= max(1, excess * lower_bound)


def test_pack_best_fit_of_nothing_and_of_many():
    assert train_llm.pack_best_fit([], 8) == []
    rng = random.Random(0)
    sizes = [rng.randint(1, 1000) for _ in range(100_000)]
    started = time.perf_counter()
    packs = train_llm.pack_best_fit(sizes, 2048)
    assert time.perf_counter() - started < 20  # some tenths of a second; quadratic time would be an hour
    assert len(packs) <= 1.001 * math.ceil(sum(sizes) / 2048)


# ----------------------------------------------------------------------------------------------------
# 5. The global order

def one_rank(rank=0, world_size=1):
    return train_llm.Ranks(rank, rank, world_size, torch.device("cpu"))


@pytest.mark.parametrize("flags", [["--no-mask-documents"], ["--mask-documents"], ["--no-packing"]],
                         ids=" ".join)
def test_global_order_is_the_same_for_any_number_of_ranks(place, texts_path, flags):
    """Batches of B samples that w ranks take in turns are, put together again, one and the same sequence."""
    sequences = {}
    for world_size, batch_size in ((1, 1), (1, 4), (2, 2), (4, 1), (3, 4)):
        args = make_args(place, texts_path, *flags, "--batch-size", batch_size, "--seed", 3)
        train_set, _ = open_data(args)
        num_samples, per_round = len(train_set), batch_size * world_size
        for start in (0, 24):
            readers = [train_llm.ordered_batches(train_set, args, one_rank(rank, world_size), start)
                       for rank in range(world_size)]
            rows = []
            while len(rows) < 2 * num_samples + per_round:  # over the border of two epochs
                for reader in readers:
                    batch = next(reader)
                    assert len(batch["labels"]) == batch_size
                    rows += [tuple(label for label in row if label != IGNORE)
                             for row in batch["labels"].tolist()]
            order = [train_llm.sample_at(start + i, num_samples, 3) for i in range(len(rows))]
            targets = [tuple(label for label in train_set[i]["labels"].tolist() if label != IGNORE)
                       for i in order]
            assert rows == targets
            sequences.setdefault(start, []).append(rows[:2 * num_samples])
    for found in sequences.values():
        assert all(rows == found[0] for rows in found)


def test_each_epoch_is_another_permutation():
    epochs = [[train_llm.sample_at(p, 50, seed) for p in range(epoch * 50, epoch * 50 + 50)]
              for seed in (0, 1) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == len(epochs) and list(range(50)) not in epochs


def streamed_documents(args, rank, world_size, num_batches, state=None):
    """What a rank's first batches hold: [(ids, labels)], cut where positions start again."""
    args.mask_documents = True  # so that positions show the borders
    batches = train_llm.streamed_batches(args, one_rank(rank, world_size), {} if state is None else state)
    found = []
    for _ in range(num_batches):
        batch = next(batches)
        positions = batch.get("position_ids", torch.arange(args.seq_len).expand(args.batch_size, -1))
        assert batch["input_ids"].shape == (args.batch_size, args.seq_len)
        for row in range(args.batch_size):
            sample = {"input_ids": batch["input_ids"][row], "labels": batch["labels"][row],
                      "position_ids": positions[row]}
            found += split_at_positions(sample)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_streaming_sees_every_row_once_an_epoch(place, chats_path, world_size):
    expected = chat_pieces(place, chats_path)
    args = make_args(place, chats_path, "--streaming", "--batch-size", 1, tokenizer="chat_tokenizer")
    for rank in range(world_size):
        # A chat whose prompt alone fills a sequence has nothing to train on and is passed over.
        mine = Counter(piece for piece in expected[rank::world_size] if set(piece[1]) != {IGNORE})
        num_samples = len(list(train_llm.open_stream(args, one_rank(rank, world_size))))
        for epochs in (1, 2):
            found = Counter()
            for ids, labels in streamed_documents(args, rank, world_size, epochs * num_samples):
                [piece] = [p for p in mine if (ids[:len(p[0])], labels[:len(p[1])]) == p
                           and set(ids[len(p[0]):]) <= {0} and set(labels[len(p[1]):]) <= {IGNORE}]
                found[piece] += 1
            assert found == Counter({piece: epochs * count for piece, count in mine.items()})


def test_streaming_of_texts_loses_no_token(place, texts_path):
    documents = expected_documents(place, sentences(61))
    args = make_args(place, texts_path, "--streaming", "--batch-size", 1)
    num_tokens = sum(map(len, documents)) - 1
    num_samples = math.ceil(num_tokens / SEQ_LEN)
    inputs, targets = [], []
    for ids, labels in streamed_documents(args, 0, 1, 2 * num_samples):
        inputs += ids
        targets += labels
    padding = num_samples * SEQ_LEN - num_tokens
    stream = [token for document in documents for token in document]
    assert inputs == (stream[:-1] + [0] * padding) * 2
    labels = [label for document in documents for label in [*document[1:], IGNORE]]
    assert targets == (labels[:-1] + [IGNORE] * padding) * 2


@pytest.mark.parametrize("stop", [1, 5, 19])
def test_streaming_resumes_exactly(place, texts_path, chats_path, stop):
    for path, tokenizer in ((texts_path, "tokenizer"), (chats_path, "chat_tokenizer")):
        args = make_args(place, path, "--streaming", "--batch-size", 2, tokenizer=tokenizer)
        straight = streamed_documents(args, 1, 2, 40)
        state = {}
        first = streamed_documents(args, 1, 2, stop, state)
        rest = streamed_documents(args, 1, 2, 40 - stop, json.loads(json.dumps(state)))
        assert first + rest == straight


def test_streaming_of_two_sets(place, tmp_path):
    """One after the other; each row of both is seen; resumed in the middle."""
    words = {"one": "red", "two": "blue"}
    for name, word in words.items():
        texts_file(tmp_path / f"{name}.jsonl", [f"{word} {i} " * 30 for i in range(60)])
    names = [tmp_path / f"{name}.jsonl" for name in words]
    args = make_args(place, names[0], "--streaming", "--batch-size", 2, "--dataset", *names)
    num_samples = len(list(train_llm.open_stream(args, one_rank(1, 2))))
    straight = streamed_documents(args, 1, 2, num_samples // 2)
    text = [train_llm.load_tokenizer(args).decode(ids) for ids, _ in straight]
    for word in words.values():
        assert {int(n) for n in re.findall(rf"{word} (\d+) {word}", " ".join(text))} == set(range(1, 60, 2))
    reds = ["red" in part for part in text if "red" in part or "blue" in part]  # the others are padding
    assert reds == sorted(reds, reverse=True)
    state = {}
    first = streamed_documents(args, 1, 2, 7, state)
    rest = streamed_documents(args, 1, 2, num_samples // 2 - 7, json.loads(json.dumps(state)))
    assert first + rest == straight


def test_streaming_with_fewer_rows_than_ranks(place, tmp_path):
    args = make_args(place, texts_file(tmp_path / "rows.jsonl", ["only one"]), "--streaming")
    with pytest.raises(train_llm.UserError, match="no row for rank 1 of 2"):
        streamed_documents(args, 1, 2, 1)


# ----------------------------------------------------------------------------------------------------
# 6. Held-out loss

@pytest.fixture(scope="module")
def process_group():
    assert not torch.distributed.is_initialized()
    args = argparse.Namespace(seed=0, hsdp_shard_size=None, stall_timeout=600.0, deterministic=False,
                              compile=None)
    mesh = train_llm.init_distributed(args, one_rank())
    yield mesh
    torch.distributed.destroy_process_group()


def load_model(args, mesh):
    """A model as main() makes it, in this process alone."""
    folder = train_llm.fetch(args.hf_model) if args.hf_model else None
    model = train_llm.build_model(args, folder, 500)
    train_llm.shard_model(model, args, mesh, torch.float32)
    train_llm.materialise(model, torch.device("cpu"), False)
    if folder:
        train_llm.fill_buffers(model)
        train_llm.load_hf_weights(model, folder, args.trust_remote_code, one_rank())
    else:
        train_llm.init_from_scratch(model, args.seed, torch.device("cpu"))
    train_llm.prove_filled(model)
    return model


@pytest.mark.parametrize("family", [None, "llama", "qwen2", "gpt2"])
def test_packed_loss_is_the_unpacked_loss(place, tmp_path, process_group, family):
    """The same chats one by one and packed: documents in a pack do not see one another."""
    path = write_gsm8k_like(tmp_path / "rows.jsonl", 23)
    # Weights far from zero: with the usual 0.02 all losses are close to log(V) whatever the attention sees.
    source = ["--hf-model", make_hf_model(family, tmp_path / "model")] if family else [
        "--from-scratch", "--model-size", "test", "--tokenizer", place / "tokenizer"]
    losses = {}
    for flags in (("--packing",), ("--no-packing",), ("--packing", "--no-mask-documents")):
        args = train_llm.parse_args([str(token) for token in (
            *source, "--dataset", path, "--eval-split", path, "--data-cache", tmp_path / "cache", "--seq-len",
            192, "--loss-chunk-tokens", 100, "--device", "cpu", *flags)])
        _, held_out = open_data(args)
        model = load_model(args, process_group)
        if not family:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(4.0)
        # Or packing would cut other tokens away.
        assert all(len(ids) <= 192 for ids in tokens_of(args, "eval"))
        losses[flags] = train_llm.evaluate(model, {"eval": held_out}, 3, one_rank())
    packed, single, leaking = losses.values()
    assert packed["eval/tokens"] == single["eval/tokens"] == leaking["eval/tokens"] > 500
    assert packed["eval/loss"] == pytest.approx(single["eval/loss"], rel=1e-6)
    # The comparison has teeth: documents that see one another give another loss.
    assert abs(leaking["eval/loss"] / single["eval/loss"] - 1) > 1e-4


def test_held_out_loss_is_the_same_on_one_and_two_ranks(place, tmp_path):
    """The real command; held-out sequences that never divide evenly, and one alone: a rank has none."""
    path = write_gsm8k_like(tmp_path / "rows.jsonl", 40)
    for num_held_out in (1, 7):
        held_out = write_gsm8k_like(tmp_path / f"held_out_{num_held_out}.jsonl", num_held_out)
        flags = ["--from-scratch", "--model-size", "test", "--tokenizer", place / "tokenizer", "--dataset",
                 path, "--eval-split", held_out, "--data-cache", tmp_path / "cache", "--seq-len", 128,
                 "--max-lr", 1e-3, "--min-lr", 1e-4, "--max-steps", 3, "--eval-interval", 1,
                 "--log-interval", 1, "--no-packing", "--no-export", "--device", "cpu", "--batch-size", 2]
        rows = {}
        for world_size in (1, 2):
            run_dir = tmp_path / f"run_{num_held_out}_{world_size}"
            more = ["--checkpoint-dir", run_dir, "--grad-accum-steps", 2 // world_size]
            if world_size == 1:
                quick_run([*flags, *more])
            else:
                quick_ranks([*flags, *more], world_size)
            metrics = read_metrics(run_dir)
            rows[world_size] = [row for row in metrics if "eval/loss" in row]
            rows[world_size, "train"] = [row["train/loss"] for row in metrics if "train/loss" in row]
        assert [row["step"] for row in rows[1]] == [row["step"] for row in rows[2]] == [1, 2, 3]
        for one, two in zip(rows[1], rows[2]):
            assert one["eval/tokens"] == two["eval/tokens"] > 0
            assert two["eval/loss"] == pytest.approx(one["eval/loss"], rel=1e-6)
            assert one["eval/perplexity"] == pytest.approx(math.exp(one["eval/loss"]), rel=1e-12)
        assert rows[2, "train"] == pytest.approx(rows[1, "train"], rel=1e-6)
        assert rows[1][0]["eval/loss"] != rows[1][2]["eval/loss"]
