#!/usr/bin/env python3
"""Upscale a camera as it films: each frame is finished before the next one is taken.

    python examples/camera.py /dev/video0 --format v4l2 --weights stream.safetensors live.mp4    # Linux
    python examples/camera.py 0 --format avfoundation --weights stream.safetensors live.mp4      # macOS
    python examples/camera.py "video=Integrated Camera" --format dshow ... live.mp4              # Windows
    python examples/camera.py testsrc2,realtime --format lavfi live.mp4                          # a test picture
    python examples/camera.py in.mp4 live.mp4                                                    # a file
    python examples/camera.py in.mp4 - | ffplay -                                                # shown at once

A camera does not wait: while a frame is computed it films others, and only its newest one is taken next. A file waits,
so all of its frames are. Ctrl-C stops and finishes the output. With weights that were not made for streaming there is a
warning, and more flicker.
"""

import argparse
import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np

from stablevsr import UserError, build_model, stream_video


def pictures(source: str, format: str | None, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """The frames of a file or device, (h, w, 3) uint8, scaled to `size`, (width, height)."""
    with av.open(source, format=format) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24", width=size[0], height=size[1])


def newest(frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The newest frame each time one is asked for; those filmed in between are dropped."""
    latest: list[np.ndarray] = []
    state, over, failure = threading.Condition(), threading.Event(), []

    def film() -> None:
        try:
            for frame in frames:
                with state:
                    latest[:] = [frame]
                    state.notify()
                if over.is_set():
                    return
        except Exception as error:  # raised again where the frames are used
            failure.append(error)
        finally:
            over.set()
            with state:
                state.notify()

    thread = threading.Thread(target=film, daemon=True)
    thread.start()
    try:
        while True:
            with state:
                state.wait_for(lambda: latest or over.is_set())
                if not latest:
                    break
                frame = latest.pop()
            yield frame
    finally:
        over.set()
    if failure:
        raise failure[0]


class Output:
    """A video file, or yuv4mpegpipe on standard output, that takes pictures with the time at which each was ready."""

    def __init__(self, path: str, rate: int) -> None:
        self.live = path == "-"
        self.container = av.open(sys.stdout.buffer, "w", format="yuv4mpegpipe") if self.live else av.open(path, "w")
        self.rate, self.stream, self.pts = rate, None, -1

    def write(self, picture: np.ndarray, seconds: float) -> None:
        if self.stream is None:
            self.stream = self.container.add_stream("wrapped_avframe" if self.live else "libx264", rate=self.rate)
            self.stream.height, self.stream.width = picture.shape[:2]
            self.stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(picture).reformat(format="yuv420p")
        self.pts = max(self.pts + 1, round(seconds * self.rate))
        frame.pts, frame.time_base = self.pts, Fraction(1, self.rate)
        self.container.mux(self.stream.encode(frame))

    def close(self) -> None:
        if self.stream is not None:
            self.container.mux(self.stream.encode())
        self.container.close()


def size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected WIDTHxHEIGHT, as in 160x120")
    return int(width), int(height)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="a device, with --format; or a file")
    parser.add_argument("output", metavar="OUT", help="a video file; - is yuv4mpegpipe on standard output")
    parser.add_argument("--format", help="FFmpeg's name of the device: v4l2, avfoundation, dshow")
    parser.add_argument("--size", type=size, default=(160, 120), help="of the frames taken (default: 160x120)")
    parser.add_argument("--rate", type=int, default=25, help="frames per second of the output (default: %(default)s)")
    parser.add_argument("--weights", metavar="FILE", help="for streaming, a file or a name (default: small-streaming)")
    options = parser.parse_args(arguments)
    frames, count = pictures(options.source, options.format, options.size), 0
    if options.format:
        frames = newest(frames)
    output = None
    try:
        model = build_model(options.weights or "small-streaming")
        with contextlib.suppress(KeyboardInterrupt):
            start = time.monotonic()
            for picture in stream_video(model, frames):
                if output is None:
                    output, start = Output(options.output, options.rate), time.monotonic()
                output.write(picture, time.monotonic() - start if options.format else count / options.rate)
                count += 1
        print(f"{count} frames in {time.monotonic() - start:.1f} s after the first", file=sys.stderr)
    except (UserError, av.error.FFmpegError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    finally:
        if output is not None:
            output.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
