"""Run experiments/train_sharding.py several times in one process: python tests/sharding_runs.py RUNS.json

RUNS.json is a list of argument lists. Starting Python and torch takes longer than such a small run.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))
import train_sharding  # noqa: E402  (the path comes first)

if __name__ == "__main__":
    for argv in json.loads(Path(sys.argv[1]).read_text()):
        train_sharding.main(argv)
