#!/usr/bin/env python3
"""Convert published checkpoints to a stablevsr weights file, and back: the same as `stablevsr convert`."""

import sys

from stablevsr.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
