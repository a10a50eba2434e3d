"""The checkpoint that a command names."""

from __future__ import annotations

from math import prod
from pathlib import Path

from shard4bit.checkpoint import store
from shard4bit.checkpoint.manifest import NAME, SIZES, Manifest, TensorInfo
from shard4bit.cli.tables import UsageError


def directory_of(text: str) -> Path:
    """A checkpoint's directory: the one named, or the newest complete one in it. Raises UsageError for
    what is no directory, CheckpointError for one without a checkpoint."""
    path = Path(text)
    if not path.is_dir():
        raise UsageError(f"{path}: no such directory; expected a checkpoint (step-…) or a directory of them")
    return path if (path / NAME).is_file() else store.latest(path)


def open_checkpoint(text: str) -> tuple[Path, Manifest]:
    """The same with its manifest, whose files are all there at their full size."""
    return store.find(directory_of(text))


def tensor_bytes(info: TensorInfo) -> int:
    return prod(info.shape) * SIZES[info.dtype]


def state_keys(manifest: Manifest) -> dict[str, list[str]]:
    """The keys of each parameter's states. (A name may begin with another's: the longest one counts.)"""
    names = set(manifest.parameters)
    out: dict[str, list[str]] = {name: [] for name in names}
    for key in manifest.tensors:
        kind, _, rest = key.partition("/")
        name = rest.rpartition("/")[0]
        if kind == "state" and name in names:
            out[name].append(key)
    return out
