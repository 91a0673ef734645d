#!/usr/bin/env python3
"""A file job that is killed (SIGKILL) in the middle and continued, as a user would: the same bits as one left alone.

Runs the command on the demo clip with the bundled model, a process each time, once per set of options, and compares
every picture of the two results. Ends with 1 if a job fails, or continues to another result.
"""

import argparse
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from stablevsr.engine.state import RunState
from stablevsr.engine.workspace import workspace_path

DEMO = Path(__file__).parents[1] / "stablevsr/assets/demo.mp4"


def start(output: Path, options: list[str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "stablevsr", "upscale", DEMO, output, *options])


def state_of(output: Path) -> RunState:
    """How far a job is; the start if nothing is written yet."""
    try:
        data = (workspace_path(output) / "state.safetensors").read_bytes()
        return RunState.from_bytes(data, torch.device("cpu"))
    except (FileNotFoundError, ValueError):
        return RunState()


def kill_in_the_middle(job: subprocess.Popen, output: Path) -> RunState | None:
    """Kill a job once it has recorded frame-steps; returns where it was, None if it ended before."""
    while job.poll() is None:
        state = state_of(output)
        if state.phase == "denoise" and state.done > 0:
            job.kill()
            job.wait()
            return state_of(output)
        time.sleep(0.02)
    return None


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def compare(folder: Path, options: list[str]) -> dict[str, object]:
    """One job left alone and one that is killed, with these options."""
    began = time.monotonic()
    if start(folder / "whole", options).wait():
        return {"failed": "the job left alone"}
    middle = time.monotonic()
    state = kill_in_the_middle(start(folder / "killed", options), folder / "killed")
    if state is None:
        return {"failed": "the job to be killed ended before it was"}
    resumed = time.monotonic()
    if start(folder / "killed", options).wait():
        return {"failed": "the job that was to continue"}
    ours, theirs = digests(folder / "killed"), digests(folder / "whole")
    different = [name for name in theirs if ours.get(name) != theirs[name]]
    return {
        "frames": len(theirs),
        "killed after": f"{state.done} frame-steps",
        "seconds, left alone": middle - began,
        "seconds, continued": time.monotonic() - resumed,
        "same bits": not different and len(ours) == len(theirs),
        "pictures that differ": len(different),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--options", nargs="+", default=[""], help="of the command, a string for each pair of jobs")
    parser.add_argument("--device", help="default: the best available")
    parser.add_argument("-o", "--output", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    device, report = ["--device", options.device] if options.device else [], {}
    for words in options.options:
        folder = Path(tempfile.mkdtemp())
        try:
            report[words or "no options"] = row = compare(folder, [*shlex.split(words), *device])
        finally:
            shutil.rmtree(folder)
        print(words or "no options", row, flush=True)
        if options.output:
            options.output.write_text(json.dumps(report, indent=1) + "\n")
    return int(not all(row.get("same bits") for row in report.values()))


if __name__ == "__main__":
    sys.exit(main())
