"""Loading what does not fit: a StateError that says what arrived and what was expected, and no change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from shard4bit import AdamW4bit, SGD4bit, Shard4bitError, StateError
from shard4bit.spec import ADAMW_8BIT
from tests.optim.helpers import assert_same, model_of, run, snapshot


def state_of(make: Callable[..., torch.optim.Optimizer], model: Any = None, steps: int = 2) -> dict[str, Any]:
    model = model or model_of()
    optimizer = make(model.parameters())
    run(model.parameters(), optimizer, range(steps))
    return copy.deepcopy(optimizer.state_dict())


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[], Any]:
    """The state of the right optimizer after ``change``."""

    def build() -> Any:
        state = state_of(AdamW4bit)
        change(state)
        return state

    return build


def narrower() -> Any:
    torch.manual_seed(0)
    layers = nn.Linear(70, 40), nn.LayerNorm(40), nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 3)
    return nn.Sequential(*layers)


def taller() -> Any:
    torch.manual_seed(0)
    layers = nn.Linear(70, 96), nn.LayerNorm(96), nn.Linear(96, 50), nn.Tanh(), nn.Linear(50, 3)
    return nn.Sequential(*layers)


def two_groups(params: Any) -> AdamW4bit:
    first, *rest = params
    return AdamW4bit([{"params": [first]}, {"params": rest}])


def change_last(key: str, change: Callable[[torch.Tensor], Any]) -> Callable[[], Any]:
    """A change in a late parameter's state, when all before it fit."""

    def apply(state: dict[str, Any]) -> None:
        entry = state["state"][4 if key.endswith(("codes", "max")) else 7]
        entry[key] = change(entry[key])

    return edited(apply)


CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing": (lambda: None, "expected a state_dict, got NoneType"),
    "a list": (lambda: [1, 2], "expected a state_dict, got list"),
    "a string": (lambda: "state", "expected a state_dict, got str"),
    "empty": (dict, r"with 'state' and 'param_groups', got one with \[\]"),
    "no groups": (lambda: {"state": {}}, r"with 'state' and 'param_groups', got one with \['state'\]"),
    "a model's": (lambda: model_of().state_dict(), r"'param_groups', got one with \['0.bias', '0.weight'"),
    "odd groups": (lambda: {"state": {}, "param_groups": 3}, "with 'state' and 'param_groups'"),
    "groups without params": (lambda: {"state": {}, "param_groups": [{"lr": 1}]}, "'param_groups'"),
    "odd states": (lambda: {"state": 3, "param_groups": []}, "with 'state' and 'param_groups'"),
    "odd state": (edited(lambda s: s["state"].update({7: 3})), "with 'state' and 'param_groups'"),
    "torch AdamW": (
        lambda: state_of(torch.optim.AdamW),
        r"the state has quantize=None, this optimizer True; .*\(is this the state of another optimizer\?\)",
    ),
    "torch SGD": (lambda: state_of(torch.optim.SGD), "quantize=None, this optimizer True"),
    "sgd": (lambda: state_of(SGD4bit), "has first_moment=None, this optimizer 'B128/DE'"),
    "block": (
        lambda: state_of(lambda p: AdamW4bit(p, second_moment="block")),
        "group 0: the state has second_moment='B128/Linear', this optimizer 'Rank-1/Linear'; build it with",
    ),
    "factored": (
        lambda: state_of(lambda p: AdamW4bit(p, second_moment="factored")),
        "second_moment='factored', this optimizer 'Rank-1/Linear'",
    ),
    "8 bits": (
        lambda: state_of(lambda p: AdamW4bit(p, **ADAMW_8BIT)),
        "first_moment='B2048/DE/8', this optimizer 'B128/DE'",
    ),
    "full precision": (
        lambda: state_of(lambda p: AdamW4bit(p, quantize=False)),
        "quantize=False, this optimizer True",
    ),
    "narrower model": (
        lambda: state_of(AdamW4bit, narrower()),
        r"parameter 0: the saved state lacks .*'exp_avg_codes'.* and has \['exp_avg', 'exp_avg_sq'\]",
    ),
    "taller model": (
        lambda: state_of(AdamW4bit, taller()),
        r"parameter 0: exp_avg_codes is torch.uint8 \(96, 35\) in the saved state, expected "
        r"torch.uint8 \(90, 35\)",
    ),
    "two groups": (
        lambda: state_of(two_groups),
        r"the state has parameter groups of \[1, 7\] parameters, this optimizer of \[8\]: build it",
    ),
    "a smaller model": (
        lambda: state_of(AdamW4bit, model_of()[:2]),
        r"the state has parameter groups of \[4\] parameters, this optimizer of \[8\]",
    ),
    "a state missing": (
        edited(lambda s: s["state"].pop(7)),
        "parameter 7 has no state in the saved one, as if it had been frozen then",
    ),
    "a key missing": (edited(lambda s: s["state"][7].pop("step")), r"parameter 7: .* lacks \['step'\]"),
    "a key more": (
        edited(lambda s: s["state"][7].update(max_exp_avg_sq=torch.ones(3))),
        r"parameter 7: the saved state lacks nothing and has \['max_exp_avg_sq'\] more",
    ),
    "codes of another dtype": (
        change_last("exp_avg_codes", lambda t: t.int()),
        "parameter 4: exp_avg_codes is torch.int32 .* expected torch.uint8",
    ),
    "scales cast to bfloat16": (
        change_last("exp_avg_sq_row_max", lambda t: t.bfloat16()),
        r"exp_avg_sq_row_max is torch.bfloat16 \(50,\) in the saved state, expected torch.float32 \(50,\)",
    ),
    "another shape": (
        change_last("exp_avg", lambda t: t[:2]),
        r"parameter 7: exp_avg is torch.float32 \(2,\) in the saved state, expected torch.float32 \(3,\)",
    ),
    "no tensor": (change_last("exp_avg", lambda t: "x"), "parameter 7: exp_avg is a str in the saved state"),
    "None": (change_last("exp_avg", lambda t: None), "parameter 7: exp_avg is a NoneType in the saved"),
    "a dictionary": (change_last("exp_avg", lambda t: {}), "parameter 7: exp_avg is a dict in the saved"),
    "a number": (change_last("exp_avg", lambda t: 1.5), r"exp_avg is torch.float32 \(\) in the saved state"),
}


@pytest.mark.parametrize("kind", CASES)
def test_misfits_change_nothing(kind: str) -> None:
    build, message = CASES[kind]
    state = build()
    used, fresh, other = model_of(), model_of(), model_of()
    optimizers = [AdamW4bit(m.parameters(), lr=0.25) for m in (used, fresh, other)]
    run(used.parameters(), optimizers[0], range(1))
    before = snapshot(used.parameters(), optimizers[0])
    for optimizer in optimizers[:2]:
        with pytest.raises(StateError, match=message) as caught:
            optimizer.load_state_dict(state)
        assert isinstance(caught.value, Shard4bitError) and isinstance(caught.value, ValueError)
    assert_same(snapshot(used.parameters(), optimizers[0]), before)
    for model, optimizer in zip((fresh, other), optimizers[1:], strict=True):
        run(model.parameters(), optimizer, range(2))
    expected = snapshot(other.parameters(), optimizers[2])
    assert_same(snapshot(fresh.parameters(), optimizers[1]), expected)


def test_the_right_state_loads() -> None:
    """The cases above differ from this one by their change alone."""
    model, source = model_of(), model_of()
    optimizer, theirs = AdamW4bit(model.parameters()), AdamW4bit(source.parameters())
    run(source.parameters(), theirs, range(2))
    model.load_state_dict(source.state_dict())
    optimizer.load_state_dict(edited(lambda s: None)())
    assert_same(snapshot(model.parameters(), optimizer), snapshot(source.parameters(), theirs))
    state = optimizer.state_dict()
    state["state"][0] = {**state["state"][0], "step": 7}  # a plain number, as older torch writes it
    optimizer.load_state_dict(state)
    assert optimizer.state[model[0].weight]["step"].item() == 7


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_momentum_on_one_side_only(momentum: float) -> None:
    model = model_of()
    optimizer = SGD4bit(model.parameters(), momentum=momentum)
    run(model.parameters(), optimizer, range(1))
    before = snapshot(model.parameters(), optimizer)
    state = state_of(lambda p: SGD4bit(p, momentum=0.9 - momentum))
    lacks = (
        r"lacks nothing and has \['momentum_buffer_absmax'" if momentum == 0 else "lacks .'momentum_buffer"
    )
    with pytest.raises(StateError, match=f"parameter 0: the saved state {lacks}"):
        optimizer.load_state_dict(state)
    assert_same(snapshot(model.parameters(), optimizer), before)


def test_a_misfit_leaves_frozen_parameters_without_a_state() -> None:
    """One whose saved state would have been taken, had the rest fitted."""
    model = model_of()
    state = state_of(AdamW4bit, model)
    state["state"][7].pop("step")
    model[0].weight.requires_grad_(False).grad = None
    optimizer = AdamW4bit(model.parameters())
    with pytest.raises(StateError, match="parameter 7"):
        optimizer.load_state_dict(state)
    assert model[0].weight not in optimizer.state
    assert len(optimizer.bind()) == 7
