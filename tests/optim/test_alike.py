"""Steps that find parameters and gradients as they were skip the look at each; all else is seen."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from shard4bit import AdamW4bit
from shard4bit.optim import alike, stepping
from shard4bit.optim.stepping import StepPlan
from shard4bit.reference import ReferenceBackend
from tests.cuda.emulator import available
from tests.cuda.runtime import emulated
from tests.optim.helpers import assert_same, fill_grads, normal, snapshot


def pair() -> tuple[list[nn.Parameter], AdamW4bit]:
    params = [nn.Parameter(normal((70, 80), i).clone()) for i in range(3)]
    return params, AdamW4bit(params)


def looks(params: list[nn.Parameter], optimizer: AdamW4bit, step: int) -> int:
    """How often a step looked at each parameter."""
    with mock.patch.object(StepPlan, "_look", autospec=True, side_effect=StepPlan._look) as look:
        fill_grads(params, step)
        optimizer.step()
    return look.call_count


def move(param: nn.Parameter) -> None:
    param.data = param.data.clone()


def drop(param: nn.Parameter) -> None:
    param.grad = None


def transpose(param: nn.Parameter) -> None:
    assert param.grad is not None
    param.grad = param.grad.t().contiguous().t()


def narrow(param: nn.Parameter) -> None:
    assert param.grad is not None
    grad = param.grad.bfloat16()
    param.grad, param.grad_dtype = None, None  # any
    param.grad = grad


def dilate(param: nn.Parameter) -> None:
    """In memory that is not dense."""
    wide = torch.zeros(70, 160)
    wide[:, ::2] = param.data
    param.data = wide[:, ::2]


def test_one_look_for_many_steps() -> None:
    params, optimizer = pair()
    assert [looks(params, optimizer, step) for step in range(4)] == [1, 0, 0, 0]


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("change", [move, drop, transpose, narrow, dilate])
def test_a_change_is_seen(
    change: Callable[[nn.Parameter], None], guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is changed in the fourth step; the other optimizer has no plan to compare it with."""
    if not guarded:  # as with a torch that has no such comparison
        monkeypatch.setattr(alike, "_GUARDS", None)
    (params, optimizer), (others, fresh) = pair(), pair()
    for step in range(6):
        for tensors, one in ((params, optimizer), (others, fresh)):
            fill_grads(tensors, step)
            if step == 3:
                change(tensors[1])
            if one is fresh:
                one._plans.clear()
            one.step()
    assert_same(snapshot(params, optimizer), snapshot(others, fresh))
    assert not torch.equal(params[1], normal((70, 80), 1))


def test_the_memory_of_a_moved_parameter_is_updated() -> None:
    params, optimizer = pair()
    looks(params, optimizer, 0)
    old: Tensor = params[0].data
    kept = old.clone()
    move(params[0])
    assert looks(params, optimizer, 1) == 1
    assert torch.equal(old, kept) and not torch.equal(params[0], kept)


def plans_in_turn(step: int, params: list[nn.Parameter], optimizer: AdamW4bit) -> None:
    """Changes of what plans remember: of a group's options, of which parameters take part, of counts."""
    first, second = optimizer.param_groups
    first["lr"] = 1e-3 * (1 + step)
    second["maximize"] = step in (3, 4)
    for param in params[1:3]:
        param.requires_grad_(step not in (2, 5))  # another plan, on some of the same parameters
    fill_grads([p for p in params if p.requires_grad], step)
    if step == 6:
        params[3].grad = None  # from now on it has taken a step less
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kernels", [False, True], ids=["reference", "emulated kernels"])
def test_plans_in_turn_are_as_new_ones(kernels: bool) -> None:
    if kernels and not available():
        pytest.skip("the emulator needs g++")
    backends = [emulated() if kernels else ReferenceBackend() for _ in range(2)]
    ends = []
    for backend, forgetful in zip(backends, (False, True), strict=True):
        params = [nn.Parameter(normal((70, 80), i).clone()) for i in range(4)]
        optimizer = AdamW4bit([{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}])
        with mock.patch.object(stepping, "backend_for", lambda device, found=backend: found):
            for step in range(9):
                if forgetful:
                    optimizer._plans.clear()
                plans_in_turn(step, params, optimizer)
        ends.append(snapshot(params, optimizer))
    assert_same(*ends)


def thaw(step: int, params: list[nn.Parameter], optimizer: AdamW4bit) -> None:
    params[2].requires_grad_(step >= 2)


def freeze(step: int, params: list[nn.Parameter], optimizer: AdamW4bit) -> None:
    params[1].requires_grad_(step < 2)


def take_turns(step: int, params: list[nn.Parameter], optimizer: AdamW4bit) -> None:
    """As an engine that steps a group, or a part of one, at a time."""
    optimizer.param_groups[0]["params"] = [params[step % 2], params[2]][: 1 + step % 3]


def add(step: int, params: list[nn.Parameter], optimizer: AdamW4bit) -> None:
    if step == 2:
        optimizer.add_param_group({"params": [nn.Parameter(normal((70, 80), 9).clone())]})
    if step == 4:
        optimizer.param_groups = optimizer.param_groups[1:]


@pytest.mark.parametrize("change, plans", [(thaw, 1), (freeze, 1), (take_turns, 3), (add, 2)])
def test_other_parameters_are_seen(change: Callable[..., None], plans: int) -> None:
    """Before each step; the other optimizer has no plan to find again."""
    ends = []
    for forgetful in (False, True):
        params, optimizer = pair()
        for step in range(6):
            change(step, params, optimizer)
            held = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
            fill_grads(held, step)
            if forgetful:
                optimizer._plans.clear()
            optimizer.step()
            optimizer.zero_grad()
        ends.append((snapshot(params, optimizer), len(optimizer._plans)))
    assert_same(ends[0][0], ends[1][0])
    assert ends[0][1] == plans
