"""Host memory that a table on the device is copied from, step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

SPARES = 4  # different tables that may be captured without a step outside of a capture between them


class Staging:
    """A ring of two buffers: one is written again only after the copy from it is done. A captured copy reads
    its buffer at every replay: it gets one of its own, which is never written again.

    buffer: makes pinned memory, uint8, as large as the table. event: makes a CUDA event. Neither may be
    called while capturing.
    """

    def __init__(self, buffer: Callable[[], Tensor], event: Callable[[], Any]) -> None:
        self.buffer = buffer
        self.slots = [(buffer(), event()) for _ in range(2)]
        self.turn = 0
        self.spares: list[Tensor] = []
        self.captured: list[tuple[bytes, Tensor]] = []

    def copy(self, flat: np.ndarray, into: Tensor, *, capturable: bool, capturing: bool) -> None:
        """Copy bytes to the front of ``into``, in the order of the current stream.

        capturable: this table may have to be copied while capturing later on. Raises ValueError if no buffer
        is left for a capture.
        """
        if capturing:
            into[: flat.size].copy_(self._kept(flat)[: flat.size], non_blocking=True)
            return
        while capturable and len(self.spares) < SPARES:
            self.spares.append(self.buffer())
        pinned, copied = self.slots[self.turn]
        self.turn = 1 - self.turn
        copied.synchronize()
        pinned.numpy()[: flat.size] = flat
        into[: flat.size].copy_(pinned[: flat.size], non_blocking=True)
        copied.record()

    def _kept(self, flat: np.ndarray) -> Tensor:
        """A buffer with these bytes that nobody writes any more."""
        wanted = flat.tobytes()
        for held, pinned in self.captured:
            if held == wanted:
                return pinned
        if not self.spares:
            raise ValueError(
                f"{len(self.captured)} steps with different gradients or options were captured without one "
                "outside of a capture between them: take a step before the next capture"
            )
        pinned = self.spares.pop()
        pinned.numpy()[: flat.size] = flat
        self.captured.append((wanted, pinned))
        return pinned
