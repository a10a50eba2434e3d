"""The kernels on a GPU against the torch reference on the CPU, bit for bit."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import shard4bit
from shard4bit.dispatch import backend_for
from shard4bit.layout import Slab
from shard4bit.maths.update import ADAMW
from shard4bit.reference import ReferenceBackend
from shard4bit.spec import ADAMW_PAPER, parse_spec
from shard4bit.state import Moment
from tests.cuda.test_kernels_decode import KINDS, filled
from tests.gpu.quiet import quiet
from tests.test_invariance import adamw_scalars, run
from tests.test_oracle_agreement import random_grads

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SHAPES = [
    (64, 512),
    (61, 131),
    (5, 1025),
    (4100, 3),
    (300, 768),
    (129, 256),
    (7, 16, 384),
    (64, 16, 3, 3),
    (77,),
]
ADAMS: dict[str, dict[str, Any]] = {
    "paper": ADAMW_PAPER,
    "compensated": {"compensate": True, "rounding": "nearest"},
    "stochastic": {"compensate": True, "rounding": "stochastic"},
}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits; NaNs are equal."""
    a, b = a.detach().cpu().contiguous().reshape(-1), b.detach().contiguous().reshape(-1)
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    same = a.view(size) == b.view(size)
    return bool((same | (a.isnan() & b.isnan())).all()) if a.is_floating_point() else bool(same.all())


def pair(dtype: torch.dtype, make: Any) -> tuple[Any, Any, list[Any], list[Any]]:
    rng = np.random.default_rng(3)
    starts = [torch.from_numpy(rng.standard_normal(s).astype(np.float32)).to(dtype) for s in SHAPES]
    host = [torch.nn.Parameter(s.clone()) for s in starts]
    device = [torch.nn.Parameter(s.clone().cuda()) for s in starts]
    return make(host), make(device), host, device


def set_grads(params: list[Any], step: int, seed: int, special: float | None = None) -> None:
    for i, p in enumerate(params):
        rng = np.random.default_rng((seed, step, i))
        flat = (p.shape[0], p.numel() // p.shape[0])
        grad = random_grads(rng, flat, step + 1)[step]
        if special is not None and step == 2:
            grad[0, -1] = special
        p.grad = torch.from_numpy(grad).view(p.shape).to(p.dtype).to(p.device)


def compare(host: Any, device: Any, params: list[Any], others: list[Any], where: Any) -> None:
    for p, q in zip(params, others, strict=True):
        assert equal(q, p), (where, tuple(p.shape), "parameter")
        for key, value in host.state[p].items():
            assert equal(device.state[q][key], value), (where, tuple(p.shape), key)


def step_and_compare(
    host: Any, device: Any, params: list[Any], others: list[Any], seed: int, special: float | None = None
) -> None:
    """Four steps of both, everything compared after each."""
    for step in range(4):
        set_grads(params, step, seed, special)
        set_grads(others, step, seed, special)
        host.step()
        device.step()
        compare(host, device, params, others, step)


@pytest.mark.parametrize("special", [None, float("nan"), float("inf")], ids=["finite", "nan", "inf"])
@pytest.mark.parametrize("kind", ADAMS)
@pytest.mark.parametrize("second", ["rank1", "block"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw(dtype: str, second: str, kind: str, special: float | None) -> None:
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1, "second_moment": second, **ADAMS[kind]}
    host, device, params, others = pair(DTYPES[dtype], lambda p: shard4bit.AdamW4bit(p, **options))
    step_and_compare(host, device, params, others, 1, special)


@pytest.mark.parametrize("compensate", [False, True], ids=["plain", "compensated"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd(nesterov: bool, compensate: bool) -> None:
    options = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.01, "maximize": not nesterov}
    options["compensate"] = compensate
    host, device, params, others = pair(torch.float32, lambda p: shard4bit.SGD4bit(p, lr=0.1, **options))
    step_and_compare(host, device, params, others, 2)


def test_factored() -> None:
    """Sums in another order: 16 fp32 additions a term at most, so 2^-20 relative."""
    host, device, params, others = pair(
        torch.float32, lambda p: shard4bit.AdamW4bit(p, lr=1e-2, second_moment="factored")
    )
    for step in range(4):
        set_grads(params, step, 3)
        set_grads(others, step, 3)
        host.step()
        device.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(q.detach().cpu(), p.detach(), rtol=1e-4, atol=1e-6)
        for key, value in host.state[p].items():
            if key.endswith("mean"):
                torch.testing.assert_close(device.state[q][key].cpu(), value, rtol=2.0**-19, atol=0)


def on_gpu() -> Any:
    return backend_for(torch.device("cuda", torch.cuda.current_device()))


CUTS = {
    "run": {"row_cuts": [0.21, 0.5, 0.73], "col_cuts": []},
    "rows": {"row_cuts": [0.3, 0.31], "col_cuts": []},
    "cols": {"row_cuts": [], "col_cuts": [0.27, 0.5]},
    "grid": {"row_cuts": [0.6], "col_cuts": [0.333]},
}


@pytest.mark.parametrize("special", [None, "nan"])
@pytest.mark.parametrize("kind", CUTS)
@pytest.mark.parametrize("second", ["rank1", "block"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sharding_invariance(dtype: str, second: str, kind: str, special: str | None) -> None:
    """Cut slabs on the GPU against the whole matrix of the CPU reference, bit for bit."""
    specs = [
        parse_spec("B128/DE", signed=True, argument="first"),
        parse_spec(second, signed=False, argument="second"),
    ]
    for number, shape in enumerate([(40, 384), (33, 301), (300, 128)]):
        problem = {"shape": shape, "kind": kind, **CUTS[kind], "mode": number + 1, "special": special}
        problem |= {"seed": number, "dtype": DTYPES[dtype]}
        scalars = partial(adamw_scalars, compensate=number == 1)
        run(ADAMW, problem, specs, scalars, backend=on_gpu, device="cuda")


def test_factored_is_the_same_every_time() -> None:
    found = []
    for _ in range(2):
        _, device, _, others = pair(
            torch.bfloat16, lambda p: shard4bit.AdamW4bit(p, second_moment="factored")
        )
        for step in range(3):
            set_grads(others, step, 4)
            device.step()
        found.append([p.detach().cpu() for p in others])
    assert all(equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("second", ["rank1", "block", "factored"])
def test_a_step_allocates_nothing_and_waits_for_nothing(second: str) -> None:
    params = [torch.nn.Parameter(torch.randn(512, 1024, device="cuda")) for _ in range(4)]
    optimizer = shard4bit.AdamW4bit(params, second_moment=second)
    for p in params:
        p.grad = torch.randn_like(p)
    for _ in range(3):
        optimizer.step()
    with quiet():
        optimizer.step()


def test_a_large_tensor() -> None:
    """More than 2^31 elements: the last rows equal those of the same rows alone (block statistics, and codes
    that do not depend on a row's number)."""
    rows, cols, tail = 1_100_000, 2048, 64
    param = torch.nn.Parameter(torch.zeros(rows, cols, device="cuda", dtype=torch.bfloat16))
    param.grad = torch.zeros_like(param)
    small = torch.nn.Parameter(torch.zeros(tail, cols, device="cuda", dtype=torch.bfloat16))
    small.grad = torch.randn(tail, cols, device="cuda", dtype=torch.bfloat16)
    param.grad[-tail:] = small.grad
    options = {"second_moment": "block", "rounding": "nearest"}
    optimizers = [shard4bit.AdamW4bit([p], **options) for p in (param, small)]
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.step()
    assert equal(param.detach()[-tail:], small.detach().cpu())
    for key, value in optimizers[1].state[small].items():
        if key != "step":
            assert equal(optimizers[0].state[param][key][-tail:], value.cpu()), key


@pytest.mark.parametrize("name, signed", KINDS)
def test_decoding(name: str, signed: bool) -> None:
    for number, slab in enumerate(
        [
            Slab.whole((300, 700)),
            Slab.box((300, 700), [(3, 290), (5, 695)]),
            Slab.run((300, 700), 777, 200_001),
        ]
    ):
        moment = filled(name, signed, slab, number)
        tensors = {suffix: t.cuda() for suffix, t in moment.tensors.items()}
        on_gpu = Moment(moment.name, moment.spec, slab, tensors)
        found = backend_for(torch.device("cuda", 0)).decode(on_gpu)
        assert equal(found, ReferenceBackend().decode(moment)), slab
