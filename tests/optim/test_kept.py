"""What a step keeps for the next one must not show: no memory held, no change overlooked."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from shard4bit import AdamW4bit, SGD4bit, StateError
from tests.optim.helpers import assert_same, copied, fill_grads, model_of, normal, run, snapshot


@pytest.mark.parametrize("cls", [AdamW4bit, SGD4bit])
@pytest.mark.parametrize("strided", [False, True])
def test_gradients_are_free_after_zero_grad(cls: Any, strided: bool) -> None:
    """As with torch's optimizers; held ones would double the memory of the next backward pass."""
    model = model_of()
    optimizer = cls(model.parameters())
    for seed in range(2):
        fill_grads(model.parameters(), seed)
        if strided:
            model[0].weight.grad = model[0].weight.grad.t().contiguous().t()
        optimizer.step()
        grads = [weakref.ref(p.grad) for p in model.parameters()]
        optimizer.zero_grad()
        gc.collect()
        assert [g() for g in grads] == [None] * 8


def test_a_step_holds_no_copies() -> None:
    """Of strided parameters and gradients, which are made dense for the step only."""
    from tests.optim.test_values import Allocations

    base = nn.Parameter(normal((90, 140), 1).clone().t())
    optimizer = AdamW4bit([base])
    run([base], optimizer, [0])
    base.grad = normal((90, 140), 2).clone().t()
    assert not base.grad.is_contiguous() and not base.is_contiguous()
    with Allocations() as seen:
        optimizer.step()
    gc.collect()
    assert seen.peak >= 2 * 4 * 90 * 140  # both were copied
    assert seen.alive < 90 * 140


def test_changes_between_steps_are_seen() -> None:
    """New memory of a parameter, gradients in place, other options, other groups: as a new optimizer
    with the same state would see them."""
    kept, fresh = model_of(), model_of()
    optimizer = AdamW4bit(kept.parameters())
    other = AdamW4bit(fresh.parameters())
    params = list(kept.parameters())

    def both(change: Any) -> None:
        nonlocal other
        again = AdamW4bit(fresh.parameters())
        again.load_state_dict(other.state_dict())
        other = again
        for mine, step in ((kept, optimizer), (fresh, other)):
            change(list(mine.parameters()), step)
            step.step()
        assert_same(snapshot(params, optimizer), snapshot(fresh.parameters(), other))

    def renew(ps: list[Any], strided: bool) -> None:
        for p in ps:
            p.data = p.data.t().contiguous().t() if strided and p.ndim == 2 else p.data.clone()

    def drop(ps: list[Any], o: Any) -> None:
        ps[2].grad = None
        ps[0].grad.fill_(2.0)

    both(lambda ps, o: fill_grads(ps, 1))
    both(lambda ps, o: [p.grad.mul_(-3) for p in ps])  # the same gradient tensors
    both(lambda ps, o: renew(ps, False))
    both(lambda ps, o: o.param_groups[0].update(lr=0.5, weight_decay=0.3, betas=(0.5, 0.5)))
    both(lambda ps, o: o.param_groups[0].update(maximize=True))
    both(lambda ps, o: o.zero_grad(set_to_none=False))
    both(drop)
    both(lambda ps, o: o.zero_grad())
    both(lambda ps, o: renew(ps, True))
    both(lambda ps, o: fill_grads(ps, 4))


def test_groups_made_anew() -> None:
    """Other dictionaries with the same parameters, and parameters moved between groups."""
    params, alone = (copied([nn.Parameter(normal((70, 80), i).clone()) for i in range(3)]) for _ in range(2))
    optimizer = SGD4bit([{"params": params[:2], "lr": 0.1}, {"params": params[2:], "lr": 0.2}])
    single = [SGD4bit([p]) for p in alone]

    def step(seed: int, *rates: float) -> None:
        fill_grads(params, seed)
        fill_grads(alone, seed)
        optimizer.step()
        for each, rate in zip(single, rates, strict=True):
            each.param_groups[0]["lr"] = rate
            each.step()
        assert [p.tolist() for p in params] == [p.tolist() for p in alone]

    step(0, 0.1, 0.1, 0.2)
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.3}
    step(1, 0.3, 0.3, 0.2)
    moved = optimizer.param_groups[0]["params"].pop()
    optimizer.param_groups[1]["params"].insert(0, moved)
    step(2, 0.3, 0.2, 0.2)
    optimizer.param_groups.reverse()
    step(3, 0.3, 0.2, 0.2)


def test_freezing_in_many_ways_keeps_nothing() -> None:
    """Each set of trained parameters may have its own preparations; they must not pile up."""
    model = model_of()
    optimizer = AdamW4bit(model.parameters())
    params = list(model.parameters())
    for pattern in range(64):
        for i, param in enumerate(params[:6]):
            param.requires_grad_(bool(pattern >> i & 1))
        run(params, optimizer, [pattern])
    gc.collect()
    plans = [
        o for o in gc.get_objects() if type(o).__name__ == "StepPlan" and o.steps is optimizer._counts.vector
    ]
    assert len(plans) <= 16


def test_a_moved_parameter_is_refused_again_and_again() -> None:
    """Not only the first time."""
    param = nn.Parameter(normal((70, 80), 1).clone())
    optimizer = AdamW4bit([param])
    run([param], optimizer, [0])
    tensors = optimizer.bind()[0].moments[1].tensors
    tensors.update({key: value.to("meta") for key, value in tensors.items()})
    param.data = param.data.clone()
    before = param.detach().clone()
    for seed in (1, 2):
        with pytest.raises(StateError, match="is on cpu, its state on meta: move the model"):
            run([param], optimizer, [seed])
        assert torch.equal(param, before)
