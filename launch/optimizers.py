"""The optimizers that launch.train knows by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import shard4bit

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
MOMENTUM = 0.9


@dataclass(frozen=True)
class Choice:
    """An optimizer that has not been built yet.

    make(parameters, **options) builds it; json: its "type" in DeepSpeed's configuration, None where DeepSpeed
    cannot; ours: whether shard4bit can save it; engines: that it works with, all if empty.
    """

    make: Callable[..., torch.optim.Optimizer]
    options: dict[str, Any]
    json: str | None
    ours: bool = True
    engines: tuple[str, ...] = ()


def choose(
    name: str,
    lr: float,
    second_moment: str | None,
    *,
    compensate: bool | None = None,
    rounding: str | None = None,
) -> Choice:
    """The optimizer called ``name``. compensate: of shard4bit's own only; second_moment and rounding:
    of adamw4bit only. Raises ValueError where its package is not installed."""
    asked = {"compensate": compensate, "rounding": rounding}
    own = {option: value for option, value in asked.items() if value is not None}
    adam: dict[str, Any] = {"lr": lr, "betas": BETAS, "eps": 1e-8, "weight_decay": WEIGHT_DECAY}
    if name == "adamw4bit":
        own["second_moment"] = second_moment or "rank1"
        return Choice(shard4bit.AdamW4bit, {**adam, **own}, "AdamW4bit")
    if name == "adamw8bit":
        return Choice(shard4bit.AdamW4bit, {**adam, **shard4bit.spec.ADAMW_8BIT, **own}, "AdamW4bit")
    if name == "sgd4bit":
        return Choice(shard4bit.SGD4bit, {"lr": lr, "momentum": MOMENTUM, **own}, "SGD4bit")
    if name == "adamw":
        return Choice(torch.optim.AdamW, adam, "AdamW", ours=False)
    assert name == "bnb-adamw8bit", name
    try:
        theirs = importlib.import_module("bitsandbytes").optim
    except ImportError:
        raise ValueError(
            "--optimizer bnb-adamw8bit needs the package bitsandbytes (pip install bitsandbytes); "
            "adamw8bit is shard4bit's own"
        ) from None
    return Choice(theirs.AdamW8bit, adam, None, ours=False, engines=("single", "ddp"))
