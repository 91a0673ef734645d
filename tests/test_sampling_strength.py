"""`strength`: sampling that starts from the enlarged input instead of pure noise."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler
from media_tools import read_frames, write_frames
from models import TINY, offloaded, random_model, with_noise_levels
from stream_models import TINY_STREAM, random_stream_model
from torch import Tensor

from stablevsr import PRESETS, SamplingConfig, Stopped, UserError, sample_video, stream_video, upscale
from stablevsr.architectures import STABLEVSR_SCHEDULE
from stablevsr.convert.published_config import write_schedule
from stablevsr.engine import store
from stablevsr.model import StableVSR
from stablevsr.sampling.config import STREAMING
from stablevsr.sampling.noise import SeededNoise
from stablevsr.sampling.schedule import run_steps, timesteps
from stablevsr.sampling.streaming import ddim_steps
from stablevsr.sampling.tiles import PictureDecoder, encode_in_tiles

SCHEDULER = DDPMScheduler | DDIMScheduler


@pytest.fixture(scope="module")
def stream_model() -> StableVSR:
    model = random_stream_model()
    model.sampling = STREAMING
    return model


def clip(n: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def get_timesteps(scheduler: SCHEDULER, num_inference_steps: int, strength: float) -> Tensor:
    """As in the img2img pipelines of diffusers."""
    init_timestep = min(int(num_inference_steps * strength), num_inference_steps)
    t_start = max(num_inference_steps - init_timestep, 0)
    return scheduler.timesteps[t_start * scheduler.order :]


def enlarged(frames: np.ndarray) -> Tensor:
    """(n, h, w, 3) uint8 to (n, 3, 4h, 4w) in [-1, 1]."""
    low_res = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
    return F.interpolate(low_res, scale_factor=4, mode="bicubic").clamp(-1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The schedule


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_the_steps_are_those_of_the_library(spacing: str) -> None:
    config = SamplingConfig(spacing=spacing).schedule_for(TINY)
    scheduler = DDPMScheduler.from_config(write_schedule(config))
    for steps, strength in product((1, 4, 7, 50), (1.0, 0.999, 0.75, 0.58, 0.3, 0.02)):
        scheduler.set_timesteps(steps)
        expected = get_timesteps(scheduler, steps, strength).tolist()
        assert timesteps(config, steps, strength) == expected
        if expected:
            assert SamplingConfig(steps=steps, strength=strength).steps_taken == len(expected)


def test_a_run_of_fewer_steps_is_the_end_of_the_whole() -> None:
    for steps in (run_steps, ddim_steps):
        schedule = (TINY_STREAM if steps is ddim_steps else TINY).schedule
        whole, part = steps(schedule, 7), steps(schedule, 7, 0.5)
        assert [step.index for step in part] == [0, 1, 2]
        for a, b in zip(whole[-3:], part, strict=True):
            assert (a.timestep, a.alpha_bar, a.alpha_bar_next) == (b.timestep, b.alpha_bar, b.alpha_bar_next)
        assert part[0].alpha_bar_prev is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strength": 0.0}, "got strength 0, expected above 0 and at most 1"),
        ({"strength": 1.5}, "got strength 1.5, expected above 0 and at most 1"),
        ({"strength": float("nan")}, "strength is nan, expected a finite number"),
        ({"strength": 0.2, "steps": 4}, "got strength 0.2 with steps 4, which leaves no step: increase one of them"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingConfig().with_fields(fields)


def test_no_notice_of_a_start_from_pure_noise() -> None:
    assert SamplingConfig(steps=5).notices(TINY, SamplingConfig())
    assert not SamplingConfig(steps=5, strength=0.8).notices(TINY, SamplingConfig())


# ---------------------------------------------------------------------------------------------------------------------
# The start, and runs


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_one_frame_as_the_library_would(sampler: str, tiny_model: StableVSR) -> None:
    """Explicitly: encode, add noise, denoise with the library's scheduler, decode."""
    frames, noise, model = clip(1, 6, 7), SeededNoise(0, (4, 6, 7)), tiny_model
    settings = write_schedule(model.config.schedule)
    scheduler = (
        DDPMScheduler.from_config(settings)
        if sampler == "ddpm"
        else DDIMScheduler.from_config(settings, set_alpha_to_one=True)
    )
    scheduler.set_timesteps(8)
    times = get_timesteps(scheduler, 8, 0.6)
    low_res = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    latent = model.vae.encode(enlarged(frames)).mean * model.config.vae.scaling_factor
    x = scheduler.add_noise(latent, noise.initial(0)[None], times[:1])
    for i, time in enumerate(times):
        v = model.unet(torch.cat([x, low_res], 1), time[None], model.encode_prompt(None))
        if sampler == "ddim":
            # The library ends a step at t - n // steps; ours at the run's next time, which "leading" makes the same.
            x = scheduler.step(v, time, x).prev_sample
        else:
            x0 = scheduler.step(v, time, x).pred_original_sample
            x = with_our_noise(scheduler, x0, x, time, noise.step(i, 0))
    expected = model.vae.decode(x / model.config.vae.scaling_factor) / 2 + 0.5
    ours = sample_video(
        model, torch.from_numpy(frames).permute(0, 3, 1, 2) / 255, steps=8, strength=0.6, sampler=sampler, noise=noise
    )
    torch.testing.assert_close(ours, expected.clamp(0, 1), rtol=0, atol=1e-5)
    assert expected.std() > 0.05


def with_our_noise(scheduler: DDPMScheduler, x0: Tensor, x: Tensor, time: Tensor, noise: Tensor) -> Tensor:
    """The library's step, which draws its own noise, with noise that is given."""
    previous = scheduler.previous_timestep(time)
    a = scheduler.alphas_cumprod[time]
    a_next = scheduler.alphas_cumprod[previous] if previous >= 0 else torch.tensor(1.0)
    mean = a_next**0.5 * (1 - a / a_next) / (1 - a) * x0 + (a / a_next) ** 0.5 * (1 - a_next) / (1 - a) * x
    variance = (1 - a_next) / (1 - a) * (1 - a / a_next)
    return mean + (variance.clamp(min=1e-20).sqrt() * noise if time > 0 else 0)


def test_a_streamed_frame_starts_from_the_tiny_encoder(stream_model: StableVSR) -> None:
    frames, noise, model = clip(1, 8, 12), SeededNoise(0, (4, 8, 12)), stream_model
    steps = ddim_steps(model.config.schedule, 4, 0.5)
    assert [step.timestep for step in steps] == [499, 249]
    low_res = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    a = steps[0].alpha_bar
    x = a**0.5 * model.vae.encode(enlarged(frames)) + (1 - a) ** 0.5 * noise.initial(0)[None]
    for step in steps:
        v = model.unet(torch.cat([x, low_res], 1), torch.tensor([step.timestep]), model.encode_prompt(None))
        a, b = step.alpha_bar, step.alpha_bar_next
        x = b**0.5 * (a**0.5 * x - (1 - a) ** 0.5 * v) + (1 - b) ** 0.5 * (a**0.5 * v + (1 - a) ** 0.5 * x)
    expected = (model.vae.decode(x) / 2 + 0.5).clamp(0, 1)
    ours = sample_video(model, torch.from_numpy(frames).permute(0, 3, 1, 2) / 255, strength=0.5, noise=noise)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.05


@pytest.mark.parametrize("streams", [False, True])
def test_from_pure_noise_nothing_is_encoded(streams, tiny_model, stream_model, monkeypatch) -> None:
    model, encoded = stream_model if streams else tiny_model, []
    real = model.vae.encode
    monkeypatch.setattr(model.vae, "encode", lambda picture: encoded.append(tuple(picture.shape)) or real(picture))
    frames, fields = clip(2, 5, 6), {"steps": 4, "scene_cuts": (1,)}
    whole = sample_video(model, frames, **fields)
    assert np.array_equal(sample_video(model, frames, strength=1.0, **fields), whole)
    assert encoded == []
    assert not np.array_equal(sample_video(model, frames, strength=0.75, **fields), whole)
    assert encoded == [(1, 3, 20, 24)] * 2  # once a frame


def test_frames_one_by_one_and_as_a_clip(stream_model: StableVSR) -> None:
    whole = sample_video(stream_model, clip(3, 6, 5), strength=0.5)
    assert np.array_equal(np.stack(list(stream_video(stream_model, clip(3, 6, 5), strength=0.5))), whole)


def test_frames_after_a_cut_are_those_of_a_clip_that_begins_there(tiny_model: StableVSR) -> None:
    frames, noise = clip(4, 4, 4), SeededNoise(0, (4, 4, 4))

    class Later:
        def initial(self, frame: int) -> Tensor:
            return noise.initial(frame + 2)

        def step(self, index: int, frame: int) -> Tensor:
            return noise.step(index, frame + 2)

    options = {"steps": 4, "strength": 0.5}
    whole = sample_video(tiny_model, frames, noise=noise, scene_cuts=(2,), **options)
    assert np.array_equal(whole[2:], sample_video(tiny_model, frames[2:], noise=Later(), **options))


def test_weights_that_noise_their_input_encode_the_frames_without(monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoded = random_model(with_noise_levels(TINY)), []
    real = model.vae.encode
    monkeypatch.setattr(model.vae, "encode", lambda picture: encoded.append(picture) or real(picture))
    sample_video(model, clip(1, 5, 6), steps=2, strength=0.5, noise_level=350)
    torch.testing.assert_close(encoded[0], enlarged(clip(1, 5, 6)))


@pytest.mark.parametrize("streams", [False, True])
def test_an_offloaded_encoder_is_brought(streams: bool, tiny_model: StableVSR, stream_model: StableVSR) -> None:
    model, options = stream_model if streams else tiny_model, {"steps": 4, "strength": 0.5}
    expected = sample_video(model, clip(2, 5, 6), **options)
    assert np.array_equal(sample_video(offloaded(model), clip(2, 5, 6), **options), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Tiles, and runs that are continued


def test_tiles_cover_everything_and_blend() -> None:
    """An encoder that looks at one position at a time gives the same in tiles."""
    picture = torch.rand(1, 3, 4 * 21, 4 * 50)
    pooled = lambda part: F.avg_pool2d(part, 4)  # noqa: E731
    torch.testing.assert_close(encode_in_tiles(pooled, picture, 16), pooled(picture))


def test_tiles_of_a_given_size(tiny_model: StableVSR, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, real = [], tiny_model.vae.encode
    monkeypatch.setattr(tiny_model.vae, "encode", lambda picture: sizes.append(picture.shape[-2:]) or real(picture))
    low_res = torch.rand(3, 6, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = PictureDecoder(tiny_model, "off").encode_enlarged(low_res)
    tiled = PictureDecoder(tiny_model, 16).encode_enlarged(low_res)
    assert sizes == [(24, 80), (24, 64), (24, 64)]
    assert whole.shape == tiled.shape == (4, 6, 20)
    assert 0 < (whole - tiled).abs().max() < 0.2 * whole.abs().max()


@pytest.mark.parametrize("streams", [False, True])
def test_a_stopped_run_continues_to_the_same_bits(streams, tiny_model, stream_model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(store, "SAVE_EVERY", -1.0)
    model, phase = (stream_model, "stream") if streams else (tiny_model, "denoise")
    clip_path = write_frames(tmp_path / "in", clip(3, 5, 6))
    options = {"steps": 4, "strength": 0.5, "scene_cuts": (1, 2)}
    expected = sample_video(model, clip(3, 5, 6), **options)
    for last in (1, 2):  # in the first pass, some frames have not begun
        stop = lambda event, last=last: event.phase != phase or event.done < last  # noqa: E731
        with pytest.raises(Stopped):
            upscale(model, clip_path, tmp_path / "out", progress=stop, force=True, **options)
        with pytest.raises(UserError, match="was started with another strength"):
            upscale(model, clip_path, tmp_path / "out", steps=4, strength=0.75, force=True)
        seen = []
        upscale(model, clip_path, tmp_path / "out", progress=seen.append, force=True, **options)
        assert next(event for event in seen if event.phase == phase).done == last + 1
        assert np.array_equal(read_frames(tmp_path / "out"), expected)


def test_an_encoder_that_runs_out_of_memory_is_tiled_and_that_is_remembered(
    tiny_model: StableVSR, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store, "SAVE_EVERY", -1.0)
    monkeypatch.setattr("stablevsr.sampling.tiles.AUTO_TILE", 16)
    clip_path, whole, real = write_frames(tmp_path / "in", clip(4, 5, 20)), 0, tiny_model.vae.encode
    options = {"steps": 4, "strength": 0.5, "scene_cuts": (1, 2, 3)}  # no flows: they take long

    def encode(picture: Tensor) -> object:
        nonlocal whole
        if picture.shape[-1] == 80:
            whole += 1
            if whole >= 2:
                raise torch.OutOfMemoryError("out of memory")
        return real(picture)

    with monkeypatch.context() as little_memory:
        little_memory.setattr(tiny_model.vae, "encode", encode)
        upscale(tiny_model, clip_path, tmp_path / "expected", **options)
        assert "in tiles of 16x16 from here on" in caplog.text
        whole = 0
        stop = lambda event: event.phase != "denoise" or event.done < 3  # noqa: E731
        with pytest.raises(Stopped):
            upscale(tiny_model, clip_path, tmp_path / "out", progress=stop, **options)
    upscale(tiny_model, clip_path, tmp_path / "out", **options)
    assert np.array_equal(read_frames(tmp_path / "out"), read_frames(tmp_path / "expected"))
    assert not np.array_equal(read_frames(tmp_path / "out"), sample_video(tiny_model, clip(4, 5, 20), **options))


def test_presets_start_from_pure_noise() -> None:
    assert {config.strength for config in PRESETS.values()} == {1.0}
    assert len(run_steps(STABLEVSR_SCHEDULE, 50, 0.3)) == 15
