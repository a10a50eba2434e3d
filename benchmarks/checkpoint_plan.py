"""Time and memory to plan a save on 1,024 ranks and a load on 768: python -m benchmarks.checkpoint_plan

The shapes of a 70 B Llama-style model with AdamW4bit, without tensors: every rank's rectangles are made as
the library makes them, then the library's own planner runs, one rank after the other, in this process.
Layouts: rows (FSDP2), units (FSDP1: each transformer layer one flat vector), flat (ZeRO: the whole model
one). Exits with status 1 if a rank needs 2 s or 1 GB.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from math import prod
from typing import Any

import torch
import xxhash

from benchmarks.shapes import llama
from shard4bit.checkpoint import header
from shard4bit.checkpoint.manifest import Manifest, TensorInfo, file_name, parse_manifest
from shard4bit.checkpoint.pieces import Piece, Rect
from shard4bit.checkpoint.plan import Announcement, Kind, Plan, announce, arrange, holding, owned, shares
from shard4bit.checkpoint.reading import needs
from shard4bit.layout import Slab
from shard4bit.rectangles import rectangles
from shard4bit.sharding import chunk_edges
from shard4bit.spec import is_quantized, parse_spec
from shard4bit.state import Part, parts, state_key

LAYERS = 80
SHAPES = llama(layers=LAYERS, width=8192, kv=1024, mlp=28672)
PARTS = ("q", "k", "v", "o", "gate", "up", "down", "norm1", "norm2")
NAMES = [
    "embed",
    *(f"layers.{i}.{part}" for i in range(LAYERS) for part in PARTS),
    "norm",
    "head",
]
MOMENTS = {
    "exp_avg": parse_spec("B128/DE", signed=True, argument="first_moment"),
    "exp_avg_sq": parse_spec("Rank-1/Linear", signed=False, argument="second_moment"),
}
FULL = Part("", "full", torch.float32)
LIMITS = 2.0, 1e9  # seconds and bytes of one rank

Rects = list[tuple[str, Kind, Rect]]


def tensors(shape: tuple[int, ...]) -> Iterator[tuple[str, Part]]:
    """(key with {} for the name, part) of a parameter and its state."""
    yield "model/{}", FULL
    for moment, spec in MOMENTS.items():
        for part in parts(spec) if is_quantized(shape) else (FULL,):
            yield "state/{}/" + state_key(moment, part.suffix), part


@lru_cache(maxsize=100_000)
def slab_rects(shape: tuple[int, ...], slab: Slab, whole: bool) -> tuple[tuple[str, Kind, Rect], ...]:
    out: Rects = []
    for key, part in tensors(shape):
        data = torch.empty(part.local_shape(slab), dtype=part.dtype, device="meta")
        pieces: Iterator[Piece] = rectangles(key, slab, data, part, whole)
        out += [(key, (p.dtype, p.shape), p.rect) for p in pieces]
    return tuple(out)


@lru_cache
def rows_of(shape: tuple[int, ...], world: int, rank: int) -> Slab:
    edges = chunk_edges(0, shape[0], world)
    return Slab.box(shape, [(edges[rank], edges[rank + 1]), *((0, d) for d in shape[1:])])


@lru_cache
def flat_starts(units: bool) -> list[tuple[int, int]]:
    """(offset in its flat vector, length of the vector) of each parameter."""
    vectors: dict[str, list[int]] = {}
    for i, name in enumerate(NAMES):
        unit = name.rpartition(".")[0] if units else ""
        vectors.setdefault(unit, []).append(i)
    out = [(0, 0)] * len(NAMES)
    for members in vectors.values():
        total, offset = sum(prod(SHAPES[i]) for i in members), 0
        for i in members:
            out[i] = (offset, total)
            offset += prod(SHAPES[i])
    return out


def rank_rects(layout: str, world: int, rank: int, whole: bool) -> Rects:
    """What one rank holds (or, with ``whole``, wants)."""
    out: Rects = []
    starts = flat_starts(layout == "units") if layout != "rows" else []
    for i, (name, shape) in enumerate(zip(NAMES, SHAPES, strict=True)):
        if layout == "rows":
            slab = rows_of(shape, world, rank)
        else:
            offset, total = starts[i]
            size = -(-total // world)
            first, stop = (min(max(e - offset, 0), prod(shape)) for e in (rank * size, (rank + 1) * size))
            slab = Slab.run(shape, first, stop)
        out += [(key.format(name), kind, rect) for key, kind, rect in slab_rects(shape, slab, whole)]
    return out


class Cost:
    """CPU seconds, and bytes by which the process grew at most, of one rank's work."""

    def __init__(self) -> None:
        self.seconds, self.bytes = 0.0, 0

    def __call__(self, work: Callable[[], Any]) -> Any:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts anew
        before, start = _memory("VmRSS"), time.process_time()
        result = work()
        self.seconds += time.process_time() - start
        self.bytes += max(0, _memory("VmHWM") - before)
        return result


def _memory(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def save(layout: str, world: int) -> tuple[Cost, Cost, Plan, bytes, int]:
    """(an ordinary rank, rank 0, plan, manifest, number of rectangles of all ranks)."""
    other, first, count = Cost(), Cost(), 0
    table: dict[str, Kind] = {}
    keys: dict[int, set[str]] = {}
    said: list[Announcement] = []
    for rank in range(world):
        rects = rank_rects(layout, world, rank, False)
        count += len(rects)
        table = table or {key: kind for key, kind, _ in rects}
        if rank in (0, world // 2):
            cost = other if rank else first
            said.append(cost(partial(_announced, rects, table, rank)))
            keys[rank] = {key for key, _, _ in rects}
        else:
            said.append(_announced(rects, table, rank))
    plan: Plan = first(lambda: arrange(table, said))
    given = first(lambda: shares(plan, said))
    for rank, cost in ((0, first), (world // 2, other)):
        cost(lambda rank=rank: owned(given[rank], table, keys[rank]))

    def manifest() -> bytes:
        facts = {n: {"shape": list(s), "step": 9, "moments": {}} for n, s in zip(NAMES, SHAPES, strict=True)}
        about = Manifest(9, world, {}, {}, facts, [{"parameters": NAMES, "options": {}}], CONTENT)
        for key, ((dtype, shape), number) in plan.tensors.items():
            about.tensors[key] = TensorInfo(dtype, shape, plan.layouts[number])
        about.files = {file_name(rank): 2**50 for rank in range(world)}
        about.headers = {file_name(rank): "0" * 16 for rank in range(world)}
        return about.to_json()

    return other, first, plan, first(manifest), count


def _announced(rects: Rects, table: dict[str, Kind], rank: int) -> Announcement:
    return announce(holding(rects), table, rank)


CONTENT = {"parameters": True, "frozen": True, "optimizer": True}


def load(name: str, world: int, plan: Plan, raw: bytes) -> tuple[Cost, int]:
    """An ordinary rank; how many files it opens."""
    cost = Cost()
    manifest = cost(lambda: parse_manifest(raw))
    wants = [(key, rect) for key, _, rect in rank_rects(name, world, world // 2, True)]
    files = cost(lambda: needs(manifest, wants))
    for file in files:
        own: list[tuple[str, Rect, str]] = []
        mine = {
            n: [Rect(*r) for r in layout[layout[:, 0] == file, 1:].tolist()]
            for n, layout in enumerate(plan.layouts)
        }
        for key, ((dtype, _), number) in plan.tensors.items():
            own += [(key, rect, dtype) for rect in mine[number]]
        head = header.build(own)
        size = len(head) + sum(rect.area * header.SIZES[dtype] for _, rect, dtype in own)

        def check(head: bytes = head, size: int = size) -> None:
            xxhash.xxh3_64_hexdigest(head)
            header.parse_header(head[8:], size)

        cost(check)
    return cost, len(files)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs=2, default=(1024, 768), metavar=("SAVE", "LOAD"))
    before, after = parser.parse_args().ranks
    billions = sum(map(prod, SHAPES)) / 1e9
    print(f"{billions:.1f} B parameters in {len(SHAPES)} tensors, {before} -> {after} ranks")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}\n")
    print("| layout | pieces | manifest | save: a rank | save: rank 0 | load: a rank | opens |")
    print("|---|---|---|---|---|---|---|")
    worst = Cost()
    for layout in ("rows", "units", "flat"):
        other, first, plan, raw, pieces = save(layout, before)
        cost, files = load(layout, after, plan, raw)
        cells = [f"{c.seconds:.2f} s, {c.bytes / 1e6:.0f} MB" for c in (other, first, cost)]
        facts = f"| {layout} | {pieces:,} | {len(raw) / 1e6:.1f} MB "
        print(f"{facts}| {' | '.join(cells)} | {files} files |", flush=True)
        worst.seconds = max(worst.seconds, *(c.seconds for c in (other, first, cost)))
        worst.bytes = max(worst.bytes, *(c.bytes for c in (other, first, cost)))
        slab_rects.cache_clear()
    print(f"\nworst: {worst.seconds:.2f} s (limit {LIMITS[0]}), {worst.bytes / 1e6:.0f} MB")
    return int(worst.seconds >= LIMITS[0] or worst.bytes >= LIMITS[1])


if __name__ == "__main__":
    sys.exit(main())
