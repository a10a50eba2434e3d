"""Whole optimizers stepped by the emulated kernels and by the reference: the same bits, whatever the dtypes,
shapes, memory and options."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import shard4bit
from shard4bit.cuda.backend import KernelBackend
from shard4bit.maths.mapping import midpoints
from tests.covering import covering
from tests.cuda.emulator import ORDERS, SHUFFLED, available
from tests.cuda.runtime import EmulatorRuntime, Twins, emulated
from tests.oracle import PAPER
from tests.test_invariance import gradient

pytestmark = pytest.mark.skipif(not available(), reason="the emulator needs g++")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
MIXES = [(F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)]
# Whole lanes: columns in several tiles, a half-filled last one, rows in several tiles and in no whole warp.
FAST = [(70, 256), (40, 384), (33, 640), (300, 128)]
# Odd widths, three columns, five dimensions, fp32 moments (small, and more than a flat tile of 16384).
SLOW = [(61, 131), (1400, 3), (3, 5, 4, 7, 11), (40, 104), (77,), (5, 6), (16385,)]
ADAMW = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
KINDS = {
    "rank1": partial(shard4bit.AdamW4bit, second_moment="rank1", **ADAMW),
    "block": partial(shard4bit.AdamW4bit, second_moment="block", **ADAMW),
    "sgd": partial(shard4bit.SGD4bit, lr=0.1, weight_decay=0.01, dampening=0.1),
    "nesterov": partial(shard4bit.SGD4bit, lr=0.1, weight_decay=0.01, nesterov=True),
}


def grads(
    shapes: Sequence[tuple[int, ...]], step: int, specials: Sequence[str | None] = (None,), mode: int = 0
) -> list[torch.Tensor]:
    """Gradients of many kinds (tests/test_invariance.py): the i-th parameter's of mode + i. ``specials`` come
    in turns at step 3."""
    out = []
    for i, shape in enumerate(shapes):
        rows = shape[0] if len(shape) > 1 else 1
        problem = {
            "shape": (rows, int(np.prod(shape)) // rows),
            "seed": 100 * mode + i,
            "mode": (mode + i) % 5,
            "special": specials[i % len(specials)],
            "dtype": F32,
        }
        out.append(gradient(problem, step).view(shape))
    return out


def starts(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = F32) -> list[torch.Tensor]:
    rng = np.random.default_rng(5)
    return [torch.from_numpy(rng.standard_normal(s).astype(np.float32)).to(dtype) for s in shapes]


def shifted(tensor: torch.Tensor, by: int = 1) -> torch.Tensor:
    """A copy some elements off every boundary."""
    out = torch.empty(tensor.numel() + by, dtype=tensor.dtype)[by:].view(tensor.shape)
    return out.copy_(tensor)


def agree(twins: Twins, shapes: Sequence[tuple[int, ...]], steps: int = 3, **how: Any) -> None:
    for step in range(1, steps + 1):
        twins.step(grads(shapes, step, **how))
        assert twins.differences() == [], step


# ---- dtypes, shapes, memory ----


@pytest.mark.parametrize("mix, kind", covering(MIXES, ["rank1", "block", "sgd"]), ids=str)
def test_dtypes(mix: tuple[torch.dtype, torch.dtype], kind: str) -> None:
    shapes = FAST + SLOW
    twins = Twins(starts(shapes, mix[0]), KINDS[kind], emulated(), grad_dtype=mix[1])
    agree(twins, shapes, mode=MIXES.index(mix), specials=(None, "nan", "inf", None, "-inf"))


@pytest.mark.parametrize("order", ORDERS[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_orders(kind: str, order: int) -> None:
    shapes = [*FAST[1:], *SLOW]
    agree(Twins(starts(shapes, BF16), KINDS[kind], emulated(order)), shapes, steps=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("by", [1, 2])
def test_memory_off_boundaries(by: int, dtype: torch.dtype, kind: str) -> None:
    shapes = [(70, 256), (61, 131), (5000,)]
    twins = Twins(starts(shapes, dtype), KINDS[kind], emulated(), place=partial(shifted, by=by))
    size = torch.empty(0, dtype=dtype).element_size()
    assert all(p.data_ptr() % 16 == by * size % 16 for p in twins.found)
    agree(twins, shapes, steps=2)


@pytest.mark.parametrize("kind", ["rank1", "block", "sgd"])
def test_only_gradients_off_boundaries(kind: str) -> None:
    shapes = [(70, 256), (40, 384)]
    twins = Twins(starts(shapes), KINDS[kind], emulated())
    twins.place = shifted
    agree(twins, shapes, steps=2)


def test_tensors_that_are_not_dense() -> None:
    """The step works on dense copies and writes them back."""
    shapes = [(64, 128), (64, 129)]
    twins = Twins(starts(shapes), KINDS["rank1"], emulated())
    twins.place = lambda t: t.t().contiguous().t()
    for param in twins.found:
        param.data = twins.place(param.data)
        assert not param.is_contiguous()
    agree(twins, shapes, steps=2)


# ---- which parameters take part ----


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_come_and_go(kind: str) -> None:
    shapes = [*FAST[:2], *SLOW[:2], (77,), (4097,)]
    twins = Twins(starts(shapes), KINDS[kind], emulated())
    for step in range(1, 6):
        given: list[torch.Tensor | None] = [*grads(shapes, step)]
        for i in range(len(shapes)):
            if (i + step) % 3 == 0 or step == 4:
                given[i] = None
        twins.step(given)
        assert twins.differences() == [], step


def test_gradients_that_change_dtype() -> None:
    shapes = FAST[:2]
    twins = Twins(starts(shapes), KINDS["rank1"], emulated())
    for step, dtypes in enumerate(([F32, F32], [F32, BF16], [F16, F16], [F32, F32]), start=1):
        for params in (twins.expected, twins.found):
            for param, dtype in zip(params, dtypes, strict=True):
                param.grad = None
                param.grad_dtype = dtype
        twins.step(grads(shapes, step))
        assert twins.differences() == [], step


def test_parameters_of_several_dtypes_and_kinds() -> None:
    shapes = [*FAST, *SLOW]
    dtypes = [F32, BF16, F16]
    begin = [s.to(dtypes[i % 3]) for i, s in enumerate(starts(shapes))]
    seconds = ["rank1", "block", "rank1", "Rank-1/DE", "B64/Linear"]
    options = [{"quantize": i != 3, "second_moment": seconds[i % 5]} for i in range(len(shapes))]
    twins = Twins(
        begin,
        KINDS["rank1"],
        emulated(),
        grouped=lambda ps: [{"params": [p], **o} for p, o in zip(ps, options, strict=True)],
    )
    agree(twins, shapes)


def test_states_that_are_loaded() -> None:
    """The tables of a step follow states and parameters to new memory."""
    shapes = FAST[:2] + SLOW[:2]
    twins = Twins(starts(shapes), KINDS["rank1"], emulated())
    agree(twins, shapes, steps=2)
    saved = twins.reference.state_dict()
    twins.served.load_state_dict(saved)
    for q in twins.found:
        q.data = shifted(q.data)
    twins.step(grads(shapes, 3))
    assert twins.differences() == []


# ---- options ----


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_groups(kind: str, maximize: bool) -> None:
    """Groups of other hyper-parameters, step counts, and directions, in one launch."""
    shapes = [*FAST, *SLOW]
    groups: list[dict[str, Any]]
    if kind in ("rank1", "block"):
        groups = [
            {"lr": 0.0, "maximize": maximize},
            {"eps": 1.0},
            {"eps": 0.0, "betas": (0.0, 0.0), "weight_decay": 0.0},
            {"betas": (0.9, 0.999), "lr": 1e5, "weight_decay": 0.0},
            {"betas": (0.5, 0.24), "maximize": not maximize},
        ]
    else:
        groups = [
            {"lr": 0.0, "maximize": maximize},
            {"momentum": 1.0, "weight_decay": 0.0},
            {"momentum": 0.5, "maximize": not maximize},
        ]
    count = len(groups)

    def grouped(params: list[Any]) -> list[Any]:
        return [{"params": params[i::count], **groups[i]} for i in range(count)]

    twins = Twins(starts(shapes), KINDS[kind], emulated(SHUFFLED), grouped)
    for step in range(1, 4):
        given: list[torch.Tensor | None] = [*grads(shapes, step, specials=(None, None, "inf"))]
        if step == 1:  # later steps find other counts, of one group too
            given[1] = given[4] = given[8] = None
        twins.step(given)
        assert twins.differences() == [], step


@pytest.mark.parametrize("kind", ["rank1", "block", "sgd"])
def test_options_that_change_between_steps(kind: str) -> None:
    shapes = [(33, 256), (40, 104), (16385,)]
    twins = Twins(starts(shapes), KINDS[kind], emulated())
    for step, change in enumerate(({}, {"lr": 0.5}, {"maximize": True}, {"weight_decay": 0.0}), start=1):
        for optimizer in (twins.reference, twins.served):
            optimizer.param_groups[0].update(change)
        twins.step(grads(shapes, step))
        assert twins.differences() == [], step


@pytest.mark.parametrize("kind", KINDS)
def test_large_fp32_moments(kind: str) -> None:
    shapes = [(300, 128), (130, 127), (16384,), (16383,), (32769,), (1,)]
    agree(Twins(starts(shapes), partial(KINDS[kind], quantize=False), emulated()), shapes, steps=2)


# ---- values ----


def extremes(shape: tuple[int, int], step: int) -> list[torch.Tensor]:
    """Gradients at both ends of fp32, by rows and by elements, with signed zeros."""
    rng = np.random.default_rng(step)
    powers = rng.integers(-149, 128, shape)
    by_element = np.ldexp(rng.choice([-1.0, 1.0], shape), powers)
    by_row = np.ldexp(rng.uniform(1, 2, shape), rng.integers(-149, 127, (shape[0], 1)))
    # squares on both sides of 2^-126 and of the ranges of the unchecked root and quotient (arith.cuh)
    near = np.ldexp(rng.uniform(1, 2, shape), rng.choice([-63, -64, -50, -51, -80, -40, 20, 19, 21], shape))
    near[0] = rng.choice([0.0, -0.0], shape[1])
    equal = np.full(shape, -(2.0**-30))
    return [torch.from_numpy(x.astype(np.float32)) for x in (by_element, by_row, near, equal)]


@pytest.mark.parametrize("shape", [(40, 256), (41, 203)])
@pytest.mark.parametrize("kind", KINDS)
def test_extremes(kind: str, shape: tuple[int, int]) -> None:
    make = KINDS[kind]
    if kind in ("rank1", "block"):
        make = partial(make, betas=(0.5, 0.25))
    begin = starts([shape] * 4)
    twins = Twins(begin, make, emulated())
    for step in range(1, 5):
        twins.step(extremes(shape, step))
        assert twins.differences() == [], step


@pytest.mark.parametrize("second", ["rank1", "block"])
@pytest.mark.parametrize("width", [256, 203])
def test_ties(second: str, width: int) -> None:
    """Values on the midpoints between codes and beside them, under scales that are powers of two."""
    first = np.array(midpoints("de", 4, True), np.float32)
    squares = np.sqrt(np.array(midpoints("linear", 4, False))).astype(np.float32)
    around = [np.nextafter(x, np.float32(to)) for x in (first, squares) for to in (-2, 2)]
    palette = np.concatenate([first, squares, *around])
    rng = np.random.default_rng(1)
    make = partial(shard4bit.AdamW4bit, lr=1e-2, betas=(0.5, 0.75), second_moment=second)
    twins = Twins(starts([(40, width)]), make, emulated())
    for step in range(1, 5):
        grad = palette[rng.integers(0, len(palette), (40, width))]
        grad[:, ::64] = grad[0] = 1.0
        twins.step([torch.from_numpy(grad)])
        assert twins.differences() == [], step


@pytest.mark.parametrize("kind", KINDS)
def test_zeros(kind: str) -> None:
    """Nothing but zeros, then one element, then zeros again."""
    shapes = [(40, 256), (41, 203), (33, 3)]
    twins = Twins(starts(shapes), KINDS[kind], emulated())
    for step in range(1, 5):
        given = [torch.zeros(s) for s in shapes]
        if step == 2:
            for grad in given:
                grad[-1, -1] = 1e-20
        twins.step(given)
        assert twins.differences() == [], step


def test_the_twins_can_differ() -> None:
    """A kernel that gives values on a midpoint the upper code shows."""
    shapes = [(70, 256)]
    source = "return y > mid ? a + 4 : a;"

    class Broken(EmulatorRuntime):
        def run(self, text: str, name: str, *args: Any) -> None:
            assert source in text or name != "apply"
            super().run(text.replace(source, source.replace(">", ">=")), name, *args)

    make = partial(shard4bit.AdamW4bit, lr=1e-2, betas=(0.5, 0.75), second_moment="block", **PAPER)
    twins = Twins(starts(shapes), make, KernelBackend(Broken()))
    grad = torch.full(shapes[0], midpoints("de", 4, True)[10])
    grad[:, ::128] = 1.0
    twins.step([grad])
    assert twins.differences() == [(0, (70, 256), "exp_avg_codes")]
