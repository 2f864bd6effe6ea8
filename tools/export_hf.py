"""Turn a checkpoint of train_llm.py, or of a copy, into a Hugging Face folder, on the CPU, by one process.

    python tools/export_hf.py runs/mine/checkpoints/step_000100 exported/mine
    python tools/export_hf.py runs/mine/checkpoints/step_000100 exported/mine --dtype bfloat16

The weights are held in host memory once, in the precision of the folder. Then the folder is loaded, and its
logits and a generation are compared with the checkpoint's, if memory is enough. The script that the
checkpoint holds is used; relative paths in its config.yaml are taken from the present folder.
"""

import argparse
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import user_script  # noqa: F401  (finds a Python that has torch, before the next lines)

import torch
from torch import Tensor, nn

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


def open_script(checkpoint: Path) -> ModuleType:
    """The script that the checkpoint holds, imported."""
    found = [*checkpoint.glob("*.py")]
    if len(found) != 1 or not (checkpoint / ".metadata").is_file():
        sys.exit(f"export_hf.py: error: {checkpoint} is not a checkpoint, a folder like "
                 "RUN/checkpoints/step_000100")
    spec = importlib.util.spec_from_file_location(found[0].stem, found[0])
    module = sys.modules[found[0].stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_run(script: ModuleType, args: argparse.Namespace) -> argparse.Namespace:
    """The flags that the checkpoint's run was started with. Raises the script's UserError."""
    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        raise script.UserError(f"{args.folder} already holds something: name a new folder")
    # Without the script's checks of the arguments: the data set, for one, need not be there any more.
    parser = script.build_parser()
    run = parser.parse_args(script.config_tokens(str(args.checkpoint / "config.yaml"), parser))
    run.tokenizer = args.tokenizer or run.tokenizer
    return run


def build(script: ModuleType, run: argparse.Namespace, checkpoint: Path) -> tuple[nn.Module, tuple]:
    """(model on the meta device, `parts` of the script's write_hf_folder). Raises its UserError where the
    checkpoint holds another model."""
    import torch.distributed.checkpoint as dcp

    source = script.fetch(run.hf_model) if run.hf_model else None
    tokenizer = script.load_tokenizer(run)
    model = script.build_model(run, source, len(tokenizer))
    if getattr(run, "lora_rank", None):
        script.add_lora(model, run, run.hf_model, "CAUSAL_LM", torch.float32)
    saved = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    shapes = {name: tuple(tensor.shape) for name, tensor in script.model_tensors(model).items()}
    found = {name.removeprefix("model."): tuple(entry.size) for name, entry in saved.items()
             if name.startswith("model.")}
    if differ := {name for name, _ in shapes.items() ^ found.items()}:
        name = min(differ)
        raise script.UserError(f"{checkpoint} holds another model than its config.yaml describes: {name} has "
                               f"the shape {found.get(name)} there, {shapes.get(name)} expected")
    return model, script.hf_parts(model, tokenizer, source)


def read_tensors(expected: dict[str, Tensor], checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) in the model's order, as plain tensors on the CPU."""
    import torch.distributed.checkpoint as dcp
    from tqdm import tqdm

    def flush() -> Iterator[tuple[str, Tensor]]:
        dcp.load({"model": group}, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
        for name in list(group):
            yield name, group.pop(name)
            bar.update()

    group = {}
    with tqdm(total=len(expected), desc="exporting", unit=" tensors", disable=not sys.stderr.isatty()) as bar:
        for name, tensor in expected.items():
            group[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            if sum(value.nbytes for value in group.values()) >= READ_GIB * 2**30:
                yield from flush()
        yield from flush()


def logits_of_checkpoint(script: ModuleType, model: nn.Module, checkpoint: Path, input_ids: Tensor) -> Tensor:
    """Of the model with the checkpoint's weights, which went through no export."""
    import torch.distributed.checkpoint as dcp

    script.materialise(model, torch.device("cpu"), cpu_offload=False)
    if hasattr(model, "initialize_weights"):
        script.fill_buffers(model)
    tensors = {"model": script.model_tensors(model)}
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
    with torch.no_grad():
        return model.eval()(input_ids)


def main(script: ModuleType, args: argparse.Namespace) -> None:
    run = read_run(script, args)
    model, parts = build(script, run, args.checkpoint)
    dtype, partial = getattr(torch, args.dtype), args.folder.with_name(args.folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        tensors = read_tensors(script.model_tensors(model), args.checkpoint)
        whole = {name: part.clone() for name, part in script.hf_tensors(model, tensors, dtype)}
        script.write_hf_folder(partial, whole, parts, dtype)
        del whole
        if args.folder.exists():
            args.folder.rmdir()  # it is empty
        partial.rename(args.folder)
    except OSError as error:
        raise script.UserError(f"could not write {args.folder}: {error.strerror or error}") from error
    input_ids = script.plain_tokens(model, 2, 64, torch.device("cpu"))
    nbytes, checked = sum(tensor.nbytes for tensor in script.model_tensors(model).values()), "not reloaded"
    if hasattr(model, "peft_config"):
        checked = "LoRA's adapters for PeftModel.from_pretrained, not reloaded"
    elif nbytes * 1.2 < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        expected = logits_of_checkpoint(script, model, args.checkpoint, input_ids)
        del model
        checked = script.verify_export(args.folder, input_ids, expected, run.trust_remote_code)
    print(f"{args.folder}: {args.dtype}, Hugging Face format ({checked})")


if __name__ == "__main__":
    arguments = parse_args()
    module = open_script(arguments.checkpoint)
    try:
        main(module, arguments)
    except (module.UserError, OSError) as problem:
        print(f"export_hf.py: error: {problem}", file=sys.stderr)
        sys.exit(1)
