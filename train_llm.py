"""Train a causal language model with PyTorch FSDP2: from scratch, fine-tuning, supervised fine-tuning (SFT).

One file, no Trainer: it builds a model (written out below, or any causal LM of Hugging Face transformers),
shards its blocks with `fully_shard`, runs the loop that you see in `main()`, writes asynchronous checkpoints
(DCP), also when it is asked to stop, resumes exactly, and ends with a Hugging Face folder for any other tool.
Left out on purpose: tensor, pipeline and expert parallelism, reinforcement learning.

    python train_llm.py --hf-model Qwen/Qwen2.5-0.5B --dataset my_texts.jsonl   # one CPU process, or all GPUs
    torchrun --nproc_per_node 8 train_llm.py --hf-model meta-llama/Llama-2-7b-hf --dataset my_chats.jsonl
    sbatch --nodes 4 launch_slurm.sh --config configs/train_llm/pretrain_7b.yaml

`grep -n '^# [0-9]'` shows the sections, `grep -n EDIT:` the lines that people change. "(all ranks)" means
that every rank must make the call, because it communicates. At a "sync point" the host waits for the device.
Blocks between `# >>> shared` and `# <<< shared` are the same in the repository's other scripts: edit them in
a copy as you like. Some messages name tools/ and launchers of the repository; nothing here needs them.
"""

import argparse
import bisect
import contextlib
import ctypes
import dataclasses
import errno
import faulthandler
import fcntl
import functools
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import types
import zlib
from argparse import Namespace
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

# FSDP, DCP, transformers, datasets, yaml and tqdm are imported inside the functions that use them: --help and
# wrong flags must not wait for them, and training from scratch never pays for a transformers model class.

IGNORE = -100  # the label of a token that is not trained, the value that torch and transformers use

# >>> shared: errors
NAME = Path(__file__).name  # stands in front of every error


class UserError(Exception):
    """Something that the user can mend: shown as one line, without a traceback, exit code 1."""


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:1 + lines[0].endswith(":")]) if lines else type(error).__name__


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Around a library that reads a file: an error of whatever type becomes one line that names the file."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(f"{what}: {type(error).__name__}: {first_line(error)}") from error
# <<< shared: errors


# ------------------------------------------------------------------------------------------------
# 1. Arguments: the flags, a YAML or JSON file as a saved command line, and every check that needs no data

def build_parser() -> argparse.ArgumentParser:
    parser = open_parser("%(prog)s [--config FILE] (--hf-model NAME | --from-scratch) [other flags]")
    add_model_and_data_flags(parser.add_argument_group("model"), parser.add_argument_group("data"))
    add_training_flags(parser.add_argument_group("training, evaluation and logging"))
    add_lora_flags(parser.add_argument_group("LoRA"))
    add_system_flags(parser.add_argument_group("devices, sharding and memory"), recompute="none")
    add_run_flags(parser.add_argument_group("checkpoints and record"), "checkpoints", save_every=1000)
    return parser


def add_model_and_data_flags(model: argparse._ArgumentGroup, data: argparse._ArgumentGroup) -> None:
    onoff, add = argparse.BooleanOptionalAction, model.add_argument
    add("--hf-model", metavar="NAME_OR_FOLDER", help="train this Hugging Face causal LM")
    add("--from-scratch", action=onoff, default=False, help="train the model of this file")
    add("--model-size", choices=list(MODEL_SIZES), default="7B", help="for --from-scratch")
    add("--vocab-size", type=int, help="from scratch; if not given: --tokenizer's, to a multiple of 64")
    add("--seq-len", type=int, default=2048, help="tokens in a training sequence")
    add("--tokenizer", metavar="NAME_OR_FOLDER", help="if not given: the model's; needed from scratch")
    add("--chat-template", metavar="FILE", help="Jinja chat template in place of the tokenizer's")
    add("--trust-remote-code", action=onoff, default=False, help="run code that comes with the model")
    add = data.add_argument
    add("--dataset", nargs="+", metavar="NAME[:WEIGHT]", help="hub names, folders, or files "
        "(.jsonl .json .txt .csv .parquet .arrow, .gz or .zst behind it); weights are shares of the samples")
    add("--dataset-config", metavar="NAME", help="configuration of a hub data set")
    add("--dataset-split", default="train", help="split to train on")
    add("--text-column", metavar="NAME", help="train on this column as plain text; if not given: messages, "
        "prompt+completion, question+answer, instruction+output are SFT, 'text' is plain text")
    add("--eval-split", metavar="SPLIT_OR_FILE", help="split, or file, that is held out")
    add("--eval-fraction", type=float, default=0.0, help="share of the documents that is held out")
    add("--data-cache", metavar="DIR", default="data_cache", help="tokens that later runs find")
    add("--bad-rows", choices=["stop", "skip"], default="stop", help="skip: list them in a file in "
        "--data-cache, and stop where more than one in a hundred is bad")
    add("--long-chats", choices=["cut", "drop"], default="cut", help="chats of more than --seq-len tokens")
    add("--packing", action=onoff, default=True, help="fill each sequence with several documents")
    add("--mask-documents", action=onoff, help="documents in a pack do not see each other; if not given: on, "
        "except for plain text from scratch")
    add("--streaming", action=onoff, default=False, help="tokenise in file order while training")


def add_training_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--batch-size", type=int, default=4, help="sequences per process and micro-batch")
    add("--grad-accum-steps", type=int, default=1, help="micro-batches per optimizer step")
    add("--max-steps", type=int, help="if not given: --num-epochs x --steps-per-epoch, 100000 at the most")
    add("--num-epochs", type=int, default=1, help="passes over the data")
    add("--steps-per-epoch", type=int, help="if not given: one pass over the data; 1000 with --streaming")
    add("--max-lr", type=float, help="after warm-up; if not given: 3e-4, --hf-model 2e-5, LoRA 2e-4")
    add("--min-lr", type=float, help="at the end; if not given: 3e-5, a tenth of --max-lr at the most")
    add("--schedule", choices=["cosine", "wsd", "constant"], default="cosine", help="after warm-up; wsd: "
        "constant, then straight down in the last fifth")
    add("--warmup-steps", type=int, help="if not given: 2000, a tenth of all steps at the most")
    add("--weight-decay", type=float, default=0.1, help="on matrices; not on norms, biases and embeddings")
    add("--grad-clip", type=float, default=1.0, help="clip the global gradient norm to this; 0: do not")
    add("--loss-chunk-tokens", type=int, metavar="N", help="rows of logits that exist at once; if not given: "
        "512, on GPUs some 2^28 / vocabulary size")
    add("--max-bad-steps", type=int, default=10, help="stop after so many steps in a row without a finite "
        "gradient; such a step changes nothing")
    add("--seed", type=int, default=0, help="of initial weights, sample order, held-out share and dropout")
    add("--log-interval", type=int, default=10, help="steps between logged rows")
    add("--eval-interval", type=int, default=0, help="steps between evaluations; 0: at the end only")


# >>> shared: flags
def open_parser(usage: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME, description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False, usage=usage,
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=34, width=110))
    parser.error = usage_error
    parser.add_argument("--config", metavar="FILE", action="append", default=[],
                        help="YAML or JSON of flags; the command line wins")
    return parser


def add_system_flags(group: argparse._ArgumentGroup, recompute: str) -> None:
    onoff, add = argparse.BooleanOptionalAction, group.add_argument
    add("--device", choices=["auto", "cuda", "cpu"], default="auto", help="auto: GPUs if there are any")
    add("--nproc", type=int, metavar="N", help="start N processes with torchrun; if not given: one per GPU")
    add("--gpu-ranks", metavar="0,2,3", help="use these GPUs of the machine")
    add("--mixed-precision", action=onoff, default=True, help="bf16 compute, fp32 masters")
    add("--use-flash-attn", action=onoff, default=True, help="flash attention kernels")
    add("--hsdp-shard-size", type=int, metavar="N", help="shard over N processes, replicate over the "
        "rest; if not given: shard over all")
    add("--reshard-after-forward", action=onoff, default=True, help="free gathered weights until backward")
    add("--activation-checkpointing", choices=["none", "full", "selective"], default=recompute,
        help="recompute blocks in the backward, to save memory; selective: all but matmuls and attention")
    add("--compile", action=onoff, help="torch.compile each block; if not given: on CUDA only")
    add("--cpu-offload", action=onoff, default=False, help="masters and optimizer in host memory")
    add("--deterministic", action=onoff, default=False, help="the same bits again, on GPUs, too; slower")
    add("--reduce-every-micro-batch", action=onoff, default=False,
        help="reduce gradients after each micro-batch, not once a step: more traffic, less memory")


def add_run_flags(group: argparse._ArgumentGroup, folder: str, save_every: int) -> None:
    onoff, add = argparse.BooleanOptionalAction, group.add_argument
    add("--checkpoint-dir", metavar="DIR", default=folder, help="the run's folder")
    add("--checkpoint-interval", type=int, default=save_every, help="steps between checkpoints; 0: never, "
        "not even at the end")
    add("--keep-checkpoints", type=int, default=3, help="newest checkpoints kept; 0 keeps all")
    add("--keep-best", action=onoff, default=False, help="save before each evaluation, and keep the best one")
    add("--async-checkpoint", action=onoff, default=True, help="write while training goes on")
    add("--resume", default="auto", metavar="{auto,none,FOLDER}", help="auto: --checkpoint-dir's newest")
    add("--stall-timeout", type=float, metavar="SECONDS", default=600.0, help="every rank prints its "
        "stacks when no step ends for so long; after twice that the run ends")
    add("--export", action=onoff, default=True, help="end with a Hugging Face folder")
    add("--tensorboard", action=onoff, default=False, help="needs the tensorboard package")
    add("--wandb", metavar="PROJECT", help="log to this Weights & Biases project (needs wandb)")
# <<< shared: flags


def fill_defaults(args: Namespace) -> None:
    """Fill in what depends on other flags. --dataset becomes one text, as a file has it: 'a:0.7 b/:0.3'."""
    if args.dataset and (len(args.dataset) > 1 or Path(args.dataset[0]).exists()):
        args.dataset = shlex.join(args.dataset)
    elif args.dataset:
        args.dataset = args.dataset[0]
    if args.max_lr is None:
        args.max_lr = 2e-4 if args.lora_rank else 2e-5 if args.hf_model else 3e-4
    if args.min_lr is None:
        args.min_lr = min(3e-5, args.max_lr / 10)


# >>> shared: arguments
def parse_args(argv: list[str] | None = None) -> Namespace:
    """Default < config file < command line. Exits with code 2 and one line for each problem."""
    argv, parser = sys.argv[1:] if argv is None else argv, build_parser()
    for action in parser._actions:
        if action.default not in (None, [], "", argparse.SUPPRESS):
            action.help += " (default: %(default)s)"
    args = parser.parse_args(argv)
    if len(args.config) > 1:
        usage_error("--config is given twice: put all into one file")
    if args.config:
        args = parser.parse_args([*config_tokens(args.config[0], parser), *argv])
    del args.config
    fill_defaults(args)
    if problems := list(find_problems(args)):
        usage_error("\n".join(problems))
    return args


def config_tokens(path: str, parser: argparse.ArgumentParser) -> list[str]:
    """A config file as command-line tokens, so that one parser checks both and the real command line wins."""
    import yaml
    try:
        entries = yaml.safe_load(Path(path).read_bytes())  # JSON is YAML
    except OSError as error:
        usage_error(f"--config {path}: {error.strerror}")
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        usage_error(f"--config {path} is neither YAML nor JSON: {' '.join(str(error).split())}")
    if not isinstance(entries, dict):
        usage_error(f"--config {path}: expected lines of the form 'flag-name: value'")
    tokens = []
    for key, value in entries.items():
        flag = "--" + str(key).replace("_", "-")
        if flag == "--config" or any(token.partition("=")[0] == flag for token in tokens):
            usage_error(f"--config {path}: {key} is not for a file, or stands there twice")
        if isinstance(value, (dict, list)):
            usage_error(f"--config {path}: {key} must be one value, not a {type(value).__name__}")
        if isinstance(value, bool) and "--no-" + flag[2:] in parser._option_string_actions:
            tokens.append(flag if value else "--no-" + flag[2:])
        elif value is not None:
            tokens.append(f"{flag}={value}")
    return tokens


def usage_error(message: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(10)  # torchrun would end local rank 0, which has the same to say, before it has said it
    else:
        for line in message.splitlines():
            print(f"{NAME}: error: {line}", file=sys.stderr)
        print(f"{NAME}: --help lists all flags", file=sys.stderr, flush=True)
    sys.exit(2)
# <<< shared: arguments


# >>> shared: problems
def looks_like_path(name: str) -> bool:
    """A hub name is NAME or OWNER/NAME; anything else is a path."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in DATA_SUFFIXES


def find_common_problems(args: Namespace, positive: str, not_negative: str, sources: str) -> Iterator[str]:
    """Of flags that all scripts have. Names, separated by spaces: of flags that are at least 1, of those that
    are at least 0, of those that take a hub name or a path."""
    at_least = dict.fromkeys(positive.split(), 1) | dict.fromkeys(not_negative.split(), 0)
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        if name in at_least and value is not None and not at_least[name] <= value < 1e12:
            bound = "below 1e12" if value >= 1e12 else f"at least {at_least[name]}"
            yield f"{flag} must be {bound}, not {value}"
        text = str(value)
        if not name.endswith("prompt") and (not text or text[0] == "~" or not text.isprintable()):
            yield f"{flag} {text!r}: empty, unprintable, or with a ~ that only a shell understands"
        if name in sources.split() and value and looks_like_path(value) and not Path(value).exists():
            yield f"{flag} {value}: no such file or folder"
    if args.min_lr > args.max_lr:
        yield f"--min-lr {args.min_lr} is above --max-lr {args.max_lr}: lower --min-lr as well"
    if args.gpu_ranks and not re.fullmatch(r"\d+(,\d+)*", args.gpu_ranks):
        yield f"--gpu-ranks {args.gpu_ranks}: expected numbers with commas, such as 0,2,3"
    if args.chat_template and not Path(args.chat_template).is_file():
        yield f"--chat-template {args.chat_template}: no such file"
    if args.resume not in ("auto", "none") and not (Path(args.resume) / ".metadata").is_file():
        yield f"--resume {args.resume}: not a checkpoint (a folder such as RUN/checkpoints/step_001000)"
    for asked, package in ((args.tensorboard, "tensorboard"), (args.wandb, "wandb")):
        if asked and not importlib.util.find_spec(package):
            yield f"--{package} needs the {package} package: python -m pip install {package}"
    place = Path(args.checkpoint_dir).absolute()
    while not place.exists():
        place = place.parent
    if not (place.is_dir() and os.access(place, os.W_OK)):
        yield f"--checkpoint-dir {args.checkpoint_dir}: cannot write to {place}; choose another folder"
# <<< shared: problems


def find_problems(args: Namespace) -> Iterator[str]:
    """Every argument that cannot work, before anything is downloaded, tokenised or started."""
    positive = ("seq_len batch_size grad_accum_steps num_epochs loss_chunk_tokens max_bad_steps log_interval "
                "max_steps steps_per_epoch nproc hsdp_shard_size vocab_size stall_timeout lora_rank")
    not_negative = ("warmup_steps weight_decay grad_clip keep_checkpoints eval_interval max_lr min_lr "
                    "checkpoint_interval seed")
    yield from find_common_problems(args, positive, not_negative, "hf_model tokenizer")
    yield from find_data_problems(args)
    yield from find_lora_problems(args)
    if args.from_scratch == bool(args.hf_model):
        yield "choose one: --hf-model NAME_OR_FOLDER or --from-scratch"
    if args.lora_rank and args.from_scratch:
        yield "--lora-rank trains beside given weights: it needs --hf-model"
    if args.warmup_steps and args.max_steps and args.warmup_steps > args.max_steps:
        yield f"--warmup-steps {args.warmup_steps} is more than the run's {args.max_steps} steps"
    if (args.eval_interval or args.keep_best) and not (args.eval_fraction or args.eval_split):
        yield "--eval-interval and --keep-best need something held out: --eval-fraction or --eval-split"


def find_data_problems(args: Namespace) -> Iterator[str]:
    if args.from_scratch and not args.tokenizer:
        yield "--from-scratch needs --tokenizer (tools/make_stdlib_data.py trains a small one)"
    if not args.dataset:
        yield "--dataset is missing: a file, a folder or a hub name"
        return
    names, weights = zip(*dataset_names(args))
    for name in names:
        is_path = looks_like_path(name) or data_suffix(Path(name)) or name.endswith("/")
        if is_path and not Path(name).exists():
            yield f"--dataset {name}: no such file or folder"
    if 0 in weights or any(weights) != all(weights):
        yield f"--dataset {args.dataset}: give all of them a weight above 0, or none"
    if args.streaming and (args.bad_rows == "skip" or any(weights)):
        yield "--streaming goes with neither --bad-rows skip nor weights behind the names of --dataset"
    if not 0 <= args.eval_fraction < 1:
        yield "--eval-fraction must be at least 0 and below 1"
    if args.eval_fraction and (args.eval_split or args.streaming):
        yield "--eval-fraction goes with neither --eval-split nor --streaming: use --eval-split alone"
    have_no_splits = any(Path(name).is_file() for name in names)
    if args.dataset_split != "train" and have_no_splits:
        yield f"--dataset-split {args.dataset_split}: {args.dataset} has no splits; leave it out"
    if args.eval_split and not Path(args.eval_split).is_file() and (
            looks_like_path(args.eval_split) or have_no_splits):
        yield (f"--eval-split {args.eval_split}: no such file, and {args.dataset} has no splits; "
               "--eval-fraction cuts one")


# ------------------------------------------------------------------------------------------------
# 2. Distributed: who am I, which device, which mesh; how all ranks agree to stop

# >>> shared: ranks
@dataclasses.dataclass
class Ranks:
    """This process among the others; rank, local_rank and world_size mean what torchrun's variables mean."""
    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def relaunch_under_torchrun(args: Namespace) -> None:
    """Started plainly, with several GPUs or --nproc N: run this same command under torchrun, then exit."""
    # Before CUDA starts, which reads the variable.
    if args.gpu_ranks and os.environ.setdefault("CUDA_VISIBLE_DEVICES", args.gpu_ranks) != args.gpu_ranks:
        usage_error(f"--gpu-ranks {args.gpu_ranks} and CUDA_VISIBLE_DEVICES="
                    f"{os.environ['CUDA_VISIBLE_DEVICES']} disagree: unset one of them")
    num_gpus = 0 if args.device == "cpu" else torch.cuda.device_count()
    nproc = args.nproc or max(1, num_gpus)
    if args.gpu_ranks and num_gpus != len(args.gpu_ranks.split(",")):
        usage_error(f"--gpu-ranks {args.gpu_ranks}: only {num_gpus} of these GPUs exist here")
    if num_gpus and nproc > num_gpus:
        usage_error(f"--nproc {nproc}: this machine shows {num_gpus} GPUs; use --nproc {num_gpus} or fewer")
    if "RANK" in os.environ:
        return
    if os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        usage_error("srun started several of these, which do not know of each other: use launch_slurm.sh")
    if nproc == 1:
        return
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    # Time to save, after a signal that torchrun passes on; torch 2.11 does not read this and gives 30 s.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    # The failing rank has printed one line of its own that says more than the launcher's table.
    logging.disable(logging.ERROR)
    try:
        torchrun(["--standalone", f"--nproc-per-node={nproc}",
                  f"--signals-to-handle={','.join(STOP_SIGNALS)}", "--", *sys.argv])
    except ChildFailedError as error:
        # A rank that failed by itself has a positive exit code; a signal, often torchrun's, ended the others.
        killed = 128 - error.get_first_failure()[1].exitcode
        sys.exit(max((f.exitcode for f in error.failures.values() if f.exitcode > 0), default=killed))
    except SignalException as error:  # Ctrl-C or SIGTERM; the ranks have had it too
        sys.exit(128 + error.sigval)
    sys.exit(0)
# <<< shared: ranks


# >>> shared: process-group
def read_ranks(args: Namespace) -> Ranks:
    """From torchrun's variables, which accelerate and launch_slurm.sh set, too, or alone."""
    names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    with naming(f"the environment's {', '.join(names)}"):
        rank, local_rank, world_size, here = (int(os.environ.get(name, n)) for name, n in names.items())
        if not 0 <= rank < world_size or here < 1:
            raise ValueError(f"no rank {rank} among {world_size} processes, which count from 0; {here} here")
    if "TORCHELASTIC_RUN_ID" in os.environ:  # ranks would outlive a killed torchrun, and go on writing
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    use_cuda = args.device != "cpu" and torch.cuda.is_available()
    if args.device == "cuda" and not use_cuda:
        usage_error("--device cuda: torch sees no GPU here; use --device cpu, or a CUDA build of torch")
    if args.hsdp_shard_size and world_size % args.hsdp_shard_size:
        usage_error(f"--hsdp-shard-size {args.hsdp_shard_size} does not divide the {world_size} processes")
    # The modulo: srun --gpus-per-task shows every task its own device 0.
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if use_cuda else torch.device("cpu")
    return Ranks(rank, local_rank, world_size, device)


def init_distributed(args: Namespace, ranks: Ranks) -> torch.distributed.DeviceMesh:
    """Start the process group (all ranks); returns the mesh: (replicate, shard), or (shard,) without HSDP."""
    from torch.distributed.device_mesh import init_device_mesh
    cuda = ranks.device.type == "cuda"
    if args.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts
        torch.use_deterministic_algorithms(True)  # flash attention's backward, too; cuDNN's is left out
        torch.utils.deterministic.fill_uninitialized_memory = False  # slow, and `prove_filled` looks for it
    # gloo serves tensors in host memory: --cpu-offload keeps the parameters there, an export gathers them.
    # The timeout comes after the stacks of a stalled step, see `stall_after`.
    options = {"backend": "cpu:gloo,cuda:nccl" if cuda else "gloo",
               "timeout": timedelta(seconds=max(1200, 3 * args.stall_timeout))}
    if cuda:
        torch.cuda.set_device(ranks.device)
        options["device_id"] = ranks.device
    if "RANK" not in os.environ:  # alone: no port, no address
        options |= {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
    address = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    try:
        if "RANK" in os.environ:
            socket.getaddrinfo(*address)  # torch would try again until the timeout
        torch.distributed.init_process_group(**options)
    except (OSError, ValueError, TypeError, torch.distributed.DistNetworkError) as error:
        raise UserError(f"no rendezvous at {address[0]}:{address[1]} ({first_line(error)}): tools/doctor.py, "
                        "started in place of this script, says why") from error
    torch.manual_seed(args.seed + ranks.rank)  # for dropout: weights and samples have generators of their own
    # `fully_shard` shards over the mesh's last dimension. A dimension before it makes this HSDP: every row of
    # the mesh, neighbouring ranks, holds a whole model, and gradients are summed over the rows as well.
    shard = args.hsdp_shard_size or ranks.world_size
    shape = (ranks.world_size // shard, shard) if shard < ranks.world_size else (shard,)
    return init_device_mesh(ranks.device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape):])


def compute_dtype(mixed_precision: bool, device: torch.device) -> torch.dtype:
    """bf16 where the device computes in it natively, else fp32 (emulated bf16 is 15 times slower)."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if mixed_precision and native else torch.float32


def all_sum(tensor: Tensor) -> Tensor:
    torch.distributed.all_reduce(tensor)
    return tensor


def gather_objects(value: object, group: object = None) -> list:
    """What each rank has, in the order of the ranks (all ranks)."""
    values = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values
# <<< shared: process-group


# >>> shared: stop
# One rank hears a signal or sees the file RUN/STOP. It votes in the collective that each step has anyway, so
# that all ranks stop after the same step. The reasons and their exit codes:
STOPS = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 138, "SIGHUP": 129, "STOP file": 3}
IS_NOHUP = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
STOP_SIGNALS = [name for name in STOPS if name.startswith("SIG") and not (name == "SIGHUP" and IS_NOHUP)]


def catch_signals(ranks: Ranks) -> set[str]:
    """From here on a signal means: finish the step, save, end. Returns the set of reasons, which it fills.

    Python runs a handler only when the collective returns that the main thread waits in."""
    asked = set()

    def note(number: int, _: object) -> None:
        name = signal.Signals(number).name
        if name == "SIGINT" and name in asked:
            end_now("interrupted twice: ended at once", ranks.is_main, code=130)
        if ranks.is_main and name not in asked:
            again = "; again ends it at once" if name == "SIGINT" else ""
            # Not print, which a handler may have interrupted.
            os.write(2, f"\n{name}: after this step or the next the run is saved, and ends{again}\n".encode())
        asked.add(name)

    for name in STOP_SIGNALS:
        signal.signal(getattr(signal, name), note)
        signal.siginterrupt(getattr(signal, name), False)  # or system calls inside NCCL would fail with EINTR
    return asked


def votes_to_stop(asked: set[str], run_dir: Path, ranks: Ranks) -> Tensor:
    """1 for each of `STOPS` that this rank has (each rank, once a step)."""
    if ranks.is_main and os.path.exists(run_dir / "STOP"):  # Path's own raises where a file system fails
        asked.add("STOP file")
    return torch.tensor([float(name in asked) for name in STOPS], device=ranks.device)


def stall_after(seconds: float | None) -> None:
    """Where no step ends for so long, this process prints its stacks; after twice that SIGALRM ends it.
    Begins anew with each call. None: what follows may take any time."""
    faulthandler.cancel_dump_traceback_later()
    signal.setitimer(signal.ITIMER_REAL, 2 * seconds if seconds else 0)
    if seconds:
        faulthandler.dump_traceback_later(seconds)


def end_now(message: str, show: bool, code: int = 1) -> None:
    """Exit at once, whatever other threads and ranks wait for."""
    if show:
        print(f"\n{NAME}: error: {message}", file=sys.stderr, flush=True)
    os._exit(code)
# <<< shared: stop


# ------------------------------------------------------------------------------------------------
# 3. Data: rows by the datasets library, tokens in its cache, packed samples, one global order

READERS = {".jsonl": "lines", ".ndjson": "lines", ".json": "lines", ".txt": "lines", ".csv": "csv",
           ".parquet": "parquet", ".arrow": "arrow"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
DATA_SUFFIXES = (*READERS, *COMPRESSIONS)
LONE = re.compile("[\ud800-\udfff]")  # a half of a surrogate pair: no text that a tokenizer takes
TRAINED, BEGINS = 1, 2  # marks of a token: the loss asks for it; a document begins with it
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}  # ShareGPT's
# For tokenizers without a chat template (base models): contents and newlines, an end token after each answer.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
)


def data_suffix(path: Path) -> str:
    """'.jsonl' of rows.JSONL.gz; '' of a file of another kind."""
    suffix = Path(re.sub(r"\.(gz|zst)$", "", path.name.lower())).suffix
    return suffix if suffix in READERS else ""


def split_words(path: Path) -> set[str]:
    """Where a split is named: a folder, the stem, its first or last part. Numbers of shards do not count."""
    stem = re.sub(r"([-_.]\d+)?([-_.]of[-_.]\d+)?\.[a-z]+(\.gz|\.zst)?$", "", path.name.lower())
    parts = re.split("[-_.]", stem)
    return {stem, parts[0], parts[-1], *(folder.lower() for folder in path.parts[:-1])}


def data_files(source: Path, split: str) -> tuple[str, list[str], str]:
    """(reader, files of a split in the order of their names, a note on all files). Where nothing in a folder
    is called train, all files without another split's name are."""
    every = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    known, left_out = {}, Counter()
    for path in every:
        inside = path.relative_to(source)
        if any(part.startswith(".") for part in inside.parts):
            left_out["hidden"] += 1
        elif not data_suffix(path):
            left_out["of another kind"] += 1
        else:
            known[path] = split_words(inside)
    named = [path for path, words in known.items() if source.is_file() or split.lower() in words]
    if not named and split == "train":
        others = {"test", "validation", "valid", "val", "dev", "eval"}
        named = [path for path, words in known.items() if not words & others]
    if not named:
        raise UserError(f"{source}: no file of split '{split}' among its {len(known)} data files, which end "
                        f"in {' '.join(READERS)}, or in .gz or .zst behind that")
    reader, *others = {READERS[data_suffix(path)] for path in named}
    if others:
        raise UserError(f"{source} ({split}): JSON or texts beside tables: name them one by one")
    left_out["of another split"] = len(known) - len(named)
    told = "".join(f"{count:,} {why}, " for why, count in left_out.items() if count)
    return reader, [str(path) for path in named], f"{len(named):,} of {len(every):,} files, {told}"


def read_lines(files: list[tuple]) -> Iterator[dict]:
    """Rows as JSON, each with its place: lines, elements of a JSON array, or texts in pieces of some 16 KB of
    whole lines. `_ends` says whether a piece begins its document, and whether it ends it."""
    import pyarrow
    for name, *_ in files:
        compression, suffix = COMPRESSIONS.get(Path(name).suffix.lower()), data_suffix(Path(name))
        with naming(name), io.BufferedReader(pyarrow.input_stream(name, compression=compression)) as file:
            begins = True
            while suffix == ".txt" and (piece := b"".join(file.readlines(1 << 14))):
                row = {"text": piece.decode("utf-8", "replace"), "_ends": [begins, not file.peek(1)]}
                yield {"_where": name, "_line": json.dumps(row).encode()}
                begins = False
            is_array = suffix == ".json" and file.peek(1 << 12).lstrip()[:1] == b"["
            for number, row in enumerate(json.load(file) if is_array else ()):
                yield {"_where": f"{name} row {number}", "_line": json.dumps(row).encode()}
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield {"_where": f"{name}:{number}", "_line": line}


def open_rows(args: Namespace, name: str, split: str, streaming: bool = False) -> tuple[object, str]:
    """(data set of the datasets library, a note on files) of a file, a folder or a hub name."""
    import datasets
    source, cache = Path(name), str(Path(args.data_cache) / "rows")
    try:
        if not source.exists():
            return datasets.load_dataset(name, args.dataset_config, split=split, streaming=streaming), ""
        if any((source / mark).exists() for mark in ("dataset_dict.json", "dataset_info.json")):
            found = datasets.load_from_disk(name)
            found = found[split] if isinstance(found, dict) else found
            return found.to_iterable_dataset() if streaming else found, ""
        reader, files, note = data_files(source, split)
        if reader != "lines":
            return datasets.load_dataset(reader, data_files=files, split="train", cache_dir=cache,
                                         streaming=streaming), note
        # The library's own reader of JSON names no line, and ends at the first bad one.
        types = {"_where": datasets.Value("string"), "_line": datasets.Value("large_binary")}
        stats = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in files]
        known = {"features": datasets.Features(types), "gen_kwargs": {"files": stats}}
        if streaming:
            return datasets.IterableDataset.from_generator(read_lines, **known), note
        return datasets.Dataset.from_generator(read_lines, **known, cache_dir=cache, fingerprint=digest(
            stats, inspect.getsource(read_lines))), note
    except Exception as error:  # the library raises dozens of types; the first cause says what is wrong
        while error.__cause__ and not isinstance(error, UserError):
            error = error.__cause__
        if "corresponds to no data" in str(error):
            raise UserError(f"--dataset {name} ({split}): no document at all") from error
        where = "" if source.exists() else "no such file or folder, and the hub says: "
        raise error if isinstance(error, UserError) else UserError(
            f"--dataset {name} ({split}): {where}{first_line(error)}") from error


def convert_row(row: dict) -> dict | None:  # EDIT: what one of your rows becomes
    """Any form that `to_messages` knows, or a text in --text-column; None leaves the row out."""
    return row


def to_messages(row: dict) -> list[dict] | None:
    """[{'role', 'content'}, …] of a conversation, None for plain text. ValueError: the row is bad."""
    for name in ("messages", "conversations"):
        if name in row:
            return row[name] or []
    for first, last in (("prompt", "completion"), ("question", "answer"), ("instruction", "output")):
        if first in row and last in row:
            asked, said = row[first], row[last]
            if first == "instruction" and row.get("input"):
                asked = f"{asked}\n\n{row['input']}"
            return [*(asked if isinstance(asked, list) else [{"role": "user", "content": asked}]),
                    *(said if isinstance(said, list) else [{"role": "assistant", "content": said}])]
    return None


def read_row(raw: dict) -> dict | None:
    """A row as `convert_row` makes it. Raises ValueError for what is no JSON object."""
    if "_line" not in raw:
        return convert_row(without_nulls(dict(raw)))
    try:
        row = json.loads(raw["_line"])
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise ValueError(f"not JSON ({error}); expected one object a line") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {type(row).__name__}")
    return convert_row(row)


def without_nulls(value: object) -> object:
    """Remove the nulls that Arrow adds for each key that a row lacks, also inside messages and tools."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def read_json(value: object) -> object:
    """What a text holds that is JSON; anything else as it is."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(value) if isinstance(value, str) else value
    return value


def check_messages(found: object, spelt: re.Pattern) -> list[dict]:
    """Messages with texts as contents, roles as templates know them, arguments of tools as objects. A special
    token that others than the assistant spell out is broken by a zero-width space. Raises ValueError."""
    messages, found = [], read_json(found)
    for message in found if isinstance(found, list) and found else [None]:
        message = dict(message) if isinstance(message, dict) else {}
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if isinstance(content, list):
            content = "".join(part["text"] if isinstance(part, dict) else part for part in content)
        if isinstance(content, (int, float)) and not isinstance(content, bool) and abs(content) < math.inf:
            content = str(content)
        for call in message.get("tool_calls") or ():
            function, content = call.get("function", call), content or ""
            if "arguments" in function:
                function["arguments"] = read_json(function["arguments"])
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError("expected messages as a list of objects with 'role' and 'content' texts")
        role = ROLES.get(role, role)
        if role != "assistant":
            content = spelt.sub(lambda found: f"{found[0][0]}\u200b{found[0][1:]}", content)
        messages.append(message | {"role": role, "content": content})
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message of role 'assistant': nothing to train on")
    return messages


def render_chat(tokenizer, messages: list[dict], tools: list | None) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and the character spans in it that are trained: what the assistant writes,
    with the token that ends each turn; not of a message with `weight` 0 or `train` false. Raises ValueError.

    A template with {% generation %} tags says itself what the assistant writes. For any other, turn i is what
    the rendering of messages[:i+1] adds to that of messages[:i] with the generation prompt. Where the whole
    text shows it differently (Qwen3 drops the thoughts of earlier turns), the answer is trained if it stands
    there as it was given, else nothing of this turn."""
    from transformers.utils.chat_template_utils import render_jinja_template
    template = tokenizer.get_chat_template(tools=tools)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = [bool(messages[i].get("weight", 1) and messages[i].get("train", True)) for i in turns]

    show = functools.partial(render_jinja_template, tools=tools, chat_template=template,
                             **tokenizer.special_tokens_map)
    if re.search(r"{%-?\s*generation\b", template):
        [text], [spans] = show([messages], return_assistant_tokens_mask=True)
        if not all(wanted) and len(spans) != len(turns):
            raise ValueError("'weight' or 'train', but not one generation tag for each assistant message")
        return text, spans if all(wanted) else list(itertools.compress(spans, wanted))
    text, spans = show([messages])[0][0], []
    for i in itertools.compress(turns, wanted):
        after, content = show([messages[:i + 1]])[0][0], messages[i]["content"].strip()
        # A conversation that opens with the assistant: what stands before its first words is the template's.
        bare = show([messages[:i]])[0][0] if i else after.partition(content or after)[0]
        prompt = show([messages[:i]], add_generation_prompt=True)[0][0] if i else bare
        start = len(os.path.commonprefix([prompt, after, text]))
        shown = after[start:].rstrip()  # the white space after the token that ends the turn is the template's
        if content and not text.startswith(shown, start):
            shown = content + shown.rpartition(content)[2]
        if start >= len(bare) and text.startswith(shown, start):
            spans.append((start, start + len(shown)))
    return text, spans


@functools.lru_cache(maxsize=1)  # for each row
def special_tokens(tokenizer) -> tuple[list[int], set[int], re.Pattern]:
    """(what the tokenizer puts before a text, ids that can end a turn, a pattern of all special tokens)."""
    special = {token: str(added) for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    bos = [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id][:1]
    ends = {tokenizer.eos_token_id} | {*special} - {tokenizer.bos_token_id}
    longest_first = sorted(special.values(), key=len, reverse=True)
    return bos, ends, re.compile("|".join(map(re.escape, longest_first)) or "$^")


def tokenise(tokenizer, row: dict, chat: bool, text_column: str | None) -> tuple[list, list, bool]:
    """(token ids, for a chat 1 where trained, whether lone surrogates were replaced) of a row. Raises
    ValueError where the row is bad."""
    bos, _, spelt = special_tokens(tokenizer)
    messages = None if text_column else to_messages(row)
    if (messages is not None) != chat:
        raise ValueError("chats and plain texts in one data set; split them, or give --text-column")
    if chat and not tokenizer.is_fast:
        raise ValueError("chats need a tokenizer with a fast version, which tells where its tokens stand in "
                         "the text: pass another --tokenizer")
    if chat:
        messages, tools = check_messages(messages, spelt), read_json(row.get("tools"))
        text, spans = render_chat(tokenizer, messages, tools or None)
    else:
        column = text_column or "text"
        text = row.get(column)
        if not isinstance(text, str):
            raise ValueError(f"no text in column '{column}'; the row has: {', '.join(row)}. Name one with "
                             "--text-column, or use messages, prompt+completion, question+answer or "
                             "instruction+output")
    text, num_lone = LONE.subn("\ufffd", text)
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=chat)
    ids, trained = out["input_ids"], []
    if chat:
        inside = bytearray(len(text))  # 1 for each character that is trained
        for start, stop in spans:
            inside[start:stop] = b"\1" * (stop - start)
        trained = [int(start < stop and 0 not in inside[start:stop])
                   for start, stop in out["offset_mapping"]]
    else:  # of a text that is read in pieces the first one begins it, and the last one ends it
        begins, ends = row.get("_ends", (True, True))
        ids = bos * begins + ids + [tokenizer.eos_token_id] * ends
    if ids[:2] == [tokenizer.bos_token_id] * 2:
        raise ValueError("two beginning-of-text tokens: the template or the text repeats bos_token")
    return ids, trained, num_lone > 0


def encode(raw: dict, number: int, tokenizer, args: Namespace, label: str, chat: bool) -> dict:
    """The document of a row, as `map` calls it. A bad row ends the run; with --bad-rows skip it has no
    tokens, but a `problem`. Chats are cut to the seq_len + 1 tokens that a sample needs."""
    ids, trained, replaced, problem = [], [], False, ""
    try:
        if (row := read_row(raw)) is not None:
            ids, trained, replaced = tokenise(tokenizer, row, chat, args.text_column)
    except Exception as error:  # a row may hold anything
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        problem = f"{raw.get('_where') or f'{label} row {number}'}: {kind}{first_line(error)}"
        if args.bad_rows == "stop":
            raise ValueError(f"{problem} (--bad-rows skip leaves out one in a hundred)") from error
    if chat:
        ids, trained = ids[:args.seq_len + 1], trained[:args.seq_len + 1]
    _, ends, _ = special_tokens(tokenizer)
    return {
        "ids": ids, "trained": trained, "problem": problem, "replaced": replaced,
        "length": len(ids), "largest": max(ids, default=0),
        "crc": zlib.crc32(bytes(trained), zlib.crc32(array("q", ids))),
        "num_trained": sum(trained[1:]) if chat else len(ids),  # nothing predicts a chat's first token
        "ends": any(flag and token in ends for token, flag in zip(ids[1:], trained[1:]))}


def column_types() -> tuple[dict, dict]:
    """(columns of a document, see `encode`; columns of a sample, see `pack`) for the datasets library."""
    from datasets import Features, Sequence, Value
    ids, flags, number = Sequence(Value("int32")), Sequence(Value("uint8")), Value("int64")
    return Features({"ids": ids, "trained": flags, "problem": Value("string"), "length": number,
                     "largest": number, "crc": number, "num_trained": number, "ends": Value("bool"),
                     "replaced": Value("bool")}), Features({"ids": ids, "marks": flags})


def has_chats(args: Namespace, rows) -> bool:
    """Whether the rows are chats: the first one that can be read decides."""
    for raw in itertools.islice(rows, 0 if args.text_column else 1000):
        with contextlib.suppress(Exception):  # `encode` will name the row
            if (row := read_row(raw)) is not None:
                return to_messages(row) is not None
    return False


def load_tokenizer(args: Namespace):
    """--tokenizer, or the model's own, with a chat template and an end-of-text token."""
    from transformers import AutoTokenizer
    folder = fetch(args.tokenizer or args.hf_model)
    with naming(f"no usable tokenizer in {folder}, pass --tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=args.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no end-of-text token (eos_token): set one in its "
                        "tokenizer_config.json, or the model could never learn to stop")
    if args.chat_template:
        tokenizer.chat_template = Path(args.chat_template).read_text(encoding="utf-8")
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    tokenizer.model_max_length = int(1e30)  # long documents are cut here, not by the tokenizer
    return tokenizer


# >>> shared: hub
@functools.lru_cache  # a hub name costs a round trip for each of its files
def fetch(name: str) -> Path:
    """The local folder of a model or tokenizer. A hub name is downloaded once per node: its other ranks wait
    on the lock that the hub's library has for each file."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    wanted = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py"]
    try:
        get = functools.partial(snapshot_download, name, ignore_patterns=["original/*", "consolidated*"])
        folder = Path(get(allow_patterns=wanted))
        return folder if any(folder.glob("*.safetensors")) else Path(get(allow_patterns=[*wanted, "*.bin"]))
    except Exception as error:  # offline, gated, private, no space: the hub's library has dozens of types
        raise UserError(f"{name}: no such folder, and https://huggingface.co/{name} could not be fetched "
                        f"({first_line(error)}). Is it gated? Accept its licence there. Gated or private: "
                        "hf auth login") from None
# <<< shared: hub


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def tokenizer_identity(tokenizer) -> str:
    inner = (tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else
             (sorted(tokenizer.get_vocab().items()), inspect.getsource(type(tokenizer))))
    return digest(inner, tokenizer.chat_template, tokenizer.special_tokens_map)


@contextlib.contextmanager
def one_at_a_time(args: Namespace) -> Iterator[None]:
    """One process of a machine works, the others wait at the lock and find its files. No process group exists
    yet: hours of tokenising meet no timeout. A process that dies frees the lock."""
    import datasets
    datasets.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    Path(args.data_cache).mkdir(parents=True, exist_ok=True)
    with (Path(args.data_cache) / "lock").open("w") as lock:
        with contextlib.suppress(OSError):  # some network file systems lock nothing: work may be done twice
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cached_map(args: Namespace, rows, function: Callable, known: tuple, **options: object):
    """`rows` mapped, from --data-cache or made now; their old columns are gone. The key is `known`, and the
    text of this section, so that no edit of it meets rows of before."""
    section = re.findall(r"(?ms)^# 3\. .*?(?=^# 4\. )", Path(__file__).read_text(encoding="utf-8"))
    key = digest(section, *known)
    path = Path(args.data_cache).absolute() / f"{function.__name__}-{key}.arrow"
    try:
        return rows.map(function, remove_columns=rows.column_names, cache_file_name=str(path),
                        new_fingerprint=key, **options)
    except ValueError as error:  # of `encode`, perhaps in another process, which knows no UserError of ours
        raise UserError(first_line(error)) from error


def column(tokens, name: str):
    """The numbers of a column, as an array."""
    return tokens.with_format("numpy")[name][:]


def open_tokens(args: Namespace, tokenizer, name: str, split: str) -> tuple[object, bool, str]:
    """(documents, as `encode` makes them; chats or not; a line to print)."""
    label = f"{name} ({split})"
    rows, files = open_rows(args, name, split)
    if not len(rows):
        raise UserError(f"{label}: no document at all")
    chat = has_chats(args, rows)
    known = (rows._fingerprint, tokenizer_identity(tokenizer), args.text_column, chat and args.seq_len)
    workers = min(len(os.sched_getaffinity(0)), len(rows) // 10_000)
    tokens = cached_map(args, rows, encode, known, with_indices=True, features=column_types()[0],
                        num_proc=workers if workers > 1 else None, desc=f"tokenising {label}", fn_kwargs={
                            "tokenizer": tokenizer, "args": args, "label": label, "chat": chat})
    return tokens, chat, f"read       {label}: {files}{check_tokens(args, tokens, chat, label)}"


def check_tokens(args: Namespace, tokens, chat: bool, label: str) -> str:
    """A note on what was read, left out and cut. Raises UserError where training would be silently wrong."""
    length, trained, ends = (column(tokens, name) for name in ("length", "num_trained", "ends"))
    problems = [text for text in tokens.unique("problem") if text]
    if problems and (args.bad_rows == "stop" or len(problems) * 100 > len(tokens)):
        raise UserError(f"{problems[0]} ({len(problems):,} of {len(tokens):,} rows are bad: --bad-rows skip "
                        "takes one in a hundred)")
    is_long = (length > args.seq_len) & chat
    keep = (trained > 0) & ~(is_long & (args.long_chats == "drop"))
    wrong = {
        "no token is trained: does the chat template mark what the assistant says?": not keep.any(),
        "every token is trained, prompts too: the template's generation tags enclose all":
            chat and (trained[keep] == length[keep] - 1).all(),
        "no end token is ever trained, so the model would never stop: the chat template must end what the "
        "assistant says with eos_token or another special token": chat and not ends[keep].any()}
    if found := [text for text, is_so in wrong.items() if is_so]:
        raise UserError(f"{label}: {found[0]} (tools/show_batch.py shows the rows; --seq-len {args.seq_len} "
                        f"cuts {is_long.sum():,} of {len(tokens):,} chats)")
    listed = Path(args.data_cache) / f"bad_rows-{tokens._fingerprint}.txt"
    if problems:
        listed.write_text("\n".join(problems) + "\n", encoding="utf-8", errors="backslashreplace")
    told = {f"bad rows left out, see {listed}": len(problems), "cut to --seq-len": (is_long & keep).sum(),
            "left out with nothing to train": (trained == 0).sum() - len(problems),
            "left out as longer than --seq-len": ((trained > 0) & ~keep).sum(),
            "with lone surrogates, replaced": column(tokens, "replaced").sum()}
    return f"{length[keep].sum():,} tokens in {len(tokens):,} rows" + "".join(
        f"; {count:,} {why}" for why, count in told.items() if count)


def dataset_names(args: Namespace) -> list[tuple[str, float | None]]:
    """(name, weight or None) of each --dataset."""
    found = []
    for entry in shlex.split(args.dataset):
        match = re.fullmatch(r"(.+):(\d+\.?\d*|\.\d+)", entry)
        found.append((match[1], float(match[2])) if match and not Path(entry).exists() else (entry, None))
    return found


def prepare_data(args: Namespace) -> dict:
    """Tokens of all rows: {"train", "eval": [(documents, weight)], "chat": whether there are chats, "notes":
    lines to print, "vocab_size" that the documents need, "identity" of the documents}."""
    tokenizer, names = load_tokenizer(args), dataset_names(args)
    data = {"train": [], "eval": [], "chat": False, "notes": []}
    wanted = [] if args.streaming else [("train", name, args.dataset_split, weight) for name, weight in names]
    if args.eval_split:
        sources = [(args.eval_split, None)] if Path(args.eval_split).is_file() else names
        wanted += [("eval", name, args.eval_split, None) for name, _ in sources]
    with one_at_a_time(args):
        for target, name, split, weight in wanted:
            tokens, chat, note = open_tokens(args, tokenizer, name, split)
            data["notes"].append(note)
            data["chat"] |= chat
            if args.eval_fraction:  # drawn by content: what stands in the data twice is never on both sides
                drawn = (column(tokens, "crc") ^ args.seed) * 2654435761 % 2**32  # Knuth's hash; may overflow
                is_held = drawn < args.eval_fraction * 2**32
                data["eval"].append((tokens.select(is_held.nonzero()[0]), None))
                tokens = tokens.select((~is_held).nonzero()[0])
            data[target].append((tokens, weight))
        for name, _ in names if args.streaming else ():
            data["chat"] |= has_chats(args, open_rows(args, name, args.dataset_split, streaming=True)[0])
    every = [tokens for tokens, _ in data["train"] + data["eval"]]
    if not all(map(len, every)):
        raise UserError(f"--eval-fraction {args.eval_fraction} holds out nothing, or all, of "
                        f"{sum(map(len, every)):,} documents: change it")
    largest = max((int(column(tokens, "largest").max()) for tokens in every), default=0)
    # Of documents, whatever their files are called and whoever tokenised them.
    content = [digest(len(tokens), zlib.crc32(column(tokens, "crc").tobytes())) for tokens in every]
    return data | {
        "identity": digest(content, [weight for _, weight in names],
                           tokenizer_identity(tokenizer) if args.streaming else ""),
        "vocab_size": len(tokenizer) if args.from_scratch or args.streaming else largest + 1}


def pack(rows: dict[str, list], args: Namespace) -> dict[str, list]:
    """The samples of a batch of documents, as `map` calls it: ids (of T inputs and of the last one's label)
    and their marks.

    Documents are cut into pieces of at most seq_len inputs, several to a sample (best fit) or, without
    packing, one. No label crosses pieces: `end` stands for the label that a full sample's last input lacks.
    But plain text with packing is a single stream, in which that label is the next token."""
    def join(parts: list[tuple]) -> list[list[int]]:
        return [list(itertools.chain.from_iterable(part[k] for part in parts)) for k in (0, 1)]

    T, chat, end = args.seq_len, any(rows["trained"]), [0]
    documents, samples = [], {"ids": [], "marks": []}
    for ids, trained, num_trained in zip(rows["ids"], rows["trained"], rows["num_trained"]):
        if num_trained and not (chat and len(ids) > T and args.long_chats == "drop"):
            text_marks = [BEGINS | TRAINED] + [TRAINED] * (len(ids) - 1)
            documents.append((ids, [BEGINS, *trained[1:]] if chat else text_marks))
    if args.packing and not chat:
        documents, end = [join(documents)], []
    pieces = [(ids[first:first + T + 1], marks[first:first + T + 1])
              for ids, marks in documents for first in range(0, len(ids) - 1, T)]
    sizes = [min(len(ids), T) for ids, _ in pieces]
    for chosen in pack_best_fit(sizes, T) if args.packing else [[i] for i in range(len(pieces))]:
        ids, marks = join([pieces[i] for i in chosen])
        samples["ids"].append((ids + end)[:T + 1])
        samples["marks"].append((marks + end)[:T + 1])
    return samples


def pack_best_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: bins of indices whose sizes sum to at most `capacity`."""
    rooms, bins = [], []  # (room left, number) of each bin that is not full, in order
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        tightest = bisect.bisect_left(rooms, (sizes[i], 0))
        room, number = rooms.pop(tightest) if tightest < len(rooms) else (capacity, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(i)
        if room > sizes[i]:
            bisect.insort(rooms, (room - sizes[i], number))
    return bins


class TokenDataset:
    """Samples of `pack`, of one data set or of several (documents, weight).

    Without weights a pass takes each sample once. Weights are shares of a pass's samples; each part goes on
    where the pass before left it, and takes every sample before any twice."""

    def __init__(self, parts: list[tuple], args: Namespace) -> None:
        self.args, self.tables, weights = args, [], [weight for _, weight in parts]
        with one_at_a_time(args):
            for tokens, _ in parts:
                known = (tokens._fingerprint, args.seq_len, args.packing, args.long_chats)
                size = max(1_000_000, 256 * args.seq_len)  # tokens of a batch: its last sample is not full
                mean = max(1, int(column(tokens, "length").mean()))
                packed = cached_map(args, tokens, pack, known, batched=True, batch_size=size // mean + 1,
                                    desc="packing", features=column_types()[1], fn_kwargs={"args": args})
                self.tables.append(packed.data.table)
        self.sizes = [len(table) for table in self.tables]
        if not all(self.sizes):
            raise UserError("data without two tokens in a row: nothing to learn")
        self.counts = [size if weight is None else round(sum(self.sizes) * weight / sum(weights))
                       for size, weight in zip(self.sizes, weights)]

    def __len__(self) -> int:
        return sum(self.counts)

    def sample(self, i: int, epoch: int = 0) -> dict[str, Tensor]:
        for table, size, count in zip(self.tables, self.sizes, self.counts):
            if i < count:
                if count != size:  # in steps of some 0.6 of its size that have no divisor in common with it
                    step = next(n for n in itertools.count(int(0.618 * size) + 1) if math.gcd(n, size) == 1)
                    i = (epoch * count + i) * step % size
                # Three times as fast as the library's with_format("torch").
                return unpack({name: torch.from_numpy(table[name][i].values.to_numpy().astype("int64"))
                               for name in table.column_names}, self.args)
            i -= count
        raise IndexError(i)

    __getitem__ = sample


def unpack(row: dict[str, Tensor], args: Namespace) -> dict[str, Tensor]:
    """A sample of `pack` as input_ids, labels (next token or -100) and position_ids, each (T,) int64, with
    --packing padded on the right to seq_len. With --mask-documents positions start again at each document, by
    which attention tells them apart."""
    ids, marks, length = row["ids"], row["marks"], args.seq_len if args.packing else 0
    labels, positions = ids[1:].masked_fill(marks[1:] & TRAINED == 0, IGNORE), torch.arange(len(ids) - 1)
    if args.mask_documents:
        labels[marks[1:] & BEGINS > 0] = IGNORE
        positions -= (positions * (marks[:-1] & BEGINS > 0)).cummax(0).values
    # Padding is no position: rotary factors that depend on the largest one (Phi-4) must not see it.
    return {"input_ids": pad_to(ids[:-1], length, 0), "labels": pad_to(labels, length, IGNORE),
            "position_ids": pad_to(positions, length, 0)}


def pad_to(tensor: Tensor, length: int, value: int) -> Tensor:
    return F.pad(tensor, (0, length - len(tensor)), value=value) if len(tensor) < length else tensor


def collate(samples: list[dict[str, Tensor]], args: Namespace, device: torch.device) -> dict[str, Tensor]:
    """(B, T) on the device, padded on the right; position_ids only where documents must be told apart, and on
    CUDA cu_seqlens (`document_bounds`) with them, so that nobody waits for the device to learn them."""
    T = max(len(sample["input_ids"]) for sample in samples)
    if device.type == "cuda":  # kernels are planned, and graphs compiled, for each new T
        T = max(T, min(args.seq_len, math.ceil(T / 128) * 128))
    several = args.mask_documents and any((sample["position_ids"][1:] == 0).any() for sample in samples)
    fill_with = {"input_ids": 0, "labels": IGNORE} | ({"position_ids": 0} if several else {})
    batch = {key: torch.stack([pad_to(sample[key], T, value) for sample in samples])
             for key, value in fill_with.items()}
    if device.type == "cuda":
        if several:
            batch["cu_seqlens"] = document_bounds(batch["position_ids"])
        return {key: value.pin_memory().to(device, non_blocking=True) for key, value in batch.items()}
    return batch


# >>> shared: order
@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def epoch_order(num_samples: int, seed: int, epoch: int) -> Tensor:
    # crc32, not hash(): Python salts the hashes of texts in each process anew.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {epoch}".encode()))
    return torch.randperm(num_samples, generator=generator)


def sample_at(position: int, num_samples: int, seed: int) -> int:
    """The sample at a position of the endless global order, a function of seed and epoch only.

    Ranks and batch size do not enter: all a resume must know, on any number of ranks, is the position."""
    epoch, index = divmod(position, num_samples)
    return int(epoch_order(num_samples, seed, epoch)[index])
# <<< shared: order


def ordered_batches(dataset: TokenDataset, args: Namespace, ranks: Ranks, start: int) -> Iterator[dict]:
    """This rank's micro-batches from global position `start` on: ranks take turns of --batch-size samples."""
    B, position, size = args.batch_size, start + ranks.rank * args.batch_size, len(dataset)
    while True:
        positions = range(position, position + B)
        samples = [dataset.sample(sample_at(p, size, args.seed), p // size) for p in positions]
        yield collate(samples, dataset.args, ranks.device)
        position += B * ranks.world_size


def open_stream(args: Namespace, ranks: Ranks):
    """One epoch of this rank's samples of --streaming: every world_size-th file or row, in order, of one data
    set after the other."""
    import datasets
    tokenizer, (columns, features), samples = load_tokenizer(args), column_types(), []
    for name, _ in dataset_names(args):
        rows, _ = open_rows(args, name, args.dataset_split, streaming=True)
        known = {"tokenizer": tokenizer, "args": args, "label": f"{name} ({args.dataset_split})",
                 "chat": has_chats(args, rows)}
        # The library's split_dataset_by_node would tokenise all rows on each rank.
        mine = rows.shard(ranks.world_size, ranks.rank) if rows.num_shards % ranks.world_size == 0 else (
            rows.filter(lambda _, number: number % ranks.world_size == ranks.rank, with_indices=True))
        documents = mine.map(encode, with_indices=True, fn_kwargs=known, features=columns,
                             remove_columns=list(next(iter(rows), {})))
        samples.append(documents.map(pack, batched=True, batch_size=256, fn_kwargs={"args": args},
                                     features=features, remove_columns=list(columns)))
    return datasets.concatenate_datasets(samples)


def streamed_batches(args: Namespace, ranks: Ranks, state: dict) -> Iterator[dict]:
    """This rank's micro-batches of --streaming, epoch after epoch. `state`, the library's, is kept up to
    date, so that a checkpoint of it resumes exactly."""
    stream, samples = open_stream(args, ranks).repeat(None).with_format("torch"), []
    if state:
        stream.load_state_dict(state["library"])
    try:
        for row in stream:
            samples.append(unpack(row, args))
            if len(samples) == args.batch_size:
                state["library"] = stream.state_dict()
                yield collate(samples, args, ranks.device)
                samples = []
    except ValueError as error:  # of `encode`
        raise UserError(first_line(error)) from error
    raise UserError(f"--dataset {args.dataset}: no row for rank {ranks.rank} of {ranks.world_size}")


# ------------------------------------------------------------------------------------------------
# 4. Model: the decoder of this file, or any causal LM of transformers; shard, materialise, fill, prove

# Layers, hidden size, heads, key-value heads, feed-forward width. The last two are chosen so that each name
# is true within 2 % with a vocabulary of 32,000 (input and output embeddings are separate).
MODEL_SIZES = {
    "test": (2, 64, 4, 2, 192),
    "quickstart": (4, 128, 4, 2, 384),
    "125M": (12, 768, 12, 4, 2048),
    "350M": (24, 1024, 16, 8, 2816),
    "1B": (24, 2048, 16, 4, 4096),
    "3B": (28, 3072, 24, 8, 8192),
    "7B": (32, 4096, 32, 8, 13824),
    "13B": (40, 5120, 40, 8, 16640),
    "30B": (60, 6656, 52, 4, 19968),
    "70B": (80, 8192, 64, 8, 29184),
}


def decoder_config(sizes: tuple, vocab_size: int = 32000, max_positions: int = 2048) -> Namespace:
    """What the model of this file is made from, by the names of transformers' LlamaConfig, as which it is
    exported; the import of that one takes a second."""
    num_layers, hidden_size, num_heads, num_kv_heads, ffn_size = sizes
    config = Namespace(
        num_hidden_layers=num_layers, hidden_size=hidden_size, num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads, head_dim=hidden_size // num_heads, intermediate_size=ffn_size,
        vocab_size=vocab_size, max_position_embeddings=max_positions, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"])
    config.get_text_config = lambda: config  # as transformers' configurations have it
    return config


# HACK(torch 2.11): its varlen_attn takes fewer key-value heads by default; later versions need enable_gqa.
VARLEN_OPTIONS = {} if torch.__version__.startswith("2.11") else {"enable_gqa": True}


def varlen_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None,
                     dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None,
                     cu_seqlens: Tensor | None = None, **options: object) -> tuple[Tensor, None]:
    """Causal attention within the documents that `document_bounds` tells apart, by flash attention's kernels,
    which need no (T, T) mask; without bounds a row is one document. As transformers' models call it: (B, H,
    T, D), keys and values with H or fewer heads -> (B, T, H, D). Raises ValueError for what the kernel does
    not have; `prove_packing` then takes masks."""
    from torch.nn.attention.varlen import varlen_attn
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if unknown or dropout or attention_mask is not None or not getattr(module, "is_causal", True):
        raise ValueError(f"no variable-length attention with {unknown or 'dropout, a mask or without order'}")
    B, _, T, D = query.shape
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, B * T + 1, T, device=query.device, dtype=torch.int32)
    q, k, v = (x.transpose(1, 2).reshape(B * T, -1, D) for x in (query, key, value))
    window = (sliding_window - 1 if sliding_window else -1, 0)
    options = VARLEN_OPTIONS | {"scale": scaling, "window_size": window}
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, T, T, **options).view(B, T, -1, D), None


class Attention(nn.Module):  # grouped-query, with rotary positions
    def __init__(self, c) -> None:
        super().__init__()
        self.head_dim, kv_size = c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: tuple, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cu_seqlens is not None:
            return self.o_proj(varlen_attention(self, q, k, v, None, cu_seqlens=cu_seqlens)[0].flatten(2))
        if mask is not None or (x.is_cuda and x.dtype == torch.float32):
            # On a GPU only flash attention takes fewer key-value heads; the whole scores would be made.
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):  # SwiGLU
    def __init__(self, c) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)

    def forward(self, x: Tensor, rotary: tuple, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cu_seqlens)
        return x + self.mlp(self.post_attention_layernorm(x))


class CausalLM(nn.Module):
    """The model of --from-scratch, its parameters named as in transformers' LlamaForCausalLM."""

    def __init__(self, c) -> None:
        super().__init__()
        self.config, self.loss_chunk = c, 512  # rows of logits at once, see `rows_at_once`
        self.head_loss = head_loss  # or its compiled form, see `ready_model`
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(c.vocab_size, c.hidden_size),
            "layers": nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers)),
            "norm": nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps),
        })
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, position_ids: Tensor | None = None,
                cu_seqlens: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, T, V), or with labels (B, T) `chunked_loss` of them."""
        x = self.model.embed_tokens(input_ids)
        if not (x.dtype == torch.bfloat16 and torch.backends.cuda.flash_sdp_enabled()):
            cu_seqlens = None  # flash attention's kernels are for these alone
        mask = document_mask(position_ids) if position_ids is not None and cu_seqlens is None else None
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=x.device)[None]
        theta = self.config.rope_parameters["rope_theta"]
        rotary = rotary_table(position_ids, self.config.head_dim, theta, x.dtype)
        for layer in self.model.layers:
            x = layer(x, rotary, mask, cu_seqlens)
        hidden = self.model.norm(x)
        if labels is None:
            return self.lm_head(hidden)
        return chunked_loss(hidden, labels, self.lm_head, self.head_loss, self.loss_chunk)


def rotary_table(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype
                 ) -> tuple[Tensor, Tensor]:
    """cos, sin (B, 1, T, head_dim), in fp32 until the end. Su et al. 2021, arXiv:2104.09864, half-split."""
    even = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32)
    angle = position_ids[:, None, :, None].float() * theta ** -(even / head_dim)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def document_mask(position_ids: Tensor) -> Tensor:
    """(B, 1, T, T) bool: a token looks at earlier tokens of its own document (one starts at each 0)."""
    document = (position_ids == 0).cumsum(dim=1)
    T = position_ids.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=position_ids.device).tril()
    return ((document[:, :, None] == document[:, None, :]) & causal)[:, None]


def document_bounds(position_ids: Tensor) -> Tensor:
    """Where documents begin in the flattened (B, T), and its end: (N + 1,) int32, as `varlen_attn` takes it.

    A document starts at each position 0; zeros at the end of a row are padding, taken together. The end is
    repeated until N is a power of two, so that compiled kernels meet few different sizes."""
    is_padding = (position_ids.flip(1).cumsum(1) == 0).flip(1)
    starts = position_ids == 0
    starts[:, 1:] &= ~(is_padding[:, 1:] & is_padding[:, :-1])
    bounds = F.pad(starts.flatten().nonzero()[:, 0], (0, 1), value=position_ids.numel())
    size = 1 + 2 ** math.ceil(math.log2(len(bounds) - 1))
    return F.pad(bounds, (0, size - len(bounds)), value=position_ids.numel()).int()


def build_model(args: Namespace, folder: Path | None, vocab_size: int) -> nn.Module:
    """The model on the meta device: shapes, no memory. `folder` holds the Hugging Face model, if any. To
    freeze or replace a part, do it here: later, FSDP has replaced the parameters."""
    if folder is None:
        if args.vocab_size and args.vocab_size < vocab_size:
            raise UserError(f"--vocab-size {args.vocab_size}: the tokenizer has {vocab_size} tokens")
        size = args.vocab_size or math.ceil(vocab_size / 64) * 64
        with torch.device("meta"):
            return CausalLM(decoder_config(MODEL_SIZES[args.model_size], size, args.seq_len))
    import transformers
    with naming(f"--hf-model {args.hf_model}"), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=args.trust_remote_code)
        limit = getattr(config, "max_position_embeddings", None)
        if limit and args.seq_len > limit:
            raise UserError(f"--seq-len {args.seq_len}: {args.hf_model} knows {limit} positions; "
                            f"use --seq-len {limit}")
        refuse_quantised(folder, config)
        config.use_cache = False  # keys and values are kept for generation only
        model = note_fp32(transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, trust_remote_code=args.trust_remote_code))
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < vocab_size:
        raise UserError(f"{args.hf_model} embeds {rows} tokens, the data hold token {vocab_size - 1}: "
                        "use its own tokenizer")
    attach_chunked_loss(model)
    return model


def attach_chunked_loss(model: nn.Module) -> None:
    """Give a transformers model the call of `CausalLM`: logits, or with labels `chunked_loss` of them."""
    full_forward, head, config = model.forward, model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None) or 0.0
    # What a mixture of experts adds to its mean loss where its config asks for it: so much of the
    # load-balancing loss over a micro-batch (Fedus et al. 2021, arXiv:2101.03961, eq. 4 to 6).
    balance = getattr(config, "output_router_logits", False) and (
        getattr(model, "router_aux_loss_coef", None) or getattr(config, "aux_loss_coef", None))
    base = base_of(model)
    model.whole_logits, model.loss_chunk = bool(head is None or base is model or balance), 512
    model.head_loss = functools.partial(head_loss, scale=scale, cap=cap)

    # As an attribute, not as a wrapping module: parameter names stay those of the files on disk.
    def forward(input_ids: Tensor, labels: Tensor | None = None, **call: object) -> Tensor | tuple:
        call |= {"input_ids": input_ids, "use_cache": False}
        if config._attn_implementation != "varlen":
            call.pop("cu_seqlens", None)
        if labels is not None and not model.whole_logits:
            return chunked_loss(base(**call)[0], labels, head, model.head_loss, model.loss_chunk)
        out = full_forward(**call)
        if labels is None:
            return out.logits
        sums = loss_terms(out.logits.flatten(0, 1), labels.flatten())
        loss = weigh(sums)
        if balance:
            loss = loss + balance * out.aux_loss * (labels != IGNORE).sum()
        return loss, sums.detach()

    model.forward = forward


# >>> shared: shard
def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks: modules of `_no_split_modules`, outermost only; else the longest ModuleList."""
    names = set(getattr(model, "_no_split_modules", None) or ["Block"])  # EDIT: the layer class to shard
    blocks = [m for m in model.modules() if type(m).__name__.removeprefix("FSDP") in names]
    inner = {id(part) for block in blocks for part in block.modules() if part is not block}
    if blocks:
        return [block for block in blocks if id(block) not in inner]
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UserError("no transformer blocks found: the model has no list of layers")
    return list(max(lists, key=len))


def shard_model(model: nn.Module, args: Namespace, mesh: torch.distributed.DeviceMesh,
                dtype: torch.dtype) -> None:
    """Recompute, compile and shard each block, then the root, in this order (all ranks).

    The order lets compile see the recomputation and keeps FSDP's hooks out of its graphs. A sharded block is
    gathered and freed as one unit; the root takes what is left: embeddings, norm, head."""
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy
    from torch.distributed.fsdp import fully_shard
    for enable in (torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.enable_cudnn_sdp):
        enable(args.use_flash_attn)
    cuda = mesh.device_type == "cuda"
    options = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=cuda) if args.cpu_offload else OffloadPolicy(),
        # One device has nothing to gather from others: freeing would mean casting the masters again. Frozen
        # weights, which are in the compute precision, would stand there twice.
        "reshard_after_forward": args.reshard_after_forward and (
            mesh.size(-1) > 1 or hasattr(model, "peft_config")),
    }
    for module in list(fp32_modules(model)) if dtype != torch.float32 else ():
        in_fp32 = MixedPrecisionPolicy(torch.float32, torch.float32, cast_forward_inputs=False)
        fully_shard(module, **options | {"mp_policy": in_fp32})
    blocks = find_blocks(model)
    if max(Counter(id(param) for block in blocks for param in block.parameters()).values()) > 1:
        raise UserError(f"blocks of {type(model).__name__} share parameters with each other, which FSDP "
                        "cannot shard: this family cannot be trained here")
    for block in blocks:
        if args.activation_checkpointing != "none":
            recompute_in_backward(block, selective=args.activation_checkpointing == "selective")
        if args.compile or (args.compile is None and cuda):
            block.compile()
        fully_shard(block, **options)
    # The root is never resharded after forward: the backward begins with the head.
    fully_shard(model, **options | {"reshard_after_forward": None})
    for module in model.modules() if mesh.size() > 1 else ():
        if isinstance(module, FSDPModule):
            # FSDP divides by the number of ranks by default. Here gradients are plain sums, divided once, by
            # what the loss is a mean over, counted on all ranks after the last micro-batch (`reduce_stats`).
            # Without the forced sum FSDP asks for a pre-multiplied one, which gloo does not have.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
# <<< shared: shard


# >>> shared: precision
def note_fp32(model: nn.Module) -> nn.Module:
    """An hf model on the meta device, built in bf16, as fp32 masters, with the names of those tensors that
    transformers keeps in fp32 in a bf16 model (routers and score biases of mixtures of experts)."""
    patterns = [pattern.replace("*", ".*") for pattern in model._keep_in_fp32_modules_strict or ()]
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    model.fp32_names = {name for name, tensor in tensors if tensor.dtype == torch.float32
                        or any(re.search(pattern, name) for pattern in patterns)}
    return model.float()


def fp32_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules whose parameters are all kept in fp32: they are gathered, and compute, in it."""
    kept, inner = getattr(model, "fp32_names", ()), set()
    for path, module in model.named_modules() if kept else ():
        names = [f"{path}.{name}" for name, _ in module.named_parameters()]
        if names and kept.issuperset(names) and id(module) not in inner:
            inner.update(map(id, module.modules()))
            yield module


def reshard(model: nn.Module) -> None:
    """Free the gathered weights after a forward that no backward follows, which would do this: parameters are
    this rank's part of the masters again."""
    from torch.distributed.fsdp import FSDPModule
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def recompute_in_backward(block: nn.Module, selective: bool) -> None:
    """Activation checkpointing by replacing the block's forward, so that no parameter changes its name.

    A method of a module-level function: anything else would keep `block.compile()` from compiling the block
    (pytorch#135816), or give each block a graph of its own."""
    block.forward, block.is_selective = types.MethodType(recomputed, block), selective


def recomputed(block: nn.Module, *args: object, **kwargs: object) -> object:
    from torch.utils.checkpoint import checkpoint
    kwargs |= {"context_fn": expensive_kept} if block.is_selective else {}
    return checkpoint(type(block).forward, block, *args, use_reentrant=False, **kwargs)


def expensive_kept() -> tuple:
    from torch.utils.checkpoint import create_selective_checkpoint_contexts
    kinds = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
    kept = [getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default for kind in kinds]
    if hasattr(torch.ops.torch_attn, "_varlen_attn"):
        kept.append(torch.ops.torch_attn._varlen_attn.default)
    return create_selective_checkpoint_contexts([*kept, torch.ops.aten.mm.default])
# <<< shared: precision


# >>> shared: lora
def add_lora_flags(group: argparse._ArgumentGroup) -> None:
    onoff, add = argparse.BooleanOptionalAction, group.add_argument
    add("--lora-rank", type=int, metavar="R", help="train adapters of rank R, and no other weights (needs "
        "the peft package)")
    add("--lora-alpha", type=float, help="adapters are scaled by alpha / rank; if not given: twice the rank")
    add("--lora-targets", metavar="NAME,NAME,…", help="linear layers that get one, such as q_proj,v_proj; if "
        "not given: all of the blocks")
    add("--lora-dropout", type=float, default=0.0, help="on the input of the adapters")
    add("--lora-merge", action=onoff, default=False, help="export the whole model, not the adapters alone")


def find_lora_problems(args: Namespace) -> Iterator[str]:
    if not args.lora_rank and (args.lora_alpha or args.lora_targets or args.lora_dropout or args.lora_merge):
        yield "--lora-alpha, --lora-targets, --lora-dropout and --lora-merge need --lora-rank"
    if args.lora_rank and not importlib.util.find_spec("peft"):
        yield "--lora-rank needs the peft package: python -m pip install peft"
    if not 0 <= args.lora_dropout < 1 or not 0 < (args.lora_alpha or 1) < 1e6:
        yield "--lora-dropout must be at least 0 and below 1, --lora-alpha above 0"


def add_lora(model: nn.Module, args: Namespace, name: str, task: str, dtype: torch.dtype) -> None:
    """Put PEFT's low-rank adapters (Hu et al. 2021, arXiv:2106.09685), in fp32, beside linear layers of a
    model on the meta device. All else is frozen, and in `dtype`: no fp32 copy, no gradient, no optimizer
    state. `name` is the model's, `task` PEFT's word for it. Does nothing without --lora-rank."""
    if not args.lora_rank:
        return
    import peft
    inside = {id(layer) for block in find_blocks(model) for layer in block.modules()
              if isinstance(layer, nn.Linear)}
    every = [path for path, layer in model.named_modules()  # PEFT shortens so long a list by itself
             if id(layer) in inside and f"{path}.weight" not in model.fp32_names]
    config = peft.LoraConfig(
        r=args.lora_rank, lora_alpha=args.lora_alpha or 2 * args.lora_rank, lora_dropout=args.lora_dropout,
        target_modules=args.lora_targets.split(",") if args.lora_targets else every,
        base_model_name_or_path=name, task_type=task)
    with naming("--lora-targets"), torch.device("meta"):
        peft.inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
        if not {id(layer.base_layer) for layer in model.modules() if hasattr(layer, "base_layer")} <= inside:
            raise ValueError("adapters are for linear layers (nn.Linear) of the blocks only")
    for name, param in model.named_parameters():
        is_fp32 = param.requires_grad or name in model.fp32_names
        param.data = param.data.to(torch.float32 if is_fp32 else dtype)


def init_lora(model: nn.Module, seed: int, device: torch.device) -> None:
    """As PEFT does: A uniform within 1 / sqrt(its inputs), B zero; the same on any number of ranks."""
    for name, param in model.named_parameters():
        if ".lora_" in name:
            generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            bound = param.shape[1] ** -0.5 if ".lora_A." in name else 0.0
            fill(param, torch.empty(param.shape, device=device).uniform_(-bound, bound, generator=generator))


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add the adapters to their layers' weights, and take them out of the model (all ranks)."""
    for path, layer in list(model.named_modules()):
        if hasattr(layer, "lora_A"):
            A, B = (part["default"].weight.full_tensor() for part in (layer.lora_A, layer.lora_B))
            weight = layer.base_layer.weight
            fill(weight, weight.full_tensor().float() + layer.scaling["default"] * (B @ A))
            owner, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(owner), leaf, layer.base_layer)
    del model.peft_config
# <<< shared: lora


# >>> shared: materialise
def materialise(model: nn.Module, device: torch.device, cpu_offload: bool) -> None:
    """Give the sharded meta model memory, filled with NaN: `prove_filled` then finds what was never written.

    `to_empty` makes a new tensor for each module's parameter, so that tied ones come apart: tied again."""
    first_name, ties = {}, {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if first_name.setdefault(id(param), name) != name:
            ties[name] = first_name[id(param)]
    model.to_empty(device="cpu" if cpu_offload else device)
    for name, source in ties.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(source))
    with torch.no_grad():
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            if tensor.is_floating_point():
                local_part(tensor).fill_(math.nan)
    for module in model.modules() if cpu_offload else ():  # only parameters are offloaded
        module._buffers = {name: b.to(device) for name, b in module._buffers.items() if b is not None}


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; a plain tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@torch.no_grad()
def fill(param: Tensor, value: Tensor) -> None:
    """Write this rank's slice of a full tensor, which every rank holds, into a sharded parameter."""
    from torch.distributed.tensor import distribute_tensor
    value = value.to(local_part(param).device, param.dtype)
    if hasattr(param, "placements"):
        # src_data_rank=None: each rank slices its own copy, nothing is sent.
        value = distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)
    local_part(param).copy_(local_part(value))


def fill_buffers(model: nn.Module) -> None:
    """What no file holds: rotary tables and other non-persistent buffers of a transformers model, in fp32."""
    for module in model.modules():
        # Without buffers there is nothing to fill, and RWKV would compute with sharded parameters.
        module._is_hf_initialized = len(module._parameters) > 0 and not module._buffers
        for param in module.parameters(recurse=False):
            param._is_hf_initialized = True
    # transformers takes FSDP's subclass for custom code, and would skip its modules without parameters.
    model.is_custom_code = own_class(model).is_custom_code
    model.initialize_weights()


def own_class(model: nn.Module) -> type:  # FSDP has put a class of its own before it
    return next(kind for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP"))
# <<< shared: materialise


def init_from_scratch(model: CausalLM, seed: int, device: torch.device) -> None:
    """Normal(0, 0.02), output projections divided by sqrt(2 layers) (GPT-2); the same on any number of ranks,
    since each full parameter is drawn from a seed of its own."""
    for name, param in model.named_parameters():
        is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.02 / math.sqrt(2 * model.config.num_hidden_layers) if is_output else 0.02
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        value = torch.ones(param.shape, device=device)
        fill(param, value.normal_(std=std, generator=generator) if param.dim() > 1 else value)


# >>> shared: load
QUANTISED = re.compile(r"(weight_scale(_inv)?|scales|qweight|qzeros|g_idx|zero_point|absmax|quant_map|SCB|"
                       r"weight_packed|_blocks)$")


def refuse_quantised(folder: Path, config: object, names: Iterable[str] = ()) -> None:
    """Quantised weights have the names and shapes of others: without their scales they would be garbage.
    `names` are of the tensors on disk that the model does not have."""
    found = next(filter(QUANTISED.search, names), None)
    if found or getattr(config, "quantization_config", None):
        raise UserError(f"{folder} holds quantised weights ({found or 'config.json says so'}), which cannot "
                        "be trained: use the model's bf16 release, or dequantise it first")


def tensors_of_files(model: nn.Module) -> dict[str, Tensor]:
    """By the names that they have without LoRA's adapters; tied ones under each name."""
    named = model.state_dict(keep_vars=True).items()
    return {name.replace(".base_layer.", "."): tensor for name, tensor in named if ".lora_" not in name}


def load_hf_weights(model: nn.Module, folder: Path, trust_remote_code: bool, ranks: Ranks) -> None:
    """Each rank reads its slices of the safetensors files, or rank 0 loads and broadcasts (all ranks)."""
    import torch.distributed.checkpoint as dcp
    named, there = tensors_of_files(model), {}
    if any(folder.glob("*.safetensors")):
        reader = dcp.HuggingFaceStorageReader(str(folder))
        with naming(f"the safetensors files in {folder}"):  # a download that is not complete, for one
            on_disk = reader.read_metadata().state_dict_metadata
        # A base model's tensors stand under its prefix in the files of a model with a head.
        names = {name: name if name in on_disk else f"{model.base_model_prefix}.{name}" for name in named}
        there = {names[name]: tensor for name, tensor in named.items()
                 if names[name] in on_disk and on_disk[names[name]].size == tensor.shape}
        refuse_quantised(folder, None, on_disk.keys() - there.keys())
    # Tied parameters are one tensor under several names: a file may hold any of them, and mostly just one.
    if set(map(id, named.values())) <= set(map(id, there.values())):
        own = {name for name, _ in model.named_buffers()}  # old files hold what is computed today
        unread = [name for name in on_disk.keys() - there.keys() if not any(map(name.endswith, own))]
        dcp.load({name: tensor.detach() for name, tensor in there.items()}, storage_reader=reader)
        if unread and ranks.is_main:
            print(f"{folder}: {len(unread)} tensors on disk are not in the model, {min(unread)} for one")
        return
    if ranks.is_main:
        print(f"{folder}: names on disk differ from names in memory; "
              "rank 0 loads the model and broadcasts it")
    broadcast_hf_weights(model, folder, trust_remote_code, ranks)


@torch.no_grad()
def broadcast_hf_weights(model: nn.Module, folder: Path, trust_remote_code: bool, ranks: Ranks) -> None:
    """For families that transformers renames or fuses while loading (Mixtral's experts), .bin files, remote
    code: the whole model in rank 0's host memory, then one tensor at a time to everybody (all ranks)."""
    source = {}
    if ranks.is_main:
        from transformers.utils import logging
        logging.disable_progress_bar()
        logging.set_verbosity_error()  # its report on missing tensors: the error below says it
        with naming(f"the weights in {folder}"):
            full, info = own_class(model).from_pretrained(
                folder, dtype=torch.float32, trust_remote_code=trust_remote_code, output_loading_info=True,
                ignore_mismatched_sizes=True)  # they are refused below
        lacking = sorted(info["missing_keys"] | {key for key, *_ in info["mismatched_keys"]})
        if lacking:
            raise UserError(f"{folder} lacks {len(lacking)} tensors, or their shapes: {lacking[0]} for one")
        source = full.state_dict()
    for name, tensor in tensors_of_files(model).items():
        value = (source[name].to(ranks.device, tensor.dtype) if ranks.is_main
                 else torch.empty(tensor.shape, dtype=tensor.dtype, device=ranks.device))
        torch.distributed.broadcast(value, src=0)
        fill(tensor, value)
# <<< shared: load


# >>> shared: head
def base_of(model: nn.Module) -> nn.Module:
    """The model without its output head; the model itself where the two cannot be told apart."""
    inner = (child for child in model.children() if hasattr(child, "base_model"))
    return model.base_model if model.base_model is not model else next(inner, model)


def rows_at_once(model: nn.Module, device: torch.device) -> int:
    """Rows of logits that exist at once. On a GPU some 2^28 numbers of them: fewer would be slow, because the
    head's fp32 gradient is added up once a chunk, more would take gigabytes."""
    size = model.config.get_text_config().vocab_size
    return max(512, 2**28 // size // 512 * 512) if device.type == "cuda" else 512
# <<< shared: head


# >>> shared: prove
def plain_tokens(model: nn.Module, rows: int, length: int, device: torch.device) -> Tensor:
    """(rows, length) ids from all over the vocabulary, for proofs."""
    generator = torch.Generator().manual_seed(0)
    size = model.config.get_text_config().vocab_size
    return torch.randint(size, (rows, length), generator=generator).to(device)


def prove_filled(model: nn.Module) -> None:
    """Every parameter is a DTensor, and all was written; else training would start from garbage."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        # The sum is NaN if any element is, and needs no second tensor of the parameter's size.
        if tensor.is_meta or (tensor.is_floating_point() and torch.isnan(local_part(tensor).sum())):
            raise UserError(f"the model's tensor {name} was never written: the weights on disk do not fit "
                            "the model, or hold NaN")
        if isinstance(tensor, nn.Parameter) and not hasattr(tensor, "placements"):
            raise UserError(f"parameter {name} is not sharded")


def bytes_each(param: Tensor) -> int:
    """With gradient and AdamW's states, of an element of a trained parameter; of one that is frozen."""
    return 16 if param.requires_grad else param.element_size()


def check_memory(model: nn.Module, args: Namespace, mesh: torch.distributed.DeviceMesh) -> None:
    """Before anything is allocated: fp32 parameters, gradients, AdamW's two states against what is free."""
    size = sum(p.numel() for p in model.parameters())
    nbytes = sum(p.numel() * bytes_each(p) for p in model.parameters()) // mesh.size(-1)
    if mesh.device_type == "cuda" and not args.cpu_offload:
        free = torch.cuda.mem_get_info()[0]
    else:
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        free = 1024 * int(available[1]) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if nbytes > free:
        raise UserError(f"{size / 1e9:.1f}B parameters, gradients and AdamW states take {nbytes >> 30} GiB a "
                        f"process, {free >> 30} are free: choose a smaller model, or use more devices")


def describe_model(model: nn.Module, dtype: torch.dtype) -> str:
    """A line for the start of a run; `dtype` is what it computes in."""
    params, sizes = list(model.parameters()), Counter()
    blocks = Counter(type(block).__name__.removeprefix("FSDP") for block in find_blocks(model))
    for param in params:
        sizes[f"{'trained' if param.requires_grad else 'frozen'} in {str(param.dtype)[6:]}"] += param.numel()
    mine = sum(local_part(param).numel() * bytes_each(param) for param in params)
    kinds = ", ".join(f"{size:,} {kind}" for kind, size in sizes.items())
    units = ", ".join(f"{count} x {name}" for name, count in blocks.items())
    return (f"model      {sum(sizes.values()):,} parameters ({kinds}), {units} and the root, computed in "
            f"{str(dtype)[6:]}; with gradients and AdamW's states {mine / 2**20:,.1f} MiB on this rank")
# <<< shared: prove


@contextlib.contextmanager
def untrained(model: nn.Module) -> Iterator[None]:
    """Around a few forwards without gradients, dropout and graphs compiled for their shapes."""
    model.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield
    reshard(model)
    model.train()


def prove_loss(model: nn.Module, ranks: Ranks) -> None:
    """Compare the chunked loss, token by token, with that of the model's own logits. A family that transforms
    its logits in a way that `attach_chunked_loss` does not know keeps whole logits (all ranks)."""
    ids, each, loss_fn = plain_tokens(model, 2, 32, ranks.device), [], model.head_loss

    def noted(*inputs: object) -> Tensor:
        each.append(loss_fn(*inputs))
        return each[-1]

    with untrained(model):
        logits = model(ids)
        if not torch.isfinite(logits).all():
            raise UserError("the model's logits are not finite on a plain input: its weights are broken")
        expected = F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none")
        model.head_loss, chunk, model.loss_chunk = noted, model.loss_chunk, 1
        model(ids, labels=ids)
        model.head_loss, model.loss_chunk = loss_fn, chunk
    # bf16: half a unit in the last place of the largest logit, by which two orders of adding may differ.
    bound = 3e-6 if logits.dtype == torch.float32 else torch.finfo(logits.dtype).eps / 2
    if each and not (torch.stack(each)[:, 0] - expected).abs().mean() <= bound * logits.abs().max():
        model.whole_logits = True
        if ranks.is_main:
            print("this model transforms its logits in a way of its own: "
                  "the loss uses whole logits (more memory)")


def prove_packing(model: nn.Module, ranks: Ranks, can_use_varlen: bool = False) -> None:
    """Choose how documents in a pack are told apart: by variable-length attention (CUDA), or by positions
    that start again, from which transformers makes masks. The second document of a pack must have the logits
    that it has alone, up to a fraction of what a leak changes (all ranks)."""
    ids = plain_tokens(model, 2, 64, ranks.device)
    positions = torch.arange(64, device=ranks.device).expand(2, 64) % 32
    config, ways = model.config.get_text_config(), [model.config._attn_implementation]
    if getattr(config, "attention_dropout", 0.0) or getattr(config, "attn_pdrop", 0.0):
        can_use_varlen = False  # its kernel has no dropout
    if can_use_varlen and model._supports_flash_attn and model._supports_attention_backend:
        from transformers import AttentionInterface
        AttentionInterface.register("varlen", varlen_attention)
        ways.insert(0, "varlen")
    with untrained(model):
        alone = model(ids.view(4, 32)).view(2, 64, -1)[:, 32:].float()
        leak = (model(ids)[:, 32:] - alone).abs().mean()
        for way in ways:
            model.config._attn_implementation = config._attn_implementation = way
            try:
                packed = model(ids, position_ids=positions, cu_seqlens=document_bounds(positions))[:, 32:]
            except (TypeError, ValueError, RuntimeError):  # a kernel that this family cannot take
                continue
            bound = 0.01 if packed.dtype == torch.float32 else 0.2
            if (packed - alone).abs().mean() <= bound * leak:
                break
        else:
            raise UserError("documents in a pack see each other in this model: use --no-packing, or let them "
                            "with --no-mask-documents")
    if way != "varlen":  # cuDNN 9.19 makes NaN gradients behind some masks (pytorch#196678)
        torch.backends.cuda.enable_cudnn_sdp(False)


# ------------------------------------------------------------------------------------------------
# 5. Optimizer and schedule

# >>> shared: optimizer
def build_optimizer(model: nn.Module, args: Namespace) -> torch.optim.Optimizer:
    """Fused AdamW on fp32 masters; weight decay on matrices only, not on norms, biases and embeddings."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() > 1 and id(p) not in embeddings]
    others = [p for p in trained if p.dim() <= 1 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    # EDIT: another optimizer
    return torch.optim.AdamW(groups, lr=args.max_lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


@torch.no_grad()
def reduce_stats(model: nn.Module, sums: Tensor, count: Tensor, num_replicas: int, votes: Tensor
                 ) -> tuple[Tensor, ...]:
    """(mean losses, count, gradient norm, sums of votes) over all ranks and micro-batches, by one collective.

    `sums` are (K,) summed losses, `count` is what they are a mean over: trained tokens, or sequences.
    Gradients here are those of the summed loss, so that their norm is divided by the count. Under HSDP each
    replica holds the whole reduced gradient, hence the division by `num_replicas`."""
    grads = [local_part(p.grad) for p in model.parameters() if p.grad is not None]
    norms = torch._foreach_norm([g for g in grads if g.numel()]) or [torch.zeros(())]
    square = torch.stack(norms).square().sum().to(sums.device)
    total, K = all_sum(torch.cat([sums, torch.stack([count, square / num_replicas]), votes])), len(sums)
    return total[:K] / total[K], total[K], total[K + 1].sqrt() / total[K], total[K + 2:]


@torch.no_grad()
def clip_and_step(optimizer: torch.optim.Optimizer, grad_norm: Tensor, count: Tensor, grad_clip: float
                  ) -> Tensor:
    """One update, or none for a gradient that is not finite, on all ranks. Gradients are divided by `count`
    (see `reduce_stats`) and clipped. Returns 1.0 where there was no update.

    A fused kernel divides gradients by `grad_scale` and does nothing if `found_inf` is 1 (GradScaler's
    protocol): that costs no pass over the gradients and no host-device synchronisation."""
    found_inf = (~torch.isfinite(grad_norm)).float()
    over = torch.clamp(grad_norm / grad_clip, min=1.0) if grad_clip else torch.ones_like(grad_norm)
    where = local_part(optimizer.param_groups[0]["params"][0]).device  # the host with --cpu-offload
    if optimizer.defaults.get("fused"):
        optimizer.grad_scale, optimizer.found_inf = (count * over).to(where), found_inf.to(where)
        optimizer.step()
    elif not found_inf.item():  # sync point
        params = [param for group in optimizer.param_groups for param in group["params"]]
        grads = [local_part(param.grad) for param in params if param.grad is not None]
        torch._foreach_div_(grads, (count * over).to(where))
        optimizer.step()
    return found_inf
# <<< shared: optimizer


def learning_rate(step: float, total_steps: float, warmup_steps: int, max_lr: float, min_lr: float,
                  schedule: str = "cosine") -> float:
    """For the update after `step` updates: linear warm-up to max_lr, then down to min_lr at the last one."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    height = {  # EDIT: the schedule, from 1 after the warm-up to 0
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "wsd": min(1.0, (1 - progress) / 0.2),  # warm-up, stable, decay: Hu et al. 2024, arXiv:2404.06395
        "constant": 1.0,
    }
    return min_lr + (max_lr - min_lr) * height[schedule]


def resolve_steps(args: Namespace, dataset: TokenDataset | None, ranks: Ranks, progress: dict
                  ) -> tuple[int, int, float, list[str]]:
    """(total steps, warm-up steps, ahead, lines to print). Epochs count in samples. `ahead` is the number of
    today's steps that the samples seen are worth, less the steps done: not 0 where the batch has changed. The
    schedule adds it to step and total, and so goes on where it was."""
    per_step, ahead = args.batch_size * args.grad_accum_steps * ranks.world_size, 0.0
    total, known = args.num_epochs * (args.steps_per_epoch or 1000), "of a stream"
    if dataset:
        known = f"{math.ceil(len(dataset) / per_step):,} are one pass over {len(dataset):,} sequences"
    if dataset and not (args.max_steps or args.steps_per_epoch):
        ahead = progress["samples"] / per_step - progress["step"]
        left = args.num_epochs * len(dataset) - progress["samples"]
        total = progress["step"] + math.ceil(left / per_step)
    total = args.max_steps or min(total, 100_000)
    warmup = args.warmup_steps if args.warmup_steps is not None else min(2000, total // 10)
    if warmup > total:
        raise UserError(f"--warmup-steps {warmup} is more than the run's {total} steps")
    lines = [f"steps      {total:,} ({known}), {warmup:,} of warm-up; {per_step:,} sequences, "
             f"{per_step * args.seq_len:,} tokens a step; learning rate {args.max_lr:g}"]
    if 0 < progress.get("total_steps", 0) == progress["step"] < total and args.schedule != "constant":
        lines.append("note       the run had ended: its learning rate rises again")
    if total < 10 or (dataset and per_step > len(dataset)):
        lines.append("note       fewer than 10 steps, or steps that take all of the data, learn little")
    return total, warmup, ahead, lines


# ------------------------------------------------------------------------------------------------
# 6. Loss: summed cross-entropy, in chunks, so that whole logits never exist

# EDIT: what is averaged over trained tokens, {name: weight in the objective}; formulas in `loss_terms`. Each
# is logged as train/NAME, with weight 0 no more than that. The first is eval/loss and the console's loss.
LOSSES = {"loss": 1.0}


def loss_terms(logits: Tensor, labels: Tensor) -> Tensor:
    """The terms of `LOSSES`, each summed over the tokens with a label, in fp32. (N, V), (N,) -> (K,)."""
    return torch.stack([F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")])


def weigh(sums: Tensor) -> Tensor:
    return sum(weight * term for weight, term in zip(LOSSES.values(), sums.unbind(), strict=True))


def head_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: float = 1.0,
              cap: float = 0.0) -> Tensor:
    """Output head, the family's scale and soft cap, loss terms. (N, D), (V, D), (V,), (N,) -> (K,)."""
    logits = F.linear(hidden.to(weight.dtype), weight, bias)  # Mamba 2 adds up its layers in fp32
    if scale != 1.0:
        logits = logits * scale
    if cap:
        logits = cap * torch.tanh(logits / cap)
    return loss_terms(logits, labels)


class ChunkedHeadLoss(torch.autograd.Function):
    """`loss_fn` (see `head_loss`) over rows in chunks, gradients taken chunk by chunk in the forward.

    Logits, their softmax and their gradient exist for one chunk only, and nothing is computed twice, unlike
    with checkpointing (the idea of Hsu et al. 2024, Liger Kernel, arXiv:2410.10989, without its kernels). The
    loss being one number, all that backward has left to do is to multiply what the forward stored."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, loss_fn, chunk, needs_grad):
        sums = hidden.new_zeros(len(LOSSES), dtype=torch.float32)
        params = [weight] if bias is None else [weight, bias]
        num_learned = 1 + len(params) * ctx.needs_input_grad[1]  # the head is frozen beside LoRA's adapters
        totals, grad_hidden = [], torch.empty_like(hidden) if needs_grad else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            with torch.set_grad_enabled(needs_grad):
                leaves = [t.detach() for t in (hidden[rows], *params)]
                learned = [leaf.requires_grad_(needs_grad) for leaf in leaves[:num_learned]]
                terms = loss_fn(leaves[0], leaves[1], leaves[2] if bias is not None else None, labels[rows])
                loss = weigh(terms)
            sums += terms.detach()
            if needs_grad:
                grad_hidden[rows], *grads = torch.autograd.grad(loss, learned)
                del loss, terms  # of the size of the logits: not beside the totals
                # fp32: over hundreds of chunks a bf16 sum would lose the small addends. A copy, because these
                # are views, to which autograd would not add the gradient of a tied embedding in place.
                totals = ([total.add_(grad) for total, grad in zip(totals, grads)] if totals
                          else [grad.to(torch.float32, copy=True) for grad in grads])
                del grads  # of the size of the head: not beside the next chunk's logits
        if needs_grad:
            ctx.save_for_backward(grad_hidden, *(total.to(weight.dtype) for total in totals))
        ctx.mark_non_differentiable(sums)
        return weigh(sums), sums

    @staticmethod
    def backward(ctx, grad_loss, _):
        grads = [grad.mul_(grad_loss) for grad in ctx.saved_tensors]  # of hidden, weight, bias, if learned
        return *grads, *[None] * (7 - len(grads))


def chunked_loss(hidden: Tensor, labels: Tensor, head: nn.Linear, loss_fn: Callable, chunk: int
                 ) -> tuple[Tensor, Tensor]:
    """Of (B, T, D) hidden states under an output head: the weighted loss, summed over tokens, as a
    differentiable fp32 scalar, and its terms (K,), see `loss_terms`, to be looked at."""
    bias = getattr(head, "bias", None)
    needs_grad = torch.is_grad_enabled()  # `ctx.needs_input_grad` is true for parameters under no_grad, too
    return ChunkedHeadLoss.apply(hidden.flatten(0, 1), head.weight, bias, labels.flatten(), loss_fn, chunk,
                                 needs_grad)


# ------------------------------------------------------------------------------------------------
# 7. Checkpoints and export: asynchronous, published by a rename, resumed exactly; a Hugging Face folder

# >>> shared: state
def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; tied parameters once, under their first name. With LoRA's
    adapters only what is trained: the files that the model came from hold the rest."""
    persistent, some = set(model.state_dict()), hasattr(model, "peft_config")
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: tensor.detach() for name, tensor in tensors
            if name in persistent and (tensor.requires_grad or not some)}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """{parameter name: what the optimizer keeps of it}, whichever optimizer that is."""
    params = model.named_parameters()
    return {name: optimizer.state[param] for name, param in params if optimizer.state.get(param)}


def make_room(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Give the optimizer the states that a checkpoint's metadata name, empty, before its first update."""
    params = dict(model.named_parameters())
    for key, found in saved.items():
        name, _, state = key.removeprefix("optim.").rpartition(".")
        if key.startswith("optim.") and name in params:
            param, dtype = params[name], found.properties.dtype
            optimizer.state[param][state] = (
                torch.zeros_like(param, dtype=dtype) if found.size == param.shape
                else torch.zeros(found.size, dtype=dtype, device=local_part(param).device))


def random_states(ranks: Ranks) -> dict[str, Tensor]:
    states = {f"cpu_{ranks.rank}": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        states[f"cuda_{ranks.rank}"] = torch.cuda.get_rng_state(ranks.device)
    return states


def checkpoint_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> dict:
    return {"model": model_tensors(model), "optim": optimizer_tensors(model, optimizer),
            "random": random_states(ranks)}
# <<< shared: state


# >>> shared: save
@dataclasses.dataclass
class Checkpointer:
    """The run's checkpoints and the save under way. RUN/checkpoints/step_000100 holds files of DCP (torch's
    distributed checkpoint: model, optimizer, random states), progress.json, config.yaml, the script."""
    folder: Path
    keep: int
    best: int = -1  # the step of the checkpoint that --keep-best keeps
    group: object = None  # gloo, of its own: a save must not meet training's collectives
    stager: object = None
    writer: ThreadPoolExecutor | None = None
    staging: Future | None = None  # the copy that frees the parameters for the next update
    saving: Future | None = None  # its result: what went wrong, "" if nothing; the same on every rank
    step: int = 0  # that is being saved


def start_save(saver: Checkpointer, tensors: dict, progress: dict, texts: dict[str, str], ranks: Ranks
               ) -> None:
    """Begin a save (all ranks). Two stages, both in threads: staging copies the tensors to host memory while
    the next forward runs (`wait_for_copy` comes before the next update); the writer brings that copy to
    files, and rank 0 puts `texts` beside them."""
    finish_save(saver)
    cuda = ranks.device.type == "cuda"
    if saver.stager is None:  # not before: the start of training does not wait for it
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
        saver.stager = DefaultStager(StagingOptions(use_pinned_memory=cuda, use_shared_memory=False,
                                                    use_async_staging=True, use_non_blocking_copy=cuda))
        # HACK(torch 2.11): its stager closes this part after every copy, so that the next save fails. Remove
        # when 2.12 is the oldest supported; never closing it costs nothing, the process ends with it.
        saver.stager._state_dict_stager.close = lambda: None
        saver.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(hours=1))
        saver.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    if cuda:
        torch.cuda.synchronize()  # sync point: the copy runs on a stream of its own
    saver.step, texts = progress["step"], texts | {"progress.json": json.dumps(progress)}
    saver.staging = saver.stager.stage(tensors)
    saver.saving = saver.writer.submit(write_checkpoint, saver, saver.staging, texts, ranks)


def wait_for_copy(saver: Checkpointer) -> None:
    if saver.staging is not None:
        saver.staging.result()
        saver.staging = None


def finish_save(saver: Checkpointer, must: bool = False) -> None:
    """Wait for the save under way (all ranks). If it failed, which has been said, training goes on, and the
    next interval saves again; `must`: it is the run's last, so UserError."""
    wait_for_copy(saver)
    saving, saver.saving = saver.saving, None
    if saving and saving.result() and must:
        kept = checkpoints_in(saver.folder)
        raise UserError(f"could not save step {saver.step} ({saving.result()}): make room, then start the "
                        f"same command again; it goes on from {kept[-1] if kept else 'the beginning'}")
# <<< shared: save


# >>> shared: publish
def write_checkpoint(saver: Checkpointer, staged: Future, texts: dict[str, str], ranks: Ranks) -> str:
    """In the writer's thread (all ranks): tensors, then rank 0 publishes. Returns what went wrong, or ""."""
    import torch.distributed.checkpoint as dcp
    partial, problem = saver.folder / f"step_{saver.step:06d}.partial", ""
    try:
        dcp.save(staged.result(), checkpoint_id=partial, process_group=saver.group)
        if ranks.is_main:
            publish(saver, partial, texts)
    except (Exception, dcp.CheckpointException) as error:  # the latter is a BaseException
        problem = reason_of(error)
    problem = next(filter(None, gather_objects(problem, saver.group)), "")
    if problem and ranks.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        kept, free = checkpoints_in(saver.folder), shutil.disk_usage(saver.folder.parent).free >> 20
        print(f"\nstep {saver.step} could not be saved ({problem}; {free} MiB are free). The newest good "
              f"checkpoint is {kept[-1] if kept else 'none'}", file=sys.stderr, flush=True)
    return problem


def reason_of(error: BaseException) -> str:
    """DCP's message holds the traceback of the rank that failed: a line such as "OSError: …" says why."""
    reasons = re.findall(r"\w*Error: .+", str(error)) or [f"{type(error).__name__}: {first_line(error)}"]
    return next((reason for reason in reasons if "[Errno" in reason), reasons[-1])


def publish(saver: Checkpointer, partial: Path, texts: dict[str, str]) -> None:
    """Rank 0: add texts, rename a complete save into place, drop the oldest. Raises OSError."""
    from torch.distributed.checkpoint import FileSystemReader
    for part in FileSystemReader(partial).read_metadata().storage_data.values():
        if not (partial / part.relative_path).is_file():
            raise FileNotFoundError(f"rank 0 does not see the {part.relative_path} that another rank wrote: "
                                    "--checkpoint-dir must be one folder that all nodes share")
    for name, text in texts.items():
        (partial / name).write_text(text, encoding="utf-8")
    for path in (*partial.iterdir(), partial):  # DCP has done so for its own
        sync_to_disk(path)
    if partial.with_suffix("").exists():  # a copy that lost its .metadata
        partial.with_suffix("").rename(partial.with_suffix(f".{time.time_ns()}"))
    partial.rename(partial.with_suffix(""))
    sync_to_disk(partial.parent)
    kept = checkpoints_in(saver.folder)
    for old in kept[:-saver.keep] if saver.keep else []:
        if int(old.name[5:]) != saver.best:
            # Renamed first, or a kill in the middle would leave half a checkpoint under a good name.
            with contextlib.suppress(OSError):
                shutil.rmtree(old.rename(old.with_suffix(".partial")), ignore_errors=True)


def sync_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
# <<< shared: publish


# >>> shared: resume
def checkpoints_in(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    found = [path for path in folder.glob("step_*")
             if re.fullmatch(r"step_\d+", path.name) and (path / ".metadata").is_file()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def lock_run(folder: Path):
    """Rank 0: make the run's folder; its lock, held until the process ends, however it ends. Raises UserError
    after 20 s, since a run that was killed a moment ago may still be ending."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "STOP").exists():
        raise UserError(f"{folder / 'STOP'} exists: remove it to train")
    lock = (folder / "lock").open("w")
    for attempt in range(20):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if attempt == 0:
                print(f"{folder} is in use by another run: waiting 20 s for its end", file=sys.stderr)
            time.sleep(1)
        except OSError as error:  # a network file system without locks
            print(f"{folder} cannot be locked ({error.strerror}): take care that no second run uses it")
            return lock
    raise UserError(f"{folder} is in use by another run: give this one another --checkpoint-dir, or end that")


def checkpoints_to_resume(args: Namespace) -> list[Path]:
    """What --resume names, oldest first. Refuses to mix a new run into a folder that holds an old one."""
    folder = Path(args.checkpoint_dir) / "checkpoints"
    for stale in folder.glob("*.partial"):  # a save that a kill interrupted
        shutil.rmtree(stale, ignore_errors=True)
    found, chosen = checkpoints_in(folder), Path(args.resume)
    for path in set(folder.glob("step_*")) - set(found):
        print(f"{path} is left out: it has no .metadata, which a copy without hidden files loses")
    if args.resume == "auto":
        return found
    step = 0 if args.resume == "none" else read_progress([chosen], {})["step"]
    if found and int(found[-1].name[5:]) > step:
        raise UserError(f"--resume {args.resume}: {args.checkpoint_dir} already holds {found[-1].name}; give "
                        "this run another --checkpoint-dir")
    return [] if args.resume == "none" else [chosen]


def read_progress(found: list[Path], start: dict) -> dict:
    """The progress that the newest checkpoint holds, of the form of `start`; this where there is none."""
    if not found:
        return start
    try:
        if any(path.is_fifo() for path in found[-1].iterdir()):
            raise OSError("a FIFO in it would never be read")
        progress = json.loads((found[-1] / "progress.json").read_text())
        name = found[-1].name  # a copy may have a name of its own
        if name != f"step_{progress['step']:06d}" and name.startswith("step_"):
            raise ValueError("progress.json is of another step")
        return start | progress
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(found, error) from error


def unreadable(found: list[Path], error: BaseException) -> UserError:
    remedy = f"go on from {found[-2]}" if found[1:] else "begin anew"
    return UserError(f"{found[-1]} cannot be read ({reason_of(error)}): remove it to {remedy}")
# <<< shared: resume


# >>> shared: load-checkpoint
def load_checkpoint(found: list[Path], model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks
                    ) -> None:
    """Fill model, optimizer and random state from the newest, on any number of ranks (all ranks)."""
    import torch.distributed.checkpoint as dcp
    try:
        saved = dcp.FileSystemReader(found[-1]).read_metadata().state_dict_metadata
        make_room(model, optimizer, saved)
        tensors = {"model": model_tensors(model), "optim": optimizer_tensors(model, optimizer)}
        here = {f"model.{name}": tensor.shape for name, tensor in tensors["model"].items()}
        there = {name: entry.size for name, entry in saved.items() if name.startswith("model.")}
        if differ := {name for name, _ in here.items() ^ there.items()}:
            name = min(differ)
            raise UserError(f"{found[-1]} is a checkpoint of another model: {name} is {here.get(name)} here, "
                            f"{there.get(name)} there; give this run another --checkpoint-dir")
        states = {name: state for name, state in random_states(ranks).items() if f"random.{name}" in saved}
        dcp.load(tensors | ({"random": states} if states else {}), checkpoint_id=found[-1])
    except (dcp.CheckpointException, OSError, ValueError, RuntimeError, EOFError,
            pickle.UnpicklingError) as error:
        raise unreadable(found, error) from error
    for name, state in states.items():
        if name.startswith("cuda"):
            torch.cuda.set_rng_state(state, ranks.device)
        else:
            torch.set_rng_state(state)


def compare_runs(args: Namespace, progress: dict, found: list[Path], identity: str, **now: object
                 ) -> list[str]:
    """Lines to print: what is resumed, which flags or values of `now` have changed since; `progress` takes
    `now`. Raises UserError if `identity` names what changed, unless --resume names the checkpoint."""
    import yaml
    before, today = dict(progress), vars(args) | now
    progress |= now
    if not found:
        return []
    try:
        saved = yaml.safe_load((found[-1] / "config.yaml").read_text()) | before
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise unreadable(found, error) from error
    changed = [key for key, value in today.items() if saved.get(key) != value]
    others = [key for key in changed if key in identity.split()] if args.resume == "auto" else []
    shown = ", ".join(f"{key} {saved.get(key)} -> {today[key]}" for key in others or changed)
    if others:
        raise UserError(f"{found[-1]} is of another run ({shown}): give this one another --checkpoint-dir, "
                        f"or go on from that all the same with --resume {found[-1]}")
    resumed = f"resumed    {found[-1]}: step {progress['step']:,}, {progress['samples']:,} samples seen"
    return [resumed, f"changed    {shown}"] if changed else [resumed]
# <<< shared: load-checkpoint


# >>> shared: export
def hf_tensors(model: nn.Module, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype
               ) -> Iterator[tuple[str, Tensor]]:
    """Names, layout and precision of the family's files: transformers renames or fuses while it loads."""
    convert, kept = None, getattr(model, "fp32_names", ())
    if hasattr(model, "base_model_prefix"):
        from transformers.core_model_loading import revert_weight_conversion as convert
    for name, tensor in tensors:
        if tensor.is_floating_point():
            tensor = tensor.to(torch.float32 if name in kept or ".lora_" in name else dtype)
        yield from (convert(model, {name: tensor}) if convert else {name: tensor}).items()


def write_hf_folder(folder: Path, tensors: dict[str, Tensor], parts: tuple, dtype: torch.dtype) -> None:
    """Weights, and `parts`: configuration, tokenizer, and the folder that the model came from, or None; its
    code and generation_config.json are copied. The tokenizer's end token ends a generation, too. Of LoRA's
    configuration and adapters a folder for `PeftModel.from_pretrained(model, folder)`."""
    from huggingface_hub import save_torch_state_dict
    config, tokenizer, source = parts
    folder.mkdir(parents=True)
    tokenizer.model_max_length = getattr(config, "max_position_embeddings", None) or int(1e30)
    for part in (config, tokenizer):
        part.save_pretrained(folder)
    if is_adapter := hasattr(config, "peft_type"):
        tensors = {f"base_model.model.{name.replace('.default', '')}": part for name, part in tensors.items()}
    kind = "adapter_model" if is_adapter else "model"
    save_torch_state_dict(tensors, folder, filename_pattern=kind + "{suffix}.safetensors")
    for path in folder.glob("*.safetensors"):  # else nobody but their owner could read them
        path.chmod((folder / "tokenizer_config.json").stat().st_mode)
    if is_adapter:
        return
    for path in [*source.glob("*.py"), *source.glob("generation_config.json")] if source else ():
        shutil.copyfile(path, folder / path.name)
    for path, always in ((folder / "config.json", {"use_cache": True, "dtype": str(dtype)[6:]}),
                         (folder / "generation_config.json", {})):
        found = json.loads(path.read_text()) if path.exists() else {}
        ends = found.get("eos_token_id", getattr(config, "eos_token_id", None))
        ends = ends if isinstance(ends, list) else [ends]
        ends = [end for end in dict.fromkeys([*ends, tokenizer.eos_token_id]) if end is not None]
        found |= always | ({"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {})
        path.write_text(json.dumps(found, indent=2) + "\n")


def export_model(model: nn.Module, folder: Path, parts: tuple, dtype: torch.dtype, ranks: Ranks) -> None:
    """Write the folder (all ranks; rank 0 alone needs `parts`: configuration, tokenizer, source, see
    `write_hf_folder`). One tensor at a time is whole on every rank, and all of them, in `dtype`, in rank 0's
    host memory. Raises UserError."""
    for name in STOP_SIGNALS:  # all is saved: from here on they end the process at once
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    whole = (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
             for tensor in model_tensors(model).values())
    named = ((name, tensor.cpu()) for name, tensor in zip(model_tensors(model), whole) if ranks.is_main)
    tensors = {name: tensor.clone() for name, tensor in hf_tensors(model, named, dtype)}  # some are views
    if ranks.is_main:
        partial = folder.with_name(folder.name + ".partial")
        try:
            for old in (partial, folder):
                shutil.rmtree(old, ignore_errors=True)
            write_hf_folder(partial, tensors, parts, dtype)
            partial.rename(folder)
        except OSError as error:
            raise UserError(f"could not write {folder}: {error.strerror}; the checkpoint is intact: make "
                            "room, then run the same command again") from error
# <<< shared: export


@torch.no_grad()
def verify_export(folder: Path, input_ids: Tensor, expected: Tensor, trust_remote_code: bool) -> str:
    """Load the folder with transformers, on the CPU: its logits must be the trained model's, as far as
    precision goes, and those of a generation with a cache the same without. Returns a note for the end of
    a run. Raises UserError."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging
    logging.disable_progress_bar()
    adapter, whole, options = folder / "adapter_config.json", folder, {}
    if adapter.exists():  # transformers adds it to the model that it names, here in the training's precision
        whole = fetch(json.loads(adapter.read_text())["base_model_name_or_path"])
        options = {"dtype": expected.dtype}
    nbytes = sum(path.stat().st_size for path in whole.glob("*.safetensors"))
    if nbytes * 1.2 > os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        return "not reloaded: too little memory"
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=trust_remote_code, output_loading_info=True, **options)
    ids, expected, note = input_ids.cpu(), expected.cpu(), ""
    logits = model.eval()(ids, use_cache=False).logits.float()
    spread = (logits - logits.mean(-1, keepdim=True)).abs().mean()
    errors = {"logits": (logits - expected.float()).abs().mean() / spread}
    try:
        made = model.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), do_sample=False,
                              max_new_tokens=4, min_new_tokens=4, output_logits=True,
                              return_dict_in_generate=True)
        again = model(made.sequences, use_cache=False).logits[0, -5:-1].float()
        errors["generation"] = (torch.cat(made.logits).float() - again).abs().mean() / spread
    except Exception as error:  # some families of transformers cannot; of any type
        note = f"; it cannot generate ({first_line(error)})"
    bound = 1e-4 if {model.dtype, expected.dtype} == {torch.float32} else 0.1
    wrong = [f"{name}: off by {error:.1e} of the logits' spread (bound {bound:.0e})"
             for name, error in errors.items() if not error <= bound]
    wrong += [f"{name} is {kind[:-5]}" for kind in ("missing_keys", "unexpected_keys") for name in info[kind]]
    if wrong:
        raise UserError(f"{folder}, loaded again, is not the trained model: {wrong[0]}. The checkpoint is "
                        "intact, please report this")
    return f"reloaded: logits within {errors['logits']:.0e} of their spread (bound {bound:.0e}){note}"


def hf_parts(model: nn.Module, tokenizer, source: Path | None) -> tuple:
    """Of the exported folder, see `write_hf_folder`."""
    if not isinstance(model, CausalLM):
        return getattr(model, "peft_config", {}).get("default", model.config), tokenizer, source
    from transformers import LlamaConfig
    fields = {name: value for name, value in vars(model.config).items() if not callable(value)}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return LlamaConfig(**fields | ends), tokenizer, source


# ------------------------------------------------------------------------------------------------
# 8. Run record: metrics, console, timing

PEAK_TFLOPS = {  # dense bf16, the vendors' data sheets; the first that is in a device's name counts
    "H200": 989, "H100 PCIe": 756, "H100": 989, "B200": 2250, "A100": 312, "L40S": 362, "MI300X": 1307}


def flops_per_token(model: nn.Module, seq_len: int) -> float | None:
    """Forward and backward, as `perf/mfu` says; None for mixtures of experts, which use only a part."""
    config = model.config.get_text_config()
    if any(hasattr(config, name) for name in ("num_local_experts", "num_experts", "n_routed_experts")):
        return None
    embedded, heads = ({id(m.weight) for m in model.modules() if isinstance(m, kind)}
                       for kind in (nn.Embedding, nn.Linear))  # a tied head is a matmul
    matmul = sum((6.0 if p.requires_grad else 4.0) * p.numel() for p in model.parameters()
                 if p.dim() > 1 and id(p) not in embedded - heads)
    return matmul + 6.0 * len(find_blocks(model)) * config.hidden_size * seq_len


def peak_flops(device: torch.device) -> float | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((1e12 * peak for key, peak in PEAK_TFLOPS.items() if re.search(rf"\b{key}\b", name)), None)


# >>> shared: record
def peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@contextlib.contextmanager
def timed(times: dict[str, float], key: str) -> Iterator[None]:
    """Adds the block's seconds to times[key]."""
    start = time.perf_counter()
    yield
    times[key] = times.get(key, 0.0) + time.perf_counter() - start


def write_record(folder: Path, args: Namespace, ranks: Ranks) -> dict[str, str]:
    """Rank 0: configuration, command, source and environment in the run's folder. Returns the texts that
    every checkpoint carries, too. --config takes config.yaml back."""
    import yaml
    if not ranks.is_main:
        return {}
    source, here = Path(__file__).read_text(encoding="utf-8"), str(Path(__file__).resolve().parent)
    given = {key: value for key, value in vars(args).items() if value is not None}
    texts = {"config.yaml": yaml.safe_dump(given, sort_keys=False), Path(__file__).name: source}
    git = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = shutil.which("git") and subprocess.run(git, capture_output=True, text=True, check=False).stdout
    versions = {name: sys.modules[name].__version__ for name in ("torch", "transformers", "datasets")
                if name in sys.modules}
    cuda = ranks.device.type == "cuda"
    device = torch.cuda.get_device_name(ranks.device) if cuda else f"{os.cpu_count()} CPU cores"
    environment = {"commit": commit and commit.strip(), "python": sys.version.split()[0], **versions,
                   "device": device, "world_size": ranks.world_size}
    more = {"command.txt": shlex.join([sys.executable, *sys.argv]) + "\n",
            "env.json": json.dumps(environment, indent=1)}
    for name, text in (texts | more).items():
        (folder / name).write_text(text, encoding="utf-8")
    return texts


def open_trackers(args: Namespace, ranks: Ranks) -> list[Callable[[dict], None]]:
    """Rank 0: functions that take a row of metrics: the file's, and TensorBoard's or W&B's if asked for."""
    if not ranks.is_main:
        return []
    trackers = [functools.partial(append_lines, Path(args.checkpoint_dir) / "metrics.jsonl")]
    if args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(Path(args.checkpoint_dir) / "tensorboard")
        trackers.append(lambda row: [board.add_scalar(key, value, row["step"]) for key, value in row.items()])
    if args.wandb:
        import wandb
        wandb.init(project=args.wandb, name=Path(args.checkpoint_dir).name, config=vars(args))
        trackers.append(lambda row: wandb.log(row, step=row["step"]))
    return trackers


def append_lines(path: Path, *rows: dict) -> None:
    """JSON lines. A full disk costs these rows, and a line that says so, but not the run."""
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    try:
        with path.open("ab", buffering=0) as file:  # a buffer would write its rest when the file is closed
            if (written := file.write(data)) < len(data):
                file.truncate(file.tell() - written)  # no half line
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        print(f"\n{path} lacks {len(rows)} rows: {error.strerror}", file=sys.stderr, flush=True)


def open_bar(total: int, step: int, ranks: Ranks):
    """A progress bar where rank 0 writes to a terminal, else a silent one."""
    from tqdm import tqdm
    return tqdm(total=total, initial=step, desc="training", unit="step", dynamic_ncols=True,
                smoothing=0.05, disable=not (ranks.is_main and sys.stderr.isatty()))
# <<< shared: record


# ------------------------------------------------------------------------------------------------
# 9. Evaluation: the whole held-out split

@torch.no_grad()
def evaluate(model: nn.Module, eval_sets: dict[str, TokenDataset], batch_size: int, ranks: Ranks
             ) -> dict[str, float]:
    """Loss per trained token over every sample of each set once, the same on any number of ranks (all ranks).

    Ranks take turns of single batches; one that has none left repeats a sample without labels, because every
    rank must take part in each forward's gathers."""
    from tqdm import tqdm
    found, is_silent = {}, not (ranks.is_main and sys.stderr.isatty())
    model.eval()
    for name, dataset in eval_sets.items():
        started = time.perf_counter()
        sums = torch.zeros(2, device=ranks.device, dtype=torch.float64)  # an fp32 sum over millions rounds
        rounds = range(0, len(dataset), batch_size * ranks.world_size)
        for first in tqdm(rounds, desc=f"evaluating {name}", leave=False, disable=is_silent):
            start = first + ranks.rank * batch_size
            mine = range(start, min(start + batch_size, len(dataset)))
            batch = collate([dataset[i] for i in mine or [0]], dataset.args, ranks.device)
            if not mine:
                batch["labels"].fill_(IGNORE)
            sums += torch.stack([model(**batch)[1][0].double(), (batch["labels"] != IGNORE).sum()])
        loss_sum, num_tokens = all_sum(sums).tolist()  # sync point
        loss = loss_sum / max(1.0, num_tokens)
        found |= {f"{name}/loss": loss, f"{name}/perplexity": math.exp(min(loss, 700.0)),
                  f"{name}/tokens": int(num_tokens), f"{name}/time_s": time.perf_counter() - started}
    reshard(model)
    model.train()
    return found


# ------------------------------------------------------------------------------------------------
# 10. Training

IDENTITY = ("hf_model model_size data seed seq_len packing mask_documents long_chats lora_rank lora_alpha "
            "lora_targets")  # a resume refuses other values; add your flags that change model or data


def open_datasets(args: Namespace, data: dict) -> tuple[TokenDataset | None, dict[str, TokenDataset]]:
    """(train or None with --streaming, held-out sets by name)."""
    def make(split: str, **changes: object) -> TokenDataset:
        return TokenDataset(data[split], Namespace(**vars(args) | changes))

    if args.mask_documents is None:  # plain text from scratch is one stream
        args.mask_documents = bool(args.hf_model) or data["chat"]
    # EDIT: held-out sets; NAME/loss is the metric of each
    eval_sets = {"eval": make("eval")} if args.eval_split or args.eval_fraction else {}
    return None if args.streaming else make("train"), eval_sets


def resume_stream(args: Namespace, ranks: Ranks, resume_from: Path | None) -> tuple[Iterator[dict], dict]:
    """(batches, their state) of --streaming, where this rank's checkpoint says."""
    import torch.distributed.checkpoint as dcp
    texts = {str(ranks.rank): "{}"}
    if resume_from:
        saved = dcp.FileSystemReader(resume_from).read_metadata().state_dict_metadata
        if (num_saved := sum(name.startswith("stream.") for name in saved)) != ranks.world_size:
            raise UserError(f"--streaming: {resume_from} was saved by {num_saved} processes and can only be "
                            "resumed by as many")
        dcp.load({"stream": texts}, checkpoint_id=resume_from, no_dist=True)
    state = json.loads(texts[str(ranks.rank)])
    return streamed_batches(args, ranks, state), state


def ready_model(args: Namespace, model: nn.Module, checkpoints: list[Path], dtype: torch.dtype,
                mesh: torch.distributed.DeviceMesh, ranks: Ranks) -> torch.optim.Optimizer:
    """Shard the model, give it memory, then the weights of a checkpoint, of files or new ones, and prove that
    they are there (all ranks). Returns its optimizer, filled, too."""
    cuda = ranks.device.type == "cuda"
    model.loss_chunk = args.loss_chunk_tokens or rows_at_once(model, ranks.device)
    shard_model(model, args, mesh, dtype)
    if args.compile or (args.compile is None and cuda):
        model.head_loss = torch.compile(model.head_loss)
    materialise(model, ranks.device, args.cpu_offload)
    optimizer = build_optimizer(model, args)  # after sharding, which replaces the parameters
    if args.hf_model:
        fill_buffers(model)
    if args.hf_model and (args.lora_rank or not checkpoints):
        load_hf_weights(model, fetch(args.hf_model), args.trust_remote_code, ranks)
    init_lora(model, args.seed, ranks.device)  # of adapters, if there are any
    if checkpoints:
        load_checkpoint(checkpoints, model, optimizer, ranks)
    elif args.from_scratch:
        init_from_scratch(model, args.seed, ranks.device)
    prove_filled(model)
    if args.hf_model:
        prove_loss(model, ranks)
        if args.mask_documents and args.packing:
            prove_packing(model, ranks, cuda and dtype is torch.bfloat16 and args.use_flash_attn)
    return optimizer


def export_run(args: Namespace, model: nn.Module, hf_folder: Path | None, dtype: torch.dtype, ranks: Ranks
               ) -> tuple[Tensor, Tensor]:
    """Write RUN/hf (all ranks); some tokens and the trained model's logits, for `verify_export`."""
    if args.lora_merge:
        merge_lora(model)
    parts = hf_parts(model, load_tokenizer(args), hf_folder) if ranks.is_main else None
    export_model(model, Path(args.checkpoint_dir) / "hf", parts, dtype, ranks)
    probe = plain_tokens(model, 2, 64, ranks.device)
    with untrained(model):
        return probe, model(probe)


def next_command(args: Namespace) -> str:
    """For the last line of a run."""
    if args.lora_rank and not args.lora_merge:
        return "the same command with --lora-merge puts the whole model in the adapters' place"
    command = shlex.join([sys.executable, sys.argv[0], "--hf-model", str(Path(args.checkpoint_dir) / "hf")])
    return f"{command} --dataset YOUR.jsonl --checkpoint-dir runs/finetuned"


def show_row(bar, total_steps: int, row: dict) -> None:
    """Show a row of metrics in the bar, or as one line of fixed width for logs that are files; an evaluation
    always as a line."""
    if "train/lr" not in row:
        losses = [f"{key} {value:.4f}" for key, value in row.items() if key.endswith("/loss")]
        bar.write(f"step {row['step']:>7,}  {'  '.join(losses)}")
    elif not bar.disable:
        bar.set_postfix_str(f"loss {row['train/loss']:.4f}, {row['perf/tokens_per_s']:,.0f} tokens/s")
    else:
        mfu = f"  MFU {row['perf/mfu']:6.1%}" if "perf/mfu" in row else ""
        print(f"step {row['step']:>7,}/{total_steps:,}  loss {row['train/loss']:8.4f}  "
              f"lr {row['train/lr']:.2e}  norm {row['train/grad_norm']:8.3f}  "
              f"{row['perf/tokens_per_s']:>11,.0f} tokens/s  {row['time/step_s'] * 1000:9.1f} ms  "
              f"{row['perf/peak_mem_gib']:6.2f} GiB{mfu}", flush=True)


# >>> shared: ending
def report_finished(args: Namespace, ranks: Ranks, found: list[Path], step: int, total: int, flag: str
                    ) -> bool:
    """True, with a line on rank 0 that names the steps' `flag`, if last checkpoint and export are there."""
    exported = Path(args.checkpoint_dir) / "hf"
    is_wanted = exported.is_dir() and not (  # not adapters, where the whole model is asked for
        getattr(args, "lora_merge", False) and (exported / "adapter_config.json").exists())
    if not found or step < total or (args.export and not is_wanted):
        return False
    if ranks.is_main:
        model = f", {exported} the model" if args.export else ""
        print(f"this run is finished: {found[-1]} holds all {total} steps{model}. A larger "
              f"{flag} goes on from there; another --checkpoint-dir starts anew")
    torch.distributed.destroy_process_group()
    return True


def leave_stopped(stop: str, saver: Checkpointer, ranks: Ranks) -> None:
    """The end of a run that was asked to stop (all ranks)."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if ranks.is_main:
        again = "remove that file, then the" if stop == "STOP file" else "the"
        kept = checkpoints_in(saver.folder)
        saved = f"{kept[-1]} is saved; {again} same command goes on from there" if kept else "nothing saved"
        print(f"stopped ({stop}): {saved}. Exit code {STOPS[stop]}", flush=True)
    sys.exit(STOPS[stop])


def write_summary(run_dir: Path, progress: dict, last_row: dict, seconds: float) -> None:
    measured = {key: value for key, value in last_row.items() if "/" in key}
    summary = progress | measured | {"seconds": round(seconds, 1)}
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def outlive_output() -> None:
    """A full disk under the log, or a pipe whose reader has gone, costs lines but not the run."""
    def forgiving(method: Callable) -> Callable:
        def call(*args: object) -> object:
            with contextlib.suppress(OSError, UnicodeError):  # the latter: another locale
                return method(*args)
        return call

    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # None: closed
        stream.write, stream.flush = forgiving(stream.write), forgiving(stream.flush)
        setattr(sys, name, stream)


def run_and_report(saves_memory: str) -> None:
    """Calls main(); prints an error as one line, and exits with 1, Ctrl-C with 130."""
    outlive_output()
    try:
        return main()
    except (UserError, KeyboardInterrupt, Exception) as error:
        message, code = first_line(error), 130 if isinstance(error, KeyboardInterrupt) else 1
        if code == 130:
            message = "interrupted; start the same command again to go on from the newest checkpoint"
        elif isinstance(error, OSError):
            message += ": is the disk full, or a folder not yours? Saved checkpoints are intact"
        elif isinstance(error, torch.OutOfMemoryError):
            message = f"out of GPU memory ({message.split('.')[0]}): {saves_memory}, or more GPUs"
        elif isinstance(error, RuntimeError) and re.search("[Cc]onnection (closed|reset)", str(error)):
            message = ("another rank ended: its own last line says why, or the kernel's log if it was "
                       "killed; the same command goes on from the newest checkpoint")
        elif not isinstance(error, UserError):
            message = f"{type(error).__name__}: {message}"
            traceback.print_exc()
    rank = os.environ.get("RANK", "0")
    if rank != "0" and code != 130:
        time.sleep(3)  # most often rank 0 has the same to say, and this process is ended before it repeats it
    # At once: other ranks may sit in a collective, and a save's threads must not hold this up.
    end_now(message, rank == "0" or code != 130, code)
# <<< shared: ending


def main() -> None:
    # Set-up ---------------------------------------------------------------------------------
    args = parse_args()
    relaunch_under_torchrun(args)
    ranks = read_ranks(args)
    run_dir = Path(args.checkpoint_dir)
    data = prepare_data(args)  # takes as long as it needs: no process group exists yet
    train_set, eval_sets = open_datasets(args, data)

    mesh = init_distributed(args, ranks)
    dtype = compute_dtype(args.mixed_precision, ranks.device)
    # Shapes, then shards, then memory, then weights: no device needs room for more than its part.
    hf_folder = fetch(args.hf_model) if args.hf_model else None
    model = build_model(args, hf_folder, data["vocab_size"])
    add_lora(model, args, args.hf_model, "CAUSAL_LM", dtype)
    check_memory(model, args, mesh)
    lock = lock_run(run_dir) if ranks.is_main else None  # noqa: F841, held until this process ends
    checkpoints = gather_objects(checkpoints_to_resume(args) if ranks.is_main else None)[0]
    progress = read_progress(checkpoints, {  # all of it survives a resume
        "step": 0, "samples": 0, "tokens": 0, "skipped_steps": 0, "bad_in_a_row": 0, "best_eval_loss": None,
        "best_step": -1})
    total_steps, warmup_steps, ahead, notes = resolve_steps(args, train_set, ranks, progress)
    notes += compare_runs(args, progress, checkpoints, IDENTITY + " dataset" * args.streaming,
                          processes=ranks.world_size, data=data["identity"], total_steps=total_steps)
    if report_finished(args, ranks, checkpoints, progress["step"], total_steps, "--max-steps"):
        return
    optimizer = ready_model(args, model, checkpoints, dtype, mesh, ranks)
    batches, stream = ((ordered_batches(train_set, args, ranks, progress["samples"]), None) if train_set
                       else resume_stream(args, ranks, checkpoints[-1] if checkpoints else None))

    texts = write_record(run_dir, args, ranks)
    saver = Checkpointer(run_dir / "checkpoints", args.keep_checkpoints)
    bar, trackers = open_bar(total_steps, progress["step"], ranks), open_trackers(args, ranks)
    if ranks.is_main:
        trackers.append(functools.partial(show_row, bar, total_steps))
        print(describe_model(model, dtype), *data["notes"], *notes, sep="\n")
    samples_per_step = args.batch_size * args.grad_accum_steps * ranks.world_size
    reduces_always = args.reduce_every_micro_batch or mesh.size() == 1  # one device: free, and less memory
    token_flops, device_flops = flops_per_token(model, args.seq_len), peak_flops(ranks.device)
    times, num_input_tokens = {}, 0
    phase = functools.partial(timed, times)
    asked = catch_signals(ranks)
    started = row_started = time.perf_counter()
    row, row_step, evaluation = {}, progress["step"], {}

    # Loop ------------------------------------------------------------------------------------
    while True:
        # Evaluate (all ranks): at the top, after the save of the same step, so that a run that is killed here
        # evaluates when it is resumed. The best step thus reaches the disk with the next save.
        step = progress["step"]
        is_last = step >= total_steps
        if eval_sets and (is_last or (args.eval_interval and step and step % args.eval_interval == 0)):
            stall_after(None)
            evaluation = evaluate(model, eval_sets, args.batch_size, ranks)
            row_started += sum(evaluation[f"{name}/time_s"] for name in eval_sets)  # no time of steps
            loss = next(iter(evaluation.values()))  # of the first set: it decides which step is the best
            if loss < (progress["best_eval_loss"] or math.inf):
                progress |= {"best_eval_loss": loss, "best_step": step}
            for track in trackers:
                track({"step": step, **evaluation})
        if is_last:
            break
        saver.best = progress["best_step"] if args.keep_best else -1
        stall_after(args.stall_timeout)

        # Forward and backward: gradients of the summed loss, reduced with the last micro-batch (all ranks)
        loss_sums = token_count = 0.0  # tensors on the device, from the first micro-batch on
        for micro in range(args.grad_accum_steps):
            with phase("data"):
                batch = next(batches)
            with phase("forward_backward"):
                is_reduced = reduces_always or micro == args.grad_accum_steps - 1
                model.set_requires_gradient_sync(is_reduced)  # else whole gradients add up on each rank
                loss, terms = model(**batch)
                loss.backward()
                loss_sums += terms  # read at the sync point only
                token_count += (batch["labels"] != IGNORE).sum()
            num_input_tokens += batch["input_ids"].numel()

        # Clip and step (all ranks)
        with phase("checkpoint"):
            wait_for_copy(saver)  # the update would change what is being copied
        with phase("optimizer"):
            lr = learning_rate(step + ahead, total_steps + ahead, warmup_steps, args.max_lr, args.min_lr,
                               args.schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr
            num_replicas, votes = ranks.world_size // mesh.size(-1), votes_to_stop(asked, run_dir, ranks)
            losses, count, grad_norm, votes = reduce_stats(model, loss_sums, token_count, num_replicas, votes)
            skipped = clip_and_step(optimizer, grad_norm, count, args.grad_clip)
            optimizer.zero_grad()
            num_trained, norm, skipped, *values = torch.stack(
                [count, grad_norm, skipped, *losses, *votes]).tolist()  # sync point
            losses, votes = values[:len(losses)], values[len(losses):]

        # Count
        step += 1
        progress |= {
            "step": step, "samples": progress["samples"] + samples_per_step,
            "tokens": progress["tokens"] + int(num_trained),
            "skipped_steps": progress["skipped_steps"] + int(skipped),
            "bad_in_a_row": progress["bad_in_a_row"] + 1 if skipped else 0,
        }
        bar.update()
        stop = next((name for name, count in zip(STOPS, votes) if count), None)
        is_last, every = step == total_steps, args.checkpoint_interval
        may_be_best = args.keep_best and args.eval_interval and step % args.eval_interval == 0
        is_save = every and (is_last or stop or may_be_best or step % every == 0)

        # Log
        if step % args.log_interval == 0 or is_save or is_last or stop or step == 1:
            seconds, num_steps = time.perf_counter() - row_started, step - row_step
            per_gpu = num_input_tokens / seconds
            row = {
                "step": step, "samples": progress["samples"],
                **{f"train/{name}": value for name, value in zip(LOSSES, losses)},
                "train/perplexity": math.exp(min(losses[0], 700.0)), "train/lr": lr,
                "train/grad_norm": norm, "train/skipped_steps": progress["skipped_steps"],
                "train/tokens": progress["tokens"], "perf/tokens_per_s": per_gpu * ranks.world_size,
                "perf/tokens_per_s_per_gpu": per_gpu, "perf/peak_mem_gib": peak_memory_gib(ranks.device),
                "time/step_s": seconds / num_steps,
                **{f"time/{key}_s": value / num_steps for key, value in times.items()},
            }
            if token_flops and device_flops:
                row["perf/mfu"] = per_gpu * token_flops / device_flops
            for track in trackers:
                track(row)
            row_started, row_step, num_input_tokens = time.perf_counter(), step, 0
            times.clear()
        stall_after(None)
        if skipped and ranks.is_main:
            bar.write(f"no update in step {step}: its gradient is not finite")
        if progress["bad_in_a_row"] >= args.max_bad_steps:
            finish_save(saver)
            raise UserError(f"{args.max_bad_steps} steps in a row had a gradient that is not finite: lower "
                            "--max-lr, or look at the data (a step without a trained token counts, too)")

        # Save (all ranks): before the evaluation, which may run out of memory
        if is_save:
            with phase("checkpoint"):
                tensors = checkpoint_tensors(model, optimizer, ranks)
                if stream is not None:
                    tensors["stream"] = {str(ranks.rank): json.dumps(stream)}
                start_save(saver, tensors, progress, texts, ranks)
                if is_last or stop or not args.async_checkpoint:
                    finish_save(saver, must=is_last or stop)
        if stop and not is_last:
            leave_stopped(stop, saver, ranks)

    # End -------------------------------------------------------------------------------------
    bar.close()
    proof = export_run(args, model, hf_folder, dtype, ranks) if args.export else None
    torch.distributed.destroy_process_group()  # rank 0 works alone from here: the others must not time out
    if ranks.is_main:
        write_summary(run_dir, progress, row | evaluation, time.perf_counter() - started)
        print(f"record     {run_dir / 'metrics.jsonl'}, {run_dir / 'summary.json'}")
        if proof:
            print(f"model      {run_dir / 'hf'} (Hugging Face format; "
                  f"{verify_export(run_dir / 'hf', *proof, args.trust_remote_code)})")
            print(f"next       {next_command(args)}")


if __name__ == "__main__":
    run_and_report(saves_memory="lower --batch-size and raise --grad-accum-steps, or use "
                                "--activation-checkpointing full")
