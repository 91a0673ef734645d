"""What a GPU must do as the CPU does.

Without one, most of it runs on the CPU, or on a stand-in that refuses what a GPU refuses: then the tests are right.
"""

import csv
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import TINY, memory_run, random_model
from references import relative_error
from stand_in import stand_in
from stream_models import random_stream_model
from torch import Tensor

from stablevsr import Progress, SamplingConfig, Stopped, build_model, sample_video, upscale
from stablevsr.architectures import ARCHITECTURES
from stablevsr.compare.compare import compare_page
from stablevsr.engine.stream import Stream
from stablevsr.media import open_reader
from stablevsr.metrics import evaluate
from stablevsr.metrics.evaluate import Evaluator
from stablevsr.metrics.fidelity import psnr
from stablevsr.model import DTYPES, Model, StableVSR
from stablevsr.nn.attention import CHUNK, attend
from stablevsr.runtime import Offloaded
from stablevsr.sampling import tiles
from stablevsr.training.loop import Trainer
from stablevsr.training.train import train

DEMO = Path(__file__).parents[1] / "stablevsr/assets/demo.mp4"
HAS_CUDA = torch.cuda.is_available()
NEEDS_CUDA = pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
CUDA = pytest.param("cuda", marks=(pytest.mark.gpu, NEEDS_CUDA))
EVERYWHERE = pytest.mark.parametrize("device", ["stand-in", CUDA], indirect=True)
EVERYWHERE_WITHOUT_FLOAT64 = pytest.mark.parametrize("device", ["stand-in without float64", CUDA], indirect=True)
COMPUTED = pytest.mark.parametrize("device", ["cpu", CUDA], indirect=True)  # where the numbers of a device matter
ON_CUDA = pytest.mark.parametrize("device", [CUDA], indirect=True)
MADE = {"bidirectional": random_model, "streaming": random_stream_model}  # random models by mode
BOTH_MODES = pytest.mark.parametrize("mode", MADE)


CPU = torch.device("cpu")


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    if not request.param.startswith("stand-in"):
        yield torch.device(request.param)
        return
    with stand_in(monkeypatch, request.param.endswith("without float64")) as there:
        yield there


def on(device: torch.device, model: StableVSR, dtype: str = "fp32") -> StableVSR:
    model.place(device, DTYPES[dtype])
    return model


def made(mode: str, device: torch.device, dtype: str = "fp32") -> StableVSR:
    """A small random model for this mode, with a setting of few steps."""
    model = on(device, MADE[mode](), dtype)
    model.sampling = SamplingConfig(mode=mode, steps=3)
    return model


def noise(count: int, height: int = 16, width: int = 24) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def footage(count: int = 3, height: int = 24, width: int = 32) -> Tensor:
    """The first frames of the demo clip, cropped: (n, 3, h, w) in [0, 1]."""
    with open_reader(DEMO) as reader:
        frames = np.stack([frame.image for frame, _ in zip(reader, range(count), strict=False)])
    return torch.from_numpy(frames[:, :height, :width]).permute(0, 3, 1, 2).float() / 255


def write_frames(folder: Path, frames: np.ndarray) -> Path:
    folder.mkdir()
    for i, frame in enumerate(frames):
        iio.imwrite(folder / f"{i:03}.png", frame)
    return folder


def read_frames(folder: Path) -> np.ndarray:
    return np.stack([iio.imread(path) for path in sorted(folder.iterdir())])


@contextmanager
def host_waits(device: torch.device) -> Iterator[list[object]]:
    """Collects a warning for every call in the block that makes the host wait for the GPU."""
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        if HAS_CUDA and device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            waits[:] = [each for each in waits if "synchroniz" in str(each.message)]
            if HAS_CUDA and device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


# Numbers


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", "bf16"), *(pytest.param("cuda", dtype, marks=CUDA.marks) for dtype in ("bf16", "fp16"))],
    indirect=["device"],
)
def test_half_precision_is_near_float32(device: torch.device, dtype: str) -> None:
    """With the trained small model, whose pictures are worth comparing."""
    frames, options = footage(), {"steps": 4, "scene_cuts": "off"}
    exact = sample_video(build_model(device=CPU), frames, **options)
    half = sample_video(build_model(device=device, dtype=dtype), frames, **options)
    assert psnr(half, exact).min() > 40


@EVERYWHERE_WITHOUT_FLOAT64
@BOTH_MODES
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 2e-3), ("bf16", 0.1)])
def test_every_device_has_the_same_result(device: torch.device, mode: str, dtype: str, tolerance: float) -> None:
    frames = torch.from_numpy(noise(2)).permute(0, 3, 1, 2) / 255
    expected = sample_video(made(mode, CPU), frames)
    assert (sample_video(made(mode, device, dtype), frames) - expected).abs().mean() < tolerance


@COMPUTED
@BOTH_MODES
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_same_run_has_the_same_bits(device: torch.device, mode: str, dtype: str) -> None:
    frames = noise(3)
    first, second = (sample_video(made(mode, device, dtype), frames) for _ in range(2))
    assert np.array_equal(first, second)


@ON_CUDA
def test_compiled_networks_are_near_eager_ones_and_repeat_their_bits(device: torch.device) -> None:
    frames, options = footage(), {"steps": 4, "scene_cuts": "off"}
    exact = sample_video(build_model(device=CPU), frames, **options)
    compiled = build_model(device=device, dtype="bf16", compile=True)
    first, second = (sample_video(compiled, frames, **options) for _ in range(2))
    assert psnr(first, exact).min() > 40
    assert torch.equal(first, second)


def attend_compiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.compile(attend, fullgraph=True, dynamic=False)(q, k, v)


@pytest.mark.parametrize(
    ("device", "call"),
    [("cpu", attend), *(pytest.param("cuda", call, marks=CUDA.marks) for call in (attend, attend_compiled))],
    indirect=["device"],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_the_decoders_wide_attention(
    device: torch.device, call: Callable[..., Tensor], dtype: torch.dtype, tolerance: float
) -> None:
    """Its head is too wide for CUDA's flash kernels, so there it is done in chunks."""
    tokens = CHUNK + 300 if device.type == "cuda" else 70
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, tokens, 512, generator=generator).to(dtype) for _ in range(3)]
    exact = F.scaled_dot_product_attention(*(tensor.double() for tensor in inputs))
    there = [tensor.to(device) for tensor in inputs]
    assert relative_error(call(*there).cpu().double(), exact) < tolerance
    there[0].requires_grad_()
    call(*there).float().sum().backward()
    assert there[0].grad.isfinite().all()


# Memory


def offloaded_to(device: torch.device, model: StableVSR) -> Model:
    """As `build_model(offload=True)` gives it, of a model on the CPU; to the CPU too, for a test of the same steps."""
    return Offloaded(model, device, [name for name, _, part in model.parts() if part.offloaded])


@COMPUTED
def test_offloading_takes_less_memory_and_changes_no_bit(device: torch.device) -> None:
    results, peaks = [], []
    for offload in (False, True):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        whole = made("bidirectional", CPU if offload else device)
        model = offloaded_to(device, whole) if offload else whole
        results.append(sample_video(model, noise(3, 8, 8)))
        if device.type == "cuda":
            peaks.append(torch.cuda.max_memory_allocated() - before)
        del model, whole
    assert np.array_equal(*results)
    assert peaks == sorted(peaks, reverse=True)


@EVERYWHERE_WITHOUT_FLOAT64
def test_decoding_goes_on_in_tiles_when_memory_runs_out(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The allocator's own error, whatever it is called on this device."""
    model = made("bidirectional", device)
    expected = sample_video(model, noise(2), tile=16, steps=2)
    real = model.vae.decode

    def decode(latent: Tensor) -> Tensor:
        if max(latent.shape[-2:]) > 16:
            torch.empty(2**50, dtype=torch.uint8, device=device)
        return real(latent)

    monkeypatch.setattr(model.vae, "decode", decode)
    monkeypatch.setattr(tiles, "AUTO_TILE", 16)
    assert np.array_equal(sample_video(model, noise(2), steps=2), expected)
    assert "decoding in tiles" in caplog.text


@ON_CUDA
@BOTH_MODES
def test_memory_of_the_gpu_does_not_grow_with_the_clip(device: torch.device, mode: str, tmp_path: Path) -> None:
    peaks, model = [], made(mode, device)
    for count in (4, 24):
        clip = write_frames(tmp_path / f"in_{count}", noise(count, 48, 64))
        torch.cuda.reset_peak_memory_stats()
        upscale(model, clip, tmp_path / f"out_{count}", scene_cuts="off")
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 1.05 * peaks[0]  # latents that the disk has not taken yet


# Runs


@EVERYWHERE_WITHOUT_FLOAT64
@pytest.mark.parametrize(
    ("mode", "stops"),
    [
        ("bidirectional", [("flow", 1), ("denoise", 2), ("denoise", 7), ("decode", 2)]),
        ("streaming", [("stream", 1), ("stream", 3)]),
    ],
)
def test_a_job_that_was_stopped_ends_with_the_same_bits(
    device: torch.device, mode: str, stops: list[tuple[str, int]], tmp_path: Path
) -> None:
    model, clip = made(mode, device), write_frames(tmp_path / "in", noise(4))
    options = {"scene_cuts": "off", "sampler": "dpm++" if mode == "bidirectional" else "ddim"}
    upscale(model, clip, tmp_path / "whole", **options)
    for stop in stops:

        def progress(now: Progress, stop: tuple[str, int] = stop) -> bool:
            return (now.phase, now.done) != stop

        with pytest.raises(Stopped):
            upscale(model, clip, tmp_path / "stopped", progress=progress, **options)
    upscale(model, clip, tmp_path / "stopped", **options)
    assert np.array_equal(read_frames(tmp_path / "stopped"), read_frames(tmp_path / "whole"))


@COMPUTED
def test_the_loop_waits_for_the_device_once_a_pass(device: torch.device) -> None:
    """It looks for overflow at the end of each pass."""
    run, _ = memory_run(on(device, random_model()), torch.rand(4, 3, 32, 32), steps=3)
    list(run.estimate_flows())
    frame_steps, waited = run.frame_steps(), []
    for _ in range(12):
        with host_waits(device) as waits:
            next(frame_steps)
        waited.append(len(waits))
    del waited[0]  # with what happens once
    assert [count for unit, count in enumerate(waited, 1) if unit % 4 != 3] == [0] * 8


@COMPUTED
def test_a_stream_waits_for_the_device_only_where_a_frame_ends(device: torch.device) -> None:
    """To look for overflow, in latent and picture: not between steps."""
    model = made("streaming", device)
    stream = Stream(model, model.sampling.with_fields({"scene_cuts": "off"}), (32, 32))
    frames = stream.frames(torch.rand(4, 3, 32, 32) * 2 - 1)
    next(frames)
    for _ in range(3):
        with host_waits(device) as waits:
            next(frames)
        assert len(waits) <= 2


# Everything else that takes a device


def evaluated(device: torch.device, folder: Path) -> dict[str, float]:
    """The metrics of a frame, with the flow network on the device."""
    evaluator = Evaluator(device, made("bidirectional", device).flow)
    before, now = ([evaluator.picture(image) for image in noise(4, 64, 64)[i : i + 2]] for i in (0, 2))
    return evaluator.row(now, before)


def compared(device: torch.device, folder: Path) -> dict[str, float]:
    """The numbers of a comparison page."""
    return numbers_of_page(nearly_still(made("bidirectional", device)), folder)


def nearly_still(model: StableVSR) -> StableVSR:
    """With flows so short that all pixels of a frame are seen in the next one too."""
    for parameter in model.flow.flow_head.parameters():
        parameter.mul_(0.01)
    return model


def numbers_of_page(model: Model, folder: Path) -> dict[str, float]:
    frames = noise(3, 64, 64)
    page, low_res, truth = folder / "page.html", frames[:, ::4, ::4], frames[::-1].copy()
    found = compare_page({"ours": frames}, page, lr=low_res, truth=truth, model=model)
    (motion,) = found.motions
    return found.rows[0][1] | {"warping error": motion.means[0], "hidden": motion.hidden}


RECIPE = """
stage = "{stage}"
preset = "tiny"
output = "run"
steps = {steps}
batch = 2
log_every = 1
checkpoint_every = 1
[data]
crop = 32
side = 32
pool = 2
[optimiser]
ema = 0.9
"""


def trained(stage: str, device: torch.device, folder: Path) -> dict[str, float]:
    """The losses of a run that is stopped after a step: noise and timesteps are the same for every device."""
    text = RECIPE.format(stage=stage, steps=2)
    (folder / "run.toml").write_text(text.replace("32", "128") if stage == "flow" else text)
    save = Trainer.save

    def save_and_stop(trainer: Trainer) -> None:
        save(trainer)
        if trainer.step == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(Trainer, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(folder / "run.toml", device)
    train(folder / "run.toml", device)
    with (folder / "run/log.csv").open() as file:
        return {f"loss {row['step']}": float(row["loss"]) for row in csv.DictReader(file)}


MEASURED = {
    "evaluate": evaluated,
    "compare": compared,
    **{f"train {stage}": partial(trained, stage) for stage in ("flow", "tcm")},
}


@EVERYWHERE
@pytest.mark.parametrize("what", MEASURED)
def test_metrics_pages_and_training_agree_with_the_cpu(
    device: torch.device, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "tiny", TINY)
    monkeypatch.setattr(evaluate, "LOADERS", {})  # our own metrics
    for name in ("there", "here"):
        (tmp_path / name).mkdir()
    found = MEASURED[what](device, tmp_path / "there")
    assert found == pytest.approx(MEASURED[what](CPU, tmp_path / "here"), rel=1e-3, abs=1e-3)
    assert all(np.isfinite(value) for value in found.values())


@COMPUTED
def test_a_page_of_an_offloaded_model(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "LOADERS", {})
    expected = compared(device, tmp_path)
    (tmp_path / "page.html").unlink()
    model = offloaded_to(device, nearly_still(made("bidirectional", CPU)))
    assert numbers_of_page(model, tmp_path) == pytest.approx(expected, rel=1e-6)


@ON_CUDA
def test_a_half_precision_training_step_is_finite(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "tiny", TINY)
    recipe = tmp_path / "run.toml"
    recipe.write_text('dtype = "bf16"\ngradient_checkpointing = true\n' + RECIPE.format(stage="tcm", steps=2))
    train(recipe, device)  # raises for gradients that are not finite
    assert (tmp_path / "run/model.safetensors").exists()
