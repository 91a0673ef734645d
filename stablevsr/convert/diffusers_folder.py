"""Reading and writing the published folder layout (diffusers)."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from stablevsr.config import ScheduleConfig, TemporalTinyConfig, VAEConfig
from stablevsr.convert import checkpoint, published_config
from stablevsr.convert.checkpoint import find_weights, read_json
from stablevsr.convert.draft import Draft, embed_empty_prompt, on_meta, to_ours
from stablevsr.convert.keys import (
    DIFFUSERS_TCM,
    DIFFUSERS_UNET,
    DIFFUSERS_VAE,
    DIFFUSERS_VAE_OLD,
    TRANSFORMERS_TEXT,
    TRANSFORMERS_TEXT_BARE,
    Table,
    diffusers_temporal_tiny,
    diffusers_tiny,
    rename,
)
from stablevsr.convert.published_keys import Notify
from stablevsr.errors import WeightsError
from stablevsr.nn.autoencoder import build_vae
from stablevsr.nn.tcm import TCM
from stablevsr.nn.text import TextEncoder
from stablevsr.nn.tiny import TinyDecoder
from stablevsr.nn.unet import UNet
from stablevsr.prompt import VOCABULARY_FILES, Tokenizer
from stablevsr.sampling.config import STREAMING, SamplingConfig
from stablevsr.weights import Header

POSITION_IDS = "embeddings.position_ids"  # a buffer in older files: 0, 1, 2, ...

VAE_TABLES: dict[str, Table] = {"new": DIFFUSERS_VAE, "old": DIFFUSERS_VAE_OLD}
TEXT_TABLES: dict[str, Table] = {"text_model.": TRANSFORMERS_TEXT, "": TRANSFORMERS_TEXT_BARE}


def read_folder(folder: Path, variant: str | None = None, notify: Notify | None = None) -> Draft:
    """Read the folder of StableVSR, Stream-DiffVSR or the stock SD x4 upscaler (which has no `controlnet`).

    Args:
        notify: called with a sentence for each config with keys that its class does not read.

    Raises:
        WeightsError: for anything missing, unknown, misshapen or unsupported, naming the file and the key.
    """
    if not folder.is_dir():
        raise WeightsError(f"{folder} {'is a file' if folder.exists() else 'does not exist'}, expected a folder")
    draft = read_configs(folder, notify)
    _read_unet(draft, folder / "unet", variant)
    _read_vae(draft, folder / "vae", variant)
    _read_text(draft, folder / "text_encoder", variant)
    draft.tokenizer = read_tokenizer(folder / "tokenizer")
    embed_empty_prompt(draft, read_tokens(draft, folder / "tokenizer"))
    if (folder / "controlnet").is_dir():
        read_tcm(draft, folder / "controlnet", variant, notify)
    return draft


def read_configs(folder: Path, notify: Notify | None = None) -> Draft:
    """The configurations of `read_folder`, but for the TCM's, without any weights; raises as that does."""
    vae = _read_vae_config(folder / "vae", notify)
    is_streaming = isinstance(vae, TemporalTinyConfig)
    read_schedule = published_config.read_ddim_schedule if is_streaming else published_config.read_schedule
    unet = published_config.read_unet(*_config(folder / "unet"), notify)
    draft = Draft(
        unet=unet,
        vae=vae,
        schedule=read_schedule(*_config(folder / "scheduler", "scheduler_config.json"), notify),
        text=published_config.read_text(*_config(folder / "text_encoder"), notify),
        sampling=STREAMING if is_streaming else SamplingConfig(),
    )
    if unet.encoder.num_noise_levels is not None:
        low_res = _config(folder / "low_res_scheduler", "scheduler_config.json")
        draft.low_res_schedule = published_config.read_schedule(*low_res, notify)
        index = folder / "model_index.json"
        if index.is_file():
            draft.max_noise_level = read_json(index).get("max_noise_level") or draft.max_noise_level
    return draft


def read_tcm(draft: Draft, folder: Path, variant: str | None = None, notify: Notify | None = None) -> None:
    """Read the TCM of a `controlnet` folder into the draft, in place of any TCM of the base."""
    draft.tcm = published_config.read_tcm(*_config(folder), notify)
    tensors, name = find_weights(folder, variant)
    draft.tensors["tcm"] = to_ours(tensors, on_meta(TCM, draft.tcm), DIFFUSERS_TCM, str(folder / name))
    draft.provenance["tcm"] = f"diffusers, {folder.name}/{name}"


def read_tiny(draft: Draft, folder: Path, variant: str | None = None, notify: Notify | None = None) -> None:
    """Read the decoder of an AutoencoderTiny folder into the draft, for temporal guidance."""
    draft.tiny = published_config.read_tiny(*_config(folder), notify)
    tensors, name = find_weights(folder, variant)
    decoder = {key: tensor for key, tensor in tensors.items() if key.startswith("decoder.")}
    table = diffusers_tiny(draft.tiny)
    draft.tensors["tiny"] = to_ours(decoder, on_meta(TinyDecoder, draft.tiny), table, str(folder / name))
    draft.provenance["tiny"] = f"diffusers, {folder.name}/{name}"


def read_tokenizer(folder: Path) -> dict[str, str]:
    """The contents of the vocabulary files, by file name."""
    texts = {name: checkpoint.read_text_file(folder / name) for name in VOCABULARY_FILES[:2]}
    for name in VOCABULARY_FILES[2:]:
        if (folder / name).is_file():
            texts[name] = checkpoint.read_text_file(folder / name)
    return texts


def read_tokens(draft: Draft, folder: Path) -> list[int]:
    """The empty prompt's tokens in the draft's vocabulary, whose size must match the text tower."""
    assert draft.tokenizer is not None
    assert draft.text is not None
    tokenizer = Tokenizer(draft.tokenizer, draft.text.num_tokens)
    if tokenizer.size != draft.text.vocab_size:
        raise WeightsError(
            f"{folder} has a vocabulary of {tokenizer.size} tokens, the text encoder has {draft.text.vocab_size}: "
            "they do not belong together"
        )
    return tokenizer.empty()


def _config(folder: Path, name: str = "config.json") -> tuple[dict, str]:
    return read_json(folder / name), str(folder / name)


def _read_unet(draft: Draft, folder: Path, variant: str | None) -> None:
    tensors, name = find_weights(folder, variant)
    draft.tensors["unet"] = to_ours(tensors, on_meta(UNet, draft.unet), DIFFUSERS_UNET, str(folder / name))
    draft.provenance["unet"] = f"diffusers, {folder.name}/{name}"


def _read_vae_config(folder: Path, notify: Notify | None) -> VAEConfig | TemporalTinyConfig:
    config, source = _config(folder)
    read = published_config.read_temporal_tiny if published_config.is_tiny(config) else published_config.read_vae
    return read(config, source, notify)


def _read_vae(draft: Draft, folder: Path, variant: str | None) -> None:
    tensors, name = find_weights(folder, variant)
    if not isinstance(draft.vae, TemporalTinyConfig):
        draft.naming["vae_attention"] = "old" if any(".query." in key for key in tensors) else "new"
    elif not any(".temporal_processor." in key for key in tensors):
        raise WeightsError(
            f"{folder / name} is a tiny autoencoder without temporal modules, expected AutoencoderKL "
            "or TemporalAutoencoderTiny: pass a plain one with --tiny, to decode for guidance"
        )
    table = _vae_table(draft.vae, draft.naming)
    draft.tensors["vae"] = to_ours(tensors, on_meta(build_vae, draft.vae), table, str(folder / name))
    draft.provenance["vae"] = f"diffusers, {folder.name}/{name}"


def _vae_table(config: VAEConfig | TemporalTinyConfig, naming: dict[str, str]) -> Table:
    if isinstance(config, TemporalTinyConfig):
        return diffusers_temporal_tiny(config)
    return VAE_TABLES.get(naming.get("vae_attention", "new"), DIFFUSERS_VAE)


def _read_text(draft: Draft, folder: Path, variant: str | None) -> None:
    tensors, name = find_weights(folder, variant)
    prefix = "text_model." if any(key.startswith("text_model.") for key in tensors) else ""
    position_ids = prefix + POSITION_IDS
    if position_ids in tensors:
        draft.naming["text_position_ids"] = "yes"
        tensors = {key: tensor for key, tensor in tensors.items() if key != position_ids}
    expected = on_meta(TextEncoder, draft.text)
    draft.tensors["text"] = to_ours(tensors, expected, TEXT_TABLES[prefix], str(folder / name))
    draft.naming["text_prefix"] = prefix
    draft.provenance["text"] = f"diffusers, {folder.name}/{name}"


def write_folder(folder: Path, header: Header, tensors: dict[str, Tensor]) -> list[str]:
    """Write the parts of a weights file in the published layout, with the same keys and bits.

    Returns:
        The parts written. The layout has no place for the flow network.
    """
    config, naming = header.config, header.naming
    text_prefix = naming.get("text_prefix", "text_model.")
    text_table = TEXT_TABLES.get(text_prefix, TRANSFORMERS_TEXT)
    folder.mkdir(parents=True)
    _write_json(folder / "model_index.json", _model_index(header))
    _write_part(folder / "unet", published_config.write_unet(config.unet), _part(tensors, "unet"), DIFFUSERS_UNET)
    _write_part(folder / "controlnet", published_config.write_tcm(config.tcm), _part(tensors, "tcm"), DIFFUSERS_TCM)
    _write_vae(folder / "vae", config.vae, _part(tensors, "vae"), naming)
    _write_schedule(folder / "scheduler", config.schedule)
    written = ["unet", "controlnet", "vae", "scheduler"]
    if config.low_res_schedule is not None:
        _write_schedule(folder / "low_res_scheduler", config.low_res_schedule)
        written.append("low_res_scheduler")
    if config.text is not None:
        text = published_config.write_text(config.text)
        extra = {}
        if naming.get("text_position_ids"):
            extra[text_prefix + POSITION_IDS] = torch.arange(config.text.num_tokens)[None]
        _write_part(folder / "text_encoder", text, _part(tensors, "text"), text_table, "model", extra)
        written.append("text_encoder")
    if header.tokenizer is not None:
        (folder / "tokenizer").mkdir()
        for name, content in header.tokenizer.items():
            (folder / "tokenizer" / name).write_text(content, encoding="utf-8")
        written.append("tokenizer")
    return written


def _part(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    prefix = part + "."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _write_part(
    folder: Path,
    config: published_config.Json,
    tensors: dict[str, Tensor],
    table: Table,
    stem: str = "diffusion_pytorch_model",
    extra: dict[str, Tensor] | None = None,
) -> None:
    folder.mkdir()
    _write_json(folder / "config.json", config)
    published = {rename(name, table): tensor.contiguous() for name, tensor in tensors.items()}
    save_file({**published, **(extra or {})}, folder / f"{stem}.safetensors", metadata={"format": "pt"})


def _write_vae(
    folder: Path, config: VAEConfig | TemporalTinyConfig, tensors: dict[str, Tensor], naming: dict[str, str]
) -> None:
    if isinstance(config, TemporalTinyConfig):
        published = published_config.write_temporal_tiny(config)
    else:
        published = published_config.write_vae(config)
    _write_part(folder, published, tensors, _vae_table(config, naming))


def _write_schedule(folder: Path, config: ScheduleConfig) -> None:
    folder.mkdir()
    _write_json(folder / "scheduler_config.json", published_config.write_schedule(config))


def _model_index(header: Header) -> published_config.Json:
    index: published_config.Json = {
        "_class_name": "StableVSRPipeline",
        "controlnet": ["diffusers", "ControlNetModel"],
        "scheduler": ["diffusers", published_config.write_schedule(header.config.schedule)["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if header.config.is_streaming:
        # diffusers has no such autoencoder: the pipeline brings its own.
        index |= {"_class_name": "StreamDiffVSRPipeline", "vae": [None, "TemporalAutoencoderTiny"]}
        index |= {"feature_extractor": [None, None], "safety_checker": [None, None]}
    if header.config.low_res_schedule is not None:
        index["low_res_scheduler"] = ["diffusers", "DDPMScheduler"]
        index["max_noise_level"] = header.config.max_noise_level
    if header.config.text is not None:
        index["text_encoder"] = ["transformers", "CLIPTextModel"]
        index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    return index


def _write_json(path: Path, value: published_config.Json) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
