"""Runs on a real Ray cluster of two nodes of this machine: the same bits, also after a kill -9 of worker or driver."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_clips import clips_with_results, contents, scenes_video

from stablevsr import PRESETS, Progress, build_model, upscale
from stablevsr.cluster import job, ray_pool
from stablevsr.cluster.connect import Cluster
from stablevsr.cluster.description import ModelDescription
from stablevsr.cluster.driver import run_on_cluster
from stablevsr.cluster.job import Result, Setting
from stablevsr.engine.workspace import workspace_path
from stablevsr.weights import read_header

pytest.importorskip("ray")
STEPS = 3


MACHINES = """
import sys
from ray.cluster_utils import Cluster

address, sys.stdout = sys.stdout, sys.stderr
machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
machines.add_node(num_cpus=1)
print(machines.address, file=address, flush=True)
sys.stdin.read()
machines.shutdown()
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two machines with a core each, as far as Ray knows."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # In a process of its own: Ray forks, and a fork of this one may hang as it frees FFmpeg's scalers, whose threads
    # it lacks (seen with PyAV 19).
    with subprocess.Popen([sys.executable, "-c", MACHINES], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process.stdout.readline().decode().strip()
        process.stdin.close()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> dict[Path, Path]:
    return clips_with_results(tmp_path_factory.mktemp("clips"), tiny_weights, sampling())


def sampling() -> object:
    return PRESETS["exact"].with_fields({"steps": STEPS, "scene_cuts": "auto"})


def run(
    weights: Path, clips: dict[Path, Path], address: str, progress: object = None, config: object = None
) -> list[Result]:
    return run_on_cluster(
        list(clips.items()),
        ModelDescription(weights, "cpu"),
        Setting(config or sampling(), read_header(weights).config),
        Cluster(address, workers=2),
        progress=progress,
    )


def in_folder(clips: dict[Path, Path], folder: Path) -> dict[Path, Path]:
    return {clip: folder / clip.name for clip in clips}


def test_two_workers_with_a_kill_in_the_middle(address, clips, tiny_weights, tmp_path, monkeypatch) -> None:
    """Frames, sound and times are those of one process, though one of the workers is killed at work."""
    pools: list[ray_pool.Pool] = []
    real, killed = ray_pool.Pool.start, []
    monkeypatch.setattr(ray_pool.Pool, "start", lambda pool: (pools.append(pool), real(pool))[1])
    monkeypatch.setattr(ray_pool, "POLL", 0.02)

    def kill(progress: Progress) -> None:
        at_work = [seat for seat in pools[0]._seats if seat.is_placed and seat.has_worked]
        if at_work and not killed:
            killed.append(at_work[0]._place.process)
            os.kill(killed[0], signal.SIGKILL)

    targets = in_folder(clips, tmp_path)
    results = run(tiny_weights, targets, address, kill)
    assert [result.error for result in results] == [""] * 3
    for clip, expected in clips.items():
        assert contents(targets[clip]) == contents(expected)
    units = [unit for result in results for unit in result.units]
    assert len(units) == 7
    assert killed
    # Two workers, and the one in place of the killed one, if it is ready before the other has done everything.
    assert len({unit["machine"] for unit in units}) in (2, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4", "c.mp4"]


def test_segments_of_one_scene(address, tiny_weights, tmp_path) -> None:
    """On both workers; what crosses their borders is the same as in one process."""
    clip, config = scenes_video(tmp_path / "in.mp4", 7), sampling().with_fields({"segments": 3})
    upscale(build_model(tiny_weights, device="cpu"), clip, tmp_path / "expected.mp4", config)
    (result,) = run(tiny_weights, {clip: tmp_path / "out.mp4"}, address, config=config)
    assert not result.error
    assert [(unit["first"], unit["last"]) for unit in result.units] == [(0, 2), (2, 4), (4, 7)]
    assert contents(tmp_path / "out.mp4") == contents(tmp_path / "expected.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected.mp4", "in.mp4", "out.mp4"]


def test_machines_that_share_no_folder(address, clips, tiny_weights, tmp_path, monkeypatch) -> None:
    """Frames and pieces go through the object store."""
    real, lost = job.Job.prepare, []

    def prepare(self: job.Job, progress: object) -> None:
        real(self, progress)
        self.token = "what is in no folder"

    monkeypatch.setattr(job.Job, "prepare", prepare)
    monkeypatch.setattr(ray_pool, "CHUNK", 5000)
    fetch = ray_pool._Seat._fetch
    monkeypatch.setattr(ray_pool._Seat, "_fetch", lambda seat, *more: (lost.append(more), fetch(seat, *more)))
    clip = list(clips)[1]
    (result,) = run(tiny_weights, {clip: tmp_path / "out.mp4"}, address)
    assert not result.error
    assert len(lost) == 3
    assert contents(tmp_path / "out.mp4") == contents(clips[clip])
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_kill_9_of_the_driver(address, clips, tiny_weights, tmp_path) -> None:
    """The same command goes on, and repeats no finished unit. Afterwards --json says who did what."""
    clip = list(clips)[1]
    output, workspace = tmp_path / "out.mp4", workspace_path(tmp_path / "out.mp4")
    options = ["--weights", tiny_weights, "--steps", STEPS, "--scene-cuts", "auto", "--json", "--workers", 2]
    command = [sys.executable, "-m", "stablevsr", "upscale", clip, output, "--cluster", address, *options]
    driver = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    give_up = time.monotonic() + 120
    while not list(workspace.glob("units/*.json")):
        assert driver.poll() is None
        assert time.monotonic() < give_up
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    finished = {path.name: path.read_text() for path in workspace.glob("units/*.json")}
    assert not output.exists()
    again = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert contents(output) == contents(clips[clip])
    (result,) = json.loads(again.stdout)
    assert (result["frames"], result["error"], len(result["units"])) == (7, "", 3)
    for name, record in finished.items():  # as they were
        (unit,) = [unit for unit in result["units"] if f"{unit['first']:07d}.json" == name]
        assert json.loads(record).items() <= unit.items()
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
