"""Segments of long scenes: what crosses their borders, and that it does not matter who does which when."""

import random
from collections.abc import Callable
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from models import memory_run
from torch import Tensor

from stablevsr import Progress, Stopped, sample_video
from stablevsr.architectures import STABLEVSR_SCHEDULE
from stablevsr.cluster.units import ShiftedNoise
from stablevsr.engine import store
from stablevsr.engine.borders import StoredBorders
from stablevsr.engine.store import MemoryArray
from stablevsr.engine.upscale import upscale
from stablevsr.media import open_reader
from stablevsr.model import StableVSR
from stablevsr.sampling.bidirectional import FrameStep, bidirectional_sampling
from stablevsr.sampling.noise import SeededNoise
from stablevsr.sampling.schedule import Step, run_steps
from stablevsr.sampling.segments import Borders, segment_starts

SHAPE = (1, 2, 2)
NOISE = SeededNoise(0, SHAPE)
STEPS = run_steps(STABLEVSR_SCHEDULE, 5)


@pytest.mark.parametrize(
    ("longest", "cuts", "count", "starts"),
    [
        (None, [3], 9, []),
        (9, [], 9, []),
        (4, [], 9, [3, 6]),
        (3, [4], 10, [2, 7]),
        (2, [1, 2], 7, [3, 5]),
    ],
)
def test_scenes_are_divided_evenly(longest: int | None, cuts: list[int], count: int, starts: list[int]) -> None:
    found = segment_starts(longest, cuts, count)
    bounds = sorted({0, count, *cuts, *found})
    assert not set(found) & set(cuts)
    if longest:
        assert max(np.diff(bounds)) <= longest
    assert found == starts


def guide(x0: Tensor, source: int, target: int, step: Step) -> Tensor:
    return x0 * (1 + source) - target


def predict(frame: int, x: Tensor, step: Step, condition: Tensor | None) -> Tensor:
    return torch.sin(x + frame) if condition is None else torch.cos(x * condition)


def whole(count: int, borders: Borders, calls: list | None = None) -> list[FrameStep]:
    def told(x0: Tensor, source: int, target: int, step: Step) -> Tensor:
        if calls is not None:
            calls.append((step.index, source, target, x0))
        return guide(x0, source, target, step)

    latents = {frame: NOISE.initial(frame) for frame in range(count)}
    loop = bidirectional_sampling(latents, STEPS, STABLEVSR_SCHEDULE, NOISE, predict, told, borders=borders)
    return list(loop)


def stored(starts: list[int]) -> StoredBorders:
    return StoredBorders(MemoryArray(None, torch.device("cpu")), starts)


def test_a_segment_is_guided_by_its_neighbors_estimate_of_the_pass_before() -> None:
    starts, calls = [3, 4, 6], []
    steps = whole(8, stored(starts), calls)
    estimate = {(each.step.index, each.frame): each.x0 for each in steps}
    assert len(calls) == 5 * 7 - 3  # no estimates at the borders in the first pass
    for index, source, target, x0 in calls:
        assert target - source == (1 if index % 2 == 0 else -1)
        crosses = max(source, target) in starts
        assert torch.equal(x0, estimate[index - crosses, source])


class SharedBorders:
    """Of one segment, in a place that all segments share; raises KeyError for what is not there yet."""

    starts = ()

    def __init__(self, place: dict[tuple[int, int], Tensor], first: int, count: int) -> None:
        self._place, self._first, self._count = place, first, count

    def get(self, index: int, frame: int) -> Tensor | None:
        is_outside = not 0 <= self._first + frame < self._count
        return None if index < 0 or is_outside else self._place[index, self._first + frame]

    def put(self, index: int, frame: int, x0: Tensor) -> None:
        self._place[index, self._first + frame] = x0


@pytest.mark.parametrize("seed", range(4))
def test_segments_apart_in_any_order_give_the_same_bits(seed: int) -> None:
    """As on several machines: each with its own frames only, pass by pass, as soon as its neighbors' are there."""
    starts, count, luck = [3, 4, 7], 9, random.Random(seed)
    expected = {(each.step.index, each.frame): each for each in whole(count, stored(starts))}
    place: dict[tuple[int, int], Tensor] = {}
    loops = []
    for first, last in zip([0, *starts], [*starts, count], strict=True):
        noise = ShiftedNoise(NOISE, first)
        latents = {frame: NOISE.initial(first + frame) for frame in range(last - first)}

        def shifted(function: Callable, first: int = first) -> Callable:
            def call(*arguments: object) -> Tensor:
                if function is predict:
                    frame, *more = arguments
                    return predict(frame + first, *more)
                x0, source, target, step = arguments
                return guide(x0, source + first, target + first, step)

            return call

        loop = bidirectional_sampling(
            latents,
            STEPS,
            STABLEVSR_SCHEDULE,
            noise,
            shifted(predict),
            shifted(guide),
            borders=SharedBorders(place, first, count),
        )
        loops.append((first, last - first, loop))
    done = [0] * len(loops)  # passes
    while any(passes < len(STEPS) for passes in done):
        ready = [
            number
            for number, passes in enumerate(done)
            if passes < len(STEPS) and all(other >= passes for other in done[max(0, number - 1) : number + 2])
        ]
        number = luck.choice(ready)
        first, frames, loop = loops[number]
        for _ in range(frames):
            found = next(loop)
            other = expected[found.step.index, first + found.frame]
            assert torch.equal(found.latent, other.latent)
            assert torch.equal(found.x0, other.x0)
        done[number] += 1


def low_res(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 6, 8, 3), dtype=np.uint8)


def test_segments_in_a_run(tiny_model: StableVSR) -> None:
    frames = low_res(4)
    one = sample_video(tiny_model, frames, steps=2)
    assert np.array_equal(sample_video(tiny_model, frames, steps=2, segments=4), one)
    assert not np.array_equal(sample_video(tiny_model, frames, steps=2, segments=2), one)
    run, _ = memory_run(tiny_model, torch.from_numpy(frames), steps=2, segments=2)
    assert run.sizes()["borders"] == 2 * 1 * 4 * 6 * 8 * 4


@pytest.mark.parametrize("stop_after", [4, 8, 14])
def test_a_stopped_run_with_segments_ends_with_the_same_bits(
    tiny_model: StableVSR, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    monkeypatch.setattr(store, "SAVE_EVERY", -1.0)
    (tmp_path / "in").mkdir()
    frames = low_res(7)
    for index, frame in enumerate(frames):
        iio.imwrite(tmp_path / f"in/{index}.png", frame)

    def run(progress: Callable[[Progress], bool] | None = None) -> None:
        with open_reader(tmp_path / "in") as clip:
            upscale(tiny_model, clip, tmp_path / "out", steps=2, segments=3, sampler="dpm++", progress=progress)

    with pytest.raises(Stopped):
        run(lambda progress: progress[:3] != ("denoise", stop_after, 14))
    run()
    found = np.stack([iio.imread(path) for path in sorted((tmp_path / "out").iterdir())])
    assert np.array_equal(found, sample_video(tiny_model, frames, steps=2, segments=3, sampler="dpm++"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
