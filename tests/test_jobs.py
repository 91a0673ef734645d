"""Runs from file to file: killed, cut short by failing disks, and gone on with, they end with the same bits."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from stablevsr import build_model, sample_video
from stablevsr.errors import UserError
from stablevsr.jobs import plan
from stablevsr.jobs import upscale as job
from stablevsr.jobs.stores import EstimatedFlows, StoredFlows, StoredFrames, StoredLatents
from stablevsr.jobs.upscale import upscale
from stablevsr.jobs.workspace import ArrayFile, open_workspace, workspace_path
from stablevsr.media import open_reader, still_writer
from stablevsr.model import StableVSR
from stablevsr.offload import Offloaded
from stablevsr.sampling.noise import SeededNoise
from stablevsr.sampling.pictures import normalise
from stablevsr.sampling.samplers import SAMPLERS
from stablevsr.sampling.video import Progress, Stopped

STEPS = 3


def pictures(count: int, height: int = 6, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def write_frames(folder: Path, frames: np.ndarray) -> Path:
    folder.mkdir()
    for i, frame in enumerate(frames):
        iio.imwrite(folder / f"{i:03}.png", frame)
    return folder


def read_frames(folder: Path) -> np.ndarray:
    return np.stack([iio.imread(path) for path in sorted(folder.iterdir())])


@pytest.fixture
def model(tiny_model: StableVSR) -> StableVSR:
    return tiny_model


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_frames(tmp_path / "in", pictures(3))


def run(model: StableVSR, clip: Path, output: Path, **options: object) -> np.ndarray:
    with open_reader(clip) as reader:
        upscale(model, reader, output, **{"steps": STEPS, "scene_cuts": False, **options})
    return read_frames(output)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_job_is_sample_video_from_file_to_file(model: StableVSR, clip: Path, tmp_path: Path, sampler: str) -> None:
    options = {"seed": 5, "sampler": sampler, "color_fix": {"ddim": "wavelet", "dpm++": "adain"}.get(sampler)}
    result = run(model, clip, tmp_path / "out", **options)
    assert np.array_equal(result, sample_video(model, pictures(3), steps=STEPS, **options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_an_offloaded_model_goes_on_where_a_whole_one_stopped(model: StableVSR, clip: Path, tmp_path: Path) -> None:
    def stop(progress: Progress) -> bool:
        return progress.phase != "denoise" or progress.done < 4

    with pytest.raises(Stopped):
        run(model, clip, tmp_path / "out", progress=stop)
    result = run(Offloaded(model, torch.device("cpu")), clip, tmp_path / "out")
    assert np.array_equal(result, sample_video(model, pictures(3), steps=STEPS))


def test_flows_that_do_not_fit_are_estimated_anew(model, clip, tmp_path, monkeypatch) -> None:
    told: list[str] = []
    expected = run(model, clip, tmp_path / "kept", tell=told.append)
    assert "for flows" in told[-1]
    needed = 2 * 4 * 3 * 4 * 48 + 3 * 3 * 16 * 48 // 4  # latents and a guess at the output, in bytes
    usage = type("Usage", (), {"free": needed, "total": 0})
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: usage)
    assert np.array_equal(run(model, clip, tmp_path / "anew", tell=told.append), expected)
    assert "estimated anew" in told[-1]
    usage.free -= 1
    with pytest.raises(UserError, match="for 3 frames, the disk has"):
        run(model, clip, tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["anew", "in", "kept"]


FAILURES = {
    "write": (ArrayFile, "write"),
    "fsync": (os, "fsync"),
    "rename": (os, "replace"),
    "rename of a folder": (os, "rename"),
    "state": (Path, "write_bytes"),
    "note": (Path, "write_text"),
    "picture": (still_writer, "_save"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_the_nth_failure_of_the_disk_costs_nothing(
    model: StableVSR, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """For every N: one sentence, the old output or the new one, and the next run ends as if nothing had happened."""
    monkeypatch.setattr(job, "SAVE_EVERY", -1.0)  # as often as can be
    expected, old, output = run(model, clip, tmp_path / "expected"), pictures(1), tmp_path / "out"
    owner, name = FAILURES[kind]
    real, calls, fail_at = getattr(owner, name), 0, 0

    def flaky(*arguments: object, **more: object) -> object:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **more)

    monkeypatch.setattr(owner, name, flaky)
    message = None
    while message or not fail_at:
        fail_at, calls, message = fail_at + 1, 0, None
        shutil.rmtree(output, ignore_errors=True)
        write_frames(output, old)
        try:
            run(model, clip, output, force=True)
        except UserError as error:
            message = str(error)
        kept = read_frames(output)
        assert np.array_equal(kept, expected) or (message and np.array_equal(kept, old))
        assert "\n" not in (message or "")
        calls = 1000  # nothing fails now
        assert np.array_equal(run(model, clip, output, force=True), expected)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "in", "out"]
    assert fail_at > 1


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from stablevsr import build_model
from stablevsr.jobs import upscale as job
from stablevsr.media import open_reader
job.SAVE_EVERY = 0.01
clip, output, kills = Path(sys.argv[1]), Path(sys.argv[2]), 0
model = build_model(sys.argv[4], device="cpu")
luck = random.Random(int(sys.argv[3]))
while True:
    child = os.fork()
    if child == 0:
        with open_reader(clip) as reader:
            job.upscale(model, reader, output, steps=6, scene_cuts=False, sampler="dpm++")
        os._exit(0)
    time.sleep(luck.uniform(0.02, 0.4))
    os.kill(child, signal.SIGKILL)  # says nothing to one that has ended
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    kills += 1
print(kills)
"""


def test_kill_9_at_random_moments(model: StableVSR, tiny_weights: Path, tmp_path: Path) -> None:
    clip = write_frames(tmp_path / "in", pictures(4))
    run(model, clip, tmp_path / "expected", steps=6, sampler="dpm++")  # which looks back furthest
    total = 0
    for attempt in range(10):
        command = [sys.executable, "-c", KILLED, clip, tmp_path / "out", str(attempt), tiny_weights]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        total += int(result.stdout)
        assert np.array_equal(read_frames(tmp_path / "out"), read_frames(tmp_path / "expected"))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "in", "out"]
        for path in (tmp_path / "out").iterdir():
            path.unlink()
        if total >= 20:
            break
    assert total >= 20


@pytest.mark.parametrize("first_failure", [5, 13])  # of 9 decodes for guidance and 4 of results
@pytest.mark.parametrize("often", [True, False])
def test_the_fallback_to_tiles_is_remembered(model, tmp_path, monkeypatch, first_failure: int, often: bool) -> None:
    """A run that ran out of memory, was stopped and went on where there is plenty ends as if never stopped."""
    monkeypatch.setattr(job, "SAVE_EVERY", -1.0 if often else 1000.0)
    monkeypatch.setattr("stablevsr.sampling.tiles.AUTO_TILE", 16)
    clip, whole, real = write_frames(tmp_path / "in", pictures(4, 20, 24)), 0, model.vae.decode
    plenty = run(model, clip, tmp_path / "plenty")

    def decode(latent: torch.Tensor) -> torch.Tensor:
        nonlocal whole
        if latent.shape[-1] == 24:
            whole += 1
            if whole >= first_failure:
                raise torch.OutOfMemoryError("out of memory")
        return real(latent)

    def stop(progress: Progress) -> bool:
        return progress != (("denoise", 7, 12) if first_failure == 5 else ("decode", 4, 4))

    with monkeypatch.context() as little_memory:
        little_memory.setattr(model.vae, "decode", decode)
        with pytest.warns(UserWarning, match="decoding in tiles"):
            expected = run(model, clip, tmp_path / "expected")
        whole = 0
        with pytest.warns(UserWarning, match="decoding in tiles"), pytest.raises(Stopped):
            run(model, clip, tmp_path / "out", progress=stop)
    assert not np.array_equal(expected, plenty)
    assert np.array_equal(run(model, clip, tmp_path / "out"), expected)


def test_the_time_is_told_once_and_only_when_it_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 36.0, 0.0, 0.3])  # three frame-steps of 12 seconds, then of a tenth
    monkeypatch.setattr(plan.time, "monotonic", lambda: next(now))
    slow, fast = plan.Clock(1005), plan.Clock(505)
    told = [slow.after_a_step() for _ in range(7)]
    assert told == [*[None] * 4, "about 3 h 20 min for the 1000 frame-steps left", *[None] * 2]
    assert [fast.after_a_step() for _ in range(7)] == [None] * 7
    for seconds, words in [
        (61, "1 min"), (3599, "1 h"), (3 * 3600 + 25 * 60, "3 h 20 min"), (20 * 3600, "20 h"),
        (47 * 3600, "47 h"), (48 * 3600, "2 days"), (100 * 3600, "4 days 4 h"),
    ]:  # fmt: skip
        assert plan.duration(seconds) == f"about {words}"


def test_a_run_tells_its_time(model: StableVSR, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "WORTH_TELLING", -1.0)
    told: list[str] = []
    run(model, clip, tmp_path / "out", tell=told.append)
    assert told[1:] == ["about 1 min for the 4 frame-steps left"]


def test_another_run_at_the_same_output_is_refused(model: StableVSR, clip: Path, tmp_path: Path) -> None:
    with open_workspace(tmp_path / "out", {}), pytest.raises(UserError, match="another run is making"):
        run(model, clip, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, r"another seed \(0, now 1\)"),
        ({"steps": 4}, r"another steps \(3, now 4\)"),
        ({"color_fix": "adain"}, r"another color_fix \(None, now adain\)"),
    ],
)
def test_an_unfinished_run_of_other_settings_is_refused_by_name(
    model: StableVSR, clip: Path, tmp_path: Path, change: dict[str, int], words: str
) -> None:
    expected = run(model, clip, tmp_path / "out", keep_workspace=True)
    assert workspace_path(tmp_path / "out").is_dir()
    with pytest.raises(UserError, match=words):
        run(model, clip, tmp_path / "out", force=True, **change)
    assert np.array_equal(run(model, clip, tmp_path / "out", force=True, keep_workspace=True), expected)
    run(model, clip, tmp_path / "out", force=True, restart=True, **change)
    assert not workspace_path(tmp_path / "out").exists()


def test_another_input_or_other_weights_are_refused(model: StableVSR, clip: Path, tmp_path: Path) -> None:
    run(model, clip, tmp_path / "out", keep_workspace=True)
    iio.imwrite(clip / "001.png", pictures(1)[0])
    with pytest.raises(UserError, match="another input"):
        run(model, clip, tmp_path / "out", force=True)
    write_frames(tmp_path / "again", pictures(3))
    other = build_model(device="cpu")
    with pytest.raises(UserError, match="another weights"):
        run(other, tmp_path / "again", tmp_path / "out", force=True)


@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_of_somebody_else_is_left_alone(model, clip, tmp_path, restart: bool) -> None:
    folder = workspace_path(tmp_path / "out")
    folder.mkdir()
    (folder / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match="holds diary"):
        run(model, clip, tmp_path / "out", restart=restart)
    assert [path.name for path in folder.iterdir() if path.name != "lock"] == ["diary.txt"]


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("job.json", b"{", "job.json is damaged"),
        ("state.safetensors", b"12345678", "state.safetensors is damaged"),
        ("latents.raw", b"", "latents.raw is shorter than it should be"),
    ],
)
def test_a_damaged_workspace_is_told(model, clip, tmp_path, name: str, damage: bytes, words: str) -> None:
    run(model, clip, tmp_path / "out", keep_workspace=True)
    (workspace_path(tmp_path / "out") / name).write_bytes(damage)
    with pytest.raises(UserError, match=words):
        run(model, clip, tmp_path / "out", force=True)
    run(model, clip, tmp_path / "out", force=True, restart=True)


def test_stores_give_back_what_they_were_given(model: StableVSR, tmp_path: Path) -> None:
    frames = torch.from_numpy(pictures(3))
    array = ArrayFile(tmp_path / "frames", (6, 8, 3), torch.uint8)
    for i, frame in enumerate(frames):
        array.write(i, frame)
    stored = StoredFrames(array, 3)
    assert len(stored) == 3
    assert torch.equal(torch.stack(list(stored[i] for i in range(3))), normalise(frames))
    flows = ArrayFile(tmp_path / "flows", (2, 2, 24, 32), torch.float32)
    estimated = EstimatedFlows(model, normalise(frames))
    flows.write(1, torch.cat([estimated.between(2, 1), estimated.between(1, 2)]))
    assert torch.equal(StoredFlows(flows).between(2, 1), estimated.between(2, 1))
    assert torch.equal(StoredFlows(flows).between(1, 2), estimated.between(1, 2))


def test_stored_latents_keep_what_a_step_starts_from(tmp_path: Path) -> None:
    noise, cpu = SeededNoise(0, (2, 3, 4)), torch.device("cpu")

    def opened(done: int) -> StoredLatents:
        return StoredLatents(ArrayFile(tmp_path / "latents", (2, 3, 4), torch.float32), 3, noise, cpu, done)

    latents = opened(0)
    assert torch.equal(latents[1], noise.initial(1))
    first, second = torch.ones(2, 3, 4), torch.full((2, 3, 4), 2.0)
    for frame in range(3):
        latents[frame] = first
    latents[2] = second  # the second pass begins at the end
    assert torch.equal(opened(4)[2], second)
    assert torch.equal(opened(3)[2], first)  # had the word of it not reached the disk
    assert torch.equal(opened(4)[1], first)


MEMORY = """
import sys, threading, time
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from stablevsr import build_model
from stablevsr.jobs.upscale import upscale
from stablevsr.media import open_reader

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

peak, running = 0, True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.01)

model = build_model(device="cpu")
model.flow.config = replace(model.flow.config, num_updates=1)  # as much memory, less time
watcher = threading.Thread(target=watch)
watcher.start()
with open_reader(Path(sys.argv[1])) as clip:
    upscale(model, clip, Path(sys.argv[2]), steps=1)
running = False
watcher.join()
print(peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell anonymous memory")
def test_memory_does_not_grow_with_the_clip(tmp_path: Path) -> None:
    peaks = []
    for count in (24, 240):
        clip = write_frames(tmp_path / str(count), pictures(count, 48, 64))
        command = [sys.executable, "-c", MEMORY, clip, tmp_path / f"out{count}"]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout))
    frames = 240 * 48 * 64 * 3 / 1024
    print(f"peak anonymous memory: {peaks[0]} kB for 24 frames, {peaks[1]} kB for 240")
    assert peaks[1] <= 1.1 * peaks[0] + frames
