"""The units of a run on several machines, and `--shard`: the same bits, whoever does what; nothing is done twice."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cluster_clips import clips_with_results, contents, scenes, scenes_video
from stream_models import TINY_STREAM, random_stream_model

from stablevsr import PRESETS, Progress, SamplingConfig, Stopped, build_model, upscale
from stablevsr.cli import main
from stablevsr.cluster import shard
from stablevsr.cluster.description import ModelDescription
from stablevsr.cluster.job import Result, Setting
from stablevsr.cluster.pieces import Record, bound, read_piece, write_piece
from stablevsr.cluster.run_unit import Made, Order
from stablevsr.cluster.shard import run_shard
from stablevsr.cluster.units import Shard, Unit, cuts_of_stream, longest_first, units_between
from stablevsr.engine import store
from stablevsr.engine.workspace import workspace_path
from stablevsr.errors import OptionsError, UserError
from stablevsr.sampling.pictures import normalise
from stablevsr.weights import Header, read_header, write

STEPS = 2


def sampling(**fields: object) -> SamplingConfig:
    return PRESETS["exact"].with_fields({"steps": STEPS, "scene_cuts": "auto", **fields})


def setting(weights: Path, config: SamplingConfig | None = None, **more: object) -> Setting:
    header = read_header(weights)
    return Setting(config or sampling(), header.config, **more)


def share(weights: Path, clips: dict[Path, Path], text: str, **more: object) -> list[Result]:
    progress, config = more.pop("progress", None), more.pop("config", None)
    return run_shard(
        list(clips.items()),
        ModelDescription(weights, "cpu"),
        setting(weights, config, **more),
        Shard.parse(text),
        progress=progress,
    )


def test_the_units_are_the_scenes() -> None:
    assert units_between([3, 4], 9) == [Unit(0, 3), Unit(3, 4), Unit(4, 9)]
    assert units_between([], 2) == [Unit(0, 2)]
    assert [unit.first for unit in longest_first(units_between([3, 4, 7], 9))] == [0, 4, 7, 3]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_unit_is_in_one_share(count: int) -> None:
    units = units_between([2, 3, 7, 11, 12], 20)
    for clip in range(3):
        shares = [Shard(index, count).of(units, clip) for index in range(1, count + 1)]
        assert sorted(unit.first for each in shares for unit in each) == [unit.first for unit in units]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    single = [Unit(0, 5)]  # clips of one scene each are dealt out in turn
    assert [[bool(Shard(index, 2).of(single, clip)) for index in (1, 2)] for clip in (0, 1)] == [
        [True, False], [False, True],
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "3", "0/2", "3/2", "1/0", "a/b", "-1/2", "1/2/3"])
def test_a_shard_is_i_of_n(text: str) -> None:
    with pytest.raises(OptionsError, match="expected I/N with I from 1 to N, as in 1/8"):
        Shard.parse(text)


def test_the_cuts_of_a_stream_are_those_it_finds_itself() -> None:
    frames = normalise(torch.from_numpy(np.stack(scenes(4, 3, 5))))
    assert cuts_of_stream(sampling(mode="streaming"), frames) == [4, 7]
    assert cuts_of_stream(sampling(mode="streaming", scene_cuts=(2, 9)), frames) == [2, 9]
    assert cuts_of_stream(sampling(mode="streaming", scene_cuts="off"), frames) == []


@pytest.mark.parametrize("is_deep", [False, True])
def test_pieces_are_lossless_and_bounded(tmp_path: Path, is_deep: bool) -> None:
    kind, top = (np.uint16, 65536) if is_deep else (np.uint8, 256)
    noise = np.random.default_rng(0).integers(0, top, (5, 48, 64, 3), kind)
    digest = write_piece(tmp_path / "piece.mkv", map(torch.from_numpy, noise), is_deep)
    found = list(read_piece(tmp_path / "piece.mkv", Record(5, digest), is_deep))
    assert np.array_equal(torch.stack(found).numpy(), noise)
    assert found[0].dtype == (torch.uint16 if is_deep else torch.uint8)
    assert (tmp_path / "piece.mkv").stat().st_size <= bound(tmp_path, 48, 64, is_deep).bytes(5)


@pytest.mark.parametrize("damage", ["short", "changed", "gone"])
def test_a_damaged_piece_is_noticed(tmp_path: Path, damage: str) -> None:
    path, noise = tmp_path / "piece.mkv", np.random.default_rng(0).integers(0, 256, (4, 48, 64, 3), np.uint8)
    record = Record(4, write_piece(path, map(torch.from_numpy, noise), is_deep=False))
    data = bytearray(path.read_bytes())
    if damage == "changed":
        data[len(data) // 2] ^= 0xFF
    path.write_bytes(data[: len(data) // 2] if damage == "short" else data)
    if damage == "gone":
        path.unlink()
    with pytest.raises(UserError, match=r"piece.mkv, a finished scene, is damaged: delete it and piece.json to"):
        list(read_piece(path, record, is_deep=False))


@pytest.fixture(scope="module")
def stream_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream") / "stream.safetensors"
    write(path, Header(TINY_STREAM, sampling=PRESETS["streaming"]), random_stream_model().state_dict())
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> dict[Path, Path]:
    return clips_with_results(tmp_path_factory.mktemp("clips"), tiny_weights, sampling())


def test_shards_end_with_the_same_frames_sound_and_times(
    clips: dict[Path, Path], tiny_weights: Path, tmp_path: Path
) -> None:
    targets = {clip: tmp_path / clip.name for clip in clips}
    first = share(tiny_weights, targets, "1/2")
    assert not any(target.exists() for target in targets.values())
    second = share(tiny_weights, targets, "2/2")
    assert [result.error for result in first + second] == [""] * 6
    for clip, target in targets.items():
        assert contents(target) == contents(clips[clip])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4", "c.mp4"]
    assert [[unit["first"] for unit in result.units] for result in second] == [[0, 3], [0, 2, 3], [0, 4]]
    assert [result.frames for result in second] == [5, 7, 7]
    # One that starts late, or again, has nothing to do.
    modified = [target.stat().st_mtime_ns for target in targets.values()]
    assert [result.error for result in share(tiny_weights, targets, "1/2")] == [""] * 3
    assert [target.stat().st_mtime_ns for target in targets.values()] == modified


@pytest.mark.parametrize("mode", ["bidirectional", "streaming"])
def test_a_stopped_shard_continues_and_repeats_nothing(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(store, "SAVE_EVERY", -1.0)
    config = sampling(mode=mode, sampler="ddim" if mode == "streaming" else "ddpm")
    clip, count = scenes_video(tmp_path / "in.mp4", 4, 3), 0
    upscale(build_model(tiny_weights, device="cpu"), clip, tmp_path / "expected.mp4", config)
    work = {"bidirectional": ("denoise", 4 * STEPS + 3 * STEPS), "streaming": ("stream", 7)}[mode]

    def stop_in_the_second(progress: Progress) -> bool:
        nonlocal count
        count += progress.phase == work[0]
        return count < work[1] - 2

    target = {clip: tmp_path / "out.mp4"}
    with pytest.raises(Stopped):
        share(tiny_weights, target, "1/1", progress=stop_in_the_second, config=config)
    workspace = workspace_path(tmp_path / "out.mp4")
    assert (workspace / "units/0000000.json").exists()
    assert (workspace / "units/0000004.mkv.unfinished/state.safetensors").exists()
    done, before = [], count
    share(tiny_weights, target, "1/1", progress=done.append, config=config)
    assert before + sum(progress.phase == work[0] for progress in done) == work[1]
    assert contents(tmp_path / "out.mp4") == contents(tmp_path / "expected.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected.mp4", "in.mp4", "out.mp4"]


def test_streaming_weights_too(tmp_path: Path, stream_weights: Path) -> None:
    clip = scenes_video(tmp_path / "in.mp4", 3, 4, 2)
    config = PRESETS["streaming"].with_fields({"steps": STEPS, "scene_cuts": "auto"})
    upscale(build_model(stream_weights, device="cpu"), clip, tmp_path / "expected.mp4", config)
    for text in ("1/2", "2/2"):
        share(stream_weights, {clip: tmp_path / "out.mp4"}, text, config=config)
    assert contents(tmp_path / "out.mp4") == contents(tmp_path / "expected.mp4")


def fail_at(monkeypatch: pytest.MonkeyPatch, first: int, error: Exception) -> None:
    """Let the unit that starts at this frame fail."""
    real = shard.run_unit

    def run(model: object, order: Order, *more: object) -> Made:
        if order.unit.first == first:
            raise error
        return real(model, order, *more)

    monkeypatch.setattr(shard, "run_unit", run)


def test_a_scene_that_fails_does_not_stop_the_others(
    clips: dict[Path, Path], tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = {clip: tmp_path / clip.name for clip in list(clips)[:2]}
    with monkeypatch.context() as patch:
        fail_at(patch, 2, OptionsError("a decoded frame overflowed"))
        first, second = share(tiny_weights, targets, "1/1")
    assert second.error == "frames 2 to 2: a decoded frame overflowed"
    assert not first.error
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a.mp4"]
    assert not share(tiny_weights, targets, "1/1")[1].error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


def command(weights: Path, *arguments: object) -> int:
    options = ["--weights", str(weights), "--steps", "1", "--scene-cuts", "auto", "--device", "cpu", "-q"]
    return main(["upscale", *map(str, arguments), *options])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shard", "3/2"], "got shard '3/2', expected I/N"),
        (["--shard", "1/2", "--force"], "got force with a shard, where each process would discard the others' work"),
        (["--shard", "1/2", "--restart"], "got restart with a shard"),
        (["--shard", "1/2", "--cluster"], "got --cluster and --shard, which exclude each other"),
        (["--workers", "2"], "got --workers without --cluster, where it has no effect: omit it"),
        (["--cpus-per-worker", "2", "--shard", "1/2"], "got --cpus-per-worker without --cluster"),
        (["--cluster", "--workers", "0"], "got workers 0, expected 1 or more"),
    ],
)
def test_options_that_make_no_sense(tiny_weights, tmp_path, capsys, arguments: list[str], words: str) -> None:
    clip = scenes_video(tmp_path / "in.mp4", 2)
    assert command(tiny_weights, clip, tmp_path / "out.mp4", *arguments) == 2
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


def test_bad_input_is_told_as_by_one_process(tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good, bad = scenes_video(tmp_path / "in.mp4", 2), tmp_path / "bad.mp4"
    assert command(tiny_weights, "-", tmp_path / "out.mp4", "--shard", "1/2") == 2
    assert "a pipe cannot be divided: use files" in capsys.readouterr().err
    assert command(tiny_weights, bad, tmp_path / "out.mp4", "--shard", "1/2") == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    assert command(tiny_weights, bad, good, "-o", tmp_path / "out", "--shard", "1/1", "--json") == 1
    told = capsys.readouterr()
    assert "bad.mp4 does not exist" in told.err
    found = json.loads(told.out)
    assert ["does not exist" in found[0]["error"], found[1]["error"], found[1]["frames"]] == [True, "", 2]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["in.mp4"]


def test_other_runs_and_shards_refuse_each_other(tiny_weights: Path, tmp_path: Path, capsys) -> None:
    """A shared workspace does not go on with other settings, nor as a run of one process."""
    clip, out = scenes_video(tmp_path / "in.mp4", 2, 3), tmp_path / "out.mp4"
    assert command(tiny_weights, clip, out, "--shard", "1/2") == 0
    assert "1 of 2 scenes are left to other processes" not in capsys.readouterr().err  # -q
    assert command(tiny_weights, clip, out, "--shard", "2/2", "--seed", "3") == 2
    assert "was started with another seed (0, now 3)" in capsys.readouterr().err
    assert command(tiny_weights, clip, out) == 2
    assert "was started with another division (into scenes, now none)" in capsys.readouterr().err
    assert command(tiny_weights, clip, out, "--shard", "2/2") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]
