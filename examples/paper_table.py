#!/usr/bin/env python3
"""Measure the results of a test set and print them beside the values in the paper.

    for clip in 000 011 015 020; do
        stablevsr upscale REDS/val/X4/$clip results/$clip --weights stablevsr.safetensors --preset exact
    done
    python examples/paper_table.py results/ REDS/val/GT/ --weights stablevsr.safetensors

RESULTS and TRUTH hold a folder for each clip, of the same names. LPIPS, DISTS and tLP need `pip install
'stablevsr[metrics]'` and the weights of their backbones, MUSIQ needs pyiqa; what is missing is named below the table
and left empty in it. tOF is comparable only if the weights hold `raft_large`, as those converted with it do.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from stablevsr import UserError, build_model
from stablevsr.metrics.evaluate import Evaluator, clip_pairs, evaluate

# arXiv 2311.15908v2: means over clips of their means over frames. PSNR, SSIM and MUSIQ: higher is better.
PAPER = {
    "reds4": {
        "tLP": 5.57,
        "tOF": 2.68,
        "LPIPS": 0.097,
        "DISTS": 0.045,
        "PSNR": 27.97,
        "SSIM": 0.795,
        "MUSIQ": 67.6,
    },
    "vimeo": {"tLP": 3.89, "tOF": 1.37, "LPIPS": 0.070, "DISTS": 0.087, "PSNR": 31.97, "SSIM": 0.877},
}


def table(measured: dict[str, float], paper: dict[str, float]) -> str:
    """A line for each metric of the paper: its value, ours, and the difference."""
    lines = [f"{'':8}{'paper':>10}{'here':>10}{'difference':>12}"]
    for name, theirs in paper.items():
        if name in measured:
            lines.append(f"{name:8}{theirs:10.3f}{measured[name]:10.3f}{measured[name] - theirs:+12.3f}")
        else:
            lines.append(f"{name:8}{theirs:10.3f}{'-':>10}{'-':>12}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, metavar="RESULTS", help="a folder with a folder of frames for each clip")
    parser.add_argument("truth", type=Path, metavar="TRUTH", help="the ground truth, in the same form")
    parser.add_argument("--set", choices=PAPER, default="reds4", help="the test set (default: %(default)s)")
    parser.add_argument("--weights", metavar="FILE", help="weights whose flow network measures tOF (default: bundled)")
    options = parser.parse_args(arguments)
    try:
        pairs = clip_pairs(options.results, options.truth)
        model = build_model(options.weights)
        evaluator = Evaluator(model.device, model.flow)
        with tqdm(unit="frame") as bar:
            report = evaluate(evaluator, pairs, model.provenance.get("flow", "unknown"), lambda *done: bar.update())
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    frames = sum(map(len, report.clips.values()))
    print(f"{len(report.clips)} clips, {frames} frames; tOF by flows of: {report.flow_network}")
    print(table(report.overall(), PAPER[options.set]))
    for name, reason in report.skipped.items():
        if name in PAPER[options.set]:
            print(f"{name} skipped: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
