#!/usr/bin/env python3
"""How well an autoencoder reconstructs photographs: PSNR of encode and decode alone, beside bicubic x4.

The photographs come with the scikit-image package (`pip install '.[bench]'`) and were never seen in training. The
middle 256x256 of each is used. Prints a table and writes JSON.
"""

import argparse
import json
import platform
from datetime import date
from pathlib import Path

import numpy as np
import torch
from clips import PHOTOGRAPHS, photograph
from torch import Tensor

from stablevsr.architectures import ARCHITECTURES
from stablevsr.metrics.fidelity import psnr
from stablevsr.model import StableVSR
from stablevsr.nn.vae import VAE
from stablevsr.sampling.pictures import bicubic
from stablevsr.training.data import downscale
from stablevsr.training.train import read_part

SIDE = 256


def middle(picture: Tensor) -> Tensor:
    """The middle of a picture, (1, 3, SIDE, SIDE)."""
    top, left = ((side - SIDE) // 2 for side in picture.shape[1:])
    return picture[None, :, top : top + SIDE, left : left + SIDE]


def measure(vae: VAE, picture: Tensor) -> dict[str, float]:
    """PSNR of the reconstruction and of bicubic x4 of the downscaled picture."""
    with torch.no_grad():
        restored = vae.decode(vae.encode(picture * 2 - 1).mean) / 2 + 0.5
    results = {"autoencoder": restored, "bicubic": bicubic(downscale(picture))}
    return {name: psnr(result.clamp(0, 1), picture).item() for name, result in results.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="a weights file, or one that holds the vae alone")
    parser.add_argument("--preset", default="small", choices=ARCHITECTURES)
    parser.add_argument("-o", "--output", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    with torch.device("meta"):  # only the autoencoder gets weights
        model = StableVSR(ARCHITECTURES[options.preset])
    model.load_state_dict(read_part(options.weights, "vae", model), strict=False, assign=True)
    vae = model.vae.float().eval()
    results = {name: measure(vae, middle(photograph(name))) for name in PHOTOGRAPHS}
    results["mean"] = {
        key: float(np.mean([row[key] for row in results.values()])) for key in ("autoencoder", "bicubic")
    }
    print(f"{'PSNR, dB':24} autoencoder  bicubic")
    for name, row in results.items():
        print(f"{name:24} {row['autoencoder']:11.2f} {row['bicubic']:8.2f}")
    if options.output:
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
        about = {"date": str(date.today()), "torch": torch.__version__, "machine": machine}
        command = f"python benchmarks/autoencoder.py {options.weights}"
        options.output.write_text(json.dumps({**about, "command": command, "psnr_db": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
