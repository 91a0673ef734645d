#!/usr/bin/env python3
"""Ways to run the same networks, compared in one process: which of them to adopt on a GPU.

Times a frame-step of the exact preset in each way, and says how far its result is from the first one's. On a GPU it
also traces one run: the kernels that take the most time, the share of the time in which the GPU is busy, and how often
the host waited for it. A way that fails is reported, and the next one tried; the results are written after each.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from speed import Stopwatch, about, frames_of_size, load, run_ours
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map_only

from stablevsr import PRESETS, runtime
from stablevsr.model import DTYPES, StableVSR
from stablevsr.nn import layers, vae
from stablevsr.runtime import pick_device

FRAMES, STEPS = 4, 2  # one pass in each direction
TOP = 12  # kernels listed
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH", "Pageable")


@dataclass(frozen=True)
class Way:
    """A way to run the networks.

    mode: of `torch.compile`, None for none.
    cudnn: settings other than those of a run.
    folded: upsampling as one transposed convolution.
    """

    mode: str | None = None
    cudnn: dict[str, bool] = field(default_factory=dict)
    channels_last: bool = True
    folded: bool = True


# What cuDNN does with convolutions is the same when all around them is compiled, and found out sooner without.
WAYS = {
    "eager": Way(),
    "eager, any cuDNN algorithm": Way(cudnn={"deterministic": False}),
    "eager, cuDNN benchmark": Way(cudnn={"benchmark": True}),
    "eager, upsampling not folded": Way(folded=False),
    "eager, contiguous": Way(channels_last=False),
    "compiled": Way("default"),
    "compiled, CUDA graphs": Way("reduce-overhead"),
    "compiled, max-autotune": Way("max-autotune-no-cudagraphs"),  # takes many minutes: only if named
}


class Traced:
    """Replaces the stopwatch: records the phase "denoise" with the profiler."""

    def __init__(self) -> None:
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        self.profile = profile(activities=activities if torch.cuda.is_available() else activities[:1])

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if name != "denoise":
            yield
            return
        with self.profile:
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()

    def timed(self, name: str, function: object) -> object:
        return function


@contextmanager
def cudnn_settings(others: dict[str, bool]) -> Iterator[None]:
    """Let `runtime.numerics` set these instead."""
    usual = runtime._cudnn_settings

    def settings() -> list[tuple[object, str, object]]:
        return [(owner, name, others.get(name, value)) for owner, name, value in usual()]

    with patch.object(runtime, "_cudnn_settings", settings):
        yield


def upsample_and_convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`double_and_convolve` in two steps, as published."""
    return conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def compile_networks(model: StableVSR, mode: str) -> None:
    """As `StableVSR.compile_parts`, in another mode."""
    for _, network, part in model.parts():
        for name in part.compiled:
            module = network.get_submodule(name)
            module.compile(dynamic=False, mode=mode)
            if mode == "reduce-overhead":
                module._compiled_call_impl = partial(replay, module._compiled_call_impl)


def replay(call: object, *arguments: object, **options: object) -> object:
    """Call a network that runs as a CUDA graph; the next replay overwrites its result, so that is copied."""
    torch.compiler.cudagraph_mark_step_begin()
    return tree_map_only(Tensor, Tensor.clone, call(*arguments, **options))


@contextmanager
def run_as(model: StableVSR, way: Way) -> Iterator[None]:
    """The model, run in this way within the block."""
    torch._dynamo.reset()
    layouts = torch.channels_last, torch.contiguous_format
    networks = [network for _, network, part in model.parts() if part.channels_last]
    with ExitStack() as stack:
        stack.enter_context(cudnn_settings(way.cudnn))
        if not way.folded:
            for module in (layers, vae):
                stack.enter_context(patch.object(module, "double_and_convolve", upsample_and_convolve))
        if not way.channels_last:
            move(networks, layouts[1])
            stack.callback(move, networks, layouts[0])
        if way.mode:
            stack.callback(forget_compilation, model)
            compile_networks(model, way.mode)
        yield


def move(networks: list[nn.Module], layout: torch.memory_format) -> None:
    for network in networks:
        network.to(memory_format=layout)


def forget_compilation(model: StableVSR) -> None:
    for module in model.modules():
        module._compiled_call_impl = None


def trace(model: StableVSR, low_res: Tensor, seconds: float) -> dict[str, object]:
    """Where the time of a frame-step of `seconds` goes, over all frame-steps of a run."""
    traced, config = Traced(), replace(PRESETS["exact"], scene_cuts="off")
    run_ours(model, config, low_res, STEPS, traced)
    on_gpu = model.device.type == "cuda"
    events, waits, total = Counter(), Counter(), 0.0
    for event in traced.profile.events():
        waits.update(word for word in WAITS if word in event.name)
        if (event.device_type == DeviceType.CUDA) == on_gpu:
            spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            events[event.name] += spent / 1e3 / (FRAMES * STEPS)
            total += spent / 1e6 / (FRAMES * STEPS)
    top = {name[:100]: round(milliseconds, 3) for name, milliseconds in events.most_common(TOP)}
    found = {"milliseconds a frame-step": top, "host waits in all": dict(waits)}
    return found | ({"share of the time in kernels": total / seconds} if on_gpu else {})


def measure(model: StableVSR, way: Way, low_res: Tensor, turns: int) -> tuple[dict[str, object], Tensor]:
    """The numbers of one way, and its pictures."""
    device, config = model.device, replace(PRESETS["exact"], scene_cuts="off")
    seconds = []
    with run_as(model, way):
        start = time.perf_counter()
        run_ours(model, config, low_res, STEPS, Stopwatch(device, detailed=False))
        first = time.perf_counter() - start
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(turns):
            watch = Stopwatch(device, detailed=False)
            pictures = run_ours(model, config, low_res, STEPS, watch)
            seconds.append(watch.seconds["denoise"] / (FRAMES * STEPS))
        row = {"seconds a frame-step": statistics.median(seconds), "of each turn": seconds, "first call, s": first}
        if device.type == "cuda":
            row["peak memory, GB"] = torch.cuda.max_memory_allocated(device) / 1e9
        return row | {"trace": trace(model, low_res, row["seconds a frame-step"])}, pictures


def psnr(pictures: Tensor, expected: Tensor) -> float | None:
    """In dB; None for the same bits."""
    error = (pictures - expected).square().mean()
    return None if torch.equal(pictures, expected) else -10 * error.log10().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("small", "released"), default="released")
    parser.add_argument("--size", default="320x180", help="of LR frames")
    parser.add_argument("--rows", nargs="+", choices=WAYS, default=list(WAYS)[:-1], help="the first is the reference")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", help="default: the best available")
    parser.add_argument("-o", "--output", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    options.device = pick_device(options.device)
    width, height = (int(side) for side in options.size.split("x"))
    low_res = frames_of_size(width, height, FRAMES)
    model = load(options, options.dtype, compiled=False, offloaded=False)
    what = {"model": options.model, "size": options.size, "dtype": options.dtype, "frames, steps": [FRAMES, STEPS]}
    report, pictures = about(options.device) | what | {"rows": {}}, {}
    for name in options.rows:
        try:
            report["rows"][name], pictures[name] = measure(model, WAYS[name], low_res, options.turns)
        except Exception as error:  # compilers and drivers raise errors of any type; the next way may work
            report["rows"][name] = {"failed": f"{type(error).__name__}: {error}"[:2000]}
            print(f"{name:32} failed: {str(error)[:200]}", flush=True)
            continue
        row = report["rows"][name]
        for other in {*list(pictures)[:1], *({"compiled"} & {*pictures})} - {name}:
            row[f"PSNR against {other}, dB (null: same bits)"] = psnr(pictures[name], pictures[other])
        print(f"{name:32} {row['seconds a frame-step']:8.4f} s  first {row['first call, s']:6.1f} s", flush=True)
        if options.output:
            options.output.write_text(json.dumps(report, indent=1) + "\n")
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
