#!/usr/bin/env python3
"""What the model is worth on held-out clips: against bicubic, with and without the TCM, one-way and two-way.

Prints tables and writes JSON. Metrics, per clip and then over clips:

    PSNR, SSIM  fidelity, higher is better (HaarPSI and GMSD are piq's)
    HaarPSI     perceptual similarity to the truth, higher is better (Reisenhofer et al. 2018)
    GMSD        deviation of gradient magnitudes, lower is better (Xue et al. 2014)
    warp        warping error: mean squared difference of a frame and the one before, fetched along the exact flow,
                outside of occlusions, x 1000; lower is steadier (Lai et al. 2018)
    tOF         mean absolute difference of the flows seen in result and truth, x 10, lower is better. The flows are
                those of the model's own network, so the figures compare with each other, not with other papers'
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from clips import HeldOutClip, held_out_clips
from torch import Tensor
from tqdm import tqdm

from stablevsr import build_model
from stablevsr.engine.run import decode_frame
from stablevsr.metrics.fidelity import psnr, ssim, tof
from stablevsr.model import StableVSR
from stablevsr.nn.warp import pixel_grid
from stablevsr.sampling.bidirectional import bidirectional_sampling
from stablevsr.sampling.config import PRESETS, SAMPLERS, SamplingConfig
from stablevsr.sampling.denoiser import Denoiser
from stablevsr.sampling.flow import EstimatedFlows, FlowSource, estimate_flow
from stablevsr.sampling.noise import SeededNoise
from stablevsr.sampling.pictures import bicubic
from stablevsr.sampling.samplers import sampler_by_name
from stablevsr.sampling.schedule import run_steps
from stablevsr.sampling.tiles import PictureDecoder
from stablevsr.training.data import downscale

try:
    import piq
except ImportError:
    sys.exit("the metrics come with piq: pip install '.[bench]'")

EXACT = PRESETS["exact"]
METRICS = ("PSNR", "SSIM", "HaarPSI", "GMSD", "warp", "tOF")
VARIANTS = ("per frame", "one-way", "no motion comp.", "two-way")
SHORTCUTS = {  # two-way, with less guidance
    "half flow": {"flow.half_size": True},
    "tiny": {"temporal.tiny": True},
    "half size": {"temporal.half_size": True},
    "tiny, half size": {"temporal.tiny": True, "temporal.half_size": True},
    "every 2nd": {"temporal.every": 2},
    "every 3rd": {"temporal.every": 3},
}
Row = dict[str, float]


def fetch(picture: Tensor, flow: Tensor) -> Tensor:
    """Pictures (n, 3, h, w) along true flows (n, 2, h, w), bicubic, so that the error is the video's own."""
    height, width = picture.shape[-2:]
    size = torch.tensor([width, height])[:, None, None]
    grid = 2 * (pixel_grid(flow) + flow + 0.5) / size - 1
    return F.grid_sample(picture, grid.permute(0, 2, 3, 1), mode="bicubic", padding_mode="border", align_corners=False)


def warping_error(frames: Tensor, clip: HeldOutClip) -> float:
    """Mean squared difference along the exact flow, outside of occlusions, x 1000."""
    seen = ~clip.truth.forward_occluded[:, None]
    error = (frames[1:] - fetch(frames[:-1], clip.truth.forward)).square() * seen
    return 1000 * (error.sum() / (3 * seen.sum())).item()


def measure(model: StableVSR, frames: Tensor, clip: HeldOutClip) -> Row:
    """All metrics of a result (n, 3, h, w) in [0, 1]."""
    truth = clip.truth.frames
    frames = (frames * 255).round() / 255  # what a file would hold
    return {
        "PSNR": psnr(frames, truth).mean().item(),
        "SSIM": ssim(frames, truth).mean().item(),
        "HaarPSI": piq.haarpsi(frames, truth).item(),
        "GMSD": piq.gmsd(frames, truth).item(),
        "warp": warping_error(frames, clip),
        "tOF": tof(model.flow, frames, truth).mean().item(),
    }


class KeptFlows:
    """All flows of a clip, estimated once for all variants."""

    def __init__(self, flows: dict[tuple[int, int], Tensor]) -> None:
        self.flows = flows

    def between(self, target: int, source: int) -> Tensor:
        return self.flows[target, source]


class NoMotion(KeptFlows):
    """In their place: nothing moves."""

    def between(self, target: int, source: int) -> Tensor:
        return torch.zeros_like(self.flows[target, source])


def kept_flows(model: StableVSR, low_res: Tensor, half: bool) -> KeptFlows:
    """The flows between neighbours of a clip (n, 3, h, w) in [-1, 1]."""
    estimated = EstimatedFlows(model.flow, low_res, model.device, half)
    ways = [way for i in range(len(low_res) - 1) for way in ((i + 1, i), (i, i + 1))]
    return KeptFlows({way: estimated.between(*way) for way in ways})


def without_guidance(*_: object) -> None:
    """Every frame on its own."""
    return None


@torch.no_grad()
def variants(model: StableVSR, low_res: Tensor) -> dict[str, Callable[[int, str], Tensor]]:
    """What is compared: name -> function of steps and sampler that gives the clip in [0, 1]. All see the same noise.

    One-way is the same loop over steps with even indices only, for these go forwards.
    """
    flows, coarse = (kept_flows(model, low_res, half) for half in (False, True))
    decode = PictureDecoder(model, "off")
    noise = SeededNoise(0, (model.config.vae.latent_channels, *low_res.shape[2:]))

    def sample(
        num_steps: int,
        sampler: str,
        flows: FlowSource,
        with_tcm: bool = True,
        one_way: bool = False,
        config: SamplingConfig = EXACT,
    ) -> Tensor:
        denoiser = Denoiser(model, low_res, flows, config, model.encode_prompt(None))
        steps = run_steps(model.config.schedule, num_steps)
        if one_way:
            steps = [replace(step, index=2 * step.index) for step in steps]
        latents = torch.stack([noise.initial(i) for i in range(len(low_res))])
        guide = denoiser.guide if with_tcm else without_guidance
        for _ in bidirectional_sampling(
            latents,
            steps,
            model.config.schedule,
            noise,
            denoiser.predict,
            guide,
            sampler=sampler_by_name(sampler),
        ):
            pass
        return torch.stack([decode_frame(decode, latent) for latent in latents])

    def shortcut(fields: dict[str, object]) -> Callable[[int, str], Tensor]:
        config = EXACT.with_fields(fields)
        chosen = coarse if config.flow.half_size else flows
        return lambda steps, sampler: sample(steps, sampler, chosen, config=config)

    return {
        "per frame": lambda steps, sampler: sample(steps, sampler, flows, with_tcm=False),
        "one-way": lambda steps, sampler: sample(steps, sampler, flows, one_way=True),
        "no motion comp.": lambda steps, sampler: sample(steps, sampler, NoMotion(flows)),
        "two-way": lambda steps, sampler: sample(steps, sampler, flows),
        **{name: shortcut(fields) for name, fields in SHORTCUTS.items()},
    }


@torch.no_grad()
def flow_errors(model: StableVSR, clip: HeldOutClip) -> Row:
    """End-point errors in HR pixels where the truth is seen: of the network on LR frames, and of no flow at all."""
    low_res = downscale(clip.truth.frames) * 2 - 1
    truth, seen = clip.truth.forward, ~clip.truth.forward_occluded
    flow = estimate_flow(model.flow, low_res[1:], low_res[:-1])
    return {
        "network": (flow - truth).norm(dim=1)[seen].mean().item(),
        "zero": truth.norm(dim=1)[seen].mean().item(),
    }


@torch.no_grad()
def evaluate(model: StableVSR, clip: HeldOutClip, options: argparse.Namespace) -> dict[str, Row]:
    """All rows of one clip: "truth", "bicubic", "autoencoder", and "VARIANT, [SAMPLER,] T steps"."""
    truth = clip.truth.frames
    low_res = (downscale(truth) * 255).round() / 255
    through = (model.vae.decode(model.vae.encode(truth * 2 - 1).mean) / 2 + 0.5).clamp(0, 1)
    results = {"bicubic": bicubic(low_res).clamp(0, 1), "autoencoder": through}
    samples = variants(model, low_res * 2 - 1)
    for name, sampler, count in product(options.variants, options.samplers, options.steps):
        named = name if sampler == "ddpm" else f"{name}, {sampler}"
        results[f"{named}, {count} steps"] = samples[name](count, sampler)
    if options.pictures:
        middle = len(truth) // 2
        for name, frames in {"truth": truth, **results}.items():
            picture = (frames[middle] * 255).round().byte().permute(1, 2, 0).numpy()
            iio.imwrite(options.pictures / f"{clip.name}, {name}.png".replace(", ", "-").replace(" ", "-"), picture)
    return {"truth": measure(model, truth, clip)} | {k: measure(model, v, clip) for k, v in results.items()}


def one_clip(clip: HeldOutClip, options: argparse.Namespace) -> tuple[dict[str, Row], Row]:
    """Everything that is measured on a clip, in a process with a single thread."""
    torch.set_num_threads(1)
    model = build_model(options.weights, device="cpu")
    return evaluate(model, clip, options), flow_errors(model, clip)


def mean_rows(clips: list[dict[str, Row]]) -> dict[str, Row]:
    """Means over clips."""
    return {
        name: {key: float(np.mean([clip[name][key] for clip in clips])) for key in clips[0][name]} for name in clips[0]
    }


def show(title: str, rows: dict[str, Row]) -> None:
    print(f"\n{title:30}" + "".join(f"{metric:>9}" for metric in METRICS))
    for name, row in rows.items():
        print(f"{name:30}" + "".join(f"{row[metric]:9.3f}" for metric in METRICS))


def verdict(clips: dict[str, dict[str, Row]], name: str) -> dict[str, float]:
    """How a result stands against bicubic on single clips: shares of the clips on which it is better."""
    rows = [(clip[name], clip["bicubic"]) for clip in clips.values()]
    return {
        "GMSD lower": float(np.mean([ours["GMSD"] < theirs["GMSD"] for ours, theirs in rows])),
        "HaarPSI higher": float(np.mean([ours["HaarPSI"] > theirs["HaarPSI"] for ours, theirs in rows])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="a weights file; default: the bundled model")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=(*VARIANTS, *SHORTCUTS))
    parser.add_argument("--samplers", nargs="+", default=["ddpm"], choices=SAMPLERS)
    parser.add_argument("--frames", type=int, default=6, help="of a clip")
    parser.add_argument("--side", type=int, default=160, help="of a frame, in HR pixels; a multiple of 8 from 128")
    parser.add_argument("--procedural", type=int, default=4, help="number of procedural clips")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="clips at a time (default: %(default)s)")
    parser.add_argument("--only", nargs="+", help="names of clips to take")
    parser.add_argument("--pictures", type=Path, help="write the middle frames to this folder")
    parser.add_argument("-o", "--output", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    clips = [
        clip
        for clip in held_out_clips(options.frames, options.side, options.procedural)
        if not options.only or clip.name in options.only
    ]
    results, flow = {}, {}
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        done = pool.map(partial(one_clip, options=options), clips)
        for clip, (rows, errors) in zip(clips, tqdm(done, total=len(clips), desc="clips"), strict=True):
            results[clip.name], flow[clip.name] = rows, errors
    report = {
        "date": str(date.today()),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {options.processes} processes of one thread",
        "command": "python benchmarks/quality.py " + shlex.join(sys.argv[1:]),
        "seconds": round(time.monotonic() - started),
        "clips": results,
        "flow_end_point_error": flow,
    }
    for kind, wanted in (("photographs", True), ("procedural", False)):
        chosen = {clip.name: results[clip.name] for clip in clips if clip.is_photograph == wanted}
        if chosen:
            show(f"mean of {len(chosen)} clips, {kind}", mean_rows(list(chosen.values())))
            shares = {name: verdict(chosen, name) for name in next(iter(chosen.values())) if "steps" in name}
            report[kind] = {"mean": mean_rows(list(chosen.values())), "share of clips better than bicubic": shares}
            for name, share in shares.items():
                print(
                    f"{name}: GMSD lower on {share['GMSD lower']:.0%}, HaarPSI higher on {share['HaarPSI higher']:.0%}"
                )
            errors = mean_rows([{"flow": flow[name]} for name in chosen])["flow"]
            print(f"flow end-point error {errors['network']:.3f} px at HR; of no flow at all {errors['zero']:.3f} px")
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
