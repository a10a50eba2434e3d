"""Checks of hyper-parameters, parameters and gradients; every failure is a ValueError."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from shard4bit.errors import LayoutError
from shard4bit.maths.update import is_stochastic
from shard4bit.placement import is_dtensor
from shard4bit.spec import Full, QuantSpec, parse_spec

#: options of torch's optimizers that would change what they compute, and that ours do not have
UNSUPPORTED = ("amsgrad", "differentiable", "foreach", "fused", "decoupled_weight_decay")
#: what others call options of ours
ALIASES = {"wd": "weight_decay", "decay": "weight_decay", "learning_rate": "lr", "epsilon": "eps"}
PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RATE_DTYPES = (torch.float32, torch.float64)


def number(group: Mapping[str, Any], name: str, low: float, high: float, *, open_end: bool) -> None:
    """Check that a hyper-parameter is a finite number in [low, high] (or [low, high))."""
    check_number(name, group[name], low, high, open_end=open_end)


def check_number(name: str, value: Any, low: float, high: float, *, open_end: bool) -> None:
    is_tensor = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    if isinstance(value, bool) or not (isinstance(value, numbers.Real) or is_tensor):
        raise ValueError(f"{name}={value!r}: expected a number")
    x = float(value)
    if not math.isfinite(x) or x < low or x > high or (open_end and x == high):
        interval = f"[{low:g}, {high:g}{')' if open_end else ']'}"
        raise ValueError(f"{name}={x!r}: expected a finite number in {interval}")


def betas(group: Mapping[str, Any]) -> None:
    value = group["betas"]
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(f"betas={value!r}: expected a pair of numbers, such as (0.9, 0.999)")
    for i, beta in enumerate(value):
        check_number(f"betas[{i}]", beta, 0.0, 1.0, open_end=True)


def boolean(group: Mapping[str, Any], name: str) -> None:
    if not isinstance(group[name], bool):
        raise ValueError(f"{name}={group[name]!r}: expected True or False")


def rounding(group: Mapping[str, Any]) -> None:
    """Check the option, and that there is something it can round."""
    wanted = is_stochastic(group) and group["rounding"] != "auto" and group["quantize"]
    spec = parse_spec(group["second_moment"], signed=False, argument="second_moment")
    linear = isinstance(spec, QuantSpec) and spec.mapping == "linear"
    if wanted and not linear and not isinstance(spec, Full):
        raise ValueError(
            f'rounding="stochastic" with second_moment={spec}: expected codes of a linear map, as of "rank1" '
            'and "block"; use rounding="auto" or "nearest" with this one'
        )


def same(name: str, group: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    """Check an option that all groups have alike."""
    if group[name] != first[name]:
        raise ValueError(
            f"a parameter group has {name}={group[name]!r}, the first one {first[name]!r}: give it to the "
            "optimizer's constructor, for all groups"
        )


def capturable(group: Mapping[str, Any]) -> None:
    """Check the option, and what it asks of the others."""
    boolean(group, "capturable")
    if not group["capturable"]:
        return
    for key in ("betas", "eps", "weight_decay", "momentum", "dampening"):
        given = group.get(key, ())
        if any(isinstance(x, Tensor) for x in (given if isinstance(given, tuple | list) else (given,))):
            raise ValueError(
                f"{key}={given!r} with capturable=True: expected numbers; only lr may be a tensor"
            )
    rate(group["lr"])


def rate(lr: Any) -> None:
    """Check a learning rate that the device may have to read."""
    if isinstance(lr, Tensor) and (lr.numel() != 1 or lr.dtype not in RATE_DTYPES):
        raise ValueError(
            f"lr of shape {tuple(lr.shape)} and dtype {lr.dtype} with capturable=True: expected a number, or "
            "a tensor of one element, float32 or float64"
        )


def no_unknown_keys(group: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """A misspelt option of a parameter group is an error, not a silent default.

    ``params``, ``param_names`` and what schedulers add (``initial_lr``, ...) are let through.
    """
    import difflib

    for key in UNSUPPORTED:
        if group.get(key) and key not in known:
            raise ValueError(f"{key}={group[key]!r} in a parameter group: not an option of this optimizer")
    let_through = {"params", "param_names", "name", "lr_scale"}
    for key in group:
        if key in known or key in let_through or key.startswith(("initial_", "base_", "max_", "min_")):
            continue
        near = difflib.get_close_matches(ALIASES.get(key, str(key)), list(known), n=1, cutoff=0.6)
        if near:  # other keys may be the user's own notes on a group, which torch allows
            raise ValueError(f"unknown option {key!r} in a parameter group: did you mean {near[0]!r}?")


def parameter(param: Tensor) -> None:
    if param.dtype not in PARAM_DTYPES:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} has dtype {param.dtype}: expected float32, "
            "bfloat16 or float16 (arithmetic is in float32)"
        )


def not_replaced(params: Sequence[Tensor], given: Set[int] | None) -> None:
    """Raise LayoutError if DeepSpeed has put its own tensors in the place of all parameters while our
    adapter, which would know what they hold, was not imported. given: identities of the parameters."""
    if given is None or "deepspeed" not in sys.modules or "shard4bit.deepspeed" in sys.modules:
        return
    if params and not any(id(p) in given or is_dtensor(p) for p in params):
        raise LayoutError(
            f"the parameters, such as one of shape {tuple(params[0].shape)}, were replaced after the "
            "optimizer was built, as DeepSpeed does: import shard4bit.deepspeed before deepspeed.initialize"
        )


def gradient(grad: Tensor, data: Tensor, name: str) -> None:
    """Check this rank's gradient against its elements of the parameter."""
    if grad.layout != torch.strided:
        raise ValueError(
            f"{name}: a sparse gradient ({grad.layout}) cannot be quantized; use a dense one "
            "(torch.nn.Embedding(..., sparse=False))"
        )
    if grad.dtype not in PARAM_DTYPES:
        raise ValueError(f"{name}: gradient of dtype {grad.dtype}, expected float32, bfloat16 or float16")
    if grad.device != data.device:
        raise ValueError(f"{name}: gradient on {grad.device}, parameter on {data.device}")
    if grad.shape != data.shape:
        raise ValueError(f"{name}: gradient of shape {tuple(grad.shape)}, parameter of {tuple(data.shape)}")
