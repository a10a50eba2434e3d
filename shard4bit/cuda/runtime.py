"""CuPy: compiling, loading and launching. The only module that imports cupy."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import cupy
import numpy as np
import torch
from cupy.cuda import driver


class Runtime(Protocol):
    """What the back end needs of a device; tests put an emulator on the CPU in its place.

    room: bytes of arguments that a launch can have.
    """

    device: torch.device
    room: int

    def prepare(self, source: str, name: str, blocks: int, threads: int, args: tuple[Any, ...]) -> Any:
        """A launch of a kernel of ``source``, to be queued any number of times. args: ints are addresses,
        numpy scalars as typed; arrays go by value, with what is in them when the launch is queued."""

    def queue(self, launches: Sequence[Any]) -> None:
        """Run what ``prepare`` gave, in this order, on the current stream."""

    def upload(self, host: np.ndarray) -> torch.Tensor:
        """Bytes of ``host`` in new memory on the device."""

    def capturing(self) -> bool:
        """Whether launches are now captured instead of being run."""


def _public_stream(device: int) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


#: The handle of a device's current stream: what torch's compiled code calls, which makes no Stream object.
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", _public_stream)


@lru_cache(maxsize=256)
def _function(source: str, name: str, device: int) -> tuple[Any, int]:
    """A kernel, loaded, and the driver's handle of it."""
    with cupy.cuda.Device(device):
        kernel = _module(source, device).get_function(name)
        return kernel, kernel.kernel.ptr


@lru_cache(maxsize=128)
def _module(source: str, device: int) -> Any:
    return cupy.RawModule(code=source, options=("-std=c++17",), backend="nvrtc")


def _room() -> int:
    """4 KB, or since CUDA 12.1 (compiler and driver) 32764 bytes: CUDA C++ Programming Guide, "__global__
    function parameters"."""
    major, minor = cupy.cuda.nvrtc.getVersion()
    known = min(cupy.cuda.runtime.driverGetVersion(), 1000 * major + 10 * minor)
    return 32764 if known >= 12010 else 4096


_AS_IT_IS = contextlib.nullcontext()
_seen = threading.local()


class _Launch:
    """Arguments of the driver's launch, in front of the stream and behind it, and what they point to."""

    __slots__ = ("behind", "front", "kept")

    def __init__(self, kernel: Any, at: int, blocks: int, threads: int, args: tuple[Any, ...]) -> None:
        values = [np.array(a, np.uint64) if isinstance(a, int) else np.asarray(a) for a in args]
        pointers = np.array([value.ctypes.data for value in values], np.uint64)
        self.front = (at, blocks, 1, 1, threads, 1, 1, 0)
        self.behind = (pointers.ctypes.data, 0)
        self.kept = (kernel, values, pointers)


class CupyRuntime:
    """One CUDA device. See :class:`Runtime`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.room = device, _room()
        self.index = device.index if device.index is not None else torch.cuda.current_device()

    def prepare(self, source: str, name: str, blocks: int, threads: int, args: tuple[Any, ...]) -> _Launch:
        kernel, at = _function(source, name, self.index)
        return _Launch(kernel, at, blocks, threads, args)

    def queue(self, launches: Sequence[_Launch]) -> None:
        if not launches:
            return
        with self._current():  # the default stream's handle, 0, is of whatever device is current
            stream = _current_stream(self.index)
            for launch in launches:  # the driver copies the arguments
                driver.launchKernel(*launch.front, stream, *launch.behind)

    def upload(self, host: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(host.view(np.uint8).reshape(-1).copy()).to(self.device)

    def capturing(self) -> bool:
        with self._current():
            return torch.cuda.is_current_stream_capturing()

    def _current(self) -> contextlib.AbstractContextManager[Any]:
        """Make this device the current one, if it is not."""
        if not hasattr(_seen, "context"):  # a thread has none until something of the runtime needs it
            if not driver.ctxGetCurrent():
                cupy.cuda.runtime.free(0)
            _seen.context = True
        return _AS_IT_IS if torch.cuda.current_device() == self.index else torch.cuda.device(self.index)
