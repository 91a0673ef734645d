"""Decoding and encoding large frames in overlapping tiles, for when the whole does not fit into memory."""

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from stablevsr.config import SCALE
from stablevsr.runtime import out_of_memory
from stablevsr.sampling.networks import Networks
from stablevsr.sampling.pictures import bicubic

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

    def part(top: int, left: int) -> Tensor:
        return decode(latent[..., top : top + tile, left : left + tile])

    return _blended(part, height, width, tile, SCALE)


def encode_in_tiles(encode: Callable[[Tensor], Tensor], picture: Tensor, tile: int) -> Tensor:
    """The inverse: (n, 3, 4h, 4w) to (n, c, h, w), in tiles of `tile` latent pixels."""
    height, width = (side // SCALE for side in picture.shape[-2:])

    def part(top: int, left: int) -> Tensor:
        return encode(picture[..., SCALE * top : SCALE * (top + tile), SCALE * left : SCALE * (left + tile)])

    return _blended(part, height, width, tile, 1)


def _blended(part: Callable[[int, int], Tensor], height: int, width: int, tile: int, scale: int) -> Tensor:
    """Parts by top and left, in latent pixels, as one whole; `scale` is the size of the result over the latent's."""
    total: Tensor | None = None
    weights: Tensor | None = None
    for top in starts(height, tile):
        for left in starts(width, tile):
            each = part(top, left).float()
            if total is None or weights is None:
                total = each.new_zeros(*each.shape[:2], scale * height, scale * width)
                weights = each.new_zeros(scale * height, scale * width)
            h, w = each.shape[-2:]
            weight = ramp(h, each.device)[:, None] * ramp(w, each.device)
            y, x = slice(scale * top, scale * top + h), slice(scale * left, scale * left + w)
            total[..., y, x] += weight * each
            weights[y, x] += weight
    assert total is not None  # there is always a tile
    assert weights is not None
    return total / weights


class PictureDecoder:
    """Scaled latents to pictures, and LR frames to the latents of their enlargement; whole or in tiles.

    Args:
        tile: side of a tile in latent pixels; "off" takes whole frames; "auto" too, until memory runs out, and tiles
            of 64 from then on, with a warning.
    """

    def __init__(self, model: Networks, tile: int | str = "auto") -> None:
        self._model, self._vae = model, model.vae
        self._side = tile if isinstance(tile, int) else None
        self._automatic = tile == "auto"

    @property
    def has_fallen_back(self) -> bool:
        """Whether memory ran out, so that decoding and encoding switched to tiles."""
        return self._automatic and self._side is not None

    def fall_back(self) -> None:
        """Use tiles from here on, as if memory had run out."""
        self._side = AUTO_TILE

    @torch.no_grad()
    def __call__(self, latent: Tensor) -> Tensor:
        """(n, c, h, w), scaled, to (n, 3, 4h, 4w), about [-1, 1], not clamped."""
        latent = latent.to(self._model.device, self._vae.dtype) / self._vae.scaling_factor
        return self._in_memory(self._decode, latent)

    @torch.no_grad()
    def encode_enlarged(self, low_res: Tensor) -> Tensor:
        """An LR frame, (3, h, w) in [-1, 1], to the scaled latent of its bicubic enlargement, (c, h, w) float32."""
        # Clamped: the interpolation overshoots, the pictures that the encoder was trained on do not.
        picture = bicubic(low_res.to(self._model.device)[None]).clamp(-1, 1).to(self._vae.dtype)
        return self._in_memory(self._encode, picture)[0].float() * self._vae.scaling_factor

    def _in_memory(self, work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`work(x)`; if memory runs out, in tiles from here on."""
        try:
            return work(x)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or not self._automatic or self.has_fallen_back:
                raise
        # Outside the handler, whose traceback keeps alive what filled the memory.
        self.fall_back()
        log.warning("out of memory: decoding in tiles of %dx%d from here on", AUTO_TILE, AUTO_TILE)
        return work(x)

    def _decode(self, latent: Tensor) -> Tensor:
        if self._side is None or max(latent.shape[-2:]) <= self._side:
            return self._vae.decode(latent)
        return decode_in_tiles(self._vae.decode, latent, self._side).to(latent.dtype)

    def _encode(self, picture: Tensor) -> Tensor:
        if self._side is None or max(picture.shape[-2:]) <= SCALE * self._side:
            return self._mean(picture)
        return encode_in_tiles(self._mean, picture, self._side)

    def _mean(self, picture: Tensor) -> Tensor:
        """The encoder's latent; of a Gaussian the mean, for noise is added anyway."""
        latent = self._vae.encode(picture)
        return latent if isinstance(latent, Tensor) else latent.mean
