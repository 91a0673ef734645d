"""Streaming from file to file: written as it goes, killed and continued with the same bits, flat in memory and disk."""

import logging
import os
import shutil
import subprocess
import sys
import threading
from itertools import product
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from clips_made import film, write_video
from failing_disk import FailingOnce
from media_tools import picture_times, read_frames, write_frames
from stream_models import TINY_STREAM, random_stream_model

from stablevsr import Progress, Stopped, UserError, build_model, sample_video, upscale
from stablevsr.atomic import remove
from stablevsr.engine import store, stream_file
from stablevsr.engine.workspace import ArrayFile, workspace_path
from stablevsr.media import Encoding, open_reader, picture_file, still_writer
from stablevsr.media.video_reader import VideoReader
from stablevsr.model import StableVSR
from stablevsr.sampling.config import STREAMING
from stablevsr.weights import Header, write

LOSSLESS = Encoding("ffv1")
COUNT = 11


def pictures(count: int = COUNT, height: int = 6, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream") / "tiny.safetensors"
    sampling = STREAMING.with_fields({"steps": 2})
    write(path, Header(TINY_STREAM, {"note": "random"}, sampling=sampling), random_stream_model().state_dict())
    return path


@pytest.fixture(scope="module")
def model(weights: Path) -> StableVSR:
    model = build_model(weights, device="cpu")
    assert sample_video(model, pictures(3)).std(axis=(0, 1, 2)).min() > 5  # else any two runs would be equal
    return model


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_frames(tmp_path / "in", pictures())


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four frames, so that a short clip has several; states are saved as often as can be."""
    for place in (picture_file, stream_file):
        monkeypatch.setattr(place, "SEGMENT", 4)
    monkeypatch.setattr(store, "SAVE_EVERY", -1.0)


def run(model: StableVSR, clip: Path, output: Path, **options: object) -> np.ndarray:
    encoding = LOSSLESS if output.suffix else None
    assert upscale(model, clip, output, **{"encoding": encoding, **options}) == len(list(clip.iterdir()))
    return read_frames(output)


@pytest.mark.parametrize("name", ["out", "out.mkv"])
def test_a_file_is_sample_video(model: StableVSR, clip: Path, tmp_path: Path, name: str) -> None:
    seen = []
    result = run(model, clip, tmp_path / name, seed=5, color_fix="wavelet", progress=seen.append)
    assert np.array_equal(result, sample_video(model, pictures(), seed=5, color_fix="wavelet"))
    assert seen == [Progress("stream", done, COUNT) for done in range(1, COUNT + 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in", name])


def test_sound_and_times_come_along(model: StableVSR, tmp_path: Path) -> None:
    source = film(tmp_path / "in.mkv", frames=9)
    upscale(model, source, tmp_path / "out.mkv", encoding=LOSSLESS)
    assert picture_times(tmp_path / "out.mkv") == picture_times(source)
    with open_reader(source) as reader, open_reader(tmp_path / "out.mkv") as result:
        assert reader.has_audio
        assert result.has_audio
    assert np.array_equal(read_frames(tmp_path / "out.mkv"), sample_video(model, read_frames(source)))


def test_a_video_is_continued_from_its_middle(model: StableVSR, tmp_path: Path, monkeypatch) -> None:
    """Not decoded from its start again."""
    source = write_video(tmp_path / "in.mkv", list(pictures(20)), codec="ffv1", pix_fmt="bgr0")
    options = {"encoding": LOSSLESS, "steps": 1, "scene_cuts": tuple(range(1, 20))}  # without flow, which is slow
    upscale(model, source, tmp_path / "expected.mkv", **options)
    with pytest.raises(Stopped):
        upscale(model, source, tmp_path / "out.mkv", progress=lambda event: event.done < 18, **options)
    decoded, real = [], VideoReader._convert
    monkeypatch.setattr(VideoReader, "_convert", lambda *arguments: decoded.append(arguments[2]) or real(*arguments))
    upscale(model, source, tmp_path / "out.mkv", **options)
    assert decoded == list(range(15, 21))
    assert (tmp_path / "out.mkv").read_bytes() == (tmp_path / "expected.mkv").read_bytes()


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9"])
def test_segments_of_an_encoder_that_reorders_play_as_one(codec: str, model: StableVSR, clip: Path, tmp_path) -> None:
    output = tmp_path / "out.mkv"
    result = run(model, clip, output, encoding=Encoding(codec, 0))
    times = picture_times(output)
    assert len(result) == len(times) == COUNT
    steps = np.diff([float(time) for time in times])
    assert np.allclose(steps, steps[0], atol=2e-3)
    assert np.abs(result.astype(int) - sample_video(model, pictures()).astype(int)).mean() < 12  # 4:2:0 of noise


@pytest.mark.parametrize("name", ["out", "out.mkv"])
@pytest.mark.parametrize("often", [True, False])
def test_stopped_after_any_frame_it_ends_with_the_same_bits(
    model: StableVSR, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, often: bool
) -> None:
    expected, output = run(model, clip, tmp_path / f"expected{Path(name).suffix}"), tmp_path / name
    monkeypatch.setattr(store, "SAVE_EVERY", -1.0 if often else 1000.0)
    for last in (1, 4, 5, COUNT) if often else (9,):
        with pytest.raises(Stopped):
            run(model, clip, output, progress=lambda progress, last=last: progress.done < last)
        seen = []
        assert np.array_equal(run(model, clip, output, progress=seen.append), expected)
        assert not often or [progress.done for progress in seen] == list(range(last + 1, COUNT + 1))
        remove(output)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in", f"expected{Path(name).suffix}"])


def test_a_file_that_was_continued_is_the_same_file(model: StableVSR, clip: Path, tmp_path: Path) -> None:
    encoding = Encoding("h264")
    run(model, clip, tmp_path / "whole.mp4", encoding=encoding)
    with pytest.raises(Stopped):
        run(model, clip, tmp_path / "out.mp4", encoding=encoding, progress=lambda progress: progress.done < 7)
    run(model, clip, tmp_path / "out.mp4", encoding=encoding)
    assert (tmp_path / "out.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_both_outputs_continue(model: StableVSR, clip: Path, tmp_path: Path) -> None:
    options = {"side_by_side": tmp_path / "pair.mkv"}
    expected = run(model, clip, tmp_path / "expected.mkv", side_by_side=tmp_path / "expected_pair.mkv")
    for last in (3, 6, 11):
        with pytest.raises(Stopped):
            run(model, clip, tmp_path / "out.mkv", progress=lambda progress, last=last: progress.done < last, **options)
        assert np.array_equal(run(model, clip, tmp_path / "out.mkv", **options), expected)
        assert np.array_equal(read_frames(tmp_path / "pair.mkv"), read_frames(tmp_path / "expected_pair.mkv"))
        for path in (tmp_path / "pair.mkv", tmp_path / "out.mkv"):
            path.unlink()


def test_a_cut_is_found_again(model: StableVSR, tmp_path: Path) -> None:
    """What the detector remembers is not in the state: it sees the frames before again."""
    dark, bright = pictures(6) // 8, 255 - pictures(5) // 8
    clip = write_frames(tmp_path / "in", np.concatenate([dark, bright]))
    expected = run(model, clip, tmp_path / "expected")
    assert not np.array_equal(expected, run(model, clip, tmp_path / "uncut", scene_cuts="off"))
    for last in (5, 6, 7):
        with pytest.raises(Stopped):
            run(model, clip, tmp_path / "out", progress=lambda progress, last=last: progress.done < last)
        assert np.array_equal(run(model, clip, tmp_path / "out"), expected)
        shutil.rmtree(tmp_path / "out")


FAILURES = {
    "write": (ArrayFile, "_put"),
    "fsync": (os, "fsync"),
    "rename": (os, "replace"),
    "state": (Path, "write_bytes"),
    "note": (Path, "write_text"),
}
PICTURES = {"picture": (still_writer, "_save")}  # of a folder


@pytest.mark.parametrize(("kind", "name"), [*product(FAILURES, ["out", "out.mkv"]), ("picture", "out")])
def test_the_nth_failure_of_the_disk_costs_nothing(
    model: StableVSR, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    clip = write_frames(tmp_path / "in", pictures(5))
    expected, output = run(model, clip, tmp_path / f"expected{Path(name).suffix}"), tmp_path / name
    disk = FailingOnce(monkeypatch, *(FAILURES | PICTURES)[kind])
    for _ in disk.attempts(lambda: run(model, clip, output)):
        assert output.exists() == (disk.message is None)
        assert np.array_equal(run(model, clip, output, force=True), expected)
        remove(output)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in", f"expected{Path(name).suffix}"])


def test_files_that_the_disk_has_lost_are_made_again(model: StableVSR, clip: Path, tmp_path: Path) -> None:
    """After a crash of the machine, segments may be missing that the state speaks of."""
    expected = run(model, clip, tmp_path / "expected.mkv")
    with pytest.raises(Stopped):
        run(model, clip, tmp_path / "out.mkv", progress=lambda progress: progress.done < 10)
    written = workspace_path(tmp_path / "out.mkv") / "written"
    assert len(list(written.glob("*.json"))) == 2
    (written / "000000.json").unlink()
    seen = []
    assert np.array_equal(run(model, clip, tmp_path / "out.mkv", progress=seen.append), expected)
    assert seen[0].done == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "was started with another seed"),
        ({"encoding": Encoding("h264")}, "was started with another encoding"),
        ({"side_by_side": Path("pair.mkv")}, "was started with another side by side"),
    ],
)
def test_an_unfinished_run_of_other_settings_is_refused(
    model: StableVSR, clip: Path, tmp_path: Path, options: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Stopped):
        run(model, clip, tmp_path / "out.mkv", progress=lambda progress: progress.done < 3)
    with pytest.raises(UserError, match=message):
        run(model, clip, tmp_path / "out.mkv", **options)
    run(model, clip, tmp_path / "out.mkv", restart=True, **options)


def test_a_stop_before_anything_is_safe_leaves_nothing(model, clip, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(store, "SAVE_EVERY", 1000.0)

    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, clip, tmp_path / "out", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_fallback_to_tiles_is_remembered(tiny_model, tmp_path, monkeypatch, caplog) -> None:
    """Of weights whose autoencoder decodes in tiles when memory runs out: StableVSR's, streamed."""
    monkeypatch.setattr("stablevsr.sampling.tiles.AUTO_TILE", 16)
    clip, whole, real = write_frames(tmp_path / "in", pictures(5, 20, 24)), 0, tiny_model.vae.decode
    options = {"config": STREAMING, "steps": 2}

    def decode(latent: torch.Tensor) -> torch.Tensor:
        nonlocal whole
        if latent.shape[-1] == 24:
            whole += 1
            if whole >= 3:
                raise torch.OutOfMemoryError("out of memory")
        return real(latent)

    with monkeypatch.context() as little_memory:
        little_memory.setattr(tiny_model.vae, "decode", decode)
        expected, whole = run(tiny_model, clip, tmp_path / "expected", **options), 0
        with pytest.raises(Stopped):
            run(tiny_model, clip, tmp_path / "out", progress=lambda progress: progress.done < 4, **options)
        assert caplog.text.count("decoding in tiles") == 2
    assert np.array_equal(run(tiny_model, clip, tmp_path / "out", **options), expected)
    assert not np.array_equal(run(tiny_model, clip, tmp_path / "plenty", **options), expected)


def test_what_is_needed_of_the_disk_is_asked_before_the_work(model, clip, tmp_path, monkeypatch) -> None:
    usage = type("Usage", (), {"free": 10_000, "total": 0})
    monkeypatch.setattr("stablevsr.engine.plan.shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="for 11 frames, the disk has"):
        run(model, clip, tmp_path / "out.mkv")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    usage.free = 10**9
    with pytest.raises(Stopped):
        run(model, clip, tmp_path / "out.mkv", progress=lambda progress: progress.done < 7)
    usage.free = 10_000  # what was asked for is in use
    run(model, clip, tmp_path / "out.mkv")


def test_a_single_picture_with_transparency(model: StableVSR, tmp_path: Path) -> None:
    rgba = np.random.default_rng(1).integers(0, 256, (6, 8, 4), dtype=np.uint8)
    iio.imwrite(tmp_path / "in.png", rgba)
    assert upscale(model, tmp_path / "in.png", tmp_path / "out.png") == 1
    found = iio.imread(tmp_path / "out.png")
    assert found.shape == (24, 32, 4)
    with open_reader(tmp_path / "in.png") as reader:
        image = next(iter(reader)).image
    assert np.array_equal(found[..., :3], sample_video(model, image[None])[0])


def test_the_writing_is_not_on_the_way(model, clip, tmp_path, monkeypatch) -> None:
    """Pictures are encoded in the thread that also writes the workspace."""
    threads = set()
    real = picture_file.PictureFile.write

    def watched(*arguments: object) -> None:
        threads.add(threading.current_thread())
        real(*arguments)

    monkeypatch.setattr(picture_file.PictureFile, "write", watched)
    begin = len(threads)
    run(model, clip, tmp_path / "out.mkv")
    threads.discard(threading.main_thread())  # of the rehearsal
    assert len(threads) == begin + 1


def test_what_is_told(model, clip, tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO, "stablevsr")
    with pytest.raises(Stopped):
        run(model, clip, tmp_path / "out", progress=lambda progress: progress.done < 5)
    run(model, clip, tmp_path / "out")
    assert "11 frames; temporary disk space: up to 9.22 kB" in caplog.text
    assert "continuing: 5 frames are done" in caplog.text
    assert "distilled" not in caplog.text
    run(model, clip, tmp_path / "more", steps=4)
    assert "distilled for 2 ddim steps with trailing spacing, their default, not for 4 ddim" in caplog.text


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from stablevsr import build_model, upscale
from stablevsr.engine import store, stream_file
from stablevsr.media import Encoding, picture_file
store.SAVE_EVERY = 0.01
picture_file.SEGMENT = stream_file.SEGMENT = 4
clip, output, kills = Path(sys.argv[1]), Path(sys.argv[2]), 0
encoding = Encoding("ffv1") if output.suffix else None
model = build_model(sys.argv[4], device="cpu")
if sys.argv[3] == "whole":  # here, because bits depend on the number of threads
    sys.exit(upscale(model, clip, output, encoding=encoding) != 11)
luck = random.Random(int(sys.argv[3]))
while True:
    child = os.fork()
    if child == 0:
        upscale(model, clip, output, encoding=encoding)
        os._exit(0)
    time.sleep(luck.uniform(0.05, 0.5) * 1.1**kills)  # a slow machine gets on too
    os.kill(child, signal.SIGKILL)  # says nothing to one that has ended
    if os.waitpid(child, 0)[1] == 0:
        break
    kills += 1
print(kills)
"""


@pytest.mark.parametrize("name", ["out", "out.mkv"])
def test_kill_9_at_random_moments(weights: Path, clip: Path, tmp_path: Path, name: str) -> None:
    def killed(output: Path, luck: str) -> str:
        command = [sys.executable, "-c", KILLED, clip, output, luck, weights]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        return result.stdout

    killed(tmp_path / f"expected{Path(name).suffix}", "whole")
    expected, total = read_frames(tmp_path / f"expected{Path(name).suffix}"), 0
    for attempt in range(10):
        total += int(killed(tmp_path / name, str(attempt)))
        assert np.array_equal(read_frames(tmp_path / name), expected)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in", f"expected{Path(name).suffix}", name])
        remove(tmp_path / name)
        if total >= 10:
            break
    assert total >= 10


FLAT = """
import os, sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from stablevsr import build_model, upscale
from stablevsr.engine import stream_file
from stablevsr.media import picture_file
picture_file.SEGMENT = stream_file.SEGMENT = 20
clip, output = Path(sys.argv[1]), Path(sys.argv[2])
workspace = output.with_name(output.name + ".unfinished")

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def on_disk():  # beside the output itself
    try:
        return sum(f.stat().st_blocks for f in workspace.iterdir() if f.is_file() and not f.name.startswith("output"))
    except FileNotFoundError:
        return 0

peaks, running = [0, 0, 0], True
def watch():
    while running:
        for i, value in enumerate((anonymous(), on_disk() // 2, len(os.listdir("/proc/self/fd")))):
            peaks[i] = max(peaks[i], value)
        time.sleep(0.01)

model = build_model(sys.argv[3], device="cpu")
cuts = [i for i in range(1, len(os.listdir(clip))) if i % 10]  # flow is slow; now and then it will do
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
upscale(model, clip, output, steps=1, scene_cuts=cuts)
running = False
watcher.join()
print(*peaks)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell anonymous memory")
def test_memory_disk_and_open_files_do_not_grow_with_the_clip(weights: Path, tmp_path: Path) -> None:
    found = []
    for count in (24, int(os.environ.get("STABLEVSR_TEST_FRAMES", "240"))):
        clip = write_frames(tmp_path / str(count), pictures(count, 24, 32))
        command = [sys.executable, "-c", FLAT, clip, tmp_path / f"out{count}.mp4", weights]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
        found.append([int(word) for word in result.stdout.split()])
        print(f"{count} frames: {found[-1][0]} kB of anonymous memory, {found[-1][1]} kB on disk, {found[-1][2]} files")
    (memory, _, files), (later_memory, disk, later_files) = found
    assert later_memory < 1.1 * memory
    picture = 96 * 128 * 3 / 1024
    assert disk < 20 * picture + 2 * 4 * picture + 100  # those of a segment, and the state, twice while it is replaced
    assert later_files <= files + 2
