"""A Ray cluster of this machine, in a process of its own.

Ray forks to start its processes, and runs Python in the fork. In a program whose other threads hold locks, such as
those of FFmpeg's decoders, such a fork may hang. So this file is also a program, which knows nothing but Ray: it starts
Ray, says where, and stops it when its input ends, which happens however the process that started it ends.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PATIENCE = 30.0  # seconds for Ray to end its processes


@contextmanager
def local_ray(cores: int | None) -> Iterator[str]:
    """Start Ray, and stop it at the end.

    Args:
        cores: that Ray may give out; None: as many as there are.

    Yields:
        Its address.

    Raises:
        OSError: when it cannot be started.
    """
    command = [sys.executable, "-P", str(Path(__file__)), json.dumps(cores)]
    # What this process has not set before it imported Ray does not hold for it, and both must agree.
    environment = {"RAY_AUTH_MODE": "disabled", **os.environ}
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    # In a session of its own, so that Ctrl-C reaches only this process, which then stops the other.
    process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=null, start_new_session=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        answer = json.loads(process.stdout.readline() or b"{}")
        if "address" not in answer:
            raise OSError(answer.get("error", "its process ended"))
        yield answer["address"]
    finally:
        with suppress(OSError):
            process.stdin.write(b"\n")  # an inherited copy of the pipe would keep it open
            process.stdin.close()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
        process.stdout.close()


def _serve(cores: int | None) -> None:
    """Run Ray until there is a line of input, or the input ends."""
    try:
        import ray

        ray.init("local", num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level=logging.CRITICAL)
        answer = {"address": ray.get_runtime_context().gcs_address}
    except Exception as error:  # of many kinds
        answer = {"error": " ".join(str(error).split()) or type(error).__name__}
    print(json.dumps(answer), flush=True)
    if "address" in answer:
        sys.stdin.readline()
        ray.shutdown()


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
