"""What torch expects of an optimizer: closures, groups, schedulers, hooks, scalers, clipping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer, lr_scheduler

from shard4bit import AdamW4bit, SGD4bit
from tests.optim.helpers import assert_same, copied, fill_grads, model_of, normal, options, run, snapshot

BOTH: list[Callable[..., Any]] = [AdamW4bit, SGD4bit]


def loss_of(model: nn.Module) -> Tensor:
    return (model(normal((8, 70), 1)) - normal((8, 3), 2)).square().mean()


# ---- closures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", BOTH)
def test_a_closure_is_called_once_with_gradients_enabled_and_its_loss_returned(
    make: Callable[..., Any],
) -> None:
    with_closure, without = model_of(), model_of()
    first, second = make(with_closure.parameters()), make(without.parameters())
    seen: list[tuple[bool, float]] = []

    def closure() -> Tensor:
        first.zero_grad()
        loss = loss_of(with_closure)
        loss.backward()
        seen.append((torch.is_grad_enabled(), loss.item()))
        return loss

    for _ in range(3):
        with torch.no_grad():
            found = first.step(closure)
        loss = loss_of(without)
        second.zero_grad()
        loss.backward()
        assert second.step() is None
        assert found is not None and found.item() == loss.item()
    assert [enabled for enabled, _ in seen] == [True] * 3
    assert seen[2][1] < seen[0][1]
    assert_same(snapshot(with_closure.parameters(), first), snapshot(without.parameters(), second))


# ---- parameter groups -------------------------------------------------------------------------------


def test_groups_have_their_own_options() -> None:
    """Each group as an optimizer of its own with these options."""
    groups: list[dict[str, Any]] = [
        {"lr": 1e-2, "weight_decay": 0.5},
        {"quantize": False, "betas": (0.5, 0.6)},
        {"second_moment": "block", "eps": 1e-3},
        {"second_moment": "factored", "first_moment": "B2048/DE/8", "maximize": True},
    ]
    start = [nn.Parameter(normal((80, 60), i).clone()) for i in range(len(groups))]
    together, apart = copied(start), copied(start)
    one = AdamW4bit([{"params": [p], **g} for p, g in zip(together, groups, strict=True)])
    many = [AdamW4bit([p], **g) for p, g in zip(apart, groups, strict=True)]
    for seed in range(3):
        fill_grads(together, seed)
        fill_grads(apart, seed)
        one.step()
        for optimizer in many:
            optimizer.step()
    for i, optimizer in enumerate(many):
        assert options(one.param_groups[i]) == options(optimizer.param_groups[0])
        a, b = snapshot([together[i]], one), snapshot([apart[i]], optimizer)
        del a["options"], b["options"]
        assert_same(a, b)
    kinds = [sorted(one.state[p]) for p in together]
    assert kinds[0] == ["exp_avg_absmax", "exp_avg_codes", "exp_avg_sq_codes"] + [
        "exp_avg_sq_col_max",
        "exp_avg_sq_row_max",
        "step",
    ]
    assert kinds[1] == ["exp_avg", "exp_avg_sq", "step"]
    assert kinds[2] == ["exp_avg_absmax", "exp_avg_codes", "exp_avg_sq_absmax", "exp_avg_sq_codes", "step"]
    assert [k for k in kinds[3] if "mean" in k] == [
        f"exp_avg_sq_{m}" for m in ("col_mean", "mean", "row_mean")
    ]
    assert one.state[together[3]]["exp_avg_codes"].shape == (80, 60)  # 8 bits


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("make", BOTH)
def test_a_group_added_later_starts_then(make: Callable[..., Any], before: int) -> None:
    a, b, c, extra = copied([nn.Parameter(normal((70, 80), 5).clone())] * 4)
    alone, late, grown = make([a]), make([b], lr=0.02), make([c])
    run([a], alone, range(before + 2))
    for seed in range(before, before + 2):
        fill_grads([b], seed)
        late.step()
    run([c], grown, range(before))
    grown.add_param_group({"params": extra, "lr": 0.02})
    for seed in range(before, before + 2):
        fill_grads([c], seed)
        fill_grads([extra], seed)
        grown.step()
    assert grown.param_groups[1]["lr"] == 0.02 and len(grown.param_groups) == 2
    for ours, other in ((c, (a, alone)), (extra, (b, late))):
        mine, theirs = snapshot([ours], grown), snapshot([other[0]], other[1])
        del mine["options"], theirs["options"]
        assert_same(mine, theirs)


def test_a_parameter_belongs_to_one_group() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = AdamW4bit([param])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [param]})
    assert len(optimizer.param_groups) == 1


def test_named_parameters() -> None:
    """Names go into the groups (and into errors) and change nothing else."""
    named, plain = model_of(), model_of()
    first, second = AdamW4bit(named.named_parameters()), AdamW4bit(plain.parameters())
    run(named.parameters(), first, range(3))
    run(plain.parameters(), second, range(3))
    names = [name for name, _ in named.named_parameters()]
    assert first.param_groups[0]["param_names"] == names
    assert first.state_dict()["param_groups"][0]["param_names"] == names
    a, b = snapshot(named.parameters(), first), snapshot(plain.parameters(), second)
    assert a["options"][0].pop("param_names") == names
    assert_same(a, b)
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["param_names"] == names  # as torch.optim


def test_repr_shows_the_options() -> None:
    optimizer = AdamW4bit([{"params": nn.Parameter(torch.ones(2))}], second_moment="block", lr=0.25)
    text = repr(optimizer)
    assert text.startswith("AdamW4bit (\nParameter Group 0\n")
    for line in ("lr: 0.25", "second_moment: B128/Linear", "first_moment: B128/DE", "quantize: True"):
        assert f"    {line}\n" in text
    assert "    momentum_buffer: B128/DE\n" in repr(SGD4bit([nn.Parameter(torch.ones(2))]))


def test_several_optimizers_of_one_model() -> None:
    """Each touches its own parameters only: as if every other parameter were not there."""
    model, alone = model_of(), model_of()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    first, second = AdamW4bit(matrices), SGD4bit(vectors, lr=0.1)
    whole = AdamW4bit(alone.parameters())
    for seed in range(3):
        fill_grads(model.parameters(), seed)
        fill_grads(alone.parameters(), seed)
        untouched = [v.detach().clone() for v in vectors]
        first.step()
        assert all(torch.equal(a, b) for a, b in zip(untouched, vectors, strict=True))
        second.step()
        whole.step()
    assert set(first.state) == set(matrices) and set(second.state) == set(vectors)
    others = [p for p in alone.parameters() if p.ndim > 1]
    a, b = snapshot(matrices, first), snapshot(others, whole)
    assert_same(a, b)
    assert not torch.equal(vectors[0], [p for p in alone.parameters() if p.ndim == 1][0])


# ---- schedulers -------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, step_size=4, gamma=0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=9, eta_min=1e-4),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=25, cycle_momentum=True),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
}


@pytest.mark.parametrize("tensor", [False, True], ids=["float lr", "tensor lr"])
@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("algorithm", ["adamw", "sgd"])
def test_schedulers_drive_ours_as_torchs(algorithm: str, kind: str, tensor: bool) -> None:
    ours, theirs = (nn.Parameter(normal((6, 5), 8).clone()) for _ in range(2))
    rates = [torch.tensor(0.01) if tensor else 0.01 for _ in range(2)]
    optimizer: Optimizer
    if algorithm == "adamw":
        optimizer = AdamW4bit([ours], lr=rates[0])
        torchs: Optimizer = torch.optim.AdamW([theirs], lr=rates[1])
    else:
        optimizer = SGD4bit([ours], lr=rates[0], momentum=0.9)
        torchs = torch.optim.SGD([theirs], lr=rates[1], momentum=0.9)
    schedules = [SCHEDULERS[kind](o) for o in (optimizer, torchs)]
    visited = set()
    for seed in range(20):
        fill_grads([ours], seed)
        fill_grads([theirs], seed)
        for each in (optimizer, torchs, *schedules):
            each.step()
        mine, other = optimizer.param_groups[0], torchs.param_groups[0]
        assert float(mine["lr"]) == float(other["lr"])
        for option in {"betas", "momentum"} & set(mine):
            assert mine[option] == other[option]
        visited.add((float(mine["lr"]), str(mine.get("betas", mine.get("momentum")))))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert len(visited) > 3
    assert len({m for _, m in visited}) == (20 if kind == "one cycle" else 1)
    assert (optimizer.param_groups[0]["lr"] is rates[0]) == tensor


def test_a_scheduler_changes_what_a_quantized_step_does() -> None:
    """As setting the rate by hand: the same bits."""
    a, b = copied([nn.Parameter(normal((70, 80), 9).clone())] * 2)
    scheduled, by_hand = AdamW4bit([a], lr=0.1), AdamW4bit([b], lr=0.1)
    schedule = lr_scheduler.StepLR(scheduled, step_size=1, gamma=0.5)
    for seed in range(3):
        by_hand.param_groups[0]["lr"] = 0.1 * 0.5**seed
        run([a], scheduled, [seed])
        run([b], by_hand, [seed])
        schedule.step()
    mine, other = snapshot([a], scheduled), snapshot([b], by_hand)
    del mine["options"], other["options"]
    assert_same(mine, other)


# ---- gradients --------------------------------------------------------------------------------------


def test_zero_grad() -> None:
    model = model_of()
    optimizer = AdamW4bit(model.parameters())
    fill_grads(model.parameters(), 0)
    kept = [p.grad for p in model.parameters()]
    optimizer.zero_grad(set_to_none=False)
    assert [p.grad for p in model.parameters()] == kept  # the same tensors
    assert all(g is not None and not g.any() for g in kept)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_zero_gradients_are_a_step_and_missing_ones_are_not() -> None:
    """torch's rule: a gradient of zeros decays parameter and moments and counts."""
    ours, theirs = (nn.Parameter(normal((9,), 3).clone()) for _ in range(2))
    optimizer, torchs = AdamW4bit([ours], lr=0.1), torch.optim.AdamW([theirs], lr=0.1)
    for seed, grad in enumerate(["normal", "zero", "none", "normal", "zero"]):
        for param, each in ((ours, optimizer), (theirs, torchs)):
            fill_grads([param], seed)
            if grad != "normal":
                each.zero_grad(set_to_none=grad == "none")
            each.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert optimizer.state[ours]["step"] == torchs.state[theirs]["step"] == 4


def test_a_step_leaves_gradients_alone() -> None:
    model = model_of()
    for maximize in (False, True):
        for optimizer in (
            AdamW4bit(model.parameters(), maximize=maximize),
            SGD4bit(model.parameters(), weight_decay=0.1, maximize=maximize),
        ):
            fill_grads(model.parameters(), 4)
            before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
            for param, grad in zip(model.parameters(), before, strict=True):
                assert param.grad is not None and torch.equal(param.grad, grad)


@pytest.mark.parametrize("make", BOTH)
def test_maximize_is_the_negated_gradient(make: Callable[..., Any]) -> None:
    up, down = model_of(), model_of()
    first, second = make(up.parameters(), maximize=True), make(down.parameters())
    for seed in range(3):
        fill_grads(up.parameters(), seed)
        fill_grads(down.parameters(), seed)
        for param in down.parameters():
            assert param.grad is not None
            param.grad.neg_()
        first.step()
        second.step()
    a, b = snapshot(up.parameters(), first), snapshot(down.parameters(), second)
    del a["options"], b["options"]
    assert_same(a, b)


def test_clip_grad_norm() -> None:
    """Clipped gradients as torch's AdamW takes them, and the norm is what was asked."""
    ours, theirs = model_of(), model_of()
    first = AdamW4bit(ours.parameters(), quantize=False)
    second = torch.optim.AdamW(theirs.parameters())
    for seed in range(3):
        for model, optimizer in ((ours, first), (theirs, second)):
            fill_grads(model.parameters(), seed)
            clip_grad_norm_(model.parameters(), 0.5)
            norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
            assert float(norm) == pytest.approx(0.5, rel=1e-5)
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("make", BOTH)
def test_grad_scaler(make: Callable[..., Any]) -> None:
    """Power-of-two scales are exact, so the scaled run has the bits of the plain one; a step with an
    infinite gradient is skipped and changes nothing but the scale."""
    scaled, plain = model_of(), model_of()
    first, second = make(scaled.parameters()), make(plain.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for step in range(6):
        first.zero_grad()
        scaler.scale(loss_of(scaled)).backward()
        overflows = step in (2, 3)
        if overflows:
            weight = next(scaled.parameters())
            assert weight.grad is not None
            weight.grad[3, 4] = torch.inf
            before = snapshot(scaled.parameters(), first)
        scaler.step(first)
        scaler.update()
        if overflows:
            assert_same(snapshot(scaled.parameters(), first), before)
            continue
        second.zero_grad()
        loss_of(plain).backward()
        second.step()
    assert scaler.get_scale() == 2.0**10 * 2 / 4 * 2
    assert_same(snapshot(scaled.parameters(), first), snapshot(plain.parameters(), second))
    assert first.state[next(scaled.parameters())]["step"] == 4


# ---- hooks ------------------------------------------------------------------------------------------


def test_step_hooks() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = AdamW4bit([param], lr=0.1)
    seen: list[tuple[str, float]] = []

    def before(o: Optimizer, args: Any, kwargs: Any) -> None:
        assert o is optimizer
        seen.append(("before", param[0].item()))

    def after(o: Optimizer, args: Any, kwargs: Any) -> None:
        seen.append(("after", param[0].item()))

    handles = optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)
    run([param], optimizer, [0])
    moved = param[0].item()
    assert seen == [("before", 1.0), ("after", moved)] and moved != 1.0
    for handle in handles:
        handle.remove()
    run([param], optimizer, [1])
    assert len(seen) == 2 and param[0].item() != moved


def test_state_dict_hooks() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = AdamW4bit([param])
    run([param], optimizer, [0])
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre"))

    def post(o: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        seen.append("post")
        assert o is optimizer and set(state) == {"state", "param_groups"}
        return {**state, "note": 1}

    optimizer.register_state_dict_post_hook(post)
    saved = optimizer.state_dict()
    assert seen == ["pre", "post"] and saved["note"] == 1
    assert torch.equal(saved["state"][0]["exp_avg"], optimizer.state[param]["exp_avg"])


def test_load_state_dict_hooks() -> None:
    """A pre-hook may replace the state or edit its (shallow) copy; a post-hook sees it loaded."""
    source, target = (nn.Parameter(torch.ones(3)) for _ in range(2))
    first, second = AdamW4bit([source], lr=0.5), AdamW4bit([target], lr=0.1)
    run([source], first, range(4))
    saved = first.state_dict()
    seen: list[str] = []

    def edit(o: Optimizer, state: dict[str, Any]) -> None:
        seen.append("edit")
        state["param_groups"] = [{**g, "lr": 0.25} for g in state["param_groups"]]

    def replace(o: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        seen.append("replace")
        assert state["param_groups"][0]["lr"] == 0.25
        entry = {k: v + 1 if k == "step" else v for k, v in state["state"][0].items()}
        return {**state, "state": {0: entry}}

    def post(o: Optimizer) -> None:
        seen.append("post")
        assert o.state[target]["step"] == 5 and o.param_groups[0]["lr"] == 0.25

    second.register_load_state_dict_pre_hook(edit)
    second.register_load_state_dict_pre_hook(replace)
    second.register_load_state_dict_post_hook(post)
    second.load_state_dict(saved)
    assert seen == ["edit", "replace", "post"]
    assert saved["param_groups"][0]["lr"] == 0.5 and saved["state"][0]["step"] == 4  # the caller's own
    assert torch.equal(second.moment(target, "exp_avg"), first.moment(source, "exp_avg"))
