"""Python's part of a step: python -m benchmarks.step_host

Microseconds of ``step()`` before the first launch (the GPU idles meanwhile, if it has nothing else), before
the last one, and in all, with kernels that do nothing: the parameters (the 1.1 B Llama-style model's, a few
elements each) lie on the CPU. Medians. What the CUDA driver takes for launches and copies is not in it.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.shapes import llama
from shard4bit import AdamW4bit
from shard4bit.cuda.backend import KernelBackend
from shard4bit.optim import stepping


class Silent:
    """A runtime that notes when it is called. See ``shard4bit.cuda.runtime.Runtime``."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.times: list[float] = []

    def launch(self, source: str, name: str, blocks: int, threads: int, args: tuple[Any, ...]) -> None:
        self.times.append(time.perf_counter())

    def capturing(self) -> bool:
        return False

    def upload(
        self, host: np.ndarray, into: torch.Tensor | None = None, *, capturable: bool = False
    ) -> torch.Tensor:
        flat = torch.from_numpy(host.view(np.uint8).reshape(-1))
        if into is None:
            return flat.clone()
        into[: flat.numel()] = flat
        return into


def measure(tensors: int, second: str, steps: int) -> list[float]:
    """Medians of (first launch, last launch, whole step) in microseconds."""
    shapes = [(66, 66)] * tensors if tensors else [tuple(min(n, 80) for n in s) for s in llama()]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = AdamW4bit(params, second_moment=second)
    runtime = Silent()
    backend = KernelBackend(runtime)
    rows = []
    with mock.patch.object(stepping, "backend_for", lambda device: backend):
        for _ in range(steps):
            for p in params:
                p.grad = torch.empty_like(p)
            runtime.times.clear()
            begin = time.perf_counter()
            optimizer.step()
            end = time.perf_counter()
            rows.append([1e6 * (t - begin) for t in (runtime.times[0], runtime.times[-1], end)])
    return [statistics.median(column) for column in zip(*rows[3:], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores")
    print(
        "| tensors | second moment | first launch us | last launch us | step us |\n|---|---|---:|---:|---:|"
    )
    for tensors in (0, 2000):
        for second in ("block", "rank1", "factored"):
            row = measure(tensors, second, args.steps)
            cells = " | ".join(f"{x:,.0f}" for x in row)
            print(f"| {tensors or len(llama())} | {second} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
