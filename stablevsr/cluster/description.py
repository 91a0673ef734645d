"""A model as a description, from which every worker builds its own."""

import hashlib
import os
import socket
from dataclasses import dataclass

import numpy as np
import torch

from stablevsr import __version__
from stablevsr.errors import ResourceError, WeightsError
from stablevsr.model import Model, build_model, find_weights


@dataclass(frozen=True)
class ModelDescription:
    """The arguments of `build_model`.

    On a cluster `weights` is a path that all machines have, and `device` is "cpu" or "cuda": each worker is given a GPU
    of its own. None takes GPUs if the cluster has any.
    """

    weights: str | os.PathLike[str] | None = None
    device: str | None = None
    dtype: str | None = None
    compile: bool = False
    offload: bool = False

    def build(self) -> Model:
        """Build the model here; raises as `build_model` does."""
        return build_model(self.weights, self.device, self.dtype, self.compile, self.offload)

    def facts(self) -> dict[str, str]:
        """What all machines of a run must have in common: versions, weights, precision.

        Raises:
            WeightsError: when the weights file cannot be read.
        """
        path = find_weights(self.weights)
        try:
            with path.open("rb") as file:
                weights = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        except OSError as error:
            raise WeightsError(f"weights {path} cannot be read ({error.strerror}): every machine needs them") from error
        return {
            "version of stablevsr": __version__,
            "version of torch": torch.__version__.partition("+")[0],  # the build, +cpu or +cu130, may differ
            "version of numpy": np.__version__,  # which does not guarantee the same random numbers across versions
            "weights": weights,
            "device": torch.device(self.device or "cpu").type,
            "dtype": self.dtype or "fp32",
            "compilation": "yes" if self.compile else "none",
        }


def require_same(driver: dict[str, str], worker: dict[str, str], machine: str) -> None:
    """`ResourceError`, naming the machine, for the first difference between the facts of driver and worker."""
    for name, ours in driver.items():
        if worker.get(name) != ours:
            raise ResourceError(
                f"{machine} has another {name} ({worker.get(name)}, here {ours}): install the same there"
            )


def machine_name() -> str:
    """This machine's name for messages and records."""
    return socket.gethostname()


def gpu_name(model: Model) -> str | None:
    """The GPU that a model is on; None on the CPU."""
    return torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else None
