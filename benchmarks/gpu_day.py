#!/usr/bin/env python3
"""Everything that is to be known of a GPU, in one command of nine minutes: tests, a killed job, speed and memory.

Each part is a process of its own with a time limit: one that fails or hangs does not stop the others. The most
important ones come first, for the time may end before the last. Writes DIR/gpu_day.json, anew after every part, and
DIR/gpu_day.log, with all that the parts print.

Needs the package's own requirements and pytest, no network and no installation. Where diffusers is missing, the parts
that measure against its modules are skipped, and the report says so. `--small` runs all of it on the CPU at small
sizes, to find mistakes before a GPU's time is spent.
"""

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
REQUIRED = ("torch", "torchvision", "av", "einops", "safetensors", "numpy", "imageio", "PIL", "tqdm")
GRACE = 10.0  # seconds from the interrupt, after which a part may still write what it has, to the kill
ENDED = 10.0  # seconds: with less left, no part begins


@dataclass(frozen=True)
class Part:
    """One process.

    name: also of the files it writes.
    limit: seconds.
    command: what Python runs. "{result}" stands for the file, NAME.json or NAME.xml, that the report takes in.
    needs: packages without which it is skipped.
    """

    name: str
    limit: float
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()


def gpu_tests() -> list[str]:
    """The files that hold tests for a GPU: the others need not be importable there."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [f"tests/{path.name}" for path in files if "pytest.mark.gpu" in path.read_text()]


def tests(*options: str) -> tuple[str, ...]:
    # A test that hangs shows where it is after a minute.
    report = ("--junitxml", "{result}", "-o", "faulthandler_timeout=60", "-p", "no:cacheprovider")
    return ("-m", "pytest", "-v", "--durations=10", *report, *options, *gpu_tests())


def command(line: str) -> tuple[str, ...]:
    return (*shlex.split(line), "-o", "{result}")


# The limits are about twice what is expected, so their sum is more than the time there is.
PARTS = [
    Part("machine", 60, command("benchmarks/machine.py")),
    Part("tests", 150, tests("-m", "gpu", "-k", "not compiled")),
    Part("killed_job", 90, command("benchmarks/killed_job.py --options '' '--dtype bf16'")),
    Part("variants", 200, command("benchmarks/variants.py")),
    Part("memory", 90, command("benchmarks/memory.py --measure --frames 8 64 --sizes 320x180")),
    Part(
        "speed",
        180,
        command(
            "benchmarks/speed.py --sizes 320x180 --turns 3 --rows 'baseline bf16' 'baseline fp32' 'ours bf16'"
            " 'ours compiled bf16' 'fast compiled bf16'"
        ),
        needs=("diffusers",),
    ),
    Part("compiled_tests", 120, tests("-m", "gpu", "-k", "compiled")),
    Part("streaming", 120, command("benchmarks/streaming.py --turns 3"), needs=("diffusers",)),
    Part("training_step", 90, command("benchmarks/training_step.py")),
    Part("attention", 60, command("benchmarks/attention.py --sizes 320x180 --turns 5")),
    Part("memory_480x270", 60, command("benchmarks/memory.py --measure --frames 8 --sizes 480x270")),
    Part("memory_offloaded", 60, command("benchmarks/memory.py --measure --offload --frames 8 --sizes 320x180")),
]
SMALL = [
    Part("machine", 120, command("benchmarks/machine.py --side 512")),
    Part("tests", 300, tests("-m", "not gpu")),
    Part("killed_job", 300, command("benchmarks/killed_job.py --device cpu --options '--steps 2 --frames 0:3'")),
    Part(
        "variants",
        600,
        command(
            "benchmarks/variants.py --device cpu --model small --size 16x16 --turns 1"
            " --rows eager 'eager, upsampling not folded' 'eager, contiguous' compiled"
        ),
    ),
    Part(
        "memory", 120, command("benchmarks/memory.py --measure --device cpu --model small --frames 2 4 --sizes 16x16")
    ),
    Part(
        "speed",
        200,
        command(
            "benchmarks/speed.py --device cpu --sizes 16x16 --frames 2 --turns 1 --rows 'baseline fp32' 'ours fp32'"
        ),
        needs=("diffusers",),
    ),
    Part(
        "streaming",
        200,
        command("benchmarks/streaming.py --device cpu --size 16x16 --frames 3 --turns 1 --rows 'ours fp32'"),
        needs=("diffusers",),
    ),
    Part("training_step", 120, command("benchmarks/training_step.py --device cpu --preset small --crop 64 --batch 1")),
    Part("attention", 120, command("benchmarks/attention.py --device cpu --sizes 16x16 --turns 1 --ways math")),
]


def missing(packages: Iterable[str]) -> list[str]:
    return [name for name in packages if find_spec(name) is None]


def run(part: Part, folder: Path, seconds: float, log: Path) -> dict[str, object]:
    """Run a part for at most so many seconds; returns its row of the report."""
    absent = missing(part.needs)
    if absent:
        return {"skipped": f"{', '.join(absent)} is not installed"}
    if seconds < min(ENDED, part.limit):
        return {"skipped": "the time was up"}
    limit = min(part.limit, seconds)
    result = folder / f"{part.name}.{'xml' if 'pytest' in part.command else 'json'}"
    arguments = [sys.executable, *(word.replace("{result}", str(result)) for word in part.command)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
    started = time.monotonic()
    with log.open("ab") as stream:
        stream.write(f"\n=== {part.name}: {shlex.join(part.command)}\n".encode())
        stream.flush()
        process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group, to be ended with all that it started
        )
        timed_out = end_after(process, limit)
    row = {
        "command": f"python {shlex.join(part.command)}",
        "rc": process.returncode,
        "seconds": round(time.monotonic() - started, 1),
        "limit": round(limit, 1),
        "result": found_in(result),
    }
    return row | ({"timed out": True} if timed_out else {})


def end_after(process: subprocess.Popen, seconds: float) -> bool:
    """Wait for a process and end it, with its children, once the time is up; returns whether it was."""
    timed_out = False
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        timed_out = True
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what it started, too: it may hold the GPU
    process.wait()
    return timed_out


def found_in(path: Path) -> object:
    """What a part wrote, as far as it came; None if nothing."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text()) if path.suffix == ".json" else tests_of(path)
    except (ValueError, ElementTree.ParseError) as error:
        return {"damaged": str(error)}


def tests_of(path: Path) -> dict[str, object]:
    """Seconds of every test by outcome, and the messages of those that failed, from pytest's report."""
    outcomes: dict[str, dict[str, object]] = {"passed": {}, "failed": {}, "skipped": {}}
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname', '').split('.')[-1]}::{case.get('name')}"
        failure = next((found for kind in ("failure", "error") if (found := case.find(kind)) is not None), None)
        if failure is not None:
            outcomes["failed"][name] = failure.get("message", "")[:1000]
        else:
            outcomes["skipped" if case.find("skipped") is not None else "passed"][name] = float(case.get("time", 0))
    return {"counts": {outcome: len(names) for outcome, names in outcomes.items()}, **outcomes}


def rows(parts: list[Part], budget: float, log: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Run the parts, in all for at most `budget` seconds; yields names and rows."""
    end = time.monotonic() + budget
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            yield part.name, run(part, Path(folder), end - time.monotonic() - GRACE, log)


def outcome(row: dict[str, object]) -> str:
    if "skipped" in row:
        return f"skipped: {row['skipped']}"
    if row.get("timed out"):
        return f"stopped at its limit of {row['limit']:.0f} s"
    return "ok" if row["rc"] == 0 else f"failed ({row['rc']})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu_day"), metavar="DIR", help="default: gpu_day")
    parser.add_argument("--small", action="store_true", help="everything on the CPU, at small sizes")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="only these: " + ", ".join(p.name for p in PARTS))
    parser.add_argument("--budget", type=float, help="seconds in all; default: 530, with --small an hour")
    options = parser.parse_args()
    chosen = [part for part in (SMALL if options.small else PARTS) if part.name in (options.parts or [part.name])]
    unknown = {*(options.parts or ())} - {part.name for part in chosen}
    if unknown:
        parser.error(f"got the part {sorted(unknown)[0]}, expected some of {', '.join(part.name for part in PARTS)}")
    if absent := missing(REQUIRED):
        parser.error(f"{', '.join(absent)} is not installed, and every part needs it: install it first")
    folder = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    log, report = folder / "gpu_day.log", folder / "gpu_day.json"
    log.write_bytes(b"")
    found: dict[str, object] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.platform(),
        "python": platform.python_version(),
        "command": f"python benchmarks/gpu_day.py {shlex.join(sys.argv[1:])}".strip(),
        "parts": {},
    }
    failed = False
    for name, row in rows(chosen, options.budget or (3600 if options.small else 530), log):
        found["parts"][name] = row
        unfinished = report.with_suffix(".part")
        unfinished.write_text(json.dumps(found, indent=1) + "\n")
        unfinished.replace(report)
        failed |= "skipped" not in row and (row["rc"] != 0 or "timed out" in row)
        print(f"{name:18} {row.get('seconds', 0):7.1f} s  {outcome(row)}", flush=True)
    print(f"wrote {report} and {log}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
