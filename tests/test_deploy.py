"""Deployment over a real ssh: what is copied, what outlives a connection, how a run ends and comes home."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ENGLISH, REPO, make_tokenizer, read_metrics, run_script
from sshd import free_port, has_ipv6, skip_without_sshd, sshd

sys.path.insert(0, str(REPO / "tools"))
import deploy  # noqa: E402

CONFIG = "configs/train_llm/quickstart.yaml"
# Started directly, not by torchrun, because its text has the flag of the scripts that relaunch themselves.
ECHO = """
import json, os, sys, time
"--nproc"
print(json.dumps({"argv": sys.argv[1:], "secret": os.environ.get("SECRET"), "cwd": os.getcwd()}), flush=True)
if "--wait" in sys.argv:
    time.sleep(600)
sys.exit(7 if "--fail" in sys.argv else 0)
"""
TINY = [
    "--from-scratch", "--model-size", "test", "--vocab-size", "512", "--dataset", "some texts.jsonl",
    "--tokenizer", "tokenizer", "--seq-len", "32", "--device", "cpu", "--no-mixed-precision", "--no-compile",
    "--max-lr", "1e-3", "--warmup-steps", "3", "--log-interval", "1", "--seed", "3",
]


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    """An sshd, and a small git checkout with deploy.py, a training script and its data."""
    skip_without_sshd()
    folder = tmp_path_factory.mktemp("deploy")
    tree = folder / "a project"  # with a space, since people's folders have them
    for name in ("launch_single_node.sh", "train_llm.py", "tools/deploy.py", CONFIG, ".gitignore"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / name, tree / name)
    (tree / "requirements.txt").write_text("tqdm\n")
    (tree / "echo.py").write_text(ECHO)
    (tree / "some texts.jsonl").write_text("".join(
        json.dumps({"text": " ".join(ENGLISH[(5 * i + j) % 4] for j in range(1 + i % 4))}) + "\n"
        for i in range(50)))
    make_tokenizer(tree / "tokenizer", 500)
    subprocess.run(["git", "init", "-q", tree], check=True)
    # Of its own, so that the connections of other tests are left alone; short, since sockets are made in it.
    with tempfile.TemporaryDirectory() as temp, sshd(folder / "ssh d") as server:
        remote = server["home"] / "fsdp2" / "a project"
        yield SimpleNamespace(tree=tree, folder=folder, remote=remote, temp=temp, **server)
        # What a test that failed has left running.
        for pid in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (pid / "cwd").readlink() == remote:
                    os.kill(int(pid.name), signal.SIGKILL)


def command(box, *args, options=None):
    variables = [f"PYTHON={sys.executable}", "OMP_NUM_THREADS=1", "HF_HUB_OFFLINE=1", "NPROC=1"]
    return [sys.executable, str(box.tree / "tools/deploy.py"), "--ssh", f"{box.user}@127.0.0.1:{box.port}",
            "--ssh-option", options or box.options, *(f"--env={variable}" for variable in variables),
            *map(str, args)]


def run_deploy(box, *args, code=0, options=None):
    """deploy.py to its end; `stderr` is what it says itself, `stdout` the log of the run."""
    result = subprocess.run(command(box, *args, options=options), capture_output=True, text=True, timeout=240,
                            stdin=subprocess.DEVNULL, env={**os.environ, "TMPDIR": box.temp})
    assert result.returncode == code, result.stdout + result.stderr
    return result


def start_deploy(box, *args):
    """deploy.py in the background, as leader of a process group of its own."""
    # Tests that a shell has put into the background ignore SIGINT, and so would what they start.
    return subprocess.Popen(command(box, *args), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            stdin=subprocess.DEVNULL, start_new_session=True,
                            env={**os.environ, "TMPDIR": box.temp},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def shared_logins(box):
    """The processes of this machine that hold a connection for this test's deploy.py open."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            if f"ssh: {box.temp}/".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def kill(box, process):
    """SIGKILL to all that belongs to it here, the shared login too."""
    os.killpg(process.pid, signal.SIGKILL)
    logins = shared_logins(box)
    assert logins
    for pid in logins:
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def read_until(process, pattern):
    """The output up to the first line that holds the pattern."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return "".join(lines)
    raise AssertionError(f"ended with {process.wait()} before {pattern}:\n{''.join(lines)}")


# ----------------------------------------------------------------------------------------------------
# 1. Trainings

def test_a_training_outlives_its_connection_and_comes_home(box):
    """Everything here that belongs to it is killed; two processes there, compared with one here."""
    tiny = [str(box.tree / word) if word in ("some texts.jsonl", "tokenizer") else word for word in TINY]
    pool = ThreadPoolExecutor()
    here = pool.submit(run_script, [
        *tiny, "--max-steps", 12, "--batch-size", 8, "--no-export", "--data-cache", box.folder / "cache",
        "--checkpoint-dir", box.folder / "straight"])
    process = start_deploy(box, "train_llm.py", *TINY, "--max-steps", "12", "--batch-size", "4",
                           "--nproc", "2", "--checkpoint-dir", "runs/tiny one")
    assert "--name tiny-one --attach" in read_until(process, r"python\S* train_llm\.py --from-scratch")
    kill(box, process)
    assert not (box.remote / ".deploy/tiny-one/0001/exit_code").exists()

    ended = run_deploy(box, "--attach", "--name", "tiny-one")
    assert "tiny-one ended with exit code 0 (finished)" in ended.stderr
    assert "runs/tiny one/checkpoints/step_000012" in ended.stderr
    run_deploy(box, "--fetch", "--name", "tiny-one")
    home, straight = box.tree / "runs" / "tiny-one@127.0.0.1", box.folder / "straight"
    here.result()
    losses, expected = ([row["train/loss"] for row in read_metrics(run)] for run in (home, straight))
    assert len(losses) == 12 and losses == pytest.approx(expected, rel=1e-5)
    for name in ("summary.json", "config.yaml", "hf/model.safetensors", "deploy/0001/log"):
        assert (home / name).stat().st_size > 0, name
    assert not (home / "checkpoints").exists()
    run_deploy(box, "--fetch", "--name", "tiny-one", "--checkpoints", "--to", box.folder / "all of it")
    assert (box.folder / "all of it" / "checkpoints" / "step_000012" / ".metadata").is_file()


def test_stop_saves_and_the_next_start_goes_on(box):
    args = ["train_llm.py", *TINY, "--no-export", "--batch-size", "2", "--nproc", "2", "--checkpoint-dir",
            "runs/long", "--checkpoint-interval", "1000000", "--max-steps"]
    process = start_deploy(box, *args, "100000")
    read_until(process, r"step +5\b")
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal, which reaches the whole group
    assert "long goes on" in process.communicate(timeout=60)[0] and process.returncode == 130

    refused = run_deploy(box, *args, "100000", code=1)
    assert "long is running there already: --attach follows it" in refused.stderr
    script = box.tree / "train_llm.py"
    script.write_text(script.read_text() + "# changed\n")
    refused = run_deploy(box, "echo.py", "--name", "another", code=1)
    assert re.search("long is running in .*project, where this changes train_llm.py: --force", refused.stderr)
    assert not (box.remote / "train_llm.py").read_text().endswith("# changed\n")
    run_deploy(box, "--force", "--name", "another", "echo.py")
    assert (box.remote / "train_llm.py").read_text().endswith("# changed\n")
    assert "which run? --name NAME; there are: " in run_deploy(box, "--attach", code=1).stderr

    stopped = run_deploy(box, "--stop", "--name", "long")
    match = re.search(r"long ended with exit code 143 \(SIGTERM\); newest checkpoint "
                      r"runs/long/checkpoints/step_(\d+)", stopped.stderr)
    assert match, stopped.stderr
    assert "long is not running" in run_deploy(box, "--stop", "--name", "long").stderr
    step = int(match[1])
    assert step >= 5
    again = run_deploy(box, *args, str(step + 2))
    assert re.search(rf"resumed.*step_{step:06d}", again.stdout)
    rows = read_metrics(box.remote / "runs/long")
    assert [row["step"] for row in rows] == list(range(1, step + 3))


# ----------------------------------------------------------------------------------------------------
# 2. What arrives there

def test_arguments_arrive_unchanged_and_the_exit_code_comes_back(box):
    words = ["--fail", "two  words", "it's", '"$HOME"', "`id`", "$(id)", "a\\b", "a\nb", "*", "!x", "ü", "",
             "~", "--"]
    result = run_deploy(box, "--name", "echo", "--env=SECRET=it's $1", "echo.py", *words, code=7)
    told = json.loads(result.stdout.splitlines()[-1])
    assert told == {"argv": ["--nproc", "1", *words], "secret": "it's $1", "cwd": str(box.remote.resolve())}
    assert "echo ended with exit code 7" in result.stderr
    # A value of --env stays in memory, over there and here.
    kept = [path.read_text() for path in (box.remote / ".deploy/echo/0001").iterdir() if path.name != "log"]
    assert len(kept) >= 5 and not [text for text in [*kept, result.stderr] if "SECRET" in text]
    nothing = run_deploy(box, "--fetch", "--name", "echo", code=1)
    assert "echo (7) has no checkpoints yet; its log is in" in nothing.stderr


def test_every_start_keeps_its_log_and_logs_in_once(box):
    def num_logins():
        return (box.folder / "ssh d/sshd.log").read_text().count("Accepted publickey")

    before = num_logins()
    for word in ("one", "two"):
        run_deploy(box, "--name", "twice", "echo.py", word)
    assert num_logins() == before + 2 and not shared_logins(box)
    logs = sorted((box.remote / ".deploy/twice").glob("*/log"))
    assert [json.loads(log.read_text().splitlines()[-1])["argv"][-1] for log in logs] == ["one", "two"]


def test_secrets_checkpoints_and_ignored_files_stay_here(box):
    secret = [".env", "keys/server.pem", "id_rsa", "id_ed25519", "hf_token", ".hf_token.txt",
              "deploy-token.json", ".netrc", ".aws/config", "My_Secrets.yaml"]
    written = ["my run/command.txt", "my run/env.json", "my run/metrics.jsonl",
               "old/step_000010/__0_0.distcp"]
    ignored = ["runs/x/metrics.jsonl", "wandb/log", "data_cache/ids.bin"]
    wanted = ["notes.txt", "configs/train_llm/mine.yaml", "identity.py", "a/tokenizer_config.json",
              "keyboard.md", "a/added_tokens.json", "environment.md"]
    for name in secret + written + ignored + wanted:
        (box.tree / name).parent.mkdir(parents=True, exist_ok=True)
        (box.tree / name).write_text("x")
    (box.tree / "a/link").symlink_to("../notes.txt")
    said = run_deploy(box, "--detach", "--name", "files", "echo.py", "data_cache/ids.bin").stderr
    assert not [name for name in secret + written + ignored if (box.remote / name).exists()]
    assert not [name for name in wanted if not (box.remote / name).is_file()]
    assert (box.remote / "a/link").is_symlink()
    assert re.search(r"not copied, look like secrets: .*\.aws/config.* and \d+ more\n", said)
    assert "not copied, checkpoints and run folders: my run, old/step_000010/__0_0.distcp\n" in said
    assert "git ignores it: data_cache/ids.bin (--copy data_cache/ids.bin takes it along)" in said
    asked = ["--copy", box.tree / "data_cache", "--copy", box.tree / "id_rsa"]
    run_deploy(box, *asked, "--name", "more", "echo.py")
    assert (box.remote / "data_cache/ids.bin").is_file()
    assert not (box.remote / "id_rsa").exists()  # a name like a secret's stays one, whoever asks
    for name in secret:
        (box.tree / name).unlink()


def test_dry_run_prints_and_does_nothing(box):
    before = sorted(path for path in box.remote.parent.rglob("*"))
    shown = run_deploy(box, "--dry-run", "--env=SECRET=hidden", "--remote-dir", "/nowhere/at all",
                       "--name", "dry", "echo.py", "two words", options="-p 1").stdout
    assert f"{box.user}@127.0.0.1:/nowhere/at all/" in shown
    assert "echo.py 'two words'" in shown.replace("'\"'\"'", "'")
    assert "hidden" not in shown and "export SECRET=" in shown
    for mode in ("--attach", "--stop", "--fetch"):
        assert run_deploy(box, "--dry-run", mode, "--name", "dry", options="-p 1").stdout
    assert before == sorted(path for path in box.remote.parent.rglob("*"))


def test_aliases_and_ipv6_addresses_lead_there(box):
    # Behind the --ssh that run_deploy gives, and so in its place.
    config = box.folder / "config"
    config.write_text(f'Host my-box\n    HostName 127.0.0.1\n    Port {box.port}\n    User {box.user}\n')
    alias = ["--ssh=my-box", "--name", "alias"]
    options = box.options.replace("-F none", f"-F '{config}'")
    run_deploy(box, *alias, "echo.py", options=options)
    run_deploy(box, *alias, "--fetch", "--to", box.folder / "x", code=1, options=options)
    assert (box.folder / "x/deploy/0001/log").is_file()
    if has_ipv6():
        run_deploy(box, f"--ssh={box.user}@[::1]:{box.port}", "--name", "six", "echo.py")
        assert (box.remote / ".deploy/six").is_dir()


# ----------------------------------------------------------------------------------------------------
# 3. What goes wrong

def test_a_wrong_address_key_or_host_is_one_line(box):
    def complaint(*args, options=None, code=255):
        lines = run_deploy(box, *args, options=options, code=code).stderr.splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    there = f"{box.user}@127.0.0.1:{box.port}"
    nobody = f"--ssh=127.0.0.1:{free_port()}"
    assert "Connection refused (nothing listens there" in complaint("--attach", nobody)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", box.folder / "other"], check=True)
    known = f"-o 'UserKnownHostsFile=\"{box.folder}/ssh d/known_hosts\"'"
    other = f"-F none -i '{box.folder}/other' -o IdentitiesOnly=yes {known}"
    refused = complaint("--attach", options=other)
    assert re.search(f"cannot connect to {there}: .*Permission denied .*KEYFILE", refused)
    unknown = box.options.replace("known_hosts", "nobody") + " -o GlobalKnownHostsFile=none"
    assert "log in once by hand to check it" in complaint("--attach", options=unknown)
    wrong = unknown.replace("nobody", "wrong_hosts")
    (box.folder / "ssh d/wrong_hosts").write_text(
        f"[127.0.0.1]:{box.port} " + (box.folder / "other.pub").read_text())
    assert "another machine has this address" in complaint("--attach", options=wrong)
    assert "Could not resolve hostname" in complaint("--attach", "--ssh=no.such.host.invalid")
    assert "no run nobody there; there are: " in complaint("--stop", "--name", "nobody", code=1)
    assert "no run was started in" in complaint("--attach", "--remote-dir", "elsewhere", code=1)
    assert not (box.home / "elsewhere").exists()


def test_what_is_missing_there_is_named(box, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "cat", "mkdir", "wc", "rsync"):
        (folder / name).symlink_to(shutil.which(name))
    with sshd(tmp_path / "bare", PATH=str(folder)) as server:
        bare = SimpleNamespace(tree=box.tree, temp=box.temp, **server)
        assert "has no setsid: install util-linux" in run_deploy(bare, "echo.py", code=1).stderr
        (folder / "setsid").symlink_to(shutil.which("setsid"))
        assert "has no /no/python: install Python 3.10" in run_deploy(
            bare, "--env=PYTHON=/no/python", "echo.py", code=1).stderr
        (folder / "rsync").unlink()
        assert "has no rsync: install it there" in run_deploy(bare, "echo.py", code=1).stderr
        (folder / "bash").unlink()
        assert "127.0.0.1 has no bash: install it there" in run_deploy(bare, "--attach", code=1).stderr


def test_a_killed_run_is_not_taken_for_a_running_one(box):
    run_deploy(box, "--detach", "--name", "killed", "echo.py", "--wait")
    start = box.remote / ".deploy/killed/0001"
    pids = [int((start / name).read_text().split()[0]) for name in ("wrapper", "child")]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    attached = run_deploy(box, "--attach", "--name", "killed", code=1)
    assert "killed ended without an exit code" in attached.stderr
    # As after a restart of the machine: the number belongs to another process now, which must be left alone.
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        (start / "child").write_text(f"{other.pid} 1\n")
        assert "killed is not running" in run_deploy(box, "--stop", "--name", "killed").stderr
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_stop_ends_what_the_launcher_waits_for(box):
    """A launcher that dies of the signal while pip installs packages must not leave pip behind."""
    launcher = box.tree / "launch_single_node.sh"
    kept = launcher.read_text()
    launcher.write_text("#!/usr/bin/env bash\nsleep 654\nexit 0\n")
    run_deploy(box, "--detach", "--name", "pip", "echo.py")
    launcher.write_text(kept)
    assert "pip ended with exit code 143" in run_deploy(box, "--stop", "--name", "pip").stderr
    left = [path for path in Path("/proc").glob("[0-9]*/cwd") if os.path.realpath(path) == str(box.remote)]
    deadline = time.monotonic() + 30
    while any(path.parent.exists() for path in left) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [path for path in left if path.parent.exists()]


def test_a_lost_connection_is_told_from_the_end_of_the_run(box):
    process = start_deploy(box, "--name", "lost", "echo.py", "--wait")
    read_until(process, '"argv"')
    for pid in shared_logins(box):
        os.kill(pid, signal.SIGKILL)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 255 and "lost the connection to 127.0.0.1, but lost goes on" in said
    stopped = run_deploy(box, "--stop", "--name", "lost")
    assert "lost ended with exit code 143 (SIGTERM); no checkpoint" in stopped.stderr


# ----------------------------------------------------------------------------------------------------
# 4. Arguments

def test_a_config_stands_for_its_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = deploy.parse_args([CONFIG, "--ssh", "root@host:2222", "--detach", "--", "--max-steps", "5"])
    assert args.words == ["train_llm.py", "--config", CONFIG, "--max-steps", "5"]
    assert (args.name, args.run_dir, args.detach) == ("quickstart", "runs/quickstart", True)
    # What is behind a script is the script's, also where deploy.py has such a flag.
    args = deploy.parse_args(["--ssh", "h", "--name=x", "train_llm.py", "--name", "y", "--config", CONFIG])
    assert args.words == ["train_llm.py", "--name", "y", "--config", CONFIG]
    assert (args.name, args.run_dir) == ("x", "runs/quickstart")
    args = deploy.parse_args(["--ssh", "h", "train_llm.py", "--checkpoint-dir=/data/run 1"])
    assert (args.name, args.run_dir) == ("data-run-1", "/data/run 1")
    assert deploy.parse_args(["--ssh", "h", "train_llm.py"]).name == "train_llm"


def test_gpus_of_a_config_reach_the_launcher(tmp_path, monkeypatch):
    monkeypatch.setattr(deploy, "TREE", tmp_path)
    (tmp_path / "configs/mine").mkdir(parents=True)
    (tmp_path / "mine.py").touch()
    config = tmp_path / "configs/mine/a.yaml"
    config.write_text("# GPUs\ngpu_ranks: '0,3'  # two\ncheckpoint-dir: out/a\n")
    words = ["mine.py", "--config", "configs/mine/a.yaml"]
    args = deploy.parse_args([str(config), "--ssh", "h"])
    assert args.words == [*words, "--gpu-ranks", "0,3"] and args.name == "out-a"
    args = deploy.parse_args([str(config), "--ssh", "h", "--", "--gpu-ranks=1"])
    assert args.words == [*words, "--gpu-ranks=1"]
    config.write_text('{"gpu-ranks": "0,3", "nproc": 2}')
    assert deploy.flag_value("nproc", words) == "2" and deploy.flag_value("gpu-ranks", words) == "0,3"


@pytest.mark.parametrize("text, login, port, path", [
    ("root@host:22", "root@host", "22", "root@host:x"), ("box", "box", None, "box:x"),
    ("me@[fe80::1%eth0]:2222", "me@fe80::1%eth0", "2222", "me@[fe80::1%eth0]:x"),
    ("me@::1", "me@::1", None, "me@[::1]:x"), ("[::1]", "::1", None, "[::1]:x"),
    ("ssh://root@host:40022", "root@host", "40022", "root@host:x"),
    ("a@b@host", "a@b@host", None, "a@b@host:x"),
])
def test_addresses(text, login, port, path):
    remote = deploy.parse_args(["--ssh", text, "--attach"]).remote
    assert (remote.login, remote.port, remote.path("x")) == (login, port, path)
    assert ("-p" in remote.ssh) == (port is not None)


@pytest.mark.parametrize("argv, message", [
    (["train_llm.py"], "--ssh .* is missing"), (["--ssh", "h"], "what to run is missing"),
    (["--ssh", "h:0", "--attach"], "'0' is not a port"), (["--ssh", "h:", "--attach"], "'' is not a port"),
    (["--ssh", "-oProxyCommand=x", "--attach"], "expected .USER@.HOST"),
    (["--ssh", "h", "nothing.py"], "nothing.py: no such file"),
    (["--ssh", "h", "README.md"], "neither a config"),
    (["--ssh", "h", "--max-steps", "5", "train_llm.py"], "--max-steps"),
    ([CONFIG, "--ssh", "h", "--max-steps", "5"], "flags of the script go behind a --"),
    (["--ssh", "h", "--name", "a b", "--attach"], "--name a b"),
    (["--ssh", "h", "--env", "NOT_SET_HERE", "train_llm.py"], "NOT_SET_HERE: is not set here"),
    (["--ssh", "h", "--attach", "--stop"], "not allowed with"),
])
def test_wrong_arguments(argv, message, capsys, monkeypatch):
    monkeypatch.chdir(REPO)
    with pytest.raises(SystemExit) as ended:
        deploy.parse_args(argv)
    assert ended.value.code == 2 and re.search(message, capsys.readouterr().err)


def test_programs_for_the_other_machine_pass_shellcheck(tmp_path):
    if not shutil.which("shellcheck"):
        pytest.skip("needs shellcheck")
    for body in (deploy.PROBE, deploy.START, deploy.FOLLOW, deploy.STOP, deploy.RUN):
        (tmp_path / "x.sh").write_text(f"#!/usr/bin/env bash\n{deploy.FUNCTIONS}{body}")
        # Set in front of them: 2154. Not each uses every function: 2034, 2317, 2329.
        checked = subprocess.run(["shellcheck", "-e", "2154,2034,2317,2329", tmp_path / "x.sh"],
                                 capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout
