"""The command `inspect`."""

import argparse

from stablevsr.cli.console import DONE
from stablevsr.convert.assemble import describe
from stablevsr.model import bundled_weights


def run(options: argparse.Namespace) -> int:
    print(describe(options.file or bundled_weights()))
    return DONE
