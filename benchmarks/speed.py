#!/usr/bin/env python3
"""How fast the sampler is, against the published loop on the modules of diffusers and torchvision, in one run.

All rows use the same weights, noise and frames and take turns; times are medians over the turns. The cost is linear
in steps, so a few are enough:

    seconds a frame  =  steps of a whole run (50, or the preset's)  x  frame-step  +  flows  +  final decode

The columns by part are also per frame-step, from one more run in which each part waits for the device, so they need
not add up to the median.

`TFLOP/s` counts the operations of the published algorithm in all rows: a row that needs fewer shows a higher number.
Needs `pip install '.[test]'`. Prints tables and writes JSON.
"""

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the published networks and loop are the tests' own
from reference_loop import ReferenceLoop
from references import randomise

from stablevsr import PRESETS, SamplingConfig, __version__, build_model
from stablevsr.architectures import STABLEVSR
from stablevsr.config import TinyDecoderConfig
from stablevsr.engine import run
from stablevsr.engine.arrays import LowResFrames
from stablevsr.engine.store import MemoryStore
from stablevsr.media import open_reader
from stablevsr.model import DTYPES, StableVSR
from stablevsr.nn.tiny import TinyDecoder
from stablevsr.nn.vae import VAE
from stablevsr.runtime import Offloaded, pick_device
from stablevsr.sampling import denoiser
from stablevsr.sampling.networks import Networks
from stablevsr.sampling.noise import SeededNoise
from stablevsr.sampling.pictures import PictureFormat, normalise
from stablevsr.sampling.samplers import Sampler, sampler_by_name

ASSETS = Path(__file__).parents[1] / "stablevsr/assets"
WAYS = (
    *("baseline", "ours", "ours compiled", "ours offloaded", "ours offloaded tiled"),
    *("balanced", "balanced compiled", "fast", "fast compiled"),
)
TILE = 64  # LR pixels
ROWS = [f"{way} {dtype}" for way in WAYS for dtype in ("fp32", "bf16", "fp16")]
PHASES = ("flow", "denoise", "final decode")
PARTS = ("UNet", "TCM", "decode", "warp", "schedule")  # of the phase "denoise"
USUAL_ROWS = {  # measured by default
    "cpu": ["baseline fp32", "ours fp32", "ours compiled fp32", "ours bf16", "balanced fp32", "fast fp32"],
    "cuda": [
        *("baseline fp32", "baseline bf16", "ours fp32", "ours bf16", "ours compiled bf16"),
        *("fast compiled bf16", "ours offloaded bf16", "ours offloaded tiled bf16"),
    ],
}


class Stopwatch:
    """Seconds by name. Parts within a phase are timed only if `detailed`, because on CUDA each waits for the device."""

    def __init__(self, device: torch.device, detailed: bool) -> None:
        self.device, self.names = device, PHASES + PARTS if detailed else PHASES
        self.seconds: dict[str, float] = defaultdict(float)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if name not in self.names:
            yield
            return
        start = self.now()
        yield
        self.seconds[name] += self.now() - start

    def timed(self, name: str, function: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            with self.part(name):
                return function(*arguments, **options)

        return call


class Timed:
    """A model whose networks are timed: `sampling.networks.Networks`."""

    def __init__(self, model: Networks, watch: Stopwatch) -> None:
        self._model = model
        self.unet, self.tcm = watch.timed("UNet", model.unet), watch.timed("TCM", model.tcm)
        self.tiny = model.tiny and TimedTiny(model.tiny, watch)
        self.vae = TimedVAE(model.vae, watch)

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)


class TimedTiny:
    """The tiny decoder, whose time counts as that of decoding."""

    def __init__(self, tiny: TinyDecoder, watch: Stopwatch) -> None:
        self.dtype, self._decode = tiny.dtype, watch.timed("decode", tiny)

    def __call__(self, latent: Tensor) -> Tensor:
        return self._decode(latent)


class TimedVAE:
    """The VAE, which is timed as a part in the phase "denoise" only: the final decode is a phase of its own."""

    def __init__(self, vae: VAE, watch: Stopwatch) -> None:
        self._vae, self._timed, self.denoising = vae, watch.timed("decode", vae.decode), True

    def decode(self, latent: Tensor) -> Tensor:
        return self._timed(latent) if self.denoising else self._vae.decode(latent)

    def __getattr__(self, name: str) -> object:
        return getattr(self._vae, name)


def run_ours(model: Networks, config: SamplingConfig, low_res: Tensor, steps: int, watch: Stopwatch) -> Tensor:
    """Our sampler, in the three phases of `sample_video`."""
    store, timed = MemoryStore(), Timed(model, watch)
    frames = LowResFrames(store.hold("frames", low_res / 2 + 0.5), len(low_res), tuple(low_res.shape[2:]))

    def timed_sampler(name: str, eta: float = 0.0) -> Sampler:
        sampler = sampler_by_name(name, eta)
        return sampler._replace(step=watch.timed("schedule", sampler.step))

    timed_warp = watch.timed("warp", denoiser.warp_published)
    with patch.object(denoiser, "warp_published", timed_warp), patch.object(run, "sampler_by_name", timed_sampler):
        job = run.Run(timed, store, replace(config, steps=steps), frames, format=PictureFormat(torch.float32))
        with watch.part("flow"):
            deque(job.estimate_flows(), maxlen=0)
        with watch.part("denoise"):
            deque(job.frame_steps(), maxlen=0)
    timed.vae.denoising = False
    with watch.part("final decode"):
        deque(job.events(), maxlen=0)
    return torch.stack(list(job.pictures()))


def run_baseline(loop: ReferenceLoop, context: Tensor, low_res: Tensor, steps: int, watch: Stopwatch) -> Tensor:
    """The published loop."""
    loop.part = watch.part
    return loop.run(low_res, SeededNoise(0, (loop.config.vae.latent_channels, *low_res.shape[-2:])), steps, context)


@dataclass
class Row:
    """One implementation, and its measurements."""

    run: Callable[[Tensor, int, Stopwatch], Tensor]
    model: Networks
    total_steps: int  # of a whole run
    first_call: float = 0.0  # seconds, with compilation
    turns: list[dict[str, float]] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    peak: int = 0  # bytes on the device
    frames: Tensor | None = None

    def weights(self, device: torch.device) -> int:
        """Bytes of the model that are on the device."""
        return sum(tensor.nbytes for tensor in self.model.state_dict().values() if tensor.device.type == device.type)

    def phase(self, name: str) -> float:
        return statistics.median(turn[name] for turn in self.turns)


def load(options: argparse.Namespace, dtype: str, compiled: bool, offloaded: bool) -> Networks:
    """The small trained model, or one of the released size with random weights."""
    device = torch.device("cpu") if offloaded else options.device
    if options.model == "small":
        model = build_model(device=device, dtype=dtype)
    else:
        with torch.device("meta"):
            model = StableVSR(replace(STABLEVSR, tiny=TinyDecoderConfig())).requires_grad_(False).eval()
        randomise(model.to_empty(device="cpu"))
        model.place(device, DTYPES[dtype])
    if compiled:
        model.compile_parts()
    names = [name for name, _, part in model.parts() if part.offloaded]
    return Offloaded(model, options.device, names) if offloaded else model


def make_row(options: argparse.Namespace, name: str) -> Row:
    """The row of that name, with a model of its own."""
    who, dtype = name.rsplit(" ", 1)
    model = load(options, dtype, "compiled" in who, "offloaded" in who)
    config = PRESETS.get(who.split()[0], PRESETS["exact"])
    config = replace(config, scene_cuts="off", tile=TILE if "tiled" in who else "off")
    if who == "baseline":
        work = partial(run_baseline, ReferenceLoop(model), model.encode_prompt(None))
    else:
        work = partial(run_ours, model, config)
    return Row(work, model, config.steps)


def frames_of_size(width: int, height: int, count: int) -> Tensor:
    """The demo clip, resized, and played back and forth up to `count` frames: (count, 3, h, w) in [-1, 1]."""
    with open_reader(ASSETS / "demo.mp4") as clip:
        images = [frame.image for frame in clip]
    to_and_fro = np.resize([*range(len(images)), *range(len(images) - 2, 0, -1)], count)
    frames = normalise(torch.from_numpy(np.stack([images[i] for i in to_and_fro])))
    return F.interpolate(frames, (height, width), mode="bicubic", align_corners=False).clamp(-1, 1)


def take_turn(row: Row, low_res: Tensor, steps: int, device: torch.device) -> None:
    """One timed run."""
    watch = Stopwatch(device, detailed=False)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        others = torch.cuda.memory_allocated(device) - row.weights(device)
    row.frames = row.run(low_res, steps, watch)
    row.turns.append(dict(watch.seconds))
    if device.type == "cuda":  # the models of other rows are on the device too
        row.peak = max(row.peak, torch.cuda.max_memory_allocated(device) - others)


class Counter:
    """Replaces the stopwatch: counts the operations of the phase "denoise", a multiply-add as two."""

    def __init__(self) -> None:
        self.operations = 0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if name != "denoise":
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self.operations = counter.get_total_flops()


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product, the median of a few."""
    side, seconds = (8192 if device.type == "cuda" else 1024), []
    a = torch.randn(side, side, device=device, dtype=dtype)
    watch = Stopwatch(device, detailed=False)
    for _ in range(8):
        start = watch.now()
        a @ a
        seconds.append(watch.now() - start)
    return 2 * side**3 / statistics.median(seconds)


def measure(options: argparse.Namespace, width: int, height: int) -> dict[str, object]:
    """All rows at one size."""
    device, steps = options.device, options.steps
    low_res = frames_of_size(width, height, options.frames)
    rows: dict[str, Row] = {}
    for name in tqdm(options.rows, desc=f"{width}x{height}, first calls"):
        row = rows[name] = make_row(options, name)
        start = time.perf_counter()
        row.run(low_res, steps, Stopwatch(device, detailed=False))
        row.first_call = time.perf_counter() - start
    counter = Counter()
    rows[options.rows[0]].run(low_res, steps, counter)
    for turn in tqdm(range(options.turns * len(rows)), desc=f"{width}x{height}, turns"):
        take_turn(list(rows.values())[turn % len(rows)], low_res, steps, device)
    for row in rows.values():
        watch = Stopwatch(device, detailed=True)
        row.run(low_res, steps, watch)
        row.parts = dict(watch.seconds)
    return summary(options, rows, counter.operations)


def by_part(row: Row, frame_steps: int) -> dict[str, float]:
    """Seconds per frame-step by part, the same parts for all rows; the remainder is "other"."""
    seconds = {part: row.parts.get(part, 0.0) for part in PARTS}
    seconds["other"] = row.parts["denoise"] - sum(seconds.values())
    return {part: total / frame_steps for part, total in seconds.items()}


def summary(options: argparse.Namespace, rows: dict[str, Row], operations: int) -> dict[str, object]:
    """The results of the rows at one size, to be written and printed."""
    n, frame_steps = options.frames, options.frames * options.steps
    baseline, result = next(iter(rows.values())), {}
    for name, row in rows.items():
        per_step = row.phase("denoise") / frame_steps
        peak = matmul_peak(options.device, DTYPES[name.rsplit(" ", 1)[1]])
        error = (row.frames - baseline.frames).square().mean().item()
        result[name] = {
            "seconds a frame-step": per_step,
            "of which": by_part(row, frame_steps),
            "seconds a pair's flows": row.phase("flow") / (n - 1),
            "seconds a final decode": row.phase("final decode") / n,
            "steps": row.total_steps,
            "seconds a frame": row.total_steps * per_step + (row.phase("flow") + row.phase("final decode")) / n,
            "first call, seconds": row.first_call,
            "TFLOP a frame-step": operations / frame_steps / 1e12,
            "TFLOP/s": operations / frame_steps / per_step / 1e12,
            "share of a matmul's": operations / frame_steps / per_step / peak,
            "matmul TFLOP/s": peak / 1e12,
            "peak memory, GB": row.peak / 1e9 or None,
            "PSNR against the first row, dB": -10 * float(np.log10(error)) if error else None,
            "not finite": bool((~row.frames.isfinite()).any()),
        }
    return result


def show(size: str, result: dict[str, dict]) -> None:
    """Print the results as a table."""
    first = next(iter(result.values()))["seconds a frame-step"]
    parts = (*PARTS, "other")
    print(f"\n{'':22}{'':43}   {'milliseconds a frame-step':^{9 * len(parts)}}")
    print(f"{size:22}  s/frame-step  speed-up  steps   s/frame   " + "".join(f"{part:>9}" for part in parts))
    for name, row in result.items():
        step = row["seconds a frame-step"]
        cells = "".join(f"{1000 * row['of which'][part]:9.2f}" for part in parts)
        total = row["seconds a frame"]
        extra = f"  {row['PSNR against the first row, dB']:.1f} dB" if row["PSNR against the first row, dB"] else ""
        print(f"{name:22} {step:13.4f} {first / step:9.2f} {row['steps']:6} {total:9.2f}   {cells}{extra}")


def about(device: torch.device) -> dict[str, object]:
    """Where and how it was measured."""
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "date": str(date.today()),
        "stablevsr": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else machine,
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
        "command": f"python benchmarks/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}".strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("small", "released"), help="default: released on a GPU, small on a CPU")
    parser.add_argument("--sizes", nargs="+", help="of LR frames; default: 320x180 480x270, on a CPU 80x60")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="a baseline first; the others are compared with it")
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2, help="default: one pass in each direction")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", help="default: the best available")
    parser.add_argument("-o", "--output", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    options.device = pick_device(options.device)
    on_gpu = options.device.type == "cuda"
    options.model = options.model or ("released" if on_gpu else "small")
    options.sizes = options.sizes or (["320x180", "480x270"] if on_gpu else ["80x60"])
    options.rows = options.rows or USUAL_ROWS["cuda" if on_gpu else "cpu"]
    if not options.rows[0].startswith("baseline"):
        parser.error(f"got {options.rows[0]!r} as the first row, expected a baseline: put 'baseline fp32' before it")
    report = about(options.device) | {
        "model": options.model,
        "frames, steps, turns": [options.frames, options.steps, options.turns],
        "sizes": {},
    }
    for size in options.sizes:
        width, height = (int(side) for side in size.split("x"))
        report["sizes"][size] = result = measure(options, width, height)
        show(size, result)
        if options.output:  # after each size: a borrowed machine may be gone before the next
            options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
