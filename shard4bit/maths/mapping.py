"""Code tables and the mapping between normalized values and codes.

Source: Li, Chen, Zhu (arXiv 2309.01507), section 3 and appendix E; dynamic exponent (DE) after
Dettmers et al. (arXiv 2110.02861). Tables are computed exactly, in fractions, and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from shard4bit.spec import QuantSpec


@lru_cache(maxsize=16)
def table(mapping: str, bits: int, signed: bool) -> tuple[float, ...]:
    """The 2^bits values of a mapping, ascending, as float64."""
    if mapping == "linear":
        return tuple((i + 1) / 2**bits for i in range(2**bits))
    values = [Fraction(0), Fraction(1)]
    exponents = bits - 1
    for i in range(exponents):
        parts = 2**i if signed else 2 ** (i + 1)
        for k in range(parts):
            middle = Fraction(1, 10) + Fraction(9, 10) * Fraction(2 * k + 1, 2 * parts)
            value = middle * Fraction(10) ** (i - exponents + 1)
            values += [value, -value] if signed else [value]
    values.sort()
    assert len(values) == 2**bits
    if mapping == "de0":  # as lpmm: the zero is overwritten by its neighbour
        values[0] = values[1]
    return tuple(float(v) for v in values)


@lru_cache(maxsize=16)
def midpoints(mapping: str, bits: int, signed: bool) -> tuple[float, ...]:
    """The 2^bits - 1 decision thresholds: means of neighbours, in float64, rounded once to fp32."""
    t = torch.tensor(table(mapping, bits, signed), dtype=torch.float64)
    return tuple(((t[1:] + t[:-1]) / 2).float().tolist())


@dataclass(frozen=True)
class Codec:
    """A mapping's tables on one device.

    values: (2^bits,) float32. mids: (2^bits - 1,) float32.
    pairs: (256,) int64, the float32 pair (low nibble's value, high nibble's value) of a byte; 4 bits.
    base, threshold: (4096,) uint8 and float32 by the top 12 bits of a float32; None if some of these
    keys holds two midpoints (8 bits).
    """

    bits: int
    values: Tensor
    mids: Tensor
    pairs: Tensor | None
    base: Tensor | None
    threshold: Tensor | None


def codec(spec: QuantSpec, device: torch.device) -> Codec:
    """The tables of ``spec``, made once per device."""
    return _codec(spec.mapping, spec.bits, spec.signed, device)


@lru_cache(maxsize=64)
def _codec(mapping: str, bits: int, signed: bool, device: torch.device) -> Codec:
    values = torch.tensor(table(mapping, bits, signed), dtype=torch.float64).float()
    mids = torch.tensor(midpoints(mapping, bits, signed), dtype=torch.float32)
    pairs = None
    if bits == 4:
        byte = torch.arange(256)
        pairs = torch.stack([values[byte & 15], values[byte >> 4]], 1).contiguous()
        pairs = pairs.view(torch.int64).view(-1).to(device)
    base, threshold = _key_tables(mids)
    if base is not None and threshold is not None:
        base, threshold = base.to(device), threshold.to(device)
    return Codec(bits, values.to(device), mids.to(device), pairs, base, threshold)


def _key_tables(mids: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """``code = base[key] + (x > threshold[key])`` for key = the top 12 bits of x.

    Exact where no key's interval holds two midpoints. Quiet NaNs get code 0.
    """
    key = torch.arange(4096, dtype=torch.int32) << 20
    ends = torch.stack([key.view(torch.float32), (key | 0xFFFFF).view(torch.float32)])
    low, high = ends.amin(0), ends.amax(0)
    first, last = torch.bucketize(low, mids), torch.bucketize(high, mids)
    # the keys of Inf and NaN: only +Inf (first of its key) is above every midpoint
    odd = low.isnan() | high.isnan()
    at_inf = ends[0] == float("inf")
    first = torch.where(odd, torch.where(at_inf, mids.numel(), 0), first)
    last = torch.where(odd, first, last)
    if int((last - first).max()) > 1:
        return None, None
    inf = torch.tensor(float("inf"))
    return first.to(torch.uint8), torch.where(last > first, mids[first.clamp(max=len(mids) - 1)], inf)


def encode(x: Tensor, table: Codec) -> Tensor:
    """Codes (uint8) of normalized values (float32, any shape): the number of midpoints below x.

    A value on a midpoint gets the lower code, NaN gets code 0.
    """
    if table.base is None or table.threshold is None:
        x = torch.where(x.isnan(), -torch.inf, x)
        return torch.bucketize(x, table.mids, out_int32=True).to(torch.uint8)
    flat = x.contiguous().view(-1)
    key = (flat.view(torch.int32) >> 20).bitwise_and_(0xFFF)
    codes = torch.index_select(table.base, 0, key)
    codes.add_((flat > torch.index_select(table.threshold, 0, key)).view(torch.uint8))
    return codes.view(x.shape)


def decode(codes: Tensor, table: Codec) -> Tensor:
    """Values (float32) of unpacked codes (uint8, any shape)."""
    return torch.index_select(table.values, 0, codes.reshape(-1).int()).view(codes.shape)
