"""Records when decoding switched to tiles, so that a resumed run switches at the same step and stays bit-identical."""

from stablevsr.jobs.workspace import Workspace
from stablevsr.sampling.tiles import PictureDecoder


class Fallback:
    """From which unit of work on `decode` has fallen back to tiles, kept in the workspace.

    Units are frame-steps and, after all of them, the frames of the final decode.
    """

    def __init__(self, workspace: Workspace, decode: PictureDecoder) -> None:
        self._workspace, self._decode = workspace, decode
        noted = workspace.noted("tiles")
        self._since = noted["since"] if noted else None

    def before(self, unit: int) -> None:
        """Call before each unit."""
        if self._since is not None and unit >= self._since:
            self._decode.fall_back()

    def after(self, unit: int) -> None:
        """Call after each unit, before it is recorded as done."""
        if self._decode.has_fallen_back and (self._since is None or unit < self._since):
            self._since = unit
            self._workspace.note("tiles", {"since": unit})
