#!/usr/bin/env python3
"""What a machine is and can do: hardware, versions, compilers, and the ceilings that speed is compared with.

The ceilings are measured: matrix products in each precision, and a copy within the device's memory.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from stablevsr.runtime import pick_device

PACKAGES = (
    *("torch", "torchvision", "triton", "numpy", "av", "einops", "safetensors", "imageio", "pillow", "tqdm"),
    *("pytest", "diffusers", "transformers"),
)


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """The median of several calls after a first one."""
    times = []
    for _ in range(9):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def ceilings(device: torch.device, side: int) -> dict[str, float]:
    """TFLOP/s of matrix products of random numbers, and GB/s of a copy, bytes read and written."""
    found = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a = torch.randn(side, side, device=device, dtype=dtype)
        found[f"matmul {dtype}, TFLOP/s"] = 2 * side**3 / seconds(lambda a=a: a @ a, device) / 1e12
    source = torch.randn(side, 4 * side, device=device)
    target = torch.empty_like(source)
    found["copy, GB/s"] = 2 * source.nbytes / seconds(lambda: target.copy_(source), device) / 1e9
    return found


def describe(device: torch.device) -> dict[str, object]:
    found: dict[str, object] = {
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {package: version_of(package) for package in PACKAGES},
        "compilers": {name: shutil.which(name) or "missing" for name in ("cc", "c++", "nvcc")},
    }
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {
            "GPU": about.name,
            "memory, GB": about.total_memory / 1e9,
            "compute capability": f"{about.major}.{about.minor}",
            "multiprocessors": about.multi_processor_count,
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=8192, help="of the matrices")
    parser.add_argument("--device", help="default: the best available")
    parser.add_argument("-o", "--output", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    device = pick_device(options.device)
    report = describe(device) | {"ceilings": ceilings(device, options.side)}
    print(json.dumps(report, indent=1))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
