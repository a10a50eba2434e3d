"""Frozen parameters under fsdp.wrap: in the groups, without a state, and trained once they are unfrozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import shard4bit
from shard4bit.errors import CheckpointError
from tests.fsdp import models
from tests.fsdp.flat import Nest, flattened, wrapped
from tests.fsdp.models import Zoo
from tests.pool import pool

X = torch.ones(2, 2)
NO_DECAY = ["second.*"]  # frozen at first


def made(layout: str) -> tuple[Any, Any]:
    """A model with a frozen block, and its optimizer."""
    model: Any = Nest()
    model.second.requires_grad_(False)
    if layout == "single":
        named = list(model.named_parameters())
        groups = [
            {"params": [p for n, p in named if not n.startswith("second.")]},
            {"params": list(model.second.parameters()), "weight_decay": 0.0},
        ]
        return model, models.optimizer_of("rank1", groups)
    if layout == "fsdp2":
        for part in (model.first, model.second, model):
            fully_shard(part)
    else:
        model = flattened(model, layout == "fsdp1 originals")
    return model, wrapped("rank1", model, no_decay=NO_DECAY)


def steps(model: Any, optimizer: Any, count: int) -> None:
    for _ in range(count):
        model(X).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def unfrozen(layout: str, root: str) -> tuple[list[str], str, str]:
    """Digests while a block is frozen and after it was not, both of a run and of one that resumed; what a
    load into a model that is frozen still says; what the optimizer prints at first."""
    model, optimizer = made(layout)
    shown = repr(optimizer)
    steps(model, optimizer, 2)
    early = shard4bit.save(root, model, optimizer, step=2)
    digests = [shard4bit.digest(model, optimizer)]
    model.second.requires_grad_(True)
    steps(model, optimizer, 2)
    late = shard4bit.save(root, model, optimizer, step=4)
    digests.append(shard4bit.digest(model, optimizer))
    other, resumed = made(layout)
    with pytest.raises(CheckpointError) as caught:
        shard4bit.load(late, other, resumed)
    shard4bit.load(early, other, resumed)
    digests.append(shard4bit.digest(other, resumed))
    other.second.requires_grad_(True)
    steps(other, resumed, 2)
    digests.append(shard4bit.digest(other, resumed))
    shard4bit.load(late, other, resumed)
    digests.append(shard4bit.digest(other, resumed))
    return digests, str(caught.value), shown


@pytest.mark.parametrize("layout", ["fsdp2", "fsdp1 originals", "fsdp1 flat"])
def test_unfreezing(layout: str, tmp_path: Path) -> None:
    early, late = unfrozen("single", str(tmp_path / "single"))[0][:2]
    assert early != late
    for digests, text, shown in pool(2).run(unfrozen, layout, str(tmp_path / "ranks")):
        assert digests == [early, late, early, late, late]
        assert "state/second." in text
        assert "frozen, without a state" in shown


def with_packed_weights() -> list[str]:
    """Parameters that can never be trained have no place in the groups."""
    model = Zoo({"w": (70, 90)})
    model.register_parameter("packed", nn.Parameter(torch.zeros(90, 4, dtype=torch.uint8), False))
    fully_shard(model)
    optimizer = shard4bit.fsdp.wrap(model, shard4bit.AdamW4bit)
    return list(optimizer.param_groups[0]["param_names"])


def test_packed_weights_are_left_out() -> None:
    assert pool(2).run(with_packed_weights) == [["w"], ["w"]]


def imported(named: bool) -> tuple[bool, float]:
    """From torch's AdamW over the trainable parameters alone, as it is made for fine-tuning."""
    model, _ = made("fsdp2")
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    source: Any = torch.optim.AdamW(trainable, lr=0.25)
    steps(model, source, 1)
    ours = shard4bit.fsdp.wrap(model, shard4bit.AdamW4bit)
    shard4bit.import_state(ours, source.state_dict() if named else source)
    return all((p in ours.state) == p.requires_grad for p in model.parameters()), ours.param_groups[0]["lr"]


@pytest.mark.parametrize("named", [True, False])
def test_importing_from_an_optimizer_of_the_trainable_ones(named: bool) -> None:
    assert pool(2).run(imported, named) == [(True, 0.25)] * 2
