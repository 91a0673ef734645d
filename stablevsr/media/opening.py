"""Chooses the reader or the writer for a path."""

from fractions import Fraction
from itertools import islice
from pathlib import Path

from stablevsr.errors import InputError, OptionsError
from stablevsr.media.animation_reader import AnimationReader, is_animated
from stablevsr.media.codecs import Encoding
from stablevsr.media.frame import Reader, Writer
from stablevsr.media.nut import open_pipe
from stablevsr.media.paths import IMAGE_SUFFIXES, check_output, output_kind
from stablevsr.media.pipe import PIPE
from stablevsr.media.still_reader import FolderReader
from stablevsr.media.still_writer import FolderWriter, ImageWriter
from stablevsr.media.video_reader import VideoReader
from stablevsr.media.video_writer import VideoWriter, wider


def open_reader(path: str | Path, allow_truncated: bool = False, allow_hdr: bool = False) -> Reader:
    """Open a folder of images, a single image (a clip of one frame), an animation or, for any other file, a video.

    "-" is yuv4mpegpipe or NUT from standard input.

    `allow_truncated`: read what there is of a video that is cut short or damaged, with a notice; `allow_hdr`: read HDR
    video as if it were SDR, with a notice. Raises InputError, naming `path`, if it is missing or cannot be read.
    """
    path = Path(path)
    if path == PIPE:
        return open_pipe()
    if path.is_file() and is_animated(path):
        return AnimationReader(path)
    if path.is_dir() or (path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES):
        return FolderReader(path)
    if path.is_file():
        return VideoReader(path, allow_truncated, allow_hdr)
    if path.exists():
        raise InputError(f"input {path} is neither a file nor a folder; give a video, an image or a folder of images")
    raise InputError(f"input {path} does not exist; give a video, an image or a folder of images")


def open_writer(
    path: str | Path,
    source: Reader,
    *,
    height: int,
    width: int,
    force: bool = False,
    part: Path | None = None,
    encoding: Encoding | None = None,
    aspect: Fraction | None = None,
) -> Writer:
    """Open an output for frames of `height` x `width` pixels made from `source`; the suffix of `path` decides the kind.

    A video suffix gives a video with the source's timing and audio (height and width must be even), an image suffix
    one image, no suffix a folder of PNG files. The output is written to `part`, by default a hidden name beside `path`
    (it must be on the same file system); leftovers of a killed process are removed. `encoding` chooses the codec and
    quality of a video, `aspect` the width over height of its pixels (None: the source's).

    Raises OptionsError for what `check_output` refuses; for an image if the source has several frames or the result is
    larger than the format allows; for a video if a rehearsal shows that container or encoder cannot take it.
    """
    check_output(path, source.path, force)
    kind = output_kind(path)
    if kind != "video" and encoding not in (None, Encoding()):
        raise OptionsError(f"output {path} is not a video, so there is nothing to encode; leave codec and quality out")
    writer: Writer
    target = Path(path).resolve()  # a link is written through, not replaced
    if kind == "folder":
        writer = FolderWriter(target, source, height, width, part)
        if source.has_audio:
            writer.notices.append(f"a folder of images holds no sound, so that of {source.path} is left out")
    elif kind == "video":
        writer = VideoWriter(target, source, height, width, part, encoding, aspect)
    else:
        if source.frame_count != 1 and len(list(islice(source, 2))) != 1:
            raise OptionsError(
                f"output {path} is a single image, but {source.path} holds more than one frame; "
                "give a video name or a folder"
            )
        writer = ImageWriter(target, source, height, width, part)
    aspect = aspect or source.sample_aspect_ratio
    if kind != "video" and aspect != 1:
        writer.notices.append(f"{target.name} looks stretched: {wider(aspect)}, which an image cannot say")
    if source.has_alpha and not writer.takes_alpha:
        writer.notices.append(f"{target.name} cannot hold transparency, so that of {source.path} is dropped")
    return writer
