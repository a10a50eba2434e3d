"""What a rank holds of the canonical tensors, and whether rectangles tile a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
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
SIZES = {name: dtype.itemsize for dtype, name in DTYPES.items()}


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

    @property
    def shape(self) -> tuple[int, int]:
        return self.row1 - self.row0, self.col1 - self.col0

    def meet(self, other: Rect) -> Rect | None:
        """The common part, or None."""
        row0, row1 = max(self.row0, other.row0), min(self.row1, other.row1)
        col0, col1 = max(self.col0, other.col0), min(self.col1, other.col1)
        return Rect(row0, row1, col0, col1) if row0 < row1 and col0 < col1 else None

    def cut(self, values: Tensor, part: Rect) -> Tensor:
        """The view ``part`` of this rectangle's values."""
        rows = values[part.row0 - self.row0 : part.row1 - self.row0]
        return rows[:, part.col0 - self.col0 : part.col1 - self.col0]


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
        assert tuple(piece.data.shape) == piece.rect.shape, piece
        assert (piece.key, piece.rect) not in seen, piece.key
        seen.add((piece.key, piece.rect))


def check_cover(key: str, shape: tuple[int, int], rects: np.ndarray) -> None:
    """Raise CheckpointError unless rectangles (n, 4: row0, row1, col0, col1) tile (rows, columns) without
    gap or overlap. O(n log n).

    How often each element is covered is determined by the sum of the rectangles' signed corners: it is
    1 within the tensor and 0 outside if and only if that sum is the tensor's own four corners.
    """
    if len(rects) <= 4 and _few_cover(shape, [Rect(*r) for r in rects.tolist()]):
        return
    row0, row1, col0, col1 = rects.T
    wrong = (row0 < 0) | (col0 < 0) | (row1 > shape[0]) | (col1 > shape[1]) | (row0 >= row1) | (col0 >= col1)
    if wrong.any():
        rect = Rect(*rects[wrong][0].tolist())
        raise CheckpointError(f"{key}: rectangle {rect} is empty or outside of shape {shape}")
    rows, cols = shape
    whole = np.array([[0, rows, 0, cols]] if rows * cols else np.zeros((0, 4)), np.int64)
    parts = np.concatenate([rects, whole])
    sign = np.concatenate([np.ones(len(rects), np.int64), -np.ones(len(whole), np.int64)])
    r = np.concatenate([parts[:, 0], parts[:, 1], parts[:, 0], parts[:, 1]])
    c = np.concatenate([parts[:, 2], parts[:, 3], parts[:, 3], parts[:, 2]])
    weight = np.concatenate([sign, sign, -sign, -sign])
    if len(r) == 0:
        return
    order = np.lexsort((c, r))
    r, c, weight = r[order], c[order], weight[order]
    first = np.concatenate([[True], (np.diff(r) != 0) | (np.diff(c) != 0)])
    if np.add.reduceat(weight, np.flatnonzero(first)).any():
        _explain(key, shape, rects)


def _few_cover(shape: tuple[int, int], rects: list[Rect]) -> bool:
    """The same for a handful, without numpy's overhead."""
    whole = Rect(0, shape[0], 0, shape[1])
    apart = not any(a.meet(b) for i, a in enumerate(rects) for b in rects[:i])
    inside = all(min(r.shape) > 0 and r.meet(whole) == r for r in rects)
    return apart and inside and sum(r.area for r in rects) == whole.area


def _explain(key: str, shape: tuple[int, int], rects: np.ndarray) -> None:
    area = sum((r1 - r0) * (c1 - c0) for r0, r1, c0, c1 in rects.tolist())
    if area < shape[0] * shape[1]:
        raise CheckpointError(f"{key}: at most {area} of {shape[0] * shape[1]} elements are present")
    several = [Rect(*r) for r in sorted(rects.tolist())[:1000]]
    for a, b in zip(several, several[1:], strict=False):
        if a.meet(b):
            raise CheckpointError(f"{key}: rectangles {a} and {b} overlap")
    raise CheckpointError(f"{key}: rectangles overlap within shape {shape}")
