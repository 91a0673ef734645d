"""Results of more than four times the size, by two passes of the model."""

import logging
from pathlib import Path

import clips_made as made
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from clips_made import picture, write_video
from stream_models import random_stream_model

from stablevsr import OptionsError, ResourceError, SamplingConfig, Stopped, UserError, sample_video, upscale
from stablevsr.cli import main
from stablevsr.engine import plan, workspace
from stablevsr.engine.outputs import enlarged
from stablevsr.engine.preview import GAP, Crop, preview
from stablevsr.engine.progress import Progress
from stablevsr.media import Encoding, open_reader
from stablevsr.model import StableVSR
from stablevsr.sampling.noise import SeededNoise
from stablevsr.sampling.resizing import MAX_PASSES, output_size, passes_for, resized

HEIGHT, WIDTH, COUNT = 6, 8, 2


@pytest.fixture
def frames() -> np.ndarray:
    return np.stack([picture(HEIGHT, WIDTH, index) for index in range(COUNT)])


@pytest.fixture
def folder(tmp_path: Path, frames: np.ndarray) -> Path:
    (tmp_path / "in").mkdir()
    for name, frame in zip("ab", frames, strict=True):
        iio.imwrite(tmp_path / "in" / f"{name}.png", frame)
    return tmp_path / "in"


def by_hand(model: StableVSR, frames: np.ndarray, size: tuple[int, int], **fields: object) -> np.ndarray:
    """Two calls, and the resampling to (height, width)."""
    large = sample_video(model, sample_video(model, frames, **fields), **fields)
    return np.stack([resized(torch.from_numpy(each), size).numpy() for each in large])


def read(path: Path) -> np.ndarray:
    return np.stack([iio.imread(each) for each in sorted(path.iterdir())])


@pytest.mark.parametrize(
    ("fields", "even", "expected"),
    [
        ({"scale": 16}, False, (976, 1296)),
        ({"scale": 4.1}, False, (250, 332)),
        ({"scale": 5.5}, True, (336, 446)),  # 335.5 x 445.5
        ({"height": 720}, True, (720, 956)),
        ({"size": "325x10"}, False, (10, 325)),
        ({"scale": 4}, False, (244, 324)),
    ],
)
def test_sizes_are_exact(fields: dict, even: bool, expected: tuple[int, int]) -> None:
    found = output_size(SamplingConfig(**fields), 61, 81, even, MAX_PASSES)
    assert found == expected
    assert passes_for(found, (61, 81)) == (1 if fields == {"scale": 4} else 2)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scale": 16.1}, "got scale 16.1 for 81x61, expected at most 16 times as large, 1296x976: for more, upscale"),
        ({"scale": 5.0, "mode": "streaming"}, "expected at most 4 times as large, 324x244, in streaming mode and on"),
    ],
)
def test_sizes_beyond_two_passes_are_refused(fields: dict, words: str) -> None:
    with pytest.raises(OptionsError, match=words):
        output_size(SamplingConfig(**fields), 61, 81, passes=MAX_PASSES)


@pytest.mark.parametrize(
    ("fields", "size"), [({"scale": 16}, (96, 128)), ({"scale": 9.3}, (56, 74)), ({"size": (33, 10)}, (10, 33))]
)
def test_a_folder_is_upscaled_as_by_hand(
    fields: dict, size: tuple[int, int], tiny_model: StableVSR, folder: Path, frames: np.ndarray, tmp_path: Path
) -> None:
    upscale(tiny_model, folder, tmp_path / "out", steps=2, seed=3, **fields)
    expected = by_hand(tiny_model, frames, size, steps=2, seed=3)
    assert np.array_equal(read(tmp_path / "out"), expected)
    assert np.array_equal(sample_video(tiny_model, frames, steps=2, seed=3, **fields), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_floats_are_not_rounded_between_the_passes(tiny_model: StableVSR, frames: np.ndarray) -> None:
    clip = np.moveaxis(frames, -1, 1).astype(np.float32) / 255
    found = sample_video(tiny_model, clip, steps=1, scale=16)
    assert np.array_equal(found, sample_video(tiny_model, sample_video(tiny_model, clip, steps=1), steps=1))
    rounded = (sample_video(tiny_model, clip, steps=1) * 255).round().astype(np.float32) / 255
    assert not np.array_equal(found, sample_video(tiny_model, rounded, steps=1))


def test_both_passes_have_the_scenes_of_the_input(
    tiny_model: StableVSR, folder: Path, frames: np.ndarray, tmp_path: Path
) -> None:
    upscale(tiny_model, folder, tmp_path / "out", steps=2, scale=16, scene_cuts=(1,))
    cut = by_hand(tiny_model, frames, (96, 128), steps=2, scene_cuts=(1,))
    assert np.array_equal(read(tmp_path / "out"), cut)
    assert not np.array_equal(cut, by_hand(tiny_model, frames, (96, 128), steps=2))
    seen = np.stack([picture(HEIGHT, WIDTH, 0), np.full_like(frames[0], 255)])  # a cut that is found
    found = sample_video(tiny_model, seen, steps=2, scale=16, scene_cuts="auto")
    assert np.array_equal(found, by_hand(tiny_model, seen, (96, 128), steps=2, scene_cuts=(1,)))


def test_a_video_keeps_its_times_and_shape(tiny_model: StableVSR, tmp_path: Path) -> None:
    write_video(tmp_path / "in.mp4", [picture(12, 16, i) for i in range(2)])
    pair, lossless = tmp_path / "pair.mkv", Encoding("ffv1")
    options = {"steps": 1, "height": 66, "encoding": lossless, "side_by_side": pair}
    upscale(tiny_model, tmp_path / "in.mp4", tmp_path / "out.mkv", **options)
    with open_reader(tmp_path / "in.mp4") as clip, open_reader(tmp_path / "out.mkv") as result:
        assert (result.width, result.height) == (88, 66)
        times = zip(result.frame_times(), clip.frame_times(), strict=True)
        assert all(abs(found - expected) < 0.001 for found, expected in times)  # MKV has milliseconds
        before, after = [frame.image for frame in clip], [frame.image for frame in result]
    assert np.array_equal(np.stack(after), by_hand(tiny_model, np.stack(before), (66, 88), steps=1))
    with open_reader(pair) as both:
        for frame, low, high in zip(both, before, after, strict=True):
            expected = resized(torch.from_numpy(enlarged(low, False, 2)), (66, 88)).numpy()
            assert np.array_equal(frame.image, np.concatenate([expected, high], axis=1))


def test_a_smooth_pattern_stays_true_beside_the_result() -> None:
    def waves(height: int, width: int) -> np.ndarray:
        y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
        wave = 128 + 100 * np.cos(np.pi * y)[:, None] * np.cos(2 * np.pi * x)[None]
        return np.repeat(wave[..., None], 3, axis=-1)

    found = enlarged(waves(60, 80).round().astype(np.uint8), False, 2)
    assert np.abs(found - waves(960, 1280)).max() < 2  # the input's rounding, and that of the result
    assert found.shape == (960, 1280, 3)


def test_stills_keep_16_bits_and_alpha(tiny_model: StableVSR, tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 65536, (5, 4, 4), dtype=np.uint16)
    made.deep_image(tmp_path / "in.png", image, "png", "rgba64le", "rgba64be")
    upscale(tiny_model, tmp_path / "in.png", tmp_path / "out.png", steps=1, scale=10)
    with open_reader(tmp_path / "in.png") as clip, open_reader(tmp_path / "out.png") as result:
        low, frame = next(iter(clip)).image, next(iter(result))
    assert (frame.image.shape, frame.image.dtype, frame.alpha.shape) == ((50, 40, 3), np.uint16, (50, 40))
    assert len(np.unique(frame.image % 257)) > 200
    first = sample_video(tiny_model, np.moveaxis(low[None], -1, 1).astype(np.float32) / 65535, steps=1)
    second = sample_video(tiny_model, (first * 65535).round() / np.float32(65535), steps=1)[0]
    expected = resized(torch.from_numpy(second), (50, 40)).permute(1, 2, 0).numpy() * 65535
    shown = frame.alpha > 0  # elsewhere the reader makes up a color
    assert shown.mean() > 0.9
    assert np.abs(frame.image - expected)[shown].max() < 2


def stop_at(*place: object):
    """A callback that stops at a pass, a phase and a unit of it."""
    return lambda now: (now.model_pass, now.phase, now.done) != place


@pytest.mark.parametrize(
    "place",
    [
        (1, "flow", 1),
        (1, "denoise", 3),
        (1, "decode", 1),
        (1, "decode", 2),
        (2, "flow", 1),
        (2, "denoise", 1),
        (2, "write", 1),
    ],
    ids=str,
)
def test_a_stopped_run_goes_on(
    place: tuple, tiny_model: StableVSR, folder: Path, frames: np.ndarray, tmp_path: Path, monkeypatch, caplog
) -> None:
    monkeypatch.setattr("stablevsr.engine.store.SAVE_EVERY", -1.0)
    call = {"steps": 2, "scale": 12}
    with pytest.raises(Stopped):
        upscale(tiny_model, folder, tmp_path / "out", **call, progress=stop_at(*place))
    seen: list[Progress] = []
    caplog.set_level(logging.INFO)
    caplog.clear()
    upscale(tiny_model, folder, tmp_path / "out", **call, progress=seen.append)
    assert ("pass 1 of 2" in caplog.text) is (place[0] == 1 and place[1:] != ("decode", 2))
    assert {now.model_passes for now in seen} == {2}
    done = [now for now in seen if (now.model_pass, now.phase) == place[:2]]
    assert not done or done[0].done >= place[2]
    assert np.array_equal(read(tmp_path / "out"), by_hand(tiny_model, frames, (72, 96), steps=2))


def test_the_work_of_the_first_pass_outlives_a_full_disk(
    tiny_model: StableVSR, folder: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("stablevsr.engine.store.SAVE_EVERY", -1.0)

    def fail(now: Progress) -> None:
        if (now.model_pass, now.phase, now.done) == (1, "denoise", 2):
            raise ResourceError("the disk is full")

    with pytest.raises(ResourceError, match="the disk is full"):
        upscale(tiny_model, folder, tmp_path / "out", steps=2, scale=12, progress=fail)
    seen: list[Progress] = []
    upscale(tiny_model, folder, tmp_path / "out", steps=2, scale=12, progress=seen.append)
    assert [now.done for now in seen if (now.model_pass, now.phase) == (1, "denoise")] == [3, 4]


def test_an_unfinished_run_keeps_its_number_of_passes(tiny_model: StableVSR, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        upscale(tiny_model, folder, tmp_path / "out", steps=1, scale=8, progress=stop_at(2, "denoise", 1))
    with pytest.raises(OptionsError, match=r"another number of passes \(2, now 1\): use the same again, or start"):
        upscale(tiny_model, folder, tmp_path / "out", steps=1, scale=3)
    upscale(tiny_model, folder, tmp_path / "out", steps=1, scale=5)  # the size itself may change
    assert read(tmp_path / "out").shape == (2, 30, 40, 3)


def test_the_plan_counts_both_passes(
    tiny_model: StableVSR, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(plan, "WORTH_TELLING", -1.0)
    upscale(tiny_model, folder, tmp_path / "out", steps=4, scale=8)
    latents = 2 * COUNT * 4 * HEIGHT * WIDTH * 4  # two slots, four channels, four bytes
    first, told, second = [text for text in caplog.messages if text.startswith("pass ")][:3]
    assert first.startswith("pass 1 of 2: 2 frames, 8 frame-steps; temporary disk space: ")
    assert first.endswith(f"; the second pass needs {plan.size(16 * latents)}")
    assert told == "pass 1 of 2: about 1 min for the 3 frame-steps left, then about 1 min for the second pass"
    assert second.startswith(f"pass 2 of 2: 2 frames, 8 frame-steps; temporary disk space: {plan.size(16 * latents)}")
    enough = latents + 3 * 16 * COUNT * HEIGHT * WIDTH
    monkeypatch.setattr(plan, "room", lambda _: enough + 10_000)
    with pytest.raises(ResourceError, match=r"may need .* for 2 frames, the disk has"):
        upscale(tiny_model, folder, tmp_path / "again", steps=4, scale=8)
    assert not workspace.workspace_path(tmp_path / "again").exists()


def test_a_preview_is_that_of_two_passes(tiny_model: StableVSR, folder: Path, frames: np.ndarray) -> None:
    with open_reader(folder) as clip:
        whole = preview(tiny_model, clip, 1, steps=1, scale=10)
        part = preview(tiny_model, clip, 1, Crop(4, 3, 0, 0), steps=1, scale=10)
    assert whole.picture.shape == (2 * 60 + GAP, 2 * 80 + GAP, 3)
    assert np.array_equal(whole.picture[:60, 80 + GAP :], by_hand(tiny_model, frames, (60, 80), steps=1)[0])
    assert part.picture.shape == (2 * 30 + GAP, 2 * 40 + GAP, 3)
    assert whole.seconds > 0


def test_the_command(folder: Path, tmp_path: Path, tiny_weights: Path, capsys: pytest.CaptureFixture) -> None:
    line = [folder, tmp_path / "out", "--weights", tiny_weights, "--steps", "1", "--device", "cpu", "--scale", "5"]
    assert main(["upscale", *map(str, line)]) == 0
    told = capsys.readouterr().err
    assert "out (40x30), two passes of 1 steps on cpu" in told
    assert "pass 1 of 2: denoise" in told
    assert "pass 2 of 2: write" in told
    assert told.count("note: ") == len({text for text in told.splitlines() if "note: " in text})


def test_what_makes_one_pass_only_says_so(tiny_model: StableVSR, frames: np.ndarray, folder: Path, tmp_path) -> None:
    words = "expected at most 4 times as large, 32x24"
    with pytest.raises(UserError, match=words):
        sample_video(tiny_model, frames, steps=1, scale=5, noise=SeededNoise(0, (4, HEIGHT, WIDTH)))
    with pytest.raises(UserError, match=words):
        upscale(random_stream_model(), folder, tmp_path / "out", mode="streaming", steps=1, scale=5)
    assert main(["upscale", str(folder), str(tmp_path / "out"), "--scale", "5", "--shard", "1/2"]) == 2
    assert not (tmp_path / "out.unfinished").exists()
