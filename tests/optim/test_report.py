"""``opt.report()`` foretells the step: its figures are those of the states before and after a real one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import shard4bit
from shard4bit.optim.report import Report, codes_of
from shard4bit.placement import to_local
from shard4bit.spec import QuantSpec
from tests.fsdp import models
from tests.fsdp.models import Zoo
from tests.fsdp.recorder import Recorder
from tests.optim.helpers import fill_grads, model_of, run
from tests.pool import pool

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "rank1": (shard4bit.AdamW4bit, {"betas": (0.9, 0.95)}),
    "block": (shard4bit.AdamW4bit, {"second_moment": "block", "maximize": True}),
    "factored": (shard4bit.AdamW4bit, {"second_moment": "factored"}),
    "8-bit": (shard4bit.AdamW4bit, shard4bit.spec.ADAMW_8BIT),
    "sgd": (shard4bit.SGD4bit, {"momentum": 0.9, "weight_decay": 0.1}),
}


def stored(optimizer: Any) -> dict[tuple[int, str], tuple[Tensor, Tensor | None]]:
    """(values, codes or None) of every moment, by the parameter's place and the moment's name."""
    return {
        (i, m.name): (
            optimizer.moment(bound.param, m.name).reshape(-1),
            codes_of(m).clone() if isinstance(m.spec, QuantSpec) else None,
        )
        for i, bound in enumerate(optimizer.bind())
        for m in bound.moments
    }


def exact(optimizer: Any, p: Tensor, name: str, old: Tensor) -> Tensor:
    """The moment after the step, by the formula."""
    group = optimizer.param_groups[0]
    grad = to_local(p.grad).float().reshape(-1) * (-1 if group["maximize"] else 1)
    if name == "momentum_buffer":
        return group["momentum"] * old + (grad + group["weight_decay"] * to_local(p).float().reshape(-1))
    beta = group["betas"][name == "exp_avg_sq"]
    return beta * old + (1 - beta) * (grad if name == "exp_avg" else grad * grad)


def compare(optimizer: Any) -> None:
    """A report, then the step; each figure from the states themselves."""
    before, rows = stored(optimizer), iter(optimizer.report())
    bounds = optimizer.bind()
    wanted = {(i, m.name): exact(optimizer, b.param, m.name, before[i, m.name][0])
              for i, b in enumerate(bounds) for m in b.moments}  # fmt: skip
    optimizer.step()
    after = stored(optimizer)
    for key, x in wanted.items():
        row, codes = next(rows), before[key][1]
        if row.spec == "fp32" or row.elements == 0:
            assert (row.error, row.stale, row.saturated) == (None, None, None)
            continue
        error = (after[key][0].double() - x.double()).norm() / x.double().norm()
        assert row.error == pytest.approx(float(error), rel=1e-4), key
        if codes is None:
            assert row.stale is None and row.saturated is None
            continue
        new = after[key][1]
        assert new is not None
        stale = ((codes == new) & (x != before[key][0])).double().mean()
        assert row.stale == pytest.approx(float(stale), abs=1e-3), key
        top = 2 ** (8 if row.spec.endswith("/8") else 4) - 1
        ends = (codes == top) | ((codes == 0) & (row.moment != "exp_avg_sq"))
        assert row.saturated == pytest.approx(float(ends.double().mean()), abs=1e-9)
        assert row.scales is not None and 0 < row.scales[0] <= row.scales[1]
    assert next(rows, None) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_those_of_the_step(kind: str, dtype: torch.dtype) -> None:
    make, options = KINDS[kind]
    model = model_of(dtype=dtype)
    optimizer = make(model.parameters(), lr=1e-2, **options)
    run(model.parameters(), optimizer, range(3))
    fill_grads(model.parameters(), 7)
    compare(optimizer)


def test_it_changes_nothing() -> None:
    model, twin = model_of(), model_of()
    optimizers = [shard4bit.AdamW4bit(m.named_parameters()) for m in (model, twin)]
    for step in range(3):
        for m in (model, twin):
            fill_grads(m.parameters(), step)
        before = shard4bit.digest(model, optimizers[0])
        optimizers[0].report()
        optimizers[0].report(predict=False)
        assert shard4bit.digest(model, optimizers[0]) == before
        for optimizer in optimizers:
            optimizer.step()
    assert shard4bit.digest(model, optimizers[0]) == shard4bit.digest(twin, optimizers[1])


def test_rows_name_their_parameter() -> None:
    model = model_of()
    report = shard4bit.AdamW4bit(model.named_parameters()).report(predict=False)
    assert isinstance(report, Report)
    assert [row.parameter for row in report[::2]] == [n for n, _ in model.named_parameters()]
    text = str(report)
    assert "parameter" in text.splitlines()[0] and text.count("\n") == len(report)
    assert report.as_json()[0]["spec"] == "B128/DE"
    unnamed = shard4bit.AdamW4bit(model.parameters()).report(predict=False)
    assert unnamed[0].parameter == "param_groups[0]['params'][0]"


def test_parameters_that_do_not_step_have_no_errors() -> None:
    model = model_of()
    optimizer = shard4bit.AdamW4bit(model.parameters())
    rows = optimizer.report()
    assert [row.error for row in rows] == [None] * len(rows)
    fill_grads(model.parameters(), 0)
    model[0].weight.grad = None
    rows = optimizer.report()
    assert rows[0].error is None and rows[0].saturated is not None
    assert rows[8].spec == "B128/DE" and rows[8].error is not None


def test_a_fresh_state_is_all_zeros() -> None:
    row = shard4bit.AdamW4bit([torch.nn.Parameter(torch.ones(70, 80))]).report(predict=False)[0]
    assert (row.zero_scales, row.scales) == (1.0, (0.0, 0.0))


def test_bad_gradients_raise_as_in_the_step() -> None:
    model = model_of()
    optimizer = shard4bit.AdamW4bit(model.parameters())
    fill_grads(model.parameters(), 0)
    model[0].weight.grad = model[0].weight.grad.to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.report()
    fill_grads(model.parameters(), 0)
    optimizer.step()


# ---- ranks ------------------------------------------------------------------------------------------


def on_ranks(kind: str) -> tuple[list[str], list[str], list[str]]:
    """Compare under FSDP2; the collectives of a report with and without prediction, and of a step."""
    make, options = KINDS[kind]
    model = models.sharded(Zoo(), "fsdp")
    optimizer = make(model.parameters(), lr=1e-2, **options)
    models.train(model, optimizer, 2)
    models.force(model, 3)
    compare(optimizer)
    models.force(model, 4)
    found = []
    for work in (optimizer.report, lambda: optimizer.report(predict=False), optimizer.step):
        with Recorder() as recorder:
            work()
        found.append([name for name, _, _ in recorder.calls])
    return found[0], found[1], found[2]


@pytest.mark.parametrize("kind", ["rank1", "factored"])
def test_on_two_ranks(kind: str) -> None:
    for predicted, plain, step in pool(2).run(on_ranks, kind):
        assert predicted == step and step and plain == []


def one_fails() -> str:
    model = models.sharded(Zoo(), "fsdp")
    optimizer = shard4bit.AdamW4bit(model.parameters())
    models.train(model, optimizer, 1)
    models.force(model, 2)
    if dist.get_rank() == 1:
        optimizer.param_groups[0]["betas"] = None
    try:
        optimizer.report()
    except Exception as error:
        return type(error).__name__
    return "nothing"


def test_an_error_on_one_rank_reaches_the_other() -> None:
    assert pool(2).run(one_fails) == ["RuntimeError", "TypeError"]
