"""What users of DeepSpeed configure besides the optimizer: accumulation, clipping, groups, schedulers, ..."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import shard4bit
from tests.deepspeed import engines
from tests.deepspeed.engines import Known, config, engine_of, needs_deepspeed
from tests.fsdp import models
from tests.fsdp.models import ADAMW, SHAPES
from tests.pool import pool

pytestmark = needs_deepspeed
STEPS = 3


def reference(groups: Callable[[Any], Any] = lambda model: model.parameters(), **options: Any) -> Any:
    """A model and optimizer of one process, and a generator that gives them each step's gradients."""
    model: Any = Known()
    optimizer = shard4bit.AdamW4bit(groups(model), **{**ADAMW, **options})

    def steps(count: int = STEPS) -> Iterator[int]:
        for step in range(1, count + 1):
            models.force(model, step)
            yield step
            optimizer.step()

    return model, optimizer, steps


def result(engine: Any) -> Any:
    return engines.parts(engine)


def assert_equal(ranks: Any, model: nn.Module, optimizer: Any, where: Any = "") -> None:
    engines.same(engines.whole(ranks), models.canonical(model, optimizer), where)


# ---- steps of DeepSpeed's -----------------------------------------------------------------------------


def accumulated(stage: int, precision: str, no_sync: bool) -> Any:
    """Two micro-batches a step, with half of the gradient in each."""
    accumulation = 1 if no_sync else 2
    engine = engine_of(Known(), config(stage, precision=precision, gradient_accumulation_steps=accumulation))
    for step in range(1, STEPS + 1):
        if no_sync:
            with engine.no_sync():
                engine.backward(engine(step) * 0.5)
            engine.backward(engine(step) * 0.5)
            engine.step()
        else:
            for _ in range(2):
                engine.backward(engine(step))
                engine.step()
    return result(engine)


@pytest.mark.parametrize(
    "stage, precision",
    [
        (0, "fp32"), (1, "fp32"), (2, "fp32"), (0, "bf16"), (2, "bf16"), (1, "bf16+fp32"), (2, "bf16+fp32"),
        (1, "bf16 masters"),
    ],
)  # fmt: skip
def test_gradient_accumulation(stage: int, precision: str) -> None:
    """0.5 g + 0.5 g is exact; without the first of them, the moments would be other ones."""
    engines.needs({"stage": stage, "precision": precision})
    found = engines.whole(pool(2).run(accumulated, stage, precision, False))
    engines.same(found, engines.reference("rank1", STEPS, precision), (stage, precision))


@pytest.mark.parametrize("stage", [0, 1])
def test_no_sync(stage: int) -> None:
    """0.5 g + 0.5 g is exact."""
    model, optimizer, steps = reference()
    for _ in steps():
        pass
    assert_equal(pool(2).run(accumulated, stage, "fp32", True), model, optimizer, stage)


def clipped(stage: int, precision: str, norm: float) -> Any:
    """The norms of the gradients that the optimizer gets, over all ranks."""
    engine = engine_of(Known(), config(stage, precision=precision, gradient_clipping=norm))
    norms: list[float] = []

    def watch(optimizer: Any, *_: Any) -> None:
        own = sum(float(b.placed.grad().double().square().sum()) for b in optimizer.bind())
        total = torch.tensor([own], dtype=torch.float64)
        if stage:
            dist.all_reduce(total)
        norms.append(float(total.sqrt()))

    engine.basic_optimizer.register_step_pre_hook(watch)
    engines.train(engine, 2)
    return norms, [part[4] for part in engines.parts(engine)]


@pytest.mark.parametrize("stage, precision", [(0, "fp32"), (1, "bf16+fp32"), (2, "bf16")])
def test_clipping(stage: int, precision: str) -> None:
    for norms, counts in pool(2).run(clipped, stage, precision, 0.5):
        assert norms == pytest.approx([0.5, 0.5], rel=0.01) and set(counts) == {2.0}


def overflowing(stage: int) -> Any:
    """Steps 2 and 3 overflow. Returns states and weights before and after these, loss scales, step counts."""
    engine = engine_of(
        Known(), config(stage, precision="fp16", fp16={"enabled": True, "initial_scale_power": 4})
    )
    trace = []
    for step in range(1, 5):
        factor = float("inf") if step in (2, 3) else 1e-3
        engine.backward(engine(step) * factor)
        engine.step()
        trace.append((engines.parts(engine), engine.optimizer.loss_scale))
    return trace


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_overflow_of_fp16_leaves_states_untouched(stage: int) -> None:
    shapes = {n: s for n, s in SHAPES.items()}
    ranks = pool(2).run(overflowing, stage)
    after = [engines.whole([rank[step][0] for rank in ranks], shapes) for step in range(4)]
    models.same(after[1], after[0])
    models.same(after[2], after[0])
    assert {float(after[step]["state/odd/step"]) for step in (0, 1, 2)} == {1.0}
    assert float(after[3]["state/odd/step"]) == 2.0
    assert not np.array_equal(after[3]["model/odd"], after[2]["model/odd"])
    scales = [scale for _, scale in ranks[0]]
    assert scales[2] < scales[0]


# ---- parameters ---------------------------------------------------------------------------------------


def by_dimensions(model: nn.Module) -> list[dict[str, Any]]:
    """Three groups: vectors without decay, "odd" in fp32 with its own rate, all else."""
    named = dict(model.named_parameters())
    vectors = [n for n, p in named.items() if p.ndim == 1]
    rest = [n for n in named if n not in (*vectors, "odd")]
    return [
        {"params": [named[n] for n in vectors], "weight_decay": 0.0},
        {"params": [named["odd"]], "quantize": False, "lr": 1e-3},
        {"params": [named[n] for n in rest]},
    ]


def grouped(stage: int, zero: dict[str, Any]) -> Any:
    model = Known()
    engine = engine_of(model, config(stage, zero=zero), model_parameters=by_dimensions(model))
    engines.train(engine, STEPS)
    return result(engine)


@pytest.mark.parametrize("world, stage, zero", [(2, 1, {}), (3, 2, {"round_robin_gradients": True})])
def test_parameter_groups(world: int, stage: int, zero: dict[str, Any]) -> None:
    model, optimizer, steps = reference(by_dimensions)
    for _ in steps():
        pass
    assert_equal(pool(world).run(grouped, stage, zero), model, optimizer)


def frozen_run(stage: int) -> Any:
    model = Known()
    model.odd.requires_grad_(False)
    model.few.requires_grad_(False)
    engine = engine_of(model, config(stage))
    engines.train(engine, STEPS)
    kept = all(torch.equal(getattr(model, n), models.start(n, SHAPES[n])) for n in ("odd", "few"))
    return result(engine), kept


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_frozen_parameters(stage: int) -> None:
    model, optimizer, steps = reference()
    model.odd.requires_grad_(False)
    model.few.requires_grad_(False)
    for _ in steps():
        model.odd.grad = model.few.grad = None
    ranks = pool(2).run(frozen_run, stage)
    assert all(kept for _, kept in ranks)
    shapes = {n: s for n, s in SHAPES.items() if n not in ("odd", "few")}
    expected = models.canonical(model, optimizer)
    expected = {k: v for k, v in expected.items() if k.split("/")[1] in shapes}
    engines.same(engines.whole([parts for parts, _ in ranks], shapes), expected, stage)


class Partly(Known):
    """ "tall" and "few" take no part in the loss."""

    def forward(self, step: int) -> Tensor:
        used = [(n, p) for n, p in self.named_parameters() if n not in ("tall", "few")]
        return torch.stack([(p * models.gradient(n, tuple(p.shape), step)).sum() for n, p in used]).sum()


def unused_run(stage: int) -> Any:
    engine = engine_of(Partly(), config(stage))
    for step in range(1, STEPS + 1):
        engine.backward(engine(step))
        engine.step()
    return result(engine)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_parameters_that_take_no_part(stage: int) -> None:
    """DeepSpeed gives them a gradient of zeros."""
    model, optimizer, steps = reference()
    for _ in steps():
        for param in (model.tall, model.few):
            param.grad = torch.zeros_like(param)
    assert_equal(pool(2).run(unused_run, stage), model, optimizer, stage)


class Tied(nn.Module):
    """An embedding whose weight is also the last layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Embedding(70, 64), nn.Linear(64, 70, bias=False)
        self.last.weight = self.first.weight
        with torch.no_grad():
            self.first.weight.copy_(models.start("tied", (70, 64)))

    def forward(self, step: int) -> Tensor:
        whole = models.gradient("tied", (70, 64), step) / 2
        return (self.first.weight * whole).sum() + (self.last.weight * whole).sum()


def tied_run(stage: int) -> Any:
    engine = engine_of(Tied(), config(stage))
    for step in range(1, STEPS + 1):
        engine.backward(engine(step))
        engine.step()
    assert engine.module.first.weight is engine.module.last.weight
    return result(engine)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_tied_weights(stage: int) -> None:
    model = Tied()
    optimizer = models.optimizer_of("rank1", model.parameters())
    for step in range(1, STEPS + 1):
        model.first.weight.grad = models.gradient("tied", (70, 64), step)
        optimizer.step()
    ranks = pool(2).run(tied_run, stage)
    assert [len(rank) for rank in ranks] == [1, 1]
    found = engines.whole(ranks, {"first.weight": (70, 64)})
    engines.same(found, models.canonical(model, optimizer), "tied")


def scheduled(stage: int, scheduler: dict[str, Any]) -> Any:
    engine = engine_of(Known(), config(stage, scheduler=scheduler))
    used: list[dict[str, Any]] = []

    def watch(optimizer: Any, *_: Any) -> None:
        used.append({key: optimizer.param_groups[0][key] for key in ("lr", "betas")})

    engine.basic_optimizer.register_step_pre_hook(watch)
    engines.train(engine, STEPS)
    return result(engine), used


@pytest.mark.parametrize(
    "stage, scheduler",
    [
        (2, {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 5}}),
        (0, {"type": "WarmupDecayLR", "params": {"total_num_steps": 9, "warmup_num_steps": 2}}),
        (1, {"type": "OneCycle", "params": {"cycle_min_lr": 0.001, "cycle_max_lr": 0.01}}),
    ],
)
def test_schedulers(stage: int, scheduler: dict[str, Any]) -> None:
    results = pool(2).run(scheduled, stage, scheduler)
    used = results[0][1]
    assert len({options["lr"] for options in used}) > 1
    model, optimizer, steps = reference()
    for step in steps():
        optimizer.param_groups[0].update(used[step - 1])
    assert_equal([parts for parts, _ in results], model, optimizer, scheduler)


def learning(stage: int, precision: str) -> list[float]:
    """Losses of real training with other data on every rank."""
    model: Any = models.Toy()
    engine = engine_of(model, config(stage, precision=precision, gradient_clipping=1.0))
    losses = []
    for step in range(30):
        x, y = models.batch(step, dist.get_rank())
        dtype = next(iter(engine.module.parameters())).dtype
        loss = (engine(x.to(dtype)).float() - y).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("stage, precision", [(2, "bf16"), (1, "bf16+fp32")])
def test_it_learns(stage: int, precision: str) -> None:
    for losses in pool(2).run(learning, stage, precision):
        assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5]), losses
