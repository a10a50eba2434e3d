"""One rank's safetensors file: written and read a few rows at a time, with a checksum per chunk.

(safetensors' own writer takes the whole file in host memory; the format is simple: eight bytes of
length, a JSON header, the tensors.)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from shard4bit.checkpoint.manifest import SIZES, Entry, TensorInfo
from shard4bit.checkpoint.pieces import DTYPES, Piece, Rect
from shard4bit.errors import CheckpointError

CHUNK_BYTES = 4 << 20
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


def file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _bytes(rows: Tensor) -> memoryview:
    """Contiguous host bytes of a tensor."""
    host = rows.detach().to("cpu").contiguous()
    return host.reshape(-1).view(torch.uint8).numpy().data


def write_file(path: Path, pieces: Sequence[Piece]) -> tuple[int, dict[str, list[Entry]]]:
    """Write pieces to a new file and fsync it. Returns its size and the entries by tensor."""
    header, offset = {}, 0
    for piece in pieces:
        r, size = piece.rect, piece.rect.area * SIZES[piece.dtype]
        name = f"{piece.key}[{r.row0}:{r.row1},{r.col0}:{r.col1}]"
        shape = [r.row1 - r.row0, r.col1 - r.col0]
        header[name] = {
            "dtype": piece.dtype,
            "shape": shape,
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    entries: dict[str, list[Entry]] = {}
    with open(path, "xb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            entries.setdefault(piece.key, []).append(_write_piece(out, path.name, piece))
        size = out.tell()
        out.flush()
        os.fsync(out.fileno())
    return size, entries


def _write_piece(out: object, name: str, piece: Piece) -> Entry:
    r = piece.rect
    row_bytes = (r.col1 - r.col0) * SIZES[piece.dtype]
    chunk_rows = max(1, CHUNK_BYTES // max(row_bytes, 1))
    begin, sums = out.tell(), []  # type: ignore[attr-defined]
    for start in range(0, r.row1 - r.row0, chunk_rows):
        chunk = _bytes(piece.data[start : start + chunk_rows])
        sums.append(xxhash.xxh3_64_hexdigest(chunk))
        out.write(chunk)  # type: ignore[attr-defined]
    return Entry(name, r, begin, chunk_rows, sums)


def read_rect(
    directory: Path, key: str, info: TensorInfo, want: Rect, use: Callable[[Rect, Tensor], None]
) -> None:
    """Read what is needed of ``want``, check every byte read, and hand over (rectangle, values).

    Raises CheckpointError, naming file and tensor, for damaged or missing data.
    """
    for entry in info.entries:
        both = entry.rect.meet(want)
        if both is None:
            continue
        path = directory / entry.file
        try:
            with open(path, "rb") as file:
                for chunk, values in _chunks(file, path, key, info, entry, both):
                    part = chunk.meet(want)
                    if part is not None:
                        use(part, _cut(values, chunk, part))
        except OSError as error:
            raise CheckpointError(f"{path} ({key}) cannot be read: {error.strerror}") from None


def _chunks(file, path: Path, key: str, info: TensorInfo, entry: Entry, both: Rect):  # type: ignore[no-untyped-def]
    """(rectangle, values) of the checked chunks of an entry that touch ``both``."""
    rect, width = entry.rect, entry.rect.col1 - entry.rect.col0
    row_bytes = width * SIZES[info.dtype]
    for number in range(len(entry.checksums)):
        row0 = rect.row0 + number * entry.chunk_rows
        row1 = min(rect.row1, row0 + entry.chunk_rows)
        if row1 <= both.row0 or row0 >= both.row1:
            continue
        file.seek(entry.begin + (row0 - rect.row0) * row_bytes)
        data = bytearray((row1 - row0) * row_bytes)
        if file.readinto(data) != len(data):
            raise CheckpointError(f"{path} is cut short within {key}")
        if xxhash.xxh3_64_hexdigest(data) != entry.checksums[number]:
            raise CheckpointError(f"{path} is damaged: {key}, rows {row0} to {row1}: checksum differs")
        values = torch.from_numpy(np.frombuffer(data, dtype=np.uint8)).view(TORCH_DTYPES[info.dtype])
        yield Rect(row0, row1, rect.col0, rect.col1), values.view(row1 - row0, width)


def _cut(values: Tensor, have: Rect, want: Rect) -> Tensor:
    """The part ``want`` of the rectangle ``have``."""
    return values[
        want.row0 - have.row0 : want.row1 - have.row0, want.col0 - have.col0 : want.col1 - have.col0
    ]
