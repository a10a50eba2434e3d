"""The canonical checkpoint as a package."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shard4bit.checkpoint import store
from shard4bit.checkpoint.files import TORCH_DTYPES
from shard4bit.checkpoint.manifest import Manifest
from shard4bit.checkpoint.pieces import Piece, Rect
from shard4bit.checkpoint.reading import read as read_parts
from shard4bit.cli.formats.package import MOMENTS, Entry, Other, Package, Stored, filled, natural
from shard4bit.cli.found import open_checkpoint
from shard4bit.cli.tables import UsageError
from shard4bit.layout import matrix_view
from shard4bit.spec import parse_spec
from shard4bit.state import Moment, parts, state_key


def read(path: str) -> Package:
    directory, manifest = open_checkpoint(path)
    entries = [_entry(directory, manifest, name) for name in sorted(manifest.parameters, key=natural)]
    others = {
        key: Other(info.shape, TORCH_DTYPES[info.dtype], partial(_tensor, directory, manifest, key))
        for key, info in manifest.tensors.items()
        if not key.startswith(("model/", "state/"))
    }
    return Package(manifest.step, entries, manifest.groups, manifest.extra, others)


def _entry(directory: Path, manifest: Manifest, name: str) -> Entry:
    fact = manifest.parameters[name]
    shape, key = tuple(fact["shape"]), f"model/{name}"
    moments = {}
    for moment, text in fact.get("moments", {}).items():
        spec = parse_spec(text, signed=MOMENTS[moment][1], argument=f"{name}: {moment}")
        get = partial(_part, directory, manifest, f"state/{name}/", moment)
        moments[moment] = Stored(spec, partial(filled, moment, spec, shape, get))
    if key not in manifest.tensors:
        return Entry(name, shape, None, moments=moments, step=fact.get("step"))
    dtype = TORCH_DTYPES[manifest.tensors[key].dtype]
    return Entry(
        name, shape, partial(_value, directory, manifest, key, shape), dtype, moments, fact.get("step")
    )


def _part(directory: Path, manifest: Manifest, prefix: str, moment: str, suffix: str) -> Tensor:
    return _tensor(directory, manifest, prefix + state_key(moment, suffix))


def _value(directory: Path, manifest: Manifest, key: str, shape: tuple[int, ...]) -> Tensor:
    return _tensor(directory, manifest, key).view(shape)


def _tensor(directory: Path, manifest: Manifest, key: str) -> Tensor:
    """A whole tensor (rows, columns), every byte of it checked."""
    info = manifest.tensors[key]
    out = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])

    def put(number: int, rect: Rect, values: Tensor) -> None:
        out[rect.row0 : rect.row1, rect.col0 : rect.col1] = values

    read_parts(directory, manifest, [(key, Rect(0, info.shape[0], 0, info.shape[1]))], put)
    return out


# ---- writing ------------------------------------------------------------------------------------------


class _Lazy:
    """Rows of a tensor that is loaded when they are asked for; what the writer of files uses of a Tensor."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, load: Callable[[], Tensor]) -> None:
        self.shape, self.dtype, self.load = torch.Size(shape), dtype, load
        self.device = torch.device("cpu")

    def element_size(self) -> int:
        return self.dtype.itemsize

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Tensor:
        return self.load().reshape(self.shape)[rows]


def write(package: Package, path: str) -> str:
    """Write ``path``/step-…; returns its path. Memory: one tensor, or one moment before and after."""
    names = {name for group in package.groups for name in group["parameters"]}
    stated = {entry.name for entry in package.entries if entry.moments}
    if stated - names:
        raise UsageError(f"{min(stated - names)} has a state but is in no parameter group of the source")
    valued = [entry for entry in package.entries if entry.value is not None]
    facts: dict[str, Any] = {}
    for entry in package.entries:
        facts[entry.name] = {"shape": list(entry.shape)}
        if entry.step is not None or entry.moments:
            moments = {name: str(stored.spec) for name, stored in entry.moments.items()}
            facts[entry.name] |= {"step": entry.step or 0, "moments": moments}
    about = Manifest(
        step=package.step,
        world_size=1,
        tensors={},
        files={},
        parameters=facts,
        groups=package.groups,
        content={
            "parameters": bool(valued),
            "frozen": any(not entry.moments for entry in valued),
            "optimizer": bool(stated),
        },
        extra=package.extra,
    )
    pieces = [piece for entry in package.entries for piece in _pieces(entry)]
    pieces += [_piece(key, other.shape, other.dtype, other.load) for key, other in package.others.items()]
    return str(store.write(Path(path), pieces, about))


def _pieces(entry: Entry) -> list[Piece]:
    view = matrix_view(entry.shape)
    out = []
    if entry.value is not None:
        out.append(_piece(f"model/{entry.name}", (view.rows, view.cols), entry.dtype, entry.value))
    for name, stored in entry.moments.items():
        for part in parts(stored.spec):
            units = -(-view.cols // part.unit)
            shape = {
                "full": (view.rows, view.cols),
                "units": (view.rows, units),
                "rows": (view.rows, 1),
                "cols": (1, view.cols),
                "scalar": (1, 1),
            }[part.role]
            key = f"state/{entry.name}/{state_key(name, part.suffix)}"
            out.append(_piece(key, shape, part.dtype, partial(_tensor_of, stored, part.suffix)))
    return out


def _piece(key: str, shape: tuple[int, int], dtype: torch.dtype, load: Callable[[], Tensor]) -> Piece:
    data: Any = _Lazy(shape, dtype, load)
    return Piece(key, shape, Rect(0, shape[0], 0, shape[1]), data)


def _tensor_of(stored: Stored, suffix: str) -> Tensor:
    return _loaded(stored).tensors[suffix]


@lru_cache(maxsize=1)  # the tensors of one moment are asked for one after the other
def _loaded(stored: Stored) -> Moment:
    return stored.load()
