"""Host memory that saving and loading take beside the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import shard4bit
from tests.fsdp.models import Zoo

MIB = 1 << 20
SLACK = 16 * MIB  # buffers of files
LARGEST = 24 * MIB
SIZE = 12 * LARGEST  # bytes of the model, in tensors of as much


def growth(work: Callable[[], Any]) -> int:
    """Bytes by which this process grew at most."""

    def memory(field: str) -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = memory("VmRSS")
    work()
    return memory("VmHWM") - before


class Large(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for number in range(SIZE // LARGEST):
            self.register_parameter(f"p{number}", torch.nn.Parameter(torch.ones(LARGEST // 4096, 1024)))


def test_saving_and_loading_take_little_memory(tmp_path: Path) -> None:
    model, warm = Large(), Zoo({"b": (5,)})
    shard4bit.save(tmp_path / "warm", warm, step=1)
    shard4bit.load(tmp_path / "warm", warm)
    assert growth(lambda: shard4bit.save(tmp_path, model, step=1)) < LARGEST + SLACK
    assert growth(lambda: shard4bit.load(tmp_path, model)) < LARGEST + SLACK
    staged = growth(lambda: shard4bit.save(tmp_path, model, step=2, asynchronous=True).wait())
    assert SIZE // 2 < staged < SIZE + LARGEST + SLACK  # one host copy, in part in memory freed before
    assert growth(lambda: shard4bit.digest(model)) < LARGEST + SLACK
