"""Started by test_real_model.py: the proofs of both scripts, on a model as it is and with faults built in.

    RANK=0 WORLD_SIZE=1 … python tests/faults_driver.py load RESULTS.json DTYPE FOLDER WORK
    RANK=0 WORLD_SIZE=1 … python tests/faults_driver.py faults RESULTS.json DTYPE FOLDER WORK
    RANK=0 WORLD_SIZE=1 … python tests/faults_driver.py push RESULTS.json DTYPE FOLDER PORT

`load` goes through what main() of both scripts proves of a model and of its export, `faults` does so with
faults, too, and both write what each proof found. `push` does that with a vLLM server at PORT that has the
same model.
"""

import contextlib
import functools
import io
import json
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gsm8k_fsdp2 as gsm8k  # noqa: E402  (the path comes first)
import train_llm  # noqa: E402

KERNELS = "kernel_by_mask"


def attempt(script, model, proof, *args):
    """What a proof said, raised and decided; the model's switches are as before afterwards."""
    said, own, found = io.StringIO(), model.config._attn_implementation, {"error": None}
    with contextlib.redirect_stdout(said):
        try:
            proof(model, *args)
        except script.UserError as error:
            found["error"] = str(error)
    if hasattr(model, "whole_logits"):
        found["whole_logits"], model.whole_logits = model.whole_logits, False
    model.config._attn_implementation = own
    script.reshard(model)
    return found | {"said": said.getvalue()}


def kernel_by_mask():
    """Attention whose kernel depends on the mask, as it does on CUDA: with one, scores and their softmax
    exist. So packed documents are rounded in another way than documents alone."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(module, query, key, value, attention_mask, scaling=None, **options):
        if attention_mask is None:
            return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **options)
        key, value = (repeat_kv(part, module.num_key_value_groups) for part in (key, value))
        scores = query @ key.transpose(2, 3) * scaling
        if attention_mask.dtype == torch.bool:
            attention_mask = torch.zeros_like(attention_mask, dtype=scores.dtype).masked_fill(
                ~attention_mask, torch.finfo(scores.dtype).min)
        scores = scores + attention_mask
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        return (weights @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register(KERNELS, attention)
    AttentionMaskInterface.register(KERNELS, sdpa_mask)


# ----------------------------------------------------------------------------------------------------
# 1. Faults of a model in memory

@contextlib.contextmanager
def logits_of_its_own(model, transform):
    """A head that does something to its logits that the script does not know of."""
    hook = model.get_output_embeddings().register_forward_hook(lambda module, args, out: transform(out))
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def changed_call(module, change):
    """`change` changes the keyword arguments of each call that has positions."""
    def hook(module, args, kwargs):
        if kwargs.get("position_ids") is not None:
            kwargs = kwargs | change(kwargs)
        return args, kwargs

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def leak_in_second_row(kwargs):
    positions = kwargs["position_ids"].clone()
    positions[1:] = torch.arange(positions.shape[1])
    return {"position_ids": positions, "attention_mask": None}


LEAKS = {
    "positions ignored": lambda kwargs: {"position_ids": None},
    "second row leaks": leak_in_second_row,
}
HEADS = {"scale 0.9": lambda logits: logits * 0.9, "cap 20": lambda logits: 20 * torch.tanh(logits / 20)}
CACHES = {
    "next position is one too far": lambda kwargs: {
        "position_ids": kwargs["position_ids"] + (kwargs["position_ids"].shape[1] == 1)},
    "padding is seen": lambda kwargs: {"attention_mask": None},
}
compute_dtype = torch.float32


# ----------------------------------------------------------------------------------------------------
# 2. train_llm.py

def load_sft(folder, dtype, work):
    args = train_llm.parse_args(["--hf-model", folder, "--dataset", "none", "--device", "cpu",
                                 "--seq-len", "64",
                                 "--checkpoint-dir", work])
    ranks = train_llm.read_ranks(args)
    mesh = train_llm.init_distributed(args, ranks)
    model = train_llm.build_model(args, Path(folder), 1)
    train_llm.shard_model(model, args, mesh, dtype)
    train_llm.materialise(model, ranks.device, args.cpu_offload)
    train_llm.fill_buffers(model)
    train_llm.load_hf_weights(model, Path(folder), args.trust_remote_code, ranks)
    train_llm.prove_filled(model)
    return model, args, ranks, mesh


@torch.no_grad()
def loss_error(model, whole_logits):
    """Of the loss of one batch against that of the model's own logits, as a share."""
    ids = torch.arange(5, 37)[None]
    model.whole_logits = whole_logits
    logits = model(ids).double().flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, ids.flatten(), reduction="sum").item()
    found = model(ids, labels=ids)[0].item()
    model.whole_logits = False
    train_llm.reshard(model)
    return abs(found - expected) / expected


@torch.no_grad()
def prove_packs(model, ranks, faults):
    """Also how much packing changes the logits of second documents: as a share of what a leak changes, and at
    most."""
    found = {"packing": {"none": attempt(train_llm, model, train_llm.prove_packing, ranks)}}
    ids = train_llm.plain_tokens(model, 2, 64, ranks.device)
    model.eval()
    alone, leak = model(ids[:, 32:]), model(ids)[:, 32:]
    packed = model(ids, position_ids=torch.arange(64).expand(2, 64) % 32)[:, 32:]
    changed = (packed - alone).float().abs()
    found |= {"noise": float(changed.mean() / (leak - alone).float().abs().mean()),
              "largest": float(changed.max())}
    for name, change in LEAKS.items() if faults else ():
        with changed_call(model.base_model, change):
            found["packing"][name] = attempt(train_llm, model, train_llm.prove_packing, ranks)
    return found


def prove_heads(script, model, proof, loss_error, ranks, faults):
    found = {"none": attempt(script, model, proof, ranks)}
    for name, transform in HEADS.items() if faults else ():
        with logits_of_its_own(model, transform):
            seen = attempt(script, model, proof, ranks)
            found[name] = seen | {"mended": loss_error(model, True), "left": loss_error(model, False)}
    return found


# ----------------------------------------------------------------------------------------------------
# 3. Exports

def replace_tensor(folder, name, by):
    """Overwrite one tensor of a safetensors file by another one of the same size."""
    with open(folder / "model.safetensors", "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        where = json.loads(file.read(length))
        (start, end), (from_start, _) = (where[key]["data_offsets"] for key in (name, by))
        file.seek(8 + length + from_start)
        data = file.read(end - start)
        file.seek(8 + length + start)
        file.write(data)


def other_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


EXPORTS = {
    "none": lambda folder: None,
    "tensor of another layer": lambda folder: replace_tensor(
        folder, "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"),
    "rope_theta 1,000": lambda folder: other_config(
        folder, rope_parameters={"rope_type": "default", "rope_theta": 1e3}),
    "tie lost": lambda folder: other_config(folder, tie_word_embeddings=False),
}


def verify_exports(model, args, ranks, source, dtype, faults):
    from transformers import AutoTokenizer

    folder = Path(args.checkpoint_dir) / "hf"
    parts = train_llm.hf_parts(model, AutoTokenizer.from_pretrained(source), Path(source))
    train_llm.export_model(model, folder, parts, dtype, ranks)
    probe = train_llm.plain_tokens(model, 2, 64, ranks.device)
    with torch.no_grad():
        logits = model.eval()(probe)
    whole, found = folder.with_name("whole"), {}
    folder.rename(whole)
    for name, damage in EXPORTS.items() if faults else [("none", EXPORTS["none"])]:
        shutil.copytree(whole, folder)
        damage(folder)
        try:
            found[name] = {"value": train_llm.verify_export(folder, probe, logits, False), "error": None}
        except train_llm.UserError as error:
            found[name] = {"error": str(error)}
        shutil.rmtree(folder)
    shutil.rmtree(whole)
    return found


# ----------------------------------------------------------------------------------------------------
# 4. train_gsm8k_fsdp2.py

def gsm8k_args(folder, *more):
    return gsm8k.parse_args(["--model", folder, "--device", "cpu", "--max-prompt-tokens", "200",
                             "--max-new-tokens", "16", *more])


def load_gsm8k(args, folder, dtype, mesh, ranks):
    model = gsm8k.load_policy(args, Path(folder), mesh, dtype, ranks)
    gsm8k.load_hf_weights(model, Path(folder), args.trust_remote_code, ranks)
    gsm8k.prove_filled(model)
    return model


@torch.no_grad()
def logprob_error(model, whole_logits):
    """Of a row's logprobs against those of the model's own logits, as a share, on average."""
    ids = torch.arange(5, 37)[None]
    model.whole_logits = whole_logits
    logprobs = torch.log_softmax(model(ids)[0, :-1].double(), -1)
    expected = logprobs.gather(1, ids[0, 1:, None])[:, 0]
    found, _ = model(ids, torch.arange(31), ids[0, 1:])
    model.whole_logits = False
    gsm8k.reshard(model)
    return float((found - expected).abs().mean() / expected.abs().mean())


def prove_grpo(model, args, folder, dtype, ranks, faults):
    def rollouts(model, generator, ranks):
        sampling = gsm8k.Sampling(1.0, 16, [-1])
        gsm8k.prove_rollouts(gsm8k.Sampler(model, generator, None, 8, ranks.device, sampling, dtype), ranks)

    generator = gsm8k.build_generator(args, Path(folder), False)
    found = {"logprobs": prove_heads(gsm8k, model, gsm8k.prove_logprobs, logprob_error, ranks, faults),
             "rollouts": {"none": attempt(gsm8k, model, rollouts, generator, ranks)}}
    for name, change in CACHES.items() if faults else ():
        with changed_call(generator.base_model, change):
            found["rollouts"][name] = attempt(gsm8k, model, rollouts, generator, ranks)
    return found


def load(result, dtype, folder, work, faults=False):
    kernel_by_mask()
    Path(work).mkdir()
    globals()["compute_dtype"] = dtype
    model, args, ranks, mesh = load_sft(folder, dtype, work)
    found = {"own kernel": prove_packs(model, ranks, faults),
             "loss": prove_heads(train_llm, model, train_llm.prove_loss, loss_error, ranks, faults),
             "export": verify_exports(model, args, ranks, folder, dtype, faults)}
    model.config._attn_implementation = KERNELS
    found["kernel by mask"] = prove_packs(model, ranks, faults)
    del model
    args = gsm8k_args(folder)
    model = load_gsm8k(args, folder, dtype, mesh, ranks)
    found |= prove_grpo(model, args, folder, dtype, ranks, faults)
    Path(result).write_text(json.dumps(found, indent=1))


# ----------------------------------------------------------------------------------------------------
# 5. Pushes

@contextlib.contextmanager
def sends(others):
    """The trainer sends `others` {name: tensor} in place of its own."""
    own = gsm8k.hf_tensors

    def other_tensors(model, tensors, dtype, *more):
        return own(model, ((name, others.get(name, tensor)) for name, tensor in tensors), dtype, *more)

    gsm8k.hf_tensors = other_tensors
    try:
        yield
    finally:
        gsm8k.hf_tensors = own


def of_another_layer(weights):
    """Layer 5 with the weights of layer 6."""
    return {name.replace("layers.6.", "layers.5."): tensor for name, tensor in weights.items()
            if "layers.6." in name}


def train(model, prompt, answer):
    """Three steps on one answer: a change of the weights that a server must follow."""
    ids = torch.tensor([prompt + answer])
    rows = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(3):
        logprobs, _ = model(ids, rows, ids[0, len(prompt):])
        (-logprobs.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def push(result, dtype, folder, port):
    from real_model import gsm8k_rows
    from transformers import AutoModelForCausalLM, AutoTokenizer

    args = gsm8k_args(folder, "--rollouts", "vllm", "--vllm-port", port, "--vllm-timeout", "60")
    ranks = gsm8k.read_ranks(args)
    mesh = gsm8k.init_distributed(args, ranks)
    model, tokenizer = load_gsm8k(args, folder, dtype, mesh, ranks), AutoTokenizer.from_pretrained(folder)
    server = gsm8k.open_server(args, ranks)
    sampling = gsm8k.Sampling(1.0, 16, [tokenizer.eos_token_id])
    row = gsm8k_rows("test")[0]
    prompt = gsm8k.render_prompt(tokenizer, row["question"], gsm8k.SYSTEM_PROMPT)
    sampler = gsm8k.Sampler(model, None, server, 8, ranks.device, sampling, dtype)
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = {name: param.detach() for name, param in twin.named_parameters()}
    found, version = {}, 0

    def pushed(name, others):
        nonlocal version
        version += 1
        with sends(others):
            try:
                gsm8k.update_server(sampler, version, prompt, ranks)
                found[name] = {"value": server.proof_error, "error": None}
            except gsm8k.UserError as error:
                found[name] = {"error": str(error)}

    pushed("none", {})
    pushed("block of another layer", of_another_layer(before))
    train(model, prompt, tokenizer(row["answer"])["input_ids"])
    pushed("changed", {})
    pushed("stale", before)
    pushed("mended", {})
    Path(result).write_text(json.dumps(found, indent=1))


def main(mode, result, dtype, *rest):
    modes = {"load": load, "faults": functools.partial(load, faults=True), "push": push}
    modes[mode](result, getattr(torch, dtype), *rest)


if __name__ == "__main__":
    main(*sys.argv[1:])
