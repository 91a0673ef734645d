"""Published configs as they occur: of old and future versions, saved again by other classes, and of other models."""

import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, DDIMScheduler, DDPMScheduler
from diffusers import UNet2DConditionModel as DiffusersUNet
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from models import DATA
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from stablevsr.config import ScheduleConfig
from stablevsr.convert import published_config
from stablevsr.convert.assemble import Sources, convert
from stablevsr.convert.draft import on_meta
from stablevsr.convert.keys import DIFFUSERS_TCM, DIFFUSERS_UNET, DIFFUSERS_VAE, TRANSFORMERS_TEXT_BARE, Table, rename
from stablevsr.convert.published_keys import SCHEDULE, TCM, TEXT, TINY, UNET, VAE, Json, Keys
from stablevsr.errors import WeightsError
from stablevsr.nn.tcm import TCM as TCMNetwork
from stablevsr.nn.text import TextEncoder
from stablevsr.nn.unet import UNet
from stablevsr.nn.vae import VAE as VAENetwork
from stablevsr.sampling.schedule import betas, timesteps

CHECKPOINT = DATA / "checkpoint"
TOOL = Path(__file__).parent.parent / "tools/convert_weights.py"
READERS = {
    "unet": (UNET, published_config.read_unet),
    "controlnet": (TCM, published_config.read_tcm),
    "vae": (VAE, published_config.read_vae),
    "tiny": (TINY, published_config.read_tiny),
    "text_encoder": (TEXT, published_config.read_text),
    "scheduler": (SCHEDULE, published_config.read_schedule),
}
# The scheduler of the stock SD x4 upscaler's folder, as class DDIMScheduler.
STOCK_DDIM = {
    "beta_end": 0.02,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0001,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
# What a UNet's config held in the days of diffusers 0.8 and 0.9.
OLD_UNET_KEYS = (
    "_class_name",
    "act_fn",
    "attention_head_dim",
    "block_out_channels",
    "center_input_sample",
    "cross_attention_dim",
    "down_block_types",
    "downsample_padding",
    "dual_cross_attention",
    "flip_sin_to_cos",
    "freq_shift",
    "in_channels",
    "layers_per_block",
    "mid_block_scale_factor",
    "norm_eps",
    "norm_num_groups",
    "num_class_embeds",
    "only_cross_attention",
    "out_channels",
    "sample_size",
    "up_block_types",
    "use_linear_projection",
)


def config_file(folder: Path, part: str) -> Path:
    return folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")


def golden(part: str) -> Json:
    """The config of a part in the golden checkpoint; an empty one for the tiny decoder, which that does not have."""
    return (
        {"num_decoder_blocks": [3, 3, 1]} if part == "tiny" else json.loads(config_file(CHECKPOINT, part).read_text())
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))


def ddim_saved(folder: Path) -> None:
    DDIMScheduler.from_config(STOCK_DDIM).save_pretrained(folder / "scheduler")
    assert json.loads(config_file(folder, "scheduler").read_text())["_class_name"] == "DDIMScheduler"


def ddpm_saved_from_ddim(folder: Path) -> None:
    ddim_saved(folder)
    DDPMScheduler.from_pretrained(folder / "scheduler").save_pretrained(folder / "scheduler")
    saved = json.loads(config_file(folder, "scheduler").read_text())
    assert (saved["_class_name"], saved["set_alpha_to_one"], saved["skip_prk_steps"]) == ("DDPMScheduler", False, True)


def old_unet(folder: Path) -> None:
    config = {key: value for key, value in golden("unet").items() if key in OLD_UNET_KEYS}
    config_file(folder, "unet").write_text(json.dumps({**config, "_diffusers_version": "0.8.0"}))


def unknown_null(part: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config_file(folder, part).write_text(json.dumps({**golden(part), "gizmo_type": None}))

    return edit


@pytest.mark.parametrize(
    ("edit", "noted"),
    [
        (ddpm_saved_from_ddim, None),
        (ddim_saved, None),
        (old_unet, None),
        (unknown_null("unet"), "unet/config.json: ignored gizmo_type, which UNet2DConditionModel does not read"),
        (unknown_null("vae"), "vae/config.json: ignored gizmo_type, which AutoencoderKL does not read"),
        (unknown_null("text_encoder"), "text_encoder/config.json: ignored gizmo_type, which clip_text_model does not"),
        (unknown_null("controlnet"), "controlnet/config.json: ignored gizmo_type, which ControlNetModel does not read"),
        (unknown_null("scheduler"), "scheduler/scheduler_config.json: ignored gizmo_type, which DDPMScheduler"),
    ],
)
def test_variants_convert_to_the_same_file(
    edit: Callable[[Path], None], noted: str | None, folder: Path, golden_weights: Path, tmp_path: Path
) -> None:
    edit(folder)
    notes: list[str] = []
    output = tmp_path / "out.safetensors"
    flow = DATA / "golden/raft_small.pth"
    header = convert(Sources(folder, flow, with_text=True), output, notify=notes.append)
    assert len(notes) == (noted is not None)
    assert all(noted in note for note in notes)
    ours, expected = load_file(output), load_file(golden_weights)
    assert set(ours) == set(expected)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    plain = convert(Sources(CHECKPOINT, flow, with_text=True), tmp_path / "plain.safetensors")
    assert header.config == plain.config


def assert_as_the_library_reads_it(schedule: ScheduleConfig, config: Json) -> None:
    theirs = DDPMScheduler.from_config(config)
    for name in (field.name for field in fields(ScheduleConfig)):
        assert getattr(schedule, name) == theirs.config[name], name
    assert torch.equal(betas(schedule), theirs.betas)
    theirs.set_timesteps(20)
    assert timesteps(schedule, 20) == theirs.timesteps.tolist()


@pytest.mark.parametrize("edit", [ddpm_saved_from_ddim, ddim_saved])
def test_scheduler_variants_as_the_library_reads_them(edit: Callable[[Path], None], folder: Path) -> None:
    edit(folder)
    config = json.loads(config_file(folder, "scheduler").read_text())
    assert_as_the_library_reads_it(published_config.read_schedule(config, "scheduler"), config)


COMPATIBLE = [kind for kind in SCHEDULE.classes if kind != "DPMSolverSDEScheduler"]  # which needs a library more


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the library's own, with NumPy 2
@pytest.mark.parametrize("kind", COMPATIBLE)
def test_every_compatible_scheduler_as_the_library_reads_it(kind: str, tmp_path: Path) -> None:
    """Also saved again by DDPMScheduler, with the keys of the first class left in; no key is news to us."""
    getattr(diffusers, kind)().save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    for _ in range(2):
        config, notes = json.loads(path.read_text()), []
        assert_as_the_library_reads_it(published_config.read_schedule(config, kind, notes.append), config)
        assert not notes
        DDPMScheduler.from_pretrained(tmp_path).save_pretrained(tmp_path)


def test_no_compatible_scheduler_is_forgotten() -> None:
    # EDMEulerScheduler has no betas, so that nothing it says fits a DDPM.
    assert {kind.name for kind in KarrasDiffusionSchedulers} - {"EDMEulerScheduler"} == set(SCHEDULE.classes)


@pytest.mark.parametrize("config", [{}, {"gizmo": None}, {"predict_epsilon": True}, {"_class_name": "PNDMScheduler"}])
def test_sparse_scheduler_configs_have_the_defaults_of_the_class(config: Json) -> None:
    assert_as_the_library_reads_it(published_config.read_schedule(config, "scheduler"), config)


NETWORKS: dict[str, tuple[type, type[nn.Module], Table]] = {
    "unet": (DiffusersUNet, UNet, DIFFUSERS_UNET),
    "controlnet": (ControlNetModel, TCMNetwork, DIFFUSERS_TCM),
    "vae": (AutoencoderKL, VAENetwork, DIFFUSERS_VAE),
}


@pytest.mark.parametrize("part", NETWORKS)
@pytest.mark.parametrize("only_old_keys", [False, True])
def test_networks_have_the_shapes_that_the_library_builds(part: str, only_old_keys: bool) -> None:
    library, network, table = NETWORKS[part]
    config = {**golden(part), "gizmo": [1, {"a": None}]}
    if only_old_keys:
        own = ("conditioning_channels", "conditioning_embedding_out_channels", "latent_channels")
        config = {key: value for key, value in config.items() if key in (*OLD_UNET_KEYS, *own)}
    ours = on_meta(network, READERS[part][1](config, part))
    with torch.device("meta"):
        theirs = library.from_config(config).state_dict()
    assert {rename(name, table): tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }


@pytest.mark.parametrize("extra", [{}, {"gizmo": None}, {"dropout": 0.0, "torch_dtype": "float16"}])
def test_the_text_tower_has_the_shapes_that_the_library_builds(extra: Json) -> None:
    config = {**golden("text_encoder"), **extra}
    ours = on_meta(TextEncoder, published_config.read_text(config, "text"))
    with torch.device("meta"):
        theirs = CLIPTextModel(CLIPTextConfig(**config)).state_dict()
    assert {rename(name, TRANSFORMERS_TEXT_BARE): tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }


@pytest.mark.parametrize(
    ("keys", "library"),
    [
        (UNET, DiffusersUNet),
        (TCM, ControlNetModel),
        (VAE, AutoencoderKL),
        (TINY, AutoencoderTiny),
        *((SCHEDULE, getattr(diffusers, kind)) for kind in COMPATIBLE),
    ],
)
def test_every_key_of_the_library_is_sorted(keys: Keys, library: type) -> None:
    """A key that a newer version of the library adds fails here: is it read, fixed or ignored?"""
    theirs = set(inspect.signature(library.__init__).parameters) - {"self", "kwargs"}
    assert theirs <= {*keys.read, *keys.fixed, *keys.ignored}


def test_every_key_of_the_text_tower_is_sorted() -> None:
    theirs = {key for key in CLIPTextConfig().to_dict() if not key.startswith("_")}
    assert theirs <= {*TEXT.read, *TEXT.fixed, *TEXT.ignored, TEXT.class_key}


@pytest.mark.parametrize("part", READERS)
def test_no_key_is_sorted_twice(part: str) -> None:
    keys = READERS[part][0]
    sorted_keys = [*keys.read, *keys.fixed, *keys.ignored]
    assert len(sorted_keys) == len(set(sorted_keys))


@pytest.mark.parametrize(("part", "key"), [(part, key) for part in READERS for key in READERS[part][0].fixed])
def test_a_known_key_with_another_value_is_refused(part: str, key: str) -> None:
    keys, read = READERS[part]
    for value in keys.fixed[key]:
        read({**golden(part), key: value}, part)
    with pytest.raises(WeightsError, match=f"{part}: {key} = 'other' is not supported, only ") as refusal:
        read({**golden(part), key: "other"}, part)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("unet", {"time_embedding_dim": 64}, "time_embedding_dim = 64 is not supported, only 128 or None is"),
        ("unet", {"reverse_transformer_layers_per_block": [1, 1, 1, 2]}, "reverse_transformer_layers_per_block"),
        ("unet", {"dual_cross_attention": True}, "dual_cross_attention = True is not supported"),
        ("vae", {"down_block_types": ["DownEncoderBlock2D"] * 4}, "down_block_types"),
        ("vae", {"latents_mean": [0.0] * 4}, "latents_mean"),
        (
            "scheduler",
            {"trained_betas": [0.1] * 1000},
            r"trained_betas = \[0.1, .{,100}\.\.\. is not supported, only None is",
        ),
        ("scheduler", {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas"),
        ("scheduler", {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ("scheduler", {"predict_epsilon": False}, "predict_epsilon = False is not supported, only True"),
        ("scheduler", {"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' is not supported"),
        ("scheduler", {"clip_sample_range": float("inf")}, "clip_sample_range is inf, expected a finite number"),
        ("unet", {"norm_eps": float("nan")}, "norm_eps is nan, expected a finite number"),
        ("unet", {"layers_per_block": 10**9}, "blocks_per_level is 1000000000, expected at most 256"),
    ],
)
def test_values_that_would_change_the_result_are_refused(part: str, changes: Json, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        READERS[part][1]({**golden(part), **changes}, part)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("unet", {"time_embedding_dim": 128, "reverse_transformer_layers_per_block": [1, 1, 1, 1]}),
        ("unet", {"center_input_sample": None, "dual_cross_attention": None}),
        ("controlnet", {"global_pool_conditions": None}),
        ("scheduler", {"thresholding": None, "variance_type": None}),
        ("vae", {"shift_factor": 0.0, "act_fn": "swish"}),
    ],
)
def test_spelled_out_defaults_are_read(part: str, changes: Json) -> None:
    read = READERS[part][1]
    assert read({**golden(part), **changes}, part) == read(golden(part), part)


@torch.no_grad()
def test_ignored_keys_of_the_unet_change_nothing_in_the_library() -> None:
    config = {**golden("unet"), "num_class_embeds": 5}
    changes = {
        "addition_embed_type_num_heads": 2,
        "addition_time_embed_dim": 8,
        "cross_attention_norm": "layer_norm",
        "dropout": 0.5,
        "mid_block_only_cross_attention": True,
        "projection_class_embeddings_input_dim": 8,
        "resnet_out_scale_factor": 2.0,
        "resnet_skip_time_act": True,
        "sample_size": 8,
        "upcast_attention": True,
    }
    assert set(changes) == set(UNET.ignored)
    plain, changed = (DiffusersUNet.from_config({**config, **more}).eval() for more in ({}, changes))
    changed.load_state_dict(plain.state_dict(), strict=True)
    x, context = torch.randn(1, 7, 8, 8), torch.randn(1, 5, 32)
    outputs = [net(x, 3, context, class_labels=torch.tensor([2])).sample for net in (plain, changed)]
    assert torch.equal(*outputs)


@torch.no_grad()
def test_ignored_keys_of_the_tiny_decoder_change_nothing_in_the_library() -> None:
    widths = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    shape = {**widths, "num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    plain = AutoencoderTiny(**shape).eval()
    changed = AutoencoderTiny(**shape, latent_magnitude=5, latent_shift=0.1, force_upcast=True).eval()
    changed.load_state_dict(plain.state_dict(), strict=True)
    latent = torch.randn(1, 4, 5, 5)
    assert torch.equal(plain.decode(latent).sample, changed.decode(latent).sample)


@pytest.mark.parametrize("value", [None, 0, "word", [1, [2]], {"a": {}}, 1e400])
@pytest.mark.parametrize("part", READERS)
def test_unknown_keys_are_noted_whatever_they_hold(part: str, value: Any) -> None:
    _, read = READERS[part]
    notes: list[str] = []
    config = {**golden(part), "gizmo": value, "a\x1b[31m": value, "_private": value}
    assert read(config, f"x/{part}.json", notes.append) == read(golden(part), part)
    (note,) = notes
    assert note.startswith(f"x/{part}.json: ignored 'a\\x1b[31m', gizmo, which ")


def test_a_note_stays_short() -> None:
    notes: list[str] = []
    published_config.read_vae({**golden("vae"), **{f"k{i:03}": i for i in range(500)}}, "vae", notes.append)
    (note,) = notes
    assert note.startswith("vae: ignored k000, k001, ")
    assert note.endswith("k007 and 492 more, which AutoencoderKL does not read")


@pytest.mark.parametrize(
    ("part", "found", "expected"),
    [
        ("unet", "UNet3DConditionModel", "expected UNet2DConditionModel"),
        ("unet", "FlaxUNet2DConditionModel", "expected UNet2DConditionModel"),
        ("controlnet", "ControlNetXSAdapter", "expected ControlNetModel"),
        ("vae", "AutoencoderKLWan", "expected AutoencoderKL"),
        ("vae", None, "expected AutoencoderKL"),
        ("vae", ["AutoencoderKL"], "expected AutoencoderKL"),
        ("tiny", "AutoencoderKL", "expected AutoencoderTiny"),
        ("text_encoder", "t5", "expected clip_text_model"),
        ("scheduler", "FlowMatchEulerDiscreteScheduler", "expected one of DDPMScheduler, DDIMScheduler"),
        ("scheduler", "EDMEulerScheduler", "expected one of DDPMScheduler, DDIMScheduler"),
        ("scheduler", "LCMScheduler", "expected one of DDPMScheduler, DDIMScheduler"),
    ],
)
def test_configs_of_another_class_are_refused(part: str, found: Any, expected: str) -> None:
    keys, read = READERS[part]
    with pytest.raises(WeightsError, match=expected) as refusal:
        read({**golden(part), keys.class_key: found}, f"x/{part}.json")
    assert str(refusal.value).startswith(f"x/{part}.json describes a {found}, expected ")
    assert "\n" not in str(refusal.value)


def test_the_tool_prints_one_note_a_config(folder: Path, tmp_path: Path) -> None:
    for part in ("unet", "vae"):
        config_file(folder, part).write_text(json.dumps({**golden(part), "gizmo": 1, "sprocket": None}))
    command = [sys.executable, TOOL, "--stablevsr", folder, "-o", tmp_path / "out.safetensors"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"stablevsr: note: {folder}") for line in lines)
    assert all("ignored gizmo, sprocket, which" in line for line in lines)


def test_writing_back_gives_only_keys_of_the_library() -> None:
    written = set(published_config.write_schedule(ScheduleConfig())) - {"_class_name"}
    assert written <= set(inspect.signature(DDPMScheduler.__init__).parameters)
