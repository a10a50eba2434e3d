"""Normalization statistics: maxima over blocks, rows, columns or a tensor, and their reciprocals.

A statistic below 2^-126 (the smallest normal fp32) is stored as 0, so that a reciprocal never
overflows; one over data with a NaN is the canonical NaN, so that it survives an integer MAX.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shard4bit.layout import Piece

TINY = 2.0**-126
NAN = float("nan")  # torch writes it as 0x7fc00000


def settle(stat: Tensor) -> Tensor:
    """A maximum as it is stored, in place: tiny becomes 0, any NaN the canonical one."""
    stat.masked_fill_(stat < TINY, 0.0)
    return stat.masked_fill_(stat.isnan(), NAN)


def block_max(x: Tensor, piece: Piece, col0: int) -> Tensor:
    """Largest magnitude (rows, piece.count) of each block of ``x`` (rows, columns from col0)."""
    window = x[:, piece.col0 - col0 : piece.col1 - col0]
    return window.unflatten(1, (piece.count, piece.width)).abs().amax(-1)


def scale_blocks(x: Tensor, factors: Tensor, pieces: list[Piece], col0: int, block0: int) -> Tensor:
    """Multiply each block of ``x`` (rows, columns) by its factor (rows, blocks from block0), in place."""
    for piece in pieces:
        window = x[:, piece.col0 - col0 : piece.col1 - col0].unflatten(1, (piece.count, piece.width))
        first = piece.block - block0
        window.mul_(factors[:, first : first + piece.count, None])
    return x


def inverse(scale: Tensor) -> Tensor:
    """1/scale, one rounding; NaN for a zero scale, which makes every code of that scale 0.

    (Where a scale is 0 the data are zeros; their code is 0 by definition. NaN survives ``maximum``,
    so the reciprocal of min(row, column) can be taken as the maximum of two reciprocals.)
    """
    return torch.where(scale == 0, NAN, torch.ones_like(scale).div_(scale))
