"""What the sampler reads and writes, kept in a workspace: the memory of a run does not grow with the clip."""

import torch
from torch import Tensor

from stablevsr.jobs.workspace import ArrayFile
from stablevsr.runtime import send
from stablevsr.sampling.bidirectional import pass_order
from stablevsr.sampling.networks import Networks
from stablevsr.sampling.noise import NoiseSource, as_draw
from stablevsr.sampling.pictures import Frames, normalise
from stablevsr.sampling.video import flow_between


class StoredFrames:
    """LR frames on disk, as `sampling.pictures.Frames`."""

    def __init__(self, array: ArrayFile, count: int) -> None:
        self._array, self._count = array, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, frame: int) -> Tensor:
        return normalise(self._array.read(frame)[None])[0]


class StoredLatents:
    """Latents on disk, as `sampling.bidirectional.Latents`.

    Two slots a frame, written in turn: a frame-step that is cut short has not harmed what it started from.

    Args:
        array: of shape (c, h, w), twice as many as there are frames.
        noise: what frames start from.
        done: how many frame-steps the file has seen.
    """

    def __init__(self, array: ArrayFile, num_frames: int, noise: NoiseSource, device: torch.device, done: int) -> None:
        self._array, self._noise, self._device = array, noise, device
        passes, begun = divmod(done, num_frames)
        self._writes = [passes] * num_frames
        for frame in pass_order(passes, num_frames)[:begun]:
            self._writes[frame] += 1

    def __len__(self) -> int:
        return len(self._writes)

    def __getitem__(self, frame: int) -> Tensor:
        if self._writes[frame] == 0:
            latent = as_draw(self._noise.initial(frame), self._array.shape, f"frame {frame}")
        else:
            latent = self._array.read(2 * frame + self._writes[frame] % 2)
        return send(latent, self._device)

    def __setitem__(self, frame: int, latent: Tensor) -> None:
        self._array.write(2 * frame + (self._writes[frame] + 1) % 2, latent)
        self._writes[frame] += 1


class StoredFlows:
    """Flows on disk, as `sampling.flow.FlowSource`; each entry holds the forward and the backward flow of a pair."""

    def __init__(self, array: ArrayFile) -> None:
        self._array = array

    def between(self, target: int, source: int) -> Tensor:
        return self._array.read(min(target, source))[None, 0 if target > source else 1]


class EstimatedFlows:
    """Flows estimated anew whenever they are asked for: slower, and without a file."""

    def __init__(self, model: Networks, low_res: Frames, half: bool = False) -> None:
        self._model, self._low_res, self._half = model, low_res, half

    def between(self, target: int, source: int) -> Tensor:
        return flow_between(self._model, self._low_res, target, source, self._half)
