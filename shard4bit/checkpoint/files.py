"""One rank's safetensors file: written and read a few rows at a time, with a checksum per chunk.

(safetensors' own writer takes the whole file in host memory; the format is simple: eight bytes of
length, a JSON header, the tensors.)
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import xxhash
from torch import Tensor

from shard4bit.checkpoint import header
from shard4bit.checkpoint.header import Stored
from shard4bit.checkpoint.pieces import DTYPES, Piece, Rect
from shard4bit.errors import CheckpointError

CHUNK_BYTES = header.CHUNK_BYTES
FLUSH_BYTES = 16 << 20
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


def _bytes(rows: Tensor) -> memoryview:
    """Contiguous host bytes of a tensor."""
    host = rows.detach().to("cpu").contiguous()
    return host.reshape(-1).view(torch.uint8).numpy().data


def write_file(path: Path, pieces: Sequence[Piece]) -> tuple[int, str]:
    """Write pieces to a new file and fsync it. Returns its size and its header's checksum.

    Needs 4 MiB (or one row) of host memory beside the pieces.
    """
    parts = [(p.key, p.rect, p.dtype) for p in pieces]
    sums: list[str] = []
    with open(path, "xb", buffering=0) as out, _Flusher(out.fileno()) as flusher:
        head = header.build(parts)
        _write(out, head)
        for piece in pieces:
            step = header.chunk_rows(piece.rect, piece.dtype)
            for start in range(0, len(piece.data), step):
                chunk = _bytes(piece.data[start : start + step])
                sums.append(xxhash.xxh3_64_hexdigest(chunk))
                _write(out, chunk)
                flusher.wrote(len(chunk))
        flusher.check()
        size = out.tell()
        out.seek(0)
        head = header.with_sums(head, sums)
        _write(out, head)
        os.fsync(out.fileno())
    return size, xxhash.xxh3_64_hexdigest(head)


class _Flusher:
    """Brings a file to disk while it is being written, so that little is left for the last fsync."""

    def __init__(self, handle: int) -> None:
        self.handle, self.pending = handle, 0  # bytes written since the last flush began
        self.thread = ThreadPoolExecutor(1)
        self.running: Future[None] | None = None

    def wrote(self, size: int) -> None:
        """Flush if much has come and the last flush is over. Raises OSError if that failed."""
        self.pending += size
        if self.pending >= FLUSH_BYTES and (self.running is None or self.running.done()):
            self.check()
            self.pending, self.running = 0, self.thread.submit(os.fdatasync, self.handle)

    def check(self) -> None:
        """Wait for the last flush. Its error must be raised here: the system tells each only once."""
        if self.running is not None:
            self.running.result()

    def __enter__(self) -> _Flusher:
        return self

    def __exit__(self, *unused: object) -> None:
        self.thread.shutdown()


def _write(out: Any, data: bytes | memoryview) -> None:
    """All of it; the system may take less at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[out.write(rest) :]


@contextmanager
def opened(path: Path, size: int, head: str) -> Iterator[tuple[BinaryIO, list[Stored]]]:
    """An open file of known size and header, and what it holds. Raises CheckpointError, naming the file,
    for a file that is missing, of another size, not a plain file, or damaged in its header."""
    try:
        with open(path, "rb", buffering=0, opener=_plain) as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise CheckpointError(f"{path} is not a plain file")
            if info.st_size != size:
                raise CheckpointError(f"{path} has {info.st_size} bytes, expected {size}: damaged")
            try:
                stored = header.read(file, size, head)  # type: ignore[arg-type]
            except CheckpointError as error:
                raise CheckpointError(f"{path} cannot be used: {error}") from None
            yield file, stored  # type: ignore[misc]
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _plain(path: str, flags: int) -> int:
    """Follow no link, which might lead anywhere, and wait for no pipe."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


#: gives memory for so many bytes
Buffer = Callable[[int], np.ndarray]


class Scratch:
    """A Buffer that gives the same memory again: touching fresh memory costs more than reading a file that
    the system has cached."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def __call__(self, size: int) -> np.ndarray:
        if size > len(self._memory):
            self._memory = np.empty(size, np.uint8)
        return self._memory[:size]


def chunks(
    file: BinaryIO, path: Path, stored: Stored, want: Rect, buffer: Buffer
) -> Iterator[tuple[Rect, Tensor]]:
    """(rectangle, values) of the chunks that touch ``want``, each checked, in memory from ``buffer``.
    Raises CheckpointError, naming file and tensor, for damage."""
    rect, row_bytes = stored.rect, stored.row_bytes
    first = max(0, want.row0 - rect.row0) // stored.chunk_rows
    for number in range(first, len(stored.sums)):
        row0 = rect.row0 + number * stored.chunk_rows
        row1 = min(rect.row1, row0 + stored.chunk_rows)
        if row0 >= want.row1:
            return
        data = buffer((row1 - row0) * row_bytes)
        file.seek(stored.begin + (row0 - rect.row0) * row_bytes)
        if not _fill(file, data):
            raise CheckpointError(f"{path} is cut short within {stored.key}")
        if xxhash.xxh3_64_hexdigest(data.data) != stored.sums[number]:
            raise CheckpointError(f"{path} is damaged: {stored.key}, rows {row0} to {row1}: checksum differs")
        values = torch.from_numpy(data).view(TORCH_DTYPES[stored.dtype])
        part = Rect(row0, row1, rect.col0, rect.col1)
        yield part, values.view(part.shape)


def _fill(file: BinaryIO, data: np.ndarray) -> bool:
    rest = memoryview(data.data)
    while rest:
        found = file.readinto(rest)  # type: ignore[attr-defined]
        if not found:
            return False
        rest = rest[found:]
    return True
