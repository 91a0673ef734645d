#!/usr/bin/env python3
"""Make a weights file to ship of what a recipe's run left: half precision, and where every part comes from.

    python recipes/bundle.py runs/small/tcm/model.safetensors stablevsr/assets/small.safetensors \\
        unet="..." tcm="..." vae="..." flow="..."
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from stablevsr.weights import read, write


def main() -> None:
    source, target, *origins = sys.argv[1:]
    header, tensors = read(Path(source))
    provenance = dict(origin.split("=", 1) for origin in origins)
    if set(provenance) != {"unet", "tcm", "vae", "flow"}:
        sys.exit("bundle: say of unet, tcm, vae and flow where they come from, as in vae='recipes/small/2-vae.toml'")
    write(Path(target), replace(header, provenance=provenance), tensors, torch.float16)


if __name__ == "__main__":
    main()
