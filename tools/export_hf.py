"""Turn a checkpoint of train_llm.py into a Hugging Face folder, on the CPU, without GPUs or other processes.

    python tools/export_hf.py runs/mine/checkpoints/step_000100 exported/mine
    python tools/export_hf.py runs/mine/checkpoints/step_000100 exported/mine --dtype bfloat16

The weights are held in host memory once, in the precision of the folder. Then the folder is loaded, and its
tensors and logits are compared with the checkpoint's, if memory is enough.
Relative paths in the checkpoint's config.yaml are taken from the present folder: start the
program where the training was started.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_llm  # noqa: E402  (the path comes first)
from train_llm import UserError  # noqa: E402

READ_GIB = 0.5  # tensors are read in groups of this size: each read parses the checkpoint's whole index


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="export_hf.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="RUN/checkpoints/step_000100")
    parser.add_argument("folder", type=Path, help="Hugging Face folder to write; must be new or empty")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                        help="of the weights in the folder; default float32")
    parser.add_argument("--tokenizer", metavar="NAME_OR_FOLDER", help="if not given: the run's own")
    return parser.parse_args()


def read_run(args: argparse.Namespace) -> argparse.Namespace:
    """The flags that the checkpoint's run was started with. Raises UserError if it is no checkpoint."""
    config = args.checkpoint / "config.yaml"
    if not (args.checkpoint / ".metadata").is_file() or not config.is_file():
        raise UserError(f"{args.checkpoint} is not a checkpoint, a folder like RUN/checkpoints/step_000100")
    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        raise UserError(f"{args.folder} already holds something: name a new folder")
    # Without train_llm's checks of the arguments: the data set, for one, need not be there any more.
    parser = train_llm.build_parser()
    run = parser.parse_args(train_llm.config_tokens(str(config), parser))
    run.tokenizer = args.tokenizer or run.tokenizer
    return run


def build(run: argparse.Namespace, checkpoint: Path) -> tuple[nn.Module, Path | None, object]:
    """(model on the meta device, Hugging Face folder that it started from, tokenizer).

    Raises UserError where the checkpoint holds another model.
    """
    import torch.distributed.checkpoint as dcp

    source = train_llm.fetch(run.hf_model) if run.hf_model else None
    tokenizer = train_llm.load_tokenizer(run)
    model = train_llm.build_model(run, source, len(tokenizer))
    saved = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    shapes = {name: tuple(tensor.shape) for name, tensor in train_llm.model_tensors(model).items()}
    found = {name.removeprefix("model."): tuple(entry.size) for name, entry in saved.items()
             if name.startswith("model.")}
    for name in sorted(shapes.keys() | found.keys()):
        if shapes.get(name) != found.get(name):
            raise UserError(f"{checkpoint} holds another model than its config.yaml describes: {name} has "
                            f"the shape {found.get(name)} there, {shapes.get(name)} expected")
    return model, source, tokenizer


def read_tensors(model: nn.Module, checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) in the model's order, as plain tensors on the CPU."""
    import torch.distributed.checkpoint as dcp
    from tqdm import tqdm

    def flush() -> Iterator[tuple[str, Tensor]]:
        dcp.load({"model": group}, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
        for name in list(group):
            yield name, group.pop(name)
            bar.update()

    expected, group = train_llm.model_tensors(model), {}
    with tqdm(total=len(expected), desc="exporting", unit=" tensors", disable=not sys.stderr.isatty()) as bar:
        for name, tensor in expected.items():
            group[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            if sum(value.nbytes for value in group.values()) >= READ_GIB * 2**30:
                yield from flush()
        yield from flush()


@torch.no_grad()
def logits_of_checkpoint(model: nn.Module, checkpoint: Path, input_ids: Tensor, is_hf: bool) -> Tensor | None:
    """Of the model with the checkpoint's weights, which went through no export; None if memory is short."""
    import torch.distributed.checkpoint as dcp

    nbytes = sum(tensor.nbytes for tensor in train_llm.model_tensors(model).values())
    if nbytes * 1.2 > os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        return None
    train_llm.materialise(model, torch.device("cpu"), cpu_offload=False)
    if is_hf:
        train_llm.fill_buffers(model)
    tensors = {"model": train_llm.model_tensors(model)}
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
    return model.eval()(input_ids)


def main() -> None:
    args = parse_args()
    run = read_run(args)
    model, source, tokenizer = build(run, args.checkpoint)
    dtype, partial = getattr(torch, args.dtype), args.folder.with_name(args.folder.name + ".partial")
    checksums = {}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        tensors = read_tensors(model, args.checkpoint)
        whole = train_llm.hf_tensors(model, tensors, dtype, checksums)
        save_torch_state_dict({name: part.clone() for name, part in whole}, partial)
        train_llm.write_parts(partial, train_llm.model_parts(model, tokenizer), dtype, source)
        if args.folder.exists():
            args.folder.rmdir()  # it is empty
        partial.rename(args.folder)
    except OSError as error:
        raise UserError(f"could not write {args.folder}: {error.strerror or error}") from error
    input_ids = train_llm.plain_tokens(model, 2, 64, torch.device("cpu"))
    expected, error = logits_of_checkpoint(model, args.checkpoint, input_ids, source is not None), None
    del model
    if expected is not None:
        error = train_llm.verify_export(args.folder, checksums, input_ids, expected,
                                        run.trust_remote_code)
    checked = "not reloaded: too little memory" if error is None else f"reloaded: logits within {error:.0e}"
    print(f"{args.folder}: {args.dtype}, Hugging Face format ({checked})")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as problem:
        print(f"export_hf.py: error: {problem}", file=sys.stderr)
        sys.exit(1)
