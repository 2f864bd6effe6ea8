"""Make word problems in GSM8K's format, and a tokenizer for them: python tools/make_word_problems.py FOLDER

FOLDER gets train.jsonl and test.jsonl, rows of question and answer as GSM8K has them (steps of working, then
'#### ' and the number), and tokenizer/, which train_llm.py takes as --tokenizer. A problem has two steps of
+, - and * on small numbers, told by one of the templates below with a name and a thing filled in. Numbers of
a test problem never occur in a training problem of the same template, under whatever name.

sft.jsonl holds the training questions with the answers of a careless teacher, who in the last step often
takes the wrong operation, in most templates more often than not. A model that is fine-tuned on them knows the
format and how to calculate, and imitates the slips: they are left for reinforcement learning to mend. The
same arguments write the same files.
"""

import argparse
import json
import operator
import random
import re
from pathlib import Path

NAMES = ("Ada Ben Carla David Emma Felix Grace Henry Irene Jack Kate Leo Maria Noah Olga Peter Quinn Rosa "
         "Sam Tina Umar Vera Walter Xenia Yara Zoe").split()
THINGS = ("apples books cards coins cookies eggs flowers marbles muffins oranges pencils plums shells stamps "
          "stickers tickets").split()

# (question, answer). The answer is the program too: each {l}*{m}={r} in it computes r.
TEMPLATES = [
    ("{name} buys {a} boxes with {b} {thing} each and gives {c} {thing} away. How many {thing} are left?",
     "The boxes hold {a}*{b}={x} {thing}.\nThen {x}-{c}={y} are left."),
    ("{name} has {a} {thing}, finds {b} more and then loses {c}. How many {thing} does {name} have now?",
     "First {name} has {a}+{b}={x} {thing}.\nThen {x}-{c}={y} are left."),
    ("There are {a} {thing} on the table. {name} takes {b} of them, and a friend takes {c}. How many are "
     "left?",
     "After {name} there are {a}-{b}={x} {thing}.\nThen {x}-{c}={y} are left."),
    ("{name} packs {a} {thing} an hour. After {b} hours there were {c} more to pack. How many {thing} is "
     "that in all?", "In the hours {name} packs {a}*{b}={x}.\nIn all that is {x}+{c}={y}."),
    ("A shop sells {thing} for {a} dollars each. {name} buys {b} with a voucher of {c} dollars. How many "
     "dollars does {name} pay?", "The {thing} cost {a}*{b}={x} dollars.\nWith the voucher it is "
     "{x}-{c}={y}."),
    ("{name} saves {a} dollars a week for {b} weeks and had {c} dollars before. How many dollars are "
     "there now?",
     "In the weeks {name} saves {a}*{b}={x}.\nWith the old dollars it is {c}+{x}={y}."),
    ("{name} has {c} dollars and buys {a} {thing} for {b} dollars each. How many dollars remain?",
     "The {thing} cost {a}*{b}={x} dollars.\nThere remain {c}-{x}={y}."),
    ("On Monday {name} sold {a} {thing}, on Tuesday {b} and on Friday {c}. How many {thing} were sold?",
     "By Tuesday it was {a}+{b}={x}.\nBy Friday it was {x}+{c}={y}."),
    ("{name} is {a} years old. Her aunt is {b} times as old, and her uncle is {c} years older than the "
     "aunt. How old is the uncle?", "The aunt is {a}*{b}={x}.\nThe uncle is {x}+{c}={y}."),
    ("A bus leaves with {a} people. At the market {b} get off and {c} get on. How many people are on the "
     "bus?",
     "After some left it holds {a}-{b}={x}.\nThen it holds {x}+{c}={y}."),
    ("{name} reads {a} pages a day. The book has {c} pages. How many pages are left after {b} days?",
     "In the days {name} reads {a}*{b}={x} pages.\nThere remain {c}-{x}={y}."),
    ("A garden has {a} rows of {b} trees. {name} plants {c} more trees. How many trees are there?",
     "The rows have {a}*{b}={x} trees.\nWith the new ones it is {x}+{c}={y}."),
    ("{name} baked {a} {thing} and {b} cakes, and {c} of all of these were eaten. How many things remain?",
     "Baked were {a}+{b}={x}.\nThere remain {x}-{c}={y}."),
    ("A rope is {c} meters long. {name} cuts off {a} pieces of {b} meters. How many meters remain?",
     "The pieces take {a}*{b}={x} meters.\nThere remain {c}-{x}={y}."),
    ("{name} had {a} {thing} and lost {b}. A friend has {c} times as many as {name} has now. How many "
     "does the friend have?", "Now {name} has {a}-{b}={x}.\nThe friend has {x}*{c}={y}."),
    ("In a class {a} girls and {b} boys each bring {c} {thing}. How many {thing} is that?",
     "The class has {a}+{b}={x} children.\nThey bring {x}*{c}={y}."),
    ("A train has {a} cars with {b} seats. Taken are {c} seats. How many seats are free?",
     "The train has {a}*{b}={x} seats.\nFree are {x}-{c}={y}."),
    ("{name} walked {a} miles, then {b} miles, and then drove {c} miles. How many miles is that?",
     "On foot it was {a}+{b}={x} miles.\nIn all that is {x}+{c}={y}."),
    ("It was {a} degrees in the morning. It got {b} degrees warmer and then {c} degrees colder. How warm "
     "is it?",
     "By noon it was {a}+{b}={x} degrees.\nThen it was {x}-{c}={y}."),
    ("{name} earns {a} dollars an hour, works {b} hours and spends {c} dollars on {thing}. How many "
     "dollars are left?", "The work brings {a}*{b}={x} dollars.\nThen {x}-{c}={y} are left."),
    ("{name} collects {thing}: {a} red ones, {b} fewer blue ones, and {c} more green ones than blue ones. "
     "How many are green?", "Blue are {a}-{b}={x}.\nGreen are {x}+{c}={y}."),
    ("{name} needs {c} {thing} and has {a} bags of {b}. How many {thing} are missing?",
     "The bags hold {a}*{b}={x} {thing}.\nMissing are {c}-{x}={y}."),
    ("A farm has {a} hens that lay {b} eggs each, and {c} eggs from before. How many eggs are there?",
     "The hens lay {a}*{b}={x} eggs.\nWith the old ones it is {x}+{c}={y}."),
    ("{name} and a friend have {a} and {b} {thing}. They win a game and get {c} times as many as both "
     "have. How many do they get?", "Both have {a}+{b}={x} {thing}.\nThey get {x}*{c}={y}."),
]
STEP = re.compile(r"\{(\w)\}([-+*])\{(\w)\}=\{(\w)\}")
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
SLIP = {"+": "-", "-": "+", "*": "+"}  # what the careless teacher takes instead
SLIP_RATES = (0.35, 0.65, 0.7)  # of the templates, in turn
END = "<|endoftext|>"


def draw_numbers(answer: str, rng: random.Random) -> dict[str, int]:
    """Values of the letters in a template's answer: factors from 2 to 5, others and results up to 25."""
    steps = STEP.findall(answer)
    factors = {letter for left, sign, right, _ in steps if sign == "*" for letter in (left, right)}
    while True:
        values = {letter: rng.randint(2, 5 if letter in factors else 20) for letter in "abc"}
        for left, sign, right, result in steps:
            values[result] = OPERATIONS[sign](values[left], values[right])
        if all(1 <= value <= 25 for value in values.values()):
            return values


def careless_answer(answer: str, values: dict[str, int], rate: float, rng: random.Random) -> tuple[str, int]:
    """The template's answer and number, or with probability `rate` those with another last operation."""
    left, sign, right, result = STEP.findall(answer)[-1]
    slipped = OPERATIONS[SLIP[sign]](values[left], values[right])
    if slipped < 0 or rng.random() >= rate:
        return answer, values[result]
    step, wrong = f"{{{left}}}{sign}{{{right}}}", f"{{{left}}}{SLIP[sign]}{{{right}}}"
    return answer.replace(step, wrong), slipped


def make_problems(num_train: int, num_test: int, seed: int) -> tuple[list[dict], list[dict], list[dict]]:
    """(train, test, sft): rows of question and answer, no question twice in train and test."""
    rng, seen, numbers_of_test = random.Random(seed), set(), set()
    test, train, sft = [], [], []
    while len(train) < num_train:
        index = rng.randrange(len(TEMPLATES))
        question, answer = TEMPLATES[index]
        values = draw_numbers(answer, rng)
        numbers = (index, values["a"], values["b"], values["c"])
        words = values | {"name": rng.choice(NAMES), "thing": rng.choice(THINGS)}
        row = {"question": question.format(**words),
               "answer": f"{answer.format(**words)}\n#### {values['y']}"}
        for_test = len(test) < num_test
        if row["question"] in seen or (not for_test and numbers in numbers_of_test):
            continue
        seen.add(row["question"])
        if for_test:
            numbers_of_test.add(numbers)
            test.append(row)
            continue
        taught, y = careless_answer(answer, values, SLIP_RATES[index % len(SLIP_RATES)], rng)
        train.append(row)
        taught = taught.format(**(words | {"y": y}))
        sft.append({"question": row["question"], "answer": f"{taught}\n#### {y}"})
    return train, test, sft


def write_tokenizer(texts: list[str], folder: Path) -> None:
    """A byte-level BPE whose words come from the texts and in which each digit is a token of its own.

    With numbers in pieces of varying length, a small model does not learn to calculate.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1024, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--num-train", type=int, default=8000, metavar="N", help="training problems (8000)")
    parser.add_argument("--num-test", type=int, default=400, metavar="N", help="test problems (400)")
    parser.add_argument("--seed", type=int, default=0, help="of the problems (0)")
    args = parser.parse_args()
    for flag, number in (("--num-train", args.num_train), ("--num-test", args.num_test)):
        if number < 1:
            parser.error(f"{flag} must be at least 1, not {number}")
    train, test, sft = make_problems(args.num_train, args.num_test, args.seed)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test), ("sft", sft)):
        (args.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_tokenizer([f"{row['question']}\n{row['answer']}" for row in train], args.folder / "tokenizer")
    print(f"wrote {len(train)} training and {len(test)} test problems and a tokenizer to {args.folder}")


if __name__ == "__main__":
    main()
