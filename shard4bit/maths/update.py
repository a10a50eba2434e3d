"""Update rules. Each is one IEEE fp32 rounding per written operation, without fused multiply-add,
so that an element's bits depend on nothing but its own inputs.

A rule says how one moment advances and how a parameter follows from its new, not yet quantized
moments. Scalars are computed in float64 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Scalars = Mapping[str, float]
Options = Mapping[str, Any]  # numbers, and "lr", which may be a tensor


def power(base: float, exponent: int) -> float:
    """base^exponent by square-and-multiply in float64: the same bits on every host and device."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def root(x: Tensor) -> Tensor:
    """Correctly rounded square root of a float32 tensor.

    torch's own float32 ``sqrt`` on the CPU is off by one ulp for one value in six (2.13, every instruction
    set). Through float64 it is exact: the root of a 24-bit number is never near enough to a midpoint of
    two float32 for the second rounding to matter.
    """
    return x.double().sqrt_().float()


@dataclass(frozen=True)
class Rule:
    """An optimizer's mathematics.

    moments: names of the moments, in the order of all sequences below.
    options: (param_group) -> what the scalars follow from, as floats; "lr" as it is, a number or a tensor.
    scalars: (param_group, step count after this step) -> the rule's scalars. "ahead": see :func:`lead`.
        "draw": this step's number where second moments under a linear map are rounded stochastically
        (maths.rounding), else 0.
        cuda/kernels/scalars.cu does the same, operation by operation, from options where the step count lies
        on the device.
    advance: (index, old moment, gradient, parameter, scalars) -> new moment; may overwrite the old one.
        All tensors float32 of one shape.
    apply: (parameter, gradient, new moments, scalars) -> new parameter; may overwrite the parameter only.
    """

    name: str
    moments: tuple[str, ...]
    options: Callable[[Mapping[str, Any]], Options]
    scalars: Callable[[Mapping[str, Any], int], Scalars]
    advance: Callable[[int, Tensor, Tensor, Tensor, Scalars], Tensor]
    apply: Callable[[Tensor, Tensor, Sequence[Tensor], Scalars], Tensor]


def lead(new: Tensor, kept: Tensor, ahead: float) -> Tensor:
    """What a compensated step moves the parameter by, in the place of its ``new`` first moment.

    The ``kept`` moment, quantized and read again, is off by e. If nothing else happened, that error would
    move the parameter too far by ``ahead`` = decay + decay^2 + ... = decay / (1 - decay) times e in later
    steps (with AdamW's bias correction of this step taken out); this step moves it back by as much.
    """
    return new - (kept - new) * ahead


def ahead_of(group: Mapping[str, Any], decay: float) -> float:
    """``lead``'s factor for a group whose first moment decays so; 0 if it is not to be compensated.

    Raises ValueError for a decay of 1.
    """
    if not group.get("compensate"):
        return 0.0
    if decay == 1:
        raise ValueError(
            "compensate=True with a momentum of 1.0: an error of the buffer would never end, so that no step "
            "can make it good; expected momentum < 1"
        )
    return decay / (1.0 - decay)


ROUNDINGS = ("auto", "nearest", "stochastic")


def is_stochastic(group: Mapping[str, Any]) -> bool:
    """Whether those of a group's second moments that are in codes of a linear map are rounded so.

    Raises ValueError for an unknown rounding.
    """
    value = group.get("rounding", "nearest")
    if value not in ROUNDINGS:
        raise ValueError(f"rounding={value!r}: expected one of {ROUNDINGS}")
    return bool(value != "nearest")


def _adamw_options(group: Mapping[str, Any]) -> Options:
    beta1, beta2 = (float(b) for b in group["betas"])
    rest = {key: float(group[key]) for key in ("eps", "weight_decay")}
    rest |= {"ahead": ahead_of(group, beta1), "stochastic": float(is_stochastic(group))}
    return {"lr": group["lr"], "beta1": beta1, "beta2": beta2, **rest}


def _adamw_scalars(group: Mapping[str, Any], step: int) -> Scalars:
    options = _adamw_options(group)
    lr, beta1, beta2 = float(options["lr"]), options["beta1"], options["beta2"]
    correction = 1.0 - power(beta1, step)
    return {
        "beta1": beta1,
        "rest1": 1.0 - beta1,
        "beta2": beta2,
        "rest2": 1.0 - beta2,
        "keep": 1.0 - lr * options["weight_decay"],
        "step_size": lr / correction,
        "root": 1.0 / math.sqrt(1.0 - power(beta2, step)),
        "eps": options["eps"],
        "ahead": options["ahead"] * correction,
        "draw": step * options["stochastic"],
    }


def _adamw_advance(index: int, old: Tensor, grad: Tensor, param: Tensor, h: Scalars) -> Tensor:
    if index == 0:
        return old.mul_(h["beta1"]).add_(grad * h["rest1"])
    return old.mul_(h["beta2"]).add_((grad * grad).mul_(h["rest2"]))


def _adamw_apply(param: Tensor, grad: Tensor, news: Sequence[Tensor], h: Scalars) -> Tensor:
    first, second = news
    denominator = root(second).mul_(h["root"]).add_(h["eps"])
    return param.mul_(h["keep"]).sub_((first * h["step_size"]).div_(denominator))


ADAMW = Rule("adamw", ("exp_avg", "exp_avg_sq"), _adamw_options, _adamw_scalars, _adamw_advance, _adamw_apply)


def _sgd_options(group: Mapping[str, Any]) -> Options:
    names = ("momentum", "dampening", "weight_decay", "nesterov")
    options = {key: float(group[key]) for key in names}
    return {"lr": group["lr"], **options, "ahead": ahead_of(group, options["momentum"]), "stochastic": 0.0}


def _sgd_scalars(group: Mapping[str, Any], step: int) -> Scalars:
    options = _sgd_options(group)
    first = step == 1  # torch.optim.SGD starts the buffer with the gradient itself
    return {
        "lr": float(options["lr"]),
        "momentum": options["momentum"],
        "rest": 1.0 if first else 1.0 - options["dampening"],
        "first": float(first),
        "weight_decay": options["weight_decay"],
        "nesterov": options["nesterov"],
        "ahead": options["ahead"],
        "draw": 0.0,
    }


def _sgd_gradient(grad: Tensor, param: Tensor, h: Scalars) -> Tensor:
    return grad + param * h["weight_decay"] if h["weight_decay"] else grad


def _sgd_advance(index: int, old: Tensor, grad: Tensor, param: Tensor, h: Scalars) -> Tensor:
    grad = _sgd_gradient(grad, param, h)
    if h["first"]:
        return old.copy_(grad)
    return old.mul_(h["momentum"]).add_(grad * h["rest"])


def _sgd_apply(param: Tensor, grad: Tensor, news: Sequence[Tensor], h: Scalars) -> Tensor:
    direction = _sgd_gradient(grad, param, h)
    if news:
        direction = direction + news[0] * h["momentum"] if h["nesterov"] else news[0]
    return param.sub_(direction * h["lr"])


SGD = Rule("sgd", ("momentum_buffer",), _sgd_options, _sgd_scalars, _sgd_advance, _sgd_apply)
PLAIN_SGD = Rule("sgd", (), _sgd_options, _sgd_scalars, _sgd_advance, _sgd_apply)
