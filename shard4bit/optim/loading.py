"""Matching a saved ``state_dict`` with an optimizer: everything is checked before anything changes."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shard4bit.errors import StateError
from shard4bit.placement import is_dtensor, to_local

if TYPE_CHECKING:
    from shard4bit.optim.base import QuantizedOptimizer

SPEC_OPTIONS = ("quantize", "first_moment", "second_moment", "momentum_buffer")
OWN_OPTIONS = (*SPEC_OPTIONS, "compensate", "rounding")  # that torch's optimizers do not have
#: how an optimizer runs, not what it computes: never taken from or told to another one
RUN_OPTIONS = ("capturable",)


def shallow_copy(state_dict: Any) -> dict[str, Any]:
    """A copy that hooks may edit; StateError for what is no dictionary."""
    if not isinstance(state_dict, Mapping):
        raise StateError(f"expected a state_dict, got {type(state_dict).__name__}")
    return dict(state_dict)


def checked_groups(optimizer: QuantizedOptimizer, state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The saved groups, if they fit the optimizer's; StateError otherwise."""
    states, groups = state_dict.get("state"), state_dict.get("param_groups")
    if not (
        isinstance(states, Mapping)
        and all(isinstance(state, Mapping) for state in states.values())
        and isinstance(groups, list)
        and all(isinstance(group, Mapping) and "params" in group for group in groups)
    ):
        raise StateError(
            "expected a state_dict of an optimizer, with 'state' and 'param_groups', got one with "
            f"{sorted(map(str, state_dict))[:5]}"
        )
    saved, own = deepcopy(groups), optimizer.param_groups
    sizes = [len(g["params"]) for g in saved], [len(g["params"]) for g in own]
    if sizes[0] != sizes[1]:
        raise StateError(
            f"the state has parameter groups of {sizes[0]} parameters, this optimizer of {sizes[1]}: "
            "build it with the same model and groups"
        )
    for index, (theirs, ours) in enumerate(zip(saved, own, strict=True)):
        for option in SPEC_OPTIONS:
            if option in ours and theirs.get(option) != ours[option]:
                raise StateError(
                    f"parameter group {index}: the state has {option}={theirs.get(option)!r}, this "
                    f"optimizer {ours[option]!r}; build it with the same option"
                    + ("" if option in theirs else " (is this the state of another optimizer?)")
                )
        try:
            optimizer._check_group({**ours, **theirs, "params": ours["params"]})
        except ValueError as error:
            raise StateError(f"parameter group {index} of the state: {error}") from None
    return saved


def matched(
    own: Mapping[str, Tensor], saved: Mapping[str, Any] | None, what: str
) -> list[tuple[Tensor, Tensor]]:
    """(local target, local source) of every tensor of one parameter's state; StateError if they differ."""
    if not saved:
        raise StateError(
            f"{what} has no state in the saved one, as if it had been frozen then: load first, then unfreeze "
            "it (its state starts at zero)"
        )
    missing, extra = sorted(set(own) - set(saved)), sorted(set(saved) - set(own))
    if missing or extra:
        raise StateError(
            f"{what}: the saved state lacks {missing or 'nothing'} and has {extra or 'nothing'} more than "
            "this optimizer's: it was written with another spec or by another optimizer"
        )
    out = []
    for key, target in own.items():
        source = saved[key]
        if isinstance(source, int | float):
            source = torch.tensor(source, dtype=target.dtype)
        if not isinstance(source, Tensor):
            raise StateError(f"{what}: {key} is a {type(source).__name__} in the saved state, not a tensor")
        if source.shape != target.shape or (source.dtype != target.dtype and key != "step"):
            raise StateError(
                f"{what}: {key} is {source.dtype} {tuple(source.shape)} in the saved state, expected "
                f"{target.dtype} {tuple(target.shape)}"
            )
        if key.endswith("step") and not (0 <= float(source) < float("inf") and float(source) % 1 == 0):
            raise StateError(f"{what}: {key} is {float(source)} in the saved state, expected a count")
        out.append((to_local(target), _localized(source, target)))
    return out


def _localized(source: Tensor, target: Tensor) -> Tensor:
    """This rank's part of ``source`` as ``target`` is sharded."""
    if not is_dtensor(target):
        return source.full_tensor() if is_dtensor(source) else source  # type: ignore[attr-defined]
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]
    if not is_dtensor(source):
        source = source.to(to_local(target).device)
        return to_local(distribute_tensor(source, mesh, placements, src_data_rank=None))
    if source.placements != placements or source.device_mesh != mesh:  # type: ignore[attr-defined]
        source = source.redistribute(mesh, placements)  # type: ignore[attr-defined]
    return to_local(source)


def adopt_options(group: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Take a saved group's options; the parameters (and their names, if ours have some) stay ours."""
    names = group.get("param_names")
    for key, value in saved.items():
        if key != "params" and key not in RUN_OPTIONS:
            group[key] = value
    if names is not None:
        group["param_names"] = names
