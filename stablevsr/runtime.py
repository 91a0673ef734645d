"""Everything that depends on the device: selection, capabilities, numerics, transfers, placement, offloading."""

import inspect
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from stablevsr.errors import OptionsError, ResourceError

log = logging.getLogger(__name__)
T = TypeVar("T")
MAX_GRAPHS = 64  # of a compiled network, one for each size of frame; further sizes run uncompiled


class PlacedModel(Protocol):
    """Structural type of a model on a device; declared here because `runtime` imports no network."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def encode_prompt(self, prompt: str | None) -> Tensor: ...


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device of that name, None for the best one available.

    Raises:
        OptionsError: for a name that no device has.
        ResourceError: for a device that this machine does not have.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    names = [name for name, there in available.items() if there]
    if device is None:
        return torch.device(names[-1])
    try:
        target = torch.device(device)
    except RuntimeError:
        raise OptionsError(f"device {str(device)!r} is unknown, this machine has {', '.join(names)}") from None
    if not available.get(target.type, False):
        raise ResourceError(f"device {str(device)!r} is not available, this machine has {', '.join(names)}")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ResourceError(
            f"device {str(device)!r} is not available, this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return target


def check_dtype(device: torch.device, dtype: torch.dtype) -> None:
    """Warns where half precision is slower than float32: on a processor with AVX2 and no more, which emulates it.

    Raises:
        ResourceError: for bfloat16 on a GPU that only emulates it, or lacks it.
    """
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        raise ResourceError(f"{name} does not support bfloat16, which needs an Ampere or newer GPU: use fp16 or fp32")
    if device.type == "cpu" and dtype.itemsize < 4 and torch.backends.cpu.get_cpu_capability() == "AVX2":
        log.warning("this processor has no half-precision arithmetic, so fp32 is many times faster here")


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory has run out; only CUDA has a class for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # MPS uses the first and the last, the CPU allocator the others, depending on the system.
    words = ("out of memory", "can't allocate memory", "not enough memory", "invalid buffer size")
    return isinstance(error, RuntimeError) and any(each in str(error).lower() for each in words)


@contextmanager
def numerics() -> Iterator[None]:
    """The numerics of a run: cuDNN's deterministic algorithms, without benchmarking, and no TF32 in convolutions.

    Upsampling is a transposed convolution, for which cuDNN also has algorithms with no fixed order of summation. By
    default PyTorch allows TF32, with its ten-bit mantissa, in float32 convolutions: here float32 means float32. Matrix
    products follow `torch.set_float32_matmul_precision`, whose default is float32 too.
    """
    with _set(_cudnn_settings()):
        if "torch._dynamo" not in sys.modules:
            yield
            return
        # Each frame size has a graph of its own, and the default limit is eight.
        with torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS):
            yield


def _cudnn_settings() -> list[tuple[object, str, object]]:
    """Owner, name and value of each cuDNN setting of `numerics`, in the order of assignment."""
    cudnn = torch.backends.cudnn
    # PyTorch 2.9 has a second interface to TF32. It overrides the first, which fails once a program has used it.
    newer = [kind for kind in (getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None)) if kind is not None]
    return [
        (cudnn, "deterministic", True),
        (cudnn, "benchmark", False),
        (cudnn, "allow_tf32", False),
        *((kind, "fp32_precision", "ieee") for kind in newer if hasattr(kind, "fp32_precision")),
    ]


@contextmanager
def _set(settings: list[tuple[object, str, object]]) -> Iterator[None]:
    before = []
    for owner, name, _ in settings:
        with suppress(RuntimeError):  # reading the older interface fails once a program has used the newer
            before.append((owner, name, getattr(owner, name)))
    for owner, name, value in settings:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def under_numerics(steps: Iterator[T]) -> Iterator[T]:
    """Run each step of a generator under `numerics`; between steps, the caller's settings apply."""
    while True:
        with numerics():
            try:
                step = next(steps)
            except StopIteration:
                return
        yield step


def describe(model: PlacedModel) -> dict[str, str]:
    """What the bits of a run depend on, apart from weights and options: a run resumes only where all of it matches."""
    device = model.device
    found = {
        "device": device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "compilation": ", ".join(compiled_parts(model)) or "none",
        "float32 matmul precision": _matmul_precision(device),
        "version of torch": str(torch.__version__),
        "version of numpy": np.__version__,  # which does not guarantee the same random numbers across versions
    }
    if device.type == "cuda":
        found["GPU"] = torch.cuda.get_device_name(device)
        found["version of cuDNN"] = str(torch.backends.cudnn.version())
    return found


def _matmul_precision(device: torch.device) -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # as in `_set`
        backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
        return backend.matmul.fp32_precision


def compiled_parts(model: PlacedModel) -> list[str]:
    """The names of the compiled modules of a model."""
    return [name for name, part in model.named_modules() if part._compiled_call_impl is not None]


def require_compiler(device: torch.device) -> None:
    """Raises `ResourceError` where `torch.compile` finds no compiler."""
    language, variable, usual = "C++", "CXX", ("c++", "g++", "clang++")
    if device.type != "cpu":  # Triton builds its launchers in C
        language, variable, usual = "C", "CC", ("cc", "gcc", "clang")
    if not any(shutil.which(name) for name in (os.environ.get(variable), *usual) if name):
        raise ResourceError(
            f"compile=True needs a {language} compiler on the {device.type.upper()}, found none of {', '.join(usual)}: "
            "install one"
        )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """An asynchronous copy to the device: the host does not wait for the work queued there."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # a copy from pageable memory would block the host


class SideStream:
    """Work that overlaps with that of the main stream: on CUDA in a stream of its own; elsewhere it is done at once.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def has_room(self) -> bool:
        """Whether as much memory is free as the program has used at most: overlapping takes no more than that."""
        if self._stream is None:
            return True
        device = self._stream.device
        return torch.cuda.max_memory_allocated(device) <= torch.cuda.mem_get_info(device)[0]

    def start(self, work: Callable[[], T], after_main: bool) -> Callable[[], T]:
        """Queue `work`.

        Args:
            work: its result may hold tensors in tuples and lists.
            after_main: wait for what the main stream has queued so far. Without, `work` may only use tensors that
                the main stream had finished when the host last waited for it, and those made in this stream.

        Returns:
            A function to be called in the main stream: the result of `work`, or its exception.
        """
        stream, done = self._stream, Future[T]()
        if stream is not None and after_main:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):  # does nothing without one
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)
        event = None if stream is None else stream.record_event()

        def result() -> T:
            found = done.result()
            if stream is not None and event is not None:
                main = torch.cuda.current_stream(stream.device)
                main.wait_event(event)
                for tensor in _tensors_in(found):
                    tensor.record_stream(main)  # else its memory could be used again while the main stream reads it
            return found

        return result


def _tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors_in(each)


def place(network: nn.Module, device: torch.device, dtype: torch.dtype, channels_last: bool) -> None:
    """Move a network to a device and dtype.

    Copied weights become channels_last, if that helps the network; matching ones stay memory-mapped.
    """
    copied = any(tensor.device != device or tensor.dtype != dtype for tensor in network.parameters())
    network.to(device, dtype)
    if copied and channels_last:
        network.to(memory_format=torch.channels_last)


class Offloaded:
    """A model on the CPU whose networks are copied to the GPU when they are called.

    At most one network is on the GPU. The pinned CPU weights are kept, so evicting a network just drops its GPU copy.

    Args:
        model: its other attributes and methods are passed through.
        names: of the networks that take turns on the GPU.
    """

    # Found in the model by `__getattr__`. Declared to give an offloaded model the structural type of a model.
    config: Any
    sampling: Any
    provenance: dict[str, str]
    unet: Any
    tcm: Any
    vae: Any
    flow: Any
    tiny: Any
    dtype: torch.dtype
    named_modules: Callable[[], Iterator[tuple[str, nn.Module]]]

    def __init__(self, model: PlacedModel, device: torch.device, names: Iterable[str]) -> None:
        self._model, self.device = model, device
        self._resident: nn.Module | None = None
        self._originals: list[tuple[Tensor, Tensor]] = []
        for name in names:
            network = getattr(model, name)
            if device.type == "cuda":
                for tensor in chain(network.parameters(), network.buffers()):
                    tensor.data = tensor.data.pin_memory()  # several times faster to copy
            setattr(self, name, OffloadedNetwork(network, self))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode_prompt(self, prompt: str | None) -> Tensor:
        """`StableVSR.encode_prompt` on the CPU; the result is on the GPU."""
        return self._model.encode_prompt(prompt).to(self.device)

    def load(self, network: nn.Module) -> None:
        """Copy this network to the GPU, in place of the one that is there."""
        if network is self._resident:
            return
        for tensor, original in self._originals:
            tensor.data = original
        self._resident = network
        self._originals = [(tensor, tensor.data) for tensor in chain(network.parameters(), network.buffers())]
        for tensor, original in self._originals:
            tensor.data = original.to(self.device, non_blocking=True, copy=True)


class OffloadedNetwork:
    """A network that is loaded to the GPU when it, or one of its methods, is called."""

    def __init__(self, network: nn.Module, owner: Offloaded) -> None:
        self._network, self._owner = network, owner

    def __call__(self, *arguments: object) -> Any:
        self._owner.load(self._network)
        return self._network(*arguments)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._network, name)
        if not inspect.ismethod(value):
            return value

        def method(*arguments: object) -> Any:
            # `parameters` too: callers read the network's device from them.
            self._owner.load(self._network)
            return value(*arguments)

        return method
