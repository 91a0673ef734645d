"""The sound of other people's files: what containers cannot hold, times that are wrong, and where it is heard."""

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from clips_made import FLASHES, flashing, remuxed
from media_tools import doubled, heard, packets_of, picture_times, sound_delay, stream_of

from stablevsr.media import open_reader


def assert_in_order(path):
    """Strictly rising times of decoding in every stream that tells them."""
    for packets in packets_of(path).values():
        times = [decoded for _, decoded, _, _ in packets if decoded is not None]
        assert all(later > earlier for earlier, later in pairwise(times))


def length_of_sound(path):
    with av.open(str(path)) as file:
        return sum(Fraction(frame.samples, frame.sample_rate) for frame in file.decode(audio=0))


@pytest.mark.parametrize("target", [".mp4", ".mov", ".mkv", ".webm"])
@pytest.mark.parametrize(
    ("source", "video", "audio"),
    [
        (".mp4", "libx264", "aac"),
        (".mov", "libx264", "pcm_s16le"),
        (".mkv", "libx264", "ac3"),
        (".webm", "libvpx-vp9", "libopus"),
        (".avi", "mpeg4", "mp3"),
        (".ts", "libx264", "mp2"),
        (".wmv", "msmpeg4", "wmav2"),
    ],
)
def test_sound_stays_with_the_picture(tmp_path, source, video, audio, target):
    clip = flashing(tmp_path / f"in{source}", video, audio, layout="stereo")
    notices, failures = doubled(clip, tmp_path / f"out{target}")
    assert failures == []
    assert len(picture_times(tmp_path / f"out{target}")) == 25
    assert sound_delay(tmp_path / f"out{target}") == pytest.approx(sound_delay(clip), abs=0.025)
    assert all("encoded again" in notice for notice in notices)


@pytest.mark.parametrize("target", [".mp4", ".mov", ".mkv", ".webm", ".avi"])
@pytest.mark.parametrize("late", [0.5, 1.5])
def test_sound_that_begins_late(tmp_path, late, target):
    flashes = [flash + round(25 * late) for flash in FLASHES]
    clip = flashing(tmp_path / "in.mp4", late=late, frames=65, flashes=flashes)
    _, failures = doubled(clip, tmp_path / f"out{target}")
    assert failures == []
    assert sound_delay(clip) == pytest.approx(0, abs=0.025)
    assert sound_delay(tmp_path / f"out{target}") == pytest.approx(sound_delay(clip), abs=0.025)


@pytest.mark.parametrize("target", [".mp4", ".mov", ".mkv", ".webm", ".avi"])
@pytest.mark.parametrize("source", [".mp4", ".mkv", ".ts"])
def test_pictures_that_begin_late(tmp_path, source, target):
    def later(packet):
        if packet.stream.type == "video":
            packet.pts += round(Fraction(2, 5) / packet.time_base)
            packet.dts += round(Fraction(2, 5) / packet.time_base)
        return [packet]

    clip = remuxed(tmp_path / f"in{source}", flashing(tmp_path / "whole.mp4"), later)
    assert sound_delay(clip) == pytest.approx(-0.4, abs=0.025)
    _, failures = doubled(clip, tmp_path / f"out{target}")
    assert failures == []
    assert sound_delay(tmp_path / f"out{target}") == pytest.approx(-0.4, abs=0.025)


@pytest.mark.parametrize(("source", "audio"), [("in.mkv", "pcm_s16le"), ("in.avi", "pcm_s16le"), ("in.wmv", "wmav2")])
@pytest.mark.parametrize("target", ["out.mp4", "out.mov", "out.mkv", "out.webm", "out.avi"])
def test_sound_without_a_channel_layout(tmp_path, source, audio, target):
    clip = flashing(
        tmp_path / source, "mpeg4" if audio == "pcm_s16le" else "msmpeg4", audio, rate=22050, layout="stereo"
    )
    with av.open(str(clip)) as file:
        assert file.streams.audio[0].layout.name == "2 channels"  # that is, nothing is known but their number
    _, failures = doubled(clip, tmp_path / target)
    assert failures == []
    assert length_of_sound(tmp_path / target) == pytest.approx(length_of_sound(clip), abs=0.1)
    with av.open(str(tmp_path / target)) as file:
        assert file.streams.audio[0].layout.nb_channels == 2
    assert sound_delay(tmp_path / target) == pytest.approx(sound_delay(clip), abs=0.025)
    assert_in_order(tmp_path / target)


def test_sound_that_no_container_holds_is_encoded_again(tmp_path):
    """As on Blu-ray discs."""
    clip = flashing(tmp_path / "in.m2ts", "libx264", "pcm_bluray", layout="stereo", form="mpegts")
    notices, failures = doubled(clip, tmp_path / "out.mkv")
    assert (notices, failures) == (
        [".mkv cannot hold pcm_bluray audio, so it is encoded again as flac; nothing else is changed"],
        [],
    )
    assert sound_delay(tmp_path / "out.mkv") == pytest.approx(sound_delay(clip), abs=0.025)
    assert length_of_sound(tmp_path / "out.mkv") == length_of_sound(clip)  # without loss


TRUEHD = Path(__file__).parent / "data/media/truehd.mkv"  # `flashing`, by ffmpeg -c:a truehd -strict -2; PyAV has none


@pytest.mark.parametrize("target", ["out.mp4", "out.mov", "out.mkv", "out.webm", "out.avi"])
def test_truehd_is_kept_or_encoded_again(tmp_path, target):
    with av.open(str(TRUEHD)) as file:
        assert file.streams.audio[0].name == "truehd"
    notices, failures = doubled(TRUEHD, tmp_path / target)
    assert failures == []
    if target == "out.mkv":
        assert notices == []
        assert [p[-1] for p in packets_of(tmp_path / target)[1]] == [p[-1] for p in packets_of(TRUEHD)[1]]
    else:
        assert "cannot hold truehd audio, so it is encoded again as" in notices[0]
    assert length_of_sound(tmp_path / target) == pytest.approx(length_of_sound(TRUEHD), abs=0.1)
    assert sound_delay(tmp_path / target) == pytest.approx(0, abs=0.025)


@pytest.mark.parametrize("target", ["out.mp4", "out.mov", "out.mkv", "out.webm", "out.avi"])
@pytest.mark.parametrize(
    ("source", "audio", "known", "unknown"),
    [
        ("in.mov", "alac", b"alac", b"apac"),
        ("in.mkv", "pcm_s16le", b"A_PCM/INT/LIT", b"A_WHO/KNOWS/IT"[:13]),
        ("in.avi", "mp3", b"\x55\x00\x01\x00\x80\xbb", b"\x99\x99\x01\x00\x80\xbb"),
    ],
)
def test_a_sound_that_nobody_can_decode_costs_itself_only(tmp_path, source, audio, known, unknown, target):
    clip = flashing(tmp_path / source, "mpeg4", audio)
    content = clip.read_bytes()
    assert known in content
    clip.write_bytes(content.replace(known, unknown))
    notices, failures = doubled(clip, tmp_path / target)
    assert notices == [
        f"{target[3:]} cannot hold the unknown audio of {source} (stream 1) and it cannot be decoded, so it is left "
        "out; the result has no sound"
    ]
    assert failures == []
    assert len(picture_times(tmp_path / target)) == 25
    with av.open(str(tmp_path / target)) as file:
        assert not file.streams.audio


def test_a_sound_of_rubbish_costs_itself_only(tmp_path):
    """A codec that is known, and nothing that its decoder understands: the container cannot keep it either."""

    def spoilt(packet):
        if packet.stream.type == "audio":
            rubbish = av.Packet(b"\x00rubbish" * 20)
            rubbish.pts, rubbish.dts, rubbish.time_base = packet.pts, packet.dts, packet.time_base
            return [rubbish]
        return [packet]

    clip = remuxed(tmp_path / "in.mkv", flashing(tmp_path / "whole.mkv", audio="flac"), spoilt)
    notices, failures = doubled(clip, tmp_path / "out.webm")
    assert "the flac audio of in.mkv (stream 1) and it cannot be decoded" in notices[0]
    assert failures == []
    assert len(picture_times(tmp_path / "out.webm")) == 25


def test_a_sound_without_an_encoder_costs_itself_only(tmp_path, monkeypatch):
    monkeypatch.setattr("stablevsr.media.sound.ENCODERS", {})
    notices, failures = doubled(flashing(tmp_path / "in.mp4"), tmp_path / "out.webm")
    assert "cannot hold the aac audio of in.mp4" in notices[0]
    assert failures == []


def test_surround_keeps_its_channels(tmp_path):
    clip = flashing(tmp_path / "in.mkv", "libx264", "flac", layout="5.1(side)")
    for target in ("out.mov", "out.webm"):
        doubled(clip, tmp_path / target)
        with av.open(str(tmp_path / target)) as file:
            assert file.streams.audio[0].layout.nb_channels == 6
        assert sound_delay(tmp_path / target) == pytest.approx(0, abs=0.025)


@pytest.mark.parametrize("target", ["out.mp4", "out.mkv", "out.avi", "out.mov"])
def test_a_time_that_comes_twice(tmp_path, target):
    count, last = 0, None

    def twice(packet):
        nonlocal count, last
        if packet.stream.type == "audio":
            count += 1
            if count == 21:
                packet.pts = packet.dts = last
            last = packet.dts
        return [packet]

    clip = remuxed(tmp_path / "in.mkv", flashing(tmp_path / "clean.mkv"), twice)
    _, failures = doubled(clip, tmp_path / target)
    assert failures == []
    sounds = packets_of(clip)[1], packets_of(tmp_path / target)[stream_of(tmp_path / target, "audio")]
    assert abs(len(sounds[0]) - len(sounds[1])) <= 1
    if target != "out.mkv":  # which allows it
        assert_in_order(tmp_path / target)
    assert sound_delay(tmp_path / target) == pytest.approx(0, abs=0.025)


def test_old_speech_in_avi(tmp_path):
    clip = flashing(tmp_path / "in.avi", "mpeg4", "adpcm_ms", layout="stereo")
    assert doubled(clip, tmp_path / "out.avi") == ([], [])
    assert len(packets_of(tmp_path / "out.avi")[1]) >= len(packets_of(clip)[1]) - 1
    assert_in_order(tmp_path / "out.avi")


@pytest.mark.parametrize("target", ["out.mp4", "out.mkv", "out.webm"])
@pytest.mark.parametrize(
    ("suffix", "video", "audio"),
    [(".ts", "libx264", "aac"), (".m2ts", "libx264", "ac3"), (".mpg", "mpeg2video", "mp2")],
)
def test_joined_recordings_are_laid_end_to_end(tmp_path, suffix, video, audio, target):
    form = {".m2ts": "mpegts", ".mpg": "vob"}.get(suffix)
    parts = [flashing(tmp_path / f"{name}{suffix}", video, audio, form=form).read_bytes() for name in "ab"]
    clip = tmp_path / f"ab{suffix}"
    clip.write_bytes(b"".join(parts))
    notices, failures = doubled(clip, tmp_path / target)
    assert failures == []
    assert "joined from 2 recordings" in notices[0]
    times = picture_times(tmp_path / target)
    assert len(times) == 50
    assert all(later - earlier == pytest.approx(0.04, abs=0.0011) for earlier, later in pairwise(times))
    assert length_of_sound(tmp_path / target) == pytest.approx(2, abs=0.06)
    loud = heard(tmp_path / target)
    for flash in [*FLASHES, *(25 + flash for flash in FLASHES)]:
        middle = round(1000 * float(times[flash])) + 20
        assert loud[middle - 10 : middle + 10].mean() > 0.1
        assert loud[middle + 60 : middle + 70].mean() < 0.02
    assert_in_order(tmp_path / target)


@pytest.mark.parametrize(("suffix", "seconds"), [(".ts", 5), (".mkv", 3600), (".mp4", 3600)])
def test_clocks_that_begin_elsewhere(tmp_path, suffix, seconds):
    """MPEG streams count from 1.4 s or from the middle of the day; nobody wants to wait so long."""

    def later(packet):
        packet.pts += round(seconds / packet.time_base)
        packet.dts = packet.pts if packet.dts is None else packet.dts + round(seconds / packet.time_base)
        return [packet]

    clip = remuxed(tmp_path / f"in{suffix}", flashing(tmp_path / "clean.mp4"), later)
    with av.open(str(clip)) as file:
        assert file.start_time > (seconds - 0.1) * 1_000_000
    for target in ("out.mp4", "out.mkv", "out.avi", "out.webm"):
        _, failures = doubled(clip, tmp_path / target)
        assert failures == []
        assert picture_times(tmp_path / target)[0] < 0.1
        assert len(picture_times(tmp_path / target)) == 25
        assert sound_delay(tmp_path / target) == pytest.approx(0, abs=0.025)


def cut_by_an_edit_list(path, source, seconds):
    """A clip of which the first seconds are not to be seen or heard, though they are in the file.

    FFmpeg's MP4 writer hides what lies before 0.
    """

    def earlier(packet):
        packet.pts -= round(seconds / packet.time_base)
        packet.dts -= round(seconds / packet.time_base)
        return [packet]

    return remuxed(path, source, earlier)


@pytest.mark.parametrize("target", ["out.mkv", "out.mp4", "out.mov", "out.webm"])
def test_what_was_cut_off_stays_off(tmp_path, target):
    whole = flashing(tmp_path / "whole.mp4", frames=50)
    clip = cut_by_an_edit_list(tmp_path / "in.mp4", whole, Fraction(13, 25))
    with open_reader(clip) as reader:
        shown = len(list(reader))
    assert shown == 50 - 13
    _, failures = doubled(clip, tmp_path / target)
    assert failures == []
    times = picture_times(tmp_path / target)
    assert len(times) == shown
    loud = heard(tmp_path / target)
    with av.open(str(tmp_path / target)) as file:
        first = next(file.decode(audio=0))
        assert abs(first.pts * first.time_base - times[0]) <= 0.025
    assert np.flatnonzero(loud > 0.1)[0] / 1000 == pytest.approx(float(times[0]) + (FLASHES[2] - 13) / 25, abs=0.025)
    assert sound_delay(tmp_path / target) == pytest.approx(0, abs=0.025)


def test_packets_without_a_time_of_decoding(tmp_path):
    """Matroska stores none; where pictures are shown out of order the first ones stay without."""
    clip = flashing(tmp_path / "in.mkv")
    with av.open(str(clip)) as file:
        assert next(file.demux(video=0)).dts is None
    doubled(clip, tmp_path / "out.mp4")
    assert len(packets_of(tmp_path / "out.mp4")[1]) == len(packets_of(clip)[1])


def test_a_hole_in_the_sound_is_silence_when_it_is_encoded_again(tmp_path):
    def holed(packet):
        inside = packet.stream.type == "audio" and Fraction(1, 5) < packet.dts * packet.time_base < Fraction(3, 5)
        return [] if inside else [packet]

    clip = remuxed(tmp_path / "in.mkv", flashing(tmp_path / "whole.mkv", frames=40), holed)
    doubled(clip, tmp_path / "out.webm")
    loud = heard(tmp_path / "out.webm")
    start = round(1000 * float(picture_times(tmp_path / "out.webm")[0]))
    assert loud[start + 165 : start + 190].mean() > 0.1
    assert loud[start + 300 : start + 590].max() < 0.05
    assert loud[start + 690 : start + 710].mean() > 0.1


def test_damaged_packets_cost_themselves_only(tmp_path):
    def spoilt(packet):
        if packet.stream.type == "audio" and packet.pts * packet.time_base > Fraction(1, 2):
            rubbish = av.Packet(b"\xff\xf1rubbish" * 20)
            rubbish.pts, rubbish.dts, rubbish.time_base = packet.pts, packet.dts, packet.time_base
            rubbish.duration = packet.duration
            return [rubbish]
        return [packet]

    clip = remuxed(tmp_path / "in.mkv", flashing(tmp_path / "whole.mkv"), spoilt)
    _, failures = doubled(clip, tmp_path / "out.webm")
    assert "are damaged and could not be used" in failures[0]
    assert len(picture_times(tmp_path / "out.webm")) == 25
    assert heard(tmp_path / "out.webm")[165:190].mean() > 0.1


def test_sound_whose_pace_avi_would_lose_is_encoded_again(tmp_path):
    """AC-3 taken from an AVI has a size of blocks that makes the next AVI play it five times as fast."""
    clip = flashing(tmp_path / "in.avi", "mpeg4", "ac3", layout="stereo")
    _, failures = doubled(clip, tmp_path / "out.avi")
    assert failures == []
    assert length_of_sound(tmp_path / "out.avi") == pytest.approx(length_of_sound(clip), abs=0.1)
    assert packets_of(tmp_path / "out.avi")[1][-1][1] > 0.9
    assert sound_delay(tmp_path / "out.avi") == pytest.approx(0, abs=0.025)


def test_pictures_whose_times_are_those_of_decoding(tmp_path):
    """As in a recording by an old camera application: out of order, and the file does not say so."""

    def wrong(packet):
        if packet.stream.type == "video":
            packet.pts = packet.dts = packet.dts + round(Fraction(2, 25) / packet.time_base)
        return [packet]

    clip = remuxed(tmp_path / "in.mp4", flashing(tmp_path / "whole.mp4"), wrong)
    with av.open(str(clip)) as file:
        times = [frame.pts for frame in file.decode(video=0)]
    assert times != sorted(times)
    _, failures = doubled(clip, tmp_path / "out.mp4")
    assert failures == []
    times = picture_times(tmp_path / "out.mp4")
    assert all(later - earlier == pytest.approx(0.04, abs=0.0011) for earlier, later in pairwise(times))
    assert sound_delay(tmp_path / "out.mp4") == pytest.approx(0, abs=0.025)
