"""Write the golden vectors beside this file: `python tests/golden/make.py`.

Everything comes from `tests/oracle.py` and from the integer formula in `noise`, so the same files
result on every machine and with every numpy. README.md beside this file lists the keys.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
if str(HERE.parents[1]) not in sys.path:
    sys.path.insert(0, str(HERE.parents[1]))

from tests.oracle import (  # noqa: E402
    CANONICAL_NAN,
    F32,
    PAPER,
    Array,
    OracleAdamW,
    OracleSGD,
    Spec,
    from_bf16,
    midpoints,
    to_bf16,
)

Inputs = tuple[Array, list[Array]]

M4 = Spec(bits=4, norm="block", block=128, mapping="de", signed=True)
V4_RANK1 = Spec(bits=4, norm="rank1", mapping="linear")
V4_BLOCK = Spec(bits=4, norm="block", block=128, mapping="linear")
V4_DE0 = Spec(bits=4, norm="block", block=128, mapping="de0")
M8 = Spec(bits=8, norm="block", block=2048, mapping="de", signed=True)
V8 = Spec(bits=8, norm="block", block=2048, mapping="de")
M4_TENSOR = Spec(bits=4, norm="tensor", mapping="de", signed=True)
ADAMW = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "maximize": False}
SGD = {
    "lr": 0.1,
    "momentum": 0.9,
    "dampening": 0.0,
    "nesterov": True,
    "weight_decay": 0.01,
    "maximize": False,
}


@dataclass(frozen=True)
class Case:
    optimizer: str
    shape: tuple[int, int]
    inputs: Callable[[tuple[int, int]], Inputs]
    hyper: dict[str, Any]
    first: Spec | None
    second: Spec | str | None = None
    dtype: str = "float32"


# ---- inputs: integers hashed by splitmix64, scaled by powers of two, so exact everywhere


def hashed(seed: int, shape: tuple[int, ...]) -> Array:
    """uint64 noise: splitmix64 of the flat index."""
    count = int(np.prod(shape))
    z = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed << 32)
    z = z * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))).reshape(shape)


def integers(seed: int, shape: tuple[int, ...], low: int, high: int) -> Array:
    """Noise in low..high, both included."""
    return (hashed(seed, shape) % np.uint64(high - low + 1)).astype(np.int64) + low


def noise(seed: int, shape: tuple[int, ...], top: int = 0, spread: int = 8, distinct: int = 0) -> Array:
    """Signed values of four significant bits in about 2**(top-spread) .. 2**top.

    With `distinct`, only so many rows differ and the rest repeat them in an irregular order: the
    files stay small, since deflate finds the repetitions in the results as well.
    """
    rows = distinct or shape[0]
    drawn = (rows, *shape[1:])
    mantissa = integers(seed, drawn, 8, 15) * (2 * integers(seed + 1, drawn, 0, 1) - 1)
    values = np.ldexp(mantissa / 16, top - integers(seed + 2, drawn, 0, spread)).astype(F32)
    return values[integers(7, (shape[0],), 0, rows - 1)] if distinct else values


def plain(seed: int, steps: int, distinct: int = 0) -> Callable[[tuple[int, int]], Inputs]:
    """Noise whose columns differ in size, with a row and a column of zeros."""

    def build(shape: tuple[int, int]) -> Inputs:
        param = noise(seed, shape, top=-3, distinct=distinct)
        columns = np.ldexp(1.0, integers(seed + 3, shape[1:], -6, 0)).astype(F32)
        grads = []
        for t in range(1, steps + 1):
            grad = noise(seed + 10 * t, shape, top=-2, distinct=distinct) * columns
            grad[5, :] = 0
            grad[:, 3] = 0
            grads.append(grad)
        return param, grads

    return build


def holes(shape: tuple[int, int]) -> Inputs:
    """Gradients with whole blocks of 128 and whole rows of zeros; some fill at a later step."""
    param, grads = plain(200, 3, distinct=6)(shape)
    for t, grad in enumerate(grads):
        grad[::4, 128:256] = 0
        grad[1::5, 256:] = 0
        grad[10 + t : 14, :] = 0
    grads[0][2::3, :128] = 0
    return param, grads


def ties(shape: tuple[int, int]) -> Inputs:
    """Betas of 1/2 and 3/4 and scales of 2**-k, so that moments sit on or beside the midpoints."""
    first = midpoints(M4.table())
    second = np.sqrt(midpoints(V4_RANK1.table()).astype(np.float64)).astype(F32)
    near = [np.nextafter(second, F32(side)) for side in (0, 2)]
    roots = np.concatenate([second, *near])
    targets = midpoints(V4_RANK1.table())
    exact = roots[np.isin(roots * roots, targets)]
    beside = [np.nextafter(x, F32(side)) for x in (first, exact) for side in (-2, 2)]
    palette = np.concatenate([first, exact, -exact, *beside])
    param = noise(300, shape, top=-3, distinct=9)
    grad = palette[integers(301, (9, shape[1]), 0, len(palette) - 1)]
    grad = grad[np.arange(shape[0]) % 9]
    grad[0, :] = 1
    grad[:, 0] = 1
    return param, [grad, -grad, noise(310, shape, distinct=9)]


def decades(shape: tuple[int, int]) -> Inputs:
    """Gradients over 30 decades within a row, in rows scaled by 2**-60, 2**-30, 1 or 2**30."""
    param = noise(400, shape, top=0, spread=20, distinct=12)
    rows = np.ldexp(1.0, 30 * integers(401, (shape[0], 1), -2, 1))
    grads = [noise(410 + 10 * t, shape, top=0, spread=100, distinct=12) for t in range(3)]
    return param, [(rows * grad).astype(F32) for grad in grads]


def subnormals(shape: tuple[int, int]) -> Inputs:
    """Gradients, squares, maxima and reciprocals on both sides of 2**-126, by kinds of rows."""
    param = noise(500, shape, top=-3, distinct=12)
    tops = np.array([-124, -140, -125, -63, -70, 64, -61, -120])[np.arange(shape[0]) % 8]
    grads = [noise(510 + 10 * t, shape, spread=16, distinct=12) for t in range(3)]
    return param, [np.ldexp(g.astype(np.float64), tops[:, None]).astype(F32) for g in grads]


def nonfinite(shape: tuple[int, int]) -> Inputs:
    """Ordinary gradients until step 3, which holds one NaN, one +Inf and one -Inf."""
    param, grads = plain(600, 4, distinct=9)(shape)
    grads[2][4, 7] = np.nan
    grads[2][9, 100] = np.inf
    grads[2][20, 128] = -np.inf
    return param, grads


CASES = {
    "adamw_rank1": Case("adamw", (33, 129), plain(100, 4, 14), ADAMW, M4, V4_RANK1),
    "adamw_block": Case("adamw", (50, 300), holes, ADAMW | {"lr": 1e-2}, M4, V4_BLOCK),
    "adamw_factored": Case("adamw", (33, 129), plain(700, 3, 16), ADAMW, M4, "factored"),
    "adamw_rank1_bf16": Case(
        "adamw", (33, 129), plain(800, 4, 22), ADAMW | {"lr": 2e-2}, M4, V4_RANK1, "bfloat16"
    ),
    "adamw_8bit": Case("adamw", (20, 300), plain(900, 3, 6), ADAMW, M8, V8),
    "adamw_de0": Case("adamw", (33, 129), plain(1000, 3, 12), ADAMW | {"maximize": True}, M4, V4_DE0),
    "adamw_ties": Case(
        "adamw",
        (33, 129),
        ties,
        ADAMW | {"betas": (0.5, 0.75), "weight_decay": 0.0},
        M4,
        V4_RANK1,
    ),
    "adamw_decades": Case("adamw", (33, 129), decades, ADAMW | {"betas": (0.9, 0.999)}, M4, V4_RANK1),
    "adamw_subnormal": Case("adamw", (33, 129), subnormals, ADAMW | {"betas": (0.5, 0.25)}, M4, V4_RANK1),
    "adamw_nonfinite": Case("adamw", (33, 129), nonfinite, ADAMW, M4, V4_RANK1),
    "adamw_compensated": Case(
        "adamw", (33, 129), plain(1400, 3, 6), ADAMW | {"compensate": True}, M4, V4_RANK1
    ),
    "adamw_compensated_nonfinite": Case(
        "adamw", (33, 129), nonfinite, ADAMW | {"compensate": True}, M4, V4_BLOCK
    ),
    "adamw_stochastic": Case(
        "adamw", (33, 129), plain(1500, 3, 6), ADAMW | {"rounding": "stochastic"}, M4, V4_RANK1
    ),
    "sgd_compensated": Case("sgd", (33, 130), plain(1300, 3, 6), SGD | {"compensate": True}, M4),
    "sgd_nesterov": Case("sgd", (40, 130), plain(1100, 3, 14), SGD, M4),
    "sgd_dampening_tensor": Case(
        "sgd",
        (33, 129),
        plain(1200, 3, 9),
        SGD | {"dampening": 0.5, "nesterov": False, "weight_decay": 0.0, "maximize": True},
        M4_TENSOR,
    ),
}


# ---- running a case


def described(case: Case) -> str:
    """The case without its numbers, as JSON."""
    specs = {
        name: asdict(spec) if isinstance(spec, Spec) else spec
        for name, spec in (("first", case.first), ("second", case.second))
    }
    return json.dumps({"optimizer": case.optimizer, "dtype": case.dtype, **specs})


def snapshot(value: Any) -> Array:
    """A copy as an array, with the one NaN pattern that does not depend on the processor."""
    array = np.array(value)
    return np.where(np.isnan(array), CANONICAL_NAN, array) if array.dtype == F32 else array


def build(name: str) -> dict[str, Array]:
    """Run one case; all that its file holds."""
    case = CASES[name]
    bf16 = case.dtype == "bfloat16"
    param, grads = case.inputs(case.shape)
    if bf16:
        param, grads = to_bf16(param), [to_bf16(grad) for grad in grads]
    optimizer: OracleAdamW | OracleSGD
    if case.optimizer == "adamw":
        optimizer, hyper = OracleAdamW(case.shape, case.first, case.second), {**PAPER, **case.hyper}
    else:
        optimizer, hyper = OracleSGD(case.shape, case.first), case.hyper
    out = {"case": np.array(described(case)), "steps": np.array(len(grads))}
    out |= {f"hyper/{key}": np.array(value) for key, value in case.hyper.items()}
    out["step0/param"] = snapshot(param)
    for t, grad in enumerate(grads, start=1):
        out[f"step{t}/grad"] = snapshot(grad)
        if bf16:
            param = to_bf16(optimizer.step(from_bf16(param), from_bf16(grad), **hyper))
        else:
            param = optimizer.step(param, grad, **hyper)
        out[f"step{t}/param"] = snapshot(param)
        for key, value in optimizer.state.items():
            out[f"step{t}/{key}"] = snapshot(value)
    return out


def main() -> None:
    for name in CASES:
        path = HERE / f"{name}.npz"
        arrays: dict[str, Any] = build(name)
        np.savez_compressed(path, **arrays)
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
