#!/usr/bin/env python3
"""Make the small model's weights file of what the recipes' runs left, in half precision, with where each part is from.

    python recipes/bundle.py stablevsr/assets/small.safetensors \\
        --unet runs/small/unet/unet.safetensors recipes/small/5-unet.toml --tcm ...
"""

import argparse
from pathlib import Path

import torch

from stablevsr.errors import UserError
from stablevsr.model import StableVSR
from stablevsr.presets import SMALL
from stablevsr.training.train import read_part
from stablevsr.weights import Header, write

PARTS = ("unet", "tcm", "vae", "flow", "tiny")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="the file to write")
    for part in PARTS:
        metavar = (f"{part.upper()}.safetensors", "RECIPE")
        parser.add_argument(f"--{part}", required=True, nargs=2, metavar=metavar, help="the part, and its recipe")
    options = parser.parse_args()
    with torch.device("meta"):
        model = StableVSR(SMALL)
    tensors, provenance = {}, {}
    try:
        for part in PARTS:
            file, provenance[part] = getattr(options, part)
            tensors |= read_part(Path(file), part, model)
        write(options.target, Header(model.config, provenance), tensors, torch.float16)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
