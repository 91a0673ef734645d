"""Joined recordings whose sound and picture do not restart together: laid end to end, or refused before the work."""

from fractions import Fraction

import av
import numpy as np
import pytest
from clips_made import FLASHES, flashing, remuxed
from media_tools import doubled, heard, picture_times

from stablevsr.errors import UserError
from stablevsr.media import open_reader

FRAMES = 50  # two seconds


@pytest.fixture(scope="module", params=[".ts", ".mpg"])
def whole(request, tmp_path_factory):
    video = {".ts": "libx264", ".mpg": "mpeg2video"}[request.param]
    path = tmp_path_factory.mktemp("whole") / f"whole{request.param}.mp4"
    return flashing(path, video, "mp2", frames=FRAMES)


@pytest.fixture
def suffix(whole):
    return whole.suffixes[0]


def recording(path, whole, kind, start=0.0):
    """One recording whose clock begins at `start` seconds.

    kind: "full"; without sound: "silent"; the sound begins, or ends, after a second: "late", "short"; the picture ends
    after a second: "long".
    """

    def changed(packet):
        second_half = packet.dts * packet.time_base >= 1
        sound = packet.stream.type == "audio"
        if sound and ((kind == "late" and not second_half) or (kind == "short" and second_half)):
            return []
        if not sound and kind == "long" and packet.pts * packet.time_base >= 1:
            return []
        ticks = round(Fraction(start) / packet.time_base)
        packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
        return [packet]

    return remuxed(path, whole, changed, lambda stream: kind != "silent" or stream.type == "video")


def joined(path, parts):
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def flashes_of(kind):
    """Those that are heard."""
    return [f for f in FLASHES if kind not in ("silent", "late")]


@pytest.mark.parametrize(
    "kinds",
    [
        [("full", 0), ("silent", 0), ("full", 0)],
        [("silent", 0), ("full", 0)],
        [("full", 0), ("silent", 0)],
        [("long", 0), ("full", 0)],
        [("short", 0), ("full", 0)],
        [("full", 0), ("late", 0)],
        [("short", 0), ("full", 1.5)],  # the sound goes on where it ended, the picture does not
        [("full", 0), ("full", 1.9)],  # a little back
        [("short", 0), ("full", 1.9)],
        [("full", 0), ("full", 1000)],
        [("silent", 0), ("full", 0), ("silent", 0), ("short", 0), ("full", 0), ("silent", 0)],
    ],
)
def test_they_are_laid_end_to_end(tmp_path, whole, kinds, suffix):
    parts = [recording(tmp_path / f"{i}{suffix}", whole, *kind) for i, kind in enumerate(kinds)]
    clip = joined(tmp_path / f"in{suffix}", parts)
    notices, failures = doubled(clip, tmp_path / "out.mkv")
    assert notices == [f"{clip} is joined from {len(kinds)} recordings, which are laid end to end"]
    assert failures == []
    times = picture_times(tmp_path / "out.mkv")
    own = [picture_times(part) for part in parts]
    counts = [len(part) for part in own]
    ends = np.cumsum([0] + [float(part[-1] - part[0]) + 0.04 for part in own])
    expected = [end + float(time - part[0]) for end, part in zip(ends[:-1], own, strict=True) for time in part]
    assert [float(time - times[0]) for time in times] == pytest.approx(expected, abs=0.0011)
    loud, audible = heard(tmp_path / "out.mkv"), np.zeros(len(times), bool)
    for number, (kind, _) in enumerate(kinds):
        audible[[sum(counts[:number]) + flash for flash in flashes_of(kind)]] = True
    middles = [round(1000 * float(time)) + 20 for time in times]
    assert [loud[middle - 10 : middle + 10].mean() > 0.1 for middle in middles] == audible.tolist()


@pytest.mark.parametrize("kind", ["audio", "video"])
@pytest.mark.parametrize("seconds", [-1, 30])
def test_times_of_one_stream_that_jump_alone_are_refused_or_kept(tmp_path, whole, suffix, kind, seconds):
    """Nothing says where the other stream belongs; a jump ahead may be a hole."""

    def moved(packet):
        ticks = round((2 + (seconds if later and packet.stream.type == kind else 0)) / packet.time_base)
        packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
        return [packet] if later == (packet.dts - ticks >= Fraction(6, 5) / packet.time_base) else []

    parts = []
    for later in (False, True):  # two files, because a writer would set right times that run back
        parts.append(remuxed(tmp_path / f"{later}{suffix}", whole, moved))
    clip = joined(tmp_path / f"in{suffix}", parts)
    if seconds < 0:
        with pytest.raises(UserError, match="the times of its sound restart elsewhere"):
            open_reader(clip)
        return
    with open_reader(clip) as reader:
        assert reader.timeline.seams == 0


@pytest.mark.parametrize("whole", [".ts"], indirect=True)
def test_a_sound_that_begins_late_is_found(tmp_path, whole):
    """FFmpeg lists the stream, but not how many channels and samples it has, until it reads all tables of the file."""
    parts = [recording(tmp_path / f"{kind}.ts", whole, kind) for kind in ("silent", "full")]
    clip = joined(tmp_path / "in.ts", parts)
    with av.open(str(clip)) as file:
        assert file.streams.audio[0].codec_context.sample_rate == 0
    notices, _ = doubled(clip, tmp_path / "out.mp4")
    assert len(notices) == 1
    with av.open(str(tmp_path / "out.mp4")) as file:
        assert file.streams.audio[0].codec_context.sample_rate == 48000
