"""Runs from file to file: killed, cut short by failing disks, and gone on with, they end with the same bits."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from clips_made import film
from failing_disk import FailingOnce
from models import TINY, offloaded, random_model, with_noise_levels
from PIL import Image, ImageCms
from safetensors import SafetensorError

import stablevsr
from stablevsr import Progress, Stopped, build_model, sample_video
from stablevsr.atomic import _set_aside
from stablevsr.engine import fingerprint as fingerprints
from stablevsr.engine import plan, store
from stablevsr.engine import upscale as job
from stablevsr.engine.arrays import KeptFlows, LowResFrames, StepLatents
from stablevsr.engine.state import RunState
from stablevsr.engine.store import DiskStore
from stablevsr.engine.upscale import upscale
from stablevsr.engine.workspace import ArrayFile, open_workspace, workspace_path
from stablevsr.errors import IncompleteOutput, UserError
from stablevsr.media import CODECS, Encoding, Writer, open_reader, open_writer, still_writer
from stablevsr.media.paths import IMAGE_SUFFIXES
from stablevsr.media.still_reader import FolderReader
from stablevsr.model import StableVSR
from stablevsr.sampling.config import DEFAULT_NOISE_LEVEL, SAMPLERS, FlowOptions, SamplingConfig, TemporalGuidance
from stablevsr.sampling.flow import EstimatedFlows
from stablevsr.sampling.noise import SeededNoise
from stablevsr.sampling.pictures import normalise

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
        upscale(model, reader, output, **{"steps": STEPS, **options})
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
    result = run(offloaded(model), clip, tmp_path / "out")
    assert np.array_equal(result, sample_video(model, pictures(3), steps=STEPS))


# Latents and the output at most, in bytes.
NEEDED = 2 * 4 * 3 * 4 * 48 + 3 * (int(3.06 * 16 * 48) + 2000) + 20000


def test_what_does_not_fit_on_the_disk_is_made_when_needed(model, clip, tmp_path, monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO)
    expected = run(model, clip, tmp_path / "kept")
    assert "for flows" in caplog.text
    assert "would not fit" not in caplog.text
    usage = type("Usage", (), {"free": NEEDED, "total": 0})
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: usage)
    assert np.array_equal(run(model, clip, tmp_path / "anew"), expected)
    assert "flows would not fit and are estimated when needed" in caplog.text
    assert "pictures would not fit, so the final decode starts over" in caplog.text
    usage.free -= 1
    with pytest.raises(UserError, match="for 3 frames, the disk has"):
        run(model, clip, tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["anew", "in", "kept"]


FAILURES = {
    "write": (ArrayFile, "_put"),
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
    monkeypatch.setattr(store, "SAVE_EVERY", -1.0)  # as often as can be
    expected, old, output = run(model, clip, tmp_path / "expected"), pictures(1), tmp_path / "out"
    disk = FailingOnce(monkeypatch, *FAILURES[kind])

    def replace_old() -> None:
        shutil.rmtree(output, ignore_errors=True)
        write_frames(output, old)
        run(model, clip, output, force=True)

    for _ in disk.attempts(replace_old):
        kept = read_frames(output)
        assert np.array_equal(kept, expected) or (disk.message and np.array_equal(kept, old))
        assert np.array_equal(run(model, clip, output, force=True), expected)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "in", "out"]


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from stablevsr import build_model
from stablevsr.engine import store, upscale as job
from stablevsr.media import open_reader
store.SAVE_EVERY = 0.01
clip, output, kills = Path(sys.argv[1]), Path(sys.argv[2]), 0
model = build_model(sys.argv[4], device="cpu")
luck = random.Random(int(sys.argv[3]))
while True:
    child = os.fork()
    if child == 0:
        with open_reader(clip) as reader:
            job.upscale(model, reader, output, steps=6, scene_cuts="off", sampler="dpm++")
        os._exit(0)
    time.sleep(luck.uniform(0.02, 0.4) * 1.1**kills)  # a slow machine gets on too
    os.kill(child, signal.SIGKILL)  # says nothing to one that has ended
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    kills += 1
print(kills)
"""


def test_kill_9_at_random_moments(tiny_weights: Path, tmp_path: Path) -> None:
    clip = write_frames(tmp_path / "in", pictures(4))
    # From the same file: where weights lie in memory, mapped or not, can change a last bit.
    run(
        build_model(tiny_weights, device="cpu"), clip, tmp_path / "expected", steps=6, sampler="dpm++", scene_cuts="off"
    )  # which looks back furthest
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
def test_the_fallback_to_tiles_is_remembered(model, tmp_path, monkeypatch, caplog, first_failure, often) -> None:
    """A run that ran out of memory, was stopped and went on where there is plenty ends as if never stopped."""
    monkeypatch.setattr(store, "SAVE_EVERY", -1.0 if often else 1000.0)
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
        return progress != (Progress("denoise", 7, 12) if first_failure == 5 else Progress("decode", 4, 4))

    with monkeypatch.context() as little_memory:
        little_memory.setattr(model.vae, "decode", decode)
        expected = run(model, clip, tmp_path / "expected")
        whole = 0
        with pytest.raises(Stopped):
            run(model, clip, tmp_path / "out", progress=stop)
        assert caplog.text.count("decoding in tiles") == 2
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


def test_a_run_tells_its_time(model: StableVSR, clip: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(plan, "WORTH_TELLING", -1.0)
    caplog.set_level(logging.INFO)
    run(model, clip, tmp_path / "out", spacing="trailing")
    assert caplog.messages[1:] == ["about 1 min for the 4 frame-steps left"]


def test_another_run_at_the_same_output_is_refused(model: StableVSR, clip: Path, tmp_path: Path) -> None:
    with open_workspace(tmp_path / "out"), pytest.raises(UserError, match="another run is writing"):
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


@pytest.mark.parametrize(
    ("then", "now", "words"),
    [
        ({"cfg_scale": 3.0}, {}, r"another cfg_scale \(3.0, now 1.0\)"),
        ({}, {"cfg_scale": 3.0}, r"another cfg_scale \(1.0, now 3.0\)"),
        ({"sampler": "ddim", "eta": 0.5}, {"sampler": "ddim"}, r"another eta \(0.5, now 0.0\)"),
        ({}, {"temporal": TemporalGuidance(every=2)}, r"another temporal.every \(1, now 2\)"),
        ({}, {"flow": FlowOptions(half_size=True)}, r"another flow.half_size \(False, now True\)"),
        ({}, {"tile": 16}, r"another tile \(auto, now 16\)"),
        ({}, {"scene_cuts": "auto"}, r"another scene_cuts \(off, now auto\)"),
    ],
)
def test_options_that_one_of_two_runs_leaves_out_are_compared_too(
    model: StableVSR, clip: Path, tmp_path: Path, then: dict, now: dict, words: str
) -> None:
    run(model, clip, tmp_path / "out", keep_workspace=True, **then)
    with pytest.raises(UserError, match=words):
        run(model, clip, tmp_path / "out", force=True, **now)


def test_defaults_given_are_defaults_left_out(model: StableVSR, clip: Path, tmp_path: Path) -> None:
    defaults = {"steps": np.int64(STEPS), "prompt": "", "tile": "auto", "color_fix": None, "seed": 0, "eta": 0}
    run(model, clip, tmp_path / "out", keep_workspace=True)
    run(model, clip, tmp_path / "out", keep_workspace=True, force=True, **defaults)
    run(model, clip, tmp_path / "out", force=True)
    leveled = random_model(with_noise_levels(TINY))
    run(leveled, clip, tmp_path / "leveled", keep_workspace=True)
    run(leveled, clip, tmp_path / "leveled", force=True, noise_level=DEFAULT_NOISE_LEVEL)


def test_a_run_that_was_compiled_does_not_go_on_without(model, clip, tmp_path, monkeypatch) -> None:
    run(model, clip, tmp_path / "out", keep_workspace=True)
    for part in (model.unet.encoder, model.unet.decoder, model.tcm, model.vae.decoder):  # as `compile_parts` would
        monkeypatch.setattr(part, "_compiled_call_impl", part._call_impl)
    with pytest.raises(UserError, match="another compilation"):
        run(model, clip, tmp_path / "out", force=True)


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "notes.txt", "._000.png", "folder.png/x"])
def test_what_the_reader_does_not_read_may_come_and_go(model, clip, tmp_path, name: str) -> None:
    run(model, clip, tmp_path / "out", keep_workspace=True)
    (clip / name).parent.mkdir(exist_ok=True)
    (clip / name).touch()
    run(model, clip, tmp_path / "out", force=True, keep_workspace=True)
    iio.imwrite(clip / "003.png", pictures(1)[0])
    with pytest.raises(UserError, match="another input"):
        run(model, clip, tmp_path / "out", force=True)


NOTHING_TO_READ = "nothing may be read before the options are known to be good"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 5000}, "got 5000 steps"),
        ({"eta": 0.5}, "got eta 0.5 with sampler ddpm, which takes none"),
        ({"sampler": "euler"}, "got sampler 'euler'"),
        ({"sampler": "ddim", "eta": 2.0}, "got eta 2.0"),
        ({"temporal": TemporalGuidance(tiny=True)}, "hold no tiny decoder"),
        ({"prompt": "a cat"}, "hold no text encoder"),
        ({"cfg_scale": 2.0, "negative_prompt": "blur"}, "hold no text encoder"),
        ({"negative_prompt": "blur"}, "a negative_prompt with cfg_scale 1, where it has no effect"),
        ({"cfg_scale": float("nan")}, "cfg_scale is nan"),
        ({"tcm_scale": float("inf")}, "tcm_scale is inf"),
        ({"noise_level": 20}, "got noise_level 20, but these weights have no noise levels"),
        ({"seed": -1}, "got seed -1"),
        ({"tile": 3}, "got tile 3"),
        ({"color_fix": "sepia"}, "got color_fix 'sepia'"),
        ({"encoding": Encoding("mjpeg")}, "codec mjpeg is unknown"),
        ({"encoding": Encoding("h264", 99)}, "quality 99 is out of range"),
        ({"side_by_side": Path("none/pair.mp4")}, "is not a folder"),
    ],
)
def test_options_are_refused_before_a_frame_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict, words: str
) -> None:
    model = random_model(replace(TINY, tiny=None))
    clip = write_frames(tmp_path / "in", pictures(3))

    def fail(*_: object) -> None:
        raise AssertionError(NOTHING_TO_READ)

    monkeypatch.setattr(job, "fingerprint", fail)
    monkeypatch.setattr(FolderReader, "_frames", fail)
    with open_reader(clip) as reader:
        reader.frame_count = 10**6
        with pytest.raises(UserError, match=words):
            upscale(model, reader, tmp_path / "out.mp4", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_clip_of_several_frames_needs_a_flow_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(replace(TINY, flow=None))
    one, two = (write_frames(tmp_path / str(count), pictures(count)) for count in (1, 2))
    with pytest.raises(UserError, match="hold no flow network"):
        run(model, two, tmp_path / "out")
    run(model, one, tmp_path / "out")
    monkeypatch.setattr(FolderReader, "__init__", with_unknown_count(FolderReader.__init__))
    with pytest.raises(UserError, match="hold no flow network"):
        run(model, two, tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "out"]


def with_unknown_count(init: Callable[..., None]) -> Callable[..., None]:
    def wrapped(self: FolderReader, path: Path) -> None:
        init(self, path)
        self.frame_count = None

    return wrapped


def test_options_that_nobody_knows_are_refused_at_once(model: StableVSR, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got stepps, which is not a sampling option"):
        run(model, clip, tmp_path / "out", stepps=3)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("tiny", [True, False])
def test_a_run_goes_on_with_its_estimate_on_the_device_of_the_model(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, tiny: bool
) -> None:
    """In the middle of a pass the loop decodes it there. The meta device stands in for a GPU."""
    monkeypatch.setattr(store, "SAVE_EVERY", -1.0)
    model = random_model()
    options = {"sampler": sampler, "temporal": TemporalGuidance(tiny=tiny)}

    def stop(progress: Progress) -> bool:
        return progress.phase != "denoise" or progress.done < 4

    with pytest.raises(Stopped):
        run(model, clip, tmp_path / "out", progress=stop, **options)
    seen = []

    def look(latents, steps, schedule, noise, predict, guide, start, *_) -> None:
        seen.append((start.done, start.x0.device, latents[0].device))
        raise Stopped

    with monkeypatch.context() as context:
        context.setattr(
            job, "fingerprint", lambda *_: json.loads((workspace_path(tmp_path / "out") / "job.json").read_text())
        )
        context.setattr("stablevsr.engine.run.bidirectional_sampling", look)
        context.setattr(StableVSR, "device", torch.device("meta"))
        with pytest.raises(Stopped):
            run(model, clip, tmp_path / "out", **options)
    assert seen == [(4, torch.device("meta"), torch.device("meta"))]
    expected = sample_video(model, pictures(3), steps=STEPS, **options)
    assert np.array_equal(run(model, clip, tmp_path / "out", **options), expected)


def test_the_decision_about_flows_is_remembered(model, clip, tmp_path, monkeypatch) -> None:
    """Killed with some flows written, gone on with on a fuller disk, killed again: the third run asks for no flow."""
    usage = type("Usage", (), {"free": 10**9, "total": 0})
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: usage)
    expected = sample_video(model, pictures(3), steps=STEPS)

    def stop_in(phase: str, done: int) -> Callable[[Progress], bool]:
        return lambda progress: (progress.phase, progress.done) != (phase, done)

    monkeypatch.setattr(store, "SAVE_EVERY", 1000.0)
    with pytest.raises(Stopped):
        run(model, clip, tmp_path / "out", progress=stop_in("flow", 1))
    folder = workspace_path(tmp_path / "out")
    assert (folder / "flows.raw").stat().st_size > 0
    usage.free = NEEDED
    monkeypatch.setattr(store, "SAVE_EVERY", -1.0)
    with pytest.raises(Stopped):
        run(model, clip, tmp_path / "out", progress=stop_in("denoise", 4))
    assert not (folder / "flows.raw").exists()
    (folder / "flows.raw").touch()
    usage.free = 10**9
    assert np.array_equal(run(model, clip, tmp_path / "out"), expected)


def noise_of(writer: Writer, channels: int) -> np.ndarray:
    kind = np.uint16 if writer.is_deep else np.uint8
    return np.random.default_rng(0).integers(0, np.iinfo(kind).max + 1, (64, 96, channels), dtype=kind)


ENCODINGS = [Encoding(name, crf) for name in CODECS for crf in (None, 0) if CODECS[name].crf is not None or crf is None]
OUTPUTS = [("out", None), *((f"out{suffix}", None) for suffix in (*IMAGE_SUFFIXES, ".webm"))]
OUTPUTS += [(f"out{suffix}", encoding) for encoding in ENCODINGS for suffix in CODECS[encoding.codec].containers]


@pytest.mark.parametrize(("name", "encoding"), OUTPUTS, ids=str)
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("alpha", [False, True])
def test_noise_takes_no_more_of_the_disk_than_planned(tmp_path: Path, name, encoding, deep: bool, alpha: bool) -> None:
    count = 1 if Path(name).suffix in IMAGE_SUFFIXES else 4
    with open_reader(write_frames(tmp_path / "in", pictures(count))) as clip:
        clip.is_deep, clip.has_alpha = deep, alpha
        writer = open_writer(tmp_path / name, clip, height=64, width=96, encoding=encoding)
        bound = plan.Output.of(writer, clip, encoding, 64 * 96, tmp_path)
        with writer:
            for frame in clip:
                writer.write(noise_of(writer, 4 if alpha and writer.takes_alpha else 3), frame)
    files = [tmp_path / name] if (tmp_path / name).is_file() else list((tmp_path / name).iterdir())
    size = sum(file.stat().st_size for file in files)
    assert size <= bound.bytes(count)
    pixels = 64 * 96 * count
    assert bound.per_frame * count - plan.PER_FRAME * count <= 3 * size + pixels  # and no wild guess either


def test_sound_counts_as_output(tmp_path: Path, model: StableVSR) -> None:
    film(tmp_path / "in.mkv")
    with open_reader(tmp_path / "in.mkv") as clip, open_writer(tmp_path / "o.mkv", clip, height=64, width=96) as writer:
        bound = plan.Output.of(writer, clip, None, 64 * 96, tmp_path)
        for frame in clip:
            writer.write(noise_of(writer, 3), frame)
    assert bound.once == plan.PER_FILE + (tmp_path / "in.mkv").stat().st_size
    assert (tmp_path / "o.mkv").stat().st_size <= bound.bytes(3)


def test_a_large_disk_need_not_be_left_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 150 * 10**9, "total": 4 * 10**12})
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: usage)
    assert plan.room(tmp_path) == 148 * 10**9
    usage.free, usage.total = 3 * 10**9, 20 * 10**9
    assert plan.room(tmp_path) == 2 * 10**9
    usage.free = 10**6
    assert plan.room(tmp_path) == 0  # which is told as "0 bytes"


def test_a_second_output_on_another_disk_must_fit_there(model, clip, tmp_path, monkeypatch) -> None:
    (tmp_path / "disk").mkdir()
    real = Path.stat

    def stat(self: Path, **options: bool) -> os.stat_result:
        found = real(self, **options)
        if self != tmp_path / "disk":
            return found
        values = list(found)
        values[2] += 1  # st_dev
        return os.stat_result(values)

    monkeypatch.setattr(Path, "stat", stat)
    free = {tmp_path / "disk": 10_000}
    usage = lambda path: type("Usage", (), {"free": free.get(Path(path), 10**9), "total": 0})  # noqa: E731
    monkeypatch.setattr(plan.shutil, "disk_usage", usage)
    with pytest.raises(UserError, match=r"disk may need .* for 3 frames, the disk has 10 kB to spare"):
        run(model, clip, tmp_path / "out", side_by_side=tmp_path / "disk/pair")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "in"]
    assert list((tmp_path / "disk").iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(errno.ENOENT, "No such file or directory", "in/001.png"), BrokenPipeError(errno.EPIPE, "x")],
)
def test_errors_of_others_are_not_the_workspaces(model, clip, tmp_path, error: OSError) -> None:
    """An input that went away, a pipe that nobody reads: told as such, and the run can go on."""

    def fail(progress: Progress) -> None:
        if progress == Progress("denoise", 4, 9):
            raise error

    with pytest.raises(type(error)) as caught:
        run(model, clip, tmp_path / "out", progress=fail)
    assert caught.value is error
    assert np.array_equal(run(model, clip, tmp_path / "out"), sample_video(model, pictures(3), steps=STEPS))


def test_an_input_that_cannot_be_read_is_named(model: StableVSR, clip: Path, tmp_path: Path) -> None:
    with open_reader(clip) as reader:
        (clip / "001.png").unlink()
        (clip / "001.png").symlink_to("nowhere.png")
        with pytest.raises(UserError, match=r"001.png cannot be read \(No such file or directory\)"):
            upscale(model, reader, tmp_path / "out", steps=STEPS)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_weights_of_a_model_are_hashed_once_for_several_clips(clip, tmp_path, monkeypatch) -> None:
    model = random_model()
    run(model, clip, tmp_path / "out", keep_workspace=True)
    known = fingerprints.hash_weights(model)
    with monkeypatch.context() as context:
        context.setattr(fingerprints, "_hash", None)
        run(model, clip, tmp_path / "out", force=True, keep_workspace=True)
    model.unet.encoder.conv_in.bias.add_(1)
    assert fingerprints.hash_weights(model) != known
    with pytest.raises(UserError, match="another weights"):
        run(model, clip, tmp_path / "out", force=True)


def test_a_checkout_need_not_be_installed(model, clip, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", None)
    with open_reader(clip) as reader:
        found = fingerprints.fingerprint(model, reader, SamplingConfig())
        assert found["version of stablevsr"] == stablevsr.__version__


def test_a_folder_that_a_killed_run_set_aside_comes_back(model: StableVSR, clip: Path, tmp_path: Path) -> None:
    expected = run(model, clip, tmp_path / "out", keep_workspace=True)
    (tmp_path / "out").rename(_set_aside(tmp_path / "out"))
    with pytest.raises(UserError, match="is not empty"):
        run(model, clip, tmp_path / "out")
    assert np.array_equal(run(model, clip, tmp_path / "out", force=True), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


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
        ("pictures.raw", b"", "pictures.raw is shorter than expected"),
    ],
)
def test_a_damaged_workspace_is_told(model, clip, tmp_path, name: str, damage: bytes, words: str) -> None:
    run(model, clip, tmp_path / "out", keep_workspace=True)
    (workspace_path(tmp_path / "out") / name).write_bytes(damage)
    with pytest.raises(UserError, match=words):
        run(model, clip, tmp_path / "out", force=True)
    run(model, clip, tmp_path / "out", force=True, restart=True)


CPU = torch.device("cpu")


@pytest.fixture
def disk(model: StableVSR, tmp_path: Path) -> Iterator[DiskStore]:
    with open_workspace(tmp_path / "out") as workspace, DiskStore(workspace, CPU) as found:
        yield found


def test_arrays_give_back_what_they_were_given(model: StableVSR, disk: DiskStore) -> None:
    frames = torch.from_numpy(pictures(3))
    array = disk.array("frames", (6, 8, 3), torch.uint8, CPU)
    for i, frame in enumerate(frames):
        array.write(i, frame)
    low_res = LowResFrames(array, 3, (6, 8))
    assert len(low_res) == 3
    assert torch.equal(torch.stack(list(low_res)), normalise(frames))
    estimated = EstimatedFlows(model.flow, low_res, CPU)
    flows = disk.array("flows", (2, *estimated.shape), torch.float32, CPU)
    flows.write(1, torch.stack([estimated.estimate(2, 1), estimated.estimate(1, 2)]))
    disk.flush()
    kept = KeptFlows(flows, estimated)
    assert torch.equal(kept.between(2, 1), estimated.between(2, 1))
    assert torch.equal(kept.between(1, 2), estimated.between(1, 2))


def test_latents_keep_what_a_step_starts_from(disk: DiskStore) -> None:
    shape, noise = (2, 3, 4), SeededNoise(0, (2, 3, 4))

    def opened(done: int) -> StepLatents:
        disk.flush()
        return StepLatents(disk.array("latents", shape, torch.float32, CPU), 3, noise, shape, CPU, done, disk.slots)

    latents = opened(0)
    assert torch.equal(latents[1], noise.initial(1))
    first, second = torch.ones(2, 3, 4), torch.full((2, 3, 4), 2.0)
    for frame in range(3):
        latents[frame] = first
    latents[2] = second  # the second pass begins at the end
    assert torch.equal(opened(4)[2], second)
    assert torch.equal(opened(3)[2], first)  # had the word of it not reached the disk
    assert torch.equal(opened(4)[1], first)


def test_nothing_on_the_way_of_a_frame_step_waits_for_the_disk(model, clip, tmp_path, monkeypatch) -> None:
    """With a slow disk: what the next frame-step reads is asked for before this one computes, by another thread."""
    main, events = threading.current_thread(), []
    read, write = ArrayFile.read, ArrayFile.write

    def slow(kind: str, real: Callable) -> Callable:
        def wrapped(self: ArrayFile, index: int, *value: torch.Tensor) -> torch.Tensor | None:
            assert threading.current_thread() is not main
            time.sleep(0.002)
            events.append((kind, self.path.stem, index))
            return real(self, index, *value)

        return wrapped

    monkeypatch.setattr(ArrayFile, "read", slow("read", read))
    monkeypatch.setattr(ArrayFile, "write", slow("write", write))
    asked, waited = store.DiskArray.read, []

    def counting(self: store.DiskArray, index: int) -> torch.Tensor:
        if index not in self._ahead and index not in self._behind:
            waited.append((self._file.path.stem, index))
        return asked(self, index)

    monkeypatch.setattr(store.DiskArray, "read", counting)

    def progress(event: Progress) -> None:
        if event.phase == "denoise" and event.done == 1:
            waited.clear()  # the first frame-step has nothing before it

    run(model, clip, tmp_path / "out", progress=progress)
    assert [name for name, _ in waited if name in ("latents", "flows")] == []
    assert {name for _, name, _ in events} == {"frames", "latents", "flows", "pictures"}


@pytest.mark.parametrize("fields", [{}, {"every": 2}, {"first_step": 2}])
def test_nothing_that_was_read_ahead_stays_in_memory(model, clip, tmp_path, monkeypatch, fields: dict) -> None:
    stores, real = [], store.DiskStore.__init__
    monkeypatch.setattr(store.DiskStore, "__init__", lambda self, *of: stores.append(self) or real(self, *of))
    most = 0

    def progress(event: Progress) -> None:
        nonlocal most
        if event.phase == "denoise":
            arrays = stores[-1]._arrays
            most = max(most, *(len(arrays[name]._ahead) for name in ("latents", "flows") if name in arrays))

    frames = write_frames(tmp_path / "more", pictures(6))
    run(model, frames, tmp_path / "out", temporal=TemporalGuidance(**fields), steps=4, progress=progress)
    assert most <= 1


def test_the_weights_of_an_offloaded_model_are_hashed_once(clip, tmp_path, monkeypatch) -> None:
    model, hashed, real = offloaded(random_model()), [], fingerprints._hash
    monkeypatch.setattr(fingerprints, "_hash", lambda of: hashed.append(of) or real(of))
    for name in ("a", "b"):
        run(model, clip, tmp_path / name)
    assert hashed == [model]


def test_an_error_of_the_disk_reaches_the_run_and_stops_the_writing(tmp_path: Path, monkeypatch) -> None:
    written, real = [], ArrayFile._put

    def put(self: ArrayFile, index: int, data: memoryview) -> None:
        written.append(index)
        if index == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, index, data)

    monkeypatch.setattr(ArrayFile, "_put", put)
    with open_workspace(tmp_path / "out") as workspace:
        disk = DiskStore(workspace, CPU)
        array = disk.array("latents", (2,), torch.float32, CPU)
        array.write(0, torch.zeros(2))
        array.write(1, torch.zeros(2))
        with pytest.raises(UserError, match="make room"):
            disk.flush()
        with pytest.raises(UserError, match="make room"):
            array.write(2, torch.zeros(2))
        with pytest.raises(UserError, match="make room"):
            disk.__exit__(None, None, None)
    assert written == [0, 1]


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_the_final_decode_is_continued_too(model, clip, tmp_path, monkeypatch, stop_at: int) -> None:
    monkeypatch.setattr(store, "SAVE_EVERY", -1.0)
    expected, decoded = run(model, clip, tmp_path / "expected"), []
    with pytest.raises(Stopped):
        run(model, clip, tmp_path / "out", progress=lambda event: (event.phase, event.done) != ("decode", stop_at))
    real = model.vae.decode
    monkeypatch.setattr(model.vae, "decode", lambda latent: decoded.append(1) or real(latent))
    assert np.array_equal(run(model, clip, tmp_path / "out"), expected)
    assert len(decoded) == 3 - stop_at


def test_another_depth_decodes_anew(model, clip, tmp_path, monkeypatch) -> None:
    """What was decoded for 8 bits is not enough for a video of 10."""
    monkeypatch.setattr(store, "SAVE_EVERY", -1.0)
    options = {"encoding": Encoding("hevc10")}
    with open_reader(clip) as reader:
        upscale(model, reader, tmp_path / "expected.mkv", steps=STEPS, **options)
        stop = lambda event: (event.phase, event.done) != ("decode", 2)  # noqa: E731
        with pytest.raises(Stopped):
            upscale(model, reader, tmp_path / "out.mkv", steps=STEPS, progress=stop)
        upscale(model, reader, tmp_path / "out.mkv", steps=STEPS, **options)
    with open_reader(tmp_path / "expected.mkv") as a, open_reader(tmp_path / "out.mkv") as b:
        assert all(np.array_equal(x.image, y.image) for x, y in zip(a, b, strict=True))


def test_an_icc_profile_goes_through_the_frame_table(model, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for i, image in enumerate(pictures(2)):
        Image.fromarray(image).save(tmp_path / f"in/{i}.png", icc_profile=profile if i else None)
    with pytest.raises(Stopped):
        run(model, tmp_path / "in", tmp_path / "out", progress=lambda event: event.phase != "denoise")
    run(model, tmp_path / "in", tmp_path / "out")
    found = [Image.open(path).info.get("icc_profile") for path in sorted((tmp_path / "out").iterdir())]
    assert found == [None, profile]


def test_sound_that_cannot_be_added_is_told_and_costs_no_picture(model, clip, tmp_path, monkeypatch) -> None:
    real = Writer.__exit__

    def closing(self: Writer, *error: object) -> None:
        real(self, *error)
        self.failures.append("stream 1 of in.mp4 is missing")

    monkeypatch.setattr(Writer, "__exit__", closing)
    with pytest.raises(IncompleteOutput, match=r"stream 1 of in\.mp4 is missing"):
        run(model, clip, tmp_path / "out")
    assert np.array_equal(read_frames(tmp_path / "out"), sample_video(model, pictures(3), steps=STEPS))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


MUXING = """
import os, signal, sys
from stablevsr import build_model, upscale
from stablevsr.media import video_writer

real, calls = video_writer.join, 0

def join(*arguments):
    global calls
    calls += 1
    if calls == 2:  # the first is the rehearsal
        real(*arguments)  # as far as it can be
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)

video_writer.join = join
upscale(build_model(sys.argv[1], device="cpu"), sys.argv[2], sys.argv[3], steps=2)
"""


def test_kill_9_in_the_final_mux_costs_no_picture(tiny_weights: Path, tmp_path: Path) -> None:
    """What was denoised and decoded is there, and only the encoding is done again."""
    source, model = film(tmp_path / "in.mkv"), build_model(tiny_weights, device="cpu")
    upscale(model, source, tmp_path / "whole.mkv", steps=2)
    command = [sys.executable, "-c", MUXING, tiny_weights, source, tmp_path / "out.mkv"]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == -signal.SIGKILL
    assert not (tmp_path / "out.mkv").exists()
    seen = []
    upscale(model, source, tmp_path / "out.mkv", steps=2, progress=seen.append)
    assert {progress.phase for progress in seen} == {"write"}
    assert (tmp_path / "out.mkv").read_bytes() == (tmp_path / "whole.mkv").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mkv", "out.mkv", "whole.mkv"]


def test_the_source_is_decoded_once(model, clip, tmp_path, monkeypatch) -> None:
    passes, real = [], FolderReader._frames
    monkeypatch.setattr(FolderReader, "_frames", lambda reader: passes.append(1) or real(reader))
    run(model, clip, tmp_path / "out")
    assert len(passes) == 1


@pytest.mark.parametrize("x0", [None, torch.rand(2, 3, 4)])
def test_a_state_comes_back_from_its_bytes(x0: torch.Tensor | None) -> None:
    state = RunState("denoise", 7, x0, tiled_since=3)
    back = RunState.from_bytes(state.to_bytes(), CPU)
    assert replace(back, x0=None) == replace(state, x0=None)
    assert back.x0 is x0 is None or torch.equal(back.x0, x0)
    for damaged in (b"", b"12345678", state.to_bytes()[:-3], RunState("denoise", "x").to_bytes()):
        with pytest.raises((ValueError, KeyError, SafetensorError)):
            RunState.from_bytes(damaged, CPU)


MEMORY = """
import sys, threading, time
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from stablevsr import build_model, upscale
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

model = build_model(sys.argv[3], device="cpu")
model.flow.config = replace(model.flow.config, num_updates=1)  # as much memory, less time
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
with open_reader(Path(sys.argv[1])) as clip:
    upscale(model, clip, Path(sys.argv[2]), steps=1, scene_cuts="off")
running = False
watcher.join()
print(peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell anonymous memory")
def test_memory_does_not_grow_with_the_clip(tmp_path: Path, tiny_weights: Path) -> None:
    peaks = []
    # Every tensor is given back as it is freed: glibc's own choice of what to keep moves the peak by 6 MB.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    for count in (12, 84):
        clip = write_frames(tmp_path / str(count), pictures(count, 32, 48))
        command = [sys.executable, "-c", MEMORY, clip, tmp_path / f"out{count}", tiny_weights]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600, env=environment)
        peaks.append(int(done.stdout))
    more = (84 - 12) * 16 * 32 * 48 * 3 / 1024  # kB of results
    print(f"peak anonymous memory: {peaks[0]} kB for 12 frames, {peaks[1]} kB for 84")
    assert peaks[1] <= peaks[0] + more / 2
