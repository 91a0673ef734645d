#!/usr/bin/env python3
"""Bundle the parts trained by the recipes into one weights file, in half precision, with the provenance of each part.

    python recipes/bundle.py stablevsr/assets/small.safetensors \\
        --unet runs/small/unet/unet.safetensors recipes/small/5-unet.toml --tcm ...
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from stablevsr import FlowOptions, SamplingConfig, TemporalGuidance
from stablevsr.architectures import SMALL, SMALL_STREAMING
from stablevsr.errors import UserError
from stablevsr.model import PARTS, StableVSR
from stablevsr.sampling.config import STREAMING
from stablevsr.training.train import read_part
from stablevsr.weights import Header, write

# The sampler that UNet and TCM are distilled to: DDIM at t = 999, 749, 499, 249.
BUNDLES = {
    "small": Header(
        replace(SMALL, schedule=replace(SMALL.schedule, timestep_spacing="trailing")),
        sampling=SamplingConfig(
            steps=4, sampler="ddim", temporal=TemporalGuidance(tiny=True), color_fix="backprojection"
        ),
    ),
    "small_streaming": Header(
        SMALL_STREAMING,
        sampling=replace(STREAMING, spacing=None, flow=FlowOptions(half_size=True), color_fix="backprojection"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="weights file to write")
    parser.add_argument("--architecture", choices=BUNDLES, default="small", help="default: %(default)s")
    for part in PARTS:
        metavar = (f"{part.upper()}.safetensors", "RECIPE")
        parser.add_argument(f"--{part}", nargs=2, metavar=metavar, help="its weights and recipe")
    options = parser.parse_args()
    header = BUNDLES[options.architecture]
    with torch.device("meta"):
        model = StableVSR(header.config)
    tensors, provenance = {}, {}
    try:
        for part in PARTS:
            given, held = getattr(options, part), getattr(header.config, part) is not None
            if bool(given) != held:
                parser.error(f"architecture {options.architecture} has {'a' if held else 'no'} part {part}")
            if given:
                file, provenance[part] = given
                tensors |= read_part(Path(file), part, model)
        write(options.target, replace(header, provenance=provenance), tensors, torch.float16)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
