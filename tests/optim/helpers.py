"""What the optimizer tests share: a small model, gradients by seed, snapshots compared bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits (0.0 is not -0.0); a NaN equals a NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_floating_point():
        a, b = (torch.where(t.isnan(), torch.nan, t) for t in (a.detach(), b.detach()))
    view = INTEGERS[a.element_size()]
    return torch.equal(a.contiguous().view(view), b.contiguous().view(view))


def model_of(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Two quantized matrices, small matrices and vectors."""
    torch.manual_seed(seed)
    layers = nn.Linear(70, 90), nn.LayerNorm(90), nn.Linear(90, 50), nn.Tanh(), nn.Linear(50, 3)
    return nn.Sequential(*layers).to(dtype)


def fill_grads(params: Iterable[Tensor], seed: int) -> None:
    """Fresh normal gradients: the same for the same position, shape and seed."""
    for i, param in enumerate(params):
        param.grad = normal(tuple(param.shape), seed, i).to(param.dtype, copy=True)


@lru_cache(maxsize=2048)
def normal(shape: tuple[int, ...], *seed: int) -> Tensor:
    """Standard normal float32 values, the same on every machine; not to be changed in place."""
    return torch.as_tensor(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def run(params: Iterable[Tensor], optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Steps with the gradients of these seeds."""
    params = list(params)
    for seed in steps:
        fill_grads(params, seed)
        optimizer.step()


def options(group: dict[str, Any]) -> dict[str, Any]:
    """A group's options as plain values."""
    return {
        key: float(value) if isinstance(value, Tensor) else value
        for key, value in group.items()
        if key != "params"
    }


def snapshot(params: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copies of everything a step or a load could change: parameters, states and options."""
    out: dict[str, Any] = {"options": [options(g) for g in optimizer.param_groups]}
    for i, param in enumerate(params):
        out[f"parameter {i}"] = param.detach().clone()
        for key, value in optimizer.state.get(param, {}).items():
            out[f"state {i} {key}"] = value.clone()
    return out


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Two snapshots are equal, bit for bit."""
    assert a.keys() == b.keys()
    for key, value in a.items():
        equal = same_bits(value, b[key]) if isinstance(value, Tensor) else value == b[key]
        assert equal, key


def copied(params: Sequence[Tensor]) -> list[nn.Parameter]:
    """Fresh parameters of the same values and memory formats."""
    return [nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params]
