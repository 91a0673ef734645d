"""`upscale_on_cluster`: the counterpart of `upscale` for many clips on a Ray cluster."""

from collections.abc import Mapping
from pathlib import Path

from stablevsr.cluster.connect import Cluster
from stablevsr.cluster.description import ModelDescription
from stablevsr.cluster.driver import run_on_cluster
from stablevsr.cluster.job import Result, Setting
from stablevsr.engine.progress import OnProgress
from stablevsr.errors import OptionsError
from stablevsr.media import Encoding
from stablevsr.model import bundled_weights
from stablevsr.sampling.config import SamplingConfig, resolve
from stablevsr.weights import read_header


def upscale_on_cluster(
    clips: Mapping[str | Path, str | Path],
    model: ModelDescription | None = None,
    config: SamplingConfig | None = None,
    *,
    cluster: Cluster | None = None,
    encoding: Encoding | None = None,
    force: bool = False,
    restart: bool = False,
    keep_workspace: bool = False,
    progress: OnProgress | None = None,
    **fields: object,
) -> list[Result]:
    """Upscale clips four times, each into its output, on the machines of a Ray cluster.

    Scenes are sampled wherever a worker is free, and each result has the bits that `upscale` would give it. What is
    finished is kept in a folder beside each output; after a crash the same call continues. A clip or a scene that fails
    does not stop the others.

    Args:
        clips: for every input its output.
        model: what every worker builds; None is the bundled model.
        config: how to sample; None takes what the weights were made for.
        cluster: which machines; None is this one, with a worker for each GPU, or else for each core.
        encoding, force, restart, keep_workspace: as in `upscale`.
        progress: called with the frame-steps of all clips that have been read so far; return False to stop.
        fields: fields of `SamplingConfig` by name, which override `config`'s.

    Returns:
        For every clip its number of frames, the error if there was one, and who did what.

    Raises:
        UserError: for invalid options, when no worker can be used, and for an only clip that cannot be read.
        Stopped: when `progress` returned False.
    """
    model = model or ModelDescription()
    header = read_header(Path(model.weights or bundled_weights()))
    config = resolve(config, header.sampling, fields)
    config.check(header.config)
    pairs = [(Path(clip), Path(output)) for clip, output in clips.items()]
    outputs = [output.resolve() for _, output in pairs]
    for output in outputs:
        if outputs.count(output) > 1:
            raise OptionsError(f"two inputs would both be written to {output}: choose another output for one of them")
    setting = Setting(config, header.config, {}, encoding, force, restart, keep_workspace)
    return run_on_cluster(pairs, model, setting, cluster, progress=progress)
