"""What a step costs under DeepSpeed's ZeRO: torchrun --nproc-per-node 2 -m benchmarks.zero_step

Takes the parameter shapes of the 1.1 B Llama-style model (--scale N: their dimensions divided by N) in bf16,
with fp32 masters, at ZeRO stage 1 and 2, with fresh random gradients before every step. The optimizers:
AdamW4bit ("rank1", "block", "factored"), torch's fused AdamW ("torch-fused"), and DeepSpeed's FusedAdam
("FusedAdam"), where its operator builds.

Prints one JSON line a case, of the slowest rank: medians of engine.step() (CUDA events, and wall; with
casting and the gathering of the weights) and of the optimizer's own part of it, measured apart; bytes of
state; and the GPU memory that is allocated before the engine is made, after that, after the first steps, at
most in training, and by engine.step() above what there is. --out DIR keeps a table (zero_step.md) and the
lines (zero_step.json).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import shard4bit
from benchmarks.shapes import Shapes, llama
from benchmarks.sharded_step import OPTIONS, Clock, Model, state_bytes

OURS = ("rank1", "block", "factored")
OPTIMIZERS = (*OURS, "torch-fused", "FusedAdam")
TIMES = ("step_event_ms", "step_wall_ms", "optimizer_event_ms", "optimizer_wall_ms")
MEMORY = ("before_mb", "engine_mb", "stepped_mb", "peak_mb", "step_extra_mb")


class RandomGradient(torch.autograd.Function):
    """A loss of zero whose gradient is noise: a backward that costs nothing else and keeps nothing."""

    @staticmethod
    def forward(ctx: Any, param: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(param)
        return param.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:  # type: ignore[override]
        (param,) = ctx.saved_tensors
        return torch.empty_like(param).normal_(0, 1e-3)


class Trained(Model):
    """The shapes, with such a loss."""

    def forward(self) -> Tensor:
        return torch.stack([RandomGradient.apply(p) for p in self.parameters()]).sum()


def allocated() -> float:
    """MB of GPU memory; 0 without one."""
    return round(torch.cuda.memory_allocated() / 1e6, 1) if torch.cuda.is_available() else 0.0


def obstacle() -> str:
    """Why DeepSpeed's FusedAdam cannot be built here, if so; the first rank builds it for all. Collective."""
    why = [""]
    if dist.get_rank() == 0:
        from deepspeed.ops.op_builder import FusedAdamBuilder

        try:
            FusedAdamBuilder().load(verbose=False)
        except Exception as error:  # of a missing nvcc, of the compiler, of torch's loader, ...
            why = [
                f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error) else ''}"
            ]
    dist.broadcast_object_list(why)
    return why[0]


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "torch-fused":
        return torch.optim.AdamW(model.parameters(), fused=True, **OPTIONS)
    if name == "FusedAdam":
        from deepspeed.ops.adam import FusedAdam

        return FusedAdam(model.parameters(), adam_w_mode=True, **OPTIONS)
    return shard4bit.AdamW4bit(model.parameters(), second_moment=name, **OPTIONS)


def engine_of(stage: int, name: str, model: nn.Module) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer_of(name, model), config=config)[0]


class Inside:
    """Times of the optimizer's own step within engine.step(), of the parameter groups together."""

    def __init__(self, optimizer: torch.optim.Optimizer, clock: Clock) -> None:
        self.clock, self.event, self.wall = clock, 0.0, 0.0
        plain = optimizer.step

        def step(*args: Any, **kwargs: Any) -> None:
            event, wall = clock.measure(lambda: plain(*args, **kwargs))
            self.event, self.wall = self.event + event, self.wall + wall

        optimizer.step = step  # type: ignore[assignment, method-assign]

    def taken(self) -> tuple[float, float]:
        out, self.event, self.wall = (self.event, self.wall), 0.0, 0.0
        return out


def timed(engine: Any, clock: Clock, steps: int, inside: Inside | None) -> list[tuple[float, float]]:
    """(milliseconds by events, by wall) of steps: of the engine's, or of the optimizer's within them."""
    out = []
    for _ in range(steps):
        engine.backward(engine())
        clock.synchronize()
        dist.barrier()
        whole = clock.measure(engine.step)
        out.append(whole if inside is None else inside.taken())
    return out


def run_case(stage: int, name: str, shapes: Shapes, device: torch.device, steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    clock, model = Clock(device), Trained(shapes, device).bfloat16()
    memory = [allocated()]
    engine = engine_of(stage, name, model)
    memory.append(allocated())
    timed(engine, clock, 2, None)  # compiles, and makes the states
    memory.append(allocated())
    if clock.cuda:
        torch.cuda.reset_peak_memory_stats()
    walls = timed(engine, clock, steps, None)
    peak = torch.cuda.max_memory_allocated() / 1e6 if clock.cuda else 0.0
    engine.backward(engine())
    extra = clock.extra(engine.step)[1]
    own = timed(engine, clock, steps, Inside(engine.basic_optimizer, clock))  # synchronizes within the step
    times = [statistics.median(column) for pairs in (walls, own) for column in zip(*pairs, strict=True)]
    values = torch.tensor([*times, *memory, peak, extra], dtype=torch.float64, device=device)
    dist.all_reduce(values, dist.ReduceOp.MAX)  # the slowest rank, the fullest one
    out = {
        "stage": stage,
        "optimizer": name,
        "wrapper": type(engine.optimizer).__name__,
        "ranks": dist.get_world_size(),
        "state_mb": round(state_bytes(engine.basic_optimizer) / 1e6, 1),
        **{key: round(v, 3) for key, v in zip((*TIMES, *MEMORY), values.tolist(), strict=True)},
    }
    engine.destroy()
    return out


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table(title: str, results: list[dict[str, Any]], skipped: dict[str, str]) -> str:
    columns = ("stage", "optimizer", *TIMES, "state_mb", *MEMORY)
    lines = [title, "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(str(result[c]) for c in columns)} |" for result in results]
    lines += [f"\n{name} is left out: {why}" for name, why in skipped.items()]
    return "\n".join(lines) + "\n"


def started() -> torch.device:
    """DeepSpeed, our part of it, and the process group; the device of this rank."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    import shard4bit.deepspeed  # noqa: F401

    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)  # gloo's collectives, nothing to compile
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
    return device


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=int, default=1, help="divide every dimension by this")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--stages", default="1,2")
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    parser.add_argument("--out", type=Path, metavar="DIR", help="write zero_step.md and zero_step.json there")
    args = parser.parse_args()
    device, names = started(), args.optimizers.split(",")
    import deepspeed

    shapes = [tuple(max(1, d // args.scale) for d in shape) for shape in llama()]
    kind = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    title = (
        f"{dist.get_world_size()} x {kind}, torch {torch.__version__}, DeepSpeed {deepspeed.__version__}, "
    )
    title += f"{sum(torch.Size(s).numel() for s in shapes) / 1e6:.1f} M parameters in bf16, fp32 masters"
    why = obstacle() if "FusedAdam" in names else ""
    skipped = {"FusedAdam": why} if why else {}
    first, results = dist.get_rank() == 0, []
    if first:
        print(title, *(f"SKIPPED {name}: {why}" for name, why in skipped.items()), sep="\n", flush=True)
    for stage in map(int, args.stages.split(",")):
        for name in (n for n in names if n not in skipped):
            results.append(run_case(stage, name, shapes, device, args.steps))
            free()
            if first:
                print("RESULT", json.dumps(results[-1]), flush=True)
    if first:
        print(table(title, results, skipped), flush=True)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "zero_step.md").write_text(table(title, results, skipped))
            about = {"about": title, "results": results, "skipped": skipped}
            (args.out / "zero_step.json").write_text(json.dumps(about, indent=1) + "\n")
    dist.barrier()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # gloo sometimes aborts in an ordinary exit
