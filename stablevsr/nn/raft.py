"""RAFT, recurrent all-pairs field transforms for optical flow (Teed and Deng, ECCV 2020)."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stablevsr.config import FlowConfig
from stablevsr.nn.warp import pixel_grid

STRIDE = 8  # of the grid of features and flow, in pixels


class NormedConv(nn.Module):
    """A convolution, padded to keep the size at stride 1, and the norm that `norm` names, if any."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, norm: str, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2)
        norms = {"instance": nn.InstanceNorm2d, "batch": nn.BatchNorm2d}
        self.norm = norms[norm](out_channels) if norm in norms else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class EncoderBlock(nn.Module):
    """A residual block of two 3x3 convolutions, or a bottleneck block of 1x1, 3x3, 1x1."""

    def __init__(self, kind: str, in_channels: int, out_channels: int, norm: str, stride: int) -> None:
        super().__init__()
        if kind == "residual":
            layers = [(in_channels, out_channels, 3, stride), (out_channels, out_channels, 3, 1)]
        else:
            narrow = out_channels // 4
            layers = [(in_channels, narrow, 1, 1), (narrow, narrow, 3, stride), (narrow, out_channels, 1, 1)]
        self.convs = nn.ModuleList(NormedConv(a, b, kernel, norm, step) for a, b, kernel, step in layers)
        self.skip = NormedConv(in_channels, out_channels, 1, norm, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in self.convs:
            y = F.relu(conv(y))
        return F.relu(self.skip(x) + y)


class FeatureEncoder(nn.Module):
    """The feature network (fnet) or the context network (cnet): features at an eighth of the size."""

    def __init__(self, kind: str, widths: tuple[int, ...], norm: str) -> None:
        super().__init__()
        self.stem = NormedConv(3, widths[0], 7, norm, stride=2)
        self.blocks = nn.ModuleList()
        for in_channels, out_channels, stride in zip(widths, widths[1:4], (1, 2, 2), strict=False):
            self.blocks.append(EncoderBlock(kind, in_channels, out_channels, norm, stride))
            self.blocks.append(EncoderBlock(kind, out_channels, out_channels, norm, 1))
        self.conv_out = nn.Conv2d(widths[3], widths[4], 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) to (n, widths[4], h / 8, w / 8)."""
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.conv_out(x)


class MotionEncoder(nn.Module):
    """Correlation features and the current flow to motion features, with the flow itself concatenated."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        corr_widths = (config.corr_levels * (2 * config.corr_radius + 1) ** 2, *config.motion_corr_widths)
        self.corr_convs = nn.ModuleList(
            nn.Conv2d(a, b, kernel, padding=kernel // 2)
            for a, b, kernel in zip(corr_widths, corr_widths[1:], (1, 3), strict=False)
        )
        wide, narrow = config.motion_flow_widths
        self.flow_convs = nn.ModuleList([nn.Conv2d(2, wide, 7, padding=3), nn.Conv2d(wide, narrow, 3, padding=1)])
        self.conv_out = nn.Conv2d(corr_widths[-1] + narrow, config.motion_width - 2, 3, padding=1)

    def forward(self, flow: Tensor, corr: Tensor) -> Tensor:
        features = flow
        for conv in self.corr_convs:
            corr = F.relu(conv(corr))
        for conv in self.flow_convs:
            features = F.relu(conv(features))
        motion = F.relu(self.conv_out(torch.cat([corr, features], dim=1)))
        return torch.cat([motion, flow], dim=1)


class ConvGRU(nn.Module):
    """A convolutional gated recurrent unit (equations 3 to 6)."""

    def __init__(self, hidden_dim: int, input_dim: int, kernel: tuple[int, int]) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2)
        self.conv_z = nn.Conv2d(hidden_dim + input_dim, hidden_dim, kernel, padding=padding)
        self.conv_r = nn.Conv2d(hidden_dim + input_dim, hidden_dim, kernel, padding=padding)
        self.conv_q = nn.Conv2d(hidden_dim + input_dim, hidden_dim, kernel, padding=padding)

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        both = torch.cat([hidden, x], dim=1)
        z = torch.sigmoid(self.conv_z(both))
        r = torch.sigmoid(self.conv_r(both))
        q = torch.tanh(self.conv_q(torch.cat([r * hidden, x], dim=1)))
        return (1 - z) * hidden + z * q


def lookup_window(radius: int, like: Tensor) -> Tensor:
    """Offsets (side, side, 2), x then y, of the positions that a lookup samples around its centre."""
    # The window's first axis is added to x and its second to y: swapped, but the weights were trained this way.
    offsets = torch.arange(-radius, radius + 1, device=like.device, dtype=like.dtype)
    return torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), dim=-1)


def to_grid(points: Tensor, picture: Tensor) -> Tensor:
    """Pixel positions (..., 2) in a picture (..., h, w), normalised for grid_sample with aligned corners."""
    # Filled on the device, for a copy would block the host.
    size = torch.cat([points.new_full((1,), side - 1) for side in reversed(picture.shape[-2:])])
    return 2 * points / size - 1


class CorrelationPyramid:
    """All-pairs correlation of two feature maps, pooled to several levels (section 3.2)."""

    def __init__(self, features1: Tensor, features2: Tensor, levels: int, radius: int) -> None:
        c, h = features1.shape[1:3]
        volume = features1.flatten(2).transpose(1, 2) @ features2.flatten(2)  # (n, h*w of 1, h*w of 2)
        volume /= c**0.5  # in place: it is the largest tensor
        volume = rearrange(volume, "n p (h w) -> (n p) 1 h w", h=h)
        self.levels = [volume]
        for _ in range(levels - 1):
            self.levels.append(F.avg_pool2d(self.levels[-1], 2))
        self.window = lookup_window(radius, features1)

    def lookup(self, coords: Tensor) -> Tensor:
        """Correlation in a window around `coords` (n, 2, h, w), x then y: (n, levels * side^2, h, w)."""
        n, _, h, w = coords.shape
        centres = rearrange(coords, "n xy h w -> (n h w) 1 1 xy")
        found = []
        for level, volume in enumerate(self.levels):
            points = to_grid(centres / 2**level + self.window, volume)
            samples = F.grid_sample(volume, points, mode="bilinear", align_corners=True)
            found.append(rearrange(samples, "(n h w) 1 i j -> n (i j) h w", n=n, h=h, w=w))
        return torch.cat(found, dim=1)


class OnDemandCorrelation:
    """`CorrelationPyramid` computed on demand, at lookup (section 3.2, "Efficient Computation").

    For pictures whose all-pairs volume would not fit in memory: pooling and interpolation are linear, so they can be
    applied to the second feature map instead of the correlations.
    """

    CHUNK = 2**26  # elements in memory at a time

    def __init__(self, features1: Tensor, features2: Tensor, levels: int, radius: int) -> None:
        self.features1 = features1 / features1.shape[1] ** 0.5
        self.levels = [features2]
        for _ in range(levels - 1):
            self.levels.append(F.avg_pool2d(self.levels[-1], 2))
        self.window = lookup_window(radius, features1).flatten(0, 1)  # (side^2, 2)

    def lookup(self, coords: Tensor) -> Tensor:
        n, _, _, w = coords.shape
        rows = max(1, self.CHUNK // (n * w * len(self.window) * self.features1.shape[1]))
        parts = zip(coords.split(rows, dim=2), self.features1.split(rows, dim=2), strict=True)
        return torch.cat([self._lookup_rows(*part) for part in parts], dim=2)

    def _lookup_rows(self, coords: Tensor, features1: Tensor) -> Tensor:
        centres = rearrange(coords, "n xy h w -> n (h w) 1 xy")
        found = []
        for level, features2 in enumerate(self.levels):
            points = to_grid(centres / 2**level + self.window, features2)
            samples = F.grid_sample(features2, points, mode="bilinear", align_corners=True)  # (n, c, h*w, side^2)
            products = torch.einsum("ncpk,ncp->nkp", samples, features1.flatten(2))
            found.append(products.unflatten(2, coords.shape[2:]))
        return torch.cat(found, dim=1)


class RAFT(nn.Module):
    """Optical flow between two pictures whose sides are multiples of 8 and at least 128 pixels."""

    max_correlations = 2**29  # of the all-pairs volume, 4 bytes each, a third more with the pyramid; else on demand

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        hidden, context = config.hidden_dim, config.context_widths[-1] - config.hidden_dim
        self.fnet = FeatureEncoder(config.block, config.feature_widths, "instance")
        self.cnet = FeatureEncoder(config.block, config.context_widths, config.context_norm)
        self.motion_encoder = MotionEncoder(config)
        self.grus = nn.ModuleList(
            ConvGRU(hidden, config.motion_width + context, kernel) for kernel in config.gru_kernels
        )
        self.flow_head = nn.Sequential(
            nn.Conv2d(hidden, config.flow_head_dim, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(config.flow_head_dim, 2, 3, padding=1),
        )
        self.mask_head = None
        if config.convex_upsampling:
            self.mask_head = nn.Sequential(
                nn.Conv2d(hidden, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 9 * STRIDE**2, 1)
            )

    def forward(self, picture1: Tensor, picture2: Tensor) -> Tensor:
        """
        Args:
            picture1, picture2: (n, 3, h, w) in [-1, 1].

        Returns:
            (n, 2, h, w), x then y, in pixels: `picture2` at p + flow(p) shows what `picture1` shows at p. The last
            of `config.num_updates` predictions.
        """
        return self.upsample(*self.estimate(*self.features(picture1, picture2), self.context(picture1)))

    def predictions(self, picture1: Tensor, picture2: Tensor) -> list[Tensor]:
        """The prediction after every update, each as `forward` returns it: for training."""
        updates = self.updates(*self.features(picture1, picture2), self.context(picture1))
        return [self.upsample(flow, hidden) for flow, hidden in updates]

    def features(self, picture1: Tensor, picture2: Tensor) -> tuple[Tensor, Tensor]:
        """The features to be matched, of both pictures, (n, c, h / 8, w / 8)."""
        features1, features2 = self.fnet(torch.cat([picture1, picture2])).chunk(2)
        return features1, features2

    def encode(self, picture: Tensor) -> Tensor:
        """The features of one picture, as `features` has them up to rounding."""
        return self.fnet(picture)

    def context(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """The initial hidden state and the context of the first picture, (n, c, h / 8, w / 8)."""
        split = [self.config.hidden_dim, self.config.context_widths[-1] - self.config.hidden_dim]
        hidden, context = self.cnet(picture).split(split, dim=1)
        return torch.tanh(hidden), F.relu(context)

    def estimate(self, features1: Tensor, features2: Tensor, context: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The last of `updates`."""
        for flow, hidden in self.updates(features1, features2, context):  # noqa: B007 (the last one is returned)
            pass
        return flow, hidden

    def updates(
        self, features1: Tensor, features2: Tensor, context: tuple[Tensor, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the flow (n, 2, h / 8, w / 8), in units of 8 pixels, and the hidden state after every update.

        Args:
            features1, features2: from `features`.
            context: from `context`, of the first picture.
        """
        fits = features1.shape[0] * features1.shape[2:].numel() ** 2 <= self.max_correlations
        correlation = CorrelationPyramid if fits else OnDemandCorrelation
        pyramid = correlation(features1, features2, self.config.corr_levels, self.config.corr_radius)
        hidden, inputs = context

        origin = pixel_grid(hidden)  # (1, 2, h / 8, w / 8)
        coords = origin.expand(hidden.shape[0], -1, -1, -1)
        for _ in range(self.config.num_updates):
            coords = coords.detach()  # no gradient through the lookup's position (section 3.3)
            motion = self.motion_encoder(coords - origin, pyramid.lookup(coords))
            x = torch.cat([inputs, motion], dim=1)
            for gru in self.grus:
                hidden = gru(hidden, x)
            coords = coords + self.flow_head(hidden)
            yield coords - origin, hidden

    def upsample(self, flow: Tensor, hidden: Tensor) -> Tensor:
        """(n, 2, h / 8, w / 8) to (n, 2, h, w)."""
        if self.mask_head is None:
            return bilinear_upsample(flow)
        # The factor balanced the mask's gradient in training (appendix B); the weights expect it.
        return convex_upsample(flow, 0.25 * self.mask_head(hidden))


def bilinear_upsample(flow: Tensor) -> Tensor:
    """x8 upsampling without a mask, as in RAFT small: (n, 2, h, w) to (n, 2, 8h, 8w), in pixels."""
    size = (STRIDE * flow.shape[-2], STRIDE * flow.shape[-1])
    return STRIDE * F.interpolate(flow, size=size, mode="bilinear", align_corners=True)


def convex_upsample(flow: Tensor, mask: Tensor) -> Tensor:
    """x8 upsampling in which each fine pixel is a convex combination of 3x3 coarse ones (appendix B).

    Args:
        flow: (n, 2, h, w).
        mask: (n, 9 * 64, h, w), logits of the weights.
    """
    weights = rearrange(mask, "n (k i j) h w -> n 1 k i j h w", k=9, i=STRIDE, j=STRIDE).softmax(dim=2)
    patches = F.unfold(STRIDE * flow, 3, padding=1)
    patches = rearrange(patches, "n (xy k) (h w) -> n xy k 1 1 h w", k=9, h=flow.shape[-2])
    return rearrange((weights * patches).sum(dim=2), "n xy i j h w -> n xy (h i) (w j)")
