"""What the checkpoint tests run on every rank of a pool (or in this process alone)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import shard4bit
from tests.fsdp import models
from tests.fsdp.models import SHAPES, Arrays, Toy, Zoo, canonical, optimizer_of

STEPS = 3
Found = tuple[Arrays, str]


def found(model: Any, optimizer: Any = None) -> Found:
    return canonical(model, optimizer), shard4bit.digest(model, optimizer)


def blank(layout: str, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Any:
    """A Zoo of sevens."""
    model = Zoo(shapes)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(7.0)
    return models.sharded(model, layout)


def toy(layout: str, seed: int = 0) -> Any:
    return Toy(seed) if layout == "plain" else models.shard_toy(Toy(seed))


def save_zoo(kind: str, layout: str, root: str) -> Found:
    model = models.sharded(Zoo(), layout)
    optimizer = optimizer_of(kind, model.parameters())
    models.train(model, optimizer, STEPS)
    path = shard4bit.save(root, model, optimizer, step=STEPS, extra={"layout": layout, "list": [1, None]})
    assert path == Path(root) / f"step-{STEPS:010d}"
    return found(model, optimizer)


def load_zoo(kind: str, layout: str, path: str) -> tuple[Found, Any, Arrays]:
    """All after loading, what ``load`` returned, all after one more step."""
    model = blank(layout)
    optimizer = optimizer_of(kind, model.parameters(), lr=0.5, weight_decay=0.0)
    loaded = shard4bit.load(path, model, optimizer)
    state = found(model, optimizer)
    models.train(model, optimizer, 1, first=STEPS + 1)
    return state, loaded, canonical(model, optimizer)


def single_zoo(kind: str, steps: int) -> Found:
    model = Zoo()
    optimizer = optimizer_of(kind, model.parameters())
    models.train(model, optimizer, steps)
    return found(model, optimizer)


def train_toy(layout: str, kind: str, steps: int, root: str | None, saved_at: int) -> tuple[Arrays, Any]:
    """An uninterrupted run with real gradients, with a save on the way; everything and the losses."""
    model = toy(layout)
    optimizer = optimizer_of(kind, model.parameters())
    losses = models.fit(model, optimizer, 0, saved_at)
    if root is not None:
        shard4bit.save(root, model, optimizer, step=saved_at)
    losses += models.fit(model, optimizer, saved_at, steps)
    return canonical(model, optimizer), losses


def resume_toy(layout: str, kind: str, steps: int, root: str) -> tuple[Arrays, Any]:
    """The rest of such a run, from a checkpoint, in a model that starts from other values."""
    model = toy(layout, seed=1)
    optimizer = optimizer_of(kind, model.parameters(), lr=0.7)
    start = shard4bit.load(root, model, optimizer).step
    losses = models.fit(model, optimizer, start, steps)
    return canonical(model, optimizer), losses
