"""The reduction between measure and apply: one batched all-reduce per process group and operation.

Maxima travel as int32 bit patterns of non-negative floats with a canonical NaN, whose integer order
is the float order with NaN on top; a float MAX may drop NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from shard4bit.backend import Work
from shard4bit.layout import Neighbours, Slab
from shard4bit.maths.normalize import NAN
from shard4bit.spec import Factored, Full, MomentSpec, QuantSpec

Index = tuple[slice, ...]
_ACTIVE = attrgetter("active")


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
    """A reduction, settled at once, for works that come once."""
    reduction = Reduction(works)
    reduction.run(failure)
    reduction.settle()


class Reduction:
    """Completes ``work.fresh`` of one list of works over all ranks and settles ``work.active``. Made once
    for the steps of that list, because it keeps the vectors. Without links it communicates nothing.

    What ranks agree on stays on the device: whoever applies there (see ``backend.Agreement``) need not wait
    until the host has read it.
    """

    def __init__(self, works: Sequence[Work]) -> None:
        self.works = [work for work in works if work.links]
        self.places = {id(work): 1 + i for i, work in enumerate(self.works)}
        members: dict[Group, list[tuple[Work, Link]]] = {}
        for work in self.works:
            for link in work.links:
                members.setdefault(link.group, []).append((work, link))
        device = self.works[0].param.device if self.works else torch.device("cpu")
        self.flags = torch.zeros(1 + len(self.works), device=device)
        self.groups = [
            _GroupReduction(group, linked, [0, *(self.places[id(work)] for work, _ in linked)], self.flags)
            for group, linked in members.items()
        ]
        self.said = [False] * len(self.flags)  # what this rank says, as ``own`` has it
        self.own = torch.zeros_like(self.flags)
        self.read = torch.zeros_like(self.flags, device="cpu", pin_memory=device.type == "cuda")
        self.copied = torch.cuda.Event() if device.type == "cuda" else None
        self.open = False

    def run(self, failure: BaseException | None = None) -> None:
        """Collective. A rank that failed earlier takes part nevertheless, with ``failure``: it raises that
        afterwards, and every other rank of its groups raises RuntimeError in ``settle``, so that nobody
        waits for it."""
        if self.groups:
            said = [failure is not None, *map(_ACTIVE, self.works)]
            if said != self.said:
                self.said = said
                self.own.copy_(torch.tensor(said, dtype=torch.float32))
            self.flags.copy_(self.own)
            for group in self.groups:
                group.run(self.flags, absent=failure is not None)
            self.read.copy_(self.flags, non_blocking=True)
            if self.copied is not None:
                self.copied.record(torch.cuda.current_stream(self.flags.device))
            self.open = True
        if failure is not None:
            raise failure

    def settle(self) -> None:
        """Wait for what the ranks agreed on, and set ``work.active``. Raises RuntimeError if another rank
        failed. Nothing if it was called already."""
        if not self.open:
            return
        self.open = False
        if self.copied is not None:
            self.copied.synchronize()
        any_failed, *active = self.read.tolist()
        for work, flag in zip(self.works, active, strict=True):
            work.active = bool(flag)
        if any_failed:
            raise RuntimeError("the optimizer step failed on another rank; see that rank's error")


class _GroupReduction:
    """Of one group. places: of its flags (failure, each work's gradient) among those of all groups."""

    def __init__(
        self, group: Group, linked: Sequence[tuple[Work, Link]], places: list[int], flags: Tensor
    ) -> None:
        self.group = group
        shares = [(work, share) for work, link in linked for share in link.shares]
        device = linked[0][0].param.device
        self.maxima = _Vector([p for p in shares if not p[1].is_sum], torch.float32, len(places), device)
        self.sums = _Vector([p for p in shares if p[1].is_sum], torch.float64, 0, device)
        every = places == list(range(len(flags)))  # the usual case: all works in one group
        self.places = None if every else torch.tensor(places, device=flags.device)
        self.picked = flags if every else torch.zeros(len(places), device=flags.device)

    def run(self, flags: Tensor, *, absent: bool) -> None:
        """MAX of the flags and the maxima, SUM of the sums, all in the order of the current stream. Groups
        run one after another: what one has settled of ``flags`` the next one starts from."""
        vector = self.maxima.collect(absent=absent)
        head = vector[: len(self.picked)]
        if self.places is not None:
            torch.index_select(flags, 0, self.places, out=self.picked)
        head.copy_(self.picked)
        vector.nan_to_num_(NAN, math.inf, -math.inf)  # a negative NaN would lose to every number
        self.group.all_reduce(vector.view(torch.int32), maximum=True)
        self.picked.copy_(head)
        if self.places is not None:
            flags.index_copy_(0, self.places, self.picked)
        if self.sums.shares:
            self.group.all_reduce(self.sums.collect(absent=absent), maximum=False)
        if not absent:
            self.maxima.deliver()
            self.sums.deliver()


class _Vector:
    """Shares of works, one behind another, after ``room`` flags."""

    def __init__(
        self, shares: list[tuple[Work, Share]], dtype: torch.dtype, room: int, device: torch.device
    ) -> None:
        self.shares, self.room = shares, room
        length = room + sum(share.length for _, share in shares)
        self.values = torch.zeros(length, dtype=dtype, device=device)
        self.held = [(w, s) for w, s in shares if s.index is not None]
        self.known: list[Tensor] = []  # the statistics that are viewed
        self.views: list[Tensor] = []  # this rank's shares in ``work.fresh``
        self.slots: list[Tensor] = []  # the same in ``values``

    def collect(self, *, absent: bool) -> Tensor:
        """The vector as this rank has it, but for the flags; zeros for what it lacks, or if ``absent``."""
        if absent or len(self.held) < len(self.shares):
            self.values.zero_()
        if not absent:
            self._look()
            if self.views:
                torch._foreach_copy_(self.slots, self.views)
        return self.values

    def deliver(self) -> None:
        """Put the reduced shares where they came from."""
        if self.views:
            torch._foreach_copy_(self.views, self.slots)

    def _look(self) -> None:
        """Make the views, if a back end does not keep its statistics where they were."""
        found = [work.fresh[share.moment][share.stat] for work, share in self.held]
        if len(found) == len(self.known) and all(map(is_, found, self.known)):
            return
        self.known = found
        self.views = [t[s.index] for t, (_, s) in zip(found, self.held, strict=True) if s.index is not None]
        parts = self.values[self.room :].split([share.length for _, share in self.shares])
        mine = [part for part, (_, s) in zip(parts, self.shares, strict=True) if s.index is not None]
        self.slots = [part.view(view.shape) for part, view in zip(mine, self.views, strict=True)]
