"""Started by test_family_kinds.py: imports torch, transformers and both scripts once, forks for each request.

A request is a line of JSON on stdin, the answer, an exit code, a line on stdout. {"script": "train_llm",
"argv": [...]} runs that script's command to its end; {"call": "bf16_step", "argv": [...]} calls a function of
this file. What the child writes goes to the files "stdout" and "stderr" of the request's folder "cwd".
"""

import importlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_llm  # noqa: E402  (the path comes first)
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402, F401  (here, so that no fork does)


def bf16_step(argv):
    """One step that computes in bf16, whatever the processor has; prints what it saw as JSON.

    "computed" holds the dtype of every parameter and buffer when its module's forward ends."""
    args = train_llm.parse_args([*argv, "--dataset", "none", "--device", "cpu"])
    ranks = train_llm.read_ranks(args)
    mesh = train_llm.init_distributed(args, ranks)
    folder, dtype = Path(args.hf_model), torch.bfloat16
    model = train_llm.build_model(args, folder, 1)
    train_llm.shard_model(model, args, mesh, dtype)
    train_llm.materialise(model, ranks.device, args.cpu_offload)
    optimizer = train_llm.build_optimizer(model, args)
    train_llm.fill_buffers(model)
    train_llm.load_hf_weights(model, folder, args.trust_remote_code, ranks)
    train_llm.prove_filled(model)
    train_llm.prove_loss(model, ranks)
    if args.packing:
        train_llm.prove_packing(model, ranks)

    computed, names = {}, {id(module): name for name, module in model.named_modules()}

    def note(module, *_):
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and id(module) in names:
                computed[f"{names[id(module)]}.{leaf}"] = str(tensor.dtype)

    # Before FSDP's own hooks, which give the gathered parameters back.
    handle = torch.nn.modules.module.register_module_forward_hook(note)
    batch = torch.load("batch.pt")
    loss, _ = model(**batch)
    handle.remove()
    loss.backward()
    count = (batch["labels"] != -100).sum()
    grads = [param.grad for param in model.parameters() if param.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads).full_tensor()
    train_llm.clip_and_step(optimizer, norm / count, count.float(), 1.0)
    masters = sorted({str(param.dtype) for param in model.parameters()})
    found = {"loss": loss.item() / count.item(), "norm": norm.item() / count.item()}
    print(json.dumps(found | {"computed": computed, "masters": masters}))
    torch.distributed.destroy_process_group()


def serve_child(request):
    os.chdir(request["cwd"])
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.close(0)
    if "call" in request:
        globals()[request["call"]](request["argv"])
        return
    script = importlib.import_module(request["script"])
    sys.argv = [script.__file__, *request["argv"]]
    script.run_and_report(saves_memory="")


def main():
    import train_gsm8k_fsdp2  # noqa: F401  (before the first fork)

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                serve_child(json.loads(line))
                code = 0
            except SystemExit as error:
                code = error.code
            except BaseException:
                sys.excepthook(*sys.exc_info())
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
