"""Memory with inaccessible pages around it, where an access out of bounds faults."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

PAGE = mmap.PAGESIZE
GUARD = 1 << 20  # bytes on either side of a guarded array
NO_ACCESS, READ_ONLY = 0, 1  # PROT_NONE and PROT_READ; Python has no name for the former
_libc = ctypes.CDLL(None, use_errno=True)


def guarded(
    array: npt.NDArray[Any], at: str = "end", align: int = 1, writable: bool = True
) -> npt.NDArray[Any]:
    """Return a copy of the array whose end (or start) touches a mebibyte that nothing can access.

    With `align`, for vector accesses, the copy starts at a multiple of that many bytes (16 say), and up to
    align - 1 accessible bytes may lie between its end and the inaccessible ones. With `writable=False` the
    whole copy can only be read.
    """
    if at not in ("start", "end"):
        raise ValueError(f"at must be 'start' or 'end', not {at!r}")
    room = -(-max(array.nbytes, 1) // PAGE) * PAGE
    memory = mmap.mmap(-1, GUARD + room + GUARD)
    start = GUARD
    if at == "end":
        start = (GUARD + room - array.nbytes) // align * align
    copy: npt.NDArray[Any] = np.ndarray(array.shape, array.dtype, buffer=memory, offset=start)
    copy[...] = array
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect(base, GUARD, NO_ACCESS)
    protect(base + GUARD + room, GUARD, NO_ACCESS)
    if not writable:
        protect(base + GUARD, room, READ_ONLY)
        copy.flags.writeable = False
    return copy


def stacks(count: int, size: int) -> mmap.mmap:
    """Return memory for `count` stacks of `size` bytes; the lowest page of each is inaccessible."""
    memory = mmap.mmap(
        -1, count * size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    )
    base = address_of(memory)
    for i in range(count):
        protect(base + i * size, PAGE, NO_ACCESS)
    return memory


def address_of(memory: mmap.mmap) -> int:
    """Return where the memory starts."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def protect(address: int, size: int, protection: int) -> None:
    """Change what may be done with whole pages."""
    if _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), protection):
        raise OSError(ctypes.get_errno(), "mprotect failed")
