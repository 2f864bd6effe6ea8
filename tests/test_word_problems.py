"""tools/make_word_problems.py: right answers, test problems that are new, a token for each digit; and the
quickstart that learns from them, examples/quickstart_gsm8k.sh."""

import json
import os
import re
import subprocess
import sys

import pytest
from helpers import REPO

sys.path.insert(0, str(REPO / "tools"))

import make_word_problems  # noqa: E402


def make(folder, *flags):
    command = [sys.executable, str(REPO / "tools/make_word_problems.py"), str(folder), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()]
            for path in folder.glob("*.jsonl")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("word_problems") / "problems"


@pytest.fixture(scope="module")
def problems(folder):
    return make(folder, "--num-train", 3000, "--num-test", 300)


def solve(answer):
    """The result of the last step, each step recomputed and made of what is known by then."""
    steps = re.findall(r"(\d+)([-+*])(\d+)=(\d+)", answer)
    assert len(steps) == 2
    for left, sign, right, result in steps:
        left, right = int(left), int(right)
        assert {"+": left + right, "-": left - right, "*": left * right}[sign] == int(result)
    assert steps[0][3] in (steps[1][0], steps[1][2]), "the second step takes up the first one's result"
    return int(steps[1][3])


def template_of(row):
    """The number of the template that a row's question is made from."""
    for index, (question, _) in enumerate(make_word_problems.TEMPLATES):
        if re.fullmatch(re.sub(r"\\{\w+\\}", r"\\w+", re.escape(question)), row["question"]):
            return index
    raise AssertionError(f"no template has {row['question']}")


def test_answers_are_right_and_follow_from_the_question(problems):
    assert {name: len(rows) for name, rows in problems.items()} == {"train": 3000, "sft": 3000, "test": 300}
    for row in problems["train"] + problems["test"]:
        assert set(row) == {"question", "answer"} and row["question"].endswith("?")
        working, number = row["answer"].rsplit("\n#### ", 1)
        assert 1 <= int(number) == solve(working) and "{" not in row["question"] + working
        # Every number of the working stands in the question or has been worked out.
        known = re.findall(r"\d+", row["question"]) + re.findall(r"=(\d+)", working)
        assert set(re.findall(r"\d+", working)) <= set(known)


def test_the_judge_of_the_training_agrees(problems):
    from train_gsm8k_fsdp2 import parse_number, reward
    for row in problems["test"]:
        number = parse_number(row["answer"].rsplit("#### ", 1)[1])
        assert reward(row["answer"], number, True, 0.1) == (1.1, True)
        assert reward(row["answer"], number + 1, True, 0.1) == (0.1, False)


def test_test_problems_are_new(problems):
    questions = [row["question"] for row in problems["train"] + problems["test"]]
    assert len(set(questions)) == len(questions)

    def numbers(row):  # the template and its numbers, whoever it is told of
        return (template_of(row), *re.findall(r"\d+", row["question"]))

    assert not {numbers(row) for row in problems["train"]} & {numbers(row) for row in problems["test"]}


def test_problems_are_varied(problems):
    assert len({template_of(row) for row in problems["train"]}) >= 24
    for words in (make_word_problems.NAMES, make_word_problems.THINGS):
        assert all(any(word in row["question"] for row in problems["test"]) for word in words)
    counts = [sum(sign in row["answer"] for row in problems["train"]) for sign in "+-*"]
    assert min(counts) > len(problems["train"]) / 5


def test_the_careless_teacher_slips_in_the_last_step_only(problems):
    """He calculates right, but may take the wrong operation: seldom in some templates, mostly in the others,
    so that the likeliest answer of whoever learns from him is right in the former only."""
    slips = {}
    for taught, row in zip(problems["sft"], problems["train"], strict=True):
        assert taught["question"] == row["question"]
        working, number = taught["answer"].rsplit("\n#### ", 1)
        assert int(number) == solve(working) >= 0
        assert working.split("\n")[0] == row["answer"].split("\n")[0]
        signs = [re.findall(r"\d([-+*])\d", text)[1] for text in (working, row["answer"])]
        assert signs[0] == signs[1] or signs in (["-", "+"], ["+", "-"], ["+", "*"])
        slips.setdefault(template_of(row), []).append(taught["answer"] != row["answer"])
    rates = {index: sum(made) / len(made) for index, made in slips.items()}
    assert set(rates) == set(range(len(make_word_problems.TEMPLATES)))
    seldom = {index for index, rate in rates.items() if rate < 0.5}
    assert set(range(0, len(rates), 3)) <= seldom and len(seldom) <= len(rates) * 2 / 3
    assert 0.4 < sum(map(sum, slips.values())) / len(problems["sft"]) < 0.65


def test_the_seed_decides(folder, problems, tmp_path):
    again = make(tmp_path / "again", "--num-train", 3000, "--num-test", 300)
    assert again == problems
    for name in ("train.jsonl", "tokenizer/tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    first, second = (make_word_problems.make_problems(200, 20, seed) for seed in (1, 2))
    assert not [rows for rows, others in zip(first, second) if rows[0] in others]
    assert first == make_word_problems.make_problems(200, 20, 1)


def test_each_digit_is_a_token(folder, problems):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert [token for token in tokenizer.get_vocab() if re.search(r"\d.|.\d", token)] == []
    for row in problems["test"][:50]:
        text = f"{row['question']}\n{row['answer']}"
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and len(ids) < 80
    # Words that no problem holds come in pieces, and come back.
    assert tokenizer.decode(tokenizer("Zwölf Bücher: 3.50 €")["input_ids"]) == "Zwölf Bücher: 3.50 €"


def test_numbers_of_problems_are_checked(tmp_path):
    for flag in ("--num-train", "--num-test"):
        tool, out = REPO / "tools/make_word_problems.py", tmp_path / "out"
        command = [sys.executable, str(tool), str(out), flag, "0"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and f"{flag} must be at least 1" in done.stderr
        assert not out.exists()


def quickstart(folder, *flags, **variables):
    environment = os.environ | {"PYTHON": sys.executable, "RUN": str(folder)} | variables
    command = ["bash", str(REPO / "examples/quickstart_gsm8k.sh"), *map(str, flags)]
    return subprocess.run(
        command, cwd=folder.parent, env=environment, capture_output=True, text=True, timeout=600)


def test_quickstart_says_how_it_is_used(tmp_path):
    shown = quickstart(tmp_path / "run", "--help")
    assert shown.returncode == 0 and "--vllm" in shown.stdout and "set -e" not in shown.stdout
    for flags, variables, said in (
            (["--checkpoint-dir", "x"], {}, "the variable RUN names the folder"),
            ([], {"SEED": "one"}, "SEED is a number, not 'one'")):
        wrong = quickstart(tmp_path / "run", *flags, **variables)
        assert wrong.returncode == 2 and said in wrong.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_quickstart_from_start_to_end(tmp_path):
    """A few steps of each stage; started again it has nothing to do but to draw."""
    run, flags = tmp_path / "run", ["--train-steps", 2, "--eval-every", 1, "--eval-limit", 8, "--nproc", 1]
    for start in (1, 2):
        done = quickstart(run, *flags, SFT_ARGS="--max-steps 4 --warmup-steps 1 --nproc 1")
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("this run is finished") == (0 if start == 1 else 2)
        accuracies = re.findall(r"^step +(\d+)  accuracy [\d.]+$", done.stdout, re.MULTILINE)
        assert accuracies == ["0", "1", "2"] and f"wrote {run}/grpo/accuracy.png" in done.stdout
    assert (run / "grpo/accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "the word problems" in done.stderr and (run / "grpo/hf/config.json").is_file()
