"""Previews: what they show, what they say, and that they touch nothing else."""

import json
import re
from pathlib import Path

import clips_made as made
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from clips_made import picture, write_video
from stream_models import random_stream_model

from stablevsr import PRESETS, Progress, UserError, sample_video
from stablevsr.cli import main
from stablevsr.engine.outputs import enlarged
from stablevsr.engine.preview import GAP, Crop, _Stopwatch, preview
from stablevsr.media import open_reader
from stablevsr.model import StableVSR
from stablevsr.sampling.resizing import resized


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "in.mp4"
    write_video(path, [picture(18, 24, i) for i in range(5)])
    return path


def halves(shown: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    assert (shown[:, width : width + GAP] == 255).all()
    return shown[:, :width], shown[:, width + GAP :]


def test_a_frame_is_shown_with_the_one_that_guides_it(tiny_model: StableVSR, video: Path) -> None:
    with open_reader(video) as clip:
        images = [frame.image for frame in clip]
        found = preview(tiny_model, clip, 3, steps=2)
    assert found.frames == range(2, 4)
    expected = sample_video(tiny_model, np.stack(images[2:4]), steps=2)
    before, after = halves(found.picture, 96)
    for row, (image, result) in enumerate(zip(images[2:4], expected, strict=True)):
        top = row * (72 + GAP)
        assert np.array_equal(after[top : top + 72], result)
        assert np.array_equal(before[top : top + 72], enlarged(image, False))
    assert found.seconds > 0


def test_a_part_is_shown_with_a_frame_on_either_side(tiny_model: StableVSR, video: Path) -> None:
    with open_reader(video) as clip:
        images = [frame.image[4:12, 6:18] for frame in clip]
        found = preview(tiny_model, clip, 2, Crop(12, 8, 6, 4), steps=1, scene_cuts=(2, 3, 4))
        last = preview(tiny_model, clip, 4, Crop(12, 8, 6, 4), steps=1)
    assert (found.frames, last.frames) == (range(1, 4), range(3, 5))
    _, after = halves(found.picture, 48)
    expected = sample_video(tiny_model, np.stack(images[1:4]), steps=1, scene_cuts=(1, 2))
    assert np.array_equal(after[:32], expected[0])
    assert np.array_equal(after[-32:], expected[2])


def test_the_size_that_is_asked_for_is_that_of_the_preview(tiny_model: StableVSR, video: Path) -> None:
    with open_reader(video) as clip:
        whole = preview(tiny_model, clip, 0, steps=1, height=27)
        part = preview(tiny_model, clip, 0, Crop(12, 8, 0, 0), steps=1, height=27)
        large = preview(tiny_model, clip, 0, steps=1)
    assert whole.frames == range(2)
    assert whole.picture.shape == (2 * 27 + GAP, 2 * 36 + GAP, 3)
    assert part.picture.shape == (2 * 12 + GAP, 2 * 18 + GAP, 3)
    _, after = halves(large.picture, 96)
    _, small = halves(whole.picture, 36)
    expected = resized(torch.from_numpy(np.ascontiguousarray(after[:72])), (27, 36)).numpy()
    assert np.array_equal(small[:27], expected)


def test_streams_and_deep_clips_and_stills(tmp_path: Path, tiny_model: StableVSR) -> None:
    made.deep_image(tmp_path / "in.png", picture(10, 12).astype(np.uint16) * 257, "png", "rgb48le", "rgb48be")
    with open_reader(tmp_path / "in.png") as clip:
        found = preview(tiny_model, clip, 0, steps=1)
    assert found.frames == range(1)
    _, after = halves(found.picture, 48)
    expected = sample_video(tiny_model, picture(10, 12)[None], steps=1)[0]
    assert np.abs(after.astype(int) - expected).max() <= 1
    made.folder_of(tmp_path / "in", ["a.png", "b.png"])
    with open_reader(tmp_path / "in") as clip:
        assert preview(random_stream_model(), clip, 1, config=PRESETS["streaming"], steps=1).seconds > 0


def test_the_estimate_is_that_of_guided_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three frames in two passes; a guided step takes 4 s, another 1 s, and the first of all 100 s."""
    clock = [0.0]
    monkeypatch.setattr("stablevsr.engine.preview.time.monotonic", lambda: clock[0])
    watch = _Stopwatch(None)
    work = [("flow", 9.0), ("flow", 2.0)]
    work += [("denoise", seconds) for seconds in (100.0, 7.0, 4.0, 1.0, 4.0, 4.0)]
    work += [("decode", seconds) for seconds in (5.0, 3.0, 3.0)]
    for phase, seconds in work:
        clock[0] += seconds
        watch(Progress(phase, 1, 1))
    assert watch.estimate(3, frames=10, steps=50) == 10 * (50 * 4.0 + 3.0) + 9 * 2.0


def test_the_estimate_counts_the_steps_that_are_taken(tiny_model: StableVSR, video: Path, monkeypatch) -> None:
    counted = []
    monkeypatch.setattr(_Stopwatch, "estimate", lambda watch, measured, frames, steps: counted.append(steps) or 1.0)
    with open_reader(video) as clip:
        preview(tiny_model, clip, 1, steps=4, strength=0.5)
    assert counted == [2]


def command(*words: object) -> int:
    return main(["upscale", *map(str, words), "--device", "cpu", "--steps", "1"])


def test_the_command(video: Path, tmp_path: Path, tiny_weights: Path, capsys: pytest.CaptureFixture) -> None:
    words = [video, tmp_path / "out.mp4", "--weights", tiny_weights, "--preview"]
    assert command(*words, "2:12x8+6+4") == 0
    told = capsys.readouterr().err
    assert f"wrote {tmp_path / 'out.preview-1.png'}: bicubic interpolation left, the result right, frames 1 to" in told
    assert re.search("the whole run, 5 frames and 1 steps, would take about [0-9]+ s on cpu, judging by this", told)
    first = (tmp_path / "out.preview-1.png").read_bytes()
    assert command(*words, "3", "--frames", "1:4", "--json") == 0
    assert json.loads(capsys.readouterr().out)["frames"] == 3
    assert iio.imread(tmp_path / "out.preview-2.png").shape == (2 * 72 + GAP, 2 * 96 + GAP, 3)
    assert (tmp_path / "out.preview-1.png").read_bytes() == first  # to be compared
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.preview-1.png", "out.preview-2.png"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preview", "5"], "got frame 5 for a preview, expected 0 to 4"),
        (["--preview", "1", "--frames", "2:"], "got frame 1 for a preview, but --frames begins at 2"),
        (["--preview", "1:20x8+6+4"], "got the part 20x8+6+4, expected one inside of 24x18"),
        (["--preview", "1:0x8+6+4"], "got the part 0x8"),
        (["--preview", "1", "--height", "300"], "got height 300 for 24x18, expected at most 16 times"),
    ],
)
def test_places_that_the_clip_does_not_have(
    video: Path, tmp_path: Path, tiny_weights: Path, options: list[str], words: str, capsys, monkeypatch, caplog
) -> None:
    monkeypatch.setattr("stablevsr.engine.preview.sample_video", lambda *_, **__: pytest.fail("the work has begun"))
    if "--height" not in options:
        monkeypatch.setattr("stablevsr.cli.upscale.load", lambda _: pytest.fail("the weights are loaded"))
    assert command(video, tmp_path / "out.mp4", "--weights", tiny_weights, *options) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_previews_do_not_do(video: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for paths in ([video, "-"], [video, tmp_path / "other.mp4", "-o", tmp_path]):
        assert command(*paths, "--preview", "0") == 2
        assert "got --preview with several inputs or a pipe" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(video, tmp_path / "out.mp4", "--preview", "1:2")
    assert "expected FRAME or FRAME:WxH+X+Y" in capsys.readouterr().err


def test_the_end_of_a_clip_that_does_not_say_its_length(video: Path, tiny_model: StableVSR) -> None:
    with open_reader(video) as clip:
        clip.frame_count = None
        with pytest.raises(UserError, match=r"got frame 9 for a preview, but .* ends before it"):
            preview(tiny_model, clip, 9, steps=1)
        assert preview(tiny_model, clip, 4, steps=1).count == 5  # of the packets
        clip.frame_times = lambda: None
        assert preview(tiny_model, clip, 4, steps=1).seconds is None
