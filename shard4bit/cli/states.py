"""What AdamW4bit keeps for a rank's part of a parameter, in bytes: states, and beside them the CUDA kernels'
tables and workspace and the vectors that ranks reduce.

Integers alone. cuda/plan.py, cuda/tables.py and comm.py make the real things; tests compare with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import prod
from types import MappingProxyType
from typing import Any

from shard4bit.comm import make_link
from shard4bit.layout import Neighbours, Slab
from shard4bit.spec import Factored, Full, MomentSpec, QuantSpec, is_quantized, parse_spec
from shard4bit.state import parts

#: first and second moment as AdamW4bit's options; None: torch.optim.AdamW with fp32 states
Moments = tuple[str, str] | None

TILE, FLAT, VECTOR, BLOCK = 256, 16384, 4096, 128  # rows and columns, elements, elements, columns of a tile
RECORD, LIVE, ENTRY = 168, 24 + 52, 16  # bytes: of a slab, of its addresses and scalars, of a tile
CODES = 256  # bytes: the 4-bit map
#: device tensors in the order in which they are made: vectors to reduce, workspace, tables
TENSORS = (
    *("reduced maxima", "reduced sums", "codes"),
    *("zeroed", "parts", "sums", "shared"),
    *("measure", "apply", "vectors", "means", "totals", "slabs", "live"),
)


@cache
def specs(moments: Moments, shape: tuple[int, ...]) -> tuple[MomentSpec, MomentSpec]:
    """The specs of a parameter's moments as AdamW4bit takes them; None: both fp32."""
    if moments is None or not is_quantized(shape):
        return Full(), Full()
    first, second = moments
    return (
        parse_spec(first, signed=True, argument="first_moment"),
        parse_spec(second, signed=False, argument="second_moment"),
    )


@cache
def state_tensors(slab: Slab, moments: Moments) -> tuple[int, ...]:
    """Bytes of each tensor of both moments of a rank's part of a parameter (the step count lies on the
    host), as they are made."""
    return tuple(
        prod(part.local_shape(slab)) * part.dtype.itemsize
        for spec in specs(moments, slab.view.shape)
        for part in parts(spec)
    )


def state_bytes(slab: Slab, moments: Moments) -> int:
    """Bytes of both moments of a rank's part of a parameter."""
    return sum(state_tensors(slab, moments))


# ---- beside the states --------------------------------------------------------------------------------


def once(moments: Moments, *, shared: bool) -> dict[str, int]:
    """Bytes by ``TENSORS`` that do not depend on the parameters. shared: other ranks hold parts of some."""
    out = dict.fromkeys(TENSORS, 0)
    if moments is None:
        return out
    out["codes"] = CODES
    for spec in specs(moments, (1 << 20, 2)):
        if isinstance(spec, QuantSpec) and spec.bits == 8:  # the reference's map: values and midpoints
            out["codes"] += 4 * (2**9 - 1)
    out["reduced maxima"] = 4 * shared  # whether a rank failed
    return out


@cache
def kept(slab: Slab, near: Neighbours | None, moments: Moments) -> Mapping[str, int]:
    """Bytes by ``TENSORS`` that a rank keeps for its part of a parameter, those of states not counted.

    near: how the parameter is divided between ranks; None: this one has all of it.
    moments: None, B128/DE with rank1, block or factored, or 8 bits.
    """
    out = dict.fromkeys(TENSORS, 0)
    if moments is None:
        return MappingProxyType(out)
    both = specs(moments, slab.view.shape)
    cut: tuple[int, ...] = ()
    if near:  # what is reduced of a run is the same on all ranks
        alike = Slab.run(slab.view.shape, 0, 0) if near.kind == "run" else slab
        out["reduced maxima"], out["reduced sums"], cut = _reduced(alike, near, moments)
    absmax = [4 * slab.rows * _units(slab, both[i]) for i in cut]  # of the new moments
    if isinstance(both[0], QuantSpec) and both[0].bits == 8:  # served by the torch reference
        out["shared"] = sum(absmax)
        return MappingProxyType(out)
    out["slabs"], out["live"] = RECORD, LIVE
    if isinstance(both[0], Full):
        out["apply"] = ENTRY * -(-slab.numel // FLAT)
    elif slab.numel or near:
        _of_matrix(out, slab, both[1])
        out["shared"] = sum(16 * -(-size // 16) for size in absmax)
    return MappingProxyType(out)


def _of_matrix(out: dict[str, int], slab: Slab, second: MomentSpec) -> None:
    """Tiles and statistics of a matrix with quantized moments. (Four elements are the least of workspace.)"""
    rows, width = slab.rows, slab.width
    groups, heights = -(-slab.col1 // TILE) - slab.col0 // TILE, -(-rows // TILE)
    tiles = groups * heights if slab.numel else 0
    out["apply"] = ENTRY * tiles
    out["measure"] = ENTRY * len(_cut_tiles(slab))
    if isinstance(second, Factored):
        out["sums"] = 8 * (_fours(rows) + _fours(width) + 4)
        out["parts"] = 4 * (_fours(groups * rows) + _fours(heights * width))
    elif isinstance(second, QuantSpec) and second.norm == "rank1":
        out["zeroed"] = 4 * (_fours(rows) + _fours(width))
    else:
        return
    out["measure"] += ENTRY * tiles
    out["vectors"] = ENTRY * (-(-rows // VECTOR) + -(-width // VECTOR))
    out["means"], out["totals"] = out["vectors"] + ENTRY, 4


def _fours(count: int) -> int:
    return -(-count // 4) * 4


def _units(slab: Slab, spec: MomentSpec) -> int:
    """Blocks in a row."""
    assert isinstance(spec, QuantSpec), spec
    first, stop = slab.units(spec.block_size)
    return stop - first


@cache
def _reduced(slab: Slab, near: Neighbours, moments: Moments) -> tuple[int, int, tuple[int, ...]]:
    """Bytes of the maxima (with a flag: is there a gradient?) and of the sums that ranks reduce for a
    parameter, and which of its moments have blocks on more than one rank."""
    nobody: Any = None  # the group itself is not looked at
    shares = make_link(nobody, near, slab, specs(moments, slab.view.shape)).shares
    maxima = 4 + 4 * sum(s.length for s in shares if not s.is_sum)
    sums = 8 * sum(s.length for s in shares if s.is_sum)
    return maxima, sums, tuple(sorted({s.moment for s in shares if s.stat == "absmax"}))


def _cut_tiles(slab: Slab) -> set[tuple[int, int, int]]:
    """(first row, rows, block) of the tiles of blocks that go on beyond the slab."""
    return {
        (row0, min(TILE, rect.row1 - row0), block)
        for rect in slab.rects()
        for edge, block in ((rect.col0, rect.col0 // BLOCK), (rect.col1, (rect.col1 - 1) // BLOCK))
        if edge % BLOCK and edge != slab.view.cols
        for row0 in range(rect.row0, rect.row1, TILE)
    }
