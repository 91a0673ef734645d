"""Entry point of `python -m stablevsr`."""

import sys

from stablevsr.cli import main

if __name__ == "__main__":
    sys.exit(main())
