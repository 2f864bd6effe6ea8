"""Run experiments/train_sharding.py several times in one process: python tests/sharding_runs.py RUNS.json

RUNS.json is a list of argument lists. Starting Python and torch takes longer than such a small run. All runs
share one process group, which gives up after a minute: a hang must not outlast its test.
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))
import train_sharding  # noqa: E402  (the path comes first; it sets variables that torch reads)
import torch.distributed as dist  # noqa: E402, I001

if __name__ == "__main__":
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(minutes=1))
    for argv in json.loads(Path(sys.argv[1]).read_text()):
        train_sharding.main(argv)
