"""manifest.json: what a checkpoint holds and where. Plain JSON with a checksum of itself; no pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from shard4bit.checkpoint.pieces import SIZES, Rect, check_cover
from shard4bit.checkpoint.strict import count, hexadecimal, parse, text
from shard4bit.errors import CheckpointError

NAME = "manifest.json"
FORMAT = "shard4bit"
VERSION = 1
#: A 70 B model on 1,024 ranks takes 1 to 10 MB. The limit bounds the memory that parsing can take.
MAX_BYTES = 64 << 20
_HEAD = b'{"checksum":"'
_BODY = len(_HEAD) + 16 + len(b'",')


def file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


@dataclass(frozen=True)
class Entry:
    """One rectangle of a tensor, and the name of the file that has it."""

    file: str
    rect: Rect


@dataclass
class TensorInfo:
    """shape: (rows, columns). layout: (n, 5) int64, each row the number of a file (rank) and the rectangle
    that it has: row0, row1, col0, col1. They tile the tensor."""

    dtype: str
    shape: tuple[int, int]
    layout: np.ndarray

    @property
    def entries(self) -> list[Entry]:
        return [Entry(file_name(f), Rect(*r)) for f, *r in self.layout.tolist()]

    def touching(self, rect: Rect) -> list[tuple[int, Rect]]:
        """(number of a file, rectangle that it has) of all that have a part of ``rect``."""
        _, row0, row1, col0, col1 = self.layout.T
        found = (row0 < rect.row1) & (row1 > rect.row0) & (col0 < rect.col1) & (col1 > rect.col0)
        return [(f, Rect(*r)) for f, *r in self.layout[found].tolist()]


@dataclass
class Manifest:
    """step: the caller's; parameters: name -> shape, step count and specs of the moments; groups:
    parameter names and options of each parameter group; extra: the caller's (see extra.py).

    files: name -> bytes. headers: name -> checksum of the file's header.
    """

    step: int
    world_size: int
    tensors: dict[str, TensorInfo]
    files: dict[str, int]
    parameters: dict[str, Any]
    groups: list[dict[str, Any]]
    content: dict[str, bool]
    extra: Any = None
    headers: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> bytes:
        layouts: list[list[list[int]]] = []
        known: dict[bytes, int] = {}
        tensors = {}
        for key, info in self.tensors.items():
            number = known.setdefault(info.layout.tobytes(), len(layouts))
            if number == len(layouts):
                layouts.append(info.layout.tolist())
            tensors[key] = {"dtype": info.dtype, "shape": list(info.shape), "layout": number}
        raw = seal(
            {
                "format": FORMAT,
                "version": VERSION,
                "step": self.step,
                "world_size": self.world_size,
                "content": self.content,
                "files": [{"header": self.headers[n], "size": self.files[n]} for n in sorted_names(self)],
                "parameters": self.parameters,
                "groups": self.groups,
                "extra": self.extra,
                "layouts": layouts,
                "tensors": tensors,
            }
        )
        if len(raw) > MAX_BYTES:
            raise CheckpointError(
                f"the manifest would have {len(raw)} bytes, more than {MAX_BYTES}: put large lists in extra "
                "into tensors"
            )
        return raw


def sorted_names(manifest: Manifest) -> list[str]:
    """The files in the order of ranks."""
    return [file_name(rank) for rank in range(manifest.world_size)]


def seal(body: dict[str, Any]) -> bytes:
    """A manifest's bytes: the checksum of all others first."""
    raw = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    return _HEAD + xxhash.xxh3_64_hexdigest(raw).encode() + b'",' + raw[1:]


def read_manifest(directory: Path) -> Manifest:
    """Read and check a manifest. Raises CheckpointError, naming what is wrong."""
    path = directory / NAME
    try:
        with open(path, "rb", opener=_no_links) as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise CheckpointError(f"{directory} holds no {NAME}: not a shard4bit checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    return parse_manifest(raw, str(path))


def _no_links(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def parse_manifest(raw: bytes, path: str = NAME) -> Manifest:
    """Raises CheckpointError for anything but the bytes of a good manifest."""
    if len(raw) > MAX_BYTES:
        raise CheckpointError(f"{path} has more than {MAX_BYTES} bytes: not a manifest")
    try:
        body = parse(raw)
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the manifest of a shard4bit checkpoint")
    if body.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {str(body.get('version'))[:20]}, this release reads {VERSION}: "
            "update shard4bit"
        )
    sealed = _HEAD + xxhash.xxh3_64_hexdigest(b"{" + raw[_BODY:]).encode() + b'",'
    if raw[:_BODY] != sealed:
        raise CheckpointError(f"{path} was changed after it was written: its checksum differs")
    try:
        return _parse(body)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise CheckpointError(f"{path}: {error}") from None
        raise CheckpointError(f"{path} is malformed: {type(error).__name__} {error}") from None


def _parse(body: dict[str, Any]) -> Manifest:
    files, headers = {}, {}
    if count(body["world_size"]) != len(body["files"]) or not body["files"]:
        raise ValueError(f"{len(body['files'])} files of {body['world_size']} ranks")
    if len(body["layouts"]) > len(body["tensors"]):
        raise ValueError(f"{len(body['layouts'])} layouts of {len(body['tensors'])} tensors")
    for rank, about in enumerate(body["files"]):
        files[file_name(rank)] = count(about["size"])
        headers[file_name(rank)] = hexadecimal(about["header"])
    layouts = [_layout(rows, len(files)) for rows in body["layouts"]]
    tensors, checked, room = {}, set[tuple[int, int, int]](), sum(files.values())
    for key, raw in body["tensors"].items():
        rows, cols = map(count, raw["shape"])
        dtype, number = text(raw["dtype"]), count(raw["layout"])
        if dtype not in SIZES:
            raise CheckpointError(f"{key} has the unknown dtype {dtype[:20]!r}")
        room -= count(rows * cols * SIZES[dtype])
        if room < 0:  # said before anybody makes room for a tensor
            raise CheckpointError(f"the tensors up to {key} have more bytes than the files")
        if number >= len(layouts):
            raise CheckpointError(f"{key} has layout {number} of {len(layouts)}")
        if (number, rows, cols) not in checked:
            check_cover(key, (rows, cols), layouts[number][:, 1:])
            checked.add((number, rows, cols))
        tensors[key] = TensorInfo(dtype, (rows, cols), layouts[number])
    _check_facts(body)
    return Manifest(
        step=count(body["step"]),
        world_size=len(files),
        tensors=tensors,
        files=files,
        parameters=body["parameters"],
        groups=body["groups"],
        content=body["content"],
        extra=body["extra"],
        headers=headers,
    )


def _layout(rows: Sequence[Sequence[int]], files: int) -> np.ndarray:
    """(n, 5) of a list of lists of five integers."""
    if not isinstance(rows, list) or not set(map(type, rows)) <= {list} or not set(map(len, rows)) <= {5}:
        raise ValueError("expected a layout of [file, row0, row1, col0, col1]")
    flat = list(chain.from_iterable(rows))
    if not set(map(type, flat)) <= {int}:
        raise ValueError("expected integers in a layout")
    out = np.array(flat, np.int64).reshape(-1, 5)
    if len(out) and (out.min() < 0 or out.max() >= 2**62):
        raise ValueError("a layout has negative or huge numbers")
    if len(out) and out[:, 0].max() >= files:
        raise ValueError(f"a layout names file {out[:, 0].max()} of {files}")
    return out


def _check_facts(body: dict[str, Any]) -> None:
    """What is said of parameters and groups must be of the types that loading relies on."""
    for what in ("parameters", "frozen", "optimizer"):
        if not isinstance(body["content"][what], bool):
            raise ValueError(f"content {what!r} is {body['content'][what]!r}")
    for fact in body["parameters"].values():
        count(fact.get("step", 0))
        for size in fact["shape"]:
            count(size)
        for moment, spec in fact.get("moments", {}).items():
            text(moment), text(spec)
    for group in body["groups"]:
        for name in group["parameters"]:
            text(name)
        if not isinstance(group["parameters"], list) or not isinstance(group["options"], dict):
            raise ValueError("expected a group of parameters and options")
