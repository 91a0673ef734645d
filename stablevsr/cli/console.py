"""The command's terminal: messages, progress bars, signals."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from stablevsr.errors import OptionsError

if TYPE_CHECKING:
    from tqdm import tqdm

    from stablevsr.cluster.assignment import AtWork
    from stablevsr.engine.progress import Progress

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
UNITS = {"flow": "pair", "denoise": "frame-step"}  # of the phases that do not count frames


class _Handler(logging.Handler):
    """Writes each message as a line on stderr, above the progress bars if there are any; stdout is left to pipes."""

    bar: "tqdm | None" = None

    def emit(self, record: logging.LogRecord) -> None:
        note = "note: " if record.levelno == logging.WARNING else ""
        # File names need not be valid text: those are shown with escapes.
        text = f"stablevsr: {note}{record.getMessage()}".encode(sys.stderr.encoding or "utf-8", "backslashreplace")
        bars = nullcontext() if self.bar is None else self.bar.external_write_mode(sys.stderr)
        with bars:
            print(text.decode(sys.stderr.encoding or "utf-8"), file=sys.stderr, flush=True)


def open_closed_streams() -> None:
    """Open the null device where a standard stream is closed.

    Else the next file that is opened would take its number, and what libraries print would end up inside. Python's
    own stdin and stdout stay None, by which those who need them know.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # for the rest of the process, as the one it stands for


@contextmanager
def log_to_stderr(quiet: int) -> Iterator[None]:
    """Show the package's messages.

    Args:
        quiet: 0 shows information and notes, 1 notes, 2 errors only; -1 shows details.
    """
    logger, handler = logging.getLogger("stablevsr"), _Handler()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel({-1: logging.DEBUG, 0: logging.INFO, 1: logging.WARNING}.get(quiet, logging.ERROR))
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def shows_progress() -> bool:
    """Whether progress bars are shown."""
    return logging.getLogger("stablevsr").isEnabledFor(logging.INFO)


class ProgressBars:
    """A bar for each phase of a run, with the time remaining."""

    def __init__(self) -> None:
        self._phase: tuple[int, str] | None = None  # of a pass of the model
        self._bar: tqdm | None = None

    def __enter__(self) -> "ProgressBars":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = _Handler.bar = self._phase = None

    def __call__(self, progress: "Progress") -> None:
        from tqdm import tqdm

        if not shows_progress():
            return
        phase, of = (progress.model_pass, progress.phase), progress.model_passes
        if phase != self._phase:
            self.__exit__()
            self._phase = phase
            before = progress.done - 1  # above 0 when an unfinished run is continued
            self._bar = tqdm(
                total=progress.total,
                initial=before,
                desc=f"pass {phase[0]} of {of}: {phase[1]}" if of > 1 else phase[1],
                unit=UNITS.get(progress.phase, "frame"),
            )
            _Handler.bar = self._bar
        assert self._bar is not None
        self._bar.total = progress.total
        self._bar.update(progress.done - self._bar.n)


class WorkerBars:
    """With -v, on a terminal, a bar for each worker of a cluster below that of the whole run."""

    def __init__(self) -> None:
        self._bars: dict[int, tqdm] = {}
        self._is_shown = logging.getLogger("stablevsr").isEnabledFor(logging.DEBUG) and sys.stderr.isatty()

    def __enter__(self) -> "WorkerBars":
        return self

    def __exit__(self, *_: object) -> None:
        for bar in self._bars.values():
            bar.close()

    def __call__(self, workers: "list[AtWork]") -> None:
        from tqdm import tqdm

        for worker in workers if self._is_shown else ():
            bar = self._bars.get(worker.number)
            if bar is None:
                bar = self._bars[worker.number] = tqdm(position=worker.number, leave=False, unit=UNITS["denoise"])
            title = f"worker {worker.number} on {worker.machine}: {worker.unit or 'waiting'} "
            if bar.desc != title:
                bar.set_description_str(title, refresh=False)
                bar.bar_format = None if worker.unit else "{desc}"
                bar.initial = worker.done  # above 0 when an unfinished unit is continued
                bar.reset(worker.total)
            bar.update(worker.done - bar.n)


def leaving_when_interrupted() -> AbstractContextManager[None]:
    """Exit at Ctrl-C with one line; for imports, where an exception could be mistaken for a module's error."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        os.write(sys.stderr.fileno(), b"stablevsr: interrupted\n")
        os._exit(INTERRUPTED)

    return _handling(signal.SIGINT, leave)


def stopped_by_signal() -> AbstractContextManager[None]:
    """Let SIGTERM clean up as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    return _handling(signal.SIGTERM, interrupt)


@contextmanager
def _handling(number: int, handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # signals can be handled only there
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def close_streams() -> None:
    """Redirect broken streams to the null device, so that Python does not fail again when it flushes at exit."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, stream.fileno())
            os.close(devnull)


def require_folder_of(path: "os.PathLike[str]") -> None:
    """`OptionsError` unless the folder to write `path` in exists."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise OptionsError(f"{path} cannot be written because {folder} is not a folder: create it first")
