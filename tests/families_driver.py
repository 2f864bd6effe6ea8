"""Started by test_families.py with torchrun: sharded models, one after another, against transformers' own.

    torchrun --nproc-per-node 2 families_driver.py RESULTS.json TEXTS.jsonl FOLDER...

It goes the way of the script's main() as far as the first loss, and writes what it saw of each model.
"""

import contextlib
import io
import json
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_llm  # noqa: E402  (the path comes first)
from model_runs import SEQ_LEN, loss_of, pieces_of  # noqa: E402

FLAGS = ["--device", "cpu", "--no-mixed-precision", "--seq-len", str(SEQ_LEN), "--loss-chunk-tokens", "24",
         "--dataset", "none", "--trust-remote-code"]


def relative(value, expected):
    return abs(value - expected) / abs(expected)


def difference(logits, expected):
    return float((logits - expected).abs().max() / expected.abs().max())


def load(folder, args, mesh, ranks):
    """The sharded model as main() makes it, and what was printed on the way."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        model = train_llm.build_model(args, folder, 1)
        train_llm.shard_model(model, args, mesh, torch.float32)
        train_llm.materialise(model, ranks.device, args.cpu_offload)
        optimizer = train_llm.build_optimizer(model, args)
        train_llm.fill_buffers(model)
        train_llm.load_hf_weights(model, folder, args.trust_remote_code, ranks)
        train_llm.prove_filled(model)
        train_llm.prove_loss(model, ranks)
        train_llm.prove_packing(model, ranks)
    return model, optimizer, said.getvalue()


def packed(pieces):
    """All pieces in one row, positions starting again at each, labels as they are."""
    return {
        "input_ids": torch.cat([ids for ids, _ in pieces], dim=1),
        "labels": torch.cat([labels for _, labels in pieces])[None],
        "position_ids": torch.cat([torch.arange(ids.shape[1]) for ids, _ in pieces])[None],
    }


def look_at(folder, texts, args, mesh, ranks):
    from torch.distributed.fsdp import FSDPModule
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, optimizer, said = load(folder, args, mesh, ranks)
    model.eval()
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    reference.eval()
    pieces = pieces_of(Path(texts), AutoTokenizer.from_pretrained(folder))
    one = torch.cat([ids for ids, _ in pieces], dim=1)[:, :SEQ_LEN]
    next_tokens = torch.cat([one[:, 1:], torch.full((1, 1), -100)], dim=1)
    with torch.no_grad():
        theirs = reference(one, labels=one, use_cache=False)
        logits = model(one)
        one_loss = model(one, labels=next_tokens)[0].item() / (SEQ_LEN - 1)
    pieces = pieces[:6]
    row = packed(pieces)
    expected, count = loss_of(reference, pieces)
    with torch.no_grad():
        apart = torch.cat([reference(ids, use_cache=False).logits for ids, _ in pieces], dim=1)
        together = reference(row["input_ids"], use_cache=False).logits
        in_pack = model(row["input_ids"], position_ids=row["position_ids"])
    loss, _ = model(**row)
    loss.backward()
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found = {
        "said": said, "ties": len(names) - len(list(model.parameters())), "whole_logits": model.whole_logits,
        "num_fsdp_modules": sum(isinstance(module, FSDPModule) for module in model.modules()),
        "num_layers": model.config.num_hidden_layers,
        "logits_error": difference(logits, theirs.logits),
        "loss": theirs.loss.item(), "loss_error": relative(one_loss, theirs.loss.item()),
        "packed_error": relative(loss.item() / count, expected),
        "packed_logits_error": difference(in_pack, apart), "leak": difference(together, apart),
    }
    train_llm.clip_and_step(optimizer, torch.tensor(1.0), torch.tensor(float(count)), 1.0)
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    found["dtypes"] = sorted({str(tensor.dtype) for tensor in [*model.parameters(), *moments]})
    return found


def main(results, texts, *folders):
    args = train_llm.parse_args(["--hf-model", folders[0], *FLAGS])
    ranks = train_llm.read_ranks(args)
    mesh = train_llm.init_distributed(args, ranks)
    found = {}
    for folder in folders:
        args.hf_model = folder
        try:
            found[Path(folder).name] = look_at(Path(folder), texts, args, mesh, ranks)
        except Exception:  # on both ranks alike; the other models have tests of their own
            found[Path(folder).name] = {"error": traceback.format_exc()}
    if ranks.is_main:
        Path(results).write_text(json.dumps(found, indent=1))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
