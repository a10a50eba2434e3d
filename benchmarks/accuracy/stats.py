"""Paired differences between arms: t and bootstrap intervals, and two one-sided tests for equivalence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.90  # of the intervals; 90 % corresponds to two one-sided tests at 5 %
RESAMPLES = 10_000


def t_below(t: float, freedom: int) -> float:
    """P(T <= t) of Student's t with a whole number of degrees of freedom (Abramowitz & Stegun 26.7.3, 4)."""
    if freedom < 1:
        raise ValueError(f"{freedom} degrees of freedom: expected at least 1")
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine2 = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if not odd or freedom > 1 else 0.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine2 * (k - 1) / k
        total += term
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + 0.5 * inside


def t_quantile(share: float, freedom: int) -> float:
    """The t below which ``share`` of the distribution lies, by bisection."""
    low, high = -1e4, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_below(middle, freedom) < share else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Difference:
    """Mean of the paired differences, arm minus baseline, in the metric's unit.

    low, high: 90 % t interval. boot_low, boot_high: 90 % percentile bootstrap over pairs. p: the larger of
    the two one-sided tests' against ``delta``. verdict: "equivalent", "not equivalent" or "inconclusive".
    """

    pairs: int
    mean: float
    low: float
    high: float
    boot_low: float
    boot_high: float
    p: float
    verdict: str


def compare(arm: Sequence[float], baseline: Sequence[float], delta: float) -> Difference:
    """Of values paired by their place. Equivalent: the interval lies inside -delta .. delta.

    Raises ValueError for fewer than two pairs or unequal lengths.
    """
    if len(arm) != len(baseline) or len(arm) < 2:
        raise ValueError(f"{len(arm)} and {len(baseline)} values: expected two or more pairs")
    gaps = np.array(arm, float) - np.array(baseline, float)
    n, mean = len(gaps), float(gaps.mean())
    error = float(gaps.std(ddof=1)) / math.sqrt(n)
    half = t_quantile(0.5 + LEVEL / 2, n - 1) * error
    low, high = mean - half, mean + half
    picks = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
    boot = np.quantile(gaps[picks].mean(1), [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    if error > 0:
        p = max(1 - t_below((mean + delta) / error, n - 1), t_below((mean - delta) / error, n - 1))
    else:
        p = 0.0 if abs(mean) < delta else 1.0
    inside, outside = -delta < low and high < delta, low > delta or high < -delta
    verdict = "equivalent" if inside else "not equivalent" if outside else "inconclusive"
    return Difference(n, mean, low, high, float(boot[0]), float(boot[1]), p, verdict)
