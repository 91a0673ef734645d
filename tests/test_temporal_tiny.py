"""The temporal tiny autoencoder: against the library without temporal keys, its sizes, its published folder."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from models import DATA
from safetensors.torch import load_file, save_file
from stream_models import (
    STABLEVSR,
    STREAM,
    STREAM_DIFFVSR,
    TINY_STREAM,
    convert_recorded,
    published_folder,
    random_stream_model,
)
from torch import Tensor

from stablevsr import weights
from stablevsr.config import (
    ModelConfig,
    ScheduleConfig,
    TemporalTinyConfig,
    TinyDecoderConfig,
    VAEConfig,
)
from stablevsr.convert import published_config as published
from stablevsr.convert.assemble import Sources, convert, describe, to_diffusers
from stablevsr.convert.keys import diffusers_temporal_tiny, rename_all
from stablevsr.errors import UserError
from stablevsr.fields import from_dict, to_dict
from stablevsr.model import StableVSR, build_model
from stablevsr.nn.tiny import TemporalProcessor, TemporalTinyVAE
from stablevsr.nn.vae import VAE
from stablevsr.runtime import compiled_parts

PARTS = {"unet": "diffusion_pytorch_model", "controlnet": "diffusion_pytorch_model"}
PARTS |= {"vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture(scope="module")
def stream_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_recorded(tmp_path_factory.mktemp("stream"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the recorded checkpoint to spoil."""
    return published_folder(tmp_path / "Stream-DiffVSR")


def part_file(folder: Path, part: str) -> Path:
    return folder / part / f"{PARTS[part]}.safetensors"


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def is_temporal(key: str) -> bool:
    return key.endswith(".alpha") or ".temporal_processor." in key


# ---------------------------------------------------------------------------------------------------------------------
# The network


def test_sizes_of_the_released_model() -> None:
    with torch.device("meta"):
        model = StableVSR(STREAM_DIFFVSR)

    def count(part: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in part.parameters())

    assert count(model.unet) == 472_374_020
    assert count(model.tcm) == 207_699_264
    assert count(model.vae) == 2_052_501
    assert count(model.vae.encoder) == 1_026_251
    assert count(model.vae.decoder) == 1_026_250
    assert count(model.flow) == 5_257_536
    processors = [part for part in model.vae.decoder.modules() if isinstance(part, TemporalProcessor)]
    assert [count(part) for part in processors] == [24_705] * 7
    assert len(model.vae.state_dict()) == 166


@pytest.mark.parametrize("width", [6, 64])
def test_frame_0_has_the_bits_of_the_library_without_temporal_keys(width: int) -> None:
    torch.manual_seed(0)
    widths = (width,) * 3
    library = AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, 3, 3),
        num_decoder_blocks=(3, 3, 1),
    ).eval()
    config = TemporalTinyConfig(width=width)
    ours = TemporalTinyVAE(config).requires_grad_(False).eval()
    names, theirs = rename_all(ours.state_dict(), diffusers_temporal_tiny(config)), library.state_dict()
    assert {name for name in names.values() if not is_temporal(name)} == set(theirs)
    for name, tensor in ours.state_dict().items():
        if not is_temporal(names[name]):
            tensor.copy_(theirs[names[name]])
    latent, picture = torch.randn(1, 4, 9, 7), torch.rand(1, 3, 36, 28) * 2 - 1
    with torch.no_grad():
        assert torch.equal(ours.decode(latent), library.decode(latent).sample)
        assert torch.equal(ours.encode(picture), library.encode(picture).latents)
        # The features leave out the mapping to [0, 1], which for the library is the encoder's own.
        layers = library.encoder.layers
        assert torch.equal(ours.features(picture)[-1], layers[1](layers[0](picture)))


def test_each_frame_has_its_own_share() -> None:
    """alpha is the current frame's; the two meet only where their sequences join."""
    torch.manual_seed(0)
    processor = TemporalProcessor(5).requires_grad_(False)
    x, previous = torch.randn(1, 5, 8, 40), torch.randn(1, 5, 8, 40)
    assert torch.equal(processor(x[..., :3, :], previous[..., :3, :]), x[..., :3, :])

    def added(current: Tensor, past: Tensor) -> Tensor:
        return processor(current, past) - current

    processor.alpha.fill_(1.0)
    nothing = torch.zeros_like(x)
    difference = (added(x, previous) - added(x, nothing))[0].abs().amax((0, 1))
    assert difference[:20].max() < 1e-6 < difference[-8:].max()  # at the end of the last row, the previous frame begins
    processor.alpha.fill_(0.0)
    change = (added(x, previous) - added(nothing, previous))[0].abs().amax((0, 1))
    assert change[20:].max() < 1e-6 < change[:8].max()


# ---------------------------------------------------------------------------------------------------------------------
# Its configuration


def test_a_configuration_says_which_autoencoder_it_has() -> None:
    for config in (STREAM_DIFFVSR, STABLEVSR, TINY_STREAM):
        again = from_dict(ModelConfig, json.loads(json.dumps(to_dict(config))))
        assert again == config
        assert type(again.vae) is type(config.vae)
    assert STREAM_DIFFVSR.is_streaming
    assert not STABLEVSR.is_streaming
    with torch.device("meta"):
        assert isinstance(StableVSR(TINY_STREAM).vae, TemporalTinyVAE)


def test_a_configuration_of_before_is_read() -> None:
    path = DATA.parent.parent / "stablevsr/assets/small.safetensors"
    config = weights.read_header(path).config
    assert type(config.vae) is VAEConfig
    assert type(config.schedule) is ScheduleConfig
    assert "set_alpha_to_one" not in to_dict(STABLEVSR)["schedule"]  # and an older program reads what is written now
    with torch.device("meta"):
        assert type(StableVSR(config).vae) is VAE


def test_nonsense_is_refused() -> None:
    with pytest.raises(UserError, match="TemporalTinyConfig: num_blocks must have 3 levels"):
        TemporalTinyConfig(num_blocks=(3, 3))
    with pytest.raises(UserError, match="TemporalTinyConfig: width must be positive, got 0"):
        TemporalTinyConfig(width=0)
    with pytest.raises(UserError, match="ModelConfig: vae is TinyDecoderConfig"):
        ModelConfig(vae=TinyDecoderConfig())
    with pytest.raises(UserError, match="unet takes 7 channels, expected 8 of the latent"):
        ModelConfig(vae=TemporalTinyConfig(latent_channels=8))
    values = to_dict(STREAM_DIFFVSR)
    values["vae"]["surprise"] = 1
    with pytest.raises(UserError, match="VAEConfig has no field num_blocks, surprise, width"):
        from_dict(ModelConfig, values)


# ---------------------------------------------------------------------------------------------------------------------
# The published folder


def test_round_trip_same_keys_same_bits(stream_weights: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"
    written = to_diffusers(stream_weights, back)
    assert written == ["unet", "controlnet", "vae", "scheduler", "text_encoder", "tokenizer"]
    for part in PARTS:
        ours, theirs = load_file(part_file(back, part)), load_file(part_file(STREAM / "checkpoint", part))
        assert set(ours) == set(theirs)
        for name, tensor in theirs.items():
            assert tensor.dtype == ours[name].dtype
            assert torch.equal(tensor, ours[name]), name
    index, original = (json.loads((place / "model_index.json").read_text()) for place in (back, STREAM / "checkpoint"))
    for name in ("_diffusers_version", "_name_or_path"):
        del original[name]
    assert index == original
    for part in ("vae/config.json", "scheduler/scheduler_config.json"):
        ours, theirs = (json.loads((place / part).read_text()) for place in (back, STREAM / "checkpoint"))
        assert {key: theirs[key] for key in ours} == ours
    convert(Sources(back, DATA / "golden/raft_small.pth", with_text=True), tmp_path / "again.safetensors")
    again, first = load_file(tmp_path / "again.safetensors"), load_file(stream_weights)
    assert all(torch.equal(again[name], first[name]) for name in {**again, **first})
    assert weights.read_header(tmp_path / "again.safetensors").config == weights.read_header(stream_weights).config


def test_libraries_open_what_we_write_back(stream_weights: Path, tmp_path: Path) -> None:
    to_diffusers(stream_weights, tmp_path / "back")
    for library, part in ((UNet2DConditionModel, "unet"), (ControlNetModel, "controlnet")):
        _, report = library.from_pretrained(tmp_path / "back", subfolder=part, output_loading_info=True)
        assert not any(report.values()), report
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "back", subfolder="scheduler")
    assert (scheduler.config.timestep_spacing, scheduler.config.set_alpha_to_one) == ("trailing", False)


def test_what_is_read_of_the_published_folder(stream_weights: Path) -> None:
    header = weights.read_header(stream_weights)
    assert header.config.vae == TemporalTinyConfig(width=6)
    assert header.config.schedule == STREAM_DIFFVSR.schedule
    text = describe(stream_weights)
    assert "made for streaming" in text
    assert "trailing spacing" in text
    assert "diffusers, vae/diffusion_pytorch_model.safetensors" in text


def test_the_tool_there_and_back(folder: Path, tmp_path: Path) -> None:
    def tool(*arguments: object) -> str:
        command = [sys.executable, str(DATA.parent.parent / "tools/convert_weights.py"), *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert not result.stderr
        return result.stdout

    file = tmp_path / "stream.safetensors"
    assert "made for streaming" in tool("--stablevsr", folder, "--flow", DATA / "golden/raft_small.pth", "-o", file)
    assert "made for streaming" in tool("--inspect", file)
    assert "wrote unet, controlnet, vae, scheduler" in tool("--to-diffusers", tmp_path / "back", file)
    assert isinstance(build_model(file, "cpu").vae, TemporalTinyVAE)


def test_recognised_by_what_it_is(folder: Path, tmp_path: Path) -> None:
    """Also under the library's class name, or none."""
    config = json.loads((folder / "vae/config.json").read_text())
    for name in ("AutoencoderTiny", None):
        changed = {**config, "_class_name": name}
        if name is None:
            del changed["_class_name"]
        (folder / "vae/config.json").write_text(json.dumps(changed))
        header = convert(Sources(folder), tmp_path / "out.safetensors")
        assert header.config.vae == TemporalTinyConfig(width=6)


def spoil_plain(folder: Path) -> None:
    tensors = load_file(part_file(folder, "vae"))
    kept = {key: tensor.clone() for key, tensor in tensors.items() if not is_temporal(key)}
    save_file(kept, part_file(folder, "vae"))


def spoil_one_alpha(folder: Path) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(part_file(folder, "vae")).items()}
    del tensors["decoder.layers.12.alpha"]
    save_file(tensors, part_file(folder, "vae"))


def spoil_nan(folder: Path) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(part_file(folder, "vae")).items()}
    tensors["decoder.layers.7.temporal_processor.0.bias"].fill_(torch.nan)
    save_file(tensors, part_file(folder, "vae"))


def spoil_config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "vae/config.json", **changes)


def spoil_kl(folder: Path) -> None:
    shutil.copytree(DATA / "checkpoint/vae", folder / "vae", dirs_exist_ok=True)
    spoil_config(**json.loads((STREAM / "checkpoint/vae/config.json").read_text()))(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_plain, "is a tiny autoencoder without temporal modules, expected AutoencoderKL"),
        (spoil_one_alpha, r"vae/diffusion_pytorch_model.safetensors lacks decoder.layers.12.alpha"),
        (spoil_nan, "decoder.layers.7.temporal_processor.0.bias holds NaN"),
        (spoil_kl, "is a tiny autoencoder without temporal modules"),
        (spoil_config(scaling_factor=0.5), r"vae/config.json: scaling_factor = 0.5 is not supported"),
        (spoil_config(act_fn="gelu"), "act_fn = 'gelu' is not supported"),
        (spoil_config(upsample_fn="bilinear"), "upsample_fn = 'bilinear' is not supported"),
        (spoil_config(decoder_block_out_channels=[6, 6, 8]), r"have widths \[6, 8\], expected a single one"),
        (spoil_config(num_decoder_blocks=[3, 2, 1]), "expected num_encoder_blocks reversed"),
        (spoil_config(num_encoder_blocks=[1, 1, 3, 3], num_decoder_blocks=[3, 3, 1, 1]), "must have 3 levels"),
        (spoil_config(num_encoder_blocks=3), "vae/config.json holds a value of the wrong type"),
        (spoil_config(latent_channels=8), "expected 8 of the latent|has shape"),
        (spoil_config(_class_name="AutoencoderDC"), "vae/config.json describes a AutoencoderDC, expected one of"),
    ],
)
def test_spoilt_folders(folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(folder)
    with pytest.raises(UserError, match=message):
        convert(Sources(folder), folder.parent / "out.safetensors")
    assert [path.name for path in folder.parent.iterdir()] == ["Stream-DiffVSR"]


def test_where_the_last_step_ends_is_read_as_the_library_does() -> None:
    for name in ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler"):
        for value in (True, False):
            schedule = published.read_ddim_schedule({"_class_name": name, "set_alpha_to_one": value}, "scheduler")
            assert schedule.set_alpha_to_one == value
    assert published.read_ddim_schedule({}, "scheduler").set_alpha_to_one == DDIMScheduler().config.set_alpha_to_one
    with pytest.raises(UserError, match=r"scheduler: DDIMScheduleConfig: set_alpha_to_one is 'no', expected bool"):
        published.read_ddim_schedule({"set_alpha_to_one": "no"}, "scheduler")
    notes: list[str] = []
    published.read_ddim_schedule({"_class_name": "DDIMScheduler", "gizmo": 1}, "scheduler", notes.append)
    assert notes == ["scheduler: ignored gizmo, which DDIMScheduler does not read"]


def test_configs_survive_the_published_layout() -> None:
    for config in (STREAM_DIFFVSR, TINY_STREAM):
        assert published.read_temporal_tiny(published.write_temporal_tiny(config.vae), "vae") == config.vae
        written = published.write_schedule(config.schedule)
        assert published.read_ddim_schedule(written, "scheduler") == config.schedule


def test_a_weights_file_is_a_base_like_any_other(stream_weights: Path, tmp_path: Path) -> None:
    header = convert(Sources(stream_weights), tmp_path / "bf16.safetensors", torch.bfloat16)
    assert header.config.vae == TemporalTinyConfig(width=6)
    assert header.config.schedule == STREAM_DIFFVSR.schedule
    assert build_model(tmp_path / "bf16.safetensors", "cpu", "bf16").vae.dtype == torch.bfloat16


def test_what_is_compiled() -> None:
    model = random_stream_model()
    model.compile_parts()
    assert compiled_parts(model) == [
        "unet.encoder",
        "unet.decoder",
        "tcm",
        "vae.decoder",
    ]


def test_a_file_gives_the_model_back(tmp_path: Path) -> None:
    model = random_stream_model()
    weights.write(tmp_path / "model.safetensors", weights.Header(model.config), model.state_dict())
    again = build_model(tmp_path / "model.safetensors", "cpu")
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
