"""Train on another machine over ssh: copy this project, start a run that outlives the connection, follow it.

    python tools/deploy.py configs/train_llm/quickstart.yaml --ssh root@host:port
    python tools/deploy.py configs/train_llm/quickstart.yaml --ssh root@host:port -- --max-steps 50
    python tools/deploy.py --ssh me@box train_llm.py --hf-model MODEL --dataset my.jsonl --gpu-ranks 0,2
    python tools/deploy.py --ssh me@box --name quickstart --attach      # follow its log again
    python tools/deploy.py --ssh me@box --name quickstart --stop        # let it save, wait for its end
    python tools/deploy.py --ssh me@box --name quickstart --fetch       # metrics, log, export come home

configs/SCRIPT/x.yaml stands for SCRIPT.py --config configs/SCRIPT/x.yaml. Relative paths in a script's
arguments count from the project there. The same command again continues a run from its newest checkpoint.

Needed are ssh, rsync, git and Python here; ssh, rsync, bash, util-linux and Python 3.10 there, where
launch_single_node.sh installs packages into .venv (--env PYTHON=/path/to/python takes another interpreter).
Copied are the files that git tracks or would track, but no secret and no checkpoint; nothing is deleted.
Runs share the project's files; --remote-dir gives a run its own. A start logs in three times: use a key.

Ctrl-C after a start is passed on as SIGTERM: the run saves and ends. A second Ctrl-C only leaves, and so does
the first one with --attach or --stop. A lost connection or a closed terminal never stops a run.

Exit code: the run's own where its end was seen, else 0; 1 an error, which the last line explains; 2 wrong
arguments; 130 left with Ctrl-C, the run goes on; 255 ssh cannot connect or lost the connection.
"""

import argparse
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

TREE = Path(__file__).resolve().parent.parent

# Matched with every part of a path, in lower case. Where a letter follows `token`, it is a tokenizer's.
SECRETS = re.compile(
    r"\.env(\..*)?|.*\.env|\.envrc|.*\.(pem|key|p12|pfx|ppk|kdbx)|id_(rsa|dsa|ecdsa|ed25519).*|\.netrc"
    r"|\.git-credentials|credentials.*|.*(secret|password|passwd|api_?key|token(?![a-z])).*|\.pypirc|\.npmrc"
    r"|\.pgpass|\.ssh|\.aws|\.gnupg|\.kube|\.docker|\.azure|tokens\..*|service_account.*\.json")
# A checkpoint's folder and files, saved or half saved.
CHECKPOINT = re.compile(r"step_\d+(\.\w+)?|.*\.distcp")


def note(text: str) -> None:
    """To stderr, so that stdout holds the run's log alone."""
    print(f"deploy: {text}", file=sys.stderr, flush=True)


def fail(text: str, code: int = 1) -> NoReturn:
    note(text)
    sys.exit(code)


# ----------------------------------------------------------------------------------------------------
# 1. Arguments

def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deploy.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s --ssh [USER@]HOST[:PORT] [flags] (CONFIG.yaml [-- ARGUMENTS] | SCRIPT.py ARGUMENTS)")
    add = parser.add_argument
    add("target", nargs="?", metavar="SCRIPT.py | CONFIG.yaml", help="what to run")
    add("--ssh", metavar="[USER@]HOST[:PORT]", required=True, help="where; a host of ~/.ssh/config too")
    add("--ssh-option", metavar="TEXT", action="append", default=[], help="such as '-i KEYFILE'")
    add("--remote-dir", metavar="DIR", default=f"fsdp2/{TREE.name}", help="the project's folder there, "
        "default: %(default)s in the home folder")
    add("--name", help="of the run; default: the name of the config or script")
    add("--env", metavar="NAME[=VALUE]", action="append", default=[],
        help="set this for the run; without =VALUE: as it is set here. Never printed, never on a disk there")
    add("--copy", metavar="PATH", action="append", default=[], help="copy this too, though git ignores it")
    add("--detach", action="store_true", help="start and leave, do not follow the log")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--attach", action="store_true", help="follow a run's log; Ctrl-C leaves it running")
    mode.add_argument("--stop", action="store_true", help="SIGTERM: the run saves and ends; waits for that")
    mode.add_argument("--fetch", action="store_true", help="copy its results and log to runs/NAME@HOST")
    return parser


def split_words(argv: list[str]) -> tuple[list[str], list[str]]:
    """(deploy's own words with the script or config, the script's arguments)."""
    for i, word in enumerate(argv):
        if word == "--":
            return argv[:i], argv[i + 1:]
        is_value = i > 0 and argv[i - 1] in ("--remote-dir", "--name", "--env", "--copy")
        if word.endswith(".py") and not word.startswith("-") and not is_value:
            return argv[:i + 1], argv[i + 1:]
    return argv, []


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Adds `words`, the launcher's arguments, `run_dir`, `variables`, `login`, `bash`. Exits with 2."""
    parser = build_parser()
    own, script_args = split_words(argv)
    for word in own:
        if word.endswith("=--"):  # older versions of argparse raise ValueError here
            parser.error(f"{word}: a value is missing")
    args, unknown = parser.parse_known_args(own)
    if unknown:
        parser.error(f"{' '.join(unknown)}: flags of the script go behind its name, after a config behind --")
    args.remote_dir = args.remote_dir.removeprefix("~/")
    args.is_start = not (args.attach or args.stop or args.fetch)
    if not args.target and (args.is_start or script_args):
        parser.error("the config or script to run is missing")
    try:
        args.words = launcher_words(args.target, script_args) if args.target else []
        flags = script_flags(args.words)
        args.variables = dict(map(variable, args.env))
        args.login, args.ssh_command = ssh_command(args)
    except ValueError as error:
        parser.error(str(error))
    # Programs go in through stdin: whatever login shell there is, only bash reads them, so that every word
    # arrives as it was given, and no value of a variable shows up in a list of processes.
    args.bash = [*args.ssh_command, "-T", args.login, "bash -s"]
    args.run_dir = flags.checkpoint_dir or "checkpoints"
    if args.name is None and args.words:
        args.name = Path(flags.config or args.words[0]).stem
    if not re.fullmatch(r"\w[\w.@+-]*", args.name or "", re.ASCII):
        parser.error("give the run a --name of letters, digits and . _ @ + -")
    return args


def launcher_words(target: str, script_args: list[str]) -> list[str]:
    """Script and arguments, for launch_single_node.sh. Raises ValueError."""
    is_config = target.endswith((".yaml", ".yml", ".json"))
    if not is_config and not target.endswith(".py"):
        raise ValueError(f"{target} is neither a config (.yaml) nor a script (.py)")
    # From this folder or from the project's; in a copy of the project, the copy's own.
    places = Path(target).resolve(), (TREE / target).resolve()
    path = next((path for path in places if TREE in path.parents and path.is_file()), None)
    if path is None:
        raise ValueError(f"{target}: no such file in {TREE}, which gets copied")
    relative = path.relative_to(TREE).as_posix()
    if not is_config:
        return [relative, *script_args]
    script = f"{path.parent.name}.py"
    if not (TREE / script).is_file():
        raise ValueError(f"{target}: there is no {script}; name the script: SCRIPT.py --config {relative}")
    return [script, "--config", relative, *script_args]


def script_flags(words: list[str]) -> argparse.Namespace:
    """--config and --checkpoint-dir of the script, the latter from its config file where it stands there."""
    parser = argparse.ArgumentParser(prog="deploy.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--checkpoint-dir")
    flags, _ = parser.parse_known_args(words)
    if flags.checkpoint_dir is None and flags.config and (TREE / flags.config).is_file():
        # By a pattern, because this program must run where no package is installed.
        line = r"^[\"']?checkpoint[-_]dir[\"']?:[ \t]*(\"[^\"]*\"|'[^']*'|[^#\n]*)"
        found = re.search(line, (TREE / flags.config).read_text(), re.MULTILINE)
        flags.checkpoint_dir = found[1].strip().strip("\"'") if found else None
    return flags


def variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and name.isascii()) or not equals and name not in os.environ:
        raise ValueError(f"--env {text}: no variable that is set here; --env NAME=VALUE sets one")
    return name, value if equals else os.environ[name]


def ssh_command(args: argparse.Namespace) -> tuple[str, list[str]]:
    """(user@host, ssh with its options). Raises ValueError."""
    match = re.fullmatch(r"((?:[^\s-]\S*@)?[^\s:@-][^\s:@]*)(?::(\d+))?", args.ssh)
    if not match:
        raise ValueError(f"--ssh {args.ssh}: expected [USER@]HOST[:PORT] (IPv6: a name of ~/.ssh/config)")
    try:
        options = [word for option in args.ssh_option for word in shlex.split(option)]
    except ValueError as error:
        raise ValueError(f"--ssh-option {' '.join(args.ssh_option)}: {error}") from None
    # Four unanswered signs of life, after a minute, are a lost connection. The user's options come first,
    # because ssh takes the first value that it meets.
    kept = ["-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"]
    return match[1], ["ssh", *options, *(["-p", match[2]] if match[2] else []), *kept]


# ----------------------------------------------------------------------------------------------------
# 2. Programs that run there. .deploy/NAME holds a run's log, pid, exit_code after its end, a link `run` to
#    its run folder, and a lock, which the run's processes hold for as long as they live.

BEGIN = r"""
say() { echo "deploy: $*" >&2; }
die() { say "$@"; exit 1; }
is_running() { ! flock -n -s "$folder/lock" true; }
pid() { until cat "$folder/pid" 2>/dev/null || ! is_running; do sleep 0.1; done; }
folder=.deploy/$name
cd -- "$HOME" || exit
for tool in rsync setsid flock; do
    command -v "$tool" >/dev/null || die "that machine has no $tool: install rsync and util-linux there"
done
"""

PREPARE = r"""
mkdir -p -- "$tree" && cd -- "$tree" && mkdir -p -- "$folder" || exit
! is_running || die "$name is running there already: --attach follows it, --stop ends it"
"""

FIND = r"""
cd -- "$tree" 2>/dev/null || die "no run was started in $tree there"
[[ -d $folder ]] || die "no run $name there; there are: $(ls -m .deploy)"
"""

# The child writes its pid and becomes the launcher, then the training or its torchrun. A signal ends the
# launcher, but not the pip that it may be waiting for: the last line ends that, too.
RUN = r"""
folder=$1
shift
( echo "$BASHPID" >"$folder/pid.new"; mv "$folder/pid.new" "$folder/pid"; exec "$@" )
code=$?
echo "$code" >"$folder/exit_code.new"
mv "$folder/exit_code.new" "$folder/exit_code"
trap "" TERM
(( code < 128 )) || kill -TERM 0
"""

# In a session of its own, so that no closing connection ends the run. It inherits the lock.
START = r"""
exec 9>>"$folder/lock"
flock -n 9 || die "$name was started there by somebody else just now: --attach follows it"
[[ $run_dir == /* ]] || run_dir=$PWD/$run_dir
ln -sfn -- "$run_dir" "$folder/run" && rm -f "$folder/pid" "$folder/exit_code" && touch "$folder/log" || exit
from=(-c "+$(( $(wc -c <"$folder/log") + 1 ))")
setsid bash -c "$run" deploy "$folder" "${command[@]}" </dev/null >>"$folder/log" 2>&1 &
exec 9>&-
say "$name runs there as process $(pid), in $PWD"
"""

FOLLOW = r"""
while_running=()
! is_running || while_running=(-f "--pid=$(pid)")
tail "${from[@]}" "${while_running[@]}" "$folder/log" || exit
flock -s "$folder/lock" true  # waits: the exit code is written before the lock is free
[[ -s $folder/exit_code ]] || die "$name ended without an exit code: it was killed, or the machine went down"
code=$(cat "$folder/exit_code")
say "$name ended with exit code $code; --fetch copies its results"
exit "$code"
"""

STOP = r"""
is_running || { say "$name is not running"; exit 0; }
kill -TERM "$(pid)"
say "sent SIGTERM to $name: it saves and ends"
"""


def program(args: argparse.Namespace, *bodies: str) -> bytes:
    """A bash program with its variables set in front; those of --env are exported."""
    values = {"tree": args.remote_dir, "name": args.name, "run_dir": args.run_dir, "run": RUN}
    lines = [f"{name}={shlex.quote(value)}\n" for name, value in values.items()]
    # Python over there would hold back the log's lines for as long as its buffer is not full.
    exported = {"PYTHONUNBUFFERED": "1", **args.variables}
    lines += [f"export {name}={shlex.quote(value)}\n" for name, value in exported.items()]
    command = f"command=(./launch_single_node.sh {shlex.join(args.words)})\n"
    return os.fsencode("".join([*lines, command, BEGIN, *bodies]))


def run_there(args: argparse.Namespace, *bodies: str) -> None:
    """Runs bash programs there, one after the other; ends this program with their exit code, if not 0."""
    code = subprocess.run(args.bash, input=program(args, *bodies)).returncode
    if code == 255:  # the line above is ssh's own
        fail(f"cannot connect to {args.ssh}; --ssh-option='-i KEYFILE' names another key", 255)
    if code:
        sys.exit(code)


# ----------------------------------------------------------------------------------------------------
# 3. Files: what is copied there

def git_files(*words: str) -> set[str]:
    """What git tracks or would track, as paths in this project."""
    command = ["git", "-C", str(TREE), "ls-files", "-z", "--cached", "--others", *words]
    listed = subprocess.run(command, capture_output=True)
    if listed.returncode:
        fail(f"git cannot list the files of {TREE} ({os.fsdecode(listed.stderr).strip()}); where it is no "
             "checkout, `git init` there is enough")
    return {name for name in os.fsdecode(listed.stdout).split("\0") if name}


def listed_files(args: argparse.Namespace) -> list[str]:
    """Paths in this project; says which of git's files stay here."""
    names, asked = git_files("--exclude-standard"), set()
    for path in args.copy:
        asked |= git_files("--error-unmatch", "--", os.path.abspath(path) if os.path.exists(path) else path)
    kept, left = [], []
    for name in sorted(names | asked):
        parts = name.split("/")
        is_secret = any(SECRETS.fullmatch(part.lower()) for part in parts)  # even if --copy asks for it
        if is_secret or name not in asked and any(map(CHECKPOINT.fullmatch, parts)):
            left.append(name)
        elif (TREE / name).is_symlink() or (TREE / name).is_file():  # neither deleted here, nor a submodule
            kept.append(name)
    if left:
        note(f"not copied, for they look like secrets or checkpoints: {', '.join(left)}")
    return kept


def note_ignored(words: list[str], files: list[str]) -> None:
    """Says which files and folders the arguments name, other than for writing, that stay here."""
    for flag, word in zip(["", *words], words):
        flag, _, value = word.rpartition("=") if word.startswith("--") else (flag, "", word)
        name = os.path.normpath(value)
        if flag in ("--checkpoint-dir", "--data-cache", "--resume") or name.startswith((".", "/", "-")):
            continue
        if (TREE / name).exists() and not any(f == name or f.startswith(f"{name}/") for f in files):
            note(f"not copied, git ignores it: {name} (--copy {shlex.quote(name)} takes it along)")


def rsync(args: argparse.Namespace, *words: str, files: Sequence[str] = ()) -> None:
    command = ["rsync", "-rlptz", "-s", "--partial", "--rsync-path=cd && rsync", "-e",
               shlex.join(args.ssh_command), *words]
    code = subprocess.run(command, input=os.fsencode("\0".join(files))).returncode
    if code:
        fail(f"rsync ended with exit code {code}; the lines above say why", 255 if code == 255 else 1)


# ----------------------------------------------------------------------------------------------------
# 4. What the user asks for: start, attach, stop, fetch

def attach_command(args: argparse.Namespace) -> str:
    options = [f"--ssh-option={option}" for option in args.ssh_option]
    return shlex.join(["python", "tools/deploy.py", "--ssh", args.ssh, *options, "--remote-dir",
                       args.remote_dir, "--name", args.name, "--attach"])


def start(args: argparse.Namespace) -> int:
    files = listed_files(args)
    if args.words[0] not in files:
        fail(f"{args.words[0]} is not among the files to copy: does git ignore it?")
    note_ignored(args.words, files)
    run_there(args, PREPARE)
    note(f"copies {len(files)} files to {args.login}:{args.remote_dir}")
    rsync(args, "--from0", "--files-from=-", f"{TREE}/", f"{args.login}:{args.remote_dir}/", files=files)
    note(f"{attach_command(args)} follows the run's log again")
    if args.detach:
        run_there(args, FIND, START)
        return 0
    return follow(args, FIND, START, FOLLOW)


def follow(args: argparse.Namespace, *bodies: str) -> int:
    """Prints the log until the run ends; returns its exit code."""
    passes_on, code = args.is_start, None
    # This ssh ignores Ctrl-C, so that it goes on where that is passed on.
    ssh = subprocess.Popen(args.bash, stdin=subprocess.PIPE,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    try:
        with contextlib.suppress(BrokenPipeError), ssh.stdin:
            ssh.stdin.write(program(args, *bodies))
        while code is None:
            try:
                code = ssh.wait()
            except KeyboardInterrupt:
                if not passes_on:
                    fail(f"{args.name} goes on; {attach_command(args)} follows it again", 130)
                passes_on = False
                run_there(args, FIND, STOP)
                note("Ctrl-C again leaves without waiting for that")
    finally:
        ssh.terminate()
    if code == 255:
        fail(f"lost the connection to {args.login}, but {args.name} goes on: {attach_command(args)} "
             "follows it again", 255)
    return code


def fetch(args: argparse.Namespace) -> int:
    """Nothing is deleted here. What is still being written, *.partial, stays there."""
    run_there(args, FIND)
    home = TREE / "runs" / f"{args.name}@{args.login.rpartition('@')[2]}"
    home.mkdir(parents=True, exist_ok=True)
    there = f"{args.login}:{args.remote_dir}/.deploy/{args.name}"
    rsync(args, "--exclude=/checkpoints", "--exclude=*.partial", f"{there}/log", f"{there}/run/", f"{home}/")
    note(f"{', '.join(sorted(path.name for path in home.iterdir()))} are in {home}")
    return 0


def main() -> int:
    args = parse_args(sys.argv[1:])
    try:
        if args.is_start:
            return start(args)
        if args.fetch:
            return fetch(args)
        if args.attach:
            return follow(args, FIND, "from=(-n 100)\n", FOLLOW)
        code = follow(args, FIND, STOP, "from=(-n 0)\n", FOLLOW)
        return 0 if code == 128 + signal.SIGTERM else code
    except FileNotFoundError as error:  # from subprocess
        fail(f"{error.filename} is not installed on this machine")
    except KeyboardInterrupt:
        fail("interrupted", 130)


if __name__ == "__main__":
    sys.exit(main())
