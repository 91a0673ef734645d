"""The `stablevsr` command: parses options and reports errors. Each command's module is imported only when it runs."""

import argparse
import importlib
import logging
import sys
from collections.abc import Callable

from stablevsr.cli.console import (
    BAD_INPUT,
    FAILED,
    INTERRUPTED,
    close_streams,
    leaving_when_interrupted,
    log_to_stderr,
    open_closed_streams,
    stopped_by_signal,
)
from stablevsr.cli.parser import build_parser
from stablevsr.errors import IncompleteOutput, UserError

log = logging.getLogger("stablevsr")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 a run failed, 2 bad usage or input, 130 interrupted."""
    open_closed_streams()
    options = build_parser().parse_args(arguments)
    with log_to_stderr(options.quiet - options.verbose):
        with leaving_when_interrupted():
            command = importlib.import_module(f"stablevsr.cli.{options.command}")
        return told_in_a_sentence(command.run, options)


def told_in_a_sentence(run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Run a command; every error becomes one sentence and an exit code."""
    try:
        with stopped_by_signal():
            code = run(options)
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where an error is told
            return code
    except KeyboardInterrupt:
        log.error("interrupted; no incomplete output is left")
        return INTERRUPTED
    except BrokenPipeError:  # the reader has exited, as `| head` does: nobody is left to report to
        return FAILED
    except UserError as error:
        log.error("%s", error)
        return FAILED if isinstance(error, IncompleteOutput) else BAD_INPUT
    except Exception as error:
        if options.debug:
            raise
        log.error("failed: %s: %s (--debug shows the traceback)", type(error).__name__, error)
        return FAILED
    finally:
        close_streams()
