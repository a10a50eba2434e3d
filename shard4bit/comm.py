"""The reduction between measure and apply: one batched all-reduce per process group and operation.

Maxima travel as int32 bit patterns of non-negative floats with a canonical NaN, whose integer order
is the float order with NaN on top; a float MAX may drop NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from shard4bit.backend import Work
from shard4bit.layout import Neighbours, Slab
from shard4bit.maths.normalize import NAN
from shard4bit.spec import Factored, Full, MomentSpec, QuantSpec

Index = tuple[slice, ...]


class Group(Protocol):
    """Ranks that combine vectors; the collective part of a step."""

    def all_reduce(self, vector: Tensor, *, maximum: bool) -> None: ...


@dataclass(frozen=True)
class TorchGroup:
    """A ``torch.distributed`` process group."""

    group: dist.ProcessGroup

    def all_reduce(self, vector: Tensor, *, maximum: bool) -> None:
        op = dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM
        if vector.device.type == "cpu" and dist.get_backend(self.group) == "nccl":
            moved = vector.cuda()  # NCCL reduces device memory only (CPU-offloaded parameters)
            dist.all_reduce(moved, op, group=self.group)
            vector.copy_(moved)
        else:
            dist.all_reduce(vector, op, group=self.group)


@dataclass(frozen=True)
class Share:
    """A stretch of the reduced vector: ``length`` values of one statistic of one moment.

    ``index`` is where this rank keeps them in ``Work.fresh`` (None: it has no part of them).
    """

    moment: int
    stat: str
    length: int
    index: Index | None

    @property
    def is_sum(self) -> bool:
        return self.stat.endswith("sum")


@dataclass(frozen=True)
class Link:
    """What a parameter's moments share with the other ranks of one group."""

    group: Group
    shares: tuple[Share, ...]


def make_link(group: Group, neighbours: Neighbours, slab: Slab, specs: Sequence[MomentSpec]) -> Link:
    """The statistics of ``specs`` that the group must combine, in an order that all its ranks share."""
    shares: list[Share] = []
    for i, spec in enumerate(specs):
        if isinstance(spec, Factored):
            for stat in _row_and_column(neighbours, slab, "row_sum", "col_sum"):
                shares.append(Share(i, *stat))
            shares.append(Share(i, "sum", 1, ()))
        elif isinstance(spec, QuantSpec) and spec.norm == "rank1":
            for stat in _row_and_column(neighbours, slab, "row_max", "col_max"):
                shares.append(Share(i, *stat))
        elif isinstance(spec, QuantSpec) and spec.norm == "tensor":
            shares.append(Share(i, "absmax", 1, ()))
        elif isinstance(spec, QuantSpec):
            shares += [Share(i, *stat) for stat in _blocks(neighbours, slab, spec.block_size)]
        else:
            assert isinstance(spec, Full), spec
    return Link(group, tuple(shares))


def _row_and_column(
    neighbours: Neighbours, slab: Slab, row: str, col: str
) -> list[tuple[str, int, Index | None]]:
    """(statistic, length, index) of the row and column statistics that are shared."""
    if neighbours.kind == "cols":
        return [(row, slab.rows, (slice(None),))]
    if neighbours.kind == "rows":
        return [(col, slab.width, (slice(None),))]
    if not any(0 < e < slab.view.numel for e in neighbours.edges):
        return []  # the parameter lies on one rank
    held = slab.numel > 0
    out: list[tuple[str, int, Index | None]] = [
        (row, 1, _row_index(slab, r)) for r in neighbours.cut_rows(slab.view)
    ]
    return [*out, (col, slab.view.cols, (slice(None),) if held else None)]


def _row_index(slab: Slab, row: int) -> tuple[slice] | None:
    """Where a run keeps a global row."""
    if not slab.row_ranges:
        return None
    start, stop = slab.row_ranges[0]
    return (slice(row - start, row - start + 1),) if start <= row < stop else None


def _blocks(neighbours: Neighbours, slab: Slab, size: int) -> list[tuple[str, int, Index | None]]:
    first, stop = slab.units(size)
    out: list[tuple[str, int, Index | None]] = []
    if neighbours.kind == "cols":
        for block in neighbours.cut_units(slab.view, size):
            here = slice(block - first, block - first + 1)
            index = (slice(None), here) if first <= block < stop else None
            out.append(("absmax", slab.rows, index))
    elif neighbours.kind == "run":
        for row, block in neighbours.cut_row_units(slab.view, size):
            rows = _row_index(slab, row)
            here = slice(block - first, block - first + 1)
            out.append(("absmax", 1, (*rows, here) if rows else None))
    return out


def reduce(works: Sequence[Work], failure: BaseException | None = None) -> None:
    """Complete ``work.fresh`` over all ranks and settle ``work.active``; collective.

    A rank that failed earlier takes part nevertheless, with ``failure``: it raises that afterwards,
    and every other rank of its groups raises RuntimeError, so that nobody waits for it. Without links
    (one process) it communicates nothing.
    """
    members: dict[Group, list[tuple[Work, Link]]] = {}
    for work in works:
        for link in work.links:
            members.setdefault(link.group, []).append((work, link))
    elsewhere = False
    for group, linked in members.items():
        elsewhere |= _reduce_max(group, linked, failed=failure is not None or elsewhere)
        _reduce_sum(group, linked)
    if failure is not None:
        raise failure
    if elsewhere:
        raise RuntimeError("the optimizer step failed on another rank; see that rank's error")


def _reduce_max(group: Group, linked: Sequence[tuple[Work, Link]], *, failed: bool) -> bool:
    """MAX of the flags (failure, gradient present) and the maxima. Returns whether any rank failed."""
    shares = [(w, s) for w, link in linked for s in link.shares if not s.is_sum]
    flags = [float(failed), *(float(w.active) for w, _ in linked)]
    device = linked[0][0].param.device
    pieces = [torch.tensor(flags, dtype=torch.float32, device=device)]
    pieces += [_collect(w, s, torch.float32, device, failed) for w, s in shares]
    vector = torch.cat(pieces)
    vector.masked_fill_(vector.isnan(), NAN)  # a negative NaN would lose to every number
    group.all_reduce(vector.view(torch.int32), maximum=True)
    values = vector[: len(flags)].tolist()
    for (work, _), flag in zip(linked, values[1:], strict=True):
        work.active = bool(flag)
    if not failed:
        _deliver(shares, vector[len(flags) :])
    return bool(values[0])


def _reduce_sum(group: Group, linked: Sequence[tuple[Work, Link]]) -> None:
    shares = [(w, s) for w, link in linked for s in link.shares if s.is_sum]
    if not shares:
        return
    device = linked[0][0].param.device
    vector = torch.cat([_collect(w, s, torch.float64, device, not w.fresh) for w, s in shares])
    group.all_reduce(vector, maximum=False)
    if all(w.fresh for w, _ in shares):
        _deliver(shares, vector)


def _collect(work: Work, share: Share, dtype: torch.dtype, device: torch.device, absent: bool) -> Tensor:
    if share.index is None or absent:
        return torch.zeros(share.length, dtype=dtype, device=device)
    return work.fresh[share.moment][share.stat][share.index].reshape(-1).to(device)


def _deliver(shares: Sequence[tuple[Work, Share]], vector: Tensor) -> None:
    start = 0
    for work, share in shares:
        values = vector[start : start + share.length]
        start += share.length
        if share.index is not None:
            target = work.fresh[share.moment][share.stat][share.index]
            target.copy_(values.view(target.shape))
