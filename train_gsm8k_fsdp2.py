"""Train a causal language model with GRPO on GSM8K's questions, with PyTorch FSDP2 (reinforcement learning).

One file, no Trainer: it shards any causal LM of Hugging Face transformers with `fully_shard`, lets it answer
each question several times, judges the answers by the number that they end with, and makes the better ones of
each group likelier. Completions come from these processes themselves, or from a vLLM server whose weights
follow the trainer's (both ends of that wire are in section 7). Checkpoints, signals and export are those of
train_llm.py. Left out on purpose: learned rewards, tools and several turns, top-p and top-k sampling (they
bias the ratio), tensor and pipeline parallelism in the trainer, LoRA.

    python train_gsm8k_fsdp2.py --model FOLDER --dataset FOLDER      # one CPU process, or all GPUs
    torchrun --nproc_per_node 8 train_gsm8k_fsdp2.py --model Qwen/Qwen2.5-1.5B-Instruct --batch-size 4
    examples/run_gsm8k.sh --config configs/train_gsm8k_fsdp2/qwen2.5_7b.yaml    # vLLM on the first GPU
    sbatch --nodes 4 launch_slurm.sh train_gsm8k_fsdp2.py --rollouts vllm --vllm-host 10.0.0.9

Contents: 1 Arguments, 2 Distributed, 3 Data, 4 Model, 5 Optimizer and schedule, 6 Rollouts, 7 Weights to
vLLM, 8 Advantages and loss, 9 Checkpoints and export, 10 Run record, 11 Evaluation, 12 Training. For another
task change prompt and reward in section 3, for another objective section 8. `EDIT:` marks the lines that
people change.
"""

import argparse
import atexit
import contextlib
import ctypes
import dataclasses
import errno
import faulthandler
import fcntl
import functools
import http.client
import importlib.util
import inspect
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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

# FSDP, DCP, transformers, datasets, yaml and tqdm are imported inside the functions that use them: --help and
# wrong flags must not wait for them.


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
    parser = open_parser("%(prog)s [--config FILE] [--model NAME_OR_FOLDER] [other flags]")
    add_model_and_data_flags(parser.add_argument_group("model and questions"))
    add_rollout_flags(parser.add_argument_group("rollouts"))
    add_training_flags(parser.add_argument_group("training"))
    onoff, add = argparse.BooleanOptionalAction, parser.add_argument_group("evaluation").add_argument
    add("--eval-every", type=int, metavar="STEPS", default=0, help="0: at the end only")
    add("--eval-first", action=onoff, default=False, help="also before the first step")
    add("--eval-limit", type=int, metavar="N", help="the first N questions of the split; 0: no evaluation")
    add_system_flags(parser.add_argument_group("devices, sharding and memory"), recompute="full")
    record = parser.add_argument_group("checkpoints and logging")
    add_run_flags(record, "checkpoints_gsm8k_fsdp2", save_every=50)
    record.add_argument("--logger", choices=["rich", "print", "none"], default="print", help="rich: a live "
                        "panel (needs the rich package); print: a line a step")
    record.add_argument("--log-level", choices=["DEBUG", "INFO", "WARNING"], default="INFO", help="DEBUG: "
                        "also a right and a wrong answer of each step; WARNING: only what is wrong")
    parser.set_defaults(stall_timeout=1800.0)  # a step generates first
    return parser


def add_model_and_data_flags(group: argparse._ArgumentGroup) -> None:
    onoff, add = argparse.BooleanOptionalAction, group.add_argument
    add("--model", metavar="NAME_OR_FOLDER", default="Qwen/Qwen2.5-7B-Instruct", help="the policy's first "
        "weights: any Hugging Face causal LM")
    add("--chat-template", metavar="FILE", help="Jinja chat template in place of the tokenizer's")
    add("--trust-remote-code", action=onoff, default=False, help="run code that comes with the model")
    add("--dataset", default="openai/gsm8k", help="hub name, folder with a file for each split, or a .jsonl "
        ".json .parquet .csv file; rows are question and answer, the answer ends with '#### number'")
    add("--dataset-config", metavar="NAME", default="main", help="configuration of a hub data set")
    add("--dataset-split", default="train", help="split to train on")
    add("--eval-split", metavar="SPLIT_OR_FILE", default="test", help="split, or file, to evaluate on")
    add("--limit", type=int, metavar="N", help="train on the first N questions only")
    add("--system-prompt", default=SYSTEM_PROMPT, metavar="TEXT", help="'' for none")
    add("--max-prompt-tokens", type=int, default=512, help="longer questions are left out")


def add_rollout_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--rollouts", choices=["local", "vllm"], default="local", help="who generates: these processes, or a "
        "vLLM server")
    add("--vllm-host", default="127.0.0.1", help="of the server that examples/run_gsm8k.sh starts")
    add("--vllm-port", type=int, default=8000, help="of the same")
    add("--vllm-timeout", type=float, metavar="SECONDS", default=300.0, help="for each answer of it")
    add("--sync-backend", choices=["nccl", "gloo"], help="for sending weights to vLLM; if not given: nccl on "
        "GPUs. gloo where vLLM shares the trainer's GPU or runs on a CPU")
    add("--concurrency", type=int, default=4, help="requests under way from each process, one a question")
    add("--async-depth", type=int, choices=[0, 1], default=0, help="1: the next batch is generated while "
        "this one trains, with weights one step older")
    add("--batch-size", type=int, default=1, help="questions a step and process")
    add("--group-size", type=int, default=8, help="completions a question")
    add("--max-new-tokens", type=int, default=512, help="longest completion")
    add("--temperature", type=float, default=1.0, help="of sampling; loss and logged logprobs use it, too")
    add("--rollout-batch", type=int, metavar="N", default=128, help="completions that a process generates "
        "side by side with --rollouts local")
    add("--zero-variance", choices=["keep", "drop"], default="drop", help="groups of equal rewards")
    add("--format-reward", type=float, metavar="REWARD", default=0.0, help="for a completion that ends with "
        "one final answer, beside 1 for a right one")


def add_training_flags(group: argparse._ArgumentGroup) -> None:
    onoff, add = argparse.BooleanOptionalAction, group.add_argument
    add("--train-steps", type=int, default=50, help="batches; each is --updates-per-batch updates; 0: "
        "evaluate only")
    add("--updates-per-batch", type=int, default=1, help="passes over a batch, with an update each")
    add("--loss", choices=list(CLIP), default="grpo", help="see `policy_loss` in section 8")
    add("--clip-low", type=float, help="the ratio is clipped below 1 - this; if not given: 0.2, gspo 3e-4")
    add("--clip-high", type=float, help="and above 1 + this; if not given: 0.2, dapo 0.28, gspo 4e-4")
    add("--kl-coef", type=float, default=0.0, help="of the distance to the first weights; needs their memory")
    add("--tis-cap", type=float, metavar="CAP", default=2.0, help="truncated importance sampling: weigh "
        "tokens by trainer's over sampler's probability, at most this; 0: do not")
    add("--mask-truncated", action=onoff, default=False, help="learn nothing from answers cut at "
        "--max-new-tokens, rather than that they are wrong")
    add("--micro-batch-tokens", type=int, metavar="N", default=16384, help="padded tokens of a micro-batch")
    add("--max-lr", type=float, default=1e-6, help="learning rate after warm-up")
    add("--min-lr", type=float, help="where the cosine ends; if not given: --max-lr, so that it is constant")
    add("--warmup-steps", type=int, default=0, help="of a linear warm-up")
    add("--weight-decay", type=float, default=0.0, help="on matrices; not on norms, biases and embeddings")
    add("--grad-clip", type=float, default=1.0, help="largest global gradient norm; 0 is off")
    add("--seed", type=int, default=0, help="of the order of questions and of local sampling")


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
    """Those that depend on other flags."""
    low, high = CLIP[args.loss]
    args.clip_low = low if args.clip_low is None else args.clip_low
    args.clip_high = high if args.clip_high is None else args.clip_high
    args.min_lr = args.max_lr if args.min_lr is None else args.min_lr


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
    positive = ("batch_size max_prompt_tokens max_new_tokens rollout_batch concurrency vllm_timeout "
                "vllm_port updates_per_batch micro_batch_tokens limit nproc hsdp_shard_size stall_timeout")
    not_negative = ("clip_low clip_high kl_coef tis_cap max_lr min_lr warmup_steps weight_decay grad_clip "
                    "format_reward keep_checkpoints eval_every eval_limit checkpoint_interval "
                    "train_steps seed")
    yield from find_common_problems(args, positive, not_negative, "dataset model")
    if args.group_size < 2:
        yield f"--group-size must be at least 2, not {args.group_size}: a group is compared with itself"
    if not 0 < args.temperature < math.inf:
        yield f"--temperature must be above 0, not {args.temperature}: what does not differ teaches nothing"
    if args.async_depth and args.rollouts != "vllm":
        yield "--async-depth 1 needs --rollouts vllm: these processes cannot generate and train at once"
    if args.warmup_steps > args.train_steps:
        yield f"--warmup-steps {args.warmup_steps} is more than --train-steps {args.train_steps}"
    if args.logger == "rich" and not importlib.util.find_spec("rich"):
        yield "--logger rich needs the rich package: python -m pip install rich"


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
# 3. Data: questions, prompts, the reward, one global order

DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
SYSTEM_PROMPT = r"Reason step by step, and put the final answer, one number, within \boxed{}."


def load_questions(args: Namespace, tokenizer, split: str, limit: int | None, say: Callable) -> list[dict]:
    """{'question', 'answer', 'gold', 'prompt'} of each row of a split, in file order; those whose prompt is
    longer than --max-prompt-tokens are left out. Raises UserError."""
    if limit == 0:  # --eval-limit
        return []
    rows = read_questions(args, split)[:limit]
    for row in rows:
        row["prompt"] = render_prompt(tokenizer, row["question"], args.system_prompt)
    kept = [row for row in rows if len(row["prompt"]) <= args.max_prompt_tokens]
    if not kept:
        raise UserError(f"--max-prompt-tokens {args.max_prompt_tokens} leaves no question of '{split}'")
    left_out = f"; {len(rows) - len(kept):,} longer than --max-prompt-tokens are left out"
    say(f"questions  {len(kept):,} of '{split}'" + left_out * (len(kept) < len(rows)))
    return kept


def read_questions(args: Namespace, split: str) -> list[dict]:
    """{'question', 'answer', 'gold'} of each row; gold is the answer's number. Raises UserError that names
    the first faulty row: unnoticed, it could never earn a reward."""
    questions = []
    for path in split_files(args, split):
        if path and path.suffix in (".jsonl", ".json"):
            questions += [to_question(row, where) for where, row in json_lines(path)]
            continue
        where = str(path or f"{args.dataset} ({split})")
        with naming(f"--dataset {where}"):
            import datasets
            rows = (datasets.load_dataset(path.suffix[1:], data_files=str(path), split="train") if path
                    else datasets.load_dataset(args.dataset, args.dataset_config or None, split=split))
        questions += [to_question(row, f"{where} row {number}") for number, row in enumerate(rows, 1)]
    if not questions:
        raise UserError(f"--dataset {args.dataset} holds no questions of '{split}'; of a folder those files "
                        f"are read that have this word in their names, such as {split}.jsonl")
    return questions


def split_files(args: Namespace, split: str) -> list[Path | None]:
    """The local files of a split; [None] for the name of a hub data set."""
    source = Path(split if Path(split).suffix in DATA_SUFFIXES else args.dataset)
    if source.is_dir():
        # A clone of a hub repository holds a folder for each configuration.
        configured = source / (args.dataset_config or "")
        files = (configured if configured.is_dir() else source).rglob("*")
        return [path for path in sorted(files) if path.suffix in DATA_SUFFIXES
                and split.lower() in re.split(r"[^a-z0-9]+", path.name.lower())]
    if source.suffix not in DATA_SUFFIXES:
        return [None]
    if source == Path(args.dataset) and split not in (args.dataset, args.dataset_split):
        # Or the model would be evaluated on what it was trained on.
        raise UserError(f"--dataset {source} is one file without a split '{split}': give --eval-split a file "
                        "of its own, or --dataset a folder with train and test files")
    return [source]


def json_lines(path: Path) -> Iterator[tuple[str, object]]:
    with naming(str(path)):
        lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            with naming(f"{path}:{number}: expected one JSON object a line"):
                row = json.loads(line)
            yield f"{path}:{number}", row


def to_question(row: object, where: str) -> dict:
    question, answer = (row.get(key) if isinstance(row, dict) else None for key in ("question", "answer"))
    if not (isinstance(question, str) and question.strip() and isinstance(answer, (str, int, float))):
        raise UserError(f"{where}: expected texts called 'question' and 'answer', not {str(row)[:100]}")
    answer = str(answer)
    # Other data sets give the bare number where GSM8K gives its derivation, too.
    number = final_answer(answer) or answer
    gold = parse_number(number)
    if gold is None:
        raise UserError(f"{where}: no number to compare with in the answer {number[-60:]!r}; it must end "
                        "with a line such as '#### 18'")
    return {"question": question, "answer": answer, "gold": gold}


def render_prompt(tokenizer, question: str, system_prompt: str) -> list[int]:  # EDIT: the prompt
    """Token ids of what the model is asked with; an empty system prompt is left out."""
    if not tokenizer.chat_template:
        text = "\n".join([*filter(None, [system_prompt]), f"Question: {question}", "Answer:"])
        ids, bare = tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids[:ids.index(bare[0]) + len(bare)]  # with BOS where the tokenizer adds it, without EOS
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    with naming("the chat template refuses the prompt (if it knows no system turn: --system-prompt '')"):
        return list(tokenizer.apply_chat_template(
            [*system, {"role": "user", "content": question}], add_generation_prompt=True, return_dict=False))


ANSWER_MARKER = re.compile(r"\\boxed\s*\{|(?<!#)####(?!#)")


def marked_answer(text: str) -> tuple[int, str, str]:
    """(number of markers, what stands in the last one, what follows it); \\boxed without its end holds ''."""
    markers = list(ANSWER_MARKER.finditer(text))
    if not markers:
        return 0, "", ""
    start, depth = markers[-1].end(), 1
    if markers[-1][0] == "####":
        inside, _, after = text[start:].partition("\n")
        return len(markers), inside.strip(), after
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return len(markers), text[start:i].strip(), text[i + 1:]
    return len(markers), "", ""


def final_answer(text: str) -> str | None:
    """What stands in the last \\boxed{…} or behind the last ####, whichever comes later; None if nothing."""
    return marked_answer(text)[1] or None


# What LaTeX and Markdown dress a number in, undone in this order, with the plain form.
UNDRESS = [(re.compile(pattern), plain) for pattern, plain in (
    (r"\{,\}|,\\!|(?<=[0-9])\\,(?=[0-9]{3})", ","),  # thousands: 1{,}234 1,\!234 1\,234
    (r"\\([$%])", r"\1"),
    (r"\\!|\^\{?\\circ\}?", ""),
    (r"\\[()\[\],;: ]|\\quad|(?<=[0-9{])~|\s+", " "),
    (r"\\(?:text|mathrm|mathbf|textbf|mathit|textit|mbox)\s*\{([^{}]*)\}", r"\1"),
    (r"\\[dt]?frac\s*(?:\{([-0-9.,]+)\}|([0-9]))\s*(?:\{([0-9.,]+)\}|([0-9]))", r" \1\2/\3\4 "),
    (r"\^\{([0-9])\}", r"^\1"),  # a unit's exponent
    (r"  +", " "),
)]
DIGITS = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)"  # commas in groups of three only, none after a lone 0
DECIMAL = rf"(?:{DIGITS}(?:\.[0-9]*)?|\.[0-9]+)"
# No digits but an exponent, and no signs: what is left of a sum, a range or a second number does not pass.
WORD = r"[A-Za-zÀ-ÖØ-öø-ɏ]+(?:[.'’-][A-Za-zÀ-ÖØ-öø-ɏ]+)*\.?(?:\^[0-9]|[²³])?"
NUMBER = re.compile(
    rf"(?P<sign>(?:[$€£¥] ?)*[-+]?) ?(?:[$€£¥] ?)*"
    rf"(?:(?P<whole>{DIGITS}) (?P<part>[0-9]+/[0-9]+)|(?P<top>{DECIMAL})(?: ?/ ?(?P<bottom>{DECIMAL}))?)"
    rf"(?P<times>(?: ?(?:hundred|thousand|million|billion)s?\b)*)"
    rf"[$€£¥%¢° ]*(?P<unit>(?:/ ?)?{WORD}(?:(?: ?/ ?| ){WORD}){{0,5}})?", re.IGNORECASE)
MAGNITUDES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}
SPACED = re.compile(r"(?<![0-9.,/] )(?<![0-9.,/])[1-9][0-9]{0,2}(?: [0-9]{3})+(?![0-9/]|[.,][0-9]| [0-9])")
POWER = re.compile(  # 1.5e3, 10^3, 1.5 x 10^3; of two digits at most, which bounds the time that it takes
    r"(?P<first>[-+]?[0-9]+(?:\.[0-9]*)?)[eE](?P<e>[-+]?[0-9]{1,2})|"
    r"(?:(?P<times>[-+]?[0-9]+(?:\.[0-9]*)?) ?(?:×|x|\*|\\times|\\cdot) ?)?10\^\{?(?P<p>-?[0-9]{1,2})\}?")
# Words behind a number that change its value or go on talking: not its unit.
NOT_UNITS = {*MAGNITUDES, "trillion", "k", "bn", "mn", "M", "B", "x", "y", "n", "and", "or", "to", "is",
             "not", "plus", "minus", "half", "halves", "third", "thirds", "fourths", "fifths", "tenths",
             "hundredths", "thousandths"}


def parse_number(text: str) -> Fraction | None:
    """The exact value of a text that is one number, whatever its dress and unit; None for anything else.

    3/4, 1 1/2 and \\frac{1}{2} are fractions, 50% is 50, 2 thousand is 2000, 8 000 is 8000, (18) is 18, 1.5e3
    and 1.5 x 10^3 are 1500; of 'x = 5' the right side."""
    if len(text) > 200:  # no number, and it bounds the time that the patterns take
        return None
    left, equals, text = text.replace("−", "-").rpartition("=")
    if equals and left.rstrip().endswith(("<", ">", "!", "~")):
        return None
    for pattern, plain in UNDRESS * 2:  # \text may stand in \textbf
        text = pattern.sub(plain, text)
    dressing = " $*_`{}"
    text = text.strip(dressing).removesuffix(".").strip(dressing)
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1].strip(dressing)
    if power := POWER.fullmatch(text):
        return Fraction(power["first"] or power["times"] or 1) * Fraction(10) ** int(power["e"] or power["p"])
    match = NUMBER.fullmatch(SPACED.sub(lambda found: found[0].replace(" ", ","), text))
    if match is None:
        return None
    words = re.findall(r"[^\W\d_]+", match["unit"] or "")
    if NOT_UNITS & {*words, *map(str.lower, words)}:
        return None
    parts = (match["whole"] or "0", *(match["part"] or f"{match['top']}/{match['bottom'] or 1}").split("/"))
    whole, top, bottom = (Fraction(part.replace(",", "")) for part in parts)
    if bottom == 0 or (match["part"] and top >= bottom):  # 1 5/2 is no mixed number
        return None
    value = whole + top / bottom
    for word in match["times"].lower().split():
        value *= MAGNITUDES[word.removesuffix("s")]
    return -value if "-" in match["sign"] else value


def reward(text: str, gold: Fraction, finished: bool, format_weight: float) -> tuple[float, bool]:  # EDIT:
    """(reward, right) of one completion. `finished`: it ended by itself and was not cut off at the limit."""
    # The mark spoils a number that the limit may have cut (#### 18 of 180), but not a closed \boxed.
    right = parse_number(final_answer(text if finished else text + "…") or "") == gold
    num_markers, answer, after = marked_answer(text)
    in_form = finished and num_markers == 1 and answer != "" and not after.strip()
    return float(right) + format_weight * in_form, right


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


def load_tokenizer(args: Namespace):
    from transformers import AutoTokenizer
    folder = fetch(args.model)
    with naming(f"no usable tokenizer in {folder}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=args.trust_remote_code)
    if args.chat_template:
        tokenizer.chat_template = Path(args.chat_template).read_text(encoding="utf-8")
    return tokenizer


def end_tokens(tokenizer, folder: Path) -> list[int]:
    """Tokens that end a completion: the tokenizer's and those of generation_config.json. Raises UserError."""
    path = folder / "generation_config.json"
    with naming(str(path)):
        more = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    found = {tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])} - {None}
    if not found:
        raise UserError(f"{folder}: no end-of-text token in the tokenizer or generation_config.json: "
                        "completions would never end")
    return sorted(found)


# ------------------------------------------------------------------------------------------------
# 4. Model: any causal LM of transformers; shard, materialise, fill, prove

def build_model(args: Namespace, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model on the meta device: shapes, no memory."""
    import transformers
    with naming(f"--model {args.model}"):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=args.trust_remote_code)
    refuse_quantised(folder, config)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit and args.max_prompt_tokens + args.max_new_tokens > limit:
        raise UserError(f"{args.model} knows {limit} positions: lower --max-prompt-tokens "
                        f"{args.max_prompt_tokens} or --max-new-tokens {args.max_new_tokens}")
    with naming(f"--model {args.model}"), torch.device("meta"):
        model = note_fp32(transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, trust_remote_code=args.trust_remote_code)).to(dtype)
    return model


def attach_logprobs(model: nn.Module, compiled: bool = False) -> None:
    """Give a transformers model the call of this script: logits, or with `rows` and `targets` the logprobs.

    `rows` (N,) are positions in the flattened (B, T), `targets` (N,) the tokens that follow them. Padding
    stands on the right, where causal attention does not see it: no attention mask is needed."""
    full_forward, head, base = model.forward, model.get_output_embeddings(), base_of(model)
    functions = {f.__name__: torch.compile(f) if compiled else f
                 for f in (to_logits, head_logprobs, logits_gradient)}
    model.whole_logits, model.chunk = base is model, 512  # see `prove_logprobs`, `rows_at_once`

    # As an attribute, not as a wrapping module: parameter names stay those of the files on disk.
    def forward(input_ids: Tensor, rows: Tensor | None = None, targets: Tensor | None = None,
                temperature: float = 1.0) -> tuple[Tensor, Tensor] | Tensor:
        if rows is None or model.whole_logits:
            logits = full_forward(input_ids=input_ids, use_cache=False).logits
            if rows is None:
                return logits
            return token_logprobs(logits.flatten(0, 1)[rows].float() / temperature, targets)
        hidden = base(input_ids=input_ids, use_cache=False)[0].flatten(0, 1)[rows]
        return ChunkedLogprobs.apply(hidden, head.weight, getattr(head, "bias", None), targets, functions,
                                     head_options(model) | {"temperature": temperature}, model.chunk)

    model.forward = forward


def head_options(model: nn.Module) -> dict[str, float]:
    """What some families do to their logits: Cohere and Granite scale them, Gemma 2 caps them."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return {"scale": scale, "cap": getattr(config, "final_logit_softcapping", None) or 0.0}


def to_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float = 1.0, cap: float = 0.0,
              temperature: float = 1.0) -> Tensor:
    """Logits over the temperature, in fp32. (N, D), (V, D), (V,) -> (N, V)."""
    logits = F.linear(hidden.to(weight.dtype), weight, bias).float()  # Mamba 2 adds up its layers in fp32
    if scale != 1:  # each of these is a pass over the largest tensor there is
        logits = logits * scale
    if cap:
        logits = cap * torch.tanh(logits / cap)
    return logits if temperature == 1 else logits / temperature


def token_logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p(target) and the distribution's entropy, without gradient. (N, V), (N,) -> (N,), (N,)."""
    logprobs = torch.log_softmax(logits, dim=-1)
    with torch.no_grad():
        entropy = -logprobs.exp().mul_(logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], entropy


def head_logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, **options: float
                  ) -> tuple[Tensor, Tensor]:
    """(N, D), (V, D), (V,), (N,) -> (N,), (N,), see `token_logprobs`; `options` of `to_logits`."""
    return token_logprobs(to_logits(hidden, weight, bias, **options), targets)


def logits_gradient(logits: Tensor, targets: Tensor, grad: Tensor) -> Tensor:
    """Of log p(target) times `grad`: (one-hot - softmax) * grad. (N, V), (N,), (N,) -> (N, V)."""
    grad = grad[:, None]  # scatter_add: without the zeros that gather's own backward would make
    return torch.softmax(logits, dim=-1).mul(-grad).scatter_add(1, targets[:, None], grad)


class ChunkedLogprobs(torch.autograd.Function):
    """`token_logprobs` of hidden states under an output head, in chunks, forward and backward.

    Logits, their softmax and their gradient exist for one chunk only. The backward computes each chunk's
    logits again: unlike with a summed loss, the gradient of each logprob is not known before all are."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, functions, options, chunk):
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.functions, ctx.options, ctx.chunk = functions, options, chunk
        chunks = [slice(start, start + chunk) for start in range(0, len(hidden), chunk)]
        found = [functions["head_logprobs"](hidden[rows], weight, bias, targets[rows], **options)
                 for rows in chunks]
        logprobs, entropies = (torch.cat(parts) for parts in zip(*found))
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad_logprobs, _):
        hidden, weight, bias, targets = ctx.saved_tensors
        params = [weight] if bias is None else [weight, bias]
        # fp32: over hundreds of chunks a bf16 sum would lose the small addends.
        sums = [torch.zeros_like(param, dtype=torch.float32) for param in params]
        grad_hidden = torch.empty_like(hidden)
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            with torch.enable_grad():
                leaves = [tensor.detach().requires_grad_() for tensor in (hidden[rows], *params)]
                logits = ctx.functions["to_logits"](*leaves[:2], leaves[2] if bias is not None else None,
                                                    **ctx.options)
            grad = ctx.functions["logits_gradient"](logits.detach(), targets[rows], grad_logprobs[rows])
            grad_hidden[rows], *grads = torch.autograd.grad(logits, leaves, grad)
            for total, grad in zip(sums, grads):
                total += grad
            del grads, grad  # of the size of the head: not beside the next chunk's logits
        grad_params = [total.to(weight.dtype) for total in sums]
        return grad_hidden, *grad_params, *[None] * (6 - len(grad_params))


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


@torch.no_grad()
def prove_logprobs(model: nn.Module, ranks: Ranks) -> None:
    """Compare the chunked logprobs, token by token, with those of the model's own logits. A family that
    transforms its logits in a way that `to_logits` does not know keeps whole logits (all ranks)."""
    ids = plain_tokens(model, 2, 32, ranks.device)
    targets, rows = ids.flatten(), torch.arange(ids.numel(), device=ranks.device)
    with torch.compiler.set_stance("force_eager"):
        logits = model(ids)
        expected, _ = token_logprobs(logits.flatten(0, 1).float(), targets)
        chunked, _ = model(ids, rows, targets)
    reshard(model)
    if not torch.isfinite(expected).all():
        raise UserError("the model's logits are not finite on a plain input: its weights are broken")
    # bf16: half a unit in the last place of the largest logit, by which two orders of adding may differ.
    bound = 3e-6 if logits.dtype == torch.float32 else torch.finfo(logits.dtype).eps / 2
    if not (chunked - expected).abs().mean() <= bound * logits.abs().max():
        model.whole_logits = True
        if ranks.is_main:
            print("this model transforms its logits in a way of its own: whole logits are used (more memory)")


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


def learning_rate(step: int, total_steps: int, warmup_steps: int, max_lr: float, min_lr: float) -> float:
    """For the update after `step` updates: linear warm-up to max_lr, then a cosine that ends at min_lr."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return min_lr + 0.5 * (max_lr - min_lr) * (1 + math.cos(math.pi * min(1.0, progress)))


# ------------------------------------------------------------------------------------------------
# 6. Rollouts: local, or from vLLM

ROLLOUT_LOG = "fsdp2_gsm8k_rollouts.rank{rank}.jsonl"


@dataclasses.dataclass
class Completion:
    ids: list[int]  # with the end token
    logprobs: list[float]  # of each, under the distribution that it was drawn from
    finish: str  # "stop" or "length"


@dataclasses.dataclass
class Group:
    """A question's completions. Plain values, because ranks send them to one another."""
    position: int  # in the endless global order of questions
    question: int  # the row in the data set
    version: int  # steps that the sampler's weights had been trained for
    prompt_ids: list[int]
    completions: list[Completion]
    rewards: list[float] = dataclasses.field(default_factory=list)
    correct: list[bool] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Sampling:
    """How completions are drawn; temperature 0 is greedy."""
    temperature: float
    max_new_tokens: int
    ends: list[int]


@torch.no_grad()
def draw_tokens(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row, and its logprob in the distribution drawn from. (N, V), (N,) -> (N,), (N,).

    By inverting the cumulative distribution at `uniform` (in [0, 1)): what is drawn depends on nothing but
    the row's logits and its number, not on the rows beside it."""
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        # CUDA promises no order for sums of floats, whose last bits hardly ever matter here.
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)
        # fp64: where a GPU's scan joins its blocks, fp32 would now and then step on an impossible token.
        cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
        torch.use_deterministic_algorithms(deterministic)
        found = torch.searchsorted(cumulative, uniform[:, None].double() * cumulative[:, -1:], right=True)
        tokens = found[:, 0].clamp(max=logits.shape[-1] - 1)  # the product may round up to the sum
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def uniforms(seeds: list[int], n: int, length: int, device: torch.device) -> Tensor:
    """(P * n, length) numbers in [0, 1), each prompt's from its own seed, the same on any device."""
    drawn = [torch.rand(n, length, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(drawn).to(device)


def share_tensors(model: nn.Module, generator: nn.Module) -> None:
    """Let the plain, hook-free generator use the model's gathered parameters and its buffers; no copy."""
    parameters = model.named_parameters(remove_duplicate=False)
    for name, tensor in [*parameters, *model.named_buffers(remove_duplicate=False)]:
        owner, _, leaf = name.rpartition(".")
        module = generator.get_submodule(owner)
        (module._parameters if leaf in module._parameters else module._buffers)[leaf] = tensor


def padded_mask(*args: object, **options: object) -> Tensor | None:
    """transformers' mask for SDPA, but padding in front looks at everything: nobody looks at it, and a row
    that looks at nothing comes out of some kernels as NaN, which spreads."""
    from transformers.masking_utils import sdpa_mask
    mask = sdpa_mask(*args, **options)
    return mask if mask is None else mask | ~mask.any(-1, keepdim=True)


def build_generator(args: Namespace, folder: Path, whole_logits: bool) -> nn.Module:
    """The model again, without memory of its own (`share_tensors`), hooks or recomputation."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    generator = build_model(args, folder).eval()
    generator.whole_logits = whole_logits
    if generator.config._attn_implementation == "sdpa" and generator._supports_attention_backend:
        AttentionInterface.register("sdpa_padded", sdpa_attention_forward)
        AttentionMaskInterface.register("sdpa_padded", padded_mask)
        for config in (generator.config, generator.config.get_text_config()):
            config._attn_implementation = "sdpa_padded"
    return generator


def without_cudnn() -> contextlib.AbstractContextManager:
    """Attention by kernels that need no plan for each new length: cuDNN's takes 20 to 40 ms a token."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    flash = [SDPBackend.FLASH_ATTENTION] if torch.backends.cuda.flash_sdp_enabled() else []
    return sdpa_kernel([*flash, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


@torch.no_grad()
def generate(generator: nn.Module, prompts: list[list[int]], n: int, uniform: Tensor, sampling: Sampling
             ) -> list[Completion]:
    """n completions of each prompt, prompt by prompt, with a key-value cache.

    `uniform` is (P * n, new tokens). Prompts are read once and padded on the left. When half of the rows have
    ended, the rest goes on alone."""
    from transformers import DynamicCache
    device, width, total = uniform.device, max(map(len, prompts)), len(prompts) * n
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    cache, head = DynamicCache(config=generator.config), generator.get_output_embeddings()
    reader = generator if generator.whole_logits else base_of(generator)
    options, known = head_options(generator), inspect.signature(type(reader).forward).parameters
    # Its name depends on family and version of transformers, which ignores a wrong one; see `prove_rollouts`.
    name = next((name for name in ("cache", "past_key_values", "cache_params") if name in known), "cache")

    def next_logits(ids: Tensor, position: Tensor) -> Tensor:
        call = {"input_ids": ids, "attention_mask": mask, "position_ids": position, name: cache}
        out = reader(**call, use_cache=True)
        if generator.whole_logits:
            return out.logits[:, -1]
        return to_logits(out[0][:, -1], head.weight, getattr(head, "bias", None), **options)

    def of_rows(index: Tensor, *tensors: Tensor) -> list[Tensor]:
        cache.reorder_cache(index)
        return [tensor[index] for tensor in tensors]

    logits, position = next_logits(ids, position), position[:, -1:]
    repeated = torch.arange(len(prompts), device=device).repeat_interleave(n)
    logits, mask, position = of_rows(repeated, logits, mask, position)
    ends = torch.tensor(sampling.ends, device=device)
    tokens = torch.zeros(total, sampling.max_new_tokens, dtype=torch.int64, device=device)
    logprobs, lengths = torch.zeros(tokens.shape, device=device), torch.zeros_like(tokens[:, 0])
    rows, running = torch.arange(total, device=device), torch.ones(total, dtype=torch.bool, device=device)
    for t in range(sampling.max_new_tokens):
        drawn, logprob = draw_tokens(logits, sampling.temperature, uniform[rows, t])
        tokens[rows, t], logprobs[rows, t] = drawn, logprob
        lengths[rows] += running
        running = running & ~torch.isin(drawn, ends)
        num_running = int(running.sum())  # sync point
        if not num_running or t + 1 == sampling.max_new_tokens:
            break
        if num_running <= len(rows) // 2:
            rows, running, drawn, mask, position = of_rows(
                running.nonzero()[:, 0], rows, running, drawn, mask, position)
        mask, position = F.pad(mask, (0, 1), value=1), position + 1
        logits = next_logits(drawn[:, None], position)
    found = zip(tokens.tolist(), logprobs.tolist(), lengths.tolist())
    return [Completion(ids[:length], known[:length], "stop" if ids[length - 1] in sampling.ends else "length")
            for ids, known, length in found]


@dataclasses.dataclass
class Server:
    """A vLLM server, this process's requests under way to it, and on rank 0 the wire to its workers."""
    host: str
    port: int
    timeout_s: float
    pool: ThreadPoolExecutor | None = None
    version: int = -1  # of the weights that it has
    proof_error: float = 0.0  # of the last push
    group: object = None  # of rank 0 and the workers
    wire: torch.device | None = None  # that tensors are sent from

    @property
    def address(self) -> str:
        return f"vLLM at {self.host}:{self.port}"


def request(server: Server, path: str, body: dict | None = None, again: bool = True) -> object:
    """The answer's JSON, None for an empty one. While nobody answers, the server is asked `again` until the
    deadline. Raises UserError."""
    deadline, headers = time.monotonic() + server.timeout_s, {"Content-Type": "application/json"}
    while True:
        # 5 s more than vLLM's workers have, whose error says more.
        connection = http.client.HTTPConnection(server.host, server.port, timeout=server.timeout_s + 5)
        try:
            data = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", path, data, headers)
            response = connection.getresponse()
            text = response.read().decode(errors="replace")
            break
        except (OSError, http.client.HTTPException) as error:
            if not again or time.monotonic() > deadline:
                raise UserError(f"{server.address} does not answer {path} ({first_line(error)}): is it "
                                "running? The same command goes on from the newest checkpoint") from error
            time.sleep(0.5)
        finally:
            connection.close()
    if response.status != 200:
        raise UserError(f"{server.address} refuses {path} (status {response.status}, {text[:300]!r}): was it "
                        "started as examples/run_gsm8k.sh does, with VLLM_SERVER_DEV_MODE=1 and "
                        "--worker-extension-cls train_gsm8k_fsdp2.WeightReceiver?")
    with naming(f"{server.address} does not answer as vLLM does"):
        return json.loads(text) if text.strip() else None


def check_tokens(ids: list, logprobs: list) -> None:
    """Raises ValueError or TypeError for what vLLM does not answer."""
    if not ids or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise ValueError("no tokens, or one that is not a number from 0 on")
    if len(ids) != len(logprobs) or not all(map(math.isfinite, logprobs)):
        raise ValueError("not one finite logprob for each token")


def complete(server: Server, prompt_ids: list[int], n: int, sampling: Sampling) -> list[Completion]:
    """n completions of a prompt, token ids in and out. Raises UserError.

    Without a seed: vLLM 0.32 draws seeded requests one by one, and on a CPU they end its engine when a prompt
    is read in pieces."""
    body = {"prompt": prompt_ids, "n": n, "logprobs": 0, "temperature": sampling.temperature,
            "max_tokens": sampling.max_new_tokens, "stop_token_ids": sampling.ends,
            "return_token_ids": True, "skip_special_tokens": False,
            # What a request leaves out, vLLM takes from the model's generation_config.json; 0 is no top_k.
            "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
            "frequency_penalty": 0.0}
    answer = request(server, "/v1/completions", body)
    with naming(f"{server.address} does not answer as vLLM does"):
        found = [Completion(choice["token_ids"], choice["logprobs"]["token_logprobs"],
                            choice["finish_reason"]) for choice in answer["choices"]]
        for completion in found:
            check_tokens(completion.ids, completion.logprobs)
        # "abort": somebody else has paused the server.
        if len(found) != n or any(completion.finish not in ("stop", "length") for completion in found):
            raise ValueError(f"{n} finished completions expected: {found}")
    return found


@dataclasses.dataclass
class Sampler:
    """Who generates: a server, or the generator, which borrows the model's parameters."""
    model: nn.Module
    generator: nn.Module | None
    server: Server | None
    batch: int  # completions side by side, for the generator
    device: torch.device
    sampling: Sampling
    dtype: torch.dtype  # that the model computes in


def start_completions(sampler: Sampler, prompts: list[list[int]], n: int, seeds: list[int], sampling: Sampling
                      ) -> list[Callable[[], list[Completion]]]:
    """For each prompt a function that waits for its n completions. With a server the requests are under way
    when this returns; locally the work is done here, drawn by the prompts' seeds (all ranks)."""
    from torch.distributed.fsdp import FSDPModule
    from tqdm import tqdm
    server, found, per_call = sampler.server, [], max(1, sampler.batch // n)
    is_silent = not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0"
    if server:
        return [server.pool.submit(complete, server, prompt, n, sampling).result for prompt in prompts]
    units = [module for module in sampler.model.modules() if isinstance(module, FSDPModule)]
    for unit in units:  # whole parameters on every rank (all ranks); until they are freed no rank waits
        unit.unshard()
    with without_cudnn():
        share_tensors(sampler.model, sampler.generator)
        starts = range(0, len(prompts), per_call)
        for start in tqdm(starts, desc="generating", leave=False, disable=is_silent):
            some = slice(start, start + per_call)
            uniform = uniforms(seeds[some], n, sampling.max_new_tokens, sampler.device)
            found += generate(sampler.generator, prompts[some], n, uniform, sampling)
    for unit in units:
        unit.reshard()
    groups = [found[start:start + n] for start in range(0, len(found), n)]
    return [functools.partial(list, group) for group in groups]


def start_batch(sampler: Sampler, questions: list[dict], progress: dict, phase: Callable, args: Namespace,
                ranks: Ranks) -> list[tuple[Group, Callable]]:
    """Ask the next batch of the global order, in which ranks take turns of --batch-size, of this step's
    weights: this rank's groups, without completions yet, and for each what waits for them (all ranks)."""
    with phase("sync"):
        update_server(sampler, progress["step"], questions[0]["prompt"], ranks)
    groups, first = [], progress["samples"] + ranks.rank * args.batch_size
    for position in range(first, first + args.batch_size):
        question = sample_at(position, len(questions), args.seed)
        groups.append(Group(position, question, progress["step"], questions[question]["prompt"], []))
    # crc32, not hash(): Python salts the hashes of texts in each process anew.
    seeds = [zlib.crc32(f"{args.seed} sample {group.position}".encode()) for group in groups]
    prompts = [group.prompt_ids for group in groups]
    with phase("generate"):
        waiting = start_completions(sampler, prompts, args.group_size, seeds, sampler.sampling)
    return list(zip(groups, waiting))


def judge(tokenizer, completion: Completion, gold: Fraction, format_weight: float) -> tuple[float, bool]:
    """(reward, right)."""
    text = tokenizer.decode(completion.ids, skip_special_tokens=True)
    return reward(text, gold, completion.finish == "stop", format_weight)


def judge_batch(groups: list[Group], questions: list[dict], tokenizer, step: int, args: Namespace,
                ranks: Ranks) -> list[Group]:
    """Fill in rewards, and log the groups (a step that a resume repeats stands there twice); returns those of
    all ranks, in global order (all ranks)."""
    for group in groups:
        gold = questions[group.question]["gold"]
        judged = [judge(tokenizer, completion, gold, args.format_reward) for completion in group.completions]
        group.rewards, group.correct = map(list, zip(*judged))
    rows = [{"step": step} | dataclasses.asdict(group) for group in groups]
    append_lines(Path(args.checkpoint_dir) / ROLLOUT_LOG.format(rank=ranks.rank), *rows)
    return list(itertools.chain(*gather_objects(groups)))


def has_variance(group: Group) -> bool:
    return max(group.rewards) > min(group.rewards)


# ------------------------------------------------------------------------------------------------
# 7. Weights to vLLM

# A process group of its own joins rank 0 (its rank 0) and vLLM's workers (1 …). They are told names, dtypes
# and shapes, then rank 0 broadcasts the tensors one by one, as bytes. Workers stage all of them in host
# memory (requests wait meanwhile) and swap only when everybody has everything: a trainer that dies on the
# way changes nothing.

class WeightReceiver:
    """vLLM's end: `--worker-extension-cls train_gsm8k_fsdp2.WeightReceiver` adds these methods to each
    worker, and rank 0 calls them through /collective_rpc. They run in vLLM's processes, and use torch and
    what the worker has (`rank`, `device`, `reload_weights`, `get_model`)."""

    def call_weights(self, method: str, *args: object) -> dict:
        """One of the methods below; an error is an answer, too. vLLM reads no other worker's answer behind a
        failure, nor any that comes after a timeout, and would take it for that of its next call, for ever."""
        try:
            return getattr(self, method)(*args) or {}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {first_line(error)}"}

    def open_weights(self, host: str, port: int, world_size: int, backend: str, timeout_s: float) -> None:
        self.close_weights()
        store = torch.distributed.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))
        self.weight_group = join_group(store, 1 + self.rank, world_size, backend, local_address(host, port),
                                       timeout_s)
        self.weight_timeout_s, self.weight_backend, self.staged = timeout_s, backend, {}

    def receive_weights(self, layout: list[tuple[str, str, list[int]]]) -> None:
        """Stage all tensors of (name, dtype, shape). Raises if the stream breaks off."""
        self.staged = {}
        device = self.device if self.weight_backend == "nccl" else torch.device("cpu")
        for name, dtype, shape in layout:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            broadcast(self.weight_group, tensor.view(-1).view(torch.uint8), self.weight_timeout_s)
            self.staged[name] = tensor.cpu()  # a GPU has no room for a second model

    def swap_weights(self, version: int) -> None:
        """Bring the staged weights into the model, by the same path as loading from disk."""
        self.reload_weights(weights_iterator=iter(self.staged.items()))
        self.staged = {}
        self.mend_tied_head()
        self.version = version

    def mend_tied_head(self) -> None:
        """HACK(vLLM 0.32, CPU): a reload leaves the packed copy of an output head that shares the embedding's
        weight as it was. Remove when a reload packs it anew."""
        modules = [m for m in self.get_model().modules() if isinstance(getattr(m, "weight", None), Tensor)]
        pointers = [module.weight.data_ptr() for module in modules]
        for module, pointer in zip(modules, pointers):
            if hasattr(module, "cpu_linear") and pointers.count(pointer) > 1:
                module.quant_method.process_weights_after_loading(module)

    def weights_version(self) -> dict[str, int]:
        """-1: those that the server loaded itself."""
        return {"version": getattr(self, "version", -1)}

    def served_sizes(self) -> dict[str, int | None]:
        return model_sizes(self.model_config.hf_config)

    def close_weights(self) -> None:
        self.weight_group, self.staged = None, {}


def model_sizes(config: object) -> dict[str, int | None]:
    """What two configurations of the same model agree in."""
    names = ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
             "num_key_value_heads")
    return {name: getattr(config.get_text_config(), name, None) for name in names.split()}


def join_group(store: torch.distributed.Store, rank: int, world_size: int, backend: str, address: str,
               timeout_s: float) -> torch.distributed.ProcessGroup:
    """A process group beside the default one, which belongs to the trainer alone, or to vLLM."""
    kind = getattr(torch.distributed, "ProcessGroupNCCL" if backend == "nccl" else "ProcessGroupGloo")
    options = kind.Options() if backend == "nccl" else kind._Options()
    options._timeout = timedelta(seconds=timeout_s)
    if backend == "gloo":
        options._devices = [kind.create_device(hostname=address)]
    return kind(store, rank, world_size, options)


def local_address(host: str, port: int) -> str:
    """This machine's address as a peer at host:port sees it."""
    with socket.create_connection((host, port), timeout=30) as connection:
        return connection.getsockname()[0]


def broadcast(group: torch.distributed.ProcessGroup, tensor: Tensor, timeout_s: float,
              call: Future | None = None) -> None:
    """From rank 0. Raises RuntimeError after the deadline, or at once when `call`, the peers' side, ends."""
    options = torch.distributed.BroadcastOptions()
    options.rootRank = 0
    work, deadline = group.broadcast([tensor], options), time.monotonic() + timeout_s
    while call is not None and not work.is_completed():
        if call.done():
            call.result()  # raises if it failed; else they have everything, and this end sees it in a moment
            break
        if time.monotonic() > deadline:
            raise RuntimeError(f"no progress for {timeout_s:.0f} s")
        time.sleep(1e-4)
    work.wait()
    if tensor.is_cuda:
        torch.cuda.current_stream().synchronize()  # sync point: before any other communicator goes on


def rpc(server: Server, method: str, *args: object) -> list[dict]:
    """A method of `WeightReceiver` on every worker; their answers. Raises UserError."""
    body = {"method": "call_weights", "args": [method, *args]}  # no "timeout": see there
    with naming(f"{server.address} does not answer as vLLM does"):
        answers = request(server, "/collective_rpc", body, again=False)["results"]
        if errors := [answer["error"] for answer in answers if "error" in answer]:
            # In swap_weights: it may hold half of each.
            raise UserError(f"{server.address} failed in {method} ({errors[0]}): its log says why. Does it "
                            "serve --model? Start it again, and then the same command, which goes on from "
                            "the newest checkpoint")
        return answers


def open_server(args: Namespace, ranks: Ranks) -> Server:
    """Wait until the server is there; rank 0 joins its workers in a group. Raises UserError."""
    pool = ThreadPoolExecutor(args.concurrency)
    server = Server(args.vllm_host, args.vllm_port, args.vllm_timeout, pool)
    request(server, "/health")
    if not ranks.is_main:
        return server
    request(server, "/resume", {})  # a trainer that died in a push may have left it paused
    world_size, address = 1 + len(rpc(server, "weights_version")), local_address(server.host, server.port)
    backend = args.sync_backend or ("nccl" if ranks.device.type == "cuda" else "gloo")
    server.wire = ranks.device if backend == "nccl" else torch.device("cpu")
    store = torch.distributed.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False,
                                       timeout=timedelta(seconds=server.timeout_s))
    call = pool.submit(rpc, server, "open_weights", address, store.port, world_size, backend,
                       server.timeout_s)
    try:
        server.group = join_group(store, 0, world_size, backend, address, server.timeout_s)
    except RuntimeError as error:
        if call.done():
            call.result()  # says more
        raise UserError(f"{server.address}: its workers did not reach {address}:{store.port} "
                        f"({first_line(error)}): can that machine connect to this one?") from error
    call.result()
    return server


def check_server(server: Server | None, model: nn.Module, ranks: Ranks) -> None:
    """Rank 0 raises UserError for a server of another model, which a push would leave with half of each, and
    for one that was started again, and has answered with the weights of its folder."""
    if server is None or not ranks.is_main:
        return
    mine, served = model_sizes(model.config), rpc(server, "served_sizes")[0]
    if differ := [f"{name} {served[name]}, not {mine[name]}" for name in mine if served[name] != mine[name]]:
        raise UserError(f"{server.address} serves another model than --model: {'; '.join(differ)}")
    versions = {answer["version"] for answer in rpc(server, "weights_version")}
    if server.version >= 0 and versions != {server.version}:
        raise UserError(
            f"{server.address} has weights {versions} in place of {server.version}: it was started again, or "
            "somebody else updates it. The same command goes on from the newest checkpoint")


def push_weights(server: Server, model: nn.Module, dtype: torch.dtype, version: int, ranks: Ranks) -> None:
    """Stage the model's weights in `dtype` on the server, then swap them in, as `version` (all ranks). Raises
    UserError.

    Tensors are gathered one by one, so that no rank ever holds the whole model. Rank 0 has sent one before it
    takes part in the next gather: gathers and sends never wait for each other crosswise."""
    # The call holds vLLM's engine: a rank that still waited for completions would never get to the gathers.
    torch.distributed.barrier()
    if ranks.is_main:
        check_server(server, model, ranks)
        shapes = ((name, torch.empty(param.shape, device="meta")) for name, param in model.named_parameters())
        layout = [(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
                  for name, tensor in hf_tensors(model, shapes, dtype)]
        call = server.pool.submit(rpc, server, "receive_weights", layout)
    try:
        for name, param in model.named_parameters():  # tied ones once, as in files
            whole = param.detach().full_tensor()
            for _, tensor in hf_tensors(model, [(name, whole)], dtype) if ranks.is_main else ():
                data = tensor.to(server.wire).contiguous().view(-1).view(torch.uint8)
                broadcast(server.group, data, server.timeout_s, call)
        if ranks.is_main:
            call.result()  # all workers have everything
            request(server, "/pause?mode=wait", {})  # until running requests have ended
            try:
                rpc(server, "swap_weights", version)
                request(server, "/reset_prefix_cache", {})  # keys and values of the old weights
            finally:
                request(server, "/resume", {})
    except RuntimeError as error:
        if not ranks.is_main:
            raise
        raise UserError(
            f"the weights of step {version} did not reach {server.address} ({first_line(error)}): it "
            "serves those that it had; the same command goes on from the newest checkpoint") from error
    server.version = version


def update_server(sampler: Sampler, step: int, prompt: list[int], ranks: Ranks) -> None:
    """Give the server this step's weights, unless it has them, and let it continue a prompt, which proves
    that it uses them (all ranks)."""
    server = sampler.server
    if server is None or server.version == step:
        return
    push_weights(server, sampler.model, sampler.dtype, step, ranks)
    short = dataclasses.replace(sampler.sampling, max_new_tokens=min(16, sampler.sampling.max_new_tokens))
    answers = gather_objects(complete(server, prompt, 4, short) if ranks.is_main else None)[0]
    server.proof_error = prove_completions(
        sampler, [(prompt, answer) for answer in answers], f"{server.address} serves other weights than were "
        "sent. Is it another model, another --dtype, or was it started without --logprobs-mode "
        "processed_logprobs?")


@torch.no_grad()
def prove_completions(sampler: Sampler, answered: list[tuple[list[int], Completion]], wrong: str) -> float:
    """Mean difference between the logprobs of (prompt, completion) pairs and those of one whole forward (all
    ranks). Raises UserError, which says what is `wrong`, beyond what the precision explains."""
    batch = collate([Sequence(prompt + c.ids, len(prompt), c.logprobs, 0.0) for prompt, c in answered],
                    sampler.device)
    logprobs, _ = sampler.model(batch["input_ids"], batch["rows"], batch["targets"],
                                sampler.sampling.temperature)
    reshard(sampler.model)
    error = float((logprobs - batch["sampler_logprobs"]).abs().mean())
    bound = 1e-3 if sampler.dtype == torch.float32 else 0.1
    if not error <= bound:
        raise UserError(f"{wrong} (its logprobs differ from the trainer's by {error:.2g}, bound {bound})")
    return error


# ------------------------------------------------------------------------------------------------
# 8. Advantages and loss

# The ratio is clipped to [1 - low, 1 + high]; the papers' values.
CLIP = {"grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "dr_grpo": (0.2, 0.2), "gspo": (3e-4, 4e-4)}
RATIO_BINS = 2001  # of log(ratio) between -1 and 1, from which the percentiles are read


def group_advantages(rewards: Tensor, loss: str) -> Tensor:
    """Reward above the group's mean, over the group's standard deviation. (P, G) -> (P, G).

    GRPO (Shao et al. 2024, arXiv:2402.03300). Dr. GRPO (Liu et al. 2025, arXiv:2503.20783) leaves the
    division out, since it weighs questions by how easy or hard they are."""
    above = rewards - rewards.mean(dim=1, keepdim=True)
    return above if loss == "dr_grpo" else above / (rewards.std(dim=1, keepdim=True) + 1e-4)


def policy_loss(kind: str, logprobs: Tensor, batch: dict[str, Tensor], clip: tuple[float, float],
                kl_coef: float, max_tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed loss of a micro-batch, to be divided by the number of sequences (dapo: tokens) over all
    micro-batches and ranks; so it does not matter how they are split. All tensors are (N,) over the
    completions' tokens: logprobs (with gradient), and in `batch` old_logprobs (trainer's policy before this
    batch), weights (truncated importance sampling), advantages, sequence (which one of `num_sequences`), and
    ref_logprobs where kl_coef is not 0.

        r = exp(logprobs - old_logprobs)          gspo: one r a sequence, exp of the mean over its tokens
        token = -weight * min(r * A, clip(r, 1 - low, 1 + high) * A) + kl_coef * k3
        k3 = exp(ref - logprobs) - (ref - logprobs) - 1      (Schulman 2020: unbiased, never negative)

        grpo     sum over sequences of the mean of their tokens, over sequences   arXiv:2402.03300, eq. 3
        dapo     sum over tokens, over tokens                                     arXiv:2503.14476, eq. 8
        dr_grpo  sum over tokens / max_tokens, over sequences                     arXiv:2503.20783
        gspo     as grpo, with the sequence's ratio                               arXiv:2507.18071, eq. 5
    """
    sequence, advantages = batch["sequence"], batch["advantages"]
    log_ratio = logprobs - batch["old_logprobs"]
    nothing = log_ratio.new_zeros(int(batch["num_sequences"]))
    lengths = nothing.index_add(0, sequence, torch.ones_like(log_ratio))  # bincount would synchronise
    if kind == "gspo":
        log_ratio = (nothing.index_add(0, sequence, log_ratio) / lengths)[sequence]
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip[0], 1 + clip[1])
    tokens = -batch["weights"] * torch.minimum(ratio * advantages, clipped * advantages)
    if kl_coef:
        difference = batch["ref_logprobs"] - logprobs
        tokens = tokens + kl_coef * (difference.expm1() - difference)
    if kind in ("grpo", "gspo"):
        tokens = tokens / lengths[sequence]
    elif kind == "dr_grpo":
        tokens = tokens / max_tokens
    is_clipped = (clipped * advantages < ratio * advantages).detach()
    return (tokens * batch["counted"]).sum(), {"clipped": is_clipped, "ratio": ratio.detach()}


def importance_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """min(p_trainer / p_sampler, cap) of each token: corrects what the sampler's kernels, precision or age
    changed (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training")."""
    if not cap:
        return torch.ones_like(old_logprobs)
    return (old_logprobs - sampler_logprobs).exp().clamp(max=cap)


@dataclasses.dataclass
class Sequence:
    """A completion with its prompt, as the loss sees it."""
    ids: list[int]
    num_prompt: int
    sampler_logprobs: list[float]
    advantage: float


def choose_groups(groups: list[Group], zero_variance: str) -> list[Group]:
    """Those to train on: all, or those whose rewards differ."""
    return [group for group in groups if zero_variance == "keep" or has_variance(group)]


def to_sequences(groups: list[Group], loss: str, mask_truncated: bool) -> list[Sequence]:
    if not groups:
        return []
    # fp64: near the mean (1.1 - 1.075) fp32 loses a part of the advantage's digits.
    rewards = torch.tensor([group.rewards for group in groups], dtype=torch.float64)
    advantages = group_advantages(rewards, loss).tolist()
    return [Sequence(group.prompt_ids + completion.ids, len(group.prompt_ids), completion.logprobs, advantage)
            for group, row in zip(groups, advantages) for completion, advantage in zip(group.completions, row)
            if completion.finish == "stop" or not mask_truncated]


def deal(sequences: list[Sequence], world_size: int, max_tokens: int) -> list[list[list[Sequence]]]:
    """Micro-batches of each rank: sequences by length, dealt to and fro, then as many side by side as
    max_tokens allow with their padding. Every rank gets the same number; those with fewer get empty ones."""
    longest_first = sorted(sequences, key=lambda s: -len(s.ids))
    hands = [[] for _ in range(world_size)]
    for i, sequence in enumerate(longest_first):
        turn, place = divmod(i, world_size)
        hands[place if turn % 2 == 0 else world_size - 1 - place].append(sequence)
    dealt = []
    for hand in hands:
        micro_batches = []
        for sequence in hand:
            if not micro_batches or (len(micro_batches[-1]) + 1) * len(micro_batches[-1][0].ids) > max_tokens:
                micro_batches.append([])
            micro_batches[-1].append(sequence)
        dealt.append(micro_batches)
    most = max(1, *map(len, dealt))  # one at least: every step has its collectives
    return [micro_batches + [[] for _ in range(most - len(micro_batches))] for micro_batches in dealt]


def collate(sequences: list[Sequence], device: torch.device, max_len: int = 0) -> dict[str, Tensor]:
    """input_ids (B, T), padded on the right, on CUDA to a multiple of 128 but not beyond max_len; over the N
    completion tokens rows, targets, sequence, sampler_logprobs, advantages, counted. An empty micro-batch
    becomes one token that does not count."""
    counted = float(bool(sequences))
    sequences = sequences or [Sequence([0, 0], 1, [0.0], 0.0)]
    T = max(len(s.ids) for s in sequences)
    if device.type == "cuda":  # kernels are planned, and graphs compiled, for each new T
        T = max(T, min(max_len, math.ceil(T / 128) * 128))
    input_ids = torch.tensor([s.ids + [0] * (T - len(s.ids)) for s in sequences])
    lengths = torch.tensor([len(s.ids) - s.num_prompt for s in sequences])
    rows = torch.cat([torch.arange(i * T + s.num_prompt - 1, i * T + len(s.ids) - 1)
                      for i, s in enumerate(sequences)])
    batch = {
        "input_ids": input_ids, "rows": rows, "targets": input_ids.flatten()[rows + 1],
        "sequence": torch.arange(len(sequences)).repeat_interleave(lengths),
        "sampler_logprobs": torch.tensor([value for s in sequences for value in s.sampler_logprobs]),
        "advantages": torch.tensor([s.advantage for s in sequences]).repeat_interleave(lengths),
        "counted": torch.full((len(rows),), counted),
    }
    batch = {key: value.to(device) for key, value in batch.items()}
    # On the host, where it is known: no synchronisation to learn it.
    return batch | {"num_sequences": torch.tensor(len(sequences)), "count": torch.tensor([
        counted * len(sequences), counted * len(rows)])}


def loss_denominator(batch: dict[str, Tensor], kind: str) -> Tensor:
    """What this micro-batch adds to the number that the summed loss is divided by: sequences, or tokens."""
    return batch["count"][1 if kind == "dapo" else 0]


@torch.no_grad()
def add_old_logprobs(model: nn.Module, ref_model: nn.Module | None, batches: list[dict], args: Namespace
                     ) -> None:
    """The trainer's logprobs before this batch's first update, where several updates follow (with one they
    are the update's own), and the frozen first model's (all ranks)."""
    for batch in batches:
        call = batch["input_ids"], batch["rows"], batch["targets"], args.temperature
        if args.updates_per_batch > 1:
            batch["old_logprobs"] = model(*call)[0]
        if ref_model is not None:
            batch["ref_logprobs"] = ref_model(*call)[0]


def micro_batch_loss(model: nn.Module, batch: dict[str, Tensor], args: Namespace, totals: Tensor) -> Tensor:
    """Summed loss of a micro-batch; what `update_stats` reads is added to `totals` (all ranks)."""
    logprobs, entropy = model(batch["input_ids"], batch["rows"], batch["targets"], args.temperature)
    batch = {"old_logprobs": logprobs.detach()} | batch
    batch["weights"] = importance_weights(batch["old_logprobs"], batch["sampler_logprobs"], args.tis_cap)
    loss, found = policy_loss(args.loss, logprobs, batch, (args.clip_low, args.clip_high), args.kl_coef,
                              args.max_new_tokens)
    with torch.no_grad():
        counted = batch["counted"]
        log_ratio = (logprobs - batch["sampler_logprobs"]).nan_to_num(nan=0.0)  # an index, below
        mismatch = batch["old_logprobs"] - batch["sampler_logprobs"]
        to_ref = batch.get("ref_logprobs", logprobs) - logprobs
        each = torch.stack([torch.ones_like(counted), entropy, found["clipped"],
                            mismatch.expm1() - mismatch, mismatch.exp() > (args.tis_cap or math.inf),
                            to_ref.expm1() - to_ref])
        sums = (each * counted).sum(1)
        where = ((log_ratio.clamp(-1, 1) + 1) / 2 * (RATIO_BINS - 1)).round().long()
        totals[:len(sums)] += sums
        totals[len(sums):].index_add_(0, where, counted.to(totals.dtype))
    return loss


def update_stats(totals: list[float]) -> dict[str, float]:
    """Metrics of sums over all ranks, micro-batches and updates of a step; {} where nothing was trained."""
    tokens = totals[0]
    if not tokens:
        return {}
    keys = ("entropy", "clip_frac", "mismatch_kl", "tis_capped_frac", "ref_kl")
    stats = {f"train/{key}": total / tokens for key, total in zip(keys, totals[1:6])}
    cumulative = list(itertools.accumulate(totals[6:]))
    for percent in (1, 50, 99):
        reached = (i for i, total in enumerate(cumulative) if total >= percent / 100 * tokens)
        place = next(reached, RATIO_BINS // 2)
        stats[f"train/ratio_p{percent:02d}"] = math.exp(2 * place / (RATIO_BINS - 1) - 1)
    return stats


# ------------------------------------------------------------------------------------------------
# 9. Checkpoints and export: asynchronous, published by a rename, resumed exactly; a Hugging Face folder

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


# ------------------------------------------------------------------------------------------------
# 10. Run record: metrics, console, timing

PHASES = ("generate", "reward", "sync", "logprob", "train", "checkpoint")


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


def rollout_metrics(groups: list[Group], step: int, seconds: float) -> dict[str, float]:
    """Over the groups of all ranks, in a step that took `seconds`."""
    lengths = {True: [], False: []}
    for group in groups:
        for completion, correct in zip(group.completions, group.correct):
            lengths[correct].append(len(completion.ids))
    both = lengths[True] + lengths[False]
    finishes = [completion.finish for group in groups for completion in group.completions]
    return {
        "rollout/reward_mean": fmean(itertools.chain(*(group.rewards for group in groups))),
        "rollout/accuracy": len(lengths[True]) / len(both),
        "rollout/zero_variance_frac": fmean(not has_variance(group) for group in groups),
        "rollout/truncated_frac": fmean(finish == "length" for finish in finishes),
        "rollout/length_mean": fmean(both), "rollout/length_right": fmean(lengths[True] or [0]),
        "rollout/length_wrong": fmean(lengths[False] or [0]),
        "rollout/version_lag": fmean(step - group.version for group in groups),
        "perf/completion_tokens_per_s": sum(both) / seconds,
    }


def first_answers(groups: list[Group], tokenizer) -> str:
    """The first question as the model meets it, and a right and a wrong answer to one of these questions."""
    parts = [("first question", groups[0].prompt_ids)]
    for wanted, name in ((True, "a right answer"), (False, "a wrong answer")):
        found = (completion.ids for group in groups
                 for completion, right in zip(group.completions, group.correct) if right is wanted)
        parts.append((name, next(found, None)))
    return "\n".join(f"--- {name}\n{tokenizer.decode(ids)}" if ids else f"--- {name}: none yet"
                     for name, ids in parts)


def format_row(row: dict, total_steps: int) -> str:
    """One fixed-width line a step. Not the loss: on-policy it is 0 whatever is learnt. A step without a group
    whose rewards differ trains nothing."""
    trained = (f"entropy {row['train/entropy']:6.3f}  norm {row['train/grad_norm']:7.3f}"
               if "train/grad_norm" in row else "nothing to train on".ljust(29))
    return (f"step {row['step']:>6,}/{total_steps:,}  reward {row['rollout/reward_mean']:6.3f}  right "
            f"{row['rollout/accuracy']:6.1%}  length {row['rollout/length_mean']:6.1f}  {trained}  "
            f"{row['time/step_s']:6.2f} s (generate {row['time/generate_s']:.2f}, train "
            f"{row['time/train_s']:.2f}, sync {row['time/sync_s']:.2f})")


def open_logger(args: Namespace, say: Callable, ranks: Ranks) -> Callable[[dict], None]:
    """A function that shows a row of metrics, by --logger: a line, or rank 0's live panel."""
    if args.logger != "rich" or not ranks.is_main:
        return lambda row: say(format_row(row, args.train_steps)) if args.logger == "print" else None
    from rich.columns import Columns
    from rich.live import Live
    from rich.panel import Panel
    live = Live(auto_refresh=False)
    live.start()
    atexit.register(live.stop)

    def show(row: dict) -> None:
        columns = Columns([f"{key} {value:,.4g}" for key, value in row.items()], padding=(0, 3))
        live.update(Panel(columns, title=f"step {row['step']:,} of {args.train_steps:,}"), refresh=True)

    return show


# ------------------------------------------------------------------------------------------------
# 11. Evaluation

def wilson_interval(num_right: int, num: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927, J. Am. Stat. Assoc. 22), also near 0 and 1."""
    share, square = num_right / num, z * z / num
    centre = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / num + square / (4 * num))
    return max(0.0, centre - half), min(1.0, centre + half)


def evaluate(sampler: Sampler, questions: list[dict], tokenizer, step: int, ranks: Ranks) -> dict[str, float]:
    """Accuracy of this step's greedy answers to all held-out questions, each rank a part (all ranks)."""
    started, mine = time.perf_counter(), questions[ranks.rank::ranks.world_size]
    update_server(sampler, step, questions[0]["prompt"], ranks)
    greedy = dataclasses.replace(sampler.sampling, temperature=0.0)
    waiting = start_completions(sampler, [row["prompt"] for row in mine], 1, [0] * len(mine), greedy)
    counts = torch.zeros(3, dtype=torch.int64)
    for row, wait in zip(mine, waiting):
        [answer] = wait()
        _, right = judge(tokenizer, answer, row["gold"], 0.0)
        counts += torch.tensor([right, len(answer.ids), answer.finish == "length"])
    num = len(questions)
    right, length, cut = all_sum(counts.to(ranks.device)).tolist()  # sync point
    low, high = wilson_interval(right, num)
    return {"eval/accuracy": right / num, "eval/accuracy_low": low, "eval/accuracy_high": high,
            "eval/length_mean": length / num, "eval/truncated_frac": cut / num, "eval/questions": num,
            "eval/time_s": time.perf_counter() - started}


# ------------------------------------------------------------------------------------------------
# 12. Training

def load_policy(args: Namespace, folder: Path, mesh: torch.distributed.DeviceMesh, dtype: torch.dtype,
                ranks: Ranks, master: torch.dtype = torch.float32) -> nn.Module:
    """A sharded model without its weights: shapes, then shards, then memory (all ranks)."""
    model = build_model(args, folder, master)
    if master is torch.float32:
        check_memory(model, args, mesh)
    attach_logprobs(model, args.compile or (args.compile is None and ranks.device.type == "cuda"))
    model.chunk = rows_at_once(model, ranks.device)
    shard_model(model, args, mesh, dtype)
    materialise(model, ranks.device, args.cpu_offload)
    fill_buffers(model)
    model.eval()  # no dropout: it would be noise in the ratio
    return model


def fill_model(model: nn.Module, args: Namespace, folder: Path, checkpoints: list[Path], optimizer: object,
               ranks: Ranks) -> None:
    """Weights of the newest checkpoint, or the first ones, proved to be there (all ranks)."""
    if checkpoints:
        load_checkpoint(checkpoints, model, optimizer, ranks)
    else:
        load_hf_weights(model, folder, args.trust_remote_code, ranks)
    prove_filled(model)
    prove_logprobs(model, ranks)


def load_reference(args: Namespace, folder: Path, mesh: torch.distributed.DeviceMesh, dtype: torch.dtype,
                   ranks: Ranks) -> nn.Module | None:
    """The first model, frozen and sharded, for --kl-coef (all ranks)."""
    if not args.kl_coef:
        return None
    # No updates: no fp32 needed
    model = load_policy(args, folder, mesh, dtype, ranks, master=dtype).requires_grad_(False)
    fill_model(model, args, folder, [], None, ranks)
    return model


def prove_rollouts(sampler: Sampler, ranks: Ranks) -> None:
    """Let the generator continue two prompts of unequal length, and compare its logprobs with the policy's
    (all ranks). Raises UserError for a family whose cache works in another way."""
    ids = plain_tokens(sampler.model, 2, 24, torch.device("cpu")).tolist()
    prompts, name = [ids[0], ids[1][:9]], type(sampler.generator).__name__
    sampling = dataclasses.replace(sampler.sampling, max_new_tokens=16)
    with naming(f"{name} cannot be sampled here, use --rollouts vllm"):
        waiting = start_completions(sampler, prompts, 2, [0, 1], sampling)
    answered = [(prompt, completion) for prompt, wait in zip(prompts, waiting) for completion in wait()]
    prove_completions(sampler, answered, f"{name}: its cache works in another way, use --rollouts vllm")


def open_sampler(args: Namespace, model: nn.Module, folder: Path, tokenizer, dtype: torch.dtype, ranks: Ranks
                 ) -> Sampler:
    """The server, its weights not yet those of the model, or a generator, proved to be right (all ranks)."""
    server = open_server(args, ranks) if args.rollouts == "vllm" else None
    generator = None if server else build_generator(args, folder, model.whole_logits)
    sampling = Sampling(args.temperature, args.max_new_tokens, end_tokens(tokenizer, folder))
    sampler = Sampler(model, generator, server, args.rollout_batch, ranks.device, sampling, dtype)
    if generator:
        prove_rollouts(sampler, ranks)
    return sampler


def note_updates(updates: list[list[float]], num_sequences: int, progress: dict) -> dict[str, float]:
    """Count updates that were left out; metrics of the last one. Raises UserError after 10 in a row whose
    gradient was not finite."""
    for skipped, *_ in updates:
        progress["skipped_updates"] += bool(skipped)
        # Where no group has variance there is nothing to train on, and nothing wrong.
        progress["bad_in_a_row"] = progress["bad_in_a_row"] + 1 if skipped and num_sequences else 0
    if progress["bad_in_a_row"] >= 10:
        raise UserError("10 updates in a row had a gradient that is not finite; none of them changed the "
                        "weights. Lower --max-lr, or go back to an older checkpoint with --resume")
    skipped, loss, grad_norm = updates[-1]
    return {} if skipped else {"train/loss": loss, "train/grad_norm": grad_norm}


def is_due(step: int, every: int) -> bool:
    return step > 0 and every > 0 and step % every == 0


def note_evaluation(progress: dict, found: dict) -> str:
    """A line to show; notes in `progress` which step is the best."""
    if found["eval/accuracy"] > (progress["best_accuracy"] or 0.0):
        progress |= {"best_accuracy": found["eval/accuracy"], "best_step": progress["step"]}
    return (f"step {progress['step']:>6,}  held-out accuracy {found['eval/accuracy']:.1%} (95 %: "
            f"{found['eval/accuracy_low']:.1%} to {found['eval/accuracy_high']:.1%}) over "
            f"{found['eval/questions']:,} questions")


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
    from tqdm import tqdm

    # Set-up ---------------------------------------------------------------------------------
    args = parse_args()
    relaunch_under_torchrun(args)
    ranks = read_ranks(args)
    run_dir, folder = Path(args.checkpoint_dir), fetch(args.model)
    say = tqdm.write if ranks.is_main and args.log_level != "WARNING" else (lambda line: None)
    tokenizer = load_tokenizer(args)  # takes as long as it needs: no process group exists yet
    train = load_questions(args, tokenizer, args.dataset_split, args.limit, say)
    held_out = load_questions(args, tokenizer, args.eval_split, args.eval_limit, say)

    mesh = init_distributed(args, ranks)
    dtype = compute_dtype(args.mixed_precision, ranks.device)
    model = load_policy(args, folder, mesh, dtype, ranks)
    lock = lock_run(run_dir) if ranks.is_main else None  # noqa: F841, held until this process ends
    checkpoints = gather_objects(checkpoints_to_resume(args) if ranks.is_main else None)[0]
    progress = read_progress(checkpoints, {  # all of it survives a resume
        "step": 0, "samples": 0, "tokens": 0, "skipped_updates": 0, "bad_in_a_row": 0, "best_accuracy": None,
        "best_step": -1})
    data = repr([[row["gold"] for row in train], [row["prompt"] for row in train]])
    notes = compare_runs(args, progress, checkpoints, "model seed data", processes=ranks.world_size,
                         data=f"{zlib.crc32(data.encode()):08x}")
    if report_finished(args, ranks, checkpoints, progress["step"], args.train_steps, "--train-steps"):
        return
    optimizer = build_optimizer(model, args)  # after sharding, which replaces the parameters
    fill_model(model, args, folder, checkpoints, optimizer, ranks)
    ref_model = load_reference(args, folder, mesh, dtype, ranks)
    sampler = open_sampler(args, model, folder, tokenizer, dtype, ranks)

    texts = write_record(run_dir, args, ranks)
    saver = Checkpointer(run_dir / "checkpoints", args.keep_checkpoints)
    trackers = open_trackers(args, ranks)
    show = open_logger(args, say, ranks)
    say("\n".join([describe_model(model, dtype), *notes]))
    reduces_always = args.reduce_every_micro_batch or mesh.size() == 1  # one device: no traffic, less memory
    times, pending, row, evaluation = {}, None, {}, {}
    phase = functools.partial(timed, times)
    asked = catch_signals(ranks)
    bar = open_bar(args.train_steps, progress["step"], ranks)
    bar.disable = bar.disable or args.logger != "print"
    started = row_started = time.perf_counter()

    # Loop ------------------------------------------------------------------------------------
    while True:
        # Evaluate (all ranks): first of all, so that a run that was ended after a save makes up for it
        step = progress["step"]
        is_last = step >= args.train_steps
        if held_out and (is_last or is_due(step, args.eval_every) or (step == 0 and args.eval_first)):
            stall_after(None)
            for _, wait in pending or ():
                wait()  # or new weights would answer what was asked of the old
            evaluation = evaluate(sampler, held_out, tokenizer, step, ranks)
            say(note_evaluation(progress, evaluation))
            for track in trackers:
                track({"step": step, **evaluation})
            row_started = time.perf_counter()
        if is_last:
            break
        stall_after(args.stall_timeout)

        # Generate and judge (all ranks); the next batch may be generated during this one's update
        pending = pending or start_batch(sampler, train, progress, phase, args, ranks)
        with phase("generate"):
            for group, wait in pending:
                group.completions = wait()
            check_server(sampler.server, model, ranks)
        with phase("reward"):
            groups = judge_batch([group for group, _ in pending], train, tokenizer, step + 1, args, ranks)
        progress["samples"], pending = groups[-1].position + 1, None
        if args.async_depth and step + 1 < args.train_steps:
            pending = start_batch(sampler, train, progress, phase, args, ranks)

        # Advantages, and micro-batches for each rank, as many on each
        chosen = choose_groups(groups, args.zero_variance)
        sequences = to_sequences(chosen, args.loss, args.mask_truncated)
        hands = deal(sequences, ranks.world_size, args.micro_batch_tokens)
        longest = args.max_prompt_tokens + args.max_new_tokens
        batches = [collate(hand, ranks.device, longest) for hand in hands[ranks.rank]]
        with phase("logprob"):
            add_old_logprobs(model, ref_model, batches, args)

        # Updates: forward and backward, reduced with the last micro-batch; clip and step (all ranks)
        totals, updates = torch.zeros(6 + RATIO_BINS, dtype=torch.float64, device=ranks.device), []
        lr = learning_rate(step, args.train_steps, args.warmup_steps, args.max_lr, args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with phase("train"):
            for _ in range(args.updates_per_batch):
                loss_sum, count = torch.zeros(2, device=ranks.device)
                for micro, batch in enumerate(batches, 1):
                    # Where it is off, whole gradients add up on each rank
                    model.set_requires_gradient_sync(reduces_always or micro == len(batches))
                    loss = micro_batch_loss(model, batch, args, totals)
                    loss.backward()
                    loss_sum += loss.detach()  # read at the sync point only
                    count += loss_denominator(batch, args.loss)
                wait_for_copy(saver)  # the update would change what is being copied
                update_loss, update_count, grad_norm, votes = reduce_stats(
                    model, loss_sum[None], count, ranks.world_size // mesh.size(-1),
                    votes_to_stop(asked, run_dir, ranks))
                # Without anything to train on the norm is 0/0, and the update is left out
                is_skipped = clip_and_step(optimizer, grad_norm, update_count, args.grad_clip)
                updates.append(torch.stack([is_skipped, update_loss[0], grad_norm]))
                optimizer.zero_grad()
            totals = all_sum(totals).tolist()  # sync point: what follows has been computed, too
            updates, votes = torch.stack(updates).tolist(), votes.tolist()

        # Count
        stop = next((name for name, voted in zip(STOPS, votes) if voted), None)
        progress["step"] += 1
        progress["tokens"] += sum(len(s.ids) - s.num_prompt for s in sequences)
        last_update = note_updates(updates, len(sequences), progress)
        bar.update()
        is_last = progress["step"] == args.train_steps

        # Log
        seconds, row_started = time.perf_counter() - row_started, time.perf_counter()
        row = {
            "step": progress["step"], "samples": progress["samples"], "rollout/groups": len(chosen),
            **rollout_metrics(groups, step, seconds), "train/lr": lr, **last_update, **update_stats(totals),
            "train/skipped_updates": progress["skipped_updates"], "train/tokens": progress["tokens"],
            "sync/probe_error": sampler.server.proof_error if sampler.server else 0.0,
            "perf/peak_mem_gib": peak_memory_gib(ranks.device), "time/step_s": seconds,
            **{f"time/{key}_s": times.pop(key, 0.0) for key in PHASES},
        }
        for track in trackers:
            track(row)
        show(row)
        if progress["step"] == 1 or args.log_level == "DEBUG":
            say(first_answers(groups, tokenizer))
        stall_after(None)

        # Save (all ranks)
        may_be_best = args.keep_best and is_due(progress["step"], args.eval_every)
        is_save = is_last or stop or may_be_best or is_due(progress["step"], args.checkpoint_interval)
        if is_save and args.checkpoint_interval:
            saver.best = progress["best_step"] if args.keep_best else -1
            with phase("checkpoint"):
                start_save(saver, checkpoint_tensors(model, optimizer, ranks), progress, texts, ranks)
                if is_last or stop or not args.async_checkpoint:
                    finish_save(saver, must=is_last or stop)
        if stop and not is_last:
            bar.close()
            leave_stopped(stop, saver, ranks)

    # End -------------------------------------------------------------------------------------
    bar.close()
    if sampler.server and ranks.is_main:
        rpc(sampler.server, "close_weights")
    if args.export:
        export_model(model, run_dir / "hf", (model.config, tokenizer, folder), dtype, ranks)
    torch.distributed.destroy_process_group()  # rank 0 works alone from here: the others must not time out
    if ranks.is_main:
        write_summary(run_dir, progress, row | evaluation, time.perf_counter() - started)
        if 0 < args.train_steps * args.updates_per_batch <= progress["skipped_updates"]:
            say("note       nothing was learnt: in no step did a group's rewards differ. Are the questions "
                "too hard or too easy, or the answers never in the expected form?")
        say(f"done       {run_dir}: the same command with a larger --train-steps goes on from here")


if __name__ == "__main__":
    run_and_report(saves_memory="lower --micro-batch-tokens")
