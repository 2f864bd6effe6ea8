"""Draw metrics of runs against optimizer steps: python tools/plot_metrics.py RUN [RUN …] --out curve.png

Each KEY of --keys gets a line per run, train/loss and eval/loss if none is named, and a band where the run
also has KEY_low and KEY_high; of a step that was logged twice (resumed runs), the later row counts. Needs
matplotlib (python -m pip install matplotlib).
"""

import argparse
import json
import sys
from pathlib import Path


def read_series(run: Path, key: str) -> dict[int, float]:
    """{step: value} of a metric in RUN/metrics.jsonl."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that hold a metrics.jsonl")
    parser.add_argument("--keys", nargs="+", default=["train/loss", "eval/loss"], metavar="KEY")
    parser.add_argument("--out", type=Path, default=Path("metrics.png"), metavar="FILE.png")
    parser.add_argument("--title", default="")
    args = parser.parse_args()
    for run in args.runs:
        if not (run / "metrics.jsonl").is_file():
            parser.error(f"{run}: no metrics.jsonl there; name the --checkpoint-dir of a run")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit("plot_metrics.py: error: needs matplotlib: python -m pip install matplotlib")

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    drawn = 0
    for run in args.runs:
        for key in args.keys:
            series = read_series(run, key)
            if series:
                label = " ".join([*([run.name] if len(args.runs) > 1 else []),
                                  *([key] if len(args.keys) > 1 or len(args.runs) == 1 else [])])
                sparse = len(series) < 25
                axes.plot(list(series), list(series.values()), marker="o" if sparse else "", label=label)
                low, high = read_series(run, f"{key}_low"), read_series(run, f"{key}_high")
                if low.keys() == high.keys() == series.keys():
                    axes.fill_between(list(series), list(low.values()), list(high.values()), alpha=0.15)
                drawn += 1
    if not drawn:
        sys.exit(f"plot_metrics.py: error: no row has {' or '.join(args.keys)}")
    unit = "nats per token" if args.keys[0].endswith("loss") else args.keys[0]
    axes.set(xlabel="optimizer steps", ylabel=unit, title=args.title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.out, dpi=110)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
