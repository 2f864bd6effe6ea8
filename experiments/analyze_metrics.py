"""Summarise a folder of run_experiments.py: Markdown, CSV, PNG plots and one self-contained HTML report.

    python experiments/analyze_metrics.py --experiment-dir artifacts/experiments --baseline ddp_fp32
    python experiments/analyze_metrics.py --timeline trace.json --out step.png      # one step, drawn

Of each run it takes the median over its rows, the first left out (warm-up, compilation); of an experiment the
mean and the standard deviation over the seeds. A speed-up compares runs of the same seed. PNG plots and the
timeline need matplotlib; the report does not.
"""

import argparse
import csv
import html
import json
import math
import statistics
import sys
from pathlib import Path

# {column: (heading, decimals, whether more is better; None: neither)}
COLUMNS = {
    "loss": ("final loss", 4, None),
    "tokens_per_s": ("tokens/s", 0, True),
    "speedup": ("speed-up", 2, True),
    "peak_mem_mib": ("peak memory, MiB", 1, False),
    "collectives_ms": ("collectives, ms a step", 1, False),
    "sent_mib": ("sent, MiB a step", 2, False),
}
COLORS = {"ddp": "#64748b", "control": "#a3acb9", "manual": "#d9480f", "fsdp1": "#7c3aed", "fsdp2": "#0b7285"}


# ------------------------------------------------------------------------------------------------
# 1. Read

def read_run(path: Path) -> tuple[dict[str, float] | None, dict[int, float], str]:
    """(values of the COLUMNS but the speed-up, {step: loss}, what is wrong)."""
    if not path.is_file():
        return None, {}, "has not run"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    logs = [row for row in rows if row["event"] == "log"]
    curve = {row["step"]: row["train/loss"] for row in logs}
    if not logs or rows[-1]["event"] != "end":
        return None, curve, f"ended after step {max(curve, default=0)}"
    steady = logs[1:] or logs

    def median(key: str) -> float:
        return statistics.median(row[key] for row in steady)

    sent = [sum(row[key] for key in row if key.startswith("comm/")) for row in steady]
    values = {"loss": logs[-1]["train/loss"], "tokens_per_s": median("perf/tokens_per_s"),
              "peak_mem_mib": max(row["perf/peak_mem_gib"] for row in steady) * 1024,
              "collectives_ms": median("time/collectives_s") * 1e3, "sent_mib": statistics.median(sent)}
    return values, curve, ""


def read_experiments(folder: Path, baseline: str) -> tuple[dict[str, dict], dict[str, dict], list[str]]:
    """({experiment: {column: values over seeds}}, {experiment: {step: mean loss}}, lines on failed runs)."""
    values, curves, problems = {}, {}, []
    for config in sorted((folder / "configs").glob("*_seed*.json"), key=order_of):
        name, _, seed = config.stem.rpartition("_seed")
        found, curve, problem = read_run(folder / f"{config.stem}_metrics.jsonl")
        if problem:
            log = folder / f"{config.stem}.log"
            text = log.read_text(errors="replace").splitlines() if log.is_file() else []
            problems.append(": ".join([config.stem, problem, *[t.strip() for t in text if "rror:" in t][:1]]))
        values.setdefault(name, {})
        if found:
            values[name][int(seed)] = found
            curves.setdefault(name, []).append(curve)
    for runs in values.values():
        for seed, found in runs.items():
            base = values.get(baseline, {}).get(seed)
            found["speedup"] = found["tokens_per_s"] / base["tokens_per_s"] if base else math.nan
    table = {name: {column: [run[column] for run in runs.values()] for column in COLUMNS}
             for name, runs in values.items() if runs}
    means = {name: {step: statistics.fmean(curve[step] for curve in found if step in curve)
                    for step in found[0]} for name, found in curves.items()}
    return table, means, problems


def order_of(config: Path) -> tuple:
    impl = impl_of(config.stem)
    return list(COLORS).index(impl), config.stem


def impl_of(name: str) -> str:
    return next(key for key in [*COLORS, ""] if name.startswith(key)) or "ddp"


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


# ------------------------------------------------------------------------------------------------
# 2. Markdown and CSV

def format_cell(values: list[float], decimals: int) -> str:
    mean, spread = mean_and_spread(values)
    return f"{mean:,.{decimals}f} ± {spread:,.{decimals}f}" if len(values) > 1 else f"{mean:,.{decimals}f}"


def write_markdown(path: Path, table: dict, problems: list[str], about: tuple[dict, str, str]) -> None:
    sweep, baseline, note = about
    lines = ["# Sharding experiments", ""]
    if sweep:
        lines += [f"`{sweep['command']}`", "", f"{sweep['date']}, commit `{sweep['commit']}`, "
                  f"{sweep['device']}, torch {sweep['torch']}, {sweep['launcher']}. {note}", ""]
    lines += ["| experiment | runs | " + " | ".join(heading for heading, _, _ in COLUMNS.values()) + " |",
              "|---|---:|" + "---:|" * len(COLUMNS)]
    for name, row in table.items():
        cells = [format_cell(row[column], decimals) for column, (_, decimals, _) in COLUMNS.items()]
        lines.append(f"| {name} | {len(row['loss'])} | " + " | ".join(cells) + " |")
    lines += ["", f"Mean ± standard deviation over seeds. Speed-up against {baseline}, seed by seed."]
    lines += ["", "Failed or missing: " + ("; ".join(problems) if problems else "none.")]
    path.write_text("\n".join(lines) + "\n")


def write_csv(path: Path, table: dict) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["experiment", "runs", *[f"{column}_{what}" for column in COLUMNS
                                                 for what in ("mean", "std")]])
        for name, row in table.items():
            cells = [value for column in COLUMNS for value in mean_and_spread(row[column])]
            writer.writerow([name, len(row["loss"]), *[f"{value:.6g}" for value in cells]])


# ------------------------------------------------------------------------------------------------
# 3. HTML: one file, no script, drawn with SVG

STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #66727f; --line: #e3e7eb; --page: #fbfbf9;
  --card: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #98a3ae; --line: #333b44; --page: #14181c; --card: #1b2026 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 40px 24px 80px; max-width: 1080px; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, sans-serif }
h1 { font-size: 30px; margin: 0 0 4px } h2 { font-size: 18px; margin: 44px 0 4px }
p { margin: 4px 0 14px; color: var(--soft); max-width: 76ch }
code { font-size: 13px; overflow-wrap: anywhere }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 14px;
  margin: 26px 0 }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 16px 18px }
.tile b { display: block; font-size: 23px; font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
.tile span { color: var(--soft) }
.card { overflow-x: auto } svg { display: block; width: 100%; height: auto } svg text { fill: var(--ink) }
svg .soft { fill: var(--soft) } svg .grid { stroke: var(--line) } svg .whisker { stroke: var(--ink) }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 13.5px }
th, td { padding: 7px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { color: var(--soft); font-weight: 500 } th:first-child, td:first-child { text-align: left }
td small { color: var(--soft) } .dot { display: inline-block; width: 9px; height: 9px; border-radius: 9px;
  margin-right: 8px } .bad { border-left: 4px solid #c92a2a }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px }
"""


def bars(table: dict, column: str) -> str:
    """Horizontal bars, one an experiment, with the spread over seeds as a whisker."""
    _, decimals, _ = COLUMNS[column]
    rows = {name: mean_and_spread(row[column]) for name, row in table.items()}
    largest = max(mean + spread for mean, spread in rows.values()) or 1.0
    height, parts = 26 * len(rows) + 6, []
    for i, (name, (mean, spread)) in enumerate(rows.items()):
        y, width = 26 * i + 4, 560 * mean / largest
        low, high = (240 + 560 * max(0.0, mean + sign * spread) / largest for sign in (-1, 1))
        parts.append(
            f'<text x="228" y="{y + 14}" text-anchor="end" font-size="13">{html.escape(name)}</text>'
            f'<rect x="240" y="{y}" width="{width:.1f}" height="19" rx="3" fill="{COLORS[impl_of(name)]}"/>'
            f'<path d="M{low:.1f} {y + 9.5}H{high:.1f}" class="whisker" stroke-width="1.5"/>'
            f'<text x="{max(high, 240 + width) + 8:.1f}" y="{y + 14}" font-size="13" class="soft">'
            f"{mean:,.{decimals}f}</text>")
    return f'<svg viewBox="0 0 900 {height}" role="img">{"".join(parts)}</svg>'


def loss_lines(curves: dict) -> str:
    """Mean loss against steps. Curves that lie on one another are the point."""
    steps = max(max(curve) for curve in curves.values())
    low = min(min(curve.values()) for curve in curves.values())
    high = max(max(curve.values()) for curve in curves.values())
    low, high = low - 0.05 * (high - low), high + 0.05 * (high - low) or 1.0

    def place(step: float, loss: float) -> str:
        return f"{60 + 820 * step / steps:.1f},{10 + 250 * (high - loss) / (high - low):.1f}"

    parts = []
    for i in range(5):
        loss = low + (high - low) * i / 4
        y = place(0, loss).split(",")[1]
        parts.append(f'<path d="M60 {y}H880" class="grid"/><text x="52" y="{float(y) + 4}" text-anchor="end" '
                     f'font-size="12" class="soft">{loss:.2f}</text>')
    for i in range(1, 5):
        x = place(steps * i / 4, high).split(",")[0]
        parts.append(f'<text x="{x}" y="280" text-anchor="middle" font-size="12" class="soft">'
                     f"{steps * i // 4}</text>")
    for i, (name, curve) in enumerate(curves.items()):
        points = " ".join(place(step, loss) for step, loss in curve.items())
        parts.append(f'<polyline points="{points}" fill="none" stroke="{COLORS[impl_of(name)]}" '
                     f'stroke-width="2" stroke-dasharray="6 {i % 5}" opacity="0.8"><title>{html.escape(name)}'
                     "</title></polyline>")
    return f'<svg viewBox="0 0 900 290" role="img">{"".join(parts)}</svg>'


def tiles(table: dict, baseline: str) -> str:
    """The answers that most readers look for first."""
    found = []
    if {"manual_fp32", "fsdp2_fp32"} <= table.keys():
        pair = [mean_and_spread(table[name]["tokens_per_s"])[0] for name in ("manual_fp32", "fsdp2_fp32")]
        found.append((f"{pair[0] / pair[1]:.2f} ×", "tokens/s of manual FSDP over FSDP2, fp32"))
    if control := table.get(f"control_{baseline}"):
        noise = 100 * abs(mean_and_spread(control["speedup"])[0] - 1)
        found.append((f"{noise:.1f} %", "between the baseline and its own repetition: the noise"))
    fastest = max(table, key=lambda name: mean_and_spread(table[name]["tokens_per_s"])[0])
    smallest = min(table, key=lambda name: mean_and_spread(table[name]["peak_mem_mib"])[0])
    found += [(fastest, "has the most tokens/s"), (smallest, "needs the least memory")]
    return "".join(f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(text)}</span></div>'
                   for value, text in found)


def html_table(table: dict) -> str:
    head = "".join(f"<th>{heading}</th>" for heading, _, _ in COLUMNS.values())
    body = []
    for name, row in table.items():
        cells = []
        for column, (_, decimals, _) in COLUMNS.items():
            mean, spread = mean_and_spread(row[column])
            cells.append(f"<td>{mean:,.{decimals}f} <small>± {spread:,.{decimals}f}</small></td>")
        dot = f'<span class="dot" style="background:{COLORS[impl_of(name)]}"></span>'
        body.append(f"<tr><td>{dot}{html.escape(name)}</td><td>{len(row['loss'])}</td>{''.join(cells)}</tr>")
    return f"<table><tr><th>experiment</th><th>runs</th>{head}</tr>{''.join(body)}</table>"


def write_html(path: Path, table: dict, curves: dict, problems: list[str], about: tuple[dict, str, str]
               ) -> None:
    sweep, baseline, note = about
    origin = (f"<p><code>{html.escape(sweep['command'])}</code></p><p>{sweep['date']} · commit "
              f"<code>{sweep['commit'][:12]}{'-dirty' * sweep['commit'].endswith('dirty')}</code> · "
              f"{html.escape(sweep['device'])} · torch {sweep['torch']} · "
              f"{html.escape(sweep['launcher'])}</p>"
              if sweep else "")
    legend = "".join(f'<span><span class="dot" style="background:{COLORS[impl]}"></span>{impl}</span>'
                     for impl in dict.fromkeys(map(impl_of, table)))
    sections = [
        ("Speed", "Tokens a second of all processes together, median of a run's steps. Longer is better; the "
         "line is one standard deviation over seeds.", bars(table, "tokens_per_s")),
        ("Memory", "Largest sum of rank 0's tensors during a step. Shorter is better.",
         bars(table, "peak_mem_mib")),
        ("Time in collectives", "Milliseconds of a step in which a collective ran on rank 0, whether hidden "
         "behind computation or not, waiting for the other ranks included.", bars(table, "collectives_ms")),
        ("Bytes moved", "MiB that a rank sends in one step, if collectives run as a ring.",
         bars(table, "sent_mib")),
        ("Loss", "Mean over seeds. All implementations compute the same, so the lines of one precision lie "
         "on one another.", loss_lines(curves)),
        ("All numbers", f"Mean ± standard deviation over seeds; speed-up against {html.escape(baseline)}, "
         "seed by seed.", html_table(table)),
    ]
    bad = "".join(f"<li>{html.escape(problem)}</li>" for problem in problems)
    parts = [f"<h2>{title}</h2><p>{text}</p><div class='card'>{content}</div>"
             for title, text, content in sections]
    failed = f"<h2>Failed or missing</h2><div class='card bad'><ul>{bad}</ul></div>" if problems else ""
    path.write_text(
        "<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' "
        f"content='width=device-width'><title>Sharding experiments</title><style>{STYLE}</style><h1>Sharding "
        f"experiments</h1>{origin}<p>{html.escape(note)}</p><div class='tiles'>{tiles(table, baseline)}</div>"
        f"{failed}<div class='legend'>{legend}</div>{''.join(parts)}</html>\n")


# ------------------------------------------------------------------------------------------------
# 4. PNG plots

def import_figure():
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure


def write_plots(folder: Path, table: dict, curves: dict) -> list[Path]:
    """sharding.png: speed, memory and traffic side by side; loss.png. None without matplotlib."""
    Figure = import_figure()
    if Figure is None:
        return []
    names = list(table)[::-1]
    figure = Figure(figsize=(13, 0.34 * len(names) + 1.6), layout="constrained")
    for axes, column in zip(figure.subplots(1, 3, sharey=True), ("tokens_per_s", "peak_mem_mib", "sent_mib")):
        means, spreads = zip(*(mean_and_spread(table[name][column]) for name in names))
        axes.barh(names, means, xerr=spreads, color=[COLORS[impl_of(name)] for name in names],
                  error_kw={"elinewidth": 1, "ecolor": "#222"})
        axes.set_title(COLUMNS[column][0], fontsize=11)
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False, labelsize=9)
    figure.savefig(folder / "sharding.png", dpi=110)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer steps", ylabel="loss, nats per token")
    for i, (name, curve) in enumerate(curves.items()):
        axes.plot(list(curve), list(curve.values()), color=COLORS[impl_of(name)], linestyle=(0, (6, i % 5)),
                  label=name, alpha=0.8)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(folder / "loss.png", dpi=110)
    return [folder / "sharding.png", folder / "loss.png"]


def read_steps(trace: Path) -> tuple[list[tuple], float]:
    """(spans (row, label, kind, start ms, length ms) of a `manual` step, length of all in ms) of a trace."""
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("ph") == "X"]
    marks = sorted((event["ts"], event["ts"] + event["dur"], *event["name"].split(" ", 1)) for event in events
                   if event["name"].startswith(("gather ", "free ", "reduce "))
                   and event["cat"] == "user_annotation")
    if not marks:
        sys.exit(f"analyze_metrics.py: error: {trace} is no trace of train_sharding.py --impl manual --trace")
    start, spans, num_root = marks[0][0], [], 0
    for (begin, end, what, unit), (following, *_) in zip(marks, [*marks[1:], (marks[-1][1],)]):
        num_root += what == "gather" and unit == "root"
        phase = "forward" if num_root < 2 else "backward"
        if what == "gather":
            spans.append(("wait for weights", "", "wait", begin, end - begin))
        # What runs until the next mark belongs to the unit just gathered, else to the root.
        if following > end:
            spans.append(("compute", unit if what == "gather" else "root", phase, end, following - end))
    for event in events:
        if event["name"].startswith("gloo:") or "ncclDevKernel" in event["name"]:
            kind = "all-gather" if "gather" in event["name"].lower() else "reduce-scatter"
            spans.append(("collectives", "", kind, event["ts"], event["dur"]))
    last = max(begin + length for *_, begin, length in spans)
    return [(*names, (begin - start) / 1e3, length / 1e3) for *names, begin, length in spans
            if begin >= start], (last - start) / 1e3


def draw_timeline(trace: Path, out: Path) -> None:
    """One step of `--impl manual` from a real trace: what computes, what is sent, and who waits."""
    Figure = import_figure()
    if Figure is None:
        sys.exit("analyze_metrics.py: error: --timeline needs matplotlib: python -m pip install matplotlib")
    from matplotlib.patches import Patch
    spans, length = read_steps(trace)
    colors = {"forward": "#2b8a3e", "backward": "#0b7285", "wait": "#c92a2a", "all-gather": "#d9480f",
              "reduce-scatter": "#7c3aed"}
    rows = ["collectives", "wait for weights", "compute"]
    figure = Figure(figsize=(13, 2.9), layout="constrained")
    axes = figure.add_subplot(xlabel="milliseconds", xlim=(0, length))
    for row, label, kind, begin, duration in spans:
        axes.barh(rows.index(row), duration, left=begin, height=0.7, color=colors[kind], edgecolor="white",
                  linewidth=0.4)
        if label and duration > 0.03 * length:
            axes.text(begin + duration / 2, rows.index(row), label.replace("block ", "b"), ha="center",
                      va="center", color="white", fontsize=8)
    axes.set_yticks(range(3), rows)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    axes.legend(handles=[Patch(color=color, label=kind) for kind, color in colors.items()], ncols=5,
                loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=9)
    figure.savefig(out, dpi=110)
    print(f"wrote {out}")


# ------------------------------------------------------------------------------------------------
# 5. Main

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--experiment-dir", type=Path, metavar="DIR", help="what run_experiments.py wrote")
    parser.add_argument("--baseline", default="ddp_fp32", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="default: report, in --experiment-dir")
    parser.add_argument("--note", default="", help="a sentence for the head of the report")
    parser.add_argument("--timeline", type=Path, metavar="TRACE", help="draw this trace of --impl manual")
    parser.add_argument("--out", type=Path, default=Path("step.png"), metavar="PNG", help="of --timeline")
    args = parser.parse_args()
    if args.timeline:
        return draw_timeline(args.timeline, args.out)
    folder = args.experiment_dir
    if folder is None or not (folder / "configs").is_dir():
        parser.error(f"--experiment-dir {folder}: no configs folder there; name run_experiments.py's folder")
    table, curves, problems = read_experiments(folder, args.baseline)
    if not table:
        parser.error(f"--experiment-dir {folder}: no run has finished; start run_experiments.py --execute")
    if args.baseline not in table:
        parser.error(f"--baseline {args.baseline}: no finished run; there are {', '.join(table)}")
    sweep = json.loads((folder / "sweep.json").read_text()) if (folder / "sweep.json").is_file() else {}
    report = args.output_dir or folder / "report"
    report.mkdir(parents=True, exist_ok=True)
    about = sweep, args.baseline, args.note
    write_markdown(report / "report.md", table, problems, about)
    write_csv(report / "summary.csv", table)
    write_html(report / "report.html", table, curves, problems, about)
    plots = write_plots(report, table, curves)
    print((report / "report.md").read_text())
    print(f"wrote {report}/report.html, report.md, summary.csv" + "".join(f", {path.name}" for path in plots)
          + ("" if plots else "; PNG plots need matplotlib: python -m pip install matplotlib"))


if __name__ == "__main__":
    main()
