"""The command `compare`."""

import argparse
import logging

from tqdm import tqdm

from stablevsr import __version__
from stablevsr.cli.console import DONE, shows_progress
from stablevsr.cli.weights import asking
from stablevsr.compare.clips import labels
from stablevsr.compare.collect import Settings
from stablevsr.compare.compare import check_page, compare_page
from stablevsr.compare.places import Crop
from stablevsr.model import Model, build_model, find_weights

log = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> int:
    paths = [options.low_res, *options.results, *([options.gt] if options.gt else [])]
    check_page(options.output, paths, options.force)
    settings = Settings(
        crops=tuple(Crop(*crop) for crop in options.crop) if options.crop else None,
        profile=options.profile,
        flow_frames=options.flow_frames,
        metrics_frames=options.metrics_frames,
        part=options.frames,
        crf=options.crf,
        allow_truncated=options.allow_truncated,
        allow_hdr=options.allow_hdr,
    )

    def load() -> Model:
        return build_model(find_weights(options.weights, asking(options.yes)), options.device)

    # The delay avoids an empty bar above an error about bad input.
    with tqdm(unit="frame", delay=0.1, disable=not shows_progress()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = compare_page(
            dict(zip(labels(options.results), options.results, strict=True)),
            options.output,
            lr=options.low_res,
            truth=options.gt,
            model=None if options.no_flow else load,
            settings=settings,
            about={"made by": f"stablevsr {__version__}", "weights": options.weights or "bundled"},
            force=options.force,
            progress=progress,
        )
    for notice in found.notices:
        log.warning("%s", notice)
    log.info("wrote %s: %d frames of %s", options.output, found.frame_count, ", ".join(found.labels))
    return DONE
