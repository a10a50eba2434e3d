"""fp16 with a loss scale above 1, and gradients that autograd makes: what the loss is multiplied by and what
DeepSpeed divides the gradients by are the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shard4bit.errors import LayoutError
from tests.deepspeed import engines
from tests.deepspeed.engines import Known, config, engine_of, needs_deepspeed
from tests.fsdp import models
from tests.pool import pool

pytestmark = needs_deepspeed
STEPS = 3
SCALED = {"enabled": True, "initial_scale_power": 4, "hysteresis": 1}


def gradient(name: str, shape: tuple[int, ...], step: int) -> Tensor:
    """Exact in fp16, also times 16 and divided by 4."""
    grad = models.gradient(name, shape, step)
    return grad.where(grad.abs() > 2.0**-8, torch.zeros(())).clamp(-4, 4).half().float()


class Exact(Known):
    def forward(self, step: int) -> Tensor:
        named = list(self.named_parameters())
        return torch.stack([(p.float() * gradient(n, tuple(p.shape), step)).sum() for n, p in named]).sum()


@contextmanager
def scaling_deepspeed(how: str) -> Iterator[None]:
    """DeepSpeed as it is ("installed"), or ones whose engine scales the loss ("later") or does worse."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    from shard4bit.deepspeed import layout

    own = DeepSpeedEngine.backward  # ours, around DeepSpeed's
    inner = own.__wrapped__

    def backward(self: Any, loss: Any, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Any:
        scale = layout.loss_scale(self) if how == "later" else 3.0
        return inner(self, loss.float() * scale, retain_graph, scale_wrt_gas)

    cell = own.__closure__[own.__code__.co_freevars.index("back")]
    if how != "installed":
        cell.cell_contents = backward
    try:
        yield
    finally:
        cell.cell_contents = inner


def trained(stage: int, accumulation: int, how: str, more: dict[str, Any]) -> Any:
    settings = config(stage, precision="fp16", gradient_accumulation_steps=accumulation, fp16=SCALED, **more)
    engine = engine_of(Exact(), settings)
    returned = []
    with scaling_deepspeed(how):
        for step in range(1, STEPS + 1):
            for _ in range(accumulation):
                loss = engine(step)
                returned.append(float(engine.backward(loss)) * accumulation == float(loss))
                engine.step()
    assert engine.optimizer.loss_scale == 16 and engine.skipped_steps == 0
    return engines.parts(engine), all(returned) or how == "later"


def expected() -> Any:
    model: Any = Exact()
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(param.half())
    optimizer = models.optimizer_of("rank1", model.parameters())
    for step in range(1, STEPS + 1):
        for name, param in model.named_parameters():
            param.grad = gradient(name, tuple(param.shape), step)
        optimizer.step()
    return models.canonical(model, optimizer)


@pytest.mark.parametrize(
    "stage, accumulation, how",
    [(0, 1, "installed"), (0, 2, "installed"), (0, 2, "later"), (1, 1, "installed"), (2, 2, "installed")],
)
def test_gradients_are_scaled_once(stage: int, accumulation: int, how: str) -> None:
    """The optimizer's gradients, and so its states, are those of one process without a scale."""
    results = pool(2).run(trained, stage, accumulation, how, {})
    assert all(returned for _, returned in results)
    engines.same(engines.whole([parts for parts, _ in results]), expected(), (stage, accumulation, how))


def test_an_engine_that_scales_by_something_else_is_noticed() -> None:
    for outcome in pool(2).outcomes(trained, 0, 1, "worse", {}):
        assert outcome[0] == "error" and isinstance(outcome[1], LayoutError), outcome
        assert "multiplies the loss by 3.0, expected 1 or its scale, 16.0" in str(outcome[1])


def ways(stage: int) -> list[float]:
    """The optimizer's gradient of one element, by each way of giving "scale_wrt_gas"."""
    settings = config(stage, precision="fp16", gradient_accumulation_steps=2, fp16=SCALED)
    engine = engine_of(Exact({"small": (37, 5)}), settings)
    seen: list[float] = []

    def watch(optimizer: Any, *_: Any) -> None:
        [bound] = optimizer.bind()
        seen.append(float(bound.placed.grad().sum()))

    engine.basic_optimizer.register_step_pre_hook(watch)
    for args, kwargs in [((), {}), ((False, False), {}), ((), {"scale_wrt_gas": False})]:
        for _ in range(2):
            engine.backward(engine(1), *args, **kwargs)
            engine.step()
    return seen


def test_losses_that_are_divided_by_hand() -> None:
    total = float(gradient("small", (37, 5), 1).sum())
    for seen in pool(2).run(ways, 0):
        assert seen == pytest.approx([total, 2 * total, 2 * total], rel=1e-5)


def clipped(stage: int, norm: float) -> list[float]:
    """Norms of the gradients that the optimizer gets, over all ranks."""
    settings = config(stage, precision="fp16", fp16=SCALED, gradient_clipping=norm)
    engine = engine_of(Exact(), settings)
    norms: list[float] = []

    def watch(optimizer: Any, *_: Any) -> None:
        total = torch.stack([b.placed.grad().double().square().sum() for b in optimizer.bind()]).sum()
        if stage:
            dist.all_reduce(total)
        norms.append(float(total.sqrt()))

    engine.basic_optimizer.register_step_pre_hook(watch)
    engine.backward(engine(1))
    engine.step()
    return norms


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_clipping(stage: int) -> None:
    """To a little less than what the norms are without the scale."""
    shapes = Exact().named_parameters()
    own = sum(float(gradient(n, tuple(p.shape), 1).double().square().sum()) for n, p in shapes) ** 0.5
    for norms in pool(2).run(clipped, stage, 0.9 * own):
        assert norms[0] == pytest.approx(0.9 * own, rel=1e-3)


def unsupported() -> str:
    engine = engine_of(Exact(), config(0, precision="fp16", fp16=SCALED))
    with pytest.raises(RuntimeError) as caught:
        engine.scale(engine(1)).backward()
    return str(caught.value)


def test_backward_without_the_engine_is_an_error() -> None:
    for message in pool(2).run(unsupported):
        assert "use engine.backward(loss)" in message
