"""CuPy: compiling, loading and launching. The only module that imports cupy."""

from __future__ import annotations

import weakref
from functools import lru_cache
from typing import Any, Protocol

import cupy
import numpy as np
import torch


class Runtime(Protocol):
    """What the back end needs of a device; tests put an emulator on the CPU in its place."""

    device: torch.device

    def launch(self, source: str, name: str, blocks: int, threads: int, args: tuple[Any, ...]) -> None:
        """Run a kernel of ``source`` on the current stream: ints are addresses, numpy scalars as typed."""

    def upload(self, host: np.ndarray, into: torch.Tensor | None = None) -> torch.Tensor:
        """Bytes of ``host`` on the device: in new memory, or (stream-ordered) in ``into``."""


class _Stream:
    """torch's current stream, as CuPy takes it."""

    __slots__ = ("ptr",)

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


@lru_cache(maxsize=256)
def _function(source: str, name: str, device: int) -> Any:
    with cupy.cuda.Device(device):
        return _module(source, device).get_function(name)


@lru_cache(maxsize=128)
def _module(source: str, device: int) -> Any:
    return cupy.RawModule(code=source, options=("-std=c++17",), backend="nvrtc")


class _Staging:
    """A ring of pinned buffers: one is written again only after the copy from it is done."""

    def __init__(self, size: int) -> None:
        self.slots = [
            (torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(2)
        ]
        self.turn = 0

    def copy(self, host: np.ndarray, into: torch.Tensor) -> None:
        pinned, copied = self.slots[self.turn]
        self.turn = 1 - self.turn
        copied.synchronize()
        flat = host.view(np.uint8).reshape(-1)
        pinned.numpy()[: flat.size] = flat
        into[: flat.size].copy_(pinned[: flat.size], non_blocking=True)
        copied.record()


class CupyRuntime:
    """One CUDA device. See :class:`Runtime`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.index = device.index if device.index is not None else torch.cuda.current_device()
        self.staging: dict[int, _Staging] = {}

    def launch(self, source: str, name: str, blocks: int, threads: int, args: tuple[Any, ...]) -> None:
        function = _function(source, name, self.index)
        stream = _Stream(torch.cuda.current_stream(self.index).cuda_stream)
        if torch.cuda.current_device() == self.index:
            function((blocks,), (threads,), args, stream=stream)
        else:
            with cupy.cuda.Device(self.index):
                function((blocks,), (threads,), args, stream=stream)

    def upload(self, host: np.ndarray, into: torch.Tensor | None = None) -> torch.Tensor:
        flat = host.view(np.uint8).reshape(-1)
        if into is None:
            return torch.from_numpy(flat.copy()).to(self.device)
        staging = self.staging.get(id(into))
        if staging is None:
            staging = self.staging[id(into)] = _Staging(into.numel())
            weakref.finalize(into, self.staging.pop, id(into), None)  # another tensor may get its id
        staging.copy(flat, into)
        return into
