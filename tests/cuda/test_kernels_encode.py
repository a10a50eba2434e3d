"""Given values (an imported state) are encoded by the kernels as by the reference, whatever the cut."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from shard4bit.layout import Slab
from shard4bit.optim import encode as module
from shard4bit.spec import parse_spec
from tests.cuda.emulator import available
from tests.cuda.runtime import emulated
from tests.simulate import Rank, assemble, in_threads, take
from tests.test_invariance import bits, cut, gradient, problems

pytestmark = pytest.mark.skipif(not available(), reason="the emulator needs g++")


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems())
def test_first_moments(problem: dict[str, Any]) -> None:
    spec, shape, cpu = parse_spec("B128/DE", signed=True, argument="x"), problem["shape"], torch.device("cpu")
    values = gradient(problem, 3).float()
    whole = Rank.make(Slab.whole(shape), values, ("m",), [spec], [])
    module.encode(whole.moments[0], values.reshape(-1), (), cpu)
    pieces = cut(problem)
    ranks = [Rank.make(slab, values, ("m",), [spec], []) for slab, _ in pieces]
    with mock.patch.object(module, "backend_for", lambda device: emulated()):
        in_threads(
            [
                partial(module.encode, r.moments[0], take(values, r.slab).reshape(-1), near, cpu)
                for r, (_, near) in zip(ranks, pieces, strict=True)
            ]
        )
    for name, expected in whole.moments[0].tensors.items():
        found = assemble(ranks, f"m_{name}").reshape(expected.shape)
        assert torch.equal(bits(found), bits(expected)), name
