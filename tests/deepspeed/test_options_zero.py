"""Optimizers as DeepSpeed gets them: by name with options in the JSON, as objects, as callables."""

from __future__ import annotations

import inspect
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

import shard4bit
from shard4bit.errors import LayoutError
from tests.deepspeed import engines
from tests.deepspeed.engines import Known, config, engine_of, entry, needs_deepspeed
from tests.fsdp import models
from tests.fsdp.models import ADAMW
from tests.pool import pool

pytestmark = needs_deepspeed


class Mine(shard4bit.AdamW4bit):
    """A user's own subclass."""


def given(how: str, stage: int) -> Any:
    """Train two steps with an optimizer that is given in some way; the parts of this rank."""
    model = Known()
    settings = config(stage)
    if how == "json":
        engine = engine_of(model, settings)
    else:
        del settings["optimizer"]
        engines.deepspeed()  # imports shard4bit.deepspeed, as a user would
        optimizer: Any = {
            "object": lambda: shard4bit.AdamW4bit(model.parameters(), **ADAMW),
            "subclass": lambda: Mine(model.parameters(), **ADAMW),
            "callable": lambda: lambda params: shard4bit.AdamW4bit(params, **ADAMW),
            "patterns": lambda: shard4bit.deepspeed.AdamW4bit(model.parameters(), **ADAMW),
        }[how]()
        engine = engine_of(model, settings, optimizer=optimizer)
    engines.train(engine, 2)
    return engines.parts(engine)


@pytest.mark.parametrize("stage", [0, 1])
def test_every_way_gives_the_same(stage: int) -> None:
    expected = engines.reference("rank1", 2)
    for how in ("json", "object", "subclass", "callable", "patterns"):
        engines.same(engines.whole(pool(2).run(given, how, stage)), expected, how)


def scheduled_object() -> Any:
    """A client's optimizer under a client's scheduler of torch, which replaces its ``step``."""
    model = Known()
    engines.deepspeed()
    optimizer = shard4bit.AdamW4bit(model.parameters(), **ADAMW)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    settings = config(0, precision="bf16")
    del settings["optimizer"]
    engine = engine_of(model, settings, optimizer=optimizer, lr_scheduler=scheduler)
    before = float(optimizer.bind()[0].step)
    engines.train(engine, 2)
    return before, float(optimizer.bind()[0].step), optimizer.param_groups[0]["lr"]


def test_a_scheduler_of_torch_around_an_object() -> None:
    engines.needs({"stage": 0, "precision": "bf16"})
    assert pool(2).run(scheduled_object) == [(0.0, 2.0, ADAMW["lr"] / 4)] * 2


def with_options(stage: int, options: dict[str, Any], zero: dict[str, Any]) -> Any:
    settings = config(stage, zero=zero)
    settings["optimizer"] = entry(**options)
    engine = engine_of(Known(), settings)
    engines.train(engine, 2)
    specs = {b.placed.name: {m.name: str(m.spec) for m in b.moments} for b in engine.basic_optimizer.bind()}
    return engines.parts(engine), specs


@pytest.mark.parametrize("stage, zero", [(0, {}), (2, {"round_robin_gradients": True})])
def test_patterns_of_names(stage: int, zero: dict[str, Any]) -> None:
    options = {"kind": "block", "quantize_exclude": ["odd", "conv*"], "no_decay": ["bias", "few", "odd"]}
    results = pool(2).run(with_options, stage, options, zero)
    model = models.Zoo()
    groups: list[dict[str, Any]] = []
    for name, param in model.named_parameters():
        groups.append({"params": [param]})
        if name in ("odd", "conv"):
            groups[-1]["quantize"] = False
        if name in ("bias", "few", "odd"):
            groups[-1]["weight_decay"] = 0.0
    optimizer = models.optimizer_of("block", groups)
    models.train(model, optimizer, 2)
    engines.same(engines.whole([p for p, _ in results]), models.canonical(model, optimizer), stage)
    assert results[0][1]["odd"] == {"exp_avg": "fp32", "exp_avg_sq": "fp32"}
    assert results[0][1]["tall"]["exp_avg_sq"] == "B128/Linear"


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("AdamW4bit", {"second_momment": "block"}, ["second_momment", "did you mean 'second_moment'"]),
        ("AdamW4bit", {"quantise_exclude": ["*"]}, ["did you mean 'quantize_exclude'"]),
        ("AdamW4bit", {"torch_adam": True}, ["torch_adam", "weight_decay"]),
        ("AdamW4bit", {"momentum": 0.9}, ["momentum"]),
        ("AdamW4bit", {"second_moment": "rank-2"}, ["rank-2"]),
        ("AdamW4bit", {"lr": "fast"}, ["lr='fast'"]),
        ("AdamW4bit", {"no_decay": "*.bias"}, ["no_decay='*.bias'", "['*.bias']"]),
        ("AdamW4bit", {"no_decay": [3]}, ["no_decay=[3]"]),
        (
            "AdamW4bit",
            {"no_decay": ["*.bias"]},
            ["no_decay", "'*.bias' matches no parameter of the optimizer", "wide"],
        ),
        ("SGD4bit", {"momentum_bufer": "B128/DE"}, ["did you mean 'momentum_buffer'"]),
        ("SGD4bit", {"betas": [0.9, 0.99]}, ["betas"]),
    ],
)
def test_wrong_options(name: str, options: dict[str, Any], words: list[str]) -> None:
    for outcome in pool(2).outcomes(wrong, name, options):
        assert outcome[0] == "error" and isinstance(outcome[1], ValueError), outcome
        for word in words:
            assert word in str(outcome[1]), outcome[1]


def wrong(name: str, options: dict[str, Any]) -> None:
    engine_of(Known(), {**config(2), "optimizer": {"type": name, "params": options}})


#: option -> another value than its default, as a JSON has it
OTHERWISE: dict[str, dict[str, Any]] = {
    "AdamW4bit": {
        "lr": 0.01, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.2, "second_moment": "factored",
        "first_moment": "B256/DE", "quantize": False, "maximize": True, "compensate": False,
        "rounding": "nearest", "capturable": True,
    },
    "SGD4bit": {
        "lr": 0.01, "momentum": 0.8, "dampening": 0.1, "weight_decay": 0.2, "nesterov": True,
        "momentum_buffer": "B256/DE", "quantize": False, "maximize": True, "compensate": True,
        "capturable": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(OTHERWISE))
def test_all_options_are_taken(name: str) -> None:
    parameters = inspect.signature(getattr(shard4bit, name)).parameters
    options = {key: OTHERWISE[name][key] for key in list(parameters)[1:]}  # KeyError: a new one, to be added
    together = [options]
    if "nesterov" in options:  # which is without dampening
        together = [{**options, "dampening": 0.0}, {**options, "nesterov": False}]
    for given in together:
        found = pool(2).run(taken, name, {**given, "no_decay": [], "quantize_exclude": []})[0]
        expected = {**given, **({"betas": (0.8, 0.9)} if "betas" in given else {})}
        assert {k: found[k] for k in expected} == expected
    for key, value in options.items():
        default = parameters[key].default
        assert default is not value and (key == "betas" or default != value), key


def taken(name: str, options: dict[str, Any]) -> Any:
    engine = engine_of(Known(), {**config(1), "optimizer": {"type": name, "params": options}})
    return {k: v for k, v in engine.basic_optimizer.param_groups[0].items() if k != "params"}


def test_an_object_that_our_adapter_did_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed loaded, and our adapter not: its flat partitions must not pass for parameters."""
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    monkeypatch.delitem(sys.modules, "shard4bit.deepspeed", raising=False)
    model = Known()
    optimizer = shard4bit.AdamW4bit(model.parameters(), **ADAMW)
    optimizer.bind()  # its own parameters pass
    again = shard4bit.AdamW4bit(model.parameters(), **ADAMW)
    again.param_groups[0]["params"] = [nn.Parameter(torch.zeros(1000))]
    with pytest.raises(LayoutError, match="import shard4bit.deepspeed before"):
        again.step()


# ---- what is refused ----------------------------------------------------------------------------------

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("stage 3", {"zero_optimization": {"stage": 3}}, '"stage": 2'),
    ("offload_optimizer to cpu", {"zero": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
    ("elastic_checkpoint", {"zero": {"elastic_checkpoint": True}}, "shard4bit.save"),
    ("load_universal", {"checkpoint": {"load_universal": True}}, "shard4bit.load"),
    ("torch_autocast", {"torch_autocast": {"enabled": True, "dtype": "float16"}}, "bfloat16"),
    (
        "ZenFlow",
        {
            "zero": {
                "offload_optimizer": {"device": "cpu"},
                "zenflow": {"topk_ratio": 0.1, "select_strategy": "step", "select_interval": 4,
                            "update_interval": 4, "full_warm_up_rounds": 0, "overlap_step": False},
            }
        },
        "zenflow",
    ),
]  # fmt: skip


@pytest.mark.parametrize("what, more, instead", REFUSED, ids=[r[0] for r in REFUSED])
def test_refused_at_initialize(what: str, more: dict[str, Any], instead: str) -> None:
    if engines.OLD and what in ("torch_autocast", "ZenFlow"):
        pytest.skip(f"DeepSpeed before 0.19 has no {what}, so there is nothing to refuse")
    for outcome in pool(2).outcomes(refused, more):
        assert outcome[0] == "error", what
        assert isinstance(outcome[1], LayoutError), outcome[1:]
        assert what in str(outcome[1]) and instead in str(outcome[1]), outcome[1]


def refused(more: dict[str, Any]) -> None:
    more = dict(more)
    engines.deepspeed()
    try:
        engine_of(Known(), {**config(2, zero=more.pop("zero", {})), **more})
    finally:  # a flag of the process, which would change the engines of later tests
        autocast = sys.modules.get("deepspeed.runtime.torch_autocast")
        if autocast is not None:
            autocast.TORCH_AUTOCAST_INITIALIZED = False  # type: ignore[attr-defined]


def moe() -> None:
    engines.deepspeed()
    from deepspeed.moe.layer import MoE

    model = nn.Sequential(nn.Linear(8, 8), MoE(8, nn.Linear(8, 8), num_experts=2, ep_size=1))
    engine_of(model, config(2, precision="bf16"))


def test_mixture_of_experts_is_refused() -> None:
    for outcome in pool(2).outcomes(moe):
        assert outcome[0] == "error" and isinstance(outcome[1], LayoutError), outcome
        assert "mixture-of-experts" in str(outcome[1]) and "FSDP2" in str(outcome[1])


def foreign() -> None:
    engine_of(Known(), config(0), model_parameters=[nn.Parameter(torch.zeros(3, 2))])


def test_parameters_that_are_not_the_models_are_refused() -> None:
    for outcome in pool(2).outcomes(foreign):
        assert outcome[0] == "error" and "of shape (3, 2) that is not the model's" in str(outcome[1]), outcome


def other_optimizer() -> str:
    """Another optimizer is left alone, and our functions say that it is not ours."""
    settings = {**config(1), "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    engine = engine_of(Known(), {**settings, "zero_allow_untested_optimizer": True})
    engine.backward(engine(1))
    engine.step()
    with pytest.raises(LayoutError) as caught:
        shard4bit.deepspeed.full_moment(engine, "odd", "exp_avg")
    return str(caught.value)


def test_other_optimizers_are_left_alone() -> None:
    for message in pool(2).run(other_optimizer):
        assert "no optimizer of shard4bit" in message and "import shard4bit.deepspeed" in message
