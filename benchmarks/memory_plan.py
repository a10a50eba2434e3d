"""What `python -m shard4bit memory` plans beside CUDA's allocator: python -m benchmarks.memory_plan

One process, the shapes of a 1.1 B Llama-style model (or --params). Measured in torch.cuda.memory_allocated:
weights, gradients, moments with what the kernels keep beside them (after two steps), and the most during the
third step and during a save (in bf16 of the states alone). Exits with status 1 if any figure is more
than 3 % off. PYTORCH_CUDA_ALLOC_CONF must not be set: the plan is of the allocator's default settings.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import nn

import shard4bit
from benchmarks.shapes import llama
from shard4bit.cli.models import Model, Param, of_size
from shard4bit.cli.plan import OPTIMIZERS, usage
from shard4bit.cli.shards import Setup

COLUMNS = ("weights", "gradients", "moments", "step", "save")
BOUND = 0.03


class Shapes(nn.Module):
    """Parameters without a forward."""

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        super().__init__()
        for param in model.params:
            tensor = torch.empty(param.shape, dtype=dtype, device="cuda").normal_(0, 0.02)
            self.register_parameter(param.name.replace(".", "_"), nn.Parameter(tensor))


def gradients(model: nn.Module) -> None:
    for param in model.parameters():
        param.grad = torch.empty_like(param).normal_(0, 1e-3)


def optimizer_of(params: Any, moments: tuple[str, str] | None) -> torch.optim.Optimizer:
    """What the planner plans under these moments: 8 bits are not compensated, as in ``ADAMW_8BIT``."""
    if moments is None:
        return torch.optim.AdamW(params)
    first, second = moments
    return shard4bit.AdamW4bit(params, first_moment=first, second_moment=second, compensate="/8" not in first)


def measured(model: Model, name: str, dtype: str) -> dict[str, int]:
    """Bytes as the allocator counts them."""
    gc.collect()
    torch.cuda.empty_cache()
    start = torch.cuda.memory_allocated()
    net: Any = Shapes(model, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    weights = torch.cuda.memory_allocated() - start
    optimizer: Any = optimizer_of(net.parameters(), OPTIMIZERS[name])
    gradients(net)
    both = torch.cuda.memory_allocated() - start
    optimizer.step()
    optimizer.step()
    after = torch.cuda.memory_allocated() - start
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    step = torch.cuda.max_memory_allocated() - start
    torch.cuda.reset_peak_memory_stats()
    save(net, optimizer, parameters=dtype == "fp32")
    saving = torch.cuda.max_memory_allocated() - start
    found = {"weights": weights, "gradients": both - weights, "moments": after - both}
    return {**found, "step": step, "save": saving}


def save(net: nn.Module, optimizer: Any, *, parameters: bool) -> None:
    """A save whose files need not reach the disk: what counts here is the device's memory."""
    if isinstance(optimizer, torch.optim.AdamW):
        torch.serialization.set_crc32_options(False)
        with open(os.devnull, "wb") as sink:
            torch.save([net.state_dict(), optimizer.state_dict()], sink)
        return
    with tempfile.TemporaryDirectory() as folder, ExitStack() as patches:
        for name in ("fsync", "fdatasync"):
            patches.enter_context(mock.patch.object(os, name, lambda handle: None))
        shard4bit.save(folder, net, optimizer, step=1, parameters=parameters)


def planned(model: Model, name: str, dtype: str) -> dict[str, int]:
    """The same figures from the plan."""
    plan = usage(model, Setup("single", param=dtype), OPTIMIZERS[name])
    blocks = plan.allocated
    found = {"weights": blocks.weights, "gradients": blocks.gradients, "moments": blocks.moments}
    return {**found, "step": plan.step, "save": plan.save}


def compare(dtype: str, name: str, plan: dict[str, int], found: dict[str, int]) -> float:
    """Print a row; returns the largest deviation of its columns."""
    errors = [abs(plan[c] / found[c] - 1) for c in COLUMNS]
    cells = [f"{plan[c] / 1e6:.1f} / {found[c] / 1e6:.1f}" for c in COLUMNS]
    row = f"{dtype} {name:20}" + "".join(f"{c:>20}" for c in cells)
    print(f"{row}  {100 * max(errors):5.2f} %", flush=True)
    return max(errors)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--params", type=float)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    options = parser.parse_args()
    shapes = tuple(Param(f"{i}.weight", shape) for i, shape in enumerate(llama()))
    model = of_size(options.params) if options.params else Model("Llama 1.1 B", shapes)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {model.numel / 1e6:.1f} M parameters")
    print(f"{'MB planned / measured':25}" + "".join(f"{c:>20}" for c in COLUMNS) + "    most", flush=True)
    begin, worst = time.perf_counter(), 0.0
    for dtype in options.dtypes:
        for name, moments in OPTIMIZERS.items():
            if moments is None and dtype != "fp32":
                continue  # torch's AdamW keeps bf16 states there
            plan = planned(model, name, dtype)
            worst = max(worst, compare(dtype, name, plan, measured(model, name, dtype)))
    print(f"largest deviation of all columns: {100 * worst:.2f} %, in {time.perf_counter() - begin:.0f} s")
    return 1 if worst > BOUND else 0


if __name__ == "__main__":
    sys.exit(main())
