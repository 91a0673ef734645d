#!/usr/bin/env python3
"""Many tiny clips on a local Ray cluster of two workers: whether the memory of driver and object store stays flat.

A random model of the tests, one step, clips of two scenes of one frame. Nothing may be left but the outputs. With
--apart frames and pictures travel by Ray, as between machines without shared storage.

    python benchmarks/many_clips.py --apart -o benchmarks/results/many_clips.json
"""

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
from contextlib import suppress
from datetime import date
from pathlib import Path

import av
import numpy as np
import ray
import torch

from stablevsr import PRESETS, Progress, __version__
from stablevsr.cluster import Cluster, ModelDescription, upscale_on_cluster
from stablevsr.cluster.job import Job
from stablevsr.weights import Header, write

FRAMES, SIZE, SAMPLES = 2, (24, 32), 20


def write_weights(path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from models import TINY, random_model

    write(path, Header(TINY, {"note": "random"}, sampling=PRESETS["exact"]), random_model().state_dict())


def write_clip(path: Path, number: int) -> None:
    luck = np.random.default_rng(number)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=24, height=SIZE[0], width=SIZE[1], pix_fmt="bgr0")
        for _ in range(FRAMES):
            picture = luck.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))


def status(process: int | str, name: str) -> int:
    """A number of /proc/PROCESS/status: kB, or the parent."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    return 0


def object_store() -> int:
    """The process of this run's Ray that holds the object store."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            process = int(path.parent.name)
            if path.read_bytes().split(b"\0")[0].endswith(b"raylet/raylet"):
                while process > 1 and process != os.getpid():
                    process = status(process, "PPid")
                if process == os.getpid():
                    return int(path.parent.name)
    raise RuntimeError("there is no raylet")


class Watch:
    """Takes a sample after every tenth of the clips."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder, self._every, self._next = folder, max(1, count // SAMPLES), 0
        self.samples: list[dict[str, object]] = []

    def __call__(self, progress: Progress) -> None:
        done = sum(1 for path in self._folder.iterdir() if path.suffix == ".mkv")
        if done >= self._next:
            files = len(os.listdir("/proc/self/fd"))
            store = status(object_store(), "RssShmem")  # pages that were ever used
            found = {"clips": done, "driver, MB": status("self", "VmRSS") / 1000, "object store, MB": store / 1000}
            self.samples.append(found | {"open files": files})
            print(found, flush=True)
            self._next = done + self._every


def hide_folders() -> None:
    """Make all workers believe that they see none of the driver's folders."""
    real = Job.prepare

    def prepare(self: Job, progress: object) -> None:
        real(self, progress)
        self.token = f"not {self.token}"

    Job.prepare = prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=500)
    parser.add_argument("--apart", action="store_true", help="as machines without shared storage")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if options.apart:
        hide_folders()
    with tempfile.TemporaryDirectory() as name:
        inputs, outputs = Path(name) / "in", Path(name) / "out"
        inputs.mkdir()
        outputs.mkdir()
        clips = {inputs / f"{number}.mkv": outputs / f"{number}.mkv" for number in range(options.clips)}
        for number, clip in enumerate(clips):
            write_clip(clip, number)
        write_weights(Path(name) / "tiny.safetensors")
        watch = Watch(outputs, options.clips)
        model, cluster = ModelDescription(Path(name) / "tiny.safetensors", "cpu"), Cluster(workers=2)
        results = upscale_on_cluster(clips, model, cluster=cluster, progress=watch, steps=1, scene_cuts=(1,))
        left = sorted(path.name for path in outputs.iterdir() if path not in clips.values())
        report = {
            "date": str(date.today()),
            "stablevsr": __version__,
            "torch": torch.__version__,
            "ray": ray.__version__,
            "device": f"{platform.machine()}, {os.cpu_count()} cores",
            "command": shlex.join(["python", "benchmarks/many_clips.py", *sys.argv[1:]]),
            "clips": len(results),
            "frames": sum(result.frames for result in results),
            "failed": [result.error for result in results if result.error],
            "left beside the outputs": left,
            "samples": watch.samples,
        }
    print(json.dumps(report, indent=1))
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
