"""How many launches a step takes: as many for one parameter as for thirty, but for the table's."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import shard4bit
from shard4bit.cuda import tables
from shard4bit.cuda.backend import KernelBackend
from tests.cuda.emulator import available
from tests.cuda.runtime import EmulatorRuntime, served_by

pytestmark = pytest.mark.skipif(not available(), reason="the emulator needs g++")

SHAPES = [(17, 256), (65, 64), (4097, 1), (5, 7)] * 7 + [(33,), (4500,)]
LAUNCHES = {
    "rank1": ["clear", "measure", "apply", "commit"],
    "block": ["apply"],
    "factored": ["measure", "gather_sums", "total", "advance_means", "apply"],
    "fp32": ["apply"],
    "sgd": ["apply"],
}


def maker(kind: str) -> Any:
    if kind == "sgd":
        return shard4bit.SGD4bit
    if kind == "fp32":
        return partial(shard4bit.AdamW4bit, quantize=False)
    return partial(shard4bit.AdamW4bit, second_moment=kind)


def sent(launches: list[str]) -> tuple[int, list[str]]:
    """How many launches bring the table, which come first, and the others."""
    count = launches.count("receive")
    assert launches[:count] == count * ["receive"]
    return count, launches[count:]


def stepped(
    kind: str, shapes: list[tuple[int, ...]], steps: int, room: int = 200
) -> list[tuple[list[str], list[int]]]:
    """Launches and uploads of each step."""
    runtime = EmulatorRuntime(room=room)
    backend = KernelBackend(runtime)
    params = [torch.nn.Parameter(torch.ones(s)) for s in shapes]
    optimizer = maker(kind)(params)
    out = []
    for step in range(steps):
        for param in params:
            param.grad = torch.full(param.shape, 1.0 + step)  # in other memory than the last one
        runtime.launches.clear()
        runtime.uploads.clear()
        with served_by(backend):
            optimizer.step()
        out.append(([name for name, _ in runtime.launches], list(runtime.uploads)))
    return out


@pytest.mark.parametrize("kind", LAUNCHES)
def test_launches(kind: str) -> None:
    size = 24 * len(SHAPES) + tables.HYPER.itemsize  # of addresses, and of scalars once for all
    many, one = stepped(kind, SHAPES, 3), stepped(kind, SHAPES[:1], 3)
    for (launches, uploads), (of_one, uploads_of_one) in zip(many, one, strict=True):
        assert sent(launches) == (-(-size // 184), LAUNCHES[kind])
        assert sent(of_one) == (1, LAUNCHES[kind])
        assert len(uploads) == len(uploads_of_one)
    assert not any(uploads for _, uploads in many[1:])  # tables are made once
    for launches, _ in stepped(kind, SHAPES, 2, room=4096):
        assert sent(launches) == (1, LAUNCHES[kind])


def test_only_small_parameters() -> None:
    """Without a matrix that is quantized, rank-1 measures and commits nothing."""
    for launches, _ in stepped("rank1", [(5,), (7, 3)], 2):
        assert sent(launches)[1] == ["apply"]


def test_nothing_to_step() -> None:
    assert sent(stepped("rank1", [(0,), (0, 3)], 2)[1][0])[1] == []


def test_groups_share_launches() -> None:
    """Other hyper-parameters are other rows of a table."""
    runtime = EmulatorRuntime()
    params = [torch.nn.Parameter(torch.ones(65, 64)) for _ in range(4)]
    optimizer = shard4bit.AdamW4bit([{"params": [p], "lr": 0.1 * i} for i, p in enumerate(params)])
    for param in params:
        param.grad = torch.ones_like(param)
    with served_by(KernelBackend(runtime)):
        optimizer.step()
    assert 184 < 4 * 24 + 4 * tables.HYPER.itemsize <= 2 * 184
    assert sent([name for name, _ in runtime.launches]) == (2, LAUNCHES["rank1"])
