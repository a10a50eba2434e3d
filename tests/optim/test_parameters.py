"""Every kind of parameter: shapes, strides, dtypes, devices, frozen ones, ones without a gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shard4bit import AdamW4bit, LayoutError, SGD4bit
from tests import oracle
from tests.covering import covering
from tests.optim.helpers import (
    assert_same,
    copied,
    fill_grads,
    model_of,
    normal,
    options,
    run,
    same_bits,
    snapshot,
)

ADAMW: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SGD: dict[str, Any] = {
    "lr": 0.1,
    "momentum": 0.9,
    "dampening": 0.1,
    "nesterov": False,
    "weight_decay": 0.01,
}
FIRST = oracle.Spec(signed=True)
RANK1 = oracle.Spec(norm="rank1", mapping="linear")


# ---- shapes -----------------------------------------------------------------------------------------

VIEWS = {
    (65, 64): (65, 64),
    (9, 5, 100): (45, 100),
    (8, 16, 400): (128, 400),
    (64, 8, 3, 3): (64, 72),
    (8, 64, 3, 3): (512, 9),
    (2, 3, 30, 31): (180, 31),
    (1, 5000): (1, 5000),
    (5000, 1): (5000, 1),
}


@pytest.mark.parametrize("shape", VIEWS, ids=str)
def test_tensors_of_any_dimensions_are_matrices(shape: tuple[int, ...]) -> None:
    """Bit for bit the oracle's run on the matrix; the state keeps the dimensions of rows and columns."""
    rows, cols = VIEWS[shape]
    param = nn.Parameter(normal(shape, 1).clone())
    optimizer = AdamW4bit([param], **ADAMW)
    matrix, reference = normal(shape, 1).numpy().reshape(rows, cols), oracle.OracleAdamW(shape, FIRST, RANK1)
    for seed in range(3):
        fill_grads([param], seed)
        assert param.grad is not None
        grad = param.grad.numpy().reshape(rows, cols)
        optimizer.step()
        matrix = reference.step(matrix, grad, **ADAMW)
    assert same_bits(param.detach().reshape(rows, cols), torch.from_numpy(matrix))
    state = optimizer.state[param]
    for key, value in reference.state.items():
        if key != "step":
            flat = torch.from_numpy(np.asarray(value)).reshape(-1)
            assert same_bits(state[key].reshape(-1), flat), key
    split = next(s for s in range(1, len(shape)) if int(np.prod(shape[:s])) == rows)
    assert state["exp_avg_codes"].shape == (*shape[:split], -(-cols // 2))
    assert state["exp_avg_absmax"].shape == (*shape[:split], -(-cols // 128))
    assert state["exp_avg_sq_row_max"].shape == shape[:split]
    assert state["exp_avg_sq_col_max"].shape == shape[split:]
    assert optimizer.moment(param, "exp_avg").shape == shape


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1)], ids=str)
def test_single_elements(shape: tuple[int, ...]) -> None:
    ours, theirs = (nn.Parameter(torch.full(shape, 0.5)) for _ in range(2))
    first, second = AdamW4bit([ours], **ADAMW), torch.optim.AdamW([theirs], **ADAMW)
    run([ours], first, range(3))
    run([theirs], second, range(3))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert first.moment(ours, "exp_avg").shape == shape


EMPTY = [(0,), (0, 5), (5, 0), (3, 0, 4), (0, 9000)]


@pytest.mark.parametrize(
    "shape, second", covering(EMPTY, ["rank1", "block", "factored", "Tensor/DE"]), ids=str
)
def test_empty_parameters_step_among_others(shape: tuple[int, ...], second: str) -> None:
    """They count steps as torch's do, and the others do not notice them."""
    empty, beside, alone = (nn.Parameter(normal(s, 2).clone()) for s in (shape, (80, 70), (80, 70)))
    cases: list[tuple[Any, dict[str, Any]]] = [(AdamW4bit, {"second_moment": second}), (SGD4bit, {})]
    for cls, hyper in cases:
        both, single = cls([empty, beside], **hyper), cls([alone], **hyper)
        for seed in range(2):
            fill_grads([empty, beside], seed)
            alone.grad = beside.grad
            both.step()
            single.step()
        assert_same(snapshot([beside], both), snapshot([alone], single))
        assert both.state[empty]["step"] == 2
        name = "exp_avg" if cls is AdamW4bit else "momentum_buffer"
        assert both.moment(empty, name).shape == shape
        both.load_state_dict(both.state_dict())


# ---- strides ----------------------------------------------------------------------------------------


def strided() -> dict[str, tuple[Tensor, Tensor]]:
    """Names -> (a tensor of unusual strides, the memory it lies in)."""
    wide, tall, conv = torch.zeros(90, 140), torch.zeros(70, 90), torch.zeros(16, 32, 4, 4)
    last = conv.contiguous(memory_format=torch.channels_last)
    block = torch.zeros(80, 6000)
    return {
        "transposed": (tall.t(), tall),
        "every other column": (wide[:, ::2], wide),
        "a window": (block[3:60, 100:260], block),
        "channels_last": (last, last),
        "permuted": (conv.permute(2, 0, 3, 1), conv),
    }


@pytest.mark.parametrize("kind", list(strided()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_change_nothing(kind: str, dtype: torch.dtype) -> None:
    """The same bits as a contiguous copy, in the parameter's own memory, and none written beside it."""
    values, memory = strided()[kind]
    memory = memory.to(dtype, memory_format=torch.preserve_format)
    values = torch.as_strided(memory, values.shape, values.stride(), values.storage_offset())
    values.copy_(normal(tuple(values.shape), 3))
    assert not values.is_contiguous()
    odd, plain = nn.Parameter(values), nn.Parameter(values.clone(memory_format=torch.contiguous_format))
    assert odd.data_ptr() == values.data_ptr() and plain.is_contiguous()
    for cls in (AdamW4bit, SGD4bit):
        first, second = cls([odd], lr=0.1), cls([plain], lr=0.1)
        inside = memory.clone()
        for seed in range(3):
            fill_grads([plain], seed)
            assert plain.grad is not None
            odd.grad = torch.empty_like(odd).copy_(plain.grad)
            if seed == 1:
                odd.grad = plain.grad  # contiguous, unlike the parameter
            first.step()
            second.step()
        assert odd.data_ptr() == values.data_ptr() and odd.stride() == values.stride()
        assert_same(snapshot([odd], first), snapshot([plain], second))
        touched = torch.zeros_like(memory, dtype=torch.bool)
        torch.as_strided(touched, values.shape, values.stride(), values.storage_offset()).fill_(True)
        assert torch.equal(memory[~touched], inside[~touched])
        assert not torch.equal(memory, inside)


def test_channels_last_model_trains_as_a_contiguous_one() -> None:
    torch.manual_seed(0)
    plain: Any = nn.Sequential(nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3))
    last: Any = nn.Sequential(nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3))
    last.load_state_dict(plain.state_dict())
    last.to(memory_format=torch.channels_last)
    first, second = AdamW4bit(plain.parameters()), AdamW4bit(last.parameters())
    for seed in range(3):
        fill_grads(plain.parameters(), seed)
        for a, b in zip(plain.parameters(), last.parameters(), strict=True):
            assert a.grad is not None
            b.grad = a.grad.clone(memory_format=torch.channels_last) if a.ndim == 4 else a.grad.clone()
        first.step()
        second.step()
    assert last[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert first.state[plain[0].weight]["exp_avg_codes"].dtype == torch.uint8
    assert_same(snapshot(plain.parameters(), first), snapshot(last.parameters(), second))


# ---- dtypes -----------------------------------------------------------------------------------------


def narrowed(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float32 values after one rounding to ``dtype``, without torch."""
    if dtype == torch.bfloat16:
        return oracle.from_bf16(oracle.to_bf16(x))
    return x.astype(np.float16).astype(np.float32) if dtype == torch.float16 else x


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(61, 131), (37, 5), (300,)], ids=str)
def test_arithmetic_is_in_float32_and_cast_once(
    shape: tuple[int, ...], dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    """Against the oracle, whose arithmetic is float32; also where the gradient has another dtype."""
    matrix = oracle.matrix_shape(shape)
    quantized = oracle.is_quantized(shape)
    references: tuple[Any, Any] = (
        oracle.OracleAdamW(shape, FIRST if quantized else None, RANK1 if quantized else None),
        oracle.OracleSGD(shape, FIRST if quantized else None),
    )
    for cls, hyper, reference in zip((AdamW4bit, SGD4bit), (ADAMW, SGD), references, strict=True):
        expected = narrowed(normal(shape, 4).numpy(), dtype).reshape(matrix)
        param = nn.Parameter(normal(shape, 4).to(dtype, copy=True))
        param.grad_dtype = None  # torch then allows any
        optimizer = cls([param], **hyper)
        for seed in range(4):
            grad = normal(shape, seed, 7).to(grad_dtype)
            param.grad = grad
            optimizer.step()
            wide = narrowed(normal(shape, seed, 7).numpy(), grad_dtype).reshape(matrix)
            expected = narrowed(reference.step(expected, wide, **hyper), dtype)
            assert param.dtype == dtype and param.grad is grad
            assert same_bits(param.detach().float().reshape(matrix), torch.from_numpy(expected)), seed
        for name in optimizer.bind()[0].moments:
            mine = optimizer.moment(param, name.name).reshape(matrix)
            spec = FIRST if name.name != "exp_avg_sq" else RANK1
            theirs = oracle.load_moment(reference.state, name.name, matrix, spec if quantized else None)
            assert mine.dtype == torch.float32 and same_bits(mine, torch.from_numpy(np.asarray(theirs)))


def test_float16_overflows_to_infinity() -> None:
    param = nn.Parameter(torch.full((3,), 65504.0, dtype=torch.float16))
    param.grad = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float16)
    SGD4bit([param], lr=1e4, momentum=0).step()
    assert param.tolist() == [torch.inf, 65504.0, float(np.float16(55504))]


# ---- devices ----------------------------------------------------------------------------------------


def test_meta_parameters() -> None:
    """Building on the meta device is fine and allocates nothing; using the optimizer there is not."""
    with torch.device("meta"):
        model: Any = nn.Sequential(nn.Linear(70, 90), nn.Linear(90, 3))
    for cls in (AdamW4bit, SGD4bit):
        optimizer = cls(model.parameters())
        assert not optimizer.state and len(optimizer.param_groups[0]["params"]) == 4
        for param in model.parameters():
            param.grad = torch.empty_like(param)
        for call in (optimizer.step, optimizer.state_dict):
            with pytest.raises(LayoutError, match=r"meta device: materialize the model \(model.to_empty"):
                call()
            assert not optimizer.state
    model.to_empty(device="cpu")
    for layer in model:
        layer.reset_parameters()
    other = copied(list(model.parameters()))
    first, second = AdamW4bit(model.parameters()), AdamW4bit(other)
    run(model.parameters(), first, range(2))
    run(other, second, range(2))
    assert_same(snapshot(model.parameters(), first), snapshot(other, second))


def test_a_meta_parameter_stops_the_step_of_the_others() -> None:
    good, bad = nn.Parameter(torch.ones(70, 80)), nn.Parameter(torch.empty(70, 80, device="meta"))
    optimizer = AdamW4bit([good, bad])
    good.grad = torch.ones_like(good)
    with pytest.raises(LayoutError, match="meta"):
        optimizer.step()
    assert torch.equal(good, torch.ones(70, 80))
    assert not any(tensor.any() for tensor in optimizer.state.get(good, {}).values())


def test_building_allocates_nothing() -> None:
    optimizer = AdamW4bit(model_of().parameters())
    assert not optimizer.state
    optimizer.zero_grad()
    assert not optimizer.state and repr(optimizer)


# ---- frozen parameters, missing gradients -----------------------------------------------------------


@pytest.mark.parametrize("cls", [AdamW4bit, SGD4bit])
def test_steps_without_a_gradient_change_nothing(cls: Any) -> None:
    """No decay, no count, no change of the state; then on as if those steps had not been."""
    whole, gaps = model_of(), model_of()
    first, second = cls(whole.parameters(), weight_decay=0.1), cls(gaps.parameters(), weight_decay=0.1)
    for seed in range(4):
        run(whole.parameters(), first, [seed])
        run(gaps.parameters(), second, [seed])
        before = snapshot(gaps.parameters(), second)
        second.zero_grad()
        second.step()
        assert_same(snapshot(gaps.parameters(), second), before)
    assert_same(snapshot(whole.parameters(), first), snapshot(gaps.parameters(), second))


def test_some_parameters_without_a_gradient() -> None:
    model = model_of()
    params = list(model.parameters())
    optimizer = AdamW4bit(params)
    run(params, optimizer, range(2))
    before = snapshot(params, optimizer)
    for seed in range(2, 4):
        fill_grads(params, seed)
        params[0].grad = params[1].grad = None
        optimizer.step()
    after = snapshot(params, optimizer)
    for key, value in before.items():
        if isinstance(value, Tensor):
            still = key.split()[1] in ("0", "1")
            assert same_bits(value, after[key]) == still, key
    assert [int(optimizer.state[p]["step"]) for p in params] == [2, 2, 4, 4, 4, 4, 4, 4]


def test_frozen_parameters_have_no_state() -> None:
    model, other = model_of(), model_of()
    frozen = model[0].weight.requires_grad_(False)
    start = frozen.clone()
    optimizer = AdamW4bit(model.parameters(), weight_decay=0.5)
    trained = [p for p in model.parameters() if p is not frozen]
    run(trained, optimizer, range(3))
    assert torch.equal(frozen, start) and frozen not in optimizer.state
    assert 0 not in optimizer.state_dict()["state"]
    with pytest.raises(ValueError, match="no moment 'exp_avg'"):
        optimizer.moment(frozen, "exp_avg")
    alone = AdamW4bit(list(other.parameters())[1:], weight_decay=0.5)
    run(list(other.parameters())[1:], alone, range(3))
    assert_same(snapshot(trained, optimizer), snapshot(list(other.parameters())[1:], alone))


def test_a_parameter_thawed_later_starts_then() -> None:
    model, other = model_of(), model_of()
    late = model[0].weight.requires_grad_(False)
    optimizer, twin = AdamW4bit(model.parameters()), AdamW4bit([other[0].weight])
    run([p for p in model.parameters() if p is not late], optimizer, range(3))
    late.requires_grad_(True)
    for seed in range(3, 5):
        fill_grads(model.parameters(), seed)
        other[0].weight.grad = late.grad
        optimizer.step()
        twin.step()
    assert optimizer.state[late]["step"] == 2 and optimizer.state[model[0].bias]["step"] == 5
    assert_same(snapshot([late], optimizer), snapshot([other[0].weight], twin))


def test_a_parameter_frozen_for_a_while_keeps_its_state() -> None:
    model, other = model_of(), model_of()
    weight = model[0].weight
    optimizer, twin = AdamW4bit(model.parameters()), AdamW4bit(other.parameters())
    run(model.parameters(), optimizer, range(2))
    run(other.parameters(), twin, range(2))
    weight.requires_grad_(False)
    weight.grad = None
    rest = [p for p in model.parameters() if p is not weight]
    run(rest, optimizer, range(5, 7))
    assert_same(snapshot([weight], optimizer), snapshot([other[0].weight], twin))
    assert options(optimizer.param_groups[0]) == options(twin.param_groups[0])
    weight.requires_grad_(True)
    for seed in (8, 9):
        for each, stepped in ((weight, optimizer), (other[0].weight, twin)):
            stepped.zero_grad()
            fill_grads([each], seed)
            stepped.step()
    assert_same(snapshot([weight], optimizer), snapshot([other[0].weight], twin))
