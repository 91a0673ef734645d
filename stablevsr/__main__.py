"""Where the command begins: quiet when it is stopped before it has begun, for importing PyTorch takes seconds."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def main() -> int:
    """`stablevsr`, and `python -m stablevsr`; returns the exit code."""
    before = signal.signal(signal.SIGINT, _leave)
    from stablevsr.cli import main as command

    signal.signal(signal.SIGINT, before)
    return command()


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    # Not an exception: raised in the middle of an import it could be taken for an error of the module. Nothing is open.
    os.write(sys.stderr.fileno(), b"stablevsr: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
