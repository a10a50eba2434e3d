"""Without quantization the optimizers are torch's, to within fp32 rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shard4bit import AdamW4bit, SGD4bit
from tests.optim.helpers import fill_grads

SHAPES = [(), (1,), (7,), (3, 5), (65, 64), (16, 32, 3, 3), (5, 1025)]
STEPS = 100


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def follow(ours: list[nn.Parameter], optimizer: torch.optim.Optimizer, others: list[Any]) -> None:
    """Step ``optimizer`` and every (parameters, optimizer) of ``others`` on the same gradients."""
    for seed in range(STEPS):
        fill_grads(ours, seed)
        optimizer.step()
        for params, other in others:
            for mine, theirs in zip(ours, params, strict=True):
                assert mine.grad is not None
                theirs.grad = mine.grad.to(theirs.dtype)
            other.step()


def check(ours: list[nn.Parameter], theirs: list[nn.Parameter], exact: list[nn.Parameter]) -> None:
    """Within an ulp or two of torch's float32 run, and as near to its float64 run as that run is."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2.5e-7, atol=5e-7)
    mine, torchs = (
        [float((a - c).detach().abs().max()) for a, c in zip(params, exact, strict=True)]
        for params in (ours, theirs)
    )
    assert max(mine) <= 1.25 * max(torchs) < 1e-4


ADAMW_OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3},
    {"lr": 1e-2, "maximize": True, "weight_decay": 0.0},
    {"lr": torch.tensor(3e-3), "betas": (0.0, 0.99)},
]


@pytest.mark.parametrize(
    ("second", "hyper"), list(zip(["rank1", "block", "factored", "B2048/DE/8"], ADAMW_OPTIONS, strict=True))
)
def test_adamw_without_quantization_is_torch_adamw(second: str, hyper: dict[str, Any]) -> None:
    ours, theirs, exact = parameters(), parameters(), parameters(torch.float64)
    optimizer = AdamW4bit(ours, quantize=False, second_moment=second, **hyper)
    torchs = torch.optim.AdamW(theirs, **hyper)
    follow(ours, optimizer, [(theirs, torchs), (exact, torch.optim.AdamW(exact, **hyper))])
    check(ours, theirs, exact)
    for a, b in zip(ours, theirs, strict=True):
        assert optimizer.state[a]["step"] == torchs.state[b]["step"] == STEPS
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizer.moment(a, name), torchs.state[b][name], rtol=1e-5, atol=1e-6)


def test_adamw_defaults_are_torchs() -> None:
    ours = AdamW4bit(parameters()).defaults
    theirs = torch.optim.AdamW(parameters()).defaults
    for option in ("lr", "betas", "eps", "weight_decay", "maximize"):
        assert ours[option] == theirs[option]


SGD_OPTIONS: list[dict[str, Any]] = [
    {"momentum": 0.0},
    {"momentum": 0.0, "weight_decay": 0.1, "maximize": True},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "dampening": 1.0, "weight_decay": 0.05},
    {"momentum": 0.7, "nesterov": True},
    {"momentum": 0.7, "nesterov": True, "weight_decay": 0.05, "maximize": True},
    {"momentum": 0.9, "lr": torch.tensor(2e-3)},
]


@pytest.mark.parametrize(
    "hyper", SGD_OPTIONS, ids=lambda h: "+".join(f"{k}={float(v):g}" for k, v in h.items())
)
def test_sgd_without_quantization_is_torch_sgd(hyper: dict[str, Any]) -> None:
    hyper = {"lr": 1e-2, **hyper}
    ours, theirs, exact = parameters(), parameters(), parameters(torch.float64)
    optimizer = SGD4bit(ours, quantize=False, **hyper)
    torchs = torch.optim.SGD(theirs, **hyper)
    follow(ours, optimizer, [(theirs, torchs), (exact, torch.optim.SGD(exact, **hyper))])
    check(ours, theirs, exact)
    for a, b in zip(ours, theirs, strict=True):
        if hyper["momentum"]:
            buffer = torchs.state[b]["momentum_buffer"]
            torch.testing.assert_close(optimizer.moment(a, "momentum_buffer"), buffer, rtol=1e-5, atol=3e-6)
        else:
            assert set(optimizer.state[a]) == {"step"}


@pytest.mark.parametrize("quantize", [False, True])
def test_plain_sgd_has_nothing_to_quantize(quantize: bool) -> None:
    """Momentum 0: the same, bit for bit, whatever ``quantize`` says, as one rounded product and sum."""
    param = nn.Parameter(torch.randn(80, 70))
    expected: Tensor = param.detach().clone()
    optimizer = SGD4bit([param], lr=0.1, momentum=0, quantize=quantize)
    for seed in range(3):
        fill_grads([param], seed)
        assert param.grad is not None
        expected = expected - param.grad * 0.1
        optimizer.step()
    assert torch.equal(param, expected)


def test_small_tensors_and_vectors_keep_full_precision() -> None:
    """4096 elements or one dimension: the default options give torch's AdamW."""
    shapes = [(64, 64), (9000,), (4096, 1), ()]
    ours = [nn.Parameter(torch.full(s, 0.5)) for s in shapes]
    theirs = [nn.Parameter(torch.full(s, 0.5)) for s in shapes]
    optimizer, torchs = AdamW4bit(ours), torch.optim.AdamW(theirs)
    for seed in range(5):
        fill_grads(ours, seed)
        fill_grads(theirs, seed)
        optimizer.step()
        torchs.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert set(optimizer.state[a]) == {"step", "exp_avg", "exp_avg_sq"}
        assert optimizer.state[a]["exp_avg"].shape == a.shape
