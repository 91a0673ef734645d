"""The speed benchmark's table: every row in the same units."""

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch
from models import random_model

from stablevsr import PRESETS

CPU = torch.device("cpu")


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import speed

    yield speed
    sys.modules.pop("speed")


@pytest.fixture
def ticking(speed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that advances by a second each time it is read: a part that holds no other takes one second a call."""
    clock = iter(range(10**9))
    monkeypatch.setattr(speed.Stopwatch, "now", lambda watch: float(next(clock)))


def measured(speed, num_frames: int, steps: int) -> dict[str, dict]:
    """The published loop and our sampler on the same random model."""
    model, low_res = random_model(), torch.rand(num_frames, 3, 8, 8)
    rows = {
        "baseline fp32": partial(speed.run_baseline, speed.ReferenceLoop(model), model.encode_prompt(None)),
        "ours fp32": partial(speed.run_ours, model, PRESETS["exact"]),
    }
    rows = {name: speed.Row(run, model, 50) for name, run in rows.items()}
    for row in rows.values():
        speed.take_turn(row, low_res, steps, CPU)
        watch = speed.Stopwatch(CPU, detailed=True)
        row.run(low_res, steps, watch)
        row.parts = dict(watch.seconds)
    return speed.summary(Namespace(frames=num_frames, steps=steps, device=CPU), rows, 10**12)


@pytest.mark.parametrize(("num_frames", "steps"), [(2, 2), (4, 1)])
def test_columns_by_part_are_of_a_frame_step_in_every_row(speed, ticking, num_frames: int, steps: int) -> None:
    guided = (num_frames - 1) / num_frames  # all frame-steps but the first of each pass
    for row in measured(speed, num_frames, steps).values():
        parts = dict(row["of which"])
        assert parts.pop("other") > 0
        assert parts == {"UNet": 1, "TCM": guided, "decode": guided, "warp": guided, "schedule": 1}


def test_parts_add_up_to_their_own_run(speed) -> None:
    row = speed.Row(run=None, model=None, total_steps=50, parts={"denoise": 8.0, "UNet": 4.0, "decode": 2.0})
    parts = speed.by_part(row, frame_steps=4)
    assert parts == {"UNet": 1, "TCM": 0, "decode": 0.5, "warp": 0, "schedule": 0, "other": 0.5}
    assert sum(parts.values()) == 8.0 / 4


def test_the_printed_table_says_its_unit(speed, capsys: pytest.CaptureFixture) -> None:
    row = {
        "seconds a frame-step": 0.25,
        "of which": {"UNet": 0.0625, "TCM": 0.03125, "decode": 0.125, "warp": 0.001, "schedule": 0.002, "other": 0.003},
        "steps": 50,
        "seconds a frame": 12.5,
        "PSNR against the first row, dB": None,
    }
    speed.show("80x60", {"baseline fp32": row, "ours fp32": row | {"PSNR against the first row, dB": 130.0}})
    unit, head, *lines = capsys.readouterr().out.splitlines()[1:]
    assert unit.strip() == "milliseconds a frame-step"
    assert head.split()[-6:] == ["UNet", "TCM", "decode", "warp", "schedule", "other"]
    for line in lines:
        assert line.removesuffix("  130.0 dB").split()[-6:] == ["62.50", "31.25", "125.00", "1.00", "2.00", "3.00"]
        assert len(line.removesuffix("  130.0 dB")) == len(head)
