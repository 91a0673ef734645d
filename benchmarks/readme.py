#!/usr/bin/env python3
"""Write the tables of the README and the manual, between their markers, from the JSON in benchmarks/results."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
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
    head = [f"{kind}: share of clips on which, against bicubic,", *columns]
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


def streaming_table(report: Report) -> str:
    """Seconds per frame of a stream, beside the published loops."""
    head = ["", "seconds a frame", "latency, s", "times as fast", "times as fast as 50 steps", "largest difference"]
    lines = []
    for name, row in report["rows"].items():
        speeds = [f"{row[key]:.2f}" for key in ("times as fast as the published loop", "times as fast as 50 steps")]
        error = "" if row["error"] is None else f"{row['error']:.0e}"
        lines.append([name, f"{row['seconds a frame']:.3g}", f"{row['latency, seconds']:.3g}", *speeds, error])
    return table(head, lines)


def summary_table(report: Report) -> str:
    """The README's few figures: bicubic interpolation against the bundled model, on both kinds of clips."""
    rows = {
        "PSNR, dB": "PSNR",
        "HaarPSI": "HaarPSI",
        "distance of deep features (lower is better)": "features",
        "flicker along the true motion (lower is better)": "warp",
    }
    kinds = ("photographs", "footage")
    head = ["", *(f"{kind}: {name}" for kind in kinds for name in ("bicubic", "bundled model"))]
    means = [report[kind]["mean"][variant] for kind in kinds for variant in ("bicubic", "default")]
    return table(head, [[title, *(f"{mean[key]:.3f}" for mean in means)] for title, key in rows.items()])


# Name of the marker -> (result file, function that makes the table).
TABLES: dict[str, tuple[str, Callable[[Report], str]]] = {
    "quality": ("quality_photos.json", means_table),
    "footage": ("quality_photos.json", partial(means_table, kind="footage")),
    "shares": ("quality_photos.json", shares_table),
    "shares_footage": ("quality_photos.json", partial(shares_table, kind="footage")),
    "stream_quality": ("quality_streaming.json", means_table),
    "stream_quality_footage": ("quality_streaming.json", partial(means_table, kind="footage")),
    "presets": ("quality_presets.json", means_table),
    "strength": ("quality_strength.json", means_table),
    "crf28": ("quality_crf28.json", means_table),
    "crf28_footage": ("quality_crf28.json", partial(means_table, kind="footage")),
    "summary": ("quality_photos.json", summary_table),
    "streaming": ("streaming_small_cpu.json", streaming_table),
    "speed": ("speed_small_cpu.json", speed_table),
}


def with_tables(text: str) -> str:
    """`text` with every marked table regenerated; those whose results are missing, or that others make, stay."""

    def made(match: re.Match) -> str:
        file, make = TABLES.get(match["name"], ("", means_table))
        if not (RESULTS / file).is_file():
            return match[0]
        return f"{match['begin']}\n{make(json.loads((RESULTS / file).read_text()))}\n{match['end']}"

    return re.sub(r"(?P<begin><!-- table: (?P<name>\w+) -->)\n.*?(?P<end><!-- end -->)", made, text, flags=re.S)


def main() -> None:
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))


if __name__ == "__main__":
    main()
