"""The conversion: read the parts, assemble them, write the weights file; and back to the published layout."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from stablevsr import weights
from stablevsr.architectures import SD_X4_UPSCALER
from stablevsr.atomic import replacing
from stablevsr.config import TextConfig
from stablevsr.convert import checkpoint, diffusers_folder
from stablevsr.convert.draft import Draft, embed_empty_prompt, tcm_from_unet
from stablevsr.convert.flow import read_flow
from stablevsr.convert.ldm import convert_ldm
from stablevsr.convert.published_keys import Notify
from stablevsr.errors import OptionsError, ResourceError
from stablevsr.model import PARTS, empty_model
from stablevsr.prompt import OPEN_CLIP_EMPTY_PROMPT
from stablevsr.sampling.config import SamplingConfig


@dataclass(frozen=True)
class Sources:
    """The sources of a model's parts."""

    base: Path  # a folder (diffusers layout), an LDM single file, or a weights file of ours
    flow: Path | None = None  # RAFT, from torchvision or princeton-vl; None: the base's, if any
    tcm: Path | None = None  # a `controlnet` folder; None: the base's, else initialised from the UNet
    tiny: Path | None = None  # an AutoencoderTiny folder, its decoder for guidance; None: the base's, if any
    tokenizer: Path | None = None  # a vocabulary for a base without one (LDM)
    variant: str | None = None  # which files of a folder to take, for instance "fp16"
    with_text: bool = False  # keep text tower and vocabulary, for prompts
    origin: dict[str, str] = field(default_factory=dict)  # where the base came from, to be added to the provenance


def convert(
    sources: Sources, output: Path, dtype: torch.dtype | None = None, notify: Notify | None = None
) -> weights.Header:
    """Write the weights file `output` atomically.

    Args:
        dtype: of the floating-point tensors; None keeps the dtype of each part.
        notify: called with a sentence for each published config with keys that its class does not read.

    Returns:
        The header that was written.

    Raises:
        WeightsError: naming the file, the key and what was expected.
        OptionsError: for a text tower or a vocabulary that the base does not have.
        ResourceError: when the file cannot be written.
    """
    draft = _read_base(sources, notify)
    if sources.tcm is not None:
        diffusers_folder.read_tcm(draft, sources.tcm, sources.variant, notify)
    elif draft.tcm is None:
        tcm_from_unet(draft)
    if sources.flow is not None:
        draft.flow, draft.tensors["flow"], draft.provenance["flow"] = read_flow(sources.flow)
    if sources.tiny is not None:
        diffusers_folder.read_tiny(draft, sources.tiny, sources.variant, notify)
    if not sources.with_text:
        draft.drop_text()
    elif draft.text is None:
        raise OptionsError(f"{sources.base} holds no text tower: leave out --with-text, or convert from its source")
    elif draft.tokenizer is None:
        raise OptionsError(f"{sources.base} holds no vocabulary, which prompts need: pass --tokenizer FOLDER")
    draft.provenance |= sources.origin
    header, tensors = draft.finish()
    weights.check_tensors(tensors, empty_model(header).state_dict(), str(sources.base))
    weights.write(output, header, tensors, dtype)
    return header


def _read_base(sources: Sources, notify: Notify | None) -> Draft:
    path = sources.base
    if path.is_dir():
        return diffusers_folder.read_folder(path, sources.variant, notify)
    if path.suffix == ".safetensors" and weights.is_ours(path):
        return _read_ours(path)
    return _read_ldm(path, sources.tokenizer)


def _read_ours(path: Path) -> Draft:
    header, tensors = read_checked(path)
    weights.check_finite(tensors, str(path))
    draft = Draft.from_config(header.config)
    draft.provenance, draft.naming, draft.tokenizer = dict(header.provenance), dict(header.naming), header.tokenizer
    draft.sampling = header.sampling
    draft.empty_prompt = tensors.pop("empty_prompt")
    for name, tensor in tensors.items():
        part, parameter = name.split(".", 1)
        draft.tensors.setdefault(part, {})[parameter] = tensor
    return draft


def _read_ldm(path: Path, tokenizer: Path | None) -> Draft:
    """The original x4-upscaler-ema file. It contains no config: the released one is assumed, and checked."""
    tensors = checkpoint.read_tensors(path)
    parts, config = convert_ldm(tensors, replace(SD_X4_UPSCALER, text=TextConfig()), str(path))
    draft = Draft.from_config(config)
    draft.tcm = draft.flow = draft.tiny = None
    draft.tensors = parts
    draft.provenance = {part: f"LDM, {path.name}" for part in parts}
    weights.check_finite(tensors, str(path))
    tokens: Sequence[int] = OPEN_CLIP_EMPTY_PROMPT
    if tokenizer is not None:
        draft.tokenizer = diffusers_folder.read_tokenizer(tokenizer)
        tokens = diffusers_folder.read_tokens(draft, tokenizer)
    embed_empty_prompt(draft, tokens)
    return draft


def read_checked(path: Path) -> tuple[weights.Header, dict[str, Tensor]]:
    """Header and tensors of a weights file, whose names and shapes must match its configuration."""
    header, tensors = weights.read(path)
    weights.check_tensors(tensors, empty_model(header).state_dict(), str(path))
    return header, tensors


def to_diffusers(path: Path, folder: Path) -> list[str]:
    """Write the parts of a weights file in the published layout, atomically; returns the parts written."""
    if folder.exists():
        raise OptionsError(f"{folder} already exists: choose a new folder")
    header, tensors = read_checked(path)
    if not folder.absolute().parent.is_dir():
        raise OptionsError(f"{folder.parent} does not exist: create it first")
    try:
        with replacing(folder) as part:
            return diffusers_folder.write_folder(part, header, tensors)
    except (OSError, SafetensorError) as error:
        raise ResourceError(f"{folder} could not be written ({error}); nothing was kept of it") from error


def describe(path: Path) -> str:
    """A text that lists the parts of a weights file with parameter counts, dtypes and provenance."""
    header, tensors = read_checked(path)
    lines = [f"{path}: {sum(t.numel() for t in tensors.values()):,} numbers, {path.stat().st_size / 2**20:,.1f} MiB"]
    for part in PARTS:
        own = [tensor for name, tensor in tensors.items() if name.startswith(part + ".")]
        if own:
            dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in own if t.is_floating_point()}))
            count = sum(tensor.numel() for tensor in own)
            lines.append(f"  {part:5} {count:>13,}  {dtypes:9} {header.provenance.get(part, 'unknown source')}")
        else:
            lines.append(f"  {part:5} {'absent':>13}")
    lines += [f"  {name}: {value}" for name, value in header.provenance.items() if name not in (*PARTS, "note")]
    if header.config.is_streaming:
        lines.append("  made for streaming: a temporal tiny autoencoder, past frames only")
    schedule = header.config.schedule
    lines.append(
        f"  schedule: {schedule.beta_schedule}, {schedule.prediction_type}, {schedule.timestep_spacing} spacing"
    )
    plain = SamplingConfig().flat()
    changed = {name: value for name, value in header.sampling.flat().items() if value != plain[name]}
    settings = ", ".join(f"{name} {value}" for name, value in {"steps": header.sampling.steps, **changed}.items())
    lines.append(f"  sampling: {settings}")
    return "\n".join(lines)
