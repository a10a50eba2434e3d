"""divide_in_range of arith.cuh, whatever the hardware guesses: proven for all reciprocals, by numpy."""

from __future__ import annotations

import numpy as np
import pytest

ONE = 0x3F800000
Floats = np.ndarray


def rounded(high: Floats, low: Floats) -> Floats:
    """float32 of high + low, where high is their float64 sum and low what it leaves out."""
    near = high.astype(np.float32)
    over = high - near
    for end, sign in ((np.inf, 1.0), (-np.inf, -1.0)):
        other = np.nextafter(near, np.float32(end))
        tie = (over == (other.astype(np.float64) - near) / 2) & (low * sign > 0)
        near = np.where(tie, other, near)
    return near


def fma(a: Floats, b: Floats, c: Floats) -> Floats:
    product, c = a.astype(np.float64) * b, c.astype(np.float64)  # exact: 48 bits
    total = product + c
    back = total - product
    return rounded(total, (product - (total - back)) + (c - back))


def mantissas() -> Floats:
    return (np.arange(1 << 23, dtype=np.uint32) + np.uint32(ONE)).view(np.float32)


def test_fma_rounds_once() -> None:
    a, b = (np.float32([1 + 2.0**-12, -1 - 2.0**-12, 1 + 2.0**-23, 3.0]) for _ in range(2))
    c = np.float32([2.0**-50, -(2.0**-50), 1.0, -9.0])
    exact = [1 + 2.0**-11 + 2.0**-23, 1 + 2.0**-11, 2.0 + 2.0**-22, 0.0]
    assert fma(a, b, c).tolist() == exact


@pytest.mark.slow
def test_all_reciprocals_and_the_quotients_they_could_spoil() -> None:
    """With a guess of 1/b within one unit in the last place, two quotients of mantissas are wrong at most.

    tests/gpu/test_arithmetic.py shows that no GPU makes these guesses.
    """
    b = mantissas()
    best = (1.0 / b.astype(np.float64)).astype(np.float32)
    spoilt: set[tuple[int, float]] = set()
    for off in (-1, 0, 1):
        guess = (best.view(np.int32) + np.int32(off)).view(np.float32)
        by = fma(fma(-b, guess, np.ones_like(b)), guess, guess)
        wrong = np.nonzero(by != best)[0]
        assert len(wrong) == {-1: 1, 0: 0, 1: 32}[off]
        spoilt |= {(int(i) + ONE, float(by[i])) for i in wrong}
    a, failures = mantissas(), set()
    for bits, by_one in spoilt:
        divisor = np.uint32(bits).view(np.float32)
        by = np.full_like(a, by_one)
        q = (a.astype(np.float64) * by).astype(np.float32)
        q = fma(fma(np.full_like(a, -divisor), q, a), by, q)
        truth = (a.astype(np.float64) / np.float64(divisor)).astype(np.float32)
        failures |= {(bits, int(i) + ONE) for i in np.nonzero(q != truth)[0]}
    assert failures == {(0x3FFFFFFD, 0x3FD55553), (0x3FFFFFFF, ONE)}
