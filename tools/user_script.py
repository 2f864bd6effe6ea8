"""For the programs of this folder: a Python that has torch, and the training script that they serve."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def find_torch() -> None:
    """Where this Python lacks torch, the program begins again with that of .venv beside the launchers."""
    if importlib.util.find_spec("torch"):
        return
    venv = ROOT / ".venv"
    if (venv / "bin/python").is_file() and Path(sys.prefix).resolve() != venv.resolve():
        os.execv(venv / "bin/python", [str(venv / "bin/python"), *sys.argv])
    sys.exit(f"{Path(sys.argv[0]).name}: error: {sys.executable} has no torch: use the Python of your "
             f"trainings, or start ./launch_single_node.sh once, which makes {venv}")


def take_script(argv: list[str], names: tuple[str, ...]) -> tuple[ModuleType, list[str]]:
    """(the script that argv begins with, else train_llm.py; the other words). It must define the `names`."""
    is_given = bool(argv) and argv[0].endswith(".py")
    path = Path(argv[0]) if is_given else ROOT / "train_llm.py"
    program = Path(sys.argv[0]).name
    if not path.is_file():
        sys.exit(f"{program}: error: there is no script {path}")
    spec = importlib.util.spec_from_file_location("training_script", path)
    script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
    spec.loader.exec_module(script)
    missing = [name for name in names if not hasattr(script, name)]
    if missing:
        sys.exit(f"{program}: error: {path} has no {', '.join(missing)}: name train_llm.py or a copy of it")
    return script, argv[is_given:]


find_torch()
