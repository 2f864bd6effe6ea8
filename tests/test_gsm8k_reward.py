"""Questions, prompts, and the reward: which answers count as right, all of GSM8K's and 2,000 wrong ones."""

import argparse
import json
import random
import time
from fractions import Fraction

import pytest
from helpers import BOS, CHAT_TEMPLATES, EOS, gsm8k_folder, make_tokenizer, write_gsm8k_like
from train_gsm8k_fsdp2 import (
    SYSTEM_PROMPT, UserError, final_answer, parse_number, read_questions, render_prompt, reward,
)

SIZES = {"train": 7473, "test": 1319}


def is_right(text, gold):
    return reward(text, gold, True, 0.0)[1]


def make_args(dataset, config="main"):
    return argparse.Namespace(dataset=str(dataset), dataset_config=config, dataset_split="train")


def write_lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# ----------------------------------------------------------------------------------------------------
# 1. Numbers

# text: the number that it says.
NUMBERS = {
    "18": 18, "007": 7, "0": 0, "-0": 0, " 18 ": 18, "18\n": 18, "1,234": 1234, "1,234,567.50": "2469135/2",
    "+5": 5, "-5": -5, "−5": -5, "- 5": -5, "-1,000": -1000, "$5": 5, "€5": 5, "£5": 5, "¥5": 5, "$ 5": 5,
    "-$5": -5, "$-5": -5, "−$5.50": "-11/2", "18$": 18, "18 €": 18, "50%": 50, "50 %": 50, "12.5%": "25/2",
    "50 percent": 50, "18¢": 18, ".5": "1/2", "5.": 5, "5. km": 5, "5.0": 5, "-.5": "-1/2", "0.10": "1/10",
    "3.14": "157/50", "3/4": "3/4", "-3/4": "-3/4", "3 / 4": "3/4", "1,000/3": "1000/3", "1.5/2": "3/4",
    "1 1/2": "3/2", "-1 1/2": "-3/2", "1 1/2 hours": "3/2", "1/2 million": 500_000, r"\frac{3}{4}": "3/4",
    r"\dfrac{3}{4}": "3/4", r"\tfrac34": "3/4", r"-\frac{3}{4}": "-3/4", r"\frac{-3}{4}": "-3/4",
    r"1\frac{1}{2}": "3/2", r"$\frac{1}{2}$ cup": "1/2", "18 dollars": 18, "18 dollars.": 18, "5 km/h": 5,
    "5km": 5, "$5/hour": 5, "20 miles per hour": 20, "3 m^2": 3, "3 m²": 3, "3 sq. ft.": 3, "5 pm": 5,
    "5 more apples": 5, "5 years-old": 5, "18 dollars each week": 18, "5 dozen": 5, "3 quarters": 3,
    "18 café": 18, r"12 \text{ apples}": 12, r"12\text{ apples}.": 12, r"3\,\mathrm{km}": 3,
    r"3 \text{ m}^{2}": 3, r"\text{18}": 18, r"\textbf{18 \text{ dollars}}": 18, r"90^\circ": 90,
    r"12~\text{km}": 12, r"\$18": 18, r"\$18.00": 18, r"-\$18": -18, r"50\%": 50, r"$\$18$": 18, "$18$": 18,
    "$$18$$": 18, r"\(18\)": 18, r"\[ 18 \]": 18, r"\$1{,}234": 1234, r"1,\!234": 1234, r"10\,000": 10_000,
    r"5\ \text{km}": 5, "**18**": 18, "**$18**": 18, "*18*": 18, "`18`": 18, "__18__": 18,
    "**18 dollars.**": 18, "$18$.": 18, "x = 5": 5, "x=-5": -5, r"$x = \frac{1}{2}$": "1/2",
    "12 + 6 = 18 apples": 18, r"\text{cost} = \$18": 18, "5 hundred": 500, "5 thousand": 5000,
    "2.5 million": 2_500_000, "$3 billion dollars": 3_000_000_000, "5 hundred thousand": 500_000,
    "5 Thousand": 5000, "1.5e3": 1500, "1.5E3": 1500, "2e-2": "1/50", "-3e2": -300, "1e+22": 10**22,
    "10^3": 1000, "10^{12}": 10**12, "1.5 x 10^3": 1500, r"2 \times 10^3": 2000, "3*10^2": 300,
    r"$10^3$": 1000, "(18)": 18, "(-18)": -18, "($18)": 18, r"\(18\)": 18, "8 000": 8000,
    "1 234 567": 1_234_567, "1 234": 1234, "8 000 dollars": 8000, "$8 000": 8000,
}

NOT_NUMBERS = [
    "", " ", ".", "-", "$", "%", ",", "=", "x", "x =", "eighteen", "dollars", "a hundred", "hundred",
    "about 18", "~18", "nan", "inf", "1e999999999", "0x12", "1_000", "the answer is 18", "negative 5",
    "USD 5", "1,23", "12,34", "1234,567", "0,234", ",123", "1,,234", "1,234,5", "1.2.3", "1 23", "1'234",
    "1234 567", "0 123", "1 2345", "5 100/200 300",
    "18,00 €", "--5", "+-5", "5-", "-$-5", "1/0", "0/0", "1 1/0", r"\frac{1}{0}", "1 5/2", "3/-4", "1/2/3",
    "3/4/2020", "1.5 1/2", r"\frac{1}{x}", r"\frac{1+1}{2}", r"\frac{\frac{1}{2}}{3}", r"5\frac{-1}{2}",
    "3-5", "3 - 5", "3–5", "3 to 5", "5 or 6", "5 and 6", "5, 6", "5 6", "5; 6", "(5, 6)", "3:30", "3:1",
    "18...", "3+4", "3*4", "3 × 4", "2^3", "5²", "5!", r"2 \times 3", r"\sqrt{5}", r"5\pi", "2x",
    "e3", "1e999", "1.5e3.5", "10^", "10^x", "3^10", "(18", "18)", "()", "(3)(4)",
    "3y", "x + 5", ">= 5", "x <= 5", "x != 5", "> 5", r"\geq 5", "5k", "$5K", "5M", "5bn", "3 trillion",
    "5 thousandths", "2 thirds", "3 and a half", "3 and more", "5 plus tax", "5 is wrong",
    "3 apples and 4 pears", "5 ft 6 in", "18 dollars 50 cents", "7 remainder 2", "½", "3½", "3万", "١٨",
    "１８", "18…", "1" * 201, "18" + " " * 199,
]


@pytest.mark.parametrize("text", NUMBERS)
def test_number(text):
    found = parse_number(text)
    assert isinstance(found, Fraction) and found == Fraction(NUMBERS[text])


@pytest.mark.parametrize("text", NOT_NUMBERS)
def test_no_number(text):
    assert parse_number(text) is None


# Pieces that the patterns look for, so that strings of them come close to matching in many ways.
PIECES = [*"0123456789$€%,./=-+^*_`{}()[]~ \n…x²½√", "−", "  ", "12", ",345", "1/2", " 3/4", "\\", "\\text{",
          "\\frac{", "}{", "\\frac12", "\\,", "\\!", "{,}", "\\$", "\\%", "\\(", "\\)", "\\quad", " hundred",
          " million", " dollars", " km/h", " and ", "e9", "a-b", "a.", "#", "####", "#### ", "\\boxed{",
          "\\boxed", "\ud800", "\x00", "İ", "ſ", "\u212a"]


def test_any_text_is_judged_at_once():
    """No exception, no pattern that takes for ever; by processor time, which a busy machine leaves alone."""
    rng = random.Random(0)
    texts = ["".join(rng.choices(PIECES, k=rng.randint(0, 60))) for _ in range(10_000)]
    texts += [(piece * 200)[:n] + end for piece in PIECES for end in ("", "!", "5") for n in (199, 9000)]
    texts += ["5 " + (piece * 99)[:190] + "!" for piece in ("a ", "a-", "a/", "a.", "a", "$ ", "million ")]
    texts += ["\\boxed{" * 5000, "#### " * 5000, "\\boxed{" + "{" * 20_000, "\\boxed" + " " * 20_000]
    num_numbers, slowest = 0, 0.0
    for text in texts:
        start = time.process_time()
        number, answer = parse_number(text), final_answer(text)
        is_right(text, Fraction(5))
        slowest = max(slowest, time.process_time() - start)
        assert number is None or isinstance(number, Fraction)
        assert answer is None or (answer and answer in text)
        num_numbers += number is not None
    assert num_numbers > 100 and slowest < 2


# ----------------------------------------------------------------------------------------------------
# 2. Answers

@pytest.mark.parametrize(("text", "answer"), [
    ("", None), ("The answer is 18.", None), ("# 18", None), ("### 18", None), ("##### 18", None),
    ("#### 18", "18"), ("so\n#### 18\n", "18"), ("####18", "18"), ("####   18  \nmore", "18"),
    ("#### 18\r\n", "18"), ("#### ", None), ("####", None), ("####\n18", None),
    ("#### $1,234 in all", "$1,234 in all"),
    ("#### 5\n#### 6", "6"), ("#### 5\n#### ", None),
    (r"\boxed{18}", "18"), (r"so $\boxed{18}$.", "18"), (r"\boxed {18}", "18"), (r"\boxed{ 18 }", "18"),
    (r"\boxed{}", None), (r"\boxed{18", None), (r"\boxed 18", None), ("boxed{18}", None),
    (r"\boxed{\frac{3}{4}}", r"\frac{3}{4}"),
    (r"\boxed{\text{a \textbf{b}} {c}} }", r"\text{a \textbf{b}} {c}"),
    (r"\boxed{5} and \boxed{6}", "6"), (r"\boxed{5} and \boxed{6", None), (r"\boxed{\boxed{5}}", "5"),
    ("\\boxed{1\n8}", "1\n8"),
    ("\\boxed{5}\n#### 6", "6"), ("#### 5\n\\boxed{6}", "6"), (r"#### \boxed{6}", "6"),
])
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_the_last_answer_counts():
    assert is_right("#### 17\nNo:\n#### 18", Fraction(18)) and not is_right("#### 18\n#### 17", Fraction(18))
    assert not is_right("It is 18.", Fraction(18)) and not is_right("#### none", Fraction(18))
    assert is_right(r"\boxed{0.75}", Fraction(3, 4)) and not is_right(r"\boxed{0.7500001}", Fraction(3, 4))
    assert is_right("#### 100000000000000000001", Fraction(10**20 + 1))  # no float would tell it from 10**20
    assert not is_right("#### 100000000000000000000", Fraction(10**20 + 1))


@pytest.mark.parametrize(("text", "finished", "earned", "right"), [
    ("6 * 3 = 18\n#### 18", True, 1.25, True),
    ("6 * 3 = 18\n#### 18\n\n", True, 1.25, True),
    (r"\boxed{18} ", True, 1.25, True),
    ("6 * 3 = 17\n#### 17", True, 0.25, False),
    ("#### 18\nQuestion: And then?", True, 1.0, True),  # right, but not where it should end
    ("#### 18\n#### 18", True, 1.0, True),
    (r"#### \boxed{18}", True, 1.0, True),
    (r"\boxed{18} apples", True, 1.0, True),
    ("18", True, 0.0, False),
    ("#### ", True, 0.0, False),
    (r"\boxed{18", True, 0.0, False),
    ("", True, 0.0, False),
    ("#### 18", False, 0.0, False),  # cut off: perhaps it was to be 180
    ("#### 18\n", False, 1.0, True),
    (r"\boxed{18}", False, 1.0, True),
    (r"\boxed{18", False, 0.0, False),
])
def test_reward(text, finished, earned, right):
    assert reward(text, Fraction(18), finished, 0.25) == (earned, right)
    assert reward(text, Fraction(18), finished, 0.0) == (float(right), right)


# ----------------------------------------------------------------------------------------------------
# 3. All of GSM8K

@pytest.fixture(scope="module")
def gsm8k():
    """{split: its rows as read_questions gives them}."""
    folder = gsm8k_folder()
    if folder is None:
        pytest.skip("GSM8K is not on this machine (GSM8K_DIR)")
    return {split: read_questions(make_args(folder), split) for split in SIZES}


def dressed(number):
    """The ways in which models write an integer that is right."""
    grouped, latex = f"{number:,}", f"{number:,}".replace(",", "{,}")
    yield from (f"{number}", grouped, f"{number}.", f"{number}.00", f"{grouped}.0", f"{number}%")
    yield from (f"x = {number}", f"**{number}**", f"${grouped}", rf"\${latex}", f"${number}$")
    yield from (rf"\text{{{number}}}", f"{2 * number}/2", rf"\frac{{{3 * number}}}{{3}}")
    yield f"{number}".replace("-", "−")
    for unit in ("dollars", "apples", "km/h", "square feet", "miles per hour", "m^2", "years old", "cents"):
        yield from (f"{number} {unit}", f"{grouped} {unit}.", rf"{latex} \text{{ {unit}}}")


def test_every_answer_of_gsm8k_is_right(gsm8k):
    assert {split: len(rows) for split, rows in gsm8k.items()} == SIZES
    rows, rng = [row for rows in gsm8k.values() for row in rows], random.Random(0)
    # Read once more, by means of this test's own.
    numbers = [int(row["answer"].split("####")[1].strip().replace(",", "")) for row in rows]
    forms = {number: list(dressed(number)) for number in numbers}
    for number in forms:
        assert not [text for text in forms[number] if not is_right(rf"\boxed{{{text}}}", Fraction(number))]
    for row, number in zip(rows, numbers):
        text = rng.choice(forms[number])
        assert row["gold"] == number and is_right(row["answer"], row["gold"])
        assert is_right(rf"So it is $\boxed{{{text}}}$.", row["gold"])
        assert is_right(f"{row['question']}\n#### {text}\n\n", row["gold"])


def wrong_number(n, rng):
    return str(n + rng.choice([-1, 1]) * rng.choice([1, 2, 3, 10, 100, rng.randint(1, 1000)]))


def moved_digit(n, rng):
    """One digit stands elsewhere."""
    digits = list(str(abs(n)))
    digits.insert(rng.randrange(len(digits)), digits.pop(rng.randrange(len(digits))))
    return ("-" if n < 0 else "") + "".join(digits)


def changed_digit(n, rng):
    digits = list(str(n))
    digits[-rng.randint(1, len(str(abs(n))))] = rng.choice("0123456789")
    return "".join(digits)


def moved_point(n, rng):
    return str(n) + "0" if rng.random() < 0.3 else f"{n // 10}.{n % 10}" if n >= 0 else f"{n}0"


def swapped_digits(n, rng):
    text, i = str(n), rng.randrange(len(str(n)))
    return text[:i] + text[i + 1:i + 2] + text[i] + text[i + 2:] if text[i] != "-" else str(-n)


def other_sign(n, rng):
    return rng.choice([str(-n), f"${-n}" if n < 0 else f"-${n}", f"{-n}".replace("-", "−")])


def other_unit(n, rng):
    return rng.choice([f"{100 * n} cents", f"{n * 1000:,} grams", f"{60 * n} minutes", f"{n}/100 dollars",
                       rf"{n * 100:,} \text{{ cents}}", f"{n / 12 + 1:.1f} dozen"])


def other_magnitude(n, rng):
    words = ["hundred", "thousand", "million", "billion", "hundred thousand", "k", "thousandths"]
    return f"{n} {rng.choice(words)}"


def cut_or_doubled(n, rng):
    text = str(abs(n))
    return rng.choice([text[:-1], text[1:], text + text[-1], f"{n} or {n + 1}", f"{n}-{n + 5}", f"{n}, {n}"])


def value_of(text):
    """What a perturbed text without words says, by Python's own reading; None where it says no one number."""
    try:
        return Fraction(text.replace("−", "-").replace("$", "").replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def test_2000_perturbed_answers_are_wrong(gsm8k):
    kinds = [wrong_number, moved_digit, changed_digit, moved_point, swapped_digits, other_sign, other_unit,
             other_magnitude, cut_or_doubled]
    rows, rng, num_wrong = [row for rows in gsm8k.values() for row in rows], random.Random(0), 0
    while num_wrong < 2000:
        row = rng.choice(rows)
        text = kinds[num_wrong % len(kinds)](int(row["gold"]), rng)
        if row["gold"] == 0 or value_of(text) == row["gold"]:
            continue  # the digits of 11 swapped are right
        num_wrong += 1
        for form in (f"#### {text}", rf"\boxed{{{text}}}", f"#### {row['gold']}\nNo.\n#### {text}\n"):
            assert not is_right(form, row["gold"]), (form, row["gold"])
            assert reward(form, row["gold"], True, 0.0) == (0.0, False)


# ----------------------------------------------------------------------------------------------------
# 4. Questions

ROW = {"question": "How many are 3 * 6?", "answer": "3 * 6 = <<3*6=18>>18\n#### 18"}


def test_questions_of_a_folder(tmp_path):
    write_gsm8k_like(tmp_path / "train.jsonl", 20)
    write_lines(tmp_path / "test-00001-of-00002.json", "", ROW, "  ")
    write_lines(tmp_path / "test-00000-of-00002.jsonl", {**ROW, "answer": "#### -1,234.5", "id": 7})
    write_lines(tmp_path / "training_notes.jsonl", "not for this script")  # no word of it is "train"
    args = make_args(tmp_path)
    train = read_questions(args, "train")
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    assert [{key: row[key] for key in ROW} for row in train] == [json.loads(line) for line in lines]
    assert all(row["gold"] == int(row["answer"].split()[-1]) for row in train)
    assert [row["gold"] for row in read_questions(args, "test")] == [Fraction(-2469, 2), 18]
    with pytest.raises(UserError, match="holds no questions of 'validation'; of a folder"):
        read_questions(args, "validation")


def test_questions_of_a_clone_with_configurations(tmp_path):
    write_lines(tmp_path / "main/test.jsonl", ROW)
    write_lines(tmp_path / "socratic/test.jsonl", {**ROW, "answer": "#### 1"})
    assert [row["gold"] for row in read_questions(make_args(tmp_path), "test")] == [18]
    assert [row["gold"] for row in read_questions(make_args(tmp_path, "socratic"), "test")] == [1]
    assert [row["gold"] for row in read_questions(make_args(tmp_path, None), "test")] == [18, 1]


def test_questions_of_one_file(tmp_path):
    path, held_out = write_lines(tmp_path / "rows.jsonl", ROW), write_lines(tmp_path / "held.jsonl", ROW, ROW)
    args = make_args(path)
    assert len(read_questions(args, "train")) == 1 and len(read_questions(args, str(held_out))) == 2
    assert len(read_questions(args, str(path))) == 1  # asked for by its name
    with pytest.raises(UserError, match="one file without a split 'test': give --eval-split a file"):
        read_questions(args, "test")


def test_a_bare_number_is_an_answer_too(tmp_path):
    rows = {**ROW, "answer": "1,234"}, {**ROW, "answer": "so \\boxed{3/4}"}
    path = write_lines(tmp_path / "rows.jsonl", *rows)
    assert [row["gold"] for row in read_questions(make_args(path), "train")] == [1234, Fraction(3, 4)]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_questions_of_tables(tmp_path, suffix):
    datasets = pytest.importorskip("datasets")
    rows = [ROW, {"question": 'With "quotes",\nand lines', "answer": "#### 2"}]
    table = datasets.Dataset.from_list(rows)
    getattr(table, f"to_{suffix}")(tmp_path / f"train.{suffix}")
    assert read_questions(make_args(tmp_path), "train") == [
        {**row, "gold": gold} for row, gold in zip(rows, (18, 2))]
    getattr(datasets.Dataset.from_list([ROW, {**ROW, "answer": "none"}]), f"to_{suffix}")(
        tmp_path / f"test.{suffix}")
    with pytest.raises(UserError, match=rf"test\.{suffix} row 2: no number to compare with"):
        read_questions(make_args(tmp_path), "test")


@pytest.mark.parametrize(("lines", "message"), [
    ([], "holds no questions of 'train'"),
    (["", " "], "holds no questions"),
    ([ROW, "{'question': 1}"], r"rows\.jsonl:2: expected one JSON object a line: JSONDecodeError: "),
    ([ROW, "\udcff"], r"rows\.jsonl:2: expected one JSON object a line: UnicodeDecodeError: "),
    ([ROW, [1, 2]], r"rows\.jsonl:2: expected texts called 'question' and 'answer', not \[1, 2\]$"),
    ([{"problem": "?"}], r"rows\.jsonl:1: .*'question' and 'answer', not {'problem': '\?'}$"),
    ([ROW, {"question": "?", "answer": [18]}], r"rows\.jsonl:2: expected texts"),
    ([ROW, {"question": "?", "answer": True}], r"rows\.jsonl:2: no number to compare with .* 'True'"),
    ([{**ROW, "question": " "}], r"rows\.jsonl:1: expected texts"),
    ([ROW, "", {**ROW, "answer": "It is\n#### eighteen"}],
     r"rows\.jsonl:3: no number to compare with in the answer 'eighteen'; it must end .* such as '#### 18'$"),
    ([{**ROW, "answer": "It is 18"}, ROW, {**ROW, "answer": "#### 3 or 4"}],
     r"rows\.jsonl:1: no number to compare with in the answer 'It is 18'"),
])
def test_faulty_questions(tmp_path, lines, message):
    path = tmp_path / "rows.jsonl"
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in lines)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message):
        read_questions(make_args(path), "train")


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"missing\.jsonl: FileNotFoundError"):
        read_questions(make_args(tmp_path / "missing.jsonl"), "train")
    with pytest.raises(UserError, match=r"held\.jsonl: FileNotFoundError"):
        read_questions(make_args(tmp_path), str(tmp_path / "held.jsonl"))


def test_a_hub_name_without_a_hub():
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match=r"^--dataset nobody/questions \(train\): .*nobody/questions"):
        read_questions(make_args("nobody/questions"), "train")


# ----------------------------------------------------------------------------------------------------
# 5. Prompts

@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """{name: tokenizer} with the chat template of that name; 'base' and 'base_bos' have none."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizers")
    kinds = {**{name: (name, name.startswith("llama")) for name in CHAT_TEMPLATES},
             "base": (None, False), "base_bos": (None, True)}
    return {name: AutoTokenizer.from_pretrained(make_tokenizer(folder / name, 300, template, bos))
            for name, (template, bos) in kinds.items()}


@pytest.mark.parametrize("system", ["", "Think."])
def test_chat_prompts(tokenizers, system):
    for name in sorted(CHAT_TEMPLATES.keys() - {"gemma"}):
        tokenizer = tokenizers[name]
        ids = render_prompt(tokenizer, "How many?", system)
        messages = [("system", system)] * bool(system) + [("user", "How many?")]
        messages = [{"role": role, "content": content} for role, content in messages]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert type(ids) is list and all(type(token) is int for token in ids)
        assert tokenizer.decode(ids) == text and "How many?" in text and (not system or system in text)
        assert text.count(BOS) == name.startswith("llama")  # once, though template and tokenizer both know it


def test_the_generation_prompt_comes_last(tokenizers):
    tokenizer = tokenizers["chatml_generation"]
    assert tokenizer.decode(render_prompt(tokenizer, "How many?", "Think.")) == (
        "<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n"
        "<|im_start|>assistant\n")


def test_a_template_that_refuses(tokenizers):
    with pytest.raises(UserError, match=r"--system-prompt ''\): .*System role not supported$"):
        render_prompt(tokenizers["gemma"], "How many?", SYSTEM_PROMPT)
    text = tokenizers["gemma"].decode(render_prompt(tokenizers["gemma"], "How many?", ""))
    assert text.endswith("<start_of_turn>user\nHow many?<end_of_turn>\n<start_of_turn>model\n")


def test_plain_prompts(tokenizers):
    for name in ("base", "base_bos"):
        ids = render_prompt(tokenizers[name], "How many?", "")
        front = BOS * (name == "base_bos")
        assert tokenizers[name].decode(ids) == f"{front}Question: How many?\nAnswer:"
        ids = render_prompt(tokenizers[name], "How many?", "Think.")
        assert tokenizers[name].decode(ids) == f"{front}Think.\nQuestion: How many?\nAnswer:"


@pytest.mark.parametrize("front", ["", BOS, EOS])
def test_a_plain_prompt_has_no_end_token(tmp_path, front):
    """Of tokenizers that end every text with EOS, some of which begin it with the same token, too."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path, 300, bos=True))
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single=f"{front} $A {EOS}".strip(),
        special_tokens=[(token, backend.token_to_id(token)) for token in {EOS, front} - {""}])
    assert tokenizer.decode(tokenizer("So")["input_ids"]) == f"{front}So{EOS}"
    ids = render_prompt(tokenizer, "How many?", "")
    assert tokenizer.decode(ids) == f"{front}Question: How many?\nAnswer:"


def test_the_system_prompt_asks_for_what_is_rewarded():
    assert r"\boxed{}" in SYSTEM_PROMPT and "\n" not in SYSTEM_PROMPT
