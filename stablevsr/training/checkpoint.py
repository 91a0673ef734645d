"""All that a run needs to go on, in one file that is whole or not there."""

import json
import pickle
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from stablevsr.atomic import replacing
from stablevsr.errors import UserError
from stablevsr.training.recipe import Recipe

# What may change between the pieces of a run without changing what it computes.
FREE = ("output", "log_every", "checkpoint_every", "sample_every", "workers")


def fingerprint(recipe: Recipe, world: int) -> dict[str, str]:
    """The settings that a checkpoint must agree with, as text; `world` is the number of processes."""
    settings = {**asdict(recipe), "processes": world}
    return {name: json.dumps(value) for name, value in settings.items() if name not in FREE}


def save_checkpoint(
    path: Path,
    recipe: Recipe,
    world: int,
    step: int,
    learner: nn.Module,
    average: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
) -> None:
    """Write a checkpoint; `UserError` if it cannot be written, the previous one is then still there."""
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
        raise UserError(f"checkpoint {path} could not be written ({error}); the one before it is intact") from error


def load_checkpoint(
    path: Path,
    recipe: Recipe,
    world: int,
    learner: nn.Module,
    average: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
) -> int:
    """Fill weights, moving average and optimiser from a checkpoint; returns the number of steps done.

    Raises:
        UserError: for a damaged file, and for a checkpoint of another recipe, naming the setting.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        theirs, ours = dict(state["recipe"]), fingerprint(recipe, world)
    except (OSError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError, EOFError, KeyError) as error:
        raise UserError(f"checkpoint {path} is damaged ({error}); remove it to start again") from error
    for name in sorted({*theirs, *ours}):
        if theirs.get(name) != ours.get(name):
            raise UserError(
                f"checkpoint {path} was made with {name} = {theirs.get(name)}, the recipe says {ours.get(name)}: "
                "give the recipe another output, or remove the checkpoint"
            )
    try:
        learner.load_state_dict(state["weights"])
    except RuntimeError as error:
        raise UserError(f"checkpoint {path} is of another configuration than the weights to start from") from error
    for name, value in average.items():  # checkpoints of version 0.1 have one even where the recipe wants none
        value.copy_(state["average"][name])
    optimiser.load_state_dict(state["optimiser"])
    return state["step"]
