"""Started by test_loading.py with torchrun: how much memory of its own a rank needs while it loads a model.

    torchrun --nproc-per-node 2 loading_driver.py RESULTS_FOLDER MODEL_FOLDER

Counted is anonymous memory (RssAnon): pages of mapped files and of the page cache are the system's.
"""

import json
import re
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed
import torch.distributed.checkpoint  # noqa: F401  what loading imports is part of the baseline
import torch.distributed.fsdp  # noqa: F401
import torch.distributed.tensor  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_llm  # noqa: E402  (the path comes first)


def anonymous_bytes():
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


class Peak:
    """The largest value since the last `take`, sampled by a thread."""

    def __init__(self):
        self.value = anonymous_bytes()
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        while True:
            self.value = max(self.value, anonymous_bytes())
            time.sleep(0.002)

    def take(self):
        value, self.value = max(self.value, anonymous_bytes()), anonymous_bytes()
        return value


def main(results, folder):
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    args = train_llm.parse_args(["--hf-model", str(folder), "--dataset", "none", "--device", "cpu",
                                 "--no-mixed-precision",
                                 "--seq-len", "128", "--loss-chunk-tokens", "32"])
    ranks = train_llm.read_ranks(args)
    mesh = train_llm.init_distributed(args, ranks)
    # The baseline has the model's class and the kernels' threads too, by way of a model of one small layer.
    config = AutoConfig.from_pretrained(folder)
    small = AutoModelForCausalLM.from_config(type(config)(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64))
    small(torch.arange(16)[None])
    del small
    torch.distributed.barrier()
    peak, steps = Peak(), {}
    baseline = peak.take()

    def done(name):
        steps[name] = {"peak": peak.take() - baseline, "after": anonymous_bytes() - baseline}

    model = train_llm.build_model(args, folder, 1)
    train_llm.shard_model(model, args, mesh, torch.float32)
    done("build and shard")
    train_llm.materialise(model, ranks.device, args.cpu_offload)
    done("materialise")
    train_llm.fill_buffers(model)
    done("fill_buffers")
    train_llm.load_hf_weights(model, folder, args.trust_remote_code, ranks)
    done("load_hf_weights")
    train_llm.prove_filled(model)
    done("prove_filled")
    shard = sum(train_llm.local_part(tensor).nbytes for tensor in [*model.parameters(), *model.buffers()])
    found = {"baseline": baseline, "shard": shard, "steps": steps}
    (Path(results) / f"rank_{ranks.rank}.json").write_text(json.dumps(found, indent=1))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
