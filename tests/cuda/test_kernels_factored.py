"""Factored second moments by the kernels: sums in an order of their own, which is always the same."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import shard4bit
from shard4bit.layout import Slab
from shard4bit.maths.update import ADAMW
from shard4bit.spec import parse_spec
from tests.cuda.emulator import ORDERS, available
from tests.cuda.runtime import Twins, emulated
from tests.cuda.test_kernels_optimizers import FAST, MIXES, SLOW, grads, shifted, starts
from tests.simulate import Rank, assemble, in_threads, take
from tests.test_invariance import adamw_scalars, bits, cut, gradient, problems

pytestmark = pytest.mark.skipif(not available(), reason="the emulator needs g++")

SHAPES = [*FAST, *SLOW, (270, 300)]
# Squares are non-negative, so errors of sums are relative. A column's partial sum over a warp's rows takes 32
# additions in fp32, the first of them exact, and one rounding of the tile's sum out of fp64; a row's takes
# 3 + 5. Partial sums are added in fp64. That is at most 32 roundings of 2^-24 each; the few more of
# a mean and its decay, which the reference has too, are well within what no sum of 32 comes near.
BOUND = 2.0**-19
MEANS = ("exp_avg_sq_row_mean", "exp_avg_sq_col_mean", "exp_avg_sq_mean")

factored = partial(
    shard4bit.AdamW4bit, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, second_moment="factored"
)


def near(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=BOUND, atol=0, equal_nan=True)


def agree(twins: Twins) -> None:
    """All but the means, and what follows from them, has the same bits."""
    for p, q in zip(twins.expected, twins.found, strict=True):
        for key in MEANS:
            if key in twins.reference.state[p]:
                near(twins.served.state[q][key], twins.reference.state[p][key])
        size = 2.0**-7 if p.dtype == torch.bfloat16 else 2.0**-10 if p.dtype == torch.float16 else 1e-5
        torch.testing.assert_close(q.detach(), p.detach(), rtol=size, atol=1e-6, equal_nan=True)
    exact = {"exp_avg_codes", "exp_avg_absmax", "exp_avg", "exp_avg_sq", "step"}
    assert not [d for d in twins.differences() if d[2] in exact]
    kept = {i for i, p in enumerate(twins.expected) if p.dim() < 2 or p.numel() <= 4096}
    assert not [d for d in twins.differences() if d[0] in kept]


@pytest.mark.parametrize("mix", MIXES, ids=lambda m: "-".join(str(d)[6:] for d in m))
def test_dtypes(mix: tuple[torch.dtype, torch.dtype]) -> None:
    twins = Twins(starts(SHAPES, mix[0]), factored, emulated(), grad_dtype=mix[1])
    for step in range(1, 4):
        twins.step(grads(SHAPES, step, mode=MIXES.index(mix)))
        agree(twins)


def test_memory_off_boundaries() -> None:
    shapes = SHAPES[:6]
    twins = Twins(starts(shapes), factored, emulated(), place=shifted)
    for step in range(1, 4):
        twins.step([None if (i + step) % 3 == 0 else g for i, g in enumerate(grads(shapes, step))])
        agree(twins)


def test_values_that_are_not_finite() -> None:
    """They reach the means of their row and column, and the overall one, as in the reference."""
    shapes = [(70, 256), (61, 131)]
    for special in ("nan", "inf", "-inf"):
        twins = Twins(starts(shapes), factored, emulated())
        for step in range(1, 5):
            twins.step(grads(shapes, step, specials=(special,), mode=4))
            for p, q in zip(twins.expected, twins.found, strict=True):
                for key in MEANS:
                    near(twins.served.state[q][key], twins.reference.state[p][key])
                assert torch.equal(p.isfinite(), q.isfinite())


def test_zeros_and_groups() -> None:
    shapes = [(40, 256), (41, 203)]
    twins = Twins(
        starts(shapes),
        factored,
        emulated(),
        grouped=lambda ps: [{"params": ps[:1], "maximize": True}, {"params": ps[1:], "betas": (0.5, 0.0)}],
    )
    for step, factor in enumerate((0.0, 1.0, 0.0), start=1):
        twins.step([factor * g for g in grads(shapes, step, mode=2)])
        if factor == 0.0 and step == 1:
            assert twins.differences() == []
        agree(twins)


def test_sums_come_in_one_order() -> None:
    """Again, and in other orders of threads and blocks: the same bits."""
    results = []
    for order in (*ORDERS, ORDERS[0]):
        twins = Twins(starts(SHAPES), factored, emulated(order))
        for step in range(1, 3):
            twins.step(grads(SHAPES, step, mode=2))
        results.append([twins.served.state[q] | {"param": q.detach()} for q in twins.found])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert all(torch.equal(bits(a[key]), bits(b[key])) for key in a)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems())
def test_cuts(problem: dict[str, Any]) -> None:
    """Sums of sums of a cut are in another order than those of the whole, within the same bound."""
    problem = {**problem, "special": None, "dtype": torch.float32, "mode": 2}
    shape = problem["shape"]
    specs = [
        parse_spec("B128/DE", signed=True, argument="first"),
        parse_spec("factored", signed=False, argument="second"),
    ]
    rng = np.random.default_rng(problem["seed"])
    start = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
    whole = Rank.make(Slab.whole(shape), start, ADAMW.moments, specs, [])
    ranks = [Rank.make(slab, start, ADAMW.moments, specs, groups) for slab, groups in cut(problem)]
    for rank in ranks:
        rank.backend = emulated()
    for step in range(1, 4):
        grad, h = gradient(problem, step), adamw_scalars(step)
        whole.step(ADAMW, grad, h)
        in_threads([partial(r.step, ADAMW, grad, h) for r in ranks])
    for moment, suffix in ((0, "codes"), (0, "absmax"), (1, "row_mean"), (1, "col_mean"), (1, "mean")):
        expected = whole.moments[moment].tensors[suffix]
        found = assemble(ranks, f"{ADAMW.moments[moment]}_{suffix}").reshape(expected.shape)
        if moment == 0:
            assert torch.equal(bits(found), bits(expected))
        else:
            near(found, expected)
    for rank in ranks:
        expected = take(whole.param.view(shape), rank.slab)
        torch.testing.assert_close(rank.param, expected, rtol=1e-5, atol=1e-6)
