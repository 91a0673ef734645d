#!/usr/bin/env python3
"""The speed and latency of streaming, against the published loops, in one run.

The baselines are the libraries' modules (diffusers, torchvision) in the published loops of Stream-DiffVSR (four steps)
and of StableVSR (50 steps, both directions). All rows use the same frames and, except for the autoencoder, the same
networks, and take turns; times are medians over the turns.

    seconds a frame   of a long clip, for a frame that is guided by the previous one. For the published streaming loop,
                      (the whole clip - a clip of one frame) / (frames - 1); for the 50-step loop, as in `speed.py`
    latency           from a frame in to the same frame out; for loops that need the whole clip, the time of this clip
    error             largest difference of the pictures, about [-1, 1], from the published streaming loop's

The small model is the bundled one; the released one has random weights.
Needs `pip install '.[test]'`. Prints a table and writes JSON.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
from speed import about, frames_of_size
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the published networks and loops are the tests' own
from reference_loop import ReferenceLoop
from reference_stream_loop import ReferenceStreamLoop
from references import randomise

from stablevsr import build_model
from stablevsr.architectures import STREAM_DIFFVSR
from stablevsr.config import ModelConfig
from stablevsr.engine.stream import Stream
from stablevsr.model import DTYPES, StableVSR
from stablevsr.runtime import pick_device
from stablevsr.sampling.config import DISTILLED_STEPS, STREAMING
from stablevsr.sampling.noise import SeededNoise

PUBLISHED, TO_AND_FRO = "published loop", "50 steps to and fro"
OURS = {
    "ours fp32": ("fp32", False, {}),
    "ours compiled fp32": ("fp32", True, {}),
    "ours bf16": ("bf16", False, {}),
    "ours bf16, prepared ahead": ("bf16", False, {}),
    "ours compiled bf16": ("bf16", True, {}),
    "ours fp32, half flow": ("fp32", False, {"flow.half_size": True}),
    "ours compiled bf16, half flow": ("bf16", True, {"flow.half_size": True}),
}
AHEAD = "prepared ahead"  # rows in which the next frame is always there already; makes a difference on CUDA only
USUAL = {"cpu": ["ours fp32", "ours fp32, half flow", "ours compiled fp32", "ours bf16"], "cuda": list(OURS)}
# One turn over LR frames (n, 3, h, w) in [-1, 1]: seconds a frame, latency, pictures (n, 3, 4h, 4w)
Turn = Callable[[Tensor], tuple[float, float, Tensor]]


def random_model(config: ModelConfig, device: torch.device, dtype: str) -> StableVSR:
    """A model with random weights, the same in every call."""
    with torch.device("meta"):
        model = StableVSR(config).requires_grad_(False).eval()
    torch.manual_seed(0)
    randomise(model.to_empty(device="cpu"))
    model.place(device, DTYPES[dtype])
    return model


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Ready:
    """Frames that are all there already."""

    def __init__(self, frames: Iterator[Tensor]) -> None:
        self._frames, self._next = frames, None

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        frame, self._next = self.peek(), None
        if frame is None:
            raise StopIteration
        return frame

    def peek(self) -> Tensor | None:
        if self._next is None:
            self._next = next(self._frames, None)
        return self._next


def ours(model: StableVSR, fields: dict[str, object], ahead: bool = False) -> Turn:
    config = STREAMING.with_fields({"scene_cuts": "off", **fields})

    def turn(low_res: Tensor) -> tuple[float, float, Tensor]:
        stream, asked, out, pictures = Stream(model, config, tuple(low_res.shape[2:])), [], [], []

        def camera() -> Iterator[Tensor]:
            for frame in low_res:
                asked.append(now(model.device))
                yield frame

        for finished in stream.frames(Ready(camera()) if ahead else camera()):
            pictures.append(finished.state.picture.float().cpu())
            out.append(now(model.device))
        seconds = [b - a for a, b in pairwise(out)]
        latencies = [b - a for a, b in zip(asked[1:], out[1:], strict=True)]
        return statistics.median(seconds), statistics.median(latencies), torch.stack(pictures)

    return turn


def published(model: StableVSR) -> Turn:
    loop, context = ReferenceStreamLoop(model), model.encode_prompt(None)

    def turn(low_res: Tensor) -> tuple[float, float, Tensor]:
        noise = SeededNoise(0, (model.config.vae.latent_channels, *low_res.shape[2:]))
        start = now(model.device)
        loop.run(low_res[:1], noise, DISTILLED_STEPS, context)
        middle = now(model.device)
        pictures = loop.run(low_res, noise, DISTILLED_STEPS, context)
        whole, one = now(model.device) - middle, middle - start
        return (whole - one) / (len(low_res) - 1), whole, pictures

    return turn


def to_and_fro(model: StableVSR, steps: int = 2) -> Turn:
    loop, context = ReferenceLoop(model), model.encode_prompt(None)

    def turn(low_res: Tensor) -> tuple[float, float, Tensor]:
        noise, seconds = SeededNoise(0, (model.config.vae.latent_channels, *low_res.shape[2:])), []
        for count in (steps, 2 * steps):  # the difference is the time of the steps only
            start = now(model.device)
            pictures = loop.run(low_res, noise, count, context)
            seconds.append(now(model.device) - start)
        whole = seconds[0] + (50 - steps) * (seconds[1] - seconds[0]) / steps
        return whole / len(low_res), whole, pictures

    return turn


def make_rows(options: argparse.Namespace) -> dict[str, Turn]:
    device, is_small = options.device, options.model == "small"

    def streaming_model(dtype: str) -> StableVSR:
        if is_small:  # placed as for its users
            return build_model("small-streaming", device, dtype)
        return random_model(STREAM_DIFFVSR, device, dtype)

    rows = {PUBLISHED: published(streaming_model("fp32"))}
    if is_small:
        rows[TO_AND_FRO] = to_and_fro(build_model(device=device))
    for name in options.rows:
        dtype, compiled, fields = OURS[name]
        model = streaming_model(dtype)
        if compiled:
            model.compile_parts()
        rows[name] = ours(model, fields, ahead=AHEAD in name)
    return rows


def measure(options: argparse.Namespace) -> dict[str, dict[str, float | None]]:
    """All rows at one size."""
    width, height = (int(side) for side in options.size.split("x"))
    low_res, rows = frames_of_size(width, height, options.frames).to(options.device), make_rows(options)
    turns: dict[str, list[tuple[float, float, Tensor]]] = {name: [] for name in rows}
    for turn in tqdm(rows.values(), desc="first calls"):
        turn(low_res[:3])
    for _ in tqdm(range(options.turns), desc="turns"):
        for name, turn in rows.items():
            turns[name].append(turn(low_res))
    truth, base = turns[PUBLISHED][0][2], statistics.median(seconds for seconds, _, _ in turns[PUBLISHED])
    result = {}
    for name, measured in turns.items():
        seconds = statistics.median(seconds for seconds, _, _ in measured)
        result[name] = {
            "seconds a frame": seconds,
            "latency, seconds": statistics.median(latency for _, latency, _ in measured),
            "times as fast as the published loop": base / seconds,
            "error": None if name == TO_AND_FRO else (measured[0][2] - truth).abs().max().item(),
        }
    if TO_AND_FRO in result:
        for row in result.values():
            row["times as fast as 50 steps"] = result[TO_AND_FRO]["seconds a frame"] / row["seconds a frame"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("small", "released"), help="default: released on a GPU, small on a CPU")
    parser.add_argument("--size", help="of LR frames; default: 320x180, on a CPU 80x60")
    parser.add_argument("--rows", nargs="+", choices=OURS, help="ours; the baselines are always measured")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", help="default: the best available")
    parser.add_argument("-o", "--output", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    options.device = pick_device(options.device)
    on_gpu = options.device.type == "cuda"
    options.model = options.model or ("released" if on_gpu else "small")
    options.size = options.size or ("320x180" if on_gpu else "80x60")
    options.rows = options.rows or USUAL["cuda" if on_gpu else "cpu"]
    result = measure(options)
    print(f"\n{options.model}, {options.size}, {options.frames} frames\n{'':30}   s/frame  latency  speed-up     error")
    for name, row in result.items():
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        numbers = f"{row['seconds a frame']:10.4f} {row['latency, seconds']:8.3f}"
        print(f"{name:30}{numbers} {row['times as fast as the published loop']:9.2f} {error:>9}")
    if options.output:
        what = {"model": options.model, "size": options.size, "frames": options.frames, "turns": options.turns}
        options.output.write_text(json.dumps(about(options.device) | what | {"rows": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
