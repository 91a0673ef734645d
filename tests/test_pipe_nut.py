"""NUT through pipes: frames with their times, compressed or not, without delay."""

import io
import os
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from media_tools import picture_times
from stream_models import random_stream_model

from stablevsr import UserError, upscale
from stablevsr.errors import IncompleteOutput
from stablevsr.media import open_reader
from stablevsr.media.nut import NutReader, open_pipe
from stablevsr.media.pipe import PipeReader, PipeWriter
from stablevsr.sampling.config import STREAMING

TIMES = (0, 3, 4, 9)  # in units of a thousandth of a second


class Sink:
    """What a program writes into a pipe."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> int:
        self.data += bytes(data)
        return len(data)


def picture(seed: int, height: int = 18, width: int = 22) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def nut(codec: str = "rawvideo", pixel_format: str = "yuv420p", sound: bool = False, **sizes: int) -> list[bytes]:
    """NUT from FFmpeg itself, in pieces: the header with the first frame, the other frames, the end."""
    sink, ends = Sink(), []
    with av.open(sink, "w", format="nut", options={"flush_packets": "1"}) as output:
        stream = output.add_stream(codec, rate=1000)
        stream.height, stream.width, stream.pix_fmt = *picture(0, **sizes).shape[:2], pixel_format
        if sound:
            output.add_stream("pcm_s16le", rate=8000)
        for seed, time in enumerate(TIMES):
            frame = av.VideoFrame.from_ndarray(picture(seed, **sizes), format="rgb24").reformat(format=pixel_format)
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            output.mux(stream.encode(frame))
            ends.append(len(sink.data))
        output.mux(stream.encode(None))
    return [sink.data[a:b] for a, b in zip([0, *ends], [*ends, len(sink.data)], strict=True)]


@pytest.mark.parametrize("codec", ["rawvideo", "ffv1"])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p10le", "gray", "bgr24"])
def test_frames_and_times_are_those_of_the_file(codec: str, pixel_format: str, tmp_path: Path) -> None:
    if (codec, pixel_format) == ("ffv1", "bgr24"):
        pixel_format = "bgr0"
    stream = b"".join(nut(codec, pixel_format))
    (tmp_path / "file.nut").write_bytes(stream)
    with open_pipe(io.BytesIO(stream)) as pipe, open_reader(tmp_path / "file.nut") as file:
        found = [(reader.height, reader.width, reader.is_deep) for reader in (pipe, file)]
        assert found == [(18, 22, "10" in pixel_format)] * 2
        assert pipe.sample_aspect_ratio == file.sample_aspect_ratio
        frames, expected = list(pipe), list(file)
    assert [frame.pts * frame.time_base for frame in frames] == [Fraction(time, 1000) for time in TIMES]
    assert [frame.pts * frame.time_base for frame in expected] == [Fraction(time, 1000) for time in TIMES]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(frames, expected, strict=True))


def test_the_kind_of_pipe_is_seen_in_its_first_byte() -> None:
    assert isinstance(open_pipe(io.BytesIO(b"".join(nut()))), NutReader)
    y4m = open_pipe(io.BytesIO(b"YUV4MPEG2 W2 H2 F25:1 C420\nFRAME\n" + bytes(6)))
    assert isinstance(y4m, PipeReader)
    assert len(list(y4m)) == 1
    for other in (b"", b"\x00\x00\x00 ftypisom"):
        with pytest.raises(UserError, match="standard input holds no yuv4mpegpipe video: write it with ffmpeg"):
            open_pipe(io.BytesIO(other))


@pytest.mark.parametrize(("codec", "pixel_format"), [("rawvideo", "yuv420p"), ("ffv1", "yuv420p")])
def test_a_frame_is_there_before_the_next_is_sent(codec: str, pixel_format: str) -> None:
    """Larger than the buffers in between."""
    receive, send = os.pipe()
    sent, pieces = 0, nut(codec, pixel_format, height=240, width=320)
    goes_on = threading.Semaphore(1)

    def write() -> None:
        nonlocal sent
        with os.fdopen(send, "wb", buffering=0) as pipe:
            for piece in pieces:
                goes_on.acquire()
                sent += 1
                while piece:
                    piece = piece[pipe.write(piece) :]

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    watchdog = threading.Timer(60, lambda: [goes_on.release() for _ in pieces])
    watchdog.start()
    with open_pipe(os.fdopen(receive, "rb", buffering=0)) as reader:
        for number, _ in enumerate(reader, 1):
            assert sent == number
            goes_on.release()
    thread.join()
    watchdog.cancel()
    assert number == len(TIMES)


def test_other_streams_are_left_out_with_a_note() -> None:
    with open_pipe(io.BytesIO(b"".join(nut(sound=True)))) as reader:
        assert reader.notices == ["standard input holds 1 more streams, which are left out: only video is read"]
        assert not reader.has_audio


def test_where_a_stream_breaks_off_is_told() -> None:
    with open_pipe(io.BytesIO(b"".join(nut()[:3])[:-50])) as reader:
        frames = iter(reader)
        next(frames), next(frames)
        with pytest.raises(IncompleteOutput, match=r"is cut or damaged at frame 3 .* the 2 before it are"):
            next(frames)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (b"nothing", "standard input cannot be read as NUT .*: write it with ffmpeg -i INPUT"),
        (b"nut/multimedia container\x00" + bytes(500), "standard input cannot be read as NUT"),
        (b"".join(nut())[:60], "standard input"),
    ],
)
def test_what_cannot_be_read_is_told_at_once(stream: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_pipe(io.BytesIO(stream))


class Interrupted(io.BytesIO):
    """A pipe that stays open, and Ctrl-C during the read that would wait for more."""

    is_interrupted = False

    def read(self, size: int = -1) -> bytes:
        assert not self.is_interrupted, "it would wait again"
        data = super().read(size)
        if not data:
            self.is_interrupted = True
            raise KeyboardInterrupt
        return data


@pytest.mark.parametrize("length", [1, 40, 200])  # inside of the headers
def test_ctrl_c_while_a_pipe_is_opened(length: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        open_pipe(Interrupted(nut()[0][:length]))


def test_ctrl_c_while_a_frame_is_read() -> None:
    with open_pipe(Interrupted(nut()[0])) as reader, pytest.raises(KeyboardInterrupt):
        assert len(list(reader)) == 1


CLOSED = """
import os, threading
from stablevsr.media.nut import open_pipe
with open_pipe(os.fdopen(0, "rb", buffering=0)) as reader:
    frames = iter(reader)
    next(frames)
    thread = threading.Thread(target=lambda: next(frames, None))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
del reader, frames
print("closed", flush=True)
thread.join()
"""


@pytest.mark.parametrize("codec", ["rawvideo", "ffv1"])
def test_a_reader_that_is_closed_lets_a_thread_that_waits_in_it_go_on(codec: str) -> None:
    """FFmpeg, which calls back for more of the pipe, must find its memory again."""
    first, *others = nut(codec, height=240, width=320)
    with subprocess.Popen([sys.executable, "-c", CLOSED], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdin.write(first)
        process.stdin.flush()
        assert process.stdout.readline() == b"closed\n"
        process.communicate(b"".join(others), timeout=60)
    assert process.returncode == 0


def test_times_arrive_in_the_file(tmp_path: Path) -> None:
    model = random_stream_model()
    with open_pipe(io.BytesIO(b"".join(nut()))) as reader:
        assert upscale(model, reader, tmp_path / "out.mkv", STREAMING, steps=1) == len(TIMES)
    assert [float(time) for time in picture_times(tmp_path / "out.mkv")] == [time / 1000 for time in TIMES]


def test_what_comes_as_nut_goes_out_with_its_pixel_format(tmp_path: Path) -> None:
    for pixel_format, expected in (("yuv444p10le", b"C444p10"), ("bgr24", b"C420mpeg2"), ("gray", b"C420mpeg2")):
        with open_pipe(io.BytesIO(b"".join(nut(pixel_format=pixel_format)))) as reader:
            target, frame = io.BytesIO(), next(iter(reader))
            PipeWriter(reader, 18, 22, target).write(frame.image, frame)
            assert expected in target.getvalue().split(b"\n")[0]
