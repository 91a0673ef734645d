"""Segments of a scene on several workers: the bits of one process, whoever does which pass, and whoever dies."""

import shutil
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from cluster_clips import contents, scenes_video
from fake_ray import FakeRay

from stablevsr import PRESETS, Progress, SamplingConfig, Stopped, build_model, upscale
from stablevsr.cli import main
from stablevsr.cluster import driver, ray_pool, worker
from stablevsr.cluster.connect import Cluster
from stablevsr.cluster.description import ModelDescription
from stablevsr.cluster.driver import run_on_cluster
from stablevsr.cluster.job import Result, Setting
from stablevsr.cluster.run_unit import Order
from stablevsr.cluster.units import scenes_of, units_between
from stablevsr.engine.workspace import workspace_path
from stablevsr.errors import OptionsError
from stablevsr.weights import read_header

STEPS = 3


class RealWorker(worker.Worker):
    """On a thread, with a number."""

    act: Callable[["RealWorker", Order, int], None] = staticmethod(lambda worker, order, index: None)
    has_shared_storage = True

    def __init__(self, description: ModelDescription, threads: int, number: int, killed: threading.Event) -> None:
        super().__init__(description, threads)
        self.number, self.killed = number, killed

    def facts(self) -> dict[str, str]:
        return self._description.facts()

    def sees(self, folder: str, token: str) -> bool:
        return self.has_shared_storage

    def run(self, order: Order, frames: str | None, piece: str | None, index=None, border=None) -> worker.Outcome:
        type(self).act(self, order, index)
        return super().run(order, frames, piece, index, border)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeRay]:
    """Makes a cluster of real workers on threads, which do something before they work."""
    monkeypatch.setattr(ray_pool, "POLL", 0.02)
    monkeypatch.setattr(driver, "WAIT", 0.02)
    monkeypatch.setattr(worker, "collecting_notices", lambda found: nullcontext())  # all are in one process here

    def make(act: object = lambda worker, order, index: None, **fields: object) -> FakeRay:
        ray = FakeRay(type("Worker", (RealWorker,), {"act": staticmethod(act), **fields}))
        monkeypatch.setattr(driver, "connected", ray.connected)
        return ray

    return make


def sampling(**fields: object) -> SamplingConfig:
    return PRESETS["exact"].with_fields({"steps": STEPS, "scene_cuts": "auto", **fields})


def run(weights: Path, clip: Path, config: SamplingConfig, workers: int = 2, progress: object = None) -> Result:
    setting = Setting(config, read_header(weights).config)
    where = Cluster(workers=workers)
    (result,) = run_on_cluster(
        [(clip, target(clip))], ModelDescription(weights, "cpu"), setting, where, progress=progress
    )
    return result


def target(clip: Path) -> Path:
    return clip.with_name("out.mp4")


def expect_the_same(weights: Path, clip: Path, config: SamplingConfig) -> None:
    expected = clip.with_name("expected.mp4")
    upscale(build_model(weights, device="cpu"), clip, expected, config)
    assert contents(target(clip)) == contents(expected)
    assert sorted(path.name for path in clip.parent.iterdir()) == ["expected.mp4", "in.mp4", "out.mp4"]


def test_units_with_segments() -> None:
    units = units_between([4], 9, [2, 6, 7])
    assert [(unit.first, unit.last, unit.before, unit.after) for unit in units] == [
        (0, 2, 0, 1), (2, 4, 1, 0), (4, 6, 0, 1), (6, 7, 1, 1), (7, 9, 1, 0),
    ]  # fmt: skip
    assert [len(scene) for scene in scenes_of(units)] == [2, 3]
    assert not any(unit.before or unit.after for unit in units_between([4], 9))
    first, middle, last = units[2:]
    assert [middle.source(index) for index in range(4)] == [None, 7, 5, 7]
    assert [middle.given(index) for index in range(4)] == [6, 6, 6, 6]
    assert [first.source(index) for index in range(4)] == [None, 6, None, 6]
    assert [last.given(index) for index in range(4)] == [7, None, 7, None]
    for a, b in ((first, middle), (middle, last)):  # what one needs the other leaves, a pass before
        for index in range(1, 6):
            user, giver = (a, b) if index % 2 else (b, a)
            assert user.source(index) == giver.given(index - 1)


@pytest.mark.parametrize(
    ("lengths", "workers", "fields", "has_shared_storage"),
    [
        ((4,), 2, {"segments": 2}, True),
        ((5,), 2, {"segments": 2, "sampler": "dpm++"}, True),
        ((6,), 1, {"segments": 2}, False),
        ((4, 2, 3), 3, {"segments": 2, "strength": 0.7}, False),
    ],
)
def test_any_number_of_segments_and_workers(
    cluster, tiny_weights: Path, tmp_path: Path, lengths, workers: int, fields: dict, has_shared_storage: bool
) -> None:
    clip, told = scenes_video(tmp_path / "in.mp4", *lengths), []
    cluster(has_shared_storage=has_shared_storage)
    config = sampling(**fields)
    result = run(tiny_weights, clip, config, workers, told.append)
    assert (result.error, result.frames) == ("", sum(lengths))
    assert len(result.units) == sum(-(-length // config.segments) for length in lengths)
    assert all(unit["sampling"] > 0 for unit in result.units)
    steps = [each for each in told if each.phase == "denoise"]
    assert max(each.done for each in steps) == steps[-1].total
    expect_the_same(tiny_weights, clip, config)


def test_segments_of_a_scene_are_sampled_at_the_same_time(cluster, tiny_weights: Path, tmp_path: Path) -> None:
    clip, both = scenes_video(tmp_path / "in.mp4", 4), threading.Barrier(2, timeout=20)
    cluster(lambda worker, order, index: both.wait())
    assert not run(tiny_weights, clip, sampling(segments=2)).error
    expect_the_same(tiny_weights, clip, sampling(segments=2))


@pytest.mark.parametrize("has_shared_storage", [True, False])
def test_a_worker_that_dies(cluster, tiny_weights: Path, tmp_path: Path, has_shared_storage: bool) -> None:
    """Its passes go to others; where storage is shared, from the last one that is finished."""
    clip, killed, begun = scenes_video(tmp_path / "in.mp4", 5), [], []

    def act(worker: RealWorker, order: Order, index: int) -> None:
        begun.append((order.unit.first, index))
        if index == 2 and not killed:
            killed.append(order.unit.first)
            worker.killed.set()
            raise SystemExit

    ray = cluster(act, has_shared_storage=has_shared_storage)
    config = sampling(segments=2)
    result = run(tiny_weights, clip, config)
    assert not result.error
    assert ray.started == 3
    assert sum(unit["failures"] for unit in result.units) == 1
    assert begun.count((killed[0], 0)) == (1 if has_shared_storage else 2)
    expect_the_same(tiny_weights, clip, config)


def test_a_driver_that_dies(cluster, tiny_weights: Path, tmp_path: Path) -> None:
    """The next one goes on with the pass that each segment had begun."""
    clip, config, begun = scenes_video(tmp_path / "in.mp4", 5), sampling(segments=2), []

    def interrupt(progress: Progress) -> bool:
        return progress.phase != "denoise" or progress.done < 5 + 3

    ray = cluster()
    with pytest.raises(Stopped):
        run(tiny_weights, clip, config, progress=interrupt)
    ray.settle()
    assert list((workspace_path(target(clip)) / "units").glob("*.npy"))
    cluster(lambda worker, order, index: begun.append(index))
    assert not run(tiny_weights, clip, config).error
    assert begun.count(0) <= 3  # asked once, and answered at once
    assert begun.count(1) <= 1  # of a segment that was behind
    expect_the_same(tiny_weights, clip, config)


@pytest.mark.parametrize("has_borders", [True, False])
def test_a_finished_segment_that_somebody_deletes(
    cluster, tiny_weights: Path, tmp_path: Path, has_borders: bool
) -> None:
    """The scene begins again, unless what its segments left for each other is still there."""
    clip, config = scenes_video(tmp_path / "in.mp4", 4), sampling(segments=2)

    def refuse(worker: RealWorker, order: Order, index: int) -> None:
        if order.unit.first == 2 and index == STEPS - 1:
            raise OptionsError("a decoded frame overflowed")

    cluster(refuse)
    error = run(tiny_weights, clip, config, workers=1).error
    assert error.startswith("frames 2 to 3: ")
    assert error.endswith(": a decoded frame overflowed")
    units = workspace_path(target(clip)) / "units"
    if not has_borders:
        for path in units.glob("*.npy"):
            path.unlink()
    first_passes = []
    cluster(lambda worker, order, index: first_passes.append(order.unit.first) if index == 0 else None)
    assert not run(tiny_weights, clip, config).error
    assert sorted(first_passes) == ([2] if has_borders else [0, 2])
    expect_the_same(tiny_weights, clip, config)


def test_a_segment_that_fails_ends_its_scene_and_no_other(cluster, tiny_weights: Path, tmp_path: Path) -> None:
    clip, done = scenes_video(tmp_path / "in.mp4", 4, 2), []

    def fail(worker: RealWorker, order: Order, index: int | None) -> None:
        if order.unit.first == 2 and index == 1:
            raise RuntimeError("no luck")
        done.append((order.unit.first, index))

    cluster(fail)
    result = run(tiny_weights, clip, sampling(segments=2))
    assert result.error.count("RuntimeError: no luck") == 1
    assert result.error.startswith("frames 2 to 3: ")
    assert (4, None) in done
    assert max(index for first, index in done if first == 0) <= 2
    cluster()
    assert not run(tiny_weights, clip, sampling(segments=2)).error
    expect_the_same(tiny_weights, clip, sampling(segments=2))


def test_shards_do_not_divide_scenes(cluster, tiny_weights: Path, tmp_path: Path, capsys) -> None:
    """Nor do they continue a run that does."""
    clip, config = scenes_video(tmp_path / "in.mp4", 3, 1), sampling(segments=2)
    ray = cluster()
    with pytest.raises(Stopped):
        run(tiny_weights, clip, config, progress=lambda progress: progress.phase != "denoise")
    ray.settle()
    options = ["--weights", str(tiny_weights), "--steps", str(STEPS), "--scene-cuts", "auto", "--segments", "2", "-q"]
    command = ["upscale", str(clip), str(target(clip)), "--shard", "1/1", "--device", "cpu", *options]
    assert main(command) == 2
    assert "was started with another division (into segments, now into scenes)" in capsys.readouterr().err
    shutil.rmtree(workspace_path(target(clip)))
    assert main(command) == 0
    expect_the_same(tiny_weights, clip, config)
