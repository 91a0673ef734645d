"""`stablevsr upscale --preview`: a frame before and after, in a picture beside the output."""

import argparse
import json
import logging
from itertools import count
from pathlib import Path

from PIL import Image

from stablevsr.atomic import replacing
from stablevsr.cli.console import DONE, ProgressBars, require_folder_of
from stablevsr.engine.plan import duration
from stablevsr.engine.preview import Crop, Preview, preview, require_place
from stablevsr.errors import OptionsError, ResourceError
from stablevsr.media import Reader
from stablevsr.media.pipe import PIPE
from stablevsr.model import Model
from stablevsr.sampling.config import SamplingConfig

log = logging.getLogger(__name__)


def check_preview(outputs: list[Path], inputs: list[Path]) -> None:
    """`OptionsError` unless there is one clip, from a file, and a place for the picture."""
    if len(outputs) != 1 or PIPE in (*outputs, *inputs):
        raise OptionsError("got --preview with several inputs or a pipe, expected one file and its output")
    require_folder_of(outputs[0])


def check_place(clip: Reader, options: argparse.Namespace) -> None:
    """`OptionsError` unless the clip has this frame and this part of it."""
    require_place(clip, *_place(options))


def _place(options: argparse.Namespace) -> tuple[int, Crop | None]:
    """Frame, counted from the first of --frames, and part."""
    (frame, crop), (first, _) = options.preview, options.frames
    if frame < first:
        raise OptionsError(f"got frame {frame} for a preview, but --frames begins at {first}")
    return frame - first, Crop(*crop) if crop else None


def show(model: Model, clip: Reader, output: Path, config: SamplingConfig, options: argparse.Namespace) -> int:
    """Write the picture, and say where it is and how long the whole run would take."""
    first = options.frames[0]
    frame, crop = _place(options)
    with ProgressBars() as bars:
        found = preview(model, clip, frame, crop, config, progress=bars)
    path = _write(found, output)
    numbers = [first + number for number in found.frames]
    shown = f"frames {numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"frame {numbers[0]}"
    log.info("wrote %s: bicubic interpolation left, the result right, %s", path, shown)
    if found.seconds is not None:
        log.info(
            "the whole run, %d frames and %d steps, would take %s on %s, judging by this preview",
            found.count,
            config.steps_taken,
            duration(found.seconds) if found.seconds > 60 else f"about {max(1, round(found.seconds))} s",
            model.device,
        )
    if options.json:
        print(json.dumps({"preview": str(path), "frames": found.count, "seconds": found.seconds}, indent=1))
    return DONE


def _write(found: Preview, output: Path) -> Path:
    """Write the picture under a name of its own: earlier ones stay, to be compared."""
    path = next(
        path for number in count(1) if not (path := output.with_name(f"{output.stem}.preview-{number}.png")).exists()
    )
    try:
        with replacing(path) as part:
            Image.fromarray(found.picture).save(part, "PNG", icc_profile=found.profile)
    except OSError as error:
        raise ResourceError(
            f"{path} could not be written ({error.strerror or error}): choose another output"
        ) from error
    return path
