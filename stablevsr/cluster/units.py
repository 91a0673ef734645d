"""The units of work: the scenes of a clip, or the segments of its scenes."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from stablevsr.engine.stream import stream_cuts
from stablevsr.errors import OptionsError
from stablevsr.sampling.config import SamplingConfig
from stablevsr.sampling.noise import SeededNoise


@dataclass(frozen=True)
class Unit:
    """A scene, or a segment of one: frames `first` to `last` - 1 of a clip, counted from 0."""

    first: int
    last: int
    before: int = 0  # 1 for a segment that has a neighbor before it
    after: int = 0  # the same after it

    @property
    def count(self) -> int:
        """The number of its frames."""
        return self.last - self.first

    def source(self, index: int) -> int | None:
        """The frame of a neighbor whose estimate of pass `index` - 1 guides the first frame of pass `index`."""
        if index == 0 or not (self.after if index % 2 else self.before):
            return None
        return self.last if index % 2 else self.first - 1

    def given(self, index: int) -> int | None:
        """The frame of this segment whose estimate of pass `index` guides a neighbor in the next pass."""
        if not (self.after if index % 2 else self.before):
            return None
        return self.last - 1 if index % 2 else self.first

    def __str__(self) -> str:
        return f"frames {self.first} to {self.last - 1}"


def units_between(cuts: Sequence[int], num_frames: int, starts: Collection[int] = ()) -> list[Unit]:
    """The units of a clip, in order.

    Args:
        cuts: the frames that start a new scene.
        starts: the frames that start a new segment inside a scene.
    """
    bounds = pairwise(sorted([0, *cuts, *starts, num_frames]))
    return [Unit(first, last, int(first in starts), int(last in starts)) for first, last in bounds]


def scenes_of(units: Iterable[Unit]) -> list[list[Unit]]:
    """The units by scene, in order."""
    scenes: list[list[Unit]] = []
    for unit in units:
        if unit.before:
            scenes[-1].append(unit)
        else:
            scenes.append([unit])
    return scenes


def cuts_of_stream(config: SamplingConfig, frames: Iterable[Tensor]) -> list[int]:
    """The cuts that a run in streaming mode finds, which sees past frames only.

    Args:
        frames: (3, h, w) in [-1, 1] each.
    """
    is_cut, cuts, previous = stream_cuts(config), [], None
    for index, frame in enumerate(frames):
        if previous is not None and is_cut(index, frame, previous):
            cuts.append(index)
        previous = frame
    return cuts


def longest_first(units: Iterable[Unit]) -> list[Unit]:
    """The order in which they are started, so that no long one is left for the end."""
    return sorted(units, key=lambda unit: (-unit.count, unit.first))


@dataclass(frozen=True)
class Shard:
    """One of the processes that share out the units among themselves without talking: number `index` of `count`."""

    index: int  # from 1
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """From "I/N"; `OptionsError` for anything but 1/N to N/N."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            raise OptionsError(f"got shard {text!r}, expected I/N with I from 1 to N, as in 1/8")
        return cls(int(index), int(count))

    def of(self, units: Iterable[Unit], clip: int) -> list[Unit]:
        """This process's share of a clip: every N-th unit, longest first.

        It depends on nothing but the clip's number on the command line, by which the first turn rotates. So all
        processes agree, even if some of them cannot read, or no longer have to read, another clip.
        """
        return [unit for turn, unit in enumerate(longest_first(units), clip) if turn % self.count == self.index - 1]


@dataclass(frozen=True)
class ShiftedNoise:
    """The noise of a clip for a scene whose frames are counted from 0."""

    noise: SeededNoise
    first: int  # the scene's first frame in the clip

    def initial(self, frame: int) -> Tensor:
        return self.noise.initial(self.first + frame)

    def step(self, index: int, frame: int) -> Tensor:
        return self.noise.step(index, self.first + frame)

    def low_res(self, frame: int) -> Tensor:
        return self.noise.low_res(self.first + frame)
