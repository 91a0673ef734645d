#!/usr/bin/env python3
"""What segments cost at their seams, on held-out clips with exact flow and the bundled model (4 steps).

    whole scene      the chain of guidance unbroken
    exchange         segments whose first frames are guided by their neighbors' estimates of the step before
    apart            the same segments, nothing exchanged: no guidance crosses a seam
    overlap          segments widened to overlap by 8 frames, sampled apart, and blended linearly

All see the same noise. Measured are, at the seams (the pair of frames across one; the frames on either side) and
elsewhere: the warping error x 1000 (mean squared difference along the exact flow, outside of occlusions; lower is
steadier) and HaarPSI to the truth (higher is better).
"""

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
from clips import HeldOutClip, held_out_clips
from quality import KeptFlows, kept_flows, low_resolution
from torch import Tensor

from stablevsr import build_model
from stablevsr.cluster.units import ShiftedNoise
from stablevsr.engine.borders import StoredBorders
from stablevsr.engine.run import decode_frame
from stablevsr.engine.store import MemoryArray
from stablevsr.model import StableVSR
from stablevsr.nn.warp import warp
from stablevsr.sampling.bidirectional import bidirectional_sampling
from stablevsr.sampling.color_fix import fix_colors
from stablevsr.sampling.denoiser import Denoiser
from stablevsr.sampling.noise import SeededNoise
from stablevsr.sampling.samplers import sampler_by_name
from stablevsr.sampling.schedule import run_steps
from stablevsr.sampling.segments import NO_BORDERS, Borders, NoBorders, segment_starts
from stablevsr.sampling.tiles import PictureDecoder

OVERLAP = 8  # frames
ROOT = Path(__file__).parents[1]


class Sampler:
    """Samples ranges of a clip's frames, all with the clip's own noise.

    Args:
        low_res: (n, 3, h, w) in [-1, 1].
    """

    def __init__(self, model: StableVSR, low_res: Tensor) -> None:
        self._model, self._low_res = model, low_res
        self._flows = kept_flows(model, low_res, model.sampling.flow.half_size).flows
        self._noise = SeededNoise(model.sampling.seed, (model.config.vae.latent_channels, *low_res.shape[2:]))

    @torch.no_grad()
    def __call__(self, first: int, last: int, borders: Borders = NO_BORDERS) -> Tensor:
        """Frames `first` to `last` - 1, (n, 3, 4h, 4w) in [0, 1]; `borders` are counted from `first`."""
        model, config = self._model, self._model.sampling
        flows = KeptFlows({(a - first, b - first): flow for (a, b), flow in self._flows.items()})
        denoiser = Denoiser(model, self._low_res[first:last], flows, config, model.encode_prompt(None))
        noise = ShiftedNoise(self._noise, first)
        latents = torch.stack([noise.initial(frame) for frame in range(last - first)])
        schedule = config.schedule_for(model.config)
        for _ in bidirectional_sampling(
            latents,
            run_steps(schedule, config.steps),
            schedule,
            noise,
            denoiser.predict,
            denoiser.guide,
            sampler=sampler_by_name(config.sampler, config.eta),
            borders=borders,
        ):
            pass
        decode = PictureDecoder(model, "off")
        pictures = torch.stack([decode_frame(decode, latent) for latent in latents])
        return fix_colors(pictures, self._low_res[first:last] / 2 + 0.5, config.color_fix)


def blended(sample: Sampler, starts: list[int], count: int) -> Tensor:
    """Overlapping segments, each sampled apart."""
    half, total, weights = OVERLAP // 2, None, torch.zeros(count, 1, 1, 1)
    for first, last in zip([0, *starts], [*starts, count], strict=True):
        begin, end = max(0, first - half), min(count, last + half)
        frames = sample(begin, end)
        weight = torch.ones(end - begin, 1, 1, 1)
        ramp = ((torch.arange(OVERLAP) + 0.5) / OVERLAP)[:, None, None, None]
        if begin > 0:
            weight[:OVERLAP] *= ramp
        if end < count:
            weight[-OVERLAP:] *= ramp.flip(0)
        total = frames.new_zeros(count, *frames.shape[1:]) if total is None else total
        total[begin:end] += weight * frames
        weights[begin:end] += weight
    return total / weights


def variants(sample: Sampler, starts: list[int], count: int) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """What is compared."""
    stored = StoredBorders(MemoryArray(None, torch.device("cpu")), starts)
    yield "whole scene", lambda: sample(0, count)
    yield "exchange", lambda: sample(0, count, stored)
    yield "apart", lambda: sample(0, count, NoBorders(starts))
    yield f"overlap of {OVERLAP}", lambda: blended(sample, starts, count)


def measure(frames: Tensor, clip: HeldOutClip, starts: list[int]) -> dict[str, float]:
    """The figures of one result (n, 3, h, w) in [0, 1]."""
    import piq

    frames = (frames * 255).round() / 255
    seen = ~clip.truth.forward_occluded[:, None]
    error = (frames[1:] - warp(frames[:-1], clip.truth.forward, "bicubic")).square() * seen
    warping = 1000 * error.sum((1, 2, 3)) / (3 * seen.sum((1, 2, 3)))
    likeness = piq.haarpsi(frames, clip.truth.frames, reduction="none")
    pairs = torch.zeros(len(warping), dtype=torch.bool)
    pairs[[start - 1 for start in starts]] = True
    sides = torch.zeros(len(frames), dtype=torch.bool)
    sides[[start + side for start in starts for side in (-1, 0)]] = True
    return {
        "warping error at seams": warping[pairs].mean().item(),
        "warping error elsewhere": warping[~pairs].mean().item(),
        "HaarPSI at seams": likeness[sides].mean().item(),
        "HaarPSI elsewhere": likeness[~sides].mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="a weights file; default: the bundled model")
    parser.add_argument("--frames", type=int, default=24, help="of a clip")
    parser.add_argument("--segments", type=int, default=8, help="frames of a segment")
    parser.add_argument("--side", type=int, default=128, help="of a frame, in HR pixels; a multiple of 8 from 128")
    parser.add_argument("--procedural", type=int, default=2, help="number of procedural clips")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the weights')")
    parser.add_argument("--only", nargs="+", help="names of clips to take")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks/results/seams_small.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, started, clips = build_model(options.weights, device="cpu"), time.monotonic(), {}
    model.sampling = replace(model.sampling, steps=options.steps or model.sampling.steps)
    for clip in held_out_clips(options.frames, options.side, options.procedural):
        if options.only and clip.name not in options.only:
            continue
        starts = segment_starts(options.segments, [], options.frames)
        sample = Sampler(model, low_resolution(clip.truth.frames, None) * 2 - 1)
        found = {name: measure(run(), clip, starts) for name, run in variants(sample, starts, options.frames)}
        clips[clip.name] = {"truth": measure(clip.truth.frames, clip, starts), **found}
        print(clip.name, json.dumps(clips[clip.name], indent=1), flush=True)
    names = next(iter(clips.values()))
    mean = {
        name: {key: float(np.mean([clip[name][key] for clip in clips.values()])) for key in figures}
        for name, figures in names.items()
    }
    report = {
        "date": str(date.today()),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {options.threads} thread",
        "command": shlex.join(["python", "benchmarks/seams.py", *sys.argv[1:]]),
        "steps": model.sampling.steps,
        "seconds": round(time.monotonic() - started),
        "mean": mean,
        "clips": clips,
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(mean, indent=1))


if __name__ == "__main__":
    main()
