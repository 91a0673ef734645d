"""Connecting to a Ray cluster, or starting one on this machine."""

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from stablevsr.cluster.description import ModelDescription
from stablevsr.cluster.local_ray import local_ray
from stablevsr.errors import OptionsError, ResourceError

log = logging.getLogger(__name__)

TIMEOUT = 10.0  # seconds to wait for an answer from an address


@dataclass(frozen=True)
class Cluster:
    """Which machines to use.

    Raises:
        OptionsError: for numbers below 1.
    """

    address: str = "local"  # of a Ray cluster; "auto": the one that this machine belongs to; "local": a new one here
    workers: int | None = None  # None: as many as there is room for
    cpus_per_worker: int | None = None  # None: 1; on the CPU also its threads

    def __post_init__(self) -> None:
        for name in ("workers", "cpus_per_worker"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionsError(f"got {name} {value}, expected 1 or more")


@dataclass(frozen=True)
class Connection:
    """A cluster in use."""

    ray: ModuleType
    description: ModelDescription  # with the device that the workers use
    workers: int
    cpus: int  # of each worker

    @property
    def needs(self) -> dict[str, float]:
        """What Ray reserves for a worker."""
        if self.description.device == "cuda":
            return {"num_gpus": 1, "num_cpus": 0}
        return {"num_gpus": 0, "num_cpus": self.cpus}

    def has_room(self) -> bool:
        """Whether there is a free slot for a worker."""
        free = self.ray.available_resources()
        names = {"num_gpus": "GPU", "num_cpus": "CPU"}
        return all(free.get(names[name], 0) >= needed for name, needed in self.needs.items())


@contextmanager
def connected(cluster: Cluster, description: ModelDescription) -> Iterator[Connection]:
    """Connect, and disconnect at the end; a cluster started here ends with it.

    Raises:
        ResourceError: without Ray, without a cluster at the address, with one of another version, or without GPUs; when
            Ray cannot be started here.
        OptionsError: for a device that workers cannot have.
    """
    if description.device not in (None, "cpu", "cuda"):
        raise OptionsError(
            f"got device {description.device}, expected cpu or cuda: each worker of a cluster gets a GPU of its own"
        )
    address = cluster.address
    if address == "local" and "RAY_ADDRESS" in os.environ:  # as in a job that was submitted to a cluster
        address = "auto"
    require_address(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing here sends anything anywhere
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it warns of a change to come
    if address == "local" and "ray" not in sys.modules:  # it is read when Ray is imported, and never again
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import ray
    except ImportError:
        raise ResourceError("--cluster needs the package ray: pip install 'stablevsr[cluster]'") from None
    _require_somebody(address)
    before = signal.getsignal(signal.SIGTERM)
    with ExitStack() as stack:
        if address == "local":
            address = _start(stack, cluster, description)
        _join(ray, address)
        stack.callback(ray.shutdown)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray exits at once, where others want to clean up
        yield _connection(ray, cluster, description)


def _start(stack: ExitStack, cluster: Cluster, description: ModelDescription) -> str:
    """Start a cluster here, until `stack` is closed; returns its address."""
    cores: int | None = None
    if cluster.workers and description.device != "cuda":
        cores = max(os.cpu_count() or 1, cluster.workers * (cluster.cpus_per_worker or 1))
    try:
        return stack.enter_context(local_ray(cores))
    except OSError as error:
        logs = Path(tempfile.gettempdir(), "ray")
        raise ResourceError(f"Ray cannot be started on this machine ({error}): its logs are in {logs}") from error


def _join(ray: ModuleType, address: str) -> None:
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL)
    except Exception as error:  # of many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ResourceError(f"the Ray cluster at {address} cannot be used ({reason})") from error


def require_address(address: str) -> None:
    """`OptionsError` unless this has the form of an address of a Ray cluster."""
    host, _, port = address.rpartition(":")
    if address in ("local", "auto") or (host and port.isdecimal() and "/" not in address):
        return
    hint = ": put --cluster after the paths" if Path(address).exists() else ", as in 10.0.0.1:6379"
    raise OptionsError(f"got {address} as the address of a Ray cluster, expected HOST:PORT, auto or nothing{hint}")


def _require_somebody(address: str) -> None:
    """Find out in seconds what Ray needs minutes for."""
    if address in ("local", "auto"):
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), TIMEOUT).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ResourceError(
            f"there is no Ray cluster at {address} ({reason}): start one there with ray start --head"
        ) from None


def _connection(ray: ModuleType, cluster: Cluster, description: ModelDescription) -> Connection:
    there = ray.cluster_resources()
    gpus, cpus = int(there.get("GPU", 0)), int(there.get("CPU", 0))
    device = description.device or ("cuda" if gpus else "cpu")
    threads = cluster.cpus_per_worker or 1
    if device == "cuda" and not gpus and not cluster.workers:  # with --workers, machines may be added on demand
        raise ResourceError("got device cuda, but the cluster has no GPU: use device cpu, or add machines with GPUs")
    workers = cluster.workers or (gpus if device == "cuda" else max(1, cpus // threads))
    return Connection(ray, replace(description, device=device), workers, threads)
