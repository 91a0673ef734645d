"""The page that puts results side by side: what is in it, and what it refuses."""

import base64
import hashlib
import io
import json
import re
import resource
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
import pytest
import torch

from stablevsr.cli import main
from stablevsr.compare import compare
from stablevsr.compare.clips import eight_bits, labels
from stablevsr.compare.collect import Settings, enlarged, evenly
from stablevsr.compare.compare import compare_inline, compare_page
from stablevsr.compare.curves import chart
from stablevsr.compare.grid import Grid, reduced
from stablevsr.compare.motion import HIDDEN, follow
from stablevsr.compare.places import CROP, Crop, FoundCrops, Line, Profile
from stablevsr.errors import UserError
from stablevsr.media.colour import to_rgb


def moving(count: int = 6, height: int = 64, width: int = 96, seed: int = 0) -> np.ndarray:
    """A smooth clip that moves, with some noise of its own: (n, h, w, 3) uint8."""
    y, x = np.mgrid[:height, :width][..., None]
    clip = np.stack([128 + 90 * np.sin((x + 3 * i) / 7 + y / 9 + np.arange(3)) for i in range(count)])
    return (clip + np.random.default_rng(seed).normal(0, 4, clip.shape)).clip(0, 255).astype(np.uint8)


def write(path: Path, frames: np.ndarray, rate: Fraction = Fraction(24)) -> Path:
    """As a folder of images, or a lossless video if the name has a suffix."""
    if not path.suffix:
        path.mkdir(parents=True)
        for i, frame in enumerate(frames):
            iio.imwrite(path / f"{i:04}.png", frame)
        return path
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=rate, options={"crf": "0", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    return path


class Elements(HTMLParser):
    """The elements of a page: their names with attributes, and the text of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] == "script":
            self.scripts[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.found.append((f"/{tag}", {}))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])

    @property
    def media(self) -> bytes:
        return base64.b64decode(self.scripts[1])

    def pictures(self, words: str) -> list[np.ndarray]:
        """The images whose description holds these words."""
        found = [attributes for attributes in self.all("img") if words in (attributes["alt"] or "")]
        return [iio.imread(base64.b64decode(a["src"].partition(",")[2]), extension=".png") for a in found]


def run(*arguments: object) -> int:
    return main(["compare", *map(str, arguments), "--device", "cpu"])


@pytest.fixture(autouse=True)
def _tiny_model(monkeypatch: pytest.MonkeyPatch, tiny_weights: Path) -> None:
    monkeypatch.setattr("stablevsr.model.bundled_weights", lambda: tiny_weights)


@pytest.fixture
def clips(tmp_path: Path) -> dict[str, Path]:
    """LR as video, two results, the truth."""
    folder = tmp_path / "clips"
    folder.mkdir()
    truth = moving()
    return {
        "lr": write(folder / "lr.mp4", truth[:, ::4, ::4]),
        "a": write(folder / "a.mp4", moving(seed=1)),
        "b": write(folder / "b", moving(seed=2)),
        "gt": write(folder / "gt", truth),
    }


def test_the_page_holds_everything_and_needs_nothing(clips: dict[str, Path], tmp_path: Path, capsys) -> None:
    out = tmp_path / "report.html"
    assert run(clips["lr"], clips["a"], clips["b"], "--gt", clips["gt"], "-o", out) == 0
    assert "6 frames of bicubic ×4, a.mp4, b, truth" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["report.html"]
    text = out.read_text()
    assert "://" not in text
    page = Elements(text)
    for tag, attributes in page.found:
        for name in ("src", "href", "poster", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    for title in ("Crops", "Temporal profile", "Motion", "Metrics", "Inputs", "Settings"):
        assert f"<h2>{title}</h2>" in text
    assert hashlib.sha256(clips["a"].read_bytes()).hexdigest() in text
    lines = "".join(
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in sorted(clips["b"].iterdir())
    )
    assert hashlib.sha256(lines.encode()).hexdigest() in text
    assert page.data["labels"] == ["bicubic ×4", "a.mp4", "b", "truth"]
    assert len(page.all("svg")) >= 5
    policy = next(a["content"] for a in page.all("meta") if "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(page.scripts[2].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_the_figures_are_those_of_evaluate(clips: dict[str, Path], tmp_path: Path, capsys) -> None:
    out = tmp_path / "report.html"
    assert run(clips["lr"], clips["a"], "--gt", clips["gt"], "-o", out) == 0
    capsys.readouterr()
    assert main(["evaluate", str(clips["a"]), str(clips["gt"]), "--device", "cpu"]) == 0
    names, values = (line.split()[1:] for line in capsys.readouterr().out.splitlines()[:2])
    assert "tOF" in names
    row = re.search(r'<th scope="row">a.mp4</th>(.*?)</tr>', out.read_text())[1]
    assert re.findall(r"<td>(.*?)</td>", row) == values


def test_the_stream_is_exact_in_time_and_the_tiles_are_the_versions(clips: dict[str, Path], tmp_path: Path) -> None:
    lr = write(tmp_path / "lr.mp4", moving(30)[:, ::4, ::4], Fraction(30000, 1001))
    a = moving(30, seed=1)
    compare_page({"a": a}, tmp_path / "r.html", lr=lr, settings=Settings(crf=4))
    page = Elements((tmp_path / "r.html").read_text())
    rate = Fraction(*page.data["rate"])
    assert rate == Fraction(30000, 1001)
    with av.open(io.BytesIO(page.media)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        frames = list(container.decode(stream))
    assert [frame.pts * frame.time_base for frame in frames] == [i / rate for i in range(30)]
    assert all(frames[i].key_frame for i in range(0, 30, 12))
    (_, _), (x, y) = page.data["tiles"]
    for frame, expected in zip(frames, a, strict=True):
        tile = to_rgb(frame)[y : y + 64, x : x + 96]
        assert np.abs(tile.astype(int) - expected).mean() < 5  # the noise in colour is halved in resolution


@pytest.mark.parametrize(("count", "height", "width"), [(1, 16, 16), (3, 720, 1280), (4, 1080, 1920), (7, 50, 33)])
def test_tiles_have_guards_and_even_places(count: int, height: int, width: int) -> None:
    grid = Grid.of(count, height, width)
    assert max(grid.size) <= 4096
    assert grid.shrink == 1
    assert not any(side % 16 for side in grid.size)
    owner = np.zeros(grid.size, int)
    for tile in range(count):
        x, y = grid.corner(tile)
        assert (x % 2, y % 2) == (0, 0)
        owner[y - 8 : y + height + 8, x - 8 : x + width + 8] += 1
    assert owner.max() == 1
    assert owner.sum() == count * (height + 16) * (width + 16)


def test_borders_are_repeated_around_a_tile() -> None:
    grid = Grid.of(2, 16, 16)
    stitched = grid.stitch([np.full((16, 16, 3), 10, np.uint8), np.full((16, 16, 3), 200, np.uint8)])
    assert set(np.unique(stitched)) == {10, 200}


def test_what_is_too_large_for_a_stream_is_reduced() -> None:
    assert Grid.of(2, 2160, 3840).shrink == 1
    large = Grid.of(4, 4320, 7680)
    assert large.shrink == 2
    assert max(large.size) <= 8192
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    small = reduced(image, 2)
    assert small.shape == (3, 4, 3)
    assert abs(int(small[1, 2, 0]) - image[2:4, 4:6, 0].mean()) <= 0.5
    assert (small[2, 3] == image[4, 6]).all()


HOSTILE = ["<script>alert(1)<script>.mp4", "\"quotes' & {{SCRIPT}}<!--.mp4", "x onerror=alert(1) <img src=q>.mp4"]


def test_hostile_file_names_do_no_harm(tmp_path: Path) -> None:
    lr = write(tmp_path / "l&<b>r.mp4", moving(2)[:, ::4, ::4])
    paths = [write(tmp_path / name, moving(2)) for name in HOSTILE]
    paths.append(write(tmp_path / "a<" / "script><script>alert(1)<" / "script>", moving(2)))
    paths.append(write(tmp_path / "script>", moving(2)))
    out = tmp_path / "r.html"
    assert run(lr, *paths, "-o", out, "--no-flow") == 0
    page = Elements(out.read_text())
    assert [attributes.get("id") for attributes in page.all("script")] == ["data", "media", None]
    assert page.data["labels"] == ["bicubic ×4", *labels(paths)]
    assert "</script>" in page.data["labels"][4]
    assert not any(name.startswith("on") for _, attributes in page.found for name in attributes)
    assert not page.all("b")
    assert all(attributes["src"].startswith("data:") for attributes in page.all("img"))


def test_names_that_are_not_unicode(tmp_path: Path) -> None:
    a = write(tmp_path / "a\udcff.mp4", moving(2))
    assert run(write(tmp_path / "lr", moving(2)[:, ::4, ::4]), a, "-o", tmp_path / "r.html", "--no-flow") == 0
    assert Elements((tmp_path / "r.html").read_text()).data["labels"][1] == "a\udcff.mp4"


def test_labels_are_unique() -> None:
    assert labels([Path("x/out.mp4"), Path("y.mp4")]) == ["out.mp4", "y.mp4"]
    assert labels([Path("x/out.mp4"), Path("y/out.mp4")]) == ["x/out.mp4", "y/out.mp4"]
    assert labels([Path("out.mp4"), Path("out.mp4")]) == ["out.mp4", "out.mp4 (2)"]


def test_one_frame_is_lossless_and_has_no_temporal_parts(tmp_path: Path) -> None:
    truth, lr = moving(1), write(tmp_path / "lr", moving(1)[:, ::4, ::4])
    out = tmp_path / "r.html"
    a, gt = write(tmp_path / "a", moving(1, seed=1)), write(tmp_path / "gt", truth)
    assert run(lr, a, "--gt", gt, "-o", out) == 0
    page = Elements(out.read_text())
    assert "Temporal profile" not in out.read_text()
    assert "<h2>Motion" not in out.read_text()
    stitched = iio.imread(page.media, extension=".png")
    expected = [enlarged(truth[0, ::4, ::4]), moving(1, seed=1)[0], truth[0]]
    for (x, y), image in zip(page.data["tiles"], expected, strict=True):
        assert np.array_equal(stitched[y : y + 64, x : x + 96], image)
    assert "PSNR" in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{lr}", "{a}", "{small}"], "a.mp4 is 96x64 and {small} is 48x32; give clips of the same size"),
        (["{lr}", "{small}"], "lr.mp4 is 24x16 and {small} is 48x32, expected 96x64"),
        (["{lr}", "{a}", "--gt", "{small}"], "a.mp4 is 96x64 and {small} is 48x32"),
        (["{lr}", "{a}", "{short}"], "lr.mp4 has 6 frames and {short} has 4; give clips of the same length"),
        (["{lr}", "{a}", "--gt", "{short}"], "{short} has 4"),
        (["{lr}", "{a}", "--gt", "{tmp}/none"], "input {tmp}/none does not exist"),
        (["{tmp}/none.mp4", "{a}"], "none.mp4 does not exist"),
        (["{lr}", "{a}", "--crop", "90,0,16"], "the crop 90,0,16 is not inside 96x64"),
        (["{lr}", "{a}", "--crop", "0,0,0"], "the crop 0,0,0 is not inside"),
        (["{lr}", "{a}", "--crop", "0,0,8@6"], "got a crop of frame 6, but frames are 0 to 5"),
        (["{lr}", "{a}", "--profile", "row:64"], "there are 64 rows"),
        (["{lr}", "{a}", "--profile", "line:3"], "got the profile 'line:3', expected row:Y or column:X"),
        (["{lr}", "{a}", "--flow-frames", "5"], "got frame 5 for the flow to the next one, but frames are 0 to 5"),
        (["{lr}", "{a}", "--metrics-frames", "-1"], "got metrics_frames -1"),
        (["{lr}", "{a}", "--crf", "60"], "got a crf of 60"),
        (["{lr}", "{a}", "--frames", "9:"], "has 6 frames, so there is no frame 9"),
        (["{lr}", "{a}", "-o", "{tmp}/r.mp4"], "expected a name that ends in .html"),
        (["{lr}", "{a}", "-o", "{tmp}/no/r.html"], "no is not a folder; create it first"),
        (["{lr}", "{a}", "-o", "{old}"], "old.html already exists; choose another output, or pass --force"),
    ],
)
def test_bad_input_is_one_sentence(
    clips: dict[str, Path], tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture
) -> None:
    places = {**clips, "tmp": tmp_path, "old": tmp_path / "old.html"}
    places["small"] = write(tmp_path / "small", moving(6)[:, ::2, ::2])
    places["short"] = write(tmp_path / "short.mp4", moving(4))
    places["old"].write_text("precious")
    output = [] if "-o" in arguments else ["-o", tmp_path / "r.html"]
    assert run(*(argument.format(**places) for argument in arguments), *output) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "frame/s]" not in line]
    assert len(told) == 1, told
    assert words.format(**places) in told[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips", "old.html", "short.mp4", "small"]
    assert places["old"].read_text() == "precious"


@pytest.mark.parametrize("arguments", [["--crop", "1,2"], ["--crop", "1,2,3@x"], ["--flow-frames", "x"], []])
def test_bad_usage(clips: dict[str, Path], arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    output = ["-o", "r.html"] if arguments else []
    with pytest.raises(SystemExit) as caught:
        run(clips["lr"], clips["a"], *output, *arguments)
    assert caught.value.code == 2
    assert "expected" in capsys.readouterr().err or not arguments


def test_a_large_video_lies_beside_the_page(clips: dict[str, Path], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(compare, "MAX_INLINE", 1000)
    out = tmp_path / "it's 50% #1?.html"
    assert run(clips["lr"], clips["a"], "-o", out, "--no-flow") == 0
    page = Elements(out.read_text())
    assert page.scripts[1] == ""
    assert page.data["url"] == "it%27s%2050%25%20%231%3F_files/video.mp4"
    with av.open(str(tmp_path / "it's 50% #1?_files/video.mp4")) as container:
        assert len(list(container.decode(video=0))) == 6
    assert run(clips["lr"], clips["a"], "-o", out, "--no-flow", "--force") == 0
    (tmp_path / "taken_files").write_text("")
    assert run(clips["lr"], clips["a"], "-o", tmp_path / "taken.html", "--no-flow") == 2
    assert not (tmp_path / "taken.html").exists()


def test_arrays_give_the_same_page_as_files(clips: dict[str, Path], tmp_path: Path) -> None:
    from_files, from_arrays = tmp_path / "files.html", tmp_path / "arrays.html"
    assert run(clips["lr"], clips["b"], "-o", from_files, "--no-flow") == 0
    floats = torch.from_numpy(moving(seed=2)).permute(0, 3, 1, 2).float() / 255
    compare_page({"b": floats}, from_arrays, lr=moving()[:, ::4, ::4], settings=Settings(rate=Fraction(24)))
    pages = [Elements(path.read_text()) for path in (from_files, from_arrays)]
    assert pages[0].media == pages[1].media
    assert pages[0].data == pages[1].data
    assert [a["src"] for a in pages[0].all("img")] == [a["src"] for a in pages[1].all("img")]
    for bad in (moving()[..., 0], moving().astype(int), np.full((1, 3, 4, 4), 2.0)):
        with pytest.raises(UserError, match=r"got (float )?frames"):
            compare_page({"bad": bad}, tmp_path / "bad.html")
    with pytest.raises(UserError, match="got nothing to compare"):
        compare_page({}, tmp_path / "bad.html")
    assert not (tmp_path / "bad.html").exists()


def test_the_inline_version_is_the_slider_alone() -> None:
    shown = compare_inline({"</iframe><b>": moving(3), "b": moving(3, seed=1)}, truth=moving(3))
    frame = Elements(shown._repr_html_())
    assert [name for name, _ in frame.found] == ["iframe", "/iframe"]
    page = Elements(frame.all("iframe")[0]["srcdoc"])
    assert page.data["labels"] == ["</iframe><b>", "b", "truth"]
    assert page.data["url"] == ""
    assert not page.all("h2")


def test_a_part_is_taken_of_clips_that_are_longer(clips: dict[str, Path], tmp_path: Path) -> None:
    part = write(tmp_path / "part", moving(6, seed=1)[2:5])
    out = tmp_path / "r.html"
    assert run(clips["lr"], part, clips["a"], "-o", out, "--frames", "2:5", "--no-flow", "--crop", "0,0,32@1") == 0
    page = Elements(out.read_text())
    assert page.data["frames"] == 3
    bicubic, first, second = page.pictures("32x32 at 0,0")
    assert np.array_equal(first, second)
    assert np.array_equal(first, moving(6, seed=1)[3, :32, :32])
    assert np.array_equal(bicubic, enlarged(moving()[3, ::4, ::4])[:32, :32])
    assert out.read_text().count("2:5 of them") == 2


def test_crops_are_found_where_the_versions_differ() -> None:
    found, rng = FoundCrops(), np.random.default_rng(0)
    base = rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)
    for frame in range(9):
        other = base.copy()
        if frame == 3:
            other[200:264, 96:160] //= 2
        if frame == 5:
            other[10:50, 300:340] //= 4
        found.add(frame, [base, other])
    places = sorted((crop.frame, crop) for _, crop, _ in found.found)
    assert [frame for frame, _ in places] == [3, 5]
    assert all(crop.size == CROP for _, crop in places)
    crop = places[0][1]
    assert abs(crop.x - 96) <= 16
    assert abs(crop.y - 200) <= 16


@pytest.mark.parametrize("line", ["row:5", "column:7"])
def test_the_profile_is_a_line_over_time(line: str) -> None:
    clip = moving(8)
    profile = Profile(Line.of(line, 64, 96), 8)
    for i, frame in enumerate(clip):
        profile.add(i, [frame, 255 - frame])
    expected = clip[:, 5] if line == "row:5" else clip[:, :, 7].transpose(1, 0, 2)
    picture, inverse = profile.pictures()
    assert np.array_equal(picture, expected)
    assert np.array_equal(inverse, 255 - expected)


def test_long_profiles_skip_frames() -> None:
    profile = Profile(Line(True, 0), 1500)
    for i in range(1500):
        profile.add(i, [np.full((1, 2, 3), i % 256, np.uint8)])
    assert profile.pictures()[0].shape == (500, 2, 3)


class ConstantFlow(torch.nn.Module):
    """Everything moves 4 pixels to the left from the first frame to the second."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.weight = 0, torch.nn.Parameter(torch.zeros(1))

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        flow = torch.zeros(len(first), 2, *first.shape[-2:])
        flow[:, 0] = -4 if self.calls == 1 else 4
        return flow


def test_the_warping_error_is_zero_along_the_motion() -> None:
    wide = moving(1, 64, 120)[0]
    before, after = wide[:, :96], wide[:, 4:100]
    still = [before, before]
    motion = follow(ConstantFlow(), 3, [before[::4, ::4]] * 2, [before, still[0]], [after, still[1]])
    assert motion.frame == 3
    assert motion.largest == 4
    assert motion.means[0] < 0.01
    assert motion.means[1] > 5
    assert motion.hidden == pytest.approx(4 / 96)
    assert (motion.errors[0][:, :4] == HIDDEN).all()
    assert motion.errors[0][:, 4:].max() <= 4  # black


def test_curves_leave_gaps_and_stay_inside() -> None:
    svg = chart("a<b", [("x&y", [(0, 1.0), (1, float("inf")), (2, 3.0), (3, 2.0)]), ("one", [(3, 5.0)])], 4)
    assert svg.count("<polyline") == 1
    assert svg.count("<circle") == 4
    assert "a&lt;b" in svg
    assert "x&amp;y" in svg
    assert "nan" not in svg
    assert "inf" not in svg
    assert "<svg" in chart("none", [("x", [(0, float("inf"))])], 1)
    for values in ([0.0, 0.0], [1e-9, 2e-9], [1e6, 3e6]):
        assert chart("m", [("x", list(enumerate(values)))], 2).count('class="grid"') in range(2, 8)


def test_metrics_of_a_few_frames(clips: dict[str, Path], tmp_path: Path) -> None:
    assert evenly(5, 9) == set(range(5))
    assert evenly(301, 4) == {0, 100, 200, 300}
    assert evenly(7, 1) == {0}
    out = tmp_path / "r.html"
    arguments = [clips["lr"], clips["a"], "--gt", clips["gt"], "--no-flow", "-o", out, "--force"]
    assert run(*arguments, "--metrics-frames", "2") == 0
    assert "Measured on 2 frames, evenly spaced" in out.read_text()
    assert "tOF" not in "".join(re.findall(r"<figcaption>(.*?)</figcaption>", out.read_text()))
    assert run(*arguments, "--metrics-frames", "0") == 0
    assert "<h2>Metrics" not in out.read_text()


def test_memory_does_not_grow_with_the_clip(tmp_path: Path) -> None:
    """One frame of both versions takes 0.3 MB, so that holding them would show."""

    def peak(count: int) -> int:
        lr = write(tmp_path / f"lr{count}.mp4", moving(count, 48, 64))
        a = write(tmp_path / f"a{count}.mp4", np.tile(moving(count, 48, 64), (1, 4, 4, 1)))
        tracemalloc.start()
        compare_page({"a": a}, tmp_path / f"{count}.html", lr=lr, settings=Settings(crf=40))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(4)  # what is imported on the way does not count
    short, long = peak(10), peak(60)
    assert long - short < 3e6, (short, long)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, clips: dict[str, Path], capsys) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        code = run(clips["lr"], clips["a"], "-o", tmp_path / "r.html", "--no-flow")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2
    assert "the page could not be written" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["clips"]


def test_what_lies_beside_another_page_is_not_replaced(tmp_path: Path, clips: dict[str, Path], capsys) -> None:
    (tmp_path / "r_files").mkdir()
    (tmp_path / "r_files/video.mp4").write_text("precious")
    assert run(clips["lr"], clips["a"], "-o", tmp_path / "r.html", "--no-flow") == 2
    assert "video.mp4 already exists" in capsys.readouterr().err


@pytest.mark.parametrize("make", [lambda: Settings(rate=Fraction(0)), lambda: Settings(crf=-1)])
def test_settings_out_of_range(make: Callable) -> None:
    with pytest.raises(UserError, match="got"):
        make()


def test_a_crop_is_a_place() -> None:
    assert Crop(0, 0, 8).overlaps(Crop(7, 7, 8, 3))
    assert not Crop(0, 0, 8).overlaps(Crop(8, 0, 8))


def test_pictures_of_16_bits_are_shown_in_8() -> None:
    deep = np.array([0, 128, 129, 257 * 100, 65535], np.uint16)
    assert eight_bits(deep).tolist() == [0, 0, 1, 100, 255]
    assert eight_bits(np.uint8([7])).tolist() == [7]
