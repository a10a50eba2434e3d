"""What `python -m shard4bit memory` plans beside CUDA's allocator: python -m benchmarks.memory_plan

One process, the shapes of a 1.1 B Llama-style model (or --params). Measured in torch.cuda.memory_allocated:
weights and gradients, moments (after two steps), and the most during the third step and during a save.
Exits with status 1 if a peak is more than 3 % off.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from typing import Any

import torch
from torch import nn

import shard4bit
from benchmarks.shapes import llama
from shard4bit.cli.models import Model, Param, of_size
from shard4bit.cli.plan import OPTIMIZERS, Setup, Usage, usage


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


def measured(model: Model, name: str, dtype: str) -> dict[str, int]:
    """Bytes as the allocator counts them."""
    gc.collect()
    torch.cuda.empty_cache()
    start = torch.cuda.memory_allocated()
    net: Any = Shapes(model, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    weights = torch.cuda.memory_allocated() - start
    moments = OPTIMIZERS[name]
    if moments is None:
        optimizer: Any = torch.optim.AdamW(net.parameters())
    else:
        first, second = moments
        optimizer = shard4bit.AdamW4bit(net.parameters(), first_moment=first, second_moment=second)
    gradients(net)
    both = torch.cuda.memory_allocated() - start
    optimizer.step()
    optimizer.step()
    after = torch.cuda.memory_allocated() - start
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    step = torch.cuda.max_memory_allocated() - start
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        if moments is None:
            torch.save([net.state_dict(), optimizer.state_dict()], folder + "/all.pt")
        else:
            shard4bit.save(folder, net, optimizer, step=1)
    save = torch.cuda.max_memory_allocated() - start
    found = {"weights": weights, "gradients": both - weights, "moments": after - both}
    return {**found, "step": step, "save": save}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--params", type=float)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    options = parser.parse_args()
    shapes = tuple(Param(f"{i}.weight", shape) for i, shape in enumerate(llama()))
    model = of_size(options.params) if options.params else Model("Llama 1.1 B", shapes)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {model.numel / 1e6:.1f} M parameters")
    columns = ("weights", "gradients", "moments", "step", "save")
    print(f"MB planned / measured{'':17}" + "".join(f"{c:>20}" for c in columns))
    off = 0
    for dtype in options.dtypes:
        for name, moments in OPTIMIZERS.items():
            if moments is None and dtype != "fp32":
                continue  # torch's AdamW keeps bf16 states there
            plan: Usage = usage(model, Setup("single", param=dtype), moments)
            found = measured(model, name, dtype)
            cells = [f"{getattr(plan, c) / 1e6:.1f} / {found[c] / 1e6:.1f}" for c in columns]
            errors = [abs(getattr(plan, c) / found[c] - 1) for c in ("step", "save")]
            off += max(errors) > 0.03
            print(f"{dtype} {name:33}" + "".join(f"{c:>20}" for c in cells) + f"  {100 * max(errors):.2f} %")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
