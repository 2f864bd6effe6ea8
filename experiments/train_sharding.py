"""Train one small transformer with DDP, hand-written FSDP, FSDP1 or FSDP2, and measure what each costs.

    python experiments/train_sharding.py --max-steps 20                                   # one process
    torchrun --standalone --nproc_per_node=2 experiments/train_sharding.py --impl manual
    torchrun --standalone --nproc_per_node=2 experiments/train_sharding.py --impl fsdp2 --precision bf16

`--impl` chooses who shards; model, data, optimizer and loop are the same for all. `manual` is fully sharded
data parallelism written out, in section 4; README.md beside this file explains it and the metrics. What else
a real training needs is left out (train_llm.py has it): text data, evaluation, export, models that do not
fit on one device before they are sharded.

Contents: 1 Arguments, 2 Distributed, 3 Data and model, 4 Manual FSDP, 5 All implementations, 6 Checkpoints,
7 Run record, 8 Training. `EDIT:` marks the lines that people change. "(all ranks)" means that every rank must
make the call, because it communicates. At a "sync point" the host waits for the device.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import sys
import tempfile
import time
import types
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

# Read when torch is imported. The profiler of the logged steps would announce itself on the terminal.
os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

# torch 2.13 has other names for collectives that 2.11 does not know yet, and FSDP1 has been superseded.
warnings.filterwarnings("ignore", module=r"torch\.", category=FutureWarning)
warnings.filterwarnings("ignore", module=r"torch\.", category=UserWarning)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class UserError(Exception):
    """A problem that the user can solve, shown as one line."""


# ------------------------------------------------------------------------------------------------
# 1. Arguments: flags, and a YAML or JSON file with sections, read as a saved command line

def build_parser() -> argparse.ArgumentParser:
    """Each group is a section of the config file: `model: {embed_dim: 768}` is `--embed-dim 768`. Of flags of
    "fsdp", None means: not given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON with the sections below; flags win")
    onoff = argparse.BooleanOptionalAction
    add = parser.add_argument_group("model").add_argument
    for name, default in (("vocab-size", 512), ("embed-dim", 256), ("num-layers", 4), ("num-heads", 4),
                          ("ff-hidden-dim", 1024), ("dropout", 0.0)):
        add(f"--{name}", type=type(default), default=default)
    add = parser.add_argument_group("data").add_argument
    add("--seq-len", type=int, default=128, help="tokens in a sequence")
    add("--num-samples", type=int, default=4096, help="sequences in one epoch")
    add("--batch-size", type=int, default=8, help="sequences a process and micro-batch")
    add = parser.add_argument_group("optim").add_argument
    add("--lr", type=float, default=3e-4)
    add("--warmup-steps", type=int, default=20, help="then the rate stays as it is")
    add("--weight-decay", type=float, default=0.01)
    add("--grad-clip", type=float, default=1.0, help="largest gradient norm; 0: no clipping")
    add = parser.add_argument_group("runtime").add_argument
    add("--epochs", type=int, default=1)
    add("--max-steps", type=int, help="end after so many optimizer steps, whatever --epochs says")
    add("--grad-accum", type=int, default=1, help="micro-batches a step; gradients are reduced once a step")
    add("--precision", choices=list(DTYPES), default="fp32", help="of the computation; weights stay fp32")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto")
    add("--seed", type=int, default=0)
    add("--compile", action=onoff, default=False, help="torch.compile each block")
    add("--log-every", type=int, default=5, help="steps between rows; the logged step is profiled")
    add("--metrics-path", metavar="FILE", help="append the rows to this JSON lines file")
    add("--trace", metavar="FILE", help="keep the last logged step's trace (chrome://tracing, Perfetto)")
    add("--ckpt-dir", metavar="DIR", help="save here at the end, and every --save-every steps")
    add("--save-every", type=int, default=0, help="steps between checkpoints; 0: only the last")
    add("--resume", metavar="{auto,FOLDER}", help="auto: the newest checkpoint in --ckpt-dir, if any")
    add = parser.add_argument_group("fsdp").add_argument
    add("--impl", choices=["ddp", "manual", "fsdp1", "fsdp2"], default="manual")
    add("--sharding", choices=["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD"],
        help="gathered weights are freed after the forward, after the backward, never; HYBRID_SHARD: "
             "sharded within groups, replicated over them (default: FULL_SHARD; ddp: NO_SHARD)")
    add("--shard-size", type=int, metavar="N", help="processes in a HYBRID_SHARD group (default: a node's)")
    add("--auto-wrap", choices=["transformer", "size", "none"], help="what is gathered at once: a block "
        "(default), a module with --min-unit-params, or the whole model")
    add("--min-unit-params", type=int, metavar="N", help="for --auto-wrap size (default: 100000)")
    add("--activation-checkpoint", action=onoff, default=False, help="recompute blocks in the backward")
    add("--prefetch", action=onoff, help="gather the next unit while this one computes")
    add("--limit-all-gathers", action=onoff, help="at most two units gathered ahead (fsdp1)")
    add("--use-orig-params", action=onoff, help="the optimizer sees the model's own parameters")
    return parser


RENAMED = {"mixed_precision": "precision", "sharding_strategy": "sharding", "auto_wrap_policy": "auto_wrap",
           "activation_checkpointing": "activation_checkpoint", "checkpoint_dir": "ckpt_dir"}


def config_tokens(path: str, parser: argparse.ArgumentParser) -> list[str]:
    import yaml
    try:
        entries = yaml.safe_load(Path(path).read_bytes())  # JSON is YAML
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f"--config {path}: {' '.join(str(error).split())}")
    sections = {group.title: {action.dest for action in group._group_actions}
                for group in parser._action_groups[2:]}
    everywhere = set().union(*sections.values())  # at the top level any flag may stand
    tokens = []
    for name, value in entries.items() if isinstance(entries, dict) else [("file", [])]:
        is_section = name in sections and isinstance(value, dict)
        inner, known = (value, sections[name]) if is_section else ({name: value}, everywhere)
        for key, item in inner.items():
            flag = RENAMED.get(key, str(key)).replace("_", "-")
            if flag.replace("-", "_") not in known or isinstance(item, (dict, list)):
                parser.error(f"--config {path}: not known, or not in this place: {key}: {item}")
            if item is not None:
                is_switch = isinstance(item, bool)
                tokens.append(f"--{'' if item else 'no-'}{flag}" if is_switch else f"--{flag}={item}")
    return tokens


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Default < config file < command line. Exits with code 2 and one line for each problem."""
    argv, parser = sys.argv[1:] if argv is None else argv, build_parser()
    args = parser.parse_args(argv)
    if args.config:
        args = parser.parse_args([*config_tokens(args.config, parser), *argv])
    if problems := list(find_problems(args)):
        parser.error("\n".join(problems))
    # `prefetch` may stay None: the official implementations then do as they see fit.
    args.sharding = args.sharding or ("NO_SHARD" if args.impl == "ddp" else "FULL_SHARD")
    args.auto_wrap = args.auto_wrap or "transformer"
    args.min_unit_params = args.min_unit_params or 100_000
    args.prefetch = True if args.impl == "manual" and args.prefetch is None else args.prefetch
    args.limit_all_gathers = args.limit_all_gathers is not False
    args.use_orig_params = args.impl != "manual" and args.use_orig_params is not False
    return args


def find_problems(args: Namespace) -> Iterator[str]:
    for name in ("vocab_size embed_dim num_layers num_heads ff_hidden_dim seq_len num_samples batch_size "
                 "epochs max_steps grad_accum log_every shard_size min_unit_params").split():
        if getattr(args, name) is not None and getattr(args, name) < 1:
            yield f"--{name.replace('_', '-')} must be at least 1"
    if not 0 <= args.dropout < 1:
        yield "--dropout must be at least 0 and below 1"
    if min(args.lr, args.weight_decay, args.grad_clip, args.warmup_steps, args.save_every, args.seed) < 0:
        yield "--lr, --weight-decay, --grad-clip, --warmup-steps, --save-every, --seed cannot be negative"
    if args.num_heads > 0 and args.embed_dim % args.num_heads:
        yield f"--embed-dim {args.embed_dim} is not a multiple of --num-heads {args.num_heads}"
    if args.resume == "auto" and not args.ckpt_dir:
        yield "--resume auto looks into --ckpt-dir: give one"
    if args.resume not in (None, "auto") and not (Path(args.resume) / "progress.json").is_file():
        yield f"--resume {args.resume}: not a checkpoint (a folder such as DIR/step_000100)"
    if (args.shard_size and args.sharding != "HYBRID_SHARD") or (args.min_unit_params
                                                                 and args.auto_wrap != "size"):
        yield "--shard-size goes with --sharding HYBRID_SHARD, --min-unit-params with --auto-wrap size"
    if args.impl == "fsdp1" and args.compile and args.use_orig_params is False:
        yield "--impl fsdp1 can --compile only with --use-orig-params"
    for (impl, name, value), reason in REFUSED.items():
        if args.impl == impl and getattr(args, name) == value:
            flag = f"--{'no-' * (value is False)}{name.replace('_', '-')}"
            yield f"--impl {impl} {reason}: leave {flag} out"


# What an implementation cannot do otherwise is refused, never ignored.
REFUSED = {
    ("manual", "limit_all_gathers", False): "never gathers more than one unit ahead",
    ("manual", "use_orig_params", True): "gives the optimizer one flat shard a unit",
    ("fsdp2", "limit_all_gathers", False): "never gathers more than one unit ahead",
    ("fsdp2", "use_orig_params", False): "always keeps the model's own parameters",
    **{("ddp", name, value): "gathers no weights and has no units" for value in (True, False)
       for name in ("prefetch", "limit_all_gathers", "use_orig_params")},
    **{("ddp", "sharding", name): "keeps all weights on each process"
       for name in ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD")},
    **{("ddp", "auto_wrap", name): "has no units" for name in ("transformer", "size", "none")},
}


# ------------------------------------------------------------------------------------------------
# 2. Distributed: who am I, which device, which mesh

@dataclasses.dataclass
class Ranks:  # this process among the others
    rank: int
    world_size: int
    device: torch.device
    mesh: dist.DeviceMesh  # ("replicate", "shard"): weights are sharded over the second dimension


def init_distributed(args: Namespace) -> Ranks:
    """Start the process group (all ranks), from torchrun's variables or alone."""
    rank, local_rank, world_size, local_size = (int(os.environ.get(name, value)) for name, value in (
        ("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)))
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    device, options = torch.device("cpu"), {"backend": "gloo"}
    if args.device != "cpu" and torch.cuda.is_available():
        if local_size > torch.cuda.device_count():
            raise UserError(f"{local_size} processes, {torch.cuda.device_count()} GPUs: start fewer")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        options = {"backend": "cpu:gloo,cuda:nccl", "device_id": device}
    if "RANK" not in os.environ:  # alone: no port, no address
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    shard_size = {"NO_SHARD": 1, "HYBRID_SHARD": args.shard_size or local_size}.get(args.sharding, world_size)
    if world_size % shard_size:
        raise UserError(f"--shard-size {shard_size} does not divide the {world_size} processes")
    if not dist.is_initialized():
        dist.init_process_group(**options)
    mesh = dist.init_device_mesh(device.type, (world_size // shard_size, shard_size),
                                 mesh_dim_names=("replicate", "shard"))
    return Ranks(rank, world_size, device, mesh)


# ------------------------------------------------------------------------------------------------
# 3. Data and model: random sentences of a small language, and a decoder of pre-norm blocks

BRANCH_PROBS = (0.6, 0.2, 0.1, 0.1)
# No model can do better on average, in nats a token; the first token of a sequence is given.
BEST_LOSS = -sum(p * math.log(p) for p in BRANCH_PROBS)


def make_data(args: Namespace) -> Tensor:
    """(samples, tokens + 1) of a Markov chain: each token has four successors, some more probable."""
    # EDIT: return token ids of your own text, the same on all ranks, in random order.
    random = torch.Generator().manual_seed(args.seed)
    successors = torch.randint(args.vocab_size, (args.vocab_size, len(BRANCH_PROBS)), generator=random)
    S, T = args.num_samples, args.seq_len
    branches = torch.multinomial(torch.tensor(BRANCH_PROBS), S * T, replacement=True, generator=random)
    tokens = torch.empty(S, T + 1, dtype=torch.long)
    tokens[:, 0] = torch.randint(args.vocab_size, (S,), generator=random)
    for t, branch in enumerate(branches.view(T, S)):
        tokens[:, t + 1] = successors[tokens[:, t], branch]
    return tokens


def take_batch(data: Tensor, start: int, args: Namespace, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """(inputs, labels), each (B, T): this rank's part of the micro-batch that begins with sample `start`. The
    order is fixed, so that a resumed run goes on exactly, also with another number of processes."""
    first = start + ranks.rank * args.batch_size
    tokens = data[torch.arange(first, first + args.batch_size) % len(data)].to(ranks.device)
    return tokens[:, :-1], tokens[:, 1:]


class Block(nn.Module):
    def __init__(self, args: Namespace):
        super().__init__()
        D, self.num_heads, self.dropout = args.embed_dim, args.num_heads, args.dropout
        self.attention_norm, self.mlp_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, args.ff_hidden_dim), nn.Linear(args.ff_hidden_dim, D)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (part.view(B, T, self.num_heads, -1).transpose(1, 2)
                   for part in self.qkv(self.attention_norm(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.dropout(self.out(attended.transpose(1, 2).reshape(B, T, D)), self.dropout, self.training)
        return x + F.dropout(self.down(F.gelu(self.up(self.mlp_norm(x)))), self.dropout, self.training)


class Decoder(nn.Module):
    """Token ids (B, T) to fp32 logits (B, T, V)."""

    def __init__(self, args: Namespace):
        super().__init__()
        self.tokens = nn.Embedding(args.vocab_size, args.embed_dim)
        self.positions = nn.Embedding(args.seq_len, args.embed_dim)
        self.blocks = nn.ModuleList([Block(args) for _ in range(args.num_layers)])
        self.norm = nn.LayerNorm(args.embed_dim)
        self.head = nn.Linear(args.embed_dim, args.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.size(1), device=input_ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).float()


def dress_blocks(model: Decoder, args: Namespace) -> None:
    """Recomputation and compilation go inside what is sharded, so that gathering stays outside the graph. All
    blocks share one compiled function: bound methods would be compiled once for each block."""
    def recomputed(block: Block, x: Tensor) -> Tensor:
        return checkpoint(Block.forward, block, x, use_reentrant=False)

    forward = recomputed if args.activation_checkpoint else Block.forward
    forward = torch.compile(forward) if args.compile else forward
    for block in model.blocks:
        block.forward = types.MethodType(forward, block)


# ------------------------------------------------------------------------------------------------
# 4. Manual FSDP
#
# The model is cut into units, here: each block, and a root with all the rest. A rank keeps 1/N of each unit:
# a slice of one flat vector, in which all parameters of the unit stand end to end. A step goes like this:
#
#   before a unit's forward    all-gather: the slices of all ranks become the unit's whole parameters
#   after its forward          free them (not the root's, whose backward comes next)
#   before its backward        all-gather again
#   after its backward         free them; add the gradient to this rank's sum over micro-batches
#   after the last micro-batch reduce-scatter: each rank gets the mean gradient of its own slice
#   update                     the optimizer knows the slices only, and nothing communicates
#
# Three tensors of a unit matter: `shard` always exists, `full` while the unit computes, `grad` from its
# backward to its reduce-scatter.

@dataclasses.dataclass(eq=False)
class Unit:
    name: str
    module: nn.Module
    names: list[str]  # of its parameters in the whole model
    params: list[nn.Parameter]  # views of `full`, which the module computes with
    shard: nn.Parameter  # (padded size / N,) fp32: this rank's slice, which the optimizer updates
    full: Tensor  # (padded size,) in the compute dtype; its memory is freed while nobody needs it
    grad: Tensor | None = None  # (padded size,) fp32: this rank's gradients of the micro-batches so far
    grad_views: list[Tensor] = dataclasses.field(default_factory=list)  # of `grad`, one a parameter
    gathering: dist.Work | None = None  # an all-gather under way
    num_missing: int = 0  # parameters whose gradient the running backward has not produced yet


@dataclasses.dataclass(eq=False)
class ManualFSDP:
    mesh: dist.DeviceMesh  # ("replicate", "shard")
    dtype: torch.dtype
    reshard_after_forward: bool
    prefetch: bool
    units: list[Unit] = dataclasses.field(default_factory=list)
    forward_order: list[Unit] = dataclasses.field(default_factory=list)  # recorded in the first step
    backward_order: list[Unit] = dataclasses.field(default_factory=list)
    is_last_micro_batch: bool = True  # set by the loop: gradients are reduced with the last one only
    reducing: tuple | None = None  # (work, unit, its gradient): the reduce-scatter under way

    def __post_init__(self):
        self.replicas, self.shards = (self.mesh.get_group(name) for name in ("replicate", "shard"))
        self.num_replicas, self.num_shards = self.mesh.shape


def shard_manually(fsdp: ManualFSDP, modules: dict[str, nn.Module], full_names: dict[nn.Parameter, str]
                   ) -> None:
    """Make each module a unit; inner modules come first, and the outer ones take what is left."""
    for name, module in modules.items():
        slots = [(owner, key, param) for owner in module.modules()
                 for key, param in owner.named_parameters(recurse=False) if param in full_names]
        if slots:
            fsdp.units.append(make_unit(fsdp, name, module, slots))
            fsdp.units[-1].names = [full_names.pop(param) for _, _, param in slots]
            add_hooks(fsdp, fsdp.units[-1])


def make_unit(fsdp: ManualFSDP, name: str, module: nn.Module, slots: list[tuple]) -> Unit:
    """Flatten the parameters, keep this rank's slice, and put views of the (empty) whole in their places."""
    flat = torch.cat([param.detach().flatten() for _, _, param in slots])
    flat = F.pad(flat, (0, -len(flat) % fsdp.num_shards))  # zeros at the end, so that the slices are equal
    shard = nn.Parameter(flat.chunk(fsdp.num_shards)[dist.get_rank(fsdp.shards)].clone())
    full, params = torch.empty_like(flat, dtype=fsdp.dtype), []
    for (owner, key, param), view in zip(slots, split_like(full, [param for _, _, param in slots])):
        # NOTE: .data, because a plain view shares the version counter of `full`: autograd would take the
        # second all-gather of a step for a change of weights that it has saved.
        params.append(nn.Parameter(view.data))
        setattr(owner, key, params[-1])
    unit = Unit(name, module, [], params, shard, full)
    free(unit)
    return unit


def split_like(flat: Tensor, params: list[Tensor]) -> list[Tensor]:
    """Views of a flat tensor with the shapes of the parameters; padding at the end is left out."""
    pieces = flat[:sum(p.numel() for p in params)].split([p.numel() for p in params])
    return [piece.view(param.shape) for piece, param in zip(pieces, params)]


def start_gather(fsdp: ManualFSDP, unit: Unit) -> None:
    """Begin the all-gather of a unit (all ranks), unless it is gathered already."""
    storage = unit.full.untyped_storage()
    if storage.size() == 0:
        storage.resize_(unit.full.numel() * unit.full.itemsize)
        local = unit.shard.detach().to(fsdp.dtype)  # cast first: in bf16 half as much is sent
        unit.gathering = dist.all_gather_into_tensor(unit.full, local, group=fsdp.shards, async_op=True)


def gather(fsdp: ManualFSDP, unit: Unit, order: list[Unit]) -> None:
    """Return when the unit's parameters are whole; with prefetch, begin with the unit that comes next.

    `order` is recorded while the first step runs, so that no step before the second prefetches."""
    with record_function(f"gather {unit.name}"):
        start_gather(fsdp, unit)
        if unit.gathering:
            unit.gathering.wait()  # NCCL: the stream waits, not the host
            unit.gathering = None
        if unit not in order:
            order.append(unit)
        elif fsdp.prefetch and unit is not order[-1]:
            start_gather(fsdp, order[order.index(unit) + 1])


def free(unit: Unit) -> None:
    """Give the memory of the whole parameters back. What autograd has saved of them are views of the same
    storage, which the next gather fills again."""
    with record_function(f"free {unit.name}"):
        unit.full.untyped_storage().resize_(0)


def add_hooks(fsdp: ManualFSDP, unit: Unit) -> None:
    """Gather and free around the module's forward and backward, and take each gradient when it is there."""
    def before_forward(module: nn.Module, inputs: tuple) -> None:
        gather(fsdp, unit, fsdp.forward_order)
        unit.num_missing = len(unit.params)

    def after_forward(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        is_root = unit is fsdp.units[-1]
        if not torch.is_grad_enabled() or (fsdp.reshard_after_forward and not is_root):
            free(unit)
        if output.requires_grad:
            output.register_hook(before_backward)

    def before_backward(grad_output: Tensor) -> None:
        gather(fsdp, unit, fsdp.backward_order)

    unit.module.register_forward_pre_hook(before_forward)
    unit.module.register_forward_hook(after_forward)
    for index, param in enumerate(unit.params):
        param.register_post_accumulate_grad_hook(lambda param, i=index: take_gradient(fsdp, unit, i))


def take_gradient(fsdp: ManualFSDP, unit: Unit, index: int) -> None:
    """Move one parameter's gradient into the unit's flat sum. The last one ends the unit's backward.

    A weight's gradient comes from the operation that needs the weight in the backward, so that the weights
    are not needed any more once all gradients are there."""
    if unit.grad is None:
        unit.grad = torch.zeros(unit.full.shape, device=unit.full.device)
        unit.grad_views = split_like(unit.grad, unit.params)
    param = unit.params[index]
    unit.grad_views[index].add_(param.grad)  # in fp32, whatever the compute dtype
    param.grad = None
    unit.num_missing -= 1
    if unit.num_missing == 0:
        free(unit)
        if fsdp.is_last_micro_batch:
            start_reduce(fsdp, unit)


def start_reduce(fsdp: ManualFSDP, unit: Unit) -> None:
    """Begin the reduce-scatter of a unit's gradient (all ranks). One at a time: whole gradients are big."""
    finish_reduce(fsdp)
    with record_function(f"reduce {unit.name}"):
        whole = unit.grad.div_(fsdp.num_shards * fsdp.num_replicas)
        unit.grad, unit.grad_views = None, []
        unit.shard.grad = torch.empty_like(unit.shard)
        work = dist.reduce_scatter_tensor(unit.shard.grad, whole, group=fsdp.shards, async_op=True)
        fsdp.reducing = work, unit, whole


def finish_reduce(fsdp: ManualFSDP) -> None:
    """Wait for the reduce-scatter under way. With replicas, sum the slice over them as well (all ranks)."""
    if fsdp.reducing:
        work, unit, _ = fsdp.reducing
        work.wait()
        fsdp.reducing = None
        if fsdp.num_replicas > 1:
            dist.all_reduce(unit.shard.grad, group=fsdp.replicas)


def finish_backward(fsdp: ManualFSDP) -> None:
    """Call it after the last micro-batch's backward, before the update (all ranks)."""
    finish_reduce(fsdp)
    missing = [name for unit in fsdp.units if unit.shard.grad is None for name in unit.names]
    if missing:
        raise UserError(f"no gradient for some of {', '.join(missing)}: use each parameter of a unit")


def whole_tensors(fsdp: ManualFSDP, unit: Unit, local: Tensor) -> dict[str, DTensor]:
    """{parameter name: rows of this rank} of a flat local slice, as FSDP2 would shard them (all ranks).

    A flat slice begins and ends anywhere in a parameter, which no checkpoint format can say. So one unit at a
    time is gathered and cut by rows."""
    flat = torch.empty(unit.full.shape, device=local.device)
    dist.all_gather_into_tensor(flat, local.detach(), group=fsdp.shards)
    return {name: distribute_tensor(whole.clone(), fsdp.mesh["shard"], [Shard(0)], src_data_rank=None)
            for name, whole in zip(unit.names, split_like(flat, unit.params))}


def fill_slice(fsdp: ManualFSDP, unit: Unit, local: Tensor, tensors: dict[str, DTensor]) -> None:
    """The way back: from rows by name to this rank's flat slice (all ranks)."""
    flat = torch.zeros(unit.full.shape, device=local.device)
    for name, whole in zip(unit.names, split_like(flat, unit.params)):
        whole.copy_(tensors[name].full_tensor())
    local.detach().copy_(flat.chunk(fsdp.num_shards)[dist.get_rank(fsdp.shards)])


# ------------------------------------------------------------------------------------------------
# 5. All implementations: the same units, precision and reductions, each in its own words; one update

@dataclasses.dataclass
class Sharded:
    impl: str
    model: nn.Module  # to be called
    manual: ManualFSDP | None = None  # for --impl manual

    def params(self) -> list[nn.Parameter]:
        """What the optimizer updates: flat shards for `manual`, else the model's parameters as they are."""
        return [unit.shard for unit in self.manual.units] if self.manual else list(self.model.parameters())


def find_units(model: Decoder, args: Namespace) -> dict[str, nn.Module]:
    """{name: module} of what is gathered at once; the root, with all that is left, comes last."""
    units = {}
    if args.auto_wrap == "transformer":
        units = {f"block {i}": block for i, block in enumerate(model.blocks)}
    elif args.auto_wrap == "size":  # the smallest modules that are big enough; a list has no forward
        big = {name: module for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)
               and name and sum(param.numel() for param in module.parameters()) >= args.min_unit_params}
        units = {name: module for name, module in big.items()
                 if not any(other.startswith(f"{name}.") for other in big)}
    return units | {"root": model}


def shard_model(model: Decoder, args: Namespace, ranks: Ranks) -> Sharded:
    """Every rank enters with the same weights (all ranks). All implementations compute in --precision, keep
    fp32 weights, and average fp32 gradients over the ranks."""
    dress_blocks(model, args)
    model.to(ranks.device)
    if args.impl == "ddp":
        ids = [ranks.device] if ranks.device.type == "cuda" else None
        ddp = nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        return Sharded("ddp", ddp)
    units = find_units(model, args)
    if args.impl == "manual":
        reshards = args.sharding in ("FULL_SHARD", "HYBRID_SHARD")
        manual = ManualFSDP(ranks.mesh, DTYPES[args.precision], reshards, args.prefetch)
        shard_manually(manual, units, {param: name for name, param in model.named_parameters()})
        return Sharded("manual", model, manual)
    return Sharded(args.impl, {"fsdp1": wrap_fsdp1, "fsdp2": apply_fsdp2}[args.impl](units, args, ranks))


def wrap_fsdp1(units: dict[str, nn.Module], args: Namespace, ranks: Ranks) -> nn.Module:
    from torch.distributed.fsdp import (
        BackwardPrefetch, FullyShardedDataParallel, MixedPrecision, ShardingStrategy)
    from torch.distributed.fsdp.wrap import CustomPolicy
    *inner, root = units.values()
    dtype = DTYPES[args.precision]
    half = MixedPrecision(param_dtype=dtype, reduce_dtype=torch.float32, buffer_dtype=dtype)
    return FullyShardedDataParallel(
        root, auto_wrap_policy=CustomPolicy(lambda module: module in inner),
        sharding_strategy=ShardingStrategy[args.sharding],
        device_mesh=ranks.mesh if ranks.mesh.size(0) > 1 else ranks.mesh["shard"],
        mixed_precision=half if dtype != torch.float32 else None, device_id=ranks.device,
        forward_prefetch=bool(args.prefetch),
        backward_prefetch=None if args.prefetch is False else BackwardPrefetch.BACKWARD_PRE,
        limit_all_gathers=args.limit_all_gathers, use_orig_params=args.use_orig_params)


def apply_fsdp2(units: dict[str, nn.Module], args: Namespace, ranks: Ranks) -> nn.Module:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = ranks.mesh if ranks.mesh.size(0) > 1 else ranks.mesh["shard"]
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[args.precision], reduce_dtype=torch.float32)
    *inner, root = units.values()
    reshards = args.sharding in ("FULL_SHARD", "HYBRID_SHARD")
    for module in inner:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshards)
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for i, module in enumerate(inner if args.prefetch is not None else []):
        module.set_modules_to_forward_prefetch(inner[i + 1:i + 2] if args.prefetch else [])
        # An empty list would mean the default, which is to prefetch; itself is gathered already.
        module.set_modules_to_backward_prefetch(inner[i - 1:i] if args.prefetch else [module])
    return root


def reducing(sharded: Sharded, is_last: bool) -> contextlib.AbstractContextManager:
    """Around a micro-batch: gradients are reduced with the last one of a step, and added up before."""
    if sharded.manual:
        sharded.manual.is_last_micro_batch = is_last
    elif sharded.impl == "fsdp2":
        sharded.model.set_requires_gradient_sync(is_last)
    elif not is_last:
        return sharded.model.no_sync()
    return contextlib.nullcontext()


def local_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def reduce_stats(grads: list[Tensor], loss: Tensor, num_copies: int, ranks: Ranks) -> tuple[float, float]:
    """(mean loss, gradient norm) over all ranks, by one collective (all ranks). `num_copies` ranks hold the
    same gradient. Sums are fp64, rounded to fp32: how the gradient is cut into shards makes no difference."""
    norms = torch._foreach_norm(grads, dtype=torch.float64)
    stats = torch.stack([loss.double(), torch.stack(norms).square().sum()])
    dist.all_reduce(stats)
    loss, square = stats / torch.tensor([ranks.world_size, num_copies], device=stats.device)
    return tuple(torch.stack([loss, square.sqrt()]).float().tolist())  # sync point


@torch.no_grad()
def clip_and_step(optimizer: torch.optim.Optimizer, grads: list[Tensor], grad_norm: float, progress: dict,
                  grad_clip: float) -> float:
    """One update, or none where the gradient is not finite. Returns its norm without the loss scale.

    fp16 cannot hold small gradients: the loss is scaled up for the backward, half as much after overflow."""
    scale = progress["loss_scale"]
    grad_norm /= scale
    if math.isfinite(grad_norm):
        factor = min(1.0, grad_clip / (grad_norm + 1e-6) if grad_clip else 1.0) / scale
        if factor != 1.0:
            torch._foreach_mul_(grads, factor)
        optimizer.step()
    else:
        progress["skipped_steps"] += 1
        progress["loss_scale"] = max(1.0, scale / 2)
    optimizer.zero_grad()
    return grad_norm


# ------------------------------------------------------------------------------------------------
# 6. Checkpoints: DCP, torch's distributed checkpoint, under the model's own names, whoever has sharded it

def checkpoint_tensors(sharded: Sharded, optimizer: torch.optim.Optimizer, ranks: Ranks) -> dict:
    """{"model": {name: tensor}, "optim": {name: its state}, "random": {rank: state}} (all ranks). DCP reads
    any part of a tensor by name, so each loads what another saved, on any number of processes."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    random = {f"cpu_{ranks.rank}": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        random[f"cuda_{ranks.rank}"] = torch.cuda.get_rng_state()
    if not sharded.manual:
        model, optim = get_state_dict(sharded.model, optimizer)
        return {"model": model, "optim": optim["state"], "random": random}
    model, optim = {}, {}
    for unit in sharded.manual.units:
        state = adam_state(optimizer, unit.shard)
        model |= whole_tensors(sharded.manual, unit, unit.shard)
        means = whole_tensors(sharded.manual, unit, state["exp_avg"])
        squares = whole_tensors(sharded.manual, unit, state["exp_avg_sq"])
        optim |= {name: {"step": state["step"].clone(), "exp_avg": means[name], "exp_avg_sq": squares[name]}
                  for name in unit.names}
    return {"model": model, "optim": optim, "random": random}


def adam_state(optimizer: torch.optim.Optimizer, shard: Tensor) -> dict[str, Tensor]:
    """What AdamW keeps of a parameter; zeros before the first update."""
    if not optimizer.state[shard]:
        optimizer.state[shard] = {"step": torch.zeros((), device=shard.device),
                                  "exp_avg": torch.zeros_like(shard), "exp_avg_sq": torch.zeros_like(shard)}
    return optimizer.state[shard]


def load_tensors(folder: Path, sharded: Sharded, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Weights, optimizer and random states of a checkpoint, in place (all ranks)."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_state_dict
    state = checkpoint_tensors(sharded, optimizer, ranks)
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    # A rank that the saved run did not have begins with the random state of its seed.
    state["random"] = {key: value for key, value in state["random"].items() if f"random.{key}" in saved}
    try:
        dcp.load(state, checkpoint_id=folder)
    except (dcp.api.CheckpointException, RuntimeError, ValueError) as error:
        raise UserError(f"{folder} is damaged, or of another model: {str(error).splitlines()[-1]}") from error
    if sharded.manual:
        for unit in sharded.manual.units:
            own = adam_state(optimizer, unit.shard)
            fill_slice(sharded.manual, unit, unit.shard, state["model"])
            for key in ("exp_avg", "exp_avg_sq"):
                fill_slice(sharded.manual, unit, own[key],
                           {name: state["optim"][name][key] for name in unit.names})
            own["step"].copy_(state["optim"][unit.names[0]]["step"])
    else:
        groups = get_optimizer_state_dict(sharded.model, optimizer)["param_groups"]
        set_state_dict(sharded.model, optimizer, model_state_dict=state["model"],
                       optim_state_dict={"state": state["optim"], "param_groups": groups})
    for key, value in state["random"].items():
        (torch.set_rng_state if key.startswith("cpu") else torch.cuda.set_rng_state)(value)


def save_checkpoint(folder: Path, tensors: dict, progress: dict, ranks: Ranks) -> Path:
    """Write DIR/step_000100 (all ranks). The name appears when all is written: a kill leaves no half one."""
    import torch.distributed.checkpoint as dcp
    final = folder / f"step_{progress['step']:06d}"
    partial = folder / f"partial_{progress['step']:06d}"
    dcp.save(tensors, checkpoint_id=partial)
    if ranks.rank == 0 and not final.exists():
        (partial / "progress.json").write_text(json.dumps(progress))
        partial.rename(final)
    dist.barrier()
    return final


# ------------------------------------------------------------------------------------------------
# 7. Run record: how communication and memory are measured (README.md lists the metrics)
#
# Rank 0 runs each logged step under torch.profiler and reads collectives and allocations from the trace, the
# same way for each implementation. That slower step does not count for tokens/s, unless all are logged.
ITEM_SIZES = {"float": 4, "c10::BFloat16": 2, "bfloat16": 2, "c10::Half": 2, "half": 2, "double": 8,
              "int": 4, "long": 8, "long int": 8}


@contextlib.contextmanager
def profiled(path: Path) -> Iterator[None]:
    """Write a trace of what happens inside to `path`."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with torch.profiler.profile(record_shapes=True, profile_memory=True) as profiler:
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # sync point
    profiler.export_chrome_trace(str(path))


def find_collectives(events: list[dict]) -> list[tuple[str, float]]:
    """(kind, bytes) of each collective in a trace: of a gather one rank's part, else the whole tensor."""
    # gloo carries out a reduce-scatter as an all-reduce; what was asked for tells them apart.
    scattered = [math.prod(event["args"]["Input Dims"][1]) for event in events
                 if event["name"] == "c10d::_reduce_scatter_base_"]
    found = []
    for event in events:
        args, is_nccl = event["args"], event["name"] == "record_param_comms" and "dtype" in event["args"]
        if is_nccl:
            kind = args["Collective name"].strip("_").removesuffix("_base")
            kind = kind.replace("allgather", "all_gather").replace("allreduce", "all_reduce")
            size, dtype = args["In msg nelems"], args["dtype"].lower()
        elif event["name"].startswith("gloo:"):
            kind, size, dtype = event["name"][5:], math.prod(args["Input Dims"][0]), args["Input type"][0]
            if kind == "all_reduce" and size in scattered:
                scattered.remove(size)
                kind = "reduce_scatter"
        else:
            continue
        found.append((kind, size * ITEM_SIZES[dtype]))
    return found


def read_trace(path: Path, ranks: Ranks) -> tuple[dict[str, float], int]:
    """(time and traffic in collectives, largest sum of bytes that were allocated in host memory)."""
    events = [event for event in json.loads(path.read_text())["traceEvents"] if "args" in event]
    num_replicas, num_shards = ranks.mesh.shape
    factors = {"all_gather": num_shards - 1, "reduce_scatter": (num_shards - 1) / num_shards,
               "all_reduce": 2 * (num_replicas - 1) / num_replicas}  # without replicas only two numbers are
    sent = dict.fromkeys([*factors, "other"], 0.0)
    for kind, num_bytes in find_collectives(events):
        sent[kind if kind in factors else "other"] += num_bytes * factors.get(kind, 1)
    busy = reached = 0.0  # microseconds with at least one collective; where they end
    for start, end in sorted((event["ts"], event["ts"] + event["dur"]) for event in events
                             if event["name"].startswith(("gloo:", "ncclDevKernel"))):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    row = {"time/collectives_s": busy / 1e6,
           **{f"comm/{kind}_mib": num_bytes / 2**20 for kind, num_bytes in sent.items()}}
    changes = sorted((event["ts"], event["args"]["Ev Idx"], event["args"]["Bytes"]) for event in events
                     if event["name"] == "[memory]" and event["args"]["Device Type"] == 0)
    return row, max(itertools.accumulate(num_bytes for _, _, num_bytes in changes), default=0)


def held_bytes(sharded: Sharded, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights and optimizer on this rank between two steps, each storage once."""
    tensors = [*sharded.model.parameters(), *sharded.params()]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    storages = {s.data_ptr(): s.nbytes() for s in (local_part(t).untyped_storage() for t in tensors)}
    # DDP allocates its gradient buckets once, in C++, where no tensor shows them.
    buckets = sum(p.numel() * p.itemsize for p in sharded.params()) if sharded.impl == "ddp" else 0
    return sum(storages.values()) + buckets


# ------------------------------------------------------------------------------------------------
# 8. Training

def forward_backward(sharded: Sharded, data: Tensor, args: Namespace, ranks: Ranks, progress: dict) -> Tensor:
    """Gradients of one step's mean loss, in place (all ranks). Returns this rank's mean loss.

    Each sequence has the same number of tokens, so that a mean of means is the mean over all tokens."""
    total = torch.zeros((), device=ranks.device)
    per_micro_batch = args.batch_size * ranks.world_size
    # DDP has no precision of its own; the others hold weights in the compute dtype.
    cast = args.impl == "ddp" and args.precision != "fp32"
    for micro in range(args.grad_accum):
        inputs, labels = take_batch(data, progress["samples"] + micro * per_micro_batch, args, ranks)
        with reducing(sharded, is_last=micro == args.grad_accum - 1):
            with torch.autocast(ranks.device.type, DTYPES[args.precision], enabled=cast):
                logits = sharded.model(inputs)
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()) / args.grad_accum
            (loss * progress["loss_scale"]).backward()
        total += loss.detach()
    if sharded.manual:
        finish_backward(sharded.manual)
    return total


def main(argv: list[str] | None = None) -> None:
    # Set-up ---------------------------------------------------------------------------------
    from tqdm import tqdm
    args = parse_args(argv)
    ranks = init_distributed(args)
    torch.manual_seed(args.seed)  # the same weights on all ranks
    sharded = shard_model(Decoder(args), args, ranks)
    # One weight decay for all: a flat shard mixes matrices and biases.
    optimizer = torch.optim.AdamW(sharded.params(), args.lr, (0.9, 0.95), weight_decay=args.weight_decay,
                                  fused=True)
    data = make_data(args)
    torch.manual_seed(args.seed + 1 + ranks.rank)  # other dropout on each rank
    progress = {"step": 0, "samples": 0, "skipped_steps": 0,  # all of it survives a resume
                "loss_scale": 2.0**16 if args.precision == "fp16" else 1.0}
    found = Path(args.ckpt_dir).glob("step_*") if args.resume == "auto" else [args.resume]
    if newest := max(map(str, filter(None, found)), default=None):
        load_tensors(Path(newest), sharded, optimizer, ranks)
        progress = json.loads((Path(newest) / "progress.json").read_text())
    samples_per_step = args.batch_size * args.grad_accum * ranks.world_size
    total_steps = args.max_steps or max(1, args.epochs * args.num_samples // samples_per_step)
    is_main, scratch = ranks.rank == 0, tempfile.TemporaryDirectory()
    trace = Path(args.trace or f"{scratch.name}/trace.json")
    path = Path(args.metrics_path if is_main and args.metrics_path else os.devnull)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", buffering=1)

    def record(row: dict) -> None:
        file.write(json.dumps(row) + "\n")

    record({"event": "start", "args": vars(args), "world_size": ranks.world_size, "torch": torch.__version__,
            "device": f"{os.cpu_count()} CPU cores" if ranks.device.type == "cpu"
                      else torch.cuda.get_device_name()})
    bar = tqdm(total=total_steps, initial=progress["step"], desc=args.impl, unit="step",
               disable=not is_main or not sys.stderr.isatty())
    if is_main:
        bar.write(f"{args.impl}, {args.sharding}, {ranks.world_size} processes, {ranks.device.type}, "
                  f"{args.precision}; no model gets below a loss of {BEST_LOSS:.3f}", file=sys.stdout)
    times = []  # of the steps since the last row that were not profiled

    # Loop ------------------------------------------------------------------------------------
    while progress["step"] < total_steps:
        step = progress["step"] + 1
        is_logged = step % args.log_every == 0 or step == total_steps
        started = time.perf_counter()

        # Forward, backward, update (all ranks)
        with profiled(trace) if is_main and is_logged else contextlib.nullcontext():
            loss = forward_backward(sharded, data, args, ranks, progress)
            lr = args.lr * min(1.0, step / max(1, args.warmup_steps))
            for group in optimizer.param_groups:
                group["lr"] = lr
            grads = [local_part(param.grad) for param in sharded.params() if param.grad is not None]
            mean_loss, grad_norm = reduce_stats(grads, loss, ranks.mesh.size(0), ranks)
            grad_norm = clip_and_step(optimizer, grads, grad_norm, progress, args.grad_clip)

        # Count
        if not is_logged or not times:
            times.append(time.perf_counter() - started)
        progress |= {"step": step, "samples": progress["samples"] + samples_per_step}
        bar.update()

        # Log (rank 0)
        if is_logged and is_main:
            communication, allocated = read_trace(trace, ranks)
            on_cpu = held_bytes(sharded, optimizer) + allocated
            peak = torch.cuda.max_memory_allocated() if ranks.device.type == "cuda" else on_cpu
            step_s = sum(times) / len(times)
            tokens_per_s = samples_per_step * args.seq_len / step_s
            record({"event": "log", "step": step, "samples": progress["samples"], "train/loss": mean_loss,
                    "train/grad_norm": grad_norm if math.isfinite(grad_norm) else None, "train/lr": lr,
                    "train/skipped_steps": progress["skipped_steps"], "perf/tokens_per_s": tokens_per_s,
                    "perf/peak_mem_gib": peak / 2**30, "time/step_s": step_s, **communication})
            bar.write(f"step {step:>6}/{total_steps}  loss {mean_loss:.4f}  norm {grad_norm:.3f}  "
                      f"{tokens_per_s:,.0f} tokens/s  {peak / 2**30:.3f} GiB", file=sys.stdout)
            times.clear()

        # Save (all ranks)
        if args.ckpt_dir and (step == total_steps or (args.save_every and step % args.save_every == 0)):
            started = time.perf_counter()
            tensors = checkpoint_tensors(sharded, optimizer, ranks)
            folder = save_checkpoint(Path(args.ckpt_dir), tensors, progress, ranks)
            record({"event": "checkpoint", "step": step, "checkpoint": str(folder),
                    "time/checkpoint_s": time.perf_counter() - started})

    # End -------------------------------------------------------------------------------------
    bar.close()
    record({"event": "end", "step": progress["step"], "samples": progress["samples"]})


if __name__ == "__main__":
    try:
        main()
        dist.destroy_process_group()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"train_sharding.py: error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
