"""Streaming as users call it: `stream_video` and `sample_video`, cuts that are found on the way, memory."""

import gc
import logging
import weakref
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from stream_models import convert_recorded, random_stream_model, recorded
from torch import Tensor

from stablevsr import PRESETS, Progress, Stopped, UserError, build_model, sample_video, stream_video
from stablevsr.engine.stream import Stream
from stablevsr.model import StableVSR
from stablevsr.sampling.config import STREAMING
from stablevsr.sampling.cuts import StreamCuts, changes, find_cuts
from stablevsr.sampling.noise import RecordedNoise
from stablevsr.sampling.pictures import in_model_range


@pytest.fixture(scope="module")
def model() -> StableVSR:
    found = random_stream_model()
    found.sampling = STREAMING
    return found


def clip(n: int = 4, height: int = 6, width: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def test_converted_weights_do_the_recorded_case_by_default(tmp_path: Path) -> None:
    """No option given: the file says how it is sampled."""
    expected, options = recorded("case_stream")
    model = build_model(convert_recorded(tmp_path), device="cpu")
    assert model.sampling == STREAMING
    frames = expected["input"].permute(0, 2, 3, 1).contiguous()
    noise = RecordedNoise(expected["init_noise"], expected["init_noise"][None])
    fields = {"prompt": options["prompt"], "tcm_scale": float(options["conditioning_scale"]), "scene_cuts": "off"}
    found = sample_video(model, frames, noise=noise, **fields)
    difference = (found.int() - expected["output_u8"].permute(0, 2, 3, 1).int()).abs()
    assert difference.max() <= 1


@pytest.mark.parametrize("kind", ["numpy", "torch", "float"])
def test_one_by_one_and_as_a_clip_give_the_same_bits(kind: str, model: StableVSR) -> None:
    frames = clip() if kind == "numpy" else torch.from_numpy(clip())
    if kind == "float":
        frames = frames.permute(0, 3, 1, 2) / 255
    whole = sample_video(model, frames, seed=3, color_fix="wavelet")
    found = list(stream_video(model, iter(frames), seed=3, color_fix="wavelet"))
    assert type(whole) is type(frames)
    assert [type(picture) for picture in found] == [type(frames)] * 4
    assert all(np.array_equal(a, b) for a, b in zip(whole, found, strict=True))
    assert whole.shape == ((4, 3, 24, 20) if kind == "float" else (4, 24, 20, 3))


def test_a_frame_goes_out_before_the_next_is_asked_for(model: StableVSR) -> None:
    asked = []

    def camera() -> Iterator[np.ndarray]:
        for index, frame in enumerate(clip()):
            asked.append(index)
            yield frame

    for index, _ in enumerate(stream_video(model, camera(), steps=1)):
        assert asked == list(range(index + 1))


def test_memory_does_not_grow_with_the_stream(model: StableVSR) -> None:
    """What is alive while the stream pauses, after 3 frames and after 12."""
    held, seen = [], []
    frames = stream_video(model, repeat(clip(1)[0], 12), steps=1, scene_cuts="off")
    for picture in frames:
        seen.append(weakref.ref(picture))
        del picture
        gc.collect()
        held.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
    assert held[3] == held[-1]
    assert not any(picture() is not None for picture in seen)


def test_weights_of_stablevsr_stream_with_a_warning(tiny_model: StableVSR, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "stablevsr"):
        found = list(stream_video(tiny_model, clip(2), PRESETS["streaming"]))
    assert len(found) == 2
    assert "not trained for streaming" in caplog.text


def test_progress_and_stopping(model: StableVSR) -> None:
    seen = []
    sample_video(model, clip(3), progress=seen.append)
    assert seen == [Progress("stream", done, 3) for done in (1, 2, 3)]
    with pytest.raises(Stopped):
        sample_video(model, clip(3), progress=lambda progress: progress.done < 2)


def test_bad_options_are_refused_before_the_first_frame(model: StableVSR) -> None:
    def camera() -> Iterator[np.ndarray]:
        raise AssertionError("a frame was asked for")
        yield

    with pytest.raises(UserError, match="no text encoder"):
        stream_video(model, camera(), prompt="a cat")
    with pytest.raises(UserError, match="got stepz"):
        stream_video(model, camera(), stepz=3)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (
            clip(1, 6, 7)[0],
            r"got 7x6 uint8 \(numpy\) for frame 1, expected 5x6 uint8 \(numpy\) as before: a stream keeps size",
        ),
        (torch.zeros(3, 6, 5), r"got 5x6 float32 \(torch on cpu\) for frame 1, expected 5x6 uint8"),
        (clip(1), r"got shape \(1, 6, 5, 3\) for frame 1, expected \(h, w, 3\) uint8 or \(3, h, w\) float"),
        ("picture", "got str for frame 1, expected"),
        (np.full((6, 5, 3), np.nan), "got frames"),
    ],
)
def test_bad_frames_are_told_when_they_come(frame: object, message: str, model: StableVSR) -> None:
    found = stream_video(model, iter([clip(1)[0], frame]), steps=1)
    next(found)
    with pytest.raises(UserError, match=message):
        next(found)


def test_an_empty_stream_gives_nothing(model: StableVSR) -> None:
    assert list(stream_video(model, [])) == []


def test_a_clip_of_another_mode_is_told(model: StableVSR) -> None:
    with pytest.raises(UserError, match="got mode bidirectional for streaming weights"):
        sample_video(model, clip(), PRESETS["exact"])


# ---------------------------------------------------------------------------------------------------------------------
# Cuts


def scenes(*lengths: int, seed: int = 0) -> Tensor:
    """Scenes of slowly drifting pictures, (n, 3, 32, 32) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        picture = torch.rand(3, 8, 8, generator=generator).repeat_interleave(4, 1).repeat_interleave(4, 2) * 2 - 1
        found += [(picture + 0.01 * i).clamp(-1, 1) for i in range(length)]
    return torch.stack(found)


def cuts_in(frames: Tensor) -> list[int]:
    rule = StreamCuts()
    return [i for i in range(1, len(frames)) if rule(i, frames[i], frames[i - 1])]


def test_cuts_are_found_without_looking_ahead() -> None:
    frames = scenes(5, 1, 6, 4)
    assert cuts_in(frames) == [5, 6, 12]
    assert find_cuts(changes(scenes(6, 7))) == cuts_in(scenes(6, 7)) == [6]
    assert cuts_in(scenes(9)) == []


def test_a_fast_pan_is_not_many_cuts() -> None:
    picture = scenes(1)[0].repeat(1, 1, 4)
    pan = torch.stack([picture[..., 8 * i : 8 * i + 32] for i in range(8)])
    assert cuts_in(pan) in ([], [1])


def test_a_stream_that_is_continued_finds_the_same_cuts(model: StableVSR) -> None:
    frames = [in_model_range(frame / 2 + 0.5) for frame in scenes(4, 3, 5)]
    whole = list(Stream(model, STREAMING.with_fields({"steps": 1}), (32, 32)).frames(frames))
    assert [i for i, frame in enumerate(whole) if frame.condition is None] == [0, 4, 7]
    for done in (2, 5, 7, 8):
        again = Stream(model, STREAMING.with_fields({"steps": 1}), (32, 32))
        first = max(0, done - 4)
        again.recall(first, frames[first:done])
        rest = list(again.frames(frames[done:], whole[done - 1].state))
        for a, b in zip(rest, whole[done:], strict=True):
            assert torch.equal(a.state.picture, b.state.picture)
