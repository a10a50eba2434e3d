"""Python's part of a step: python -m benchmarks.step_host

Microseconds of ``step()`` before the first launch (the GPU idles meanwhile, if it has nothing else), before
the last one, and in all, with kernels that do nothing: the parameters (the 1.1 B Llama-style model's, a few
elements each) lie on the CPU. Medians. What the CUDA driver takes for launches is not in it.

With --cuda, the same of real steps on a GPU, each from an idle one: when its launches are called and have
returned.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.shapes import llama
from shard4bit import AdamW4bit
from shard4bit.cuda.backend import KernelBackend
from shard4bit.optim import stepping


class Silent:
    """A runtime that notes when it is called, and does nothing. See ``shard4bit.cuda.runtime.Runtime``."""

    def __init__(self) -> None:
        self.device, self.room = torch.device("cpu"), 32764
        self.times: list[float] = []

    def prepare(self, source: str, name: str, blocks: int, threads: int, args: tuple[Any, ...]) -> None: ...

    def queue(self, launches: Sequence[Any]) -> None:
        self.times += [time.perf_counter() for _ in launches]

    def capturing(self) -> bool:
        return False

    def upload(self, host: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(host.view(np.uint8).reshape(-1).copy())


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


class Timed:
    """A runtime that notes when launches begin, and when they have returned."""

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime
        self.times: list[tuple[str, float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runtime, name)

    def prepare(self, source: str, name: str, *rest: Any) -> Any:
        return name, self.runtime.prepare(source, name, *rest)

    def queue(self, launches: Sequence[Any]) -> None:
        for name, launch in launches:
            self.times.append((name, time.perf_counter()))
            self.runtime.queue([launch])
        self.times.append(("all returned", time.perf_counter()))


def measure_on_gpu(second: str, steps: int) -> list[tuple[str, float]]:
    """(event, median microseconds since the call of ``step()``) of bf16 parameters and gradients."""
    from shard4bit.cuda.runtime import CupyRuntime

    params = [torch.nn.Parameter(torch.randn(s, device="cuda", dtype=torch.bfloat16)) for s in llama()]
    optimizer = AdamW4bit(params, second_moment=second)
    runtime = Timed(CupyRuntime(torch.device("cuda", torch.cuda.current_device())))
    backend, rows = KernelBackend(runtime), []
    for p in params:
        p.grad = torch.randn_like(p)
    with mock.patch.object(stepping, "backend_for", lambda device: backend):
        for _ in range(steps):
            runtime.times.clear()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            optimizer.step()
            runtime.times.append(("step() returns", time.perf_counter()))
            torch.cuda.synchronize()
            runtime.times.append(("GPU idle", time.perf_counter()))
            rows.append([(what, 1e6 * (t - begin)) for what, t in runtime.times])
    columns = zip(*rows[3:], strict=True)
    return [(column[0][0], statistics.median(t for _, t in column)) for column in columns]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--cuda", action="store_true", help="real steps on a GPU")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores")
    if args.cuda:
        for second in ("block", "rank1", "factored"):
            print(f"{second}: ", "; ".join(f"{w} {t:,.0f}" for w, t in measure_on_gpu(second, args.steps)))
        return
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
