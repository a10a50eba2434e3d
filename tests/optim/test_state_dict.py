"""Saving and going on: the same bits as a run that was never interrupted."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.optim import Optimizer, lr_scheduler

from shard4bit import AdamW4bit, SGD4bit
from shard4bit.spec import ADAMW_8BIT
from tests.covering import covering
from tests.optim.helpers import assert_same, copied, fill_grads, model_of, normal, options, run, snapshot

Make = Callable[..., Optimizer]
KINDS: dict[str, Make] = {
    "rank1": AdamW4bit,
    "block": partial(AdamW4bit, second_moment="block"),
    "stochastic": partial(AdamW4bit, compensate=True, rounding="stochastic"),
    "factored": partial(AdamW4bit, second_moment="factored", first_moment="Tensor/DE"),
    "8 bits": partial(AdamW4bit, **ADAMW_8BIT),
    "not quantized": partial(AdamW4bit, quantize=False),
    "sgd": partial(SGD4bit, momentum=0.8, dampening=0.2),
    "plain sgd": partial(SGD4bit, momentum=0),
}


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def twin(model: nn.Module) -> Any:
    """A fresh model of the same shapes, dtype and parameters."""
    out = model_of(99, next(model.parameters()).dtype)
    out.load_state_dict(model.state_dict())
    return out


def go_on(pairs: list[tuple[nn.Module, Optimizer]], steps: range = range(10, 13)) -> None:
    """Step every model alike and compare everything with the first."""
    for model, optimizer in pairs:
        run(model.parameters(), optimizer, steps)
    expected = snapshot(pairs[0][0].parameters(), pairs[0][1])
    for model, optimizer in pairs[1:]:
        assert_same(snapshot(model.parameters(), optimizer), expected)


# ---- torch.save, torch.load -------------------------------------------------------------------------


@pytest.mark.parametrize("kind, dtype", covering(KINDS, [torch.float32, torch.bfloat16]), ids=str)
def test_round_trip(kind: str, dtype: torch.dtype) -> None:
    """Into a fresh optimizer and into a used one; torch's own load would cast scales to bfloat16."""
    model = model_of(0, dtype)
    optimizer = KINDS[kind](model.parameters())
    run(model.parameters(), optimizer, range(3))
    saved = through_file(optimizer.state_dict())
    before = snapshot(model.parameters(), optimizer)
    pairs: list[tuple[nn.Module, Optimizer]] = [(model, optimizer)]
    for used in (0, 2):
        other = model_of(5, dtype)
        target = KINDS[kind](other.parameters(), lr=0.7)
        run(other.parameters(), target, range(used))
        other.load_state_dict(model.state_dict())
        target.load_state_dict(saved)
        assert_same(snapshot(other.parameters(), target), before)
        pairs.append((other, target))
    for key, value in before.items():
        if key.startswith("state"):
            assert value.dtype == (torch.uint8 if key.endswith("codes") else torch.float32), key
    go_on(pairs)


def test_what_a_state_holds() -> None:
    """Keys, dtypes and shapes written out for a 70 -> 90 layer: half a byte an element and moment."""
    model = model_of()
    optimizer = AdamW4bit(model.parameters())
    saved = optimizer.state_dict()["state"]
    assert {k: (v.dtype, tuple(v.shape)) for k, v in saved[0].items()} == {
        "step": (torch.float32, ()),
        "exp_avg_codes": (torch.uint8, (90, 35)),
        "exp_avg_absmax": (torch.float32, (90, 1)),
        "exp_avg_sq_codes": (torch.uint8, (90, 35)),
        "exp_avg_sq_row_max": (torch.float32, (90,)),
        "exp_avg_sq_col_max": (torch.float32, (70,)),
    }
    assert {k: (v.dtype, tuple(v.shape)) for k, v in saved[1].items()} == {
        "step": (torch.float32, ()),
        "exp_avg": (torch.float32, (90,)),
        "exp_avg_sq": (torch.float32, (90,)),
    }
    size = sum(v.numel() * v.element_size() for v in saved[0].values())
    assert size == 6300 + 4 * (1 + 90 + 90 + 70)


def test_loading_is_in_place_and_copies() -> None:
    model = model_of()
    optimizer = AdamW4bit(model.parameters())
    run(model.parameters(), optimizer, range(2))
    saved = optimizer.state_dict()
    other = twin(model)
    target = AdamW4bit(other.parameters())
    run(other.parameters(), target, range(1))
    tensors = [t for p in other.parameters() for t in target.state[p].values()]
    places = [(id(t), t.data_ptr()) for t in tensors]
    target.load_state_dict(saved)
    again = [t for p in other.parameters() for t in target.state[p].values()]
    assert [(id(t), t.data_ptr()) for t in again] == places
    theirs = {t.data_ptr() for entry in saved["state"].values() for t in entry.values()}
    assert not theirs & {t.data_ptr() for t in again}
    kept = snapshot(model.parameters(), optimizer)
    run(other.parameters(), target, range(5, 7))
    assert_same(snapshot(model.parameters(), optimizer), kept)
    optimizer.load_state_dict(optimizer.state_dict())
    assert_same(snapshot(model.parameters(), optimizer), kept)


def test_options_are_loaded_and_parameters_stay() -> None:
    a, b, c, d = copied([nn.Parameter(normal((70, 80), 1).clone())] * 4)
    first = AdamW4bit(
        [
            {"params": [a], "lr": torch.tensor(0.25), "betas": (0.5, 0.75)},
            {"params": [c], "weight_decay": 0.125, "eps": 1e-3, "maximize": True, "note": "mine"},
        ]
    )
    second = AdamW4bit([{"params": [b], "lr": 0.5}, {"params": [d]}])
    second.load_state_dict(through_file(first.state_dict()))
    assert [options(g) for g in second.param_groups] == [options(g) for g in first.param_groups]
    assert second.param_groups[1]["note"] == "mine"
    assert second.param_groups[0]["params"] == [b] and second.param_groups[1]["params"] == [d]
    assert isinstance(second.param_groups[0]["lr"], torch.Tensor)
    first.param_groups[0]["lr"].fill_(9.0)
    assert float(second.param_groups[0]["lr"]) == 0.25  # not shared


def test_resuming_with_a_scheduler() -> None:
    def parts(model: nn.Module) -> tuple[Optimizer, Any]:
        optimizer = AdamW4bit(model.parameters(), lr=0.01)
        return optimizer, lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=12)

    whole, half = model_of(), model_of()
    optimizer, schedule = parts(whole)
    for seed in range(10):
        run(whole.parameters(), optimizer, [seed])
        schedule.step()
    first, schedule = parts(half)
    for seed in range(6):
        run(half.parameters(), first, [seed])
        schedule.step()
    saved = through_file([half.state_dict(), first.state_dict(), schedule.state_dict()])
    resumed = model_of(8)
    second, schedule = parts(resumed)
    for each, state in zip((resumed, second, schedule), saved, strict=True):
        each.load_state_dict(state)
    for seed in range(6, 10):
        run(resumed.parameters(), second, [seed])
        schedule.step()
    assert_same(snapshot(resumed.parameters(), second), snapshot(whole.parameters(), optimizer))


def test_a_state_saved_before_the_first_step() -> None:
    model, other = model_of(), model_of()
    optimizer, target = AdamW4bit(model.parameters()), AdamW4bit(other.parameters())
    run(other.parameters(), target, range(2))
    other.load_state_dict(model.state_dict())
    target.load_state_dict(through_file(optimizer.state_dict()))
    assert all(target.state[p]["step"] == 0 for p in other.parameters())
    go_on([(model, optimizer), (other, target)])


def test_frozen_after_training_keeps_its_state_over_a_round_trip() -> None:
    """Saved with a state, loaded while frozen, thawed: goes on where it stopped."""
    model = model_of()
    optimizer = AdamW4bit(model.parameters())
    run(model.parameters(), optimizer, range(2))
    model[0].weight.requires_grad_(False)
    saved = through_file(optimizer.state_dict())
    copies = [copy.deepcopy((model, optimizer))]
    other = twin(model)
    other[0].weight.requires_grad_(False)
    loaded = AdamW4bit(other.parameters())
    loaded.load_state_dict(saved)
    copies += [(other, loaded), copy.deepcopy((other, loaded))]
    copies[2][1].load_state_dict(saved)
    for each in (model, *(m for m, _ in copies)):
        each[0].weight.requires_grad_(True)
    go_on([(model, optimizer), *copies])


# ---- copies -----------------------------------------------------------------------------------------


def pickled(pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("kind, how", covering(KINDS, [copy.deepcopy, pickled]))
def test_copies_with_their_model(kind: str, how: Callable[[Any], Any], steps: int) -> None:
    """deepcopy and pickle of (model, optimizer): same future, separate memory."""
    model = model_of()
    optimizer = KINDS[kind](model.parameters())
    run(model.parameters(), optimizer, range(steps))
    other, target = how((model, optimizer))
    assert target.param_groups[0]["params"] == list(other.parameters())
    assert not set(optimizer.state) & set(target.state)
    go_on([(model, optimizer), (other, target)])
    kept = snapshot(model.parameters(), optimizer)
    run(other.parameters(), target, range(20, 22))
    assert_same(snapshot(model.parameters(), optimizer), kept)
    repr(target), target.zero_grad(), target.state_dict()


# ---- torch.distributed.checkpoint -------------------------------------------------------------------


@pytest.mark.parametrize("kind, flatten", covering(KINDS, [False, True]))
def test_dcp_optimizer_state_dict(kind: str, flatten: bool) -> None:
    """By parameter names, in one process; into a fresh optimizer and into a used one."""
    chosen = dcp.StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = model_of(0, torch.bfloat16)
    optimizer = KINDS[kind](model.parameters())
    run(model.parameters(), optimizer, range(3))
    optimizer.zero_grad()
    before = snapshot(model.parameters(), optimizer)
    saved: Any = dcp.get_optimizer_state_dict(model, optimizer, options=chosen)
    assert_same(snapshot(model.parameters(), optimizer), before)
    keys = saved if flatten else saved["state"]["0.weight"]
    prefix = "state.0.weight." if flatten else ""
    assert torch.equal(keys[f"{prefix}step"], torch.tensor(3.0))
    saved = through_file(saved)
    pairs: list[tuple[nn.Module, Optimizer]] = [(model, optimizer)]
    for used in (0, 2):
        other = model_of(5, torch.bfloat16)
        target = KINDS[kind](other.parameters(), lr=0.7)
        run(other.parameters(), target, range(used))
        target.zero_grad()
        other.load_state_dict(model.state_dict())
        dcp.set_optimizer_state_dict(other, target, saved, options=chosen)
        assert_same(snapshot(other.parameters(), target), before)
        pairs.append((other, target))
    go_on(pairs)


def test_dcp_with_groups_and_frozen_parameters() -> None:
    def build() -> tuple[Any, Optimizer]:
        model = model_of()
        model[0].bias.requires_grad_(False)
        groups = [
            {"params": model[0].parameters(), "lr": 0.1, "second_moment": "block"},
            {"params": list(model[1:].parameters()), "quantize": False},
        ]
        return model, AdamW4bit(groups)

    pairs = [build(), build()]
    model, optimizer = pairs[0]
    for seed in range(2):
        fill_grads(model.parameters(), seed)
        model[0].bias.grad = None
        optimizer.step()
    optimizer.zero_grad()
    saved = dcp.get_optimizer_state_dict(model, optimizer)
    assert "0.bias" not in saved["state"] and len(saved["state"]) == 7
    pairs[1][0].load_state_dict(model.state_dict())
    dcp.set_optimizer_state_dict(*pairs[1], through_file(saved))
    expected = snapshot(model.parameters(), optimizer)
    assert_same(snapshot(pairs[1][0].parameters(), pairs[1][1]), expected)
    assert pairs[1][1].param_groups[0]["lr"] == 0.1
