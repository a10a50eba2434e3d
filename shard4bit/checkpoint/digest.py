"""A digest of tensors that does not depend on how ranks share them: a sum over elements of a hash of
(tensor, position, bits), so that any partition gives the same number and one flipped bit another."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from shard4bit.checkpoint.pieces import Piece
from shard4bit.checkpoint.plan import agree
from shard4bit.checkpoint.ranks import at_first, to_first, together

_CHUNK = 1 << 20  # elements hashed at a time
_ODD = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer: a bijection of 64-bit words whose every output bit depends on the input."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_ODD[1])
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_ODD[2])
    return x ^ (x >> np.uint64(31))


def piece_sum(piece: Piece) -> int:
    """The piece's share of its tensor's sum, modulo 2^64."""
    seed = int.from_bytes(hashlib.blake2b(piece.key.encode(), digest_size=8).digest(), "little")
    rows, cols = piece.data.shape
    if rows * cols == 0:
        return 0
    words = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[piece.data.element_size()]
    height, total = max(1, _CHUNK // cols), 0
    columns = np.arange(piece.rect.col0, piece.rect.col1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for start in range(0, rows, height):
            chunk = piece.data[start : start + height].detach().to("cpu").contiguous()
            bits = chunk.reshape(-1).view(torch.uint8).numpy().view(words).reshape(chunk.shape)
            row = np.arange(len(bits), dtype=np.uint64) + np.uint64(piece.rect.row0 + start)
            place = row[:, None] * np.uint64(piece.shape[1]) + columns[None, :]
            keyed = _mix(place * np.uint64(_ODD[0]) + np.uint64(seed))
            total += int(_mix(keyed ^ _mix(bits.astype(np.uint64) + np.uint64(1))).sum())
    return total % 2**64


def digest(pieces: Sequence[Piece], facts: Sequence[str]) -> str:
    """Hex digest (128 bits) of all ranks' tensors and of ``facts`` (equal on all ranks). Collective."""
    mine, plan = agree("planning the digest", pieces)

    def hashed() -> dict[str, int]:
        sums: dict[str, int] = {}
        for piece in pieces:
            if (piece.key, piece.rect) in mine:
                sums[piece.key] = sums.get(piece.key, 0) + piece_sum(piece)
        return sums

    said = to_first(together("hashing for the digest", hashed))

    def add() -> str:
        total = dict.fromkeys(plan.tensors, 0)
        for found in said:
            for key, value in found.items():
                total[key] = (total[key] + value) % 2**64
        lines = sorted(f"{key} {value:016x}" for key, value in total.items())
        text = "\n".join([*lines, *sorted(facts)])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    return at_first("adding up the digest", add)
