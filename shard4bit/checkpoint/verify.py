"""Checking a whole checkpoint without a model: every checksum, every header, every tensor's cover."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shard4bit.checkpoint.files import Scratch, chunks, opened
from shard4bit.checkpoint.manifest import Manifest, file_name, read_manifest
from shard4bit.checkpoint.pieces import Rect
from shard4bit.checkpoint.reading import match
from shard4bit.errors import CheckpointError

Progress = Callable[[int, int], None]


def verify(directory: str | Path, progress: Progress | None = None) -> list[str]:
    """The faults of one checkpoint (a step's directory), each naming file and tensor; empty if it is whole.

    Checks the manifest (and with it that every tensor is covered without gap or overlap), that each file
    is there with its size and the header that the manifest promises, and every byte of data once.
    progress(bytes done, bytes in all) is called now and then. Raises nothing for damage of any kind.
    """
    directory = Path(directory)
    try:
        manifest = read_manifest(directory)
    except CheckpointError as error:
        return [str(error)]
    faults: list[str] = []
    count = _Count(sum(manifest.files.values()), progress)
    expected: list[set[tuple[str, Rect]]] = [set() for _ in range(manifest.world_size)]
    for key, info in manifest.tensors.items():
        for file, *rect in info.layout.tolist():
            expected[file].add((key, Rect(*rect)))
    for file, parts in enumerate(expected):
        try:
            _verify_file(directory, manifest, file, parts, faults, count)
        except CheckpointError as error:
            faults.append(str(error))
    return faults


class _Count:
    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def add(self, size: int) -> None:
        self.done += size
        if self.progress is not None:
            self.progress(self.done, self.total)


def _verify_file(
    directory: Path,
    manifest: Manifest,
    file: int,
    expected: set[tuple[str, Rect]],
    faults: list[str],
    count: _Count,
) -> None:
    name = file_name(file)
    path = directory / name
    with opened(path, manifest.files[name], manifest.headers[name]) as (handle, stored):
        found = match(manifest, stored, path)
        for key, rect in sorted(expected - set(found)):
            faults.append(f"{path} lacks {key}, {rect}, which the manifest says is there")
        for key, rect in sorted(set(found) - expected):
            faults.append(f"{path} holds {key}, {rect}, which the manifest does not know")
        count.add(min((part.begin for part in stored), default=manifest.files[name]))
        scratch = Scratch()
        for part in stored:
            try:
                for _, values in chunks(handle, path, part, part.rect, scratch):
                    count.add(values.numel() * values.element_size())
            except CheckpointError as error:
                faults.append(str(error))
