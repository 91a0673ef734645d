"""How much of Temporal Texture Guidance (paper, section 4.2) is done."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from stablevsr.config import SCALE
from stablevsr.errors import UserError
from stablevsr.sampling.schedule import Step


@dataclass(frozen=True)
class Guidance:
    """How much of the guidance (paper, section 4.2) is done. The default is all of it, as published.

    Decoding the neighbour's clean estimate is about three quarters of the compute. These options trade temporal
    consistency for speed; see the README.
    """

    every: int = 1  # guide one step in so many; in the others the UNet is alone
    first_step: int = 0  # leave the steps before this one unguided
    tiny: bool = False  # decode the estimate by the tiny decoder, where the weights hold one
    half_size: bool = False  # decode the estimate at half size
    half_flow: bool = False  # estimate the flow at half size

    def __post_init__(self) -> None:
        if self.every < 1 or self.first_step < 0:
            raise UserError(
                f"got guidance in every {self.every} steps from step {self.first_step}, expected 1 and 0 at least"
            )

    def wanted(self, step: Step) -> bool:
        """Whether this step is guided.

        The guided steps go forwards and backwards in turn, as all steps do: with an even `every` they would otherwise
        all go the same way, and detail with them.
        """
        block, offset = divmod(step.index, self.every)
        return step.index >= self.first_step and offset == (block % 2 if self.every % 2 == 0 else 0)

    def picture(self, decode: Callable[[Tensor], Tensor], x0: Tensor) -> Tensor:
        """The clean estimate (1, c, h, w) as a picture (1, 3, 4h, 4w), about [-1, 1]."""
        if not self.half_size:
            return decode(x0)
        height, width = x0.shape[-2:]
        even = F.pad(x0, (0, width % 2, 0, height % 2), mode="replicate")
        small = decode(F.avg_pool2d(even, 2))
        large = F.interpolate(small.float(), scale_factor=2, mode="bilinear", align_corners=False).to(small.dtype)
        return large[..., : SCALE * height, : SCALE * width]


PUBLISHED = Guidance()
