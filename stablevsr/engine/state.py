"""The state of a run, as it is saved."""

import json
from dataclasses import dataclass

import torch
from safetensors.torch import load, save
from torch import Tensor

PHASES = ("flow", "denoise", "decode", "stream")


@dataclass(frozen=True)
class RunState:
    """Everything that a run needs to continue, apart from its arrays.

    Units of work are counted over the whole run: frame-steps, then the frames of the final decode; in streaming mode
    frames.
    """

    phase: str = "flow"
    done: int = 0  # units of the phase: pairs of frames, frame-steps, frames
    x0: Tensor | None = None  # (c, h, w), the clean estimate of the last frame-step, on the run's device
    picture: Tensor | None = None  # (3, 4h, 4w), the last finished frame of a stream, on the run's device
    tiled_since: int | None = None  # the unit from which decoding is tiled, because memory ran out
    depth: str | None = None  # the format of the decoded pictures

    def to_bytes(self) -> bytes:
        progress = {"phase": self.phase, "done": self.done, "tiled_since": self.tiled_since, "depth": self.depth}
        kept = {"x0": self.x0, "picture": self.picture}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in kept.items() if tensor is not None}
        return save(tensors, {"state": json.dumps(progress)})

    @classmethod
    def from_bytes(cls, data: bytes, device: torch.device) -> "RunState":
        """The inverse of `to_bytes`; raises ValueError for anything else.

        Args:
            device: where its tensors go.
        """
        size = int.from_bytes(data[:8], "little")
        progress = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["state"])
        if progress["phase"] not in PHASES or type(progress["done"]) is not int:
            raise ValueError("not the state of a run")
        tensors = {name: tensor.to(device) for name, tensor in load(data).items()}
        return cls(**progress, x0=tensors.get("x0"), picture=tensors.get("picture"))
