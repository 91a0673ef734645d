"""Checkpoints: everything a run needs to resume, in one file that is written atomically."""

import json
import pickle
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from stablevsr.atomic import replacing
from stablevsr.errors import UserError
from stablevsr.training.recipe import Recipe

# Settings that may change when a run resumes: they do not affect its results.
FREE = ("output", "log_every", "checkpoint_every", "sample_every", "workers")


def fingerprint(recipe: Recipe, world: int) -> dict[str, str]:
    """The settings that a checkpoint and its run must share, as JSON; `world` is the number of processes."""
    settings = {**asdict(recipe), "processes": world}
    return {name: json.dumps(value) for name, value in settings.items() if name not in FREE}


def save_checkpoint(
    path: Path,
    recipe: Recipe,
    world: int,
    step: int,
    learner: nn.ModuleDict,
    average: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
) -> None:
    """Write a checkpoint atomically.

    Raises:
        UserError: if it cannot be written; the previous checkpoint is kept.
    """
    state = {
        "recipe": fingerprint(recipe, world),
        "step": step,
        "weights": learner.state_dict(),
        "average": average,
        "optimiser": optimiser.state_dict(),
    }
    try:
        with replacing(path) as part:
            torch.save(state, part)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(
            f"checkpoint {path} cannot be written ({error}): run again to resume from the previous one, which is intact"
        ) from error


def load_checkpoint(
    path: Path,
    recipe: Recipe,
    world: int,
    learner: nn.ModuleDict,
    average: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
) -> int:
    """Load weights, moving average and optimiser state from a checkpoint; returns the number of completed steps.

    Raises:
        UserError: if the file is damaged, or was written with other settings; the message names the first that differs.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        theirs, ours = dict(state["recipe"]), fingerprint(recipe, world)
    except (OSError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError, EOFError, KeyError) as error:
        raise UserError(f"checkpoint {path} is damaged ({error}): delete it to start over") from error
    for name in sorted({*theirs, *ours}):
        if theirs.get(name) != ours.get(name):
            raise UserError(
                f"checkpoint {path} has {name} = {theirs.get(name)}, expected {ours.get(name)} as in the recipe: "
                "choose another output, or delete the checkpoint"
            )
    weights, kept = (_named(state[name], learner) for name in ("weights", "average"))
    try:
        learner.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"checkpoint {path} does not fit the model configuration of the starting weights: "
            "choose another output, or delete the checkpoint"
        ) from error
    for name, value in average.items():  # version 0.1 stored one even with ema = 0
        value.copy_(kept[name])
    optimiser.load_state_dict(state["optimiser"])
    return state["step"]


def _named(tensors: dict[str, Tensor], learner: nn.ModuleDict) -> dict[str, Tensor]:
    """Tensors under the names of `learner`; version 0.1, which trained one part at a time, left its name out."""
    (first, *_) = learner
    lacks = not any(name.startswith(tuple(f"{part}." for part in learner)) for name in tensors)
    return {f"{first}.{name}": value for name, value in tensors.items()} if lacks else tensors
