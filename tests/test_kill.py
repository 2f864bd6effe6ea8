"""benchmarks/kill_test.py in its short form: killed again and again, a training ends as the straight run."""

import json
import subprocess
import sys

import pytest
from helpers import REPO


def kill_test(*args):
    command = [sys.executable, REPO / "benchmarks/kill_test.py", *args]
    return subprocess.run(list(map(str, command)), text=True, capture_output=True, timeout=600)


def report(folder, *args):
    done = kill_test("--folder", folder, *args)
    log = folder / "killed.log"
    tail = log.read_text(errors="replace")[-4000:] if log.exists() else ""
    assert done.returncode == 0, done.stderr + tail
    summary = json.loads((folder / "report.json").read_text())
    assert done.stdout.strip() == (folder / "report.md").read_text().strip()
    return summary


@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
    """Kills of each target, among them some while starting and some around a save."""
    summary = report(tmp_path / "kills", "--kills", 6, "--seed", 5)
    kills = summary["kills"]
    assert len(kills) == 6 and set(summary["by_target"]) == {"rank", "all", "launcher", "total"}
    assert {kill["moment"] for kill in kills} == {"start", "save", "step"}
    assert summary["by_target"]["total"]["saving"] > 0
    assert sum(kill["checkpoints"] for kill in kills) == summary["checks"] > 0
    assert all(kill["lost_s"] > 0 and kill["step"] >= kill["newest"] for kill in kills)


@pytest.mark.slow
def test_torchrun_brings_a_killed_rank_back(tmp_path):
    summary = report(tmp_path / "kills", "--kills", 2, "--seed", 3, "--target", "rank",
                     "--restart-by", "torchrun")
    assert summary["by_target"]["total"]["kills"] == 2
    # Nobody but torchrun started anything again.
    assert (tmp_path / "kills/killed.log").read_text().count("=== start ") == 1


def test_arguments(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    from kill_test import parse_args
    (tmp_path / "file").touch()
    for argv, message in {
        ("--folder", str(tmp_path)): "already holds something: name a new folder",
        ("--kills", "0"): "--kills must be at least 1",
        ("--restart-by", "torchrun"): "needs --target rank",
        ("--steps", "5"): "--steps must be at least 30",
        ("--script", str(tmp_path / "none.py")): "there is no script",
    }.items():
        with pytest.raises(SystemExit) as ended:
            parse_args(list(argv))
        assert ended.value.code == 2 and message in capsys.readouterr().err
    assert parse_args(["--kills", "50", "--folder", str(tmp_path / "new")]).steps == 500
