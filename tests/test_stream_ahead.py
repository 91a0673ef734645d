"""Streaming with what can be done ahead: the next frame is read in a thread, and prepared while this one is sampled."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from clips_made import write_video
from models import TINY, random_model
from stream_models import TINY_STREAM, random_stream_model
from torch import Tensor

from stablevsr import UserError, runtime, sample_video, upscale
from stablevsr.architectures import RAFT_SMALL
from stablevsr.engine.stream import Stream
from stablevsr.engine.stream_reader import ReadAhead
from stablevsr.media import Encoding, Frame, open_reader
from stablevsr.media.frame import Reader
from stablevsr.model import StableVSR
from stablevsr.runtime import SideStream
from stablevsr.sampling.config import STREAMING, SamplingConfig
from stablevsr.sampling.noise import SeededNoise
from stablevsr.sampling.stream_denoiser import StreamDenoiser
from stablevsr.sampling.streaming import StreamFrame, StreamState, cuts_at, stream_steps, streaming_sampling

CPU = torch.device("cpu")
SHAPE = (4, 8, 12)


QUICK = replace(RAFT_SMALL, num_updates=1)


@pytest.fixture(scope="module")
def stream_model() -> StableVSR:
    model = random_stream_model(replace(TINY_STREAM, flow=QUICK))
    model.sampling = STREAMING
    return model


def clip(n: int = 6) -> Tensor:
    return torch.rand(n, 3, *SHAPE[1:], generator=torch.Generator().manual_seed(0)) * 2 - 1


class Ready:
    """`Peekable` frames; `there` says which of them are there before they are asked for."""

    def __init__(self, frames: Tensor | list[Tensor], there: Callable[[int], bool] = lambda frame: True) -> None:
        self.frames, self.there, self.taken = list(frames), there, 0

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        if self.taken == len(self.frames):
            raise StopIteration
        self.taken += 1
        return self.frames[self.taken - 1]

    def peek(self) -> Tensor | None:
        is_there = self.taken < len(self.frames) and self.there(self.taken)
        return self.frames[self.taken] if is_there else None


class Logged:
    """Networks that write down what they are asked for."""

    def __init__(self, networks: StreamDenoiser) -> None:
        self.networks, self.asked = networks, []

    def __getattr__(self, name: str) -> object:
        work = getattr(self.networks, name)

        def logged(*arguments: object) -> object:
            self.asked.append(name)
            return work(*arguments)

        return logged


def run(model: StableVSR, frames: object, config: SamplingConfig = STREAMING, **options: object) -> tuple:
    """The loop over frames, and the networks that it works with."""
    context = model.encode_prompt(None)
    decoder = Stream(model, config, SHAPE[1:]).decoder
    networks = Logged(
        StreamDenoiser(
            model,
            torch.cat([context.roll(1, 1), context]) if config.cfg_scale > 1 else context,
            cfg_scale=config.cfg_scale,
            encoder=decoder.encode_enlarged if config.strength < 1 else None,
        )
    )
    schedule = model.config.schedule
    steps = stream_steps(schedule, config.steps, config.strength)
    noise = options.pop("noise", SeededNoise(0, SHAPE))
    return streaming_sampling(frames, steps, schedule, noise, networks, **options), networks


def same(found: list[StreamFrame], expected: list[StreamFrame]) -> bool:
    assert [frame.state.frame for frame in found] == [frame.state.frame for frame in expected]
    return all(torch.equal(a.state.picture, b.state.picture) for a, b in zip(found, expected, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# The loop, forced to look ahead on the CPU


@pytest.mark.parametrize(
    ("weights", "fields", "cuts"),
    [
        ("stream", {}, ()),
        ("stream", {"cfg_scale": 2.0, "steps": 2}, (4,)),
        ("stream", {"strength": 0.5}, (1, 3)),
        ("stablevsr", {"steps": 2}, ()),
    ],
)
def test_looking_ahead_changes_no_bit(weights: str, fields: dict, cuts: tuple, stream_model: StableVSR) -> None:
    model = stream_model if weights == "stream" else random_model(replace(TINY, flow=QUICK))
    config = STREAMING.with_fields(fields)
    plain, networks = run(model, clip(), config, is_cut=cuts_at(cuts))
    expected = list(plain)
    assert "begin" not in networks.asked
    ahead, networks = run(model, Ready(clip()), config, is_cut=cuts_at(cuts))
    assert same(list(ahead), expected)
    begun = networks.asked.count("begin")
    assert begun == 6 - 3 if 1 not in cuts else begun == 6 - 4  # those after the first guided frame's successor
    some, networks = run(model, Ready(clip(), lambda frame: frame != 4), config, is_cut=cuts_at(cuts))
    assert same(list(some), expected)
    assert networks.asked.count("begin") == begun - 1


def test_the_order_of_work(stream_model: StableVSR) -> None:
    frames, networks = run(stream_model, Ready(clip(4)), STREAMING.with_fields({"steps": 1}))
    begin, finish, ahead = ["flow", "encode"], ["guide", "embed", "predict", "decode"], ["flow", "encode", "begin"]
    order = [["encode", "predict", "decode"], begin + finish, begin + finish + ahead, finish]
    for expected, _ in zip(order, frames, strict=True):
        assert networks.asked == expected  # frame 3 is prepared before frame 2 goes out, but after its own work
        networks.asked.clear()


def test_a_frame_that_is_not_there_is_not_waited_for(stream_model: StableVSR) -> None:
    source = Ready(clip(), lambda frame: False)
    for i, _ in enumerate(run(stream_model, source, STREAMING.with_fields({"steps": 1}))[0]):
        assert source.taken == i + 1


def test_a_cut_is_looked_for_once_in_every_frame(stream_model: StableVSR) -> None:
    asked = []

    def is_cut(frame: int, low_res: Tensor, previous: Tensor) -> bool:
        asked.append((frame, torch.equal(low_res, clip()[frame]), torch.equal(previous, clip()[frame - 1])))
        return frame == 4

    found = list(run(stream_model, Ready(clip()), STREAMING.with_fields({"steps": 1}), is_cut=is_cut)[0])
    assert asked == [(frame, True, True) for frame in range(1, 6)]
    assert [frame.condition is None for frame in found] == [True, False, False, False, True, False]


def test_a_stream_that_is_continued_looks_ahead_too(stream_model: StableVSR) -> None:
    config = STREAMING.with_fields({"steps": 1})
    whole = list(run(stream_model, clip(), config)[0])
    rest, networks = run(stream_model, Ready(clip()[2:]), config, start=StreamState(*whole[1].state))
    assert same(list(rest), whole[2:])
    assert networks.asked.count("begin") == 2


def test_errors_of_the_next_frame_come_after_this_one(stream_model: StableVSR) -> None:
    config, bad = STREAMING.with_fields({"steps": 1}), [*clip(3), torch.zeros(3, 9, 12)]
    frames, _ = run(stream_model, Ready(bad), config)
    assert [next(frames).state.frame for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="got size 12x9 for frame 3, expected 12x8 as before"):
        next(frames)

    class Short(SeededNoise):
        def initial(self, frame: int) -> Tensor:
            return super().initial(frame)[..., : 12 if frame < 3 else 11]

    frames, _ = run(stream_model, Ready(clip()), config, noise=Short(0, SHAPE))
    assert [next(frames).state.frame for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="for frame 3, expected"):
        next(frames)


# ---------------------------------------------------------------------------------------------------------------------
# The side stream, with a CUDA that only writes down what it is told


class FakeStream:
    def __init__(self, name: str, log: list) -> None:
        self.name, self.log, self.device = name, log, torch.device("cuda:0")

    def wait_stream(self, other: "FakeStream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self.log.append(f"event in {self.name}")
        return f"the event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list:
    """The log of a CUDA that is not there."""
    log: list = []
    main, side = FakeStream("main", log), FakeStream("side", log)

    @contextmanager
    def within(stream: FakeStream) -> Iterator[None]:
        log.append(f"into {stream.name}")
        yield
        log.append(f"out of {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: log.append((stream.name, tensor.item())))
    return log


def test_what_a_side_stream_makes_is_waited_for_and_kept(cuda: list) -> None:
    side = SideStream(torch.device("cuda"))
    one, two, three = (torch.tensor(number) for number in (1, 2, 3))
    result = side.start(lambda: cuda.append("work") or (one, None, [two, (three, "x")]), after_main=True)
    assert cuda == ["side waits for main", "into side", "work", "out of side", "event in side"]
    cuda.clear()
    assert result()[0] is one
    assert cuda == ["main waits for the event of side", ("main", 1), ("main", 2), ("main", 3)]
    cuda.clear()
    side.start(lambda: cuda.append("work"), after_main=False)
    assert cuda[0] == "into side"


def test_an_error_in_a_side_stream_comes_with_the_result() -> None:
    def fail() -> None:
        raise UserError("no")

    result = SideStream(CPU).start(fail, after_main=True)
    with pytest.raises(UserError, match="no"):
        result()


def test_overlapping_work_needs_as_much_memory_again(cuda: list, monkeypatch: pytest.MonkeyPatch) -> None:
    side = SideStream(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 100))
    for peak, room in ((10, True), (11, False)):
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device, peak=peak: peak)
        assert side.has_room() == room
    assert SideStream(CPU).has_room()


def test_where_memory_is_short_nothing_is_done_ahead(stream_model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.SideStream, "has_room", lambda side: False)
    frames, networks = run(stream_model, Ready(clip()), STREAMING.with_fields({"steps": 1}))
    assert len(list(frames)) == 6
    assert "begin" not in networks.asked


# ---------------------------------------------------------------------------------------------------------------------
# Reading in a thread


def frames_of(numbers: Iterator[int] | range) -> Iterator[Frame]:
    for number in numbers:
        yield Frame(np.full((2, 2, 3), number, np.uint8), pts=number)


def numbers_in(frames: ReadAhead) -> list[int]:
    return [round((low_res[0, 0, 0].item() + 1) * 127.5) for low_res in frames]


def soon(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def test_the_next_frame_is_read_meanwhile_and_the_next_but_one_is_not() -> None:
    asked = []

    def source() -> Iterator[int]:
        for number in range(5):
            asked.append((number, threading.current_thread() is threading.main_thread()))
            yield number

    with ReadAhead(frames_of(source()), CPU) as frames:
        for number, low_res in enumerate(frames):
            assert frames.frame.pts == number
            assert low_res.shape == (3, 2, 2)
            assert soon(lambda number=number: len(asked) == min(number + 2, 5))
            time.sleep(0.02)
            assert asked == [(i, False) for i in range(min(number + 2, 5))]


def test_peeking_does_not_wait_and_takes_nothing() -> None:
    go = threading.Event()

    def source() -> Iterator[int]:
        yield 7
        go.wait(20)
        yield 8

    with ReadAhead(frames_of(source()), CPU) as frames:
        assert next(frames) is not None
        assert frames.peek() is None
        go.set()
        assert soon(lambda: frames.peek() is not None)
        peeked = frames.peek()
        assert frames.frame.pts == 7
        assert next(frames) is peeked
        assert soon(frames._coming.done)
        assert frames.peek() is None
        assert numbers_in(frames) == []
        assert numbers_in(frames) == []


def test_an_error_comes_where_its_frame_would_have() -> None:
    def source() -> Iterator[int]:
        yield from range(2)
        raise UserError("frame 2 is damaged")

    with ReadAhead(frames_of(source()), CPU) as frames:
        next(frames)
        next(frames)
        assert soon(frames._coming.done)
        assert frames.peek() is None
        with pytest.raises(UserError, match="frame 2 is damaged"):
            next(frames)


def test_a_read_that_may_never_end_is_left_and_another_is_waited_for() -> None:
    go, done = threading.Event(), []

    def source() -> Iterator[int]:
        yield 0
        go.wait(20)
        done.append(True)

    start = time.monotonic()
    with ReadAhead(frames_of(source()), CPU, patience=0.05) as frames:
        next(frames)
    assert not done
    assert time.monotonic() - start < 10
    threading.Timer(0.1, go.set).start()
    with ReadAhead(frames_of(source()), CPU) as frames:
        next(frames)
    assert soon(lambda: len(done) == 2)


class Endless(Reader):
    """A reader whose next frame never comes."""

    def __init__(self, go: threading.Event) -> None:
        super().__init__(Path("-"))
        self.go = go
        self.height, self.width = 8, 12
        self.frame_rate, self.time_base, self.frame_count = Fraction(25), Fraction(1, 25), None

    def _frames(self) -> Iterator[Frame]:
        yield Frame(np.zeros((8, 12, 3), np.uint8), pts=0, time_base=self.time_base, duration=1)
        self.go.wait(20)


def test_a_reader_may_be_closed_while_a_thread_waits_in_it(stream_model: StableVSR, tmp_path: Path) -> None:
    def stop(progress: object) -> None:
        raise KeyboardInterrupt

    go, start = threading.Event(), time.monotonic()
    with pytest.raises(UserError, match="interrupted; 1 frames are written"), Endless(go) as reader:
        upscale(stream_model, reader, tmp_path / "out.mkv", progress=stop)
    assert time.monotonic() - start < 15
    go.set()


def test_files_that_look_ahead_have_the_same_bits(stream_model, tmp_path: Path, monkeypatch) -> None:
    """As on CUDA, on the CPU."""
    images = list(np.random.default_rng(0).integers(0, 256, (7, 8, 12, 3), dtype=np.uint8))
    write_video(tmp_path / "in.mkv", images)
    with open_reader(tmp_path / "in.mkv") as reader:
        low_res = np.stack([frame.image for frame in reader])
    begun, real = [], StreamDenoiser.begin
    monkeypatch.setattr(StreamDenoiser, "begin", lambda *arguments: begun.append(True) or real(*arguments))
    whole, options = Stream.__init__, {"steps": 1, "scene_cuts": "off"}

    def looking_ahead(self: Stream, *arguments: object, **fields: object) -> None:
        whole(self, *arguments, **fields)
        self._looks_ahead = True

    expected = sample_video(stream_model, low_res, **options)
    assert begun == []
    monkeypatch.setattr(Stream, "__init__", looking_ahead)
    peek = ReadAhead.peek
    monkeypatch.setattr(ReadAhead, "peek", lambda self: soon(self._coming.done) and peek(self))  # always in time
    upscale(stream_model, tmp_path / "in.mkv", tmp_path / "out.mkv", encoding=Encoding("ffv1"), **options)
    assert len(begun) == 4
    with open_reader(tmp_path / "out.mkv") as reader:
        assert np.array_equal(np.stack([frame.image for frame in reader]), expected)


def test_a_model_on_the_cpu_does_not_look_ahead(stream_model: StableVSR) -> None:
    assert not Stream(stream_model, STREAMING, SHAPE[1:])._looks_ahead
