"""The experiments: arms, seeds, what is measured, and the difference that counts as none (stated first)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks.accuracy.arms import ABLATION, BASELINE, MAIN
from benchmarks.accuracy.candidates import CANDIDATES
from benchmarks.accuracy.models import Shape
from benchmarks.accuracy.tasks import Images, Language, Sentences, Translation
from benchmarks.accuracy.tokens import fingerprint
from benchmarks.accuracy.train import Recipe, Task


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A column of the results. delta: arms whose means differ by less count as equivalent."""

    column: str
    unit: str
    delta: float
    digits: int = 4


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One of the issue's experiments.

    make: (shape, data or toy, recipe, device, options) -> task. toy_*: the same in seconds on a CPU.
    seconds: estimate for one run on an H100, for the plan. compiled: whether torch.compile pays on a GPU.
    """

    title: str
    arms: tuple[str, ...]
    seeds: int
    metrics: tuple[Metric, ...]
    shape: Shape
    recipe: Recipe
    toy_shape: Shape
    toy_recipe: Recipe
    make: Callable[..., Task]
    data: str
    compiled: bool
    seconds: float

    def task(
        self, device: torch.device, *, toy: bool, compiled: bool | None = None, lr: float | None = None
    ) -> Task:
        """The task at full or toy size; lr overrides the recipe's."""
        shape, recipe = (self.toy_shape, self.toy_recipe) if toy else (self.shape, self.recipe)
        recipe = replace(recipe, lr=lr or recipe.lr)
        wanted = self.compiled and device.type == "cuda" if compiled is None else compiled
        return self.make(shape, None if toy else self.data, recipe, device, compiled=wanted)

    def settings(self, *, toy: bool) -> str:
        """A fingerprint of sizes and recipe (but the learning rate, a column of its own)."""
        shape, recipe = (self.toy_shape, self.toy_recipe) if toy else (self.shape, self.recipe)
        parts: dict[str, Any] = {**asdict(shape), **asdict(recipe), "data": "toy" if toy else self.data}
        parts.pop("lr")
        return fingerprint(_text(repr(sorted(parts.items()))))[:8]


def _text(value: str) -> Any:
    import numpy as np

    return np.frombuffer(value.encode(), np.uint8)


def _made_up(kind: Callable[..., Task]) -> Callable[..., Task]:
    """A maker that turns "no data" into ``toy``."""

    def make(shape: Shape, data: str | None, *rest: Any, **options: Any) -> Task:
        return kind(shape, *rest, toy=data is None, **options)

    return make


NATS = Metric(column="val_loss", unit="nats/token", delta=0.01)
POINTS = Metric(column="accuracy", unit="% right", delta=1.0, digits=2)
TOY = Shape(layers=2, width=64, heads=4, context=32, vocabulary=256)
TOY_RECIPE = Recipe(steps=40, batch=16, lr=3e-3, warmup=5)

EXPERIMENTS: dict[str, Experiment] = {
    "ablation": Experiment(
        title="1. Ablation of the second moment (paper's Table 1, in kind)",
        arms=ABLATION,
        seeds=5,
        metrics=(NATS,),
        shape=Shape(layers=6, width=256, heads=8, context=256, vocabulary=16384),
        recipe=Recipe(steps=800, batch=64, lr=1e-3, warmup=50, clip=0.0),
        toy_shape=TOY,
        toy_recipe=replace(TOY_RECIPE, clip=0.0),
        make=Language,
        data="lm16k",
        compiled=True,
        seconds=14,
    ),
    "scratch": Experiment(
        title="2. From scratch, 125 M parameters",
        arms=MAIN,
        seeds=7,
        metrics=(NATS,),
        shape=Shape(layers=14, width=768, heads=12, context=512, vocabulary=16384, tied=False),
        recipe=Recipe(steps=1280, batch=64, lr=1e-3, warmup=100),
        toy_shape=replace(TOY, tied=False),
        toy_recipe=TOY_RECIPE,
        make=Language,
        data="lm16k",
        compiled=True,
        seconds=100,
    ),
    "finetune": Experiment(
        title="3. Fine-tuning MiniLM on the VADER sets",
        arms=(*MAIN, "factored", "block"),
        seeds=10,
        metrics=(POINTS, replace(NATS, unit="nats")),
        shape=Shape(layers=6, width=384, heads=12, context=512, vocabulary=30522, dropout=0.1),
        recipe=Recipe(
            steps=729, batch=64, lr=1e-4, warmup=73, betas=(0.9, 0.999), weight_decay=0.01, floor=0.0
        ),
        toy_shape=replace(TOY, dropout=0.1),
        toy_recipe=replace(TOY_RECIPE, betas=(0.9, 0.999), weight_decay=0.01),
        make=_made_up(Sentences),
        data="vader",
        compiled=False,
        seconds=18,
    ),
    "translate": Experiment(
        title="4. Translation from scratch, En-De",
        arms=MAIN,
        seeds=3,
        metrics=(replace(NATS, delta=0.02), Metric(column="bleu", unit="BLEU", delta=0.5, digits=2)),
        shape=Shape(layers=6, width=512, heads=8, context=64, vocabulary=16384, dropout=0.2),
        recipe=Recipe(steps=2000, batch=256, lr=1e-3, warmup=300, betas=(0.9, 0.98)),
        toy_shape=replace(TOY, context=8, vocabulary=64),
        toy_recipe=replace(TOY_RECIPE, betas=(0.9, 0.98)),
        make=_made_up(Translation),
        data="bible",
        compiled=True,
        seconds=80,
    ),
    "vision": Experiment(
        title="5. A small ViT on the animal shapes",
        arms=(*MAIN, "factored", "block"),
        seeds=5,
        metrics=(POINTS, replace(NATS, unit="nats")),
        shape=Shape(layers=6, width=192, heads=6, context=49, dropout=0.1),
        recipe=Recipe(steps=1550, batch=128, lr=1e-3, warmup=150, betas=(0.9, 0.999), weight_decay=0.05),
        toy_shape=replace(TOY, context=49),
        toy_recipe=replace(TOY_RECIPE, betas=(0.9, 0.999)),
        make=_made_up(Images),
        data="shapes",
        compiled=False,
        seconds=22,
    ),
    "gap": Experiment(
        title="7. The gap: 25.5 M byte model",
        arms=MAIN,
        seeds=16,
        metrics=(replace(NATS, unit="nats/byte", delta=0.005),),
        shape=Shape(layers=8, width=512, heads=8, context=512, vocabulary=256, tied=False, embedding=1.0),
        recipe=Recipe(steps=1200, batch=32, lr=1e-3, warmup=100),
        toy_shape=replace(TOY, tied=False),
        toy_recipe=TOY_RECIPE,
        make=Language,
        data="prose",
        compiled=True,
        seconds=20,
    ),
}
EXPERIMENTS["gap-tuned"] = replace(
    EXPERIMENTS["gap"],
    title="7. The gap at 32-bit AdamW's best learning rate",
    recipe=replace(EXPERIMENTS["gap"].recipe, lr=2e-3, warmup=300),
)
EXPERIMENTS["candidates"] = replace(
    EXPERIMENTS["gap"], title="7. The gap: candidates to close it", arms=(BASELINE, *CANDIDATES), seeds=6
)
