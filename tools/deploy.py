"""Train on another machine over ssh: copy this tree, start a run that survives the connection, follow it.

    python tools/deploy.py configs/train_llm/quickstart.yaml --ssh root@host:port
    python tools/deploy.py configs/train_llm/quickstart.yaml --ssh root@host:port -- --max-steps 50
    python tools/deploy.py --ssh me@box train_llm.py --from-scratch --model-size 1B --gpu-ranks 0,2
    python tools/deploy.py --ssh me@box --name quickstart --attach      # follow its log again
    python tools/deploy.py --ssh me@box --name quickstart --stop        # let it save, wait for its end
    python tools/deploy.py --ssh me@box --name quickstart --fetch       # metrics, logs, export come home

A YAML of configs/SCRIPT/ stands for SCRIPT.py --config FILE; flags of the script go behind a --. Behind the
name of a script everything belongs to the script. Relative paths in its arguments count from the tree there.

Needed are ssh, rsync, git and Python here, and ssh, rsync, bash and Python 3.10 there; launch_single_node.sh
puts the packages into .venv there where they lack (--env PYTHON=/path/to/python takes another interpreter).
Copied are the files that git tracks or would track, but nothing whose name looks like a secret, no checkpoint
and no run folder. Nothing is deleted there. All runs of a tree share its files: while one has not ended, a
start that would change them is refused (--force, or another --remote-dir). One login serves all; users, ports
and keys may come from ~/.ssh/config. A run is known by its --name; its log, process and exit code are in
.deploy/NAME there.

Exit code: the run's own, where its end was seen; else 0, 1 for an error that the last line explains, 2 for
wrong arguments, 130 after Ctrl-C (the run goes on), 255 where ssh cannot connect or lost the connection.
"""

import argparse
import fnmatch
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent
ATTACH_LINES = 100  # of the log, that --attach shows of what it has missed

# Matched with every part of a path, in lower case. Where a letter follows `token`, it is a tokenizer's.
SECRETS = re.compile("|".join([
    *map(fnmatch.translate, (
        ".env", ".env.*", "*.env", ".envrc", "*.pem", "*.key", "*.p12", "*.pfx", "*.ppk", "*.jks", "*.kdbx",
        "*.keytab", "*.ovpn", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", ".netrc", "_netrc",
        ".git-credentials", "credentials*", "*secret*", "*password*", "*passwd*", "*api_key*", "*apikey*",
        ".pypirc", ".npmrc", ".pgpass", ".vault*", ".ssh", ".aws", ".gnupg", ".kube", ".docker", ".azure",
        "tokens.*", "service_account*.json")),
    r".*token(?![a-z]).*"]))
# A checkpoint's folder and files, saved or half saved.
CHECKPOINT = re.compile(r"step_\d+(\.\w+)?|.*\.distcp")

CODES = {0: "finished", 1: "an error, see the end of its log", 2: "wrong arguments", 3: "its STOP file",
         124: "the time limit", 127: "a command is missing there"}


class UserError(Exception):
    """Shown as one line; `code` is the exit code."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


def note(text: str) -> None:
    """To stderr, so that stdout holds the run's log alone."""
    print(f"deploy: {text}", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------
# 1. Arguments

def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deploy.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, usage="%(prog)s --ssh [USER@]HOST[:PORT] [flags] SCRIPT.py ARGUMENTS\n"
        "       %(prog)s CONFIG.yaml --ssh [USER@]HOST[:PORT] [flags] [-- ARGUMENTS]\n"
        "       %(prog)s --ssh [USER@]HOST[:PORT] [--name NAME] (--attach | --stop | --fetch)")
    add = parser.add_argument
    add("--ssh", metavar="[USER@]HOST[:PORT]", help="where; an alias of ~/.ssh/config or [an::ipv6] too")
    add("--ssh-option", metavar="TEXT", action="append", default=[], help="such as '-i KEYFILE'")
    add("--remote-dir", metavar="DIR", help="the tree over there (default: ~/fsdp2/NAME_OF_THIS_FOLDER)")
    add("--name", help="of the run (default: from its --checkpoint-dir, else from the config or script)")
    add("--env", metavar="NAME[=VALUE]", action="append", default=[],
        help="set this for the run; without =VALUE: as it is set here. Never printed, never on a disk there")
    add("--copy", metavar="PATH", action="append", default=[], help="copy this too, though git ignores it")
    add("--force", action="store_true", help="copy changed files though a run in that tree has not ended")
    add("--detach", action="store_true", help="start and leave, do not follow the log")
    add("--dry-run", action="store_true", help="print the commands, connect to nothing")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--attach", action="store_true", help="follow a run's log; Ctrl-C leaves it running")
    mode.add_argument("--stop", action="store_true", help="SIGTERM: the run saves and ends; waits for that")
    mode.add_argument("--fetch", action="store_true", help="copy its run folder and logs here")
    add("--checkpoints", action="store_true", help="--fetch: the checkpoints too")
    add("--to", metavar="FOLDER", help="--fetch: into this folder (default: runs/NAME@HOST of this tree)")
    return parser


def split_words(argv: list[str], parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """(deploy's own words, the first word that is no flag of deploy and all behind it).

    argparse.REMAINDER would do, were it not that it swallows flags in front of the script as well.
    """
    with_value = {flag for action in parser._actions if action.nargs is None
                  for flag in action.option_strings}
    own, i = [], 0
    while i < len(argv) and argv[i].startswith("-") and argv[i] != "--":
        if argv[i] in with_value and i + 1 < len(argv):
            own.append(f"{argv[i]}={argv[i + 1]}")  # so that a value may begin with a dash: -i KEYFILE
            i += 1
        else:
            own.append(argv[i])
        i += 1
    return own, argv[i:]


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Adds `words`, the launcher's arguments, and `run_dir`, `variables` and `remote`. Exits with 2."""
    parser = build_parser()
    own, rest = split_words(argv, parser)
    target, script_args = (rest[0], rest[1:]) if rest and rest[0] != "--" else (None, rest[1:])
    is_config = target is not None and target.endswith((".yaml", ".yml", ".json"))
    if is_config:
        more, script_args = split_words(script_args, parser)
        own += more
        if script_args and script_args[0] != "--":
            parser.error(f"{script_args[0]}: flags of the script go behind a --")
        script_args = script_args[1:]
    args, unknown = parser.parse_known_args(own)
    if unknown:
        hint = "go behind a --" if is_config else "go behind its name"
        parser.error(f"{' '.join(unknown)}: not a flag of deploy.py; flags of the script {hint}")
    if not args.ssh:
        parser.error("--ssh [USER@]HOST[:PORT] is missing")
    args.is_start = not (args.attach or args.stop or args.fetch)
    if target is None and (args.is_start or script_args):
        parser.error("what to run is missing: a config, or a script and its arguments")
    try:
        args.words = launcher_words(target, is_config, script_args) if target else []
        args.run_dir = flag_value("checkpoint-dir", args.words) or "checkpoints"
        args.name = args.name or (name_of(args.words) if target else None)
        args.variables = dict(map(variable, args.env))
        args.remote = parse_remote(args)
    except UserError as error:
        parser.error(str(error))
    if args.name is not None and not re.fullmatch(r"\w[\w.@+-]*", args.name, re.ASCII):
        parser.error(f"--name {args.name}: letters, digits and . _ @ + - only")
    return args


def launcher_words(target: str, is_config: bool, script_args: list[str]) -> list[str]:
    """Script and arguments, for launch_single_node.sh."""
    if not is_config and not target.endswith(".py"):
        raise UserError(f"{target} is neither a config (.yaml) nor a script (.py)")
    # From this folder or from the tree's root; in a copy of the tree, the copy's own.
    found = [path.resolve() for path in (Path(target), TREE / target) if path.is_file()]
    path = next((path for path in found if TREE in path.parents), None)
    if path is None:
        raise UserError(f"{target}: " + (f"outside {TREE}, which gets copied" if found else "no such file"))
    relative = path.relative_to(TREE).as_posix()
    words = [relative, *script_args]
    if is_config:
        script = f"{path.parent.name}.py"
        if not (TREE / script).is_file():
            raise UserError(f"{target}: there is no {script}; name the script: SCRIPT.py --config {relative}")
        words = [script, "--config", relative, *script_args]
    # The launcher counts processes from what is on its command line, and does not look into configs.
    for flag in ("gpu-ranks", "nproc"):
        value = flag_value(flag, words)
        if value and not flag_value(flag, words, configs=False):
            words += [f"--{flag}", value]
    return words


def flag_value(flag: str, words: list[str], configs: bool = True) -> str | None:
    """The last value of --flag among the words, else that in the flat YAML or JSON file of --config."""
    value = None
    for word, following in zip(words, [*words[1:], ""]):
        if word == f"--{flag}":
            value = following
        elif word.startswith(f"--{flag}="):
            value = word.partition("=")[2]
    config = flag_value("config", words, configs=False) if configs and value is None else None
    if config and (TREE / config).is_file():
        # By a pattern, because this program must run where no package is installed; JSON has such lines too.
        line = (rf"(?:^|[{{,])[ \t]*[\"']?{flag.replace('-', '[-_]')}[\"']?[ \t]*:[ \t]*"
                r"(\"[^\"]*\"|'[^']*'|[^#,}\n]*)")
        found = re.search(line, (TREE / config).read_text(), re.MULTILINE)
        value = found[1].strip().strip("\"'") if found else None
    return None if value in ("null", "~", "") else value


def name_of(words: list[str]) -> str:
    """The run folder's path in one word, without runs/ in front; else the name of the config or script."""
    folder, config = flag_value("checkpoint-dir", words), flag_value("config", words, configs=False)
    name = folder.removeprefix("./").removeprefix("runs/") if folder else Path(config or words[0]).stem
    return re.sub(r"[^\w.@+-]+", "-", name, flags=re.ASCII).strip("-.") or "run"


def variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise UserError(f"--env {name}: not a name of a variable")
    if not equals and name not in os.environ:
        raise UserError(f"--env {name}: is not set here; --env {name}=VALUE sets it")
    return name, value if equals else os.environ[name]


# ----------------------------------------------------------------------------------------------------
# 2. Connection: one login, kept open in the background, serves every ssh and rsync

@dataclass
class Remote:
    """Where, and how to get there."""
    address: str  # as the user gave it
    login: str  # user@host, as ssh takes it
    port: str | None  # None: ssh's own configuration says
    folder: str  # of the tree, from the home folder if relative
    options: list[str]
    socket: list[str] = field(default_factory=list)  # options that share one login

    @property
    def host(self) -> str:
        return self.login.rpartition("@")[2]

    @property
    def ssh(self) -> list[str]:
        """ssh and its options; the user's come first, because ssh takes the first value that it meets."""
        # Four unanswered signs of life, after a minute, are a lost connection.
        kept = ["-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"]
        return ["ssh", *self.options, *(["-p", self.port] if self.port else []), *self.socket, *kept]

    def path(self, folder: str) -> str:
        """For rsync, which wants an IPv6 address in brackets."""
        user, at, host = self.login.rpartition("@")
        return f"{user}{at}{f'[{host}]' if ':' in host else host}:{folder}"


def parse_remote(args: argparse.Namespace) -> Remote:
    user, at, host = args.ssh.removeprefix("ssh://").rstrip("/").rpartition("@")
    port = None
    if match := re.fullmatch(r"\[(.+)\](?::(.*))?", host) or re.fullmatch(r"([^:]+)(?::(.*))?", host):
        host, port = match.groups()
    # What is left with colons is an IPv6 address without brackets, and so without a port.
    if port is not None and not (port.isdecimal() and 0 < int(port) < 65536):
        raise UserError(f"--ssh {args.ssh}: '{port}' is not a port")
    if not host or host.startswith("-") or user.startswith("-") or re.search(r"\s", user + host):
        raise UserError(f"--ssh {args.ssh}: expected [USER@]HOST[:PORT]")
    folder = (args.remote_dir or f"fsdp2/{TREE.name}").removeprefix("~/").rstrip("/")
    options = [word for option in args.ssh_option for word in shlex.split(option)]
    return Remote(args.ssh, user + at + host, port, folder, options)


@contextmanager
def shared_login(remote: Remote):
    """Every connection within goes through the first one's, so that a password is asked for once."""
    for program in ("ssh", "rsync", "git"):
        if not shutil.which(program):
            raise UserError(f"{program} is not installed on this machine")
    # The path of a socket has some 100 characters at the most.
    short = "/tmp" if len(tempfile.gettempdir()) > 50 else None
    with tempfile.TemporaryDirectory(prefix="deploy-", dir=short) as folder:
        control = ["-o", f"ControlPath={folder}/s"]
        remote.socket = [*control, "-o", "ControlMaster=auto", "-o", "ControlPersist=60"]
        try:
            yield
        finally:
            subprocess.run([*remote.ssh, "-O", "exit", remote.login], capture_output=True)


def remote_command(remote: Remote) -> list[str]:
    # Programs go in through stdin: whatever login shell there is, only bash reads them, so that every word
    # arrives as it was given, and no value of a variable shows up in a list of processes.
    return [*remote.ssh, "-T", remote.login, "bash -s"]


def run_there(remote: Remote, program: str) -> list[list[str]]:
    """Runs a bash program there; returns the words of each line that it said to us."""
    # A file, not a pipe: older ssh leaves stderr open in the background process that keeps the login.
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(remote_command(remote), input=program, stdout=subprocess.PIPE, stderr=errors,
                              encoding="utf-8", errors="surrogateescape")
        errors.seek(0)
        complaint = errors.read().strip()
    if done.returncode == 255:
        raise UserError(explain_ssh(remote, complaint), 255)
    if done.returncode == 127:
        raise UserError(f"{remote.host} has no bash: install it there")
    if done.returncode:
        raise UserError(f"{remote.host}: {(complaint or f'exit code {done.returncode}').splitlines()[-1]}")
    # A login shell that prints greetings must not disturb.
    return [line[7:].split(" ") for line in done.stdout.splitlines() if line.startswith("deploy:")]


def explain_ssh(remote: Remote, complaint: str) -> str:
    """One line for what ssh printed when it could not connect."""
    last = (complaint.splitlines() or ["no reason given"])[-1].strip()
    hints = {
        "IDENTIFICATION HAS CHANGED": "its key is not the one in known_hosts: another machine has this "
        "address now, or somebody is in between; after checking, ssh-keygen -R removes the old key",
        "Host key verification failed": "its key is not known here yet: log in once by hand to check it",
        "Connection refused": "nothing listens there: is the port right, and is the machine up?",
        "Could not resolve": "is the name right?",
        "Permission denied": "is the user right? --ssh-option='-i KEYFILE' names another key",
        "timed out": "is the machine up, and does a firewall let you in?",
    }
    hint = next((hint for key, hint in hints.items() if key in complaint), None)
    return f"cannot connect to {remote.address}: {last}" + (f" ({hint})" if hint else "")


# ----------------------------------------------------------------------------------------------------
# 3. Programs that run there. .deploy/NAME/0001 holds the first start of a run, 0002 the second, ...:
#    run.sh, log, `wrapper` and `child` (process and its start time), run_dir, and exit_code after its end.

FUNCTIONS = r"""
say() { printf 'deploy:%s\n' "$*"; }
# When a process started, nothing if it has ended. A process number alone may be in use by another one by now.
started() {
    local stat fields
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 0
    read -ra fields <<<"${stat##*) }"
    [[ ${fields[0]} == [ZX] ]] || echo "${fields[19]}"
}
is_alive() {
    local pid start
    [[ -s $1 ]] && read -r pid start <"$1" && [[ -n $start && $(started "$pid") == "$start" ]]
}
newest_start() {
    local folder newest=""
    for folder in ".deploy/$1"/[0-9]*/; do [[ ! -d $folder ]] || newest=${folder%/}; done
    echo "$newest"
}
is_running() { is_alive "$1/wrapper" || is_alive "$1/child"; }
# "running", the exit code, or "lost": killed with its wrapper, or the machine went down.
state() {
    local alive=0
    ! is_running "$1" || alive=1  # first, as the exit code is written before the wrapper ends
    if [[ -s $1/exit_code ]]; then cat "$1/exit_code"
    elif [[ $alive == 1 ]]; then echo running
    else echo lost; fi
}
newest_checkpoint() {
    local folder newest=none
    for folder in "$(cat "$1/run_dir")"/checkpoints/step_*; do
        [[ ! $folder =~ /step_[0-9]+$ || ! -f $folder/.metadata ]] || newest=${folder##*/}
    done
    echo "$newest"
}
cd -- "$HOME" || exit
"""

# Says what is missing, where the tree is, and the state of each run in it.
PROBE = r"""
has_python() {
    if [[ -n ${PYTHON:-} ]]; then command -v "$PYTHON"
    else [[ -x $tree/.venv/bin/python ]] || command -v python3 || command -v python; fi >/dev/null
}
command -v rsync >/dev/null || say missing rsync
if [[ $is_start == 1 ]]; then
    mkdir -p -- "$tree" || exit
    command -v setsid >/dev/null || say missing setsid
    has_python || say missing "${PYTHON:-python3}"
fi
if cd -- "$tree" 2>/dev/null; then
    say tree "$(pwd -P)"
    for folder in .deploy/*/; do
        name=${folder#.deploy/}
        start=$(newest_start "${name%/}")
        [[ -z $start ]] || say run "${name%/}" "$(state "$start")" "$(newest_checkpoint "$start")" \
            "$(cat "$start/run_dir")"
    done
fi
"""

# run.sh of a start, whose folder is its argument.
RUN = r"""
trap '' HUP
echo "$$ $(started $$)" >"$1/wrapper"
(
    pid=$BASHPID  # inside the $( ) it would be another one
    echo "$pid $(started "$pid")" >"$1/child"
    exec COMMAND
) >>"$1/log" 2>&1
code=$?
echo "$code" >"$1/exit_code.new"
mv "$1/exit_code.new" "$1/exit_code"
# A signal ends the launcher, but not the pip that it may be waiting for.
trap '' TERM
(( code < 128 )) || kill -TERM 0
"""

# In a session of its own, so that no closing connection ends the run.
START = r"""
cd -- "$tree" || exit
last=$(newest_start "$name")
[[ -z $last || $(state "$last") != running ]] || { say refused; exit 0; }
number=${last##*/}
printf -v folder '.deploy/%s/%04d' "$name" $((10#${number:-0} + 1))
mkdir -p -- ".deploy/$name" || exit
mkdir -- "$folder" || { say refused; exit 0; }
: >"$folder/log"
printf '%s\n' "$run_dir" >"$folder/run_dir"
printf '%s' "$run_sh" >"$folder/run.sh"
setsid bash "$folder/run.sh" "$folder" </dev/null >/dev/null 2>&1 &
for (( i = 0; i < 100; i++ )); do [[ ! -s $folder/child ]] || break; sleep 0.1; done
pid=""
[[ ! -s $folder/child ]] || read -r pid _ <"$folder/child"
[[ -n $pid ]] || { echo "the run did not start, see $PWD/$folder" >&2; exit 1; }
say started "$pid"
"""

# Prints the log from its last `lines` lines on ("+1": all of it), until the run has ended. stdin stays open
# for as long as somebody listens. It is a function because bash reads this program, too, from stdin.
FOLLOW = r"""
follow() {
    local folder log size offset running shown
    cd -- "$tree" || exit
    folder=$(newest_start "$name")
    log=$folder/log
    size=$(wc -c <"$log") || exit
    offset=$(( size - $(head -c "$size" "$log" | tail -n "$lines" | wc -c) ))
    while :; do
        running=0
        ! is_running "$folder" || running=1  # before the last look at the log
        size=$(wc -c <"$log")
        shown=$(( size - offset ))
        (( shown <= 0 )) || tail -c "+$((offset + 1))" "$log" | head -c "$shown" || exit
        offset=$size
        [[ $running == 1 ]] || exit 0
        read -r -t 1 _
        (( $? > 128 )) || exit 0
    done
}
follow; exit
"""

# To the process that became the training or its torchrun, which passes it on.
STOP = r"""
cd -- "$tree" || exit
folder=$(newest_start "$name")
for (( i = 0; i < 50; i++ )); do [[ ! -s $folder/child ]] || break; sleep 0.1; done
read -r pid _ <"$folder/child"
! is_alive "$folder/child" || kill -TERM "$pid"
"""


def program(body: str, **variables: str) -> str:
    """A bash program with its variables set in front."""
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in variables.items()) + FUNCTIONS + body


# ----------------------------------------------------------------------------------------------------
# 4. Files: what is copied there

def listed_files(args: argparse.Namespace) -> tuple[list[str], dict[str, list[str]]]:
    """(files to copy, {why: files and folders that git lists, but that stay here}); paths in this tree."""
    command = ["git", "-C", str(TREE), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True)
    if listed.returncode:
        raise UserError(f"git cannot list the files of {TREE} ({os.fsdecode(listed.stderr).strip()}); "
                        "where it is no checkout, `git init` there is enough")
    names = {name for name in os.fsdecode(listed.stdout).split("\0") if name}
    asked = {name for path in args.copy for name in files_below(path)}
    # A folder with both of these was written by a run.
    records = {"command.txt", "env.json"}
    found = {}
    for name in names:
        found.setdefault(os.path.dirname(name), set()).add(os.path.basename(name))
    run_folders = {folder for folder, inside in found.items() if folder and records <= inside}
    kept, left = [], {"look like secrets": set(), "checkpoints and run folders": set()}
    for name in sorted(names | asked):
        parts, path = name.split("/"), TREE / name
        parents = {"/".join(parts[:i]) for i in range(1, len(parts))}
        if any(SECRETS.fullmatch(part.lower()) for part in parts):
            left["look like secrets"].add(name)
        elif name not in asked and (parents & run_folders or any(map(CHECKPOINT.fullmatch, parts))):
            left["checkpoints and run folders"].add(min(parents & run_folders, default=name))
        elif path.is_symlink() or path.is_file():  # neither deleted here, nor a submodule
            kept.append(name)
    return kept, {why: sorted(names) for why, names in left.items()}


def files_below(path: str) -> list[str]:
    """Of a --copy: the file, or all files of the folder, as paths in this tree."""
    full = Path(path if os.path.lexists(path) else TREE / path)
    full = full.parent.resolve() / full.name  # a link itself is copied as a link
    if TREE not in full.parents or not os.path.lexists(full):
        raise UserError(f"--copy {path}: no file or folder of {TREE}", 2)
    files = full.rglob("*") if full.is_dir() and not full.is_symlink() else [full]
    return [file.relative_to(TREE).as_posix() for file in files if file.is_symlink() or file.is_file()]


def not_copied(words: list[str], files: list[str]) -> list[str]:
    """Files and folders of this tree that the arguments name, other than for writing, and that stay here."""
    missing = []
    for flag, word in zip(["", *words], words):
        flag, equals, value = word.partition("=") if word.startswith("--") else (flag, "", word)
        if flag in ("--checkpoint-dir", "--data-cache", "--resume") or not value or Path(value).is_absolute():
            continue
        name = os.path.normpath(value)
        if (TREE / name).exists() and not any(f == name or f.startswith(name + "/") for f in files):
            missing.append(name)
    return [name for name in missing if name != "." and not name.startswith("..")]


def copy_command(remote: Remote, tree: str) -> list[str]:
    return ["rsync", "-lptz", "-s", "--from0", "--files-from=-", "-e", shlex.join(remote.ssh), f"{TREE}/",
            remote.path(f"{tree}/")]


def rsync(command: list[str], files: list[str] | None = None) -> str:
    """Runs it with `files` as its list and returns what it prints; without, that goes to the terminal."""
    names = None if files is None else os.fsencode("\0".join(files))
    with tempfile.TemporaryFile() as errors:
        done = subprocess.run(command, input=names, stdout=None if names is None else subprocess.PIPE,
                              stderr=errors)
        errors.seek(0)
        lines = os.fsdecode(errors.read()).strip().splitlines()
    if done.returncode:
        # Its last line only says that there was an error.
        first = next(iter(lines), f"rsync ended with exit code {done.returncode}")
        raise UserError(first, 255 if done.returncode == 255 else 1)
    return os.fsdecode(done.stdout or b"")


def refuse_changes(remote: Remote, tree: str, files: list[str], running: list[str]) -> None:
    """New files disturb nobody. A run reads its script again when its processes are started again."""
    listing = rsync([*copy_command(remote, tree), "--dry-run", "--checksum", "--itemize-changes"], files)
    changed = [line.split(" ", 1)[1] for line in listing.splitlines() if re.match(r"<fc", line)]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"{', '.join(running)} is running in {tree}, where this changes {', '.join(changed[:3])}{more}: "
            "--force copies it all the same (a run reads its code when it starts, and again when it restarts "
            "its processes), --remote-dir starts in a tree of its own")


# ----------------------------------------------------------------------------------------------------
# 5. What the user asks for: start, attach, stop, fetch

@dataclass
class Run:
    name: str
    state: str  # running, lost, or the exit code
    checkpoint: str  # the newest one's folder, or none
    folder: str  # its --checkpoint-dir


def probe(args: argparse.Namespace) -> tuple[str | None, dict[str, Run]]:
    """(the tree there, None if there is none; its runs by name). An error if something is missing there."""
    lines = run_there(args.remote, exports(args.variables) + program(
        PROBE, tree=args.remote.folder, is_start=str(int(args.is_start))))
    told = {key: [words for k, *words in lines if k == key] for key in ("missing", "tree", "run")}
    for (tool, *_) in told["missing"]:
        fix = {"rsync": "install it there (apt-get install rsync)", "setsid": "install util-linux there"}
        raise UserError(f"{args.remote.host} has no {tool}: " + fix.get(
            tool, "install Python 3.10 or newer there, or name one with --env PYTHON=/path/to/python3"))
    runs = {name: Run(name, state, checkpoint, " ".join(folder))
            for name, state, checkpoint, *folder in told["run"]}
    return " ".join(told["tree"][0]) if told["tree"] else None, runs


def exports(variables: dict[str, str]) -> str:
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())


def again(args: argparse.Namespace, flag: str) -> str:
    """The command that does something with the same run later."""
    options = [f"--ssh-option={option}" for option in args.ssh_option]
    options += ["--remote-dir", args.remote_dir] if args.remote_dir else []
    return shlex.join(["python", "tools/deploy.py", "--ssh", args.ssh, *options, "--name", args.name, flag])


def start_program(args: argparse.Namespace) -> str:
    command = shlex.join(["./launch_single_node.sh", *args.words])
    functions = FUNCTIONS[:FUNCTIONS.index("is_alive()")]
    return program(START, tree=args.remote.folder, name=args.name, run_dir=args.run_dir,
                   run_sh=f"#!/usr/bin/env bash\n{functions}{RUN.replace('COMMAND', command)}")


def start(args: argparse.Namespace) -> int:
    files, left = listed_files(args)
    if not files or "launch_single_node.sh" not in files or args.words[0] not in files:
        missing = args.words[0] if "launch_single_node.sh" in files else "launch_single_node.sh"
        raise UserError(f"{missing} is not among the files to copy: does git ignore it?")
    for why, names in left.items():
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            note(f"not copied, {why}: {', '.join(names[:5])}{more}")
    for name in not_copied(args.words, files):
        note(f"not copied, git ignores it: {name} (--copy {shlex.quote(name)} takes it along)")
    # Python over there would hold back the log's lines for as long as its buffer is not full.
    variables = {"PYTHONUNBUFFERED": "1", **args.variables}
    if args.dry_run:
        shown = exports(dict.fromkeys(variables, "..."))
        print(f"{shlex.join(copy_command(args.remote, args.remote.folder))} <<'END'  # names end with \\0")
        print("\n".join(files) + "\nEND")
        print(f"{shlex.join(remote_command(args.remote))} <<'END'\n{shown}{start_program(args)}END")
        return 0
    tree, runs = probe(args)
    if args.name in runs and runs[args.name].state == "running":
        raise UserError(f"{args.name} is running there already: --attach follows it, --stop ends it, --name "
                        "starts another one")
    running = [run.name for run in runs.values() if run.state == "running"]
    if running and not args.force:
        refuse_changes(args.remote, tree, files, running)
    rsync(copy_command(args.remote, tree), files)
    note(f"{len(files)} files are in {args.remote.path(tree)}")
    (answer, *pid), = run_there(args.remote, exports(variables) + start_program(args))
    if answer == "refused":
        raise UserError(f"{args.name} was started there by somebody else just now: --attach follows it")
    note(f"{args.name} runs there as process {pid[0]}: ./launch_single_node.sh {shlex.join(args.words)}")
    note(f"Ctrl-C leaves it running; {again(args, '--attach')} follows it again")
    return 0 if args.detach else follow(args, "+1")


def follow(args: argparse.Namespace, lines: str) -> int:
    """Prints the log until the run ends; returns its exit code. Ctrl-C leaves the run alone."""
    text = program(FOLLOW, tree=args.remote.folder, name=args.name, lines=lines)
    # An open stdin keeps it going: over there it ends when this program does, however that happens.
    with subprocess.Popen(remote_command(args.remote), stdin=subprocess.PIPE) as ssh:
        try:
            ssh.stdin.write(os.fsencode(text))
            ssh.stdin.flush()
            code = ssh.wait()
        except KeyboardInterrupt:
            ssh.terminate()
            note(f"{args.name} goes on; {again(args, '--attach')} follows it again")
            return 130
        except BrokenPipeError:
            code = ssh.wait()
    if code:
        what = f"lost the connection to {args.remote.host}" if code == 255 else "could not read its log"
        raise UserError(f"{what}, but {args.name} goes on: {again(args, '--attach')} follows it again", 255)
    return report(args)


def report(args: argparse.Namespace) -> int:
    """Says how the run ended; returns its exit code, 1 where that is not known."""
    run = probe(args)[1][args.name]
    saved = "no checkpoint"
    if run.checkpoint != "none":
        saved = f"newest checkpoint {run.folder}/checkpoints/{run.checkpoint}"
    if run.state == "running":
        raise UserError(f"{args.name} is still running; {again(args, '--attach')} follows it")
    if not run.state.isdecimal():
        note(f"{args.name} ended without an exit code: it was killed, or the machine went down; {saved}")
        return 1
    code = int(run.state)
    try:
        meaning = CODES.get(code) or signal.Signals(code - 128).name
    except ValueError:
        meaning = "see the end of its log"
    note(f"{args.name} ended with exit code {code} ({meaning}); {saved}")
    note(f"its results come home with {again(args, '--fetch')}")
    return code


def find_run(args: argparse.Namespace) -> tuple[str, Run]:
    """(the tree over there, the run that is meant): by its name, or the only one; sets args.name."""
    tree, runs = probe(args)
    if not runs:
        raise UserError(f"no run was started in {args.remote.path(args.remote.folder)}")
    if args.name is None and len(runs) == 1:
        args.name = next(iter(runs))
    if args.name not in runs:
        told = ", ".join(f"{run.name} ({f'ended with {run.state}' if run.state.isdecimal() else run.state})"
                         for run in runs.values())
        problem = f"no run {args.name} there" if args.name else "which run? --name NAME"
        raise UserError(f"{problem}; there are: {told}")
    return tree, runs[args.name]


def stop(args: argparse.Namespace) -> int:
    """0 once the run has ended by this signal or is not running at all; otherwise its exit code."""
    _, run = find_run(args)
    if run.state != "running":
        note(f"{args.name} is not running")
        report(args)
        return 0
    run_there(args.remote, program(STOP, tree=args.remote.folder, name=args.name))
    note(f"sent SIGTERM to {args.name}; it ends when it has saved (Ctrl-C: do not wait for that)")
    code = follow(args, "0")
    return 0 if code == 128 + signal.SIGTERM else code


def fetch_commands(args: argparse.Namespace, tree: str, run_dir: str) -> list[list[str]]:
    """Nothing is deleted here. What is still being written, *.partial, stays there."""
    # Absolute: rsync takes a colon in front of the first slash for the end of a host's name.
    home = os.path.abspath(args.to or TREE / "runs" / f"{args.name}@{args.remote.host.replace(':', '-')}")
    command = ["rsync", "-rltz", "-s", "--partial", "-e", shlex.join(args.remote.ssh)]
    options = ["--exclude=/lock", "--exclude=*.partial"]
    options += [] if args.checkpoints else ["--exclude=/checkpoints"]
    options += ["--info=progress2"] if sys.stderr.isatty() else []
    run_path = run_dir if run_dir.startswith("/") else f"{tree}/{run_dir}"
    return [[*command, *options, args.remote.path(f"{run_path}/"), f"{home}/"],
            [*command, args.remote.path(f"{tree}/.deploy/{args.name}/"), f"{home}/deploy/"]]


def fetch(args: argparse.Namespace) -> int:
    tree, run = find_run(args)
    copy_run, copy_logs = fetch_commands(args, tree, run.folder)
    Path(copy_run[-1]).mkdir(parents=True, exist_ok=True)
    rsync(copy_logs)
    look = 'cd -- "$tree" && [[ ! -d $run_dir ]] || say exists'
    if not run_there(args.remote, program(look, tree=tree, run_dir=run.folder)):
        raise UserError(f"{args.name} ({run.state}) has no {run.folder} yet; its log is in {copy_logs[-1]}")
    rsync(copy_run)
    names = sorted(path.name + "/" * path.is_dir() for path in Path(copy_run[-1]).iterdir())
    note(f"{args.name} ({run.state}): {', '.join(names)} are in {copy_run[-1]}")
    return 0


def show_commands(args: argparse.Namespace) -> int:
    """--dry-run of what follows, ends or fetches a run."""
    args.name = args.name or "NAME"
    tree = args.remote.folder
    if args.fetch:
        for command in fetch_commands(args, tree, args.run_dir if args.words else "CHECKPOINT_DIR"):
            print(shlex.join(command))
        return 0
    for text in [STOP] * args.stop + [FOLLOW]:
        body = program(text, tree=tree, name=args.name, lines=str(ATTACH_LINES if args.attach else 0))
        print(f"{shlex.join(remote_command(args.remote))} <<'END'\n{body}END")
    return 0


def act(args: argparse.Namespace) -> int:
    if args.dry_run:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for `| head`
        return start(args) if args.is_start else show_commands(args)
    with shared_login(args.remote):
        if args.is_start:
            return start(args)
        if args.fetch:
            return fetch(args)
        if args.stop:
            return stop(args)
        find_run(args)
        note(f"the log of {args.name}; Ctrl-C leaves it running")
        return follow(args, str(ATTACH_LINES))


def main() -> int:
    args = parse_args(sys.argv[1:])
    # As Ctrl-C does, so that the shared login is closed when a terminal or a job control ends this program.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)
    try:
        return act(args)
    except UserError as error:
        note(str(error))
        return error.code
    except KeyboardInterrupt:
        note("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
