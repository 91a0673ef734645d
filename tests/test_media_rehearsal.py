"""What cannot work is refused before the first frame, and at the end the picture is safe whatever else fails."""

import errno
import os
import resource
import subprocess
import sys
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
import pytest
from clips_made import FLASHES, TICKS, flashing, image, picture, remuxed, with_extras, write_video
from media_tools import doubled, heard, picture_times, refused, sound_delay

from stablevsr.errors import UserError
from stablevsr.media import Encoding, PartReader, open_reader, open_writer, video_writer
from stablevsr.media.copies import TrackError


def test_a_rehearsal_leaves_nothing_behind(tmp_path):
    clip = flashing(tmp_path / "in.mkv")
    with open_reader(clip) as reader, open_writer(tmp_path / "out.mp4", reader, height=32, width=48) as writer:
        assert len(os.listdir(tmp_path)) == 2  # the input and the part
        for frame in reader:
            writer.write(frame.image, frame)
    assert sorted(os.listdir(tmp_path)) == ["in.mkv", "out.mp4"]


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9", "prores"])
def test_what_an_encoder_cannot_do_is_known_at_once(tmp_path, codec):
    """20000 pixels are more than any of them takes."""
    image(tmp_path / "in.png")
    suffix = ".mov" if codec == "prores" else ".mkv"
    with open_reader(tmp_path / "in.png") as reader:
        size = {"height": 16, "width": 70000}
        with pytest.raises(UserError, match="could not be written"):
            open_writer(tmp_path / f"out{suffix}", reader, encoding=Encoding(codec), **size)
    assert os.listdir(tmp_path) == ["in.png"]


@pytest.mark.parametrize("pts", [[0, 100, 9000], [0, 1000, 1100, 5000]])
def test_a_variable_rate_without_a_clock_is_refused_at_once(tmp_path, pts):
    clip = write_video(tmp_path / "in.mp4", [picture()] * len(pts), pts=pts)
    message = refused(clip, tmp_path / "out.avi")
    assert ".avi has a constant frame rate" in message
    assert "use .mkv" in message
    assert os.listdir(tmp_path) == ["in.mp4"]
    doubled(clip, tmp_path / "out.mkv")
    times = picture_times(tmp_path / "out.mkv")
    assert times == pytest.approx([float(p * TICKS) for p in pts], abs=0.001)


def test_a_part_with_an_even_rate_goes_where_the_whole_does_not(tmp_path):
    clip = write_video(tmp_path / "in.mp4", [picture()] * 5, pts=[0, 1000, 2000, 2050, 2100])
    assert ".mkv" in refused(clip, tmp_path / "out.avi")
    with open_reader(clip) as whole, PartReader(whole, 0, 3) as reader:
        assert list(reader.frame_times()) == [0, Fraction(1, 30), Fraction(2, 30)]


def test_a_stream_that_fails_in_the_rehearsal_is_named(tmp_path, monkeypatch):
    clip = flashing(tmp_path / "in.mkv")

    def failing(*arguments):
        raise TrackError(1, "the muxer says no")

    monkeypatch.setattr(video_writer, "join", failing)
    assert "cannot hold stream 1" in refused(clip, tmp_path / "out.mp4")
    assert os.listdir(tmp_path) == ["in.mkv"]


def failing_at_the_end(monkeypatch, error, fits=lambda companions: False):
    """The last step fails, though its rehearsal worked."""
    real = video_writer.join

    def failing(picture, times, companions, target, form, until=None):
        if until is None and not fits(companions):
            target.write_bytes(b"half")
            raise error
        return real(picture, times, companions, target, form, until)

    monkeypatch.setattr(video_writer, "join", failing)


@pytest.mark.parametrize("target", ["out.mp4", "out.mkv", "out.webm", "out.avi", "out.mov"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), ValueError("x"), av.error.ArgumentError(22, "bad")]
)
def test_the_picture_is_kept_when_the_rest_fails(tmp_path, monkeypatch, error, target):
    clip = flashing(tmp_path / "in.mkv", audio="mp3")
    failing_at_the_end(monkeypatch, error)
    _, failures = doubled(clip, tmp_path / target)
    assert len(failures) == 1
    assert failures[0].startswith("sound, subtitles and metadata of")
    assert len(picture_times(tmp_path / target)) == 25
    assert sorted(os.listdir(tmp_path)) == ["in.mkv", target]


def test_one_sound_that_fails_costs_itself_only(tmp_path, monkeypatch):
    clip = with_extras(tmp_path / "in.mkv", subtitles=("subrip", b"Hello"))
    failing_at_the_end(monkeypatch, TrackError(1, "no"), lambda c: all(choice.index != 1 for choice in c.streams))
    _, failures = doubled(clip, tmp_path / "out.mkv")
    assert failures == [f"stream 1 of {clip} is missing (no)"]
    with av.open(str(tmp_path / "out.mkv")) as file:
        assert [stream.type for stream in file.streams] == ["video", "subtitle"]


def test_a_source_that_is_gone_at_the_end_costs_its_sound(tmp_path):
    clip = flashing(tmp_path / "in.mp4")
    with open_reader(clip) as reader:
        frames = list(reader)
        with open_writer(tmp_path / "out.mp4", reader, height=32, width=48) as writer:
            for frame in frames:
                writer.write(frame.image, frame)
            clip.unlink()
    assert "are missing" in writer.failures[0]
    assert len(picture_times(tmp_path / "out.mp4")) == 25


def test_a_disk_that_fills_up_at_the_end_costs_the_sound(tmp_path):
    clip = flashing(tmp_path / "in.mkv", audio="pcm_s16le", frames=300, layout="stereo")  # 2.3 MB of sound
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        _, failures = doubled(clip, tmp_path / "out.mkv")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(failures) == 1
    assert len(picture_times(tmp_path / "out.mkv")) == 300
    assert sorted(os.listdir(tmp_path)) == ["in.mkv", "out.mkv"]


KILLED = """
import os, signal, sys
from pathlib import Path
from media_tools import doubled
from stablevsr.media import joining, video_writer
if len(sys.argv) > 3:
    real = joining.StreamCopies.copy_until
    def killing(self, time):
        if self._until is None and time is not None and time > 0.3:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, time)
    joining.StreamCopies.copy_until = killing
doubled(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("target", ["out.mp4", "out.mkv"])
def test_a_process_killed_in_the_last_step_has_written_the_picture(tmp_path, target):
    clip = flashing(tmp_path / "in.mkv")
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}

    def run(*arguments):
        return subprocess.run([sys.executable, "-c", KILLED, str(clip), *arguments], env=environment, check=False)

    assert run(str(tmp_path / target), "kill").returncode == -9
    (part,) = (path for path in tmp_path.iterdir() if path.name.endswith(".part"))
    assert len(picture_times(part)) == 25  # whole
    assert run(str(tmp_path / target)).returncode == 0
    assert run(str(tmp_path / f"again{target[3:]}")).returncode == 0
    assert (tmp_path / target).read_bytes() == (tmp_path / f"again{target[3:]}").read_bytes()


@pytest.mark.parametrize("suffix", [".ts", ".mkv"])
def test_a_recording_that_begins_inside_a_group_of_pictures(tmp_path, suffix):
    count = 0

    def late(packet):
        nonlocal count
        count += packet.stream.type == "video"
        return [] if packet.stream.type == "video" and count <= 4 else [packet]

    clip = remuxed(tmp_path / f"in{suffix}", flashing(tmp_path / f"whole{suffix}", frames=35), late)
    notices, failures = doubled(clip, tmp_path / "out.mp4")
    assert "begins inside a group of pictures" in notices[0]
    assert failures == []
    times = picture_times(tmp_path / "out.mp4")
    assert len(times) == 35 - FLASHES[1]  # from the next key frame on, a flash
    assert all(later - earlier == pytest.approx(0.04, abs=0.0011) for earlier, later in pairwise(times))
    loud = heard(tmp_path / "out.mp4")
    assert sound_delay(tmp_path / "out.mp4") == pytest.approx(0, abs=0.025)
    assert np.flatnonzero(loud > 0.1)[0] / 1000 == pytest.approx(float(times[0]) - 5 / 25, abs=0.03)  # the flash before


@pytest.mark.parametrize(("suffix", "longest"), [(".webp", 16383), (".jpg", 65500), (".jpeg", 65500)])
def test_pictures_too_long_for_their_format(tmp_path, suffix, longest):
    image(tmp_path / "in.png")
    with open_reader(tmp_path / "in.png") as reader:
        for size in ({"height": 4, "width": longest + 1}, {"height": longest + 1, "width": 4}):
            with pytest.raises(UserError, match=rf"{suffix} holds at most {longest} pixels a side; write a \.png"):
                open_writer(tmp_path / f"out{suffix}", reader, **size)
        with open_writer(tmp_path / f"out{suffix}", reader, height=4, width=longest) as writer:
            writer.write(np.zeros((4, longest, 3), np.uint8), next(iter(reader)))
    assert iio.imread(tmp_path / f"out{suffix}", plugin="pillow").shape == (4, longest, 3)


def test_file_systems_that_cannot_flush_have_the_result_all_the_same(tmp_path, monkeypatch):
    image(tmp_path / "in.png")

    def cannot(handle):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", cannot)
    for target in ("out.png", "out.mkv", "out"):
        doubled(tmp_path / "in.png", tmp_path / target)
        assert (tmp_path / target).exists()
