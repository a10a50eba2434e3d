"""Gradients read in few calls against each parameter's own reader."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from shard4bit.layout import Slab
from shard4bit.optim.gradients import Gradients
from shard4bit.placement import Placed, place


@dataclass(eq=False)
class Buffer:
    """A flat tensor of parameters; counts how often its gradient is asked for."""

    values: Tensor | None
    failing: bool = False
    asked: int = 0

    def grad(self) -> Tensor | None:
        self.asked += 1
        if self.failing:
            raise ValueError("not now")
        return self.values


def held_in(flat: Buffer, at: int, start: int, stop: int, *, whole: bool = False) -> Placed:
    """Elements [start, stop) of a matrix (6, 7), or all of it in its own shape, that begin at ``at``."""
    slab = Slab.whole((6, 7)) if whole else Slab.run((6, 7), start, stop)

    def grad() -> Tensor | None:
        return None if flat.values is None else flat.values[at : at + slab.numel].view(slab.shape)

    return Placed(slab=slab, data=lambda: torch.empty(0), grad=grad, flat=flat, at=at)


@st.composite
def mixtures(draw: st.DrawFn) -> list[Placed]:
    """Parameters of flat tensors (with gaps, empty ones too, in any order) and by themselves, mixed."""
    out: list[Placed] = []
    for number in range(draw(st.integers(0, 3))):
        flat, at = Buffer(None), 0
        for _ in range(draw(st.integers(1, 5))):
            at += draw(st.integers(0, 4))
            start, stop = sorted(draw(st.tuples(st.integers(0, 42), st.integers(0, 42))))
            whole = draw(st.booleans())
            out.append(held_in(flat, at if whole or start < stop else 0, start, stop, whole=whole))
            at += out[-1].slab.numel
        if draw(st.booleans()):
            flat.values = torch.arange(at + draw(st.integers(0, 3))) + 1000.0 * number
    for number in range(draw(st.integers(0, 4))):
        param = nn.Parameter(torch.zeros(3))
        param.grad = torch.full((3,), float(number)) if draw(st.booleans()) else None
        placed = place(param)
        out.append(placed if draw(st.booleans()) else replace(placed, holder=None))
    return draw(st.permutations(out))


def same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b) and (not a.numel() or a.data_ptr() == b.data_ptr())


@given(placed=mixtures())
def test_each_has_its_own(placed: list[Placed]) -> None:
    found, failure = Gradients(placed).read()
    assert failure is None and len(found) == len(placed)
    assert all(same(grad, p.grad()) for grad, p in zip(found, placed, strict=True))


def test_a_flat_tensor_is_read_once() -> None:
    flat = Buffer(torch.arange(84.0))
    Gradients([held_in(flat, 0, 0, 42), held_in(flat, 42, 0, 42)]).read()
    assert flat.asked == 1


def test_the_first_failure_is_told_and_the_rest_is_read() -> None:
    bad, good = Buffer(torch.arange(42.0), failing=True), Buffer(torch.arange(42.0))
    found, failure = Gradients([held_in(bad, 0, 0, 42), held_in(good, 0, 0, 42)]).read()
    assert isinstance(failure, ValueError) and str(failure) == "not now"
    assert found[0] is None and torch.equal(found[1], good.values)  # type: ignore[arg-type]


def test_guards_are_asked_once() -> None:
    asked: list[Any] = []

    def guard() -> None:
        asked.append(None)
        raise ValueError("gathered")

    params = [nn.Parameter(torch.ones(3)) for _ in range(4)]
    placed = [replace(place(p), guard=guard) for p in params]
    _, failure = Gradients(placed).read()
    assert len(asked) == 1 and str(failure) == "gathered"


def test_without_parameters() -> None:
    assert Gradients([]).read() == ([], None)
