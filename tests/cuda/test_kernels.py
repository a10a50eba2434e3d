"""Every kernel, on the CPU, against the torch reference: bit for bit, for any cut, in three lane orders."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from shard4bit.maths.update import ADAMW, SGD
from shard4bit.spec import parse_spec
from tests.cuda.emulator import ORDERS, available
from tests.cuda.runtime import emulated
from tests.test_invariance import adamw_scalars, problems, run

pytestmark = pytest.mark.skipif(not available(), reason="the emulator needs g++")
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def specs_of(first: str, second: str) -> list[Any]:
    return [
        parse_spec(first, signed=True, argument="first"),
        parse_spec(second, signed=False, argument="second"),
    ]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "names", [("B128/DE", "rank1"), ("B128/DE", "block"), ("fp32", "fp32")], ids="+".join
)
@QUICK
@given(problem=problems())
def test_adamw(names: tuple[str, str], order: int, problem: dict[str, Any]) -> None:
    run(ADAMW, problem, specs_of(*names), adamw_scalars, backend=partial(emulated, order))


@QUICK
@given(problem=problems())
def test_sgd(problem: dict[str, Any]) -> None:
    group = {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01, "nesterov": False}
    spec = parse_spec("B128/DE", signed=True, argument="momentum_buffer")
    run(SGD, problem, [spec], lambda step: SGD.scalars(group, step), backend=emulated)
