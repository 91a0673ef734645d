"""The command `evaluate`: the table goes to standard output."""

import argparse
import logging

from tqdm import tqdm

from stablevsr.atomic import replacing
from stablevsr.cli.console import DONE, require_folder_of, shows_progress
from stablevsr.cli.weights import asking
from stablevsr.metrics.evaluate import Evaluator, clip_pairs, evaluate
from stablevsr.metrics.report import as_csv, as_json, table
from stablevsr.model import build_model, find_weights

log = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> int:
    pairs = clip_pairs(options.result, options.truth)
    for path in filter(None, (options.csv, options.json)):
        require_folder_of(path)
    model = build_model(find_weights(options.weights, asking(options.yes)), options.device)
    evaluator = Evaluator(model.device, model.flow, options.weights_dir)
    with tqdm(unit="frame", disable=not shows_progress()) as bar:

        def progress(clip: str, done: int, total: int | None) -> None:
            bar.set_description(clip)
            bar.update()

        report = evaluate(
            evaluator,
            pairs,
            model.provenance.get("flow", "unknown"),
            progress,
            options.allow_truncated,
            options.allow_hdr,
        )
    for notice in report.notices:
        log.warning("%s", notice)
    for path, text in ((options.csv, as_csv), (options.json, as_json)):
        if path:
            with replacing(path) as part:
                part.write_text(text(report), encoding="utf-8")
    print(table(report))
    return DONE
