"""The host's half of the kernels: tables laid out as C lays out its structs, tiles that cover every element
once, and the tables of codes."""

from __future__ import annotations

from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shard4bit.cuda import tables
from shard4bit.cuda.source import HEADERS, _joined
from shard4bit.layout import Slab
from shard4bit.maths.mapping import codec, encode, midpoints, table
from shard4bit.spec import QuantSpec
from tests.cuda.emulator import Module, available

needs_compiler = pytest.mark.skipif(not available(), reason="the emulator needs g++")
QUICK = settings(max_examples=200, deadline=None)

# C's names of the fields of numpy's dtypes, where they differ.
HYPER = {"scalars": "a"}
PROBE = """
extern "C" __global__ void probe(u64* out) {
  u64 found[] = {%s};
  for (u64 i = 0; i < sizeof(found) / 8; ++i) out[i] = found[i];
}
extern "C" __global__ void constants(i32* out) {
  i32 found[] = {LANE_COLS, TILE_COLS, TILE_ROWS, BLOCK, FLAT_TILE, QUANTIZED, FP32_MOMENTS, (i32)BIN_SCALE};
  for (u64 i = 0; i < sizeof(found) / 4; ++i) out[i] = found[i];
}
extern "C" __global__ void encode(const Tables* tables, const float* y, u32* out_signed, u32* out_linear,
                                  u32 count) {
  u32 at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= count) return;
  float x[8];
  for (i32 k = 0; k < 8; ++k) x[k] = y[8 * at + k];
  u32 word = 0;
  for (i32 k = 0; k < 8; ++k) word = add_signed(*tables, x[k], k, word);
  out_signed[at] = word;
  out_linear[at] = encode_linear8(x, [](i32) { return 1.0f; });
}
extern "C" __global__ void decode(const Tables* tables, float* of_signed, float* of_linear) {
  u32 word = threadIdx.x;
  for (i32 byte = 0; byte < 4; ++byte) {
    float x[8];
    signed_values8(*tables, word << (8 * byte), x);
    for (i32 k = 0; k < 2; ++k) of_signed[8 * word + 2 * byte + k] = x[2 * byte + k];
    linear_values8(word << (8 * byte), x);
    for (i32 k = 0; k < 2; ++k) of_linear[8 * word + 2 * byte + k] = x[2 * byte + k];
  }
}
extern "C" __global__ void encode_blocks(const Tables* tables, const float* x, const float* absmax,
                                         u32* out, u32 count) {
  u32 at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at < count) out[at] = encode_signed8(*tables, x + 8 * at, absmax[at], inverse(absmax[at]));
}
"""


def offsets(name: str, dtype: np.dtype, other: dict[str, str] | None = None) -> list[str]:
    """sizeof of a struct and offsetof of each field that numpy has, in C."""
    fields = [(other or {}).get(f, f) for f in dtype.names or ()]
    return [f"sizeof({name})", *(f"__builtin_offsetof({name}, {f})" for f in fields)]


@cache
def probe() -> Module:
    asked = [
        *offsets("Slab", tables.SLAB),
        *offsets("Live", tables.LIVE),
        *offsets("Tile", tables.TILE),
        *offsets("Hyper", tables.HYPER, HYPER),
        "sizeof(Tables)",
        *(f"__builtin_offsetof(Tables, {f})" for f in ("values", "mids", "bins")),
    ]
    return Module(_joined(*HEADERS) + PROBE % ", ".join(asked))


# ---- structs ----


@needs_compiler
def test_structs_are_laid_out_as_in_c() -> None:
    expected: list[int] = []
    for dtype in (tables.SLAB, tables.LIVE, tables.TILE, tables.HYPER):
        assert dtype.fields is not None
        expected += [dtype.itemsize, *(offset for _, offset in dtype.fields.values())]
    expected += [len(tables.code_tables()), 0, 64, 128]
    found = np.zeros(len(expected), np.uint64)
    probe().get_function("probe")(1, 1, (found,))
    assert found.tolist() == expected


@needs_compiler
def test_constants() -> None:
    t = tables
    expected = [t.LANE_COLS, t.TILE_COLS, t.TILE_ROWS, t.BLOCK, t.FLAT_TILE, t.QUANTIZED, t.FP32_MOMENTS]
    found = np.zeros(8, np.int32)
    probe().get_function("constants")(1, 1, (found,))
    assert found.tolist() == [*expected, t.BIN_SCALE]


# ---- tiles ----


@st.composite
def slabs(draw) -> Slab:
    rows = draw(st.one_of(st.integers(1, 20), st.integers(200, 800)))
    cols = draw(st.one_of(st.integers(1, 20), st.sampled_from([128, 256, 257, 600]), st.integers(1, 900)))
    if draw(st.booleans()):
        start, stop = sorted(draw(st.tuples(*2 * [st.integers(0, rows * cols)])))
        return Slab.run((rows, cols), start, stop)
    cuts = [sorted(draw(st.tuples(*2 * [st.integers(0, n)]))) for n in (rows, cols)]
    return Slab.box((rows, cols), [(a, b) for a, b in cuts])


@QUICK
@given(slab=slabs(), number=st.integers(0, 1000))
def test_matrix_tiles_cover_the_stored_matrix_once(slab: Slab, number: int) -> None:
    seen = np.zeros((slab.rows, slab.width), int)
    for tile in tables.matrix_tiles(number, slab):
        assert tile["slab"] == number and tile["row0"] % tables.TILE_ROWS == 0
        assert 1 <= tile["rows"] <= tables.TILE_ROWS and tile["row0"] + tile["rows"] <= slab.rows
        low = max(slab.col0, int(tile["group"]) * tables.TILE_COLS) - slab.col0
        high = min(slab.col1, (int(tile["group"]) + 1) * tables.TILE_COLS) - slab.col0
        assert low < high
        seen[tile["row0"] : tile["row0"] + tile["rows"], low:high] += 1
    assert slab.numel == 0 or (seen == 1).all()


@QUICK
@given(numel=st.integers(0, 100_000), count=st.integers(0, 20_000))
def test_tiles_of_vectors(numel: int, count: int) -> None:
    slab = Slab.run((1, 100_000), 0, numel)
    flat = tables.flat_tiles(3, slab)
    assert flat["row0"].tolist() == list(range(-(-numel // tables.FLAT_TILE)))
    assert set(flat["slab"].tolist()) <= {3}
    seen = np.zeros(count, int)
    for tile in tables.vector_tiles(3, count, tables.COLS):
        assert (tile["slab"], tile["group"]) == (3, tables.COLS) and tile["row0"] + tile["rows"] <= count
        seen[tile["row0"] : tile["row0"] + tile["rows"]] += 1
    assert (seen == 1).all()


@QUICK
@given(slab=slabs())
def test_tiles_of_shared_blocks(slab: Slab) -> None:
    """Every block of a row that holds elements of ours and of others, once, and no other."""
    ours = np.zeros((slab.rows, slab.view.cols), bool)
    for rect in slab.rects():
        ours[rect.row0 : rect.row1, rect.col0 : rect.col1] = True
    expected = Counter()
    for first in range(0, slab.view.cols, tables.BLOCK):
        block = ours[:, first : first + tables.BLOCK]
        cut = block.any(1) & ~block.all(1)
        expected.update((int(row), first // tables.BLOCK) for row in np.nonzero(cut)[0])
    found = Counter()
    for tile in tables.shared_block_tiles(5, slab):
        assert tile["slab"] == 5 and 1 <= tile["rows"] <= tables.TILE_ROWS
        rows = range(tile["row0"], tile["row0"] + tile["rows"])
        found.update((int(row), -1 - int(tile["group"])) for row in rows)
    assert found == expected


# ---- codes ----


def around(points: tuple[float, ...]) -> np.ndarray:
    """The 65 floats nearest to each point, 0 and 1, and many others."""
    rng = np.random.default_rng(0)
    near = np.array([*points, 0.0, -0.0, 1.0, -1.0], np.float32).view(np.int32)
    steps = np.arange(-32, 33)
    found = [(near[:, None].astype(np.int64) + steps).astype(np.int32).view(np.float32).reshape(-1)]
    edges = np.arange(-64, 65).astype(np.float32) / np.float32(63)  # of the bins
    found += [edges, np.nextafter(edges, np.float32(2)), np.nextafter(edges, np.float32(-2))]
    found += [
        rng.uniform(-1, 1, 200_000),
        np.ldexp(rng.uniform(-1, 1, 50_000), rng.integers(-149, 0, 50_000)),
    ]
    tiny = np.array([1, 2, 0x7FFFFF, 0x800000], np.uint32).view(np.float32)
    return np.concatenate([*(f.astype(np.float32) for f in found), tiny, -tiny])


def unpacked(words: np.ndarray) -> np.ndarray:
    return (words[:, None] >> (4 * np.arange(8, dtype=np.uint32)) & 15).reshape(-1).astype(np.uint8)


def encoded(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Signed and linear codes of floats, by the kernels' functions."""
    count = -(-len(y) // 8)
    padded = np.zeros(8 * count, np.float32)
    padded[: len(y)] = y
    words = np.zeros((2, count), np.uint32)
    args = (tables.code_tables(), padded, words[0], words[1], np.uint32(count))
    probe().get_function("encode")(-(-count // 128), 128, args)
    return unpacked(words[0])[: len(y)], unpacked(words[1])[: len(y)]


def reference(y: np.ndarray, spec: QuantSpec) -> np.ndarray:
    return encode(torch.from_numpy(y), codec(spec, torch.device("cpu"))).numpy()


SIGNED = QuantSpec(signed=True)
LINEAR = QuantSpec(signed=False, mapping="linear")


@needs_compiler
def test_signed_codes_are_the_reference_s() -> None:
    """Of [-1, 1] and what a rounded reciprocal makes of its ends."""
    y = around(midpoints("de", 4, True))
    y = y[np.abs(y) <= 1 + 2.0**-20]
    assert np.array_equal(encoded(y)[0], reference(y, SIGNED))


@needs_compiler
def test_linear_codes_are_the_reference_s() -> None:
    y = around(midpoints("linear", 4, False))
    y = np.concatenate([y[(y >= 0) & (y <= 1 + 2.0**-20)], np.array([np.nan, -np.nan], np.float32)])
    assert np.array_equal(encoded(y)[1], reference(y, LINEAR))


@needs_compiler
def test_codes_of_a_value_that_is_not_finite_stay_in_their_nibble() -> None:
    """NaN beside others in a word gives code 0 in the linear map and disturbs no neighbour."""
    y = np.tile(np.float32([0.5, np.nan, 1.0, 0.0, np.nan, np.nan, 0.3, 0.9]), 4)
    found = encoded(y)[1]
    assert np.array_equal(found, reference(y, LINEAR)) and set(found[[1, 4, 5]]) == {0}


@needs_compiler
def test_blocks_under_every_kind_of_scale() -> None:
    """Eight values under an absmax: zero, NaN, infinite, tiny and ordinary ones."""
    rng = np.random.default_rng(2)
    scales = np.float32([0.0, np.nan, np.inf, 2.0**-126, 3e38, 1.0, 0.7, 1e-30])
    x = rng.uniform(-1, 1, (500, 8, 8)).astype(np.float32)
    finite = np.isfinite(scales)
    with np.errstate(all="ignore"):
        x *= np.where(finite, scales, 1)[:, None]
    x[:, 1, ::3], x[:, 1, 1], x[:, 2, ::3], x[:, 2, 1] = np.nan, np.inf, np.inf, -np.inf
    x[:, finite, 0] = scales[finite]  # the largest itself, of either sign
    x[::2, finite, 0] *= -1
    absmax = np.tile(scales, 500)
    words = np.zeros(4000, np.uint32)
    flat = np.ascontiguousarray(x.reshape(-1))
    args = (tables.code_tables(), flat, absmax, words, np.uint32(4000))
    probe().get_function("encode_blocks")(-(-4000 // 128), 128, args)
    with np.errstate(all="ignore"):
        inverse = np.where(absmax == 0, np.float32(np.nan), np.float32(1) / absmax)
        y = (x.reshape(4000, 8) * inverse[:, None]).astype(np.float32)
    assert np.array_equal(unpacked(words), reference(y.reshape(-1), SIGNED))


@needs_compiler
def test_values_of_codes() -> None:
    """Every byte at every place of a word."""
    found = np.zeros((2, 256, 4, 2), np.float32)
    probe().get_function("decode")(1, 256, (tables.code_tables(), found[0], found[1]))
    nibbles = np.stack([np.arange(256) & 15, np.arange(256) >> 4], 1)
    for got, mapping, signed in ((found[0], "de", True), (found[1], "linear", False)):
        expected = np.array(table(mapping, 4, signed), np.float32)[nibbles]
        assert np.array_equal(got, np.repeat(expected[:, None], 4, 1))
