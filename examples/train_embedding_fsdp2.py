"""Train an embedding model with PyTorch FSDP2: contrastive pairs, any encoder or decoder of transformers.

One file, no Trainer: it shards the model with `fully_shard`, pools its last hidden states to one vector a
text, and pulls each query to its document and away from the documents of all ranks (InfoNCE, with hard
negatives and Matryoshka dimensions), or orders scored pairs (CoSENT). A gradient cache makes batches larger
than memory. It evaluates retrieval while sharded, resumes exactly, and ends with a folder that
`SentenceTransformer(folder)` loads. Vision-language models take images beside texts. Left out on purpose:
distillation, several data sets at once, sparse and multi-vector embeddings, video.

    examples/run_embedding.sh                                # the quickstart: two cores, no download of data
    python examples/train_embedding_fsdp2.py --model FOLDER --dataset my_pairs.jsonl    # one CPU, or all GPUs
    torchrun --nproc_per_node 8 examples/train_embedding_fsdp2.py --model FOLDER --dataset my_pairs.jsonl
    sbatch --nodes 4 launch_slurm.sh examples/train_embedding_fsdp2.py --model FOLDER --dataset my_pairs.jsonl

Contents: 1 Arguments, 2 Distributed, 3 Data, 4 Model, 5 Optimizer and schedule, 6 Loss, 7 Checkpoints and
export, 8 Run record, 9 Evaluation, 10 Training. `EDIT:` marks what people change: what a row becomes, in
section 3, the pooling in 4, the schedule in 5, the objective in 6. "(all ranks)" means that every rank must
make the call. Blocks between `# >>> shared` and `# <<< shared` are the same in train_llm.py.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import errno
import faulthandler
import fcntl
import functools
import hashlib
import importlib.util
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
    onoff = argparse.BooleanOptionalAction
    parser = open_parser("%(prog)s [--config FILE] --model NAME_OR_FOLDER --dataset NAME_OR_PATH [flags]")
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="NAME_OR_FOLDER", help="the encoder or decoder to train")
    add("--pooling", choices=list(POOLING), help="the embedding: the mean of all tokens, the first or the "
        "last one; if not given: what the model's 1_Pooling says, else last for decoders, else mean")
    add("--attention", choices=["causal", "bidirectional"], help="of a decoder; if not given: its own")
    add("--normalize", action=onoff, default=True, help="embeddings of length 1: scores are cosines")
    add("--query-prompt", default="", metavar="TEXT", help="put before each query; a chat's system turn")
    add("--document-prompt", default="", metavar="TEXT", help="the same for each document")
    add("--seq-len", type=int, default=512, help="tokens of a text, with prompt and image; more are cut")
    add("--trust-remote-code", action=onoff, default=False, help="run code that comes with the model")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", metavar="NAME_OR_PATH", help="hub name, folder, or .jsonl .json .parquet .csv file; "
        "rows have query and positive, and negatives (a list of texts) or score (a number); query_image and "
        "positive_image (paths, from the file's folder on) stand beside or in place of the texts")
    add("--dataset-config", metavar="NAME", help="configuration of a hub data set")
    add("--dataset-split", default="train", help="split to train on, such as train[:95%%]")
    add("--eval-split", metavar="SPLIT_OR_FILE", help="split, or file, that is held out")
    add("--num-negatives", type=int, default=0, metavar="N", help="take the first N of each row's negatives")
    add = parser.add_argument_group("loss").add_argument
    add("--temperature", type=float, default=0.05, help="scores are divided by it")
    add("--learn-temperature", action=onoff, default=False, help="train it, too, down to 0.01")
    add("--symmetric", action=onoff, default=False, help="half of the loss: find a document's query")
    add("--mrl-dims", metavar="D,D,…", help="Matryoshka: train the first D numbers, for each D: 1024,256,64")
    add("--mrl-weights", metavar="W,W,…", help="of the losses of --mrl-dims; if not given: 1 each")
    add = parser.add_argument_group("training, evaluation and logging").add_argument
    add("--batch-size", type=int, default=32, help="pairs per process and step")
    add("--grad-cache-chunk", type=int, metavar="N", help="embed all texts without gradients, then again N "
        "at a time with them: memory no longer depends on --batch-size")
    add("--max-steps", type=int, help="if not given: --num-epochs")
    add("--num-epochs", type=int, default=1, help="passes over the data")
    add("--max-lr", type=float, help="learning rate after warm-up; if not given: 2e-5, for LoRA 2e-4")
    add("--min-lr", type=float, help="where a cosine ends; if not given: a tenth of --max-lr")
    add("--warmup-steps", type=int, help="if not given: a tenth of all steps")
    add("--weight-decay", type=float, default=0.01, help="on matrices; not on norms, biases and embeddings")
    add("--grad-clip", type=float, default=1.0, help="largest global gradient norm; 0 is off")
    add("--seed", type=int, default=0, help="of sample order and dropout")
    add("--log-interval", type=int, default=10, help="steps between logged rows")
    add("--eval-interval", type=int, default=0, help="steps between evaluations, from 0 on; 0: end only")
    add_lora_flags(parser.add_argument_group("LoRA"))
    add_system_flags(parser.add_argument_group("devices, sharding and memory"), recompute="full")
    add_run_flags(parser.add_argument_group("checkpoints and record"), "checkpoints", save_every=500)
    parser.set_defaults(chat_template=None)  # `find_common_problems` looks at it
    return parser


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


def fill_defaults(args: Namespace) -> None:  # that depend on other flags
    if args.max_lr is None:
        args.max_lr = 2e-4 if args.lora_rank else 2e-5
    if args.min_lr is None:
        args.min_lr = args.max_lr / 10


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
    """Every argument that cannot work, before anything is downloaded or started."""
    positive = ("seq_len batch_size grad_cache_chunk num_epochs log_interval max_steps nproc hsdp_shard_size "
                "stall_timeout lora_rank")
    not_negative = ("warmup_steps weight_decay grad_clip keep_checkpoints eval_interval max_lr min_lr "
                    "checkpoint_interval seed num_negatives")
    yield from find_common_problems(args, positive, not_negative, "dataset model")
    yield from find_lora_problems(args)
    if args.lora_rank and args.attention and not args.lora_merge:
        yield "--attention is not in the folder of an adapter: export the whole model with --lora-merge"
    for name in ("model", "dataset"):
        if not getattr(args, name):
            yield f"--{name} is needed"
    if not 0 < args.temperature < 100:
        yield f"--temperature must be above 0 and below 100, not {args.temperature}"
    if args.learn_temperature and (args.cpu_offload or args.temperature < 0.01):
        yield "--learn-temperature goes neither with --cpu-offload nor with a --temperature below 0.01"
    if (args.eval_interval or args.keep_best) and not args.eval_split:
        yield "--eval-interval and --keep-best need something held out: --eval-split"
    try:
        read_objective(args)
    except ValueError:
        yield ("--mrl-dims and --mrl-weights are numbers with commas, such as 1024,256: each dimension once, "
               "as many weights as dimensions, all above 0")


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
# 3. Data: checked rows, one global order, batches of texts that are padded in parts

DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image, as a path or a file's bytes, with a text, which may be empty. Equal if both are."""
    text: str
    image: str | bytes
    folder: Path = dataclasses.field(compare=False, repr=False)  # of a relative path
    where: str = dataclasses.field(compare=False, repr=False)  # its row, for errors

    def read(self, whole: bool = True):
        """A PIL image in RGB; not `whole`: None, after a look at the file's head. Raises UserError."""
        is_path = isinstance(self.image, str)
        with naming(f"{self.where}: pillow cannot read the image {self.image if is_path else 'in it'}"):
            from PIL import Image
            from transformers.image_utils import load_image  # turns it as its EXIF data says
            with Image.open(self.folder / self.image if is_path else io.BytesIO(self.image)) as image:
                return load_image(image) if whole else None


def contents(item: str | Picture) -> dict:
    """{'image', 'text'} of a text or a `Picture`, each if it is there."""
    if isinstance(item, str):
        return {"text": item}
    return {"image": item.read()} | ({"text": item.text} if item.text else {})


def to_pair(row: dict, where: str, folder: Path = Path()) -> dict:  # EDIT: what one of your rows becomes
    """{'query', 'positive', 'negatives', 'score'}: two texts or `Picture`s, a list of texts, a number or
    None; relative paths begin at `folder`. Raises UserError that names the row."""
    pair = {"query": row.get("query"), "positive": row.get("positive"),
            "negatives": row.get("negatives") or [], "score": row.get("score")}
    for name in ("query", "positive"):
        image = row.get(f"{name}_image")
        image = image["bytes"] or image["path"] if isinstance(image, dict) else image  # of datasets
        if image and isinstance(pair[name], str | None):
            pair[name] = Picture(pair[name] or "", image, folder, where)
    texts = [pair["query"], pair["positive"]]
    texts += pair["negatives"] if isinstance(pair["negatives"], list) else [None]
    if not all(isinstance(text, Picture) or (isinstance(text, str) and text.strip()) for text in texts):
        raise UserError(f"{where}: query, positive and each of the list negatives must be texts, not empty")
    if pair["score"] is not None and not (
            isinstance(pair["score"], int | float) and math.isfinite(pair["score"])):
        raise UserError(f"{where}: score must be a number, not {pair['score']!r}")
    return pair


class PairDataset:
    """The checked pairs of a split. `digest` stands for all their texts, `scored` for pairs with scores,
    `most_negatives` is the largest number of a row; `picture` is the first one, None without images, whose
    relative paths begin at `folder`."""

    def __init__(self, rows, where: str, folder: Path = Path()) -> None:
        import datasets
        from tqdm import tqdm
        names = [name for name in ("query", "query_image", "positive", "positive_image", "negatives", "score")
                 if name in rows.column_names]
        for name in ("query", "positive"):
            if name not in names and f"{name}_image" not in names:
                raise UserError(f"{where}: no column '{name}'; it has: {', '.join(rows.column_names)}")
        for name in names:
            if isinstance(rows.features[name], datasets.Image):
                rows = rows.cast_column(name, datasets.Image(decode=False))  # as bytes, or as a path
        self.rows, self.where, self.folder = rows.select_columns(names), where, folder
        self.picture, self.most_negatives, digest, num_scored = None, 0, 0, 0
        for start in tqdm(range(0, len(rows), 1000), desc="checking rows", unit="k", leave=False,
                          disable=not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0"):
            for pair in self.take(range(start, min(start + 1000, len(rows)))):
                digest = zlib.crc32(repr(pair).encode(errors="replace"), digest)
                num_scored += pair["score"] is not None
                self.most_negatives = max(self.most_negatives, len(pair["negatives"]))
                for picture in (item for item in pair.values() if isinstance(item, Picture)):
                    self.picture = self.picture or picture
                    picture.read(whole=False)
        self.digest, self.scored = f"{len(rows)}-{digest:08x}", num_scored > 0
        if len(rows) < 2 or num_scored not in (0, len(rows)):
            raise UserError(f"{where}: {len(rows)} rows, {num_scored} with a score: expected at least two, "
                            "and a score in all or in none")

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Iterable[int]) -> list[dict]:
        columns = self.rows[list(indices)]
        rows = (dict(zip(columns, values)) for values in zip(*columns.values()))
        return [to_pair(row, f"{self.where} row {i + 1}", self.folder) for i, row in zip(indices, rows)]


def open_split(args: Namespace, split: str) -> PairDataset:
    """A split of --dataset, or a file, read by the datasets library. Raises UserError."""
    import datasets
    datasets.disable_progress_bars()  # each rank would show its own
    path, split = (Path(split), "train") if Path(split).is_file() else (Path(args.dataset), split)
    try:
        if path.is_file():
            kind = path.suffix[1:].replace("jsonl", "json")
            rows = datasets.load_dataset(kind, data_files=str(path), split=split)
        else:
            rows = datasets.load_dataset(args.dataset, args.dataset_config, split=split)
    except Exception as error:  # the library raises dozens of types; its first line says what is wrong
        raise UserError(f"--dataset {path} ({split}): {first_line(error.__cause__ or error)}") from error
    return PairDataset(rows, f"{path} ({split})", path.parent if path.is_file() else path)


def open_data(args: Namespace) -> tuple[PairDataset, PairDataset | None]:
    """(train, held out). Raises UserError."""
    train_set = open_split(args, args.dataset_split)
    if train_set.scored and (args.symmetric or args.num_negatives):
        raise UserError("--symmetric and --num-negatives do not go with scored pairs")
    return train_set, open_split(args, args.eval_split) if args.eval_split else None


def load_tokenizer(args: Namespace):
    """Its `processor` makes the inputs of a model that takes images; None for others."""
    from transformers import AutoProcessor, AutoTokenizer
    folder = fetch(args.model)
    kind = AutoProcessor if any(folder.glob("*processor_config.json")) else AutoTokenizer
    with naming(f"no usable tokenizer or processor in {folder}; most processors need python -m pip install "
                "pillow torchvision"):
        processor = kind.from_pretrained(folder, trust_remote_code=args.trust_remote_code)
    tokenizer = getattr(processor, "tokenizer", processor)
    takes_images = hasattr(processor, "image_processor") and processor.chat_template
    tokenizer.processor = processor if takes_images else None
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
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


@dataclasses.dataclass
class Batch:
    """The texts of this rank, R = B * (2 + num_negatives): B queries, their B positives, then the negatives.

    `parts` are model inputs, (b, T) each, of texts that stand at `order` (R,) of the batch. Equal `text_ids`
    (R,) mean equal texts; 0 is the place of a negative that a row lacks."""
    parts: list[dict[str, Tensor]]
    order: Tensor
    text_ids: Tensor
    scores: Tensor | None
    num_tokens: int


def text_id(item: str | Picture) -> int:
    digest = hashlib.blake2b(str(item).encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def encode(items: list, prompt: str, tokenizer, seq_len: int) -> list[dict]:
    """Model inputs of each text or `Picture`: lists hold a value a token, tensors its image."""
    if tokenizer.processor:
        return [encode_chat(item, prompt, tokenizer, seq_len) for item in items]
    token_ids = tokenizer([prompt + text for text in items], truncation=True, max_length=seq_len)["input_ids"]
    token_ids = [ids or [tokenizer.pad_token_id] for ids in token_ids]  # "" where nothing is added to a text
    return [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in token_ids]


def encode_chat(item: str | Picture, prompt: str, tokenizer, seq_len: int) -> dict:
    """As Qwen3-VL-Embedding does (arXiv:2601.04720): the prompt is the system's turn, image and text are the
    user's, and the assistant's begins. A text that is too long is cut, but nothing that follows it."""
    parts, render = contents(item), tokenizer.processor.apply_chat_template
    chat = [{"role": "system", "content": [{"type": "text", "text": prompt}]}] if prompt else []
    chat.append({"role": "user", "content": [{"type": kind, kind: value} for kind, value in parts.items()]})
    found = render(chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    inputs = {key: value[0].tolist() if value.shape == found["input_ids"].shape else value
              for key, value in found.items()}
    if (excess := found["input_ids"].shape[1] - seq_len) > 0:
        text = parts.get("text")
        after = render(chat, add_generation_prompt=True).rpartition(text)[2] if text else ""
        end = len(inputs["input_ids"]) - len(tokenizer(after)["input_ids"])
        if not text or tokenizer.processor.image_token_id in inputs["input_ids"][end - excess:end]:
            raise UserError(f"{getattr(item, 'where', 'a row')}: prompt and image exceed --seq-len {seq_len}")
        inputs |= {key: v[:end - excess] + v[end:] for key, v in inputs.items() if isinstance(v, list)}
    return inputs


BLANK = Picture("", b"P6 64 64 255 " + bytes(3 * 64 * 64), Path(), "a blank image")


def pad_texts(encoded: list[dict], tokenizer, seq_len: int, device: torch.device, has_images: bool
              ) -> dict[str, Tensor]:
    """input_ids and attention_mask (b, T), padded on the right, and what images add; pixels wait in host
    memory. With `has_images` a part without one gets a blank one, as a last text whose embedding is dropped:
    FSDP gathers the vision tower from all ranks, so all must run it."""
    num_texts, batch = len(encoded), {}
    if has_images and not any("pixel_values" in inputs for inputs in encoded):
        encoded = encoded + encode([BLANK], "", tokenizer, seq_len)
    T = max(len(inputs["input_ids"]) for inputs in encoded)
    if device.type == "cuda":  # kernels are planned, and graphs compiled, for each new T
        T = max(T, min(seq_len, math.ceil(T / 64) * 64))
    for key in dict.fromkeys(itertools.chain(*encoded)):
        values = [inputs[key] for inputs in encoded if key in inputs]
        pad = tokenizer.pad_token_id if key == "input_ids" else 0
        value = (torch.cat(values) if isinstance(values[0], Tensor)
                 else torch.tensor([row + [pad] * (T - len(row)) for row in values]))
        batch[key] = value if value.is_floating_point() else value.to(device)
    return batch | {"num_texts": num_texts}


def make_batch(pairs: list[dict], tokenizer, args: Namespace, device: torch.device, has_images: bool = False
               ) -> Batch:
    """Parts are the queries and the documents, or, with a gradient cache, chunks of texts of like length."""
    queries, documents = [pair["query"] for pair in pairs], [pair["positive"] for pair in pairs]
    for k in range(args.num_negatives):
        documents += [pair["negatives"][k] if k < len(pair["negatives"]) else "" for pair in pairs]
    encoded = encode(queries, args.query_prompt, tokenizer, args.seq_len)
    encoded += encode(documents, args.document_prompt, tokenizer, args.seq_len)
    lengths = [len(inputs["input_ids"]) for inputs in encoded]
    if args.grad_cache_chunk:
        order = sorted(range(len(encoded)), key=lambda i: -lengths[i])
        bounds = [*range(0, len(encoded), args.grad_cache_chunk), len(encoded)]
    else:
        order, bounds = list(range(len(encoded))), [0, len(queries), len(encoded)]
    parts = [pad_texts([encoded[i] for i in order[start:stop]], tokenizer, args.seq_len, device, has_images)
             for start, stop in zip(bounds, bounds[1:])]
    scores = None
    if pairs[0]["score"] is not None:
        scores = torch.tensor([float(pair["score"]) for pair in pairs], device=device)
    ids = [text_id(text) if text else 0 for text in queries + documents]
    return Batch(parts, torch.tensor(order, device=device), torch.tensor(ids, device=device), scores,
                 sum(lengths))


def ordered_batches(dataset: PairDataset, tokenizer, args: Namespace, ranks: Ranks, start: int
                    ) -> Iterator[Batch]:
    """This rank's batches from global position `start` on: ranks take turns of --batch-size pairs. A thread
    makes the next one while this one trains."""
    def make(position: int) -> Batch:
        if ranks.device.type == "cuda":
            torch.cuda.set_device(ranks.device)  # a thread has a current device of its own
        positions = range(position, position + args.batch_size)
        indices = [sample_at(p, len(dataset), args.seed) for p in positions]
        return make_batch(dataset.take(indices), tokenizer, args, ranks.device, dataset.picture is not None)

    position, stride = start + ranks.rank * args.batch_size, args.batch_size * ranks.world_size
    with ThreadPoolExecutor(1, "data") as pool:
        waiting = pool.submit(make, position)
        while True:
            batch, position = waiting.result(), position + stride
            waiting = pool.submit(make, position)
            yield batch


# ------------------------------------------------------------------------------------------------
# 4. Model: any encoder or decoder of transformers; pooling, shards, weights, proofs

# The names of this script and of sentence-transformers.
POOLING = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}


def pool(hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:  # EDIT: what becomes the embedding
    """(B, T, D), (B, T), padding on the right -> (B, D) in fp32."""
    if pooling == "cls":
        return hidden[:, 0].float()
    if pooling == "last":
        last = attention_mask.sum(1) - 1
        return hidden[torch.arange(len(hidden), device=hidden.device), last].float()
    weight = attention_mask.unsqueeze(-1).float()
    return (hidden.float() * weight).sum(1) / weight.sum(1)


def default_pooling(folder: Path, config: object) -> str:
    """What sentence-transformers' file says, in its old or new form; else last for decoders, which are the
    models of which transformers has a class that generates, and none that fills masks; else mean."""
    import transformers as hf
    try:
        found = json.loads((folder / "1_Pooling/config.json").read_text())
    except OSError:
        generating = hf.MODEL_FOR_CAUSAL_LM_MAPPING, hf.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        is_decoder = (any(type(config) in classes for classes in generating)
                      and type(config) not in hf.MODEL_FOR_MASKED_LM_MAPPING)
        return "last" if is_decoder else "mean"
    known = [name for name, theirs in POOLING.items()
             if found.get(f"pooling_mode_{theirs}") or found.get("pooling_mode") in (name, theirs)]
    if len(known) != 1:
        raise UserError(f"{folder}/1_Pooling asks for a pooling that is not known here: give --pooling")
    return known[0]


def build_model(args: Namespace) -> nn.Module:
    """The model on the meta device: shapes, no memory. Called with a part of a batch, it returns embeddings
    (b, D)."""
    import torch.distributed.checkpoint as dcp
    import transformers
    folder = fetch(args.model)
    with naming(f"--model {args.model}"):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=args.trust_remote_code)
        on_disk = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    refuse_quantised(folder, config)
    if config.is_encoder_decoder:
        raise UserError(f"--model {args.model} has an encoder and a decoder, which cannot be trained here")
    config.use_cache = config.get_text_config().use_cache = False  # keys and values are for generation only
    if args.attention:
        config.is_causal = config.get_text_config().is_causal = args.attention == "causal"
    with naming(f"--model {args.model}"), torch.device("meta"):
        model = note_fp32(transformers.AutoModel.from_config(
            config, dtype=torch.bfloat16, trust_remote_code=args.trust_remote_code))
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    if (padding := getattr(table, "padding_idx", None)) is not None:
        limit -= padding + 1  # RoBERTa and its kin count positions from the padding token's id on
    if args.seq_len > limit:
        raise UserError(f"--model {args.model} knows {limit} positions; use --seq-len {limit}")
    if not any("pooler" in name for name in on_disk):
        model.pooler = None  # BERT's, of another objective: kept as it is, if there
    backbone, args.pooling = model.forward, args.pooling or default_pooling(folder, config)

    # As an attribute, not as a wrapping module: parameter names stay those of the files on disk.
    def forward(input_ids: Tensor, attention_mask: Tensor, num_texts: int | None = None,
                pooling: str = args.pooling, **images: Tensor) -> Tensor:
        hidden = backbone(input_ids=input_ids, attention_mask=attention_mask, **images)[0]
        return pool(hidden[:num_texts], attention_mask[:num_texts], pooling)

    model.forward = forward
    return model


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
    """For the update after `step` updates: linear warm-up to max_lr, then down to min_lr at the last one."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    height = 0.5 * (1 + math.cos(math.pi * progress))  # EDIT: the schedule, from 1 after the warm-up to 0
    return min_lr + (max_lr - min_lr) * height


def resolve_steps(args: Namespace, dataset: PairDataset, ranks: Ranks, progress: dict
                  ) -> tuple[int, int, list[str]]:
    """(total steps, warm-up steps, lines that say why). Epochs count in pairs, also where the batch has
    changed since."""
    per_step = args.batch_size * ranks.world_size
    left = args.num_epochs * len(dataset) - progress["samples"]
    total = args.max_steps or progress["step"] + math.ceil(left / per_step)
    warmup = total // 10 if args.warmup_steps is None else args.warmup_steps
    if warmup > total:
        raise UserError(f"--warmup-steps {warmup} is more than the run's {total} steps")
    lines = [f"steps      {total:,} of {per_step:,} pairs, {warmup:,} of warm-up; the data hold "
             f"{len(dataset):,}{' with scores' if dataset.scored else ''}; learning rate {args.max_lr:g}"]
    if args.num_negatives != dataset.most_negatives:
        lines.append(f"note       rows have up to {dataset.most_negatives} negatives: see --num-negatives")
    return total, warmup, lines


# ------------------------------------------------------------------------------------------------
# 6. Loss: InfoNCE over all ranks, or CoSENT; Matryoshka; gradients at the embeddings, then through the model

@dataclasses.dataclass(frozen=True)
class Objective:
    """What a batch is scored by: (dimension, weight) of each loss, None for the model's; pairs of a rank."""
    dims: list[tuple[int | None, float]]
    batch_size: int
    symmetric: bool
    normalize: bool


def read_objective(args: Namespace) -> Objective:
    """Raises ValueError."""
    dims = args.mrl_dims.split(",") if args.mrl_dims else []
    weights = args.mrl_weights.split(",") if args.mrl_weights else ["1"] * len(dims)
    found = [(int(d), float(w)) for d, w in zip(dims, weights, strict=True)]
    if len(dict(found)) < len(found) or not all(d > 0 and 0 < w < 1e6 for d, w in found):
        raise ValueError("a dimension stands there twice, or a number is not above 0")
    return Objective(found or [(None, 1.0)], args.batch_size, args.symmetric, args.normalize)


def first_numbers(embeddings: Tensor, d: int | None, normalize: bool) -> Tensor:
    """(N, D) -> (N, d), the embeddings that Matryoshka makes of theirs."""
    return F.normalize(embeddings[:, :d], dim=-1) if normalize else embeddings[:, :d]


def info_nce(anchors: Tensor, candidates: Tensor, mask: Tensor, first: int, scale: Tensor
             ) -> tuple[Tensor, Tensor]:
    """InfoNCE (van den Oord et al. 2018, arXiv:1807.03748) summed over the B anchors from `first` on, and how
    many of them score their own candidate highest. (N, D), (M, D), whose first N are the anchors' own in the
    same order; `mask` (B, M) is true where a score must not count, see `masked_scores`."""
    own = slice(first, first + len(mask))
    labels = torch.arange(len(candidates), device=mask.device)[own]
    scores = (scale * anchors[own] @ candidates.T).masked_fill(mask, -math.inf)
    return F.cross_entropy(scores, labels, reduction="sum"), (scores.argmax(1) == labels).sum()


def masked_scores(query_ids: Tensor, document_ids: Tensor, first: int, B: int) -> tuple[Tensor, Tensor]:
    """Masks for `info_nce`: a query's positive that stands somewhere again, the positive of an equal query, a
    document that is the query itself, and places without a text are no negatives. (N,), (M,) -> (B, M),
    (B, N)."""
    N, own = len(query_ids), slice(first, first + B)
    same = (query_ids[own, None] == query_ids) | (document_ids[own, None] == document_ids[:N])
    to_documents = ((document_ids[own, None] == document_ids) | (query_ids[own, None] == document_ids)
                    | (document_ids == 0))
    to_documents[:, :N] |= same
    to_queries = same | (document_ids[own, None] == query_ids)
    for mask in (to_documents, to_queries):
        mask[:, own].fill_diagonal_(False)
    return to_documents, to_queries


def cosent(cosines: Tensor, scores: Tensor, scale: Tensor) -> Tensor:
    """log(1 + sum of exp(scale (cos_i - cos_j)) over all i, j with score_i < score_j). (N,), (N,) -> ().
    Su 2022, https://kexue.fm/archives/8847"""
    difference = scale * (cosines[:, None] - cosines)
    difference = difference.masked_fill(scores[:, None] >= scores, -math.inf)
    return torch.logsumexp(F.pad(difference.flatten(), (1, 0)), dim=0)


def batch_loss(embeddings: Tensor, text_ids: Tensor, scores: Tensor | None, rank: int, scale: Tensor,
               objective: Objective) -> Tensor:  # EDIT: the objective
    """This rank's part of the loss, which all ranks' parts add up to, and its hits: (2,), sums over B pairs.
    embeddings (W, R, D), text_ids (W, R) and scores (W, B) of all W ranks."""
    def by_kind(x: Tensor) -> tuple[Tensor, Tensor]:  # queries; positives, then negatives
        return x[:, :B].flatten(0, 1), torch.cat([x[:, B:2 * B].flatten(0, 1), x[:, 2 * B:].flatten(0, 1)])

    B = objective.batch_size
    (queries, documents), ids = by_kind(embeddings), by_kind(text_ids)
    masks = masked_scores(*ids, rank * B, B)
    loss = hits = torch.zeros((), device=queries.device)
    for number, (d, weight) in enumerate(objective.dims):
        q, p = (first_numbers(x, d, objective.normalize) for x in (queries, documents))
        if scores is None:
            one_way, found = info_nce(q, p, masks[0], rank * B, scale)
            if objective.symmetric:
                one_way = (one_way + info_nce(p, q, masks[1], rank * B, scale)[0]) / 2
            loss, hits = loss + weight * one_way, hits if number else found
        else:  # each rank sees all pairs: an equal share of one number
            loss = loss + weight * B * cosent((q * p).sum(-1), scores.flatten(), scale)
    return torch.stack([loss, hits.to(loss)])


def gather(tensor: Tensor, ranks: Ranks) -> Tensor:
    """(W, …) of all ranks, without gradients (all ranks)."""
    everything = tensor.new_empty(ranks.world_size, *tensor.shape)
    torch.distributed.all_gather(list(everything.unbind()), tensor.detach().contiguous())
    return everything


def embedding_gradients(embeddings: Tensor, scale: Tensor, batch: Batch, objective: Objective, ranks: Ranks
                        ) -> tuple[Tensor, Tensor, Tensor]:
    """(loss and hits (2,), gradient of all ranks' loss for this rank's (R, D) embeddings, and this rank's for
    the scale) (all ranks). Each rank scores its own queries against everybody's documents; what it finds for
    their embeddings goes back to them by one reduce-scatter."""
    everything = gather(embeddings, ranks).requires_grad_()
    scale = scale.detach().requires_grad_()
    scores = None if batch.scores is None else gather(batch.scores, ranks)
    terms = batch_loss(everything, gather(batch.text_ids, ranks), scores, ranks.rank, scale, objective)
    terms[0].backward()
    grad = torch.empty_like(embeddings)
    torch.distributed.reduce_scatter(grad, list(everything.grad.unbind()))
    return terms.detach(), grad, scale.grad


def learned_scale(log_scale: nn.Parameter) -> Tensor:
    """1 / temperature (1,), at most 100 (Radford et al. 2021, arXiv:2103.00020) (all ranks). Its backward
    adds up the ranks' gradients."""
    from torch.distributed.tensor import Partial
    sums = [Partial()] * log_scale.device_mesh.ndim
    return log_scale.full_tensor(grad_placements=sums).exp().clamp(max=100.0)


def forward_backward(model: nn.Module, batch: Batch, objective: Objective, args: Namespace, ranks: Ranks
                     ) -> Tensor:
    """Gradients of the summed loss into the parameters; returns loss, hits, and B times the temperature (3,)
    (all ranks).

    Gradients are taken at the embeddings first, then part by part through the model, and are reduced with the
    last part only. With a gradient cache (Gao et al. 2021, arXiv:2101.06983) all parts are embedded without
    gradients first, then again with them, from the same random states, so that dropout is the same."""
    cached, outputs, states = bool(args.grad_cache_chunk), [], []
    with torch.set_grad_enabled(not cached):
        for part in batch.parts:
            states.append(random_states(ranks) if cached else {})
            outputs.append(model(**part))
    found = torch.cat([out.detach() for out in outputs])
    embeddings = torch.empty_like(found)
    embeddings[batch.order] = found
    scale = (learned_scale(model.log_scale) if args.learn_temperature
             else torch.tensor([1 / args.temperature], device=ranks.device))
    terms, grad, grad_scale = embedding_gradients(embeddings, scale, batch, objective, ranks)
    if args.learn_temperature:
        scale.backward(grad_scale)

    grads = grad[batch.order].split([len(out) for out in outputs])
    for i, (part, part_grad) in enumerate(zip(batch.parts, grads)):
        is_last = i == len(batch.parts) - 1
        # One device has nothing to send: it need not keep whole gradients beside its own.
        is_reduced = is_last or args.reduce_every_micro_batch or ranks.world_size == 1
        model.set_requires_gradient_sync(is_reduced)
        model.set_is_last_backward(is_last)
        if cached:
            torch.set_rng_state(states[i][f"cpu_{ranks.rank}"])
            if ranks.device.type == "cuda":
                torch.cuda.set_rng_state(states[i][f"cuda_{ranks.rank}"], ranks.device)
            outputs[i] = model(**part)
        outputs[i].backward(part_grad)
        outputs[i] = None  # with its graph
    return torch.stack([*terms, objective.batch_size / scale.detach().squeeze()])


# ------------------------------------------------------------------------------------------------
# 7. Checkpoints and export: asynchronous, published by a rename, resumed exactly; a folder for others

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


def write_sentence_transformer(folder: Path, args: Namespace, dimension: int, processor: object) -> None:
    """The files by which `SentenceTransformer(folder)` pools, normalises and prompts as this script does."""
    (folder / "generation_config.json").unlink(missing_ok=True)
    module = {"max_seq_length": args.seq_len}
    if processor:
        processor.save_pretrained(folder)
        hidden = {"method": "forward", "method_output_name": "last_hidden_state", "format": "structured"}
        module |= {"modality_config": dict.fromkeys(("text", "image", "message"), hidden),
                   "module_output_name": "token_embeddings",
                   "processing_kwargs": {"chat_template": {"add_generation_prompt": True}}}
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), *[("2_Normalize", "Normalize")] * args.normalize]
    files = {
        "1_Pooling/config.json": {
            "word_embedding_dimension": dimension,
            **{f"pooling_mode_{theirs}": name == args.pooling for name, theirs in POOLING.items()}},
        "sentence_bert_config.json": module,
        "config_sentence_transformers.json": {
            "prompts": {"query": args.query_prompt, "document": args.document_prompt},
            "similarity_fn_name": "cosine" if args.normalize else "dot"},
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(kinds)],
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def export_run(args: Namespace, model: nn.Module, tokenizer, pairs: list[dict], dtype: torch.dtype,
               ranks: Ranks) -> Tensor:
    """Write RUN/hf (all ranks). Returns the embeddings of the pairs' queries, then positives, by the trained
    model, for `verify_export`."""
    folder = Path(args.checkpoint_dir) / "hf"
    prompts = {"query": args.query_prompt, "positive": args.document_prompt}
    expected = torch.cat([embed_texts(model, tokenizer, [pair[key] for pair in pairs], prompt, args, ranks)
                          for key, prompt in prompts.items()])
    if args.learn_temperature:
        del model.log_scale  # no part of an embedding
    if args.lora_merge:
        merge_lora(model)
    config = getattr(model, "peft_config", {}).get("default", model.config)
    fresh = load_tokenizer(args)  # one that has cut texts would be saved with the length that it cut at
    export_model(model, folder, (config, fresh, fetch(args.model)), dtype, ranks)
    if ranks.is_main:
        write_sentence_transformer(folder, args, expected.shape[1], fresh.processor)
    return first_numbers(expected, None, args.normalize)


def verify_export(folder: Path, pairs: list[dict], expected: Tensor, dtype: torch.dtype, args: Namespace
                  ) -> str:
    """Load the folder with sentence-transformers, on the CPU, and embed the pairs: the embeddings must be
    `expected`, those of the trained model, computed in `dtype`. Returns a word on it for the end of a run.
    Raises UserError."""
    if not importlib.util.find_spec("sentence_transformers"):
        return "not reloaded: python -m pip install sentence-transformers"
    nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if nbytes * 1.2 > os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        return "not reloaded: too little memory"
    from sentence_transformers import SentenceTransformer
    loaded = SentenceTransformer(str(folder), device="cpu", trust_remote_code=args.trust_remote_code,
                                 model_kwargs={"dtype": "auto"})
    found = torch.cat([
        loaded.encode([contents(pair[key]) for pair in pairs], prompt_name=prompt, convert_to_tensor=True)
        for key, prompt in (("query", "query"), ("positive", "document"))]).float()
    error = ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
    bound = 1e-5 if {dtype, next(loaded.parameters()).dtype} == {torch.float32} else 0.05
    if not error <= bound:
        raise UserError(f"{folder}, loaded again, is not the trained model: embeddings are off by "
                        f"{error:.1e} (bound {bound:.0e}). The checkpoint is intact, please report this")
    return f"SentenceTransformer loads it: embeddings within {error:.0e}"


# ------------------------------------------------------------------------------------------------
# 8. Run record: docs/metrics.md explains each key of metrics.jsonl

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
# 9. Evaluation: retrieval among all held-out documents, or rank correlation, while sharded

@torch.no_grad()
def embed_texts(model: nn.Module, tokenizer, texts: list, prompt: str, args: Namespace, ranks: Ranks
                ) -> Tensor:
    """(N, D) in fp32 of texts and `Picture`s, whole in each rank's host memory (all ranks).

    Texts of like length go together, images first; ranks take turns. One that has none left repeats a text,
    because every rank must take part in each forward's gathers."""
    from tqdm import tqdm
    b = args.grad_cache_chunk or args.batch_size  # what fits with gradients fits without
    has_images, found, per_round = any(isinstance(item, Picture) for item in texts), [], b * ranks.world_size
    lengths = [len(item) if isinstance(item, str) else math.inf for item in texts]
    order = sorted(range(len(texts)), key=lambda i: -lengths[i])
    model.eval()
    for start in tqdm(range(0, len(texts), per_round), desc="embedding", leave=False,
                      disable=not (ranks.is_main and sys.stderr.isatty())):
        turn = (order[start:start + per_round] + order[-1:] * per_round)[ranks.rank * b:][:b]
        mine = encode([texts[i] for i in turn], prompt, tokenizer, args.seq_len)
        vectors = model(**pad_texts(mine, tokenizer, args.seq_len, ranks.device, has_images))
        found.append(gather(vectors, ranks).flatten(0, 1).cpu())  # sync point
    reshard(model)
    model.train()
    return torch.cat(found)[torch.tensor(order).argsort()]


def retrieval_ranks(queries: Tensor, documents: Tensor, own: Tensor, query_ids: Tensor, rows: slice
                    ) -> Tensor:
    """(N, D), (M, D), (N,) the index of each query's document -> the rank, from 1, of that of each query in
    `rows`. Ties count against it; documents of queries with an equal id (N,) are left out."""
    scores = queries[rows] @ documents.T
    mine = scores.gather(1, own[rows, None])
    i, j = (query_ids[rows, None] == query_ids).nonzero(as_tuple=True)
    scores[i, own[j]] = -math.inf
    return 1 + (~(scores < mine)).sum(1)  # one of NaN comes last


def retrieval_metrics(queries: Tensor, documents: Tensor, own: Tensor, query_ids: Tensor, ranks: Ranks
                      ) -> dict[str, float]:
    """See `retrieval_ranks`; each rank takes a part of the queries (all ranks)."""
    inputs = [tensor.to(ranks.device) for tensor in (queries, documents, own, query_ids)]
    sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    for start in range(ranks.rank * 256, len(queries), ranks.world_size * 256):
        rank = retrieval_ranks(*inputs, slice(start, start + 256))
        near = (rank <= 10).double()
        sums += torch.stack([(rank == 1).double().sum(), near.sum(), (near / rank).sum(),
                             (near / torch.log2(1.0 + rank)).sum()])
    means = (all_sum(sums) / len(queries)).tolist()  # sync point
    return dict(zip(("recall@1", "recall@10", "mrr@10", "ndcg@10"), means))


def spearman(one: Tensor, other: Tensor) -> float:
    """The correlation of their ranks; equal values share the mean of theirs."""
    ranks = []
    for values in (one, other):
        _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum(0).double() - (counts - 1) / 2)[inverse])
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def evaluate(model: nn.Module, dataset: PairDataset, tokenizer, objective: Objective, args: Namespace,
             ranks: Ranks) -> dict[str, float]:
    """The eval/… of docs/metrics.md over the whole held-out split, the same on any number of ranks (all
    ranks). Documents are the positives and all negatives, equal texts taken once."""
    started, pairs = time.perf_counter(), dataset.take(range(len(dataset)))
    queries, positives = [pair["query"] for pair in pairs], [pair["positive"] for pair in pairs]
    texts = list(dict.fromkeys([*positives, *(text for pair in pairs for text in pair["negatives"])]))
    place = {text: i for i, text in enumerate(texts)}
    own = torch.tensor([place[text] for text in positives])
    query_ids = torch.tensor([text_id(query) for query in queries])
    all_q = embed_texts(model, tokenizer, queries, args.query_prompt, args, ranks)
    all_p = embed_texts(model, tokenizer, texts, args.document_prompt, args, ranks)
    found = {}
    for number, (d, _) in enumerate(objective.dims):
        q, p = (first_numbers(x, d, args.normalize) for x in (all_q, all_p))
        if dataset.scored:
            scores = torch.tensor([float(pair["score"]) for pair in pairs])
            values = {"spearman": spearman(F.cosine_similarity(q, p[own]), scores)}
        else:
            values = retrieval_metrics(q, p, own, query_ids, ranks)
        suffix = f"_{d}" if number else ""
        found |= {f"eval/{name}{suffix}": value for name, value in values.items()}
    return found | {"eval/time_s": time.perf_counter() - started}


def note_evaluation(found: dict[str, float], progress: dict, bar, ranks: Ranks) -> None:
    """Show it; recall@10, or the correlation, decides which step is the best."""
    if ranks.is_main:
        values = "  ".join(f"{key[5:]} {value:.4f}" for key, value in found.items() if key != "eval/time_s")
        bar.write(f"step {progress['step']:>7,}  {values}")
    value = found.get("eval/spearman", found.get("eval/recall@10"))
    if progress["best_eval"] is None or value > progress["best_eval"]:
        progress |= {"best_eval": value, "best_step": progress["step"]}


# ------------------------------------------------------------------------------------------------
# 10. Training

IDENTITY = ("model data seed seq_len pooling attention normalize lora_rank lora_alpha "
            "lora_targets")  # another one is another run


def ready_model(args: Namespace, model: nn.Module, checkpoints: list[Path], dtype: torch.dtype,
                mesh: torch.distributed.DeviceMesh, ranks: Ranks) -> torch.optim.Optimizer:
    """Shard the model, give it memory and the weights of a checkpoint or of files, and prove that they are
    there (all ranks). Returns its optimizer, filled, too."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    shard_model(model, args, mesh, dtype)
    materialise(model, ranks.device, args.cpu_offload)
    fill_buffers(model)
    if args.lora_rank or not checkpoints:
        load_hf_weights(model, fetch(args.model), args.trust_remote_code, ranks)
    if args.lora_rank:
        init_lora(model, args.seed, ranks.device)
    if args.learn_temperature:  # after the files, which do not know of it; outside of FSDP, so always fp32
        value = torch.tensor([-math.log(args.temperature)], device=ranks.device)
        placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
        model.log_scale = nn.Parameter(distribute_tensor(value, mesh, placements))
    optimizer = build_optimizer(model, args)  # after sharding, which replaces the parameters
    if checkpoints:
        load_checkpoint(checkpoints, model, optimizer, ranks)
    prove_filled(model)
    prove_embeddings(model, args, 0.02 if dtype == torch.float32 else 0.25, ranks)
    return optimizer


@torch.no_grad()
def prove_embeddings(model: nn.Module, args: Namespace, bound: float, ranks: Ranks) -> None:
    """Padding beside a text must not change its embedding, by more than `bound` of what another text does;
    and the first token must see the last one if, and only if, --attention says so (all ranks)."""
    ids = plain_tokens(model, 2, 32, ranks.device)
    mask, changed = torch.ones_like(ids), torch.cat([ids[:, :-1], ids[:, -1:].flip(0)], dim=1)
    family = own_class(model).__name__ + (f" with --attention {args.attention}" if args.attention else "")
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        alone, beside = model(ids, mask), model(F.pad(ids, (0, 16)), F.pad(mask, (0, 16)))
        first, other = model(ids, mask, pooling="cls"), model(changed, mask, pooling="cls")
    reshard(model)
    model.train()
    if not torch.isfinite(alone).all():
        raise UserError("the model's embeddings are not finite on a plain input: its weights are broken")
    sees = bool((first - other).abs().max() > 1e-3 * first.abs().mean())
    if args.attention and sees != (args.attention == "bidirectional"):
        raise UserError(f"{family}: the model does not do it")
    if not (beside - alone).abs().mean() <= bound * (alone[0] - alone[1]).abs().mean():
        raise UserError(f"padding changes the embeddings of {family}: it cannot be trained here")


def count_bad_steps(is_bad: float, progress: dict, saver: Checkpointer) -> None:
    """Raises UserError after ten in a row (all ranks)."""
    progress["bad_in_a_row"] = progress["bad_in_a_row"] + 1 if is_bad else 0
    progress["skipped_steps"] += bool(is_bad)
    if progress["bad_in_a_row"] == 10:
        finish_save(saver)
        raise UserError("10 steps in a row had a gradient that is not finite, and changed nothing: lower "
                        "--max-lr, or look at the data")


def show_row(bar, row: dict, total_steps: int, ranks: Ranks) -> None:
    """In the bar, or as one line of fixed width for logs that are files."""
    if not bar.disable:
        bar.set_postfix_str(f"loss {row['train/loss']:.4f}, {row['perf/pairs_per_s']:,.0f} pairs/s")
    elif ranks.is_main:
        print(f"step {row['step']:>7,}/{total_steps:,}  loss {row['train/loss']:8.4f}  "
              f"accuracy {row['train/accuracy']:.3f}  lr {row['train/lr']:.2e}  "
              f"norm {row['train/grad_norm']:8.3f}  {row['perf/pairs_per_s']:>9,.1f} pairs/s  "
              f"{row['perf/peak_mem_gib']:6.2f} GiB", flush=True)


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
    train_set, eval_set = open_data(args)  # takes as long as it needs: no process group exists yet
    tokenizer = load_tokenizer(args)
    for data in filter(None, (train_set, eval_set)):
        if data.picture and not tokenizer.processor:
            raise UserError(f"{data.picture.where}: {args.model} takes no images")

    mesh = init_distributed(args, ranks)
    dtype = compute_dtype(args.mixed_precision, ranks.device)
    # Shapes, then shards, then memory, then weights: no device needs room for more than its part.
    model = build_model(args)
    add_lora(model, args, args.model, "FEATURE_EXTRACTION", dtype)
    objective, dimension = read_objective(args), model.config.get_text_config().hidden_size
    if any(d and d > dimension for d, _ in objective.dims):
        raise UserError(f"--mrl-dims {args.mrl_dims}: the model's embeddings have {dimension} numbers")
    check_memory(model, args, mesh)
    lock = lock_run(run_dir) if ranks.is_main else None  # noqa: F841, held until this process ends
    checkpoints = gather_objects(checkpoints_to_resume(args) if ranks.is_main else None)[0]
    progress = read_progress(checkpoints, {  # all of it survives a resume
        "step": 0, "samples": 0, "skipped_steps": 0, "bad_in_a_row": 0, "best_eval": None, "best_step": -1})
    total_steps, warmup_steps, notes = resolve_steps(args, train_set, ranks, progress)
    notes += compare_runs(args, progress, checkpoints, IDENTITY, processes=ranks.world_size,
                          data=train_set.digest, total_steps=total_steps)
    if report_finished(args, ranks, checkpoints, progress["step"], total_steps, "--max-steps"):
        return
    optimizer = ready_model(args, model, checkpoints, dtype, mesh, ranks)
    batches = ordered_batches(train_set, tokenizer, args, ranks, progress["samples"])

    texts = write_record(run_dir, args, ranks)
    saver = Checkpointer(run_dir / "checkpoints", args.keep_checkpoints)
    trackers = open_trackers(args, ranks)
    if ranks.is_main:
        print(describe_model(model, dtype), *notes, sep="\n")
    samples_per_step = args.batch_size * ranks.world_size
    num_replicas = ranks.world_size // mesh.size(-1)  # 1 without HSDP
    pair_count = torch.tensor(float(args.batch_size), device=ranks.device)
    times, num_tokens, stop = {}, 0, None
    phase = functools.partial(timed, times)
    asked = catch_signals(ranks)
    bar = open_bar(total_steps, progress["step"], ranks)
    started = row_started = time.perf_counter()
    row, row_step, evaluation = {}, progress["step"], {}

    # Loop ------------------------------------------------------------------------------------
    while True:
        # Evaluate (all ranks): here, not behind the save, so that a run that was ended between the two makes
        # up for it when it is resumed. What an evaluation decides thus comes after the save of its step.
        step = progress["step"]
        is_last = step >= total_steps
        if eval_set and (is_last or (args.eval_interval and step % args.eval_interval == 0)):
            stall_after(None)
            evaluation = evaluate(model, eval_set, tokenizer, objective, args, ranks)
            row_started += evaluation["eval/time_s"]  # no time of steps
            note_evaluation(evaluation, progress, bar, ranks)
            for track in trackers:
                track({"step": step, **evaluation})
        if is_last:
            break
        stall_after(args.stall_timeout)

        # Forward and backward: gradients of the summed loss, reduced with the last part (all ranks)
        with phase("data"):
            batch = next(batches)
        with phase("forward_backward"):
            terms = forward_backward(model, batch, objective, args, ranks)
        num_tokens += batch.num_tokens * ranks.world_size

        # Clip and step (all ranks)
        with phase("checkpoint"):
            wait_for_copy(saver)  # the update would change what is being copied
        with phase("optimizer"):
            lr = learning_rate(step, total_steps, warmup_steps, args.max_lr, args.min_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            means, num_pairs, grad_norm, votes = reduce_stats(
                model, terms, pair_count, num_replicas, votes_to_stop(asked, run_dir, ranks))
            skipped = clip_and_step(optimizer, grad_norm, num_pairs, args.grad_clip)
            optimizer.zero_grad()
            loss, accuracy, temperature, norm, skipped, *votes = torch.stack(
                [*means, grad_norm, skipped, *votes]).tolist()  # sync point

        # Count
        step += 1
        progress |= {"step": step, "samples": progress["samples"] + samples_per_step}
        stop = next((name for name, count in zip(STOPS, votes) if count), None)
        bar.update()
        count_bad_steps(skipped, progress, saver)
        is_last, every = step == total_steps, args.checkpoint_interval
        may_be_best = args.keep_best and args.eval_interval and step % args.eval_interval == 0
        is_save = every and (is_last or stop or may_be_best or step % every == 0)

        # Log
        if step % args.log_interval == 0 or is_save or is_last or stop or step == 1:
            seconds, num_steps = time.perf_counter() - row_started, step - row_step
            row = {
                "step": step, "samples": progress["samples"], "train/loss": loss, "train/accuracy": accuracy,
                "train/temperature": temperature, "train/lr": lr, "train/grad_norm": norm,
                "train/skipped_steps": progress["skipped_steps"],
                "perf/pairs_per_s": samples_per_step * num_steps / seconds,
                "perf/tokens_per_s": num_tokens / seconds, "perf/peak_mem_gib": peak_memory_gib(ranks.device),
                "time/step_s": seconds / num_steps,
                **{f"time/{key}_s": value / num_steps for key, value in times.items()},
            }
            for track in trackers:
                track(row)
            show_row(bar, row, total_steps, ranks)
            row_started, row_step, num_tokens = time.perf_counter(), step, 0
            times.clear()
        stall_after(None)

        # Save (all ranks): before the evaluation, which may run out of memory
        if is_save:
            with phase("checkpoint"):
                saver.best = progress["best_step"] if args.keep_best else -1
                start_save(saver, checkpoint_tensors(model, optimizer, ranks), progress, texts, ranks)
                if is_last or stop or not args.async_checkpoint:
                    finish_save(saver, must=is_last or stop)
        if stop and not is_last:
            leave_stopped(stop, saver, ranks)

    # End -------------------------------------------------------------------------------------
    bar.close()
    batches.close()
    proof = train_set.take(range(min(8, len(train_set))))
    expected = export_run(args, model, tokenizer, proof, dtype, ranks) if args.export else None
    torch.distributed.destroy_process_group()  # rank 0 works alone from here: the others must not time out
    if ranks.is_main:
        write_summary(run_dir, progress, row | evaluation, time.perf_counter() - started)
        print(f"record     {run_dir / 'metrics.jsonl'}, {run_dir / 'summary.json'}")
        if args.export:
            found = verify_export(run_dir / "hf", proof, expected, dtype, args)
            print(f"model      {run_dir / 'hf'} ({found})")
            print(f"next       SentenceTransformer({str(run_dir / 'hf')!r}).encode(['a text', 'another'])")


if __name__ == "__main__":
    run_and_report(saves_memory="give a smaller --grad-cache-chunk")
