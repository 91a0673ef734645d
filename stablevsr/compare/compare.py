"""Writes a page that compares versions of a clip side by side, in one pass, a frame at a time."""

import base64
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from urllib.parse import quote

from stablevsr.atomic import hidden_sibling, remove, replacing
from stablevsr.compare.clips import Source, gather
from stablevsr.compare.collect import Collector, ModelSource, Settings
from stablevsr.compare.grid import Grid, GridVideo, reporting
from stablevsr.compare.page import Findings, Media, png, render
from stablevsr.errors import InputError, OptionsError, ResourceError

MAX_INLINE = 20_000_000  # bytes of base64 video inside a page
VIDEO, STILL = "video.mp4", "frame.png"  # file names beside a page
Progress = Callable[[int, int], None]  # frames done, total


def compare_page(
    results: Mapping[str, Source],
    output: str | Path,
    *,
    lr: Source | None = None,
    truth: Source | None = None,
    model: ModelSource | None = None,
    settings: Settings | None = None,
    about: Mapping[str, str] | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Findings:
    """Write one HTML page that shows versions of a clip side by side; it needs no network.

    A video of more than about 20 MB is written to a folder `STEM_files` beside it.

    Args:
        results: by label, paths of clips, or arrays (n, h, w, 3) uint8 or (n, 3, h, w) float in [0, 1].
        output: the page, ending in .html.
        lr: the clip they were upscaled from, by four; shown with bicubic interpolation.
        truth: the ground truth, needed for metrics.
        model: its flow network visualises motion and measures tOF; or a function that builds it, called once the
            clips have been checked. None leaves these out.
        about: further rows for the table of settings.
        force: replace an existing page.
        progress: called after each frame.

    Raises:
        InputError: for clips that cannot be read or do not match.
        OptionsError: for settings that do not suit the clips, and an invalid output.
        ResourceError: when the page cannot be written.
    """
    output = Path(output)
    check_page(output, [source for source in (lr, truth, *results.values()) if isinstance(source, str | Path)], force)
    part = hidden_sibling(output.resolve())
    try:
        findings = _find(results, lr, truth, model, settings or Settings(), about or {}, part, progress)
        with reporting(output):
            media = _inline(part) if _fits(part) else _beside(part, output.resolve(), findings.frame_count == 1)
            with replacing(output) as page:
                page.write_bytes(render(findings, media).encode(errors="replace"))  # names may not be valid Unicode
    finally:
        remove(part)
    return findings


@dataclass(frozen=True)
class Inline:
    """A comparison that a notebook displays. `page` is the whole HTML page."""

    page: str
    height: int = 640  # of the frame around it, in CSS pixels

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{escape(self.page)}" title="comparison" '
            f'style="width: 100%; height: {self.height}px; border: 0"></iframe>'
        )


def compare_inline(
    results: Mapping[str, Source],
    *,
    lr: Source | None = None,
    truth: Source | None = None,
    settings: Settings | None = None,
    height: int = 640,
) -> Inline:
    """Only the slider, as an object that a notebook displays; for the arguments see `compare_page`.

    The video is always inline: choose a part of a long clip.
    """
    settings = replace(settings or Settings(), crops=(), profile=None, flow_frames=(), metrics_frames=0)
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "video"
        findings = _find(results, lr, truth, None, settings, {}, part, lambda done, total: None)
        return Inline(render(findings, _inline(part), controls_only=True), height)


def check_page(output: Path, inputs: list[str | Path], force: bool) -> None:
    """Raise `UserError` unless the page can be written; changes nothing."""
    if output.suffix.lower() not in (".html", ".htm"):
        raise OptionsError(f"got the output {output}, expected a name that ends in .html")
    if not output.parent.is_dir():
        raise OptionsError(f"{output} cannot be written: {output.parent} is not a folder; create it first")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise ResourceError(
            f"{output} cannot be written: no write permission in {output.parent}; choose another output"
        )
    if any(Path(path).resolve() == output.resolve() for path in inputs):
        raise OptionsError(f"{output} is an input; choose another output")
    for path in (output, files_beside(output) / VIDEO, files_beside(output) / STILL):
        if path.exists() and not force:
            raise OptionsError(f"{path} already exists; choose another output, or pass --force to replace it")


def _find(
    results: Mapping[str, Source],
    lr: Source | None,
    truth: Source | None,
    model: ModelSource | None,
    settings: Settings,
    about: Mapping[str, str],
    video: Path,
    progress: Progress,
) -> Findings:
    """Read the clips in one pass; writes the stitched frames to `video`, a single frame as PNG."""
    with ExitStack() as stack:
        sides = gather(
            stack,
            lr,
            dict(results),
            truth,
            settings.part,
            settings.rate,
            settings.allow_truncated,
            settings.allow_hdr,
        )
        collector = Collector(sides, model, settings)
        first = sides.all[0].reader
        grid = Grid.of(len(collector.labels), *collector.size)
        is_still = sides.frame_count == 1
        stitched = None if is_still else stack.enter_context(GridVideo(video, grid, first.frame_rate, settings.crf))
        done = 0
        for frame, images in enumerate(sides.frames()):
            versions = collector.add(frame, images)
            if stitched:
                stitched.write(versions)
            else:
                with reporting(video):
                    video.write_bytes(png(grid.stitch(versions)))
            done = frame + 1
            progress(done, sides.frame_count)
        if done != sides.frame_count:
            raise InputError(f"{first.path} claims {sides.frame_count} frames, but has {done}; remux it first")
        return collector.findings(grid, first.frame_rate, about)


def files_beside(output: Path) -> Path:
    """The folder for the files of a page that are not inline."""
    return output.with_name(f"{output.stem}_files")


def _fits(part: Path) -> bool:
    return part.stat().st_size * 4 / 3 <= MAX_INLINE


def _inline(part: Path) -> Media:
    return Media(data=base64.b64encode(part.read_bytes()).decode())


def _beside(part: Path, output: Path, is_still: bool) -> Media:
    """Move the video to its folder."""
    folder = files_beside(output)
    if folder.exists() and not folder.is_dir():
        raise OptionsError(f"{folder} is not a folder, but needed for the page's video; choose another output")
    folder.mkdir(exist_ok=True)
    name = STILL if is_still else VIDEO
    with replacing(folder / name) as place:
        shutil.move(part, place)
    return Media(url=f"{quote(os.fsencode(folder.name))}/{name}")
