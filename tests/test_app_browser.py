"""The app in a real browser, with the bundled weights: its whole path. Skipped without Gradio or a browser."""

import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from clips_made import picture, write_video

from stablevsr import Progress, build_model, upscale
from stablevsr.app.clips import look_at, read_frame
from stablevsr.app.jobs import Job
from stablevsr.app.server import open_folders, serving
from stablevsr.app.studio import Folders, Studio
from stablevsr.engine.progress import OnProgress
from stablevsr.media import Encoding, PartReader, open_reader

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
pytest.importorskip("gradio", reason="gradio is not installed: pip install 'stablevsr[app]'")

STEPS = 3
MAX_UPLOAD = 1_000_000
PHONE = {"width": 375, "height": 700}


def clip_of(path: Path, frames: int) -> Path:
    """A video of 24x16 pixels, lossless."""
    return write_video(path, [picture(16, 24, index) for index in range(frames)])


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def lookups() -> list[str]:
    """The hosts that this process has connected to or looked up, since the app was started."""
    return []


class HeldStudio(Studio):
    """A studio whose runs wait at their second unit of work while `free` is not set, however fast the machine is."""

    free = threading.Event()

    def _upscale(self, job: Job, progress: OnProgress) -> int:
        def hold(now: Progress) -> bool | None:
            if now.done == 2:
                assert self.free.wait(60)
            return progress(now)

        return super()._upscale(job, hold)


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HeldStudio]:
    folders = Folders(tmp_path_factory.mktemp("app") / "files")
    with open_folders(folders):
        studio = HeldStudio(build_model(device="cpu"), "the bundled small model", folders)
        yield studio
        studio.free.set()
        studio.close()


@pytest.fixture(scope="module")
def address(studio: Studio, lookups: list[str]) -> Iterator[str]:
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def connecting(self: socket.socket, to: object) -> None:
        lookups.append(str(to[0] if isinstance(to, tuple) else to))
        connect(self, to)

    def looking_up(host: object, *more: object, **others: object) -> object:
        lookups.append(str(host))
        return look_up(host, *more, **others)

    socket.socket.connect, socket.getaddrinfo = connecting, looking_up
    with serving(studio, "127.0.0.1", free_port(), MAX_UPLOAD) as address:
        yield address
    socket.socket.connect, socket.getaddrinfo = connect, look_up


@pytest.fixture
def page(browser: "playwright.Browser", address: str) -> Iterator["playwright.Page"]:
    """The page, open; at the end, nothing has been complained about and nothing was asked of another server."""
    page = browser.new_context(viewport={"width": 1200, "height": 900}).new_page()
    complaints: list[str] = []

    def hear(message: "playwright.ConsoleMessage") -> None:
        # Gradio's page asks how far an upload is, which a small one may no longer know.
        if message.type == "error" and "upload_progress" not in message.location["url"]:
            complaints.append(message.text)

    page.on("console", hear)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request",
        lambda request: request.url.startswith((address, "blob:", "data:")) or complaints.append(request.url),
    )
    page.goto(address)
    page.wait_for_selector("#start")
    yield page
    page.context.close()
    assert not complaints


def give(page: "playwright.Page", clip: Path) -> None:
    page.set_input_files("#clip input[type=file]", clip)


def test_the_whole_path(page: "playwright.Page", studio: HeldStudio, tmp_path: Path) -> None:
    """Upload, a part, preview, run, a second run that waits, stop, go on, download."""
    clip = clip_of(tmp_path / "holiday.mp4", 6)
    give(page, clip)
    page.wait_for_selector("#about >> text=6 frames")
    assert page.is_enabled("#start")
    page.focus("#part .first")
    page.keyboard.press("ArrowRight")
    page.focus("#part .last")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#part output").startswith("frames 1 to 3: 3 of 6")
    page.fill("#steps input", "1")
    page.keyboard.press("Tab")
    page.click("#preview")
    page.wait_for_selector("#pair img >> nth=1", timeout=60000)
    width = "images => images[1].naturalWidth"
    assert page.locator("#pair img").evaluate_all(width) == 4 * look_at(clip).width
    assert "on its own" in page.inner_text("#preview-told")
    page.click("#back")
    page.wait_for_selector("#frame img")
    assert not page.is_visible("#back")

    page.fill("#steps input", str(STEPS))
    page.fill("#seed input", "7")
    page.keyboard.press("Tab")
    page.click("#start")
    page.wait_for_selector("#told >> text=holiday_upscaled.mp4 is in the list of runs")
    page.click("#start")
    page.wait_for_selector("#told >> text=It waits for holiday_upscaled.mp4")
    page.wait_for_selector("#job >> text=Waiting for another run: holiday_upscaled.mp4")
    page.locator("#runs label").nth(1).click()
    page.wait_for_selector("#job h3 >> text=/^holiday_upscaled.mp4$/")
    page.wait_for_selector("#job [role=progressbar]")
    page.click("#stop")
    page.wait_for_selector("#job >> text=Stopping after")
    studio.free.set()
    page.wait_for_selector("#job >> text=Stopped.", timeout=60000)
    page.click("#resume")
    page.reload()
    page.wait_for_selector("#runs label >> nth=1 >> text=holiday_upscaled.mp4: done", timeout=120000)
    page.locator("#runs label").nth(1).click()
    page.wait_for_selector("#result a.download >> text=Download holiday_upscaled.mp4")
    with page.expect_download() as download:
        page.click("#result a.download")
    assert download.value.suggested_filename == "holiday_upscaled.mp4"
    download.value.save_as(tmp_path / "result.mp4")
    # The input lies over the result, at the same frame: the part began with frame 1.
    page.wait_for_function("() => document.querySelectorAll('#result video[src]').length === 2")
    at = "() => [...document.querySelectorAll('#result video')].map((each) => each.readyState > 1 && each.currentTime)"
    page.wait_for_function(f"() => {{ const [a, b] = ({at})(); return Math.abs(b - a - 1 / 30) < 0.002; }}")
    page.locator("#result .cut").fill("25")
    assert page.evaluate("getComputedStyle(document.querySelector('#result .before')).clipPath").startswith("inset(0")
    assert page.locator("#result .stage").get_attribute("style") == "--cut: 25%;"

    config = studio.config("weights", {"steps": STEPS, "seed": 7})
    with open_reader(clip) as whole:
        upscale(studio.model, PartReader(whole, 1, 4), tmp_path / "direct.mp4", config, encoding=Encoding("h264"))
    for index in range(3):
        assert (read_frame(tmp_path / "result.mp4", index) == read_frame(tmp_path / "direct.mp4", index)).all()


def test_an_upload_that_is_no_video(page: "playwright.Page", tmp_path: Path) -> None:
    (tmp_path / "notes.mp4").write_text("no pixels here")
    give(page, tmp_path / "notes.mp4")
    page.wait_for_selector("#about [role=alert] >> text=notes.mp4")
    assert str(tmp_path) not in page.inner_text("#about")
    assert not page.is_enabled("#start")
    assert not page.is_enabled("#preview")


def test_an_upload_that_is_too_large(browser: "playwright.Browser", address: str, tmp_path: Path) -> None:
    """Not with the fixture `page`: the browser itself complains of the answer."""
    (tmp_path / "large.mp4").write_bytes(bytes(MAX_UPLOAD + 1))
    page = browser.new_page()
    page.goto(address)
    give(page, tmp_path / "large.mp4")
    page.wait_for_selector("text=exceed the maximum allowed size")
    assert not page.is_enabled("#start")
    assert "up to 1 MB" in page.inner_text("#clip")
    page.close()
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
    body = form + bytes(MAX_UPLOAD + 1) + b"\r\n--x--\r\n"
    header = {"Content-Type": "multipart/form-data; boundary=x"}
    with pytest.raises(urllib.error.HTTPError) as refused:  # not only by the page
        urllib.request.urlopen(urllib.request.Request(f"{address}gradio_api/upload", body, header))
    assert refused.value.code == 413


def test_only_uploads_and_results_are_served(address: str, studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (studio.folders.outputs / "result.png").write_bytes(b"a result")
    with urllib.request.urlopen(f"{address}gradio_api/file={studio.folders.outputs}/result.png") as answer:
        assert answer.read() == b"a result"
        assert "default-src 'self'" in answer.headers["content-security-policy"]
    outside = [tmp_path / "secret.txt", studio.folders.jobs, Path(__file__), Path("/etc/passwd"), studio.folders.root]
    asked = [f"file={path}" for path in outside] + [f"file={studio.folders.outputs}/../runs.json"]
    asked += ["file=http://127.0.0.1:9/x", "proxy=http://127.0.0.1:9/x"]
    for what in asked:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}gradio_api/{what}")
        assert refused.value.code in (403, 404), what
    elsewhere = urllib.request.Request(address, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(elsewhere)
    assert refused.value.code == 400


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_in_its_width_and_in_its_colors(
    browser: "playwright.Browser", address: str, tmp_path: Path, scheme: str
) -> None:
    page = browser.new_context(viewport=PHONE, color_scheme=scheme, has_touch=True).new_page()
    page.goto(address)
    page.wait_for_selector("#start")
    give(page, clip_of(tmp_path / "clip.mp4", 4))
    page.wait_for_selector("#part output >> text=frames 0 to 3")
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", back)[:3]))
    assert brightness > 600 if scheme == "light" else brightness < 150
    page.context.close()


def test_nothing_beyond_this_machine_was_asked(address: str, lookups: list[str]) -> None:
    """By the server; the last test of this file, so that all has happened."""
    assert lookups
    assert {host for host in lookups if not host.startswith(("127.", "localhost", "::1", "/"))} == set()
