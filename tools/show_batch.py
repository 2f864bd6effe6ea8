"""Show what train_llm.py, or a copy of it, trains on: what was read and left out, how long the documents are,
and its first micro-batch as text, trained tokens in green.

    python tools/show_batch.py --hf-model MODEL --dataset my_chats.jsonl --seq-len 512
    python tools/show_batch.py my_copy.py --config my.yaml
    python tools/show_batch.py --sample 17 --config RUN/config.yaml      # of a step that was skipped

Takes the flags of the script, reads and tokenises through it (and leaves the tokens in --data-cache, where
the training finds them), and needs neither a GPU nor other processes. Where standard output is no terminal,
or NO_COLOR is set, trained tokens stand in ⟦ ⟧ instead. A token is trained if the loss asks the model for it;
the one behind the last of a sample, where that is trained, is shown too. Special tokens are spelt out; lines
of === open a sample, lines of --- a document in it.
"""

import argparse
import os
import sys
from collections import Counter
from itertools import groupby
from types import ModuleType

from user_script import take_script

IGNORE = -100  # the label of a token that is not trained
NEEDED = ("UserError", "Ranks", "parse_args", "prepare_data", "open_datasets", "streamed_batches",
          "sample_at", "load_tokenizer")


def parse_args(argv: list[str]) -> tuple[ModuleType, int | None, argparse.Namespace]:
    """(the script, --sample, the script's arguments). Exits with code 2 and a line for a wrong one."""
    parser = argparse.ArgumentParser(
        prog="show_batch.py", description=__doc__, allow_abbrev=False,
        usage="%(prog)s [SCRIPT.py] [--sample N] FLAGS", epilog="FLAGS: those of the script, see its --help",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, metavar="N",
                        help="show sample N instead of the first micro-batch")
    if {"-h", "--help"} & set(argv):
        parser.parse_args(["--help"])
    script, rest = take_script(argv, NEEDED)
    own, rest = parser.parse_known_args(rest)
    args = script.parse_args(rest)
    if own.sample is not None and args.streaming:
        parser.error("--sample: a stream has no numbered samples; leave --streaming out")
    return script, own.sample, args


def load_samples(script: ModuleType, args: argparse.Namespace, number: int | None
                 ) -> list[tuple[str, list, list, list]]:
    """(title, input_ids, labels, positions) of each sample; positions begin at 0 with each document. Prints
    what was read first."""
    import torch
    ranks = script.Ranks(0, 0, 1, torch.device("cpu"))
    data = script.prepare_data(args)
    for note in data["notes"]:
        print(note)
    for tokens, _ in data["train"]:
        show_lengths(tokens["length"][:])
    train_set, _ = script.open_datasets(args, data)
    if train_set is None:
        args.mask_documents = True  # so that positions show the borders
        batch = next(script.streamed_batches(args, ranks, {}))
        positions = batch.get("position_ids", [torch.arange(args.seq_len)] * args.batch_size)
        rows = zip(batch["input_ids"], batch["labels"], positions)
        return [(f"sample {i}", *(row.tolist() for row in rows)) for i, rows in enumerate(rows)]
    if number is not None and not 0 <= number < len(train_set):
        raise script.UserError(f"--sample {number}: the data has samples 0 to {len(train_set) - 1}")
    # Of several data sets the numbers run over all of them; weights change from pass to pass what they are.
    first = [script.sample_at(i, len(train_set), args.seed) for i in range(args.batch_size)]
    # Where the model sees no boundaries, its positions show none; those of this copy do.
    args.mask_documents = True
    masked, _ = script.open_datasets(args, data)
    samples = []
    for i in first if number is None else [number]:
        sample = train_set[i]
        tensors = sample["input_ids"], sample["labels"], masked[i]["position_ids"]
        samples.append((f"sample {i} of {len(train_set)}", *(tensor.tolist() for tensor in tensors)))
    return samples


def show_lengths(lengths: list[int]) -> None:
    """How many documents have 1, 2 to 3, 4 to 7, … tokens; chats are counted as cut."""
    counts = Counter(length.bit_length() for length in lengths if length)
    for bits in range(min(counts), max(counts) + 1):
        bar = "#" * -(-40 * counts[bits] // max(counts.values()))
        print(f"{2 ** (bits - 1):>10,} to {2 ** bits - 1:>9,} tokens {counts[bits]:>10,} {bar}")


def num_padding(ids: list[int], labels: list[int]) -> int:
    """Padding is token 0 without a label, on the right; a 0 there that is itself trained is none."""
    start = len(ids)
    before = [IGNORE, *labels]
    while start and ids[start - 1] == 0 and labels[start - 1] == before[start - 1] == IGNORE:
        start -= 1
    return len(ids) - start


def render(tokenizer, ids: list[int], trained: list[bool], marks: tuple[str, str]) -> str:
    """The text of one document, each run of trained tokens between the two marks.

    A run is what decoding up to its end adds to decoding up to its start: some tokenizers drop the space in
    front of whatever they decode.
    """
    text, end, shown = "", 0, ""
    for is_trained, run in groupby(trained):
        end += len(list(run))
        longer = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        piece, text = longer[len(text):], longer
        shown += marks[0] + piece + marks[1] if is_trained else piece
    return shown


def show_sample(tokenizer, sample: tuple[str, list, list, list], marks: tuple[str, str]) -> None:
    title, ids, labels, positions = sample
    padding = num_padding(ids, labels)
    ids = ids[:len(ids) - padding]
    if labels[-1] != IGNORE:  # the token behind the sample
        ids = [*ids, labels[-1]]
    trained = [False, *(label != IGNORE for label in labels)]
    starts = [i for i in range(len(labels) - padding) if positions[i] == 0]
    print(f"=== {title}")
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(ids)]), 1):
        if len(starts) > 1:
            print(f"--- document {number} of {len(starts)}, {end - start} tokens")
        print(render(tokenizer, ids[start:end], trained[start:end], marks))
    if padding:
        print(f"--- padding, {padding} tokens")


def main() -> None:
    script, number, args = parse_args(sys.argv[1:])
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    marks = ("⟦", "⟧") if plain else ("\x1b[32m", "\x1b[0m")
    try:
        samples = load_samples(script, args, number)
        tokenizer = script.load_tokenizer(args)
    except script.UserError as error:
        sys.exit(f"show_batch.py: error: {error}")
    for sample in samples:
        show_sample(tokenizer, sample, marks)
    num_tokens = sum(len(ids) for _, ids, _, _ in samples)
    num_trained = sum(label != IGNORE for _, _, labels, _ in samples for label in labels)
    padding = sum(num_padding(ids, labels) for _, ids, labels, _ in samples)
    print(f"=== {num_tokens} tokens, {num_trained} trained ({num_trained / num_tokens:.1%}), "
          f"{padding} padding ({padding / num_tokens:.1%})")


if __name__ == "__main__":
    main()
