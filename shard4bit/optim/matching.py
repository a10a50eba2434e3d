"""Whose state is whose: another optimizer's states and groups, matched with ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shard4bit.errors import StateError
from shard4bit.optim import foreign
from shard4bit.optim.base import QuantizedOptimizer
from shard4bit.optim.loading import RUN_OPTIONS, SPEC_OPTIONS


@dataclass
class Matching:
    """states: of our parameters; groups: of our groups, the source's, or None if they are cut otherwise."""

    states: dict[Tensor, Any]
    groups: list[Mapping[str, Any]] | None


def match(optimizer: QuantizedOptimizer, source: Any) -> Matching:
    """Find our parameters in ``source``, an optimizer or a state_dict. Raises StateError."""
    if isinstance(source, QuantizedOptimizer):
        raise StateError("the source is an optimizer of shard4bit: give shard4bit.export_state(source)")
    own = [list(g["params"]) for g in optimizer.param_groups]
    if isinstance(source, torch.optim.Optimizer):
        groups: Any = source.param_groups
        keys: list[list[Any]] = own
        theirs: list[list[Any]] = [list(g["params"]) for g in groups]
        states: Any = source.state
        if not getattr(source, "is_adamw", True):  # torchao's Adam says it here only
            groups = [{**g, "decoupled_weight_decay": False} for g in groups]
        if not {p for ps in own for p in ps} & {p for ps in theirs for p in ps}:
            raise StateError(
                "the source holds none of this optimizer's parameters: build both from one model's "
                "parameters, or give the source's state_dict()"
            )
    elif isinstance(source, Mapping) and {"state", "param_groups"} <= set(source):
        groups, states = source["param_groups"], source["state"]
        keys, theirs, states = _keys(optimizer, groups, states)
    else:
        raise StateError(
            f"expected an optimizer or its state_dict, got {type(source).__name__} "
            f"{sorted(map(str, source))[:5] if isinstance(source, Mapping) else ''}"
        )
    known = {k for ks in theirs for k in ks}
    pairs = list(zip((p for ps in own for p in ps), (k for ks in keys for k in ks), strict=True))
    wanted = {k for p, k in pairs if k in known or p.requires_grad}  # the source may leave out frozen ones
    lacking = [k for _, k in pairs if k in wanted and k not in known]
    left = [k for ks in theirs for k in ks if k not in wanted and states.get(k)]
    if lacking or left:
        raise StateError(
            f"the source lacks {_some(lacking)} and has states of {_some(left)} that this optimizer lacks: "
            "build both from the same parameters"
        )
    same = [[k for k in ks if k in wanted] for ks in theirs]
    matched = [g for g, ks in zip(groups, same, strict=True) if ks]
    ours = [wanted.intersection(ks) for ks in keys]
    fit = [set(ks) for ks in same if ks] == [ks for ks in ours if ks] and len(matched) == len(keys)
    return Matching({p: states.get(k) for p, k in pairs}, matched if fit else None)


def _keys(
    optimizer: QuantizedOptimizer, groups: Any, states: Mapping[Any, Any]
) -> tuple[list[list[Any]], list[list[Any]], Mapping[Any, Any]]:
    """(our parameters' keys, the source's keys, states by these keys), by groups: names where both have
    them, else positions."""
    own = optimizer.param_groups
    ids = [list(g["params"]) for g in groups]
    names = [list(g.get("param_names") or g["params"]) for g in groups]
    named = all(isinstance(n, str) for ns in names for n in ns)
    if named and all(g.get("param_names") for g in own):
        by_name = {
            n: states.get(i) for ns, i_s in zip(names, ids, strict=True) for n, i in zip(ns, i_s, strict=True)
        }
        return [list(g["param_names"]) for g in own], names, by_name
    if any(isinstance(i, str) for i_s in ids for i in i_s):
        raise StateError(
            "the source names its parameters, this optimizer does not: build it from "
            "model.named_parameters(), or by shard4bit.fsdp.wrap"
        )
    sizes = [len(i_s) for i_s in ids], [len(g["params"]) for g in own]
    if sizes[0] != sizes[1]:
        raise StateError(
            f"the source has parameter groups of {sizes[0]} parameters, this optimizer of {sizes[1]}: build "
            "the same groups, or give both optimizers names (model.named_parameters())"
        )
    return ids, ids, states


def _some(keys: list[Any]) -> str:
    shown = [str(tuple(k.shape)) if isinstance(k, Tensor) else repr(k) for k in keys[:3]]
    return (", ".join(shown) + (" ..." if len(keys) > 3 else "")) or "nothing"


def options_of(optimizer: QuantizedOptimizer, matching: Matching) -> list[dict[str, Any]]:
    """The source's options for each of our groups, checked."""
    if matching.groups is None:
        raise StateError(
            "the source's parameter groups are cut otherwise than this optimizer's: import with "
            "hyperparameters=False, which keeps this optimizer's options"
        )
    known = [key for key in optimizer.defaults if key not in (*SPEC_OPTIONS, *RUN_OPTIONS)]
    out = []
    for number, (group, theirs) in enumerate(zip(optimizer.param_groups, matching.groups, strict=True)):
        options = foreign.options(theirs, known, f"parameter group {number}")
        optimizer._check_group({**group, **options})
        out.append(options)
    return out
