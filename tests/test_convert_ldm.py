"""The original single file of the SD x4 upscaler, against diffusers' own converter of that layout."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
    infer_diffusers_model_type,
)
from ldm_layout import CLIP, FIRST_STAGE, UNET, layout
from models import TINY

from stablevsr.architectures import LOW_RES_SCHEDULE, SD_X4_UPSCALER
from stablevsr.config import TextConfig, UNetConfig
from stablevsr.convert import keys
from stablevsr.convert.ldm import convert_ldm
from stablevsr.errors import WeightsError
from stablevsr.nn.text import TextEncoder
from stablevsr.nn.unet import UNet
from stablevsr.nn.vae import VAE


def schedule_buffers(kind, prefix="", n=1000):
    """What the original code registers, computed in float64 as there."""
    if kind == "linear":  # linear in the root
        betas = np.linspace(1e-4**0.5, 0.02**0.5, n) ** 2
    else:
        angles = (np.arange(n + 1) / n + 8e-3) / (1 + 8e-3) * math.pi / 2
        betas = np.clip(1 - np.cos(angles[1:]) ** 2 / np.cos(angles[:-1]) ** 2, 0, 0.999)
    products = np.cumprod(1 - betas)
    buffers = {
        "betas": betas,
        "alphas_cumprod": products,
        "alphas_cumprod_prev": np.append(1.0, products[:-1]),
        "sqrt_alphas_cumprod": np.sqrt(products),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - products),
        "log_one_minus_alphas_cumprod": np.log(1 - products),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / products),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / products - 1),
    }
    if not prefix:
        names = ("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2")
        buffers |= dict.fromkeys(names, products)
    return {prefix + name: torch.tensor(values, dtype=torch.float32) for name, values in buffers.items()}


def tiny_config(**changes):
    encoder = dataclasses.replace(TINY.unet.encoder, num_noise_levels=7, **changes)
    text = TextConfig(width=32, mlp_width=48, num_layers=2, num_heads=2, num_tokens=9, vocab_size=11)
    return dataclasses.replace(
        TINY,
        unet=UNetConfig(encoder),
        tcm=dataclasses.replace(TINY.tcm, encoder=encoder),
        text=text,
        low_res_schedule=LOW_RES_SCHEDULE,
        max_noise_level=5,
        context_tokens=9,
    )


CONFIGS = {
    "as released": tiny_config(),
    "other blocks": tiny_config(
        blocks_per_level=(3, 3, 3, 3),
        attention=(True, False, True, False),
        only_cross_attention=(False, True, True, False),
        linear_projection=False,
        transformer_depth=(2, 2, 2, 2),
    ),
}


@functools.cache
def random_weights(config):
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in layout(config).items()}


def random_file(config, dtype=torch.float32):
    file = {name: tensor.to(dtype) for name, tensor in random_weights(config).items()}
    file |= schedule_buffers("linear") | schedule_buffers("linear", "low_scale_model.")
    return file | {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(1),
        f"{CLIP}attn_mask": torch.zeros(9, 9),
    }


def networks(config):
    with torch.device("meta"):
        return {"unet": UNet(config.unet), "vae": VAE(config.vae), "text": TextEncoder(config.text)}


def through_diffusers(file, config):
    """LDM to diffusers by their converter, diffusers to ours by our other tables; every converted key must be used."""
    (blocks,) = set(config.unet.encoder.blocks_per_level)
    unet_config = {"layers_per_block": blocks, "num_class_embeds": config.unet.encoder.num_noise_levels}
    text = convert_open_clip_checkpoint(None, file)
    dropped = f"text_model.encoder.layers.{config.text.num_layers}."  # the layer that the tower does not use
    converted = {
        "unet": convert_ldm_unet_checkpoint(file, unet_config),
        "vae": convert_ldm_vae_checkpoint(file, {"down_block_types": [None] * 3, "up_block_types": [None] * 3}),
        "text": {k: v for k, v in text.items() if not k.startswith((dropped, "text_projection."))},
    }
    tables = {"unet": keys.DIFFUSERS_UNET, "vae": keys.DIFFUSERS_VAE, "text": keys.TRANSFORMERS_TEXT}
    parts = {}
    for part, network in networks(config).items():
        names = keys.rename_all(network.state_dict(), tables[part])
        assert set(names.values()) == set(converted[part])
        parts[part] = {ours: converted[part][theirs] for ours, theirs in names.items()}
    return parts


@pytest.mark.parametrize("name", CONFIGS)
def test_conversion_is_that_of_diffusers_to_the_bit(name):
    config = CONFIGS[name]
    file = random_file(config)
    parts, _ = convert_ldm(file, config, "x4.ckpt")
    expected = through_diffusers(file, config)
    for part, network in networks(config).items():
        network.load_state_dict(parts[part], strict=True, assign=True)
        assert parts[part].keys() == expected[part].keys()
        for key, tensor in parts[part].items():
            assert torch.equal(tensor, expected[part][key]), (part, key)


def test_full_size_names_are_those_of_diffusers():
    config = dataclasses.replace(SD_X4_UPSCALER, text=TextConfig())
    shapes = layout(config)
    # Every tensor is one number that no other has, and takes no memory.
    file = {n: torch.tensor(float(i)).half().expand(shape) for i, (n, shape) in enumerate(shapes.items())}
    assert len(file) < 2048  # beyond, half precision skips integers
    assert infer_diffusers_model_type(file) == "upscale"
    parts, _ = convert_ldm(file, config, "x4.ckpt")
    expected = through_diffusers(file, config)
    for part in ("unet", "vae", "text"):
        ours = {key: (tensor.shape, tensor.flatten()[0].item()) for key, tensor in parts[part].items()}
        theirs = {key: (tensor.shape, tensor.flatten()[0].item()) for key, tensor in expected[part].items()}
        assert ours == theirs
    sizes = {part: sum(tensor.numel() for tensor in parts[part].values()) for part in parts}
    assert sizes["unet"] == 472_374_020 + 1000 * 1024  # the released UNet, and the noise-level embedding
    assert sizes["vae"] == 55_325_927


def test_tensors_are_views_of_the_file():
    file = random_file(CONFIGS["as released"], torch.float16)
    parts, _ = convert_ldm(file, CONFIGS["as released"], "x4.ckpt")
    storages = {tensor.untyped_storage().data_ptr() for tensor in file.values()}
    for tensors in parts.values():
        for key, tensor in tensors.items():
            assert tensor.dtype == torch.float16
            assert tensor.is_contiguous()
            assert tensor.untyped_storage().data_ptr() in storages, key


def test_without_text_configuration_the_tower_is_left_out():
    config = CONFIGS["as released"]
    parts, _ = convert_ldm(random_file(config), dataclasses.replace(config, text=None), "x4.ckpt")
    assert set(parts) == {"unet", "vae"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kind", "name"), [("linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")])
def test_low_resolution_schedule_is_that_of_the_buffers(kind, name, dtype):
    file = random_file(CONFIGS["as released"]) | schedule_buffers(kind, "low_scale_model.")
    file = {key: tensor.to(dtype) for key, tensor in file.items()}
    for start in ("linear", "squaredcos_cap_v2"):
        schedule = dataclasses.replace(LOW_RES_SCHEDULE, beta_schedule=start)
        config = dataclasses.replace(CONFIGS["as released"], low_res_schedule=schedule)
        found = convert_ldm(file, config, "x4.ckpt")[1]
        assert found == dataclasses.replace(config, low_res_schedule=dataclasses.replace(schedule, beta_schedule=name))


def test_configuration_stays_without_buffers():
    config = CONFIGS["as released"]
    file = {key: tensor for key, tensor in random_file(config).items() if key.startswith((UNET, FIRST_STAGE, CLIP))}
    assert convert_ldm(file, config, "x4.ckpt")[1] == config


ATTENTION, FUSED = f"{FIRST_STAGE}decoder.mid.attn_1.q.weight", f"{CLIP}transformer.resblocks.0.attn.in_proj_weight"
ZEROS = torch.zeros(3)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (f"{UNET}label_emb.weight", lambda t: None, r"x4\.ckpt: .*label_emb\.weight is missing, .*\(7, 64\)"),
        (FUSED, lambda t: None, r"in_proj_weight is missing, .*\(96, 32\)"),
        (FUSED, lambda t: t[1:], r"in_proj_weight has shape \(95, 32\), expected \(96, 32\)"),
        (ATTENTION, lambda t: t[..., 0, 0], r"attn_1\.q\.weight has shape \(32, 32\), expected \(32, 32, 1, 1\)"),
        (f"{UNET}out.2.bias", lambda t: t[:3], r"out\.2\.bias has shape \(3,\), expected \(4,\)"),
        (f"{UNET}out.3.bias", lambda t: ZEROS, r"x4\.ckpt: .*out\.3\.bias is not part of the expected model"),
        (f"{CLIP}transformer.resblocks.3.ln_1.weight", lambda t: ZEROS, r"resblocks\.3\.ln_1\.weight is not part"),
        ("model_ema.diffusion_modelout2bias", lambda t: ZEROS, "model_ema.diffusion_modelout2bias is not part"),
        ("xbetas", lambda t: ZEROS, "xbetas is not part"),
        ("betas", lambda t: t * 1.00001, "the noise schedule betas has 1000 entries"),
        ("betas", lambda t: t[:10], "the noise schedule betas has 10 entries"),
        ("betas", lambda t: schedule_buffers("cosine")["betas"], "expected 1000 of scaled_linear, 0.0001 to 0.02"),
        ("low_scale_model.betas", lambda t: t.flip(0), "scaled_linear, .* or 1000 of squaredcos_cap_v2"),
    ],
)
def test_other_files_are_refused_in_a_sentence(name, change, message):
    file = random_file(CONFIGS["as released"])
    changed = change(file.pop(name, None))
    if changed is not None:
        file[name] = changed
    with pytest.raises(WeightsError, match=message):
        convert_ldm(file, CONFIGS["as released"], "x4.ckpt")
