#!/usr/bin/env bash
# Trains on this machine: one process per GPU, or two processes on the CPU where there is no GPU.
#
# Usage:
#   ./launch_single_node.sh                      the quickstart, configs/train_llm/quickstart.yaml
#   ./launch_single_node.sh ARGS...              train_llm.py with these arguments
#   ./launch_single_node.sh SCRIPT.py ARGS...    another training script
#   ./launch_single_node.sh [SCRIPT.py] --help   this text, then the script's own flags
#
# Environment:
#   NPROC=2                    processes to start, instead of one per GPU (--nproc in ARGS wins)
#   MAX_RESTARTS=3             how often all processes start again after one died; default 0
#   CUDA_VISIBLE_DEVICES=0,3   the GPUs to use; set but empty: none
#   PYTHON=python3.12          interpreter; default: .venv/bin/python beside this file, else python3
#   OMP_NUM_THREADS=4          CPU threads of each process; default: the cores are divided among them
#   DRY_RUN=1                  print the commands, check the script's flags and stop
# More machines: launch_multi_node.sh, or launch_slurm.sh where there is SLURM.
#
# Where that Python lacks packages of requirements.txt, they are installed into .venv beside this file.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
requirements=$here/requirements.txt
venv=$here/.venv
venv_python=$venv/bin/python
dry_run=${DRY_RUN:-0}

# Notes go to stderr, so that stdout holds the commands and then what the training prints.
note() { printf 'launch: %s\n' "$*" >&2; }
die() { note "$@"; exit 1; }
usage_error() { note "$@"; exit 2; }
show() { local line; printf -v line '%q ' "$@"; printf '%s\n' "${line% }"; }
run() { show "$@"; [[ $dry_run == 1 ]] || "$@" >&2; }

# ----------------------------------------------------------------------------------------------------
# 1. Script: which one, and with what arguments

script=$here/train_llm.py
if [[ ${1:-} == *.py ]]; then
    # A name that is no file here is looked up beside the launcher, so that it works from any folder.
    script=$1
    [[ -f $script ]] || script=$here/$1
    shift
elif [[ $# == 0 ]]; then
    set -- --config "$here/configs/train_llm/quickstart.yaml"
fi
[[ -f $script ]] || usage_error "there is no script $script"

help=0
if [[ $# == 1 && ($1 == -h || $1 == --help) ]]; then
    help=1
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    echo
fi

# ----------------------------------------------------------------------------------------------------
# 2. Python: the interpreter and its packages

# Packages of requirements.txt that Python $1 has not, or has in a version below the one asked for. It reads
# what is installed and imports nothing: importing torch takes seconds, and a broken driver is another matter.
lacking_packages() {
    "$1" - "$requirements" <<'EOF'
import importlib.metadata, re, sys

def release(version):
    return [int(number) for number in re.match(r"\d+(\.\d+)*", version)[0].split(".")]

for line in open(sys.argv[1]):
    match = re.match(r"([\w-]+)[^#]*", line)
    if not match:
        continue
    name, at_least = match[1], re.search(r">=\s*([\d.]+)", match[0])
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version is None or at_least and release(version) < release(at_least[1]):
        print(name + (at_least[0] if at_least else ""), end=" ")
EOF
}

# Goes on from wherever an interrupted installation stopped.
install_packages() {
    local quiet=()
    # pip is not asked to be quiet on a terminal: torch's CUDA wheels are gigabytes, a silent wait looks hung.
    [[ -t 2 ]] || quiet=(--quiet)
    # pip comes in by a step of its own, because it is this one that fails on a Debian without python3-venv.
    [[ -x $venv_python ]] || run "$python" -m venv --without-pip "$venv" || die "could not make $venv"
    if ! "$venv_python" -m pip --version >/dev/null 2>&1; then
        run "$venv_python" -m ensurepip --default-pip || die "$python cannot put pip into $venv;" \
            "on Debian or Ubuntu 'apt-get install python3-venv' mends that, then start this again"
    fi
    run "$venv_python" -m pip install ${quiet[@]+"${quiet[@]}"} -r "$requirements" ||
        die "pip could not install $requirements into $venv; start this again to go on"
}

if [[ -n ${PYTHON:-} ]]; then
    python=$PYTHON
elif [[ -x $venv_python ]]; then
    python=$venv_python
else
    python=python3
    command -v python3 >/dev/null || python=python
fi
command -v "$python" >/dev/null || die "no $python here; name an interpreter with PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "$python is $("$python" --version 2>&1); Python 3.10 or newer is needed (PYTHON=/path/to/python3)"
# Not the program nproc: where OMP_NUM_THREADS is set, that one prints it in place of the number of cores.
num_cores=$("$python" -c 'import os
print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')

lacking=$(lacking_packages "$python")
if [[ -n $lacking && $python != "$venv_python" && -x $venv_python ]]; then
    note "$python lacks ${lacking% }; using $venv"
    python=$venv_python
    lacking=$(lacking_packages "$python")
fi
found=$python # a dry run does not make the other one
if [[ -n $lacking && $help == 1 ]]; then
    note "$python lacks ${lacking% }; the flags of ${script##*/} can be shown once they are installed"
    exit 0
elif [[ -n $lacking ]]; then
    note "$python lacks ${lacking% }; installing $requirements into $venv"
    install_packages
    python=$venv_python
fi

[[ $help == 0 ]] || exec "$python" "$script" --help

# The quickstart's data is made here, of the sources of that Python's library.
if [[ " $* " == *"/configs/train_llm/quickstart.yaml "* && $dry_run != 1 ]]; then
    "$python" "$here/tools/make_stdlib_data.py" >&2 || die "could not make the quickstart's data"
fi

# ----------------------------------------------------------------------------------------------------
# 3. Processes: how many, on what

num_gpus=0
if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    # CUDA itself ends the list at the first entry that names no device; -1 is the usual way to say "none".
    visible=,$CUDA_VISIBLE_DEVICES
    visible=${visible%%,-1*}
    IFS=, read -ra devices <<<"${visible#,}"
    num_gpus=${#devices[@]}
elif command -v nvidia-smi >/dev/null; then
    # Counts cards: a card that is split into MIG slices lists these below its own line. No driver: none.
    num_gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || num_gpus=0
fi

# The scripts that relaunch themselves define this flag; a mention of torchrun's --nproc-per-node is not it.
relaunches=0
! grep -qE "[\"']--nproc[\"']" "$script" || relaunches=1

# What the arguments or their config ask for stays theirs: --nproc 4, or --gpu-ranks 0,3 for two.
asked=""
config=""
count_ranks() { local list; IFS=, read -ra list <<<"$1"; echo "${#list[@]}"; }
if [[ $relaunches == 1 ]]; then
    previous=""
    for arg in "$@"; do
        [[ $previous != --nproc && $previous != --gpu-ranks && $previous != --config ]] || arg=$previous=$arg
        case $arg in
            --nproc=*) asked=${arg#*=} ;;
            --gpu-ranks=*) asked=$(count_ranks "${arg#*=}") ;;
            --config=*) config=${arg#*=} ;;
        esac
        previous=$arg
    done
    if [[ -z $asked && -f $config ]]; then
        asked=$(sed -nE 's/^"?nproc"?: *([0-9]+).*/\1/p' "$config")
        ranks=$(sed -nE "s/^\"?gpu[-_]ranks\"?: *[\"']?([0-9,]+).*/\1/p" "$config")
        [[ -n $asked || -z $ranks ]] || asked=$(count_ranks "$ranks")
    fi
fi

if [[ -n $asked ]]; then
    nproc=$asked
elif [[ -n ${NPROC:-} ]]; then
    [[ $NPROC =~ ^[1-9][0-9]*$ ]] || usage_error "NPROC is a number of processes, not '$NPROC'"
    nproc=$NPROC
elif [[ $num_gpus -gt 0 ]]; then
    nproc=$num_gpus
else
    nproc=$((num_cores > 1 ? 2 : 1))
    note "no GPU here: $nproc process(es) on the CPU"
fi

[[ ${MAX_RESTARTS:-0} =~ ^[0-9]+$ ]] || usage_error "MAX_RESTARTS is a number, not '$MAX_RESTARTS'"

# ----------------------------------------------------------------------------------------------------
# 4. Environment
#
# For NCCL nothing is set: its defaults are right on one machine. When a run hangs at its first collective,
# start tools/doctor.py in place of the script; these help, too, and all pass through from the caller's
# environment:
#   NCCL_DEBUG=INFO            which transport each pair of GPUs uses, and what failed
#   NCCL_SOCKET_IFNAME=lo      the network interface of the rendezvous, where the chosen one is no use
#   NCCL_IB_DISABLE=1          leave InfiniBand out, to tell whether it is at fault
#   NCCL_P2P_DISABLE=1         leave direct GPU to GPU copies out, likewise

environment=()
# The first is torchrun's --max-restarts. The second gives each start a store of its own: torch 2.11 and 2.13
# keep one, where the new processes find the old ones' addresses.
[[ ${MAX_RESTARTS:-0} == 0 ]] ||
    environment+=("PET_MAX_RESTARTS=$MAX_RESTARTS" TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1)
# A number that the script will reject divides nothing; its own message is the better one.
if [[ -z ${OMP_NUM_THREADS:-} && $nproc =~ ^[1-9][0-9]*$ ]]; then
    threads=$((num_cores / nproc))
    if [[ $num_gpus == 0 ]]; then
        # Processes that each take every core slow one another down many times over.
        environment+=("OMP_NUM_THREADS=$((threads > 1 ? threads : 1))")
    elif [[ $nproc -gt 1 ]]; then
        # What torchrun sets as well, but with a warning.
        environment+=(OMP_NUM_THREADS=1)
    fi
fi

# ----------------------------------------------------------------------------------------------------
# 5. Command

command=("$python")
if [[ $relaunches == 0 ]]; then
    command+=(-m torch.distributed.run --standalone --nproc-per-node "$nproc")
elif [[ -z $asked ]]; then
    # The script starts torchrun itself, after it has checked its arguments: a mistake is one clean message.
    set -- --nproc "$nproc" "$@"
fi
command+=("$script" "$@")
show ${environment[@]+"${environment[@]}"} "${command[@]}"
[[ $dry_run != 1 ]] || exec "$found" -B "$here/tools/check_flags.py" "$script" "$@"
exec env ${environment[@]+"${environment[@]}"} "${command[@]}"
