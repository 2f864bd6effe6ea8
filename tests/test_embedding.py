"""examples/train_embedding_fsdp2.py: losses, gradients over ranks, evaluation, data, export, runs."""

import json
import shutil

import embedding_models as em
import pytest
import torch
import train_embedding_fsdp2 as script
from helpers import REPO, read_metrics, run_script

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
    specs = [{"name": case, "model": str(model), "case": case} for case in em.CASES if "real" not in case]
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
