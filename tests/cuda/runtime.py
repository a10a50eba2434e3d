"""The kernel back end on the CPU: its own launches, carried out by the emulator."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch

from shard4bit.cuda.backend import KernelBackend
from tests.cuda.emulator import ASCENDING, Module

_LOCK = threading.Lock()  # the emulator runs one launch at a time; simulated ranks are threads


class EmulatorRuntime:
    """See ``shard4bit.cuda.runtime.Runtime``. ``launches`` records (kernel, thread blocks)."""

    def __init__(self, order: int = ASCENDING, sanitize: bool = False) -> None:
        self.device = torch.device("cpu")
        self.order, self.sanitize = order, sanitize
        self.launches: list[tuple[str, int]] = []

    def launch(self, source: str, name: str, blocks: int, threads: int, args: tuple[Any, ...]) -> None:
        with _LOCK:
            kernel = Module(source, sanitize=self.sanitize).get_function(name)
            kernel(blocks, threads, args, order=self.order)
            self.launches.append((name, blocks))

    def upload(self, host: np.ndarray, into: torch.Tensor | None = None) -> torch.Tensor:
        flat = torch.from_numpy(host.view(np.uint8).reshape(-1).copy())
        if into is None:
            return flat
        into[: flat.numel()] = flat
        return into


def emulated(order: int = ASCENDING, sanitize: bool = False) -> KernelBackend:
    return KernelBackend(EmulatorRuntime(order, sanitize))
