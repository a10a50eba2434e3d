"""Reading the quantized moments of an engine's parameters, by name or parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shard4bit.deepspeed import layout
from shard4bit.deepspeed.attach import layout_of, optimizer_of


def local_moment(engine: Any, parameter: str | Tensor, moment: str) -> tuple[Tensor, int]:
    """This rank's values of a moment ("exp_avg", "exp_avg_sq", "momentum_buffer"), dequantized.

    Returns (values, start): fp32, flat, the elements [start, start + len(values)) of the parameter; none on
    a rank that holds no part of it. Collective at the first use of the optimizer.
    Raises ValueError for a parameter or moment that the optimizer does not have.
    """
    name = _name(engine, parameter)
    values = optimizer_of(engine).moment(name, moment).reshape(-1)
    slab = layout_of(engine).placed(name).slab
    start = slab.row_ranges[0][0] * slab.view.cols + slab.head if slab.row_ranges else 0
    return values, start


def full_moment(engine: Any, parameter: str | Tensor, moment: str) -> Tensor:
    """A whole moment, dequantized: fp32, of the parameter's shape, on every rank. Collective.

    What ``deepspeed.utils.safe_get_full_optimizer_state`` is for unpacked states.
    """
    name = _name(engine, parameter)
    values, start = local_moment(engine, name, moment)
    found, group = layout_of(engine), layout_of(engine).groups[name]
    view = found.placed(name).slab.view
    if group is None:
        return values.view(view.shape)
    whole = torch.zeros(view.numel, dtype=torch.float32, device=values.device)
    whole[start : start + len(values)] = values
    group.all_reduce(whole.view(torch.int32), maximum=False)  # all others have zero bits: the sum is exact
    return whole.view(view.shape)


def _name(engine: Any, parameter: str | Tensor) -> str:
    known = layout_of(engine).tensors
    name = parameter if isinstance(parameter, str) else layout.names_of(engine).get(parameter)
    if name not in known:
        what = repr(name) if isinstance(name, str) else f"a parameter of shape {tuple(parameter.shape)}"  # type: ignore[union-attr]
        raise ValueError(f"the optimizer has no {what}; it has {list(known)[:5]} and more")
    return name
