"""What ``print(optimizer)`` says: which parameters are quantized, which not and why, what that costs.

Communicates nothing, and makes no states: where parameters lie says what they will take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shard4bit.comm import Group, Link, make_link
from shard4bit.layout import Slab
from shard4bit.placement import Placed
from shard4bit.spec import QUANTIZE_ABOVE, Full, MomentSpec, QuantSpec, is_quantized
from shard4bit.state import parts

if TYPE_CHECKING:  # base imports this
    from shard4bit.optim.base import QuantizedOptimizer
    from shard4bit.optim.bound import Bound


@dataclass
class _Line:
    """Parameters of which the same is to be said."""

    tensors: int = 0
    elements: int = 0
    dtypes: set[torch.dtype] = field(default_factory=set)

    def add(self, param: Tensor, shape: tuple[int, ...]) -> None:
        self.tensors, self.elements = self.tensors + 1, self.elements + prod(shape)
        self.dtypes.add(param.dtype)


def summary(optimizer: QuantizedOptimizer) -> str:
    """Some lines of text; bytes are of this rank, or of one process where it is not known what lies here."""
    lines: dict[str, _Line] = {}
    whole_bytes, low, here = 0, _Line(), list[_Here | None]()
    for param, placed, group in _members(optimizer):
        shape = tuple(param.shape) if placed is None else placed.slab.view.shape
        specs = {m: optimizer._spec(m, group, shape) for m in optimizer._rule(group).moments}
        trained = param.requires_grad or param in optimizer._bound
        lines.setdefault(_label(shape, group, specs, trained), _Line()).add(param, shape)
        if param.dtype in (torch.bfloat16, torch.float16) and param.requires_grad:
            low.add(param, shape)
        if trained:
            whole_bytes += 4 + sum(_bytes(spec, shape) for spec in specs.values())
            here.append(None if placed is None else _Here.of(placed, list(specs.values())))
    out = [_group(number, group) for number, group in enumerate(optimizer.param_groups)]
    for what, line in lines.items():
        plural = "" if line.tensors == 1 else "s"
        out.append(f"  {what}: {line.tensors:,} parameter{plural}, {line.elements:,} elements")
    out += _costs(here, whole_bytes)
    if low.tensors:
        names = " and ".join(sorted(str(d).removeprefix("torch.") for d in low.dtypes))
        out.append(
            f"  WARNING: {low.tensors:,} of these parameters are trained in {names} without fp32 masters: "
            "updates smaller than half a unit in a parameter's last place are rounded away. Keep fp32 "
            "parameters and compute in low precision (FSDP's MixedPrecision, autocast)."
        )
    return "\n".join(out)


def _group(number: int, group: Mapping[str, Any]) -> str:
    """As torch's optimizers print it, but for thousands of names."""
    options = {k: v for k, v in sorted(group.items()) if k not in ("params", "param_names")}
    lines = [
        f"    {k}: {v.item() if isinstance(v, Tensor) and v.numel() == 1 else v}" for k, v in options.items()
    ]
    return "\n".join([f"Parameter Group {number}", *lines, ""])


def _members(optimizer: QuantizedOptimizer) -> list[tuple[Tensor, Placed | None, Mapping[str, Any]]]:
    """(tensor of the groups, where it lies if that is known, options) of every parameter, several to a flat
    tensor."""
    out: list[tuple[Tensor, Placed | None, Mapping[str, Any]]] = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            bounds = optimizer._bound.get(param)
            placed = [b.placed for b in bounds] if bounds else optimizer._places(param)
            out += [(param, p, {**group, **p.options}) for p in placed] or [(param, None, group)]
    return out


@dataclass
class _Here:
    """What a parameter's states take on this rank."""

    bytes: int
    elements: int
    links: tuple[Link, ...]

    @staticmethod
    def of(placed: Placed, specs: Sequence[MomentSpec]) -> _Here:
        slab = placed.slab
        held = [part for spec in specs for part in parts(spec)]
        size = 4 + sum(prod(part.local_shape(slab)) * part.dtype.itemsize for part in held)
        return _Here(size, slab.numel, tuple(make_link(g, n, slab, specs) for g, n in placed.neighbours))


def _label(
    shape: tuple[int, ...], group: Mapping[str, Any], specs: Mapping[str, MomentSpec], trained: bool
) -> str:
    if not trained:
        return "frozen, without a state"
    if not specs:
        return "without a state (momentum=0)"
    if any(not isinstance(spec, Full) for spec in specs.values()):
        bits = sorted({spec.bits for spec in specs.values() if isinstance(spec, QuantSpec)})
        kind = "/".join(map(str, bits)) + "-bit" if bits else "reduced"
        return f"{kind} ({', '.join(f'{name} {spec}' for name, spec in specs.items())})"
    if not group["quantize"]:
        return "fp32, by quantize=False"
    if len(shape) < 2:
        return "fp32, no matrices"
    if not is_quantized(shape):
        return f"fp32, too small (at most {QUANTIZE_ABOVE:,} elements)"
    return "fp32, as the options say"


def _bytes(spec: MomentSpec, shape: tuple[int, ...]) -> int:
    """Of one moment of a whole parameter."""
    slab = Slab.whole(shape)
    return sum(prod(part.global_shape(slab)) * part.dtype.itemsize for part in parts(spec))


def _costs(every: Sequence[_Here | None], whole_bytes: int) -> list[str]:
    known = [here for here in every if here is not None]
    if len(known) < len(every):
        return [f"  state: {whole_bytes:,} bytes in one process; not known by rank"]
    size, held = sum(here.bytes for here in known), sum(here.elements for here in known)
    calls, moved = traffic(known)
    return [
        f"  state on this rank: {size:,} bytes for {held:,} elements"
        + (f" ({size / held:.3f} bytes each)" if held else ""),
        f"  communication of a step: {moved:,} bytes in {calls} all-reduce{'' if calls == 1 else 's'}",
    ]


def traffic(bounds: Sequence[Bound | _Here]) -> tuple[int, int]:
    """(all-reduces, bytes of their vectors) of a step in which all take part; see ``comm.reduce``."""
    maxima: dict[Group, int] = {}
    sums: dict[Group, int] = {}
    for bound in bounds:
        for link in bound.links:
            numbers = sum(share.length for share in link.shares if not share.is_sum)
            maxima[link.group] = maxima.get(link.group, 1) + 1 + numbers  # flags: failure, gradient
            added = sum(share.length for share in link.shares if share.is_sum)
            sums[link.group] = sums.get(link.group, 0) + added
    sums = {group: length for group, length in sums.items() if length}
    return len(maxima) + len(sums), 4 * sum(maxima.values()) + 8 * sum(sums.values())
