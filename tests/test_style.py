"""The budgets and rules of the scripts, and whether configs and README speak of what exists.

A budget is raised only in the commit that needs it, with the reason in its message.
"""

import ast
import functools
import importlib
import io
import re
import subprocess
import sys
import tokenize

import pytest
import yaml
from helpers import REPO

sys.path.insert(0, str(REPO / "tools"))
from copy_twins import scripts_beside  # noqa: E402  (the path comes first)

MAX_SCRIPT_LINES = 1500
# train_llm.py holds what peers spread over a package: data preparation with chat templates and packing, the
# model, loading and export for every family of transformers, checkpoints, and what a cluster does to a run:
# signals, stalls, full disks, damaged files. Its median function has 10 lines. train_gsm8k_fsdp2.py holds the
# part of that which is shared (fenced, 1,180 lines), questions and rewards, two kinds of rollouts, both ends
# of the wire to vLLM, four losses.
LONGER_SCRIPTS = {"train_llm.py": 2890, "train_gsm8k_fsdp2.py": 3345, "train_embedding_fsdp2.py": 2289}
MAX_TOOL_LINES = 400
MAX_MAIN_LINES = {"train_llm.py": 160, "train_gsm8k_fsdp2.py": 180, "train_embedding_fsdp2.py": 160}
MAX_FUNCTION_LINES = 60
MAX_NESTING = 4
MAX_LINE_WIDTH = 110
MAX_FLAGS = 72
MAX_EDIT_MARKERS = 6
MAX_CONFIG_LINES = 30
MIN_COMMENT_FRAC, MAX_COMMENT_FRAC = 0.15, 0.30

THIRD_PARTY = {"torch", "transformers", "datasets", "yaml", "tqdm"}
SCRIPTS = scripts_beside(REPO / "train_llm.py")  # those that git tracks: no user's copy beside them
CONFIGS = sorted((REPO / "configs").glob("**/*.yaml"))
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda path: str(path.relative_to(REPO)))


@functools.cache
def repo_files():
    """Every file that is tracked; what a user puts beside them is his."""
    listed = subprocess.run(
        ["git", "ls-files"],
        cwd=REPO, capture_output=True, text=True, check=True,
    ).stdout.splitlines()
    return [REPO / name for name in sorted(set(listed)) if (REPO / name).is_file()]


@functools.cache
def tree_of(script):
    return ast.parse(script.read_text())


def functions(script):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree_of(script)) if isinstance(node, kinds)]


def comments(script):
    """(line number, text) of every comment, those behind code included."""
    tokens = tokenize.generate_tokens(io.StringIO(script.read_text()).readline)
    return [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]


def is_rule(text):
    return re.fullmatch(r"# -{20,}", text) is not None


def test_there_are_scripts_and_configs():
    # Without this one, an empty list would pass every test below.
    assert REPO / "train_llm.py" in SCRIPTS
    assert REPO / "configs/train_llm/quickstart.yaml" in CONFIGS


# ----------------------------------------------------------------------------------------------------
# 1. Budgets of a script

def line_count(function):
    return function.end_lineno - function.lineno + 1


def nesting(node):
    """How deep for, while, if, with and try stand inside one another below a node; elif is no step deeper."""
    control = (ast.For, ast.AsyncFor, ast.While, ast.If, ast.With, ast.AsyncWith, ast.Try, ast.Match)
    deepest = 0
    for child in ast.iter_child_nodes(node):
        # An elif is an if that begins in the column of the if it belongs to; under an else it is indented.
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse \
            and child.col_offset == node.col_offset
        step = isinstance(child, control) and not is_elif
        deepest = max(deepest, nesting(child) + step)
    return deepest


@each_script
def test_script_length(script):
    assert len(script.read_text().splitlines()) <= LONGER_SCRIPTS.get(script.name, MAX_SCRIPT_LINES)


def test_tool_lengths():
    tools = [path for path in repo_files() if path.parent == REPO / "tools" and path.suffix == ".py"]
    lengths = {path.name: len(path.read_text().splitlines()) for path in tools}
    assert tools and not {name: length for name, length in lengths.items() if length > MAX_TOOL_LINES}


@each_script
def test_function_lengths(script):
    lengths = {function.name: line_count(function) for function in functions(script)}
    limits = {name: MAX_MAIN_LINES[script.name] if name == "main" else MAX_FUNCTION_LINES for name in lengths}
    assert not {name: length for name, length in lengths.items() if length > limits[name]}


@each_script
def test_nesting(script):
    depths = {function.name: nesting(function) for function in functions(script)}
    assert not {name: depth for name, depth in depths.items() if depth > MAX_NESTING}


def test_nesting_is_counted_as_meant():
    def depth(source):
        return nesting(ast.parse(source))

    assert depth("x = 1") == 0
    assert depth("if a:\n pass\nelif b:\n pass\nelif c:\n pass\nelse:\n pass") == 1
    assert depth("if a:\n pass\nelse:\n  if b:\n   pass") == 2
    assert depth("for a in b:\n  with c:\n   try:\n    while d:\n     pass\n   finally:\n    pass") == 4
    assert depth("try:\n pass\nexcept E:\n if a:\n  pass") == 2


@each_script
def test_number_of_flags(script):
    calls = [node.func for node in ast.walk(tree_of(script)) if isinstance(node, ast.Call)]
    added = [func for func in calls if isinstance(func, ast.Attribute) and func.attr == "add_argument"]
    # The help, too, because a loop over a table adds many by one call.
    assert len(added) <= MAX_FLAGS and len(option_lines(script)) <= MAX_FLAGS


@each_script
def test_share_of_comments(script):
    tokens = tokenize.generate_tokens(io.StringIO(script.read_text()).readline)
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
             tokenize.ENDMARKER)
    code_lines = set()
    for token in tokens:
        if token.type not in empty:
            code_lines |= set(range(token.start[0], token.end[0] + 1))
    docstring_lines = set()
    for node in ast.walk(tree_of(script)):
        holds_docstring = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if holds_docstring and ast.get_docstring(node) is not None:
            docstring_lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    # Rules and fences are layout and say nothing; a docstring is what other files would say in a comment.
    said = [text for _, text in comments(script) if not is_rule(text) and not re.match(r"# (>>>|<<<) ", text)]
    share = (len(said) + len(docstring_lines)) / len(code_lines - docstring_lines)
    assert MIN_COMMENT_FRAC <= share <= MAX_COMMENT_FRAC


@each_script
def test_edit_markers(script):
    assert sum("EDIT:" in text for _, text in comments(script)) <= MAX_EDIT_MARKERS


def test_line_width():
    long = []
    for path in repo_files():
        if path.suffix in {".py", ".sh", ".sbatch"} or path == REPO / ".ci/run":
            lines = path.read_text().splitlines()
            long += [f"{path.relative_to(REPO)}:{number}" for number, line in enumerate(lines, 1)
                     if len(line) > MAX_LINE_WIDTH]
    assert not long


# ----------------------------------------------------------------------------------------------------
# 2. Rules of a script

def imported_names(nodes):
    """The top-level packages that import statements among the nodes name; '.' for a relative import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else node.module.split(".")[0])
    return names


@each_script
def test_imports(script):
    """The copy law: a script that is copied alone into an empty folder runs."""
    tree = tree_of(script)
    inside = {id(node) for function in functions(script) for node in ast.walk(function)}
    at_module_level = imported_names(node for node in ast.walk(tree) if id(node) not in inside)
    assert at_module_level <= THIRD_PARTY | set(sys.stdlib_module_names)
    project = {path.stem for path in SCRIPTS} | {path.name for path in REPO.iterdir() if path.is_dir()}
    assert not imported_names(ast.walk(tree)) & ({".", "helpers"} | project - THIRD_PARTY)


@each_script
def test_no_state_that_hides(script):
    nodes = ast.walk(tree_of(script))
    assert not [node.lineno for node in nodes if isinstance(node, (ast.Global, ast.Nonlocal))]


@each_script
def test_no_bare_except(script):
    handlers = [node for node in ast.walk(tree_of(script)) if isinstance(node, ast.ExceptHandler)]
    assert not [handler.lineno for handler in handlers if handler.type is None]


@each_script
def test_nothing_is_left_to_do(script):
    assert not [line for line, text in comments(script) if re.search(r"\b(TODO|FIXME|XXX)\b", text)]


@each_script
def test_sections(script):
    lines = script.read_text().splitlines()
    numbered = [(index, re.match(r"# (\d+)\. [A-Z]", line)) for index, line in enumerate(lines)]
    sections = [(index, int(match[1])) for index, match in numbered if match]
    assert sections and [number for _, number in sections] == list(range(1, len(sections) + 1))
    assert not [lines[index] for index, _ in sections if not is_rule(lines[index - 1])]


@each_script
def test_main_comes_last(script):
    """Execution order, and no program at module level, so that a test can import the script."""
    body = tree_of(script).body
    assert isinstance(body[-2], ast.FunctionDef) and body[-2].name == "main"
    assert isinstance(body[-1], ast.If) and ast.unparse(body[-1].test) == "__name__ == '__main__'"
    assert not [node.lineno for node in body if isinstance(node, (ast.For, ast.While, ast.With))]


# ----------------------------------------------------------------------------------------------------
# 3. Configs

@each_config
def test_config_is_read_by_its_script(config, monkeypatch):
    monkeypatch.chdir(REPO)
    relative = config.relative_to(REPO)
    assert len(relative.parts) == 3, "a config stands in configs/<script>/"
    script = importlib.import_module(relative.parts[1])
    script.parse_args(["--config", str(relative)])


@each_config
def test_config_form(config):
    text = config.read_text()
    assert text.startswith("# ") and len(text.splitlines()) <= MAX_CONFIG_LINES
    values = yaml.safe_load(text)
    flat = (str, int, float, bool, type(None))
    for value in values.values():
        items = value if isinstance(value, list) else [value]
        assert all(isinstance(item, flat) for item in items), "one level of keys and values"


# ----------------------------------------------------------------------------------------------------
# 4. README: every path and every flag that it names exists

SCRIPT_SUFFIXES = (".py", ".sh", ".sbatch")
# What runs write; a README may say what is in there.
WRITTEN = ("runs", "checkpoints", "data_cache", "outputs", "wandb", ".venv", ".venv-test")


@functools.cache
def option_lines(program):
    """The lines of a Python program's --help that introduce an option, in front of what is said about it."""
    shown = subprocess.run([sys.executable, str(program), "--help"], cwd=REPO, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr[-3000:]
    lines = re.findall(r"^ {1,4}(-.*?)(?:  .*)?$", shown.stdout, re.MULTILINE)
    return [line for line in lines if not line.startswith("-h")]


@functools.cache
def flags_of(program):
    """The flags that a program of this repository takes; of a shell script those that its text names."""
    text = "\n".join(option_lines(program)) + " --help" if program.suffix == ".py" else program.read_text()
    return set(re.findall(r"--[a-z][\w-]*", text))


def readme_lines():
    """What the README sets as code: command lines (continued ones joined) and spans between backticks."""
    text = (REPO / "README.md").read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [line for block in blocks for line in block.splitlines()] + spans


def words_of(line):
    return [word.strip("\"'(),;:") for word in line.split()]


def should_exist(word):
    """Whether a word of the README looks like a file or folder of this repository."""
    path = word.removeprefix("./")
    if not re.fullmatch(r"[\w.*-]+(/[\w.*-]+)*/?", path) or path.startswith(WRITTEN):
        return False
    if "/" in path:
        return (REPO / path.split("/")[0]).is_dir() or path.endswith(SCRIPT_SUFFIXES)
    # A single name that ends in .yaml or .jsonl is mostly one of a run's own files.
    return path.endswith((*SCRIPT_SUFFIXES, ".md")) or path in ("requirements.txt", "LICENSE")


def test_readme_paths_exist():
    words = [word for line in readme_lines() for word in words_of(line)]
    # A single name may also be said next to the folder that it stands in.
    names = {path.name for path in repo_files()}
    exists = {word: word in names or any(REPO.glob(word.removeprefix("./"))) for word in words
              if should_exist(word)}
    assert exists, "no path was recognised in the README"
    assert not [word for word in exists if not exists[word]]
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", (REPO / "README.md").read_text())
    assert not [link for link in links if not (REPO / link).exists()]


def unknown_flags(line, everyones):
    """The flags of one command line or span that no program of this repository has.

    In front of the first script they belong to torchrun, sbatch or whatever runs it; behind it they are that
    script's. A line with no script is another program's command unless it begins with the flag.
    """
    owner, unknown = everyones if line.lstrip().startswith("-") else None, []
    for word in words_of(line):
        flag = word.split("=")[0]
        program = REPO / word.removeprefix("./")
        if word.endswith(SCRIPT_SUFFIXES) and program.is_file() and not program.name.startswith("test_"):
            # A launcher passes on what it does not know itself, and so do these tools.
            passes_on = program.suffix != ".py" or program.name in (
                "show_batch.py", "deploy.py", "verify_resume.py")
            owner = everyones if passes_on else flags_of(program)
        elif re.fullmatch(r"--[a-z][\w-]*", flag) and owner is not None and flag not in owner:
            unknown.append(f"{flag} in: {line.strip()}")
    return unknown


def test_readme_flags_exist():
    programs = [path for path in repo_files() if path.suffix in SCRIPT_SUFFIXES and path.parts[-2] != "tests"]
    programs += [REPO / "tests/run.sh"]
    everyones = set().union(*map(flags_of, programs))
    assert not [flag for line in readme_lines() for flag in unknown_flags(line, everyones)]


def test_unknown_flags_are_found_where_they_should_be():
    known = {"--config", "--all"}
    assert unknown_flags("--confg x", known) and not unknown_flags("--config x --all", known)
    assert not unknown_flags("pip install --upgrade torch", known)
    assert not unknown_flags("sbatch --nodes 2 tests/run.sh --config x", known)
    assert unknown_flags("FOO=1 ./launch_single_node.sh --config x --nope=3", known)


# ----------------------------------------------------------------------------------------------------
# 5. Every file

def test_no_file_names_a_machine_or_a_registry():
    # In pieces, or this file would be the first one found.
    folders = ["/wo" + "rk/", "/ro" + "ot/"]
    hosts = ["pypi" + ".org", "python" + "hosted", "npm" + "js.", "deb.deb" + "ian"]
    found = []
    for path in repo_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # a picture
        found += [f"{path.relative_to(REPO)}: {name}" for name in folders + hosts if name in text]
    assert not found
