#!/usr/bin/env bash
# Reinforcement learning from nothing, on two CPU cores: makes word problems in GSM8K's format, lets a small
# model learn from the answers of a careless teacher by SFT (train_llm.py), lets it find out by GRPO which of
# its own answers are right (train_gsm8k_fsdp2.py), and draws its accuracy on problems that it never saw. No
# GPU, no download of data or models. Started again, it leaves out what is finished and goes on from there.
#
# Usage:
#   bash examples/quickstart_gsm8k.sh [ARGS...]           the training processes generate themselves
#   bash examples/quickstart_gsm8k.sh --vllm [ARGS...]    a vLLM server does, started by examples/run_gsm8k.sh
#   bash examples/quickstart_gsm8k.sh --help              this text
# ARGS are flags of train_gsm8k_fsdp2.py, such as --train-steps 200, --async-depth 1 or --loss dapo.
#
# Environment:
#   SEED=1        other problems, weights and samples; default 0
#   RUN=FOLDER    the folder of all that; default runs/quickstart_gsm8k, for another seed ..._seedN
#   SFT_ARGS="--max-steps 500"    further flags of train_llm.py
#   PYTHON                        as launch_single_node.sh says
#   VLLM_PYTHON, VLLM_PORT        with --vllm, as examples/run_gsm8k.sh says
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
launch=$here/launch_single_node.sh
seed=${SEED:-0}
run=${RUN:-runs/quickstart_gsm8k}
[[ -n ${RUN:-} || $seed == 0 ]] || run+=_seed$seed
sft_args=()
read -ra sft_args <<<"${SFT_ARGS:-}"

stage() { printf '\nquickstart: stage %s\n' "$*" >&2; }
usage_error() { printf 'quickstart: %s\n' "$*" >&2; exit 2; }

if [[ $# == 1 && ($1 == -h || $1 == --help) ]]; then
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi
[[ $seed =~ ^[0-9]+$ ]] || usage_error "SEED is a number, not '$seed'"

start_grpo=("$launch" "$here/train_gsm8k_fsdp2.py")
grpo=$run/grpo
args=()
for arg in "$@"; do
    case $arg in
        --vllm) start_grpo=("$here/examples/run_gsm8k.sh"); grpo=$run/grpo_vllm ;;
        --checkpoint-dir | --checkpoint-dir=*) usage_error "$arg: the variable RUN names the folder here" ;;
        *) args+=("$arg") ;;
    esac
done

problems=$run/problems
if [[ -f $problems/tokenizer/tokenizer.json ]]; then  # what the program writes last
    stage "1 of 4: $problems has the word problems"
else
    stage "1 of 4: word problems and a tokenizer (five minutes for all stages on two idle cores)"
    NPROC=1 "$launch" "$here/tools/make_word_problems.py" "$problems" --seed "$seed"
fi

stage "2 of 4: SFT, the model learns what the careless teacher says (three minutes)"
"$launch" --config "$here/configs/train_llm/sft_word_problems.yaml" --dataset "$problems/sft.jsonl" \
    --tokenizer "$problems/tokenizer" --seed "$seed" --checkpoint-dir "$run/sft" \
    ${sft_args[@]+"${sft_args[@]}"}

stage "3 of 4: GRPO, the model learns which of its own answers are right (two minutes)"
"${start_grpo[@]}" --config "$here/configs/train_gsm8k_fsdp2/quickstart.yaml" --model "$run/sft/hf" \
    --dataset "$problems" --seed "$seed" --checkpoint-dir "$grpo" ${args[@]+"${args[@]}"}

stage "4 of 4: accuracy against steps"
venv_python=$here/.venv/bin/python
python=${PYTHON:-python3}
[[ -n ${PYTHON:-} || ! -x $venv_python ]] || python=$venv_python
if [[ $python == "$venv_python" ]] && ! "$python" -c 'import matplotlib' 2>/dev/null; then
    "$python" -m pip install --quiet matplotlib >&2
fi
"$python" - "$grpo/metrics.jsonl" <<'PYTHON_END'
import json, sys
for row in map(json.loads, open(sys.argv[1])):
    if "eval/accuracy" in row:
        print(f"step {row['step']:>4}  accuracy {row['eval/accuracy']:.3f}")
PYTHON_END
"$python" "$here/tools/plot_metrics.py" "$grpo" --keys eval/accuracy --out "$grpo/accuracy.png" \
    --title "Held-out word problems, greedy"
stage "4 of 4 is done. Next: examples/run_gsm8k.sh, a real model on GSM8K, see docs/reinforcement_learning.md"
