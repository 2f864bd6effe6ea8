"""Copy blocks that scripts share from one script into the others.

    python tools/copy_twins.py train_llm.py watch signals    # these blocks, into every script that has them
    python tools/copy_twins.py train_llm.py --all            # every block
    python tools/copy_twins.py train_llm.py --all --check    # writes nothing, shows differences, exit code 1

A block stands between `# >>> shared: NAME` and `# <<< shared: NAME` and is the same in each script that has
it. The scripts are the Python files in the folder of the named one and in examples/, in a git repository
those that it tracks: nobody's own copy is changed. Change a block where you like, run this.
"""

import argparse
import difflib
import re
import shutil
import subprocess
import sys
from pathlib import Path

FENCE = re.compile(r"# (>>>|<<<) shared: ([a-z0-9-]+)")


def find_blocks(text: str) -> dict[str, tuple[int, int]]:
    """{name: (index of its first line, index behind its last)}, without the fences. Raises ValueError."""
    blocks, opened = {}, None
    for index, line in enumerate(text.split("\n")):
        fence = FENCE.fullmatch(line)
        if fence is None:
            if re.match(r"\s*#\s*(>>>|<<<)", line):
                raise ValueError(f"line {index + 1} is like a fence, but is none: {line.strip()}")
            continue
        kind, name = fence.groups()
        if kind == ">>>" and opened:
            raise ValueError(f"line {index + 1} opens block {name} while {opened} is open")
        if kind == ">>>" and name in blocks:
            raise ValueError(f"line {index + 1} opens block {name} a second time")
        if kind == "<<<" and opened != name:
            raise ValueError(f"line {index + 1} closes block {name} while {opened or 'none'} is open")
        if kind == ">>>":
            opened, start = name, index + 1
        else:
            blocks[name], opened = (start, index), None
    if opened:
        raise ValueError(f"block {opened}, opened in line {start}, is never closed")
    return blocks


def lines_of(path: Path) -> tuple[list[str], dict[str, tuple[int, int]]]:
    text = path.read_text()
    try:
        return text.split("\n"), find_blocks(text)
    except ValueError as error:
        sys.exit(f"copy_twins.py: error: {path}: {error}")


def scripts_beside(script: Path) -> list[Path]:
    """The Python files in its folder, which may be examples/, and in examples/ beside it. In a git repository
    those that it tracks: a user's own copy is left alone."""
    folder = script.parent.parent if script.resolve().parent.name == "examples" else script.parent
    git = ["git", "-C", str(folder), "ls-files", "--", "*.py"]
    listed = subprocess.run(git, capture_output=True, text=True, check=False) if shutil.which("git") else None
    names = [name for name in listed.stdout.splitlines() if name.removeprefix("examples/").count("/") == 0
             ] if listed else []
    tracked = [folder / name for name in names if (folder / name).is_file()]
    return tracked or sorted([*folder.glob("*.py"), *folder.glob("examples/*.py")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("script", type=Path, help="the script whose blocks are right")
    parser.add_argument("names", nargs="*", metavar="BLOCK")
    parser.add_argument("--all", action="store_true", help="every block of the script")
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    if not args.script.is_file():
        parser.error(f"{args.script}: no such file")
    if args.all == bool(args.names):
        parser.error("name blocks, or give --all")
    source, blocks = lines_of(args.script)
    if unknown := [name for name in args.names if name not in blocks]:
        parser.error(f"{args.script} has no block {unknown[0]}; it has: {', '.join(blocks) or 'none'}")
    others = [path for path in scripts_beside(args.script) if not path.samefile(args.script)]
    found = differ = 0
    # All are read before the first is written: a broken fence in one of them stops this early.
    for path, (lines, twins) in [(path, lines_of(path)) for path in others]:
        names = [name for name in twins if name in (blocks if args.all else args.names)]
        for name in reversed(names):  # from the end, so that the places of the blocks before stay true
            place, wanted, found = slice(*twins[name]), source[slice(*blocks[name])], found + 1
            own = lines[place]
            if own == wanted:
                continue
            differ += 1
            if args.check:
                print(*difflib.unified_diff(wanted, own, f"{args.script.name}: {name}",
                                            f"{path.name}: {name}", lineterm=""), sep="\n")
            else:
                print(f"{path.name}: {name} ({len(own)} lines become {len(wanted)})")
                lines[place] = wanted
                path.write_text("\n".join(lines))
    print(f"{found} twins compared, {differ} {'differ' if args.check else 'copied'}")
    sys.exit(1 if args.check and differ else 0)


if __name__ == "__main__":
    main()
