"""ZeRO on real process groups: every stage, sharding and precision gives the bits of one process."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.deepspeed import engines
from tests.deepspeed.engines import PRECISIONS, Known, config, engine_of, needs_deepspeed
from tests.fsdp.models import Arrays
from tests.fsdp.test_invariance_fsdp2 import close
from tests.pool import pool

pytestmark = needs_deepspeed
STEPS = 3
WRAPPERS = {  # stage, precision -> what DeepSpeed builds around our optimizer, if not its ZeRO optimizer
    (0, "fp32"): "AdamW4bit",
    (0, "bf16"): "FP16_UnfusedOptimizer",
    (0, "fp16"): "FP16_UnfusedOptimizer",
    (1, "bf16+fp32"): "BF16_Optimizer",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "round robin": {"round_robin_gradients": True},
    "contiguous": {"contiguous_gradients": True, "overlap_comm": False},
    "scattered": {"contiguous_gradients": False, "overlap_comm": False},
    "overlap": {"contiguous_gradients": True, "overlap_comm": True},
    "aligned": {"parameter_alignment": True},
    "all": {"round_robin_gradients": True, "parameter_alignment": True, "overlap_comm": True},
}


@cache
def single(kind: str, precision: str = "fp32") -> Arrays:
    return engines.reference(kind, STEPS, precision)


def run(stage: int, kind: str, precision: str, zero: dict[str, Any]) -> Any:
    """Train with known gradients. Returns this rank's parts, the name of DeepSpeed's wrapper, and whether the
    model's parameters are the optimizer's, rounded."""
    engine = engine_of(Known(), config(stage, kind, precision, zero=zero))
    engines.train(engine, STEPS)
    parts = engines.parts(engine)
    follows = True
    for name, slab, data, _, _ in parts:
        start = slab.row_ranges[0][0] * slab.view.cols + slab.head if slab.numel else 0
        param = engine.module.get_parameter(name).detach().reshape(-1)[start : start + slab.numel]
        follows &= torch.equal(param, torch.from_numpy(data).reshape(-1).to(param.dtype))
    return parts, type(engine.optimizer).__name__, follows


def check(world: int, stage: int, kind: str = "rank1", precision: str = "fp32", **zero: Any) -> None:
    results = pool(world).run(run, stage, kind, precision, zero)
    found = engines.whole([parts for parts, _, _ in results])
    where = (world, stage, kind, precision, zero)
    if kind == "factored":
        expected = single(kind, precision)
        close({k: v.reshape(expected[k].shape) for k, v in found.items()}, expected, where)
    else:
        engines.same(found, single(kind, precision), where)
    assert all(follows for _, _, follows in results), where
    expected_wrapper = WRAPPERS.get((stage, precision), "DeepSpeedZeroOptimizer")
    assert results[0][1] == expected_wrapper or (stage == 0 and kind == "sgd"), where


@pytest.mark.parametrize("world, stage, kind", [(2, 0, "rank1"), (2, 1, "rank1"), (3, 2, "rank1")])
def test_zero_equals_one_process(world: int, stage: int, kind: str) -> None:
    check(world, stage, kind)


@pytest.mark.parametrize("world, stage, kind", [(2, 2, "rank1"), (3, 1, "block"), (3, 2, "sgd")])
def test_round_robin(world: int, stage: int, kind: str) -> None:
    check(world, stage, kind, round_robin_gradients=True)


@pytest.mark.parametrize(
    "world, stage, precision",
    [
        (2, 0, "bf16"),
        (2, 0, "fp16"),
        (3, 1, "bf16"),
        (2, 1, "bf16+fp32"),
        (3, 2, "bf16+fp32"),
        (2, 2, "bf16 masters"),
        (3, 2, "fp16"),
    ],
)
def test_precisions(world: int, stage: int, precision: str) -> None:
    engines.needs({"stage": stage, "precision": precision})
    check(world, stage, "rank1", precision)


@pytest.mark.parametrize("name", ["scattered", "overlap", "all"])
def test_ways_of_reducing(name: str) -> None:
    engines.needs({"stage": 2, "zero": OPTIONS[name]})
    check(2, 2, "block", **OPTIONS[name])


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_everything(stage: int, world: int) -> None:
    for kind in ("rank1", "block", "factored", "sgd"):
        for precision in PRECISIONS if stage else ("fp32", "bf16", "fp16"):
            if engines.has(stage, precision):
                check(world, stage, kind, precision)
    for kind in ("rank1", "sgd") if stage else ():
        for zero in (options for options in OPTIONS.values() if engines.has(stage, "fp32", **options)):
            check(world, stage, kind, "fp32", **zero)
            check(world, stage, kind, "bf16", **zero)
