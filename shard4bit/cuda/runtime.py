"""CuPy: compiling, loading and launching. The only module that imports cupy."""

from __future__ import annotations

import contextlib
from functools import lru_cache
from typing import Any, Protocol

import cupy
import numpy as np
import torch

from shard4bit.cuda.staging import Stagings


class Runtime(Protocol):
    """What the back end needs of a device; tests put an emulator on the CPU in its place."""

    device: torch.device

    def launch(self, source: str, name: str, blocks: int, threads: int, args: tuple[Any, ...]) -> None:
        """Run a kernel of ``source`` on the current stream: ints are addresses, numpy scalars as typed."""

    def upload(
        self, host: np.ndarray, into: torch.Tensor | None = None, *, capturable: bool = False
    ) -> torch.Tensor:
        """Bytes of ``host`` on the device: in new memory, or (stream-ordered) in ``into``, of which every
        replay of a capture then makes the same copy. capturable: such captures may come."""

    def capturing(self) -> bool:
        """Whether launches and copies into existing memory are now captured instead of being run."""


class _Stream:
    """torch's current stream, as CuPy takes it."""

    __slots__ = ("ptr",)

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


class _Event:
    """A CUDA event as staging takes it."""

    __slots__ = ("event",)

    def __init__(self) -> None:
        self.event = cupy.cuda.Event(disable_timing=True)

    def query(self) -> bool:
        return bool(self.event.done)

    def synchronize(self) -> None:
        self.event.synchronize()


_AS_IT_IS = contextlib.nullcontext()


def _public_stream(device: int) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


#: The handle of a device's current stream: what torch's compiled code calls, which makes no Stream object.
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", _public_stream)


@lru_cache(maxsize=256)
def _function(source: str, name: str, device: int) -> Any:
    with cupy.cuda.Device(device):
        return _module(source, device).get_function(name)


@lru_cache(maxsize=128)
def _module(source: str, device: int) -> Any:
    return cupy.RawModule(code=source, options=("-std=c++17",), backend="nvrtc")


class CupyRuntime:
    """One CUDA device. See :class:`Runtime`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.index = device.index if device.index is not None else torch.cuda.current_device()
        self.stagings = Stagings(self)

    def launch(self, source: str, name: str, blocks: int, threads: int, args: tuple[Any, ...]) -> None:
        function = _function(source, name, self.index)
        stream = _Stream(_current_stream(self.index))
        with self._current():
            function((blocks,), (threads,), args, stream=stream)

    def upload(
        self, host: np.ndarray, into: torch.Tensor | None = None, *, capturable: bool = False
    ) -> torch.Tensor:
        flat = host.view(np.uint8).reshape(-1)
        if into is None:
            return torch.from_numpy(flat.copy()).to(self.device)
        capturing = capturable and self.capturing()
        self.stagings.copy(flat, into, capturable=capturable, capturing=capturing)
        return into

    def pinned(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def event(self) -> _Event:
        with self._current():
            return _Event()

    def copy(self, into: int, source: int, size: int, copied: _Event | None = None) -> None:
        stream, runtime = _current_stream(self.index), cupy.cuda.runtime
        with self._current():  # the default stream's handle, 0, is of whatever device is current
            runtime.memcpyAsync(into, source, size, runtime.memcpyHostToDevice, stream)
            if copied is not None:
                runtime.eventRecord(copied.event.ptr, stream)

    def capturing(self) -> bool:
        with self._current():
            return torch.cuda.is_current_stream_capturing()

    def _current(self) -> contextlib.AbstractContextManager[Any]:
        """Make this device the current one, if it is not."""
        return _AS_IT_IS if torch.cuda.current_device() == self.index else torch.cuda.device(self.index)
