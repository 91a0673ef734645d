"""The training loop: one for all stages, for one process or many, with bit-exact resume."""

import csv
import logging
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import cast

import imageio.v3 as iio
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm

from stablevsr.atomic import replacing
from stablevsr.errors import UserError
from stablevsr.nn.attention import Transformer
from stablevsr.nn.layers import ResBlock
from stablevsr.training.checkpoint import load_checkpoint, save_checkpoint
from stablevsr.training.data import Window, Windows
from stablevsr.training.recipe import OptimiserRecipe, Recipe
from stablevsr.training.samples import sample_picture
from stablevsr.training.stages import Randomness, StageLoss

log = logging.getLogger(__name__)
NUM_SAMPLES = 4  # rows of a sample image


def learning_rate(optimiser: OptimiserRecipe, step: int, steps: int) -> float:
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up, then constant or half-cosine decay."""
    rate = optimiser.lr * min(1.0, (step + 1) / (optimiser.warmup + 1))
    if optimiser.decay == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / steps))
    return rate


class Trainer:
    """Holds the weights, optimiser and moving average of a run, and runs its steps.

    All randomness is a function of (seed, step, process), so weights, optimiser state, moving average and step number
    are the whole state of a run.
    """

    def __init__(self, recipe: Recipe, loss: StageLoss, windows: Windows, folder: Path, device: torch.device) -> None:
        self.recipe, self.windows, self.folder, self.device = recipe, windows, folder, device
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for stale in folder.glob(".stablevsr-*.part") if self.rank == 0 else ():  # left by a killed process
            stale.unlink(missing_ok=True)
        self.stage_loss, self.learner = loss, loss.learner
        self.optimiser = torch.optim.AdamW(
            self.learner.parameters(),
            recipe.optimiser.lr,
            betas=recipe.optimiser.betas,
            weight_decay=recipe.optimiser.weight_decay,
        )
        self.step = 0
        self.is_whole = True  # between two steps, not within the update of the weights
        self.average: dict[str, Tensor] = {}
        if recipe.optimiser.ema:
            self.average = {name: value.detach().clone() for name, value in self.learner.state_dict().items()}
        self.loss: nn.Module = loss
        if self.world > 1:
            # Rollouts train the decoder of an autoencoder, but not all of its encoder.
            self.loss = DistributedDataParallel(loss, find_unused_parameters=loss.stage.is_rollout)
        self.log = Log(folder / "log.csv") if self.rank == 0 else None

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def run(self) -> dict[str, Tensor]:
        """Train to the last step, resuming from a checkpoint if there is one; returns the final weights.

        A run that is interrupted saves a checkpoint first.
        """
        self.resume()
        if self.log:
            self.log.cut(self.step)
        try:
            self.take_steps()
        except KeyboardInterrupt:
            if self.is_whole and self.rank == 0 and self.step:
                self.save()
                log.info("step %d is saved, the same command goes on from there", self.step)
            raise
        return self.kept_weights()

    def take_steps(self) -> None:
        batches = self.batches()
        bar = tqdm(total=self.recipe.steps, initial=self.step, desc=self.recipe.stage, disable=self.rank > 0)
        started = time.monotonic()
        while self.step < self.recipe.steps:
            loss, norm = self.one_step(batches)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()
            if self.log and (self.step % self.recipe.log_every == 0 or self.step == self.recipe.steps):
                rate = learning_rate(self.recipe.optimiser, self.step - 1, self.recipe.steps)
                self.log.add(self.step, loss=loss, gradient=norm, rate=rate, seconds=time.monotonic() - started)
            if self.rank == 0 and self.recipe.sample_every and self.step % self.recipe.sample_every == 0:
                self.draw_samples()
            if self.step % self.recipe.checkpoint_every == 0 or self.step == self.recipe.steps:
                self.save()
        bar.close()

    def kept_weights(self) -> dict[str, Tensor]:
        """The weights to write: the moving average if enabled, else the current weights."""
        return self.average if self.recipe.optimiser.ema else self.learner.state_dict()

    def one_step(self, batches: Iterator[Window]) -> tuple[float, float]:
        """One optimiser step; returns the mean loss of this process and the gradient norm.

        Raises:
            UserError: if the gradient is not finite.
        """
        recipe = self.recipe
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(recipe.optimiser, self.step, recipe.steps)
        total = 0.0
        for part in range(recipe.accumulate):
            window = self.to_device(next(batches))
            last = part == recipe.accumulate - 1
            skip_sync = not last and isinstance(self.loss, DistributedDataParallel)
            sync = cast(DistributedDataParallel, self.loss).no_sync() if skip_sync else nullcontext()
            autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.dtype == "bf16")
            # Accumulation and processes share one index: two processes draw the same noise as one that accumulates two.
            random = Randomness(recipe.seed, self.step, part * self.world + self.rank)
            with sync:
                with autocast:
                    loss = self.loss(window, random) / recipe.accumulate
                loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(self.learner.parameters(), recipe.optimiser.clip or math.inf)
        if not norm.isfinite():
            raise UserError(
                f"the gradient is not finite in step {self.step + 1} (the last checkpoint is intact): "
                "start again with a lower optimiser.lr and another output"
            )
        self.is_whole = False
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.update_average()
        self.is_whole = True
        return total, norm.item()

    @property
    def pins(self) -> bool:
        """Whether batches use pinned memory, which asynchronous copies need; CUDA only."""
        return self.device.type == "cuda"

    def to_device(self, window: Window) -> Window:
        return {name: value.to(self.device, non_blocking=self.pins) for name, value in window.items()}

    @torch.no_grad()
    def update_average(self) -> None:
        """Exponential moving average of the weights, with a lower decay during the first steps."""
        if self.recipe.optimiser.ema:
            decay = min(self.recipe.optimiser.ema, (1 + self.step) / (10 + self.step))
            for name, value in self.learner.state_dict().items():
                if value.is_floating_point():
                    self.average[name].lerp_(value, 1 - decay)
                else:
                    self.average[name].copy_(value)

    def batches(self) -> Iterator[Window]:
        """Batches from the current step on; sample numbers depend on the step, so a resumed run sees the same data."""
        recipe = self.recipe
        per_step = recipe.batch * recipe.accumulate * self.world

        def numbers() -> Iterator[list[int]]:
            for step in range(self.step, recipe.steps):
                for part in range(recipe.accumulate):
                    first = step * per_step + (part * self.world + self.rank) * recipe.batch
                    yield list(range(first, first + recipe.batch))

        try:
            yield from DataLoader(
                self.windows,
                batch_sampler=numbers(),
                num_workers=recipe.workers,
                pin_memory=self.pins,
            )
        except UserError as error:
            # A worker's error arrives with its traceback as text; the message is the last line.
            raise type(error)(re.sub(r"^[\w.]*Error: ", "", str(error).splitlines()[-1])) from error

    def draw_samples(self) -> None:
        """Write OUTPUT/samples/STEP.png: results on the first windows with the weights that would be written."""
        windows = [{k: v.to(self.device) for k, v in self.windows[number].items()} for number in range(NUM_SAMPLES)]
        current = {name: value.clone() for name, value in self.learner.state_dict().items()}
        was_training = self.learner.training
        self.learner.load_state_dict(self.kept_weights())
        self.learner.eval()  # RAFT large has batch norm
        picture = sample_picture(self.stage_loss.model, self.recipe.stage, windows)
        self.learner.train(was_training)
        self.learner.load_state_dict(current)
        path = self.folder / "samples" / f"{self.step:07}.png"
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as part:
            iio.imwrite(part, picture.numpy(), extension=".png")
        if self.log is not None:
            self.log.picture(self.step, picture)

    def save(self) -> None:
        if self.rank == 0:
            save_checkpoint(
                self.checkpoint, self.recipe, self.world, self.step, self.learner, self.average, self.optimiser
            )

    def resume(self) -> None:
        """Resume from the checkpoint, if there is one.

        Processes on machines without a shared disk may find different checkpoints; training would mix their weights
        and hang at the end. So all processes compare their steps and stop together if these differ.

        Raises:
            UserError: if the checkpoint does not fit the recipe, or the processes find different ones.
        """
        if self.checkpoint.exists():
            self.step = load_checkpoint(
                self.checkpoint, self.recipe, self.world, self.learner, self.average, self.optimiser
            )
        if self.world == 1:
            return
        steps: list[int] = [0] * self.world
        dist.all_gather_object(steps, self.step)
        for rank, step in enumerate(steps):
            if step != steps[0]:
                found = [f"a checkpoint of step {each}" if each else "no checkpoint" for each in (step, steps[0])]
                raise UserError(
                    f"process {rank} finds {found[0]} at {self.checkpoint}, process 0 finds {found[1]}: "
                    "put the output on a shared disk, or copy the checkpoint of process 0 to all machines"
                )


class Log:
    """Logs training to a CSV file and, if installed, to TensorBoard."""

    FIELDS = ("step", "loss", "gradient", "rate", "seconds")

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.board = None
        else:
            self.board = SummaryWriter(str(path.parent))

    def add(self, step: int, **values: float) -> None:
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.FIELDS).writerow({"step": step, **{k: f"{v:.6g}" for k, v in values.items()}})
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def picture(self, step: int, picture: Tensor) -> None:
        if self.board:
            self.board.add_image("samples", picture, step, dataformats="HWC")

    def cut(self, step: int) -> None:
        """Drop rows after `step`, from which the run resumes; a new file gets only the header."""
        lines = self.path.read_text().splitlines()[1:] if self.path.exists() else []
        rows = [line.split(",") for line in lines]
        kept = [row for row in rows if len(row) == len(self.FIELDS) and row[0].isdigit() and int(row[0]) <= step]
        with replacing(self.path) as part:
            part.write_text("\n".join(",".join(row) for row in [self.FIELDS, *kept]) + "\n")


def checkpoint_blocks(network: nn.Module) -> None:
    """Gradient checkpointing: recompute activations in residual blocks and transformers in the backward pass."""
    for module in network.modules():
        if isinstance(module, ResBlock | Transformer):
            whole = partial(checkpoint, module.forward, use_reentrant=False)
            module.forward = whole  # type: ignore[method-assign]  # replaced on this instance only


def start_processes(device: torch.device) -> torch.device:
    """Join the process group if started by torchrun; returns the device of this process."""
    if not dist.is_torchelastic_launched():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device
