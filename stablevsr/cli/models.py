"""The command `models`: known weights and what they are for."""

import argparse

from stablevsr.cli.console import DONE
from stablevsr.hub.cache import entries
from stablevsr.hub.names import KNOWN

PURPOSES = {  # of `model.BUNDLED`, which PyTorch would have to be imported for
    "small": "small and quick, to try the package; the default",
    "small-streaming": "as small, for streams: 4 steps a frame from past frames only",
}


def run(options: argparse.Namespace) -> int:
    here = {entry.name.partition("@")[0] for entry in entries() if entry.finished}
    for name, purpose in PURPOSES.items():
        print(f"{name} (bundled)\n    {purpose}\n    stablevsr upscale IN OUT --weights {name}")
    for known in KNOWN:
        kept = " (in the cache)" if known.repo in here else ""
        print(f"{known.repo}{kept}\n    {known.purpose}\n    {known.use}")
    print("size and license are said before anything is downloaded; other models of these kinds work by name too")
    return DONE
