"""Run by torchrun: gradients of the embedding script for cases of `embedding_models`, saved by rank 0.

    python -m torch.distributed.run --nproc-per-node 2 tests/embedding_driver.py OUT SPEC.json

SPEC is a list of {"name", "model", "case", "flags"}. OUT/NAME.pt holds the mean loss, whole gradients, how
often gradients were reduced, and how far the second forward of a text was from the first.
"""

import json
import sys
from pathlib import Path

import torch
from helpers import REPO

sys.path.insert(0, str(REPO / "examples"))
import embedding_models  # noqa: E402
import train_embedding_fsdp2 as script  # noqa: E402


def run_case(spec, out, mesh, ranks):
    args = embedding_models.case_args(script, spec["model"], spec["case"], *spec.get("flags", []))
    rows = embedding_models.CASES[spec["case"]][0]
    args.batch_size = len(rows) // ranks.world_size
    tokenizer, model = script.load_tokenizer(args), script.build_model(args)
    if args.lora_rank:
        script.add_lora(model, args, args.model, "FEATURE_EXTRACTION", torch.float32)
    script.ready_model(args, model, [], torch.float32, mesh, ranks)
    embedding_models.draw_adapters(model)
    objective = script.read_objective(args)
    mine = rows[ranks.rank * args.batch_size:(ranks.rank + 1) * args.batch_size]
    pairs = [script.to_pair(row, "row", Path(spec["model"])) for row in mine]
    batch = script.make_batch(pairs, tokenizer, args, ranks.device, "pictures" in spec["case"])
    outputs = []
    model.register_forward_hook(lambda _, __, result: outputs.append(result.detach()))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        terms = script.forward_backward(model, batch, objective, args, ranks)
    reductions = sum(event.count for event in profile.key_averages()
                     if event.key == "c10d::_reduce_scatter_base_")
    units = len(script.find_blocks(model))
    count = torch.tensor(float(args.batch_size))
    means, total, _, _ = script.reduce_stats(model, terms, count, 1, torch.zeros(1))
    n = len(batch.parts)
    again = max(((a - b).abs().max().item() for a, b in zip(outputs[:n], outputs[n:])), default=0.0)
    gradients = {name: param.grad.full_tensor() / total for name, param in model.named_parameters()
                 if param.grad is not None}
    if ranks.is_main:
        torch.save({"loss": means[0].item(), "gradients": gradients, "reductions": reductions, "units": units,
                    "again": again, "pooling": args.pooling}, out / f"{spec['name']}.pt")


def main():
    out, specs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    first = script.parse_args(["--model", str(REPO), "--dataset", str(REPO), "--device", "cpu"])
    ranks = script.read_ranks(first)
    mesh = script.init_distributed(first, ranks)
    for spec in specs:
        torch.manual_seed(ranks.rank)
        run_case(spec, out, mesh, ranks)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
