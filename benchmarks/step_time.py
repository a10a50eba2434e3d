"""Time, memory and first-step cost of optimizer steps on one GPU: python -m benchmarks.step_time

Every case runs in a fresh process on the parameter shapes of a 1.1 B Llama-style model (or 2,000 tensors
of 40 k elements), with fresh random gradients before every step. Prints a table; --json FILE keeps it.

kernel_ms: GPU time of a step. wall_ms, least_ms: ``step()`` from an idle GPU until it is idle again, the
median and the least of --steps. host_us: what a loop of pure Python took between the steps, median. It tells
how much of a core this process had: on a rented host, with others beside it, it may double, and with it what
``step()`` does before its first launch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

SECONDS = ("block", "rank1", "factored")
OURS: dict[str, dict[str, Any]] = {
    **{name: {"second_moment": name} for name in SECONDS},
    **{
        f"{name}_paper": {"second_moment": name, "compensate": False, "rounding": "nearest"}
        for name in SECONDS
    },
}
CASES = [
    *[(name, "bf16", "llama") for name in ("torch_fused", *OURS)],
    *[(name, "fp32", "llama") for name in ("torch_fused", "block", "rank1", "rank1_paper")],
    *[(name, "fp32", "small") for name in ("torch_fused", "rank1")],
]
PEERS = [
    *[(name, "bf16", "llama") for name in ("torch_foreach", "flashoptim", "bitsandbytes8", "torchao4")],
    *[(name, "fp32", "llama") for name in ("flashoptim", "bitsandbytes8")],
]


def make_optimizer(name: str, params: list[Any], dtype: str) -> Any:
    import torch

    options: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    if name == "torch_fused":
        return torch.optim.AdamW(params, fused=True, **options)
    if name == "torch_foreach":
        return torch.optim.AdamW(params, foreach=True, **options)
    if name == "flashoptim":
        from flashoptim import FlashAdamW

        return FlashAdamW(params, master_weight_bits=24 if dtype == "bf16" else None, **options)
    if name == "bitsandbytes8":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(params, **options)
    if name == "torchao4":
        from torchao.optim import AdamW4bit

        return AdamW4bit(params, bf16_stochastic_round=dtype == "bf16", **options)
    import shard4bit

    return shard4bit.AdamW4bit(params, **OURS[name], **options)


def kernel_ms(step: Any, count: int) -> float:
    """GPU time of one step: the sum of its kernels and copies, by the profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(count):
            step()
        torch.cuda.synchronize()
    total = sum(e.device_time_total for e in trace.events() if "cuda" in str(e.device_type).lower())
    return total / 1e3 / count


def python_us() -> float:
    """Microseconds of a loop of pure Python: some 400 on a core of 2023 that does nothing else."""
    begin, total = time.perf_counter(), 0
    for i in range(10_000):
        total += i & 3
    return (time.perf_counter() - begin) * 1e6


def run_case(name: str, dtype: str, shapes_of: str, steps: int) -> dict[str, Any]:
    begin = time.perf_counter()
    import torch

    from benchmarks.shapes import llama

    torch.manual_seed(0)
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    shapes = llama() if shapes_of == "llama" else [(200, 200)] * 2000
    params = [torch.nn.Parameter(torch.randn(s, device="cuda", dtype=kind) * 0.02) for s in shapes]
    count = sum(p.numel() for p in params)
    for p in params:
        p.grad = torch.empty_like(p)

    def fresh_gradients() -> None:
        for p in params:
            p.grad.normal_(0, 1e-3)

    fresh_gradients()
    torch.cuda.synchronize()
    started = time.perf_counter() - begin
    base, begin = torch.cuda.memory_allocated(), time.perf_counter()
    optimizer = make_optimizer(name, params, dtype)
    optimizer.step()
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    optimizer.step()
    torch.cuda.synchronize()
    state = torch.cuda.memory_allocated() - base
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    walls, host = [], []
    for _ in range(steps):
        fresh_gradients()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        optimizer.step()
        torch.cuda.synchronize()
        walls.append((time.perf_counter() - begin) * 1e3)
        host.append(python_us())
    peak = torch.cuda.max_memory_allocated() - before
    return {
        "optimizer": name,
        "dtype": dtype,
        "shapes": shapes_of,
        "kernel_ms": round(kernel_ms(optimizer.step, 4), 3),
        "wall_ms": round(statistics.median(walls), 3),
        "least_ms": round(min(walls), 3),
        "host_us": round(statistics.median(host)),
        "first_s": round(first, 2),
        "start_s": round(started, 2),
        "bytes_per_param": round(state / count, 4),
        "transient_mb": round(peak / 1e6, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs=3, metavar=("OPTIMIZER", "DTYPE", "SHAPES"))
    parser.add_argument("--only", help="run the cases whose optimizer is in this comma-separated list")
    parser.add_argument("--peers", action="store_true", help="also the peers that need their own packages")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.case:
        print("RESULT", json.dumps(run_case(*args.case, args.steps)), flush=True)
        return 0
    results, failed = [], 0
    for case in CASES + (PEERS if args.peers else []):
        if args.only and case[0] not in args.only.split(","):
            continue
        command = [sys.executable, "-m", "benchmarks.step_time", "--case", *case, "--steps", str(args.steps)]
        child = subprocess.run(command, capture_output=True, text=True, timeout=300)
        line = next((x for x in child.stdout.splitlines() if x.startswith("RESULT ")), None)
        if line is None:
            failed += 1
            print(*case, "FAILED:", child.stderr.strip()[-1500:], flush=True)
            continue
        results.append(json.loads(line[7:]))
        print(line, flush=True)
        if args.json:  # after each case: the next may be cut off
            with open(args.json, "w") as out:
                json.dump(results, out, indent=1)
    print_table(results)
    return 1 if failed else 0


def print_table(results: list[dict[str, Any]]) -> None:
    import torch

    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
    columns = ("optimizer", "dtype", "shapes", "kernel_ms", "wall_ms", "least_ms", "host_us", "first_s")
    columns += ("bytes_per_param", "transient_mb")
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for result in results:
        print("| " + " | ".join(str(result[c]) for c in columns) + " |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
