#!/usr/bin/env python3
"""Two workers of one thread on a local Ray cluster against one process of one thread, with the bundled model.

Writes the wall times, and what a unit, a worker and a written frame cost beside the sampling, which
benchmarks/scaling.py takes over. The load average of the machine stands beside them.

    python benchmarks/cluster.py -o benchmarks/results/cluster_small_cpu.json
"""

import argparse
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import av
import numpy as np
import torch

from stablevsr import __version__
from stablevsr.cluster import driver
from stablevsr.cluster.connect import Cluster
from stablevsr.cluster.description import ModelDescription
from stablevsr.cluster.job import Setting
from stablevsr.model import bundled_weights
from stablevsr.weights import read_header


def film(path: Path, lengths: list[int], height: int, width: int) -> None:
    """A lossless video of scenes that pan over noise of several scales, each over another picture."""
    luck = np.random.default_rng(0)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=24, height=height, width=width, pix_fmt="bgr0")
        for number, length in enumerate(lengths):
            still = sum(
                np.kron(luck.random((height // size + 4, width // size + 4, 3)), np.ones((size, size, 1)))[
                    : height + 8, : width + 8
                ]
                for size in (1, 4, 16)
            )
            still = still / 3 * (0.4 if number % 2 else 1.0)
            for frame in range(length):
                picture = (255 * still[frame % 8 :][:height, :width]).astype(np.uint8)
                out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        out.mux(stream.encode(None))


def decoded(path: Path) -> list[bytes]:
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24").tobytes() for frame in file.decode(video=0)]


class Watch(logging.Handler):
    """Notes when workers become ready and begin."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.start, self.ready = time.monotonic(), []

    def emit(self, record: logging.LogRecord) -> None:
        if "is ready on" in record.getMessage():
            self.ready.append(time.monotonic() - self.start)


def on_cluster(clip: Path, output: Path) -> dict[str, object]:
    """The run with two workers, and its costs."""
    header, watch, writing = read_header(bundled_weights()), Watch(), 0.0
    logger = logging.getLogger("stablevsr")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(watch)
    real = driver._Driver._join_next_unit

    def timed(self: driver._Driver, clip: object) -> None:
        nonlocal writing
        start = time.monotonic()
        real(self, clip)
        writing += time.monotonic() - start

    driver._Driver._join_next_unit = timed
    start = time.monotonic()
    (result,) = driver.run_on_cluster(
        [(clip, output)],
        ModelDescription(device="cpu"),
        Setting(header.sampling, header.config),
        Cluster(workers=2, cpus_per_worker=1),
    )
    assert not result.error, result.error
    overheads = [unit["seconds"] - unit["sampling"] for unit in result.units]
    return {
        "two workers, seconds": time.monotonic() - start,
        "units": len(result.units),
        "overhead of a unit, seconds": float(np.mean(overheads)),
        "largest overhead of a unit, seconds": max(overheads),
        "start of a worker, seconds": float(np.mean(watch.ready)),
        "write of a frame, seconds": writing / result.frames,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, nargs="+", default=[9, 14, 7, 11, 12, 8, 10, 13], help="frames of each")
    parser.add_argument("--size", type=int, nargs=2, default=(48, 64), help="height and width of the LR frames")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        clip, one, two = (Path(folder) / name for name in ("in.mkv", "one.mp4", "two.mp4"))
        film(clip, options.scenes, *options.size)
        start = time.monotonic()
        command = [sys.executable, "-m", "stablevsr", "upscale", clip, one, "--device", "cpu", "-q"]
        subprocess.run([*map(str, command)], check=True)
        alone, between = time.monotonic() - start, os.getloadavg()
        found = on_cluster(clip, two)
        assert decoded(one) == decoded(two)
    report = {
        "date": str(date.today()),
        "stablevsr": __version__,
        "torch": torch.__version__,
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "command": shlex.join(["python", "benchmarks/cluster.py", *sys.argv[1:]]),
        "load average before, between, after": [before[0], between[0], os.getloadavg()[0]],
        "frames, height, width, steps": [
            sum(options.scenes),
            *options.size,
            read_header(bundled_weights()).sampling.steps,
        ],
        "one process, seconds": alone,
        **found,
        "times as fast": alone / found["two workers, seconds"],
        "decoded frames": "identical",
    }
    print(json.dumps(report, indent=1))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
