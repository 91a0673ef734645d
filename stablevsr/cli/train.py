"""The command `train`."""

import argparse
import logging
import os

from stablevsr.cli.console import DONE
from stablevsr.runtime import pick_device
from stablevsr.training.train import train

log = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> int:
    output = train(options.recipe, pick_device(options.device))
    if os.environ.get("RANK", "0") == "0":
        log.info("wrote %s", output)
    return DONE
