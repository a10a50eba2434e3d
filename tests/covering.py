"""Parameters of a test over two axes: of all pairs as few are quick as have every value, the others slow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def covering(first: Iterable[Any], second: Iterable[Any]) -> list[Any]:
    """pytest parameters (value of the first axis, value of the second), the first axis outermost."""
    rows, columns = list(first), list(second)
    quick = {(k % len(rows), k % len(columns)) for k in range(max(len(rows), len(columns)))}
    return [
        pytest.param(row, column, marks=[] if (i, j) in quick else [pytest.mark.slow])
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    ]
