"""Runs a recipe: from a TOML file to a weights file."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from stablevsr.architectures import ARCHITECTURES
from stablevsr.atomic import replacing
from stablevsr.config import ModelConfig, TemporalTinyConfig
from stablevsr.errors import OptionsError, ResourceError, WeightsError
from stablevsr.fields import to_dict
from stablevsr.model import BUNDLED, StableVSR, build_model, find_weights
from stablevsr.nn.tcm import starting_state
from stablevsr.nn.tiny import TemporalProcessor
from stablevsr.runtime import check_dtype, require_compiler
from stablevsr.training.data import MixedWindows, ProceduralWindows, Windows
from stablevsr.training.folders import FolderWindows
from stablevsr.training.loop import Trainer, checkpoint_blocks, start_processes
from stablevsr.training.losses import autoencoder_of, temporal_autoencoder_of
from stablevsr.training.photos import PhotoClips, PhotoWindows
from stablevsr.training.recipe import Recipe, RolloutRecipe, read_recipe
from stablevsr.training.stages import STAGES, TRAINED, Stage, StageLoss, stage_of
from stablevsr.weights import Header, check_finite, check_tensors, read, read_header, read_safetensors, write


def train(path: Path, device: torch.device) -> Path:
    """Run a recipe, resuming from its checkpoint if there is one; returns the path of the weights file.

    Raises:
        UserError: if the recipe, data or weights are invalid or do not fit each other.
    """
    recipe = read_recipe(path)
    parts = STAGES[recipe.stage].parts
    header, model = starting_model(recipe, path.parent)
    source = recipe.init or f"preset {recipe.preset}"
    if (not {"flow", "tcm"}.isdisjoint(parts) or STAGES[recipe.stage].is_streaming) and model.flow is None:
        raise WeightsError(
            f"{source} has no flow network, which stage {recipe.stage} needs: use weights converted with --flow"
        )
    if recipe.stage == "tiny" and model.tiny is None:
        raise WeightsError(
            f"{source} has no tiny decoder, which stage tiny needs: use weights converted with --tiny, or preset small"
        )
    device = start_processes(device)
    teacher = teacher_of(recipe, path.parent, model.config)
    stage = stage_of(recipe, device, autoencoder_of(teacher.to(device)) if teacher else None)
    if recipe.dtype == "bf16":
        check_dtype(device, torch.bfloat16)
    folder = path.parent / recipe.output
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"output folder {folder} cannot be created ({error.strerror}): choose another") from error
    loss = StageLoss(model.to(device), stage)
    loss.learner.train()
    if recipe.gradient_checkpointing:
        checkpoint_blocks(model)  # frozen parts too: the TCM's gradient runs through the UNet's decoder
    if recipe.compile:
        require_compiler(device)
        model.compile_parts()
    trainer = Trainer(recipe, loss, open_windows(recipe, stage, path.parent), folder, device)
    weights = {name: value.contiguous().cpu() for name, value in trainer.run().items()}
    output = folder / "model.safetensors"
    if trainer.rank == 0:
        check_finite(weights, f"the trained {' and '.join(parts)}")
        provenance = header.provenance | dict.fromkeys(parts, f"trained by {path.name}, {recipe.steps} steps")
        write(output, replace(header, provenance=provenance), {**unchanged(recipe, model, path.parent), **weights})
        for part in parts:
            held = {name: value for name, value in weights.items() if name.startswith(part + ".")}
            if part == "unet":  # the UNet was trained with this context only
                held["empty_prompt"] = model.empty_prompt.cpu()
            with replacing(folder / f"{part}.safetensors") as unfinished:
                save_file(held, unfinished)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return output


def located(base: Path, weights: str) -> Path:
    """The weights file that a recipe in the folder `base` means: a path from there, a bundled name, hub:OWNER/NAME."""
    path = base / weights
    is_name = weights in BUNDLED or weights.startswith("hub:")
    return find_weights(weights) if is_name and not path.exists() else path


def unchanged(recipe: Recipe, model: StableVSR, base: Path) -> dict[str, Tensor]:
    """All tensors of the model; those from `recipe.init` keep the bits and dtype of that file."""
    tensors = {name: value.cpu() for name, value in model.state_dict().items()}
    if recipe.init:
        changed = {*recipe.parts, *(["tcm"] if recipe.tcm_from_unet else [])}
        if "unet" in changed:
            changed.add("empty_prompt")
        _, kept = read(located(base, recipe.init))
        tensors |= {name: value for name, value in kept.items() if name.split(".")[0] not in changed}
    return tensors


def starting_model(recipe: Recipe, base: Path) -> tuple[Header, StableVSR]:
    """The header and model that a recipe starts from, on the CPU in float32.

    Raises:
        UserError: if preset, parts or weights files are unknown or do not fit.
    """
    if recipe.init:
        start = located(base, recipe.init)
        model = cast(StableVSR, build_model(start, device="cpu"))  # not offloaded
        header = read_header(start)
    elif recipe.preset in ARCHITECTURES:
        torch.manual_seed(recipe.seed)
        model = StableVSR(ARCHITECTURES[recipe.preset])
        torch.nn.init.normal_(model.empty_prompt)
        model.tcm.zero()
        held = [part for part in TRAINED if getattr(model, part) is not None]
        header = Header(model.config, dict.fromkeys(held, "untrained, random"))
    else:
        raise OptionsError(f"preset is {recipe.preset!r}, expected one of {', '.join(ARCHITECTURES)}")
    _check_kind(recipe, header)
    for part, file in recipe.parts.items():
        if part not in TRAINED or getattr(model, part) is None:
            known = ", ".join(each for each in TRAINED if getattr(model, each) is not None)
            raise OptionsError(f"parts has {part!r}, expected a part of the model: {known}")
        model.load_state_dict(read_part(located(base, file), part, model), strict=False)
        header.provenance[part] = f"from {Path(file).name}"
    if recipe.tcm_from_unet:
        model.tcm.load_state_dict(starting_state(model.config.tcm, model.unet.state_dict()))
        header.provenance["tcm"] = "untrained: initialised from the unet, zero convolutions"
    if recipe.vae_from_tiny:
        _start_decoder(recipe, model, base)
        header.provenance["vae"] = f"untrained: decoder from the tiny decoder of {Path(recipe.teacher).name}"
    if STAGES[recipe.stage].is_rollout:
        if header.config.unet.encoder.num_noise_levels is not None:
            raise WeightsError(
                f"{recipe.init} has noise levels (stock SD x4), which stage {recipe.stage} does not support: "
                "use StableVSR weights"
            )
        header = for_rollout(recipe.rollout, header)
        header.sampling.check(header.config)
    model.config, model.sampling = header.config, header.sampling
    return header, model.eval()


def _check_kind(recipe: Recipe, header: Header) -> None:
    """Raises `WeightsError` unless stage and weights are both for streaming, or neither."""
    if header.config.is_streaming != STAGES[recipe.stage].is_streaming:
        kinds = ("streaming", "StableVSR") if header.config.is_streaming else ("StableVSR", "streaming")
        fitting = ", ".join(name for name, stage in STAGES.items() if stage.is_streaming == header.config.is_streaming)
        raise WeightsError(
            f"{recipe.init or f'preset {recipe.preset}'} has {kinds[0]} weights, but stage {recipe.stage} trains "
            f"{kinds[1]} weights: stages for these are {fitting}"
        )


def teacher_of(recipe: Recipe, base: Path, config: ModelConfig) -> StableVSR | None:
    """The model of `recipe.teacher`, on the CPU in float32; `config` is that of the model to train.

    Raises:
        UserError: if it is no StableVSR model, or its latents have other channels.
    """
    if not recipe.teacher:
        return None
    teacher = cast(StableVSR, build_model(located(base, recipe.teacher), device="cpu"))  # not offloaded
    if teacher.config.is_streaming:
        raise WeightsError(f"teacher {recipe.teacher} has streaming weights, expected StableVSR weights with their VAE")
    theirs, ours = teacher.config.vae.latent_channels, config.vae.latent_channels
    if theirs != ours:
        raise WeightsError(f"teacher {recipe.teacher} has latents of {theirs} channels, expected {ours}")
    return teacher


def _start_decoder(recipe: Recipe, model: StableVSR, base: Path) -> None:
    """Start the decoder of the temporal tiny autoencoder as the teacher's tiny decoder, which may be narrower."""
    teacher = teacher_of(recipe, base, model.config)
    if teacher is None or teacher.tiny is None:
        raise WeightsError(f"teacher {recipe.teacher} has no tiny decoder: omit vae_from_tiny")
    decoder, theirs, ours = temporal_autoencoder_of(model).decoder, teacher.config.tiny, model.config.vae
    assert theirs is not None
    assert isinstance(ours, TemporalTinyConfig)
    if to_dict(replace(theirs, width=ours.width)) != to_dict(ours) or theirs.width > ours.width:
        raise WeightsError(f"the tiny decoder of teacher {recipe.teacher} is {theirs}, expected {ours} or narrower")
    state = decoder.state_dict()
    for name, narrow in teacher.tiny.state_dict().items():
        # Their channels come first and do not read the other ones, so the decoder computes what theirs does.
        place = state[name][: len(narrow)]
        place.zero_()[tuple(slice(side) for side in narrow.shape)] = narrow
    for module in decoder.modules():
        if isinstance(module, TemporalProcessor):
            for parameter in module.convs[1].parameters():  # adds nothing at first
                torch.nn.init.zeros_(parameter)


def for_rollout(rollout: RolloutRecipe, header: Header) -> Header:
    """The header for a distilled model: the rollout's sampler becomes the default of the weights."""
    schedule = replace(header.config.schedule, timestep_spacing=rollout.spacing)
    mode = "streaming" if header.config.is_streaming else "bidirectional"
    sampling = replace(
        header.sampling,
        mode=mode,
        steps=rollout.steps,
        spacing=None,
        sampler="ddim",
        eta=0.0,
        color_fix=rollout.color_fix or header.sampling.color_fix,
    )
    return replace(header, config=replace(header.config, schedule=schedule), sampling=sampling)


def read_part(path: Path, part: str, model: StableVSR) -> dict[str, Tensor]:
    """Tensors of one part from a full weights file or a `PART.safetensors`, under the names of `model`.

    The UNet includes the empty prompt's embedding that it was trained with.

    Raises:
        UserError: if tensors are missing, have another shape, or are not finite.
    """
    wanted = ("unet.", "empty_prompt") if part == "unet" else part + "."
    tensors, expected = (
        {name: tensor for name, tensor in both.items() if name.startswith(wanted)}
        for both in (read_safetensors(path), model.state_dict())
    )
    check_tensors(tensors, expected, str(path))
    check_finite(tensors, str(path))
    return tensors


def open_windows(recipe: Recipe, stage: Stage, base: Path) -> Windows:
    """The dataset of a recipe.

    Raises:
        UserError: if the data folder is missing or has no usable files.
    """
    data = recipe.data
    if data.kind == "folders":
        return FolderWindows(recipe.seed, data.crop, base / data.root, data.include, data.exclude, stage.num_frames)
    procedural = ProceduralWindows(
        recipe.seed, data.crop, data.pool, data.side, stage.num_frames, data.speed, stage.needs_flow
    )
    if data.kind == "procedural":
        return procedural
    clips = PhotoClips(stage.num_frames, data.side, data.speed, stage.needs_flow, data.degraded)
    photos = PhotoWindows(recipe.seed, data.crop, data.pool, clips, base / data.root, data.include, data.exclude)
    return MixedWindows(photos, procedural, data.procedural) if data.procedural else photos
