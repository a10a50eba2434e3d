"""The caller's ``extra``: JSON, tensors, and what else schedulers keep in their states."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shard4bit.checkpoint.manifest import Manifest
from shard4bit.checkpoint.pieces import DTYPES, Piece, Rect
from shard4bit.errors import CheckpointError
from shard4bit.layout import matrix_view

_MARKS = ("$tensor", "$float", "$tuple", "$items", "$counter")


def encode(value: Any) -> tuple[Any, list[Tensor]]:
    """JSON for the manifest, and the tensors in it. Raises CheckpointError for anything else."""
    tensors: list[Tensor] = []
    try:
        return _encode(value, "extra", tensors), tensors
    except RecursionError:
        raise CheckpointError("extra must be JSON or tensors: it is nested too deeply") from None


def _encode(value: Any, where: str, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        if type(value) is not Tensor or value.dtype not in DTYPES or value.layout != torch.strided:
            raise CheckpointError(
                f"extra must be JSON or tensors: {where} is a {type(value).__name__} of {value.dtype}; "
                "expected a plain dense tensor of a common dtype"
            )
        tensors.append(value.detach())
        return {"$tensor": [len(tensors) - 1, list(value.shape)]}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, tuple):
        return {"$tuple": [_encode(v, f"{where}[{i}]", tensors) for i, v in enumerate(value)]}
    if isinstance(value, list):
        return [_encode(v, f"{where}[{i}]", tensors) for i, v in enumerate(value)]
    if isinstance(value, Mapping):
        items = [(k, _encode(v, f"{where}[{k!r}]", tensors)) for k, v in value.items()]
        counts = isinstance(value, Counter)  # MultiStepLR keeps one and calls its ``elements``
        if not counts and all(type(k) is str and not k.startswith("$") for k, _ in items):
            return dict(items)
        mark = "$counter" if counts else "$items"
        return {mark: [[_encode(k, f"a key of {where}", tensors), v] for k, v in items]}
    raise CheckpointError(
        f"extra must be JSON or tensors: {where} is a {type(value).__name__}; convert it, for example to a "
        "list or by torch.as_tensor"
    )


def pieces(tensors: list[Tensor]) -> list[Piece]:
    """What the rank that has them (the first) saves."""
    out = []
    for number, tensor in enumerate(tensors):
        view = matrix_view(tensor.shape)
        shape = (view.rows, view.cols)
        out.append(Piece(f"extra/{number}", shape, Rect(0, shape[0], 0, shape[1]), tensor.reshape(shape)))
    return out


def wanted(manifest: Manifest) -> list[Piece]:
    """Empty host memory for all tensors of ``extra``."""
    out = []
    types = {name: dtype for dtype, name in DTYPES.items()}
    for key, info in manifest.tensors.items():
        if key.startswith("extra/"):
            values = torch.zeros(info.shape, dtype=types[info.dtype])
            out.append(Piece(key, info.shape, Rect(0, info.shape[0], 0, info.shape[1]), values))
    return out


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The caller's value; ``tensors`` by key. Raises CheckpointError for marks that make no sense."""
    if isinstance(value, list):
        return [decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    mark = next(iter(value)) if len(value) == 1 else ""
    if mark not in _MARKS:
        return {k: decode(v, tensors) for k, v in value.items()}
    inner = value[mark]
    try:
        if mark == "$float":
            return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[inner]
        if mark == "$tuple":
            return tuple(decode(v, tensors) for v in inner)
        if mark == "$items":
            return {decode(k, tensors): decode(v, tensors) for k, v in inner}
        if mark == "$counter":
            return Counter({decode(k, tensors): decode(v, tensors) for k, v in inner})
        number, shape = inner
        return tensors[f"extra/{number}"].reshape(shape)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"extra has an odd {mark}: {type(error).__name__} {error}") from None
