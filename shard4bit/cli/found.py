"""The checkpoint that a command names, recognised by what lies there."""

from __future__ import annotations

from math import prod
from pathlib import Path

from shard4bit.checkpoint import store
from shard4bit.checkpoint.manifest import NAME, SIZES, Manifest, TensorInfo
from shard4bit.cli.tables import UsageError
from shard4bit.errors import CheckpointError


def directory_of(text: str) -> Path:
    """A checkpoint's directory: the one named, or the newest complete one in it. Raises UsageError for
    what is no directory, CheckpointError for one without a checkpoint."""
    path = Path(text)
    if not path.is_dir():
        raise UsageError(f"{path}: no such directory; expected a checkpoint (step-…) or a directory of them")
    if (path / NAME).is_file():
        return path
    try:
        return store.latest(path)
    except CheckpointError:
        if (other := deepspeed(path)) is None:
            raise
    raise UsageError(
        f"{other[1]} is a {other[0]} checkpoint of DeepSpeed's: make a canonical one with python -m "
        f"shard4bit convert {path} TARGET --to canonical"
    )


def deepspeed(path: Path) -> tuple[str, Path] | None:
    """What a directory has of DeepSpeed's: "native" (``save_checkpoint``) or "universal", and its folder,
    which is the directory itself (named by a tag) or the one that "latest" in it names. None: nothing.

    Raises UsageError for a directory that has several kinds of checkpoints.
    """
    if (path / NAME).is_file():
        return None
    if (path / "zero").is_dir():
        return "universal", path
    if any(path.glob("*model_states.pt")):
        return "native", path
    found = [(kind, file.read_text().strip()) for kind, file in _latest(path) if file.is_file()]
    if not found:
        return None
    names = [tag for _, tag in found] + (["step-…"] if any(path.glob(f"step-*/{NAME}")) else [])
    if len(names) > 1:
        raise UsageError(f"{path} has several kinds of checkpoints: name one, {path}/({' | '.join(names)})")
    [(kind, tag)] = found
    if not (path / tag).is_dir():
        raise UsageError(
            f"{path}: its newest {kind} checkpoint of DeepSpeed's is {tag!r}, which is not there"
        )
    return kind, path / tag


def _latest(path: Path) -> list[tuple[str, Path]]:
    return [("native", path / "latest"), ("universal", path / "latest_universal")]


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
