"""Clips of several scenes for the tests of runs on several machines, and how their results are compared."""

from pathlib import Path

import av
import numpy as np
from clips_made import picture, write_video

from stablevsr import SamplingConfig, build_model, upscale
from stablevsr.media import open_reader

SIZE = (12, 16)


def scenes(*lengths: int) -> list[np.ndarray]:
    """Frames (h, w, 3) uint8 of scenes of these lengths: each drifts a little, and differs a lot from the last."""
    frames = []
    for number, length in enumerate(lengths):
        still = picture(*SIZE) if number % 2 else 255 - picture(*SIZE)[::-1, ::-1]
        frames += [np.roll(still, index, axis=1) // (1 + number // 2) for index in range(length)]
    return frames


def scenes_video(path: Path, *lengths: int) -> Path:
    """The same as a video with sound."""
    frames = scenes(*lengths)
    pts = [1000 * i + 17 * (i % 3) for i in range(len(frames))]  # of a variable rate
    return write_video(path, frames, pts=pts, audio=len(frames) / 30)


def clips_with_results(folder: Path, weights: Path, config: SamplingConfig) -> dict[Path, Path]:
    """Three clips of two and three scenes, and what one process makes of them."""
    found, model = {}, build_model(weights, device="cpu")
    for name, lengths in {"a": (3, 2), "b": (2, 1, 4), "c": (4, 3)}.items():
        clip = scenes_video(folder / f"{name}.mp4", *lengths)
        found[clip] = folder / f"{name}.expected.mp4"
        upscale(model, clip, found[clip], config)
    return found


def contents(path: Path) -> tuple[list[bytes], list[tuple], list[bytes]]:
    """The decoded frames, their times, and the packets of sound of a video."""
    with open_reader(path) as reader:
        found = [(frame.image.tobytes(), (frame.pts, frame.duration, frame.time_base)) for frame in reader]
    with av.open(str(path)) as file:
        sound = [bytes(packet) for packet in file.demux(audio=0) if packet.size]
    return [image for image, _ in found], [time for _, time in found], sound
