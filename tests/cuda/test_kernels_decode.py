"""The decode kernel against the torch reference, bit for bit, for any slab."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shard4bit.cuda.source import SECONDS, decode_text
from shard4bit.layout import Slab
from shard4bit.reference import ReferenceBackend
from shard4bit.spec import parse_spec
from shard4bit.state import Moment
from tests.cuda import nvrtc
from tests.cuda.emulator import ORDERS, available
from tests.cuda.runtime import emulated
from tests.cuda.test_gate import FOUR_BLOCKS, violations
from tests.test_invariance import bits

CPU = torch.device("cpu")
KINDS = [("B128/DE", True), ("rank1", False), ("block", False), ("factored", False)]
EMULATED = pytest.mark.skipif(not available(), reason="the emulator needs g++")


@st.composite
def slabs(draw: st.DrawFn) -> Slab:
    """Boxes and runs, also empty ones, of matrices of up to 20 rows and 600 columns."""
    rows, cols = draw(st.integers(1, 20)), draw(st.sampled_from([1, 2, 7, 128, 129, 255, 256, 300, 513, 600]))

    def stretch(size: int) -> tuple[int, int]:
        start = draw(st.integers(0, size))
        return start, draw(st.integers(start, size))

    if draw(st.booleans()):
        return Slab.run((rows, cols), *stretch(rows * cols))
    return Slab.box((rows, cols), [stretch(rows), stretch(cols)])


def filled(name: str, signed: bool, slab: Slab, seed: int) -> Moment:
    """A moment of random codes and statistics of many magnitudes, some of them 0, Inf and NaN."""
    rng = np.random.default_rng(seed)
    moment = Moment.zeros("m", parse_spec(name, signed=signed, argument="moment"), slab, CPU)
    for suffix, tensor in moment.tensors.items():
        if suffix == "codes":
            tensor.copy_(torch.from_numpy(rng.integers(0, 256, tuple(tensor.shape), dtype=np.uint8)))
            continue
        values = 10.0 ** rng.uniform(-40, 30, tuple(tensor.shape))
        odd = rng.uniform(size=tuple(tensor.shape))
        for chance, value in ((0.05, 0.0), (0.03, np.inf), (0.01, np.nan)):
            values = np.where(odd < chance, value, values)
        tensor.copy_(torch.as_tensor(np.asarray(values, dtype=np.float32)))
    return moment


@EMULATED
@pytest.mark.parametrize("name, signed", KINDS)
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(slab=slabs(), seed=st.integers(0, 2**16), order=st.sampled_from(list(ORDERS)))
def test_decoding(name: str, signed: bool, slab: Slab, seed: int, order: int) -> None:
    moment = filled(name, signed, slab, seed)
    backend = emulated(order)
    expected, found = ReferenceBackend().decode(moment), backend.decode(moment)
    assert len(backend.runtime.launches) == (slab.numel > 0)
    assert torch.equal(expected.isnan(), found.isnan())
    keep = ~expected.isnan()
    assert torch.equal(bits(found)[keep], bits(expected)[keep])


@EMULATED
def test_quantizers_without_a_kernel_go_to_the_reference() -> None:
    moment = filled("B2048/DE-0", False, Slab.whole((9, 300)), 1)
    backend = emulated()
    assert torch.equal(backend.decode(moment).isnan(), ReferenceBackend().decode(moment).isnan())
    assert backend.runtime.launches == []


@pytest.mark.skipif(not nvrtc.available(), reason="the package nvidia-cuda-nvrtc is not installed")
@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
def test_it_neither_spills_nor_needs_a_stack(arch: str) -> None:
    for second in (None, *SECONDS[:3]):
        assert violations(decode_text(second), arch, {"decode": FOUR_BLOCKS}) == []
