"""Decoding a large latent in overlapping tiles, for when the whole does not fit into memory."""

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from stablevsr.config import SCALE
from stablevsr.runtime import out_of_memory
from stablevsr.sampling.networks import Networks

log = logging.getLogger(__name__)

AUTO_TILE = 64  # latent pixels: what "auto" falls back to


def starts(size: int, tile: int) -> list[int]:
    """Where tiles of length `tile` start: evenly spaced, overlapping by at least a quarter, the last at the border."""
    if size <= tile:
        return [0]
    count = math.ceil((size - tile) / (tile - tile // 4)) + 1
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]


def ramp(length: int, device: torch.device) -> Tensor:
    """Weights that rise from the borders to the middle, never zero."""
    position = torch.arange(length, device=device) + 0.5
    return torch.minimum(position, length - position)


def decode_in_tiles(decode: Callable[[Tensor], Tensor], latent: Tensor, tile: int) -> Tensor:
    """Decode a latent (n, c, h, w) tile by tile: (n, 3, 4h, 4w), blended where tiles overlap.

    Attention and group norm see one tile at a time, so the result differs slightly from decoding the whole.
    """
    height, width = latent.shape[-2:]
    total: Tensor | None = None
    weights: Tensor | None = None
    for top in starts(height, tile):
        for left in starts(width, tile):
            part = decode(latent[..., top : top + tile, left : left + tile]).float()
            if total is None or weights is None:
                total = part.new_zeros(*part.shape[:2], SCALE * height, SCALE * width)
                weights = part.new_zeros(SCALE * height, SCALE * width)
            h, w = part.shape[-2:]
            weight = ramp(h, part.device)[:, None] * ramp(w, part.device)
            y, x = slice(SCALE * top, SCALE * top + h), slice(SCALE * left, SCALE * left + w)
            total[..., y, x] += weight * part
            weights[y, x] += weight
    assert total is not None  # there is always a tile
    assert weights is not None
    return total / weights


class PictureDecoder:
    """Scaled latents to pictures, whole or in tiles.

    Args:
        tile: side of a tile in latent pixels; "off" decodes whole frames; "auto" too, until memory runs out, and
            in tiles of 64 from then on, with a warning.
    """

    def __init__(self, model: Networks, tile: int | str = "auto") -> None:
        self._model, self._vae = model, model.vae
        self._side = tile if isinstance(tile, int) else None
        self._automatic = tile == "auto"

    @property
    def has_fallen_back(self) -> bool:
        """Whether memory ran out, so that decoding switched to tiles."""
        return self._automatic and self._side is not None

    def fall_back(self) -> None:
        """Decode in tiles from here on, as if memory had run out."""
        self._side = AUTO_TILE

    @torch.no_grad()
    def __call__(self, latent: Tensor) -> Tensor:
        """(n, c, h, w), scaled, to (n, 3, 4h, 4w), about [-1, 1], not clamped."""
        latent = latent.to(self._model.device, self._vae.dtype) / self._vae.scaling_factor
        try:
            return self._decode(latent)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or not self._automatic or self.has_fallen_back:
                raise
        # Outside the handler, whose traceback keeps alive what filled the memory.
        self.fall_back()
        log.warning("out of memory: decoding in tiles of %dx%d from here on", AUTO_TILE, AUTO_TILE)
        return self._decode(latent)

    def _decode(self, latent: Tensor) -> Tensor:
        if self._side is None or max(latent.shape[-2:]) <= self._side:
            return self._vae.decode(latent)
        return decode_in_tiles(self._vae.decode, latent, self._side).to(latent.dtype)
