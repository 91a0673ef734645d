#!/usr/bin/env python3
"""The device memory that the released size needs: counted without a device, or with `--measure` measured on one.

Counting runs every part on fake CUDA tensors, without storage, and sums the bytes alive at the same time, uncompiled.
Attention in fused kernels counts as its result only. What libraries need in addition (workspaces of convolutions,
fragmentation, a CUDA context of some hundred MB) is not included.

Measuring runs a clip of each length once, in two steps, and reads the allocator's peak in each phase; `reserved` is
what the process held in the end, without the CUDA context. Prints a table and writes JSON.
"""

import argparse
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from speed import PHASES, TILE, Stopwatch, about, frames_of_size, load, run_ours
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stablevsr import PRESETS
from stablevsr.architectures import STABLEVSR
from stablevsr.config import SCALE
from stablevsr.model import DTYPES, StableVSR
from stablevsr.nn.raft import RAFT
from stablevsr.runtime import pick_device
from stablevsr.sampling.flow import Padding


class Alive(TorchDispatchMode):
    """Counts the bytes of the storages that operations allocate, while they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(
        self, operation: Callable, types: object, arguments: tuple = (), options: dict | None = None
    ) -> object:
        result = operation(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self.bytes:
                self.bytes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.bytes.pop, storage._cdata, None)
                self.most = max(self.most, sum(self.bytes.values()))
        return result


def most(call: Callable[[], object]) -> float:
    """Peak memory of a call in GB, beyond what was allocated before."""
    with torch.no_grad(), Alive() as alive:
        call()
    return alive.most / 1e9


def weights(part: torch.nn.Module) -> float:
    """Size of a part's parameters and buffers in GB."""
    return sum(tensor.nbytes for tensor in part.state_dict().values()) / 1e9


def model_of(dtype: torch.dtype) -> StableVSR:
    """The released size, with flow in float32; fake parameters cannot be cast."""
    torch.set_default_dtype(dtype)
    model = StableVSR(replace(STABLEVSR, flow=None))
    torch.set_default_dtype(torch.float32)
    model.flow = RAFT(STABLEVSR.flow)
    return model


def count(model: StableVSR, width: int, height: int, dtype: torch.dtype) -> dict[str, float]:
    """Memory in GB at one LR size."""

    def numbers(channels: int, *size: int) -> Tensor:
        return torch.empty(1, channels, *size, dtype=dtype)

    x, timestep = numbers(model.config.unet.encoder.in_channels, height, width), torch.zeros(1, dtype=torch.long)
    context = torch.empty(1, model.config.context_tokens, model.config.unet.encoder.context_dim, dtype=dtype)
    size, latent = (SCALE * height, SCALE * width), model.config.vae.latent_channels
    frame = Padding.for_size(*size).pad(torch.empty(1, 3, *size))
    held = {
        "unet": most(lambda: model.unet(x, timestep, context)),
        "tcm": most(lambda: model.tcm(x, timestep, context, numbers(3, *size))),
        "vae": most(lambda: model.vae.decode(numbers(latent, height, width))),
        "flow": most(lambda: model.flow(frame, frame)),
    }
    kept = {name: weights(getattr(model, name)) for name in held}
    tiled = held | {"vae": most(lambda: model.vae.decode(numbers(latent, TILE, TILE)))}
    return {
        **{f"{name}, weights": value for name, value in kept.items()},
        **{f"{name}, at work": value for name, value in held.items()},
        "all weights and the largest part at work": sum(kept.values()) + max(held.values()),
        "offloaded": max(kept[name] + held[name] for name in held),
        f"offloaded, decoded in tiles of {TILE}": max(kept[name] + tiled[name] for name in held),
    }


class Peaks(Stopwatch):
    """Replaces the stopwatch: the allocator's peak in each phase, in GB."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, detailed=False)
        self.peaks: dict[str, float | None] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        on_gpu = self.device.type == "cuda"
        if name in PHASES and on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        yield
        if name in PHASES:
            self.peaks[name] = torch.cuda.max_memory_allocated(self.device) / 1e9 if on_gpu else None


def measure(options: argparse.Namespace) -> dict[str, dict[str, float | None]]:
    """Rows by size and number of frames."""
    device, rows = options.device, {}
    model = load(options, options.dtype, compiled=False, offloaded=options.offload)
    config = replace(PRESETS["exact"], scene_cuts="off")
    for size in options.sizes:
        width, height = (int(side) for side in size.split("x"))
        for count in options.frames:
            watch = Peaks(device)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            run_ours(model, config, frames_of_size(width, height, count), 2, watch)
            held = torch.cuda.memory_reserved(device) / 1e9 if device.type == "cuda" else None
            rows[f"{size}, {count} frames"] = row = {**watch.peaks, "reserved": held}
            print(f"{size}, {count} frames, GB: {row}", flush=True)
    return rows


def count_sizes(sizes: list[str]) -> dict[str, dict[str, float]]:
    """Rows by size and dtype."""
    rows = {}
    fused = patch.object(F, "scaled_dot_product_attention", lambda q, k, v: torch.empty_like(q))
    no_cudnn = torch.backends.cudnn.flags(enabled=False)  # whose grid sampler cannot be faked
    with FakeTensorMode(), torch.device("cuda"), fused, no_cudnn:
        for dtype in (torch.bfloat16, torch.float32):
            model = model_of(dtype)
            for size in sizes:
                width, height = (int(side) for side in size.split("x"))
                result = rows[f"{size}, {dtype}"] = count(model, width, height, dtype)
                print(f"\n{size}, {dtype}: GB")
                for name, value in result.items():
                    print(f"  {name:44} {value:5.2f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["320x180", "480x270"], help="of LR frames")
    parser.add_argument("-o", "--output", type=Path, help="write the results as JSON")
    measured = parser.add_argument_group("measured on a device")
    measured.add_argument("--measure", action="store_true", help="run clips instead of counting")
    measured.add_argument("--model", choices=("small", "released"), default="released")
    measured.add_argument("--dtype", choices=DTYPES, default="bf16")
    measured.add_argument("--frames", type=int, nargs="+", default=[8, 64])
    measured.add_argument("--offload", action="store_true")
    measured.add_argument("--device", help="default: the best available")
    options = parser.parse_args()
    if options.measure:
        options.device = pick_device(options.device)
        what = {name: getattr(options, name) for name in ("model", "dtype", "offload")}
        report = about(options.device) | what | {"rows, GB": measure(options)}
    else:
        report = about(torch.device("cpu")) | {"device": "none, counted", "sizes": count_sizes(options.sizes)}
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
