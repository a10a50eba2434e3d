"""A plain numpy oracle of the 4-bit optimizers of Li, Chen, Zhu 2023 (arXiv 2309.01507).

It shares nothing with the library it checks: whole matrices, one IEEE float32 rounding per
written operation, no cleverness. Parameters and gradients are float32 matrices in the shape
given by `matrix_shape`; bfloat16 and float16 values are widened by the caller before a step and
rounded once after it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
State = dict[str, Any]
F32 = np.float32
SMALLEST_NORMAL = F32(2.0**-126)
CANONICAL_NAN = np.uint32(0x7FC00000).view(F32)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the matrix view: the cut with the smallest rows + cols, first if tied."""
    if len(shape) < 2:
        return (math.prod(shape), 1)
    cuts = [(math.prod(shape[:s]), math.prod(shape[s:])) for s in range(1, len(shape))]
    return min(cuts, key=sum)


def is_quantized(shape: tuple[int, ...]) -> bool:
    """True for tensors of two or more dimensions and more than 4096 elements."""
    return len(shape) >= 2 and math.prod(shape) > 4096


@dataclass(frozen=True)
class Spec:
    """How one moment is quantized. `block` matters for norm "block" only."""

    bits: int = 4
    norm: str = "block"
    block: int = 128
    mapping: str = "de"
    signed: bool = False

    def table(self) -> Array:
        return make_table(self.mapping, self.bits, self.signed)


def dynamic_exponent(bits: int, signed: bool) -> list[Fraction]:
    """The dynamic exponent entries as exact fractions, ascending: 2**bits of them."""
    exponents = bits - 1
    entries = [Fraction(0), Fraction(1)]
    for i in range(exponents):
        parts = 2**i if signed else 2 ** (i + 1)
        for k in range(parts):
            middle = Fraction(1, 10) + Fraction(9, 10) * Fraction(2 * k + 1, 2 * parts)
            entry = middle * Fraction(10) ** (i - exponents + 1)
            entries += [entry, -entry] if signed else [entry]
    return sorted(entries)


def make_table(mapping: str, bits: int, signed: bool) -> Array:
    """The entries as float64 (each the double nearest to the exact decimal value).

    "de0" is unsigned "de" with entry 0 overwritten by entry 1, so its first two are equal.
    """
    if mapping not in (("de",) if signed else ("de", "de0", "linear")):
        raise ValueError(f"no mapping {mapping!r} with signed={signed}")
    exact = dynamic_exponent(bits, signed)
    if mapping == "linear":
        exact = [Fraction(i + 1, 2**bits) for i in range(2**bits)]
    elif mapping == "de0":
        exact[0] = exact[1]
    return np.array([float(entry) for entry in exact], np.float64)


def midpoints(table: Array) -> Array:
    """Decision points of a float64 table: averaged in float64, rounded once to float32."""
    return ((table[:-1] + table[1:]) / 2).astype(F32)


def stored_statistic(maximum: Array) -> Array:
    """What is kept of a maximum of magnitudes: 0 below 2**-126, one NaN, Inf as it is."""
    kept = np.where(maximum < SMALLEST_NORMAL, F32(0), maximum)
    return np.where(np.isnan(kept), CANONICAL_NAN, kept)


def measure(x: Array, spec: Spec) -> dict[str, Array]:
    """Statistics of a matrix by their name suffix. numpy's max lets NaN through."""
    magnitude = np.abs(x)
    if spec.norm == "tensor":
        return {"absmax": stored_statistic(magnitude.max())}
    if spec.norm == "block":
        starts = range(0, x.shape[1], spec.block)
        blocks = [magnitude[:, s : s + spec.block].max(axis=1) for s in starts]
        return {"absmax": stored_statistic(np.stack(blocks, axis=1))}
    if spec.norm == "rank1" and not spec.signed:
        by_axis = {"row_max": magnitude.max(axis=1), "col_max": magnitude.max(axis=0)}
        return {key: stored_statistic(maximum) for key, maximum in by_axis.items()}
    raise ValueError(f"norm {spec.norm!r} does not go with signed={spec.signed}")


def scale_matrix(stats: dict[str, Array], spec: Spec, shape: tuple[int, int]) -> Array:
    """The scale of every element. numpy's minimum lets NaN through."""
    if spec.norm == "rank1":
        return np.minimum(stats["row_max"][:, None], stats["col_max"][None, :])
    if spec.norm == "block":
        return np.repeat(stats["absmax"], spec.block, axis=1)[:, : shape[1]]
    return np.full(shape, stats["absmax"], F32)


@np.errstate(all="ignore")
def encode(x: Array, scale: Array, table: Array) -> Array:
    """One code (uint8) per element: how many midpoints lie strictly below x / scale.

    The quotient is x times the rounded reciprocal. A value on a midpoint takes the lower entry;
    NaN, and anything whose scale is 0, takes code 0. `table` is the float64 one.
    """
    y = x.astype(F32) * (F32(1) / np.asarray(scale, F32))
    codes = np.zeros(y.shape, np.int64)
    for mid in midpoints(table):
        codes += y > mid
    return np.where(scale == 0, 0, codes).astype(np.uint8)


@np.errstate(all="ignore")
def decode(codes: Array, scale: Array, table: Array) -> Array:
    """Entry times scale, in float32."""
    return table.astype(F32)[codes] * scale


def dice(shape: tuple[int, int], step: int) -> Array:
    """Numbers in [0, 1) by row, column and step, 15 bits each, as float64: a hash of row, column // 8 and
    step, which each further column of the eight multiplies on."""
    rows, cols = shape
    out = np.empty(shape, np.float64)
    with np.errstate(over="ignore"):
        for start in range(0, cols, 8):
            x = np.arange(rows, dtype=np.uint32) * np.uint32(2246822507)
            x += np.uint32(step) * np.uint32(2654435769) + np.uint32(start // 8) * np.uint32(3266489909)
            for shift, factor in ((16, 2146121005), (15, 2221713035), (16, 1)):
                x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
            for col in range(start, min(start + 8, cols)):
                out[:, col] = ((x >> np.uint32(8)) & np.uint32(0x7FFF)) / 2.0**15
                x = x * np.uint32(2438952949)
    return out


@np.errstate(all="ignore")
def encode_by_dice(x: Array, scale: Array, bits: int, step: int) -> Array:
    """Stochastic codes of the linear map: the quotient lies between two entries and goes up where the dice
    reach its distance from the upper one."""
    y = x.astype(F32) * (F32(1) / np.asarray(scale, F32))
    thrown = (1 + dice(y.shape, step)).astype(F32)
    number = np.floor(y * F32(2**bits) + thrown).astype(np.float64) - 2
    codes = np.clip(np.where(np.isnan(number), 0, number), 0, 2**bits - 1)
    return np.where(scale == 0, 0, codes).astype(np.uint8)


def pack(codes: Array, bits: int) -> Array:
    """Bytes of a matrix of codes; at 4 bits column 2j is the low nibble of byte j of its row."""
    if bits == 8:
        return codes.astype(np.uint8)
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return even[:, 0::2] | (even[:, 1::2] << 4)


def unpack(packed: Array, bits: int, cols: int) -> Array:
    """The inverse of `pack`, given the number of columns."""
    if bits == 8:
        return packed
    pairs = np.stack([packed & 15, packed >> 4], axis=2)
    return pairs.reshape(len(packed), -1)[:, :cols]


def store_moment(state: State, name: str, x: Array, spec: Spec | None, dice_of: int = 0) -> None:
    """Write a moment into the state: as it is without a spec, else as codes and statistics. dice_of: a step,
    for stochastic rounding."""
    if spec is None:
        state[name] = x
        return
    stats = measure(x, spec)
    scale = scale_matrix(stats, spec, x.shape)
    if dice_of and spec.mapping == "linear":
        codes = encode_by_dice(x, scale, spec.bits, dice_of)
    else:
        codes = encode(x, scale, spec.table())
    state[f"{name}_codes"] = pack(codes, spec.bits)
    state.update({f"{name}_{suffix}": value for suffix, value in stats.items()})


def load_moment(state: State, name: str, shape: tuple[int, int], spec: Spec | None) -> Array:
    """Read a moment back as a float32 matrix."""
    if spec is None:
        return state[name]
    suffixes = ("row_max", "col_max") if spec.norm == "rank1" else ("absmax",)
    stats = {suffix: state[f"{name}_{suffix}"] for suffix in suffixes}
    codes = unpack(state[f"{name}_codes"], spec.bits, shape[1])
    return decode(codes, scale_matrix(stats, spec, shape), spec.table())


def mean32(values: Array) -> np.float32:
    """Mean with a correctly rounded float64 sum (no order to speak of), rounded to float32."""
    return F32(math.fsum(values.astype(np.float64).ravel()) / values.size)


def power(base: float, n: int) -> float:
    """base**n in float64 by squaring, from the least significant bit of n."""
    result = 1.0
    while n:
        if n & 1:
            result *= base
        base *= base
        n >>= 1
    return result


#: options of AdamW that make it algorithm 1 of the paper, to the letter
PAPER: dict[str, Any] = {"compensate": False, "rounding": "nearest"}


class OracleAdamW:
    """AdamW on one whole matrix. A moment with spec None is kept in float32."""

    def __init__(self, shape: tuple[int, ...], first: Spec | None, second: Spec | str | None):
        self.shape = matrix_shape(shape)
        self.first, self.second = first, second
        rows, cols = self.shape
        self.state: State = {"step": 0}
        store_moment(self.state, "exp_avg", np.zeros(self.shape, F32), first)
        if second == "factored":
            self.state["exp_avg_sq_row_mean"] = np.zeros(rows, F32)
            self.state["exp_avg_sq_col_mean"] = np.zeros(cols, F32)
            self.state["exp_avg_sq_mean"] = np.zeros((), F32)
        else:
            assert not isinstance(second, str), second
            store_moment(self.state, "exp_avg_sq", np.zeros(self.shape, F32), second)

    def _factored(self, square: Array, keep: np.float32, take: np.float32) -> Array:
        """Update the row, column and overall means of g*g; give the product they stand for."""
        means = {
            "exp_avg_sq_row_mean": np.array([mean32(row) for row in square], F32),
            "exp_avg_sq_col_mean": np.array([mean32(col) for col in square.T], F32),
            "exp_avg_sq_mean": np.array(mean32(square), F32),
        }
        for key, new in means.items():
            self.state[key] = np.asarray(self.state[key] * keep + new * take)
        overall = self.state["exp_avg_sq_mean"]
        ratio = np.where(overall == 0, F32(0), self.state["exp_avg_sq_row_mean"] / overall)
        return ratio[:, None] * self.state["exp_avg_sq_col_mean"][None, :]

    @np.errstate(all="ignore")
    def step(
        self,
        param: Array,
        grad: Array,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        maximize: bool = False,
        compensate: bool = True,
        rounding: str = "auto",
    ) -> Array:
        """One step; returns the new parameter. Scalars are float64 rounded once to float32."""
        self.state["step"] += 1
        beta1, beta2 = betas
        c1 = 1 - power(beta1, self.state["step"])
        c2 = 1 - power(beta2, self.state["step"])
        keep2, take2 = F32(beta2), F32(1 - beta2)
        g = -grad if maximize else grad
        square = g * g

        m = load_moment(self.state, "exp_avg", self.shape, self.first)
        m = m * F32(beta1) + g * F32(1 - beta1)
        if isinstance(self.second, str):
            v = self._factored(square, keep2, take2)
        else:
            v = load_moment(self.state, "exp_avg_sq", self.shape, self.second)
            v = v * keep2 + square * take2
            dice_of = 0 if rounding == "nearest" else self.state["step"]
            store_moment(self.state, "exp_avg_sq", v, self.second, dice_of)
        store_moment(self.state, "exp_avg", m, self.first)
        if compensate:
            kept = load_moment(self.state, "exp_avg", self.shape, self.first)
            m = m - (kept - m) * F32(beta1 / (1 - beta1) * c1)

        denominator = np.sqrt(v) * F32(1 / math.sqrt(c2)) + F32(eps)
        return param * F32(1 - lr * weight_decay) - m * F32(lr / c1) / denominator


class OracleSGD:
    """SGD with momentum on one whole matrix; the first step copies the gradient."""

    def __init__(self, shape: tuple[int, ...], first: Spec | None):
        self.shape = matrix_shape(shape)
        self.first = first
        self.state: State = {"step": 0}
        store_moment(self.state, "momentum_buffer", np.zeros(self.shape, F32), first)

    @np.errstate(all="ignore")
    def step(
        self,
        param: Array,
        grad: Array,
        *,
        lr: float,
        momentum: float,
        dampening: float,
        nesterov: bool,
        weight_decay: float,
        maximize: bool = False,
        compensate: bool = False,
    ) -> Array:
        """One step; returns the new parameter."""
        self.state["step"] += 1
        g = -grad if maximize else grad
        if weight_decay != 0:
            g = g + param * F32(weight_decay)
        b = g
        if self.state["step"] > 1:
            old = load_moment(self.state, "momentum_buffer", self.shape, self.first)
            b = old * F32(momentum) + g * F32(1 - dampening)
        store_moment(self.state, "momentum_buffer", b, self.first)
        if compensate:
            kept = load_moment(self.state, "momentum_buffer", self.shape, self.first)
            b = b - (kept - b) * F32(momentum / (1 - momentum))
        direction = g + b * F32(momentum) if nesterov else b
        return param - direction * F32(lr)


def to_bf16(x: Array) -> Array:
    """The bfloat16 bits (uint16) nearest to float32 values, ties to even; NaN is 0x7fc0."""
    bits = np.asarray(x, F32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    """The float32 values of bfloat16 bits."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(F32)
