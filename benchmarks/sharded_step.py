"""What a sharded step costs, per engine: torchrun --nproc-per-node 2 -m benchmarks.sharded_step

Takes the parameter shapes of the 1.1 B Llama-style model (--scale N: their dimensions divided by N), sharded
by FSDP2 or FSDP1, with fresh random gradients before every step. Prints, for rank 0, one JSON line a case:
milliseconds of a step from an idle GPU (CUDA events, and wall; medians) and of one among many in a row
(row_ms, without waiting between them, as after a backward that keeps the GPU busy), of its measure and apply
kernels (two_ms), of all its kernels and of its collectives by the profiler, bytes of state, bytes that the
step communicates, and the memory that saving and loading need above the steady state.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

import shard4bit
from benchmarks.shapes import Shapes, llama
from shard4bit.optim.summary import traffic

OPTIONS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
ENGINES = ("fsdp2", "fsdp1-orig", "fsdp1-flat")
OPTIMIZERS = ("adamw", "rank1", "block")


class Layer(nn.Module):
    """Parameters without a forward."""

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        super().__init__()
        for number, shape in enumerate(shapes):
            values = torch.randn(shape, device=device) * 0.02
            self.register_parameter(f"p{number}", nn.Parameter(values))


class Model(nn.Module):
    """The shapes, nine parameters a layer."""

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(shapes[i : i + 9], device) for i in range(0, len(shapes), 9))


def sharded(engine: str, shapes: Shapes, device: torch.device) -> Any:
    model = Model(shapes, device)
    if engine == "fsdp2":
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    policy = ModuleWrapPolicy({Layer})
    orig = engine == "fsdp1-orig"
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=orig, device_id=device)


def give_gradients(model: Any) -> None:
    for param in model.parameters():
        if param.grad is None:
            param.grad = torch.empty_like(param)
        grad = param.grad
        (grad.to_local() if isinstance(grad, DTensor) else grad).normal_(0, 1e-3)


def optimizer_of(name: str, model: Any) -> Any:
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), fused=True, **OPTIONS)
    return shard4bit.fsdp.wrap(model, shard4bit.AdamW4bit, second_moment=name, **OPTIONS)


class Clock:
    """Times of one step; memory above a base. On the CPU, wall times and the process's peak."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def measure(self, step: Any) -> tuple[float, float]:
        """(milliseconds by CUDA events, or wall; by wall)."""
        self.synchronize()
        begin = time.perf_counter()
        if self.cuda:
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            step()
            b.record()
        else:
            step()
        self.synchronize()
        wall = (time.perf_counter() - begin) * 1e3
        return (a.elapsed_time(b) if self.cuda else wall), wall

    def in_a_row(self, step: Any, count: int) -> float:
        """Milliseconds of a step among ``count``, without waiting for the device between them."""
        step()
        return self.measure(lambda: [step() for _ in range(count)])[0] / count

    def extra(self, work: Any) -> tuple[float, float, float]:
        """(seconds, MB of GPU memory, MB of host memory) that ``work`` needs above what there is."""
        self.synchronize()
        before = torch.cuda.memory_allocated() if self.cuda else 0
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(OSError):  # not allowed: the peak is then that of the whole run
            Path("/proc/self/clear_refs").write_text("5")
        host = _host_mb("VmRSS")
        begin = time.perf_counter()
        work()
        self.synchronize()
        seconds = time.perf_counter() - begin
        peak = (torch.cuda.max_memory_allocated() - before) / 1e6 if self.cuda else 0.0
        return round(seconds, 2), round(peak, 1), round(_host_mb("VmHWM") - host, 1)


def _host_mb(what: str) -> float:
    """VmRSS (resident now) or VmHWM (its peak since the last reset) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(what)) / 1e3


def by_kind(step: Any, clock: Clock, count: int) -> dict[str, float]:
    """GPU milliseconds a step of measure and apply, of all kernels, of collectives, by the profiler."""
    if not clock.cuda:
        return {}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(count):
            step()
        torch.cuda.synchronize()
    events = [e for e in trace.events() if "cuda" in str(e.device_type).lower()]
    spent = {
        "two_ms": [e for e in events if e.name in ("measure", "apply")],
        "kernel_ms": [e for e in events if "nccl" not in e.name.lower()],
        "nccl_ms": [e for e in events if "nccl" in e.name.lower()],
    }
    return {k: round(sum(e.device_time_total for e in v) / 1e3 / count, 3) for k, v in spent.items()}


def state_bytes(optimizer: Any) -> int:
    tensors = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    locals_ = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in locals_)


def run_case(engine: str, name: str, shapes: Shapes, device: torch.device, steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    clock, model = Clock(device), sharded(engine, shapes, device)
    optimizer = optimizer_of(name, model)
    times = []
    for _ in range(steps + 2):
        give_gradients(model)
        times.append(clock.measure(optimizer.step))
    events, walls = zip(*times[2:], strict=True)
    out: dict[str, Any] = {
        "engine": engine,
        "optimizer": name,
        "ranks": dist.get_world_size(),
        "event_ms": round(statistics.median(events), 3),
        "wall_ms": round(statistics.median(walls), 3),
        "row_ms": round(clock.in_a_row(optimizer.step, steps), 3),
        **by_kind(optimizer.step, clock, 4),
        "state_mb": round(state_bytes(optimizer) / 1e6, 1),
    }
    if name == "adamw":
        return out
    out["reduces"], out["reduced_bytes"] = traffic(optimizer.bind())
    largest = max(torch.Size(s).numel() for s in shapes) * 4 / 1e6
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        save = clock.extra(lambda: shard4bit.save(shared[0], model, optimizer, step=1))
        load = clock.extra(lambda: shard4bit.load(shared[0], model, optimizer))
        dist.barrier()
    keys = ("s", "gpu_mb", "host_mb")
    out["largest_parameter_mb"] = round(largest, 1)
    out |= {f"save_{k}": v for k, v in zip(keys, save, strict=True)}
    out |= {f"load_{k}": v for k, v in zip(keys, load, strict=True)}
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=int, default=1, help="divide every dimension by this")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    args = parser.parse_args()
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    shapes = [tuple(max(1, d // args.scale) for d in shape) for shape in llama()]
    if dist.get_rank() == 0:
        kind = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        print(f"{kind}, torch {torch.__version__}, {dist.get_world_size()} ranks", flush=True)
    for engine in args.engines.split(","):
        for name in args.optimizers.split(","):
            result = run_case(engine, name, shapes, device, args.steps)
            if dist.get_rank() == 0:
                print("RESULT", json.dumps(result), flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo sometimes aborts in an ordinary exit


if __name__ == "__main__":
    sys.exit(main())
