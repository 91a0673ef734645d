"""Video through pipes: what is read and written, by FFmpeg's own judgement, and the command between two programs."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from clips_made import write_video
from stream_models import TINY_STREAM, random_stream_model

from stablevsr import PRESETS, UserError, build_model, sample_video, upscale
from stablevsr.errors import IncompleteOutput
from stablevsr.media import Encoding, PartReader, open_reader
from stablevsr.media.frame import Reader
from stablevsr.media.pipe import PIXEL_FORMATS, PipeReader, PipeWriter
from stablevsr.model import StableVSR
from stablevsr.sampling.config import STREAMING
from stablevsr.weights import Header, write

FORMATS = sorted({*PIXEL_FORMATS.values()})


def picture(height: int = 6, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_ffmpeg_writes(pixel_format: str, frames: list[np.ndarray], full: bool = False) -> bytes:
    """yuv4mpegpipe from FFmpeg itself."""
    target = io.BytesIO()
    height, width = frames[0].shape[:2]
    with av.open(target, "w", format="yuv4mpegpipe", options={"strict": "-1"}) as output:
        stream = output.add_stream("wrapped_avframe", rate=Fraction(30000, 1001))
        stream.height, stream.width, stream.pix_fmt = height, width, pixel_format
        stream.codec_context.color_range = 2 if full else 1
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame = frame.reformat(format=pixel_format, dst_color_range="JPEG" if full else "MPEG")
            frame.pts = i
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return target.getvalue()


def y4m(words: str = "W2 H2 F25:1 Ip A1:1 C420", frames: int = 1, size: int = 6) -> bytes:
    return f"YUV4MPEG2 {words}\n".encode() + b"".join(b"FRAME\n" + bytes([40 + i] * size) for i in range(frames))


def images(stream: bytes) -> list[np.ndarray]:
    with PipeReader(io.BytesIO(stream)) as reader:
        return [frame.image for frame in reader]


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("pixel_format", FORMATS)
def test_a_pipe_is_read_as_the_file_would_be(pixel_format: str, full: bool, tmp_path: Path) -> None:
    """Sizes are odd: chroma is then larger than half."""
    stream = as_ffmpeg_writes(pixel_format, [picture(7, 9, seed) for seed in range(3)], full)
    (tmp_path / "file.y4m").write_bytes(stream)
    with PipeReader(io.BytesIO(stream)) as pipe, open_reader(tmp_path / "file.y4m") as file:
        assert (pipe.height, pipe.width, pipe.is_deep) == (file.height, file.width, file.is_deep)
        assert pipe.frame_rate == file.frame_rate == Fraction(30000, 1001)
        frames, expected = list(pipe), list(file)
    assert len(frames) == len(expected) == 3
    for ours, theirs in zip(frames, expected, strict=True):
        assert ours.pts * ours.time_base == pytest.approx(theirs.pts * theirs.time_base)
        assert ours.image.dtype == theirs.image.dtype
        assert np.array_equal(ours.image, theirs.image)


def test_what_the_header_says() -> None:
    with PipeReader(io.BytesIO(y4m("W2 H2 F24000:1001 Ip A10:11 C420mpeg2 XYSCSS=420MPEG2 XCOLORRANGE=FULL"))) as pipe:
        assert (pipe.frame_rate, pipe.sample_aspect_ratio) == (Fraction(24000, 1001), Fraction(10, 11))
        assert pipe.notices == []
        assert next(iter(pipe)).image[0, 0, 1] > 0
    with PipeReader(io.BytesIO(y4m("W2 H2 F3000000000:100000001 A1:9999999999"))) as pipe:  # beyond FFmpeg's numbers
        assert (pipe.frame_rate, pipe.sample_aspect_ratio) == (25, 1)
    with PipeReader(io.BytesIO(y4m("W2 H2"))) as pipe:
        assert (pipe.frame_rate, pipe.sample_aspect_ratio) == (25, 1)
        assert len(list(pipe)) == 1
    with PipeReader(io.BytesIO(y4m("H2 W2 F0:0 A0:0 It"))) as pipe:
        assert (pipe.frame_rate, pipe.sample_aspect_ratio) == (25, 1)
        assert "is interlaced; its frames are taken as they are: add -vf bwdif" in pipe.notices[0]


def test_limited_gray_is_stretched() -> None:
    assert images(y4m("W2 H2 Cmono XCOLORRANGE=LIMITED", size=4))[0].max() == round((40 - 16) * 255 / 219)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (b"", "standard input holds no yuv4mpegpipe video: write it with ffmpeg -i INPUT -f yuv4mpegpipe"),
        (b"\x00\x00\x00\x20ftypisom" * 1000, "holds no yuv4mpegpipe video"),
        (y4m("W0 H2"), "the header of standard input gives W0, expected a size"),
        (y4m("H2"), "the header of standard input gives W not at all, expected a size"),
        (y4m("W2 Hx"), "gives Hx, expected a size"),
        (y4m("W99999 H99999"), "standard input is 99999x99999, but at most"),
        (
            y4m("W2 H2 C444alpha"),
            "has the pixel format 444alpha, which is not read: add -pix_fmt yuv420p to",
        ),
    ],
)
def test_what_cannot_be_read_is_told_at_once(stream: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PipeReader(io.BytesIO(stream))


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (b"FRAME\nabc", r"standard input ends in the middle of frame 3 \(3 of 6 bytes\): the 2 before it are done"),
        (b"FRAME", r"ends in the middle of frame 3 \(0 of 6 bytes\)"),
        (y4m("W4 H4", size=24), "frame 2 of standard input is followed by another video, expected a frame of the same"),
        (b"abc\n", "frame 2 of standard input is followed by something else"),
        (b"\n" + y4m()[-12:], "frame 2 of standard input is followed by something else"),
        (b"\n", "frame 2 of standard input is followed by something else"),
    ],
)
def test_where_a_stream_breaks_off_is_told(end: bytes, message: str) -> None:
    with PipeReader(io.BytesIO(y4m(frames=2) + end)) as pipe:
        frames = iter(pipe)
        next(frames), next(frames)
        with pytest.raises(IncompleteOutput, match=message):
            next(frames)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def source(tmp_path: Path, stream: bytes | None = None) -> Reader:
    if stream is not None:
        return PipeReader(io.BytesIO(stream))
    write_video(tmp_path / "in.mkv", [picture(), picture()])
    return open_reader(tmp_path / "in.mkv")


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv422p", "yuv444p", "yuv444p10le", "yuv420p12le", "gray"])
def test_what_is_written_ffmpeg_reads(pixel_format: str, tmp_path: Path) -> None:
    """Like the source where it came through a pipe; gray becomes 4:2:0."""
    smooth = np.linspace(40, 200, 3 * 24 * 32).reshape(24, 32, 3)
    with source(tmp_path, as_ffmpeg_writes(pixel_format, [picture()])) as reader:
        target = io.BytesIO()
        writer, frame = PipeWriter(reader, 24, 32, target), next(iter(reader))
        image = (smooth * 257).astype(np.uint16) if writer.is_deep else smooth.astype(np.uint8)
        with writer:
            writer.write(image, frame)
            writer.write(image, frame)
    (tmp_path / "out.y4m").write_bytes(target.getvalue())
    with av.open(str(tmp_path / "out.y4m")) as file:
        stream = file.streams.video[0]
        assert stream.codec_context.pix_fmt == ("yuv420p" if pixel_format == "gray" else pixel_format)
        assert (stream.width, stream.height, stream.average_rate) == (32, 24, Fraction(30000, 1001))
        assert len(list(file.decode(stream))) == 2
    with open_reader(tmp_path / "out.y4m") as file:
        found = next(iter(file)).image
    scale = 257 if writer.is_deep else 1
    assert np.abs(found.astype(float) - image).max() <= 3 * scale


def test_the_matrix_goes_by_the_size_in_both_directions(tmp_path: Path) -> None:
    """A pipe does not say which, so that a result of 720 lines must be what is taken for BT.709."""
    red = np.zeros((720, 16, 3), np.uint8) + np.array([200, 30, 40], np.uint8)
    with source(tmp_path) as reader:
        target = io.BytesIO()
        PipeWriter(reader, 720, 16, target).write(red, next(iter(reader)))
    found = images(target.getvalue())[0]
    assert np.abs(found.astype(int) - red).max() <= 3


def test_a_part_of_a_pipe_goes_out_in_its_format() -> None:
    target = io.BytesIO()
    with PipeReader(io.BytesIO(y4m("W2 H2 C444", frames=3, size=12))) as reader:
        part = PartReader(reader, 1, 3)
        frame = next(iter(part))
        PipeWriter(part, 2, 2, target).write(frame.image, frame)
    assert b" C444 " in target.getvalue().splitlines()[0]


class Narrow(io.BytesIO):
    """A stream that takes a few bytes at a time."""

    def write(self, data: bytes) -> int:
        return super().write(data[:7])


def test_a_stream_that_takes_a_part_gets_the_rest(tmp_path: Path) -> None:
    narrow, wide = Narrow(), io.BytesIO()
    with source(tmp_path) as reader:
        for target in (narrow, wide):
            frame = next(iter(reader))
            PipeWriter(reader, 6, 8, target).write(frame.image, frame)
    assert narrow.getvalue() == wide.getvalue()


def test_what_a_pipe_leaves_out_is_told(tmp_path: Path) -> None:
    with source(tmp_path) as reader:
        reader.has_audio = reader.has_alpha = True
        writer = PipeWriter(reader, 24, 32, io.BytesIO())
    assert "no sound" in writer.notices[0]
    assert "no transparency" in writer.notices[1]


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipe") / "tiny.safetensors"
    write(path, Header(TINY_STREAM, {"note": "random"}, sampling=STREAMING), random_stream_model().state_dict())
    return path


@pytest.fixture(scope="module")
def stream() -> bytes:
    return as_ffmpeg_writes("yuv444p", [picture(seed=seed) for seed in range(4)])


def command(*words: object, **options: object) -> subprocess.Popen:
    line = [sys.executable, "-m", "stablevsr", "upscale", "-q", *map(str, words)]
    kinds = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(line, env=environment, bufsize=0, **kinds)


def test_a_pipe_gives_what_a_file_gives(weights: Path, stream: bytes, tmp_path: Path) -> None:
    (tmp_path / "in.y4m").write_bytes(stream)
    # By the command, too: bits depend on the number of threads.
    with command(tmp_path / "in.y4m", tmp_path / "file.mkv", "--codec", "ffv1", "--weights", weights) as process:
        process.communicate(timeout=120)
    with command("-", tmp_path / "pipe.mkv", "--codec", "ffv1", "--weights", weights) as process:
        _, told = process.communicate(stream, timeout=120)
    assert (process.returncode, told) == (0, b"stablevsr: note: random\n")
    expected = [frame.image for frame in open_reader(tmp_path / "file.mkv")]
    found = [frame.image for frame in open_reader(tmp_path / "pipe.mkv")]
    assert len(expected) == 4
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))
    with command("-", "-", "--weights", weights) as process:
        output, _ = process.communicate(stream, timeout=120)
    with command(tmp_path / "in.y4m", "-", "--weights", weights, stdin=subprocess.DEVNULL) as process:
        again, _ = process.communicate(timeout=120)
    assert [image.shape for image in images(output)] == [(24, 32, 3)] * 4
    assert sum(len(image) for image in images(again)) == 4 * 24


def frames_of(pipe: io.RawIOBase, size: int) -> Iterator[bytes]:
    """The frames from a pipe, each as soon as it is there."""
    pipe.readline()
    while pipe.readline() == b"FRAME\n":
        data = b""
        while len(data) < size:
            data += pipe.read(size - len(data))
        yield data


def test_a_frame_is_out_before_the_next_but_one_is_in(weights: Path, stream: bytes) -> None:
    header, *frames = stream.split(b"FRAME\n")
    with command("-", "-", "--weights", weights) as process:
        watchdog = threading.Timer(120, process.kill)
        watchdog.start()
        process.stdin.write(header)
        found = frames_of(process.stdout, 3 * 24 * 32)
        for frame in frames:
            process.stdin.write(b"FRAME\n" + frame)
            assert next(found)  # waits for ever where a frame is held back
        process.stdin.close()
        assert next(found, None) is None
        assert process.wait(120) == 0
        watchdog.cancel()


def test_a_reader_that_closes_ends_the_run_quietly(weights: Path, stream: bytes) -> None:
    frame = stream.split(b"FRAME\n")[1]
    with command("-", "-", "--weights", weights, "-q") as process:
        process.stdin.write(stream)
        next(frames_of(process.stdout, 3 * 24 * 32))
        process.stdout.close()
        try:
            while process.poll() is None:
                process.stdin.write(b"FRAME\n" + frame)
                time.sleep(0.01)
        except BrokenPipeError:
            pass
        assert process.wait(60) == 1
        assert process.stderr.read() == b""


def test_a_stream_that_is_cut_keeps_what_is_done(weights: Path, stream: bytes, tmp_path: Path) -> None:
    for target in ("-", tmp_path / "out.mkv"):
        with command("-", target, "--weights", weights, "-q") as process:
            output, told = process.communicate(stream[:-7], timeout=120)
        assert process.returncode == 1
        assert told.decode().startswith("stablevsr: standard input ends in the middle of frame 4 (137 of 144 bytes)")
        assert told.decode().endswith("3 frames are written\n")
        found = images(output) if target == "-" else list(open_reader(target))
        assert len(found) == 3


class InterruptedAtTheEnd(io.BytesIO):
    """A pipe that stays open, and Ctrl-C while the run waits for more."""

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        if not data:
            raise KeyboardInterrupt
        return data


def test_ctrl_c_keeps_what_is_done(weights: Path, stream: bytes, tmp_path: Path) -> None:
    model = build_model(weights, device="cpu")
    interrupted = pytest.raises(IncompleteOutput, match="interrupted; 4 frames are written")
    with PipeReader(InterruptedAtTheEnd(stream)) as reader, interrupted:
        upscale(model, reader, tmp_path / "out.mkv")
    assert len(list(open_reader(tmp_path / "out.mkv"))) == 4


def test_ctrl_c_ends_a_run_that_waits_for_more(weights: Path, stream: bytes) -> None:
    with command("-", "-", "--weights", weights) as process:
        process.stdin.write(stream)
        found = frames_of(process.stdout, 3 * 24 * 32)
        for _ in range(4):
            next(found)
        time.sleep(0.5)  # now it waits
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 1
        assert re.search(rb"interrupted; [34] frames are written\n$", process.stderr.read())


def test_what_is_missing_in_a_file_from_a_pipe_is_told(weights: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("stablevsr.media.video_writer.write_display_size", lambda *arguments: False)
    said = pytest.raises(IncompleteOutput, match="but not all of it: it does not say that its pixels are 1")
    with PipeReader(io.BytesIO(y4m("W8 H6 F25:1 A4:3 C420", size=72))) as reader, said:
        upscale(build_model(weights, device="cpu"), reader, tmp_path / "out.mkv", encoding=Encoding("ffv1"))
    assert len(list(open_reader(tmp_path / "out.mkv"))) == 1


def test_a_pipe_warns_as_a_file_does(tiny_model: StableVSR, stream: bytes, tmp_path: Path, caplog) -> None:
    with PipeReader(io.BytesIO(stream)) as reader:
        upscale(tiny_model, reader, tmp_path / "out.mkv", PRESETS["streaming"], steps=1)
    assert "not trained for streaming" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-", "-", "--mode", "bidirectional", "--steps", "2"], "got mode bidirectional for streaming weights"),
        (["-", "out.png"], "got out.png with a pipe, which carries one video only: omit it"),
        (["-", "-", "--json"], "standard output cannot take both the video and what --json prints"),
        (["-", "in.mp4", "-o", "."], "got - among several inputs, but a pipe carries one video"),
        (["-", "-", "--side-by-side", "pair.mp4"], "got pair.mp4 with a pipe, which carries one video only: omit it"),
    ],
)
def test_what_pipes_do_not_do(weights: Path, stream: bytes, words: list[str], message: str, tmp_path: Path) -> None:
    with command(*words, "--weights", weights, cwd=tmp_path) as process:
        _, told = process.communicate(stream, timeout=120)
    assert process.returncode == 2
    assert message in told.decode()


def test_a_model_that_needs_all_frames_takes_no_pipe(tiny_weights: Path, stream: bytes) -> None:
    with command("-", "-", "--weights", tiny_weights) as process:
        _, told = process.communicate(stream, timeout=120)
    assert process.returncode == 2
    assert (
        "got mode bidirectional for a pipe, but it needs all frames before the first is done: use mode" in told.decode()
    )


def test_terminals_are_no_pipes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    with pytest.raises(UserError, match="standard input is a terminal, expected video from a pipe"):
        PipeReader()
    monkeypatch.setattr(sys, "stdout", type("Terminal", (), {"isatty": lambda self: True})())
    with source(tmp_path) as reader, pytest.raises(UserError, match="standard output is a terminal"):
        PipeWriter(reader, 4, 4)


@pytest.mark.parametrize("kind", ["none", "closed", "notebook"])
def test_closed_streams_are_no_pipes(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with open(os.devnull) as closed:
        pass
    for name in ("stdin", "stdout"):
        monkeypatch.setattr(sys, name, {"none": None, "closed": closed, "notebook": io.StringIO()}[kind])
    with pytest.raises(UserError, match="standard input is closed, expected video from a pipe"):
        PipeReader()
    with source(tmp_path) as reader, pytest.raises(UserError, match="standard output is closed: add"):
        PipeWriter(reader, 4, 4)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no disk that is always full")
def test_a_disk_that_is_full_of_what_is_written(tmp_path: Path) -> None:
    with source(tmp_path) as reader, open("/dev/full", "wb", buffering=0) as full:
        writer, frame = PipeWriter(reader, 6, 8, full), next(iter(reader))
        with pytest.raises(UserError, match=r"standard output could not be written \(No space left on device\)"):
            writer.write(frame.image, frame)


@pytest.mark.parametrize(
    ("words", "closed", "code", "message"),
    [
        ("models", "0<&- 1>&- 2>&-", 0, ""),
        ("upscale - out.mkv", "0<&-", 2, "standard input is closed, expected video from a pipe"),
        ("upscale in.mkv out.mkv", "0<&- 1>&-", 2, "input in.mkv does not exist"),
        ("upscale in.mkv out.mkv", "2>&-", 2, ""),
        ("models", "> /dev/full", 1, "No space left on device"),
        ("upscale in.y4m - --weights small-streaming -q", "> /dev/full", 2, "standard output could not be written"),
    ],
)
def test_the_command_without_standard_streams(words: str, closed: str, code: int, message: str, tmp_path: Path) -> None:
    """A file that is opened gets the number of no stream: what libraries print would end up inside."""
    (tmp_path / "in.y4m").write_bytes(y4m())
    program = "import os, sys; from stablevsr.cli import main; code = main(sys.argv[1:]); "
    program += "sys.exit(code if os.open(os.devnull, os.O_RDONLY) > 2 else 77)"
    line = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", program, *words.split()]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(line, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == code
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == (message != "")


def test_python_may_give_a_reader_of_its_own(weights: Path, stream: bytes, tmp_path: Path) -> None:
    model = build_model(weights, device="cpu")
    with PipeReader(io.BytesIO(stream)) as reader:
        assert upscale(model, reader, tmp_path / "out.mkv", encoding=Encoding("ffv1")) == 4
    found = np.stack([frame.image for frame in open_reader(tmp_path / "out.mkv")])
    assert np.array_equal(found, sample_video(model, np.stack(images(stream))))
