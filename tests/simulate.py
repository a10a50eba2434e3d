"""Ranks simulated by threads of one process: the production measure -> reduce -> apply over any cuts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shard4bit.backend import Backend, Work, Works
from shard4bit.comm import Reduction, make_link
from shard4bit.layout import Neighbours, Slab
from shard4bit.maths.update import Rule
from shard4bit.reference import ReferenceBackend
from shard4bit.spec import MomentSpec
from shard4bit.state import Moment, parts, state_key


@dataclass(eq=False)
class ThreadGroup:
    """An all-reduce among threads. ``log`` records (values, is maximum) of each."""

    size: int
    log: list[tuple[int, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=5)
        self.slots: list[Tensor] = []
        self.lock = threading.Lock()

    def all_reduce(self, vector: Tensor, *, maximum: bool) -> None:
        with self.lock:
            self.slots.append(vector.clone())
        self.barrier.wait()
        stack = torch.stack(self.slots)
        self.barrier.wait()
        with self.lock:
            self.slots.clear()
            self.log.append((vector.numel(), maximum))
        vector.copy_(stack.amax(0) if maximum else stack.sum(0))
        self.barrier.wait()


def in_threads(functions: list[Callable[[], Any]]) -> list[Any]:
    """Run functions side by side; their results, or the first error."""
    results: list[Any] = [None] * len(functions)
    errors: list[BaseException] = []

    def call(i: int) -> None:
        try:
            results[i] = functions[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@dataclass
class Rank:
    """One simulated rank's slab of a matrix, with its part of parameter and state."""

    slab: Slab
    param: Tensor
    moments: list[Moment]
    links: tuple[Any, ...]
    backend: Backend = field(default_factory=ReferenceBackend)

    @staticmethod
    def make(
        slab: Slab,
        whole: Tensor,
        names: tuple[str, ...],
        specs: list[MomentSpec],
        neighbours: list[tuple[Any, Neighbours]],
        device: str = "cpu",
    ) -> Rank:
        place = torch.device(device)
        moments = [Moment.zeros(n, s, slab, place) for n, s in zip(names, specs, strict=True)]
        links = tuple(make_link(g, n, slab, specs) for g, n in neighbours)
        return Rank(slab, take(whole, slab).to(place), moments, links)

    def step(self, rule: Rule, whole_grad: Tensor | None, scalars: Any) -> None:
        grad = None if whole_grad is None else take(whole_grad, self.slab).to(self.param.device)
        work = Work(
            self.slab, self.moments, self.param, [grad], scalars, links=self.links, active=grad is not None
        )
        works = Works([work])
        self.backend.measure(rule, works)
        reduction = Reduction(works)
        reduction.run()
        self.backend.apply(rule, works, reduction)
        reduction.settle()


def take(whole: Tensor, slab: Slab) -> Tensor:
    """A slab's elements of a whole matrix (rows, cols), dense, in the slab's shape."""
    rows = [r for start, stop in slab.row_ranges for r in range(start, stop)]
    window = whole[rows][:, slab.col0 : slab.col1].reshape(-1)
    return window[slab.head : window.numel() - slab.tail].clone().view(slab.shape)


def assemble(ranks: list[Rank], key: str) -> Tensor:
    """A canonical tensor from all ranks' parts: OR of codes, else the values (equal where shared)."""
    first = ranks[0].slab.view
    out: Tensor | None = None
    for rank in ranks:
        for moment in rank.moments:
            for part in parts(moment.spec):
                if state_key(moment.name, part.suffix) != key:
                    continue
                slab, tensor = rank.slab, moment.tensors[part.suffix].cpu()
                if part.role == "scalar":
                    out = tensor if out is None else out
                    assert torch.equal(out, tensor) or bool(tensor.isnan())
                    continue
                shape = {"rows": (first.rows, 1), "cols": (1, first.cols)}.get(
                    part.role, (first.rows, -(-first.cols // part.unit))
                )
                if out is None:
                    fill = 0 if tensor.dtype == torch.uint8 else -1.0
                    out = torch.full(shape, fill, dtype=tensor.dtype)
                _put(out, part.role, part.unit, slab, tensor)
    assert out is not None, key
    return out


def _put(out: Tensor, role: str, unit: int, slab: Slab, tensor: Tensor) -> None:
    if slab.numel == 0:
        return
    rows = [r for start, stop in slab.row_ranges for r in range(start, stop)]
    if role == "full":
        flat = out.view(-1)
        index = torch.tensor([[r * out.shape[1] + c for c in range(slab.col0, slab.col1)] for r in rows])
        index = index.view(-1)[slab.head : index.numel() - slab.tail]
        flat[index] = tensor.view(-1)
        return
    if role == "rows":
        window, new = (rows, slice(0, 1)), tensor.view(-1, 1)
    elif role == "cols":
        window, new = ([0], slice(slab.col0, slab.col1)), tensor.view(1, -1)
    else:
        first, stop = slab.units(unit)
        window, new = (rows, slice(first, stop)), tensor.view(len(rows), -1)
        if out.dtype != torch.uint8 and (slab.head or slab.tail):
            new = new.clone()  # of a cut row, blocks outside of the run are unused
            if slab.head:
                new[0, : slab.head // unit] = -1.0
            if slab.tail:
                new[-1, -(-(slab.width - slab.tail) // unit) :] = -1.0
    old = out[window]
    if out.dtype == torch.uint8:
        out[window] = old | new
    else:
        fresh = old == -1.0
        known = (old == new) | (old.isnan() & new.isnan()) | (new == -1.0)
        assert bool((fresh | known).all()), "ranks disagree about a shared statistic"
        out[window] = torch.where(fresh, new, old)
