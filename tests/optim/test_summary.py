"""print(optimizer): what is quantized and why not, what it costs, without touching anything."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import shard4bit
from tests.optim.helpers import model_of, run


def sorts() -> dict[str, nn.Parameter]:
    shapes = {"embed": (300, 20), "big": (90, 70), "conv": (32, 16, 3, 3), "small": (64, 64), "bias": (5000,)}
    out = {n: nn.Parameter(torch.ones(s)) for n, s in shapes.items()}
    out["frozen"] = nn.Parameter(torch.ones(3), requires_grad=False)
    return out


def test_counts_and_reasons() -> None:
    params = sorts()
    groups: Any = [{"params": [params.pop("embed")], "quantize": False}, {"params": list(params.values())}]
    text = repr(shard4bit.AdamW4bit(groups, lr=torch.tensor(0.25)))
    for line in (
        "AdamW4bit (",
        "4-bit (exp_avg B128/DE, exp_avg_sq Rank-1/Linear): 2 parameters, 10,908 elements",
        "fp32, by quantize=False: 1 parameter, 6,000 elements",
        "fp32, too small (at most 4,096 elements): 1 parameter, 4,096 elements",
        "fp32, no matrices: 1 parameter, 5,000 elements",
        "frozen, without a state: 1 parameter, 3 elements",
        "communication of a step: 0 bytes in 0 all-reduces",
        "    lr: 0.25\n",
    ):
        assert line in text, (line, text)
    assert "WARNING" not in text


@pytest.mark.parametrize(
    "options, words",
    [
        ({"second_moment": "factored"}, "4-bit (exp_avg B128/DE, exp_avg_sq factored)"),
        (shard4bit.spec.ADAMW_8BIT, "8-bit (exp_avg B2048/DE/8"),
        ({"first_moment": "fp32", "second_moment": "B128/DE/8"}, "8-bit (exp_avg fp32"),
        ({"first_moment": "fp32", "second_moment": "factored"}, "reduced (exp_avg fp32"),
        ({"first_moment": "fp32", "second_moment": "fp32"}, "fp32, as the options say"),
    ],
)
def test_specs(options: dict[str, Any], words: str) -> None:
    assert words in repr(shard4bit.AdamW4bit([sorts()["big"]], **options))


def test_sgd() -> None:
    assert "4-bit (momentum_buffer B128/DE)" in repr(shard4bit.SGD4bit([sorts()["big"]]))
    assert "without a state (momentum=0)" in repr(shard4bit.SGD4bit([sorts()["big"]], momentum=0.0))


def test_bytes_are_those_of_the_state() -> None:
    """Known before binding, as one process has everything; and the same as what is then held."""
    model = model_of()
    optimizer = shard4bit.AdamW4bit(model.parameters())
    costs = r"state on this rank: ([\d,]+) bytes for ([\d,]+) elements"
    before = re.search(costs, repr(optimizer))
    assert not optimizer.state  # and printing has bound nothing
    run(model.parameters(), optimizer, range(1))
    after = re.search(costs, repr(optimizer))
    held = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
    assert before and after
    assert before[1] == after[1] == f"{held:,}"
    assert after[2] == f"{sum(p.numel() for p in model.parameters()):,}"
    assert "communication of a step: 0 bytes in 0 all-reduces" in repr(optimizer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_are_warned_of(dtype: torch.dtype) -> None:
    model = model_of(dtype=dtype)
    text = repr(shard4bit.AdamW4bit([*model.parameters(), sorts()["big"]]))
    assert f"WARNING: {len(list(model.parameters()))} of these" in text
    assert str(dtype).removeprefix("torch.") in text


def test_printing_never_raises() -> None:
    optimizer = shard4bit.AdamW4bit([sorts()["big"]])
    optimizer.param_groups[0]["second_moment"] = "nonsense"
    assert "nonsense" in repr(optimizer)
    assert "AdamW4bit" in repr(shard4bit.AdamW4bit([nn.Parameter(torch.ones(9, 9, device="meta"))]))
