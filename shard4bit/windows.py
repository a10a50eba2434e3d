"""Windows: the chunks of a rank's rectangles that the reference works on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import lcm

from torch import Tensor

from shard4bit.layout import Rect
from shard4bit.spec import QuantSpec
from shard4bit.state import Moment


@dataclass(frozen=True)
class Window(Rect):
    """A chunk of whole or cut rows of a rectangle, and its place in the rank's elements."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.row1 - self.row0, self.width

    def elements(self, flat: Tensor) -> Tensor:
        """This window of a dense vector, as (rows, columns), sharing its memory."""
        return flat[self.offset : self.offset + self.numel].view(self.shape)


def windows(rects: Sequence[Rect], moments: Sequence[Moment], limit: int) -> Iterator[Window]:
    """The rectangles in windows of about ``limit`` elements, which cut no block and no byte of codes of
    ``moments`` that the rectangles do not cut."""
    specs = [m.spec for m in moments]
    blocks = [s.block_size for s in specs if isinstance(s, QuantSpec) and s.norm == "block"]
    align = lcm(2, *blocks)
    step = max(align, limit // align * align)
    for rect in rects:
        height = max(1, limit // rect.width)
        cuts = range((rect.col0 // step + 1) * step, rect.col1, step) if rect.width > limit else ()
        edges = [rect.col0, *cuts, rect.col1]
        for row0 in range(rect.row0, rect.row1, height):
            row1 = min(rect.row1, row0 + height)
            offset = rect.offset + (row0 - rect.row0) * rect.width
            for col0, col1 in zip(edges, edges[1:], strict=False):
                yield Window(row0, row1, col0, col1, offset + col0 - rect.col0)
