"""The parts together, and how a model comes from a file."""

import os
import warnings
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn

from stablevsr.config import ModelConfig
from stablevsr.errors import UserError
from stablevsr.nn.autoencoder import build_vae
from stablevsr.nn.raft import RAFT
from stablevsr.nn.tcm import TCM
from stablevsr.nn.text import TextEncoder
from stablevsr.nn.tiny import TinyDecoder
from stablevsr.nn.unet import UNet
from stablevsr.offload import Offloaded
from stablevsr.prompt import Tokenizer
from stablevsr.runtime import check_dtype, pick_device, require_compiler
from stablevsr.weights import Header, check_finite, check_tensors
from stablevsr.weights import read as read_weights

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class StableVSR(nn.Module):
    """UNet, TCM, VAE, flow, tiny decoder and text, with the empty prompt's embedding. `sample_video` runs them."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.provenance: dict[str, str] = {}
        self.unet = UNet(config.unet)
        self.tcm = TCM(config.tcm)
        self.vae = build_vae(config.vae)
        self.flow = RAFT(config.flow) if config.flow else None
        self.tiny = TinyDecoder(config.tiny) if config.tiny else None
        self.text = TextEncoder(config.text) if config.text else None
        self.register_buffer("empty_prompt", torch.zeros(config.context_tokens, config.unet.encoder.context_dim))

    @property
    def device(self) -> torch.device:
        return self.empty_prompt.device

    @property
    def dtype(self) -> torch.dtype:
        return self.empty_prompt.dtype

    @torch.no_grad()
    def encode_prompt(self, prompt: str | None) -> Tensor:
        """The UNet's context for a prompt, (1, tokens, width); None and "" give the embedding kept in the file.

        Raises:
            UserError: when the weights hold no text encoder. A prompt that is too long is cut, with a warning.
        """
        if not prompt:
            return self.empty_prompt[None]
        if self.text is None or self.tokenizer is None:
            raise UserError(f"got the prompt {prompt!r}, but these weights hold no text encoder: convert --with-text")
        tokens, truncated = self.tokenizer.encode(prompt)
        if truncated:
            warnings.warn(f"the prompt is longer than {len(tokens)} tokens, its end is cut off", stacklevel=2)
        return self.text(torch.tensor([tokens], device=self.device))

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move to a device; all networks get `dtype`, but for those that need more.

        Flow stays in float32, for half precision would round positions in the picture. The VAE does for float16,
        in which the published one overflows, and for which nothing promises the range of a tiny one whose output is
        fed back; bfloat16 has the range. Weights that are copied anyway come to lie
        channels last, which convolutions like; those that can stay in the mapped file do, for memory's sake.
        """
        for name, part in self.named_children():
            wide = name == "flow" or (name == "vae" and dtype == torch.float16)
            kind = torch.float32 if wide else dtype
            copied = any(tensor.device != device or tensor.dtype != kind for tensor in part.parameters())
            part.to(device, kind)
            if copied and name != "flow":  # which it does not help
                part.to(memory_format=torch.channels_last)
        self.empty_prompt = self.empty_prompt.to(device, dtype)

    def compile_parts(self) -> None:
        """Compile the networks of the denoising loop, one graph each; the first call of each new size is slow.

        The UNet's halves are two, so that they serve with the TCM in between and without. Flow is left out: as a
        rule it is computed once a pair of frames, and would need hundreds of them to make up for its compilation.
        """
        parts = [self.unet.encoder, self.unet.decoder, self.tcm, self.vae.decoder, self.tiny]
        if self.config.is_streaming:  # once a frame, outside of the TCM's graph and the decoder's
            parts += [self.tcm.conditioning, self.vae.encoder]
        for part in parts:
            if part is not None:
                part.compile(dynamic=False)


def empty_model(header: Header) -> StableVSR:
    """A model without memory (on meta), to be filled by `load_state_dict(..., assign=True)`."""
    tokenizer = Tokenizer(header.tokenizer, header.config.context_tokens) if header.tokenizer else None
    with torch.device("meta"):
        model = StableVSR(header.config, tokenizer)
    model.provenance = header.provenance
    return model.requires_grad_(False).eval()


def build_model(
    weights: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    compile: bool = False,
    offload: bool = False,
) -> StableVSR | Offloaded:
    """Build a model from a weights file, ready for `sample_video`.

    Args:
        weights: a file made by `tools/convert_weights.py`; None is the small model that comes with the package.
        device: "cpu", "cuda", "cuda:1", "mps"; None takes the best one there is.
        dtype: "fp32", "fp16" or "bf16", see `StableVSR.place`; None is fp32.
        compile: run the networks through `torch.compile`: faster behind a slow first call.
        offload: keep the networks in the computer's memory, with one at a time on the GPU: less of its memory, and
            slower for the copies.

    Raises:
        UserError: for a file that is damaged or not ours, a device that is not there or has nothing to offload to, an
            unknown dtype.
    """
    target = pick_device(device)
    if dtype not in (None, *DTYPES):
        raise UserError(f"got dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    check_dtype(target, DTYPES[dtype or "fp32"])
    if compile:
        require_compiler(target)
    if offload and target.type != "cuda":
        raise UserError(f"offload keeps networks out of a GPU's memory, but the device is {target}: leave it out")
    path = Path(weights) if weights is not None else bundled_weights()
    header, tensors = read_weights(path)
    model = empty_model(header)
    check_tensors(tensors, model.state_dict(), str(path))
    check_finite(tensors, str(path))
    model.load_state_dict(tensors, strict=True, assign=True)
    model.place(torch.device("cpu") if offload else target, DTYPES[dtype or "fp32"])
    if compile:
        model.compile_parts()
    return Offloaded(model, target) if offload else model


def bundled_weights() -> Path:
    """The weights file inside the package."""
    return Path(str(resources.files("stablevsr") / "assets" / "small.safetensors"))
