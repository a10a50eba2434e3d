"""Stochastic rounding of moments under a linear map: a value between two entries goes to the upper one with
the probability that makes the mean exact. What would round back to the same entry for ever moves on average.

The random numbers are a function of the row and column in the whole parameter and of the step (a generator by
counter, as those of Salmon et al., SC 2011, of 32 bits): the same for every cut, for the kernels and for a
resumed run, with nothing to store. cuda/kernels/codes.cuh does the same, operation by operation.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

LANE = 8  # columns that share one hash
STEP, ROW, COLUMNS = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35  # odd: a counter from (step, row, column // LANE)
MIX = ((16, 0x7FEB352D), (15, 0x846CA68B))  # rounds: shift, factor (C. Wellons' lowbias32), then shift 16
NEXT = 0x915F77F5  # from column to column (Steele and Vigna 2022: a good multiplier modulo 2^32)
BITS = 0x7FFF00  # of the mantissa that are drawn: with fewer than 23, 16 y + draw stays below 18
_ALL, _ONE = 0xFFFFFFFF, 0x3F800000


def draws(rows: Tensor, col0: int, col1: int, step: int) -> Tensor:
    """Random numbers in [1, 2), multiples of 2^-15, for columns [col0, col1) of some rows in one step.

    rows: (n,) int64, row numbers in the whole parameter. Returns (n, col1 - col0) float32 on their device.
    """
    first = col0 // LANE
    lanes = torch.arange(first, -(-col1 // LANE), dtype=torch.int64, device=rows.device)
    x = (rows[:, None] * ROW).add(lanes.mul_(COLUMNS).add_(step * STEP)).bitwise_and_(_ALL)
    for shift, factor in MIX:
        x.bitwise_xor_(x >> shift).mul_(factor).bitwise_and_(_ALL)
    x.bitwise_xor_(x >> 16)
    words = x.int()[:, :, None] * _powers(rows.device)  # modulo 2^32, as int32 multiplies
    words.bitwise_and_(BITS).bitwise_or_(_ONE)
    start = first * LANE
    return words.view(torch.float32).view(len(rows), -1)[:, col0 - start : col1 - start]


@lru_cache(maxsize=16)
def _powers(device: torch.device) -> Tensor:
    """Of NEXT, int32 (LANE,)."""
    powers = [pow(NEXT, k, 1 << 32) for k in range(LANE)]
    return torch.tensor(powers, dtype=torch.int64, device=device).int()


def encode_drawn(y: Tensor, drawn: Tensor, bits: int) -> Tensor:
    """Codes (uint8) of normalized values under the linear map without zero: for y = (k + p) / 2^bits, k >= 1,
    entry k with probability p, else entry k - 1; below the first entry code 0. NaN gets code 0.

    y: float32 in [0, 1 + 2^-23], overwritten; drawn: of the same shape, from :func:`draws`.
    """
    codes = y.mul_(float(1 << bits)).add_(drawn).floor_().sub_(2.0)
    return codes.nan_to_num_(0.0).clamp_(0.0, float((1 << bits) - 1)).to(torch.uint8)
