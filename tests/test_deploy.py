"""Deployment over a real ssh: what is copied, what outlives a connection, how a run ends and comes home."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ENGLISH, REPO, make_tokenizer, read_metrics
from sshd import free_port, skip_without_sshd, sshd

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
    with sshd(folder / "ssh d") as server:
        remote = server["home"] / "fsdp2" / "a project"
        yield SimpleNamespace(tree=tree, folder=folder, remote=remote, **server)
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
                            stdin=subprocess.DEVNULL)
    assert result.returncode == code, result.stdout + result.stderr
    return result


def start_deploy(box, *args):
    """deploy.py in the background, as leader of a process group of its own."""
    # Tests that a shell has put into the background ignore SIGINT, and so would what they start.
    return subprocess.Popen(command(box, *args), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            stdin=subprocess.DEVNULL, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def kill(process):
    """SIGKILL to all that belongs to it here, its ssh too."""
    os.killpg(process.pid, signal.SIGKILL)
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

def test_a_training_outlives_its_connection_goes_on_and_comes_home(box):
    """All of deploy.py is killed; later Ctrl-C stops the run, and the same command continues it."""
    args = ["train_llm.py", *TINY, "--batch-size", "2", "--nproc", "2", "--checkpoint-dir", "runs/tiny one",
            "--checkpoint-interval", "1000000", "--max-steps"]
    named = ["--name", "tiny"]
    process = start_deploy(box, *named, *args, "100000")
    assert "--name tiny --attach" in read_until(process, r"step +3\b")
    kill(process)
    refused = run_deploy(box, *named, *args, "100000", code=1)
    assert "tiny is running there already: --attach follows it" in refused.stderr

    attached = start_deploy(box, *named, "--attach")
    read_until(attached, r"step +\d")
    os.killpg(attached.pid, signal.SIGINT)  # as Ctrl-C in a terminal, which reaches the whole group
    assert "tiny goes on; python tools/deploy.py" in attached.communicate(timeout=60)[0]
    assert attached.returncode == 130
    stopped = run_deploy(box, *named, "--stop")
    assert "tiny ended with exit code 143" in stopped.stderr
    assert "tiny is not running" in run_deploy(box, *named, "--stop").stderr

    process = start_deploy(box, *named, *args, "100000")
    said = read_until(process, r"step +\d")
    os.killpg(process.pid, signal.SIGINT)
    said += process.communicate(timeout=60)[0]
    assert "sent SIGTERM to tiny: it saves and ends" in said and "tiny ended with exit code 143" in said
    assert process.returncode == 143
    assert re.search(r"resumed.*step_\d+", said)

    step = read_metrics(box.remote / "runs/tiny one")[-1]["step"]
    run_deploy(box, *named, *args, str(step + 2))
    run_deploy(box, *named, "--fetch")
    home = box.tree / "runs" / "tiny@127.0.0.1"
    assert [row["step"] for row in read_metrics(home)] == list(range(1, step + 3))
    for name in ("summary.json", "config.yaml", "hf/model.safetensors", "log"):
        assert (home / name).stat().st_size > 0, name
    assert not (home / "checkpoints").exists()


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
    folder = box.remote / ".deploy/echo"
    kept = [path.read_text() for path in folder.iterdir() if path.is_file() and path.name != "log"]
    assert len(kept) >= 3 and not [text for text in [*kept, result.stderr] if "SECRET" in text]


def test_the_log_goes_on_with_the_next_start(box):
    for word in ("one", "two"):
        told = run_deploy(box, "--name", "twice", "echo.py", word).stdout.splitlines()
        assert [json.loads(line)["argv"][-1] for line in told if line.startswith("{")] == [word]
    log = (box.remote / ".deploy/twice/log").read_text()
    assert log.count('"argv"') == 2
    assert run_deploy(box, "--name", "twice", "--attach").stdout == log


def test_secrets_checkpoints_and_ignored_files_stay_here(box):
    secret = [".env", "keys/server.pem", "id_rsa", "id_ed25519", "hf_token", ".hf_token.txt",
              "deploy-token.json", ".netrc", ".aws/config", "My_Secrets.yaml"]
    written = ["old/step_000010/progress.json", "__0_0.distcp"]
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
    assert re.search(r"not copied, .* secrets or checkpoints: .*\.aws/config, .*old/step_000010/", said)
    assert "git ignores it: data_cache/ids.bin (--copy data_cache/ids.bin takes it along)" in said
    asked = ["--copy", box.tree / "data_cache", "--copy", "id_rsa"]
    run_deploy(box, *asked, "--name", "more", "echo.py")
    assert (box.remote / "data_cache/ids.bin").is_file()
    assert not (box.remote / "id_rsa").exists()  # a name like a secret's stays one, whoever asks
    said = run_deploy(box, "--copy", "nowhere", "--name", "more", "echo.py", code=1).stderr
    assert "'nowhere' did not match any file" in said
    for name in secret:
        (box.tree / name).unlink()


def test_an_alias_leads_there(box):
    # Behind the --ssh that run_deploy gives, and so in its place.
    config = box.folder / "config"
    config.write_text(f'Host my-box\n    HostName 127.0.0.1\n    Port {box.port}\n    User {box.user}\n')
    options = box.options.replace("-F none", f"-F '{config}'")
    run_deploy(box, "--ssh=my-box", "--name", "alias", "echo.py", options=options)
    assert (box.remote / ".deploy/alias/log").is_file()
    nothing = run_deploy(box, "--ssh=my-box", "--name", "alias", "--fetch", code=1, options=options)
    assert re.search(r"alias/run.* failed: No such file", nothing.stderr)


# ----------------------------------------------------------------------------------------------------
# 3. What goes wrong

def test_a_wrong_address_key_or_host_is_told(box):
    def complaint(*args, options=None, code=255):
        return run_deploy(box, "--name", "x", "--attach", *args, options=options, code=code).stderr

    unknown = box.options.replace("known_hosts", "nobody") + " -o GlobalKnownHostsFile=none"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", box.folder / "other"], check=True)
    known = f"-o 'UserKnownHostsFile=\"{box.folder}/ssh d/known_hosts\"'"
    other = f"-F none -i '{box.folder}/other' -o IdentitiesOnly=yes {known}"
    assert "Connection refused" in complaint(f"--ssh=127.0.0.1:{free_port()}")
    assert "Permission denied" in complaint(options=other)
    assert "Host key verification failed" in complaint(options=unknown)
    assert "Could not resolve hostname" in complaint("--ssh=no.such.host.invalid")
    assert "no run was started in elsewhere there" in complaint("--remote-dir", "elsewhere", code=1)
    assert not (box.home / "elsewhere").exists()
    run_deploy(box, "--name", "known", "echo.py")
    assert re.search("no run x there; there are: .*known", complaint(code=1))


def test_what_is_missing_there_is_named(box, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "mkdir", "rsync", "flock"):
        (folder / name).symlink_to(shutil.which(name))
    with sshd(tmp_path / "bare", PATH=str(folder)) as server:
        bare = SimpleNamespace(tree=box.tree, **server)
        assert "that machine has no setsid: install" in run_deploy(bare, "echo.py", code=1).stderr
        (folder / "rsync").unlink()
        assert "that machine has no rsync: install" in run_deploy(bare, "echo.py", code=1).stderr


def test_a_killed_run_is_not_taken_for_a_running_one(box):
    run_deploy(box, "--detach", "--name", "killed", "echo.py", "--wait")
    child = int((box.remote / ".deploy/killed/pid").read_text())
    wrapper = int(Path(f"/proc/{child}/stat").read_text().split(") ")[1].split()[1])
    os.kill(wrapper, signal.SIGKILL)
    # Its launcher still lives, and so does the run.
    assert "killed is running there already" in run_deploy(
        box, "--name", "killed", "echo.py", code=1).stderr
    os.kill(child, signal.SIGKILL)
    attached = run_deploy(box, "--attach", "--name", "killed", code=1)
    assert "killed ended without an exit code" in attached.stderr
    assert "killed is not running" in run_deploy(box, "--stop", "--name", "killed").stderr
    run_deploy(box, "--name", "killed", "echo.py")


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
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    os.kill(int(children[0]), signal.SIGTERM)  # its ssh, which then says 255
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 255 and "lost the connection to" in said and "but lost goes on" in said
    assert "lost ended with exit code 143" in run_deploy(box, "--stop", "--name", "lost").stderr


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
    args = deploy.parse_args(["--ssh", "h", "--copy", "a.py", "train_llm.py", "--checkpoint-dir=/data/run 1"])
    assert (args.name, args.run_dir, args.copy) == ("train_llm", "/data/run 1", ["a.py"])


@pytest.mark.parametrize("text, login, port", [
    ("root@host:22", "root@host", "22"), ("box", "box", None), ("a@b@host", "a@b@host", None)])
def test_addresses(text, login, port):
    args = deploy.parse_args(["--ssh", text, "--attach", "--name", "x", "--ssh-option", "-i 'a b'"])
    assert args.login == login and args.bash[:3] == ["ssh", "-i", "a b"]
    assert args.bash[3:5] == (["-p", port] if port else ["-o", "ConnectTimeout=20"])


@pytest.mark.parametrize("argv, message", [
    (["train_llm.py"], "required: --ssh"), (["--ssh", "h"], "config or script to run is missing"),
    (["--ssh", "h", ""], "config or script to run is missing"),
    (["--ssh", "", "train_llm.py"], "expected .USER"),
    (["--ssh", "h:", "train_llm.py"], "--ssh h:: expected"), (["--ssh", "::1", "train_llm.py"], "IPv6"),
    (["--ssh", "-oProxyCommand=x", "train_llm.py"], "expected one argument"),
    (["--ssh=-oProxyCommand=x", "train_llm.py"], "expected .USER@.HOST"),
    (["--ssh", "h", "nothing.py"], "nothing.py: no such file"),
    (["--ssh", "h", "README.md"], "neither a config"),
    (["--ssh", "h", "--max-steps=5", "train_llm.py"], "--max-steps=5: flags of the script go behind"),
    ([CONFIG, "--ssh", "h", "--max-steps", "5"], "flags of the script go behind"),
    (["--ssh", "h", "--attach"], "give the run a --name"),
    (["--ssh", "h", "--name", "a b", "--attach"], "give the run a --name"),
    (["--ssh", "h", "--env", "NOT_SET_HERE", "train_llm.py"], "NOT_SET_HERE: no variable that is set here"),
    (["--ssh", "h", "--attach", "--stop"], "not allowed with"),
    (["--ssh", "h", "--ssh-option=a'b", "train_llm.py"], "--ssh-option a'b: No closing quotation"),
    (["--ssh", "h", "--env=--", "train_llm.py"], "--env=--: a value is missing"),
    (["--ssh", "h", "--copy", "--", "train_llm.py"], "--copy: expected one argument"),
])
def test_wrong_arguments(argv, message, capsys, monkeypatch):
    monkeypatch.chdir(REPO)
    with pytest.raises(SystemExit) as ended:
        deploy.parse_args(argv)
    assert ended.value.code == 2 and re.search(message, capsys.readouterr().err)


def test_programs_for_the_other_machine_pass_shellcheck(tmp_path):
    if not shutil.which("shellcheck"):
        pytest.skip("needs shellcheck")
    for body in (deploy.PREPARE, deploy.FIND + deploy.START + deploy.FOLLOW, deploy.STOP, deploy.RUN):
        (tmp_path / "x.sh").write_text(f"#!/usr/bin/env bash\n{deploy.BEGIN}{body}")
        # Set in front of them: 2154. Not each uses every function: 2034, 2317, 2329.
        checked = subprocess.run(["shellcheck", "-e", "2154,2034,2317,2329", tmp_path / "x.sh"],
                                 capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout
