"""Make pairs for an embedding model from Python's own standard library: a docstring, and its function.

    python tools/make_docstring_pairs.py runs/docstrings    # a few seconds; train.jsonl and test.jsonl
    python examples/train_embedding_fsdp2.py --model runs/minilm --dataset runs/docstrings --eval-split test

`query` is the first paragraph of a docstring, in one line, `positive` the source of its function without the
docstring. Whole modules are held out, chosen by a hash of their name, so that no test pair has a sibling in
training; modules that hold over 2 % of all pairs always train, or one of them would be most of the test.
"""

import argparse
import ast
import json
import os
import sysconfig
import textwrap
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
MIN_WORDS = 5  # of a docstring that says something
HELD_OUT = 0.25  # of the modules
MAX_SHARE = 0.02  # of all pairs, for a module that may be held out


def stdlib_files(root: Path) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def pairs_of(source: str) -> Iterator[tuple[str, str]]:
    """(first paragraph of the docstring, source without the docstring) of each function that has one."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or len(node.body) < 2:
            continue
        query = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        if len(query.split()) < MIN_WORDS:
            continue
        docstring, end = node.body[0], node.end_lineno
        kept = lines[node.lineno - 1:docstring.lineno - 1] + lines[docstring.end_lineno:end]
        yield query, textwrap.dedent("\n".join(kept)).strip()


def make_rows(root: Path) -> dict[str, list[dict]]:
    """{"train": rows, "test": rows}; a docstring or a source that stands there twice is taken once."""
    rows, seen = [], set()
    for path in stdlib_files(root):
        try:
            pairs = list(pairs_of(path.read_text(encoding="utf-8")))
        except (SyntaxError, ValueError):  # templates of lib2to3 and the like
            continue
        module = path.relative_to(root).parts[0].removesuffix(".py")
        for query, positive in pairs:
            if positive and query not in seen and positive not in seen:
                rows.append({"query": query, "positive": positive, "module": module})
                seen |= {query, positive}
    counts = Counter(row["module"] for row in rows)
    tested = {module for module, count in counts.items() if count <= MAX_SHARE * len(rows)
              and zlib.crc32(module.encode()) < HELD_OUT * 2**32}
    return {"train": [row for row in rows if row["module"] not in tested],
            "test": [row for row in rows if row["module"] in tested]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    splits = make_rows(Path(sysconfig.get_paths()["stdlib"]))
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        (args.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"wrote {len(splits['train']):,} training pairs and {len(splits['test']):,} test pairs of "
          f"{len({row['module'] for row in splits['test']})} other modules to {args.folder}")


if __name__ == "__main__":
    main()
