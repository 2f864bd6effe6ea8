"""The launcher of one node: which command it makes of its arguments and surroundings, how it installs.

It runs for real, in copies beside small scripts, so that no test trains anything or needs the network.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import venv
import zipfile

import pytest
from helpers import REPO
from quick_runs import free_port

# Prints how it was called. The first one relaunches itself as the training scripts do, so it has their flag.
RELAUNCHES = """
import json, os, sys
"--nproc"
if "--help" in sys.argv:
    print("flags of this script")
print(json.dumps({"argv": sys.argv, "cwd": os.getcwd(), "omp": os.environ.get("OMP_NUM_THREADS")}))
"""
PLAIN = """
# torchrun --nproc-per-node 2 plain.py
import os
os.write(1, f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}\\n".encode())  # whole, unlike print's
"""
CPU = {"CUDA_VISIBLE_DEVICES": ""}
LAUNCHERS = ("launch_single_node.sh", "launch_multi_node.sh", "launch_slurm.sh")


@pytest.fixture
def project(tmp_path):
    """A folder with the launcher, scripts that print how they were called, and a requirement that is met."""
    folder = tmp_path / "a project"  # with a space, since people's folders have them
    folder.mkdir()
    shutil.copy(REPO / "launch_single_node.sh", folder)
    (folder / "tools").mkdir()
    shutil.copy(REPO / "tools/check_flags.py", folder / "tools")
    (folder / "tools/make_stdlib_data.py").write_text("print('made')")
    (folder / "requirements.txt").write_text("# a comment\ntqdm>=4.0,<99  # another\n")
    (folder / "train_llm.py").write_text(RELAUNCHES)
    (folder / "plain.py").write_text(PLAIN)
    return folder


def launch(folder, *args, cwd=None, code=0, name="launch_single_node.sh", **env):
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHON": sys.executable, **env}
    result = subprocess.run(
        [str(folder / name), *args], cwd=cwd or folder, text=True, capture_output=True,
        env={key: value for key, value in env.items() if value is not None}, timeout=180,
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result


def command_of(folder, *args, **env):
    """The tokens that a dry run prints for the final command, less the environment in front."""
    lines = launch(folder, *args, DRY_RUN="1", **env).stdout.splitlines()
    assert len(lines) == 1, lines
    return [token for token in shlex.split(lines[0]) if not token.startswith("OMP_NUM_THREADS=")]


def num_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def test_without_arguments_it_trains_the_quickstart(project):
    config = str(project / "configs/train_llm/quickstart.yaml")
    script = str(project / "train_llm.py")
    expected = [sys.executable, script, "--nproc", "2", "--config", config]
    assert command_of(project, NPROC="2", **CPU) == expected
    assert (REPO / "configs/train_llm/quickstart.yaml").is_file()
    assert "made" in launch(project, NPROC="2", **CPU).stderr  # its data
    assert "made" not in launch(project, "--x", NPROC="2", **CPU).stderr


def test_arguments_pass_through_unchanged(project):
    args = ["--name", "two words", "--pattern", "*.py $HOME 'x' \"y\" \\", "--empty", "", "--lr=3e-4"]
    assert command_of(project, *args, NPROC="3")[-len(args):] == args
    # What runs gets the same as what was printed.
    printed, record = launch(project, *args, NPROC="3").stdout.splitlines()
    assert json.loads(record)["argv"] == [str(project / "train_llm.py"), "--nproc", "3", *args]
    assert shlex.split(printed)[-len(args):] == args


def test_the_callers_folder_is_kept(project, tmp_path):
    record = json.loads(launch(project, "--x", "1", cwd=tmp_path, **CPU).stdout.splitlines()[-1])
    assert record["cwd"] == str(tmp_path)


def test_another_script_by_its_name(project, tmp_path):
    shutil.copy(project / "train_llm.py", project / "train_other.py")
    beside = [sys.executable, str(project / "train_other.py"), "--nproc", "2", "--x"]
    assert command_of(project, "train_other.py", "--x", cwd=tmp_path, NPROC="2") == beside
    # A file in the caller's own folder comes first, as with any other command.
    shutil.copy(project / "train_llm.py", tmp_path / "train_other.py")
    own = [sys.executable, "train_other.py", "--nproc", "2"]
    assert command_of(project, "train_other.py", cwd=tmp_path, NPROC="2") == own
    assert "there is no script" in launch(project, "absent.py", code=2).stderr


def test_a_script_that_does_not_relaunch_itself_goes_through_torchrun(project):
    assert command_of(project, "plain.py", "--x", NPROC="2")[1:] == [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "plain.py", "--x"
    ]


def test_torchrun_really_starts_the_processes(project):
    lines = launch(project, "plain.py", NPROC="2", **CPU).stdout.splitlines()[1:]
    assert sorted(lines) == ["rank 0 of 2", "rank 1 of 2"]


@pytest.mark.parametrize("args", [
    ["--nproc", "3"], ["--nproc=3"], ["--gpu-ranks", "0,1,2"], ["--gpu-ranks=0,1,2"],
    ["--lr", "1", "--nproc", "3"],
])
def test_the_arguments_own_number_of_processes_wins(project, args):
    assert command_of(project, *args, NPROC="5") == [sys.executable, str(project / "train_llm.py"), *args]


@pytest.mark.parametrize("line", ["nproc: 3", "gpu_ranks: 0,1,2", "gpu-ranks: '0,1,2'  # three"])
def test_a_configs_own_number_of_processes_wins(project, line):
    (project / "saved.yaml").write_text(f"from_scratch: true\n{line}\n")
    for args in (["--config", "saved.yaml"], ["--config=saved.yaml"]):
        assert command_of(project, *args, NPROC="5") == [sys.executable, str(project / "train_llm.py"), *args]
        assert command_of(project, *args, "--nproc", "2", NPROC="5")[-2:] == ["--nproc", "2"]


@pytest.mark.parametrize(("visible", "count"), [
    ("0", 1), ("0,3", 2), ("4,5,6", 3), ("0,1,-1,2", 2), ("GPU-1a-17,GPU-2b-18", 2),
])
def test_one_process_for_each_visible_gpu(project, visible, count):
    assert command_of(project, "--x", CUDA_VISIBLE_DEVICES=visible)[2:4] == ["--nproc", str(count)]
    assert command_of(project, "--x", CUDA_VISIBLE_DEVICES=visible, NPROC="7")[2:4] == ["--nproc", "7"]


@pytest.mark.parametrize("visible", ["", "-1"])
def test_processes_on_the_cpu_where_no_gpu_is_visible(project, visible):
    result = launch(project, "--x", DRY_RUN="1", CUDA_VISIBLE_DEVICES=visible)
    expected = 2 if num_cores() > 1 else 1
    assert f"--nproc {expected} --x" in result.stdout
    assert "no GPU" in result.stderr


@pytest.mark.gpu
def test_all_gpus_of_the_machine_are_found(project):
    import torch

    assert command_of(project, "--x")[2:4] == ["--nproc", str(torch.cuda.device_count())]


def test_bad_number_of_processes(project):
    for nproc in ("0", "two", "-1", "1.5"):
        assert "NPROC is a number" in launch(project, code=2, NPROC=nproc).stderr
    # One in the arguments is the script's to judge.
    assert command_of(project, "--nproc", "two")[-2:] == ["--nproc", "two"]


def test_restarts(project):
    """By a variable that torchrun reads, whoever starts it; with a new store for each start."""
    for args in (["--x"], ["plain.py", "--x"]):
        assert command_of(project, *args, MAX_RESTARTS="2", NPROC="2")[:3] == [
            "PET_MAX_RESTARTS=2", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", sys.executable]
        for none in ({}, {"MAX_RESTARTS": "0"}):
            assert command_of(project, *args, NPROC="2", **none)[0] == sys.executable
    assert "MAX_RESTARTS is a number" in launch(project, code=2, MAX_RESTARTS="two").stderr
    once = 'import pathlib, sys\ndied = pathlib.Path(f"died-{os.environ[\'RANK\']}")\n'
    once += "if not died.exists():\n    died.touch()\n    sys.exit(1)\n"
    (project / "plain.py").write_text(PLAIN.replace("import os\n", "import os\n" + once))
    lines = launch(project, "plain.py", NPROC="2", MAX_RESTARTS="2", **CPU).stdout.splitlines()[1:]
    assert {"rank 0 of 2", "rank 1 of 2"} <= set(lines)


def test_threads_are_divided_among_the_processes(project):
    def threads(*args, **env):
        return json.loads(launch(project, *args, **env).stdout.splitlines()[-1])["omp"]

    assert threads("--x", NPROC="1", **CPU) == str(num_cores())
    assert threads("--nproc", str(num_cores()), **CPU) == "1"
    assert threads("--x", NPROC="999", **CPU) == "1"
    assert threads("--x", NPROC="2", OMP_NUM_THREADS="5", **CPU) == "5"
    assert threads("--x", CUDA_VISIBLE_DEVICES="0,1") == "1"
    assert threads("--x", CUDA_VISIBLE_DEVICES="0") is None
    # The number of cores is not what OMP_NUM_THREADS says.
    assert ("--nproc 2" in launch(project, "--x", OMP_NUM_THREADS="1", **CPU).stdout) == (num_cores() > 1)


def test_the_printed_command_holds_the_environment_that_was_set(project):
    line = launch(project, "--x", NPROC="1", DRY_RUN="1", **CPU).stdout
    assert line.startswith(f"OMP_NUM_THREADS={num_cores()} ")
    pasted = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert json.loads(pasted.stdout)["omp"] == str(num_cores())


@pytest.mark.parametrize("args", [["--help"], ["train_llm.py", "--help"]])
def test_help_shows_the_launchers_usage_and_then_the_scripts(project, args):
    out = launch(project, *args).stdout
    assert out.index("Usage:") < out.index("DRY_RUN=1") < out.index("flags of this script")
    assert "set -euo" not in out and not any(line.startswith("#") for line in out.splitlines())
    # With more arguments it is the script's alone.
    assert "Usage:" not in launch(project, "--x", "--help", **CPU).stdout


def test_short_help(project):
    assert "Usage:" in launch(project, "-h").stdout


# What each launcher needs besides for a dry run on one machine, anywhere.
SURROUNDINGS = {
    "launch_single_node.sh": {"NPROC": "1"},
    "launch_multi_node.sh": {"NODE_RANK": "0", "NNODES": "1", "MASTER_PORT": str(free_port())},
    "launch_slurm.sh": {"SLURM_NNODES": "1"},
}
CHECKED = """
import argparse, tqdm
print("imported")
def parse_args(*argv):
    parser = argparse.ArgumentParser(prog="train_llm.py")
    parser.add_argument("--nproc")
    parser.add_argument("--lr", type=float)
    parser.parse_args(*argv)
if __name__ == "__main__":
    print("started")
"""


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_dry_run_checks_the_scripts_flags(project, name):
    """By its parse_args, with or without an argument; what has none is neither checked nor run."""
    shutil.copy(REPO / name, project)
    env = {**SURROUNDINGS[name], **CPU, "DRY_RUN": "1"}
    for source in (CHECKED, CHECKED.replace("*argv", "")):
        (project / "train_llm.py").write_text(source)
        wrong = launch(project, "--lr", "1", "--lrr", "two words", code=2, name=name, **env)
        assert "train_llm.py: error: unrecognized arguments: --lrr two words" in wrong.stderr
        right = launch(project, "--lr", "1", name=name, **env)
        assert right.stdout.splitlines()[1:] == ["imported"]
    for other in (CHECKED.replace("if __name__", "if '__main__'"), CHECKED.replace("parse_args(", "parse(")):
        (project / "train_llm.py").write_text(other)
        assert len(launch(project, "--lrr", name=name, **env).stdout.splitlines()) == 1
    assert not list(project.rglob("__pycache__"))


def test_a_dry_run_checks_the_training_scripts():
    for name, script in zip(LAUNCHERS, ("train_llm.py", "train_gsm8k_fsdp2.py", "tools/doctor.py")):
        env = {**SURROUNDINGS[name], **CPU, "DRY_RUN": "1"}
        wrong = launch(REPO, script, "--lerning-rate", "1", code=2, name=name, **env)
        assert "unrecognized arguments: --lerning-rate 1" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_dry_run_needs_no_torch(project, name):
    venv.create(project / "bare", with_pip=False)
    python = str(project / "bare/bin/python")
    shutil.copy(REPO / name, project)
    (project / "train_llm.py").write_text(CHECKED)
    result = launch(project, "--lrr", name=name, PYTHON=python, DRY_RUN="1", **SURROUNDINGS[name], **CPU)
    assert f"{python} has no torch, so the flags are not checked" in result.stderr
    assert result.stdout.splitlines()[-1].endswith("train_llm.py --lrr" if "single" not in name else "--lrr")


def test_an_interpreter_that_is_not_there(project):
    assert "no /nowhere/python" in launch(project, code=1, PYTHON="/nowhere/python").stderr


# ----------------------------------------------------------------------------------------------------
# Missing packages: real environments, and a real package that pip takes from a folder

@pytest.fixture
def wheels(tmp_path):
    """A folder with the one package that the project below asks for, in two versions."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for version in ("1.0", "2.0"):
        info = f"tiny_package-{version}.dist-info"
        with zipfile.ZipFile(folder / f"tiny_package-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr("tiny_package.py", f"version = '{version}'\n")
            metadata = f"Metadata-Version: 2.1\nName: tiny-package\nVersion: {version}\n"
            wheel.writestr(f"{info}/METADATA", metadata)
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture
def bare(project, wheels):
    """The project, asking for a package that this test's Python lacks; the environment that offers it."""
    (project / "requirements.txt").write_text("tiny-package>=1.0,<2\n")
    # pip's own variables: no index and no settings of this machine, just the folder.
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels.as_uri(), "PIP_CONFIG_FILE": os.devnull}
    return project, {**offline, **CPU}


def test_missing_packages_dry_run_shows_what_it_would_do(bare):
    project, env = bare
    result = launch(project, "--x", NPROC="2", DRY_RUN="1", **env)
    assert "lacks tiny-package>=1.0" in result.stderr
    commands = [shlex.split(line) for line in result.stdout.splitlines()]
    venv, python = str(project / ".venv"), str(project / ".venv/bin/python")
    requirements = str(project / "requirements.txt")
    assert commands[0] == [sys.executable, "-m", "venv", "--without-pip", venv]
    assert commands[1] == [python, "-m", "ensurepip", "--default-pip"]
    assert commands[2] == [python, "-m", "pip", "install", "--quiet", "-r", requirements]
    assert commands[3][1:] == [python, str(project / "train_llm.py"), "--nproc", "2", "--x"]
    assert not (project / ".venv").exists()


def test_missing_packages_are_installed_once_and_completed_when_interrupted(bare, wheels):
    project, env = bare
    (project / "train_llm.py").write_text(RELAUNCHES + "import tiny_package; print(tiny_package.version)")
    first = launch(project, "--x", **env)
    assert first.stdout.splitlines()[-1] == "1.0"  # the newest that requirements.txt admits
    # The next time .venv is found to have everything, with PYTHON named or not, and nothing is installed.
    for python in (sys.executable, None):
        again = launch(project, "--x", **{**env, "PYTHON": python, "PIP_FIND_LINKS": "/nowhere"})
        assert again.stdout.splitlines()[-1] == "1.0" and "install" not in again.stdout
    # As after an interruption: .venv is there, the package is not.
    python = str(project / ".venv/bin/python")
    subprocess.run([python, "-m", "pip", "uninstall", "-qy", "tiny-package"], check=True)
    completed = launch(project, "--x", **{**env, "PYTHON": None})
    assert completed.stdout.splitlines()[-1] == "1.0" and "-m venv" not in completed.stdout
    # A version below the one asked for counts as missing.
    (project / "requirements.txt").write_text("tiny-package>=1.5\n")
    newer = launch(project, "--x", **{**env, "PYTHON": None})
    assert newer.stdout.splitlines()[-1] == "2.0"
    # And a package that pip cannot get is an error in words, with nothing run.
    (project / "requirements.txt").write_text("tiny-package>=3\n")
    failed = launch(project, "--x", code=1, **{**env, "PYTHON": None})
    assert "pip could not install" in failed.stderr and "argv" not in failed.stdout


def test_help_installs_nothing(bare):
    project, env = bare
    result = launch(project, "--help", **env)
    assert "Usage:" in result.stdout and "once they are installed" in result.stderr
    assert not (project / ".venv").exists()


# ----------------------------------------------------------------------------------------------------
# The real thing, and the scripts around it

def test_the_repositorys_own_requirements_are_met_here(tmp_path):
    # What pip installed for these tests satisfies the launcher's own reading of requirements.txt.
    result = launch(REPO, DRY_RUN="1", NPROC="1", HOME=str(tmp_path), **CPU)
    assert "lacks" not in result.stderr
    assert str(REPO / "train_llm.py") in result.stdout and "-m pip" not in result.stdout


def test_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.sh", "*.sbatch", ".ci/run"],
        cwd=REPO, capture_output=True, text=True, check=True,
    ).stdout.splitlines()
    assert {*LAUNCHERS, "tests/run.sh", ".ci/run"} <= set(tracked)
    result = subprocess.run(["shellcheck", *tracked], cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_ci_runs_every_test():
    lines = (REPO / ".ci/run").read_text().splitlines()
    code = [line for line in lines if line and not line.startswith("#")]
    assert lines[0] == "#!/usr/bin/env bash" and code[0] == "set -euo pipefail"
    assert code[-1] == "exec bash tests/run.sh --all"
    for script in (".ci/run", *LAUNCHERS, "tests/run.sh"):
        assert os.access(REPO / script, os.X_OK), script


def test_the_launchers_look_alike():
    """Header, functions that print, order of the sections; and each explains what helps when NCCL hangs."""
    helpers = []
    for name in LAUNCHERS:
        text = (REPO / name).read_text()
        lines = text.splitlines()
        assert lines[0] == "#!/usr/bin/env bash" and "set -euo pipefail" in lines
        header = text.partition("set -euo pipefail")[0]
        for said in ("Usage:", "Environment", "DRY_RUN=1", "PYTHON=", "OMP_NUM_THREADS=4", "MAX_RESTARTS=3"):
            assert said in header, (name, said)
        for said in ("NCCL_DEBUG=INFO", "NCCL_SOCKET_IFNAME=", "NCCL_IB_DISABLE=1", "tools/doctor.py"):
            assert said in text, (name, said)
        sections = [line for line in lines if line.startswith(("# 1. ", "# 2. ", "# 3. "))]
        assert [section.split()[2].strip(":") for section in sections] == ["Script", "Python", "Processes"]
        starts = ("note() ", "die() ", "usage_error() ", "show() ", "# Notes go")
        helpers.append([line for line in lines if line.startswith(starts)])
    assert len(helpers[0]) == 5 and helpers[0] == helpers[1] == helpers[2]
