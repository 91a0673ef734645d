#!/usr/bin/env python3
"""Make a weights file to ship of what a recipe's run left: half precision, and where every part comes from.

    python recipes/bundle.py runs/small/tiny/model.safetensors stablevsr/assets/small.safetensors \\
        --unet "..." --tcm "..." --vae "..." --flow "..." --tiny "..."
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from stablevsr.weights import read, write

PARTS = ("unet", "tcm", "vae", "flow", "tiny")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the model.safetensors of a run")
    parser.add_argument("target", type=Path, help="the file to write")
    for part in PARTS:
        parser.add_argument(f"--{part}", required=True, metavar="TEXT", help="where this part comes from")
    options = parser.parse_args()
    header, tensors = read(options.source)
    provenance = {part: getattr(options, part) for part in PARTS}
    write(options.target, replace(header, provenance=provenance), tensors, torch.float16)


if __name__ == "__main__":
    main()
