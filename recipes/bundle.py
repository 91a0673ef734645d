#!/usr/bin/env python3
"""Bundle the parts trained by the recipes into one weights file, in half precision, with the provenance of each part.

    python recipes/bundle.py stablevsr/assets/small.safetensors \\
        --unet runs/small/unet/unet.safetensors recipes/small/5-unet.toml --tcm ...
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from stablevsr import SamplingConfig, TemporalGuidance
from stablevsr.architectures import SMALL
from stablevsr.errors import UserError
from stablevsr.model import PARTS, StableVSR
from stablevsr.training.train import read_part
from stablevsr.weights import Header, write

# The sampler that UNet and TCM are distilled to: DDIM at t = 999, 749, 499, 249.
SAMPLING = SamplingConfig(steps=4, sampler="ddim", temporal=TemporalGuidance(tiny=True))
CONFIG = replace(SMALL, schedule=replace(SMALL.schedule, timestep_spacing="trailing"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="weights file to write")
    names = [part for part in PARTS if getattr(SMALL, part)]
    for part in names:
        metavar = (f"{part.upper()}.safetensors", "RECIPE")
        parser.add_argument(f"--{part}", required=True, nargs=2, metavar=metavar, help="its weights and recipe")
    options = parser.parse_args()
    with torch.device("meta"):
        model = StableVSR(CONFIG)
    tensors, provenance = {}, {}
    try:
        for part in names:
            file, provenance[part] = getattr(options, part)
            tensors |= read_part(Path(file), part, model)
        write(options.target, Header(model.config, provenance, sampling=SAMPLING), tensors, torch.float16)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
