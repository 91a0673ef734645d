"""Results of any size: exact sides, true pictures, the right shape, for every kind of output and in Python."""

import io
import re
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

import av
import clips_made as made
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from clips_made import picture, write_video
from stream_models import random_stream_model

from stablevsr import SamplingConfig, Stopped, UserError, sample_video, stream_video, upscale
from stablevsr.cli import main
from stablevsr.engine.outputs import Writers, needs_even_sides
from stablevsr.engine.workspace import open_workspace, workspace_path
from stablevsr.media import Encoding, Frame, PartReader, open_reader, open_writer
from stablevsr.media.pipe import PipeReader, PipeWriter
from stablevsr.model import StableVSR
from stablevsr.sampling.resizing import output_size, pixel_aspect, resized


@pytest.mark.parametrize(
    ("fields", "even", "expected"),
    [
        ({}, False, (244, 324)),
        ({"scale": 2}, False, (122, 162)),
        ({"scale": 3}, False, (183, 243)),
        ({"scale": 3}, True, (184, 244)),  # 183 and 243 lie between two even numbers: the larger
        ({"scale": 4}, True, (244, 324)),
        ({"scale": 1.5}, False, (92, 122)),  # 91.5 and 121.5
        ({"scale": 0.001}, False, (1, 1)),
        ({"height": 108}, False, (108, 143)),  # 143.4
        ({"height": 108}, True, (108, 144)),
        ({"height": 244}, True, (244, 324)),
        ({"size": "99x57"}, False, (57, 99)),
        ({"size": (100, 58)}, True, (58, 100)),
    ],
)
def test_sizes_are_exact(fields: dict, even: bool, expected: tuple[int, int]) -> None:
    assert output_size(SamplingConfig(**fields), 61, 81, even) == expected


@pytest.mark.parametrize(
    ("fields", "even", "words"),
    [
        ({"scale": 0.0}, False, "got scale 0.0, expected a number above 0"),
        ({"scale": -2.0}, False, "got scale -2.0"),
        ({"scale": float("nan")}, False, "scale is nan"),
        ({"height": 0}, False, "got height 0, expected 1 or more"),
        ({"height": 2.5}, False, "height is 2.5, expected int"),
        ({"size": "0x10"}, False, "got size '0x10', expected WIDTHxHEIGHT in pixels, as in 1920x1080"),
        ({"size": "10"}, False, "got size '10', expected WIDTHxHEIGHT"),
        ({"size": "-4x8"}, False, "got size '-4x8'"),
        ({"size": (4, 8, 9)}, False, "got size '4x8x9'"),
        ({"scale": 2.0, "height": 8}, False, "got scale 2.0 and height 8, expected one of them"),
        (
            {"scale": 4.1},
            False,
            "got scale 4.1 for 81x61, expected at most 4 times as large, 324x244, in streaming mode and on several "
            "machines: for more, upscale the result once more",
        ),
        ({"height": 245}, False, "got height 245 for 81x61, expected at most 4 times"),
        ({"size": "325x10"}, False, "got size 325x10 for 81x61, expected at most 4 times"),
        ({"height": 107}, True, "got height 107 for a video, whose sides must be even: use 108"),
        ({"scale": 0.001}, True, "got scale 0.001, which is 2x2, for a video, whose sides must be at least 4"),
        ({"size": "99x57"}, True, "got size 99x57 for a video, whose sides must be even: use 100x58"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(fields: dict, even: bool, words: str) -> None:
    with pytest.raises(UserError, match=words):
        output_size(SamplingConfig(**fields), 61, 81, even)


@pytest.mark.parametrize(
    ("aspect", "size", "expected"),
    [
        (Fraction(64, 45), (1080, 1920), Fraction(1)),  # a widescreen DVD to square pixels
        (Fraction(64, 45), (1152, 1440), Fraction(64, 45)),
        (Fraction(1), (480, 600), Fraction(1)),  # the same shape
        (Fraction(1), (482, 602), Fraction(1)),  # to the pixel: 602.5
        (Fraction(1), (480, 480), Fraction(5, 4)),
    ],
)
def test_players_show_the_shape_of_the_input(aspect: Fraction, size: tuple[int, int], expected: Fraction) -> None:
    assert pixel_aspect(aspect, (576, 720), size) == expected


def waves(height: int, width: int, top: float) -> np.ndarray:
    """A smooth pattern of three channels, (height, width, 3) in [0, top], that says its value at any point."""
    y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    phases = [(1, 2), (2, 1), (1, 3)]
    return np.stack(
        [0.5 + 0.4 * np.cos(np.pi * a * y)[:, None] * np.cos(np.pi * b * x)[None] for a, b in phases], axis=-1
    ) * (top)


@pytest.mark.parametrize("size", [(122, 162), (183, 243), (108, 143), (61, 81), (57, 99), (243, 323)], ids=str)
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_a_smooth_pattern_stays_true(size: tuple[int, int], kind: type) -> None:
    """Cosines are mirrored at the border, as no filter that is cut there is: so the bound holds there too."""
    top = 1.0 if kind is np.float32 else float(np.iinfo(kind).max)
    large, expected = waves(244, 324, top), waves(*size, top)
    if kind is np.float32:
        found = resized(torch.from_numpy(large.astype(kind)).permute(2, 0, 1), size).permute(1, 2, 0).numpy()
    else:
        found = resized(torch.from_numpy(large.round().astype(kind)), size).numpy()
    assert (found.shape, found.dtype) == ((*size, 3), kind)
    # Near the fourfold size, the roundings of the input to 8 bits do not average out.
    bound = 1.5 if kind is np.uint8 and size == (243, 323) else 1.0
    assert np.abs(found - expected).max() / top < bound / 255
    if kind is not np.uint8:  # no 8 bits on the way
        assert np.abs(found - expected)[8:-8, 8:-8].max() / top < 0.1 / 255


def test_stripes_too_fine_for_the_result_become_gray() -> None:
    """Those of three pixels do not survive one fourth of the size; without antialiasing they would become broad."""
    stripes = (np.arange(320) % 3 == 0)[None, :, None] * np.full((320, 1, 3), 255.0)
    found = resized(torch.from_numpy(stripes.astype(np.uint8)), (80, 80)).numpy().astype(float)
    assert np.abs(found[4:-4, 4:-4] - 85).max() < 6


def test_an_edge_stays_where_it_is() -> None:
    step = np.zeros((64, 64, 3), np.uint8)
    step[:, 32:] = 200
    found = resized(torch.from_numpy(step), (48, 48)).numpy()[24, :, 0].astype(float)
    assert abs(found.sum() - 24 * 200) < 100  # half of a pixel
    assert found[:20].max() < 12
    assert found[28:].min() > 188


def size_of(path: Path) -> tuple[int, int, Fraction]:
    with open_reader(path) as clip:
        assert len(list(clip)) == 3
        return clip.width, clip.height, clip.sample_aspect_ratio


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three frames of 24x18, with pixels of 4:3."""
    path = tmp_path_factory.mktemp("clip") / "in.mp4"
    write_video(path, [picture(18, 24, i) for i in range(3)], aspect=Fraction(4, 3))
    return path


@pytest.mark.parametrize(
    ("fields", "name", "expected"),
    [
        ({"scale": 2}, "out.mp4", (48, 36, Fraction(4, 3))),
        ({"scale": 3}, "out.mkv", (72, 54, Fraction(4, 3))),
        ({"height": 50}, "out.mov", (66, 50, Fraction(4, 3))),  # 66.7
        ({"size": (96, 54)}, "out.mp4", (96, 54, Fraction(1))),
        ({"scale": 2.3}, "out.avi", (56, 42, Fraction(4, 3))),  # 55.2 x 41.4
    ],
)
def test_videos(fields: dict, name: str, expected: tuple, video: Path, tmp_path: Path) -> None:
    """Without a model: what is written is the writers' work."""
    output, pair = tmp_path / name, tmp_path / "pair.mkv"
    with ExitStack() as stack:
        clip = stack.enter_context(open_reader(video))
        size = output_size(SamplingConfig(**fields), clip.height, clip.width, needs_even_sides(output, pair))
        workspace = stack.enter_context(open_workspace(output))
        with ExitStack() as opened:
            writers = Writers.open(opened, workspace, clip, output, pair, None, False, size)
            for frame in clip:
                writers.write(torch.zeros(72, 96, 3, dtype=torch.uint8), frame)
    assert size_of(output) == expected
    assert size_of(pair) == (2 * expected[0], *expected[1:])


def test_the_command(video: Path, tmp_path: Path, tiny_weights: Path, capsys: pytest.CaptureFixture) -> None:
    line = [video, tmp_path / "out.mp4", "--weights", tiny_weights, "--steps", "1", "--device", "cpu"]
    assert main(["upscale", *map(str, line), "--frames", "0:1", "--height", "50"]) == 0
    assert "(24x18) to" in (told := capsys.readouterr().err)
    assert "out.mp4 (66x50), 1 steps" in told
    with open_reader(tmp_path / "out.mp4") as clip:
        assert (clip.width, clip.height) == (66, 50)


def test_a_video_is_the_fourfold_one_resized(tiny_model: StableVSR, video: Path, tmp_path: Path) -> None:
    lossless = Encoding("ffv1")
    with open_reader(video) as whole:
        for name, scale in (("large.mkv", None), ("small.mkv", 2.5)):
            upscale(tiny_model, PartReader(whole, 0, 1), tmp_path / name, steps=1, encoding=lossless, scale=scale)
    with open_reader(tmp_path / "large.mkv") as large, open_reader(tmp_path / "small.mkv") as small:
        for before, after in zip(large, small, strict=True):
            assert np.array_equal(resized(torch.from_numpy(before.image), (46, 60)).numpy(), after.image)


@pytest.mark.parametrize("shape", [(9, 7, 3), (9, 7, 4)])
def test_stills_keep_16_bits_and_alpha(shape: tuple, tiny_model: StableVSR, tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 65536, shape, dtype=np.uint16)
    form = "rgb48" if shape[2] == 3 else "rgba64"
    made.deep_image(tmp_path / "in.png", image, "png", f"{form}le", f"{form}be")
    for name, scale in (("large.png", None), ("small.png", 3.0)):
        upscale(tiny_model, tmp_path / "in.png", tmp_path / name, steps=1, scale=scale)
    large, small = (read_raw(tmp_path / name) for name in ("large.png", "small.png"))
    assert (small.shape, small.dtype) == ((27, 21, shape[2]), np.uint16)
    assert np.array_equal(resized(torch.from_numpy(large), (27, 21)).numpy(), small)
    assert len(np.unique(small % 257)) > 200  # not 8 bits that were spread


def read_raw(path: Path) -> np.ndarray:
    """(h, w, 3 or 4) uint16 as FFmpeg reads it, alpha and all."""
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        return frame.to_ndarray(format="rgba64le" if "a" in frame.format.name else "rgb48le")


def test_a_folder_and_a_shape_of_its_own(tiny_model: StableVSR, tmp_path: Path, caplog) -> None:
    made.folder_of(tmp_path / "in", ["a.png", "b.png"])
    upscale(tiny_model, tmp_path / "in", tmp_path / "out", steps=1, size=(50, 31))
    assert {path.name: iio.imread(path).shape for path in (tmp_path / "out").iterdir()} == {
        "a.png": (31, 50, 3),
        "b.png": (31, 50, 3),
    }
    assert "out looks stretched: its pixels are " in caplog.text


def test_pipes(tmp_path: Path) -> None:
    stream = made_stream(5, 7)
    with PipeReader(io.BytesIO(stream)) as clip:
        sent = io.BytesIO()
        writer = PipeWriter(clip, 14, 20, sent, Fraction(3, 2))
        Writers(writer, (14, 20)).write(torch.zeros(20, 28, 3, dtype=torch.uint8), Frame(np.zeros((5, 7, 3), np.uint8)))
    with PipeReader(io.BytesIO(sent.getvalue())) as result:
        assert (result.height, result.width, result.sample_aspect_ratio) == (14, 20, Fraction(3, 2))
        assert len(list(result)) == 1


def made_stream(height: int, width: int) -> bytes:
    return f"YUV4MPEG2 W{width} H{height} F25:1 Ip A1:1 C444\nFRAME\n".encode() + bytes(3 * height * width)


@pytest.mark.parametrize("mode", ["bidirectional", "streaming"])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_python_has_it_too(mode: str, kind: type, tiny_model: StableVSR) -> None:
    model = tiny_model if mode == "bidirectional" else random_stream_model()
    frames = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 3), dtype=np.uint8)
    if kind is np.float32:
        frames = np.moveaxis(frames, -1, 1).astype(kind) / 255
    fields = {"mode": mode, "steps": 1}
    large, small = (sample_video(model, frames, **fields, scale=scale) for scale in (None, 2))
    expected = [resized(torch.from_numpy(frame), (12, 16)).numpy() for frame in large]
    assert np.array_equal(np.stack(expected), small)
    if mode == "streaming":
        assert np.array_equal(np.stack(list(stream_video(model, frames, **fields, height=12))), small)


def stop_after(phase: str, done: int):
    return lambda progress: not (progress.phase == phase and progress.done == done)


def test_the_size_may_change_until_the_result_is_written(tiny_model: StableVSR, tmp_path: Path) -> None:
    made.folder_of(tmp_path / "in", ["a.png", "b.png"])
    with pytest.raises(Stopped):
        upscale(tiny_model, tmp_path / "in", tmp_path / "out", steps=1, scale=2, progress=stop_after("write", 1))
    upscale(tiny_model, tmp_path / "in", tmp_path / "out", steps=1, scale=3)
    upscale(tiny_model, tmp_path / "in", tmp_path / "again", steps=1, scale=3)
    for name in ("a.png", "b.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_stream_goes_on_at_its_size_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stablevsr.engine.store.SAVE_EVERY", -1.0)
    model = random_stream_model()
    made.folder_of(tmp_path / "in", ["a.png", "b.png"])
    call = {"mode": "streaming", "steps": 1, "scale": 2}
    with pytest.raises(Stopped):
        upscale(model, tmp_path / "in", tmp_path / "out", **call, progress=stop_after("stream", 1))
    with pytest.raises(UserError, match=r"another scale \(2, now None\)"):
        upscale(model, tmp_path / "in", tmp_path / "out", mode="streaming", steps=1)
    upscale(model, tmp_path / "in", tmp_path / "out", **call)
    upscale(model, tmp_path / "in", tmp_path / "again", **call)
    for name in ("a.png", "b.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("out.mp4", ["--scale", "0"], "got scale 0.0, expected a number above 0"),
        ("out.mp4", ["--height", "290"], "got height 290 for 24x18, expected at most 16 times as large, 384x288: for"),
        ("out.mp4", ["--height", "35"], "must be even: use 36"),
        ("out.mp4", ["--size", "big"], "got size 'big', expected WIDTHxHEIGHT"),
        ("out.mp4", ["--size", "4x2", "--codec", "av1"], "which is 4x2, for a video, whose sides must be at least 4"),
    ],
)
def test_bad_sizes_are_one_sentence_before_the_work(
    name: str, options: list[str], words: str, video: Path, tmp_path: Path, tiny_weights: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("stablevsr.engine.upscale.fingerprint", lambda *_: pytest.fail("the work has begun"))
    line = [video, tmp_path / name, "--weights", tiny_weights, "--steps", "1", "--device", "cpu", *options]
    assert main(["upscale", *map(str, line)]) == 2
    said = [each for each in capsys.readouterr().err.splitlines() if "note: " not in each and " steps on " not in each]
    assert len(said) == 1
    assert re.search(words, said[0])
    assert list(tmp_path.iterdir()) == []
    assert not workspace_path(tmp_path / name).exists()


def test_a_size_that_the_encoder_refuses_is_named(tmp_path: Path) -> None:
    iio.imwrite(tmp_path / "in.png", np.zeros((4, 5000, 3), np.uint8))
    said = r"by libx264 at 20000x16 .*another size"
    with open_reader(tmp_path / "in.png") as clip, pytest.raises(UserError, match=said):
        open_writer(tmp_path / "out.mp4", clip, height=16, width=20000)
