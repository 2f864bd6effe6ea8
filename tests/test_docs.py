"""README and docs/: every path, flag and link in them exists, and every command is one that works.

A command of a training script is parsed by that script; each program that is named is run by a test, or by
nobody without a cluster, a GPU or a hub.
"""

import functools
import importlib
import re
import shlex
import subprocess
import sys

import pytest
from helpers import REPO, option_lines

sys.path.insert(0, str(REPO / "tools"))
from copy_twins import scripts_beside  # noqa: E402  (the path comes first)

PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md")), *sorted(REPO.glob("*/README.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
SCRIPT_SUFFIXES = (".py", ".sh", ".sbatch")
# What runs write; a page may say what is in there.
WRITTEN = ("runs", "checkpoints", "data_cache", "outputs", "wandb", "logs", ".venv", ".venv-test",
           "vllm-env")
# What the reader of a page has.
READERS = {"my_chats.jsonl": "{}", "my_texts.jsonl": "{}", "my_texts/a.txt": "", "my_pairs.jsonl": "{}",
           "my_questions/train.jsonl": "", "my_tokenizer/tokenizer.json": "{}"}
MAX_README_LINES = 160


def repo_files():
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    return [path for path in map(REPO.joinpath, listed.splitlines()) if path.is_file()]


@functools.cache
def flags_of(program):
    """The flags that a program of this repository takes; of a shell script those that its text names."""
    text = "\n".join(option_lines(program)) + " --help" if program.suffix == ".py" else program.read_text()
    return set(re.findall(r"--[a-z][\w-]*", text))


def parts_of(page):
    """(command lines, spans between backticks) of a page; continued lines joined, comments left out."""
    text = page.read_text().replace("\\\n", " ")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for kind, block in fenced if kind == "bash" for line in block.splitlines()]
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"(?:^|\n)    (\S.*)", text)  # a block by its indentation
    spans = re.findall(r"`([^`]+)`", text)
    starts = r"(python|bash|\./launch|sbatch|torchrun|[A-Z_]+=\S+) "
    lines += [span for span in spans if re.match(starts, span)]
    lines = [line.split("  #")[0].strip() for line in lines if not line.startswith("#")]
    return [" ".join(line.split()) for line in lines if line], [" ".join(span.split()) for span in spans]


def words_of(line):
    return [word.strip("\"'(),;:") for word in line.split()]


def should_exist(word):
    """Whether a word of a page looks like a file or folder of this repository."""
    path = word.removeprefix("./")
    if not re.fullmatch(r"[\w.*-]+(/[\w.*-]+)*/?", path) or path.startswith(WRITTEN):
        return False
    if "/" in path:
        return (REPO / path.split("/")[0]).is_dir() or path.endswith(SCRIPT_SUFFIXES)
    # A single name that ends in .yaml or .jsonl is mostly one of a run's own files.
    return path.endswith((*SCRIPT_SUFFIXES, ".md")) or path in ("requirements.txt", "LICENSE")


@each_page
def test_paths_exist(page):
    words = [word for lines in parts_of(page) for line in lines for word in words_of(line)]
    # A single name may also be said next to the folder that it stands in.
    names = {path.name for path in repo_files()} | {"train_mine.py", "my_copy.py"}
    assert not [word for word in words if should_exist(word) and word not in names
                and not any(REPO.glob(word.removeprefix("./").rstrip("/")))]
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


def unknown_flags(line, everyones):
    """The flags of one command line or span that no program of this repository has.

    In front of the first script they belong to torchrun, sbatch or whatever runs it; behind it they are that
    script's. A line with no script is another program's command unless it begins with the flag.
    """
    line = re.sub(r'"[^"]*"', '""', line)  # another program's command, as one argument
    owner, unknown = everyones if line.lstrip().startswith("-") else None, []
    for word in words_of(line):
        flag = word.split("=")[0]
        program = REPO / word.removeprefix("./")
        if word.endswith(SCRIPT_SUFFIXES) and program.is_file() and not program.name.startswith("test_"):
            # A launcher passes on what it does not know itself, and so do these tools.
            passes_on = program.suffix != ".py" or program.name in (
                "show_batch.py", "deploy.py", "verify_resume.py", "finetune_gsm8k.py")
            owner = everyones if passes_on else flags_of(program)
        elif re.fullmatch(r"--[a-z][\w-]*", flag) and owner is not None and flag not in owner:
            unknown.append(f"{flag} in: {line.strip()}")
    return unknown


@functools.cache
def everyones_flags():
    programs = [path for path in repo_files() if path.suffix in SCRIPT_SUFFIXES and path.parts[-2] != "tests"]
    return set().union(*map(flags_of, [*programs, REPO / "tests/run.sh"]))


@each_page
def test_flags_exist(page):
    lines, spans = parts_of(page)
    assert not [flag for line in lines + spans for flag in unknown_flags(line, everyones_flags())]


def test_unknown_flags_are_found_where_they_should_be():
    known = {"--config", "--all"}
    assert unknown_flags("--confg x", known) and not unknown_flags("--config x --all", known)
    assert not unknown_flags("pip install --upgrade torch", known)
    assert not unknown_flags("sbatch --nodes 2 tests/run.sh --config x", known)
    assert unknown_flags("FOO=1 ./launch_single_node.sh --config x --nope=3", known)


def training_commands():
    """(script, its arguments) of each command that starts a training, through whatever launcher."""
    scripts = {path.name: path for path in scripts_beside(REPO / "train_llm.py")}
    for page in PAGES:
        for line in parts_of(page)[0]:
            words = shlex.split(line)
            starts = [i for i, word in enumerate(words) if word.endswith(SCRIPT_SUFFIXES)]
            if not starts or "YOUR" in line or "…" in line or "train_mine.py" in line:
                continue
            first, rest = words[starts[0]].rpartition("/")[2], words[starts[0] + 1:]
            if first.startswith("launch_"):
                script = rest.pop(0) if rest and rest[0].endswith(".py") else "train_llm.py"
                default = ["--config", "configs/train_llm/quickstart.yaml"]
                rest = rest or default
            else:
                script = {"run_gsm8k.sh": "train_gsm8k_fsdp2.py"}.get(first, first)
            if script.rpartition("/")[2] in scripts and rest not in (["--help"], ["-h"]):
                yield scripts[script.rpartition("/")[2]], rest


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder that looks like a clone of somebody who has data."""
    for path in REPO.iterdir():
        if not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    for name, text in READERS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMANDS = [*training_commands()]


@pytest.mark.parametrize("script, arguments", COMMANDS, ids=lambda value: " ".join(value)[:60] if isinstance(
    value, list) else value.name)
def test_training_commands_parse(place, monkeypatch, script, arguments):
    monkeypatch.syspath_prepend(script.parent)
    importlib.import_module(script.stem).parse_args(arguments)


def test_there_are_commands_of_every_script():
    assert {script.name for script, _ in COMMANDS} == {p.name for p in scripts_beside(REPO / "train_llm.py")}


def test_every_program_that_a_page_names_is_run_by_a_test():
    tests = {path.name: path.read_text() for path in (REPO / "tests").glob("*.py")}
    needs_hardware = {"on_gpu.sh"}  # rehearsed without, by tests/test_on_gpu.py
    named = {word.rpartition("/")[2] for page in PAGES for line in parts_of(page)[0] for word in line.split()
             if word.endswith((".py", ".sh")) and any(REPO.glob(word.removeprefix("./")))}
    benchmarks = {path.name for path in (REPO / "benchmarks").iterdir()}
    assert not [name for name in named - needs_hardware - benchmarks
                if not any(name in text or name.removesuffix(".py") in text for file, text in tests.items()
                           if file != "test_docs.py")]


def test_the_readme_is_short():
    assert len((REPO / "README.md").read_text().splitlines()) <= MAX_README_LINES
