#!/usr/bin/env bash
# GRPO on GSM8K with vLLM beside it: starts a vLLM server on this machine's first GPU, waits until it answers,
# trains on the other GPUs with train_gsm8k_fsdp2.py, and stops the server however the training ends. Without
# a GPU both run on the CPU (with a build of vLLM for CPUs).
#
# Usage:
#   examples/run_gsm8k.sh                          configs/train_gsm8k_fsdp2/qwen2.5_7b.yaml, on 4 GPUs
#   examples/run_gsm8k.sh --config FILE ARGS...    the flags of train_gsm8k_fsdp2.py
#   examples/run_gsm8k.sh --help                   this text
#
# Environment:
#   VLLM_PYTHON=FOLDER/bin/python   the Python that has vLLM; default: the one that trains
#   VLLM_GPUS=0,1              the server's GPUs, named as in CUDA_VISIBLE_DEVICES, tensor parallel over them;
#                              default: the first one. The rest of CUDA_VISIBLE_DEVICES, or of all, trains
#   VLLM_PORT=8001             the server's port; default: the flag --vllm-port, which is 8000
#   VLLM_DTYPE=float16         what the server computes in; default bfloat16, on the CPU float32
#   VLLM_ARGS="--max-num-seqs 64 --gpu-memory-utilization 0.8"    further flags of the server
#   VLLM_WAIT=1800             seconds until the server must answer, a download of the model included
#   PYTHON, NPROC, OMP_NUM_THREADS   of the training, as launch_single_node.sh says
#   DRY_RUN=1                  print both commands and stop
#
# The exit code is the training's. SIGTERM, SIGINT and SIGUSR1 go to the training, which finishes its step and
# saves; then the server ends. Its output is in RUN/vllm.log. It listens on 127.0.0.1 only: whoever reaches
# its port can replace its weights.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
script=train_gsm8k_fsdp2.py
trainer=""
server=""
signalled=0

note() { printf 'run_gsm8k: %s\n' "$*" >&2; }
die() { note "$@"; exit 1; }
usage_error() { note "$@"; exit 2; }
show() { local line; printf -v line '%q ' "$@"; printf '%s\n' "${line% }"; }

if [[ $# == 1 && ($1 == -h || $1 == --help) ]]; then
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    printf '\nThe flags: ./launch_single_node.sh %s --help\n' "$script"
    exit 0
fi
[[ $# -gt 0 ]] || set -- --config "$here/configs/train_gsm8k_fsdp2/qwen2.5_7b.yaml"

# ----------------------------------------------------------------------------------------------------
# 1. What is served: the flags, read by the training script itself

python=${VLLM_PYTHON:-${PYTHON:-}}
if [[ -z $python ]]; then
    python=python3
    [[ ! -x $here/.venv/bin/python ]] || python=$here/.venv/bin/python
fi
command -v "$python" >/dev/null || usage_error "no $python here: VLLM_PYTHON names the Python that has vLLM"
if [[ ${DRY_RUN:-0} != 1 ]] && ! "$python" -c 'from importlib.util import find_spec
raise SystemExit(find_spec("vllm") is None)'; then
    usage_error "$python has no vLLM: install it, best into an environment of its own ('python3 -m venv" \
        "vllm-env && vllm-env/bin/pip install vllm'), and set VLLM_PYTHON=vllm-env/bin/python"
fi

# A mistake in the flags is the script's own message here, before anything is started; its exit code is 2.
settings=$(PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1 "$python" -c '
import sys
import train_gsm8k_fsdp2
args = train_gsm8k_fsdp2.parse_args(sys.argv[1:])
print(args.model, args.checkpoint_dir, args.vllm_port, args.max_prompt_tokens + args.max_new_tokens,
      int(args.trust_remote_code), args.device, args.gpu_ranks or "", sep="\n")
' --rollouts vllm "$@") || exit
{ read -r model; read -r run_dir; read -r port; read -r max_model_len; read -r remote_code; read -r device
  read -r gpu_ranks || true; } <<<"$settings"
port=${VLLM_PORT:-$port}
[[ $port =~ ^[1-9][0-9]*$ ]] || usage_error "VLLM_PORT is a port, not '$port'"

# ----------------------------------------------------------------------------------------------------
# 2. Who gets which GPU

visible=()
if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    [[ $CUDA_VISIBLE_DEVICES == -1 ]] || IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
elif command -v nvidia-smi >/dev/null; then
    num_gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || num_gpus=0
    for ((gpu = 0; gpu < num_gpus; gpu++)); do visible+=("$gpu"); done
fi

environment=(VLLM_SERVER_DEV_MODE=1 VLLM_NO_USAGE_STATS=1 "PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}")
place=()
training=()
if [[ ${#visible[@]} == 0 ]]; then
    [[ -z ${VLLM_GPUS:-} ]] || usage_error "VLLM_GPUS=$VLLM_GPUS: this machine shows no GPU"
    num_cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)))')
    # Half of the cores, and wherever the system likes: the training's processes want the same ones.
    environment+=(VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_OMP_THREADS_BIND=nobind
        "OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((num_cores > 3 ? num_cores / 2 : 1))}")
    place+=(--dtype "${VLLM_DTYPE:-float32}" --enforce-eager --kv-cache-memory-bytes 512M)
else
    gpus=()
    IFS=, read -ra gpus <<<"${VLLM_GPUS:-${visible[0]}}"
    rest=,$(IFS=,; echo "${visible[*]}"),
    for gpu in "${gpus[@]}"; do
        [[ $rest == *,"$gpu",* ]] || usage_error "VLLM_GPUS=$VLLM_GPUS: the GPUs here are ${visible[*]}"
        rest=${rest/,$gpu,/,}
    done
    rest=${rest#,}
    rest=${rest%,}
    [[ -n $rest || $device == cpu ]] || usage_error "vLLM takes ${gpus[*]}, and no GPU is left to train on:" \
        "on one GPU start $script with --rollouts local"
    [[ -z $gpu_ranks ]] || usage_error "--gpu-ranks does not know of the server's GPU:" \
        "set CUDA_VISIBLE_DEVICES for both, and VLLM_GPUS"
    environment+=("CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${gpus[*]}")")
    training+=("CUDA_VISIBLE_DEVICES=$rest")
    place+=(--dtype "${VLLM_DTYPE:-bfloat16}" --tensor-parallel-size "${#gpus[@]}")
fi

# ----------------------------------------------------------------------------------------------------
# 3. The two commands

extra=()
[[ $remote_code == 0 ]] || extra+=(--trust-remote-code)
more=()
read -ra more <<<"${VLLM_ARGS:-}"
# Not `vllm serve`: builds for CPUs, which carry another name, lack it.
serve=(env "${environment[@]}" "$python" -m vllm.entrypoints.openai.api_server --model "$model"
    --host 127.0.0.1 --port "$port" "${place[@]}" --max-model-len "$max_model_len"
    --logprobs-mode processed_logprobs --worker-extension-cls train_gsm8k_fsdp2.WeightReceiver
    ${extra[@]+"${extra[@]}"} ${more[@]+"${more[@]}"})
train=(env ${training[@]+"${training[@]}"} "$here/launch_single_node.sh" "$here/$script" "$@"
    --rollouts vllm --vllm-host 127.0.0.1 --vllm-port "$port")
show "${serve[@]}"
show "${train[@]}"
[[ ${DRY_RUN:-0} != 1 ]] || exit 0

# ----------------------------------------------------------------------------------------------------
# 4. The server, and its end

open_port() { exec 3<>"/dev/tcp/127.0.0.1/$port"; }

# In a subshell, so that the connection is closed with it.
is_healthy() (
    open_port 2>/dev/null || exit 1
    printf 'GET /health HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n' >&3
    read -r -t 5 answer <&3 && [[ $answer == *" 200 "* ]]
)

is_running() { kill -0 "$1" 2>/dev/null; }

show_log() {
    note "the end of $log:"
    tail -n 25 "$log" >&2
}

# The whole process group: vLLM's engine and workers are processes of their own.
# shellcheck disable=SC2317  # called by a trap
stop_server() {
    trap '' TERM INT USR1 HUP  # this must not be left half done
    [[ -n $server ]] || return 0
    kill -TERM "$server" 2>/dev/null || true
    for ((i = 0; i < 300; i++)); do
        is_running "-$server" || break
        sleep 0.1
    done
    ! is_running "-$server" || kill -KILL -- "-$server" 2>/dev/null || true
    server=""
}

# shellcheck disable=SC2317  # called by a trap
on_signal() {
    signalled=1
    if [[ -n $trainer ]]; then
        # To the one process: it passes the signal on to its ranks itself, and two would end them at once.
        kill "-$1" "$trainer" 2>/dev/null || true
    else
        exit $((128 + $(kill -l "$1")))
    fi
}

! (open_port) 2>/dev/null || die "port $port is taken, perhaps by another vLLM: set VLLM_PORT to a free one"
mkdir -p -- "$run_dir"
log=$run_dir/vllm.log
trap stop_server EXIT
for name in TERM INT USR1 HUP; do
    # shellcheck disable=SC2064  # the name as it is now
    trap "on_signal $name" "$name"
done

# Process groups of their own, or Ctrl-C would reach the server while the training still needs it.
set -m
"${serve[@]}" </dev/null >>"$log" 2>&1 &
server=$!
disown "$server"
note "starting vLLM (log: $log)"
SECONDS=0
until is_healthy; do
    if ! is_running "$server"; then
        show_log
        server=""
        die "vLLM did not start; above stands why"
    fi
    if [[ $SECONDS -gt ${VLLM_WAIT:-1800} ]]; then
        show_log
        die "vLLM did not answer within ${VLLM_WAIT:-1800} s (VLLM_WAIT); above stands how far it came"
    fi
    sleep 0.5
done
note "vLLM answers on port $port after $SECONDS s"

# ----------------------------------------------------------------------------------------------------
# 5. The training

"${train[@]}" </dev/null &
trainer=$!
code=0
while :; do
    # A signal that is passed on interrupts `wait`, which then has nothing to say about the training.
    signalled=0
    wait "$trainer" && code=0 || code=$?
    [[ $signalled == 1 ]] || break
done
is_running "$server" || { show_log; note "vLLM ended before the training did; above stands why"; }
exit "$code"
