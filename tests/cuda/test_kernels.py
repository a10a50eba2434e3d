"""Every kernel, on the CPU, against the torch reference: bit for bit, for any cut, in three lane orders."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from shard4bit.backend import Work, Works
from shard4bit.comm import Reduction
from shard4bit.layout import Neighbours, Slab
from shard4bit.maths.update import ADAMW, SGD
from shard4bit.reference import ReferenceBackend
from shard4bit.spec import parse_spec
from tests.cuda.emulator import ORDERS, available
from tests.cuda.runtime import emulated
from tests.simulate import Rank, ThreadGroup, in_threads, take
from tests.test_invariance import adamw_scalars, bits, problems, run, sgd_scalars

pytestmark = pytest.mark.skipif(not available(), reason="the emulator needs g++")
QUICK = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))


def specs_of(first: str, second: str) -> list[Any]:
    return [
        parse_spec(first, signed=True, argument="first"),
        parse_spec(second, signed=False, argument="second"),
    ]


NAMES = [("B128/DE", "rank1"), ("B128/DE", "block"), ("fp32", "fp32")]


@pytest.mark.parametrize(
    ("names", "order", "compensate"),
    [
        *[
            pytest.param(
                n,
                o,
                False,
                id=f"{'+'.join(n)}-{o}",
                marks=[pytest.mark.slow] if o and n != NAMES[0] else [],
            )
            for n in NAMES
            for o in ORDERS
        ],
        *[
            pytest.param(
                n, o, True, id=f"{'+'.join(n)}-{o}-compensated", marks=[pytest.mark.slow] if o else []
            )
            for n in NAMES[:2]
            for o in ORDERS
        ],
    ],
)
@QUICK
@given(problem=problems())
def test_adamw(names: tuple[str, str], order: int, compensate: bool, problem: dict[str, Any]) -> None:
    scalars = partial(adamw_scalars, compensate=compensate)
    run(ADAMW, problem, specs_of(*names), scalars, backend=partial(emulated, order))


@pytest.mark.parametrize("order", [o if not o else pytest.param(o, marks=pytest.mark.slow) for o in ORDERS])
@pytest.mark.parametrize("names", NAMES[:2], ids="+".join)
@QUICK
@given(problem=problems())
def test_stochastic_rounding(names: tuple[str, str], order: int, problem: dict[str, Any]) -> None:
    scalars = partial(adamw_scalars, compensate=True, rounding="stochastic")
    run(ADAMW, problem, specs_of(*names), scalars, backend=partial(emulated, order))


@pytest.mark.parametrize("backend", [ReferenceBackend, emulated], ids=["reference", "kernels"])
@pytest.mark.parametrize("names", NAMES[:2], ids="+".join)
def test_stochastic_rounding_of_scattered_rows(names: tuple[str, str], backend: Any) -> None:
    """A part whose rows are several stretches of the whole's, as a cut of the second of three dimensions."""
    shape, ends = (4, 30, 70), [0, 9, 10, 30]
    start, *grads = torch.randn((4, 4 * 30, 70), generator=torch.Generator().manual_seed(1))
    group, specs = ThreadGroup(3), specs_of(*names)
    near = [(group, Neighbours("rows"))]
    slabs = [Slab.box(shape, [(0, 4), (a, b), (0, 70)]) for a, b in pairwise(ends)]
    assert [len(slab.row_ranges) for slab in slabs] == [4, 4, 4]
    whole = Rank.make(Slab.whole(shape), start, ADAMW.moments, specs, [])
    ranks = [Rank.make(slab, start, ADAMW.moments, specs, near) for slab in slabs]
    for rank in ranks:
        rank.backend = backend()
    for step, grad in enumerate(grads, 1):
        scalars = adamw_scalars(step, rounding="stochastic")
        whole.step(ADAMW, grad, scalars)
        in_threads([partial(rank.step, ADAMW, grad, scalars) for rank in ranks])
    for rank, (a, b) in zip(ranks, pairwise(ends), strict=True):
        assert torch.equal(rank.param, whole.param.view(shape)[:, a:b])
        codes = whole.moments[1].tensors["codes"].view(4, 30, -1)[:, a:b]
        assert torch.equal(rank.moments[1].tensors["codes"].view(codes.shape), codes)


@pytest.mark.parametrize("compensate", [False, True], ids=["plain", "compensated"])
@QUICK
@given(problem=problems())
def test_sgd(compensate: bool, problem: dict[str, Any]) -> None:
    spec = parse_spec("B128/DE", signed=True, argument="momentum_buffer")
    run(SGD, problem, [spec], partial(sgd_scalars, compensate=compensate), backend=emulated)


@pytest.mark.parametrize("names", [("B128/DE", "rank1"), ("B128/DE", "block"), ("B128/DE", "factored")])
@pytest.mark.parametrize("holder", [0, 1, None])
def test_ranks_without_a_gradient(names: tuple[str, str], holder: int | None) -> None:
    """After a step of both: a parameter steps on all its ranks if one has a gradient, else on none."""
    shape, specs = (8, 200), specs_of(*names)
    start, grad = torch.randn((2, *shape), generator=torch.Generator().manual_seed(1))
    found = []
    for backend in (ReferenceBackend, emulated):
        group, near = ThreadGroup(2), Neighbours("run", (0, 900, 1600))
        slabs = [Slab.run(shape, 0, 900), Slab.run(shape, 900, 1600)]
        ranks = [Rank.make(s, start, ADAMW.moments, specs, [(group, near)]) for s in slabs]
        works = [Works([Work(r.slab, r.moments, r.param, [None], {}, links=r.links)]) for r in ranks]
        backends = [backend(), backend()]
        for step in (1, 2):
            for number, (rank, batch) in enumerate(zip(ranks, works, strict=True)):
                batch[0].active = step == 1 or number == holder
                batch[0].grad = take(grad, rank.slab) if batch[0].active else None
                batch[0].scalars = adamw_scalars(step)
            in_threads([partial(_step, b, w) for b, w in zip(backends, works, strict=True)])
        found.append(ranks)
    exact = names[1] != "factored"  # else sums are in another order
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got.param, expected.param, rtol=0, atol=0 if exact else 1e-6)
        for m, n in zip(expected.moments, got.moments, strict=True):
            for key, tensor in m.tensors.items():
                if exact or key in ("codes", "absmax"):
                    assert torch.equal(bits(n.tensors[key]), bits(tensor)), key
                else:
                    torch.testing.assert_close(n.tensors[key], tensor, rtol=2.0**-19, atol=0)


def _step(backend: Any, works: Works) -> None:
    backend.measure(ADAMW, works)
    reduction = Reduction(works)
    reduction.run()
    backend.apply(ADAMW, works, reduction)
    reduction.settle()
