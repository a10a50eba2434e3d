"""The torch reference against the numpy oracle and the committed golden vectors, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shard4bit
from shard4bit.spec import FIRST_MOMENTS, SECOND_MOMENTS
from tests import oracle

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bits; NaNs are equal whatever their payload."""
    a, b = np.ascontiguousarray(a).reshape(-1), np.ascontiguousarray(b).reshape(-1)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.kind != "f":
        return bool((a == b).all())
    bits = a.view(f"u{a.itemsize}") == b.view(f"u{b.itemsize}")
    return bool((bits | (np.isnan(a) & np.isnan(b))).all())


def oracle_spec(spec: Any) -> Any:
    if not isinstance(spec, shard4bit.QuantSpec):
        return None if str(spec) == "fp32" else "factored"
    return oracle.Spec(
        bits=spec.bits, norm=spec.norm, block=spec.block_size, mapping=spec.mapping, signed=spec.signed
    )


def compare_state(state: dict[str, Any], expected: dict[str, Any], where: Any) -> None:
    keys = {k for k in state if k != "step"}
    assert keys == {k for k in expected if k != "step"}, where
    for key in keys:
        got = state[key].numpy().reshape(-1)
        want = np.asarray(expected[key]).reshape(-1)
        assert same_bits(got, want), (where, key)


def golden_spec(saved: dict[str, Any] | str | None) -> Any:
    if saved is None or isinstance(saved, str):
        return saved or "fp32"
    return shard4bit.QuantSpec(
        bits=saved["bits"],
        norm=saved["norm"],
        mapping=saved["mapping"],
        signed=saved["signed"],
        block_size=saved["block"],
    )


def optimizer_for(case: dict[str, Any], param: torch.Tensor, hyper: dict[str, Any]) -> Any:
    first = golden_spec(case["first"])
    if case["optimizer"] == "sgd":
        return shard4bit.SGD4bit([param], momentum_buffer=first, **hyper)
    second = golden_spec(case.get("second"))
    return shard4bit.AdamW4bit([param], first_moment=first, second_moment=second, **{**oracle.PAPER, **hyper})


def from_file(array: np.ndarray) -> torch.Tensor:
    """A parameter or gradient; uint16 are the bits of bfloat16."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def to_file(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.float().numpy()  # exact, and NaN is NaN
    return tensor.numpy()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden_vectors(path: Path) -> None:
    file = np.load(path)
    hyper = {}
    for key in file.files:
        if key.startswith("hyper/"):
            value = file[key].tolist()
            hyper[key[6:]] = tuple(value) if isinstance(value, list) else value
    param = torch.nn.Parameter(from_file(file["step0/param"]))
    optimizer = optimizer_for(json.loads(str(file["case"])), param, hyper)
    for step in range(1, int(file["steps"]) + 1):
        param.grad = from_file(file[f"step{step}/grad"])
        optimizer.step()
        want = to_file(from_file(file[f"step{step}/param"]))
        assert same_bits(to_file(param), want), (path.stem, step)
        prefix = f"step{step}/"
        known = {k[len(prefix) :]: file[k] for k in file.files if k.startswith(prefix)}
        expected = {k: v for k, v in known.items() if k not in ("grad", "param", "step")}
        compare_state(optimizer.state[param], expected, (path.stem, step))


def random_grads(rng: np.random.Generator, shape: tuple[int, int], steps: int) -> list[np.ndarray]:
    """Gradients of many magnitudes with zero rows, columns and blocks."""
    out = []
    for step in range(steps):
        grad = rng.standard_normal(shape) * 10.0 ** rng.uniform(-20, 2, (shape[0], 1))
        grad[step % shape[0]] = 0
        grad[:, (7 * step) % shape[1]] = 0
        grad[: shape[0] // 2, :128] *= step > 1
        out.append(grad.astype(np.float32))
    return out


@pytest.mark.parametrize("second", [*SECOND_MOMENTS, "B37/DE/8", "B5/Linear/8", "Rank-1/DE-0/8"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((61, 131), {}),
        ((5, 1025), {}),
        ((4100, 3), {}),
        ((61, 131), oracle.PAPER),
        ((61, 131), {**oracle.PAPER, "compensate": True}),
        ((61, 131), {**oracle.PAPER, "rounding": "stochastic"}),
    ],
    ids=["61x131", "5x1025", "4100x3", "61x131-paper", "61x131-compensated", "61x131-stochastic"],
)
def test_adamw_equals_the_oracle(second: str, shape: tuple[int, int], options: dict[str, Any]) -> None:
    rng = np.random.default_rng(len(second) + shape[0])
    first = FIRST_MOMENTS[len(second) % len(FIRST_MOMENTS)]
    start = rng.standard_normal(shape).astype(np.float32)
    hyper: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    if options.get("rounding") == "stochastic" and "Linear" not in second and second != "fp32":
        with pytest.raises(ValueError, match="rounding"):
            shard4bit.AdamW4bit([torch.nn.Parameter(torch.zeros(shape))], second_moment=second, **options)
        return
    hyper |= options
    param = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = shard4bit.AdamW4bit([param], first_moment=first, second_moment=second, **hyper)
    specs = [oracle_spec(m.spec) for m in optimizer.bind()[0].moments]
    reference, expected = oracle.OracleAdamW(shape, *specs), start
    for grad in random_grads(rng, shape, 4):
        param.grad = torch.from_numpy(grad.copy())
        optimizer.step()
        expected = reference.step(expected, grad, **hyper)
        if second == "factored":  # sums in another order: at most an ulp or two in the statistics
            for key, value in optimizer.state[param].items():
                if value.dtype == torch.float32 and key != "step":
                    want = np.asarray(reference.state[key])
                    np.testing.assert_allclose(value.numpy(), want, rtol=3e-7, atol=0)
            np.testing.assert_allclose(param.detach().numpy(), expected, rtol=1e-5, atol=1e-7)
        else:
            assert same_bits(param.detach().numpy(), expected), (first, second)
            compare_state(optimizer.state[param], reference.state, (first, second))


@pytest.mark.parametrize("spec", [*FIRST_MOMENTS, "B300/DE/8"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("compensate", [False, True], ids=["plain", "compensated"])
def test_sgd_equals_the_oracle(spec: str, nesterov: bool, compensate: bool) -> None:
    shape, rng = (61, 131), np.random.default_rng(5)
    start = rng.standard_normal(shape).astype(np.float32)
    hyper: dict[str, Any] = {
        "lr": 0.1,
        "momentum": 0.9,
        "dampening": 0.0 if nesterov else 0.2,
        "nesterov": nesterov,
        "weight_decay": 0.01,
        "maximize": not nesterov,
        "compensate": compensate,
    }
    param = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = shard4bit.SGD4bit([param], momentum_buffer=spec, **hyper)
    reference = oracle.OracleSGD(shape, oracle_spec(optimizer.bind()[0].moments[0].spec))
    expected = start
    for grad in random_grads(rng, shape, 4):
        param.grad = torch.from_numpy(grad.copy())
        optimizer.step()
        expected = reference.step(expected, grad, **hyper)
        assert same_bits(param.detach().numpy(), expected)
        compare_state(optimizer.state[param], reference.state, spec)
