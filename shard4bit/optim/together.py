"""Binding on all ranks, or on none: no rank may wait in a step for another that could not bind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from shard4bit.comm import Group

T = TypeVar("T")


def on_all(optimizer: Any, work: Callable[[], T]) -> T:
    """``work()``, and then one small all-reduce along each of the groups that the optimizer's parameters are
    sharded along: if it raised on one of their ranks, it raises on all, there its own error, elsewhere
    RuntimeError."""
    failure: BaseException | None = None
    try:
        out = work()
    except Exception as error:  # told to the others before it is raised
        failure = error
    failed = failure is not None
    for group, device in _groups(optimizer).items():
        flag = torch.tensor([int(failed)], dtype=torch.int32, device=device)
        group.all_reduce(flag, maximum=True)
        failed = bool(flag.item())
    if failure is not None:
        raise failure
    if failed:
        raise RuntimeError("preparing the optimizer failed on another rank; see that rank's error")
    return out


def _groups(optimizer: Any) -> dict[Group, torch.device]:
    """In an order that all their ranks share: by the places of parameters, which options do not change."""
    found: dict[Group, torch.device] = {}
    for param in (p for group in optimizer.param_groups for p in group["params"]):
        for placed in optimizer._places(param):
            for group, _ in placed.neighbours:
                found.setdefault(group, placed.data().device)
    return found
