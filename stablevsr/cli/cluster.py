"""`upscale` on several machines: with `--cluster`, or as one of the processes of `--shard`."""

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from stablevsr.cli.console import DONE, FAILED, ProgressBars, WorkerBars
from stablevsr.cli.upscale import fetch_weights, find_tasks, open_clip, print_summary, sampling_config, untrained_parts
from stablevsr.cluster.connect import Cluster, require_address
from stablevsr.cluster.description import ModelDescription
from stablevsr.cluster.driver import run_on_cluster
from stablevsr.cluster.job import Setting
from stablevsr.cluster.shard import run_shard
from stablevsr.cluster.units import Shard
from stablevsr.engine.workspace import workspace_path
from stablevsr.errors import OptionsError
from stablevsr.media import Encoding
from stablevsr.media.pipe import PIPE
from stablevsr.model import find_weights
from stablevsr.runtime import pick_device
from stablevsr.weights import read_header

log = logging.getLogger(__name__)


def run_on_several(options: argparse.Namespace) -> int:
    """Run `upscale` with one of the options for several machines."""
    _check(options)
    shard = Shard.parse(options.shard) if options.shard else None
    tasks = find_tasks(options)
    clips = [(task.input, task.output) for task in tasks]
    if PIPE in [path for clip in clips for path in clip]:
        raise OptionsError("got - with --cluster or --shard, but a pipe cannot be divided: use files")
    if options.weights:
        options.weights = fetch_weights(tasks, options)
    config = sampling_config(options)
    header = read_header(find_weights(options.weights))
    for notice in untrained_parts(header.provenance):
        log.warning("%s", notice)
    device = str(pick_device(options.device)) if shard else options.device
    description = ModelDescription(options.weights, device, options.dtype, options.compile, options.offload)
    setting = Setting(
        config,
        header.config,
        encoding=Encoding(options.codec, options.crf),
        force=options.force,
        restart=options.restart,
        keep_workspace=options.keep_workspace,
        open_clip=partial(open_clip, options=options),
    )
    with ProgressBars() as bars, WorkerBars() as watch, telling_how_to_continue([output for _, output in clips]):
        if shard:
            done = run_shard(clips, description, setting, shard, side_by_side=options.side_by_side, progress=bars)
        else:
            cluster = Cluster(options.cluster, options.workers, options.cpus_per_worker)
            done = run_on_cluster(
                clips, description, setting, cluster, side_by_side=options.side_by_side, progress=bars, watch=watch
            )
    print_summary(done, options)
    return FAILED if any(result.error for result in done) else DONE


@contextmanager
def telling_how_to_continue(outputs: list[Path]) -> Iterator[None]:
    """If the run is interrupted, say how to continue it."""
    try:
        yield
    except KeyboardInterrupt:
        left = [workspace_path(output) for output in outputs if workspace_path(output).exists()]
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            log.error("run the same command again to continue, or delete %s%s", left[0], more)
        raise


def _check(options: argparse.Namespace) -> None:
    if options.cluster and options.shard:
        raise OptionsError("got --cluster and --shard, which exclude each other: omit one")
    if options.cluster:
        require_address(options.cluster)  # before a path that was taken for one is missed
    for name in ("workers", "cpus_per_worker"):
        if getattr(options, name) is not None and not options.cluster:
            flag = f"--{name.replace('_', '-')}"
            raise OptionsError(f"got {flag} without --cluster, where it has no effect: omit it")
