#!/usr/bin/env python3
"""A training step of the TCM: seconds and memory, with and without gradient checkpointing, in bf16.

Random weights of a published architecture, and procedural clips, which are rendered before the time is taken.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from speed import about

from stablevsr.architectures import ARCHITECTURES
from stablevsr.errors import UserError
from stablevsr.runtime import out_of_memory, pick_device
from stablevsr.training.loop import Trainer, checkpoint_blocks
from stablevsr.training.recipe import DataRecipe, Recipe
from stablevsr.training.stages import StageLoss, stage_of
from stablevsr.training.train import open_windows, starting_model


def steps(trainer: Trainer, count: int) -> dict[str, float]:
    """The median time of a step after a first one, the peak memory, and the last loss."""
    on_gpu, batches, seconds = trainer.device.type == "cuda", [next(trainer.batches())], []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(trainer.device)
    for _ in range(count + 1):
        start = time.perf_counter()
        loss, norm = trainer.one_step(iter(batches))  # returns numbers, so the device has finished
        seconds.append(time.perf_counter() - start)
    peak = {"peak memory, GB": torch.cuda.max_memory_allocated(trainer.device) / 1e9} if on_gpu else {}
    return {"seconds a step": statistics.median(seconds[1:]), **peak, "loss": loss, "gradient": norm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=ARCHITECTURES, default="stablevsr")
    parser.add_argument("--crop", type=int, default=256, help="side in HR pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", help="default: the best available")
    parser.add_argument("-o", "--output", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    device = pick_device(options.device)
    data = DataRecipe(crop=options.crop, side=options.crop, pool=options.batch)
    recipe = Recipe("tcm", 1000, "", preset=options.preset, batch=options.batch, dtype="bf16", data=data)
    report = about(device) | {"preset": options.preset, "crop": options.crop, "batch": options.batch, "rows": {}}
    with tempfile.TemporaryDirectory() as folder:
        _, model = starting_model(recipe, Path(folder))
        stage = stage_of(recipe, device)
        loss = StageLoss(model.to(device), stage)
        loss.learner.train()
        for name in ("plain", "checkpointed"):
            if name == "checkpointed":
                checkpoint_blocks(model)
            own = replace(recipe, gradient_checkpointing=name == "checkpointed")
            trainer = Trainer(own, loss, open_windows(own, stage, Path(folder)), Path(folder), device)
            try:
                row = steps(trainer, options.steps)
            except (RuntimeError, MemoryError, UserError) as error:
                if not out_of_memory(error) and not isinstance(error, UserError):
                    raise
                row = {"failed": str(error).splitlines()[0]}
            report["rows"][name] = row
            del trainer  # and its optimizer's state, before the next one's peak is taken
            print(name, row, flush=True)
            if options.output:
                options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
