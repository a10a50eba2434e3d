"""Kernels touch no memory but their own (every tensor lies between inaccessible pages) and do nothing that
C++ leaves undefined (UBSan)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import shard4bit
from shard4bit.backend import Works
from shard4bit.cuda import plan
from shard4bit.cuda.backend import KernelBackend
from shard4bit.maths.update import ADAMW, SGD
from shard4bit.state import state_key
from tests import simulate, test_invariance
from tests.covering import covering
from tests.cuda.emulator import SHUFFLED, available, guarded
from tests.cuda.runtime import EmulatorRuntime, Twins, emulated
from tests.cuda.test_kernels import specs_of
from tests.cuda.test_kernels_optimizers import KINDS, grads, shifted, starts
from tests.test_invariance import adamw_scalars, problems

pytestmark = pytest.mark.skipif(not available(), reason="the emulator needs g++")

# Whole lanes (in tiles and blocks that are full and that are not), then odd ones.
SHAPES = [(70, 256), (33, 640), (40, 384), (280, 104), (48, 136), (61, 131), (1400, 3), (2, 5, 7, 60), (77,)]
MAKERS = {**KINDS, "factored": partial(shard4bit.AdamW4bit, second_moment="factored")}
PLACES = ["start", "end"]


def guard(tensor: torch.Tensor, at: str) -> torch.Tensor:
    """A copy whose start or end touches memory that nothing can access."""
    whole = tensor.detach().contiguous().reshape(-1)
    copy = torch.from_numpy(guarded(whole.view(torch.uint8).numpy(), at))
    return copy.view(tensor.dtype).view(tensor.shape)


def guard_states(optimizer: Any, at: str) -> None:
    for bound in optimizer.bind():
        for moment in bound.moments:
            for suffix, tensor in moment.tensors.items():
                moment.tensors[suffix] = guard(tensor, at)
                optimizer.state[bound.param][state_key(moment.name, suffix)] = moment.tensors[suffix]


class GuardedRuntime(EmulatorRuntime):
    """Tables between inaccessible pages, too."""

    def __init__(self, at: str) -> None:
        super().__init__(SHUFFLED)
        self.at = at

    def upload(self, host: Any) -> torch.Tensor:
        return guard(super().upload(host), self.at)


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Workspace, the table and the gradients and parameters of simulated ranks are guarded; at which end."""
    at: str = request.param
    allocate, take, table = plan.BatchBuilder._allocate, simulate.take, plan.BatchBuilder._bytes

    def guarded_pools(self: Any) -> dict[str, torch.Tensor]:
        return {name: guard(pool, at) for name, pool in allocate(self).items()}

    monkeypatch.setattr(plan.BatchBuilder, "_allocate", guarded_pools)
    monkeypatch.setattr(plan.BatchBuilder, "_bytes", lambda self, size: guard(table(self, size), at))
    monkeypatch.setattr(simulate, "take", lambda whole, slab: guard(take(whole, slab), at))
    yield at


@pytest.mark.parametrize("kind, dtype", covering(MAKERS, [torch.float32, torch.bfloat16]), ids=str)
def test_memory_of_a_step(kind: str, dtype: torch.dtype, place: str) -> None:
    twins = Twins(
        starts(SHAPES, dtype),
        MAKERS[kind],
        KernelBackend(GuardedRuntime(place)),
        place=partial(guard, at=place),
    )
    guard_states(twins.served, place)
    for step in range(1, 3):
        twins.step(grads(SHAPES, step))
        if kind != "factored":
            assert twins.differences() == []


@pytest.mark.parametrize("kind", ["rank1", "block", "factored", "sgd"])
@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=list(HealthCheck),  # the fixture may serve all examples
)
@given(problem=problems())
def test_memory_of_ranks(kind: str, place: str, problem: dict[str, Any]) -> None:
    rule, specs = ADAMW, specs_of("B128/DE", kind if kind != "sgd" else "rank1")
    scalars: Any = adamw_scalars
    if kind == "sgd":
        group = {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01, "nesterov": False}
        rule, specs = SGD, specs[:1]

        def scalars(step: int) -> Any:
            return SGD.scalars(group, step)

    ranks = [
        simulate.Rank.make(slab, torch.ones(problem["shape"]).to(problem["dtype"]), rule.moments, specs, near)
        for slab, near in test_invariance.cut(problem)
    ]
    for rank in ranks:
        rank.backend = KernelBackend(GuardedRuntime(place))
        for moment in rank.moments:
            moment.tensors = {k: guard(t, place) for k, t in moment.tensors.items()}
    for step in (1, 2):
        grad = test_invariance.gradient(problem, step)
        simulate.in_threads([partial(r.step, rule, grad, scalars(step)) for r in ranks])


def test_a_fault_is_reported() -> None:
    """A parameter one element short of its slab."""
    param = torch.nn.Parameter(torch.ones(77))
    work = MAKERS["rank1"]([param]).bind()[0].work
    work.param, work.grad, work.scalars = guard(torch.ones(76), "end"), torch.ones(77), adamw_scalars(1)
    kernels = emulated()
    works = Works([work])
    kernels.measure(ADAMW, works)
    with pytest.raises(RuntimeError, match="kernel apply"):
        kernels.apply(ADAMW, works)


@pytest.mark.parametrize(
    ("kind", "dtype", "grad_dtype"),
    [
        ("rank1", torch.bfloat16, torch.bfloat16),
        *[  # each is compiled anew
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("rank1", torch.float32, torch.float16),
                ("block", torch.float16, torch.float16),
                ("factored", torch.bfloat16, torch.float32),
                ("nesterov", torch.float32, torch.float32),
            )
        ],
    ],
    ids=str,
)
def test_nothing_undefined(kind: str, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    for shapes, place in ((SHAPES, torch.clone), (SHAPES[4:6], shifted)):
        twins = Twins(
            starts(shapes, dtype), MAKERS[kind], emulated(sanitize=True), place=place, grad_dtype=grad_dtype
        )
        for step in range(1, 4):
            twins.step(grads(shapes, step, specials=(None, "nan", "inf")))
            if kind != "factored":
                assert twins.differences() == []
