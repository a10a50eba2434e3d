"""Training loops under torch.compile: graph breaks around a step, no errors, and the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from shard4bit import AdamW4bit, SGD4bit
from tests.optim.helpers import same_bits

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.compile, about what it meets on its way
MAKERS = {"adamw": partial(AdamW4bit, lr=1e-2), "sgd": partial(SGD4bit, lr=0.1, nesterov=True)}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Training:
    """Steps of a small model, with hooks and a scheduler; ``wrap`` compiles what it is given, or does not."""

    def __init__(self, kind: str, capturable: bool, wrap: Callable[[Any], Any]) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 40))
        self.optimizer = MAKERS[kind](self.model.parameters(), capturable=capturable)
        self.calls: list[str] = []
        self.optimizer.register_step_pre_hook(lambda *args: self.calls.append("before"))
        self.optimizer.register_step_post_hook(lambda *args: self.calls.append("after"))
        self.wrap = wrap
        self.losses: list[float] = []

    def loss_of(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).square().mean()

    def run(self, step: Callable[[torch.Tensor], Any]) -> list[Any]:
        schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)
        for i in range(5):
            x = torch.randn(8, 96, generator=torch.Generator().manual_seed(i))
            self.losses.append(float(step(x)))
            schedule.step()
        return [*self.model.parameters(), *(t for s in self.optimizer.state.values() for t in s.values())]


def whole_loop(training: Training) -> Callable[[torch.Tensor], Any]:
    def step(x: torch.Tensor) -> torch.Tensor:
        loss = training.loss_of(x)
        loss.backward()
        training.optimizer.step()
        training.optimizer.zero_grad()
        return loss

    return training.wrap(step)


def closure(training: Training) -> Callable[[torch.Tensor], Any]:
    def step(x: torch.Tensor) -> Any:
        def again() -> torch.Tensor:
            training.optimizer.zero_grad()
            loss = training.loss_of(x)
            loss.backward()
            return loss

        return training.optimizer.step(again)

    return training.wrap(step)


def step_alone(training: Training) -> Callable[[torch.Tensor], Any]:
    act = training.wrap(lambda: training.optimizer.step())

    def step(x: torch.Tensor) -> torch.Tensor:
        loss = training.loss_of(x)
        training.optimizer.zero_grad()
        loss.backward()
        act()
        return loss

    return step


QUICK = {
    ("eager", "adamw", True, whole_loop),
    ("aot_eager", "adamw", False, whole_loop),
    ("eager", "sgd", False, closure),
}
CASES = list(product(("eager", "aot_eager"), MAKERS, (False, True), (whole_loop, closure, step_alone)))


@pytest.mark.parametrize(
    ("backend", "kind", "capturable", "loop"),
    [pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in CASES],
    ids=["-".join([b, k, "capturable" if c else "plain", f.__name__]) for b, k, c, f in CASES],
)
def test_compiled_loops(backend: str, kind: str, capturable: bool, loop: Any) -> None:
    plain = Training(kind, capturable, lambda f: f)
    expected = plain.run(loop(plain))
    compiled = Training(kind, capturable, torch.compile(backend=backend))
    torch._dynamo.utils.counters.clear()
    found = compiled.run(loop(compiled))
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0  # something was compiled
    assert compiled.losses == plain.losses and compiled.calls == plain.calls == ["before", "after"] * 5
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
def test_many_optimizers() -> None:
    """More than the frames that torch.compile makes of one function: what it gives up on runs as it is."""
    limit = torch._dynamo.config.recompile_limit
    for _ in range(limit + 3):
        training = Training("adamw", False, torch.compile(backend="eager"))
        training.run(whole_loop(training))
        assert training.calls == ["before", "after"] * 5
