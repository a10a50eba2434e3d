"""Writing and finding checkpoints, collectively.

A checkpoint is written into a fresh hidden directory beside its final place and published by one
rename, after every file is on disk: a crash at any moment leaves earlier checkpoints whole.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shard4bit.checkpoint.background import Saving, raise_unseen, settle, start
from shard4bit.checkpoint.files import write_file
from shard4bit.checkpoint.manifest import NAME, Manifest, TensorInfo, file_name, read_manifest
from shard4bit.checkpoint.pieces import Piece
from shard4bit.checkpoint.plan import Plan, agree
from shard4bit.checkpoint.ranks import at_first, to_first, together, world
from shard4bit.checkpoint.reading import read_into
from shard4bit.checkpoint.upkeep import Hidden, latest, remove_leftovers, remove_old, step_name
from shard4bit.errors import CheckpointError
from shard4bit.log import log

__all__ = ["Saving", "find", "latest", "raise_unseen", "read_into", "settle", "step_name", "write"]


def write(root: Path, pieces: Sequence[Piece], about: Manifest, *, keep_last: int | None = None) -> Path:
    """Save this rank's pieces; ``about`` carries all but tensors and files. Collective.

    Returns the checkpoint's path. Raises CheckpointError on every rank if any rank fails.
    """
    job = _Job(root, pieces, about, keep_last)
    job.finish()
    return job.final


def write_later(
    root: Path, pieces: Sequence[Piece], about: Manifest, *, keep_last: int | None = None
) -> Saving:
    """The same, but return when the rank's share is copied to host memory; a thread does the rest."""
    job = _Job(root, pieces, about, keep_last)
    job.stage()
    return start(job.final, job.finish)


class _Job:
    """One save: planned in the constructor, with the caller's thread; written by ``finish``."""

    def __init__(self, root: Path, pieces: Sequence[Piece], about: Manifest, keep_last: int | None) -> None:
        self.root, self.about, self.keep_last = root, about, keep_last
        self.final, self.first = root / step_name(about.step), world()[0] == 0
        at_first(f"preparing {self.final}", lambda: _check_place(root, self.final))
        mine, self.plan = agree(f"planning {self.final}", pieces)
        share = [p for p in pieces if (p.key, p.rect) in mine]
        # elements of many bytes first, so that every tensor is aligned to its elements
        self.share = sorted(share, key=lambda p: -p.data.element_size())

    def stage(self) -> None:
        """Copy this rank's share to host memory."""

        def copy() -> None:
            self.share = [replace(p, data=p.data.detach().to("cpu", copy=True)) for p in self.share]

        together(f"copying for {self.final}", copy)

    def finish(self) -> None:
        """Write and publish."""
        hidden: Hidden | None = None

        def make() -> str:
            nonlocal hidden
            hidden = Hidden(self.root, self.final)
            remove_leftovers(self.root, hidden.path)
            return hidden.path.name

        rank, _ = world()
        begin = time.perf_counter()
        try:
            place = self.root / at_first(f"preparing {self.final}", make)
            written = to_first(
                together(f"writing {self.final}", lambda: write_file(place / file_name(rank), self.share))
            )
            at_first(
                f"publishing {self.final}",
                lambda: _publish(place, self.final, self.plan, written, self.about),
            )
        finally:
            if hidden is not None:
                hidden.close()
        size = sum(size for size, _ in written)  # on rank 0, of all
        log.info("saved %s: %.1f MB in %.2f s", self.final, size / 1e6, time.perf_counter() - begin)
        if self.keep_last is not None and self.first:
            remove_old(self.root, self.final, self.keep_last)


def _check_place(root: Path, final: Path) -> None:
    """Make the root if need be."""
    made = [p for p in (root, *root.parents) if not p.exists()]
    root.mkdir(parents=True, exist_ok=True)
    for path in made:
        _fsync_directory(path.parent)
    if os.path.lexists(final):
        raise CheckpointError(f"{final} exists already: save another step, or remove it")


def _publish(
    hidden: Path, final: Path, plan: Plan, written: Sequence[tuple[int, str]], about: Manifest
) -> None:
    for rank, (size, head) in enumerate(written):
        path = hidden / file_name(rank)
        if not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(
                f"rank 0 does not see the {size} bytes that rank {rank} wrote to {path}: all ranks must "
                "write to one shared filesystem"
            )
        about.files[path.name], about.headers[path.name] = size, head
    for key, ((dtype, shape), layout) in plan.tensors.items():
        about.tensors[key] = TensorInfo(dtype, shape, plan.layouts[layout])
    with open(hidden / NAME, "xb") as out:
        out.write(about.to_json())
        out.flush()
        os.fsync(out.fileno())
    _fsync_directory(hidden)
    if os.path.lexists(final):
        raise CheckpointError(f"{final} appeared while it was being saved: two savers?")
    os.rename(hidden, final)  # fails if ``final`` has appeared since: a checkpoint is no empty directory
    try:
        _fsync_directory(final.parent)
    except OSError:  # the rename may not outlive a crash, so it is an error, and that leaves nothing
        os.rename(final, hidden)
        raise


def _fsync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find(path: Path) -> tuple[Path, Manifest]:
    """The checkpoint at ``path`` (itself, or the newest under it), the same on all ranks. Collective."""

    def choose() -> str:
        return str(path if (path / NAME).is_file() else latest(path))

    chosen = Path(at_first(f"looking for {path}", choose))
    manifest = together(f"reading {chosen}", lambda: read_manifest(chosen))
    # A rank checks the files that it opens; that all are there is for one rank to see.
    at_first(f"reading {chosen}", lambda: check_files(chosen, manifest))
    return chosen, manifest


def check_files(directory: Path, manifest: Manifest) -> None:
    """Every file that the manifest lists must be there, whole."""
    for name, size in manifest.files.items():
        path = directory / name
        if not path.is_file() or path.is_symlink():
            raise CheckpointError(f"{path} is missing: the checkpoint is incomplete")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, expected {size}: damaged")
