"""How much GPU memory a model that is trained from scratch needs, by size and number of GPUs.

    python tools/plan_memory.py
    python tools/plan_memory.py my_copy.py --detail 7B       # the sizes of another script

Counted for each GPU, in GiB, from the shapes of the real model on the meta device:
  states       fp32 master, gradient and two Adam moments: 16 bytes a parameter, sharded over the GPUs
  gathered     bf16 weights of two blocks (one computes, one is prefetched) and of the root
  reduced      one block's gradient in bf16 and as the fp32 input of its reduce-scatter
  head         gradient of the output head in fp32 and bf16, logits of a chunk in fp32 (three copies)
  activations  --activation-checkpointing full: each block's bf16 input, and one block's inner activations
Not counted: CUDA's context, NCCL's buffers and fragmentation: leave 10 % and 2 GiB.
"""

import argparse
import sys
from dataclasses import replace
from types import ModuleType

from user_script import take_script

GIB = 2**30


def count_parameters(script: ModuleType, size: str, vocab_size: int = 32000) -> tuple[int, int, int]:
    """(all, in one block, in the root: embeddings and the last norm)."""
    import torch
    with torch.device("meta"):
        model = script.CausalLM(replace(script.MODEL_SIZES[size], vocab_size=vocab_size))
    total = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    return total, block, total - block * len(model.model.layers)


def memory_gib(script: ModuleType, size: str, num_gpus: int, tokens: int, vocab_size: int, chunk: int
               ) -> dict[str, float]:
    """GiB a GPU with `tokens` in a micro-batch, by the parts that this file's docstring names."""
    c = script.MODEL_SIZES[size]
    total, block, root = count_parameters(script, size, vocab_size)
    # bf16 values a token inside a block: norms, queries, keys, values, attention output, the MLP's products.
    inner = 6 * c.hidden_size + 2 * c.num_kv_heads * c.head_size + 4 * c.ffn_size
    parts = {
        "states": 16 * total / num_gpus,
        # One GPU frees nothing, because it would have nothing to gather.
        "gathered": 2 * (total if num_gpus == 1 else 2 * block + root),
        "reduced": 6 * block,
        "head": 6 * vocab_size * c.hidden_size + 12 * min(chunk, tokens) * vocab_size,
        "activations": 2 * tokens * (c.num_layers * c.hidden_size + inner),
    }
    return {name: nbytes / GIB for name, nbytes in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [SCRIPT.py] [flags]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--batch-size", type=int, default=1, help="sequences per GPU and micro-batch")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--loss-chunk-tokens", type=int, default=8192)
    parser.add_argument("--detail", metavar="SIZE", help="the parts of one size, in place of the table")
    if {"-h", "--help"} & set(sys.argv):
        parser.parse_args(["--help"])
    script, rest = take_script(sys.argv[1:], ("MODEL_SIZES", "CausalLM"))
    args = parser.parse_args(rest)
    shape = (args.batch_size * args.seq_len, args.vocab_size, args.loss_chunk_tokens)
    if args.detail and args.detail not in script.MODEL_SIZES:
        parser.error(f"--detail {args.detail}: one of {', '.join(script.MODEL_SIZES)}")
    rows = ["states", "gathered", "reduced", "head", "activations"] if args.detail else [
        size for size in script.MODEL_SIZES if size[0].isdigit()]
    print(f"| {args.detail or 'model'} | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in args.gpus) + " |")
    print("|---|" + "---:|" * len(args.gpus))
    for row in rows:
        parts = [memory_gib(script, args.detail or row, n, *shape) for n in args.gpus]
        values = [p[row] if args.detail else sum(p.values()) for p in parts]
        print(f"| {row} | " + " | ".join(f"{v:,.1f}" for v in values) + " |")


if __name__ == "__main__":
    main()
