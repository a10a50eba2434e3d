"""Whether ``optimizer.state`` and the groups still are what the optimizer works on. Users change them: they
move states off a GPU and back, start them anew, torch's ZeroRedundancyOptimizer loads that way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any

from torch import Tensor

from shard4bit.errors import StateError
from shard4bit.layout import Slab
from shard4bit.optim.bound import Bound
from shard4bit.placement import Placed, to_local
from shard4bit.spec import MomentSpec
from shard4bit.state import Moment, Part, parts, state_key

_get: Any = dict.get


class Held:
    """Of every entry of ``optimizer.state`` the tensor that came last, at the last look."""

    def __init__(self) -> None:
        self.keys: list[str | None] = []
        self.last: list[Any] = []

    def take(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        self.keys = [next(reversed(entry), None) for entry in state.values()]
        self.last = list(map(_get, state.values(), self.keys))

    def stands(self, state: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether a look would find nothing new, as far as these tell. Every step asks."""
        return len(state) == len(self.last) and all(map(is_, map(_get, state.values(), self.keys), self.last))


def replaced(bounds: Sequence[Bound], entry: Mapping[str, Any] | None) -> bool:
    """Whether the entry of a parameter has other tensors than those that ``bounds`` work on, or none.

    Raises StateError if only some are others: steps, which look at the last one only, may have been taken
    since, so that the entry is neither the old state nor the new one.
    """
    if not entry:
        return True
    own = {key: tensor for bound in bounds for key, tensor in bound.shown().items()}
    others = [key for key, tensor in own.items() if entry.get(key) is not tensor]
    if others and entry.get(next(reversed(own))) is own[next(reversed(own))]:
        raise StateError(
            f"{', '.join(others)} in the state of a parameter of shape {bounds[0].shape} were replaced, the "
            "rest was not: change values in place (copy_, fill_), or replace every tensor of the entry"
        )
    return bool(others)


def put(moments: Sequence[Moment], entry: dict[str, Any], placed: Placed) -> dict[str, Tensor]:
    """Show moments in an entry of ``optimizer.state``; if it has them (after unpickling or deepcopy, or since
    somebody put them there), take these up instead. Returns what it shows. Raises StateError if that does not
    fit."""
    every = {placed.prefix + state_key(m.name, p.suffix): (m, p) for m in moments for p in parts(m.spec)}
    if every.keys().isdisjoint(entry):
        entry.update({key: placed.wrap(m.tensors[part.suffix], part) for key, (m, part) in every.items()})
    else:
        for key, (moment, part) in every.items():
            moment.tensors[part.suffix] = _local(entry.get(key), key, part, placed.slab)
    return {key: entry[key] for key in every}


def _local(found: Any, key: str, part: Part, slab: Slab) -> Tensor:
    """This rank's part of a tensor that was found in an entry."""
    local = to_local(found) if isinstance(found, Tensor) else None
    shape = part.local_shape(slab)
    if local is None or local.shape != shape or local.dtype != part.dtype or not local.is_contiguous():
        was = type(found).__name__
        if local is not None:
            was = f"{local.dtype} {tuple(local.shape)} with strides {local.stride()}"
        raise StateError(
            f"optimizer.state has {was} as {key} of a parameter of shape {slab.view.shape}, expected "
            f"{part.dtype} {shape}, contiguous"
        )
    return local


def check_specs(
    bounds: Sequence[Bound], group: Mapping[str, Any], spec_of: Callable[..., MomentSpec]
) -> None:
    """Raise StateError if a group's options have come to ask for other states than those of its parameter.

    spec_of: (moment's name, group, the whole parameter's shape) -> how it is to be stored.
    """
    for bound in bounds:
        now = bound.placed.overriding(group)
        for moment in bound.moments:
            spec = spec_of(moment.name, now, bound.shape)
            if spec != moment.spec:
                raise StateError(
                    f"a group's options now ask for {moment.name} as {spec}, the state of a parameter of "
                    f"shape {bound.shape} has it as {moment.spec}: build a new optimizer, or take the "
                    "parameter's entry out of optimizer.state, so that it starts anew"
                )
