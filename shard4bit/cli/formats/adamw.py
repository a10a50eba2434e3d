"""The file of a ``torch.optim.AdamW`` (or SGD) ``state_dict``, read without running anything in it."""

from __future__ import annotations

import json
import pickle
import tempfile
from collections.abc import Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shard4bit.cli.formats import single
from shard4bit.cli.formats.package import MOMENTS, OPTIONS, Entry, Package, Stored, filled, values
from shard4bit.cli.tables import UsageError, progress
from shard4bit.spec import Full


def read(path: str, model: str | None, names: str | None, step: int | None) -> Package:
    """model: safetensors of the parameters (and buffers); names: JSON list of the parameters' names in the
    optimizer's order, needed where the file has none."""
    state = _load(path)
    groups, named = _groups(state["param_groups"], names, path)
    found = {named.get(key, key): value for key, value in state["state"].items()}
    if unknown := [name for name in found if not isinstance(name, str)]:
        raise UsageError(f"{path} has a state of parameter {unknown[0]!r}, which is in none of its groups")
    entries = single.model_entries(model) if model else {}
    for group in groups:
        for name in group["parameters"]:
            entries[name] = _with_state(name, found.get(name, {}), entries.get(name), path)
    steps = [entry.step or 0 for entry in entries.values()]
    return Package(max(steps, default=0) if step is None else step, list(entries.values()), groups)


def _load(path: str) -> Mapping[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read as a file of tensors: {str(error).splitlines()[0]}"
        ) from None
    for key in ("optimizer", "optimizer_state_dict", "optim"):
        if isinstance(state, Mapping) and "param_groups" not in state and key in state:
            state = state[key]
    if not (isinstance(state, Mapping) and {"state", "param_groups"} <= set(state)):
        raise UsageError(f"{path}: expected an optimizer's state_dict, with 'state' and 'param_groups'")
    return state


def _groups(saved: Any, names: str | None, path: str) -> tuple[list[dict[str, Any]], dict[Any, str]]:
    """Groups by name, and the names of the parameters that the file numbers."""
    listed = _listed(names) if names else None
    named: dict[Any, str] = {}
    groups = []
    for group in saved:
        ids = group["params"]
        if all(isinstance(i, str) for i in ids):
            own = list(ids)
        elif "param_names" in group:
            own = list(group["param_names"])
        elif listed is not None and all(i < len(listed) for i in ids):
            own = [listed[i] for i in ids]
        else:
            raise UsageError(
                f"{path} numbers its parameters: give --names FILE, a JSON list of their names in the order "
                "in which the optimizer got them, [name for name, _ in model.named_parameters()]"
            )
        named |= dict(zip(ids, own, strict=True))
        options = {k: float(v) if isinstance(v, Tensor) else v for k, v in group.items() if k in OPTIONS}
        groups.append({"parameters": own, "options": json.loads(json.dumps(options))})
    return groups, named


def _listed(path: str) -> list[str]:
    try:
        names = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{path}: expected a JSON list of names")
    return names


def _with_state(name: str, state: Mapping[str, Any], entry: Entry | None, path: str) -> Entry:
    moments = {key: state[key] for key in MOMENTS if isinstance(state.get(key), Tensor)}
    foreign = sorted(set(state) - set(MOMENTS) - {"step"})
    if foreign:
        raise UsageError(
            f"{path}: the state of {name} has {foreign}; expected that of AdamW or SGD. (States of other "
            "libraries: shard4bit.import_state)"
        )
    shapes = {tuple(tensor.shape) for tensor in moments.values()} | ({entry.shape} if entry else set())
    if len(shapes) != 1:
        raise UsageError(
            f"{name} has shapes {sorted(shapes)} in {path} and the model" if shapes else
            f"{path} has no state of {name}: give --model, which has its shape"
        )  # fmt: skip
    shape = shapes.pop()
    stored = {
        key: Stored(Full(), partial(filled, key, Full(), shape, partial(_given, tensor)))
        for key, tensor in moments.items()
    }
    step = int(state.get("step", 0))
    if entry is None:
        return Entry(name, shape, moments=stored, step=step)
    return Entry(name, shape, entry.value, entry.dtype, stored, step)


def _given(tensor: Tensor, suffix: str) -> Tensor:
    return tensor


def write(package: Package, path: str) -> str:
    """Write the state_dict of the torch optimizer over the same groups. Tensors pass through a scratch file
    beside the target, so that they do not all have to fit into memory."""
    kind = torch.optim.SGD if package.is_sgd else torch.optim.AdamW
    usual = {k: v for k, v in kind([torch.zeros(1)]).param_groups[0].items() if k != "params"}
    order = {name: i for i, name in enumerate(n for g in package.groups for n in g["parameters"])}
    state: dict[int, dict[str, Any]] = {}
    target = Path(path)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        stated = [entry for entry in package.entries if entry.moments]
        for entry in progress(stated, "decoding"):
            own: dict[str, Any] = {} if package.is_sgd else {"step": torch.tensor(float(entry.step or 0))}
            for name, stored in entry.moments.items():
                file = Path(scratch) / f"{order[entry.name]}-{name}"
                own[name] = _on_disk(values(stored.load()), file)
            state[order[entry.name]] = own
        groups = []
        for group in package.groups:
            options = {k: _tupled(v) for k, v in group["options"].items() if k in usual}
            names = group["parameters"]
            groups.append({**usual, **options, "params": [order[n] for n in names], "param_names": names})
        hidden = Path(scratch) / "state.pt"
        torch.save({"state": state, "param_groups": groups}, hidden)
        del state, own
        hidden.rename(target)
    return path


def _on_disk(tensor: Tensor, file: Path) -> Tensor:
    numel = prod(tensor.shape)
    if numel == 0:
        return tensor
    mapped = torch.from_file(str(file), shared=True, size=numel, dtype=tensor.dtype)
    return mapped.view(tensor.shape).copy_(tensor)


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
