"""A compiled source and its kernels."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.cuda.emulator import build, memory

ASCENDING, DESCENDING, SHUFFLED = 0, 1, 2
ORDERS = (ASCENDING, DESCENDING, SHUFFLED)
MAX_THREADS = 1024
STACK_BYTES = 128 << 10
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)
KINDS = {"b": b"i", "i": b"i", "u": b"i", "f": b"f"}  # by numpy's kind of a scalar; others are structs

_one_launch = threading.Lock()  # they share the stacks and the process's signal handlers


class _Argument(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_uint32), ("kind", ctypes.c_char)]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("order", ctypes.c_uint32),
        ("argument_count", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("arguments", ctypes.POINTER(_Argument)),
        ("stacks", ctypes.c_void_p),
        ("stack_bytes", ctypes.c_uint64),
        ("seconds", ctypes.c_double),
    ]


class Module:
    """A kernel source, built for the CPU; the kernels in it are its `extern "C" __global__` functions.

    `flags` are g++'s, such as -DNAME=VALUE and -I. RuntimeError if the source does not compile.
    """

    def __init__(self, source: str, flags: Sequence[str] = (), sanitize: bool = False) -> None:
        self._library = ctypes.CDLL(str(build.shared_object(source, tuple(flags), sanitize)))
        self._library.cusim_message.restype = ctypes.c_char_p
        self._library.cusim_fault_address.restype = ctypes.c_void_p

    def get_function(self, name: str) -> Kernel:
        """Return a kernel by its name."""
        try:
            return Kernel(self._library, name)
        except AttributeError:
            raise RuntimeError(f"the source has no kernel named {name}") from None


class Kernel:
    """A kernel to call with a grid, a block and its arguments."""

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self.name = name
        self._library = library
        self._entry = library[f"cusim_launch_{name}"]

    def __call__(
        self,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        order: int = ASCENDING,
        seed: int = 1,
        seconds: float = 60.0,
    ) -> None:
        """Run every thread to its end; RuntimeError if that cannot be.

        An argument is a numpy array (its address goes to the kernel), a numpy scalar, a ctypes value, a
        Python int (64 bits: an address or a long long) or a Python float (a double). `seed` is for the order
        SHUFFLED, `seconds` the CPU time after which the launch is given up.
        """
        if order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}, not {order!r}")
        values = [_value(argument) for argument in args]
        arguments = (_Argument * len(values))(
            *[_Argument(ctypes.addressof(v), ctypes.sizeof(v), kind) for v, kind in values]
        )
        launch = _Launch(
            _size(grid, MAX_GRID), _size(block, MAX_BLOCK), order, len(values), seed & (2**64 - 1), arguments
        )
        if launch.block[0] * launch.block[1] * launch.block[2] > MAX_THREADS:
            raise RuntimeError(f"kernel {self.name}: a block of more than {MAX_THREADS} threads")
        with _one_launch:
            launch.stacks, launch.stack_bytes = memory.address_of(_stacks()), STACK_BYTES
            launch.seconds = seconds
            if self._entry(ctypes.byref(launch)):
                return
            message = self._library.cusim_message().decode(errors="replace")
            fault = self._library.cusim_fault_address()
        raise RuntimeError(message + (_near(fault, args) if fault else ""))


@functools.cache
def _stacks() -> Any:
    return memory.stacks(MAX_THREADS, STACK_BYTES)


def _size(given: int | Sequence[int], limits: tuple[int, int, int]) -> Any:
    """Return a grid's or block's three dimensions for ctypes."""
    sizes = (given,) if isinstance(given, (int, np.integer)) else tuple(given)
    sizes += (1,) * (3 - len(sizes))
    if len(sizes) != 3 or not all(1 <= size <= limit for size, limit in zip(sizes, limits, strict=True)):
        raise RuntimeError(f"the size {given} is not within {limits}")
    return (ctypes.c_uint32 * 3)(*sizes)


def _value(argument: Any) -> tuple[Any, bytes]:
    """Return an argument as a ctypes value that the kernel's parameter is copied from, and its kind."""
    if isinstance(argument, np.ndarray):
        return ctypes.c_void_p(argument.ctypes.data), b"p"
    if isinstance(argument, np.generic):
        kind = KINDS.get(argument.dtype.kind, b"s")
        return (ctypes.c_char * argument.dtype.itemsize).from_buffer_copy(argument.tobytes()), kind
    if isinstance(argument, int):
        unsigned = argument >= 2**63
        return (ctypes.c_uint64 if unsigned else ctypes.c_int64)(argument), b"i"
    if isinstance(argument, float):
        return ctypes.c_double(argument), b"f"
    if isinstance(argument, (ctypes.c_void_p, ctypes._Pointer)):
        return argument, b"p"
    if isinstance(argument, (ctypes.c_float, ctypes.c_double)):
        return argument, b"f"
    if isinstance(argument, ctypes._SimpleCData):
        return argument, b"i"
    if isinstance(argument, (ctypes.Structure, ctypes.Array)):
        return argument, b"s"
    raise TypeError(f"a kernel takes no {type(argument).__name__}")


def _near(address: int, args: Sequence[Any]) -> str:
    """Say where an address lies with respect to the array nearest to it."""
    found = []
    for position, argument in enumerate(args):
        if isinstance(argument, np.ndarray):
            start, end = argument.ctypes.data, argument.ctypes.data + argument.nbytes
            if address < start:
                found.append(
                    (start - address, f"{start - address} bytes before the start of argument {position}")
                )
            elif address >= end:
                found.append((address - end, f"{address - end} bytes past the end of argument {position}"))
            else:
                found.append((0, f"within argument {position}, which may only be read"))
    distance, text = min(found, default=(memory.GUARD, ""))
    return f", {text}" if distance < memory.GUARD else ""
