"""Filling tensors from a checkpoint: nothing changes before every byte that any rank needs is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shard4bit.checkpoint.files import Buffer, Scratch, chunks, opened
from shard4bit.checkpoint.header import Stored
from shard4bit.checkpoint.manifest import Manifest, file_name
from shard4bit.checkpoint.pieces import SIZES, Piece, Rect
from shard4bit.checkpoint.ranks import together
from shard4bit.errors import CheckpointError

#: At most so many checked bytes does a rank keep between checking and filling.
STAGED_BYTES = 256 << 20

#: of one file: (key, the rectangle that it has) -> numbers of those who want part of it
Needs = dict[tuple[str, Rect], list[int]]


def needs(manifest: Manifest, wants: Iterable[tuple[str, Rect]]) -> dict[int, Needs]:
    """For each file that has anything of the wanted rectangles: what."""
    out: dict[int, Needs] = {}
    for number, (key, want) in enumerate(wants):
        if not want.area:
            continue
        for file, rect in manifest.tensors[key].touching(want):
            out.setdefault(file, {}).setdefault((key, rect), []).append(number)
    return dict(sorted(out.items()))


Parts = dict[tuple[str, Rect], Stored]


def match(manifest: Manifest, stored: Sequence[Stored], path: Path) -> Parts:
    """A file's parts by key and rectangle. Raises CheckpointError if the manifest knows one otherwise."""
    out = {}
    for part in stored:
        info = manifest.tensors.get(part.key)
        if info is None or info.dtype != part.dtype:
            raise CheckpointError(f"{path} holds {part.key} as {part.dtype}, unlike the manifest")
        out[part.key, part.rect] = part
    return out


Use = Callable[[int, Rect, Tensor], None]


def read(
    directory: Path,
    manifest: Manifest,
    wants: Sequence[tuple[str, Rect]],
    use: Use,
    buffer: Buffer | None = None,
) -> None:
    """Read, check, and hand over (number of the want, rectangle, values), file by file, in their order.

    The values are views of a chunk's memory, which comes from ``buffer``; by default the next chunk's
    overwrites it.
    Raises CheckpointError, naming file and tensor, for data that is damaged or missing.
    """
    for file, needed in needs(manifest, wants).items():
        _read_file(directory, manifest, file, needed, wants, use, buffer or Scratch())


def _read_file(
    directory: Path,
    manifest: Manifest,
    file: int,
    needed: Needs,
    wants: Sequence[tuple[str, Rect]],
    use: Use,
    buffer: Buffer,
) -> None:
    name = file_name(file)
    path = directory / name
    with opened(path, manifest.files[name], manifest.headers[name]) as (handle, stored):
        parts = match(manifest, stored, path)
        for (key, rect), numbers in needed.items():
            part = parts.get((key, rect))
            if part is None:
                raise CheckpointError(f"{path} lacks {key}, {rect}, which the manifest says is there")
            span = _hull([wants[n][1] for n in numbers])
            for chunk, values in chunks(handle, path, part, span, buffer):
                for number in numbers:
                    both = chunk.meet(wants[number][1])
                    if both is not None:
                        use(number, both, chunk.cut(values, both))


def _hull(rects: Sequence[Rect]) -> Rect:
    return Rect(
        min(r.row0 for r in rects),
        max(r.row1 for r in rects),
        min(r.col0 for r in rects),
        max(r.col1 for r in rects),
    )


class _Staging:
    """A Buffer for chunks that may be kept, of ``limit`` bytes in all. Its memory is one block: that is
    several times faster to touch for the first time than chunk by chunk."""

    def __init__(self, limit: int) -> None:
        self._block = np.empty(limit, np.uint8)
        self._start = self._used = 0  # of the last chunk, and of all
        self._keep, self._inside, self._scratch = False, False, Scratch()
        self.parts: list[tuple[int, Rect, Tensor]] = []  # number of the want, rectangle, values
        self.late: set[int] = set()  # wants of which something was not kept

    def __call__(self, size: int) -> np.ndarray:
        if not self._keep:  # nobody wanted enough of the last one
            self._used = self._start
        self._start, self._keep = self._used, False
        self._inside = self._used + size <= len(self._block)
        if not self._inside:
            return self._scratch(size)
        self._used += size
        return self._block[self._start : self._used]

    def keep(self, number: int, rect: Rect, values: Tensor) -> None:
        """Part of the last chunk."""
        if not self._inside or number in self.late:
            self.late.add(number)
            return
        self._keep = True
        self.parts.append((number, rect, values))


def read_into(directory: Path, manifest: Manifest, pieces: Sequence[Piece]) -> None:
    """Fill the pieces' memory. Collective. Raises CheckpointError on every rank, with nothing changed, if
    any finds damage. What is read and checked is kept in host memory of the size of the largest tensor that
    the rank has part of, 256 MiB at most; what exceeds that is read and checked again."""
    wants = [(piece.key, piece.rect) for piece in pieces]
    size = sum(piece.rect.area * SIZES[piece.dtype] for piece in pieces)
    largest = max((prod(piece.shape) * SIZES[piece.dtype] for piece in pieces), default=0)
    staging = _Staging(min(STAGED_BYTES, size, largest))

    def put(number: int, rect: Rect, values: Tensor) -> None:
        piece = pieces[number]
        piece.rect.cut(piece.data, rect).copy_(values)

    def fill() -> None:
        with torch.no_grad():
            for number, rect, values in staging.parts:
                put(number, rect, values)
            again = sorted(staging.late)
            chosen = [wants[n] for n in again]
            read(directory, manifest, chosen, lambda n, rect, values: put(again[n], rect, values))

    together(f"checking {directory}", lambda: read(directory, manifest, wants, staging.keep, staging))
    together(f"loading {directory}", fill)
