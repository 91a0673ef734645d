"""A part of a video is the same as that part of all its frames, wherever decoding begins."""

import itertools
from fractions import Fraction

import av
import numpy as np
import pytest
from clips_made import folder_of, image, picture, remuxed, write_video

from stablevsr.errors import UserError
from stablevsr.media import PartReader, open_reader

COUNT = 60


def moving(path, codec="libx264", options=None, pts=None, **settings):
    """A clip in which every frame differs, a key frame every ten frames or so, B-frames where the codec has them."""
    defaults = {"libx264": {"bf": "3", "b-pyramid": "normal", "sc_threshold": "0"}}.get(codec, {})
    with av.open(str(path), "w") as out:
        pix_fmt = settings.pop("pix_fmt", "yuv420p")
        stream = out.add_stream(codec, rate=25, options={**defaults, **(options or {})}, **settings)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = 64, 96, pix_fmt, 10
        stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(COUNT):
            image = np.roll(picture(64, 96, i), 5 * i, axis=(0, 1))
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = pts(i) if pts else 40 * i, Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def uneven(i):
    return 40 * i + (i * i) % 13


def offset_ts(path):
    def later(packet):
        packet.pts, packet.dts = packet.pts + 900_000, packet.dts + 900_000
        return [packet]

    return remuxed(path, moving(path.with_name("whole.ts")), later)


def hour_late(path):
    def later(packet):
        packet.pts += round(3600 / packet.time_base)
        packet.dts = packet.pts if packet.dts is None else packet.dts + round(3600 / packet.time_base)
        return [packet]

    return remuxed(path, moving(path.with_name("whole.mp4")), later)


def edited(path):
    """The first frames are cut off by an edit list."""

    def earlier(packet):
        packet.pts -= round(Fraction(13, 25) / packet.time_base)
        packet.dts -= round(Fraction(13, 25) / packet.time_base)
        return [packet]

    return remuxed(path, moving(path.with_name("whole.mp4")), earlier)


def interlaced(path):
    return moving(path, options={"x264-params": "interlaced=1:bf=0:keyint=10"})


X265 = {"x265-params": "log-level=0:bframes=3:keyint=10:min-keyint=10:scenecut=0:open-gop=1"}
CLIPS = {  # the clip, and whether decoding begins in the middle
    "constant.mp4": (moving, True),
    "constant.mov": (moving, True),
    "constant.mkv": (moving, True),
    "variable.mp4": (lambda path: moving(path, pts=uneven), True),
    "variable.mkv": (lambda path: moving(path, pts=uneven), True),
    "closed.mkv": (lambda path: moving(path, options={"x264-params": "open-gop=0:keyint=10"}), True),
    "open.mkv": (lambda path: moving(path, options={"x264-params": "open-gop=1:keyint=10:min-keyint=1"}), True),
    "open.mp4": (lambda path: moving(path, options={"x264-params": "open-gop=1:keyint=10:min-keyint=1"}), True),
    "hevc.mkv": (lambda path: moving(path, "libx265", X265), True),
    "hevc.mp4": (lambda path: moving(path, "libx265", X265), True),
    "vp9.webm": (
        lambda path: moving(path, "libvpx-vp9", {"g": "10", "auto-alt-ref": "1", "lag-in-frames": "16"}),
        True,
    ),
    "prores.mov": (lambda path: moving(path, "prores_ks", pix_fmt="yuv422p10le"), True),
    "ffv1.mkv": (lambda path: moving(path, "ffv1", pix_fmt="bgr0"), True),
    "late.mkv": (hour_late, True),
    "refreshed.mkv": (lambda path: moving(path, options={"x264-params": "intra-refresh=1:keyint=10"}), False),
    "interlaced.mkv": (interlaced, True),
    "edited.mp4": (edited, False),
    "offset.ts": (offset_ts, False),
    "raw.h264": (lambda path: write_video(path, [picture(64, 96, i) for i in range(COUNT)]), False),
    "old.avi": (lambda path: moving(path, "mpeg4"), False),
    "vp8.webm": (lambda path: moving(path, "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16"}), False),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", CLIPS)
def test_a_part_is_the_same_bits(tmp_path, monkeypatch, name):
    make, seeks = CLIPS[name]
    clip = make(tmp_path / name)
    with open_reader(clip) as reader:
        frames = list(reader)
    decoded = []
    convert = type(reader)._decode

    def counted(self, *arguments):
        for frame in convert(self, *arguments):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(type(reader), "_decode", counted)
    sought = 0
    for first, last in ((0, 3), (1, 2), (9, 12), (10, 11), (11, 14), (25, 33), (len(frames) - 12, None)):
        with open_reader(clip) as whole:
            decoded.clear()
            part = list(PartReader(whole, first, last))
        expected = frames[first:last]
        assert len(part) == len(expected)
        sought += len(decoded) < first + len(part)
        for got, wanted in zip(part, expected, strict=True):
            assert np.array_equal(got.image, wanted.image)
            assert (got.pts, got.time_base, got.duration) == (
                wanted.pts - expected[0].pts,
                wanted.time_base,
                wanted.duration,
            )
    assert (sought > 0) == seeks
    assert not seeks or sought >= 2


def test_a_part_after_damage_is_read_and_one_before_it_too(tmp_path):
    """What is decoded from the start stops at the damage."""
    clip = moving(tmp_path / "in.mkv")
    with open_reader(clip) as reader:
        frames = list(reader)
    content = bytearray(clip.read_bytes())
    with av.open(str(clip)) as file:
        start = [packet.pos for packet in file.demux(video=0) if packet.size][4]
    content[start + 20 : start + 40] = b"\x00\xff" * 10
    clip.write_bytes(content)
    with open_reader(clip) as reader, pytest.raises(UserError, match="cannot be decoded"):
        list(reader)
    with open_reader(clip) as reader:
        part = list(PartReader(reader, 40, 50))
    assert all(np.array_equal(a.image, b.image) for a, b in itertools.zip_longest(part, frames[40:50]))


def test_stills_before_a_part_are_not_decoded(tmp_path):
    folder = folder_of(tmp_path / "in", [f"{i}.png" for i in range(5)], lambda path, i: image(path))
    content = (folder / "0.png").read_bytes()
    with open_reader(folder) as reader:
        (folder / "0.png").write_bytes(content[: len(content) // 2])
        assert [frame.name for frame in PartReader(reader, 2, 4)] == ["2", "3"]
