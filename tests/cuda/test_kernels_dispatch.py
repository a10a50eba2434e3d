"""Which specs the kernels serve, the golden vectors through them, and the others through the reference."""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import shard4bit
from shard4bit.backend import Work
from shard4bit.cuda.backend import KernelBackend, second_of
from shard4bit.layout import Slab
from shard4bit.spec import FIRST_MOMENTS, SECOND_MOMENTS, parse_spec
from shard4bit.state import Moment
from tests import test_oracle_agreement as golden
from tests.cuda.emulator import available
from tests.cuda.runtime import EmulatorRuntime, Twins, served_by
from tests.cuda.test_kernels_optimizers import grads, starts

pytestmark = pytest.mark.skipif(not available(), reason="the emulator needs g++")

SERVED = {
    ("B128/DE", "Rank-1/Linear"): "RANK1",
    ("B128/DE", "rank1"): "RANK1",
    ("B128/DE", "B128/Linear"): "BLOCKED",
    ("B128/DE", "block"): "BLOCKED",
    ("B128/DE", "factored"): "FACTORED",
    ("fp32", "fp32"): "",
    ("B128/DE",): "NONE",
    ("fp32",): "",
}
FIRSTS = (*FIRST_MOMENTS, "B64/DE", "B256/DE", "B128/DE/8")
SECONDS = (*SECOND_MOMENTS, "rank1", "block", "B64/Linear", "B128/Linear/8", "Rank-1/Linear/8")
ALL = [*product(FIRSTS, SECONDS), *((f,) for f in FIRSTS), ()]
SHAPES = [(33, 128), (61, 131), (77,)]
# In golden vectors of these no kernel works.
UNSERVED_FILES = {"adamw_8bit", "adamw_de0", "sgd_dampening_tensor"}


def work_of(names: tuple[str, ...]) -> Work:
    slab, cpu = Slab.whole((8, 256)), torch.device("cpu")
    specs = [parse_spec(n, signed=i == 0, argument="spec") for i, n in enumerate(names)]
    moments = [Moment.zeros(str(i), spec, slab, cpu) for i, spec in enumerate(specs)]
    return Work(slab, moments, torch.zeros(8, 256), [torch.zeros(8, 256)], {})


@pytest.mark.parametrize("names", ALL, ids="+".join)
def test_what_is_served(names: tuple[str, ...]) -> None:
    assert second_of(work_of(names)) == SERVED.get(names)


@pytest.mark.parametrize("path", golden.GOLDEN, ids=lambda p: p.stem)
def test_golden_vectors(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = EmulatorRuntime()
    if path.stem == "adamw_factored":  # sums in another order, see test_kernels_factored.py
        close = partial(np.testing.assert_allclose, rtol=2.0**-19, atol=2.0**-28)
        monkeypatch.setattr(golden, "same_bits", lambda a, b: close(a, b) is None)
    with served_by(KernelBackend(runtime)):
        golden.test_golden_vectors(path)
    steps = int(np.load(path)["steps"])
    kernels = [name for name, _ in runtime.launches].count("apply")
    assert kernels == (0 if path.stem in UNSERVED_FILES else steps)


UNSERVED = [n for n in ALL if n not in SERVED and len(n) == 2 and (n[0] == "B128/DE" or n[1] == "rank1")]


@pytest.mark.parametrize("names", UNSERVED, ids="+".join)
def test_other_specs_go_to_the_reference(names: tuple[str, str]) -> None:
    """In one step with parameters that kernels serve."""
    runtime = EmulatorRuntime()
    make = partial(shard4bit.AdamW4bit, first_moment=names[0], second_moment=names[1])
    served = {"first_moment": "B128/DE", "second_moment": "rank1"}
    twins = Twins(
        starts([*SHAPES, (65, 64)]),
        make,
        KernelBackend(runtime),
        grouped=lambda ps: [{"params": ps[:-1]}, {"params": ps[-1:], **served}],
    )
    for step in range(1, 3):
        twins.step(grads([*SHAPES, (65, 64)], step))
        assert twins.differences() == []
    launches = [name for name, _ in runtime.launches if name != "receive"]
    assert launches == 2 * ["clear", "measure", "apply", "commit"]


@pytest.mark.parametrize("options", [{"momentum": 0.0}, {"momentum_buffer": "B2048/DE/8"}], ids=str)
def test_other_sgd_goes_to_the_reference(options: dict[str, object]) -> None:
    runtime = EmulatorRuntime()
    shapes = SHAPES[:2]
    make = partial(shard4bit.SGD4bit, lr=0.1, weight_decay=0.1, **options)
    twins = Twins(starts(shapes), make, KernelBackend(runtime))
    for step in range(1, 3):
        twins.step(grads(shapes, step))
        assert twins.differences() == []
    assert runtime.launches == []
