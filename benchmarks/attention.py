#!/usr/bin/env python3
"""The attention in the middle of the decoder, computed in several ways: one head, 512 wide, over all LR pixels.

At 320x180 it is two fifths of a decode's operations. Flash kernels support widths up to 256, so PyTorch's default may
not be the best choice; in half precision on CUDA our networks use chunks of 2048. Prints for each way: milliseconds
(median, after a warm-up), share of the measured matmul peak, memory beyond the inputs, and the largest difference from
the exact result, in float64 (float32 beyond 4,096 positions). A way that fails on the device is reported as such.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from speed import about, matmul_peak
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from stablevsr.model import DTYPES
from stablevsr.nn.attention import attend_in_chunks
from stablevsr.runtime import pick_device

WIDTH = 512


def by_backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "PyTorch's choice": F.scaled_dot_product_attention,
    "math": partial(by_backend, SDPBackend.MATH),
    "flash": partial(by_backend, SDPBackend.FLASH_ATTENTION),
    "efficient": partial(by_backend, SDPBackend.EFFICIENT_ATTENTION),
    "cuDNN": partial(by_backend, SDPBackend.CUDNN_ATTENTION),
    "chunks of 1024": partial(attend_in_chunks, rows=1024),
    "chunks of 2048": partial(attend_in_chunks, rows=2048),
    "chunks of 4096": partial(attend_in_chunks, rows=4096),
    "chunks of 2048, compiled": torch.compile(partial(attend_in_chunks, rows=2048), dynamic=False),
    "flex, compiled": torch.compile(flex_attention, dynamic=False),
}


def seconds(call: Callable[[], Tensor], device: torch.device, turns: int) -> float:
    """The median time of a few calls after a first one."""
    times = []
    for _ in range(turns + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


@torch.no_grad()
def measure(
    way: Callable[[Tensor, Tensor, Tensor], Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    expected: Tensor,
    peak: float,
    turns: int,
) -> dict[str, object]:
    """The numbers of one way, or why there are none."""
    device, positions = inputs[0].device, inputs[0].shape[2]
    try:
        difference = (way(*inputs).double() - expected).abs().max().item()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        took = seconds(partial(way, *inputs), device, turns)
    except Exception as error:
        # Compilers and backends fail with errors of any type; the next way may work.
        return {"refused": str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}
    memory = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
    operations = 4 * positions**2 * WIDTH
    return {
        "ms": 1000 * took,
        "share of a matmul's": operations / took / peak,
        "MB": memory and memory / 1e6,
        "difference": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", help="of LR frames; default: 320x180 480x270, on a CPU 80x60")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16, on a CPU fp32")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--device", help="default: the best available")
    parser.add_argument("-o", "--output", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    device = pick_device(options.device)
    on_gpu = device.type == "cuda"
    dtype = DTYPES[options.dtype or ("bf16" if on_gpu else "fp32")]
    report = about(device) | {"dtype": str(dtype), "sizes": {}}
    peak = matmul_peak(device, dtype)
    for size in options.sizes or (["320x180", "480x270"] if on_gpu else ["80x60"]):
        width, height = (int(side) for side in size.split("x"))
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(1, 1, width * height, WIDTH, generator=generator).to(device, dtype) for _ in range(3)]
        exact = torch.float64 if width * height <= 4096 else torch.float32
        q, k, v = (tensor.to(exact) for tensor in inputs)
        parts = [((part * WIDTH**-0.5) @ k.mT).softmax(-1) @ v for part in q.split(1024, dim=2)]
        expected = torch.cat(parts, dim=2).double()
        print(f"\n{size}, {dtype}: {'ms':>22} {'of matmul':>10} {'MB':>8}  difference")
        rows = report["sizes"][size] = {}
        for name in options.ways:
            row = rows[name] = measure(WAYS[name], tuple(inputs), expected, peak, options.turns)
            if "refused" in row:
                print(f"{name:26} refused: {row['refused'][:80]}")
            else:
                memory = "-" if row["MB"] is None else f"{row['MB']:.0f}"
                share = row["share of a matmul's"]
                print(f"{name:26} {row['ms']:12.2f} {share:10.2f} {memory:>8}  {row['difference']:.1e}")
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
