"""manifest.json: what a checkpoint holds and where. Plain JSON with a checksum of itself; no pickle."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from shard4bit.checkpoint.pieces import DTYPES, Rect, check_cover
from shard4bit.errors import CheckpointError

NAME = "manifest.json"
FORMAT = "shard4bit"
VERSION = 1
SIZES = {name: dtype.itemsize for dtype, name in DTYPES.items()}


@dataclass
class Entry:
    """One rectangle of a tensor in a file: row-major, from byte ``begin``.

    checksums: xxh3-64 of each stretch of ``chunk_rows`` rows (the last may be shorter), in hex.
    """

    file: str
    rect: Rect
    begin: int
    chunk_rows: int
    checksums: list[str]


@dataclass
class TensorInfo:
    dtype: str
    shape: tuple[int, int]
    entries: list[Entry] = field(default_factory=list)


@dataclass
class Manifest:
    """step: the caller's; parameters: name -> shape, step count and specs of the moments; groups:
    parameter names and options of each parameter group; extra: the caller's JSON."""

    step: int
    world_size: int
    tensors: dict[str, TensorInfo]
    files: dict[str, int]  # name -> bytes
    parameters: dict[str, Any]
    groups: list[dict[str, Any]]
    content: dict[str, bool]
    extra: Any = None

    def to_json(self) -> bytes:
        tensors = {
            key: {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "pieces": [
                    {
                        "file": e.file,
                        "rows": [e.rect.row0, e.rect.row1],
                        "columns": [e.rect.col0, e.rect.col1],
                        "begin": e.begin,
                        "chunk_rows": e.chunk_rows,
                        "xxh3": e.checksums,
                    }
                    for e in info.entries
                ],
            }
            for key, info in self.tensors.items()
        }
        body = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "world_size": self.world_size,
            "content": self.content,
            "files": self.files,
            "parameters": self.parameters,
            "groups": self.groups,
            "extra": self.extra,
            "tensors": tensors,
        }
        text = json.dumps({**body, "checksum": _checksum(body)}, sort_keys=True, separators=(",", ":"))
        return text.encode()


def _checksum(body: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def read_manifest(directory: Path) -> Manifest:
    """Parse and check a manifest. Raises CheckpointError, naming what is wrong."""
    path = directory / NAME
    try:
        body = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{directory} holds no {NAME}: not a shard4bit checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the manifest of a shard4bit checkpoint")
    if body.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {body.get('version')!r}, this release reads {VERSION}: "
            "update shard4bit"
        )
    if body.pop("checksum", None) != _checksum(body):
        raise CheckpointError(f"{path} was changed after it was written: its checksum differs")
    try:
        manifest = _parse(body)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is malformed: {type(error).__name__} {error}") from None
    return manifest


def _parse(body: dict[str, Any]) -> Manifest:
    tensors = {}
    for key, raw in body["tensors"].items():
        rows, cols = raw["shape"]
        info = TensorInfo(raw["dtype"], (_count(rows), _count(cols)))
        if info.dtype not in SIZES:
            raise CheckpointError(f"{key} has the unknown dtype {info.dtype!r}")
        for piece in raw["pieces"]:
            rect = Rect(*map(_count, piece["rows"]), *map(_count, piece["columns"]))
            entry = Entry(piece["file"], rect, _count(piece["begin"]), piece["chunk_rows"], piece["xxh3"])
            if entry.file not in body["files"]:
                raise CheckpointError(f"{key} is said to be in {entry.file!r}, which is not listed")
            chunks = -(-(rect.row1 - rect.row0) // entry.chunk_rows) if entry.chunk_rows > 0 else -1
            if chunks != len(entry.checksums):
                raise CheckpointError(f"{key} has {len(entry.checksums)} checksums, not {chunks}")
            info.entries.append(entry)
        check_cover(key, info.shape, [e.rect for e in info.entries])
        tensors[key] = info
    for name, size in body["files"].items():
        if Path(name).name != name or name.startswith("."):
            raise CheckpointError(f"file name {name!r} leaves the checkpoint's directory")
        _count(size)
    _check_facts(body)
    return Manifest(
        step=_count(body["step"]),
        world_size=_count(body["world_size"]),
        tensors=tensors,
        files=body["files"],
        parameters=body["parameters"],
        groups=body["groups"],
        content=body["content"],
        extra=body["extra"],
    )


def _check_facts(body: dict[str, Any]) -> None:
    """What is said of parameters and groups must be of the types that loading relies on."""
    for what in ("parameters", "frozen", "optimizer"):
        if not isinstance(body["content"][what], bool):
            raise ValueError(f"content {what!r} is {body['content'][what]!r}")
    for fact in body["parameters"].values():
        _count(fact.get("step", 0))
        if not isinstance(fact["shape"], list) or not isinstance(fact.get("moments", {}), dict):
            raise ValueError(f"expected a shape and moments, got {fact!r}")
    for group in body["groups"]:
        if not isinstance(group["parameters"], list) or not isinstance(group["options"], dict):
            raise ValueError(f"expected a group of parameters and options, got {group!r}")


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**62:
        raise ValueError(f"expected a count, got {value!r}")
    return value
