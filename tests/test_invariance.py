"""Sharding invariance: any cut of a matrix gives the bits of the uncut one (hypothesis)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shard4bit.layout import Neighbours, Slab
from shard4bit.maths.update import ADAMW, SGD
from shard4bit.reference import ReferenceBackend
from shard4bit.spec import parse_spec
from shard4bit.state import parts, state_key
from tests.simulate import Rank, ThreadGroup, assemble, in_threads, take

ADAMW_SPECS = [
    ("B128/DE", "rank1"),
    ("B128/DE", "block"),
    ("B5/DE", "B7/DE-0"),
    ("B2048/DE/8", "B2048/DE/8"),
    ("Tensor/DE", "Tensor/Linear"),
    ("fp32", "rank1"),
]
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def edges(n: int, cuts: list[float]) -> list[int]:
    """Boundaries of [0, n) at fractions of it; equal ones make empty parts."""
    return [0, *sorted(min(n, int(c * (n + 1))) for c in cuts), n]


@st.composite
def problems(draw: Any) -> dict[str, Any]:
    rows = draw(st.one_of(st.integers(1, 5), st.integers(6, 40)))
    cols = draw(st.one_of(st.sampled_from([1, 2, 3, 127, 128, 129, 255, 256, 300]), st.integers(1, 400)))
    fractions = st.lists(st.floats(0, 1), min_size=0, max_size=3)
    return {
        "shape": (rows, cols),
        "kind": draw(st.sampled_from(["run", "run", "rows", "cols", "grid"])),
        "row_cuts": draw(fractions),
        "col_cuts": draw(fractions),
        "mode": draw(st.integers(0, 4)),
        "special": draw(st.sampled_from([None, None, None, "nan", "inf"])),
        "seed": draw(st.integers(0, 2**31)),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
    }


def gradient(problem: dict[str, Any], step: int) -> torch.Tensor:
    """Many magnitudes, zero rows, columns and blocks, ties, and sometimes a NaN or an Inf."""
    rng = np.random.default_rng((problem["seed"], step))
    rows, cols = problem["shape"]
    x = rng.standard_normal((rows, cols))
    scale = {
        0: 1.0,
        1: 10.0 ** rng.uniform(-38, 2, (rows, cols)),
        2: 10.0 ** rng.uniform(-15, 5, (rows, 1)),
        3: 10.0 ** rng.uniform(-15, 5, (1, cols)),
        4: 1.0,
    }[problem["mode"]]
    x = np.round(x * 4) / 4 if problem["mode"] == 4 else x * scale
    if rng.random() < 0.4:
        x[rng.integers(rows)] = 0
    if rng.random() < 0.4:
        x[:, rng.integers(cols)] = 0
    if rng.random() < 0.3:
        x[rng.integers(rows) :, rng.integers(cols) // 128 * 128 :] = 0
    if problem["special"] and step == 3:
        x[rng.integers(rows), rng.integers(cols)] = float(problem["special"])
    return torch.from_numpy(x.astype(np.float32)).to(problem["dtype"])


def cut(problem: dict[str, Any]) -> list[tuple[Slab, list[tuple[ThreadGroup, Neighbours]]]]:
    """Slabs of simulated ranks, with their groups."""
    rows, cols = problem["shape"]
    row_edges, col_edges = edges(rows, problem["row_cuts"]), edges(cols, problem["col_cuts"])
    if problem["kind"] == "run":
        flat = edges(rows * cols, problem["row_cuts"] + problem["col_cuts"])
        group, near = ThreadGroup(len(flat) - 1), Neighbours("run", tuple(flat))
        return [(Slab.run((rows, cols), a, b), [(group, near)]) for a, b in zip(flat, flat[1:], strict=False)]
    if problem["kind"] == "rows":
        col_edges = [0, cols]
    if problem["kind"] == "cols":
        row_edges = [0, rows]
    by_row = [ThreadGroup(len(col_edges) - 1) for _ in row_edges[1:]]
    by_col = [ThreadGroup(len(row_edges) - 1) for _ in col_edges[1:]]
    out = []
    for i, (a, b) in enumerate(zip(row_edges, row_edges[1:], strict=False)):
        for j, (c, d) in enumerate(zip(col_edges, col_edges[1:], strict=False)):
            near: list[tuple[ThreadGroup, Neighbours]] = []
            if len(row_edges) > 2:
                near.append((by_col[j], Neighbours("rows")))
            if len(col_edges) > 2:
                near.append((by_row[i], Neighbours("cols", tuple(col_edges))))
            out.append((Slab.box((rows, cols), [(a, b), (c, d)]), near))
    return out


def bits(x: torch.Tensor) -> torch.Tensor:
    x = torch.where(x.isnan(), torch.nan, x) if x.is_floating_point() else x
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def run(
    rule: Any,
    problem: dict[str, Any],
    specs: list[Any],
    scalars: Any,
    steps: int = 4,
    backend: Callable[[], Any] = ReferenceBackend,
    device: str = "cpu",
) -> None:
    """Step the whole matrix (by the reference) and its cut (by ``backend``) side by side and compare
    everything after each step."""
    names, shape = rule.moments, problem["shape"]
    rng = np.random.default_rng(problem["seed"])
    start = torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(problem["dtype"])
    whole = Rank.make(Slab.whole(shape), start, names, specs, [])
    ranks = [Rank.make(slab, start, names, specs, near, device) for slab, near in cut(problem)]
    for rank in ranks:
        rank.backend = backend()
    assert sum(r.slab.numel for r in ranks) == start.numel()
    for step in range(1, steps + 1):
        grad, h = gradient(problem, step), scalars(step)
        whole.step(rule, grad, h)
        in_threads([partial(r.step, rule, grad, h) for r in ranks])
        for rank in ranks:
            assert torch.equal(bits(rank.param.cpu()), bits(take(whole.param.view(shape), rank.slab))), step
        for moment in whole.moments:
            for part in parts(moment.spec):
                expected = moment.tensors[part.suffix]
                found = assemble(ranks, state_key(moment.name, part.suffix)).reshape(expected.shape)
                assert torch.equal(bits(found), bits(expected)), (step, moment.name, part.suffix)


def adamw_scalars(step: int, *, compensate: bool = False, rounding: str = "nearest") -> Any:
    group = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "compensate": compensate}
    return ADAMW.scalars({**group, "rounding": rounding}, step)


def sgd_scalars(step: int, *, compensate: bool = False) -> Any:
    group = {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01, "nesterov": False}
    return SGD.scalars({**group, "compensate": compensate}, step)


COMPENSATED = {("B128/DE", "rank1"), ("Tensor/DE", "Tensor/Linear")}  # of the quick tests


@pytest.mark.parametrize(
    ("names", "compensate"),
    [
        pytest.param(
            names,
            compensate,
            id="+".join(names) + ("-compensated" if compensate else ""),
            marks=[pytest.mark.slow] if compensate and names not in COMPENSATED else [],
        )
        for names in ADAMW_SPECS
        for compensate in (False, True)
    ],
)
@QUICK
@given(problem=problems())
def test_adamw_is_the_same_for_every_cut(
    names: tuple[str, str], compensate: bool, problem: dict[str, Any]
) -> None:
    specs = [
        parse_spec(names[0], signed=True, argument="first"),
        parse_spec(names[1], signed=False, argument="second"),
    ]
    run(ADAMW, problem, specs, partial(adamw_scalars, compensate=compensate))


@pytest.mark.parametrize("second", ["rank1", pytest.param("block", marks=pytest.mark.slow), "B37/Linear/8"])
@QUICK
@given(problem=problems())
def test_stochastic_rounding_is_the_same_for_every_cut(second: str, problem: dict[str, Any]) -> None:
    specs = [
        parse_spec("B128/DE", signed=True, argument="first"),
        parse_spec(second, signed=False, argument="second"),
    ]
    run(ADAMW, problem, specs, partial(adamw_scalars, rounding="stochastic"))


@pytest.mark.parametrize("compensate", [False, True], ids=["plain", "compensated"])
@QUICK
@given(problem=problems())
def test_sgd_is_the_same_for_every_cut(compensate: bool, problem: dict[str, Any]) -> None:
    spec = parse_spec("B128/DE", signed=True, argument="momentum_buffer")
    run(SGD, problem, [spec], partial(sgd_scalars, compensate=compensate))


@QUICK
@given(problem=problems())
def test_factored_is_the_same_up_to_the_order_of_sums(problem: dict[str, Any]) -> None:
    """Sums are in float64: a statistic of n terms is off by n 2^-53 and one fp32 rounding a step."""
    problem = {**problem, "special": None, "dtype": torch.float32, "mode": 2}
    shape, rng = problem["shape"], np.random.default_rng(problem["seed"])
    specs = [
        parse_spec("fp32", signed=True, argument="first"),
        parse_spec("factored", signed=False, argument="second"),
    ]
    start = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
    whole = Rank.make(Slab.whole(shape), start, ADAMW.moments, specs, [])
    ranks = [Rank.make(slab, start, ADAMW.moments, specs, near) for slab, near in cut(problem)]
    for step in range(1, 5):
        grad, h = gradient(problem, step), adamw_scalars(step)
        whole.step(ADAMW, grad, h)
        in_threads([partial(r.step, ADAMW, grad, h) for r in ranks])
    for suffix in ("row_mean", "col_mean", "mean"):
        expected = whole.moments[1].tensors[suffix]
        found = assemble(ranks, f"exp_avg_sq_{suffix}").reshape(expected.shape)
        torch.testing.assert_close(found, expected, rtol=4 * 2.0**-23, atol=0)
    for rank in ranks:
        expected = take(whole.param.view(shape), rank.slab)
        torch.testing.assert_close(rank.param, expected, rtol=1e-5, atol=1e-6)


def test_without_the_reduction_the_cut_shows() -> None:
    """The property can fail: ranks that do not reduce get other bits."""
    shape = (8, 200)
    start, grad = torch.randn(shape), torch.randn(shape)
    specs = [
        parse_spec("B128/DE", signed=True, argument="first"),
        parse_spec("rank1", signed=False, argument="second"),
    ]
    whole = Rank.make(Slab.whole(shape), start, ADAMW.moments, specs, [])
    half = Rank.make(Slab.run(shape, 0, 900), start, ADAMW.moments, specs, [(_Nobody(), _RUN)])
    whole.step(ADAMW, grad, adamw_scalars(1))
    half.step(ADAMW, grad, adamw_scalars(1))
    assert not torch.equal(half.moments[1].tensors["codes"][:4], whole.moments[1].tensors["codes"][:4])


_RUN = Neighbours("run", (0, 900, 1600))


class _Nobody:
    def all_reduce(self, vector: torch.Tensor, *, maximum: bool) -> None:
        """Leaves this rank's own values."""
