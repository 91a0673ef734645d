"""A model that waits in the computer's memory, with one part at a time on the GPU."""

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn

PARTS = ("unet", "tcm", "vae", "flow", "tiny")


class Offloaded:
    """A model on the CPU whose parts come to the GPU when they are called: `sampling.networks.Networks`.

    Each goes when the next one comes, so that the GPU holds one part and what it computes. Nothing is copied back, for
    the originals never left. The text tower works on the CPU, once a run.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self.device = model, device
        self._at_work: nn.Module | None = None
        self._originals: list[tuple[Tensor, Tensor]] = []
        for name in PARTS:
            part = getattr(model, name)
            if part is not None and device.type == "cuda":
                if name != "flow":  # which it does not help
                    part.to(memory_format=torch.channels_last)
                for tensor in chain(part.parameters(), part.buffers()):
                    tensor.data = tensor.data.pin_memory()  # copied several times as fast
            setattr(self, name, part and OffloadedPart(part, self))

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    def encode_prompt(self, prompt: str | None) -> Tensor:
        """As `StableVSR.encode_prompt`; the result is on the GPU."""
        return self._model.encode_prompt(prompt).to(self.device)

    def bring(self, part: nn.Module) -> None:
        """Have this part, and no other, on the GPU."""
        if part is self._at_work:
            return
        for tensor, original in self._originals:
            tensor.data = original
        self._at_work = part
        self._originals = [(tensor, tensor.data) for tensor in chain(part.parameters(), part.buffers())]
        for tensor, original in self._originals:
            tensor.data = original.to(self.device, non_blocking=True, copy=True)


class OffloadedPart:
    """A network that comes to the GPU when it is called."""

    def __init__(self, network: nn.Module, owner: Offloaded) -> None:
        self._network, self._owner = network, owner

    def __call__(self, *arguments: object) -> object:
        self._owner.bring(self._network)
        return self._network(*arguments)

    def decode(self, latent: Tensor) -> Tensor:
        """Of the VAE."""
        self._owner.bring(self._network)
        return self._network.decode(latent)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Brings the network first, because callers ask its parameters for the device that it works on."""
        self._owner.bring(self._network)
        return self._network.parameters()

    def __getattr__(self, name: str) -> object:
        return getattr(self._network, name)
