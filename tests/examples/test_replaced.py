"""Parameters that a framework shards after the optimizer was built, as accelerate does with FSDP2: it reads
and loads the state_dict, shards the model, and puts the new parameters into the groups."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import fully_shard

import shard4bit
from tests.pool import pool


def model_of() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(96, 128), torch.nn.LayerNorm(128), torch.nn.Linear(128, 96))


def groups_of(model: torch.nn.Module) -> list[dict[str, object]]:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(2):
        torch.manual_seed(step)
        model(torch.randn(8, 96)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def replaced(step_first: bool) -> tuple[str, int, list[str]]:
    """The digest, the number of states, and the digest of an optimizer built after the sharding."""
    model = model_of()
    optimizer = shard4bit.AdamW4bit(groups_of(model), lr=0.01)
    if step_first:
        train(model, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    fully_shard(model)
    for group, new in zip(optimizer.param_groups, groups_of(model), strict=True):
        group["params"] = new["params"]
    train(model, optimizer)
    other = fully_shard(model_of())
    late = shard4bit.AdamW4bit(groups_of(other), lr=0.01)
    train(other, late)
    states = len(optimizer.state_dict()["state"])
    return shard4bit.digest(model, optimizer), states, [shard4bit.digest(other, late)]


def test_what_was_read_before_the_sharding_is_forgotten() -> None:
    for digest, states, others in pool(2).run(replaced, False):
        assert states == 6 and others == [digest]


def test_states_are_not_lost_in_silence() -> None:
    for outcome in pool(2).outcomes(replaced, True):
        assert outcome[0] == "error" and isinstance(outcome[1], ValueError)
        with pytest.raises(ValueError, match="shard before steps and loads"):
            raise outcome[1]
