"""What a rank holds of the canonical tensors, and who of several holders counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shard4bit.errors import CheckpointError

#: safetensors' names of the dtypes that a checkpoint may hold
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, order=True)
class Rect:
    """Rows [row0, row1) x columns [col0, col1) of a tensor seen as a matrix."""

    row0: int
    row1: int
    col0: int
    col1: int

    @property
    def area(self) -> int:
        return (self.row1 - self.row0) * (self.col1 - self.col0)

    def meet(self, other: Rect) -> Rect | None:
        """The common part, or None."""
        row0, row1 = max(self.row0, other.row0), min(self.row1, other.row1)
        col0, col1 = max(self.col0, other.col0), min(self.col1, other.col1)
        return Rect(row0, row1, col0, col1) if row0 < row1 and col0 < col1 else None


@dataclass(frozen=True)
class Piece:
    """One rectangle of one canonical tensor, in this rank's memory.

    key: the tensor's name. shape: the whole tensor's (rows, columns).
    data: (rows, columns) of the rectangle, a view of the live tensor.
    """

    key: str
    shape: tuple[int, int]
    rect: Rect
    data: Tensor

    @property
    def dtype(self) -> str:
        return DTYPES[self.data.dtype]


def check_unique(pieces: Sequence[Piece]) -> None:
    seen: set[tuple[str, Rect]] = set()
    for piece in pieces:
        assert piece.data.shape == (
            piece.rect.row1 - piece.rect.row0,
            piece.rect.col1 - piece.rect.col0,
        ), piece
        assert (piece.key, piece.rect) not in seen, piece.key
        seen.add((piece.key, piece.rect))


#: a tensor as one rank announces it: key -> (dtype, shape, rectangles)
Holding = dict[str, tuple[str, tuple[int, int], list[Rect]]]


def holding(pieces: Sequence[Piece]) -> Holding:
    out: Holding = {}
    for piece in pieces:
        out.setdefault(piece.key, (piece.dtype, piece.shape, []))[2].append(piece.rect)
    return out


def owned(holdings: Sequence[Holding], rank: int) -> set[tuple[str, Rect]]:
    """The rectangles that ``rank`` writes: of equal ones on several ranks, the lowest rank's.

    Raises CheckpointError if ranks disagree about a tensor or if a tensor is not covered exactly.
    """
    owners: dict[str, dict[Rect, int]] = {}
    kinds: dict[str, tuple[str, tuple[int, int]]] = {}
    for holder, held in enumerate(holdings):
        for key, (dtype, shape, rects) in held.items():
            if kinds.setdefault(key, (dtype, shape)) != (dtype, shape):
                raise CheckpointError(
                    f"rank {holder} has {key} as {dtype} {shape}, another rank as {kinds[key]}: all "
                    "ranks must hold the same model"
                )
            for rect in rects:
                owners.setdefault(key, {}).setdefault(rect, holder)
    for key, by_rect in owners.items():
        check_cover(key, kinds[key][1], list(by_rect))
    return {(key, r) for key, by_rect in owners.items() for r, o in by_rect.items() if o == rank}


def check_cover(key: str, shape: tuple[int, int], rects: Sequence[Rect]) -> None:
    """Raise CheckpointError unless the rectangles tile (rows, columns) without gap or overlap."""
    area = sum(r.area for r in rects)
    overlap = next(_overlaps(rects), None)
    if overlap is not None:
        raise CheckpointError(f"{key}: rectangles {overlap[0]} and {overlap[1]} overlap")
    if area != shape[0] * shape[1]:
        raise CheckpointError(f"{key}: {area} of {shape[0] * shape[1]} elements are present")
    for r in rects:
        if r.row0 < 0 or r.col0 < 0 or r.row1 > shape[0] or r.col1 > shape[1]:
            raise CheckpointError(f"{key}: rectangle {r} is outside of shape {shape}")


def _overlaps(rects: Sequence[Rect]) -> Iterator[tuple[Rect, Rect]]:
    """Pairs that overlap, by a sweep over rows."""
    active: list[Rect] = []
    for rect in sorted(r for r in rects if r.area):
        active = [a for a in active if a.row1 > rect.row0]
        yield from ((a, rect) for a in active if a.meet(rect))
        active.append(rect)
