"""What every test shares: import paths, no network, and GPU tests only where there is a GPU."""

import os
import sys

import pytest
from helpers import REPO

# Scripts stand at the top level and in examples/ and are imported by name, just as a reader runs them.
sys.path[:0] = [str(REPO), str(REPO / "examples")]

# Also for a pytest that was not started by run.sh. Before transformers is imported, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


# Fixtures that start real servers or several machines: what uses them is no part of the core suite.
SERVERS = {"cluster", "machines", "box"}
# Files that take minutes, the longest first, so that two workers end at about the same time.
LONG = ["vllm", "verify_resume", "real_model", "embedding", "kill", "experiments", "doctor", "survival",
        "slurm", "grpo_runs", "lora", "family_kinds", "multi_node", "word_problems", "export", "deploy",
        "reference", "on_gpu", "loading"]


def pytest_collection_modifyitems(items):
    places = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))
    for item in items:
        if SERVERS & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch  # here, because most single test files need none of it

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
