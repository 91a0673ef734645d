#!/usr/bin/env python3
"""Draw the manual's plots from the JSON in benchmarks/results: python benchmarks/plots.py (needs matplotlib)."""

import hashlib
import json
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
METRICS = {"PSNR": "PSNR, dB (higher is better)", "features": "feature distance (lower is better)"}
GRAY, BLUE = "#8a8a8a", "#4f66c9"  # readable on white and on dark gray


def quality_plot(clips: dict[str, dict[str, dict[str, float]]], path: Path, source: str) -> None:
    """For every clip a line from bicubic interpolation to the bundled model, in two metrics."""
    names = sorted(clips, key=lambda name: clips[name]["bicubic"]["features"])
    figure, axes = plt.subplots(1, len(METRICS), figsize=(9, 4), sharey=True, layout="constrained")
    for axis, (metric, title) in zip(axes, METRICS.items(), strict=True):
        for row, name in enumerate(names):
            start, end = (clips[name][variant][metric] for variant in ("bicubic", "default"))
            axis.plot([start, end], [row, row], color=GRAY, linewidth=1, zorder=1)
            axis.scatter(start, row, color=GRAY, s=28, zorder=2, label="bicubic" if row == 0 else None)
            axis.scatter(end, row, color=BLUE, s=28, zorder=2, label="bundled model" if row == 0 else None)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].legend(loc="upper right", fontsize=9, frameon=False)
    figure.savefig(path, transparent=True, metadata={"Date": None, "Description": source})
    plt.close(figure)


def main() -> None:
    matplotlib.use("svg")
    matplotlib.rcParams.update(dict.fromkeys(("text.color", "xtick.color", "ytick.color", "axes.edgecolor"), GRAY))
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "stablevsr"  # the same file from the same figures
    text = (ROOT / "benchmarks/results/quality_photos.json").read_bytes()
    digest = hashlib.sha256(text).hexdigest()  # a test compares it: a plot of older results is noticed
    quality_plot(json.loads(text)["clips"], ROOT / "docs/images/quality.svg", f"quality_photos.json {digest}")


if __name__ == "__main__":
    main()
