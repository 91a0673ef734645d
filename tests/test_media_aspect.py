"""Pixels that are not square: every container says so, whatever its codec can."""

from fractions import Fraction
from itertools import product

import av
import pytest
from clips_made import picture, write_video
from media_tools import doubled

from stablevsr.media import Encoding
from stablevsr.media.matroska import write_display_size
from stablevsr.media.truncation import missing_bytes


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        *product(["out.mp4", "out.mkv"], ["h264", "hevc", "vp9", "av1"]),
        *product(["out.webm"], ["vp9", "av1"]),
        *product(["out.mov", "out.mkv"], ["prores"]),
        ("out.mkv", "ffv1"),
        ("out.avi", "h264"),
    ],
)
def test_pixels_that_are_not_square_stay_so(tmp_path, name, codec):
    """Most codecs do not say it themselves; with sound, the file is written twice."""
    for audio in (None, 0.2):
        source = write_video(tmp_path / "in.mp4", [picture()] * 3, aspect=Fraction(4, 3), audio=audio)
        _, failures = doubled(source, tmp_path / name, Encoding(codec))
        assert failures == []
        with av.open(str(tmp_path / name), options={"err_detect": "crccheck+explode"}) as out:
            assert out.streams.video[0].sample_aspect_ratio == Fraction(4, 3)
            assert len(list(out.decode(video=0))) == 3
            out.seek(0)
            assert len(list(out.decode(video=0))) == 3
        assert missing_bytes(tmp_path / name) == 0
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.avi", "out.avi cannot say that its pixels are 1.33 times as wide as high; a .mkv file can"),
        ("out", "out looks stretched: its pixels are 1.33 times as wide as high, which an image cannot say"),
    ],
)
def test_pixels_whose_shape_is_lost_are_told(tmp_path, name, message):
    source = write_video(tmp_path / "in.mp4", [picture()] * 3, aspect=Fraction(4, 3))
    notices, _ = doubled(source, tmp_path / name, Encoding("ffv1") if name.endswith("avi") else None)
    assert notices == [message]


def test_a_file_that_begins_otherwise_is_left_alone(tmp_path):
    source = write_video(tmp_path / "in.mkv", [picture()] * 3)
    data = source.read_bytes()
    space = data.index(b"\xec\x01\x00")  # after the table of contents
    for other in (data[:space] + b"\xbf" + data[space + 1 :], data[: space + 99], b"", bytes(99)):
        (tmp_path / "other.mkv").write_bytes(other)
        assert not write_display_size(tmp_path / "other.mkv", 48, 32, Fraction(4, 3))
        assert (tmp_path / "other.mkv").read_bytes() == other
    assert write_display_size(source, 48, 32, Fraction(4, 3))
    assert len(source.read_bytes()) == len(data)
