"""The page of `stablevsr compare` in a real browser: what its users see and touch. Skipped where there is none."""

import io
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from stablevsr.compare import compare
from stablevsr.compare.collect import Settings
from stablevsr.compare.compare import compare_inline, compare_page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

FRAMES, HEIGHT, WIDTH = 20, 240, 320
VIEW = {"width": 1000, "height": 800}


def colours(version: int) -> np.ndarray:
    """(n, 3) uint8: a colour for every frame that no other frame or version has; red and green tell the frame."""
    levels = np.linspace(40, 215, FRAMES)
    return np.stack([levels, 255 - levels, np.full(FRAMES, 70 + 58 * version)], -1).round().astype(np.uint8)


def identify(pixel: np.ndarray) -> tuple[int, int]:
    """Version and frame of the nearest colour. Browsers convert YUV coarsely: blue may be off by 8."""
    all_colours = np.stack([colours(version) for version in range(3)]).astype(int)
    distances = np.abs(all_colours - pixel)
    assert distances.max(-1).min() <= 10, pixel
    return tuple(map(int, np.unravel_index(distances.sum(-1).argmin(), distances.shape[:2])))


def flat(version: int, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.broadcast_to(colours(version)[:frames, None, None], (frames, height, width, 3)).copy()


class Viewer:
    """A page that is open, and what it complained about."""

    def __init__(self, page: "playwright.Page") -> None:
        self.page, self.complaints = page, []
        page.on("console", lambda message: self._hear(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        page.on("request", lambda request: self._check(request.url))

    def _hear(self, text: str) -> None:
        if "getImageData" not in text:  # advice on what we do here, not the page
            self.complaints.append(text)

    def _check(self, url: str) -> None:
        if not url.startswith(("file:", "blob:", "data:")):
            self.complaints.append(url)

    def open(self, path: Path) -> "Viewer":
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("#view[data-frame]")
        self.at(0)
        return self

    def at(self, frame: int) -> None:
        self.page.wait_for_selector(f"#view[data-frame='{frame}']", timeout=10000)

    @property
    def frame(self) -> int:
        return int(self.page.get_attribute("#view", "data-frame"))

    def pixel(self, x: float, y: float = 0.5) -> np.ndarray:
        """The colour on the canvas at this share of its width and height."""
        code = """([x, y]) => { const c = document.getElementById('view'), at = [x * c.width, y * c.height];
            return [...c.getContext('2d').getImageData(...at.map(Math.floor), 1, 1).data]; }"""
        return np.array(self.page.evaluate(code, [x, y])[:3])

    def shows(self, x: float, version: int, frame: int) -> bool:
        """Whether this version and frame is at this share of the width, going by its colour.

        A browser may report that it has sought before it hands out the new picture; the page then draws once more when
        that is there, which may take until the next refresh of the screen, so this looks for up to two seconds.
        """
        until = time.monotonic() + 2
        while identify(self.pixel(x)) != (version, frame):
            if time.monotonic() > until:
                return False
            self.page.wait_for_timeout(20)
        return True

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    @property
    def split(self) -> int:
        return int(self.page.get_attribute("#divider", "aria-valuenow"))


@pytest.fixture
def viewer(browser: "playwright.Browser") -> Iterator[Callable[..., Viewer]]:
    """Opens pages; at the end, none may have complained."""
    opened = []

    def open_page(path: Path, **options: object) -> Viewer:
        page = browser.new_context(**{"viewport": VIEW, **options}).new_page()
        opened.append(Viewer(page))
        return opened[-1].open(path)

    yield open_page
    complaints = [complaint for viewer in opened for complaint in viewer.complaints]
    for viewer in opened:
        viewer.page.context.close()
    assert not complaints


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LR, one result and the truth: versions 0, 1 and 2 of flat colours."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    settings = Settings(crf=4, rate=Fraction(10))
    compare_page({"one": flat(1)}, path, lr=flat(0)[:, ::4, ::4], truth=flat(2), settings=settings)
    return path


def test_the_page_opens_with_lr_on_the_left_and_the_result_on_the_right(viewer: Callable, report: Path) -> None:
    page = viewer(report)
    assert page.shows(0.45, 0, 0)
    assert page.shows(0.55, 1, 0)
    assert page.page.inner_text("#left-tag") == "bicubic ×4"
    assert page.page.inner_text("#right-tag") == "one"
    assert page.page.inner_text("#frame") == "0 of 0–19"


def test_every_step_shows_its_frame(viewer: Callable, report: Path) -> None:
    page = viewer(report)
    for frame in range(1, FRAMES):
        page.press("ArrowRight")
        page.at(frame)
        assert page.shows(0.45, 0, frame), frame
        assert page.shows(0.55, 1, frame), frame
    for frame in range(FRAMES - 2, -1, -1):
        page.page.click("#back")
        page.at(frame)
        assert page.shows(0.55, 1, frame), frame
    page.press("ArrowLeft")
    page.press("End")
    page.at(FRAMES - 1)
    page.press("Shift+ArrowLeft")
    page.at(FRAMES - 11)
    page.press("Home")
    page.at(0)
    page.press(*["ArrowRight"] * 7)  # faster than it can seek
    page.at(7)
    assert page.shows(0.55, 1, 7)
    page.page.fill("#seek", "13")
    page.at(13)
    assert page.shows(0.55, 1, 13)


def test_it_plays_in_step_and_stops_on_the_frame_it_shows(viewer: Callable, report: Path) -> None:
    page = viewer(report)
    page.press("Space")
    while page.frame < 4:
        page.page.wait_for_timeout(50)
    assert page.page.inner_text("#play") == "Pause"
    page.page.click("#play")
    page.page.wait_for_timeout(500)
    frame = page.frame
    assert page.shows(0.45, 0, frame)
    assert page.shows(0.55, 1, frame)
    assert page.page.inner_text("#play") == "Play"
    page.press("ArrowRight")
    page.at(min(frame + 1, FRAMES - 1))


def test_the_slider_follows_mouse_finger_and_keys(viewer: Callable, report: Path) -> None:
    page = viewer(report, has_touch=True)
    box = page.page.locator("#stage").bounding_box()
    middle = box["y"] + box["height"] / 2
    page.page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.page.mouse.down()
    page.page.mouse.move(box["x"] + 0.7 * box["width"], middle, steps=4)
    page.page.mouse.up()
    assert page.split == 70
    page.page.mouse.move(box["x"] + 0.2 * box["width"], middle)
    assert page.split == 70
    assert page.shows(0.6, 0, 0)
    page.page.focus("#divider")
    page.press("ArrowLeft", "ArrowLeft", "PageDown")
    assert page.split == 58
    page.press("Home")
    assert (page.split, page.shows(0.3, 1, 0)) == (0, True)
    page.press("End")
    assert (page.split, page.shows(0.65, 0, 0)) == (100, True)
    page.page.evaluate("document.activeElement.blur()")
    page.press(",", ",", ".")
    assert page.split == 95
    touches = page.page.context.new_cdp_session(page.page)
    for kind, x in (("touchStart", 0.95), ("touchMove", 0.6), ("touchMove", 0.4)):
        points = [{"x": box["x"] + x * box["width"], "y": middle}]
        touches.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    touches.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    assert page.split == 40


def test_the_sides_are_chosen(viewer: Callable, report: Path) -> None:
    page = viewer(report)
    page.page.select_option("#right", label="truth")
    assert page.shows(0.55, 2, 0)
    page.page.click("#swap")
    assert page.shows(0.45, 2, 0)
    assert page.shows(0.55, 0, 0)
    page.page.evaluate("document.activeElement.blur()")
    page.press("r")
    assert page.shows(0.55, 1, 0)
    page.press("l", "l", "x")
    assert page.shows(0.45, 1, 0)
    assert page.page.inner_text("#right-tag") == "one"


def test_zoom_and_pan(viewer: Callable, tmp_path: Path) -> None:
    """A white square of 40 pixels around the middle of a dark frame tells how large a pixel is and where it lies."""
    clip = np.full((2, HEIGHT, WIDTH, 3), 30, np.uint8)
    clip[:, 100:140, 140:180] = 255
    compare_page({"a": clip, "b": clip}, tmp_path / "r.html", settings=Settings(crf=4))
    page = viewer(tmp_path / "r.html")
    code = """() => { const c = document.getElementById('view'), y = c.height >> 1;
        const row = c.getContext('2d').getImageData(0, 0, c.width, c.height).data, bright = [];
        for (let x = 0; x < c.width; x++) if (row[4 * (y * c.width + x)] > 140) bright.push(x);
        return [bright[0], bright.length, c.width]; }"""

    def square() -> tuple[int, int]:
        start, length, width = page.page.evaluate(code)
        return start + length // 2 - width // 2, length

    for key, factor in (("1", 1), ("2", 2), ("4", 4), ("0", 2)):
        page.press(key)
        offset, length = square()
        assert abs(offset) <= 1
        assert length == pytest.approx(40 * factor, abs=factor)
    page.page.click("text=4×")
    assert page.page.get_attribute("[data-zoom='4']", "aria-pressed") == "true"
    box = page.page.locator("#stage").bounding_box()
    start = box["x"] + 0.2 * box["width"], box["y"] + 20
    page.page.mouse.move(*start)
    page.page.mouse.down()
    page.page.mouse.move(start[0] + 60, start[1], steps=3)
    page.page.mouse.up()
    assert page.split == 50
    assert square()[0] == pytest.approx(60, abs=2)
    page.press("d")
    assert square()[0] == pytest.approx(0, abs=2)
    page.press(*["d"] * 30)  # no further than the border of the picture
    assert square()[0] == pytest.approx(-(WIDTH * 4 - box["width"]) / 2, abs=3)


def test_one_frame_is_shown_without_loss(viewer: Callable, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (1, HEIGHT, WIDTH, 3), dtype=np.uint8) for _ in range(2))
    compare_page({"a": a, "b": b}, tmp_path / "r.html")
    page = viewer(tmp_path / "r.html")
    page.press("1", " ", "ArrowRight")
    code = """([w, h]) => { const c = document.getElementById('view');
        return [...c.getContext('2d').getImageData((c.width - w) >> 1, (c.height - h) >> 1, w, h).data]; }"""
    seen = np.array(page.page.evaluate(code, [WIDTH, HEIGHT]), np.uint8).reshape(HEIGHT, WIDTH, 4)[..., :3]
    assert np.array_equal(seen[:, : WIDTH // 2], a[0, :, : WIDTH // 2])
    assert np.array_equal(seen[:, WIDTH // 2 :], b[0, :, WIDTH // 2 :])
    assert not page.page.is_visible("#play")


def test_a_video_beside_the_page_plays(viewer: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The canvas may not be read back then, so we look at the screen."""
    monkeypatch.setattr(compare, "MAX_INLINE", 1000)
    out = tmp_path / "50% #1?.html"
    compare_page({"a": flat(0), "b": flat(1)}, out, settings=Settings(crf=4))
    page = viewer(out)
    page.press("ArrowRight", "ArrowRight")
    page.at(2)
    picture = iio.imread(io.BytesIO(page.page.locator("#stage").screenshot()))[..., :3].astype(int)
    for x, version in ((0.4, 0), (0.6, 1)):
        pixel = picture[int(0.3 * picture.shape[0]), int(x * picture.shape[1])]
        assert identify(pixel) == (version, 2)


def test_a_video_that_is_gone_is_said(browser: "playwright.Browser", tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(compare, "MAX_INLINE", 1000)
    compare_page({"a": flat(0, 2)}, tmp_path / "r.html")
    (tmp_path / "r_files/video.mp4").unlink()
    page = browser.new_page()
    page.goto((tmp_path / "r.html").as_uri())
    page.wait_for_selector("#problem:visible")
    assert "r_files/video.mp4 is not beside this page" in page.inner_text("#problem")
    page.close()


def test_hostile_labels_are_only_text(viewer: Callable, tmp_path: Path) -> None:
    names = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\"'&amp;<!--"]
    compare_page({name: flat(i, 2) for i, name in enumerate(names)}, tmp_path / "r.html", truth=flat(2, 2))
    page = viewer(tmp_path / "r.html")
    assert page.page.locator("#left option").all_inner_texts() == [*names, "truth"]
    assert page.page.inner_text("#left-tag") == names[0]
    assert all(name in page.page.inner_text("main") for name in names)


def test_a_notebook_shows_the_inline_version(browser: "playwright.Browser", tmp_path: Path) -> None:
    shown = compare_inline({"a": flat(0, 4), "b": flat(1, 4)}, settings=Settings(crf=4))
    (tmp_path / "notebook.html").write_text(f"<!DOCTYPE html><body>{shown._repr_html_()}", encoding="utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "notebook.html").as_uri())
    frame = page.frame_locator("iframe")
    frame.locator("#view[data-frame='0']").wait_for()
    frame.locator("#forward").click()
    frame.locator("#view[data-frame='1']").wait_for()
    assert not frame.locator("#problem").is_visible()
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_in_its_width_and_in_its_colours(viewer: Callable, report: Path, scheme: str) -> None:
    page = viewer(report, viewport={"width": 375, "height": 667}, color_scheme=scheme, device_scale_factor=2)
    assert page.page.evaluate("document.documentElement.scrollWidth") == 375
    back, text = page.page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    brightness = [sum(map(int, colour[4:-1].split(","))) for colour in (back, text)]
    assert (brightness[0] > 600 > brightness[1]) if scheme == "light" else (brightness[0] < 150 < brightness[1])
    assert page.shows(0.45, 0, 0)
    for selector in ("#left", "#right", "#play", "#seek", "#divider", "[data-zoom='2']"):
        box = page.page.locator(selector).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 375
        assert box["height"] >= 36


def test_everything_is_reached_by_the_keyboard_and_shows_its_focus(viewer: Callable, report: Path) -> None:
    code = """() => { const e = document.activeElement, name = e.id || e.dataset.zoom || e.className || e.tagName;
        return [name, getComputedStyle(e).outlineStyle, getComputedStyle(e, '::after').outlineStyle]; }"""
    page = viewer(report)
    reached = set()
    for _ in range(60):
        page.press("Tab")
        name, style, shadow = page.page.evaluate(code)
        reached.add(name)
        if name != "BODY":
            assert "solid" in (style, shadow), name
    wanted = {"left", "swap", "right", "divider", "back", "play", "forward", "seek", "speed", "0", "1", "2", "4"}
    assert wanted | {"SUMMARY", "row crops"} <= reached


def test_frames_are_shown_from_below(viewer: Callable, report: Path) -> None:
    """Buttons at crops and clicks into curves go to their frame, and the curves say where we are."""
    page = viewer(report)
    button = page.page.locator("button[data-frame]").first
    frame = int(button.get_attribute("data-frame"))
    button.click()
    page.at(frame)
    assert page.page.get_attribute("[data-zoom='4']", "aria-pressed") == "true"
    chart = page.page.locator(".chart").first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    x = (56 + (640 - 66) * 9 / 19) / 640
    page.page.mouse.click(box["x"] + x * box["width"], box["y"] + box["height"] / 2)
    page.at(9)
    assert float(chart.locator(".now").get_attribute("x1")) == pytest.approx(56 + 574 * 9 / 19, abs=0.1)
