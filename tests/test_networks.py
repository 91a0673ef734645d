"""Every network against the library that defines it, on shared random weights."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from references import REFERENCES, on_same_weights, pair, randomise, relative_error
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from stablevsr.architectures import LOW_RES_SCHEDULE, RAFT_LARGE, RAFT_SMALL, SD_X4_UPSCALER, STABLEVSR
from stablevsr.config import (
    FlowConfig,
    ModelConfig,
    TCMConfig,
    TextConfig,
    TinyDecoderConfig,
    UNetConfig,
    UNetEncoderConfig,
    VAEConfig,
)
from stablevsr.convert.keys import diffusers_tiny, rename_all
from stablevsr.errors import UserError
from stablevsr.nn import layers
from stablevsr.nn.attention import attend, attend_in_chunks
from stablevsr.nn.layers import double_and_convolve
from stablevsr.nn.raft import RAFT, CorrelationPyramid, OnDemandCorrelation
from stablevsr.nn.tcm import TCM
from stablevsr.nn.text import TextEncoder
from stablevsr.nn.tiny import TinyDecoder
from stablevsr.nn.unet import Residuals, UNet
from stablevsr.nn.vae import VAE
from stablevsr.nn.warp import pixel_grid, warp_published

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
both_precisions = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])

RELEASED = STABLEVSR
RELEASED_TEXT = TextConfig()


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Most tensors here are tiny: on busy cores, threads that wait for each other cost ten times what they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes of the released model


@pytest.mark.parametrize(
    ("network", "config", "expected"),
    [
        (UNet, RELEASED.unet, 472_374_020),
        (TCM, RELEASED.tcm, 207_699_264),
        (VAE, RELEASED.vae, 55_325_927),
        (RAFT, RAFT_LARGE, 5_257_536),
        (RAFT, RAFT_SMALL, 990_162),
    ],
    ids=["unet", "tcm", "vae", "raft_large", "raft_small"],
)
def test_parameter_count(network, config, expected):
    with torch.device("meta"):
        assert count(network(config)) == expected


def test_parameter_count_of_the_decoder():
    with torch.device("meta"):
        assert count(VAE(RELEASED.vae).decoder) == 32_965_379


@pytest.mark.parametrize(
    ("network", "config"),
    [
        (UNet, RELEASED.unet),
        (UNet, SD_X4_UPSCALER.unet),
        (TCM, RELEASED.tcm),
        (TCM, SD_X4_UPSCALER.tcm),
        (VAE, RELEASED.vae),
        (TextEncoder, RELEASED_TEXT),
    ],
    ids=["unet", "unet_sd_x4", "tcm", "tcm_sd_x4", "vae", "text"],
)
def test_released_layout(network, config):
    """Every tensor of the published layout has its place and its shape, and ours has no other."""
    build, table = REFERENCES[network]
    with torch.device("meta"):
        ours, published = network(config).state_dict(), build(config).state_dict()
    names = rename_all(ours, table)
    assert {names[name]: t.shape for name, t in ours.items()} == {name: t.shape for name, t in published.items()}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# UNet

BASE = UNetEncoderConfig(channels=(16, 24, 32, 48), num_heads=(2, 3, 4, 6), context_dim=20, norm_groups=8)
GOLDEN = UNetEncoderConfig(channels=(32, 32, 64, 64), num_heads=(4, 4, 4, 4), context_dim=32)
UNIFORM_ENCODERS = {  # the same number of blocks at every level
    "golden": GOLDEN,
    "base": BASE,
    "conv_projections": replace(BASE, linear_projection=False),
    "three_levels": UNetEncoderConfig(
        channels=(16, 16, 32),
        blocks_per_level=(1, 1, 1),
        attention=(False, True, True),
        only_cross_attention=(True, False, True),
        num_heads=(1, 4, 2),
        transformer_depth=(1, 1, 1),
        context_dim=24,
        norm_groups=4,
    ),
    "depth": replace(BASE, transformer_depth=(1, 2, 1, 2)),
    "attention_first": replace(
        BASE, attention=(True, False, True, False), only_cross_attention=(False, False, True, True)
    ),
    "norm_eps": replace(BASE, norm_eps=1e-3),
    "sin_first": replace(BASE, cos_first=False),
    "freq_shift": replace(BASE, freq_shift=1.0),
    "noise_level": replace(BASE, num_noise_levels=1000),
}
ENCODERS = UNIFORM_ENCODERS | {"blocks": replace(BASE, blocks_per_level=(1, 2, 3, 1))}
SIZES = [(37, 53), (8, 16), (23, 9), (1, 6), (2, 1), (1, 1)]


class Inputs(NamedTuple):
    """What UNet and TCM look at, in the order of their arguments."""

    x: Tensor
    timestep: Tensor
    context: Tensor
    noise_level: Tensor | None


def random_inputs(config: UNetEncoderConfig, size: tuple[int, int], dtype: torch.dtype, tokens: int = 7) -> Inputs:
    """A batch of two that differ in everything."""
    generator = torch.Generator().manual_seed(1)
    return Inputs(
        torch.randn(2, config.in_channels, *size, generator=generator, dtype=dtype),
        torch.tensor([801, 20]),
        torch.randn(2, tokens, config.context_dim, generator=generator, dtype=dtype),
        None if config.num_noise_levels is None else torch.tensor([20, 350]),
    )


def random_residuals(unet: UNet, inputs: Inputs) -> Residuals:
    """Something to add to every skip and to the middle."""
    generator = torch.Generator().manual_seed(2)

    def like(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=t.dtype)

    features = unet.encoder(*inputs)
    return Residuals([like(skip) for skip in features.skips], like(features.middle))


def run_published_unet(published: nn.Module, inputs: Inputs, residuals: Residuals | None = None) -> Tensor:
    extra = {}
    if residuals is not None:
        extra["down_block_additional_residuals"] = tuple(residuals.skips)
        extra["mid_block_additional_residual"] = residuals.middle
    return published(*inputs[:3], class_labels=inputs.noise_level, **extra).sample


@torch.no_grad()
def check_unet(config: UNetEncoderConfig, size: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    """With and without residuals."""
    ours, published = pair(UNet, UNetConfig(config), dtype)
    inputs = random_inputs(config, size, dtype)
    for residuals in (None, random_residuals(ours, inputs)):
        expected = run_published_unet(published, inputs, residuals)
        assert relative_error(ours(*inputs, residuals=residuals), expected) <= tolerance


@both_precisions
@pytest.mark.parametrize("name", ENCODERS)
def test_unet(name, dtype):
    check_unet(ENCODERS[name], (13, 10), dtype, TOLERANCE[dtype])


@both_precisions
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_unet_takes_any_size(size, dtype):
    check_unet(BASE, size, dtype, TOLERANCE[dtype])


@pytest.mark.slow
@both_precisions
def test_released_unet(dtype):
    check_unet(RELEASED.unet.encoder, (9, 7), dtype, TOLERANCE[dtype])


def test_a_noise_level_is_asked_for():
    encoder = UNIFORM_ENCODERS["noise_level"]
    unet, _ = pair(UNet, UNetConfig(encoder))
    inputs = random_inputs(encoder, (4, 4), torch.float32)
    with pytest.raises(ValueError, match="noise_level"):
        unet(*inputs[:3])


# ---------------------------------------------------------------------------------------------------------------------
# TCM


def tcm_config(encoder: UNetEncoderConfig) -> TCMConfig:
    return TCMConfig(encoder, conditioning_widths=(8, 12, 16))


def random_picture(size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The HR picture of a low-resolution grid, batch 2."""
    generator = torch.Generator().manual_seed(3)
    return torch.rand(2, 3, 4 * size[0], 4 * size[1], generator=generator, dtype=dtype) * 2 - 1


def run_tcm(tcm: TCM, inputs: Inputs, picture: Tensor, scale: float) -> Residuals:
    return tcm(*inputs[:3], picture, scale, inputs.noise_level)


def run_published_tcm(published: nn.Module, inputs: Inputs, picture: Tensor, scale: float) -> Residuals:
    skips, middle = published(
        *inputs[:3], picture, conditioning_scale=scale, class_labels=inputs.noise_level, return_dict=False
    )
    return Residuals(skips, middle)


def worst_error(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    errors = [relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
    return torch.tensor(errors).max().item()  # unlike Python's max, this keeps a NaN


@torch.no_grad()
def check_tcm(config: TCMConfig, size: tuple[int, int], dtype: torch.dtype, scale: float) -> None:
    ours, published = pair(TCM, config, dtype)
    inputs, picture = random_inputs(config.encoder, size, dtype), random_picture(size, dtype)
    residuals = run_tcm(ours, inputs, picture, scale)
    expected = run_published_tcm(published, inputs, picture, scale)
    assert worst_error(residuals.skips, expected.skips) <= TOLERANCE[dtype]
    assert relative_error(residuals.middle, expected.middle) <= TOLERANCE[dtype]


@both_precisions
@pytest.mark.parametrize("name", UNIFORM_ENCODERS)
def test_tcm(name, dtype):
    check_tcm(tcm_config(UNIFORM_ENCODERS[name]), (13, 10), dtype, scale=1.0)


@both_precisions
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tcm_takes_any_size(size, dtype):
    check_tcm(tcm_config(BASE), size, dtype, scale=0.7)


@pytest.mark.slow
@both_precisions
def test_released_tcm(dtype):
    check_tcm(RELEASED.tcm, (9, 7), dtype, scale=1.0)


@pytest.mark.parametrize("blocks", [(1, 2, 3, 1), (2, 1, 1, 2)], ids=str)
def test_tcm_fits_a_unet_with_uneven_levels(blocks):
    """ControlNet has no such thing, so its encoder is compared with the UNet's, which `test_unet` holds."""
    encoder = replace(BASE, blocks_per_level=blocks)
    unet, tcm = UNet(UNetConfig(encoder)), TCM(tcm_config(encoder))
    inputs, picture = random_inputs(encoder, (6, 5), torch.float32), random_picture((6, 5), torch.float32)
    residuals = run_tcm(tcm, inputs, picture, 1.0)
    assert [r.shape for r in residuals.skips] == [s.shape for s in unet.encoder(*inputs).skips]
    assert unet(*inputs, residuals=residuals).isfinite().all()


@torch.no_grad()
def test_a_zeroed_tcm_adds_nothing():
    tcm = randomise(TCM(tcm_config(BASE)))
    tcm.zero()
    inputs, picture = random_inputs(BASE, (5, 6), torch.float32), random_picture((5, 6), torch.float32)
    residuals = run_tcm(tcm, inputs, picture, 1.0)
    assert not any(r.any() for r in (*residuals.skips, residuals.middle, tcm.conditioning(picture)))


@both_precisions
@pytest.mark.parametrize("name", ["base", "conv_projections", "attention_first", "noise_level"])
def test_tcm_gradients(name, dtype):
    """Of the training loss: a mean squared error behind the frozen UNet. No tensor of the TCM is left out."""
    encoder = UNIFORM_ENCODERS[name]
    unet, published_unet = pair(UNet, UNetConfig(encoder), dtype)
    tcm, published_tcm = pair(TCM, tcm_config(encoder), dtype)
    inputs, picture = random_inputs(encoder, (9, 7), dtype), random_picture((9, 7), dtype)
    target = torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(4), dtype=dtype)

    ours = unet(*inputs, residuals=run_tcm(tcm, inputs, picture, 0.7))
    theirs = run_published_unet(published_unet, inputs, run_published_tcm(published_tcm, inputs, picture, 0.7))
    for prediction in (ours, theirs):
        F.mse_loss(prediction, target).backward()

    names = rename_all(dict(tcm.named_parameters()), REFERENCES[TCM][1])
    expected = dict(published_tcm.named_parameters())
    errors = {n: relative_error(p.grad, expected[names[n]].grad) for n, p in tcm.named_parameters()}
    assert {n: e for n, e in errors.items() if not e <= GRADIENT_TOLERANCE[dtype]} == {}


# ---------------------------------------------------------------------------------------------------------------------
# VAE

VAES = {
    "golden": VAEConfig(channels=(32, 32, 64)),
    "wide_latent": VAEConfig(channels=(16, 24, 32), latent_channels=8, norm_groups=8),
    "one_block": VAEConfig(channels=(8, 16, 24), blocks_per_level=1, norm_groups=4),
}


@torch.no_grad()
def check_vae(config: VAEConfig, latent_size: tuple[int, int], extra: tuple[int, int], dtype: torch.dtype) -> None:
    """`extra`: what the encoder's picture has beyond four times the latent size."""
    ours, published = pair(VAE, config, dtype)
    generator = torch.Generator().manual_seed(5)
    height, width = (4 * side + more for side, more in zip(latent_size, extra, strict=True))
    picture = torch.rand(2, 3, height, width, generator=generator, dtype=dtype) * 2 - 1
    latent = torch.randn(2, config.latent_channels, *latent_size, generator=generator, dtype=dtype)
    posterior, expected = ours.encode(picture), published.encode(picture).latent_dist
    assert relative_error(posterior.mean, expected.mean) <= TOLERANCE[dtype]
    assert relative_error(posterior.log_variance, expected.logvar) <= TOLERANCE[dtype]
    assert relative_error(ours.decode(latent), published.decode(latent).sample) <= TOLERANCE[dtype]


@both_precisions
@pytest.mark.parametrize("name", VAES)
def test_vae(name, dtype):
    check_vae(VAES[name], (9, 6), (0, 0), dtype)


@both_precisions
@pytest.mark.parametrize(("latent_size", "extra"), [((5, 7), (1, 3)), ((1, 4), (2, 0)), ((1, 1), (0, 0))], ids=str)
def test_vae_takes_any_size(latent_size, extra, dtype):
    check_vae(VAES["one_block"], latent_size, extra, dtype)


@pytest.mark.slow
@both_precisions
def test_released_vae(dtype):
    check_vae(RELEASED.vae, (9, 7), (1, 2), dtype)


@torch.no_grad()
@pytest.mark.parametrize("gain", [1.0, 100.0], ids=["plain", "clamped"])
def test_posterior_sample(gain):
    """`gain` 100 drives the logarithm of the variance into its clamp, on both sides."""
    ours, published = pair(VAE, VAES["one_block"], torch.float64)
    ours.quant_conv.weight.mul_(gain)  # in place, so for both
    picture = torch.rand(2, 3, 20, 28, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    posterior, expected = ours.encode(picture), published.encode(picture).latent_dist
    limits = posterior.log_variance.min().item(), posterior.log_variance.max().item()
    assert (limits == (-30.0, 20.0)) == (gain > 1)
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    drawn = expected.sample(torch.Generator().manual_seed(7))
    assert relative_error(posterior.sample(noise), drawn) <= TOLERANCE[torch.float64]


# ---------------------------------------------------------------------------------------------------------------------
# RAFT


@torch.no_grad()
@pytest.mark.parametrize("size", [(128, 128), (136, 160)], ids=str)
@pytest.mark.parametrize("config", [RAFT_LARGE, RAFT_SMALL], ids=["large", "small"])
def test_raft(config, size):
    ours, published = pair(RAFT, config)
    generator = torch.Generator().manual_seed(8)
    pictures = [torch.rand(2, 3, *size, generator=generator) * 2 - 1 for _ in range(2)]
    assert relative_error(ours(*pictures), published(*pictures)[-1]) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("config", [RAFT_LARGE, RAFT_SMALL], ids=["large", "small"])
def test_raft_without_room_for_all_pairs(config, monkeypatch):
    """Correlations on demand, in several pieces, against the volume; its own size would be quadratic in pixels."""
    raft = RAFT(config).eval()
    randomise(raft)
    a, b = torch.rand(2, 2, 3, 136, 152) * 2 - 1
    with torch.no_grad():
        expected = raft(a, b)
        monkeypatch.setattr(RAFT, "max_correlations", 2 * 17**2 * 19**2 - 1)
        monkeypatch.setattr(OnDemandCorrelation, "CHUNK", 300_000)
        got = raft(a, b)
    assert expected.std() > 0.1
    assert relative_error(got, expected) < 1e-4


def test_correlations_on_demand(monkeypatch):
    features = torch.randn(2, 2, 16, 17, 19)
    coords = torch.rand(2, 2, 17, 19) * 30 - 5  # outside too
    monkeypatch.setattr(OnDemandCorrelation, "CHUNK", 100_000)
    plain, on_demand = (kind(*features, 4, 3).lookup(coords) for kind in (CorrelationPyramid, OnDemandCorrelation))
    torch.testing.assert_close(on_demand, plain, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("num_updates", [1, 5])
def test_raft_updates(num_updates):
    """The flow after fewer updates, while it is still small and the lookup well inside."""
    _, published = pair(RAFT, RAFT_LARGE)
    ours = on_same_weights(RAFT, replace(RAFT_LARGE, num_updates=num_updates), published)
    generator = torch.Generator().manual_seed(9)
    pictures = [torch.rand(1, 3, 128, 136, generator=generator) * 2 - 1 for _ in range(2)]
    expected = published(*pictures, num_flow_updates=num_updates)[-1]
    assert relative_error(ours(*pictures), expected) <= TOLERANCE[torch.float32]


# ---------------------------------------------------------------------------------------------------------------------
# Text tower

TEXTS = {
    "gelu": TextConfig(width=32, mlp_width=96, num_layers=3, num_heads=4, vocab_size=530),
    "quick_gelu": TextConfig(
        width=48,
        mlp_width=64,
        num_layers=2,
        num_heads=3,
        vocab_size=99,
        num_tokens=20,
        activation="quick_gelu",
        norm_eps=1e-3,
    ),
}


@torch.no_grad()
def check_text(config: TextConfig, length: int, dtype: torch.dtype) -> None:
    ours, published = pair(TextEncoder, config, dtype)
    tokens = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(10))
    assert relative_error(ours(tokens), published(tokens).last_hidden_state) <= TOLERANCE[dtype]


@both_precisions
@pytest.mark.parametrize("name", TEXTS)
def test_text(name, dtype):
    check_text(TEXTS[name], TEXTS[name].num_tokens, dtype)


@both_precisions
def test_text_shorter_than_the_table(dtype):
    check_text(TEXTS["gelu"], 5, dtype)


@pytest.mark.slow
@both_precisions
def test_released_text(dtype):
    check_text(RELEASED_TEXT, RELEASED_TEXT.num_tokens, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Warp


def published_flow_warp(x: Tensor, flow: Tensor) -> Tensor:
    """The published formula, line by line; `flow` (n, h, w, 2)."""
    h, w = x.shape[-2:]
    grid_y, grid_x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    vgrid = torch.stack((grid_x, grid_y), 2).type_as(x) + flow
    vgrid_x = 2.0 * vgrid[:, :, :, 0] / max(w - 1, 1) - 1.0
    vgrid_y = 2.0 * vgrid[:, :, :, 1] / max(h - 1, 1) - 1.0
    return F.grid_sample(
        x, torch.stack((vgrid_x, vgrid_y), dim=3), mode="bilinear", padding_mode="zeros", align_corners=False
    )


@both_precisions
@pytest.mark.parametrize("size", [(24, 40), (17, 33), (1, 9)], ids=str)
def test_warp(size, dtype):
    generator = torch.Generator().manual_seed(11)
    picture = torch.rand(2, 3, *size, generator=generator, dtype=dtype)
    flow = min(size) / 6 * torch.randn(2, 2, *size, generator=generator, dtype=dtype)
    expected = published_flow_warp(picture, flow.permute(0, 2, 3, 1))
    assert relative_error(warp_published(picture, flow), expected) <= TOLERANCE[dtype]


def test_a_zero_flow_stretches_the_picture():
    """Half a pixel at the borders, where zeros come in; nothing in the middle (the named oddity)."""
    picture = torch.rand(1, 3, 21, 31, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    warped = warp_published(picture, torch.zeros(1, 2, 21, 31, dtype=torch.float64))
    assert relative_error(warped, picture) > 0.1
    torch.testing.assert_close(warped[..., 0, 0], picture[..., 0, 0] / 4)
    torch.testing.assert_close(warped[..., 10, 15], picture[..., 10, 15])


@pytest.mark.parametrize("flow", [(3.0, 0.0), (0.0, -2.0), (-5.0, 4.0)], ids=str)
def test_an_integer_flow_shifts_the_inside(flow):
    """To half a pixel: on a ramp, the value fetched is the place it came from."""
    ramp = pixel_grid(torch.empty(1, 1, 40, 56, dtype=torch.float64))
    shift = torch.tensor(flow, dtype=torch.float64).view(1, 2, 1, 1)
    warped = warp_published(ramp, shift.expand_as(ramp))
    inside = (..., slice(6, -6), slice(6, -6))
    distance = (warped - (ramp + shift))[inside].abs()
    assert 0 < distance.max() <= 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Half precision


def check_bfloat16(network: nn.Module, call) -> None:
    with torch.no_grad():
        full = call(network, torch.float32)
        half = call(copy.deepcopy(network).to(torch.bfloat16), torch.bfloat16)
    for a, b in zip(half, full, strict=True):
        assert a.dtype == torch.bfloat16
        assert a.isfinite().all()
        assert relative_error(a.float(), b) < 5e-2


def test_unet_in_bfloat16():
    unet, _ = pair(UNet, UNetConfig(GOLDEN))
    check_bfloat16(unet, lambda net, dtype: [net(*as_type(random_inputs(GOLDEN, (12, 9), torch.float32), dtype))])


def test_tcm_in_bfloat16():
    def call(net: TCM, dtype: torch.dtype) -> list[Tensor]:
        inputs = as_type(random_inputs(GOLDEN, (12, 9), torch.float32), dtype)
        residuals = run_tcm(net, inputs, random_picture((12, 9), torch.float32).to(dtype), 1.0)
        return [*residuals.skips, residuals.middle]

    tcm, _ = pair(TCM, tcm_config(GOLDEN))
    check_bfloat16(tcm, call)


def test_vae_decode_in_bfloat16():
    vae, _ = pair(VAE, VAES["golden"])
    latent = torch.randn(2, 4, 9, 6, generator=torch.Generator().manual_seed(13))
    check_bfloat16(vae, lambda net, dtype: [net.decode(latent.to(dtype))])


def test_warp_in_bfloat16_keeps_its_grid():
    """Positions stay as precise as the flow: a bf16 grid would be off by whole pixels, and this picture is noise."""
    generator = torch.Generator().manual_seed(14)
    picture = torch.rand(1, 3, 8, 900, generator=generator).to(torch.bfloat16)
    flow = torch.randn(1, 2, 8, 900, generator=generator)
    warped = warp_published(picture, flow)
    assert warped.dtype == torch.bfloat16
    assert relative_error(warped.float(), warp_published(picture.float(), flow)) < 5e-3


def as_type(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return inputs._replace(x=inputs.x.to(dtype), context=inputs.context.to(dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Configurations


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (UNetEncoderConfig, {"in_channels": 0}, "in_channels must be positive, got 0"),
        (UNetEncoderConfig, {"channels": ()}, "channels must be positive, got ()"),
        (UNetEncoderConfig, {"channels": (256, 500, 512, 1024)}, "500 channels does not divide into norm_groups = 32"),
        (UNetEncoderConfig, {"num_heads": (8, 7, 8, 8)}, "512 channels does not divide into 7 heads"),
        (UNetEncoderConfig, {"blocks_per_level": (2, 2, 2)}, "4 entries, one per level, got (2, 2, 2)"),
        (UNetEncoderConfig, {"transformer_depth": (1, 0, 1, 1)}, "must be positive, got (1, 0, 1, 1)"),
        (TCMConfig, {"conditioning_widths": (16, 32, 96, 256)}, "3 entries (two stride-2 steps, x4 to x1), got (16,"),
        (VAEConfig, {"channels": (128, 256, 512, 512)}, "got (128, 256, 512, 512)"),
        (VAEConfig, {"scaling_factor": -0.5}, "scaling_factor must be positive, got -0.5"),
        (FlowConfig, {"block": "dense"}, "block 'dense' is not supported, only 'residual', 'bottleneck' are"),
        (FlowConfig, {"hidden_dim": 256}, "must exceed hidden_dim = 256, got 256"),
        (TextConfig, {"activation": "relu"}, "activation 'relu' is not supported"),
        (TextConfig, {"num_heads": 3}, "width 1024 does not divide into 3 heads"),
        (ModelConfig, {"unet": UNetConfig(out_channels=8)}, "unet predicts 8 channels, but the latent has 4"),
        (ModelConfig, {"text": TEXTS["gelu"]}, "the text tower is 32 wide, the unet expects 1024"),
        (ModelConfig, {"low_res_schedule": LOW_RES_SCHEDULE}, "got no entries and a schedule"),
    ],
)
def test_a_configuration_refuses_nonsense(config, values, message):
    with pytest.raises(UserError) as raised:
        config(**values)
    assert message in str(raised.value)
    assert config.__name__ in str(raised.value)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_doubling_in_one_convolution_equals_the_two_steps(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(5, 7, 3, padding=1).double().to(memory_format=layout)
    x = torch.randn(2, 5, 6, 9, dtype=torch.float64)
    expected = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(double_and_convolve(x, conv), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("change", ["in place", "assigned", "dtype", "none"])
def test_the_kernel_that_is_kept_follows_its_weights(change: str) -> None:
    """On a CPU without gradients the fused kernel is computed once, until the weights change."""
    torch.manual_seed(0)
    conv, x = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False), torch.randn(1, 8, 5, 4)
    with torch.no_grad():
        first = double_and_convolve(x, conv)
        kept = layers._kernels[conv].kernel
        if change == "in place":
            conv.weight.mul_(2)
        elif change == "assigned":
            conv.load_state_dict({"weight": torch.randn(8, 8, 3, 3), "bias": conv.bias}, assign=True)
        elif change == "dtype":
            conv.half().float()
        found = double_and_convolve(x, conv)
        assert (layers._kernels[conv].kernel is kept) == (change == "none")
        layers._kernels.clear()
        assert torch.equal(found, double_and_convolve(x, conv))
    assert torch.equal(first, found) == (change == "none")
    conv.requires_grad_(True)
    double_and_convolve(x, conv).sum().backward()
    assert conv.weight.grad is not None


@both_precisions
@pytest.mark.parametrize("config", [TinyDecoderConfig(), TinyDecoderConfig(latent_channels=8, width=16)])
def test_tiny_decoder(config: TinyDecoderConfig, dtype: torch.dtype) -> None:
    library = AutoencoderTiny(
        latent_channels=config.latent_channels,
        encoder_block_out_channels=(config.width,) * 3,
        decoder_block_out_channels=(config.width,) * 3,
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=config.num_blocks,
    )
    library = randomise(library).to(dtype).eval()
    published, ours = library.state_dict(), TinyDecoder(config).to(dtype)
    names = rename_all(ours.state_dict(), diffusers_tiny(config))
    assert {name for name in published if name.startswith("decoder.")} == set(names.values())
    ours.load_state_dict({name: published[theirs] for name, theirs in names.items()})
    latent = torch.randn(2, config.latent_channels, 6, 9, dtype=dtype)
    with torch.no_grad():
        assert relative_error(ours(latent), library.decode(latent).sample) < TOLERANCE[dtype]


# ---------------------------------------------------------------------------------------------------------------------
# The decoder's attention, whose head is too wide for CUDA's flash kernels


def attention_inputs(tokens: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, tokens, width, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("rows", [1, 32, 70, 1000])
def test_attention_in_chunks(rows: int, dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = attention_inputs(70, 48, dtype)
    ours = attend_in_chunks(4 * q, k, v, rows)
    assert ours.dtype == dtype
    exact = F.scaled_dot_product_attention(4 * q.double(), k.double(), v.double())
    assert relative_error(ours.double(), exact) < tolerance


@pytest.mark.parametrize(
    ("dtype", "learns", "left_to_pytorch"),
    [
        (torch.bfloat16, False, [64]),
        (torch.float16, False, [64]),
        (torch.bfloat16, True, [512, 64]),
        (torch.float32, False, [512, 64]),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_wide_attention_on_cuda_is_done_in_chunks(
    compiled: bool, dtype: torch.dtype, learns: bool, left_to_pytorch: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors that say they are on a GPU, and hold nothing: what would run there, in one graph when compiled."""
    fused = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: fused.append(q.shape[-1]) or q)
    call = torch.compile(attend, backend="eager", fullgraph=True, dynamic=False) if compiled else attend
    with FakeTensorMode():
        for width in (512, 64):
            shape = (1, 1, 4500, width)
            q, k, v = (torch.empty(shape, dtype=dtype, device="cuda", requires_grad=learns) for _ in range(3))
            result = call(q, k, v)
            assert (result.shape, result.dtype, result.device.type) == (q.shape, dtype, "cuda")
    assert fused == left_to_pytorch
