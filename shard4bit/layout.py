"""Integers only: how a parameter is seen as a matrix and which part of it a rank holds.

Nothing here knows torch. A parameter has a *matrix view* (rows x cols); a rank holds a *slab* of it,
which is either a box (one range per original dimension, as DTensors cut) or a run (a flat range, as
FSDP1 and ZeRO cut). The quantized state follows the matrix view of the whole parameter, so that it
does not depend on the cuts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

Range = tuple[int, int]  # [start, stop)


@dataclass(frozen=True)
class MatrixView:
    """A parameter's shape and where it is cut into rows and columns."""

    shape: tuple[int, ...]
    split: int  # dimensions before it form the rows, the others the columns

    @property
    def lead(self) -> tuple[int, ...]:
        return self.shape[: self.split]

    @property
    def trail(self) -> tuple[int, ...]:
        return self.shape[self.split :]

    @property
    def rows(self) -> int:
        return prod(self.lead)

    @property
    def cols(self) -> int:
        return prod(self.trail)

    @property
    def numel(self) -> int:
        return self.rows * self.cols


def matrix_view(shape: Sequence[int]) -> MatrixView:
    """The cut that makes rows + cols smallest (ties: the earlier one); a vector is one column."""
    dims = tuple(int(d) for d in shape)
    if len(dims) < 2:
        return MatrixView(dims, len(dims))
    cuts = range(1, len(dims))
    return MatrixView(dims, min(cuts, key=lambda s: (prod(dims[:s]) + prod(dims[s:]), s)))


@dataclass(frozen=True)
class Rect:
    """A rectangle of a slab: stored rows x global columns, and where its elements start in the
    rank's dense elements (row-major)."""

    row0: int
    row1: int
    col0: int
    col1: int
    offset: int

    @property
    def width(self) -> int:
        return self.col1 - self.col0

    @property
    def numel(self) -> int:
        return (self.row1 - self.row0) * self.width


@dataclass(frozen=True)
class Slab:
    """The part of one parameter that one rank holds. Build it with :meth:`whole`, :meth:`box` or
    :meth:`run`.

    ``row_ranges`` are the global rows stored, in storage order; ``[col0, col1)`` the stored columns.
    ``head`` and ``tail`` count the elements of the first and last stored row that are not ours
    (runs only). ``lead`` and ``trail`` are the local shapes of the row and column dimensions.
    """

    view: MatrixView
    row_ranges: tuple[Range, ...]
    col0: int
    col1: int
    lead: tuple[int, ...]
    trail: tuple[int, ...]
    head: int = 0
    tail: int = 0
    flat: bool = False  # a run: the rank's elements are one flat vector

    @staticmethod
    def whole(shape: Sequence[int]) -> Slab:
        return Slab.box(shape, [(0, d) for d in shape])

    @staticmethod
    def box(shape: Sequence[int], ranges: Sequence[Range]) -> Slab:
        """One [start, stop) per dimension. Raises ValueError if the columns are not one window."""
        view = matrix_view(shape)
        assert len(ranges) == len(view.shape), (ranges, shape)
        for (start, stop), dim in zip(ranges, view.shape, strict=True):
            assert 0 <= start <= stop <= dim, (ranges, shape)
        lead_ranges, trail_ranges = ranges[: view.split], ranges[view.split :]
        col0, col1 = _window(view.trail, trail_ranges)
        return Slab(
            view,
            _row_ranges(view.lead, lead_ranges),
            col0,
            col1,
            tuple(b - a for a, b in lead_ranges),
            tuple(b - a for a, b in trail_ranges),
        )

    @staticmethod
    def run(shape: Sequence[int], start: int, stop: int) -> Slab:
        """The flat elements [start, stop). Cut rows are stored as whole rows."""
        view = matrix_view(shape)
        assert 0 <= start <= stop <= view.numel, (start, stop, shape)
        if start == stop:
            return Slab(view, (), 0, 0, (0,), (0,), flat=True)
        row0, row1 = start // view.cols, -(-stop // view.cols)
        head, tail = start - row0 * view.cols, row1 * view.cols - stop
        lead = (row1 - row0,)
        return Slab(view, ((row0, row1),), 0, view.cols, lead, view.trail, head, tail, flat=True)

    @property
    def rows(self) -> int:
        """Number of stored rows."""
        return sum(stop - start for start, stop in self.row_ranges)

    @property
    def width(self) -> int:
        """Number of stored columns."""
        return self.col1 - self.col0

    @property
    def numel(self) -> int:
        """Elements held by this rank."""
        return self.rows * self.width - self.head - self.tail

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the rank's own tensor of the parameter."""
        return (self.numel,) if self.flat else self.lead + self.trail

    @property
    def is_whole(self) -> bool:
        return self.numel == self.view.numel

    def rects(self) -> list[Rect]:
        """At most three rectangles that cover the slab: a cut first row, whole rows, a cut last row."""
        rows, c0, c1 = self.rows, self.col0, self.col1
        if self.numel == 0:
            return []
        if rows == 1:
            return [Rect(0, 1, c0 + self.head, c1 - self.tail, 0)]
        out, first, last, offset = [], 0, rows, 0
        if self.head:
            out.append(Rect(0, 1, c0 + self.head, c1, 0))
            first, offset = 1, self.width - self.head
        if self.tail:
            last = rows - 1
        if first < last:
            out.append(Rect(first, last, c0, c1, offset))
        if self.tail:
            out.append(Rect(last, rows, c0, c1 - self.tail, offset + (last - first) * self.width))
        return out

    def row_pieces(self) -> Iterator[tuple[int, int, int]]:
        """(first stored row, first global row, number of rows) of each contiguous range of rows."""
        stored = 0
        for start, stop in self.row_ranges:
            if stop > start:
                yield stored, start, stop - start
            stored += stop - start

    def row_numbers(self, row0: int, row1: int) -> list[range]:
        """The global numbers of stored rows [row0, row1), in order."""
        out = []
        for stored, start, count in self.row_pieces():
            low, high = max(row0, stored), min(row1, stored + count)
            if low < high:
                out.append(range(start + low - stored, start + high - stored))
        return out

    def units(self, size: int) -> Range:
        """[first, stop) of the groups of ``size`` columns that the stored columns touch."""
        if self.col1 == self.col0:
            return self.col0 // size, self.col0 // size
        return self.col0 // size, -(-self.col1 // size)


def _row_ranges(lead: Sequence[int], ranges: Sequence[Range]) -> tuple[Range, ...]:
    """The product of ranges as contiguous ranges of row numbers, in row-major order."""
    if any(a >= b for a, b in ranges):
        return ()
    out = [(0, 1)]
    for dim, (a, b) in zip(lead, ranges, strict=True):
        if (a, b) == (0, dim):
            out = [(start * dim, stop * dim) for start, stop in out]
        else:
            out = [(r * dim + a, r * dim + b) for start, stop in out for r in range(start, stop)]
    return tuple(out)


def _window(trail: Sequence[int], ranges: Sequence[Range]) -> Range:
    """The column window of a product of ranges; ValueError if it has gaps."""
    if any(a >= b for a, b in ranges):
        return 0, 0
    start, stop = 0, 1
    for dim, (a, b) in zip(trail, ranges, strict=True):
        if stop - start > 1 and (a, b) != (0, dim):
            raise ValueError(
                f"columns {list(ranges)} of the trailing dimensions {tuple(trail)} are not one "
                "contiguous window: shard the first of them, or a leading dimension"
            )
        if stop - start == 1:
            start, stop = start * dim + a, start * dim + b
        else:
            start, stop = start * dim, stop * dim
    return start, stop


@dataclass(frozen=True)
class Piece:
    """Consecutive blocks of one rectangle: columns [col0, col1) are ``count`` blocks of ``width``."""

    col0: int
    col1: int
    block: int  # global number of the first block in its row
    count: int
    width: int
    cut: bool  # part of the block lies outside the rectangle


def block_pieces(col0: int, col1: int, cols: int, size: int) -> list[Piece]:
    """Columns [col0, col1) of rows of ``cols`` columns, split into a cut head, whole blocks and a
    tail (which is whole when it ends the row)."""
    out = []
    if col0 % size:
        stop = min(col1, (col0 // size + 1) * size)
        out.append(Piece(col0, stop, col0 // size, 1, stop - col0, True))
        col0 = stop
    count = max(0, (col1 - col0) // size)
    if count:
        out.append(Piece(col0, col0 + count * size, col0 // size, count, size, False))
        col0 += count * size
    if col0 < col1:
        out.append(Piece(col0, col1, col0 // size, 1, col1 - col0, col1 != cols))
    return out


@dataclass(frozen=True)
class Neighbours:
    """How the ranks of one process group divide a parameter; the same on all of them.

    ``kind`` is "rows" (each has whole row windows of its own), "cols" (``edges`` are the global
    column boundaries) or "run" (``edges`` are flat element boundaries).
    """

    kind: str
    edges: tuple[int, ...] = ()

    def cut_rows(self, view: MatrixView) -> list[int]:
        """Rows that lie on more than one rank (runs)."""
        assert self.kind == "run", self
        inner = [e for e in self.edges if 0 < e < view.numel and e % view.cols]
        return sorted({e // view.cols for e in inner})

    def cut_units(self, view: MatrixView, size: int) -> list[int]:
        """Groups of ``size`` columns that lie on more than one rank (column windows)."""
        assert self.kind == "cols", self
        return sorted({e // size for e in self.edges if 0 < e < view.cols and e % size})

    def cut_row_units(self, view: MatrixView, size: int) -> list[tuple[int, int]]:
        """(row, group of ``size`` columns) that lie on more than one rank (runs)."""
        assert self.kind == "run", self
        inner = {e for e in self.edges if 0 < e < view.numel}
        places = sorted((e // view.cols, e % view.cols) for e in inner)
        return sorted({(r, c // size) for r, c in places if c % size})
