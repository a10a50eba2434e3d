"""Buffers of uploads: none is written or given back while it is being copied from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from shard4bit.cuda.staging import Stagings


class Late:
    """An event that a copy reaches only when somebody waits, or when it is told to."""

    def __init__(self) -> None:
        self.done, self.waits = True, 0

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done, self.waits = True, self.waits + 1


class Slow:
    """Copies that are done when their events are."""

    def __init__(self) -> None:
        self.events: list[Late] = []
        self.copies: list[tuple[int, int, int]] = []

    def pinned(self, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.uint8)

    def event(self) -> Late:
        self.events.append(Late())
        return self.events[-1]

    def copy(self, into: int, source: int, size: int, copied: Any = None) -> None:
        self.copies.append((into, source, size))
        copied.done = False


def copy(stagings: Stagings, table: torch.Tensor, byte: int) -> None:
    stagings.copy(np.full(5, byte, np.uint8), table, capturable=False, capturing=False)


def test_a_buffer_in_use_is_waited_for() -> None:
    slow = Slow()
    stagings, table = Stagings(slow), torch.zeros(8, dtype=torch.uint8)
    for byte in range(5):
        copy(stagings, table, byte)
        assert [event.waits for event in slow.events] == [max(0, byte // 2), max(0, (byte - 1) // 2)]
    slots = stagings.of[id(table)].slots
    assert [buffer.bytes[:5].tolist() for buffer, _ in slots] == [[4] * 5, [3] * 5]
    assert slow.copies == [(table.data_ptr(), slots[i % 2][0].at, 5) for i in range(5)]
    for event in slow.events:
        event.done = True
    copy(stagings, table, 5)
    assert [event.waits for event in slow.events] == [2, 1]


def test_buffers_of_a_table_that_is_gone() -> None:
    """They are kept until the copies from them are done, which nobody waits for."""
    slow = Slow()
    stagings, tables = Stagings(slow), [torch.zeros(8, dtype=torch.uint8) for _ in range(3)]
    copy(stagings, tables[0], 1)
    gone = stagings.of[id(tables[0])]
    del tables[0]
    assert stagings.of == {} and stagings.retired == [gone]
    copy(stagings, tables[0], 2)
    assert stagings.retired == [gone]
    slow.events[0].done = True
    copy(stagings, tables[0], 3)
    assert stagings.retired == [gone]  # looked at when the next table comes
    copy(stagings, tables[1], 4)
    assert stagings.retired == [] and not any(event.waits for event in slow.events)
