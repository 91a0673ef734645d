"""Weights by name, for the commands: the question before a download."""

import logging
import sys

from stablevsr.errors import OptionsError
from stablevsr.hub.fetch import Confirm, Offer

log = logging.getLogger(__name__)


def asking(yes: bool) -> Confirm:
    """Say what a download would bring, and ask.

    Args:
        yes: the answer is yes; nothing is asked.

    Returns:
        A function that raises OptionsError where there is no terminal to ask on.
    """

    def confirm(offer: Offer) -> bool:
        if yes:
            log.info("%s", offer)
            return True
        if sys.stdin is None or not sys.stdin.isatty():
            raise OptionsError(f"{offer}: pass --yes to download without a question")
        print(f"stablevsr: {offer}\nstablevsr: download? [y/N] ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    return confirm
