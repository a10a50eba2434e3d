"""Host memory that tables on the device are copied from, step by step."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import numpy as np
from torch import Tensor

SPARES = 4  # different tables that may be captured without a step outside of a capture between them


class Copier(Protocol):
    """What staging needs of a device."""

    def pinned(self, size: int) -> Tensor:
        """Host memory, uint8. Not called while capturing."""

    def event(self) -> Any:
        """A CUDA event, or what has its ``query`` and ``synchronize``. Not called while capturing."""

    def copy(self, into: int, source: int, size: int, copied: Any = None) -> None:
        """Copy bytes between two addresses, in the order of the current stream, and record an event then."""


class Buffer:
    """Host memory as numpy and as the driver take it, found once: each way takes torch some microseconds."""

    def __init__(self, copier: Copier, size: int) -> None:
        memory = copier.pinned(size)
        self.at, self.bytes = memory.data_ptr(), memory.numpy()  # which keeps the memory


class Staging:
    """A ring of two buffers for one table: one is written again only after the copy from it is done. A
    captured copy reads its buffer at every replay: it gets one of its own, which is never written again."""

    def __init__(self, copier: Copier, into: Tensor) -> None:
        self.copier, self.into, self.size = copier, into.data_ptr(), into.numel()
        self.slots = [(Buffer(copier, self.size), copier.event()) for _ in range(2)]
        self.turn = 0
        self.spares: list[Buffer] = []
        self.captured: list[tuple[bytes, Buffer]] = []

    def copy(self, flat: np.ndarray, *, capturable: bool, capturing: bool) -> None:
        """Copy bytes to the front of the table, in the order of the current stream.

        capturable: this table may have to be copied while capturing later on. Raises ValueError if no buffer
        is left for a capture.
        """
        if capturing:
            self.copier.copy(self.into, self._kept(flat).at, flat.size)
            return
        while capturable and len(self.spares) < SPARES:
            self.spares.append(Buffer(self.copier, self.size))
        buffer, copied = self.slots[self.turn]
        self.turn = 1 - self.turn
        if not copied.query():
            copied.synchronize()
        buffer.bytes[: flat.size] = flat
        self.copier.copy(self.into, buffer.at, flat.size, copied)

    def busy(self) -> bool:
        """Whether a copy is still going on."""
        return not all(copied.query() for _, copied in self.slots)

    def _kept(self, flat: np.ndarray) -> Buffer:
        """A buffer with these bytes that nobody writes any more."""
        wanted = flat.tobytes()
        for held, buffer in self.captured:
            if held == wanted:
                return buffer
        if not self.spares:
            raise ValueError(
                f"{len(self.captured)} steps with different gradients or options were captured without one "
                "outside of a capture between them: take a step before the next capture"
            )
        buffer = self.spares.pop()
        buffer.bytes[: flat.size] = flat
        self.captured.append((wanted, buffer))
        return buffer


class Stagings:
    """Of all tables of a device, each made when its table is first copied to (never while capturing: a step
    outside of a capture comes first)."""

    def __init__(self, copier: Copier) -> None:
        self.copier = copier
        self.of: dict[int, Staging] = {}
        self.retired: list[Staging] = []  # of tables that are gone

    def copy(self, flat: np.ndarray, into: Tensor, *, capturable: bool, capturing: bool) -> None:
        """See ``Staging.copy``."""
        staging = self.of.get(id(into))
        if staging is None:
            # torch's allocator, which knows nothing of our copies, may give pinned memory to others as soon
            # as we drop it: so not before the copies from it are done
            self.retired = [staging for staging in self.retired if staging.busy()]
            staging = self.of[id(into)] = Staging(self.copier, into)
            weakref.finalize(into, self._retire, id(into))  # another tensor may get its id
        staging.copy(flat, capturable=capturable, capturing=capturing)

    def _retire(self, key: int) -> None:
        self.retired.append(self.of.pop(key))
