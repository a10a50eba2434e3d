"""Launches that are prepared once and queued: when their arguments are read, and from which threads."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import shard4bit
from shard4bit.cuda.plan import CHUNK_ARGUMENTS
from shard4bit.cuda.source import receive_text

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def runtime_of(room: int | None = None) -> Any:
    from shard4bit.cuda.runtime import CupyRuntime

    runtime = CupyRuntime(torch.device("cuda", torch.cuda.current_device()))
    runtime.room = room or runtime.room
    return runtime


@pytest.mark.parametrize("room", [4096, None], ids=["least", "as it is"])
def test_arguments_are_copied_when_queued(room: int | None) -> None:
    """What comes after does not change them, though the GPU has not begun yet; nor does a capture see it."""
    runtime = runtime_of(room)
    assert runtime.room in (4096, 32764)
    size = (runtime.room - CHUNK_ARGUMENTS) // 4 * 4
    table, into = np.zeros(size, np.uint8), torch.zeros(size, dtype=torch.uint8, device="cuda")
    args = table, into.data_ptr(), np.int32(size // 4)
    launch = runtime.prepare(receive_text(size), "receive", -(-size // 1024), 256, args)
    found = []
    torch.cuda.synchronize()
    torch.cuda._sleep(10**8)
    for value in range(1, 5):
        table[:] = value
        runtime.queue([launch])
        found.append(into.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        runtime.queue([launch])
    table[:] = 9
    graph.replay()
    found.append(into.clone())
    assert [x.unique().tolist() for x in found] == [[1], [2], [3], [4], [4]]


@pytest.mark.parametrize("begun", [False, True], ids=["from the first step", "later"])
def test_a_thread_of_its_own(begun: bool) -> None:
    """Whose first call is the step, before anything has given it the device's context."""
    start = torch.randn(65, 256, generator=torch.Generator().manual_seed(1))
    found = []
    for threaded in (False, True):
        param = nn.Parameter(start.cuda())
        param.grad = torch.ones_like(param)
        optimizer = shard4bit.AdamW4bit([param])
        if begun:
            optimizer.step()
        torch.cuda.synchronize()
        if threaded:
            thread = threading.Thread(target=optimizer.step)
            thread.start()
            thread.join()
        else:
            optimizer.step()
        torch.cuda.synchronize()
        found.append((param.detach(), optimizer.state[param]["step"]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] == 1 + begun
