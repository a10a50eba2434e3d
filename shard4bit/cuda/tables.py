"""The tables that a launch reads, as numpy arrays: mirrors of the structs in kernels/slabs.cuh, and the
cut of slabs into tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from shard4bit.layout import Slab
from shard4bit.maths.mapping import midpoints, table

LANE_COLS, TILE_COLS, TILE_ROWS, BLOCK, FLAT_TILE = 8, 256, 256, 128, 16384
VECTOR_TILE = 4096  # elements of a tile of a row or column vector
QUANTIZED, FP32_MOMENTS = 0, 1
ROWS, COLS, MEAN = 0, 1, 2

_POINTERS = (
    *("m_codes", "m_absmax", "v_codes", "v_row", "v_col", "v_mean", "new_m_absmax", "new_v_absmax"),
    *("new_row", "new_col", "new_sum", "part_row", "part_col", "numbers"),
)
SLAB = np.dtype(
    [(name, np.uint64) for name in _POINTERS]
    + [(name, np.int64) for name in ("numel", "head", "tail", "all_rows")]
    + [(name, np.int32) for name in ("rows", "col0", "col1", "cols", "kind")]
    + [("row0", np.uint32)]
)
LIVE = np.dtype([("param", np.uint64), ("grad", np.uint64), ("hyper", np.int32), ("active", np.int32)])
TILE = np.dtype([(name, np.int32) for name in ("slab", "row0", "rows", "group")])
HYPER = np.dtype(
    [
        ("scalars", np.float32, 8),
        ("maximize", np.int32),
        ("first", np.int32),
        ("tame", np.int32),
        ("ahead", np.float32),
        ("draw", np.uint32),
    ]
)
RECIPE = np.dtype(
    [(name, np.float64) for name in ("lr", "ahead", "a", "b", "c", "d")]
    + [(name, np.uint64) for name in ("lr_at", "count")]
    + [(name, np.int32) for name in ("wide", "maximize", "stochastic", "pad")]
)
BIN_SCALE = 63


def code_tables() -> np.ndarray:
    """``Tables`` of codes.cuh as bytes: values, midpoints and bins of the signed 4-bit map."""
    values = np.array(table("de", 4, True), dtype=np.float32)
    mids = np.array([*midpoints("de", 4, True), np.inf], dtype=np.float32)
    bins = np.zeros(128, dtype=np.uint8)
    for number in range(-64, 64):
        low, high = number / BIN_SCALE, (number + 1) / BIN_SCALE
        inside = (mids >= low) & (mids < high)
        assert inside.sum() <= 1, number
        bins[number % 128] = 4 * (mids < low).sum()
    return np.concatenate([values.view(np.uint8), mids.view(np.uint8), bins])


def matrix_tiles(number: int, slab: Slab) -> np.ndarray:
    """Tiles of at most TILE_ROWS rows and TILE_COLS columns that cover a slab's stored matrix."""
    if slab.numel == 0:
        return np.zeros(0, TILE)
    first, stop = slab.col0 // TILE_COLS, -(-slab.col1 // TILE_COLS)
    row0 = np.arange(0, slab.rows, TILE_ROWS, dtype=np.int32)
    groups = np.arange(first, stop, dtype=np.int32)
    out = np.zeros(len(row0) * len(groups), TILE)
    out["slab"] = number
    out["row0"] = np.repeat(row0, len(groups))
    out["rows"] = np.minimum(slab.rows - out["row0"], TILE_ROWS)
    out["group"] = np.tile(groups, len(row0))
    return out


def flat_tiles(number: int, slab: Slab) -> np.ndarray:
    """Tiles of FLAT_TILE elements of a slab that keeps fp32 moments; row0 counts tiles."""
    out = np.zeros(-(-slab.numel // FLAT_TILE), TILE)
    out["slab"], out["rows"] = number, 1
    out["row0"] = np.arange(len(out), dtype=np.int32)
    return out


def vector_tiles(number: int, count: int, group: int) -> np.ndarray:
    """Tiles of a slab's row or column vector of ``count`` elements."""
    out = np.zeros(-(-count // VECTOR_TILE), TILE)
    out["slab"], out["group"] = number, group
    out["row0"] = np.arange(len(out), dtype=np.int32) * VECTOR_TILE
    out["rows"] = np.minimum(count - out["row0"], VECTOR_TILE)
    return out


def shared_block_tiles(number: int, slab: Slab) -> np.ndarray:
    """Tiles of the blocks whose columns lie partly on other ranks."""
    places = sorted(set(_cut_blocks(slab)))
    out = np.zeros(len(places), TILE)
    for tile, (row0, rows, block) in zip(out, places, strict=True):
        tile["slab"], tile["row0"], tile["rows"], tile["group"] = number, row0, rows, -1 - block
    return out


def _cut_blocks(slab: Slab) -> Iterator[tuple[int, int, int]]:
    """(first row, rows, block)."""
    cols = slab.view.cols
    for rect in slab.rects():
        for edge, block in ((rect.col0, rect.col0 // BLOCK), (rect.col1, (rect.col1 - 1) // BLOCK)):
            if edge % BLOCK and edge != cols:
                for row0 in range(rect.row0, rect.row1, TILE_ROWS):
                    yield row0, min(TILE_ROWS, rect.row1 - row0), block


def joined(tiles: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, TILE), *tiles])
