"""The command `app`."""

import argparse
import logging
import webbrowser

from stablevsr.app.server import (
    is_loopback,
    open_folders,
    require_address,
    require_gradio,
    serving,
    wait_for_interrupt,
)
from stablevsr.app.studio import Folders, Studio
from stablevsr.cli.console import DONE
from stablevsr.cli.upscale import load
from stablevsr.errors import OptionsError

log = logging.getLogger(__name__)

MEGABYTE = 10**6


def run(options: argparse.Namespace) -> int:
    require_gradio()
    if options.max_upload < 1:
        raise OptionsError(f"got --max-upload {options.max_upload}, expected 1 or more megabytes")
    require_address(options.host, options.port)
    folders = Folders(options.folder.absolute())
    with open_folders(folders):
        studio = Studio(load(options), str(options.weights or "the bundled small model"), folders)
        try:
            with serving(studio, options.host, options.port, options.max_upload * MEGABYTE) as address:
                log.info("open %s in a browser; files are in %s; Ctrl-C ends the app", address, folders.root)
                if not is_loopback(options.host):
                    log.warning("everyone who can reach %s can use the app and see all of its runs", options.host)
                if options.open:
                    webbrowser.open(address)
                wait_for_interrupt()
        finally:
            studio.close()
    log.info("ended; an unfinished run can go on when the app is started again")
    return DONE
