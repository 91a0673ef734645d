"""What the page shows and does, without the page: the model, the folders, the previews and the jobs."""

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stablevsr.app.clips import ClipFacts, read_frame
from stablevsr.app.jobs import Job, JobQueue
from stablevsr.atomic import remove, replacing
from stablevsr.engine.memory import sample_video
from stablevsr.engine.outputs import enlarged
from stablevsr.engine.progress import OnProgress, Progress, Stopped
from stablevsr.engine.upscale import upscale
from stablevsr.engine.workspace import open_workspace, workspace_path
from stablevsr.errors import OptionsError, ResourceError, UserError
from stablevsr.fields import from_dict, to_dict
from stablevsr.media import Encoding, PartReader, open_reader
from stablevsr.model import Model
from stablevsr.sampling.config import PRESETS, SamplingConfig

WEIGHTS_OWN = "weights"  # the name of the options that the weights were made for
FORMATS = {  # name: suffix and codec
    "MP4 (H.264)": (".mp4", "h264"),
    "MP4 (HEVC, 10 bits)": (".mp4", "hevc10"),
    "WebM (VP9)": (".webm", "vp9"),
    "MOV (ProRes)": (".mov", "prores"),
    "MKV (lossless)": (".mkv", "ffv1"),
}
SHOWN_BY_BROWSERS = (".mp4", ".webm", ".png")


@dataclass(frozen=True)
class Folders:
    """Where the app keeps its files. These three folders are served, and nothing else.

    uploads: what pages have sent, and the pictures that they show; emptied when the app starts.
    inputs: the clips of jobs.
    """

    root: Path

    @property
    def uploads(self) -> Path:
        return self.root / "uploads"

    @property
    def inputs(self) -> Path:
        return self.root / "inputs"

    @property
    def outputs(self) -> Path:
        return self.root / "outputs"

    @property
    def jobs(self) -> Path:
        return self.root / "runs.json"

    def make(self) -> None:
        """Create them, and empty the uploads.

        Raises:
            ResourceError: when that is not possible.
        """
        remove(self.uploads)
        for folder in (self.root, self.uploads, self.inputs, self.outputs):
            make_folder(folder)


class Box(NamedTuple):
    """A part of a frame, in its pixels."""

    left: int
    top: int
    width: int
    height: int


def disk_error(folder: Path, error: OSError) -> ResourceError:
    """What to say when a file of the app cannot be written."""
    advice = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the disk"
    return ResourceError(f"{folder} cannot be written ({error.strerror or error}): {advice}, then try again")


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turns errors of the disk into `ResourceError`."""
    try:
        yield
    except OSError as error:
        raise disk_error(folder, error) from error


def make_folder(folder: Path) -> None:
    """Create a folder of the app, unless it exists.

    Raises:
        ResourceError: when that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"{folder}, a folder of the app, cannot be used ({error.strerror}): choose another with --folder"
        ) from error


class Studio:
    """One model, and everything that it is asked to do; used by all pages that are open.

    Args:
        model: stays loaded.
        weights: its name, for the page.
    """

    def __init__(self, model: Model, weights: str, folders: Folders) -> None:
        self.model, self.weights, self.folders = model, weights, folders
        self._device = threading.Lock()
        self._preview_stopped = threading.Event()
        self.jobs = JobQueue(folders.jobs, self._upscale, self._device)

    def presets(self) -> dict[str, SamplingConfig]:
        """The presets that these weights support, after the options that they were made for."""
        found = {WEIGHTS_OWN: self.model.sampling}
        for name, config in PRESETS.items():
            try:
                config.check(self.model.config)
            except UserError:
                continue
            found[name] = config
        return found

    def config(self, preset: str, fields: Mapping[str, Any]) -> SamplingConfig:
        """The options of a preset with these fields, checked against the weights.

        Raises:
            OptionsError: for values out of range and options that the weights do not support.
        """
        config = self.presets()[preset].with_fields(dict(fields))
        config.check(self.model.config)
        return config

    def preview(
        self, path: Path, index: int, box: Box | None, config: SamplingConfig, progress: Callable[[Progress], None]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Frame `index` enlarged by bicubic interpolation, and upscaled; (4h, 4w, 3) uint8 each. None when stopped.

        The frame is upscaled on its own, while a run also uses its neighbors.

        Args:
            box: the part of the frame; None for all of it.

        Raises:
            ResourceError: while a run is using the model.
        """
        if not self._device.acquire(blocking=False):
            raise ResourceError("the model is busy with a run or another preview: stop it, or wait for its end")
        self._preview_stopped.clear()

        def watch(now: Progress) -> bool:
            progress(now)
            return not self._preview_stopped.is_set()

        try:
            frame = read_frame(path, index)
            if box is not None:
                frame = np.ascontiguousarray(frame[box.top : box.top + box.height, box.left : box.left + box.width])
            after = sample_video(self.model, frame[None], config, progress=watch)[0]
            return enlarged(frame, is_deep=False), np.asarray(after)
        except Stopped:
            return None
        finally:
            self._device.release()

    def stop_preview(self) -> None:
        """Stop the preview after its unit of work in progress."""
        self._preview_stopped.set()

    def submit(self, facts: ClipFacts, first: int, last: int, config: SamplingConfig, format: str) -> Job:
        """Queue the upscaling of frames `first` to `last` of a clip, which is kept for as long as the job is.

        Args:
            format: of `FORMATS`; for a single image a PNG is written instead.

        Raises:
            OptionsError: for a part that the clip does not have, and when too many jobs are waiting.
            ResourceError: when the disk is full; nothing is queued then.
        """
        if not 0 <= first <= last < facts.frame_count:
            raise OptionsError(f"got frames {first} to {last}, expected some of 0 to {facts.frame_count - 1}")
        suffix, codec = FORMATS[format] if facts.is_video else (".png", None)
        whole = (first, last) == (0, facts.frame_count - 1)
        with writing_to(self.folders.root):
            return self.jobs.submit(
                input=str(self._keep(facts.path)),
                output=str(self._unused(facts.path, suffix)),
                frames=None if whole else (first, last + 1),
                config=to_dict(config),
                codec=codec,
                start=first / facts.frame_rate,
            )

    def discard(self, number: int) -> None:
        """Forget a job, and delete the work of an unfinished one; a finished result stays in the folder.

        Raises:
            OptionsError: for a job that is running or waiting.
        """
        job = self.jobs.find(number)
        if job is None:
            return
        if job.state in ("waiting", "running", "stopping"):
            raise OptionsError(f"{job.name} is {job.state}: stop it first")
        self.jobs.remove(number)
        if workspace_path(Path(job.output)).exists():
            with open_workspace(Path(job.output)) as workspace:
                workspace.remove()
        if all(other.input != job.input for other in self.jobs.all()):
            remove(Path(job.input).parent)

    def close(self) -> None:
        """Stop the job that runs, so that it can go on after a restart."""
        self.jobs.close()

    def _upscale(self, job: Job, progress: OnProgress) -> int:
        with open_reader(job.input) as clip:
            return upscale(
                self.model,
                PartReader(clip, *job.frames) if job.frames else clip,
                Path(job.output),
                from_dict(SamplingConfig, job.config),
                encoding=Encoding(job.codec) if job.codec else None,
                progress=progress,
            )

    def _keep(self, path: Path) -> Path:
        """An uploaded clip, in the folder of inputs; it is not copied if that is on the same disk."""
        kept = self.folders.inputs / path.parent.name / path.name  # the upload's folder is named by a hash of it
        if not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            try:
                os.link(path, kept)
            except OSError:
                with replacing(kept) as part:
                    shutil.copyfile(path, part)
        return kept

    def _unused(self, path: Path, suffix: str) -> Path:
        """A path in the output folder for a result of `path` that no file and no job has."""
        taken = {Path(job.output) for job in self.jobs.all()}
        for number in range(1, 10_000):
            end = "" if number == 1 else f"-{number}"
            output = self.folders.outputs / f"{path.stem}_upscaled{end}{suffix}"
            if output not in taken and not output.exists() and not workspace_path(output).exists():
                return output
        raise OptionsError(f"{self.folders.outputs} holds too many results of {path.name}: move some away")
