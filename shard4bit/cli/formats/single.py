"""One safetensors file: parameters under their names, states under ``optimizer.NAME.…``, the rest in its
metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shard4bit.checkpoint.files import TORCH_DTYPES
from shard4bit.checkpoint.pieces import DTYPES
from shard4bit.cli.formats.package import MOMENTS, Entry, Package, Stored, filled, natural
from shard4bit.cli.tables import UsageError, progress
from shard4bit.layout import Slab
from shard4bit.spec import parse_spec
from shard4bit.state import Part, parts, state_key

KEY, PREFIX, VERSION = "shard4bit", "optimizer.", 1


def _opened(path: str) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be read as safetensors: {error}") from None


def _load(path: str, key: str) -> Tensor:
    with _opened(path) as file:
        return file.get_tensor(key)


def model_entries(path: str) -> dict[str, Entry]:
    """The tensors of a model's safetensors file."""
    out = {}
    with _opened(path) as file:
        for key in sorted(file.keys(), key=natural):
            if key.startswith(PREFIX):
                continue
            part = file.get_slice(key)
            dtype = TORCH_DTYPES.get(part.get_dtype())
            if dtype is None:
                raise UsageError(
                    f"{path}: {key} has dtype {part.get_dtype()}, which a checkpoint cannot hold"
                )
            out[key] = Entry(key, tuple(part.get_shape()), partial(_load, path, key), dtype)
    return out


def read(path: str) -> Package:
    with _opened(path) as file:
        metadata, keys = file.metadata() or {}, set(file.keys())
    try:
        about = json.loads(metadata[KEY])
        facts, groups, step, extra = (about[k] for k in ("parameters", "groups", "step", "extra"))
        if about["version"] != VERSION:
            raise UsageError(f"{path} was written by another release of shard4bit: update it")
        entries = model_entries(path)
        for name, fact in facts.items():
            entries[name] = _with_state(path, keys, name, fact, entries.get(name))
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
        raise UsageError(
            f"{path} is not of convert ({type(error).__name__} {error}); a model's file is for --model"
        ) from None
    return Package(step, list(entries.values()), groups, extra)


def _with_state(path: str, keys: set[str], name: str, fact: Any, entry: Entry | None) -> Entry:
    shape, moments = tuple(fact["shape"]), {}
    for moment, text in fact["moments"].items():
        spec = parse_spec(text, signed=MOMENTS[moment][1], argument=f"{name}: {moment}")
        missing = [k for k in (_key(name, moment, p) for p in parts(spec)) if k not in keys]
        if missing:
            raise UsageError(f"{path} lacks {missing[0]}")
        get = partial(_part, path, name, moment)
        moments[moment] = Stored(spec, partial(filled, moment, spec, shape, get))
    if entry is None:
        return Entry(name, shape, moments=moments, step=fact["step"])
    return Entry(name, shape, entry.value, entry.dtype, moments, fact["step"])


def _key(name: str, moment: str, part: Part) -> str:
    return f"{PREFIX}{name}.{state_key(moment, part.suffix)}"


def _part(path: str, name: str, moment: str, suffix: str) -> Tensor:
    return _load(path, f"{PREFIX}{name}.{state_key(moment, suffix)}")


def write(package: Package, path: str) -> str:
    """Write a new file, tensor by tensor; states are shaped as ``optimizer.state`` shows them."""
    items: list[tuple[str, torch.dtype, tuple[int, ...], Callable[[], Tensor]]] = []
    facts = {}
    for entry in package.entries:
        if entry.value is not None:
            items.append((entry.name, entry.dtype, entry.shape, entry.value))
        moments = {name: str(stored.spec) for name, stored in entry.moments.items()}
        if moments or entry.step is not None:
            facts[entry.name] = {"shape": entry.shape, "step": entry.step, "moments": moments}
        for name, stored in entry.moments.items():
            whole = Slab.whole(entry.shape)
            for part in parts(stored.spec):
                load = partial(_of, stored, part.suffix)
                items.append((_key(entry.name, name, part), part.dtype, part.local_shape(whole), load))
    items.sort(key=lambda item: -item[1].itemsize)  # every tensor is aligned to its elements
    about = {"version": VERSION, "step": package.step, "groups": package.groups, "extra": package.extra}
    metadata = {"format": "pt", KEY: json.dumps({**about, "parameters": facts})}
    _stream(Path(path), items, metadata)
    return path


def _of(stored: Stored, suffix: str) -> Tensor:
    return stored.load().tensors[suffix]


def _stream(path: Path, items: Any, metadata: dict[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for key, dtype, shape, _ in items:
        if key in header:
            raise UsageError(f"two tensors would have the name {key}")
        end = offset + prod(shape) * dtype.itemsize
        header[key] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    hidden = path.with_name(f".{path.name}.part")
    try:
        with open(hidden, "xb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for _, dtype, shape, load in progress(items, "writing"):
                tensor = load().to(dtype).contiguous().view(-1)
                assert tensor.numel() == prod(shape)
                out.write(tensor.view(torch.uint8).numpy().data)
            out.flush()
            os.fsync(out.fileno())
        hidden.rename(path)
    finally:
        hidden.unlink(missing_ok=True)
