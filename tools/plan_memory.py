"""How much GPU memory a training needs, by number of GPUs.

    python tools/plan_memory.py                                          # every --model-size of train_llm.py
    python tools/plan_memory.py --hf-model FOLDER --gpus 8 16            # fine-tuning this model
    python tools/plan_memory.py --hf-model FOLDER --gpus 1 --lora-rank 16
    python tools/plan_memory.py my_copy.py --detail 7B                   # a size of another script, in parts

Counted for each GPU, in GiB, from the shapes of the real model on the meta device:
  states       fp32 master, gradient and two Adam moments: 16 bytes a parameter, sharded over the GPUs; with
               --lora-rank so much for the adapters' parameters, 2 bytes for the others
  gathered     bf16 weights of two blocks (one computes, one is prefetched) and of the root
  reduced      one block's gradient in bf16 and as the fp32 input of its reduce-scatter
  head         gradient of the output head in fp32 and bf16, logits of a chunk in fp32 (three copies)
  activations  in bf16: inputs of norms and matmuls, attention, products of the MLP. Of one block, and the
               inputs of all (--activation-checkpointing full); what matmuls and attention give, too
               (selective); all of it for every block (none)
Not counted: CUDA's context, NCCL's buffers and fragmentation: leave 10 % and 2 GiB.
"""

import argparse
import sys
from dataclasses import dataclass
from types import ModuleType

from user_script import take_script

GIB = 2**30


@dataclass
class Sizes:
    """Of a model: parameters in all, in its largest block and in the root (embeddings, head, last norm);
    widths of hidden states, queries, keys, and of that part of the MLP which a token passes through."""
    total: int
    block: int
    root: int
    num_layers: int
    hidden: int
    queries: int
    keys: int
    mlp: int
    vocab: int
    linear: int = 0  # inputs and outputs of all linear layers in the blocks: adapters' parameters a rank


def sizes_of(script: ModuleType, name: str, vocab_size: int = 32000) -> Sizes:
    """Of a --model-size of the script."""
    import torch
    c = script.decoder_config(script.MODEL_SIZES[name], vocab_size)
    with torch.device("meta"):
        model = script.CausalLM(c)
    keys = c.num_key_value_heads * c.head_dim
    widths = c.hidden_size, c.hidden_size, keys, c.intermediate_size, c.vocab_size
    return Sizes(*count_parameters(script, model), *widths)


def sizes_of_hf(script: ModuleType, name: str, trust_remote_code: bool) -> Sizes:
    """Of a Hugging Face model; of a mixture's experts a token passes through a few only."""
    import torch
    import transformers
    try:
        with torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # offline, gated, no model: transformers has dozens of types
        sys.exit(f"plan_memory.py: error: --hf-model {name}: {script.first_line(error)}")
    c = config.get_text_config()
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    keys = (getattr(c, "num_key_value_heads", None) or c.num_attention_heads) * head
    mlp = getattr(c, "intermediate_size", None) or getattr(c, "ffn_dim", None) or 4 * c.hidden_size
    if chosen := getattr(c, "num_experts_per_tok", None):
        mlp = chosen * (getattr(c, "moe_intermediate_size", None) or mlp)
    return Sizes(*count_parameters(script, model), c.hidden_size, c.num_attention_heads * head, keys, mlp,
                 c.vocab_size, sum(sum(layer.weight.shape) for block in script.find_blocks(model)
                                   for layer in block.modules() if isinstance(layer, torch.nn.Linear)))


def count_parameters(script: ModuleType, model) -> tuple[int, int, int, int]:
    """(all, in the largest block, in the root, number of blocks)."""
    blocks = [sum(p.numel() for p in block.parameters()) for block in script.find_blocks(model)]
    total = sum(p.numel() for p in model.parameters())
    return total, max(blocks), total - sum(blocks), len(blocks)


def memory_gib(s: Sizes, num_gpus: int, tokens: int, chunk: int | None, recompute: str, lora_rank: int = 0
               ) -> dict[str, float]:
    """GiB a GPU with `tokens` in a micro-batch, by the parts that this file's docstring names."""
    rows = min(tokens, chunk or max(512, 2**28 // s.vocab // 512 * 512))  # of logits, see `rows_at_once`
    inner = 4 * s.hidden + 2 * s.queries + 2 * s.keys + 4 * s.mlp  # bf16 values a token inside a block
    results = 3 * s.hidden + 2 * s.queries + 2 * s.keys + 2 * s.mlp  # of matmuls and attention, and the input
    kept = {"full": s.num_layers * s.hidden + inner, "selective": s.num_layers * results + inner,
            "none": s.num_layers * inner}
    parts = {
        "states": (2 * s.total + 16 * lora_rank * s.linear if lora_rank else 16 * s.total) / num_gpus,
        # One GPU frees nothing but frozen weights, because it would have nothing to gather.
        "gathered": 2 * (s.total if num_gpus == 1 and not lora_rank else 2 * s.block + s.root),
        "reduced": 6 * (lora_rank * s.linear / s.num_layers if lora_rank else s.block),
        "head": 6 * s.vocab * s.hidden * (not lora_rank) + 12 * rows * s.vocab,
        "activations": 2 * tokens * kept[recompute],
    }
    return {name: nbytes / GIB for name, nbytes in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [SCRIPT.py] [flags]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gpus", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="numbers of GPUs")
    add("--hf-model", metavar="NAME_OR_FOLDER", help="this model, in place of the script's sizes; "
        "config.json is enough")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add("--batch-size", type=int, default=4, help="sequences per GPU and micro-batch (default: 4)")
    add("--seq-len", type=int, default=2048, help="tokens of a sequence (default: 2048)")
    add("--activation-checkpointing", choices=["full", "selective", "none"], default="none",
        help="as train_llm.py's (default: none)")
    add("--lora-rank", type=int, default=0, metavar="R", help="adapters for --hf-model")
    add("--vocab-size", type=int, default=32000, help="of the script's sizes")
    add("--loss-chunk-tokens", type=int, help="if not given: as the script chooses on a GPU")
    add("--detail", metavar="SIZE", help="the parts of one size, in place of the table")
    if {"-h", "--help"} & set(sys.argv):
        parser.parse_args(["--help"])
    script, rest = take_script(
        sys.argv[1:], ("MODEL_SIZES", "decoder_config", "CausalLM", "find_blocks", "first_line"))
    args = parser.parse_args(rest)
    if args.detail and args.detail not in script.MODEL_SIZES:
        parser.error(f"--detail {args.detail}: one of {', '.join(script.MODEL_SIZES)}")
    if args.lora_rank and not args.hf_model:
        parser.error("--lora-rank needs --hf-model")
    names = [args.detail] if args.detail else [name for name in script.MODEL_SIZES if name[0].isdigit()]
    if args.hf_model:
        models = {args.hf_model: sizes_of_hf(script, args.hf_model, args.trust_remote_code)}
    else:
        models = {name: sizes_of(script, name, args.vocab_size) for name in names}
    shape = (args.batch_size * args.seq_len, args.loss_chunk_tokens, args.activation_checkpointing,
             args.lora_rank)
    rows = {name: [sum(memory_gib(sizes, n, *shape).values()) for n in args.gpus]
            for name, sizes in models.items()}
    print(f"{args.batch_size} x {args.seq_len} tokens a GPU and micro-batch, --activation-checkpointing "
          f"{args.activation_checkpointing}")
    if len(models) == 1:  # its parts, and their sum
        [(name, sizes)] = models.items()
        print(f"{name}: {sizes.total:,} parameters")
        parts = [memory_gib(sizes, n, *shape) for n in args.gpus]
        rows = {part: [found[part] for found in parts] for part in parts[0]} | {"together": rows[name]}
    print("\n| GiB a GPU | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in args.gpus) + " |")
    print("|---|" + "---:|" * len(args.gpus))
    for row, values in rows.items():
        print(f"| {row} | " + " | ".join(f"{value:,.1f}" for value in values) + " |")


if __name__ == "__main__":
    main()
