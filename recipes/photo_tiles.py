#!/usr/bin/env python3
"""Cut photographs into tiles, as one-frame clips for `kind = "folders"`: the data of recipes/small/9-unet.toml.

    python recipes/photo_tiles.py runs/photographs/tiles runs/photographs/*.jpg

Each photograph is downscaled by two and by four, which hides demosaicing and compression artefacts, and cut into
tiles. Flat tiles are dropped.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 256
REDUCTIONS = (2, 4)
MIN_DEVIATION = 6.0  # standard deviation of a tile's 8-bit values; below, it is mostly sky


def tiles(photograph: Image.Image) -> Iterator[Image.Image]:
    """Tiles of SIDE x SIDE pixels, ordered by reduction, row and column."""
    for reduction in REDUCTIONS:
        size = photograph.width // reduction, photograph.height // reduction
        small = photograph.resize(size, Image.Resampling.LANCZOS)
        for top in range(0, small.height - SIDE + 1, SIDE):
            for left in range(0, small.width - SIDE + 1, SIDE):
                tile = small.crop((left, top, left + SIDE, top + SIDE))
                if np.asarray(tile, float).std() >= MIN_DEVIATION:
                    yield tile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="output folder, for hr/NUMBER/0.png")
    parser.add_argument("photographs", type=Path, nargs="+", help="photographs, in the order that numbers the tiles")
    options = parser.parse_args()
    count = 0
    for path in options.photographs:
        try:
            photograph = Image.open(path).convert("RGB")
        except OSError as error:
            parser.error(f"{path} cannot be read ({error}), expected an image file")
        for tile in tiles(photograph):
            folder = options.target / "hr" / f"{count:05}"
            folder.mkdir(parents=True, exist_ok=True)
            tile.save(folder / "0.png")
            count += 1
    print(f"{count} tiles in {options.target}")


if __name__ == "__main__":
    main()
