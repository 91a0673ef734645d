#!/usr/bin/env python3
"""Train the Temporal Conditioning Module on REDS, as in the paper (section 4.1).

    stablevsr convert --base x4-upscaler-ema.safetensors --flow raft_large.pth -o base.safetensors
    python examples/train_tcm_on_reds.py REDS/train base.safetensors runs/tcm --device cuda
    stablevsr upscale in.mp4 out.mp4 --weights runs/tcm/model.safetensors

`REDS/train` holds the folders of its archives, `train_sharp/000/00000000.png` and, if the LR frames are to be read from
disk, `train_sharp_bicubic/X4/000/00000000.png`. Nothing of it is copied or changed. The clips of REDS4 (000, 011, 015,
020) are left out: they are the test set. The recipe is written to OUT/recipe.toml; the same command continues a run
that was stopped. For several GPUs start the recipe itself: `torchrun --nproc-per-node 4 $(which stablevsr) train
OUT/recipe.toml`.
"""

import argparse
import sys
from pathlib import Path

from stablevsr.cli import main as stablevsr

RECIPE = """\
# REDS: {source}
stage = "tcm"
init = "{weights}"
tcm_from_unet = true           # a copy of the UNet's encoder, with zero convolutions
output = "."
steps = {steps}
batch = {batch}
accumulate = {accumulate}      # the paper's batch is 32
dtype = "{dtype}"
gradient_checkpointing = true
workers = {workers}
[data]
kind = "folders"
root = "data"
crop = {crop}
[optimiser]
lr = 1e-5
"""


def lay_out(source: Path, output: Path) -> None:
    """Link the folders of REDS as recipes expect them: OUT/data/hr and, if there are LR frames, OUT/data/lr."""
    high, low = source / "train_sharp", source / "train_sharp_bicubic/X4"
    if not high.is_dir():
        raise SystemExit(f"{source} has no folder train_sharp: give the folder into which the archives were unpacked")
    (output / "data").mkdir(parents=True, exist_ok=True)
    for name, folder in (("hr", high), ("lr", low)):
        link = output / "data" / name
        link.unlink(missing_ok=True)
        if folder.is_dir():
            link.symlink_to(folder.resolve(), target_is_directory=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="REDS", help="the folder that holds train_sharp")
    parser.add_argument("weights", type=Path, metavar="BASE", help="a weights file to start from")
    parser.add_argument("output", type=Path, metavar="OUT", help="a folder for recipe, checkpoint, log and weights")
    parser.add_argument("--steps", type=int, default=20000, help="default: %(default)s, as in the paper")
    parser.add_argument("--batch", type=int, default=8, help="samples at a time (default: %(default)s)")
    parser.add_argument("--accumulate", type=int, default=4, help="gradients a step (default: %(default)s)")
    parser.add_argument("--crop", type=int, default=256, help="side of the HR crops (default: %(default)s)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16", help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=4, help="processes that read frames (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: the best available)")
    options = parser.parse_args(arguments)
    lay_out(options.source, options.output)
    recipe = options.output / "recipe.toml"
    values = {name: getattr(options, name) for name in ("steps", "batch", "accumulate", "crop", "dtype", "workers")}
    text = RECIPE.format(source=options.source, weights=options.weights.resolve().as_posix(), **values)
    recipe.write_text(text, encoding="utf-8")
    device = ["--device", options.device] if options.device else []
    return stablevsr(["train", str(recipe), *device])


if __name__ == "__main__":
    sys.exit(main())
