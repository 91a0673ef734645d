"""Reports as a text table, CSV or JSON."""

import csv
import io
import json
import math

from stablevsr.metrics.evaluate import Report

DECIMALS = {"PSNR": 2, "SSIM": 4, "HaarPSI": 4, "GMSD": 4, "LPIPS": 4, "DISTS": 4}
DECIMALS |= {"MUSIQ": 2, "NIQE": 3, "CLIP-IQA": 4, "tLP": 3, "tOF": 3}


def table(report: Report) -> str:
    """One line per clip and one for the mean over clips; then the skipped metrics with reasons."""
    names, means = report.names, report.clip_means()
    rows = {**means, "mean of clips": report.overall()} if len(means) > 1 else means
    width = max(len(name) for name in ("clip", *rows))
    lines = [f"{'clip':{width}}" + "".join(f"{name:>10}" for name in names)]
    for clip, row in rows.items():
        cells = (f"{row[name]:10.{DECIMALS[name]}f}" if name in row else f"{'-':>10}" for name in names)
        lines.append(f"{clip:{width}}" + "".join(cells))
    if "tOF" in names:
        lines.append(f"tOF by flows of: {report.flow_network}")
    lines += [f"{name} skipped: {reason}" for name, reason in report.skipped.items()]
    return "\n".join(lines)


def as_csv(report: Report) -> str:
    """One line per frame; metrics that a frame lacks are empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, ["clip", "frame", *report.names], lineterminator="\n")
    writer.writeheader()
    for clip, rows in report.clips.items():
        writer.writerows({"clip": clip, "frame": frame, **row} for frame, row in enumerate(rows))
    return file.getvalue()


def as_json(report: Report) -> str:
    """The whole report; numbers that are not finite, like PSNR of equal frames, become null."""
    values = {
        "flow_network": report.flow_network,
        "skipped": report.skipped,
        "mean": report.overall(),
        "clips": {clip: {"mean": row, "frames": report.clips[clip]} for clip, row in report.clip_means().items()},
    }
    return json.dumps(_finite(values), indent=1, allow_nan=False) + "\n"


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
