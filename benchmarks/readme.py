#!/usr/bin/env python3
"""Write the README's tables, between their markers, and its plot from the JSON in benchmarks/results.

The plot needs `pip install '.[bench]'`; `--tables` skips it.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PLOT = RESULTS / "steps_small.svg"
Report = dict[str, dict]


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def means_table(report: Report, kind: str = "photographs") -> str:
    """The mean of every metric over the clips of a kind, a row for each variant."""
    mean = {name: row for name, row in report[kind]["mean"].items() if name != "truth"}
    metrics = list(next(iter(mean.values())))
    return table(
        [kind, *metrics], [[name, *(f"{row[metric]:.3f}" for metric in metrics)] for name, row in mean.items()]
    )


def shares_table(report: Report, kind: str = "photographs") -> str:
    """The share of clips on which each variant beats bicubic interpolation."""
    shares = report[kind]["share of clips better than bicubic"]
    columns = list(next(iter(shares.values())))
    head = ["share of clips on which, against bicubic,", *columns]
    return table(head, [[name, *(f"{row[column]:.0%}" for column in columns)] for name, row in shares.items()])


def speed_table(report: Report) -> str:
    """Seconds per frame-step and per frame, at every size."""
    head = ["LR size", "", "seconds a frame-step", "times as fast", "steps", "seconds a frame", "first call, s", "PSNR"]
    lines = []
    for size, rows in report["sizes"].items():
        first = next(iter(rows.values()))["seconds a frame-step"]
        for name, row in rows.items():
            step, psnr = row["seconds a frame-step"], row["PSNR against the first row, dB"]
            cells = [f"{step:.3g}", f"{first / step:.2f}", str(row["steps"]), f"{row['seconds a frame']:.3g}"]
            lines.append([size, name, *cells, f"{row['first call, seconds']:.0f}", f"{psnr:.0f} dB" if psnr else ""])
    return table(head, lines)


# Name of the marker -> (result file, function that makes the table).
TABLES: dict[str, tuple[str, Callable[[Report], str]]] = {
    "quality": ("quality_small.json", means_table),
    "shares": ("quality_small.json", shares_table),
    "shortcuts": ("shortcuts_small.json", means_table),
    "speed": ("speed_small_cpu.json", speed_table),
}


def with_tables(text: str) -> str:
    """`text` with every marked table regenerated; tables whose results are missing stay."""

    def made(match: re.Match) -> str:
        file, make = TABLES[match["name"]]
        if not (RESULTS / file).exists():
            return match[0]
        return f"{match['begin']}\n{make(json.loads((RESULTS / file).read_text()))}\n{match['end']}"

    return re.sub(r"(?P<begin><!-- table: (?P<name>\w+) -->)\n.*?(?P<end><!-- end -->)", made, text, flags=re.S)


def plot_steps(report: Report) -> None:
    """Steps against quality, a curve for each sampler."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "stablevsr"  # the same bits each time
    from matplotlib import pyplot

    mean = report["photographs"]["mean"]
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for axis, metric in zip(axes, ("HaarPSI", "GMSD", "warp"), strict=True):
        curves: dict[str, list[tuple[int, float]]] = {}
        for name, row in mean.items():
            if found := re.fullmatch(r"two-way(?:, (\S+))?, (\d+) steps", name):
                curves.setdefault(found[1] or "ddpm", []).append((int(found[2]), row[metric]))
        for sampler, points in curves.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=sampler)
        axis.axhline(mean["bicubic"][metric], color="gray", linestyle=":", label="bicubic")
        axis.set_title(metric + (", higher is better" if metric == "HaarPSI" else ", lower is better"))
        axis.set_xlabel("steps")
    axes[0].legend()
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="do not redraw the plot")
    options = parser.parse_args()
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text()))
    steps = RESULTS / "steps_small.json"
    if steps.exists() and not options.tables:
        plot_steps(json.loads(steps.read_text()))


if __name__ == "__main__":
    main()
