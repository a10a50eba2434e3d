"""N ranks to M, any cuts: boxes, runs of flat elements, windows of columns, replicas. Ranks are simulated
one after the other; files, plans and checks are the library's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shard4bit.checkpoint.digest import piece_sum
from shard4bit.checkpoint.pieces import Piece, Rect, check_cover
from shard4bit.checkpoint.verify import verify
from shard4bit.errors import CheckpointError
from tests.checkpoint import many

DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.int64, torch.float64]


def edges(draw: Any, size: int, parts: int) -> list[int]:
    """0 = e0 <= e1 <= ... <= size: uneven, perhaps empty parts."""
    cuts = sorted(draw(st.integers(0, size)) for _ in range(parts - 1))
    return [0, *cuts, size]


def run(start: int, stop: int, cols: int) -> list[Rect]:
    """Flat elements [start, stop) as rectangles: a cut first row, whole rows, a cut last row."""
    out = []
    while start < stop:
        row, col = divmod(start, cols)
        if col or stop - start < cols:
            end = min(stop, (row + 1) * cols)
            out.append(Rect(row, row + 1, col, col + end - start))
        else:
            end = stop - stop % cols
            out.append(Rect(row, end // cols, 0, cols))
        start = end
    return out


def cut(draw: Any, shape: tuple[int, int], world: int) -> list[list[Rect]]:
    """What each rank has of a matrix."""
    rows, cols = shape
    whole = Rect(0, rows, 0, cols)
    how = draw(st.sampled_from(["rows", "columns", "grid", "run", "replicas", "strided", "one"]))
    if how == "rows":
        e = edges(draw, rows, world)
        return [[Rect(a, b, 0, cols)] for a, b in zip(e, e[1:], strict=False)]
    if how == "columns":
        e = edges(draw, cols, world)
        return [[Rect(0, rows, a, b)] for a, b in zip(e, e[1:], strict=False)]
    if how == "grid" and world % 2 == 0:
        r, c = edges(draw, rows, world // 2), edges(draw, cols, 2)
        return [[Rect(r[i], r[i + 1], c[j], c[j + 1])] for i in range(world // 2) for j in range(2)]
    if how == "run":
        e = edges(draw, rows * cols, world)
        return [run(a, b, cols) for a, b in zip(e, e[1:], strict=False)]
    if how == "strided":  # every world-th row, as a dimension in the middle is sharded
        return [[Rect(r, r + 1, 0, cols) for r in range(rank, rows, world)] for rank in range(world)]
    if how == "one":
        owner = draw(st.integers(0, world - 1))
        return [[whole] if rank == owner else [] for rank in range(world)]
    return [[whole] for _ in range(world)]


def held(draw: Any, values: many.Matrices, world: int) -> list[list[Piece]]:
    out: list[list[Piece]] = [[] for _ in range(world)]
    for key, value in values.items():
        shape = (value.shape[0], value.shape[1])
        for rank, rects in enumerate(cut(draw, shape, world)):
            out[rank] += [many.piece(key, value, r) for r in rects if r.area]
    return out


@st.composite
def matrices(draw: Any) -> many.Matrices:
    out = {}
    for number in range(draw(st.integers(1, 4))):
        shape = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
        dtype = draw(st.sampled_from(DTYPES))
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        raw = rng.integers(0, 256, (shape[0], shape[1] * dtype.itemsize), dtype=np.uint8)
        if dtype == torch.bool:
            raw &= 1
        out[f"model/t{number}"] = torch.from_numpy(raw).view(dtype)
    return out


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8))


def digest(ranks: list[list[Piece]]) -> dict[str, int]:
    """Per tensor, of pieces of which several ranks may have the same."""
    seen: dict[tuple[str, Rect], int] = {}
    for piece in (p for pieces in ranks for p in pieces):
        seen.setdefault((piece.key, piece.rect), piece_sum(piece))
    out: dict[str, int] = {}
    for (key, _), value in seen.items():
        out[key] = (out.get(key, 0) + value) % 2**64
    return out


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), matrices(), st.integers(1, 8), st.integers(1, 8))
def test_any_cuts_to_any_others(
    tmp_path_factory: pytest.TempPathFactory, data: Any, values: many.Matrices, before: int, after: int
) -> None:
    root = tmp_path_factory.mktemp("any")
    try:
        ranks = held(data.draw, values, before)
        path = many.save(root, ranks)
        assert verify(path) == []
        blank = {key: torch.zeros_like(value) for key, value in values.items()}
        wanted = held(data.draw, blank, after)
        own = [[Piece(p.key, p.shape, p.rect, p.data.clone()) for p in pieces] for pieces in wanted]
        for pieces in own:
            many.load(path, pieces)
            for piece in pieces:
                rows, cols = piece.shape
                expected = Rect(0, rows, 0, cols).cut(values[piece.key], piece.rect)
                assert same_bits(piece.data, expected), piece
        assert digest(own) == digest(ranks) == digest([many.whole(values)])
        again = many.save(root, own, step=2)  # and back
        found = {key: torch.zeros_like(value) for key, value in values.items()}
        many.load(again, many.whole(found))
        assert all(same_bits(found[key], values[key]) for key in values)
    finally:
        shutil.rmtree(root)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_cover_is_checked_exactly(data: Any) -> None:
    """Against counting, for tilings with a rectangle moved, doubled or lost, and for random ones."""
    shape = (data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7)))
    rects = [r for rank in cut(data.draw, shape, data.draw(st.integers(1, 6))) for r in rank if r.area]
    rects = list(dict.fromkeys(rects))
    numbers = st.integers(-1, 8)
    for _ in range(data.draw(st.integers(0, 2))):
        new = Rect(*(data.draw(numbers) for _ in range(4)))
        rects.append(new) if data.draw(st.booleans()) or not rects else rects.__setitem__(0, new)
    count, good = np.zeros((12, 12), int), True
    for r in rects:
        good &= 0 <= r.row0 < r.row1 <= shape[0] and 0 <= r.col0 < r.col1 <= shape[1]
        count[r.row0 + 1 : r.row1 + 1, r.col0 + 1 : r.col1 + 1] += 1
    good &= bool((count[1 : shape[0] + 1, 1 : shape[1] + 1] == 1).all())
    array = np.array([(r.row0, r.row1, r.col0, r.col1) for r in rects], np.int64).reshape(-1, 4)
    if good:
        check_cover("t", shape, array)
    else:
        with pytest.raises(CheckpointError):
            check_cover("t", shape, array)


def test_large_pieces_are_read_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a chunk, more than what may be staged, and narrow parts of both."""
    from shard4bit.checkpoint import reading

    value = torch.arange(9 * 2**20, dtype=torch.int32).view(-1, 1024)  # 36 MiB
    path = many.save(tmp_path, [[many.piece("a", value, Rect(0, 9 * 1024, 0, 1024))]])
    assert verify(path) == []
    for room in (reading.STAGED_BYTES, 10 << 20, 0):
        monkeypatch.setattr(reading, "STAGED_BYTES", room)
        found = torch.zeros_like(value)
        many.load(path, many.whole({"a": found}))
        assert found.equal(value)
        part = torch.zeros(3000, 5, dtype=torch.int32)
        many.load(path, [Piece("a", (9216, 1024), Rect(2000, 5000, 7, 12), part)])
        assert part.equal(value[2000:5000, 7:12])
