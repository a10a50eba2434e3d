"""The header of a safetensors file: which rectangles it holds, where, and the checksums of their bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import xxhash

from shard4bit.checkpoint.pieces import SIZES, Rect
from shard4bit.checkpoint.strict import count, hexadecimal, parse
from shard4bit.errors import CheckpointError

CHUNK_BYTES = 4 << 20
MAX_BYTES = 100_000_000  # safetensors' own limit
_NAME = re.compile(r"(.*)\[(\d{1,19}):(\d{1,19}),(\d{1,19}):(\d{1,19})\]", re.DOTALL)
_SUMS = b'"xxh3":"'  # before the checksums, and nowhere before that


@dataclass(frozen=True)
class Stored:
    """One rectangle in a file: row-major, from byte ``begin`` of the file.

    sums: xxh3-64 of each stretch of ``chunk_rows`` rows (the last may be shorter), in hex.
    """

    key: str
    rect: Rect
    dtype: str
    begin: int
    chunk_rows: int
    sums: tuple[str, ...]

    @property
    def row_bytes(self) -> int:
        return (self.rect.col1 - self.rect.col0) * SIZES[self.dtype]


def chunk_rows(rect: Rect, dtype: str, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Rows per checksum."""
    return max(1, chunk_bytes // max(1, (rect.col1 - rect.col0) * SIZES[dtype]))


def chunks(rect: Rect, dtype: str, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Number of checksums."""
    return -(-(rect.row1 - rect.row0) // chunk_rows(rect, dtype, chunk_bytes))


def name_of(key: str, r: Rect) -> str:
    return f"{key}[{r.row0}:{r.row1},{r.col0}:{r.col1}]"


def build(parts: Sequence[tuple[str, Rect, str]]) -> bytes:
    """The first bytes of a file of (key, rectangle, dtype) in this order, with room for the checksums, so
    that it can be written before they are known."""
    number = sum(chunks(rect, dtype) for _, rect, dtype in parts)
    about = {"format": "shard4bit", "chunk_bytes": str(CHUNK_BYTES), "xxh3": "0" * 16 * number}
    header: dict[str, Any] = {"__metadata__": about}
    offset = 0
    for key, r, dtype in parts:
        size = r.area * SIZES[dtype]
        header[name_of(key, r)] = {
            "dtype": dtype,
            "shape": list(r.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_BYTES:
        raise CheckpointError(f"a rank's file would need a header of {len(text)} bytes: too many tensors")
    return len(text).to_bytes(8, "little") + text


def with_sums(head: bytes, sums: Sequence[str]) -> bytes:
    """What ``build`` made, with the checksums."""
    joined = "".join(sums).encode()
    start = head.index(_SUMS) + len(_SUMS)
    return head[:start] + joined + head[start + len(joined) :]


def read(file: BinaryIO, size: int, known: str) -> list[Stored]:
    """The parts of an open file of ``size`` bytes whose header has the checksum ``known``.

    Raises CheckpointError for damage or nonsense; never reads more than the header.
    """
    length = int.from_bytes(file.read(8), "little")
    if length > min(MAX_BYTES, size - 8):
        raise CheckpointError(f"its header is said to have {length} bytes: damaged")
    text = file.read(length)
    if len(text) != length:
        raise CheckpointError("it is cut short within its header")
    if xxhash.xxh3_64_hexdigest(length.to_bytes(8, "little") + text) != known:
        raise CheckpointError("the checksum of its header differs: damaged, or a file of another checkpoint")
    return parse_header(text, size)


def parse_header(text: bytes, size: int) -> list[Stored]:
    """Raises CheckpointError for anything but the header of a file of ours of ``size`` bytes."""
    try:
        return _parse(parse(text), 8 + len(text), size)
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"its header is malformed: {type(error).__name__} {error}") from None


def _parse(header: dict[str, Any], data: int, size: int) -> list[Stored]:
    """``data``: where the header ends."""
    about = header.pop("__metadata__")
    chunk_bytes, joined = int(about["chunk_bytes"]), about["xxh3"]
    if not 0 < chunk_bytes <= 1 << 30:
        raise ValueError(f"chunks of {chunk_bytes} bytes")
    out, offset, used = [], 0, 0
    for name, info in header.items():
        key, rect = _split(name)
        dtype, short = info["dtype"], f"its tensor {name[:200]!r}"
        if dtype not in SIZES or info["shape"] != list(rect.shape) or min(rect.shape) < 1:
            raise CheckpointError(f"{short} has dtype {str(dtype)[:20]}, shape {str(info['shape'])[:50]}")
        start, stop = map(count, info["data_offsets"])
        if start != offset or stop - start != rect.area * SIZES[dtype] or data + stop > size:
            raise CheckpointError(f"{short} is said to be at bytes {start} to {stop}")
        rows = chunk_rows(rect, dtype, chunk_bytes)
        end = used + 16 * -(-(rect.row1 - rect.row0) // rows)
        if end > len(joined):
            raise CheckpointError(f"{short} lacks checksums")
        sums = tuple(hexadecimal(joined[i : i + 16]) for i in range(used, end, 16))
        out.append(Stored(key, rect, dtype, data + start, rows, sums))
        offset, used = stop, end
    if data + offset != size or used != len(joined):
        raise ValueError(f"{offset} bytes and {used // 16} checksums in {size - data} bytes")
    return out


def _split(name: str) -> tuple[str, Rect]:
    """Key and rectangle of KEY[row0:row1,col0:col1]."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise CheckpointError(f"its tensor {name[:200]!r} is not named KEY[row0:row1,col0:col1]")
    rect = Rect(*map(int, match.groups()[1:]))
    if name_of(match[1], rect) != name:
        raise CheckpointError(f"its tensor {name[:200]!r} has odd numbers in its name")
    return match[1], rect
