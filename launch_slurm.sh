#!/usr/bin/env bash
# Trains on the nodes of a SLURM job: one process per GPU, or on the CPU where the job has none. A job that is
# preempted or reaches its time limit saves, requeues itself and goes on, until the run is finished.
#
# Usage:
#   sbatch launch_slurm.sh                                the quickstart, configs/train_llm/quickstart.yaml
#   sbatch --nodes 4 launch_slurm.sh ARGS...              train_llm.py with these arguments
#   sbatch --nodes 4 launch_slurm.sh SCRIPT.py ARGS...    another script that runs under torchrun
#   bash launch_slurm.sh --help                           this text
# and while the job runs:
#   scancel JOB                                           ends it for good
#   scancel --signal INT JOB                              saves, then ends it
#   scancel --signal USR1 JOB                             saves, then requeues it
#
# Nodes, GPUs and CPUs are those of the job. The lines below take whole nodes, with all their GPUs; options of
# sbatch before the launcher's name win over them, such as --partition, --account, --time, --gpus-per-node.
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
#
# Environment (in front of sbatch, which hands it to the job):
#   USE_HF_MODEL=true          with HF_MODEL: --hf-model; false: --from-scratch. ARGS win over all of these
#   HF_MODEL=NAME_OR_FOLDER    the model to fine-tune
#   BATCH_SIZE=4               --batch-size
#   GRAD_ACCUM_STEPS=2         --grad-accum-steps
#   MAX_RESTARTS=3             how often the processes start again in the same job after one of them died
#   LOG_DIR=logs               holds JOBID/attempt_N/rank_R.log: a folder per start of the job, a file a rank
#   PYTHON=python3.12          interpreter; default: .venv/bin/python beside this file, else python3
#   OMP_NUM_THREADS=4          CPU threads of each process; default: 1 beside a GPU, else its share of CPUs
#   MASTER_ADDR, MASTER_PORT   of rank 0; default: the first node, a port by the job's number
#   DRY_RUN=1                  print the command, check the script's flags and stop; outside of a job, too
#
# Exit codes of the training: 0 finished; 138 (USR1) and 143 (TERM) stopped and saved, the job is requeued; 3
# and 130 stopped by its user, the job ends; others above 128: a process was killed, all start again; the rest
# are errors, with which the job ends.
set -euo pipefail

# SLURM runs a copy of this file from a folder of its own; the job knows where the original is.
here=$(dirname -- "${BASH_SOURCE[0]}")
if [[ ${BASH_SOURCE[0]##*/} == slurm_script && -n ${SLURM_JOB_ID:-} ]]; then
    original=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p')
    here=$(dirname -- "${original%%launch_slurm.sh*}launch_slurm.sh")
    [[ -f $here/launch_slurm.sh ]] || here=$SLURM_SUBMIT_DIR
fi
here=$(cd -- "$here" && pwd)
venv_python=$here/.venv/bin/python
dry_run=${DRY_RUN:-0}
job=${SLURM_JOB_ID:-0}

# Notes go to stderr, so that stdout holds the commands and then what the training prints.
note() { printf 'launch: %s\n' "$*" >&2; }
die() { note "$@"; exit 1; }
usage_error() { note "$@"; exit 2; }
show() { local line; printf -v line '%q ' "$@"; printf '%s\n' "${line% }"; }

# ----------------------------------------------------------------------------------------------------
# 1. Script: which one, and with what arguments

if [[ $# == 1 && ($1 == -h || $1 == --help) ]]; then
    sed -n '2,/^set /{s/^#SBATCH/    &/p;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 0
fi

script=$here/train_llm.py
if [[ ${1:-} == *.py ]]; then
    # A name that is no file here is looked up beside the launcher, so that it works from any folder.
    script=$1
    [[ -f $script ]] || script=$here/$1
    shift
elif [[ $# == 0 && -z ${HF_MODEL:-}${USE_HF_MODEL:-} ]]; then
    set -- --config "$here/configs/train_llm/quickstart.yaml"
fi
[[ -f $script ]] || usage_error "there is no script $script"

given=" " # the arguments without "=value"
for arg in "$@"; do
    flag=${arg%%=*}
    given+="$flag "
    case $flag in
        -[AcCGJNnpqtwx] | -[cGNnt][0-9]* | --account | --array | --constraint | --cpus-per-task | \
            --exclusive | --gpus | --gpus-per-node | --gres | --job-name | --mem | --nodelist | --nodes | \
            --ntasks | --ntasks-per-node | --partition | --qos | --time)
            # A script may have a flag of that name.
            grep -q "[\"']${flag}[\"']" "$script" || usage_error "$flag is an option of sbatch: put it" \
                "before the launcher's name, as in 'sbatch $flag ... launch_slurm.sh ARGS'" ;;
    esac
done

# In front of the arguments, the last of two equal flags being the one that counts.
variables=()
if [[ $given != *" --from-scratch "* && $given != *" --hf-model "* ]]; then
    case ${USE_HF_MODEL:-} in
        true) variables+=(--hf-model "${HF_MODEL:?USE_HF_MODEL=true needs HF_MODEL, a name or folder}") ;;
        false) [[ $given == *" --config "* ]] || variables+=(--from-scratch) ;;
        "") [[ -z ${HF_MODEL:-} ]] || variables+=(--hf-model "$HF_MODEL") ;;
        *) usage_error "USE_HF_MODEL is true or false, not '$USE_HF_MODEL'" ;;
    esac
fi
[[ -z ${BATCH_SIZE:-} ]] || variables+=(--batch-size "$BATCH_SIZE")
[[ -z ${GRAD_ACCUM_STEPS:-} ]] || variables+=(--grad-accum-steps "$GRAD_ACCUM_STEPS")
set -- ${variables[@]+"${variables[@]}"} "$@"

# Checked, because bash executes commands that stand in what it calculates with.
for name in MAX_RESTARTS SLURM_JOB_ID SLURM_RESTART_COUNT SLURM_NNODES SLURM_GPUS_ON_NODE \
    SLURM_NTASKS_PER_NODE SLURM_CPUS_PER_TASK SLURM_CPUS_ON_NODE; do
    [[ ${!name:-0} =~ ^(0|[1-9][0-9]{0,8})$ ]] || usage_error "$name is a number, not '${!name}'"
done
[[ ${SLURM_JOB_CPUS_PER_NODE:-1} =~ ^([1-9][0-9]{0,8}(\(x[0-9]+\))?(,|$))+$ ]] ||
    usage_error "SLURM_JOB_CPUS_PER_NODE is a list such as 16(x2),8, not '$SLURM_JOB_CPUS_PER_NODE'"

# ----------------------------------------------------------------------------------------------------
# 2. Python

if [[ -n ${PYTHON:-} ]]; then
    python=$PYTHON
elif [[ -x $venv_python ]]; then
    python=$venv_python
else
    python=python3
fi
command -v "$python" >/dev/null || die "no $python here; name an interpreter with PYTHON=/path/to/python3"
[[ $dry_run == 1 ]] ||
    "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' ||
    die "$python has no torch; './launch_single_node.sh --nproc 1 --help' installs it into .venv," \
        "or name another interpreter with PYTHON=/path/to/python3"

# The quickstart's data is made here, of the sources of that Python's library.
if [[ " $* " == *"/configs/train_llm/quickstart.yaml "* && $dry_run != 1 ]]; then
    "$python" "$here/tools/make_stdlib_data.py" >&2 || die "could not make the quickstart's data"
fi

# ----------------------------------------------------------------------------------------------------
# 3. Processes: how many, on what

if [[ $job == 0 ]]; then
    [[ $dry_run == 1 ]] || usage_error "not in a SLURM job: start this with 'sbatch launch_slurm.sh ...'," \
        "or see what it would run with 'DRY_RUN=1 bash launch_slurm.sh ...'"
    note "not in a SLURM job: shown for SLURM_NNODES=${SLURM_NNODES:-2}" \
        "SLURM_GPUS_ON_NODE=${SLURM_GPUS_ON_NODE:-0}"
fi
num_nodes=${SLURM_NNODES:-2}
num_gpus=${SLURM_GPUS_ON_NODE:-0}
ntasks=${SLURM_NTASKS_PER_NODE:-1}
[[ $num_gpus == 0 ]] || ntasks=$num_gpus
[[ $ntasks != 0 ]] || usage_error "SLURM_NTASKS_PER_NODE must be above 0"

# Where nodes differ, as many as the smallest has: 16(x2),8 means 16, 16 and 8.
IFS=, read -ra counts <<<"${SLURM_JOB_CPUS_PER_NODE:-${SLURM_CPUS_ON_NODE:-$ntasks}}"
cpus_on_node=${counts[0]%%(*}
for count in "${counts[@]%%(*}"; do
    [[ $count -ge $cpus_on_node ]] || cpus_on_node=$count
done
cpus_per_task=${SLURM_CPUS_PER_TASK:-$((cpus_on_node / ntasks))}
[[ $cpus_per_task -gt 0 ]] || die "$ntasks processes for $cpus_on_node CPUs a node: ask sbatch for more" \
    "with --cpus-per-task or --exclusive, or for fewer processes with --ntasks-per-node"

options=(
    # No shell or torchrun stands between a rank and its signals and exit code. When one ends with an error,
    # the others get SIGTERM at once, and SIGKILL after SLURM's KillWait, 30 s by default.
    --kill-on-bad-exit=1
    --nodes="$num_nodes" --ntasks="$((num_nodes * ntasks))" --ntasks-per-node="$ntasks"
    --distribution=block --cpus-per-task="$cpus_per_task"
)
# In words, because a step does not inherit GPUs that --exclusive brought in.
[[ $num_gpus == 0 ]] || options+=(--gres="gpu:$num_gpus")

# ----------------------------------------------------------------------------------------------------
# 4. Environment
#
# For NCCL nothing is set. When a run hangs at its first collective, start tools/doctor.py in place of the
# script; these help, too, and all pass through from the caller's environment:
#   NCCL_DEBUG=INFO            which transport each pair of GPUs uses, and what failed
#   NCCL_SOCKET_IFNAME=eth0    the network interface between the nodes, where the chosen one is no use
#   NCCL_IB_DISABLE=1          leave InfiniBand out, to tell whether it is at fault
#   GLOO_SOCKET_IFNAME=eth0    the same for gloo (tensors on the CPU), which without it takes the address of
#                              the host name: no use where that is 127.0.1.1, as Debian sets it up

# Whether other machines can reach this one as $1.
is_reachable_name() {
    local address
    address=$(getent ahosts "$1" 2>/dev/null | awk 'NR == 1 { print $1 }') || return 1
    [[ -n $address && $address != 127.* && $address != ::1 ]]
}

# The first node by its name. Where that is not in DNS, or a loopback address, by what SLURM calls it itself,
# else by an address of this machine, which is the first node.
find_head() {
    local name candidate
    name=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    for candidate in "$name" "$(scontrol show node "$name" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')" \
        $(hostname -I 2>/dev/null); do
        if is_reachable_name "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "no address of $name by which other nodes would reach it: name one with MASTER_ADDR"
}

# Above the ports of services, below those that the kernel gives to outgoing connections. A new one for each
# start, and not one where something listens: what a killed process left behind may still answer there.
find_port() {
    local port=$((20000 + (job * 16 + $1) % 12000))
    while (: >"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
        port=$((port + 1))
    done
    echo "$port"
}

head=${MASTER_ADDR:-127.0.0.1}
[[ -n ${MASTER_ADDR:-} || $num_nodes == 1 || $job == 0 ]] || head=$(find_head)
fixed_port=${MASTER_PORT:-}
attempt=${SLURM_RESTART_COUNT:-0}
log_dir=${LOG_DIR:-logs}/$job/attempt_$attempt
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    export OMP_NUM_THREADS=1
    [[ $num_gpus != 0 ]] || OMP_NUM_THREADS=$cpus_per_task
fi
export MASTER_ADDR=$head WORLD_SIZE=$((num_nodes * ntasks)) LOCAL_WORLD_SIZE=$ntasks

# ----------------------------------------------------------------------------------------------------
# 5. Command
#
# Each task gets the variables that torchrun would set, so that whatever runs under torchrun runs here. The
# first to fail leaves its exit code in FIRST_EXIT: srun returns the highest one, which mostly belongs to
# those that it ended for that. The shell does not end by a signal that is meant for the training.

# shellcheck disable=SC2016  # the variables are those of the task
as_rank='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID GROUP_RANK=$SLURM_NODEID
trap : TERM INT USR1
"$@" || { code=$?; (set -C; echo "$code $RANK" >"$FIRST_EXIT") 2>/dev/null; exit $code; }'

starts=0
prepare_step() {
    export MASTER_PORT=${fixed_port:-$(find_port $((attempt + starts)))}
    export FIRST_EXIT=$log_dir/first_exit.$starts
    command=(srun "${options[@]}" --output="$log_dir/rank_%t.log" --open-mode=append
        bash -c "$as_rank" rank "$python" -u "$script" "$@")
    show MASTER_ADDR="$MASTER_ADDR" MASTER_PORT="$MASTER_PORT" WORLD_SIZE="$WORLD_SIZE" \
        LOCAL_WORLD_SIZE="$LOCAL_WORLD_SIZE" OMP_NUM_THREADS="$OMP_NUM_THREADS" FIRST_EXIT="$FIRST_EXIT" \
        "${command[@]}"
    starts=$((starts + 1))
}

if [[ $dry_run == 1 ]]; then
    prepare_step "$@"
    exec "$python" -B "$here/tools/check_flags.py" "$script" "$@"
fi

# ----------------------------------------------------------------------------------------------------
# 6. Run: start the step, pass signals on, then decide by how it ended

asked=""      # the signal that asked this shell to stop
give_up_at="" # when the job is requeued, saved or not: shortly before its time limit
step=""       # the process id of srun, and since when it runs
step_since=0
now() { date +%s; }
job_state() { squeue --noheader --job "$job" --format=%T 2>/dev/null || true; }

# By scancel, which reaches the job's steps and not this shell. A SIGTERM to srun itself would make it kill
# all tasks.
signal_step() { scancel --signal="$asked" "$job" 2>/dev/null || true; }

pass_on() {
    local end
    asked=$1
    note "SIG$asked: the training saves and ends"
    signal_step
    if [[ $asked == USR1 ]] && end=$(squeue --noheader --job "$job" --format=%e) &&
        end=$(date -d "$end" +%s 2>/dev/null); then
        give_up_at=$((end - 15))
    fi
}

# Ends this shell. SLURM then starts the job from the top, with the next number in SLURM_RESTART_COUNT.
requeue() {
    local state
    state=$(job_state) # not RUNNING: its user has cancelled it, or SLURM itself requeues it
    [[ $state == RUNNING ]] ||
        { note "$1; the job is ${state:-gone}, so nothing is requeued here"; exit "$code"; }
    note "$1: the job is requeued and goes on from the last checkpoint, in 2 minutes at the earliest"
    scontrol requeue "$job" ||
        { note "SLURM has refused that: submit the same line again to go on"; exit "$code"; }
    trap 'exit "$code"' TERM
    sleep 300 &
    wait $! || true
    exit "$code"
}

# What the failed rank printed last: the reason, for whoever reads only this file.
show_reason() {
    local log=$log_dir/rank_${rank:-0}.log
    [[ ! -s $log ]] || tail -n 5 "$log" >&2
    note "the training ended with exit code $code${rank:+, rank $rank first}; all of it: $log_dir"
}

# Sets code, and rank where one failed first.
wait_for_step() {
    local sleeper
    while kill -0 "$step" 2>/dev/null; do
        if [[ -z $asked ]]; then
            wait "$step" || true
            continue
        fi
        # Ranks that were only being started may have missed it.
        [[ $(now) -ge $((step_since + 60)) ]] || signal_step
        if [[ -n $give_up_at && $(now) -ge $give_up_at ]]; then
            code=1
            requeue "the time limit is here before the training has saved"
        fi
        sleep 3 &
        sleeper=$!
        wait -n "$step" "$sleeper" || true
        kill "$sleeper" 2>/dev/null || true
    done
    wait "$step" && code=0 || code=$?
    rank=""
    [[ ! -s $FIRST_EXIT ]] || read -r code rank <"$FIRST_EXIT"
}

trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM
mkdir -p "$log_dir"
note "the training prints into $log_dir/rank_0.log, the other processes beside it"

while true; do
    prepare_step "$@"
    "${command[@]}" &
    step=$!
    step_since=$(now)
    wait_for_step
    case $code in
        0) note "finished"; exit 0 ;;
        138 | 143) requeue "stopped (exit code $code)" ;;
        3 | 130) note "stopped (exit code $code); the same line goes on from there"; exit "$code" ;;
    esac
    show_reason
    [[ $code -gt 128 ]] || exit "$code"
    [[ -z $asked ]] || requeue "it was asked to stop"
    state=$(job_state)
    [[ $state == RUNNING ]] || { note "the job is ${state:-gone}"; exit "$code"; }
    if [[ $starts -gt ${MAX_RESTARTS:-3} ]]; then
        note "started $starts times in this job, no more (MAX_RESTARTS)"
        exit "$code"
    fi
    note "a process was killed: all start again from the last checkpoint"
done
