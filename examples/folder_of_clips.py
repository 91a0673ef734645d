#!/usr/bin/env python3
"""Upscale every video below a folder into a tree of the same shape.

    python examples/folder_of_clips.py clips/ upscaled/ --weights stablevsr.safetensors

What is there already is skipped, so the same command continues after a stop; a clip that was cut off in the middle
continues where it was. A clip that fails is reported and the others go on. The exit code is 1 if any failed.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from stablevsr import Progress, UserError, build_model, upscale

SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"}


def clips_below(folder: Path) -> list[Path]:
    """Paths of the videos below a folder, relative to it."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(path.relative_to(folder) for path in found)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="IN", help="a folder that holds videos, also in folders of it")
    parser.add_argument("target", type=Path, metavar="OUT", help="the folder for the results")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a weights file (default: the bundled one)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="precision (default: fp32)")
    options = parser.parse_args(arguments)
    target = options.target.resolve()
    names = [
        name for name in clips_below(options.source) if not (options.source / name).resolve().is_relative_to(target)
    ]
    if not names:
        parser.error(f"{options.source} holds no video, expected files ending in {', '.join(sorted(SUFFIXES))}")
    try:
        model = build_model(options.weights, dtype=options.dtype)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2

    failed = 0
    for name in names:
        output = options.target / name
        if output.exists():
            print(f"{name}: there already")
            continue
        output.parent.mkdir(parents=True, exist_ok=True)
        with tqdm(desc=str(name), leave=False) as bar:

            def show(progress: Progress, bar: tqdm = bar) -> None:
                bar.set_postfix_str(progress.phase)
                bar.total, bar.n = progress.total, progress.done
                bar.refresh()

            try:
                count = upscale(model, options.source / name, output, progress=show)
            except UserError as error:
                failed += 1
                print(f"{name}: FAILED: {error}", file=sys.stderr)
                continue
        print(f"{name}: {count} frames")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
