"""The command `models`: known weights and what they are for."""

import argparse

from stablevsr.cli.console import DONE
from stablevsr.hub.cache import entries
from stablevsr.hub.names import KNOWN


def run(options: argparse.Namespace) -> int:
    here = {entry.name.partition("@")[0] for entry in entries() if entry.finished}
    print("the bundled model\n    small and quick, to try the package\n    stablevsr upscale IN OUT")
    for known in KNOWN:
        kept = " (in the cache)" if known.repo in here else ""
        print(f"{known.repo}{kept}\n    {known.purpose}\n    {known.use}")
    print("size and license are said before anything is downloaded; other models of these kinds work by name too")
    return DONE
