"""Collects in one pass over the clips what a comparison shows besides its video."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch

from stablevsr.compare.clips import Sides
from stablevsr.compare.grid import Grid, reduced
from stablevsr.compare.motion import Motion, follow
from stablevsr.compare.page import Findings
from stablevsr.compare.places import Crop, FoundCrops, Line, Profile
from stablevsr.errors import OptionsError
from stablevsr.metrics.evaluate import Evaluator, Row
from stablevsr.model import Model
from stablevsr.sampling.pictures import PictureFormat, bicubic

MAP_SIDE = 1280  # pixels; larger maps of flow and errors are downscaled

ModelSource = Model | Callable[[], Model]  # the latter builds one, once the clips have been checked


@dataclass(frozen=True)
class Settings:
    """What the page shows."""

    crops: tuple[Crop, ...] | None = None  # None: where the versions differ most; (): none
    profile: str | None = "middle"  # "row:Y", "column:X", the middle row, or None for none
    flow_frames: tuple[int, ...] | None = None  # motion from each of these to the next; None: the middle; (): none
    metrics_frames: int = 300  # at most this many are measured, evenly spaced
    part: tuple[int, int | None] = (0, None)  # first and last + 1 of the frames, see `clips.gather`
    crf: int = 16  # of the video: 0 is best
    rate: Fraction = Fraction(25)  # frames per second of arrays
    allow_truncated: bool = False  # of videos, see `media.open_reader`
    allow_hdr: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.crf <= 51:
            raise OptionsError(f"got a crf of {self.crf}, expected 0 (best) to 51")
        if self.metrics_frames < 0:
            raise OptionsError(f"got metrics_frames {self.metrics_frames}, expected 0 or more")
        if not 0 < self.rate <= 1000:
            raise OptionsError(f"got a rate of {self.rate} frames per second, expected more than 0 and at most 1000")

    def line(self, height: int, width: int) -> Line:
        """The line of the temporal profile."""
        return Line.of(None if self.profile == "middle" else self.profile, height, width)

    def check(self, height: int, width: int, frames: int) -> None:
        """Raise `OptionsError` for settings outside versions of this size and length."""
        for crop in self.crops or ():
            crop.check(height, width, frames)
        self.line(height, width)
        for frame in self.flow_frames or ():
            if not 0 <= frame < frames - 1:
                raise OptionsError(
                    f"got frame {frame} for the flow to the next one, but frames are 0 to {frames - 1}; "
                    "choose one that has a next"
                )


class Collector:
    """Collects what the page shows besides the video. Keeps two frames in memory, and the excerpts it collects."""

    def __init__(self, sides: Sides, model: ModelSource | None, settings: Settings) -> None:
        self.sides, self.settings, self.count = sides, settings, sides.frame_count
        self.labels = ["bicubic ×4"] if sides.low_res else []
        self.labels += [side.label for side in sides.results] + (["truth"] if sides.truth else [])
        self.size = sides.results[0].reader.height, sides.results[0].reader.width
        settings.check(*self.size, self.count)
        # Not by `callable`, for a module is callable too.
        self.model = model if model is None or isinstance(model, Model) else model()
        self.raft = self.model.flow if self.model else None
        self.cut: dict[Crop, list[np.ndarray]] = {}
        self.wanted = [replace(crop, frame=crop.resolved_frame(self.count)) for crop in settings.crops or ()]
        self.found = FoundCrops() if settings.crops is None else None
        self.profile = Profile(settings.line(*self.size), self.count) if settings.profile and self.count > 1 else None
        self.flow_frames = self._flow_frames()
        self.motions: list[Motion] = []
        self.measured = evenly(self.count, settings.metrics_frames) if sides.truth else set()
        self.rows: list[dict[int, Row]] = [{} for _ in self.labels[:-1]] if self.measured else []
        device = self.model.device if self.model else torch.device("cpu")
        self.evaluator = Evaluator(device, self.raft) if self.measured else None
        if self.evaluator and self.model is None:
            self.evaluator.skipped["tOF"] = "flow is switched off"
        self._previous: tuple[list[np.ndarray], list[np.ndarray]] | None = None

    def add(self, frame: int, images: list[np.ndarray]) -> list[np.ndarray]:
        """Process a frame of every clip; returns its versions, (h, w, 3) uint8 each."""
        versions = [enlarged(images[0]), *images[1:]] if self.sides.low_res else images
        for crop in self.wanted:
            if crop.frame == frame:
                self.cut[crop] = crop.cut(versions)
        if self.found:
            self.found.add(frame, versions)
        if self.profile:
            self.profile.add(frame, versions)
        if frame in self.measured:
            self._measure(frame, versions)
        if frame - 1 in self.flow_frames:
            assert self._previous is not None
            assert self.raft is not None
            low_res = [self._previous[0][0], images[0]]
            self.motions.append(follow(self.raft, frame - 1, low_res, self._previous[1], versions))
        self._previous = images, versions
        return versions

    def findings(self, grid: Grid, rate: Fraction, about: Mapping[str, str]) -> Findings:
        """The results, after the last frame."""
        crops = list(self.cut.items())
        if self.found:
            crops = [(crop, pictures) for _, crop, pictures in sorted(self.found.found, key=lambda entry: -entry[0])]
        return Findings(
            labels=self.labels,
            sides=self.sides.all,
            frame_count=self.count,
            size=self.size,
            grid=grid,
            rate=rate,
            crf=self.settings.crf,
            crops=crops,
            profile=self.profile,
            motions=[_small(motion) for motion in self.motions],
            rows=self.rows,
            skipped=self.evaluator.skipped if self.evaluator else {},
            flow_network=self.model.provenance.get("flow", "unknown") if self.model and self.raft else "none",
            about=dict(about),
        )

    def _flow_frames(self) -> tuple[int, ...]:
        if self.raft is None or self.sides.low_res is None or self.count == 1:
            return ()
        chosen = self.settings.flow_frames
        return ((self.count - 1) // 2,) if chosen is None else chosen

    def _measure(self, frame: int, versions: list[np.ndarray]) -> None:
        assert self.evaluator is not None
        now = [self.evaluator.picture(image) for image in versions]
        previous = [self.evaluator.picture(image) for image in self._previous[1]] if self._previous else []
        true_flow = self.evaluator.true_flow(now[-1], previous[-1]) if previous else None
        for number, rows in enumerate(self.rows):
            earlier = [previous[number], previous[-1]] if previous else []
            rows[frame] = self.evaluator.row([now[number], now[-1]], earlier, true_flow)


def evenly(count: int, limit: int) -> set[int]:
    """At most `limit` of `count` frames, evenly spaced, including the first and the last."""
    if count <= limit:
        return set(range(count))
    return {round(i * (count - 1) / max(limit - 1, 1)) for i in range(limit)}


def enlarged(image: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 to (4h, 4w, 3), bicubic."""
    picture = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
    return PictureFormat(torch.uint8).encode(bicubic(picture).clamp(0, 1)).numpy()


def _small(motion: Motion) -> Motion:
    factor = -(-max(motion.flow.shape[:2]) // MAP_SIDE)
    return replace(motion, flow=reduced(motion.flow, factor), errors=[reduced(e, factor) for e in motion.errors])
