"""Evaluation of results against the ground truth, frame by frame."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stablevsr.errors import InputError
from stablevsr.media import Reader, open_reader
from stablevsr.metrics.fidelity import WINDOW, flow_back, psnr, ssim, tlp, tof
from stablevsr.metrics.perceptual import LOADERS, Distance, Unavailable
from stablevsr.nn.raft import RAFT

NAMES = ("PSNR", "SSIM", *LOADERS, "tLP", "tOF")
Row = dict[str, float]  # by metric; the first frame has no temporal ones


@dataclass
class Report:
    """The metrics of all clips, and those that were skipped."""

    flow_network: str  # whose flow tOF compares
    clips: dict[str, list[Row]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # metric to reason
    notices: list[str] = field(default_factory=list)  # sentences about the clips for the user

    @property
    def names(self) -> list[str]:
        """The metrics that were measured, in the usual order."""
        return [name for name in NAMES if any(name in row for rows in self.clips.values() for row in rows)]

    def clip_means(self) -> dict[str, Row]:
        """Means over the frames of each clip, of the metrics that it has."""
        return {clip: means(rows) for clip, rows in self.clips.items()}

    def overall(self) -> Row:
        """Means over clips of their means over frames."""
        return means(self.clip_means().values())


def means(rows: Iterable[Row]) -> Row:
    """The mean of each metric over the rows that have it."""
    rows = list(rows)
    found = {}
    for name in NAMES:
        values = [row[name] for row in rows if name in row]
        if values:
            add = math.fsum if all(map(math.isfinite, values)) else sum  # sum accepts infinity and NaN
            found[name] = add(values) / len(values)
    return found


class Evaluator:
    """Computes the available metrics on one device.

    Args:
        raft: the network whose flow tOF compares; None skips tOF.
        weights_dir: the folder of the backbones' weights, laid out as torch's cache (`DIR/checkpoints/FILE`); None is
            that cache.
    """

    def __init__(self, device: torch.device, raft: RAFT | None, weights_dir: Path | None = None) -> None:
        self.device, self.raft = device, raft
        self.skipped: dict[str, str] = {}
        self.distances: dict[str, Distance] = {}
        if weights_dir is not None:
            torch.hub.set_dir(weights_dir)
        for name, load in LOADERS.items():
            try:
                self.distances[name] = load(device)
            except Unavailable as reason:
                self.skipped[name] = str(reason)
        if "LPIPS" in self.skipped:
            self.skipped["tLP"] = self.skipped["LPIPS"]
        if raft is None:
            self.skipped["tOF"] = "the weights hold no flow network"

    def rows(self, result: Reader, truth: Reader) -> Iterator[Row]:
        """Yields the metrics of each frame of a clip, with two frames of each clip in memory."""
        previous: list[Tensor] = []
        for mine, theirs in zip_longest(result, truth):
            if mine is None or theirs is None:
                raise InputError(different_counts(result, truth))
            pair = [self.picture(mine.image), self.picture(theirs.image)]
            yield self.row(pair, previous)
            previous = pair

    @torch.no_grad()
    def row(self, pair: list[Tensor], previous: list[Tensor], true_flow: Tensor | None = None) -> Row:
        """The metrics of one frame.

        Args:
            pair: result and truth, (1, 3, h, w) in [0, 1], on the device.
            previous: those of the previous frame; empty to leave out the temporal metrics.
            true_flow: the result of `true_flow`, to share it between several results.
        """
        row = {"PSNR": psnr(*pair).item()}
        if min(pair[0].shape[-2:]) > WINDOW // 2:
            row["SSIM"] = ssim(*pair).item()
        row |= {name: distance(*pair).item() for name, distance in self.distances.items()}
        if previous:
            result, truth = (torch.cat(both) for both in zip(previous, pair, strict=True))
            if "LPIPS" in self.distances:
                moved = [self.distances["LPIPS"](now[1:], now[:1]) for now in (result, truth)]
                row["tLP"] = tlp(*moved).item()
            if self.raft is not None:
                row["tOF"] = tof(self.raft, result, truth, true_flow).item()
        return row

    def true_flow(self, truth: Tensor, previous: Tensor) -> Tensor | None:
        """The flow from a frame of the truth to the previous one, (1, 3, h, w) in [0, 1]; None without a network."""
        return None if self.raft is None else flow_back(self.raft, torch.cat([previous, truth]))

    def picture(self, image: np.ndarray) -> Tensor:
        """(h, w, 3) uint8 or uint16 to (1, 3, h, w) in [0, 1] on the device."""
        picture = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
        return picture.to(self.device) / np.iinfo(image.dtype).max


def different_counts(result: Reader, truth: Reader) -> str:
    """The message for clips of different lengths."""
    counts = [sum(1 for _ in clip) for clip in (result, truth)]
    return (
        f"{result.path} has {counts[0]} frames and {truth.path} has {counts[1]}; give clips of the same length, "
        "or the same part of both"
    )


def clip_pairs(result: Path, truth: Path) -> dict[str, tuple[Path, Path]]:
    """Pairs of result and truth by name: two clips, or two folders with clips of the same names.

    Names that are not UTF-8 are escaped in the keys ("caf\\xe9"), so that every report can hold them.
    """
    folders = [_clips_in(path) for path in (result, truth)]
    if not any(folders):
        return {_as_text(result.name): (result, truth)}
    mine, theirs = folders
    for here, there, missing in ((result, truth, theirs - mine), (truth, result, mine - theirs)):
        if missing:
            clip = sorted(missing)[0]
            raise InputError(f"{here} lacks the clip {clip}, which {there} has; provide the same clips in both")
    return {_as_text(name): (result / name, truth / name) for name in sorted(mine)}


def _as_text(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _clips_in(path: Path) -> set[str]:
    """The names of the clips in a folder of folders; empty for a clip itself."""
    if not path.is_dir():
        return set()
    entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    return {entry.name for entry in entries} if entries and all(entry.is_dir() for entry in entries) else set()


def evaluate(
    evaluator: Evaluator,
    pairs: dict[str, tuple[Path, Path]],
    flow_network: str,
    progress: Callable[[str, int, int | None], None] = lambda clip, done, total: None,
    allow_truncated: bool = False,
    allow_hdr: bool = False,
) -> Report:
    """Evaluate all clips.

    Args:
        progress: called after each frame with the clip, the number of frames done, and the total if it is known.
        allow_truncated, allow_hdr: of videos, see `media.open_reader`.

    Raises:
        InputError: for clips that cannot be read, or differ in size or length, naming them.
    """
    report = Report(flow_network, skipped=evaluator.skipped)
    for name, paths in pairs.items():
        with ExitStack() as stack:
            readers = [stack.enter_context(open_reader(path, allow_truncated, allow_hdr)) for path in paths]
            report.notices.extend(notice for reader in readers for notice in reader.notices)
            result, truth = readers
            sizes = [f"{clip.width}x{clip.height}" for clip in (result, truth)]
            if sizes[0] != sizes[1]:
                raise InputError(f"{paths[0]} is {sizes[0]} and {paths[1]} is {sizes[1]}; give clips of one size")
            report.clips[name] = []
            for row in evaluator.rows(result, truth):
                report.clips[name].append(row)
                progress(name, len(report.clips[name]), truth.frame_count)
    return report
