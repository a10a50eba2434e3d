"""A rank's local tensors as rectangles of the canonical tensors, and what ranks share of one byte."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from shard4bit.checkpoint.pieces import Piece, Rect
from shard4bit.layout import Neighbours, Slab
from shard4bit.placement import Placed
from shard4bit.state import Moment, Part


def rectangles(key: str, slab: Slab, data: Tensor, part: Part, whole_units: bool) -> Iterator[Piece]:
    """The pieces of one local tensor, each of contiguous global rows.

    Rows, blocks and bytes that a cut divides are held by several ranks alike: with ``whole_units`` all of
    them give these, otherwise only the rank that has their first element.
    """
    view, unit = slab.view, part.unit
    if part.role in ("full", "units"):
        shape = (view.rows, -(-view.cols // unit))
        if 0 in shape:
            yield Piece(key, shape, Rect(0, shape[0], 0, shape[1]), data.new_empty(shape))
        elif part.role == "full":
            yield from _elements(key, slab, data, shape)
        else:
            yield from _units(key, slab, data, unit, shape, whole_units)
    elif part.role == "rows":
        skipped = 1 if slab.head and not whole_units else 0
        for stored, row, count in slab.row_pieces():
            if count > skipped:
                rect = Rect(row + skipped, row + count, 0, 1)
                rows = data.view(-1, 1)[stored + skipped : stored + count]
                yield Piece(key, (view.rows, 1), rect, rows)
    elif part.role == "cols":
        if slab.width:
            yield Piece(key, (1, view.cols), Rect(0, 1, slab.col0, slab.col1), data.view(1, -1))
    else:
        yield Piece(key, (1, 1), Rect(0, 1, 0, 1), data.view(1, 1))


def _split(slab: Slab) -> Iterator[tuple[Rect, int, int]]:
    """(global rectangle, first stored row, offset in the dense elements) of a slab's parts."""
    for part in slab.rects():
        for stored, row, count in slab.row_pieces():
            first, stop = max(part.row0, stored), min(part.row1, stored + count)
            if first < stop:
                rows = row + first - stored, row + stop - stored
                offset = part.offset + (first - part.row0) * part.width
                yield Rect(*rows, part.col0, part.col1), first, offset


def _elements(key: str, slab: Slab, data: Tensor, shape: tuple[int, int]) -> Iterator[Piece]:
    flat = data.view(-1)
    for rect, _, offset in _split(slab):
        values = flat[offset : offset + rect.area].view(rect.row1 - rect.row0, rect.col1 - rect.col0)
        yield Piece(key, shape, rect, values)


def _units(
    key: str, slab: Slab, data: Tensor, unit: int, shape: tuple[int, int], whole_units: bool
) -> Iterator[Piece]:
    stored0 = slab.units(unit)[0]
    for rect, row, _ in _split(slab):
        first, stop = rect.col0 // unit, -(-rect.col1 // unit)
        if rect.col0 % unit and not whole_units:
            first += 1
        if first < stop:
            count = rect.row1 - rect.row0
            matrix = data.view(slab.rows, -1)[row : row + count, first - stored0 : stop - stored0]
            yield Piece(key, shape, Rect(rect.row0, rect.row1, first, stop), matrix)


def completed(codes: Tensor, placed: Placed, unit: int) -> Tensor:
    """Codes whose bytes that a cut divides have both nibbles (a copy, if there are such bytes).
    Collective on the ranks that share them."""
    slab = placed.slab
    for group, neighbours in placed.neighbours:
        places = _shared_bytes(neighbours, slab, unit)
        if not places:
            continue
        matrix = codes.clone().view(slab.rows, codes.shape[-1])
        height = slab.rows if neighbours.kind == "cols" else 1
        shared = torch.zeros(len(places), height, dtype=torch.float64, device=codes.device)
        for i, place in enumerate(places):
            if place is not None:
                shared[i] = matrix[place].double()
        group.all_reduce(shared, maximum=False)  # the nibbles of other ranks are 0: the sum is their union
        for i, place in enumerate(places):
            if place is not None:
                matrix[place] = shared[i].to(torch.uint8)
        codes = matrix.view(codes.shape)
    return codes


def _shared_bytes(neighbours: Neighbours, slab: Slab, unit: int) -> list[tuple[slice, int] | None]:
    """Where this rank stores each byte of codes (stored rows, stored column) that a cut divides, in an
    order that all ranks of the group share; None for those of others."""
    first, stop = slab.units(unit)
    if neighbours.kind == "cols":
        cut = neighbours.cut_units(slab.view, unit)
        return [(slice(None), byte - first) if first <= byte < stop else None for byte in cut]
    if neighbours.kind == "rows":
        return []
    row0, row1 = slab.row_ranges[0] if slab.row_ranges else (0, 0)
    return [
        (slice(row - row0, row - row0 + 1), byte) if row0 <= row < row1 else None
        for row, byte in neighbours.cut_row_units(slab.view, unit)
    ]


def clear_others(moment: Moment) -> None:
    """Set nibbles that belong to other ranks to 0, after whole bytes were loaded."""
    slab = moment.slab
    if moment.quant.bits == 8 or slab.numel == 0:
        return
    codes = moment.matrix("codes")
    first = slab.units(2)[0]
    for rect in slab.rects():
        rows = codes[rect.row0 : rect.row1]
        if rect.col0 % 2:
            rows[:, rect.col0 // 2 - first] &= 0xF0
        if rect.col1 % 2:
            rows[:, rect.col1 // 2 - first] &= 0x0F
