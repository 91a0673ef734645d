"""A recipe from file to weights file."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stablevsr.atomic import replacing
from stablevsr.errors import UserError
from stablevsr.model import StableVSR, build_model
from stablevsr.nn.tcm import starting_state
from stablevsr.presets import PRESETS
from stablevsr.training.data import ProceduralWindows, Windows
from stablevsr.training.folders import FolderWindows
from stablevsr.training.loop import Trainer, checkpoint_blocks, start_processes
from stablevsr.training.recipe import Recipe, read_recipe
from stablevsr.training.stages import STAGES, Stage, StageLoss
from stablevsr.weights import Header, check_finite, check_tensors, read_safetensors, write


def train(path: Path, device: torch.device) -> Path:
    """Run a recipe, from its checkpoint if there is one; returns the weights file it wrote.

    Raises:
        UserError: for a recipe, data or weights that make no sense.
    """
    recipe = read_recipe(path)
    stage = STAGES[recipe.stage]
    device = start_processes(device)
    model = starting_model(recipe, path.parent)
    folder = path.parent / recipe.output
    folder.mkdir(parents=True, exist_ok=True)
    loss = StageLoss(model.to(device), stage)
    loss.learner.train()
    if recipe.gradient_checkpointing:
        checkpoint_blocks(loss.learner)
    if recipe.compile:
        loss.learner.compile()
    trainer = Trainer(recipe, loss, open_windows(recipe, stage, path.parent), folder, device)
    weights = trainer.run()
    output = folder / "model.safetensors"
    if trainer.rank == 0:
        loss.learner.load_state_dict(weights)
        origin = f"trained by {path.name}, {recipe.steps} steps"
        write(output, Header(model.config, {**model.provenance, stage.part: origin}), model.cpu().state_dict())
        with replacing(folder / f"{stage.part}.safetensors") as part:
            save_file({f"{stage.part}.{name}": value.contiguous().cpu() for name, value in weights.items()}, part)
    return output


def starting_model(recipe: Recipe, base: Path) -> StableVSR:
    """The model that a recipe starts from, on the CPU in float32."""
    if recipe.init:
        model = build_model(base / recipe.init, device="cpu")
    elif recipe.preset in PRESETS:
        torch.manual_seed(recipe.seed)
        model = StableVSR(PRESETS[recipe.preset])
        torch.nn.init.normal_(model.empty_prompt)
        model.tcm.zero()
        model.provenance = dict.fromkeys(("unet", "tcm", "vae", "flow"), "untrained, random")
    else:
        raise UserError(f"preset is {recipe.preset!r}, expected one of {', '.join(PRESETS)}")
    for part, file in recipe.parts.items():
        if part not in ("unet", "tcm", "vae", "flow"):
            raise UserError(f"parts names {part!r}, expected unet, tcm, vae or flow")
        getattr(model, part).load_state_dict(read_part(base / file, part, getattr(model, part)))
        model.provenance[part] = f"from {Path(file).name}"
    if recipe.tcm_from_unet:
        model.tcm.load_state_dict(starting_state(model.config.tcm, model.unet.state_dict()))
    return model.eval()


def read_part(path: Path, part: str, network: nn.Module) -> dict[str, Tensor]:
    """The parameters of one part, from a weights file or from a file that holds the part alone (`PART.safetensors`)."""
    prefix = part + "."
    tensors = {name: tensor for name, tensor in read_safetensors(path).items() if name.startswith(prefix)}
    check_tensors(tensors, {prefix + name: tensor for name, tensor in network.state_dict().items()}, str(path))
    check_finite(tensors, str(path))
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def open_windows(recipe: Recipe, stage: Stage, base: Path) -> Windows:
    """The training data of a recipe."""
    data = recipe.data
    if data.kind == "folders":
        return FolderWindows(recipe.seed, data.crop, base / data.root, data.include, data.exclude, stage.num_frames)
    return ProceduralWindows(
        recipe.seed, data.crop, data.pool, data.side, stage.num_frames, data.speed, stage.needs_flow
    )
