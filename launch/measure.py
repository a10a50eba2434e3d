"""What the demo measures: step times, bytes of optimizer state, bytes of checkpoints."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

WARM_UP = 3  # steps left out of the timings: allocations and lazy set-up


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a nest of dicts, sequences and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


def local_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The bytes of optimizer state that this rank stores; what every rank keeps counts on each."""
    total = 0
    for tensor in _tensors(dict(optimizer.state)):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        total += local.numel() * local.element_size()
    return total


def parameter_count(model: nn.Module) -> int:
    """The number of parameters of the whole model, sharded or not."""
    return sum(parameter.numel() for parameter in model.parameters())


def folder_bytes(folder: Path) -> int:
    """The bytes of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def summarize_times(seconds: list[float]) -> dict[str, float]:
    """The mean and the median in milliseconds, without the first steps; empty for no steps."""
    kept = seconds[WARM_UP:] or seconds
    if not kept:
        return {}
    return {"mean": 1e3 * statistics.fmean(kept), "median": 1e3 * statistics.median(kept)}
