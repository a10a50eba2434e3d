"""Tests of the numpy oracle itself; tables after Li, Chen, Zhu 2023 (arXiv 2309.01507)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.golden import make
from tests.oracle import (
    F32,
    PAPER,
    Array,
    OracleAdamW,
    OracleSGD,
    Spec,
    decode,
    encode,
    from_bf16,
    is_quantized,
    make_table,
    matrix_shape,
    measure,
    midpoints,
    pack,
    power,
    scale_matrix,
    to_bf16,
    unpack,
)

DE_SIGNED = [
    *(-0.8875, -0.6625, -0.4375, -0.2125, -0.0775, -0.0325, -0.0055, 0.0),
    *(0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1.0),
]
DE_UNSIGNED = [
    *(0.0, 0.00325, 0.00775, 0.02125, 0.04375, 0.06625, 0.08875, 0.15625),
    *(0.26875, 0.38125, 0.49375, 0.60625, 0.71875, 0.83125, 0.94375, 1.0),
]
DE0 = [0.00325, *DE_UNSIGNED[1:]]
LINEAR = [
    *(0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375, 0.5),
    *(0.5625, 0.625, 0.6875, 0.75, 0.8125, 0.875, 0.9375, 1.0),
]
ALL_TABLES = [
    (mapping, bits, signed)
    for mapping, signed in (("de", True), ("de", False), ("de0", False), ("linear", False))
    for bits in (4, 8)
]
M4 = Spec(signed=True)
RANK1 = Spec(norm="rank1", mapping="linear")
ADAMW: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def bits_of(x: Array) -> Array:
    return np.asarray(x, F32).view(np.uint32)


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(F32)


@pytest.mark.parametrize(
    ("mapping", "signed", "literal"),
    [("de", True, DE_SIGNED), ("de", False, DE_UNSIGNED), ("de0", False, DE0)] + [("linear", False, LINEAR)],
)
def test_four_bit_tables_to_the_last_digit(mapping: str, signed: bool, literal: list[float]) -> None:
    assert make_table(mapping, 4, signed).tolist() == literal


@pytest.mark.parametrize(("mapping", "bits", "signed"), ALL_TABLES)
def test_tables_are_ascending_and_end_at_one(mapping: str, bits: int, signed: bool) -> None:
    table = make_table(mapping, bits, signed)
    assert table.shape == (2**bits,)
    gaps = np.diff(table)
    assert (gaps[1:] > 0).all()
    assert gaps[0] == 0 if mapping == "de0" else gaps[0] > 0
    assert table[-1] == 1
    assert (np.diff(midpoints(table)) > 0).all()


def test_eight_bit_tables_at_known_places() -> None:
    signed, unsigned = make_table("de", 8, True), make_table("de", 8, False)
    assert signed[127] == 0 and unsigned[0] == 0
    assert signed[128] == 5.5e-7 and (signed[:127] == -signed[128:255][::-1]).all()
    assert unsigned[1:3].tolist() == [3.25e-7, 7.75e-7]
    assert signed[254] == 0.99296875 and unsigned[254] == 0.996484375
    assert make_table("linear", 8, False)[0] == 1 / 256


def test_maps_that_do_not_exist_are_refused() -> None:
    for mapping, signed in (("de0", True), ("linear", True), ("nf", False)):
        with pytest.raises(ValueError):
            make_table(mapping, 4, signed)
    with pytest.raises(ValueError):
        measure(np.ones((2, 2), F32), Spec(norm="rank1", signed=True))


def test_shapes() -> None:
    assert matrix_shape(()) == (1, 1)
    assert matrix_shape((7,)) == (7, 1)
    assert matrix_shape((3, 5)) == (3, 5)
    assert matrix_shape((64, 3, 3, 3)) == (64, 27)
    assert matrix_shape((8, 16, 400)) == (128, 400)
    assert matrix_shape((4, 2, 4)) == (4, 8)  # a tie goes to the first cut
    assert not is_quantized((64, 64)) and is_quantized((64, 65)) and not is_quantized((9999,))


@pytest.mark.parametrize(("mapping", "bits", "signed"), ALL_TABLES)
def test_encoding_takes_the_nearest_and_ties_take_the_lower(mapping: str, bits: int, signed: bool) -> None:
    table = make_table(mapping, bits, signed)
    mids, one = midpoints(table), F32(1)
    assert encode(mids, one, table).tolist() == list(range(2**bits - 1))
    above = np.nextafter(mids, F32(2))
    assert encode(above, one, table).tolist() == list(range(1, 2**bits))
    x = np.random.default_rng(0).uniform(-1 if signed else 0, 1, 500).astype(F32)
    chosen = np.abs(table[encode(x, one, table)] - x)
    assert (chosen <= np.abs(table[None, :] - x[:, None]).min(axis=1) + 1e-7).all()


@pytest.mark.parametrize(("mapping", "bits", "signed"), ALL_TABLES)
def test_entries_come_back_as_themselves(mapping: str, bits: int, signed: bool) -> None:
    table = make_table(mapping, bits, signed)
    for scale in (F32(1), F32(3e-38), F32(3e38), F32(0.7)):
        codes = encode(decode(np.arange(2**bits), scale, table), scale, table)
        assert (table[codes] == table).all()  # the first two of DE-0 are one value


def test_zero_blocks_have_code_zero_and_decode_to_zeros() -> None:
    x = np.ones((3, 300), F32)
    x[1, 128:256] = 0
    x[2] = 2.0**-127  # below the smallest normal: kept as 0
    stats = measure(x, M4)
    assert stats["absmax"].tolist() == [[1, 1, 1], [1, 0, 1], [0, 0, 0]]
    scale = scale_matrix(stats, M4, x.shape)
    codes = encode(x, scale, M4.table())
    assert (codes[1, 128:256] == 0).all() and (codes[2] == 0).all() and (codes[0] == 15).all()
    assert (decode(codes, scale, M4.table())[2] == 0).all()


def test_statistics_by_norm() -> None:
    x = np.abs(normal(1, 5, 300))
    block = measure(x, Spec(block=128))["absmax"]
    assert block.shape == (5, 3) and block[4, 2] == x[4, 256:].max()
    whole = measure(x, Spec(norm="tensor"))["absmax"]
    assert whole.shape == () and whole.dtype == F32 and whole == x.max()
    stats = measure(x, RANK1)
    assert stats["row_max"].shape == (5,) and stats["col_max"].shape == (300,)
    scale = scale_matrix(stats, RANK1, x.shape)
    assert (scale >= x).all()
    row, col = F32(1) / stats["row_max"], F32(1) / stats["col_max"]
    assert (F32(1) / scale == np.maximum(row[:, None], col[None, :])).all()


def test_the_smallest_normal_is_kept_and_subnormals_are_not_flushed() -> None:
    tiny = F32(2.0**-126)
    x = np.array([[tiny, tiny / 2, tiny / 4, 0]], F32)
    assert x[0, 2] > 0
    assert measure(x, Spec())["absmax"][0, 0] == tiny
    linear = Spec(mapping="linear")
    assert encode(x, tiny, linear.table()).tolist() == [[15, 7, 3, 0]]
    huge = F32(2.0**127)  # its reciprocal is subnormal
    assert encode(np.array([huge, huge / 2]), huge, linear.table()).tolist() == [15, 7]


def test_non_finite_values_stay_visible() -> None:
    odd_nan = np.uint32(0xFFC12345).view(F32)
    x = np.ones((4, 200), F32)
    x[1, 3], x[2, 150] = odd_nan, np.inf
    absmax = measure(x, M4)["absmax"]
    assert bits_of(absmax[1, 0]) == 0x7FC00000 and absmax[1, 1] == 1
    assert absmax[2].tolist() == [1, np.inf]
    codes = encode(x, scale_matrix({"absmax": absmax}, M4, x.shape), M4.table())
    assert (codes[1, :128] == 0).all()
    assert codes[2, 150] == 0 and codes[2, 151] == 7  # Inf * 0 is NaN; 1 * 0 is 0
    assert not np.isfinite(decode(codes, np.full(x.shape, np.inf, F32), M4.table())[2]).any()
    stats = measure(x, RANK1)
    assert bits_of(stats["row_max"][1]) == 0x7FC00000 == bits_of(stats["col_max"][3])
    scale = scale_matrix(stats, RANK1, x.shape)
    assert np.isnan(scale[1]).all() and np.isnan(scale[:, 3]).all()
    assert scale[2, 0] == 1 and scale[2, 150] == np.inf


def test_pack_puts_even_columns_low() -> None:
    codes = np.array([[1, 2, 3], [15, 0, 9]], np.uint8)
    packed = pack(codes, 4)
    assert packed.dtype == np.uint8 and packed.tolist() == [[0x21, 0x03], [0x0F, 0x09]]
    assert (unpack(packed, 4, 3) == codes).all()
    assert (pack(codes, 8) == codes).all() and (unpack(codes, 8, 3) == codes).all()


def test_power_and_bf16() -> None:
    assert power(0.9, 5) == 0.9 * ((0.9 * 0.9) * (0.9 * 0.9)) and power(0.3, 0) == 1
    assert math.isclose(power(0.999, 1000), 0.999**1000, rel_tol=1e-13)
    x = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, -np.inf, 3.4e38, np.nan], F32)
    assert to_bf16(x).tolist() == [0x3F80, 0x3F80, 0x3F82, 0xFF80, 0x7F80, 0x7FC0]
    assert to_bf16(np.uint32(0x7F800001).view(F32)) == 0x7FC0
    every = np.arange(2**16, dtype=np.uint16)
    wide = from_bf16(every)
    assert (to_bf16(wide)[~np.isnan(wide)] == every[~np.isnan(wide)]).all()


def test_adamw_without_quantization_is_adamw() -> None:
    shape = (20, 30)
    p = normal(2, *shape)
    oracle = OracleAdamW(shape, None, None)
    q, m, v = p.astype(np.float64), np.zeros(shape), np.zeros(shape)
    for t in range(1, 21):
        g = normal(100 + t, *shape)
        p = oracle.step(p, g, **ADAMW, maximize=t % 2 == 0)
        wide = g.astype(np.float64) * (-1 if t % 2 == 0 else 1)
        m, v = 0.9 * m + 0.1 * wide, 0.999 * v + 0.001 * wide**2
        q = q * (1 - 1e-2 * 0.1)
        q = q - 1e-2 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    assert p.dtype == F32 and oracle.state["step"] == 20
    assert set(oracle.state) == {"step", "exp_avg", "exp_avg_sq"}
    np.testing.assert_allclose(p, q, rtol=2e-5, atol=2e-6)


def test_factored_is_exact_for_squares_of_rank_one() -> None:
    rows, cols = np.abs(normal(3, 12)) + 0.1, np.abs(normal(4, 9)) + 0.1
    grad = np.outer(rows, cols).astype(F32)
    p = normal(5, 12, 9)
    factored, full = OracleAdamW((12, 9), None, "factored"), OracleAdamW((12, 9), None, None)
    a, b = p, p
    for _ in range(3):
        a, b = factored.step(a, grad, **ADAMW), full.step(b, grad, **ADAMW)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    assert factored.state["exp_avg_sq_mean"].shape == ()
    zero = OracleAdamW((12, 9), None, "factored").step(p, np.zeros((12, 9), F32), **ADAMW)
    assert (zero == p * F32(1 - 1e-2 * 0.1)).all()


def test_the_update_uses_the_moments_before_they_are_quantized() -> None:
    p, g = normal(6, 40, 130), normal(7, 40, 130)
    quantized, exact = OracleAdamW((40, 130), M4, RANK1), OracleAdamW((40, 130), None, None)
    assert (quantized.step(p, g, **ADAMW, **PAPER) == exact.step(p, g, **ADAMW, **PAPER)).all()
    assert quantized.state["exp_avg_codes"].shape == (40, 65)
    assert quantized.state["exp_avg_absmax"].shape == (40, 2)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_without_quantization_is_sgd(nesterov: bool) -> None:
    p = normal(8, 15, 10)
    oracle, q, buffer = OracleSGD(p.shape, None), p.astype(np.float64), None
    for t in range(1, 8):
        g = normal(200 + t, 15, 10)
        p = oracle.step(p, g, lr=0.1, momentum=0.9, dampening=0.25, nesterov=nesterov, weight_decay=0.01)
        wide = g + 0.01 * q
        buffer = wide if buffer is None else 0.9 * buffer + 0.75 * wide
        q = q - 0.1 * (wide + 0.9 * buffer if nesterov else buffer)
    np.testing.assert_allclose(p, q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(make.CASES))
def test_golden_files_equal_a_fresh_regeneration(name: str) -> None:
    fresh = make.build(name)
    assert is_quantized(make.CASES[name].shape)
    with np.load(make.HERE / f"{name}.npz") as stored:
        assert set(stored.files) == set(fresh)
        for key, value in fresh.items():
            assert stored[key].dtype == value.dtype and stored[key].shape == value.shape, key
            assert stored[key].tobytes() == value.tobytes(), key


def test_golden_files_are_all_listed_and_small() -> None:
    files = list(make.HERE.glob("*.npz"))
    assert {file.stem for file in files} == set(make.CASES)
    assert sum(file.stat().st_size for file in files) < 700_000


def test_golden_cases_hold_what_they_are_for() -> None:
    ties = make.build("adamw_ties")["step1/grad"]  # scales are 1/2 and 1/4 there, inverses 2 and 4
    block = np.isin(ties[:, :128], midpoints(make_table("de", 4, True)))
    assert block.sum() > 400
    assert np.isin(ties * ties, midpoints(make_table("linear", 4, False))).sum() > 400
    small = make.build("adamw_subnormal")
    assert (small["step1/exp_avg_absmax"] == 0).any()
    assert small["step1/exp_avg_sq_col_max"].max() > 2.0**126
    bad = make.build("adamw_nonfinite")
    assert np.isfinite(bad["step2/param"]).all() and not np.isfinite(bad["step3/param"]).all()
    assert (bits_of(bad["step3/exp_avg_absmax"]) == 0x7FC00000).sum() == 1
    for row in (bad["step3/exp_avg_sq_row_max"], bad["step3/exp_avg_sq_col_max"]):
        assert np.isnan(row).sum() == 1 and np.isinf(row).sum() == 2
