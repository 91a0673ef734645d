"""The command `cache`: lists what was downloaded and converted, and deletes it."""

import argparse

from stablevsr.cli.console import DONE
from stablevsr.hub.cache import Entry, cache_folder, clear, entries


def run(options: argparse.Namespace) -> int:
    if options.clear is not None:
        deleted = clear(options.clear)
        for entry in deleted:
            print(f"deleted {_line(entry)}")
        print(f"{cache_folder()}: {_size(deleted)} freed")
        return DONE
    found = entries()
    for entry in found:
        print(_line(entry))
    print(f"{cache_folder()}: {_size(found)}" if found else f"{cache_folder()}: nothing is kept")
    return DONE


def _line(entry: Entry) -> str:
    kind = "weights" if entry.finished else "unfinished download"
    return f"{entry.name}: {kind}, {_size([entry])}, {entry.changed:%Y-%m-%d %H:%M}"


def _size(found: list[Entry]) -> str:
    return f"{sum(entry.bytes for entry in found) / 10**6:,.1f} MB"
