"""Parts of states that no DTensor can show in place, because ranks that cut columns share a block: gathered
for ``state_dict()``, and cut again when one is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from shard4bit.errors import LayoutError
from shard4bit.optim.bound import Bound
from shard4bit.state import parts, state_key


def check_shown(bounds: Iterable[Bound]) -> None:
    """Raise LayoutError, on all ranks, for states that state_dict() can give neither as they lie nor
    gathered."""
    for bound in bounds:
        for moment in bound.moments:
            for part in parts(moment.spec):
                why = bound.placed.obstacle(part)
                if why is not None:
                    raise LayoutError(
                        f"{why}, so state_dict() cannot give it: save with shard4bit.save(root, model, "
                        "optimizer, step=...) and resume with shard4bit.load, on any number of ranks"
                    )


def gathered(bounds: Iterable[Bound]) -> dict[Tensor, dict[str, Tensor]]:
    """Parameter -> the entries of its state that are not shown as they lie in memory. Collective."""
    out: dict[Tensor, dict[str, Tensor]] = {}
    for bound in bounds:
        for moment in bound.moments:
            for part in parts(moment.spec):
                found = bound.placed.gather(moment.tensors[part.suffix], part)
                if found is not None:
                    key = bound.placed.prefix + state_key(moment.name, part.suffix)
                    out.setdefault(bound.param, {})[key] = found
    return out


def ungathered(bounds: Iterable[Bound], saved: Mapping[str, Any] | None) -> dict[str, Any]:
    """A parameter's saved state with this rank's part of what was gathered."""
    out = dict(saved or {})
    for bound in bounds:
        for moment in bound.moments:
            for part in parts(moment.spec):
                key = bound.placed.prefix + state_key(moment.name, part.suffix)
                if isinstance(out.get(key), Tensor):
                    out[key] = bound.placed.ungather(out[key], part)
    return out
