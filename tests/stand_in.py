"""A device that is not here: tensors that say they are elsewhere and refuse to meet others, computed on the CPU.

Unlike PyTorch's fake tensors these hold numbers, so that whole runs, with everything that reads results back, can be
tried. What goes wrong on a GPU goes wrong here: tensors of two devices in one operation, `numpy` of a tensor on the
device, a CPU generator for random numbers there, and on request float64, which MPS lacks. The device is called meta: of
those that PyTorch knows, the only one that has no numbers of its own and needs no driver.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from stablevsr.engine import store

aten = torch.ops.aten
DEVICE = torch.device("meta")
ACROSS = (aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default)


class There(Tensor):
    """A tensor on the device. `here` holds its numbers."""

    here: Tensor
    dtypes_missing: tuple[torch.dtype, ...] = ()

    @staticmethod
    def __new__(cls, here: Tensor) -> "There":
        options = {"strides": here.stride(), "dtype": here.dtype, "device": DEVICE}
        self = Tensor._make_wrapper_subclass(cls, here.shape, **options)
        self.here = here
        return self

    def __repr__(self) -> str:
        return f"There({self.here})"

    def __reduce_ex__(self, protocol: int) -> object:
        return self.here.__reduce_ex__(protocol)  # what is saved is read back on the CPU

    @classmethod
    def __torch_dispatch__(
        cls, operation: Callable, types: object, arguments: tuple = (), options: dict | None = None
    ) -> object:
        return compute(operation, arguments, options or {})


def compute(operation: Callable, arguments: tuple, options: dict) -> object:
    """An operation on tensors here and there; the result is where it would be on a machine with that device."""
    given = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in given if isinstance(tensor, There)]
    place = torch.device(options["device"]).type if options.get("device") is not None else None
    goes_there = place == DEVICE.type if place else bool(there)
    if there and operation not in ACROSS and any(type(each) is not There and each.dim() for each in given):
        raise RuntimeError(f"Expected all tensors to be on the same device, {operation} got some on the CPU")
    if place == DEVICE.type and options.get("generator") is not None:
        raise RuntimeError(f"Expected a '{place}' device type for generator but found 'cpu'")
    if operation is aten._fused_sdp_choice.default:
        return 0  # the kernel in plain operations: the others are of one device
    wrappers = {id(tensor.here): tensor for tensor in there}
    plain = tree_map(lambda leaf: leaf.here if isinstance(leaf, There) else leaf, (arguments, options))
    changed = {"device": torch.device("cpu")} if place else {}
    result = operation(*plain[0], **{**plain[1], **changed})

    def wrap(leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in wrappers:  # changed in place
            return wrappers[id(leaf)]
        if not goes_there or any(leaf is tensor for tensor in given):
            return leaf
        if leaf.dtype in There.dtypes_missing:
            raise TypeError(f"the device doesn't support {leaf.dtype}, which {operation} gave")
        return There(leaf)

    return tree_map(wrap, result)


class _Device(TorchDispatchMode):
    """Makes tensors on the device too; operations on them work without it."""

    def __torch_dispatch__(
        self, operation: Callable, types: object, arguments: tuple = (), options: dict | None = None
    ) -> object:
        return compute(operation, arguments, options or {})


class _Here:
    """An executor without a thread, for a mode is that of one thread."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def submit(self, task: Callable, *arguments: object) -> Future:
        future: Future = Future()
        try:
            future.set_result(task(*arguments))
        except BaseException as error:
            future.set_exception(error)
        return future

    def shutdown(self, wait: bool) -> None:
        pass


@contextmanager
def stand_in(monkeypatch: pytest.MonkeyPatch, without_float64: bool) -> Iterator[torch.device]:
    """The device, there within the block."""
    autocast, tensor = torch.autocast, torch.tensor

    def autocast_elsewhere(kind: str, *arguments: object, **options: object) -> AbstractContextManager:
        return nullcontext() if kind == DEVICE.type else autocast(kind, *arguments, **options)

    def tensor_elsewhere(data: object, *, device: torch.device | str | None = None, **options: object) -> Tensor:
        return tensor(data, **options).to(device)

    with monkeypatch.context() as patches, _Device():
        patches.setattr(torch, "tensor", tensor_elsewhere)  # which makes it without asking the mode
        patches.setattr(torch, "autocast", autocast_elsewhere)  # which knows the names of devices
        patches.setattr(store, "ThreadPoolExecutor", _Here)
        patches.setattr(There, "dtypes_missing", (torch.float64,) if without_float64 else ())
        # The parameters of a module that is moved become others, as their class does.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            yield DEVICE
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
