"""The shortest honest FSDP2 loop, as PyTorch's own examples write it: what train_llm.py is measured against.

Same model, same tokens in the same order, same initial weights, so that the first loss is the same; whole
logits, F.cross_entropy, AdamW and clip_grad_norm_ as they come. No data preparation, no checkpoints, no
evaluation, no record. The caller says in which precision it computes.

    torchrun --nproc_per_node 2 benchmarks/bare_fsdp2.py --tokens data_cache/pack-KEY.arrow --precision fp32 \
        --model-size quickstart --vocab-size 4096 --seq-len 256 --batch-size 4 --steps 40
"""

import argparse
import sys
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_llm import MODEL_SIZES, CausalLM, decoder_config, epoch_order, init_from_scratch  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--precision", choices=["fp32", "bf16"], required=True)
    parser.add_argument("--model-size", default="quickstart")
    for flag, default in (("--vocab-size", 4096), ("--seq-len", 256), ("--batch-size", 4), ("--steps", 40)):
        parser.add_argument(flag, type=int, default=default)
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    config = decoder_config(MODEL_SIZES[args.model_size], args.vocab_size)
    with torch.device("meta"):
        model = CausalLM(config)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    model.to_empty(device=device)
    init_from_scratch(model, 0, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)

    samples = datasets.Dataset.from_file(str(args.tokens))["ids"]  # of seq_len tokens and one more
    order = epoch_order(len(samples), 0, 0)
    for step in range(args.steps):
        first = (step * world_size + rank) * args.batch_size
        chosen = order[torch.arange(first, first + args.batch_size) % len(samples)].tolist()
        batch = torch.zeros(args.batch_size, args.seq_len + 1, dtype=torch.long)
        for row, i in enumerate(chosen):  # the last one of a batch of documents is shorter
            batch[row, :len(samples[i])] = torch.tensor(samples[i])
        batch = batch.to(device)
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 0 or (rank == 0 and step % 10 == 9):
            print(f"rank {rank} step {step + 1} loss {loss.item():.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
