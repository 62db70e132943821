"""Cubins onto cards, and launches on torch's current stream with as little Python as possible.

The driver is touched only once torch has said that there is a card: without one, a call into it may never return.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from engine.jit.compile import compile_cubin, prepare
from engine.jit.sources import KernelError, Variant, arch_of

CONFIG = "7IPPI4x"  # CUlaunchConfig: grid, block, dynamic shared memory, stream, attributes, how many attributes
ONES = ((1, 1, 1), (1, 1), (1,), ())  # what a grid or block of so many numbers lacks
WRONG_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT: this thread has not met the card yet
NUM_REMEMBERED = 8


class Strided:
    """A tensor argument that need not be contiguous: the wrapper tells the kernel its strides."""

    __slots__ = ("data_ptr", "get_device", "shape")

    def __init__(self, tensor: Tensor) -> None:
        self.data_ptr, self.get_device, self.shape = tensor.data_ptr, tensor.get_device, tensor.shape

    def is_contiguous(self) -> bool:
        return True


Dim: TypeAlias = tuple[int, ...]  # one to three numbers
Values: TypeAlias = tuple[int | float, ...]  # pointers and numbers, as they are packed
Argument: TypeAlias = Tensor | Strided | int | float | None


@dataclass(slots=True)
class _Kernel:
    """A function on a card, with the memory its launches are described in."""

    sizes: list[int]  # bytes of each parameter
    memory: bytearray  # CUlaunchConfig, then the parameters as they lie in C
    call: Callable[[], int]  # launches what the memory describes
    lock: threading.Lock  # from the description to its launch
    values: Callable[..., Values | None] | None = None  # of the arguments; known from the first launch on
    pack: Callable[..., None] | None = None  # fills the memory


_notes: dict[int, dict[Variant, None]] = {}  # by thread: inside `noted`
_kernels: dict[int, dict[Variant, _Kernel]] = {}  # by device index
_recent: deque[tuple[Variant, Dim, Dim, Values]] = deque(maxlen=NUM_REMEMBERED)


def launch(variant: Variant, grid: Dim, block: Dim, *args: Argument, shared_bytes: int = 0) -> None:
    """Run a kernel on the current device's current stream; compiles and loads it if that was not done.

    grid, block: one to three numbers. args: what the kernel takes, in order; a tensor becomes its pointer (None:
    null), an int 32 bits, a float fp32. shared_bytes: dynamic shared memory of a block.
    Raises ValueError for a tensor that is not contiguous or not on the current device, before it launches.
    """
    if _notes and (noting := _notes.get(threading.get_ident())) is not None:
        noting[variant] = None
        return
    index = torch._C._cuda_getDevice() if _kernels else _current_device()
    try:
        kernel = _kernels[index][variant]
    except KeyError:
        kernel = _load(variant, index)
    if kernel.values is None:
        _describe(kernel, variant, args)
    try:
        values = kernel.values(index, *args)  # type: ignore[misc]
    except (TypeError, AttributeError):
        raise TypeError(_wrong_kinds(variant, kernel, args)) from None
    if values is None:
        raise ValueError(_wrong_tensor(variant, args, index))
    _recent.append((variant, grid, block, values))
    with kernel.lock:
        try:
            kernel.pack(  # type: ignore[misc]
                kernel.memory, 0, *grid, *ONES[len(grid)], *block, *ONES[len(block)],
                shared_bytes, torch._C._cuda_getCurrentRawStream(index), 0, 0, *values,
            )  # fmt: skip
        except (struct.error, IndexError) as error:
            what = _call(variant, grid, block, shared_bytes, args)
            raise ValueError(f"{what}: a number does not fit: {error}") from None
        code = kernel.call()
        if code == WRONG_CONTEXT:
            _enter(index)
            code = kernel.call()
    if code:
        raise KernelError(
            f"{_call(variant, grid, block, shared_bytes, args)}: {_name_of(code)}. {_launched_last()}"
        )


def load(variants: Iterable[Variant]) -> None:
    """Bring kernels onto the current device, so that no launch has to: required before a CUDA graph is captured.

    Compiles what is missing; `prepare` before it shows progress.
    """
    index = _current_device()
    wanted = [variant for variant in dict.fromkeys(variants) if variant not in _kernels.get(index, {})]
    for _ in prepare(wanted, _arch(index)):
        pass
    for variant in wanted:
        _load(variant, index)


@contextlib.contextmanager
def noted() -> Iterator[dict[Variant, None]]:
    """Inside, `launch` on this thread only notes its variant, each once, in order: what a network would need."""
    thread = threading.get_ident()
    _notes[thread] = {}
    try:
        yield _notes[thread]
    finally:
        del _notes[thread]


def current_arch() -> str:
    """The architecture that is compiled for on the current device: "90a"."""
    return _arch(_current_device())


def synchronize() -> None:
    """Wait for the current device; raises KernelError if a kernel failed, with the ones launched last.

    CUDA_LAUNCH_BLOCKING=1 in the environment lets the launch itself say so.
    """
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise KernelError(f"{str(error).splitlines()[0]}. {_launched_last()}") from error


def _launched_last() -> str:
    """The last launches: an error that a kernel makes while it runs is reported by a later call, or much later."""
    lines = [
        f"{variant}, grid {grid}, block {block}, arguments {', '.join(map(str, values))}"
        for variant, grid, block, values in reversed(_recent)
    ]
    if not lines:
        return "Nothing was launched."
    return "Launched last (with CUDA_LAUNCH_BLOCKING=1 the one that fails comes first): " + "; ".join(lines)


def card_failure() -> str:
    """What a kernel did, after which no call of this process to its card succeeds any more; "" if none did."""
    try:
        if torch.cuda.is_initialized():
            synchronize()
    except KernelError as error:
        return str(error)
    return ""


# ------------------------------------------------------------------------------------------------------ loading


def _current_device() -> int:
    if not torch.cuda.is_available():
        raise KernelError("There is no graphics card that torch can use.")
    return torch.cuda.current_device()


def _arch(index: int) -> str:
    return arch_of(*torch.cuda.get_device_capability(index))


def _load(variant: Variant, index: int) -> _Kernel:
    if torch.cuda.is_current_stream_capturing():
        raise KernelError(f"{variant} must be loaded before a CUDA graph is captured.")
    from cuda.bindings import driver

    def check(what: str, error: Any, *result: Any) -> Any:
        if error:
            raise KernelError(f"{variant} for sm_{_arch(index)}: {what} says {error.name}")
        return result[0] if result else None

    cubin = compile_cubin(variant, _arch(index))
    _enter(index)
    module = check("cuModuleLoadData", *driver.cuModuleLoadData(cubin))
    function = check("cuModuleGetFunction", *driver.cuModuleGetFunction(module, variant.entry.encode()))
    attribute, limit = driver.CUfunction_attribute, driver.CUdevice_attribute
    static = check(
        "the driver", *driver.cuFuncGetAttribute(attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function)
    )
    most = check(
        "the driver",
        *driver.cuDeviceGetAttribute(limit.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, index),
    )
    dynamic = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    check("the driver", *driver.cuFuncSetAttribute(function, dynamic, most - static))
    check("cuFuncLoad", *driver.cuFuncLoad(function))

    places: list[tuple[int, int]] = []  # offset and bytes of each parameter
    while (one := driver.cuFuncGetParamInfo(function, len(places)))[0] == driver.CUresult.CUDA_SUCCESS:
        places.append(one[1:])
    start = struct.calcsize(CONFIG)
    memory = bytearray(start + max((offset + size for offset, size in places), default=0))
    address = ctypes.addressof((ctypes.c_char * len(memory)).from_buffer(memory))
    pointers = (ctypes.c_void_p * (len(places) or 1))(*(address + start + offset for offset, _ in places))
    call = functools.partial(_launcher(), ctypes.c_void_p(address), ctypes.c_void_p(int(function)), pointers, None)
    kernel = _Kernel([size for _, size in places], memory, call, threading.Lock())
    _kernels.setdefault(index, {})[variant] = kernel
    return kernel


@functools.cache
def _launcher() -> Callable[..., int]:
    """cuLaunchKernelEx by ctypes: everything but the memory's content can be prepared once."""
    from cuda.bindings import driver

    error, address, _ = driver.cuGetProcAddress(b"cuLaunchKernelEx", 12000, 0)
    if error:
        raise KernelError(f"The driver has no cuLaunchKernelEx: {error.name}")
    pointer = ctypes.c_void_p
    function: Callable[..., int] = ctypes.CFUNCTYPE(ctypes.c_int, pointer, pointer, pointer, pointer)(address)
    return function


def _enter(index: int) -> None:
    """Make torch's context the current one of this thread."""
    from cuda.bindings import driver

    error, context = driver.cuDevicePrimaryCtxRetain(index)
    if not error:
        (error,) = driver.cuCtxSetCurrent(context)
    if error:
        raise KernelError(f"The graphics card {index} cannot be used: {error.name}")


def _describe(kernel: _Kernel, variant: Variant, args: tuple[Argument, ...]) -> None:
    """Learn from its first launch which 4-byte parameters are int and which float."""
    letters = "".join("i" if isinstance(arg, int) else "f" if isinstance(arg, float) else "P" for arg in args)
    if [struct.calcsize(letter) for letter in letters] != kernel.sizes:
        raise TypeError(_wrong_kinds(variant, kernel, args))
    kernel.pack = struct.Struct(CONFIG + letters).pack_into
    kernel.values = _values_of(letters)


@functools.cache
def _values_of(letters: str) -> Callable[..., Values | None]:
    """A function of the device's index and the arguments: what is packed, or None where a tensor will not do.

    Written out for these kinds of arguments: a loop over any takes half as long again.
    """
    names = [f"a{place}" for place in range(len(letters))]
    kinds = list(zip(names, letters, strict=True))
    fit = [
        f"({a} is None or {a}.get_device() == index and {a}.is_contiguous())" for a, kind in kinds if kind == "P"
    ]
    values = [f"0 if {a} is None else {a}.data_ptr()" if kind == "P" else a for a, kind in kinds]
    text = f"lambda {', '.join(['index', *names])}: ({''.join(f'{one}, ' for one in values)})"
    function: Callable[..., Values | None] = eval(f"{text} if {' and '.join(fit) or True} else None")
    return function


# ------------------------------------------------------------------------------------------------------- errors


def _shown(args: tuple[Argument, ...]) -> str:
    return ", ".join(str(tuple(arg.shape)) if isinstance(arg, Tensor | Strided) else str(arg) for arg in args)


def _wrong_kinds(variant: Variant, kernel: _Kernel, args: tuple[Argument, ...]) -> str:
    return f"{variant} takes {len(kernel.sizes)} arguments of {kernel.sizes} bytes, got {len(args)}: {_shown(args)}"


def _wrong_tensor(variant: Variant, args: tuple[Argument, ...], index: int) -> str:
    for position, arg in enumerate(args):
        if isinstance(arg, Tensor) and not (arg.get_device() == index and arg.is_contiguous()):
            how = f"is on {arg.device}, not on cuda:{index}" if arg.get_device() != index else "is not contiguous"
            return f"{variant}: argument {position}, {tuple(arg.shape)} with strides {arg.stride()}, {how}"
    return f"{variant}: a strided argument is not on cuda:{index}"


def _call(variant: Variant, grid: Dim, block: Dim, shared_bytes: int, args: tuple[Argument, ...]) -> str:
    return f"{variant}, grid {grid}, block {block}, {shared_bytes} bytes shared, arguments {_shown(args)}"


def _name_of(code: int) -> str:
    from cuda.bindings import driver

    return str(driver.CUresult(code).name)
