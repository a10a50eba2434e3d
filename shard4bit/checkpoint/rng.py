"""States of the random number generators of a rank: Python's, numpy's and torch's."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shard4bit.checkpoint.manifest import Manifest
from shard4bit.checkpoint.pieces import Piece, Rect

PREFIX = "rng/"


def _bits(value: float) -> int:
    return int(np.float64(value).view(np.int64))


def _float(bits: int) -> float:
    return float(np.int64(bits).view(np.float64))


def capture() -> dict[str, Tensor]:
    """name -> vector. CUDA's is that of the current device."""
    version, words, gauss = random.getstate()
    python = [version, int(gauss is not None), _bits(gauss or 0.0), *words]
    out = {"python": torch.tensor(python, dtype=torch.int64), "torch": torch.get_rng_state()}
    state: dict[str, Any] = np.random.get_state(legacy=False)  # type: ignore[assignment]
    if state["bit_generator"] == "MT19937":  # numpy's own, unless somebody replaced it
        inner = state["state"]
        legacy = [*inner["key"].tolist(), inner["pos"], state["has_gauss"], _bits(state["gauss"])]
        out["numpy"] = torch.tensor(legacy, dtype=torch.int64)
    if torch.cuda.is_available():
        out["cuda"] = torch.cuda.get_rng_state()
    return out


def restore(states: Mapping[str, Tensor]) -> None:
    """Of vectors as ``capture`` gives them, by key."""
    if "rng/python" in states:
        version, has, gauss, *words = states["rng/python"].tolist()
        random.setstate((version, tuple(words), _float(gauss) if has else None))
    if "rng/numpy" in states:
        *key, pos, has, gauss = states["rng/numpy"].tolist()
        np.random.set_state(("MT19937", np.array(key, np.uint32), pos, has, _float(gauss)))
    if "rng/torch" in states:
        torch.set_rng_state(states["rng/torch"])
    if "rng/cuda" in states:
        torch.cuda.set_rng_state(states["rng/cuda"])


def pieces(rank: int, world_size: int) -> list[Piece]:
    """This rank's row of each table."""
    return [
        Piece(PREFIX + name, (world_size, len(state)), Rect(rank, rank + 1, 0, len(state)), state[None])
        for name, state in capture().items()
    ]


def wanted(manifest: Manifest, use: bool, rank: int, world_size: int) -> tuple[list[Piece], list[str]]:
    """Memory for this rank's row of each saved table that fits this rank's generators, and the names of
    those that do not: saved by another number of ranks, or by another version of torch."""
    saved = {k: v for k, v in manifest.tensors.items() if k.startswith(PREFIX)} if use else {}
    ours = {p.key: p for p in pieces(rank, world_size)} if saved else {}
    fit = [k for k, v in saved.items() if k in ours and (ours[k].shape, ours[k].dtype) == (v.shape, v.dtype)]
    return [replace(ours[k], data=ours[k].data.clone()) for k in fit], sorted(set(saved) - set(fit))
