#!/usr/bin/env bash
# Trains on several machines without a scheduler: started on each of them, one process per GPU, or two on the
# CPU where there is no GPU. The machines need the same script, arguments and data, and one checkpoint folder.
#
# Usage:
#   NODE_RANK=0 NNODES=2 ./launch_multi_node.sh ARGS...     on machine 0; it prints the line for the others
#   NODE_RANK=1 NNODES=2 MASTER_ADDR=10.0.0.1 ./launch_multi_node.sh ARGS...               on machine 1
#   NNODES=1:4 MASTER_ADDR=10.0.0.1 MAX_RESTARTS=3 ./launch_multi_node.sh ARGS...          elastic, on each
#   ... ./launch_multi_node.sh SCRIPT.py ARGS...            another script that runs under torchrun
#   ./launch_multi_node.sh --help                           this text
#
# With NODE_RANK the rendezvous is static: so many machines, each with its number. With MASTER_ADDR alone it
# is elastic (torchrun's c10d): machines come in any order, and within NNODES=MIN:MAX they may also come and
# go; each change starts all processes again, from the last checkpoint.
#
# Environment:
#   NODE_RANK=0                number of this machine, from 0
#   NNODES=2                   number of machines, 2 if not given; elastic: also MIN:MAX
#   MASTER_ADDR=10.0.0.1       machine 0 as the others reach it: no 127.x, and no name that means 127.x there
#   MASTER_PORT=29500          a port of machine 0 that is free and open to the others
#   NPROC_PER_NODE=8           processes on this machine, instead of one per GPU
#   MAX_RESTARTS=3             elastic: how often all processes start again after one died; default 0
#   SHUTDOWN_TIMEOUT=600       seconds to save in after a signal (torch 2.13; earlier ones give 30 s)
#   RDZV_TIMEOUT=1800          seconds to wait for the other machines
#   RDZV_ID=train              elastic: name of the run, where several share a MASTER_ADDR and MASTER_PORT
#   LOCAL_ADDR=10.0.0.2        elastic: this machine as others reach it; default: on the way to MASTER_ADDR
#   IS_HOST=1                  elastic: whether this is MASTER_ADDR; default: by this machine's own addresses
#   CUDA_VISIBLE_DEVICES=0,3   the GPUs to use; set but empty: none
#   PYTHON=python3.12          interpreter; default: .venv/bin/python beside this file, else python3
#   OMP_NUM_THREADS=4          CPU threads of each process; default: the cores are divided among them
#   DRY_RUN=1                  print the command, check the script's flags and stop
#
# SIGTERM, SIGINT, SIGHUP and SIGUSR1 to the launcher go to its processes, which save and end; SIGQUIT ends
# them unsaved. The ranks of the training scripts here agree on it, so that a signal to one machine is enough.
# The exit code is torchrun's: 0, or 1.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
venv_python=$here/.venv/bin/python
dry_run=${DRY_RUN:-0}

# Notes go to stderr, so that stdout holds the commands and then what the training prints.
note() { printf 'launch: %s\n' "$*" >&2; }
die() { note "$@"; exit 1; }
usage_error() { note "$@"; exit 2; }
show() { local line; printf -v line '%q ' "$@"; printf '%s\n' "${line% }"; }

# ----------------------------------------------------------------------------------------------------
# 1. Script: which one, and with what arguments

if [[ $# == 1 && ($1 == -h || $1 == --help) ]]; then
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi

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
    die "$python has no torch; 'NPROC=1 ./launch_single_node.sh' installs it into .venv and tries it out," \
        "or name another interpreter with PYTHON=/path/to/python3"
# Not the program nproc: where OMP_NUM_THREADS is set, that one prints it in place of the number of cores.
num_cores=$("$python" -c 'import os
print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')

# The quickstart's data is made here, of the sources of that Python's library.
if [[ " $* " == *"/configs/train_llm/quickstart.yaml "* && $dry_run != 1 ]]; then
    "$python" "$here/tools/make_stdlib_data.py" >&2 || die "could not make the quickstart's data"
fi

# ----------------------------------------------------------------------------------------------------
# 3. Processes: how many, on what

for name in NPROC_PER_NODE MASTER_PORT SHUTDOWN_TIMEOUT RDZV_TIMEOUT; do
    [[ ${!name:-1} =~ ^[1-9][0-9]*$ ]] || usage_error "$name is a number above 0, not '${!name}'"
done
[[ ${MAX_RESTARTS:-0} =~ ^[0-9]+$ ]] || usage_error "MAX_RESTARTS is a number, not '$MAX_RESTARTS'"
[[ ${IS_HOST:-1} == [01] ]] || usage_error "IS_HOST is 1 or 0, not '$IS_HOST'"

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

nproc=${NPROC_PER_NODE:-$num_gpus}
if [[ $nproc == 0 ]]; then
    nproc=$((num_cores > 1 ? 2 : 1))
    note "no GPU here: $nproc process(es) on the CPU"
fi

# ----------------------------------------------------------------------------------------------------
# 4. Rendezvous: which machine is number 0, and is it there

nnodes=${NNODES:-2}
port=${MASTER_PORT:-29500}
wait_s=${RDZV_TIMEOUT:-1800}
[[ -n ${NNODES:-} ]] || note "NNODES is not set: 2 machines"
[[ $nnodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ && ${nnodes%:*} -le ${nnodes#*:} ]] ||
    usage_error "NNODES is a number of machines, or MIN:MAX, not '$nnodes'"
[[ $port -lt 65536 ]] || usage_error "MASTER_PORT=$port: ports end at 65535"

if [[ -n ${NODE_RANK:-} ]]; then
    [[ $nnodes != *:* ]] || usage_error "NNODES=$nnodes is elastic: leave NODE_RANK out, or give one number"
    [[ $NODE_RANK =~ ^(0|[1-9][0-9]*)$ ]] || usage_error "NODE_RANK is a number from 0, not '$NODE_RANK'"
    [[ $NODE_RANK -lt $nnodes ]] ||
        usage_error "NODE_RANK=$NODE_RANK: with NNODES=$nnodes the machines are numbered 0 to $((nnodes - 1))"
    is_host=$((NODE_RANK == 0))
    # torch 2.11 and 2.13 keep one store over a restart, where the new processes find the old ones' addresses.
    [[ ${MAX_RESTARTS:-0} == 0 ]] ||
        usage_error "MAX_RESTARTS needs the elastic rendezvous: leave NODE_RANK out"
    [[ -n ${MASTER_ADDR:-} || $is_host == 1 ]] ||
        usage_error "NODE_RANK=$NODE_RANK needs MASTER_ADDR: the address of the machine with NODE_RANK=0"
else
    [[ -n ${MASTER_ADDR:-} ]] || usage_error "give this machine its number with NODE_RANK=0, 1, ..." \
        "and the address of machine 0 with MASTER_ADDR; see --help"
    is_host=${IS_HOST:-auto}
fi

# Says in a line what is wrong with the rendezvous, or prints: MASTER_ADDR, whether this machine is it, this
# machine's own address, and the interface that gloo needs to be told, "-" where it finds that by itself.
look_at_rendezvous() {
    "$python" - "${MASTER_ADDR:-}" "$port" "${nnodes#*:}" "$is_host" "${LOCAL_ADDR:-}" <<'EOF'
import fcntl, ipaddress, socket, struct, sys

master, port, max_nodes, is_host, local = sys.argv[1:]

def interfaces():
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:  # SIOCGIFADDR
                answer = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))
            except OSError:
                continue  # an interface without an IPv4 address
            found.setdefault(socket.inet_ntoa(answer[20:24]), name)
    return found

def resolve(host):
    return socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0][::4]

def is_loopback(address):
    return ipaddress.ip_address(address.split("%")[0]).is_loopback

def own_address_towards(family, target):
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # nothing is sent
        probe.connect(target)
        return probe.getsockname()[0]

def can_bind(family, address):
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError:
            return False
        return True

own = {address: name for address, name in interfaces().items() if not is_loopback(address)}
if not master:
    try:
        master = own_address_towards(socket.AF_INET, ("192.0.2.1", 9))
    except OSError:
        master = next(iter(own), "127.0.0.1")
try:
    family, target = resolve(master)
except OSError as error:
    sys.exit(f"MASTER_ADDR={master} does not resolve on this machine ({error.strerror}): correct it, or give "
             "an address that 'hostname -I' prints on machine 0")
if int(max_nodes) > 1 and is_loopback(target[0]):
    such_as = f", such as {next(iter(own))}" if own and is_host == "1" else ""
    sys.exit(f"MASTER_ADDR={master} is {target[0]}, which on each machine means that machine: give an "
             f"address of machine 0 by which the others reach it{such_as}")
is_own = can_bind(family, (target[0], 0))
if is_host == "auto":
    is_host = str(int(is_own))
if is_host == "1":
    if not is_own:
        print(f"launch: MASTER_ADDR={master} is no address of this machine, which is machine 0: right only "
              "where something forwards it", file=sys.stderr)
    if not can_bind(family, ("", int(port))):
        sys.exit(f"port {port} is taken on this machine, by another run or another program: end that one, or "
                 "give all machines another MASTER_PORT")
try:
    local = local or own_address_towards(family, target)
except OSError as error:
    sys.exit(f"there is no way from this machine to MASTER_ADDR={master} ({error.strerror})")
interface = own.get(local, "-")
try:
    if not is_loopback(resolve(socket.gethostname())[1][0]):
        interface = "-"
except OSError:
    pass  # a host name that does not resolve is no use to gloo either
print(master, is_host, local, interface)
EOF
}

# A connection that is closed again at once does nothing to the store that listens there.
answers() {
    "$python" -c 'import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).close()' \
        "$head" "$port" 2>/dev/null
}

wait_for_head() {
    local begin=$SECONDS
    ! answers || return 0
    note "waiting for machine 0: nothing answers at $head port $port yet (for up to $wait_s s, RDZV_TIMEOUT)"
    until answers; do
        [[ $((SECONDS - begin)) -lt $wait_s ]] || die "nothing has answered at $head port $port in" \
            "$wait_s s: is the launcher running there, with the same MASTER_PORT, and does a firewall let" \
            "this machine through?"
        sleep 1
    done
}

found=$(look_at_rendezvous 2>&1) || die "$found"
[[ $found != *$'\n'* ]] || printf '%s\n' "${found%$'\n'*}" >&2
read -r head is_host local_addr interface <<<"${found##*$'\n'}"

# ----------------------------------------------------------------------------------------------------
# 5. Environment
#
# For NCCL nothing is set. When a run hangs at its first collective, start tools/doctor.py in place of the
# script; these help, too, and all pass through from the caller's environment:
#   NCCL_DEBUG=INFO            which transport each pair of GPUs uses, and what failed
#   NCCL_SOCKET_IFNAME=eth0    the network interface between the machines, where the chosen one is no use
#   NCCL_IB_DISABLE=1          leave InfiniBand out, to tell whether it is at fault
#   GLOO_SOCKET_IFNAME=eth0    the same for gloo (tensors on the CPU); set below where it would go wrong

environment=()
# gloo tells the others the address of its host name, which Debian and containers set to 127.x.
if [[ -z ${GLOO_SOCKET_IFNAME:-} && $interface != - && $nnodes != 1 ]]; then
    environment+=("GLOO_SOCKET_IFNAME=$interface")
fi
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    threads=$((num_cores / nproc))
    # Processes on the CPU that each take every core slow one another down many times over.
    [[ $num_gpus == 0 && $threads -gt 0 ]] || threads=1
    environment+=("OMP_NUM_THREADS=$threads")
fi
# A variable, because torch 2.11 does not know the flag.
environment+=("TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SHUTDOWN_TIMEOUT:-600}")

# ----------------------------------------------------------------------------------------------------
# 6. Command

command=("$python" -m torch.distributed.run --nnodes "$nnodes" --nproc-per-node "$nproc"
    --max-restarts "${MAX_RESTARTS:-0}" --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
if [[ -n ${NODE_RANK:-} ]]; then
    command+=(--node-rank "$NODE_RANK" --master-addr "$head" --master-port "$port"
        --rdzv-conf "timeout=$wait_s")
else
    # Both said in words, because torchrun goes by host names, which machines made from one image share: each
    # would open a store of its own, or none, and rank 0 would call itself by a name that only it knows. And a
    # new store for each start of the processes, see above.
    environment+=(TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1)
    command+=(--rdzv-backend c10d --rdzv-endpoint "$head:$port" --rdzv-id "${RDZV_ID:-train}"
        --local-addr "$local_addr" --rdzv-conf "is_host=$is_host,join_timeout=$wait_s")
fi
command+=("$script" "$@")
show "${environment[@]}" "${command[@]}"

if [[ $nnodes != 1 && ${NODE_RANK:-} == 0 ]]; then
    launcher=$(dirname -- "$0")/launch_multi_node.sh
    others=(NODE_RANK=1 "NNODES=$nnodes" "MASTER_ADDR=$head" "MASTER_PORT=$port" "$launcher")
    note "on the others, with their number as NODE_RANK: $(show "${others[@]}" "${script#"$here/"}" "$@")"
fi
[[ $dry_run != 1 ]] || exec "$python" -B "$here/tools/check_flags.py" "$script" "$@"
[[ $is_host == 1 ]] || wait_for_head
exec env "${environment[@]}" "${command[@]}"
