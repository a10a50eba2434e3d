"""Codes in bytes. 4 bits: column 2j is the low nibble of byte j of its row, column 2j+1 the high one;
8 bits: a byte a column. A row always starts a byte."""

from __future__ import annotations

import torch
from torch import Tensor

from shard4bit.maths.mapping import Codec, decode


def packed_window(col0: int, col1: int, bits: int) -> tuple[int, int]:
    """[first, stop) of the bytes of a row that hold columns [col0, col1)."""
    per_byte = 8 // bits
    return (col0 // per_byte, -(-col1 // per_byte)) if col1 > col0 else (0, 0)


def unpack_values(codes: Tensor, byte0: int, col0: int, col1: int, table: Codec) -> Tensor:
    """Table values (rows, col1 - col0) float32 of columns [col0, col1), freshly allocated.

    codes: (rows, bytes) uint8, whose first byte is byte ``byte0`` of the row.
    """
    first, stop = packed_window(col0, col1, table.bits)
    window = codes[:, first - byte0 : stop - byte0]
    if table.pairs is None:
        return decode(window, table)
    flat = torch.index_select(table.pairs, 0, window.reshape(-1).int())
    values = flat.view(torch.float32).view(window.shape[0], 2 * window.shape[1])
    skip = col0 % 2
    return values[:, skip : skip + col1 - col0]


def unpack_codes(codes: Tensor, byte0: int, col0: int, col1: int, bits: int) -> Tensor:
    """Codes (rows, col1 - col0) uint8, one an element, of columns [col0, col1)."""
    first, stop = packed_window(col0, col1, bits)
    window = codes[:, first - byte0 : stop - byte0]
    if bits == 8:
        return window
    both = torch.stack([window & 15, window >> 4], -1).view(window.shape[0], 2 * window.shape[1])
    skip = col0 % 2
    return both[:, skip : skip + col1 - col0]


def pack_codes(codes: Tensor, byte0: int, col0: int, col1: int, new: Tensor, bits: int) -> None:
    """Write ``new`` (rows, col1 - col0) uint8 into ``codes`` in place.

    The other nibble of a byte at a cut belongs to another rank and gets 0.
    """
    if new.numel() == 0:
        return
    first, stop = packed_window(col0, col1, bits)
    window = codes[:, first - byte0 : stop - byte0]
    if bits == 8:
        window.copy_(new)
        return
    lead, trail = col0 % 2, col1 % 2
    if lead or trail:
        padded = new.new_zeros(new.shape[0], lead + new.shape[1] + trail)
        padded[:, lead : lead + new.shape[1]] = new
        new = padded
    pairs = new.view(new.shape[0], -1, 2)
    torch.bitwise_or(pairs[..., 0], pairs[..., 1] << 4, out=window)
