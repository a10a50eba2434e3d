"""Stock torch.distributed.checkpoint saves and reshards FSDP2 models with 4-bit states, bit for bit."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor, Replicate

import shard4bit
from tests.covering import covering
from tests.fsdp import models
from tests.fsdp.models import SHAPES, Arrays, Zoo, canonical, optimizer_of, same
from tests.fsdp.test_invariance_fsdp2 import close
from tests.pool import pool

STEPS = 3
Found = tuple[Arrays, str]


@cache
def single(kind: str, steps: int) -> Found:
    model = Zoo()
    optimizer = optimizer_of(kind, model.parameters())
    models.train(model, optimizer, steps)
    return canonical(model, optimizer), shard4bit.digest(model, optimizer)


def trained(kind: str, layout: str) -> tuple[Any, Any]:
    model = models.sharded(Zoo(), layout)
    optimizer = optimizer_of(kind, model.parameters())
    models.train(model, optimizer, STEPS)
    return model, optimizer


def other(kind: str, layout: str) -> tuple[Any, Any]:
    """A model of other values with an optimizer of other options."""
    model = Zoo()
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(7.0)
    model = models.sharded(model, layout)
    return model, optimizer_of(kind, model.parameters(), lr=0.5, weight_decay=0.0)


def states_of(model: Any, optimizer: Any) -> dict[str, Any]:
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def found(model: Any, optimizer: Any) -> Found:
    return canonical(model, optimizer), shard4bit.digest(model, optimizer)


def save(kind: str, layout: str, path: str, asynchronous: bool) -> Found:
    model, optimizer = trained(kind, layout)
    states = states_of(model, optimizer)
    if asynchronous:
        before = found(model, optimizer)
        # in a group of its own: its thread and the steps would mix their collectives up in one
        saving: Any = dcp.async_save(states, checkpoint_id=path, process_group=dist.new_group(backend="gloo"))
        models.train(model, optimizer, 2, first=STEPS + 1)  # what is written was copied before
        saving.result()
        assert found(model, optimizer)[1] != before[1]
        return before
    dcp.save(states, checkpoint_id=path)
    return found(model, optimizer)


def load(kind: str, layout: str, path: str) -> tuple[Found, Arrays, float]:
    """What was loaded, all after one more step, and the learning rate."""
    model, optimizer = other(kind, layout)
    states = states_of(model, optimizer)
    dcp.load(states, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    loaded = found(model, optimizer)
    models.train(model, optimizer, 1, first=STEPS + 1)
    return loaded, canonical(model, optimizer), float(optimizer.param_groups[0]["lr"])


CASES = [
    (4, "fsdp", 2, "fsdp", False),
    (2, "fsdp", 4, "fsdp", False),
    (4, "fsdp", 3, "fsdp", True),
    (4, "hsdp", 3, "fsdp", False),
    (2, "experts", 4, "hsdp", False),
]


@pytest.mark.parametrize("kind, case", covering(["rank1", "block", "factored", "sgd"], CASES), ids=str)
def test_resharding(kind: str, case: Any, tmp_path: Path) -> None:
    before, layout, after, new_layout, asynchronous = case
    path = str(tmp_path / "dcp")
    saved = pool(before).run(save, kind, layout, path, asynchronous)
    expected, digest = saved[0]
    if kind != "factored":
        same(expected, single(kind, STEPS)[0])
        assert digest == single(kind, STEPS)[1]
    for (arrays, again), further, lr in pool(after).run(load, kind, new_layout, path):
        same(arrays, expected, (kind, before, after))
        assert again == digest
        (close if kind == "factored" else same)(further, single(kind, STEPS + 1)[0], (kind, before, after))
        assert lr == (0.1 if kind == "sgd" else 3e-3)


def through_dicts(kind: str, options: dict[str, Any]) -> tuple[Found, Found, list[str], Any]:
    """From a trained optimizer to another through get_/set_optimizer_state_dict; the types and the whole
    tensors of what was between."""
    model, optimizer = trained(kind, "fsdp")
    how = StateDictOptions(**options)
    state = get_optimizer_state_dict(model, optimizer, options=how)
    kinds = sorted({type(v).__name__ for v in _tensors(state)})
    whole = {k: v.numpy().copy() for k, v in _named(state).items() if not isinstance(v, DTensor)}
    target, fresh = other(kind, "fsdp")
    with torch.no_grad():
        for ours, theirs in zip(target.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs)
    if options.get("full_state_dict"):
        how = StateDictOptions(**options, broadcast_from_rank0=True)
        if dist.get_rank() != 0:
            state = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_optimizer_state_dict(target, fresh, state, options=how)
    assert all(v.device.type == "cpu" for v in _tensors(state))
    return found(model, optimizer), found(target, fresh), kinds, whole


def _tensors(state: Any) -> list[torch.Tensor]:
    return list(_named(state).values())


def _named(state: Any) -> dict[str, torch.Tensor]:
    """name/key -> tensor, of nested and flattened optimizer states."""
    nested = {f"{n}/{k}": v for n, part in state.get("state", {}).items() for k, v in part.items()}
    flat = {k.removeprefix("state."): v for k, v in state.items() if k.startswith("state.")}
    return nested | {k.replace(".", "/", 1): v for k, v in flat.items()}


#: (torch's own setter cannot take a state that is both full and flattened)
OPTIONS: list[dict[str, bool]] = [
    {},
    {"cpu_offload": True},
    {"flatten_optimizer_state_dict": True},
    {"full_state_dict": True},
    {"full_state_dict": True, "cpu_offload": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("kind", ["rank1", "block", "factored", "sgd"])
def test_state_dict_options(kind: str, options: dict[str, bool]) -> None:
    for rank, (before, after, kinds, whole) in enumerate(pool(2).run(through_dicts, kind, options)):
        same(after[0], before[0], (kind, options))
        assert after[1] == before[1]
        if kind != "factored":
            assert before[1] == single(kind, STEPS)[1]
        if not options.get("full_state_dict"):
            assert kinds == ["DTensor", "Tensor"]  # the step counts are plain
        elif rank == 0 or not options.get("cpu_offload"):
            assert kinds == ["Tensor"]
            same({f"state/{k}": v for k, v in whole.items()}, _states(before[0]))


def _states(arrays: Arrays) -> Arrays:
    return {k: v for k, v in arrays.items() if k.startswith("state/")}


def full_on_every_rank(kind: str) -> tuple[Found, Found]:
    """A full state dict that every rank has (from torch.save, say), without broadcasting."""
    model, optimizer = trained(kind, "fsdp")
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    target, fresh = other(kind, "fsdp")
    with torch.no_grad():
        for ours, theirs in zip(target.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs)
    set_optimizer_state_dict(target, fresh, state, options=StateDictOptions(full_state_dict=True))
    return found(model, optimizer), found(target, fresh)


def test_full_state_dict_on_every_rank() -> None:
    for before, after in pool(3).run(full_on_every_rank, "rank1"):
        same(after[0], before[0])
        assert after[1] == before[1] == single("rank1", STEPS)[1]


def placed_otherwise(kind: str) -> tuple[Found, Found, Found, int]:
    """load_state_dict of states that are replicated, and of sharded states by a model that is not."""
    model, optimizer = trained(kind, "fsdp")
    state = optimizer.state_dict()
    changed = 0
    for part in state["state"].values():
        for key, value in part.items():
            if isinstance(value, DTensor) and value.placements != (Replicate(),):
                part[key], changed = value.redistribute(placements=[Replicate()]), changed + 1
    results = []
    for layout, given in (("fsdp", state), ("plain", trained(kind, "fsdp")[1].state_dict())):
        target, fresh = other(kind, layout)
        fresh.load_state_dict(given)
        with torch.no_grad():
            for ours, theirs in zip(target.parameters(), model.parameters(), strict=True):
                ours.copy_(theirs if layout == "fsdp" else theirs.full_tensor())
        results.append(found(target, fresh))
    return found(model, optimizer), results[0], results[1], changed


@pytest.mark.parametrize("kind", ["rank1", "block"])
def test_states_that_are_placed_otherwise(kind: str) -> None:
    for before, replicated, plain, changed in pool(3).run(placed_otherwise, kind):
        assert changed > len(SHAPES)
        for after in (replicated, plain):
            same(after[0], before[0])
            assert after[1] == before[1] == single(kind, STEPS)[1]


def frozen_and_partial(path: str) -> tuple[Found, Found]:
    """A frozen parameter has no state; one without any gradient yet has."""
    model, optimizer = models.sharded(Zoo(), "fsdp"), None
    model.odd.requires_grad_(False)
    optimizer = optimizer_of("rank1", model.parameters())
    models.force(model, 1)
    model.odd.grad = model.tall.grad = None
    optimizer.step()
    states = states_of(model, optimizer)
    dcp.save(states, checkpoint_id=path)
    target, _ = other("rank1", "fsdp")
    target.odd.requires_grad_(False)
    fresh = optimizer_of("rank1", target.parameters())
    states = states_of(target, fresh)
    dcp.load(states, checkpoint_id=path)
    set_state_dict(target, fresh, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    return found(model, optimizer), found(target, fresh)


def test_frozen_parameters_and_missing_gradients(tmp_path: Path) -> None:
    for before, after in pool(2).run(frozen_and_partial, str(tmp_path / "dcp")):
        same(after[0], before[0])
        assert after[1] == before[1]
        assert not any(k.startswith("state/odd/") for k in after[0])
        assert after[0]["state/tall/step"] == 0 and after[0]["state/wide/step"] == 1
