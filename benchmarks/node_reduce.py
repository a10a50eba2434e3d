"""A model of the reduce phase, and what it says of more ranks than were measured.

    milliseconds = calls * (a + b * log2(n)) + 2 * (n - 1) / n * bytes / c

n: ranks; calls: all-reduces of a step; a, b: what each takes whatever it moves, and more for each doubling of
n; c: bytes a millisecond that a rank sends in a ring, where it sends 2 * (n - 1) / n of the vector's bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2

import numpy as np

from shard4bit.cli.models import Model
from shard4bit.cli.plan import of_optimizer
from shard4bit.cli.shards import Setup, held
from shard4bit.cli.states import Moments

FORMULA = "ms = calls·(a + b·log2 n) + 2·(n − 1)/n·bytes/c"


@dataclass(frozen=True)
class Point:
    """One measurement: ranks, all-reduces, bytes of their vectors, milliseconds."""

    ranks: int
    calls: int
    size: int
    ms: float = 0.0

    @property
    def terms(self) -> tuple[float, float, float]:
        n = self.ranks
        return self.calls, self.calls * log2(n), 2 * (n - 1) / n * self.size


@dataclass(frozen=True)
class Fit:
    """a, b: milliseconds; c: milliseconds a byte (1 / c of the formula). error: the largest relative one of
    the points that it was fitted to."""

    a: float
    b: float
    c: float
    error: float = 0.0

    def __call__(self, point: Point) -> float:
        """Milliseconds."""
        return float(np.dot((self.a, self.b, self.c), point.terms))

    def __str__(self) -> str:
        speed = f"{1e-6 / self.c:.3g} GB/s" if self.c else "unlimited"
        return (
            f"a = {self.a:.4g} ms, b = {self.b:.4g} ms, c = {speed}; off by {100 * self.error:.0f} % at most"
        )


def fit(points: Sequence[Point]) -> Fit:
    """Least squares of the relative errors, with no constant below 0: one that would be is left out.

    Raises ValueError for fewer than three points.
    """
    if len(points) < 3:
        raise ValueError(f"{len(points)} measurements of the reduce phase: expected at least 3")
    rows = np.array([point.terms for point in points]) / np.array([[point.ms] for point in points])
    kept = [0, 1, 2] if len({point.ranks for point in points}) > 1 else [0, 2]
    while True:
        scale = np.abs(rows[:, kept]).max(axis=0)
        found = np.linalg.lstsq(rows[:, kept] / scale, np.ones(len(rows)), rcond=None)[0] / scale
        if (found >= 0).all():
            break
        kept.remove(kept[int(np.argmin(found * scale))])
    constants = np.zeros(3)
    constants[kept] = found
    a, b, c = constants.tolist()
    error = float(np.abs(rows @ constants - 1).max())
    return Fit(a, b, c, error)


def at(model: Model, ranks: int, moments: Moments) -> Point:
    """What FSDP2's first rank reduces in a step, on so many ranks, by the memory planner's integers."""
    (own,) = held(model, Setup("fsdp2", ranks, "bf16", None, "fp32"))
    beside = of_optimizer(own, moments)[1]
    maxima, sums = beside["reduced maxima"], beside["reduced sums"]
    return Point(ranks, bool(maxima) + bool(sums), maxima + sums)
