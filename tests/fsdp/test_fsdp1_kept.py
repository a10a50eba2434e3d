"""What FSDP1 keeps otherwise than other layouts do, and checkpoints must not show: buffers that it casts."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.distributed.fsdp import MixedPrecision

import shard4bit
from tests.fsdp.flat import Nest, flattened, wrapped
from tests.pool import pool

BF16 = torch.bfloat16

# ---- buffers that MixedPrecision casts --------------------------------------------------------------


def with_buffers(orig: bool, forward: bool) -> tuple[Any, Any, Any]:
    """A model whose buffers FSDP1 casts at the first forward, its optimizer, and one of them."""
    inner = Nest()
    inner.seen.fill_(0.1)
    inner.first.register_buffer("ema", torch.full((2, 2), 0.3))
    model = flattened(inner, orig, mixed_precision=MixedPrecision(buffer_dtype=BF16))
    if forward:
        model(torch.ones(2, 2))
    assert inner.seen.dtype == (BF16 if forward else torch.float32)
    return model, wrapped("rank1", model), inner


def buffers_saved_and_loaded(orig: bool, root: str) -> list[bool]:
    fresh, optimizer, inner = with_buffers(orig, forward=False)
    model, other, cast = with_buffers(orig, forward=True)
    early, late = (
        shard4bit.save(root, m, o, step=n) for n, (m, o) in enumerate([(fresh, optimizer), (model, other)])
    )
    with patch("shard4bit.fsdp.layout._dtypes_before_casts", return_value={}):
        cast_ones = shard4bit.save(root, model, other, step=2)  # as it was written before
    exact, rounded = torch.full((3,), 0.1), torch.full((3,), 0.1).to(BF16)
    out = []
    for path in (late, cast_ones):
        inner.seen.zero_()
        shard4bit.load(path, fresh, optimizer)
        out += [torch.equal(inner.seen, rounded.float()), inner.seen.dtype == torch.float32]
        out += [shard4bit.digest(fresh, optimizer) == shard4bit.digest(model, other)]
    for path in (early, late, cast_ones):
        cast.seen.zero_()
        shard4bit.load(path, model, other)
        out += [torch.equal(cast.seen, rounded), cast.seen.dtype == BF16]
    alone: Any = Nest()
    alone.first.register_buffer("ema", torch.zeros(2, 2))
    for path, value in ((early, exact), (late, rounded.float())):
        shard4bit.load(path, alone)
        out += [torch.equal(alone.seen, value), float(alone.first.ema[0, 0]) != 0]
    return out


@pytest.mark.parametrize("orig", [True, False])
def test_buffers_before_and_after_the_first_forward(orig: bool, tmp_path: Path) -> None:
    for found in pool(2).run(buffers_saved_and_loaded, orig, str(tmp_path)):
        assert all(found), found
