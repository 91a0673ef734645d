"""RAFT checkpoints: torchvision's and princeton-vl's, large and small."""

from pathlib import Path

from torch import Tensor

from stablevsr.architectures import RAFT_LARGE, RAFT_SMALL
from stablevsr.config import FlowConfig
from stablevsr.convert.checkpoint import read_tensors
from stablevsr.convert.draft import on_meta, to_ours
from stablevsr.convert.keys import TORCHVISION_RAFT, merge_princeton_names, princeton_raft
from stablevsr.errors import WeightsError
from stablevsr.nn.raft import RAFT


def read_flow(path: Path) -> tuple[FlowConfig, dict[str, Tensor], str]:
    """Config, tensors under our names, and provenance of a RAFT checkpoint; `WeightsError` for another file."""
    tensors = read_tensors(path)
    config = RAFT_LARGE if any("mask" in name for name in tensors) else RAFT_SMALL
    size = "large" if config is RAFT_LARGE else "small"
    if any(name.startswith("feature_encoder.") for name in tensors):
        source, table = "torchvision", TORCHVISION_RAFT
    elif any(name.removeprefix("module.").startswith("fnet.") for name in tensors):
        source, table = "princeton-vl", princeton_raft(config)
        tensors = merge_princeton_names(tensors, config, str(path))
    else:
        raise WeightsError(
            f"{path} holds no RAFT: expected torchvision's raft_large or raft_small, or princeton-vl's weights"
        )
    ours = to_ours(tensors, on_meta(RAFT, config), table, str(path))
    return config, ours, f"{source} RAFT {size}, {path.name}"
