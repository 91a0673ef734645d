"""The driver of a run on a cluster: which units go where, what fails, and what is left; with `fake_ray`."""

import io
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import pytest
from cluster_clips import scenes_video
from fake_ray import FakeRay, GrayWorker

from stablevsr import PRESETS, Progress, Stopped
from stablevsr.cli import main
from stablevsr.cli.console import WorkerBars
from stablevsr.cluster import connect, driver, ray_pool, upscale_on_cluster
from stablevsr.cluster.assignment import AtWork
from stablevsr.cluster.connect import Cluster
from stablevsr.cluster.description import ModelDescription
from stablevsr.cluster.driver import run_on_cluster
from stablevsr.cluster.job import Job, Result, Setting
from stablevsr.cluster.pieces import Record
from stablevsr.cluster.run_unit import Order
from stablevsr.cluster.units import Unit
from stablevsr.engine.workspace import workspace_path
from stablevsr.errors import OptionsError, ResourceError, UserError, WeightsError
from stablevsr.weights import read_header

Act = Callable[[GrayWorker, Order], None]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeRay]:
    """Makes a cluster whose workers do something before they work."""
    monkeypatch.setattr(ray_pool, "POLL", 0.02)
    monkeypatch.setattr(driver, "WAIT", 0.02)

    def make(act: Act = lambda worker, order: None, slots: int = 99, **fields: object) -> FakeRay:
        ray = FakeRay(type("Worker", (GrayWorker,), {"act": staticmethod(act), **fields}), slots)
        monkeypatch.setattr(driver, "connected", ray.connected)
        return ray

    return make


def upscale(
    weights: Path, *clips: Path, workers: int = 2, progress: object = None, watch: object = None, **more: object
) -> list[Result]:
    config = PRESETS["exact"].with_fields({"steps": 1, "scene_cuts": "auto"})
    return run_on_cluster(
        [(clip, target(clip)) for clip in clips],
        ModelDescription(weights, "cpu"),
        Setting(config, read_header(weights).config, **more),
        Cluster(workers=workers),
        progress=progress,
        watch=watch,
    )


def test_the_python_function(cluster, tiny_weights: Path, clip: Path) -> None:
    cluster()
    model = ModelDescription(str(tiny_weights), "cpu")
    with pytest.raises(OptionsError, match="two inputs would both be written to"):
        upscale_on_cluster({clip: "out.mp4", "other.mp4": "out.mp4"}, model)
    with pytest.raises(OptionsError, match="got steps 0"):
        upscale_on_cluster({clip: target(clip)}, model, steps=0)
    (result,) = upscale_on_cluster({clip: target(clip)}, model, steps=1, scene_cuts=(3,), cluster=Cluster(workers=1))
    assert [(unit["first"], unit["last"]) for unit in result.units] == [(0, 3), (3, 9)]


def target(clip: Path) -> Path:
    return clip.with_name(f"{clip.stem}.out.mp4")


def length(path: Path) -> int:
    with av.open(str(path)) as file:
        return sum(1 for _ in file.decode(video=0))


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith("in.mp4"))


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return scenes_video(tmp_path / "in.mp4", 2, 4, 3)


def test_the_longest_unit_is_first_and_every_worker_has_one(cluster, tiny_weights: Path, clip: Path) -> None:
    order: list[tuple[int, int]] = []
    ready = threading.Barrier(2, timeout=10)

    def act(worker: GrayWorker, what: Order) -> None:
        order.append((what.unit.count, worker.number))
        if what.unit.count > 2:  # both are at work at the same time
            ready.wait()

    cluster(act)
    (result,) = upscale(tiny_weights, clip)
    assert sorted(count for count, _ in order[:2]) == [3, 4]
    assert order[2][0] == 2
    assert len({worker for _, worker in order}) == 2
    assert (result.frames, result.error, length(target(clip))) == (9, "", 9)
    assert [(unit["first"], unit["last"], unit["failures"]) for unit in result.units] == [
        (0, 2, 0),
        (2, 6, 0),
        (6, 9, 0),
    ]
    assert left(clip.parent) == ["in.out.mp4"]


def test_a_unit_of_a_worker_that_dies_goes_to_another(cluster, tiny_weights: Path, clip: Path, caplog) -> None:
    killed = []

    def act(worker: GrayWorker, order: Order) -> None:
        if order.unit.count == 4 and len(killed) < 2:
            killed.append(worker.number)
            worker.killed.set()

    ray = cluster(act)
    (result,) = upscale(tiny_weights, clip)
    assert not result.error
    assert [unit["failures"] for unit in result.units] == [0, 2, 0]
    assert ray.started == 4  # two, and one for each that died
    assert caplog.text.count("frames 2 to 5: the worker on machine") == 2
    assert left(clip.parent) == ["in.out.mp4"]


def test_after_three_failures_a_unit_is_given_up_and_the_rest_is_done(cluster, tiny_weights, clip, tmp_path) -> None:
    attempts = []

    def act(worker: GrayWorker, order: Order) -> None:
        if order.unit.count == 4:
            attempts.append(worker.number)
            raise RuntimeError("no luck\ntoday")

    other = scenes_video(tmp_path / "other_in.mp4", 2)
    cluster(act)
    bad, good = upscale(tiny_weights, clip, other)
    assert len(attempts) == 3
    assert "frames 2 to 5: machine" in bad.error
    assert "RuntimeError: no luck today" in bad.error
    assert (good.error, good.frames) == ("", 2)
    assert left(clip.parent) == ["in.out.mp4.unfinished", "other_in.out.mp4"]
    done: list[int] = []
    cluster(lambda worker, order: done.append(order.unit.first))
    (result,) = upscale(tiny_weights, clip)
    assert done == [2]  # the finished units are not repeated
    assert (result.error, length(target(clip))) == ("", 9)
    assert left(clip.parent) == ["in.out.mp4", "other_in.out.mp4"]


def test_what_fails_everywhere_is_not_tried_again(cluster, tiny_weights: Path, clip: Path) -> None:
    attempts = []

    def act(worker: GrayWorker, order: Order) -> None:
        attempts.append(order.unit.first)
        raise OptionsError("a decoded frame overflowed: use bf16 or fp32")

    cluster(act)
    (result,) = upscale(tiny_weights, clip)
    assert sorted(attempts) == [0, 2, 6]
    assert result.error.count("a decoded frame overflowed: use bf16 or fp32") == 3


def test_a_worker_with_a_full_disk_takes_no_more_units(cluster, tiny_weights: Path, clip: Path, caplog) -> None:
    tried: list[int] = []
    first_is_done = threading.Event()

    def act(worker: GrayWorker, order: Order) -> None:
        if worker.number == 1:
            tried.append(order.unit.first)
            raise ResourceError("/tmp may need 3 GB for 4 frames, the disk has 2 GB to spare: make room")
        first_is_done.wait(0.2)

    cluster(act)
    (result,) = upscale(tiny_weights, clip)
    assert not result.error
    assert len(tried) == 1
    assert "a worker takes no more work: machine1 (process 1): /tmp may need 3 GB" in caplog.text


def test_without_a_worker_left_the_reason_is_told(cluster, tiny_weights: Path, clip: Path) -> None:
    def act(worker: GrayWorker, order: Order) -> None:
        raise ResourceError("the disk is full")

    cluster(act)
    with pytest.raises(ResourceError, match=r"machine\d \(process \d\): the disk is full"):
        upscale(tiny_weights, clip)
    cluster()
    assert not upscale(tiny_weights, clip)[0].error


@pytest.mark.parametrize("name", ["weights", "version of torch", "version of stablevsr"])
def test_a_machine_that_differs_is_named_before_the_work(cluster, tiny_weights: Path, clip: Path, name: str) -> None:
    started: list[int] = []
    cluster(lambda worker, order: started.append(worker.number), facts_of_others={1: {name: "0.9"}, 2: {name: "0.9"}})
    with pytest.raises(ResourceError, match=rf"machine\d \(process \d\) has another {name} \(0.9, here .*: install"):
        upscale(tiny_weights, clip)
    assert not started
    assert left(clip.parent) == []


def test_a_machine_without_the_weights_is_named(cluster, tiny_weights: Path, clip: Path) -> None:
    def facts(self: GrayWorker) -> dict[str, str]:
        return ModelDescription(tiny_weights.with_name("none.safetensors"), "cpu").facts()

    cluster(facts=facts)
    words = r"machine\d \(process \d\): weights .*none.safetensors cannot be read .*: every machine needs them"
    with pytest.raises(WeightsError, match=words):
        upscale(tiny_weights, clip)
    assert left(clip.parent) == []


def test_who_works_where() -> None:
    """As many workers as there is room for; GPUs if there are any."""
    ray, description = FakeRay(GrayWorker, slots=8), ModelDescription()
    found = connect._connection(ray, Cluster(), description)
    assert (found.workers, found.description.device, found.needs) == (8, "cpu", {"num_gpus": 0, "num_cpus": 1})
    assert connect._connection(ray, Cluster(cpus_per_worker=3), description).workers == 2
    with pytest.raises(ResourceError, match="got device cuda, but the cluster has no GPU: use device cpu, or add"):
        connect._connection(ray, Cluster(), ModelDescription(device="cuda"))
    assert connect._connection(ray, Cluster(workers=5), ModelDescription(device="cuda")).workers == 5  # to be added
    ray.cluster_resources = lambda: {"CPU": 8, "GPU": 3}
    found = connect._connection(ray, Cluster(), description)
    assert (found.workers, found.description.device, found.needs) == (3, "cuda", {"num_gpus": 1, "num_cpus": 0})
    assert connect._connection(ray, Cluster(), ModelDescription(device="cpu")).workers == 8


def test_pieces_travel_through_the_object_store_where_nothing_is_shared(
    cluster, tiny_weights, clip, monkeypatch
) -> None:
    monkeypatch.setattr(ray_pool, "CHUNK", 1000)  # one frame at a time, and parts of pieces
    fetched: dict[str, bytes] = {}
    cluster(has_shared_storage=False)
    real = ray_pool.write_record

    def write_record(piece: Path, record: Record) -> None:
        fetched[piece.name] = piece.read_bytes()
        real(piece, record)

    monkeypatch.setattr(ray_pool, "write_record", write_record)
    (result,) = upscale(tiny_weights, clip)
    assert "0000000.mkv, a finished scene, is damaged" in result.error  # it is not a video
    assert fetched["0000000.mkv"] == b"not read by the driver" * 2


def test_waiting_for_a_slot_is_told(cluster, tiny_weights: Path, clip: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(ray_pool, "NO_ROOM_AFTER", 0.05)
    ray = cluster(slots=0)
    threading.Timer(0.5, lambda: setattr(ray, "slots", 1)).start()
    (result,) = upscale(tiny_weights, clip)
    assert not result.error
    assert "the cluster has no free slot for 2 workers, which need 1 CPU cores each: waiting" in caplog.text


def test_an_interrupted_run_stops_its_workers_and_continues(cluster, tiny_weights: Path, clip: Path) -> None:
    endless = threading.Event()
    ray = cluster(lambda worker, order: endless.wait(20) if order.unit.count < 4 else None)

    def interrupt(progress: Progress) -> None:
        if progress.phase == "denoise" and progress.done >= 4:
            raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        upscale(tiny_weights, clip, progress=interrupt)
    endless.set()
    assert time.monotonic() - start < 5
    assert all(handle.killed.is_set() for handle in ray.handles)
    assert left(clip.parent) == ["in.out.mp4.unfinished"]
    cluster()
    with pytest.raises(Stopped):
        upscale(tiny_weights, clip, progress=lambda progress: False)
    assert not upscale(tiny_weights, clip)[0].error
    assert left(clip.parent) == ["in.out.mp4"]


def test_many_clips_are_not_all_open_at_once(cluster, tiny_weights: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(driver, "AHEAD", 2)
    clips = [scenes_video(tmp_path / f"{number}in.mp4", 2) for number in range(12)]
    most, open_files = 0, []

    def act(worker: GrayWorker, order: Order) -> None:
        nonlocal most
        most = max(most, len(list(tmp_path.glob("*.unfinished"))))
        open_files.append(len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0)

    cluster(act)
    results = upscale(tiny_weights, *clips)
    assert not any(result.error for result in results)
    assert most <= 4 + 2 + 3 + 1  # waiting, at work, finished but not joined yet, being read
    assert max(open_files) - min(open_files) < 20
    assert len(left(tmp_path)) == 12


def test_an_output_that_cannot_be_written_does_not_stop_the_others(cluster, tiny_weights, clip, tmp_path, monkeypatch):
    """It fails while other scenes of the same clip are still to be sampled."""
    other, begun = scenes_video(tmp_path / "other_in.mp4", 2), threading.Event()
    real, failed = Job.joining, []

    def joining(self: Job, progress: object) -> Iterator[Unit]:
        for unit in real(self, progress):
            yield unit
            if self.input == clip:
                begun.set()
                failed.append(unit)
                raise ResourceError("the disk is full")

    monkeypatch.setattr(Job, "joining", joining)
    cluster(lambda worker, order: begun.wait(10) if order.unit.first == 6 else None)
    bad, good = upscale(tiny_weights, clip, other)
    assert len(failed) == 1
    assert (bad.error, good.error) == ("the disk is full", "")
    assert left(tmp_path) == ["in.out.mp4.unfinished", "other_in.out.mp4"]
    monkeypatch.setattr(Job, "joining", real)
    cluster()
    assert not upscale(tiny_weights, clip)[0].error


def test_one_bad_clip_does_not_stop_the_others(cluster, tiny_weights: Path, clip: Path, tmp_path: Path) -> None:
    cluster()
    bad, good = upscale(tiny_weights, tmp_path / "none_in.mp4", clip)
    assert "does not exist" in bad.error
    assert not good.error
    with pytest.raises(UserError, match="does not exist"):
        upscale(tiny_weights, tmp_path / "none_in.mp4")


def command(weights: Path, *arguments: object) -> int:
    return main(["upscale", *map(str, arguments), "--weights", str(weights), "--steps", "1", "-q"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cluster", "nowhere"], "got nowhere as the address of a Ray cluster, expected HOST:PORT, auto or nothing"),
        (["--cluster", "setup.cfg"], "expected HOST:PORT, auto or nothing: put --cluster after the paths"),
        (["--cluster", "ray://host:10001"], "expected HOST:PORT"),
        (["--cluster", "--device", "cuda:1"], "got device cuda:1, expected cpu or cuda: each worker of a cluster gets"),
        (["--cluster", "--workers", "0"], "got workers 0, expected 1 or more"),
    ],
)
def test_options_that_make_no_sense(tiny_weights, clip, capsys, monkeypatch, arguments: list[str], words: str) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert command(tiny_weights, clip, target(clip), *arguments) == 2
    assert words in capsys.readouterr().err
    assert left(clip.parent) == []


def test_an_input_that_was_taken_for_an_address(tiny_weights: Path, clip: Path, capsys) -> None:
    assert command(tiny_weights, "--cluster", clip, target(clip)) == 2
    assert "expected HOST:PORT, auto or nothing: put --cluster after the paths" in capsys.readouterr().err


def test_an_address_where_nobody_listens(tiny_weights: Path, clip: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        assert command(tiny_weights, clip, target(clip), "--cluster", address) == 2
    assert f"there is no Ray cluster at {address}" in capsys.readouterr().err


def test_without_the_extra(tiny_weights: Path, clip: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert command(tiny_weights, clip, target(clip), "--cluster") == 2
    assert capsys.readouterr().err.endswith("--cluster needs the package ray: pip install 'stablevsr[cluster]'\n")
    assert left(clip.parent) == []


def test_progress_counts_the_frame_steps_of_all_clips(cluster, tiny_weights: Path, clip: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    told: list[Progress] = []
    cluster()
    upscale(tiny_weights, clip, progress=told.append)
    assert {(each.phase, each.total) for each in told} <= {("denoise", 9), ("write", 9), ("read", 9)}
    assert max(each.done for each in told) == 9
    assert f"{clip}: 9 frames in 3 scenes" in caplog.text
    assert workspace_path(target(clip)).exists() is False


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_for_every_worker(cluster, tiny_weights, clip, monkeypatch, caplog, is_terminal: bool) -> None:
    """Two are at work; the third has nothing to do after the only other scene."""
    caplog.set_level(logging.DEBUG, "stablevsr")
    shown, told, seen = Terminal() if is_terminal else io.StringIO(), [], threading.Event()
    monkeypatch.setattr(sys, "stderr", shown)

    def note(workers: list[AtWork]) -> None:
        told.extend(workers)
        bars(workers)
        if {worker.unit for worker in workers if worker.unit} == {"in.mp4, frames 2 to 5", "in.mp4, frames 6 to 8"}:
            seen.set()

    cluster(lambda worker, order: seen.wait(20) if order.unit.count > 2 else None)
    with WorkerBars() as bars:
        upscale(tiny_weights, clip, workers=3, watch=note)
    assert {worker.number for worker in told} == {1, 2, 3}
    assert {(worker.unit, worker.total) for worker in told} >= {("", 0), ("in.mp4, frames 2 to 5", 4)}
    assert ("on machine1: in.mp4, frames" in shown.getvalue()) == is_terminal
    assert ("waiting" in shown.getvalue()) == is_terminal
