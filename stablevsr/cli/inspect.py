"""The command `inspect`."""

import argparse

from stablevsr.cli.console import DONE
from stablevsr.cli.weights import asking
from stablevsr.convert.assemble import describe
from stablevsr.model import find_weights


def run(options: argparse.Namespace) -> int:
    print(describe(find_weights(options.file, asking(options.yes))))
    return DONE
