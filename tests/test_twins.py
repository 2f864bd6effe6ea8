"""The blocks that scripts share are the same to the byte, and tools/copy_twins.py keeps them so."""

import subprocess
import sys

import pytest
from helpers import REPO

sys.path.insert(0, str(REPO / "tools"))
import copy_twins  # noqa: E402  (the path comes first)

TOOL = REPO / "tools/copy_twins.py"
SCRIPTS = copy_twins.scripts_beside(REPO / "train_llm.py")  # no user's copy beside them
MAX_BLOCK_LINES = 80
MAX_SHARED_LINES = 1253  # of all blocks of a script, with their fences


def block(name, *lines):
    return "\n".join([f"# >>> shared: {name}", *lines, f"# <<< shared: {name}"])


def text_of(*parts):
    return "\n\n\n".join(parts) + "\n"


# ----------------------------------------------------------------------------------------------------
# 1. The scripts

def twin_problems(scripts):
    """What is wrong with the blocks of {name of a script: its text}: one line each."""
    problems, copies = [], {}
    for script, text in scripts.items():
        try:
            found = copy_twins.find_blocks(text)
        except ValueError as error:
            problems.append(f"{script}: {error}")
            continue
        lines = text.split("\n")
        for name, (start, stop) in found.items():
            copies.setdefault(name, {})[script] = lines[start:stop]
            if not any(line.strip() for line in lines[start:stop]):
                problems.append(f"{script}: block {name} is empty")
            if stop - start > MAX_BLOCK_LINES:
                problems.append(f"{script}: block {name} has {stop - start} lines")
    for name, (first, *others) in ((name, list(found)) for name, found in copies.items()):
        if not others and len(scripts) > 1:
            problems.append(f"{first}: no other script has block {name}")
        problems += [f"{other}: block {name} differs from {first}'s" for other in others
                     if copies[name][other] != copies[name][first]]
    return problems


def test_lines_of_all_blocks():
    blocks = copy_twins.find_blocks((REPO / "train_llm.py").read_text())
    assert sum(stop - start + 2 for start, stop in blocks.values()) <= MAX_SHARED_LINES


def test_twins_of_the_scripts():
    scripts = {path.name: path.read_text() for path in SCRIPTS}
    assert copy_twins.find_blocks(scripts["train_llm.py"]), "no block is found at all"
    assert not twin_problems(scripts)


def test_fences_stand_between_functions():
    """A block is whole: it can be read, and compiled, by itself."""
    for path in SCRIPTS:
        lines = path.read_text().split("\n")
        for name, (start, stop) in copy_twins.find_blocks("\n".join(lines)).items():
            compile("\n".join(lines[start:stop]), f"{path.name}: {name}", "exec")
            assert lines[start].strip() and lines[stop - 1].strip(), f"{path.name}: {name}: blank at an edge"


# ----------------------------------------------------------------------------------------------------
# 2. What the check finds

def test_good_twins():
    one = text_of("import os", block("a", "x = 1"), "# its own", block("b", "y = 2"))
    other = text_of(block("b", "y = 2"), "z = 3", block("a", "x = 1"))
    assert not twin_problems({"one.py": one, "other.py": other})
    assert not twin_problems({"one.py": one}), "a single script has no twin yet"


@pytest.mark.parametrize("line", ["x = 2", "x = 1  # why", "x = 1 ", "x  = 1"])
def test_a_difference(line):
    problems = twin_problems({"one.py": block("a", "x = 1"), "other.py": block("a", line)})
    assert problems == ["other.py: block a differs from one.py's"]


def test_a_difference_in_the_third():
    same, other = block("a", "x = 1"), block("a", "x = 1", "")
    assert twin_problems({"1.py": same, "2.py": same, "3.py": other}) == ["3.py: block a differs from 1.py's"]


def test_a_block_that_stands_alone():
    problems = twin_problems({"one.py": text_of(block("a", "x = 1"), block("b", "y = 1")),
                              "other.py": block("a", "x = 1")})
    assert problems == ["one.py: no other script has block b"]


def test_sizes():
    assert twin_problems({"one.py": block("a", *["x = 1"] * 81)}) == ["one.py: block a has 81 lines"]
    assert not twin_problems({"one.py": block("a", *["x = 1"] * 80)})
    assert twin_problems({"one.py": block("a", "")}) == ["one.py: block a is empty"]


@pytest.mark.parametrize("text, message", [
    ("# >>> shared: a\nx = 1\n", "block a, opened in line 1, is never closed"),
    ("x = 1\n# <<< shared: a\n", "line 2 closes block a while none is open"),
    (text_of("# >>> shared: a", block("b", "x = 1"), "# <<< shared: a"),
     "line 4 opens block b while a is open"),
    ("# >>> shared: a\nx = 1\n# <<< shared: b\n", "line 3 closes block b while a is open"),
    (text_of(block("a", "x = 1"), block("a", "x = 1")), "line 6 opens block a a second time"),
    ("    # >>> shared: a\n    x = 1\n    # <<< shared: a\n", "line 1 is like a fence, but is none"),
    ("# >>> shared:a\nx = 1\n", "line 1 is like a fence, but is none"),
    ("# >>> shared: a b\nx = 1\n", "line 1 is like a fence, but is none"),
    ("#>>> a\n", "line 1 is like a fence, but is none"),
])
def test_bad_fences(text, message):
    with pytest.raises(ValueError, match=message):
        copy_twins.find_blocks(text)
    assert len(twin_problems({"one.py": text, "other.py": ""})) == 1


# ----------------------------------------------------------------------------------------------------
# 3. The tool

def run_tool(*args, cwd):
    return subprocess.run([sys.executable, str(TOOL), *args], cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path):
    """Three scripts: two.py has an older a, three.py an older b, which is shorter, and an a of its own."""
    (tmp_path / "one.py").write_text(
        text_of("# one", block("a", "x = 1", "", "", "def f():", "    return 1"), block("b", "y = 1  # é")))
    (tmp_path / "two.py").write_text(
        text_of(block("a", "x = 0"), "two = 2", block("b", "y = 1  # é"), "z = 3"))
    (tmp_path / "three.py").write_text(
        text_of(block("b", "y = 0"), "three = 3", block("a", "x = 7"), block("c", "")))
    return tmp_path


def texts(folder):
    return {path.name: path.read_text() for path in sorted(folder.glob("*.py"))}


def test_copy_one_block(folder):
    before = texts(folder)
    result = run_tool("one.py", "b", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["three.py: b (1 lines become 1)", "2 twins compared, 1 copied"]
    assert texts(folder) == before | {"three.py": before["three.py"].replace("y = 0", "y = 1  # é")}


def test_copy_all_and_check(folder):
    before = texts(folder)
    result = run_tool("one.py", "--all", "--check", cwd=folder)
    assert result.returncode == 1 and texts(folder) == before
    for expected in ("--- one.py: a", "+++ two.py: a", "-x = 1", "+x = 0", "+++ three.py: b", "+y = 0"):
        assert expected in result.stdout.splitlines()
    assert result.stdout.splitlines()[-1] == "4 twins compared, 3 differ"

    result = run_tool(str(folder / "one.py"), "--all", cwd=folder.parent)
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "4 twins compared, 3 copied"
    after, whole = texts(folder), block("a", "x = 1", "", "", "def f():", "    return 1")
    assert after["one.py"] == before["one.py"]
    assert after["two.py"] == text_of(whole, "two = 2", block("b", "y = 1  # é"), "z = 3")
    assert after["three.py"] == text_of(block("b", "y = 1  # é"), "three = 3", whole, block("c", ""))

    result = run_tool("two.py", "--all", "--check", cwd=folder)
    assert result.returncode == 0 and result.stdout == "4 twins compared, 0 differ\n"


def test_a_users_copy_is_left_alone(folder):
    """In a git repository only what it tracks counts."""
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", "-C", folder, *command], check=True)
    copy = folder / "my_copy.py"
    copy.write_text(block("a", "mine = True") + "\n")
    source = next(path for path in sorted(folder.glob("*.py")) if "shared: a\n" in path.read_text())
    subprocess.run([sys.executable, TOOL, source, "--all"], check=True)
    assert "mine = True" in copy.read_text()


def test_wrong_use_changes_nothing(folder):
    before = texts(folder)
    for args, message in (
            (["one.py"], "name blocks, or give --all"),
            (["one.py", "a", "--all"], "name blocks, or give --all"),
            (["nine.py", "a"], "nine.py: no such file"),
            (["one.py", "a", "nope"], "one.py has no block nope; it has: a, b")):
        result = run_tool(*args, cwd=folder)
        assert result.returncode == 2 and message in result.stderr.splitlines()[-1]
    assert texts(folder) == before


def test_a_broken_fence_changes_nothing(folder):
    # two.py comes last: three.py, which could be written, must wait for it.
    (folder / "two.py").write_text("# >>> shared: a\nx = 0\n")
    before = texts(folder)
    result = run_tool("one.py", "--all", cwd=folder)
    assert result.returncode == 1
    assert result.stderr == "copy_twins.py: error: two.py: block a, opened in line 1, is never closed\n"
    assert texts(folder) == before
