"""The app without its page: the queue of runs, clips, messages, the folders, the command."""

import errno
import json
import logging
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from clips_made import picture, write_video
from PIL import Image

from stablevsr import Progress, SamplingConfig, Stopped, sample_video, upscale
from stablevsr.app import jobs, texts
from stablevsr.app.clips import look_at, read_frame
from stablevsr.app.jobs import Job, JobQueue, Pace
from stablevsr.app.server import is_loopback, open_folders, require_address, serving
from stablevsr.app.studio import FORMATS, Box, Folders, Studio
from stablevsr.cli import main
from stablevsr.engine import store
from stablevsr.engine.workspace import workspace_path
from stablevsr.errors import IncompleteOutput, InputError, OptionsError, ResourceError
from stablevsr.media import Encoding, PartReader, open_reader
from stablevsr.model import StableVSR
from stablevsr.sampling.config import PRESETS

FORMAT = next(iter(FORMATS))


def clip_of(path: Path, frames: int) -> Path:
    """A video of 24x16 pixels, lossless."""
    return write_video(path, [picture(16, 24, index) for index in range(frames)])


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.005)


class Work:
    """A job's work that waits at each of its ten units until it is let on."""

    def __init__(self) -> None:
        self.units, self.began, self.error, self.warning = threading.Semaphore(0), [], None, ""

    def __call__(self, job: Job, progress: Callable[[Progress], bool]) -> int:
        self.began.append(job.number)
        for done in range(1, 11):
            assert self.units.acquire(timeout=60)
            if self.error:
                raise self.error
            if self.warning:
                logging.getLogger("stablevsr.engine").warning(self.warning)
            if progress(Progress("denoise", done, 10)) is False:
                raise Stopped
        return 1

    def go_on(self, units: int = 10) -> None:
        for _ in range(units):
            self.units.release()


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def queue(tmp_path: Path, work: Work) -> Iterator[JobQueue]:
    queue = JobQueue(tmp_path / "runs.json", work, threading.Lock())
    yield queue
    work.go_on(50)
    queue.close()


def submit(queue: JobQueue, name: str = "a_x4.mp4") -> int:
    return queue.submit(input="/in/a.mp4", output=f"/out/{name}", frames=None, config={}).number


def test_the_second_run_waits_is_told_and_starts_by_itself(queue: JobQueue, work: Work) -> None:
    first, second = submit(queue), submit(queue, "b_x4.mp4")
    wait_until(lambda: queue.find(first).state == "running")
    assert queue.find(second).state == "waiting"
    assert "Waiting for another run: a_x4.mp4" in texts.about_job(queue.find(second), queue.ahead_of(second))
    work.go_on(10)
    wait_until(lambda: queue.find(second).state == "running")
    assert queue.find(first).state == "done"
    assert work.began == [first, second]


def test_a_run_is_stopped_and_goes_on(queue: JobQueue, work: Work) -> None:
    number = submit(queue)
    logging.getLogger("stablevsr.engine").warning("of another thread")
    work.warning = "few steps"
    work.go_on(3)
    wait_until(lambda: queue.find(number).progress == Progress("denoise", 3, 10))
    queue.stop(number)
    assert queue.find(number).state == "stopping"
    work.go_on(1)
    wait_until(lambda: queue.find(number).state == "stopped")
    assert 'aria-valuenow="40"' in texts.about_job(queue.find(number), [])
    queue.resume(number)
    work.go_on(10)
    wait_until(lambda: queue.find(number).state == "done")
    assert work.began == [number, number]
    assert queue.find(number).warnings == ("few steps",)
    assert "Note: few steps." in texts.about_job(queue.find(number), [])


def test_a_waiting_run_is_stopped_at_once_and_passed_over(queue: JobQueue, work: Work) -> None:
    first, second, third = submit(queue), submit(queue), submit(queue)
    queue.stop(second)
    assert queue.find(second).state == "stopped"
    work.go_on(20)
    wait_until(lambda: queue.find(third).state == "done")
    assert work.began == [first, third]


@pytest.mark.parametrize(
    ("error", "state", "note"),
    [
        (InputError("clip.mp4 is damaged: replace it"), "failed", "clip.mp4 is damaged: replace it"),
        (ValueError("7"), "failed", "ValueError: 7"),
        (IncompleteOutput("no sound"), "done", "no sound"),
    ],
)
def test_a_run_that_fails_says_why_and_the_next_one_runs(
    queue: JobQueue, work: Work, error: Exception, state: str, note: str
) -> None:
    work.error = error
    first = submit(queue)
    work.go_on(1)
    wait_until(lambda: queue.find(first).state == state)
    assert queue.find(first).note == note
    assert note in texts.about_job(queue.find(first), []) or note[1:] in texts.about_job(queue.find(first), [])
    work.error = None
    second = submit(queue)
    work.go_on(10)
    wait_until(lambda: queue.find(second).state == "done")


def test_runs_outlive_the_app(tmp_path: Path, work: Work) -> None:
    first = JobQueue(tmp_path / "runs.json", work, threading.Lock())
    numbers = [submit(first), submit(first)]
    work.go_on(2)
    wait_until(lambda: first.find(numbers[0]).progress)
    work.go_on(1)
    closing = threading.Thread(target=first.close)
    closing.start()
    work.go_on(1)
    closing.join(60)
    assert not closing.is_alive()
    again = JobQueue(tmp_path / "runs.json", work, threading.Lock())
    assert [job.state for job in again.all()] == ["stopped", "stopped"]
    again.resume(numbers[1])
    work.go_on(20)
    wait_until(lambda: again.find(numbers[1]).state == "done")
    assert again.find(numbers[0]).state == "stopped"
    again.close()


def test_a_damaged_list_of_runs_is_refused(tmp_path: Path, work: Work) -> None:
    for text in ("{", "[1]", '[{"number": 1}]'):
        (tmp_path / "runs.json").write_text(text)
        with pytest.raises(OptionsError, match="list of runs"):
            JobQueue(tmp_path / "runs.json", work, threading.Lock())
        assert (tmp_path / "runs.json").read_text() == text


def test_too_many_runs_are_refused(queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "MAX_WAITING", 2)
    first = submit(queue)
    wait_until(lambda: queue.find(first).state == "running")
    for _ in range(2):
        submit(queue)
    with pytest.raises(OptionsError, match="2 runs are waiting"):
        submit(queue)


def test_the_time_left_follows_the_last_units() -> None:
    pace = Pace()
    assert pace.seconds_left(Progress("denoise", 1, 100), 50.0) is None  # began long before
    assert pace.seconds_left(Progress("denoise", 2, 100), 52.0) is None
    assert pace.seconds_left(Progress("denoise", 3, 100), 54.0) == pytest.approx(97 * 2)
    for done in range(4, 40):
        left = pace.seconds_left(Progress("denoise", done, 100), 54.0 + 5 * (done - 3))
    assert left == pytest.approx(61 * 5)
    assert pace.seconds_left(Progress("decode", 1, 9), 300.0) is None
    assert texts.phase(Progress("decode", 1, 9, 2, 2)) == ("decoding", "frames", "4 of 5 of pass 2 of 2")
    assert [texts.time_left(each) for each in (1, 42, 600)] == ["about 5 s", "about 40 s", "about 10 min"]


def test_hostile_names_are_only_text(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>.png"
    (tmp_path / evil).touch()
    job = Job(1, "/in/x", str(tmp_path / evil), None, {}, state="done", note=evil)
    for html in (texts.about_job(job, []), texts.about_job(replace(job, state="failed"), []), texts.result_of(job)):
        assert "<img src=x" not in html
    assert "<img" not in texts.problem(InputError(evil))


def test_a_clip_is_described(tmp_path: Path) -> None:
    facts = look_at(clip_of(tmp_path / "clip.mp4", 7))
    assert facts.frame_count == 7
    assert f"{facts.width}×{facts.height} ({4 * facts.width}×{4 * facts.height} at 4×), 7 frames" in facts.sentence
    assert read_frame(facts.path, 6).shape == (facts.height, facts.width, 3)
    with pytest.raises(InputError, match=r"clip\.mp4 ends before frame 7"):
        read_frame(facts.path, 7)
    Image.new("RGB", (10, 6)).save(tmp_path / "still.png")
    still = look_at(tmp_path / "still.png")
    assert (still.is_video, still.sentence) == (False, "10×6 (40×24 at 4×), one image")


@pytest.mark.parametrize("name", ["notes.txt", "clip.mp4", "still.png"])
def test_an_upload_that_is_no_video_is_told_in_a_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("no pixels here")
    with pytest.raises(InputError, match=name) as raised:
        look_at(tmp_path / name)
    assert str(tmp_path) not in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.fixture
def studio(tmp_path: Path, tiny_model: StableVSR) -> Iterator[Studio]:
    folders = Folders(tmp_path / "app")
    folders.make()
    studio = Studio(tiny_model, "tiny", folders)
    yield studio
    studio.close()


def uploaded(studio: Studio, frames: int = 5) -> Path:
    """A clip where Gradio puts what a page sends."""
    folder = studio.folders.uploads / "0123abcd"
    folder.mkdir(exist_ok=True)
    return clip_of(folder / "clip.mp4", frames)


def test_a_part_is_upscaled_stopped_and_gone_on_with_to_the_same_bits(
    studio: Studio, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "stablevsr")
    monkeypatch.setattr(store, "SAVE_EVERY", 0)
    facts = look_at(uploaded(studio))
    config = studio.config("exact", {"steps": 3, "seed": 5})
    job = studio.submit(facts, 1, 3, config, "MKV (lossless)")
    wait_until(lambda: (now := studio.jobs.find(job.number)).progress and now.progress.phase == "denoise")
    studio.jobs.stop(job.number)
    wait_until(lambda: studio.jobs.find(job.number).state == "stopped")
    facts.path.unlink()  # the page may be closed: the run has a clip of its own
    studio.jobs.resume(job.number)
    wait_until(lambda: studio.jobs.find(job.number).state == "done")
    assert re.search(r"continuing: \d+ of 9 in phase denoise are done", caplog.text)
    assert Path(job.output) == studio.folders.outputs / "clip_upscaled.mkv"
    with open_reader(job.input) as clip:
        upscale(studio.model, PartReader(clip, 1, 4), tmp_path / "direct.mkv", config, encoding=Encoding("ffv1"))
    for index in range(3):
        assert np.array_equal(read_frame(Path(job.output), index), read_frame(tmp_path / "direct.mkv", index))
    assert look_at(Path(job.output)).frame_count == 3


def test_results_never_replace_each_other_and_an_image_gives_an_image(studio: Studio) -> None:
    path = studio.folders.uploads / "ab" / "still.webp"
    path.parent.mkdir()
    Image.new("RGB", (8, 6), "red").save(path)
    config = studio.config("weights", {"steps": 1})
    numbers = [studio.submit(look_at(path), 0, 0, config, FORMAT).number for _ in range(2)]
    wait_until(lambda: all(studio.jobs.find(number).state == "done" for number in numbers))
    names = [studio.jobs.find(number).name for number in numbers]
    assert names == ["still_upscaled.png", "still_upscaled-2.png"]
    with Image.open(studio.folders.outputs / names[0]) as image:
        assert image.size == (32, 24)
    for number in numbers:
        studio.discard(number)
    assert sorted(each.name for each in studio.folders.outputs.iterdir()) == sorted(names)
    assert not list(studio.folders.inputs.iterdir())


def test_discarding_deletes_the_unfinished_work(studio: Studio) -> None:
    job = studio.submit(look_at(uploaded(studio)), 0, 4, studio.config("exact", {"steps": 50}), FORMAT)
    wait_until(lambda: workspace_path(Path(job.output)).exists())
    with pytest.raises(OptionsError, match="stop it first"):
        studio.discard(job.number)
    studio.jobs.stop(job.number)
    wait_until(lambda: studio.jobs.find(job.number).state == "stopped")
    studio.discard(job.number)
    assert not list(studio.folders.outputs.iterdir())
    assert not list(studio.folders.inputs.iterdir())
    assert studio.jobs.all() == []


def test_a_preview_is_the_frame_upscaled_alone(studio: Studio) -> None:
    facts, seen = look_at(uploaded(studio)), []
    config = studio.config("exact", {"steps": 2, "seed": 3})
    before, after = studio.preview(facts.path, 2, None, config, seen.append)
    assert before.shape == after.shape == (4 * facts.height, 4 * facts.width, 3)
    frame = read_frame(facts.path, 2)
    assert np.array_equal(after, sample_video(studio.model, frame[None], config)[0])
    assert seen[-1].phase == "decode"
    part = studio.preview(facts.path, 2, Box(4, 2, 9, 7), config, seen.append)
    assert np.array_equal(part[1], sample_video(studio.model, frame[None, 2:9, 4:13].copy(), config)[0])
    assert part[0].shape == (28, 36, 3)

    def stop(now: Progress) -> None:
        studio.stop_preview()

    assert studio.preview(facts.path, 2, None, config, stop) is None


def test_preview_and_run_do_not_compute_at_the_same_time(studio: Studio) -> None:
    facts = look_at(uploaded(studio))
    config = studio.config("exact", {"steps": 50})
    job = studio.submit(facts, 0, 4, config, FORMAT)
    wait_until(lambda: studio.jobs.find(job.number).state == "running")
    with pytest.raises(ResourceError, match="the model is busy"):
        studio.preview(facts.path, 0, None, config, lambda now: None)
    studio.jobs.stop(job.number)


def test_bad_options_are_refused(studio: Studio) -> None:
    assert "streaming" in studio.presets()
    assert studio.presets()["weights"] == PRESETS["exact"]
    for fields in ({"steps": 0}, {"steps": 1001}, {"seed": -1}, {"color_fix": "paint"}):
        with pytest.raises(OptionsError):
            studio.config("exact", fields)
    facts = look_at(uploaded(studio))
    for first, last in ((-1, 2), (3, 2), (0, 5)):
        with pytest.raises(OptionsError, match="expected some of 0 to 4"):
            studio.submit(facts, first, last, SamplingConfig(), FORMAT)


def test_one_app_a_folder(tmp_path: Path) -> None:
    folders = Folders(tmp_path / "app")
    with open_folders(folders):
        (folders.outputs / "kept.mp4").touch()
        with pytest.raises(ResourceError, match="in use by another app"), open_folders(folders):
            pass
    (folders.uploads / "old").mkdir()
    with open_folders(folders):
        assert not list(folders.uploads.iterdir())
        assert (folders.outputs / "kept.mp4").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="choose another with --folder"), open_folders(Folders(tmp_path / "file")):
        pass


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FULL = "cannot be written (No space left on device): make room, then try again"


def test_a_clip_that_finds_no_room_is_not_queued(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, config = look_at(uploaded(studio)), studio.config("exact", {"steps": 1})
    for place in ("stablevsr.app.studio.shutil.copyfile", "stablevsr.app.jobs.replacing"):
        with monkeypatch.context() as disk:
            disk.setattr("stablevsr.app.studio.os.link", full)
            disk.setattr(place, full)
            with pytest.raises(ResourceError, match=re.escape(FULL)):
                studio.submit(facts, 0, 4, config, FORMAT)
        assert studio.jobs.all() == []
    job = studio.submit(facts, 0, 0, config, FORMAT)
    wait_until(lambda: studio.jobs.find(job.number).state == "done")


def test_a_result_that_finds_no_room_can_go_on_later(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, config = look_at(uploaded(studio)), studio.config("exact", {"steps": 2})
    with monkeypatch.context() as disk:
        disk.setattr("stablevsr.engine.array_file.ArrayFile._put", full)
        job = studio.submit(facts, 0, 1, config, FORMAT)
        wait_until(lambda: studio.jobs.find(job.number).state == "failed")
    assert "(No space left on device): make room, then run the same command again" in studio.jobs.find(job.number).note
    studio.jobs.resume(job.number)
    wait_until(lambda: studio.jobs.find(job.number).state == "done")


def test_runs_go_on_while_their_list_cannot_be_saved(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    facts, config = look_at(uploaded(studio)), studio.config("exact", {"steps": 1})
    studio._device.acquire()  # until the disk is full
    job = studio.submit(facts, 0, 1, config, FORMAT)
    with monkeypatch.context() as disk:
        disk.setattr("stablevsr.app.jobs.replacing", full)
        studio._device.release()
        wait_until(lambda: studio.jobs.find(job.number).state == "done")
    assert "the list of runs cannot be saved ([Errno 28] No space left on device)" in caplog.text
    assert "list of runs" not in "".join(studio.jobs.find(job.number).warnings)
    again = studio.submit(facts, 0, 1, config, FORMAT)  # which saves all
    wait_until(lambda: studio.jobs.find(again.number).state == "done")
    assert [row["state"] for row in json.loads(studio.folders.jobs.read_text())] == ["done", "done"]


def test_a_full_disk_is_a_sentence_on_the_page(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'stablevsr[app]'")
    from stablevsr.app.page import taking
    from stablevsr.app.view import previewing, showing

    facts, place = look_at(uploaded(studio)), (1, "the whole frame", (0.5, 0.5))
    options = ("exact", 1, 0, 1.0, "4×", "none")
    handlers = {
        1: lambda: taking(studio)(str(facts.path)),
        -1: lambda: showing(studio)(facts, *place),
        3: lambda: previewing(studio)(lambda *_, **__: None, facts, *place, *options),
    }
    for position, handler in handlers.items():
        with monkeypatch.context() as disk:
            disk.setattr("PIL.Image.Image.save", full)
            assert FULL in handler()[position]
        assert FULL not in str(handler())


def test_an_upload_that_finds_no_room_is_a_sentence_on_the_page(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'stablevsr[app]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    body = b"--cut\r\nContent-Disposition: form-data; name=files; filename=a.mp4\r\n\r\nabc\r\n--cut--\r\n"
    with serving(studio, "127.0.0.1", port, 10**6) as address:
        request = urllib.request.Request(
            f"{address}gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=cut"}
        )
        with monkeypatch.context() as disk:
            disk.setattr("gradio.route_utils.NamedTemporaryFile", full)
            with pytest.raises(urllib.error.HTTPError, match="507") as refused:
                urllib.request.urlopen(request, timeout=60)
        assert refused.value.read().decode() == f"{studio.folders.uploads} {FULL}"
        (kept,) = json.loads(urllib.request.urlopen(request, timeout=60).read())
        assert Path(kept).read_bytes() == b"abc"


def test_hosts_that_only_this_machine_reaches() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "::1", "127.3.2.1")))
    assert not any(map(is_loopback, ("0.0.0.0", "192.168.1.2", "::", "example.com")))


def test_an_address_is_checked_before_weights_are_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"port {port} is in use"):
            require_address("127.0.0.1", port)
    require_address("127.0.0.1", port)
    for host in ("203.0.113.9", "no.such.host.invalid"):
        with pytest.raises(OptionsError, match=f"got host {host}"):
            require_address(host, port)
    for wrong in (0, 70000):
        with pytest.raises(OptionsError, match="expected 1 to 65535"):
            require_address("127.0.0.1", wrong)


def test_the_command_asks_for_gradio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["app", "--folder", str(tmp_path / "app")]) == 2
    assert "pip install 'stablevsr[app]'" in capsys.readouterr().err
    assert not (tmp_path / "app").exists()


def test_the_part_of_a_frame_that_is_previewed(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'stablevsr[app]'")
    from stablevsr.app.view import AREAS, MAX_SHOWN, box_of, first_area, move, picture_of

    Image.new("RGB", (1920, 1080), "gray").save(tmp_path / "large.png")
    large = look_at(tmp_path / "large.png")
    area = first_area(large)
    assert AREAS[area] == (320, 240)
    assert box_of(large, area, (0.5, 0.5)) == Box(800, 420, 320, 240)
    assert box_of(large, area, (1.0, 0.0)) == Box(1600, 0, 320, 240)
    shown = np.asarray(picture_of(large, 0, area, (0.5, 0.5)))
    assert shown.shape == (720, MAX_SHOWN, 3)
    rows, columns = np.nonzero((shown != 128).any(-1))
    scale = MAX_SHOWN / 1920
    ends = [each * scale for each in (420, 660, 800, 1120)]
    assert [rows.min(), rows.max(), columns.min(), columns.max()] == pytest.approx(ends, abs=2)
    assert move(shown, SimpleNamespace(index=(640, 180))) == (0.5, 0.25)
    Image.new("RGB", (200, 100)).save(tmp_path / "wide.png")
    wide = look_at(tmp_path / "wide.png")
    assert box_of(wide, first_area(wide), (0.5, 0.5)) is None
    assert box_of(wide, area, (0.5, 0.5)) is None
    assert box_of(wide, "160×120 pixels", (0.5, 0.5)) == Box(20, 0, 160, 100)


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("4×", {}),
        ("2×", {"scale": 2.0}),
        ("2.5x", {"scale": 2.5}),
        ("1080 lines", {"height": 1080}),
        ("720p", {"height": 720}),
        ("1280 x 720", {"size": "1280x720"}),
    ],
)
def test_sizes_as_they_are_typed(text: str, fields: dict[str, object]) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'stablevsr[app]'")
    from stablevsr.app.settings import size_fields

    assert size_fields(text) == fields
    for wrong in ("large", "2x2x2", "-1"):
        with pytest.raises(OptionsError, match="expected one such as"):
            size_fields(wrong)
