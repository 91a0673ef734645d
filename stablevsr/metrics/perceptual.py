"""Metrics from third-party packages (the extra `metrics`). Those whose package or weights are missing are skipped."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]  # two (n, 3, h, w) in [0, 1] to (n,)


class Unavailable(Exception):
    """Why a metric is skipped."""


def require(package: str, weights: str | None = None) -> None:
    """Raise `Unavailable` unless a package is installed and the weights it would download are in the cache."""
    if find_spec(package) is None:
        raise Unavailable(f"{package} is not installed: pip install 'stablevsr[metrics]'")
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    if weights and not (cache / weights).is_file():
        raise Unavailable(f"weights missing: {weights} in {cache}; nothing is downloaded automatically")


def haarpsi(device: torch.device) -> Distance:
    """Haar perceptual similarity (Reisenhofer et al. 2018), higher is better."""
    require("piq")
    import piq

    return lambda a, b: piq.haarpsi(a, b, reduction="none")


def gmsd(device: torch.device) -> Distance:
    """Gradient magnitude similarity deviation (Xue et al. 2014), lower is better."""
    require("piq")
    import piq

    return lambda a, b: piq.gmsd(a, b, reduction="none")


def lpips(device: torch.device) -> Distance:
    """LPIPS with AlexNet (Zhang et al. 2018), lower is better."""
    require("lpips", "alexnet-owt-7be5be79.pth")
    import lpips as package

    network = package.LPIPS(net="alex", verbose=False).to(device).eval()
    return lambda a, b: network(a, b, normalize=True).flatten()


def dists(device: torch.device) -> Distance:
    """DISTS (Ding et al. 2020), lower is better."""
    require("DISTS_pytorch", "vgg16-397923af.pth")
    import DISTS_pytorch as package

    network = package.DISTS().to(device).eval()
    return lambda a, b: network(a, b).flatten()


def no_reference(name: str, file: str, folder: str = "pyiqa") -> Callable[[torch.device], Distance]:
    """A no-reference metric of pyiqa.

    Its licence is for non-commercial use, so it is not in our extras: those who may use it install it themselves.

    Args:
        name: of the metric in pyiqa.
        file: the weights that pyiqa would download.
        folder: its folder within torch's cache.
    """

    def load(device: torch.device) -> Distance:
        if find_spec("pyiqa") is None:
            raise Unavailable("pyiqa is not installed: pip install pyiqa, whose licence is for non-commercial use")
        place = Path(torch.hub.get_dir()) / folder
        if not (place / file).is_file():
            raise Unavailable(f"weights missing: {file} in {place}; nothing is downloaded automatically")
        import pyiqa

        network = pyiqa.create_metric(name, device=device)
        return lambda result, truth: network(result).flatten()

    return load


LOADERS: dict[str, Callable[[torch.device], Distance]] = {
    "HaarPSI": haarpsi,
    "GMSD": gmsd,
    "LPIPS": lpips,
    "DISTS": dists,
    "MUSIQ": no_reference("musiq", "musiq_koniq_ckpt-e95806b9.pth"),
    "NIQE": no_reference("niqe", "niqe_modelparameters.mat"),
    "CLIP-IQA": no_reference("clipiqa", "RN50.pt", "clip"),
}
