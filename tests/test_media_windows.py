"""Writers where files that are open can be neither renamed, replaced nor deleted, as on Windows."""

import errno
import gc
import os
import stat
from pathlib import Path

import pytest
from clips_made import flashing, image, picture, with_extras
from media_tools import as_wanted, doubled

from stablevsr.errors import UserError
from stablevsr.media import Encoding, PartReader, joining, open_reader, open_writer
from stablevsr.media.copies import TrackError

TARGETS = ["out.mp4", "out.mkv", "out.mov", "out.webm", "out.avi", "out", "out.png"]


def open_files():
    """What this process has open: whole paths of ordinary files."""
    found = set()
    for handle in os.listdir("/proc/self/fd"):
        try:
            if stat.S_ISREG(os.stat(f"/proc/self/fd/{handle}").st_mode):
                found.add(Path(os.readlink(f"/proc/self/fd/{handle}")))
        except OSError:
            pass  # closed since
    return found


@pytest.fixture
def windows(monkeypatch):
    """os.replace and its like with the rules of Windows; a list of what they refused."""
    refused = []

    def ruled(name, takes_two):
        real = getattr(os, name)

        def call(path, *others, dir_fd=None, **keywords):
            if dir_fd is not None:  # inside a folder that is deleted
                path = Path(os.readlink(f"/proc/self/fd/{dir_fd}")) / path
            paths = [Path(os.path.realpath(p)) for p in (path, *(others[:1] if takes_two else ()))]
            busy = [file for file in open_files() for p in paths if file == p or p in file.parents]
            if busy:
                refused.append((name, busy[0].name))
                raise PermissionError(errno.EACCES, "The process cannot access the file", str(path))
            if name == "rename" and os.path.lexists(others[0]):
                raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists")
            return real(path, *others, **keywords)

        monkeypatch.setattr(os, name, call)

    for name in ("replace", "rename"):
        ruled(name, takes_two=True)
    for name in ("remove", "unlink"):
        ruled(name, takes_two=False)
    return refused


def source_for(tmp_path, target):
    if target == "out.png":
        image(tmp_path / "in.png")
        return tmp_path / "in.png"
    if target == "out.mkv":
        return with_extras(
            tmp_path / "in.mkv", attachments=[("a.txt", "text/plain", b"words")], subtitles=("ass", b"A")
        )
    return flashing(tmp_path / "in.mp4")


def test_the_stand_in_refuses_what_windows_does(tmp_path, windows):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"2")
    with (tmp_path / "folder/a").open("rb"):
        for change in (
            lambda: os.replace(tmp_path / "b", tmp_path / "folder/a"),
            lambda: (tmp_path / "folder/a").unlink(),
            lambda: (tmp_path / "folder").rename(tmp_path / "other"),
        ):
            with pytest.raises(PermissionError):
                change()
    assert len(windows) == 3
    (tmp_path / "folder").rename(tmp_path / "other")


@pytest.mark.parametrize("target", TARGETS)
def test_a_result_is_put_in_place(tmp_path, windows, target):
    source = source_for(tmp_path, target)
    _, failures = doubled(source, tmp_path / target)
    assert failures == []
    assert windows == []
    assert sorted(os.listdir(tmp_path)) == sorted([source.name, target])


@pytest.mark.parametrize("target", TARGETS)
def test_an_old_result_is_replaced(tmp_path, windows, target):
    source = source_for(tmp_path, target)
    doubled(source, tmp_path / target)
    with open_reader(tmp_path / target) as old, open_reader(source) as reader:
        next(iter(old))  # looked into and closed
        size = {"height": 2 * reader.height, "width": 2 * reader.width}
        old.__exit__(None, None, None)
        with open_writer(tmp_path / target, reader, force=True, **size) as writer:
            for frame in reader:
                writer.write(as_wanted(frame.image, writer).repeat(2, 0).repeat(2, 1), frame)
    assert writer.failures == []
    assert windows == []
    assert sorted(os.listdir(tmp_path)) == sorted([source.name, target])


def interrupted(source, target):
    with open_reader(source) as reader, open_writer(target, reader, height=64, width=96) as writer:
        frame = next(iter(reader))
        if target.suffix != ".png":
            writer.write(as_wanted(frame.image, writer).repeat(2, 0).repeat(2, 1), frame)
        raise RuntimeError("interrupted")


@pytest.mark.parametrize("target", TARGETS)
def test_a_failure_leaves_nothing_behind(tmp_path, windows, target):
    source = source_for(tmp_path, target)
    with pytest.raises(RuntimeError, match="interrupted"):
        interrupted(source, tmp_path / target)
    assert windows == []
    assert os.listdir(tmp_path) == [source.name]


@pytest.mark.parametrize("target", ["out.mp4", "out.mkv", "out.avi"])
def test_sound_that_fails_at_the_end_lets_go_of_its_file(tmp_path, monkeypatch, windows, target):
    source = flashing(tmp_path / "in.mkv", audio="mp3")
    real = joining.StreamCopies.copy_until

    def failing(self, time):
        real(self, time)
        if self._until is None and time is not None and time > 0.5 and self._tracks:
            raise TrackError(1, "no")

    monkeypatch.setattr(joining.StreamCopies, "copy_until", failing)
    _, failures = doubled(source, tmp_path / target)
    assert failures == [f"stream 1 of {source} is missing (no)"]
    assert windows == []
    assert sorted(os.listdir(tmp_path)) == ["in.mkv", target]


def test_an_old_result_that_is_open_stays(tmp_path, windows):
    source = flashing(tmp_path / "in.mp4")
    doubled(source, tmp_path / "out.mp4")
    old = (tmp_path / "out.mp4").read_bytes()
    with open_reader(source) as reader, (tmp_path / "out.mp4").open("rb"):
        frame = next(iter(reader))
        writer = open_writer(tmp_path / "out.mp4", reader, height=32, width=48, force=True)
        with pytest.raises(UserError, match="close the program that uses it"), writer:
            writer.write(frame.image, frame)
    assert windows == [("replace", "out.mp4")]
    assert (tmp_path / "out.mp4").read_bytes() == old
    assert sorted(os.listdir(tmp_path)) == ["in.mp4", "out.mp4"]


def test_what_is_refused_leaves_nothing_behind(tmp_path, windows):
    image(tmp_path / "in.png")
    with open_reader(tmp_path / "in.png") as reader, pytest.raises(Exception, match="could not be written"):
        open_writer(tmp_path / "out.mkv", reader, height=16, width=70000, encoding=Encoding("h264"))
    assert windows == []
    assert os.listdir(tmp_path) == ["in.png"]


@pytest.mark.parametrize("target", ["out.mkv", "out"])
def test_a_part_and_a_reader_left_early_let_go_of_their_file(tmp_path, windows, target):
    source = flashing(tmp_path / "in.mp4")
    gc.disable()  # nothing may hang on chance
    try:
        with open_reader(source) as whole, PartReader(whole, 12, 15) as reader:
            with open_writer(tmp_path / target, reader, height=32, width=48) as writer:
                for frame in reader:
                    writer.write(picture(32, 48), frame)
            next(iter(whole))
            next(iter(reader))
        source.unlink()
    finally:
        gc.enable()
    assert windows == []
