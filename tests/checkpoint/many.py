"""Checkpoints of many ranks without processes: the library's own planning and files, rank after rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from shard4bit.checkpoint import store
from shard4bit.checkpoint.files import write_file
from shard4bit.checkpoint.manifest import Manifest, file_name
from shard4bit.checkpoint.pieces import Piece, Rect
from shard4bit.checkpoint.plan import announce, arrange, holding, owned, shares
from shard4bit.checkpoint.upkeep import step_name

Matrices = dict[str, torch.Tensor]


def whole(values: Matrices) -> list[Piece]:
    """Every tensor as one piece."""
    return [piece(key, value, Rect(0, value.shape[0], 0, value.shape[1])) for key, value in values.items()]


def piece(key: str, value: torch.Tensor, rect: Rect) -> Piece:
    """Part of a matrix."""
    rows, cols = value.shape
    return Piece(key, (rows, cols), rect, Rect(0, rows, 0, cols).cut(value, rect))


def save(root: Path, ranks: Sequence[Sequence[Piece]], step: int = 1, extra: Any = None) -> Path:
    """``ranks``: what each of them holds."""
    held = [holding((p.key, (p.dtype, p.shape), p.rect) for p in pieces) for pieces in ranks]
    table = {key: kind for key, (kind, _) in held[0].tensors.items()}
    said = [announce(h, table, rank) for rank, h in enumerate(held)]
    plan = arrange(table, said)
    final = root / step_name(step)
    hidden = root / f".{final.name}-simulated"
    hidden.mkdir(parents=True)
    written = []
    for rank, (pieces, share) in enumerate(zip(ranks, shares(plan, said), strict=True)):
        mine = owned(share, table, held[rank].tensors)
        written.append(write_file(hidden / file_name(rank), [p for p in pieces if (p.key, p.rect) in mine]))
    content = {"parameters": True, "frozen": True, "optimizer": False}
    about = Manifest(step, len(ranks), {}, {}, {}, [], content, extra)
    store._publish(hidden, final, plan, written, about)
    return final


def load(path: Path, pieces: Sequence[Piece]) -> None:
    """Fill one rank's pieces."""
    found, manifest = store.find(path)
    store.read_into(found, manifest, pieces)
