"""The changes of docs/changing.md: each is one or two diffs, most at an `EDIT:` mark, and is run.

The copies are compared with a formula, or with what the script as it is does.
"""

import json
import math
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from helpers import ENGLISH, REPO, make_tokenizer, read_checkpoint, read_metrics
from quick_runs import quick_ranks

STEPS = 6
DOCS = (REPO / "docs/changing.md").read_text()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extensions")
    make_tokenizer(folder / "tokenizer")
    rows = "".join(json.dumps({"text": f"{i} {text} {i * 7}"}) + "\n" for i, text in enumerate(ENGLISH * 8))
    (folder / "texts.jsonl").write_text(rows)
    train(folder, REPO / "train_llm.py", "plain")
    return folder


def diffs_of(words):
    """The diffs of docs/changing.md behind these words, as (text before, text after)."""
    blocks = re.search(r"\n\n((?:```diff\n(?:[ +-].*\n|\n)+```\n)+)", DOCS[DOCS.index(words):])[1]
    return [tuple("".join(line[1:] for line in diff.splitlines(True) if line[0] in kept)
                  for kept in (" -", " +")) for diff in re.findall(r"```diff\n(.*?)```", blocks, re.DOTALL)]


def edited(folder, name, *changes, script="train_llm.py"):
    """A copy of the script with these replacements, each of a text that stands there once."""
    source = (REPO / script).read_text()
    for before, after in changes:
        assert source.count(before) == 1, before
        source = source.replace(before, after)
    path = folder / f"{name}.py"
    path.write_text(source)
    return path


def train(folder, script, run, *flags, nproc=1, steps=STEPS):
    """Rows of the metrics by step; held-out rows are among them."""
    train_for_output(folder, run, *flags, script=script, nproc=nproc, steps=steps)
    return read_metrics(folder / run)


def train_for_output(folder, run, *flags, script=REPO / "train_llm.py", nproc=1, steps=STEPS):
    return quick_ranks([
        "--from-scratch", "--model-size", "test", "--tokenizer", folder / "tokenizer", "--dataset",
        folder / "texts.jsonl", "--eval-fraction", 0.2, "--data-cache", folder / "cache", "--seq-len", 32,
        "--batch-size", 4 // nproc, "--max-steps", steps, "--warmup-steps", 0, "--max-lr", 1e-2, "--min-lr",
        1e-3, "--checkpoint-interval", 3, "--keep-checkpoints", 0, "--log-interval", 1, "--eval-interval", 3,
        "--no-export", "--device", "cpu", "--no-mixed-precision", "--checkpoint-dir", folder / run, *flags,
    ], nproc, script=script, timeout=300)


def train_again(folder, script, run, straight, **options):
    """What `straight` left at step 3, resumed in a folder of its own."""
    shutil.copytree(folder / straight / "checkpoints/step_000003", folder / run / "checkpoints/step_000003")
    return train(folder, script, run, **options)


def values(rows, key):
    return {row["step"]: row[key] for row in rows if key in row}


def test_rows_of_an_own_form(place):
    """Joined and filtered rows are trained on as the same texts are; the others are counted."""
    script, texts = edited(place, "own_rows", *diffs_of("## Rows")), []
    with (place / "own.jsonl").open("w") as file:
        for i, text in enumerate(ENGLISH * 8):
            row = {"title": f"No. {i}", "body": text, "lang": "de" if i % 3 else "en"}
            texts += [f"{row['title']}\n\n{text}"] * (row["lang"] == "en")
            file.write(json.dumps(row) + "\n")
    (place / "joined.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    own = train(place, script, "own_rows", "--dataset", place / "own.jsonl")
    joined = train(place, REPO / "train_llm.py", "joined", "--dataset", place / "joined.jsonl")
    assert values(own, "train/loss") == values(joined, "train/loss")
    assert values(own, "eval/loss") == values(joined, "eval/loss")
    [again] = train_for_output(place, "own_again", "--dataset", place / "own.jsonl", script=script)
    assert f"{8 * len(ENGLISH) - len(texts)} left out with nothing to train" in again.stdout


def test_z_loss_with_a_metric_of_its_own(place):
    script = edited(place, "z_loss", *diffs_of("A z-loss:"))
    rows, plain = train(place, script, "z_loss"), read_metrics(place / "plain")
    assert values(rows, "train/loss")[1] == values(plain, "train/loss")[1]
    z, loss = values(rows, "train/z_loss"), values(rows, "train/loss")
    assert z[1] == pytest.approx(math.log(512) ** 2, rel=0.05) and z[STEPS] < 0.8 * z[1]
    assert loss[STEPS] != values(plain, "train/loss")[STEPS]
    # Held-out loss has no part of it: it is the cross-entropy alone.
    held_out = values(rows, "eval/loss")[STEPS]
    assert held_out == pytest.approx(loss[STEPS], rel=0.2) and "eval/z_loss" not in rows[-1]


def test_label_smoothing_leaves_the_held_out_loss_as_it_is(place):
    script = edited(place, "smoothing", *diffs_of("Label smoothing;"))
    rows, plain = train(place, script, "smoothing", steps=3), read_metrics(place / "plain")
    assert values(rows, "train/loss")[1] == values(plain, "train/loss")[1]
    assert values(rows, "train/smoothed")[1] == pytest.approx(values(rows, "train/loss")[1], rel=0.05)
    # From other gradients: less certain, so that cross-entropy falls more slowly.
    assert values(rows, "eval/loss")[3] > values(plain, "eval/loss")[3]


def test_terms_and_their_gradients_are_the_formulas(monkeypatch):
    import train_llm

    def terms(logits, labels):
        logits = logits.float()
        z = torch.logsumexp(logits, dim=-1)[labels != train_llm.IGNORE].square().sum()
        return torch.stack([F.cross_entropy(logits, labels, reduction="sum"), z])

    monkeypatch.setattr(train_llm, "LOSSES", {"loss": 1.0, "z": 0.3})
    monkeypatch.setattr(train_llm, "loss_terms", terms)
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 5, 8, requires_grad=True), torch.nn.Linear(8, 32)
    labels = torch.randint(32, (2, 5))
    loss, sums = train_llm.chunked_loss(hidden, labels, head, train_llm.head_loss, 3)
    found = torch.autograd.grad(loss, [hidden, head.weight, head.bias])
    logits = head(hidden).double().flatten(0, 1)
    expected = (F.cross_entropy(logits, labels.flatten(), reduction="sum"),
                torch.logsumexp(logits, -1).square().sum())
    torch.testing.assert_close(sums.double(), torch.stack(expected), rtol=1e-6, atol=0)
    whole = torch.autograd.grad(expected[0] + 0.3 * expected[1], [hidden, head.weight, head.bias])
    for ours, theirs in zip(found, whole):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_another_optimizer_keeps_its_own_states(place):
    """SGD with momentum, not fused: updates by its formula, resumed bitwise, with its states alone."""
    script = edited(place, "sgd", *diffs_of("SGD with momentum:"))
    straight = train(place, script, "sgd")
    resumed = train_again(place, script, "sgd_resumed", "sgd")
    assert values(resumed, "train/loss") == {
        step: loss for step, loss in values(straight, "train/loss").items() if step > 3}
    one, other = (read_checkpoint(place / run / "checkpoints/step_000006") for run in ("sgd", "sgd_resumed"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert {name.rpartition(".")[2] for name in one if name.startswith("optim.")} == {"momentum_buffer"}


# The same by the library alone, whose products on DTensors exchange data: right, and slow.
PLAIN_MUON = """class MuonAndAdamW(torch.optim.Optimizer):
    def __init__(self, matrices, others, lr):
        super().__init__([{"params": matrices, "lr": lr}, {"params": others, "lr": lr}], {})
        self.parts = [torch.optim.Muon(self.param_groups[:1]), torch.optim.AdamW(
            self.param_groups[1:], betas=(0.9, 0.95), weight_decay=0.0)]

    def step(self):
        for part in self.parts:
            part.step()


"""


def test_muon_for_matrices(place):
    """As torch.optim.Muon; on two ranks within its bf16; resumed bitwise; bad steps skipped."""
    muon, chosen = diffs_of("Muon for the blocks' matrices")
    script, build = edited(place, "muon", muon, chosen), muon[0]
    plain = edited(place, "plain_muon", (build, PLAIN_MUON + build), chosen)
    straight = train(place, script, "muon")
    runs = {1e-5: train(place, plain, "plain_muon"), 1e-2: train(place, script, "two", nproc=2)}
    for bound, rows in runs.items():
        assert values(rows, "train/loss") == pytest.approx(values(straight, "train/loss"), rel=bound)
    assert values(straight, "train/loss")[STEPS] < 0.9 * values(straight, "train/loss")[1]
    train_again(place, script, "muon_resumed", "two", nproc=2)
    one, other = (read_checkpoint(place / run / "checkpoints/step_000006") for run in ("two", "muon_resumed"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    kept = {name.rpartition(".")[2] for name in one if name.startswith("optim.")}
    assert kept == {"momentum", "exp_avg", "exp_avg_sq", "step"}
    bad = edited(place, "bad_muon", muon, chosen, (
        "    found_inf = (~torch.isfinite(grad_norm)).float()\n", "    found_inf = torch.ones(())\n"))
    rows = train(place, bad, "bad_muon", steps=3)
    assert values(rows, "train/skipped_steps")[3] == 3
    saved = read_checkpoint(place / "bad_muon/checkpoints/step_000003")
    assert not [name for name in saved if name.startswith("optim.")]  # no update, no state


def test_an_average_of_the_weights_survives_a_checkpoint(place):
    """Kept among the optimizer's states, it is saved and restored as these are."""
    script = edited(place, "average", *diffs_of("An exponential average"))
    train(place, script, "average")
    train(place, script, "average_two", nproc=2)
    train_again(place, script, "average_resumed", "average_two", nproc=2)
    one, other = (read_checkpoint(place / run / "checkpoints/step_000006")
                  for run in ("average_two", "average_resumed"))
    names = [name for name in one if name.endswith(".average")]
    assert len(names) == 21 and all(torch.equal(one[name], other[name]) for name in names)
    plain = read_checkpoint(place / "plain/checkpoints/step_000006")
    alone = read_checkpoint(place / "average/checkpoints/step_000006")
    assert all(torch.equal(alone[name], plain[name]) for name in plain if name.startswith("model."))


def test_two_held_out_sets(place):
    script = edited(place, "held_out", *diffs_of("## Held-out sets"))
    rows, plain = train(place, script, "held_out"), read_metrics(place / "plain")
    assert values(rows, "eval/loss") == values(plain, "eval/loss")
    assert values(rows, "short/loss").keys() == {3, 6}
    assert values(rows, "short/tokens") == values(rows, "eval/tokens")
    assert values(rows, "short/loss")[6] != values(rows, "eval/loss")[6]


def test_the_best_checkpoint_is_kept(place):
    """The rate is so high that the held-out loss rises after the first evaluation."""
    flags = ["--keep-best", "--keep-checkpoints", 1, "--eval-interval", 2, "--checkpoint-interval", 100]
    high = ["--max-lr", 3, "--min-lr", 3, "--warmup-steps", 8]
    rows = train(place, REPO / "train_llm.py", "best", *flags, *high, steps=8)
    losses = values(rows, "eval/loss")
    best = min(losses, key=losses.get)
    assert best < 8 and losses.keys() == {2, 4, 6, 8}
    found = sorted(path.name for path in (place / "best/checkpoints").iterdir())
    assert found == [f"step_{best:06d}", "step_000008"]
    # What was best is known to the run that goes on from the last one.
    train(place, REPO / "train_llm.py", "best", *flags, *high, steps=10)
    kept = sorted(path.name for path in (place / "best/checkpoints").iterdir())
    losses = values(read_metrics(place / "best"), "eval/loss")
    assert kept == [f"step_{min(losses, key=losses.get):06d}", "step_000010"]


def test_a_larger_number_of_steps_says_that_the_rate_rises(place):
    run = place / "longer"
    shutil.copytree(place / "plain", run)
    [result] = train_for_output(place, "longer", steps=STEPS + 2)
    assert f"max_steps {STEPS} -> {STEPS + 2}" in result.stdout
    assert "the run had ended: its learning rate rises again" in result.stdout


@pytest.mark.parametrize(("schedule", "expected"), [
    ("constant", [1e-2] * 10), ("wsd", [1e-2] * 8 + [(1e-2 + 1e-3) / 2 + 5e-4, 1e-3])])
def test_schedules(schedule, expected):
    import train_llm
    rates = [train_llm.learning_rate(step, 10, 0, 1e-2, 1e-3, schedule) for step in range(10)]
    assert rates == pytest.approx(expected, rel=0.1) and rates[-1] == pytest.approx(expected[-1])


def test_a_schedule_of_ones_own(place):
    script = edited(place, "linear", *diffs_of("## Schedule"))
    rates = values(train(place, script, "linear", "--schedule", "linear"), "train/lr")
    assert list(rates.values()) == pytest.approx([1e-2 - 9e-3 * step / 5 for step in range(6)])


def test_a_reward_of_ones_own(place, monkeypatch):
    monkeypatch.syspath_prepend(place)
    edited(place, "other_reward", *diffs_of("## Prompt and reward"), script="train_gsm8k_fsdp2.py")
    from other_reward import reward
    assert reward("#### 18", 18, True, 0.0) == (1.0, True)
    assert reward("so " * 200 + "#### 18", 18, True, 0.0) == (pytest.approx(1 - 0.107), True)


def test_no_diff_is_left_untried():
    source = (REPO / "tests/test_extensions.py").read_text()
    tried = [diff for words in re.findall(r'diffs_of\("([^"]+)"\)', source) for diff in diffs_of(words)]
    assert len(tried) == DOCS.count("```diff")
