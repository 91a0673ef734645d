"""The outputs of a run: the result and, optionally, a side-by-side comparison."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from stablevsr.engine.plan import Output
from stablevsr.engine.workspace import Workspace
from stablevsr.errors import OptionsError
from stablevsr.media import Encoding, Frame, Reader, Writer, open_writer
from stablevsr.media.paths import output_kind
from stablevsr.media.pipe import PIPE
from stablevsr.sampling.pictures import PictureFormat, bicubic, normalise
from stablevsr.sampling.resizing import passes_for, pixel_aspect, resized


class Sink(Protocol):
    """Where pictures go: a `media.Writer`, or a pipe with the same members."""

    is_deep: bool
    takes_alpha: bool
    notices: list[str]
    failures: list[str]

    def write(self, image: np.ndarray, frame: Frame) -> None: ...


class Writers:
    """The outputs of a run, open."""

    def __init__(
        self, result: Sink, size: tuple[int, int], pair: Writer | None = None, bounds: Sequence[Output] = ()
    ) -> None:
        self.result = result
        self.size = size  # (height, width) of the result
        self.pair = pair  # bicubic interpolation beside the result
        self.bounds = list(bounds)  # upper bounds on their disk space
        self._next = 0  # index of the frame to write next
        self._done: dict[object, int] = {}  # by writer: frames written by an earlier process

    @classmethod
    def open(
        cls,
        stack: ExitStack,
        workspace: Workspace,
        clip: Reader,
        output: Path,
        side_by_side: Path | None,
        encoding: Encoding | None,
        force: bool,
        size: tuple[int, int],
    ) -> "Writers":
        """Open them on `stack`; the last one opened, the result, is the first to be put in place."""
        options: dict[str, Any] = {"force": force, "encoding": encoding}
        options["aspect"] = pixel_aspect(clip.sample_aspect_ratio, (clip.height, clip.width), size)

        def open_one(path: Path, part: Path, width: int) -> Writer:
            writer = stack.enter_context(open_writer(path, clip, height=size[0], width=width, part=part, **options))
            bounds.append(Output.of(writer, clip, encoding, size[0] * width, part.parent))
            return writer

        bounds: list[Output] = []
        pair = None
        if side_by_side:  # not in the workspace: it may be on another disk
            pair = open_one(side_by_side, workspace.outside(side_by_side), 2 * size[1])
        return cls(open_one(output, workspace.folder / "output", size[1]), size, pair, bounds)

    def keep(self, workspace: Workspace) -> int:
        """Keep the growing outputs in the workspace, so that a killed run can continue; call before the first frame.

        Returns the number of frames that all outputs have; the next frame to write is the one after them.

        Raises:
            OptionsError: for a folder on another disk than the workspace.
        """
        assert isinstance(self.result, Writer)  # not a pipe
        folders: dict[Writer, Path] = {self.result: workspace.folder / "written"}
        if self.pair:
            folders[self.pair] = workspace.folder / "written.pair"
            if output_kind(self.pair.path) == "folder" and not _same_disk(self.pair.path.parent, workspace.folder):
                raise OptionsError(
                    f"{self.pair.path} is a folder on another disk than {self.result.path}, which streaming mode "
                    "does not support: choose a path beside it, or a video"
                )
        for writer, folder in folders.items():
            self._done[writer] = writer.keep(folder)
        self._next = min(self._done.values())
        return self._next

    @property
    def failures(self) -> list[str]:
        """What could not be added to a finished output; known after closing."""
        return self.result.failures + (self.pair.failures if self.pair else [])

    @property
    def is_deep(self) -> bool:
        """Whether one of them takes 16 bits a channel."""
        return self.result.is_deep or (self.pair is not None and self.pair.is_deep)

    def write(self, picture: Tensor, frame: Frame) -> None:
        """Append a finished picture, (4h, 4w, 3) uint8 or uint16, for `frame`, whose alpha is enlarged to match."""
        number, self._next = self._next, self._next + 1
        image = resized(picture, self.size).numpy()
        if number >= self._done.get(self.result, 0):
            shown = in_depth(image, self.result.is_deep)
            if frame.alpha is not None and self.result.takes_alpha:
                alpha = self._enlarged(frame.alpha[..., None], self.result.is_deep)
                shown = np.concatenate([shown, alpha], axis=-1)
            self.result.write(shown, frame)
        if self.pair and number >= self._done.get(self.pair, 0):
            both = [self._enlarged(frame.image, self.pair.is_deep), in_depth(image, self.pair.is_deep)]
            self.pair.write(np.concatenate(both, axis=1), frame)

    def _enlarged(self, image: np.ndarray, is_deep: bool) -> np.ndarray:
        """LR (h, w, c) at the size of the result, by way of four or sixteen times as large, as the result is."""
        large = enlarged(image, is_deep, passes_for(self.size, image.shape[:2]))
        return resized(torch.from_numpy(large), self.size).numpy()


def needs_even_sides(*outputs: Path | None) -> bool:
    """Whether one of them, if it is given, is a video or a pipe, which store color at half the size."""
    return any(output == PIPE or output_kind(output) == "video" for output in outputs if output)


def _same_disk(a: Path, b: Path) -> bool:
    return a.stat().st_dev == b.stat().st_dev


def in_depth(image: np.ndarray, is_deep: bool) -> np.ndarray:
    """(h, w, c) uint8 or uint16 in the depth that a writer takes."""
    if (image.dtype == np.uint16) == is_deep:
        return image
    return image.astype(np.uint16) * 257 if is_deep else ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)


def enlarged(image: np.ndarray, is_deep: bool, passes: int = 1) -> np.ndarray:
    """(h, w, c) uint8 or uint16 by bicubic interpolation to four times the size in each pass.

    Returns:
        uint16 if `is_deep`, else uint8.
    """
    picture = normalise(torch.from_numpy(image)[None])
    for _ in range(passes):
        picture = bicubic(picture)
    picture = (picture / 2 + 0.5).clamp(0, 1)
    return PictureFormat(torch.uint16 if is_deep else torch.uint8).encode(picture).numpy()
