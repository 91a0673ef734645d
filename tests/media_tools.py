"""What several tests of frames in and out do with a clip: upscale it, look into it, measure it."""

from fractions import Fraction

import av
import imageio.v3 as iio
import numpy as np
import pytest

from stablevsr.errors import UserError
from stablevsr.media import open_reader, open_writer


def doubled(source, target, encoding=None):
    """What the product does, with a model that repeats pixels; returns the notices and the failures."""
    with open_reader(source) as reader:
        size = {"height": 2 * reader.height, "width": 2 * reader.width}
        writer = open_writer(target, reader, encoding=encoding, **size)
        with writer:
            for frame in reader:
                writer.write(as_wanted(frame.image, writer).repeat(2, 0).repeat(2, 1), frame)
    return [*reader.notices, *writer.notices], writer.failures


def write_frames(folder, frames):
    """A folder of pictures, (h, w, 3) uint8 each."""
    folder.mkdir()
    for i, frame in enumerate(frames):
        iio.imwrite(folder / f"{i:03}.png", frame)
    return folder


def read_frames(path):
    """The pictures of a clip as one array, (n, h, w, 3)."""
    with open_reader(path) as reader:
        return np.stack([frame.image for frame in reader])


def as_wanted(image, writer):
    """With as many bits as the writer takes."""
    if image.dtype == np.uint8:
        return image.astype(np.uint16) * 257 if writer.is_deep else image
    return image if writer.is_deep else ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)


def refused(source, target, encoding=None):
    """The sentence by which a writer is refused when it is opened, before any frame."""
    with open_reader(source) as reader, pytest.raises(UserError) as caught:
        open_writer(target, reader, height=2 * reader.height, width=2 * reader.width, encoding=encoding)
    message = str(caught.value)
    assert not message.endswith(".")
    assert "\n" not in message
    return message


def packets_of(path):
    """(pts, dts, duration, bytes) of every packet of each stream, by its index; times in seconds."""
    found = {}
    with av.open(str(path)) as file:
        for packet in file.demux():
            if packet.size:
                times = [t if t is None else t * packet.time_base for t in (packet.pts, packet.dts, packet.duration)]
                found.setdefault(packet.stream_index, []).append((*times, bytes(packet)))
    return found


def stream_of(path, kind):
    """The index of the first stream of that kind."""
    with av.open(str(path)) as file:
        return next(stream.index for stream in file.streams if stream.type == kind)


def picture_times(path):
    """When each frame is shown, in seconds."""
    with open_reader(path) as reader:
        return [frame.pts * frame.time_base for frame in reader]


def heard(path, rate=1000):
    """How loud it is at each millisecond from 0 on: root mean square, so silence is 0."""
    loud, end = np.zeros(20 * rate), 0
    with av.open(str(path)) as file:
        for frame in file.decode(audio=0):
            samples = frame.to_ndarray().astype(np.float64)
            if not frame.format.is_planar:
                samples = samples.reshape(-1, len(frame.layout.channels) or 1).T
            full = 1.0 if frame.format.name.startswith(("flt", "dbl")) else 2.0 ** (8 * frame.format.bytes - 1)
            energy = (samples / full) ** 2
            start = (end if frame.pts is None else frame.pts * frame.time_base) * rate  # the last of WMA has no time
            end = start / rate + Fraction(frame.samples, frame.sample_rate)
            ticks = np.floor(float(start) + np.arange(samples.shape[1]) * rate / frame.sample_rate + 1e-6).astype(int)
            inside = ticks >= 0
            np.add.at(loud, ticks[inside], energy.mean(axis=0)[inside] * rate / frame.sample_rate)
    return np.sqrt(loud)


def seen(path, rate=1000):
    """How bright it is at each millisecond from 0 on."""
    with open_reader(path) as reader:  # which knows when the frames of an AVI are shown
        # On the file's own clock, as the sound is.
        frames = [(f.pts * f.time_base - reader.timeline.start, f.image.mean()) for f in reader]
    bright, frames = np.zeros(20 * rate), sorted(frames)
    for (start, value), (end, _) in zip(frames, [*frames[1:], (frames[-1][0] + Fraction(1, 25), 0)], strict=True):
        bright[max(0, round(start * rate)) : max(0, round(end * rate))] = value / 255
    return bright


def sound_delay(path):
    """Seconds by which the sound of `clips_made.flashing` comes after its picture, by cross-correlation."""
    bright, loud = seen(path), heard(path)
    spectrum = np.fft.rfft(loud, 40000) * np.conj(np.fft.rfft(bright, 40000))
    lag = int(np.fft.irfft(spectrum).argmax())
    return (lag if lag < 20000 else lag - 40000) / 1000
