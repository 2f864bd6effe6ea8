"""Memory while a model is loaded: no rank holds much more than its own share of the weights."""

import json

import pytest
import torch
import transformers
from helpers import run_script

# 251 million parameters: 1.0 GB in fp32.
CONFIG = dict(vocab_size=16000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=17,
              num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=256)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_needs_little_more_than_the_shard(dtype, tmp_path):
    source = tmp_path / "source"
    model = transformers.LlamaForCausalLM._from_config(
        transformers.LlamaConfig(**CONFIG), dtype=getattr(torch, dtype))
    num_params = sum(p.numel() for p in model.parameters())
    model.save_pretrained(source, max_shard_size="200MB")
    del model
    assert num_params > 240e6 and len(list(source.glob("*.safetensors"))) > 2
    run_script([tmp_path, source], nproc=2, script="tests/loading_driver.py", cwd=tmp_path)
    for rank in range(2):
        found = json.loads((tmp_path / f"rank_{rank}.json").read_text())
        # Half of the fp32 weights; the last layer's rows may be split unevenly.
        assert found["shard"] == pytest.approx(4 * num_params / 2, rel=0.01)
        peaks = {name: step["peak"] / found["shard"] for name, step in found["steps"].items()}
        print(f"{dtype} on disk, rank {rank}: {found['shard'] / 2**20:.0f} MiB of weights, peaks over the "
              f"baseline of {found['baseline'] / 2**20:.0f} MiB in shares of that: "
              + ", ".join(f"{name} {peak:.3f}" for name, peak in peaks.items()))
        assert max(peaks.values()) <= 1.15, peaks
        assert peaks["materialise"] > 0.95, "nothing was counted"
