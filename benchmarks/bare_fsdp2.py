"""The shortest honest FSDP2 loop, as PyTorch's own examples write it: what train_llm.py is measured against.

Same model, same tokens in the same order, same initial weights; whole logits, F.cross_entropy, AdamW and
clip_grad_norm_ as they come. No data preparation, no checkpoints, no evaluation, no record.

    torchrun --nproc_per_node 2 benchmarks/bare_fsdp2.py --tokens data_cache/tokens-KEY \
        --model-size quickstart --vocab-size 4096 --seq-len 256 --batch-size 4 --steps 40
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_llm import MODEL_SIZES, CausalLM  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--model-size", default="quickstart")
    for flag, default in (("--vocab-size", 4096), ("--seq-len", 256), ("--batch-size", 4), ("--steps", 40)):
        parser.add_argument(flag, type=int, default=default)
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    config = replace(MODEL_SIZES[args.model_size], vocab_size=args.vocab_size)
    with torch.device("meta"):
        model = CausalLM(config)
    dtype = torch.bfloat16 if cuda else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    model.to_empty(device=device)
    torch.manual_seed(0)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.02) if param.dim() > 1 else torch.nn.init.ones_(param)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)

    meta = json.loads((args.tokens / "meta.json").read_text())
    size, path = meta["train"]["tokens"], args.tokens / "train/tokens.bin"
    tokens = torch.from_file(str(path), size=size, dtype=torch.uint16)
    num_samples = (len(tokens) - 1) // args.seq_len
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(0))
    for step in range(args.steps):
        first = (step * world_size + rank) * args.batch_size
        rows = [tokens[i * args.seq_len:i * args.seq_len + args.seq_len + 1].long()
                for i in order[torch.arange(first, first + args.batch_size) % num_samples].tolist()]
        batch = torch.stack(rows).to(device)
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and step % 10 == 9:
            print(f"step {step + 1} loss {loss.item():.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
