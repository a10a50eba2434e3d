"""``optimizer.state``, ``p.data`` and groups that users change by hand between steps, as torch's optimizers
let them: what the optimizer works on is what they see there, or it says why it is not."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from shard4bit import AdamW4bit, SGD4bit, StateError, export_state, load, save
from shard4bit.optim.held import Held
from tests.optim.helpers import assert_same, model_of, normal, run, snapshot


def away(optimizer: Any) -> None:
    """Every tensor of the states elsewhere, as programs do that free a GPU between phases."""
    for entry in optimizer.state.values():
        for key, value in entry.items():
            entry[key] = value.to("cpu", copy=True)


def entries_anew(optimizer: Any) -> None:
    """As torch's ZeroRedundancyOptimizer loads."""
    for param, entry in list(optimizer.state.items()):
        optimizer.state[param] = {key: value.clone() for key, value in entry.items()}


def all_anew(optimizer: Any) -> None:
    optimizer.state = defaultdict(dict, {p: dict(s) for p, s in optimizer.state.items()})


@pytest.mark.parametrize("cls", [AdamW4bit, SGD4bit])
@pytest.mark.parametrize("change", [away, entries_anew, all_anew])
def test_replaced_states_are_taken_up(cls: Any, change: Callable[[Any], None]) -> None:
    model, twin = model_of(), model_of()
    ours, others = cls(model.parameters()), cls(twin.parameters())
    run(model.parameters(), ours, range(3))
    run(twin.parameters(), others, range(3))
    change(ours)
    saved = copy.deepcopy(ours.state_dict())
    change(ours)
    run(model.parameters(), ours, range(3, 5))
    run(twin.parameters(), others, range(3, 5))
    assert_same(snapshot(model.parameters(), ours), snapshot(twin.parameters(), others))
    change(ours)
    ours.load_state_dict(saved)  # into what is there now
    assert all(entry["step"] == 3 for entry in ours.state.values())
    run(model.parameters(), ours, range(1))
    assert all(entry["step"] == 4 for entry in ours.state_dict()["state"].values())


def test_states_that_nobody_asked_for_are_not_looked_at(tmp_path: Path) -> None:
    """What training, schedules and checkpoints do is no reason to; every step would take longer."""
    model = model_of()
    ours = AdamW4bit(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(ours, lambda step: 1.0)
    run(model.parameters(), ours, range(2))
    schedule.step()
    ours.report()
    ours.moment(model[0].weight, "exp_avg")
    assert "AdamW4bit" in str(ours)
    save(tmp_path, model, ours, step=2)
    load(tmp_path, model, ours)
    with mock.patch.object(Held, "stands", side_effect=AssertionError("looked")):
        run(model.parameters(), ours, range(2))
        assert len(ours.state) == len(list(model.parameters()))
        with pytest.raises(AssertionError, match="looked"):
            ours.step()


@pytest.mark.parametrize("when", ["before the first step", "between steps"])
@pytest.mark.parametrize("of", [lambda optimizer: optimizer, copy.copy], ids=["its own", "of a copy"])
def test_a_reference_that_was_kept(when: str, of: Callable[[Any], Any]) -> None:
    """Whoever has asked for the states may change them at any time after."""
    model, twin = model_of(), model_of()
    ours, others = AdamW4bit(model.parameters()), AdamW4bit(twin.parameters())
    run(twin.parameters(), others, range(4))
    if when == "between steps":
        run(model.parameters(), ours, range(2))
    state, stepped = ours.state, of(ours)
    run(model.parameters(), stepped, range(2))
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        state[param].update(copy.deepcopy(others.state[other]))
        param.data.copy_(other.data)
    run(twin.parameters(), others, [9])
    run(model.parameters(), stepped, [9])
    assert_same(snapshot(model.parameters(), stepped), snapshot(twin.parameters(), others))


def test_counts_that_are_changed_by_hand() -> None:
    """One of them, then all, in memory whose changes torch does not count; a twin of torch's goes along."""
    model, twin = model_of(), model_of()
    options = {"lr": 0.1, "weight_decay": 0.0}
    ours = AdamW4bit(model.parameters(), quantize=False, **options)
    others = torch.optim.AdamW(twin.parameters(), **options)
    run(model.parameters(), ours, range(3))
    run(twin.parameters(), others, range(3))
    for count, which in ((40.0, slice(0, 1)), (7.0, slice(None)), (9.0, slice(1, 2))):
        for params, optimizer in ((model.parameters(), ours), (twin.parameters(), others)):
            params = list(params)
            for param in params[which]:
                optimizer.state[param]["step"].data.numpy()[...] = count
            run(params, optimizer, range(2))
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert ours.state[param]["step"] == others.state[other]["step"]
            torch.testing.assert_close(param, other, rtol=1e-4, atol=1e-5)


def test_memory_is_free_after_bind() -> None:
    """What docs/troubleshooting.md says to whoever moves states off a GPU."""
    model = model_of()
    ours = AdamW4bit(model.parameters())
    run(model.parameters(), ours, range(2))
    held = [weakref.ref(t) for entry in ours.state.values() for t in entry.values()]
    away(ours)
    ours.bind()
    gc.collect()
    assert not any(tensor() is not None for tensor in held)


def test_a_state_dict_may_be_edited() -> None:
    """Its entries are copies, as far as maps go: whoever changes one does not change the optimizer."""
    model = model_of()
    ours = AdamW4bit(model.parameters())
    run(model.parameters(), ours, range(2))
    before = snapshot(model.parameters(), ours)
    for entry in ours.state_dict()["state"].values():
        entry.update({key: torch.zeros(3) for key in list(entry)[1:]}, note=1)
    assert_same(snapshot(model.parameters(), ours), before)
    run(model.parameters(), ours, range(1))


def test_other_values_count() -> None:
    """What was put there is used, not only shown."""
    model, twin = model_of(), model_of()
    ours, others = AdamW4bit(model.parameters()), AdamW4bit(twin.parameters())
    run(twin.parameters(), others, range(4))
    run(model.parameters(), ours, range(1))
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        ours.state[param] = copy.deepcopy(others.state[other])
        param.data.copy_(other.data)
    run(twin.parameters(), others, [9])
    run(model.parameters(), ours, [9])
    assert_same(snapshot(model.parameters(), ours), snapshot(twin.parameters(), others))


@pytest.mark.parametrize("whole", [True, False])
def test_removed_states_start_anew(whole: bool) -> None:
    model, twin = model_of(), model_of()
    ours = AdamW4bit(model.parameters())
    run(model.parameters(), ours, range(3))
    if whole:
        ours.state.clear()
    else:
        for param in model.parameters():
            del ours.state[param]
    twin.load_state_dict(model.state_dict())
    others = AdamW4bit(twin.parameters())
    for params, optimizer in ((model.parameters(), ours), (twin.parameters(), others)):
        run(params, optimizer, [5])
    assert_same(snapshot(model.parameters(), ours), snapshot(twin.parameters(), others))


def test_a_partly_replaced_entry_is_refused() -> None:
    model = model_of()
    ours = AdamW4bit(model.parameters())
    run(model.parameters(), ours, range(2))
    entry = ours.state[model[0].weight]
    entry["step"] = torch.tensor(7.0)
    with pytest.raises(
        StateError, match=r"^step in the state of a parameter of shape \(90, 70\) were replaced"
    ):
        ours.state_dict()


def test_states_that_do_not_fit_are_refused() -> None:
    model = model_of()
    ours = AdamW4bit(model.parameters())
    run(model.parameters(), ours, range(2))
    first, second = ours.state[model[0].weight], ours.state[model[2].weight]
    ours.state[model[0].weight] = dict(second)
    with pytest.raises(
        StateError, match=r"has torch.uint8 \(50, 45\) with strides .* expected torch.uint8 \(90, 35\)"
    ):
        ours.step()
    ours.state[model[0].weight] = {"step": first["step"], "exp_avg_codes": first["exp_avg_codes"]}
    with pytest.raises(StateError, match="has NoneType as exp_avg_absmax"):
        ours.step()


def test_parameters_come_and_go() -> None:
    """A parameter in another's place, the old one's state taken out: nothing of it is kept."""
    old = nn.Parameter(normal((70, 80), 1).clone())
    stays, new = nn.Parameter(normal((70, 90), 2).clone()), nn.Parameter(normal((90, 80), 3).clone())
    ours = AdamW4bit([old, stays])
    run([old, stays], ours, range(2))
    kept = weakref.ref(ours.state[old]["exp_avg_codes"])
    del ours.state[old]
    ours.param_groups[0]["params"][0] = new
    run([new, stays], ours, [4])
    old.grad = None
    gc.collect()
    assert kept() is None
    state = ours.state_dict()["state"]
    assert [float(state[i]["step"]) for i in (0, 1)] == [1.0, 3.0]

    ours.add_param_group({"params": [old]})
    ours.param_groups.pop()
    run([new, stays], ours, [5])
    assert set(ours.state_dict()["state"]) == {0, 1}


def test_given_up_memory_is_free() -> None:
    """``p.data`` put elsewhere: the optimizer holds no alias of what it was."""
    param = nn.Parameter(normal((70, 80), 1).clone())
    ours = AdamW4bit([param])
    run([param], ours, range(2))
    bound = ours.bind()[0]
    param.data = torch.empty(0)
    assert bound.work.param.numel() == 0


@pytest.mark.parametrize("form", [(140, 80), (80, 70), (35, 80)])
def test_parameters_of_another_shape_are_refused(form: tuple[int, int]) -> None:
    param = nn.Parameter(normal((70, 80), 1).clone())
    ours = AdamW4bit([param])
    run([param], ours, range(2))
    param.grad = None
    param.data = normal(form, 2).clone()
    with pytest.raises(
        StateError, match=rf"of shape \(70, 80\) has a part of shape \({form[0]}, {form[1]}\)"
    ):
        run([param], ours, [3])


def test_a_transposed_parameter() -> None:
    """In place, with gradients laid out alike: the elements at the same addresses have other coordinates."""
    param, twin = (nn.Parameter(normal((72, 72), 1).clone()) for _ in range(2))
    ours, other = AdamW4bit([param]), AdamW4bit([twin])
    for p, optimizer in ((param, ours), (twin, other)):
        run([p], optimizer, range(2))
    param.data = param.data.t()
    twin.data = twin.data.t().contiguous()
    grad = normal((72, 72), 7)
    param.grad, twin.grad = grad.t().contiguous().t(), grad.clone()
    ours.step(), other.step()
    assert torch.equal(param.data, twin.data)


@pytest.mark.parametrize("change", [{"quantize": False}, {"second_moment": "block"}])
def test_specs_changed_after_the_first_step(change: dict[str, Any]) -> None:
    """The state would stay what it was, and be saved under the new name."""
    model = model_of()
    ours = AdamW4bit(model.parameters())
    run(model.parameters(), ours, range(1))
    ours.param_groups[0].update(change)
    for act in (ours.step, ours.state_dict):
        with pytest.raises(StateError, match=r"options now ask for exp_avg.* build a new optimizer"):
            act()
    ours.state.clear()  # as it says
    ours.step()
    assert ("exp_avg_sq" in ours.state[model[0].weight]) == ("quantize" in change)


def test_specs_changed_before_the_first_step() -> None:
    model = model_of()
    ours = AdamW4bit(model.parameters())
    ours.param_groups[0]["second_moment"] = "block"
    saved = ours.state_dict()
    AdamW4bit(model_of().parameters(), second_moment="block").load_state_dict(saved)


def test_states_made_in_inference_mode() -> None:
    model = model_of()
    ours = AdamW4bit(model.parameters())
    with torch.inference_mode():
        ours.load_state_dict(ours.state_dict())
    run(model.parameters(), ours, range(1))
    assert ours.state[model[0].weight]["step"] == 1


def test_tensors_that_require_no_gradient_but_have_one() -> None:
    """As in torch.optim, also one that gets its gradient later than the others."""
    tensors = [normal((70, 80), i).clone() for i in range(2)]
    ours = AdamW4bit(tensors)
    run(tensors[:1], ours, range(2))
    run(tensors, ours, range(1))
    assert [float(ours.state[t]["step"]) for t in tensors] == [3.0, 1.0]
    assert not torch.equal(tensors[1], normal((70, 80), 1))


def test_plans_are_kept() -> None:
    """With a frozen parameter that gets a gradient, and one that has had one from the beginning."""
    frozen = [nn.Parameter(normal((70, 80), i).clone(), requires_grad=False) for i in range(2)]
    trained = nn.Parameter(normal((70, 80), 5).clone())
    frozen[0].grad = torch.ones(70, 80)
    ours = AdamW4bit([*frozen, trained])
    run([trained], ours, range(3))
    assert len(ours._plans) == 1
    run([frozen[1], trained], ours, range(3))
    assert len(ours._plans) == 1 and ours.state[frozen[1]]["step"] == 3
    assert ours.state[frozen[0]]["step"] == 6  # as in torch: what has a gradient steps


@pytest.mark.parametrize("option, value", [("lr", "x"), ("betas", (0.9, 1.0)), ("rounding", "bogus")])
def test_bad_options_of_a_saved_state(option: str, value: Any) -> None:
    ours = AdamW4bit(model_of().parameters())
    saved = copy.deepcopy(ours.state_dict())
    saved["param_groups"][0][option] = value
    with pytest.raises(StateError, match=rf"parameter group 0 of the state: {option}"):
        ours.load_state_dict(saved)


@pytest.mark.parametrize("step", [-3.0, 0.5, float("nan"), float("inf")])
def test_bad_step_counts_of_a_saved_state(step: float) -> None:
    ours = AdamW4bit(model_of().parameters())
    saved = copy.deepcopy(ours.state_dict())
    saved["state"][1]["step"].fill_(step)
    with pytest.raises(StateError, match=r"parameter 1: step is .*, expected a count"):
        ours.load_state_dict(saved)


def test_exported_counts_are_exact() -> None:
    model = model_of()
    ours = AdamW4bit(model.parameters())
    ours.bind()
    for entry in ours.state.values():
        entry["step"].fill_(1001)
    torch.set_default_dtype(torch.bfloat16)
    try:
        state = export_state(ours)["state"]
    finally:
        torch.set_default_dtype(torch.float32)
    assert {float(entry["step"]) for entry in state.values()} == {1001.0}


@pytest.mark.parametrize("alias", ["wd", "learning_rate"])
def test_other_names_of_options(alias: str) -> None:
    with pytest.raises(ValueError, match=f"unknown option '{alias}'"):
        AdamW4bit([{"params": list(model_of().parameters()), alias: 0.1}])
