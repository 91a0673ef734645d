"""Decodes the source into the workspace, once: frames, alpha, and a table of their times and names."""

import base64
from collections.abc import Generator
from dataclasses import dataclass
from fractions import Fraction

import torch

from stablevsr.engine.arrays import LowResFrames
from stablevsr.engine.progress import Progress
from stablevsr.engine.store import Array, DiskStore
from stablevsr.engine.workspace import Workspace
from stablevsr.errors import InputError
from stablevsr.media import Frame, Reader
from stablevsr.sampling.config import SamplingConfig
from stablevsr.sampling.cuts import scene_cuts

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """The metadata of a frame; see `media.Frame`."""

    pts: int | None
    time_base: str | None
    duration: int | None
    name: str | None
    has_alpha: bool
    profile: int | None  # index into the ICC profiles of the clip, which are few

    @classmethod
    def of(cls, frame: Frame, profiles: list[bytes]) -> "Row":
        """The row of a frame; a new profile is added to `profiles`."""
        time_base = None if frame.time_base is None else str(frame.time_base)
        if frame.profile is not None and frame.profile not in profiles:
            profiles.append(frame.profile)
        profile = None if frame.profile is None else profiles.index(frame.profile)
        return cls(frame.pts, time_base, frame.duration, frame.name, frame.alpha is not None, profile)


class Footage:
    """A clip in a store."""

    def __init__(
        self, frames: LowResFrames, alpha: Array, table: list[Row], profiles: list[bytes], cuts: list[int]
    ) -> None:
        self.frames, self.cuts = frames, cuts
        self._alpha, self._table, self._profiles = alpha, table, profiles

    def frame(self, index: int) -> Frame:
        """The frame as the reader gave it."""
        row = self._table[index]
        return Frame(
            self.frames.raw(index).numpy(),
            pts=row.pts,
            time_base=None if row.time_base is None else Fraction(row.time_base),
            duration=row.duration,
            name=row.name,
            alpha=self._alpha.read(index).numpy() if row.has_alpha else None,
            profile=None if row.profile is None else self._profiles[row.profile],
        )


def ingest(
    store: DiskStore, workspace: Workspace, clip: Reader, config: SamplingConfig
) -> Generator[Progress, None, Footage]:
    """Copy a clip to the store unless that is done already; returns it.

    Raises:
        UserError: for a clip without frames, and as the reader does.
    """
    dtype = torch.uint16 if clip.is_deep else torch.uint8
    array = store.array("frames", (clip.height, clip.width, 3), dtype, CPU)
    alpha = store.array("alpha", (clip.height, clip.width), dtype, CPU)
    known = workspace.noted("clip")
    if known is None:
        table: list[Row] = []
        profiles: list[bytes] = []
        for frame in clip:
            array.write(len(table), torch.from_numpy(frame.image))
            if frame.alpha is not None:
                alpha.write(len(table), torch.from_numpy(frame.alpha))
            table.append(Row.of(frame, profiles))
            yield Progress("read", len(table), max(len(table), clip.frame_count or 0))
        if not table:
            raise InputError(f"{clip.path} has no frames, expected at least 1")
    else:
        table = [Row(*row) for row in known["table"]]
        profiles = [base64.b64decode(text) for text in known["profiles"]]
    frames = LowResFrames(array, len(table), (clip.height, clip.width))
    if known is None:
        store.flush()
        workspace.sync()
        known = {
            "cuts": scene_cuts(config, frames),
            "table": [list(vars(row).values()) for row in table],
            "profiles": [base64.b64encode(profile).decode() for profile in profiles],
        }
        workspace.note("clip", known)
    return Footage(frames, alpha, table, profiles, known["cuts"])
