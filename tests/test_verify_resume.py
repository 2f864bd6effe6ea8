"""tools/verify_resume.py: proves what is exact, and names what is broken first."""

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from helpers import ENGLISH, REPO, make_tokenizer

sys.path.insert(0, str(REPO / "tools"))
import verify_resume  # noqa: E402  (the path comes first)

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    make_tokenizer(folder / "tokenizer", 500)
    texts = [" ".join(ENGLISH[(5 * i + j) % 4] for j in range(1 + i % 4)) for i in range(50)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def verify(folder, *own, script="train_llm.py", more=()):
    """The tool on a tiny run; 80 steps, so that the signal meets the middle also on a busy machine."""
    command = [
        sys.executable, REPO / "tools/verify_resume.py", "--steps", 80, *own, REPO / script, "--from-scratch",
        "--model-size", "test", "--vocab-size", 512, "--tokenizer", folder / "tokenizer", "--dataset",
        folder / "texts.jsonl", "--data-cache", folder / "cache", "--seq-len", 32, "--batch-size", 2,
        "--device", "cpu", "--no-mixed-precision", "--no-compile", *more]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONHASHSEED"}
    return subprocess.run(list(map(str, command)), cwd=folder, text=True, capture_output=True, timeout=300,
                          env=env | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})


def edited(folder, name, old, new):
    """A copy of train_llm.py with one place changed, as people make them."""
    source = (REPO / "train_llm.py").read_text()
    assert source.count(old) == 1, f"this line of train_llm.py has changed: {old}"
    (folder / name).write_text(source.replace(old, new))
    return folder / name


# ----------------------------------------------------------------------------------------------------
# 1. What is exact

def test_stopped_by_a_signal(folder):
    done = verify(folder, "--keep", folder / "kept")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nresume proven: 80 steps, stopped by SIGTERM after step " in done.stdout
    assert " on 1 process(es): bitwise (" in done.stdout
    # The stop was real: two starts of one run, neither with all the rows.
    assert 0 < (folder / "kept/stopped.log").read_text().count("\nstep ") < 80
    assert "resumed    " in (folder / "kept/resumed.log").read_text()
    again = verify(folder, "--keep", folder / "kept")
    assert again.returncode == 2 and "already holds something" in again.stderr


@slow
def test_two_processes_killed_and_two_to_one(folder):
    with ThreadPoolExecutor(2) as pool:
        killed = pool.submit(verify, folder, "--nproc", 2, "--stop-by", "SIGKILL")
        fewer = pool.submit(verify, folder, "--nproc", 2, "--resume-nproc", 1, "--stop-by", "SIGUSR1")
    killed, fewer = killed.result(), fewer.result()
    assert killed.returncode == 0, killed.stdout + killed.stderr
    assert "\nresume proven: 80 steps, stopped by SIGKILL after step " in killed.stdout
    assert " on 2 process(es): bitwise (" in killed.stdout
    assert fewer.returncode == 0, fewer.stdout + fewer.stderr
    assert "resumed with --batch-size 2 --grad-accum-steps 2" in fewer.stdout
    assert " on 1 process(es): within " in fewer.stdout


def test_a_stop_that_falls_on_an_evaluation(folder):
    """Evaluated after every step: the stop always comes between a step's save and its evaluation."""
    (folder / "held_out.jsonl").write_text(json.dumps({"text": ENGLISH[1]}) + "\n")
    done = verify(folder, more=("--eval-split", folder / "held_out.jsonl", "--eval-interval", 1))
    assert done.returncode == 0 and " on 1 process(es): bitwise (" in done.stdout, done.stdout + done.stderr


# ----------------------------------------------------------------------------------------------------
# 2. Edited copies whose resume is broken

LOADED = "        load_checkpoint(checkpoints, model, optimizer, ranks)\n"
READY = "    optimizer = ready_model(args, model, checkpoints, dtype, mesh, ranks)\n"
AVERAGE = """            optimizer.zero_grad()
            average = vars(main).setdefault("average", [p.detach().clone() for p in model.parameters()])
            for slow, param in zip(average, model.parameters()):
                slow.mul_(0.9).add_(param.detach(), alpha=0.1)
                param.data.mul_(0.99).add_(slow, alpha=0.01)
"""
BROKEN = {
    # The data begins anew.
    "samples": (READY, READY + '    progress["samples"] = 0\n'),
    # Adam's averages begin anew: the first loss and gradient after the stop are still right.
    "optimizer": ("dcp.load(tensors | (", 'dcp.load({"model": tensors["model"]} | ('),
    # A moving average of the weights, which acts on them, and which no checkpoint holds.
    "average": ("            optimizer.zero_grad()\n", AVERAGE),
    # Another order of samples in each process that is started.
    "hash": ("[dataset.sample(sample_at(p, size, args.seed), p // size)",
             '[dataset.sample(sample_at(p, size, hash("order") % 1000), p // size)'),
}


@slow
def test_broken_copies_are_caught(folder):
    copies = {name: edited(folder, f"train_{name}.py", *change) for name, change in BROKEN.items()}
    with ThreadPoolExecutor(2) as pool:
        outs = dict(zip(copies, pool.map(lambda path: verify(folder, script=path), copies.values())))
    for name, out in outs.items():
        assert out.returncode == 1, (name, out.stdout + out.stderr)
        assert not out.stderr, (name, out.stderr)
    step = int(outs["samples"].stdout.partition("resumed from step ")[2].split()[0])
    lines = {name: [line for line in out.stdout.splitlines() if not line.startswith("starts ")]
             for name, out in outs.items()}

    assert lines["samples"][1].startswith(
        f"first difference: step {step + 1}, samples: {2 * step + 2} straight, 2 then; also ")
    for name in ("optimizer", "average"):
        assert lines[name][1].startswith("first difference: step "), lines[name]
        assert "train/loss: " in lines[name][1] or "train/grad_norm: " in lines[name][1]
    assert lines["hash"][0].startswith(
        "not repeatable: two starts of the same command differ before the stop: step 1, train/")
    for name in ("samples", "optimizer", "average"):
        assert lines[name][2].startswith("last checkpoint: ") and " differ" in lines[name][2]


def test_what_does_not_run_or_stop_is_told(folder):
    """A script that fails, and one that a signal ends without a save."""
    handler = "signal.signal(getattr(signal, name), note)"
    deaf = edited(folder, "train_deaf.py", handler, handler.replace("note", "signal.SIG_DFL"))
    with ThreadPoolExecutor(2) as pool:
        failed, ignored = pool.map(lambda case: verify(folder, **case), (
            {"more": ("--tokenizer", "./nowhere")}, {"script": deaf}))
    assert failed.returncode == ignored.returncode == 1
    assert "verify_resume.py: error: the straight run failed (exit codes [2], wanted 0)" in failed.stderr
    assert "--tokenizer ./nowhere: no such file" in failed.stderr
    assert "no save and end after SIGTERM (exit codes [-15], wanted 143)" in ignored.stderr


# ----------------------------------------------------------------------------------------------------
# 3. Parts

def test_arguments(tmp_path, capsys):
    script = str(REPO / "train_llm.py")
    cases = {
        ("nothing.py",): "there is no script nothing.py",
        (script, "--max-steps=3"): "--max-steps=3 behind the script: leave out what this program sets",
        (script, "--nproc", "2"): "--nproc behind the script: leave out what",
        ("--steps", "5", script): "--steps must be at least 6",
        ("--stop-by", "SIGNOTHING", script): "invalid choice: 'SIGNOTHING'",
        ("--keep", str(REPO), script): "already holds something",
        ("--resume-nproc", "-1", script): "must be at least 1",
    }
    for argv, message in cases.items():
        with pytest.raises(SystemExit) as ended:
            verify_resume.parse_args(list(argv))
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    args = verify_resume.parse_args([script, "--device", "cpu", "--steps-per-epoch", "9"])
    assert (args.nproc, args.resume_nproc, args.tolerance) == (1, 1, 0.0)
    assert verify_resume.parse_args(["--nproc", "2", "--resume-nproc", "1", script]).tolerance > 0


@pytest.mark.parametrize("batch_size, accumulation, nproc, resume_nproc, expected", [
    (4, 2, 1, 2, (4, 1)), (4, 1, 2, 1, (4, 2)), (2, 1, 2, 4, (1, 1)), (4, 3, 1, 4, (3, 1)),
    (5, 1, 2, 1, (5, 2)),
])
def test_the_same_samples(tmp_path, batch_size, accumulation, nproc, resume_nproc, expected):
    (tmp_path / "config.yaml").write_text(f"batch_size: {batch_size}\ngrad_accum_steps: {accumulation}\n")
    flags = verify_resume.flags_for(nproc, resume_nproc, tmp_path)
    assert tuple(map(int, flags[1::2])) == expected
    assert expected[0] * expected[1] * resume_nproc == batch_size * accumulation * nproc


def test_samples_that_cannot_be_divided(tmp_path):
    (tmp_path / "config.yaml").write_text("batch_size: 4\ngrad_accum_steps: 1\n")
    with pytest.raises(verify_resume.CannotTell, match="4 sequences cannot be divided among 3 processes"):
        verify_resume.flags_for(1, 3, tmp_path)
    (tmp_path / "config.yaml").write_text("batch_size: 4\ngrad_accum_steps: 1\nstreaming: true\n")
    with pytest.raises(verify_resume.CannotTell, match="--streaming"):
        verify_resume.flags_for(1, 2, tmp_path)


def test_rows():
    """Timings do not count, and evaluations stand apart."""
    rows = [{"step": 1, "samples": 4, "train/loss": 2.0, "perf/x": 1.0, "time/y": 2.0},
            {"step": 1, "eval/loss": math.nan, "eval/time_s": 3.0}]
    straight = verify_resume.by_step(rows)
    assert straight == {1: {"step": 1, "samples": 4, "train/loss": 2.0}}
    evaluation = verify_resume.by_step(rows, evaluations=True)
    assert evaluation == {1: {"step": 1, "eval/loss": rows[1]["eval/loss"]}}
    again = verify_resume.by_step(json.loads(json.dumps(rows)), evaluations=True)
    assert verify_resume.compare_rows(evaluation, again, 0.0) == ([], 0.0)
    other = {1: straight[1] | {"train/loss": 2.5, "samples": 8, "train/new": 1}}
    found, _ = verify_resume.compare_rows(straight, other, 0.1)
    assert [key for _, key, _, _ in found] == ["samples", "train/loss", "train/new"]
    assert verify_resume.describe_rows(found) == (
        "step 1, samples: 4 straight, 8 then; also train/loss, train/new")
    # Whole numbers have no tolerance.
    found, largest = verify_resume.compare_rows(straight, {1: straight[1] | {"train/loss": 2.1}}, 0.1)
    assert not found and largest == pytest.approx(0.1 / 2.1)


@pytest.mark.parametrize("before, after", [([4], []), ([], [4]), ([4], [4])])
def test_an_evaluation_before_the_stop_after_it_or_twice(before, after):
    def run(steps, evaluations, loss=1.0):
        return SimpleNamespace(rows=[{"step": step, "samples": step, "train/loss": 3.0} for step in steps] + [
            {"step": step, "eval/loss": loss} for step in evaluations])

    straight = run(range(1, 9), [4, 8])
    stopped, resumed = run(range(1, 5), before), run(range(5, 9), [*after, 8])
    assert verify_resume.compare_runs(straight, stopped, resumed, 0.0) == ([], 0.0)
    wrong = run(range(5, 9), [8], loss=2.0)
    (found,), _ = verify_resume.compare_runs(straight, run(range(1, 5), [4]), wrong, 0.0)
    assert found == (8, "eval/loss", 1.0, 2.0)
    never = verify_resume.compare_runs(straight, run(range(1, 5), []), run(range(5, 9), [8]), 0.0)[0]
    assert never[-1] == (4, "eval/loss", 1.0, "nothing")


def test_tensors():
    def difference(a, b):
        return verify_resume.tensor_difference(a, b)[0]

    a = torch.tensor([[1.0, -0.0], [3.0, 4.0]])
    assert difference(a, a.clone()) == 0.0
    b = a.clone()
    b[0, 1] = 0.0
    assert 0 < difference(a, b) < 1e-300  # another bit, the same number
    b[0, 0] = math.nan
    assert difference(b, b.clone()) == 0.0 and difference(a, b) == math.inf
    assert difference(a, a.bfloat16()) == math.inf
    assert difference({"x": 1}, {"x": 1}) == 0.0 and difference({"x": 1}, {"x": 2}) == math.inf
    assert difference(torch.tensor(3), torch.tensor(4)) == math.inf
    c = torch.arange(6.0).reshape(2, 3).bfloat16()
    d = c.clone()
    d[1, 1] = 9
    relative, text = verify_resume.tensor_difference(c, d)
    assert text == "1 of 6 elements differ, at most by 5" and relative == pytest.approx(5 / 55 ** 0.5)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoints(monkeypatch, tmp_path):
    import torch.distributed.checkpoint as dcp
    state = {f"w{i}": torch.full((100,), float(i)) for i in range(5)} | {"word": {"epoch": 3}}
    dcp.save(state, checkpoint_id=tmp_path / "a", no_dist=True)
    other = state | {"w3": torch.zeros(100), "word": {"epoch": 4}}
    dcp.save(other, checkpoint_id=tmp_path / "b", no_dist=True)
    monkeypatch.setattr(verify_resume, "READ_AT_ONCE", 4)
    same = verify_resume.compare_checkpoints(tmp_path / "a", tmp_path / "a", 0.0, True)
    assert not same["differences"] and same["count"] == 6
    found = verify_resume.compare_checkpoints(tmp_path / "a", tmp_path / "b", 0.0, True)["differences"]
    assert len(found) == 2
    assert "w3: 100 of 100 elements differ, at most by 3" in found
    assert any(line.startswith("word") and "3 straight, 4 resumed" in line for line in found)
