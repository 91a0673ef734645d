"""`--cluster` without an address: a Ray of this machine, which is gone when the run is over, however it ends."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster_clips import contents, scenes_video

from stablevsr import PRESETS, build_model, upscale
from stablevsr.cluster.connect import Cluster, connected
from stablevsr.cluster.description import ModelDescription
from stablevsr.engine.workspace import workspace_path
from stablevsr.errors import ResourceError

pytest.importorskip("ray")

DECODES_FIRST = """
import os, sys

import av

from stablevsr.cluster import Cluster, ModelDescription, upscale_on_cluster

clip, output, weights = sys.argv[1:]
file = av.open(clip)
file.streams.video[0].thread_type = "AUTO"
frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]  # decoder and scalers stay alive
forks = []
os.register_at_fork(before=lambda: forks.append(1))
model, cluster = ModelDescription(weights, "cpu"), Cluster(workers=2)
(result,) = upscale_on_cluster({clip: output}, model, cluster=cluster, steps=1, scene_cuts="auto")
print(len(frames), result.frames, result.error, len(forks))
"""


def processes() -> set[str]:
    """Of Ray, on this machine."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:  # it has ended
            continue
        if b"raylet" in line or b"gcs_server" in line or b"local_ray" in line:
            found.add(path.parent.name)
    return found


def wait_until_gone(before: set[str]) -> None:
    give_up = time.monotonic() + 120
    while processes() - before:
        assert time.monotonic() < give_up, processes() - before
        time.sleep(0.2)


def test_a_program_that_has_decoded_video(tiny_weights: Path, tmp_path: Path) -> None:
    """It is never forked while FFmpeg's threads may hold locks."""
    clip, output, before = scenes_video(tmp_path / "in.mp4", 2, 3), tmp_path / "out.mp4", processes()
    command = [sys.executable, "-c", DECODES_FIRST, str(clip), str(output), str(tiny_weights)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.stdout.split() == ["5", "5", "0"], done.stderr
    config = PRESETS["exact"].with_fields({"steps": 1, "scene_cuts": "auto"})
    upscale(build_model(tiny_weights, device="cpu"), clip, tmp_path / "expected.mp4", config)
    assert contents(output) == contents(tmp_path / "expected.mp4")
    wait_until_gone(before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_end_in_the_middle(tiny_weights: Path, tmp_path: Path, number: signal.Signals) -> None:
    clip, output, before = scenes_video(tmp_path / "in.mp4", 8, 8), tmp_path / "out.mp4", processes()
    options = ["--weights", tiny_weights, "--steps", 500, "--scene-cuts", "auto", "--cluster", "--workers", 1, "-v"]
    command = [*map(str, [sys.executable, "-m", "stablevsr", "upscale", clip, output, *options])]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        while "worker 1 on" not in "".join(lines):  # until it is at work
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        start = time.monotonic()
        process.send_signal(number)
        process.stderr.read()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert time.monotonic() - start < 30
    assert workspace_path(output).exists()
    wait_until_gone(before)


def test_a_ray_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (
        pytest.raises(
            ResourceError, match=r"Ray cannot be started on this machine \(its process ended\): its logs are in"
        ),
        connected(Cluster(), ModelDescription(device="cpu")),
    ):
        pass
