"""Values at the edges: NaN and Inf stay visible, zeros stay exact; and the memory that a step takes."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shard4bit import AdamW4bit, SGD4bit, reference
from shard4bit.reference import CPU_CHUNK
from shard4bit.spec import FIRST_MOMENTS, SECOND_MOMENTS
from tests.optim.helpers import assert_same, copied, fill_grads, normal, run, snapshot

SHAPE = (70, 300)


def adamw(second: str, first: str = "B128/DE") -> tuple[nn.Parameter, Any]:
    param = nn.Parameter(normal(SHAPE, 1).clone())
    optimizer = AdamW4bit([param], lr=0.01, second_moment=second, first_moment=first)
    run([param], optimizer, range(2))
    return param, optimizer


# ---- NaN and Inf ------------------------------------------------------------------------------------


def reach(spec: str, row: int, col: int) -> tuple[Any, ...]:
    """The elements that share a scale with one element (for rank-1: only they may be lost)."""
    if spec == "fp32":
        return (row, col)
    if spec.startswith("B128"):
        return (row, slice(col // 128 * 128, col // 128 * 128 + 128))
    return (row,) if spec.startswith("B2048") else (slice(None),)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("second", SECOND_MOMENTS)
def test_a_bad_gradient_shows_in_the_moments(second: str, bad: float) -> None:
    """At its element, and for NaN ever after; elsewhere only where the scale is shared."""
    param, optimizer = adamw(second)
    row, col = 12, 140
    fill_grads([param], 5)
    assert param.grad is not None
    param.grad[row, col] = bad
    optimizer.step()
    for name, spec in (("exp_avg", "B128/DE"), ("exp_avg_sq", second)):
        values = optimizer.moment(param, name)
        assert not values[row, col].isfinite(), (name, values[row, col])
        if spec.startswith("Rank-1") or spec == "factored":
            continue
        elsewhere = torch.ones(SHAPE, dtype=torch.bool)
        elsewhere[reach(spec, row, col)] = False
        assert values[elsewhere].isfinite().all(), name
    run([param], optimizer, range(6, 9))
    for name in ("exp_avg", "exp_avg_sq"):
        assert not optimizer.moment(param, name)[row, col].isfinite()
    assert param[row, col].isnan()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_shows_in_the_momentum(bad: float) -> None:
    param = nn.Parameter(normal(SHAPE, 1).clone())
    optimizer = SGD4bit([param])
    fill_grads([param], 5)
    assert param.grad is not None
    param.grad[3, 4] = bad
    optimizer.step()
    values = optimizer.moment(param, "momentum_buffer")
    assert not values[3, 4].isfinite() and not param[3, 4].isfinite()
    assert values[3, 128:].isfinite().all() and values[4:].isfinite().all()
    assert param[3, 128:].isfinite().all() and param[4:].isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rank1_loses_only_what_min_of_row_and_column_loses(bad: float) -> None:
    """scale = min(row, column): NaN wins over both, so it takes its row and column; Inf only where both
    are infinite."""
    param, optimizer = adamw("rank1")
    fill_grads([param], 5)
    assert param.grad is not None
    param.grad[12, 140] = bad
    optimizer.step()
    lost = ~optimizer.moment(param, "exp_avg_sq").isfinite()
    expected = torch.zeros(SHAPE, dtype=torch.bool)
    expected[12, 140] = True
    if bad != bad:
        expected[12], expected[:, 140] = True, True
    assert torch.equal(lost, expected)


# ---- zeros ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["B128/DE", "Tensor/DE", "B2048/DE/8"])
@pytest.mark.parametrize("second", SECOND_MOMENTS)
def test_zero_gradients_leave_zero_states(first: str, second: str) -> None:
    """Codes 0, scales 0, values 0 from the first step on, though no code but DE's means 0."""
    param = nn.Parameter(torch.ones(SHAPE))
    optimizer = AdamW4bit([param], lr=0.5, weight_decay=0.5, first_moment=first, second_moment=second)
    for steps in (1, 2):
        param.grad = torch.zeros(SHAPE)
        optimizer.step()
        for key, tensor in optimizer.state[param].items():
            assert (int(tensor) == steps) if key == "step" else not tensor.any(), key
        for name in ("exp_avg", "exp_avg_sq"):
            assert (optimizer.moment(param, name) == 0).all()
    assert torch.equal(param, torch.full(SHAPE, 0.75 * 0.75))


@pytest.mark.parametrize("first", [n for n in FIRST_MOMENTS if n.startswith("B128")])
@pytest.mark.parametrize("second", ["B128/DE", "B128/DE-0", "B128/Linear", "Rank-1/DE-0", "Rank-1/Linear"])
def test_zero_blocks_rows_and_columns_stay_zero(first: str, second: str) -> None:
    """Among others that are not: the second block of every row, row 7, and column 33."""
    param = nn.Parameter(normal(SHAPE, 2).clone())
    optimizer = AdamW4bit([param], weight_decay=0.0, first_moment=first, second_moment=second)
    start = param.detach().clone()
    zero = torch.zeros(SHAPE, dtype=torch.bool)
    zero[:, 128:256] = True
    zero[7] = True
    if second.startswith("Rank-1"):
        zero[:, 33] = True
    for seed in range(3):
        fill_grads([param], seed)
        assert param.grad is not None
        param.grad[zero] = 0
        optimizer.step()
    state = optimizer.state[param]
    assert (optimizer.moment(param, "exp_avg_sq")[zero] == 0).all()
    assert (optimizer.moment(param, "exp_avg_sq")[~zero] > 0).float().mean() > 0.5
    assert torch.equal(param[zero], start[zero])
    blocks = {"exp_avg": first, "exp_avg_sq": second}
    for name, spec in blocks.items():
        codes = state[f"{name}_codes"]
        if spec.startswith("B128"):
            assert (state[f"{name}_absmax"][:, 1] == 0).all() and (state[f"{name}_absmax"][7] == 0).all()
            assert (state[f"{name}_absmax"][:7, 0] > 0).all()
            assert (codes[:, 64:128] == 0).all() and (codes[7] == 0).all()
            assert codes[:7, :64].any()
        else:
            assert (state[f"{name}_row_max"] == 0).nonzero().view(-1).tolist() == [7]
            columns = [33, *range(128, 256)]
            assert (state[f"{name}_col_max"] == 0).nonzero().view(-1).tolist() == columns
            assert (codes[:, 64:128] == 0).all() and (codes[7] == 0).all()
            assert (codes[:, 16] >> 4 == 0).all() and (codes[:7, 16] & 15).any()  # column 33 is a high nibble


def test_below_the_smallest_normal_is_zero() -> None:
    """A block whose largest magnitude is subnormal has no usable reciprocal: it is stored as zeros."""
    param = nn.Parameter(torch.zeros(SHAPE))
    optimizer = SGD4bit([param], momentum=0.5)
    param.grad = torch.full(SHAPE, 2.0**-127)
    param.grad[0, :128] = 2.0**-126
    optimizer.step()
    values = optimizer.moment(param, "momentum_buffer")
    assert (values[0, :128] == 2.0**-126).all()
    assert (values[1:] == 0).all() and (values[0, 128:] == 0).all()
    codes = optimizer.state[param]["momentum_buffer_codes"]
    assert (codes[0, :64] == 0xFF).all() and not codes[0, 64:].any() and not codes[1:].any()


# ---- memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [333, *(pytest.param(n, marks=pytest.mark.slow) for n in (50, 1000))])
@pytest.mark.parametrize(
    "names", [("B128/DE", "rank1"), ("B7/DE", "B10/DE-0/8"), ("Tensor/DE", "fp32")], ids=str
)
def test_chunks_do_not_show(names: tuple[str, str], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows shorter and longer than a chunk, blocks across its ends: the bits of one pass over all."""
    for shape in (SHAPE, (21, 1001), (2, 3001)):
        a, b = copied([nn.Parameter(normal(shape, 1).clone())] * 2)
        first, second = (AdamW4bit([p], first_moment=names[0], second_moment=names[1]) for p in (a, b))
        run([a], first, range(3))
        with monkeypatch.context() as patch:
            patch.setattr(reference, "CPU_CHUNK", chunk)
            run([b], second, range(3))
            assert torch.equal(second.moment(b, "exp_avg"), first.moment(a, "exp_avg"))
        assert_same(snapshot([a], first), snapshot([b], second))


class Allocations(TorchDispatchMode):
    """Bytes of freshly allocated outputs: the largest, and the most that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.alive = self.peak = 0
        self.users: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {place(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._watch(tensor, fresh=place(tensor) not in given)
        return out

    def _watch(self, tensor: Tensor, fresh: bool) -> None:
        where, size = place(tensor), tensor.untyped_storage().nbytes()
        if fresh and where not in self.users:
            self.largest = max(self.largest, size)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            self.users[where] = 0
        if where in self.users:
            self.users[where] += 1
            weakref.finalize(tensor, self._forget, where, size)

    def _forget(self, where: int, size: int) -> None:
        self.users[where] -= 1
        if self.users[where] == 0:
            del self.users[where]
            self.alive -= size


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def measured(optimizer: torch.optim.Optimizer, param: Tensor) -> Allocations:
    """What the second step allocates (the first also makes the states)."""
    param.grad = torch.full_like(param, 1e-3)
    optimizer.step()
    with Allocations() as seen:
        optimizer.step()
    return seen


CHUNK = 4 * CPU_CHUNK  # bytes
BIG: list[tuple[Any, tuple[int, ...], dict[str, Any]]] = [
    (AdamW4bit, (4096, 4096), {}),
    (AdamW4bit, (2048, 2048), {"second_moment": "block"}),
    (AdamW4bit, (2048, 2048), {"second_moment": "factored", "first_moment": "Tensor/DE"}),
    (AdamW4bit, (2048, 2048), {"first_moment": "B2048/DE/8", "second_moment": "B2048/DE/8"}),
    (AdamW4bit, (2048, 2048), {"quantize": False}),
    (AdamW4bit, (4 << 20,), {}),
    (AdamW4bit, (64, 128, 32, 16), {}),
    (AdamW4bit, (8, 1 << 19), {}),
    (AdamW4bit, (1, 4 << 20), {"second_moment": "block"}),
    (AdamW4bit, (3, 1400001), {"first_moment": "B7/DE", "second_moment": "B36/Linear"}),
    (SGD4bit, (2048, 2048), {"nesterov": True, "weight_decay": 0.1}),
    (SGD4bit, (2048, 2048), {"momentum": 0}),
]


@pytest.mark.parametrize(("cls", "shape", "hyper"), BIG, ids=str)
def test_a_step_takes_a_few_chunks_of_memory(cls: Any, shape: tuple[int, ...], hyper: dict[str, Any]) -> None:
    """A float64 chunk is the largest; beside the chunks there are a few statistics of rows, columns and
    blocks. Never anything of the parameter's size, which is 16 chunks and more."""
    param = nn.Parameter(torch.ones(shape))
    optimizer = cls([param], **hyper)
    seen = measured(optimizer, param)
    state = optimizer.state[param].items()
    statistics = sum(4 * t.numel() for key, t in state if key.endswith(("max", "mean")))
    size = param.numel() * 4
    assert 0 < seen.largest <= max(2 * CHUNK, statistics) < size / 4
    assert seen.peak <= 9 * CHUNK + 4 * statistics and seen.peak < size


def test_the_meter_sees_what_torch_allocates() -> None:
    param = nn.Parameter(torch.ones(2048, 2048))
    seen = measured(torch.optim.AdamW([param], foreach=False), param)
    size = param.numel() * 4
    assert seen.largest == size and 2 * size <= seen.peak <= 4 * size
