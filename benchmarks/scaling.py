#!/usr/bin/env python3
"""How long a film takes on 1 to 256 workers: a discrete simulation of `upscale --cluster`, in pure Python.

Unit times come from benchmarks/results where they were measured; what was not measured is marked as assumed, in the
results and in the table. Simulated are the list of units, longest first, workers that start late and die, and the
writing of the output in order. With segments a long scene is divided, and a segment's pass begins when its own last
pass and those of both neighbors have ended.

    python benchmarks/scaling.py        writes benchmarks/results/scaling.json and the tables in docs/scaling.md
"""

import heapq
import json
import math
import random
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "benchmarks/results", ROOT / "docs/scaling.md"
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
RATE, HOURS = 24, 2  # frames per second of the film, and its length
# Shots of feature films are about log-normal in length. Assumed here: a mean of 5 s and a few takes above a minute.
MEDIAN_SHOT, SPREAD, LONGEST_SHOT = 3.2, 0.95, 150.0  # seconds, standard deviation of the logarithm, seconds


@dataclass(frozen=True)
class Costs:
    """What things take, in seconds."""

    steps: int
    frame_step: float
    flow: float  # of a pair of frames
    decode: float  # of a frame
    unit: float  # overhead of a unit beyond its sampling
    start: float  # of a worker, up to its first unit
    write: float  # of a frame into the output
    failure: float = math.inf  # mean time to the death of a worker
    border: float = 0.0  # exchange at the borders of a segment, per pass

    def of_scene(self, frames: int) -> float:
        return frames * (self.steps * self.frame_step + self.decode) + (frames - 1) * self.flow + self.unit

    def of_pass(self, frames: int, index: int) -> float:
        """Of a segment's pass: the first also estimates flows, the last decodes."""
        flows = frames * self.flow + self.unit if index == 0 else 0.0
        decodes = frames * self.decode if index == self.steps - 1 else 0.0
        return frames * self.frame_step + self.border + flows + decodes


class Task(NamedTuple):
    """A scene, or one pass of a segment."""

    scene: int
    segment: int
    index: int  # of the pass; 0 for a whole scene
    seconds: float
    rest: float  # seconds of the chain that begins with it: the longest is started first


def film(seed: int = 0) -> list[int]:
    """Lengths of a film's scenes, in frames."""
    luck, left, found = random.Random(seed), RATE * 3600 * HOURS, []
    while left > 0:
        seconds = min(math.exp(luck.gauss(math.log(MEDIAN_SHOT), SPREAD)), LONGEST_SHOT)
        found.append(min(left, max(1, round(seconds * RATE))))
        left -= found[-1]
    return found


def segments_of(frames: int, longest: int | None) -> list[int]:
    """The lengths of a scene's segments: as equal as can be, none above `longest`."""
    count = 1 if longest is None else math.ceil(frames / longest)
    return [frames // count + (i < frames % count) for i in range(count)]


class Simulation:
    """Workers that take the task with the longest rest, and tasks that wait for those before them.

    Args:
        scenes: lengths in frames.
        longest: frames of a segment; None samples whole scenes.
    """

    def __init__(
        self, costs: Costs, scenes: list[int], workers: int, longest: int | None = None, seed: int = 0
    ) -> None:
        self._costs, self._workers, self._luck = costs, workers, random.Random(seed)
        self._scenes = [segments_of(frames, longest) for frames in scenes]
        self._ready: list[tuple[float, Task]] = []
        self._missing: dict[tuple[int, int, int], int] = {}  # for a pass of a segment, how many it still waits for
        self.ended = [0.0] * len(scenes)
        self.busy, self.deaths = 0.0, 0
        for scene, parts in enumerate(self._scenes):
            for segment in range(len(parts)):
                self._offer(scene, segment, 0)

    def run(self) -> float:
        """The time at which the output is complete."""
        costs, number = self._costs, 0
        events: list[tuple[float, int, int, Task | None, bool]] = []  # time, number, worker, its task, whether it died
        for worker in range(self._workers):
            events.append((costs.start, number := number + 1, worker, None, False))
        idle: list[int] = []
        while events:
            time, _, worker, task, died = heapq.heappop(events)
            if task is not None and died:
                self.deaths += 1
                heapq.heappush(self._ready, (-task.rest, task))  # continued from its last saved state
                heapq.heappush(events, (time + costs.start, number := number + 1, worker, None, False))
            else:
                if task is not None:
                    self._complete(task, time)
                idle.append(worker)
            while idle and self._ready:
                task = heapq.heappop(self._ready)[1]
                seconds, life = task.seconds, self._life()
                if life < seconds:
                    task = task._replace(seconds=seconds - life, rest=task.rest - life)
                self.busy += min(life, seconds)
                event = (time + min(life, seconds), number := number + 1, idle.pop(), task, life < seconds)
                heapq.heappush(events, event)
        return self._written()

    def _life(self) -> float:
        return self._luck.expovariate(1 / self._costs.failure) if math.isfinite(self._costs.failure) else math.inf

    def _offer(self, scene: int, segment: int, index: int) -> None:
        parts, costs = self._scenes[scene], self._costs
        frames = parts[segment]
        if len(parts) == 1:
            seconds = rest = costs.of_scene(frames)
        else:
            seconds = costs.of_pass(frames, index)
            rest = seconds + (costs.steps - 1 - index) * (frames * costs.frame_step + costs.border)
        heapq.heappush(self._ready, (-rest, Task(scene, segment, index, seconds, rest)))

    def _complete(self, task: Task, time: float) -> None:
        parts = self._scenes[task.scene]
        self.ended[task.scene] = max(self.ended[task.scene], time)
        if len(parts) == 1 or task.index == self._costs.steps - 1:
            return
        for segment in range(max(0, task.segment - 1), min(len(parts), task.segment + 2)):
            key = task.scene, segment, task.index + 1
            around = 1 + (segment > 0) + (segment + 1 < len(parts))
            self._missing[key] = self._missing.get(key, around) - 1
            if self._missing[key] == 0:
                del self._missing[key]
                self._offer(*key)

    def _written(self) -> float:
        """The output is written in order, a scene as soon as it and all before it are there."""
        time = 0.0
        for parts, ended in zip(self._scenes, self.ended, strict=True):
            time = max(time, ended) + sum(parts) * self._costs.write
        return time


def measured_costs() -> dict[str, Costs]:
    """The costs of one worker, and where they come from."""
    speed = json.loads((RESULTS / "speed_small_cpu.json").read_text())["sizes"]["80x60"]["ours fp32"]
    cluster = json.loads((RESULTS / "cluster_small_cpu.json").read_text())
    overheads = {
        "unit": cluster["overhead of a unit, seconds"],
        "start": cluster["start of a worker, seconds"],
        "write": cluster["write of a frame, seconds"],
    }
    cpu = Costs(
        4, speed["seconds a frame-step"], speed["seconds a pair's flows"], speed["seconds a final decode"], **overheads
    )
    # Assumed: an H100 at 40% of its 990 TFLOP/s in bf16, for the 21 TFLOP of a frame-step at 320x180 (README); a worker
    # that loads its weights in a minute; an encoder that writes 80 frames of 1280x720 a second.
    gpu = replace(cpu, steps=50, frame_step=0.053, flow=0.05, decode=0.05, start=60.0, write=1 / 80, border=0.2)
    return {"measured": cpu, "assumed": gpu}


def rows(costs: Costs, scenes: list[int], cases: Iterable[tuple[str, Costs, int | None]]) -> dict[str, list[dict]]:
    """For every case, a row for every number of workers."""
    found: dict[str, list[dict]] = {}
    alone = Simulation(replace(costs, failure=math.inf), scenes, 1).run()
    for name, case, longest in cases:
        for workers in WORKERS:
            simulation = Simulation(case, scenes, workers, longest)
            seconds = simulation.run()
            found.setdefault(name, []).append(
                {
                    "workers": workers,
                    "hours": seconds / 3600,
                    "times as fast": alone / seconds,
                    "efficiency": alone / seconds / workers,
                    "last scene, hours": max(simulation.ended) / 3600,
                    "deaths": simulation.deaths,
                }
            )
    return found


def report() -> dict[str, object]:
    """All results."""
    scenes, costs = film(), measured_costs()
    by_kind = {}
    for kind, each in costs.items():
        day = replace(each, failure=24 * 3600.0)
        cases = [("scenes", each, None), ("a worker dies once a day", day, None)]
        if kind == "assumed":
            cases += [(f"segments of {length} frames", each, length) for length in (240, 96)]
            cases.append(("writing takes no time", replace(each, write=0.0), None))
        by_kind[kind] = {
            "costs": {name: None if value == math.inf else value for name, value in asdict(each).items()},
            "longest scene, hours": each.of_scene(max(scenes)) / 3600,
            "cases": rows(each, scenes, cases),
        }
    ordered = sorted(scenes)
    return {
        "command": "python benchmarks/scaling.py",
        "film": {
            "frames": sum(scenes),
            "scenes": len(scenes),
            "median scene, frames": ordered[len(ordered) // 2],
            "longest scene, frames": ordered[-1],
        },
        "results": by_kind,
    }


def table(result: dict) -> str:
    """Hours and efficiency for every case."""
    cases = result["cases"]
    lines = [["workers", *(f"{name}: hours" for name in cases), *(f"{name}: efficiency" for name in cases)]]
    lines.append(["---"] * len(lines[0]))
    for index, workers in enumerate(WORKERS):
        hours = [f"{cases[name][index]['hours']:.3g}" for name in cases]
        lines.append([str(workers), *hours, *(f"{cases[name][index]['efficiency']:.0%}" for name in cases)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def seams_table(report: dict) -> str:
    """The means over all clips of benchmarks/seams.py."""
    lines = [["", *next(iter(report["mean"].values()))]]
    lines.append(["---"] * len(lines[0]))
    lines += [[name, *(f"{value:.3f}" for value in row.values())] for name, row in report["mean"].items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_tables(text: str, found: dict) -> str:
    """`text` with the tables between their markers made anew."""
    tables = {kind: table(result) for kind, result in found["results"].items()}
    tables["seams"] = seams_table(json.loads((RESULTS / "seams_small.json").read_text()))

    def made(match: re.Match) -> str:
        return f"{match['begin']}\n{tables[match['name']]}\n{match['end']}"

    return re.sub(r"(?P<begin><!-- table: (?P<name>\w+) -->)\n.*?(?P<end><!-- end -->)", made, text, flags=re.S)


def main() -> None:
    found = report()
    (RESULTS / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")
    DOCS.write_text(with_tables(DOCS.read_text(), found))
    for kind, result in found["results"].items():
        print(kind, result["costs"], table(result), sep="\n")


if __name__ == "__main__":
    main()
