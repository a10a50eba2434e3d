"""Bytes of text to train on, and batches that do not depend on the number of ranks.

The batch of a step is a function of (seed, step) alone; rank r of n takes the r-th of n nearly
equal slices of its rows, so any number of ranks up to the batch size sees the same global batch.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
TEXT_SUFFIXES = (".py", ".txt", ".md", ".rst")
MAX_BYTES = 16_000_000


@dataclass(frozen=True)
class Corpus:
    """Text as uint8 arrays: ``train`` and ``validation``. ``source`` is a fingerprint for records."""

    train: np.ndarray
    validation: np.ndarray
    source: str


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [x for x in folders if x not in EXCLUDED_FOLDERS]
        found += [Path(parent, name) for name in names if name.endswith(suffixes)]
    return sorted(found)


def _read(source: Path | None) -> bytes:
    folder = Path(sysconfig.get_path("stdlib")) if source is None else source
    if folder.is_file():
        return folder.read_bytes()[:MAX_BYTES]
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such file or folder")
    suffixes = (".py",) if source is None else TEXT_SUFFIXES
    parts: list[bytes] = []
    size = 0
    for path in _files(folder, suffixes):
        if size < MAX_BYTES:
            parts.append(path.read_bytes())
            size += len(parts[-1])
    if not parts:
        raise ValueError(f"{folder}: no files ending in {', '.join(suffixes)} there")
    return b"".join(parts)[:MAX_BYTES]


def load_corpus(source: Path | None, context: int) -> Corpus:
    """Read text and split it: the last of every 20 stretches is held out for validation.

    source: a text file, a folder (its .py, .txt, .md and .rst files, sorted), or None for the
    sources of Python's own standard library. At most 16 MB are read. context: bytes per sequence.
    Raises ValueError where there is nothing to read, or fewer than 40 sequences of text.
    """
    raw = _read(source)
    if len(raw) < 40 * (context + 1):
        raise ValueError(
            f"only {len(raw)} bytes of text: expected at least {40 * (context + 1)} "
            f"for a context of {context}"
        )
    text = np.frombuffer(raw, dtype=np.uint8)
    stretch = min(16384, len(text) // 20)
    held_out = np.arange(len(text)) // stretch % 20 == 19
    return Corpus(text[~held_out], text[held_out], hashlib.sha256(raw).hexdigest()[:16])


def global_batch(text: np.ndarray, seed: int, step: int, batch: int, context: int) -> np.ndarray:
    """The int64 array (batch, context + 1) of byte values that all ranks share at (seed, step).

    Its rows start anywhere in ``text``, drawn by a counter-based generator that needs no history.
    """
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))
    starts = generator.integers(0, len(text) - context, size=batch)
    return text[starts[:, None] + np.arange(context + 1)].astype(np.int64)


def rank_slice(rows: np.ndarray, rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """A rank's inputs and targets, each (its rows, context) int64, from a global batch.

    The slices of all ranks, put together in rank order, are the global batch; their lengths differ
    by at most one row. Raises ValueError where a rank would get no row.
    """
    if len(rows) < world_size:
        raise ValueError(f"a batch of {len(rows)} sequences for {world_size} ranks: some get none")
    own = torch.from_numpy(np.array_split(rows, world_size)[rank])
    return own[:, :-1], own[:, 1:]
