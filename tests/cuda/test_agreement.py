"""What ranks agree on between measure and apply: the device acts by it before the host has read it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from shard4bit.backend import Work, Works
from shard4bit.comm import Link, Reduction, make_link
from shard4bit.layout import Neighbours, Slab
from shard4bit.maths.update import ADAMW
from shard4bit.reference import ReferenceBackend
from shard4bit.spec import MomentSpec, parse_spec
from shard4bit.state import Moment
from tests.cuda.runtime import emulated
from tests.simulate import ThreadGroup, in_threads
from tests.test_invariance import adamw_scalars, bits

SHAPE = (65, 70)
SECONDS = ("rank1", "block", "factored")


class Watched(Reduction):
    """Notes how many launches there were when the host began to wait."""

    def __init__(self, works: Works, backend: Any) -> None:
        super().__init__(works)
        self.backend, self.launched = backend, -1

    def settle(self) -> None:
        if self.open:
            self.launched = len(self.backend.runtime.launches)
        super().settle()


class Elsewhere:
    """An agreement whose flags lie on another device than the works: where the first parameters are."""

    def __init__(self, reduction: Reduction) -> None:
        self.flags, self.places = torch.zeros(len(reduction.flags), device="meta"), reduction.places
        self.settle = reduction.settle


def specs_of(second: str) -> list[MomentSpec]:
    return [parse_spec(n, signed=s, argument="spec") for n, s in (("B128/DE", True), (second, False))]


def work_of(slab: Slab, specs: list[MomentSpec], links: tuple[Link, ...] = ()) -> Work:
    moments = [
        Moment.zeros(n, s, slab, torch.device("cpu")) for n, s in zip(ADAMW.moments, specs, strict=True)
    ]
    param, grad = torch.randn(slab.shape), torch.randn(slab.shape)
    return Work(slab, moments, param, [grad], adamw_scalars(1), links=links)


def ranks_of(second: str) -> list[Works]:
    """Two ranks that share a matrix, each with another parameter, which the other rank does not know."""
    group, edges, specs = ThreadGroup(2), (0, 1900, 65 * 70), specs_of(second)
    out = []
    for number in range(2):
        torch.manual_seed(number)
        slab = Slab.run(SHAPE, edges[number], edges[number + 1])
        link = make_link(group, Neighbours("run", edges), slab, specs)
        out.append(Works([work_of(slab, specs, (link,)), work_of(Slab.whole(SHAPE), specs)]))
    return out


def tensors(works: Works) -> list[torch.Tensor]:
    return [t for w in works for t in (w.param, *(t for m in w.moments for t in m.tensors.values()))]


def step(
    works: Works,
    reduction: Reduction,
    backend: Any,
    failure: Exception | None = None,
    agreed: Callable[[Reduction], Any] = lambda reduction: reduction,
) -> Any:
    """The error that it raises, if any."""
    try:
        if failure is None:
            backend.measure(ADAMW, works)
        reduction.run(failure)
        backend.apply(ADAMW, works, agreed(reduction))
        reduction.settle()
    except (ValueError, RuntimeError) as error:
        return error
    return None


@pytest.mark.parametrize("second", SECONDS)
def test_nothing_changes_where_another_rank_failed(second: str) -> None:
    """Its launches are there before the host knows of the failure, and do nothing, to parameters that the
    other rank does not share too; the next step is as any."""
    every, backend = ranks_of(second), emulated()
    reductions = [Watched(works, backend) for works in every]
    before = [t.clone() for t in tensors(every[0])]
    both = list(zip(every, reductions, strict=True))
    failures = [None, ValueError("mine")]
    raised = in_threads([partial(step, *pair, backend, f) for pair, f in zip(both, failures, strict=True)])
    assert str(raised[1]) == "mine" and "failed on another rank" in str(raised[0])
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(before, tensors(every[0]), strict=True))
    names = [name for name, _ in backend.runtime.launches[: reductions[0].launched]]
    assert names[-1] in ("apply", "commit") and "agree" in names
    assert in_threads([partial(step, *pair, backend) for pair in both]) == [None, None]
    assert not any(torch.equal(bits(a), bits(b)) for a, b in zip(before, tensors(every[0]), strict=True))


@pytest.mark.parametrize("second", SECONDS)
def test_by_the_reference_as_by_the_kernels(second: str) -> None:
    """One rank lacks the shared gradient in the second step, both do in the third. Again with the flags on
    another device, by the host then."""
    found = []
    kernels, host = emulated(), partial(step, agreed=Elsewhere)
    for backend, take in ((ReferenceBackend(), step), (emulated(), step), (kernels, host)):
        every = ranks_of(second)
        reductions = [Reduction(works) for works in every]
        for number, lacking in ((1, ()), (2, (1,)), (3, (0, 1))):
            grads = [works[0].grad for works in every]
            for rank, works in enumerate(every):
                works[0].active = rank not in lacking
                works[0].grad = grads[rank] if works[0].active else None
                for work in works:
                    work.scalars = adamw_scalars(number)
                works.version += 1
            steps = [partial(take, *pair, backend) for pair in zip(every, reductions, strict=True)]
            assert in_threads(steps) == [None, None]
            assert [works[0].active for works in every] == [len(lacking) < 2] * 2
            for works, grad in zip(every, grads, strict=True):
                works[0].grad = grad
        found.append([t for works in every for t in tensors(works)])
    assert "agree" not in [name for name, _ in kernels.runtime.launches]
    for expected, got, by_host in zip(*found, strict=True):
        assert torch.equal(bits(got), bits(by_host))
        if second == "factored":  # sums in another order
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(bits(got), bits(expected))


@pytest.mark.parametrize("failing", [False, True])
def test_groups_one_after_the_other(failing: bool) -> None:
    """Rank 0's gradient, or its failure, reaches rank 2 through rank 1, which shares one group with each;
    not rank 3, whose group with rank 2 was done before."""
    groups, specs, slab = [ThreadGroup(2) for _ in range(3)], specs_of("rank1"), Slab.whole(SHAPE)
    every = []
    for number, shared in enumerate([(0,), (0, 2), (1, 2), (1,)]):
        links = tuple(make_link(groups[i], Neighbours("rows"), slab, specs) for i in shared)
        every.append(Works([work_of(slab, specs, links)]))
        if number:
            every[-1][0].grad, every[-1][0].active = None, False
    failures = [ValueError("mine") if failing else None, None, None, None]
    rest = zip(every, failures, strict=True)
    raised = in_threads([partial(step, w, Reduction(w), ReferenceBackend(), f) for w, f in rest])
    if failing:
        assert [type(error) for error in raised] == [ValueError, RuntimeError, RuntimeError, type(None)]
    else:
        assert raised == [None] * 4
        assert [works[0].active for works in every] == [True, True, True, False]
