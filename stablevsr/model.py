"""The model: its table of parts, and building it from a weights file."""

import importlib
import logging
import os
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stablevsr.config import DTYPE_NAMES, ModelConfig
from stablevsr.errors import OptionsError
from stablevsr.nn.autoencoder import build_vae
from stablevsr.nn.raft import RAFT
from stablevsr.nn.tcm import TCM
from stablevsr.nn.text import TextEncoder
from stablevsr.nn.tiny import TemporalTinyVAE, TinyDecoder
from stablevsr.nn.unet import UNet
from stablevsr.nn.vae import VAE
from stablevsr.prompt import Tokenizer
from stablevsr.runtime import Offloaded, check_dtype, pick_device, place, require_compiler
from stablevsr.sampling.config import SamplingConfig
from stablevsr.weights import Header, check_finite, check_tensors
from stablevsr.weights import read as read_weights

log = logging.getLogger(__name__)

BUNDLED = ("small", "small-streaming")  # weights in the package, by name
DTYPES = {name: getattr(torch, dtype) for name, dtype in DTYPE_NAMES.items()}


class Part(NamedTuple):
    """How a network of the model is built, placed and compiled. Its name is that of its field in `ModelConfig`."""

    network: Callable[..., nn.Module]  # builds it from its configuration
    compiled: tuple[str, ...] = ()  # the modules that are compiled, "" for the whole network
    float32_for: tuple[torch.dtype, ...] = ()  # dtypes of the model for which it stays in float32
    channels_last: bool = True
    offloaded: bool = True  # whether it takes turns on the GPU; the text tower runs on the CPU, once per run


PARTS = {
    # In two halves, to run with or without the TCM in between.
    "unet": Part(UNet, compiled=("encoder", "decoder")),
    "tcm": Part(TCM, compiled=("",)),
    # The published VAE overflows in float16, and the tiny one, whose output is fed back, may; bfloat16 has the range.
    "vae": Part(build_vae, compiled=("decoder",), float32_for=(torch.float16,)),
    # Half precision rounds pixel coordinates. Runs once per pair of frames, too rarely for compilation to pay off.
    "flow": Part(RAFT, float32_for=(torch.float16, torch.bfloat16), channels_last=False),
    "tiny": Part(TinyDecoder, compiled=("",)),
    "text": Part(TextEncoder, offloaded=False),
}


class StableVSR(nn.Module):
    """The networks of `PARTS`, None for those missing from the weights, and the empty prompt's embedding."""

    unet: UNet
    tcm: TCM
    vae: VAE | TemporalTinyVAE
    flow: RAFT | None
    tiny: TinyDecoder | None
    text: TextEncoder | None
    empty_prompt: Tensor

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.provenance: dict[str, str] = {}
        self.sampling = SamplingConfig()  # recommended for these weights
        for name, part in PARTS.items():
            own = getattr(config, name)
            setattr(self, name, part.network(own) if own else None)
        self.register_buffer("empty_prompt", torch.zeros(config.context_tokens, config.unet.encoder.context_dim))

    @property
    def device(self) -> torch.device:
        return self.empty_prompt.device

    @property
    def dtype(self) -> torch.dtype:
        return self.empty_prompt.dtype

    @torch.no_grad()
    def encode_prompt(self, prompt: str | None) -> Tensor:
        """The UNet's context for a prompt, (1, tokens, width); None and "" return the stored empty prompt's embedding.

        A prompt that is too long is truncated, with a warning.

        Raises:
            OptionsError: when the weights contain no text encoder.
        """
        if not prompt:
            return self.empty_prompt[None]
        if self.text is None or self.tokenizer is None:
            raise OptionsError(
                f"got the prompt {prompt!r}, but these weights hold no text encoder: convert with --with-text"
            )
        tokens, truncated = self.tokenizer.encode(prompt)
        if truncated:
            log.warning("the prompt is longer than %d tokens and was truncated", len(tokens))
        return self.text(torch.tensor([tokens], device=self.device))

    def parts(self) -> Iterator[tuple[str, nn.Module, Part]]:
        """Name, network and table entry of every part that the weights contain."""
        for name, part in PARTS.items():
            network = getattr(self, name)
            if network is not None:
                yield name, network, part

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move to a device and to `dtype`, except for networks that stay in float32 (`Part.float32_for`)."""
        for _, network, part in self.parts():
            place(network, device, torch.float32 if dtype in part.float32_for else dtype, part.channels_last)
        self.empty_prompt = self.empty_prompt.to(device, dtype)

    def compile_parts(self) -> None:
        """Compile the networks of the denoising loop, one graph each; the first call at each new size is slow."""
        for _, network, part in self.parts():
            for name in part.compiled:
                network.get_submodule(name).compile(dynamic=False)


Model = StableVSR | Offloaded


def empty_model(header: Header) -> StableVSR:
    """A model on the meta device, to be filled by `load_state_dict(..., assign=True)`."""
    tokenizer = Tokenizer(header.tokenizer, header.config.context_tokens) if header.tokenizer else None
    with torch.device("meta"):
        model = StableVSR(header.config, tokenizer)
    model.provenance, model.sampling = header.provenance, header.sampling
    return model.requires_grad_(False).eval()


def build_model(
    weights: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    compile: bool = False,
    offload: bool = False,
) -> Model:
    """Build a model from a weights file, ready for `sample_video`.

    Args:
        weights: a file made by `stablevsr convert`; the name of one in the package, one of `BUNDLED`; or the name of a
            model on the Hugging Face hub, as in "hub:claudiom4sir/StableVSR" or "hub:OWNER/NAME@REVISION", which is
            downloaded and converted once. None is "small".
        device: "cpu", "cuda", "cuda:1", "mps"; None takes the best one available.
        dtype: "fp32", "fp16" or "bf16", see `StableVSR.place`; None is fp32.
        compile: use `torch.compile`: faster after a slow first call.
        offload: keep the weights in CPU memory and one network at a time on the GPU: needs less GPU memory, and is
            slower for the copies.

    Raises:
        WeightsError: for a file that is missing, damaged or not ours, and a name that the hub does not have.
        OptionsError: for an unknown device or dtype, and for offloading without a GPU.
        ResourceError: for a device that this machine does not have, or that does not support the options.
    """
    target = pick_device(device)
    if dtype not in (None, *DTYPES):
        raise OptionsError(f"got dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    check_dtype(target, DTYPES[dtype or "fp32"])
    if compile:
        require_compiler(target)
    if offload and target.type != "cuda":
        raise OptionsError(f"offload saves GPU memory, but the device is {target}: leave it out")
    path = find_weights(weights)
    header, tensors = read_weights(path)
    model = empty_model(header)
    check_tensors(tensors, model.state_dict(), str(path))
    check_finite(tensors, str(path))
    model.load_state_dict(tensors, strict=True, assign=True)
    model.place(torch.device("cpu") if offload else target, DTYPES[dtype or "fp32"])
    if compile:
        model.compile_parts()
    if not offload:
        return model
    for _, network, part in model.parts():
        if part.channels_last:  # even if `place` copied nothing
            network.to(memory_format=torch.channels_last)
    return Offloaded(model, target, [name for name, _, part in model.parts() if part.offloaded])


def bundled_weights(name: str = "small") -> Path:
    """A weights file inside the package, one of `BUNDLED`."""
    return Path(str(resources.files("stablevsr") / "assets" / f"{name}.safetensors"))


def find_weights(weights: str | os.PathLike[str] | None, confirm: Callable[[Any], bool] | None = None) -> Path:
    """The weights file that `weights` of `build_model` means; a file of a name comes before what else the name means.

    Args:
        confirm: asked with a `hub.fetch.Offer` before anything large is downloaded; None agrees.

    Raises:
        UserError: for a model on the hub, as `hub.fetch.weights_by_name` does.
    """
    if weights is None:
        return bundled_weights()
    if weights == "":
        raise OptionsError("got an empty name for the weights: give a file, or a name that stablevsr models lists")
    if not isinstance(weights, str) or os.path.exists(weights):
        return Path(weights)
    if weights in BUNDLED:
        return bundled_weights(weights)
    # Loaded here and so, because the hub's room converts, and conversion needs this module.
    fetch = importlib.import_module("stablevsr.hub.fetch")
    return fetch.weights_by_name(weights, confirm or fetch.agree)
