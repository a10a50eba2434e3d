"""Writing and reading checkpoints, collectively.

A checkpoint is written into a fresh hidden directory beside its final place and published by one
rename, after every file is on disk: a crash at any moment leaves earlier checkpoints whole.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from shard4bit.checkpoint.files import file_name, read_rect, write_file
from shard4bit.checkpoint.manifest import NAME, Entry, Manifest, TensorInfo, read_manifest
from shard4bit.checkpoint.pieces import Holding, Piece, Rect, check_unique, holding, owned
from shard4bit.checkpoint.ranks import together, world
from shard4bit.errors import CheckpointError

PREFIX = "step-"


def step_name(step: int) -> str:
    return f"{PREFIX}{step:010d}"


def latest(root: Path) -> Path:
    """The newest complete checkpoint under ``root``; CheckpointError if there is none."""
    try:
        names = sorted(os.listdir(root), reverse=True)
    except OSError as error:
        raise CheckpointError(f"{root} cannot be listed: {error.strerror}") from None
    for name in names:
        if name.startswith(PREFIX) and name[len(PREFIX) :].isdigit() and (root / name / NAME).is_file():
            return root / name
    raise CheckpointError(f"{root} holds no complete checkpoint ({PREFIX}…/{NAME})")


def write(root: Path, pieces: Sequence[Piece], about: Manifest) -> Path:
    """Save this rank's pieces; ``about`` carries all but tensors and files. Collective.

    Returns the checkpoint's path. Raises CheckpointError on every rank if any rank fails.
    """
    rank, _ = world()
    final = root / step_name(about.step)

    def prepare() -> Holding:
        check_unique(pieces)
        return holding(pieces)

    holdings = together(f"preparing {final}", prepare)
    made = together(f"preparing {final}", lambda: _make_directory(root, final) if rank == 0 else "")
    hidden = root / made[0]
    try:
        mine = together(f"planning {final}", lambda: owned(holdings, rank))[rank]
        written = together(
            f"writing {final}",
            lambda: write_file(hidden / file_name(rank), _in_file(pieces, mine)),
        )
        together(
            f"publishing {final}",
            lambda: _publish(hidden, final, holdings, written, about) if rank == 0 else None,
        )
    finally:
        if rank == 0 and hidden.exists():
            shutil.rmtree(hidden, ignore_errors=True)
    return final


def _in_file(pieces: Sequence[Piece], mine: set[tuple[str, Rect]]) -> list[Piece]:
    """This rank's share, elements of many bytes first, so that every tensor is aligned to its elements."""
    share = [p for p in pieces if (p.key, p.rect) in mine]
    return sorted(share, key=lambda p: -p.data.element_size())


def _make_directory(root: Path, final: Path) -> str:
    root.mkdir(parents=True, exist_ok=True)
    if final.exists():
        raise CheckpointError(f"{final} exists already: save another step, or remove it")
    hidden = f".{final.name}-{uuid.uuid4().hex[:12]}"
    (root / hidden).mkdir()
    return hidden


def _publish(
    hidden: Path,
    final: Path,
    holdings: Sequence[Holding],
    written: Sequence[tuple[int, dict[str, list[Entry]]]],
    about: Manifest,
) -> None:
    for rank, (size, entries) in enumerate(written):
        path = hidden / file_name(rank)
        if not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(
                f"rank 0 does not see the {size} bytes that rank {rank} wrote to {path}: all ranks must "
                "write to one shared filesystem"
            )
        about.files[path.name] = size
        for key, found in entries.items():
            dtype, shape, _ = holdings[rank][key]
            about.tensors.setdefault(key, TensorInfo(dtype, shape)).entries += found
    for held in holdings:  # tensors without elements
        for key, (dtype, shape, _) in held.items():
            about.tensors.setdefault(key, TensorInfo(dtype, shape))
    with open(hidden / NAME, "xb") as out:
        out.write(about.to_json())
        out.flush()
        os.fsync(out.fileno())
    _fsync_directory(hidden)
    if final.exists():
        raise CheckpointError(f"{final} appeared while it was being saved: two savers?")
    os.rename(hidden, final)
    _fsync_directory(final.parent)


def _fsync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find(path: Path) -> tuple[Path, Manifest]:
    """The checkpoint at ``path`` (itself, or the newest under it), the same on all ranks. Collective."""

    rank, _ = world()
    manifest: Manifest | None = None

    def choose() -> str:
        return str(path if (path / NAME).is_file() else latest(path))

    def read() -> None:
        nonlocal manifest
        manifest = read_manifest(chosen)
        _check_files(chosen, manifest)

    chosen = Path(together(f"looking for {path}", lambda: choose() if rank == 0 else "")[0])
    together(f"reading {chosen}", read)
    assert manifest is not None
    return chosen, manifest


def _check_files(directory: Path, manifest: Manifest) -> None:
    """Every file that the manifest lists must be there, whole."""
    for name, size in manifest.files.items():
        path = directory / name
        if not path.is_file() or path.is_symlink():
            raise CheckpointError(f"{path} is missing: the checkpoint is incomplete")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, expected {size}: damaged")


def read_into(directory: Path, manifest: Manifest, pieces: Sequence[Piece]) -> None:
    """Fill the pieces' memory. Collective; every needed byte is checked on all ranks before the first
    one changes anything. Raises CheckpointError on every rank if any finds damage."""

    def check() -> None:
        for piece in pieces:
            read_rect(directory, piece.key, manifest.tensors[piece.key], piece.rect, _ignore)

    def fill() -> None:
        with torch.no_grad():
            for piece in pieces:
                _fill(directory, manifest, piece)

    together(f"checking {directory}", check)
    together(f"loading {directory}", fill)


def _ignore(rect: Rect, values: Tensor) -> None:
    """Reading alone checks the bytes."""


def _fill(directory: Path, manifest: Manifest, piece: Piece) -> None:
    origin = piece.rect

    def copy(rect: Rect, values: Tensor) -> None:
        target = piece.data[
            rect.row0 - origin.row0 : rect.row1 - origin.row0,
            rect.col0 - origin.col0 : rect.col1 - origin.col0,
        ]
        target.copy_(values)

    read_rect(directory, piece.key, manifest.tensors[piece.key], origin, copy)
