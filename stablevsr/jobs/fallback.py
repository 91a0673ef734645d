"""The fallback to tiles, remembered: a run that goes on decodes as the run before it did."""

from stablevsr.jobs.workspace import Workspace
from stablevsr.sampling.tiles import PictureDecoder


class Fallback:
    """From which unit of work on `decode` has fallen back to tiles, kept in the workspace.

    Units are frame-steps, and behind all of them the frames of the final decode.
    """

    def __init__(self, workspace: Workspace, decode: PictureDecoder) -> None:
        self._workspace, self._decode = workspace, decode
        noted = workspace.noted("tiles")
        self._since = noted["since"] if noted else None

    def before(self, unit: int) -> None:
        """To be called before each unit."""
        if self._since is not None and unit >= self._since:
            self._decode.fall_back()

    def after(self, unit: int) -> None:
        """To be called behind each unit, before it is recorded as done."""
        if self._decode.has_fallen_back and (self._since is None or unit < self._since):
            self._since = unit
            self._workspace.note("tiles", {"since": unit})
