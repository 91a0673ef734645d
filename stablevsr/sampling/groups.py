"""How the fields of `SamplingConfig` are written, and its groups of options. Imports no torch."""

from dataclasses import dataclass, field
from typing import Any

from stablevsr.errors import OptionsError
from stablevsr.fields import require_types


def option(default: Any, help: str, **more: Any) -> Any:
    """A field with its help text and, in `more`, arguments for argparse: `metavar`, `choices`."""
    return field(default=default, metadata={"help": help, **more})


def require(ok: bool, message: str) -> None:
    """`OptionsError` with this message unless `ok`."""
    if not ok:
        raise OptionsError(message)


@dataclass(frozen=True)
class TemporalGuidance:
    """Temporal Texture Guidance (paper, section 4.2), in bidirectional mode. The defaults are the published ones.

    Decoding the neighbour's x0 is about 75% of the compute. These options trade temporal consistency for speed.
    """

    every: int = option(1, "apply temporal guidance every K steps", metavar="K")
    first_step: int = option(0, "apply no temporal guidance before this step, counted from 0", metavar="STEP")
    tiny: bool = option(False, "decode the guidance frame with the tiny decoder (TAESD)")
    half_size: bool = option(False, "decode the guidance frame at half size")

    def __post_init__(self) -> None:
        require_types(self)
        require(self.every >= 1, f"got temporal.every {self.every}, expected 1 or more")
        require(self.first_step >= 0, f"got temporal.first_step {self.first_step}, expected 0 or more")

    def applies_to(self, step: int) -> bool:
        """Whether step number `step` is guided.

        With an even `every`, the guided steps are shifted so that they still alternate in direction: if all ran the
        same way, detail would drift with them.
        """
        block, offset = divmod(step, self.every)
        return step >= self.first_step and offset == (block % 2 if self.every % 2 == 0 else 0)


@dataclass(frozen=True)
class FlowOptions:
    """How optical flow is estimated. The defaults are the published ones."""

    half_size: bool = option(False, "estimate optical flow at half size, where frames are large enough to gain")

    def __post_init__(self) -> None:
        require_types(self)
