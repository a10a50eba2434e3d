"""maths/rounding.py: the random numbers by their distribution, the codes by their mean."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shard4bit.maths.rounding import draws, encode_drawn

ROWS = torch.arange(1500)


def chi_square(*numbers: torch.Tensor, bins: int) -> float:
    """(statistic - degrees of freedom) in standard deviations, of a histogram of tuples in [0, 1)."""
    found = np.histogramdd([n.flatten().double().numpy() for n in numbers], bins, [(0, 1)] * len(numbers))[0]
    expected, freedom = numbers[0].numel() / found.size, found.size - 1
    return float((((found - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


def test_numbers_are_uniform_and_independent() -> None:
    """Of neighbouring rows, columns and steps too: nothing is beyond 4.5 standard deviations."""
    now, later = (draws(ROWS, 0, 1024, step).double() - 1 for step in (1000, 1001))
    assert now.min() >= 0 and now.max() == 1 - 2.0**-15
    pairs = [(now, later), (now[1:], now[:-1]), (now[8:], now[:-8]), (now[:, 8:], now[:, :-8])]
    pairs += [(now[:, i::8], now[:, j::8]) for i, j in combinations(range(8), 2)]
    scores = [chi_square(a, b, bins=24) for a, b in pairs]
    scores += [chi_square(now[:, k::8], bins=4096) for k in range(8)]
    scores.append(chi_square(now[:, 0::8], now[:, 1::8], now[:, 2::8], bins=8))
    assert max(map(abs, scores)) < 4.5, scores


def test_numbers_over_steps() -> None:
    """Of one element in many steps, which is what its second moment sees."""
    rows = torch.tensor([0, 1, 77, 2**31 + 5])
    steps = torch.stack([draws(rows, 0, 16, step) for step in range(1, 6001)]).double() - 1
    one = steps.permute(1, 2, 0).reshape(-1, 6000)  # (elements, steps)
    assert all(abs(chi_square(x, bins=64)) < 4.5 for x in one)
    assert abs(chi_square(one[:, 1:], one[:, :-1], bins=24)) < 4.5


@settings(deadline=None, max_examples=60)
@given(
    row=st.integers(0, 2**40), col0=st.integers(0, 40), width=st.integers(1, 40), step=st.integers(1, 2**24)
)
def test_numbers_do_not_depend_on_the_window(row: int, col0: int, width: int, step: int) -> None:
    every = draws(torch.arange(row, row + 3), 0, col0 + width, step)
    assert torch.equal(draws(torch.tensor([row + 1]), col0, col0 + width, step), every[1:2, col0:])


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_right_on_average(bits: int) -> None:
    """Between its neighbours, with the mean of the value; exact entries stay, however small the first is."""
    size, torch_rows = 1 << bits, torch.arange(60_000)
    y = torch.cat(
        [torch.arange(1, size + 1)[:16] / size, torch.rand(40, generator=torch.Generator().manual_seed(0))]
    )
    codes = encode_drawn(y.repeat(len(torch_rows), 1), draws(torch_rows, 3, 3 + len(y), 9), bits)
    values = (codes.double() + 1) / size
    assert torch.equal(values[:, :16], y[:16].double().expand(len(values), -1))
    inside = y >= 1 / size
    off = (values.mean(0) - y.double())[inside] * size
    assert off.abs().max() < 5 * 0.5 / len(values) ** 0.5 + 2.0**-16
    assert ((values - y.double()).abs()[:, inside] * size < 1).all()


def test_codes_at_the_ends() -> None:
    """Below the first entry (which stands for everything smaller), just above 1, and NaN."""
    y = torch.tensor([0.0, 1e-30, 0.06, 1.0, 1.0 + 2.0**-23, float("nan")])
    for drawn, codes in ((1.0, [0, 0, 0, 15, 15, 0]), (2 - 2.0**-15, [0, 0, 0, 15, 15, 0])):
        assert encode_drawn(y.clone(), torch.full_like(y, drawn), 4).tolist() == codes
