"""Everything people feed to the command: it works as they would expect, or one sentence says why it does not.

Every file is made here. What works gives the right number of frames in the right size; what fails leaves one line, the
exit code, and nothing else: no output, no temporary, no workspace.
"""

import errno
import os
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import clips_made as made
import imageio.v3 as iio
import numpy as np
import pytest
from clips_made import TICKS, picture, write_video

from stablevsr.cli import main
from stablevsr.engine.workspace import ArrayFile
from stablevsr.media import open_reader

# What the command prints on its way, beside the one line that says how it ended.
ON_THE_WAY = re.compile(
    r"(read|flow|denoise|decode|write): |stablevsr: (note: |.* steps on cpu, |\d+ frames, \d+ frame-steps)"
)


@pytest.fixture(autouse=True)
def _tiny_model(monkeypatch: pytest.MonkeyPatch, tiny_weights: Path) -> None:
    monkeypatch.setattr("stablevsr.model.bundled_weights", lambda: tiny_weights)


def run(source: Path | str, output: Path | str, *options: str) -> int:
    return main(["upscale", *options, "--steps", "1", "--device", "cpu", "--", str(source), str(output)])


def lines(capfd: pytest.CaptureFixture) -> tuple[list[str], str]:
    """What was printed that is neither progress nor a note, and the notes; nothing may go to standard output."""
    printed = capfd.readouterr()
    assert printed.out == ""
    told = [line for line in re.split(r"[\r\n]+", printed.err) if line.strip()]
    return [line for line in told if not ON_THE_WAY.match(line)], "\n".join(line for line in told if "note: " in line)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def frames_of(number: int) -> list[np.ndarray]:
    return [picture(16, 24, i) for i in range(number)]


class Works(NamedTuple):
    """A clip that comes through."""

    make: Callable[[Path], object]
    name: str = "in.mp4"
    output: str = "out.mp4"
    count: int = 3
    size: tuple[int, int] = (96, 64)  # of the output
    words: str = "note: random"  # among the notes


def gray(bits: int) -> np.ndarray:
    return (picture(16, 24)[..., 0].astype(np.uint16) * 257) if bits == 16 else picture(16, 24)[..., 0] > 100


def deep(path: Path) -> None:
    made.deep_image(path, picture(16, 24).astype(np.uint16) * 257, "png", "rgb48le", "rgb48be")


def encoded(suffix: str) -> bytes:
    return iio.imwrite("<bytes>", picture(16, 24), extension=suffix)


WORKS = {
    "one frame": Works(lambda p: write_video(p, frames_of(1)), count=1),
    "1x1 video": Works(lambda p: write_video(p, [picture(1, 1)] * 2, codec="ffv1"), "in.mkv", count=2, size=(4, 4)),
    "odd 4:4:4": Works(lambda p: write_video(p, [picture(13, 7)] * 3), size=(28, 52)),
    "rotated": Works(lambda p: write_video(p, frames_of(3), rotation=(90, False)), size=(64, 96)),
    "variable rate": Works(lambda p: write_video(p, frames_of(3), pts=[0, 1001, 5005])),
    "interlaced": Works(lambda p: made.interlaced_video(p, frames_of(3)), words="is interlaced"),
    "full range": Works(lambda p: made.flat_video(p, (90, 120, 140), 16, 1, True), count=1, size=(128, 64)),
    "untagged": Works(lambda p: made.flat_video(p, (90, 120, 140), 16, 2, False), count=1, size=(128, 64)),
    "4:3 pixels": Works(lambda p: write_video(p, frames_of(3), aspect=Fraction(4, 3))),
    "VP9 with alpha": Works(made.transparent_video, "in.webm", "out.webm", count=1, words="transparency of a video is"),
    "raw H.264": Works(lambda p: write_video(p, frames_of(3)), "in.h264"),
    "late start": Works(lambda p: write_video(p, frames_of(3), pts=[15001, 16002, 17003])),
    "two sounds and subtitles": Works(made.film, "in.mkv", "out.mkv"),
    "sound refused by .webm": Works(made.film, "in.mkv", "out.webm", words="cannot hold aac audio, so it is encoded"),
    "animated GIF": Works(
        lambda p: iio.imwrite(p, [np.full((16, 24, 3), 50 * i, np.uint8) for i in range(3)], duration=100), "in.gif"
    ),
    "10 bits": Works(
        lambda p: write_video(p, frames_of(3), codec="ffv1", pix_fmt="yuv420p10le"), "in.mkv", words="codec hevc10"
    ),
    "16-bit gray": Works(lambda p: iio.imwrite(p, gray(16)), "in.png", "out.png", 1),
    "16-bit RGB": Works(deep, "in.png", "out.png", 1),
    "16-bit RGB to JPEG": Works(deep, "in.png", "out.jpg", 1, words="gets 8 bits a channel"),
    "RGBA": Works(lambda p: made.image(p, np.dstack([picture(16, 24)] * 2)[..., :4]), "in.png", "out.png", 1),
    "RGBA to video": Works(
        lambda p: made.image(p, np.dstack([picture(16, 24)] * 2)[..., :4]), "in.png", count=1, words="is dropped"
    ),
    "1 bit": Works(lambda p: iio.imwrite(p, gray(1)), "in.png", "out.png", 1),
    "palette": Works(lambda p: made.image(p, bits=4), "in.png", "out.png", 1),
    "transparent palette": Works(
        lambda p: made.image(p, np.dstack([picture(16, 24), np.uint8(255) * gray(1)]), bits=4), "in.png", "out.png", 1
    ),
    "1x1 image": Works(lambda p: made.image(p, picture(1, 1)), "in.png", "out.png", 1, (4, 4)),
    "EXIF-turned": Works(made.exif_turned, "in.jpg", "out.png", 1),
    "JPEG named .png": Works(lambda p: p.write_bytes(encoded(".jpg")), "in.png", "out.png", 1),
    "PNG named .mp4": Works(lambda p: p.write_bytes(encoded(".png")), count=1),
    "gap in the numbers": Works(
        lambda p: made.folder_of(p, ["f1.png", "f2.png", "f5.png"]), "in", "out", words="jump from f2 to f5"
    ),
    "folder with a text": Works(
        lambda p: made.folder_of(p, ["0.png", "a.txt"], lambda q, i: q.touch() if i else made.image(q)),
        "in", "out", 1, words="skipped a.txt",
    ),
    "folder called x.png": Works(lambda p: made.folder_of(p, ["0.png", "1.png"]), "x.png", "out", 2),
    "emoji": Works(lambda p: write_video(p, frames_of(3)), "\N{CLAPPER BOARD} été.mp4", "\N{FILM FRAMES}.mp4"),
    "HTML": Works(lambda p: made.image(p), "<script>alert(1)<%2F>.png", "<script>.png", 1),
    "leading dash": Works(lambda p: made.image(p), "-dash.png", "-out.png", 1),
}  # fmt: skip


@pytest.mark.parametrize("case", WORKS.values(), ids=WORKS)
def test_what_works(tmp_path: Path, case: Works, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    case.make(tmp_path / case.name)
    before = everything(tmp_path)
    assert run(case.name, case.output) == 0
    told, notes = lines(capfd)
    assert len(told) == 1, told
    assert told[0].startswith(f"stablevsr: wrote {case.output}: {case.count} frames in")
    assert case.words in notes
    with open_reader(case.output) as reader:
        assert (reader.width, reader.height) == case.size
        assert len(list(reader)) == case.count
    after = everything(tmp_path)
    assert {name: after[name] for name in before} == before
    assert {name.split(os.sep)[0] for name in after} == {case.name, case.output}


def test_times_shape_and_streams_come_through(tmp_path: Path) -> None:
    pts = [15001, 16002, 21007]
    write_video(tmp_path / "a.mp4", frames_of(3), pts=pts, aspect=Fraction(4, 3))
    made.film(tmp_path / "b.mkv")
    for name in ("a.mp4", "b.mkv"):
        assert run(tmp_path / name, tmp_path / f"out_{name}") == 0
    with open_reader(tmp_path / "out_a.mp4") as reader:
        assert reader.sample_aspect_ratio == Fraction(4, 3)
        assert [frame.pts * frame.time_base for frame in reader] == [time * TICKS for time in pts]
    with av.open(str(tmp_path / "out_b.mkv")) as file:
        assert [stream.type for stream in file.streams] == ["video", "audio", "audio", "subtitle"]


class Fails(NamedTuple):
    """A clip that is refused."""

    make: Callable[[Path], object]
    words: str
    name: str = "in.mp4"


FAILS = {
    "not there": Fails(lambda p: None, "does not exist"),
    "zero bytes": Fails(Path.touch, "cannot be opened as a video"),
    "random bytes": Fails(lambda p: p.write_bytes(np.random.default_rng(0).bytes(20000)), "cannot be opened"),
    "text": Fails(lambda p: p.write_text("hello\n" * 99), "is a text file", "in.txt"),
    "MP4 without moov": Fails(made.without_index, "cannot be opened as a video"),
    "cut MP4": Fails(made.cut, "100 bytes are missing"),
    "cut Matroska": Fails(made.cut, "100 bytes are missing", "in.mkv"),
    "flipped bytes": Fails(made.damaged, "cannot be decoded; the file is damaged", "in.mkv"),
    "sound only": Fails(lambda p: made.sound(p, "aac"), "has no video stream"),
    "MP3 with cover": Fails(lambda p: made.sound(p, "libmp3lame", cover=True), "has no video stream", "in.mp3"),
    "PQ": Fails(lambda p: made.tagged_video(p, 16), "is HDR video", "in.mkv"),
    "HLG": Fails(lambda p: made.tagged_video(p, 18), "is HDR video", "in.mkv"),
    "size change": Fails(made.joined_sizes, "frame 4 of", "in.h264"),
    "CMYK": Fails(lambda p: made.image(p, np.zeros((8, 8, 4), np.uint8), mode="CMYK"), "of type CMYK", "in.jpg"),
    "cut image": Fails(lambda p: made.image(p).write_bytes(p.read_bytes()[:-30]), "cannot be decoded as one", "in.png"),
    "text named .png": Fails(lambda p: p.write_text("hello"), "cannot be decoded as one", "in.png"),
    "video named .png": Fails(
        lambda p: write_video(p.with_suffix(".mp4"), frames_of(3)).rename(p), "cannot be decoded as one", "in.png"
    ),
    "60000x60000": Fails(lambda p: made.png_header(p, 60000, 60000), "in.png is 60000x60000, but at most", "in.png"),
    "mixed sizes": Fails(
        lambda p: made.folder_of(p, ["a.png", "b.png"], lambda q, i: made.image(q, picture(16, 24 + 8 * i))),
        "b.png is 32x16 but", "in",
    ),
    "empty folder": Fails(Path.mkdir, "holds no image", "in"),
    "folder of texts": Fails(lambda p: made.folder_of(p, ["a.txt"], lambda q, i: q.touch()), "holds no image", "in"),
    "link to itself": Fails(lambda p: p.symlink_to(p), "does not exist"),
    "pipe": Fails(os.mkfifo, "neither a file nor a folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILS.values(), ids=FAILS)
def test_what_fails(tmp_path: Path, case: Fails, capfd: pytest.CaptureFixture) -> None:
    case.make(tmp_path / case.name)
    refused(capfd, tmp_path, tmp_path / case.name, tmp_path / "out.mp4", case.words)


def refused(capfd: pytest.CaptureFixture, folder: Path, source: Path, output: Path, words: str, *options: str) -> None:
    before = sorted(folder.rglob("*"))
    assert run(source, output, *options) == 2
    told, _ = lines(capfd)
    assert len(told) == 1, told
    assert words in told[0]
    assert sorted(folder.rglob("*")) == before


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return made.image(tmp_path / "in.png")


def test_input_equal_to_output(tmp_path: Path, clip: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "link.png").symlink_to(clip)
    before = clip.read_bytes()
    for output in (clip, tmp_path / "link.png"):
        refused(capfd, tmp_path, clip, output, "is the input itself", "--force")
    assert clip.read_bytes() == before


@pytest.mark.parametrize("name", ["out.png", "out.mp4", "out"])
def test_output_is_a_folder_of_somebody(tmp_path: Path, clip: Path, name: str, capfd: pytest.CaptureFixture) -> None:
    made.folder_of(tmp_path / name, ["thesis.txt"], lambda path, i: path.write_text("years"))
    refused(capfd, tmp_path, clip, tmp_path / name, "is not empty")
    refused(capfd, tmp_path, clip, tmp_path / name, "thesis.txt", "--force")


def test_output_is_a_link_to_itself(tmp_path: Path, clip: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "out.png").symlink_to(tmp_path / "out.png")
    refused(capfd, tmp_path, clip, tmp_path / "out.png", "leads back to itself")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_target(tmp_path: Path, clip: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(capfd, tmp_path, clip, tmp_path / "locked" / "out.png", "no permission")


def test_full_disk(tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ArrayFile, "_put", full)
    refused(capfd, tmp_path, clip, tmp_path / "out.png", "No space left on device")


def test_a_name_that_looks_like_an_option(tmp_path: Path, monkeypatch, capfd: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    made.image(tmp_path / "-dash.png")
    with pytest.raises(SystemExit) as caught:
        main(["upscale", "-dash.png", "out.png"])
    assert caught.value.code == 2
    assert "-dash.png" in capfd.readouterr().err
    assert os.listdir() == ["-dash.png"]
    assert main(["upscale", "./-dash.png", "out.png", "--steps", "1", "--device", "cpu"]) == 0
