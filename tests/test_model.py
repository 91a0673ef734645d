"""Weights files and `build_model`: strict, atomic, honest; and compiled parts."""

import copy
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from models import TINY, offloaded
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

from stablevsr import PRESETS, build_model, sample_video, weights
from stablevsr.cli.models import PURPOSES
from stablevsr.errors import OptionsError, ResourceError, WeightsError
from stablevsr.media import open_reader
from stablevsr.model import BUNDLED, StableVSR, bundled_weights, find_weights


def test_a_file_gives_the_model_back(tiny_model: StableVSR, tiny_weights: Path) -> None:
    model = build_model(tiny_weights, device="cpu")
    assert model.config == TINY
    assert model.provenance == {"note": "random"}
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_weights_that_are_copied_lie_channels_last(tiny_model: StableVSR, tiny_weights: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.safetensors"
    weights.write(half, weights.Header(tiny_model.config), tiny_model.state_dict(), torch.float16)
    x = torch.randn(1, 4, 5, 6)
    for path, copied in ((half, True), (tiny_weights, False)):
        vae = build_model(path, device="cpu").vae
        assert vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last) == copied
        plain = copy.deepcopy(vae).to(memory_format=torch.contiguous_format)
        torch.testing.assert_close(vae.decode(x), plain.decode(x))


@pytest.mark.parametrize("name", [None, *BUNDLED])
def test_the_bundled_models_run(name: str | None) -> None:
    model = build_model(name, device="cpu")
    assert sample_video(model, np.zeros((2, 4, 5, 3), np.uint8), steps=1).shape == (2, 16, 20, 3)
    assert find_weights(name).stat().st_size < 30e6


def test_the_list_of_models_has_the_bundled_ones() -> None:
    assert tuple(PURPOSES) == BUNDLED


def test_a_file_goes_before_a_bundled_model_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_weights("small-streaming") == bundled_weights("small-streaming")
    Path("small-streaming").touch()
    assert find_weights("small-streaming") == Path("small-streaming")


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "steps"), [("bf16", 8), ("fp16", 5)])  # slow where the processor lacks them
def test_half_precision_stays_near_through_a_run(dtype: str, steps: int) -> None:
    """On a real clip, with weights that were trained, for errors to add up in."""
    with open_reader(bundled_weights().parent / "demo.mp4") as reader:
        frames = np.stack([frame.image[10:34, 20:52] for frame in reader][:2])
    models = (build_model(device="cpu", dtype=kind) for kind in (dtype, "fp32"))
    half, full = (sample_video(model, frames, PRESETS["exact"], steps=steps) for model in models)
    assert 40 < 10 * np.log10(255**2 / np.square(half.astype(float) - full).mean()) < 90  # and half it is


@pytest.mark.parametrize(
    ("dtype", "expected"), [("bf16", torch.bfloat16), ("fp16", torch.float16), (None, torch.float32)]
)
def test_dtypes_leave_the_flow_alone(tiny_weights: Path, dtype: str | None, expected: torch.dtype) -> None:
    model = build_model(tiny_weights, device="cpu", dtype=dtype)
    assert {p.dtype for part in (model.unet, model.tcm) for p in part.parameters()} == {expected}
    # float16 overflows in the published VAE
    assert model.vae.dtype == (torch.float32 if dtype == "fp16" else expected)
    original = load_file(tiny_weights)
    assert all(torch.equal(value, original[f"flow.{name}"]) for name, value in model.flow.state_dict().items())
    frames = np.random.default_rng(0).random((2, 3, 8, 8)).astype(np.float32)
    result = sample_video(model, frames, steps=2)
    full = sample_video(build_model(tiny_weights, device="cpu"), frames, steps=2)
    assert np.isfinite(result).all()
    assert np.abs(result - full).mean() < 0.05


def truncate(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def resave(change: dict[str, torch.Tensor | None]) -> object:
    def spoil(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        changed = {name: t for name, t in {**tensors, **change}.items() if t is not None}
        save_file(changed, path, metadata=weights.read_header(path).to_metadata())

    return spoil


def other_metadata(**changes: str) -> object:
    def spoil(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, path, metadata={**weights.read_header(path).to_metadata(), **changes})

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "is truncated or not a safetensors file"),
        (resave({"unet.encoder.conv_in.bias": None}), "lacks unet.encoder.conv_in.bias"),
        (resave({"unet.more": torch.zeros(1)}), "has unknown unet.more"),
        (resave({"tcm.zero_conv_middle.bias": torch.zeros(7)}), r"has shape \(7,\), expected \(32,\)"),
        (resave({"tcm.zero_conv_middle.bias": torch.full((32,), torch.nan)}), "zero_conv_middle.bias holds NaN"),
        (resave({"tcm.zero_conv_middle.bias": torch.full((32,), -torch.inf)}), "holds NaN or infinity"),
        (other_metadata(format="other-2"), "has the format 'other-2', expected 'stablevsr-1'"),
        (other_metadata(config="{"), "has damaged metadata"),
        (other_metadata(config='{"gizmo": 1}'), "ModelConfig has no field gizmo"),
    ],
)
def test_spoilt_files_are_refused(tiny_weights: Path, tmp_path: Path, spoil: object, message: str) -> None:
    path = Path(shutil.copy(tiny_weights, tmp_path / "spoilt.safetensors"))
    spoil(path, {name: tensor.clone() for name, tensor in load_file(path).items()})
    with pytest.raises(WeightsError, match=message) as refusal:
        build_model(path)
    assert "spoilt.safetensors" in str(refusal.value)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("text", {"num_layers": 10**9, "width": 32}, "TextConfig: num_layers is 1000000000, expected at most 256"),
        ("text", {"vocab_size": 2**40, "width": 32}, "TextConfig: vocab_size is"),
        (
            "unet.encoder",
            {"channels": [2**40] * 4},
            "UNetEncoderConfig: the largest of channels is 1099511627776, expected at most",
        ),
        ("unet.encoder", {"blocks_per_level": [1, 10**9, 1, 1]}, "blocks_per_level is 1000000000"),
        ("unet.encoder", {"blocks_per_level": [99] * 4}, "there are 792 blocks in total, expected at most 256"),
        ("unet.encoder", {"transformer_depth": [1, 1, 1, 10**9]}, "transformer_depth is 1000000000"),
        ("unet.encoder", {"channels": [32] * 10**5}, "channels has 100000 levels, expected at most 16"),
        ("tcm", {"conditioning_widths": [8, 8, 10**12]}, "conditioning_widths is"),
        ("vae", {"blocks_per_level": 10**9}, "VAEConfig: blocks_per_level is"),
        ("tiny", {"num_blocks": [1, 1, 10**9]}, "TinyDecoderConfig: the largest of num_blocks is"),
        ("flow", {"gru_kernels": [[3, 3]] * 10**5}, "gru_kernels must be pairs"),
        ("flow", {"gru_kernels": [[3]]}, "gru_kernels must be pairs"),
        ("flow", {"motion_width": -1}, "motion_width must be positive"),
        ("flow", {"motion_width": 1}, "motion_width must exceed 2"),
        ("flow", {"motion_flow_widths": [1, 2, 3]}, "motion_flow_widths must have 2 entries"),
        ("flow", {"motion_corr_widths": [1, 2, 3]}, "motion_corr_widths must have 1 or 2 entries"),
        ("flow", {"corr_radius": 10**9}, "corr_radius is"),
        ("schedule", {"num_train_timesteps": 10**12}, "num_train_timesteps is"),
        ("", {"context_tokens": 10**12}, "ModelConfig: context_tokens is"),
        ("vae", {"scaling_factor": float("nan")}, "scaling_factor is nan, expected a finite number"),
        ("vae", {"scaling_factor": 10**400}, "expected a finite number"),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_built(
    tiny_weights: Path, tmp_path: Path, part: str, changes: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads(weights.read_header(tiny_weights).to_metadata()["config"])
    place = config
    for name in filter(None, part.split(".")):
        if place[name] is None:
            place[name] = {}
        place = place[name]
    place.update(changes)
    path = Path(shutil.copy(tiny_weights, tmp_path / "absurd.safetensors"))
    other_metadata(config=json.dumps(config))(path, load_file(tiny_weights))
    monkeypatch.setattr("stablevsr.model.StableVSR", None)  # to build it would raise
    with pytest.raises(WeightsError, match=message) as refusal:
        build_model(path, device="cpu")
    assert str(refusal.value).startswith(str(path))
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize("key", ["config", "provenance"])
def test_metadata_nested_too_deeply_is_refused(tiny_weights: Path, tmp_path: Path, key: str) -> None:
    path = Path(shutil.copy(tiny_weights, tmp_path / "deep.safetensors"))
    other_metadata(**{key: "[" * 10**5})(path, load_file(tiny_weights))
    with pytest.raises(WeightsError, match=r"deep.safetensors has damaged metadata"):
        build_model(path, device="cpu")


def test_files_that_are_not_ours(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="does not exist"):
        build_model(tmp_path / "none.safetensors")
    with pytest.raises(WeightsError, match="is a folder"):
        build_model(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(WeightsError, match=r"no stablevsr file, make one with stablevsr convert"):
        build_model(tmp_path / "plain.safetensors")


@pytest.mark.parametrize("device", ["cuda:99", "xpu", "meta"])
def test_devices_that_this_machine_lacks(device: str) -> None:
    with pytest.raises(ResourceError, match=f"device '{device}' is not available, this machine has"):
        build_model(device=device)


def test_unknown_device() -> None:
    with pytest.raises(OptionsError, match="device 'gpu' is unknown, this machine has"):
        build_model(device="gpu")


def test_unknown_dtype() -> None:
    with pytest.raises(OptionsError, match="got dtype 'int8', expected one of fp32, fp16, bf16"):
        build_model(dtype="int8")


SHARED = torch.zeros(3)


@pytest.mark.parametrize(
    "bad", [{"bad": torch.empty(3, device="meta")}, {"bad": torch.eye(2).to_sparse()}, {"bad": SHARED, "too": SHARED}]
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tiny_model: StableVSR, tmp_path: Path, bad: dict) -> None:
    path = tmp_path / "file.safetensors"
    path.write_text("precious")
    tensors = tiny_model.state_dict() | bad
    with pytest.raises(
        ResourceError, match=r"file.safetensors could not be written \(.+\); nothing was changed"
    ) as refusal:
        weights.write(path, weights.Header(TINY), tensors)
    assert "\n" not in str(refusal.value)
    assert path.read_text() == "precious"
    assert os.listdir(tmp_path) == ["file.safetensors"]


def test_compiled_frames_equal_eager_ones(tiny_weights: Path) -> None:
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("torch.compile needs a C++ compiler on the CPU, and none is there")
    frames = np.random.default_rng(0).random((3, 3, 16, 16)).astype(np.float32)
    eager = sample_video(build_model(tiny_weights, device="cpu"), frames, steps=2)
    torch._dynamo.reset()
    counters.clear()
    compiled = build_model(tiny_weights, device="cpu", compile=True)  # each part with fullgraph=True
    assert np.abs(sample_video(compiled, frames, steps=2) - eager).max() < 1e-3
    # The UNet's halves, the TCM and the decoder: none twice, and none for fewer frames.
    assert counters["stats"]["unique_graphs"] == 4
    sample_video(compiled, frames[:2], steps=1)
    assert counters["stats"]["unique_graphs"] == 4


def test_compile_without_a_compiler_is_refused(tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ResourceError, match="needs a C\\+\\+ compiler"):
        build_model(tiny_weights, device="cpu", compile=True)


def test_an_offloaded_model_has_one_part_on_the_device(tiny_model: StableVSR) -> None:
    """Here the device is the CPU too, but what is brought there is a copy, elsewhere than its original."""
    frames = np.random.default_rng(0).random((3, 3, 8, 8)).astype(np.float32)
    networks = {name: getattr(tiny_model, name) for name in ("unet", "tcm")} | {"vae": tiny_model.vae.decoder}
    networks["flow"] = tiny_model.flow.fnet
    places = {name: tensor.data_ptr() for name, tensor in tiny_model.state_dict().items()}

    def moved() -> set[str]:
        return {name.split(".")[0] for name, t in tiny_model.state_dict().items() if t.data_ptr() != places[name]}

    seen = []
    hooks = [
        network.register_forward_pre_hook(lambda *_, name=name: seen.append((name, moved())))
        for name, network in networks.items()
    ]
    model = offloaded(tiny_model)
    result = sample_video(model, frames, steps=2)
    for hook in hooks:
        hook.remove()
    assert {name for name, _ in seen} == set(networks)
    assert all(there == {name} for name, there in seen)
    model.load(torch.nn.Identity())
    assert moved() == set()
    assert np.array_equal(result, sample_video(tiny_model, frames, steps=2))


def test_offloading_to_a_cpu_is_refused(tiny_weights: Path) -> None:
    with pytest.raises(OptionsError, match="but the device is cpu: leave it out"):
        build_model(tiny_weights, device="cpu", offload=True)
