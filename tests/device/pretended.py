"""A pretended accelerator: the CPU's numbers under another device's name, with CUDA's rules kept and its costs counted.

    with PretendedAccelerator() as accelerator:
        merged = merge(accelerator.place(base, "gpu:0"), accelerator.place(expert, "gpu:0"))
    accelerator.waits, accelerator.peak

A tensor on it is a `DeviceTensor`: `tensor.device` is `gpu:N`, and every operation on it is run on the CPU tensor that
it holds. What CUDA refuses raises: operands on two devices, a generator of another device. What makes the host wait for
CUDA is counted by the place in our code that asked for it, and so are the bytes that are alive at once.

It does not show the speed of a device, about memory that a kernel allocates for itself, or about its rounding.
`torch.tensor` cannot make a tensor on it, because its constructor calls no dispatch mode; it raises there.
"""

from __future__ import annotations

import collections
import sys
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import mergekit_ace

NAME = "gpu"
DEVICES = 2
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
"""torch can be given a device in Python (2.9 and later)."""

_PACKAGE = str(Path(mergekit_ace.__file__).parent)
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
# Their result is needed by the host, or (decompositions) a status that it checks.
_READ_BY_THE_HOST = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._linalg_check_errors.default,
    torch.ops.aten._linalg_eigh.default,
    torch.ops.aten._linalg_svd.default,
}
_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.addmm_.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
}


class _Module(backend_registration._DummyBackendModule if AVAILABLE else object):  # type: ignore[misc]
    """`torch.gpu`: what torch and mergekit ask of `torch.cuda`. No device is available unless one is pretended."""

    def is_available(self) -> bool:
        return PretendedAccelerator.current is not None

    def device_count(self) -> int:
        return DEVICES if self.is_available() else 0

    def synchronize(self, device: torch.device | None = None) -> None:
        pass

    def empty_cache(self) -> None:
        if PretendedAccelerator.current is not None:
            PretendedAccelerator.current.emptied += 1

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16]


def _register() -> None:
    """Tell torch of the device, once a process; it cannot be taken back, but is then one that is not available."""
    if not hasattr(torch, NAME):

        class Hook(backend_registration._DummyPrivateUse1Hook):
            def is_available(self) -> bool:
                return PretendedAccelerator.current is not None

        backend_registration._setup_privateuseone_for_python_backend(NAME, _Module(), Hook())


class DeviceTensor(Tensor):
    """A tensor whose numbers are in `held`, on the CPU, and that says it is elsewhere."""

    held: Tensor
    accelerator: PretendedAccelerator

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device, accelerator: PretendedAccelerator) -> DeviceTensor:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        self = torch.Tensor._make_wrapper_subclass(cls, held.size(), device=device, **layout)
        self.held = held
        self.accelerator = accelerator
        return self

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Outside of a mode of this thread, as in mergekit's main thread: the tensor knows its accelerator."""
        owner = next(leaf.accelerator for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, DeviceTensor))
        return owner.run(func, args, kwargs or {})

    def tolist(self) -> Any:
        """One copy to the host; torch itself does not know how, of a subclass."""
        return self.cpu().tolist()


class Mode(TorchDispatchMode):
    """One thread's operations, also those that have no operand on a device yet."""

    def __init__(self, accelerator: PretendedAccelerator) -> None:
        super().__init__()
        self._accelerator = accelerator

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self._accelerator.run(func, args, kwargs or {})


class PretendedAccelerator:
    """Devices `gpu:0` and `gpu:1`, while the block is open; other threads enter `mode()`.

    Attributes:
        waits: how often the host had to wait, by (place in the package, operation).
        peak: the most bytes that were alive at once beyond what `place` brought.
        emptied: how often the cache was emptied.
        failures: errors to raise, in turn, when an operation is run on a device.
        capacity: bytes beyond which an allocation fails as it does on CUDA.
        tf32: products round their operands to 11 bits, as tensor cores do where TF32 is forced.
    """

    current: PretendedAccelerator | None = None

    def __init__(self, *, capacity: int | None = None, tf32: bool = False) -> None:
        self.waits: collections.Counter[tuple[str, str]] = collections.Counter()
        self.peak = 0
        self.emptied = 0
        self.failures: dict[Any, list[Exception]] = {}
        self.capacity = capacity
        self.tf32 = tf32
        self._live: dict[int, tuple[int, int]] = {}
        self._bytes = 0
        # A finalizer may run while the lock is held by its own thread.
        self._lock = threading.RLock()

    def __enter__(self) -> PretendedAccelerator:
        _register()
        assert PretendedAccelerator.current is None
        PretendedAccelerator.current = self
        self._mode = self.mode()
        self._mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mode.__exit__(kind, error, trace)
        PretendedAccelerator.current = None

    def mode(self) -> Mode:
        """A context for another thread."""
        return Mode(self)

    def place(self, tensor: Tensor, device: str) -> DeviceTensor:
        """An input: a copy on a device that does not count towards `peak`."""
        return DeviceTensor(tensor.clone(memory_format=torch.preserve_format), torch.device(device), self)

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """One operation, by CUDA's rules."""
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        home = _home(func, args, kwargs, operands)
        if func not in _COPIES:
            _refuse_mixing(func, operands, home)
        _refuse_foreign_generator(func, kwargs.get("generator"), home)
        on_device = any(isinstance(operand, DeviceTensor) for operand in operands)
        if on_device and self.failures.get(func):
            raise self.failures[func].pop(0)
        crosses = func in _COPIES and any(operand.device != home for operand in operands)
        if (on_device and func in _READ_BY_THE_HOST) or (crosses and not kwargs.get("non_blocking")):
            with self._lock:
                self.waits[_asked_by(), str(func.overloadpacket).removeprefix("aten.")] += 1

        def held(leaf: Any) -> Any:
            return leaf.held if isinstance(leaf, DeviceTensor) else leaf

        on_cpu = tree_map(held, (tuple(args), dict(kwargs)))
        if on_cpu[1].get("device") is not None:
            on_cpu[1]["device"] = torch.device("cpu")
        if self.tf32 and on_device and func in _PRODUCTS:
            on_cpu = (tuple(map(_to_tf32, on_cpu[0])), on_cpu[1])
        outputs = func(*on_cpu[0], **on_cpu[1])
        if on_device and torch.Tag.inplace_view in func.tags:
            # `squeeze_` and its like change the shape that the tensor itself says, too.
            with no_dispatch():
                func(*args, **kwargs)
        if home.type != NAME:
            return outputs
        known = {id(operand.held): operand for operand in operands if isinstance(operand, DeviceTensor)}

        def wrapped(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return known[id(leaf)] if id(leaf) in known else self._hold(leaf, home, known.values())

        return tree_map(wrapped, outputs)

    def _hold(self, tensor: Tensor, device: torch.device, operands: Iterable[DeviceTensor]) -> DeviceTensor:
        made = DeviceTensor(tensor, device, self)
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        with self._lock:
            if key not in self._live and any(operand.held.untyped_storage()._cdata == key for operand in operands):
                return made  # a view of what `place` brought
            if key not in self._live:
                if self.capacity is not None and self._bytes + size > self.capacity:
                    raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
                self._bytes += size
                self.peak = max(self.peak, self._bytes)
            holders, _ = self._live.get(key, (0, size))
            self._live[key] = (holders + 1, size)
        weakref.finalize(made, self._release, key)
        return made

    def _release(self, key: int) -> None:
        with self._lock:
            holders, size = self._live[key]
            if holders > 1:
                self._live[key] = (holders - 1, size)
            else:
                del self._live[key]
                self._bytes -= size


def _home(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], operands: Sequence[Tensor]) -> torch.device:
    """Where the result is."""
    if func is torch.ops.aten.copy_.default:
        return operands[0].device
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    return next((operand.device for operand in operands if operand.device.type == NAME), torch.device("cpu"))


def _refuse_mixing(func: Any, operands: Sequence[Tensor], home: torch.device) -> None:
    pointwise = torch.Tag.pointwise in func.tags
    for operand in operands:
        # A number that happens to be a tensor on the CPU may be an operand, not the target, of elementwise arithmetic.
        is_number = pointwise and operand.ndim == 0 and operand.device.type == "cpu" and operand is not operands[0]
        if operand.device != home and not is_number and any(other.device.type == NAME for other in operands):
            found = sorted({str(other.device) for other in operands})
            raise RuntimeError(f"{func}: expected all tensors to be on the same device; found {found} at {_asked_by()}")


def _refuse_foreign_generator(func: Any, generator: torch.Generator | None, home: torch.device) -> None:
    if generator is not None and generator.device.type != home.type:
        raise RuntimeError(f"{func}: expected a {home.type} generator; found {generator.device.type} at {_asked_by()}")


def _to_tf32(operand: Any) -> Any:
    """float32 rounded to 11 significant bits."""
    if not (isinstance(operand, Tensor) and operand.dtype == torch.float32):
        return operand
    mantissa, exponent = torch.frexp(operand)
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


def _asked_by() -> str:
    """The two innermost places of the package that led here, outermost last."""
    places: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(places) < 2:
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGE):
            places.append(f"{file.removeprefix(_PACKAGE)[1:]}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(places) or "outside of the package"
