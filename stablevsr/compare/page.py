"""Renders the page of a comparison from the template beside this file."""

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from html import escape
from importlib import resources

import imageio.v3 as iio
import numpy as np

from stablevsr.compare.clips import Side
from stablevsr.compare.curves import COLOURS, chart
from stablevsr.compare.grid import Grid
from stablevsr.compare.motion import BRIGHTEST, Motion
from stablevsr.compare.places import Crop, Profile
from stablevsr.metrics.evaluate import NAMES, Row, means
from stablevsr.metrics.report import DECIMALS

CROP_SIDE = 192  # CSS pixels to which a crop is enlarged, by an integer factor
PROFILE_SIDE = 160  # the same for the time axis of a profile
LOWER_IS_BETTER = {"GMSD", "LPIPS", "DISTS", "tLP", "tOF"}


@dataclass(frozen=True, eq=False)
class Findings:
    """The contents of a page. Versions are the enlarged LR (if there is LR), the results, and the truth."""

    labels: list[str]  # of the versions
    sides: list[Side]  # the inputs
    frame_count: int
    size: tuple[int, int]  # height and width of the versions
    grid: Grid
    rate: Fraction  # frames per second
    crf: int
    crops: list[tuple[Crop, list[np.ndarray]]]
    profile: Profile | None
    motions: list[Motion]
    rows: list[dict[int, Row]]  # metrics of each version except the truth, by frame
    skipped: dict[str, str]  # metric to reason
    flow_network: str
    about: dict[str, str]

    @property
    def notices(self) -> list[str]:
        """Sentences about the inputs for the reader."""
        notices = [notice for side in self.sides for notice in side.reader.notices]
        if any(side.reader.sample_aspect_ratio != 1 for side in self.sides):
            notices.append("non-square pixels are shown as squares")
        return list(dict.fromkeys(notices))


@dataclass(frozen=True)
class Media:
    """The stitched video, or the PNG of a single frame: base64 inside the page, or the URL of a file beside it."""

    data: str = ""
    url: str = ""


def render(findings: Findings, media: Media, controls_only: bool = False) -> str:
    """The whole page, or only the slider; all text from outside is escaped."""
    script = asset("compare.js")
    sections = "" if controls_only else "".join(_sections(findings))
    results = [side.label for side in findings.sides if side.role == "result"]
    values = {
        "TITLE": escape(f"{', '.join(results)} compared"),
        "HASH": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "STYLE": asset("compare.css"),
        "SCRIPT": script,
        "DATA": _json(_player(findings, media)),
        "MEDIA": media.data,
        "BODY_CLASS": "inline" if controls_only else "",
        "TEMPORAL": "hidden" if findings.frame_count == 1 else "",
        "NOTE": escape(_note(findings)),
        "SECTIONS": sections,
    }
    # In one pass, so that substituted text is not substituted again.
    return re.sub(r"{{([A-Z_]+)}}", lambda match: values[match[1]], asset("compare.html"))


def asset(name: str) -> str:
    """A text file of the package."""
    return (resources.files("stablevsr.compare") / name).read_text(encoding="utf-8")


def png(image: np.ndarray) -> bytes:
    """(h, w, 3) uint8 as a PNG file."""
    return iio.imwrite("<bytes>", image, extension=".png", plugin="pillow")


def _json(value: object) -> str:
    """JSON that is safe inside <script>: nothing in it closes the element or opens a comment."""
    text = json.dumps(value)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _player(findings: Findings, media: Media) -> dict[str, object]:
    grid = findings.grid
    return {
        "labels": findings.labels,
        "tiles": [grid.corner(tile) for tile in range(grid.count)],
        "width": grid.width,
        "height": grid.height,
        "shrink": grid.shrink,
        "frames": findings.frame_count,
        "rate": [findings.rate.numerator, findings.rate.denominator],  # frame i is shown from i / rate
        "url": media.url,
    }


def _note(findings: Findings) -> str:
    if findings.frame_count == 1:
        return "The picture above is lossless." if findings.grid.shrink == 1 else _reduced(findings)
    note = f"The video above is compressed (H.264, CRF {findings.crf}, colour at half resolution)."
    if findings.crops:
        note += " The crops below are lossless."
    return note + (" " + _reduced(findings) if findings.grid.shrink > 1 else "")


def _reduced(findings: Findings) -> str:
    return f"To fit into one video, the versions above are downscaled to 1/{findings.grid.shrink} of their size."


def _sections(findings: Findings) -> Iterable[str]:
    if findings.crops:
        yield _section("Crops", _crops(findings))
    if findings.profile:
        yield _section("Temporal profile", _profile(findings, findings.profile))
    if findings.motions:
        yield _section("Motion", "".join(_motion(findings, motion) for motion in findings.motions))
    if findings.rows:
        yield _section("Metrics", _metrics(findings))
    yield _section("Inputs", _inputs(findings))
    yield _section(
        "Settings",
        _table([], [[escape(key), _name(value)] for key, value in _settings(findings)]),
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _image(image: np.ndarray, alt: str, width: int, height: int) -> str:
    data = base64.b64encode(png(image)).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}" width="{width}" height="{height}">'


def _figures(pictures: list[tuple[str, str]], kind: str) -> str:
    """Labelled pictures in a row, which scrolls if it is too wide, by keyboard too."""
    figures = "".join(f"<figure>{image}<figcaption>{escape(label)}</figcaption></figure>" for label, image in pictures)
    return f'<div class="row {kind}" tabindex="0" role="group" aria-label="versions">{figures}</div>'


def _crops(findings: Findings) -> str:
    parts = ["<p>Lossless, enlarged without smoothing.</p>"]
    for crop, images in findings.crops:
        side = crop.size * max(1, CROP_SIDE // crop.size)
        place = f"{crop.size}x{crop.size} at {crop.x},{crop.y} of frame {crop.frame}"
        middle = crop.x + crop.size / 2, crop.y + crop.size / 2
        show = f'data-frame="{crop.frame}" data-x="{middle[0]}" data-y="{middle[1]}"'
        parts.append(f'<h3>{place} <button type="button" {show}>Show above</button></h3>')
        pictures = zip(findings.labels, images, strict=True)
        parts.append(
            _figures([(label, _image(image, f"{label}, {place}", side, side)) for label, image in pictures], "crops")
        )
    return "".join(parts)


def _profile(findings: Findings, profile: Profile) -> str:
    is_row = profile.line.is_row
    frames = -(-findings.frame_count // profile.every)
    time = frames * max(1, PROFILE_SIDE // frames)
    along = findings.size[1] if is_row else findings.size[0]
    width, height = (along, time) if is_row else (time, along)
    step = "every frame" if profile.every == 1 else f"every {profile.every} frames"
    text = (
        f"The pixels of {profile.line} over time, {step}; time runs {'downwards' if is_row else 'to the right'}. "
        "Stable detail appears as smooth lines, flicker as ragged ones."
    )
    pictures = [
        (label, _image(image, f"{label}, {profile.line} over time", width, height))
        for label, image in zip(findings.labels, profile.pictures(), strict=True)
    ]
    return f"<p>{text}</p>{_figures(pictures, 'profile rows' if is_row else 'profile')}"


def _motion(findings: Findings, motion: Motion) -> str:
    height, width = motion.flow.shape[:2]
    pictures = [(f"flow, up to {motion.largest:.1f} pixels", motion.flow, "optical flow")]
    for label, error, mean in zip(findings.labels, motion.errors, motion.means, strict=True):
        value = f"{mean:.2f}" if math.isfinite(mean) else "none"
        pictures.append((f"{label}: mean {value}", error, f"warping error of {label}"))
    images = [(label, _image(image, alt, width, height)) for label, image, alt in pictures]
    text = (
        "First the flow, estimated on LR: hue is direction, saturation is speed. Then, for each version, the "
        "difference between this frame and the next one warped back along the flow: black is 0, pale yellow "
        f"{BRIGHTEST} of 255 or more, grey is occluded ({motion.hidden:.0%}). Flicker is bright, and so are errors of "
        "the flow."
    )
    show = f'<button type="button" data-frame="{motion.frame}">Show above</button>'
    return f"<h3>Frame {motion.frame} to {motion.frame + 1} {show}</h3><p>{text}</p>{_figures(images, 'maps')}"


def _metrics(findings: Findings) -> str:
    labels = findings.labels[:-1]
    names = [name for name in NAMES if any(name in row for rows in findings.rows for row in rows.values())]
    clip_means = [means(rows.values()) for rows in findings.rows]
    heads = ["mean of frames", *(f"{name} {'↓' if name in LOWER_IS_BETTER else '↑'}" for name in names)]
    lines = [
        [escape(label), *(_number(row.get(name), name) for name in names)]
        for label, row in zip(labels, clip_means, strict=True)
    ]
    parts = [_table(heads, lines)]
    if findings.frame_count > 1:
        keys = "".join(f'<li class="s{i % COLOURS}">{escape(label)}</li>' for i, label in enumerate(labels))
        parts.append(f'<ul class="legend">{keys}</ul><div class="charts">')
        for name in names:
            curves = [
                (label, [(frame, row[name]) for frame, row in rows.items() if name in row])
                for label, rows in zip(labels, findings.rows, strict=True)
            ]
            parts.append(f"<figure><figcaption>{name}</figcaption>{chart(name, curves, findings.frame_count)}</figure>")
        parts.append("</div>")
    if len(findings.rows[0]) < findings.frame_count:
        parts.append(f"<p>Measured on {len(findings.rows[0])} frames, evenly spaced.</p>")
    parts += [f"<p>{escape(name)} skipped: {escape(reason)}</p>" for name, reason in findings.skipped.items()]
    return "".join(parts)


def _number(value: float | None, name: str) -> str:
    return "–" if value is None else f"{value:.{DECIMALS[name]}f}"


def _inputs(findings: Findings) -> str:
    lines = []
    for side in findings.sides:
        clip, mark = side.reader, side.fingerprint
        lines.append(
            [
                side.role,
                _name(clip.path.name or str(clip.path)),
                f"{clip.width}x{clip.height}",
                f"{clip.part} of them" if clip.part != "all" else "all",
                f"{float(clip.frame_rate):.6g}",
                f"{mark.size:,}" if mark else "in memory",
                f"<code>{mark.sha256}</code>" if mark else "–",
            ]
        )
    return _table(["", "name", "size", "frames", "per second", "bytes", "SHA-256"], lines)


def _settings(findings: Findings) -> Iterable[tuple[str, str]]:
    yield from findings.about.items()
    yield "frames", f"{findings.frame_count}, counted from 0"
    yield "size of the versions", f"{findings.size[1]}x{findings.size[0]}"
    rate = f"{float(findings.rate):.6g} frames per second, constant"
    yield "video", f"H.264, CRF {findings.crf}, {rate}" if findings.frame_count > 1 else "one frame, PNG"
    if findings.profile:
        yield "temporal profile", str(findings.profile.line)
    yield "flow network", findings.flow_network
    yield from (("note", notice) for notice in findings.notices)


def _name(text: str) -> str:
    """Text of a cell that may wrap anywhere."""
    return f'<span class="name">{escape(text)}</span>'


def _table(heads: list[str], lines: list[list[str]]) -> str:
    """A table of cells that are HTML already."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heads)
    rows = "".join(
        f'<tr><th scope="row">{line[0]}</th>{"".join(f"<td>{cell}</td>" for cell in line[1:])}</tr>' for line in lines
    )
    head = f"<thead><tr>{head}</tr></thead>" if heads else ""
    table = f"<table>{head}<tbody>{rows}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="group" aria-label="table">{table}</div>'
