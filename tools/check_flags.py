"""Says what is wrong with a script's flags and starts nothing. The launchers call it where DRY_RUN=1.

    python tools/check_flags.py SCRIPT.py FLAGS...

It imports the script and calls its parse_args, which exits with 2 and a message of its own. A script without
that function is not checked.
"""

import argparse
import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path


def can_be_imported(script: Path) -> bool:
    """Whether there is a parser to call, and a guard without which an import would run the whole script."""
    text = script.read_text(encoding="utf-8", errors="replace")
    needed = (r"^def parse_args\(", r"^if __name__ ==")
    return all(re.search(line, text, re.MULTILINE) for line in needed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path, help="the script whose flags these are")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="whatever the script would be started with")
    args = parser.parse_args()
    if not can_be_imported(args.script):
        return
    if importlib.util.find_spec("torch") is None:
        print(f"launch: {sys.executable} has no torch, so the flags are not checked", file=sys.stderr)
        return
    # As when Python starts the script itself.
    sys.argv = [str(args.script), *args.flags]
    sys.path[0] = str(args.script.resolve().parent)
    parse_args = importlib.import_module(args.script.stem).parse_args
    if inspect.signature(parse_args).parameters:
        parse_args(args.flags)
    else:
        parse_args()


if __name__ == "__main__":
    main()
