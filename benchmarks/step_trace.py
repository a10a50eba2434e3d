"""Where a step's wall time goes: python -m benchmarks.step_trace [SECOND DTYPE ...]

The 1.1 B Llama-style model, each step from an idle GPU under torch's profiler: microseconds from the call of
``step()`` to the first work on the GPU, of that work, between its parts, and from its end to the return of
``synchronize``; then every part of the median step. (The profiler itself adds some to the first column.)
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

CASES = [("block", "bf16"), ("rank1", "bf16"), ("factored", "bf16"), ("block", "fp32")]
STEPS = 9


def trace(second: str, dtype: str) -> None:
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    import shard4bit
    from benchmarks.shapes import llama

    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    params = [torch.nn.Parameter(torch.randn(s, device="cuda", dtype=kind) * 0.02) for s in llama()]
    optimizer = shard4bit.AdamW4bit(params, lr=1e-4, betas=(0.9, 0.95), second_moment=second)
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    plain = []
    for _ in range(STEPS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        optimizer.step()
        torch.cuda.synchronize()
        plain.append(1e6 * (time.perf_counter() - begin))
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for i in range(STEPS):
            torch.cuda.synchronize()
            time.sleep(0.005)
            with record_function(f"step {i}"):
                optimizer.step()
                torch.cuda.synchronize()
    steps = [parts_of(recorded.events(), f"step {i}") for i in range(1, STEPS)]
    steps.sort(key=lambda s: s["wall"])
    names = ("wall", "before", "busy", "between", "after")
    middle = {k: statistics.median(s[k] for s in steps) for k in names}
    print(f"{second} {dtype}: wall without profiler {statistics.median(plain):.0f}", end="; with it ")
    print(", ".join(f"{k} {v:.0f}" for k, v in middle.items()), flush=True)
    for name, start, length in steps[len(steps) // 2]["parts"]:
        print(f"    at {start:7.0f}  {length:7.1f}  {name[:60]}", flush=True)


def is_label(name: str) -> bool:
    """Of a stretch of time, ours or torch's around a step, not of work."""
    return name.startswith(("step ", "Optimizer.step"))


def parts_of(events: Any, label: str) -> dict[str, Any]:
    """Figures of one step, in microseconds."""
    (host,) = (e for e in events if e.name == label and "cpu" in str(e.device_type).lower())
    begin, end = host.time_range.start, host.time_range.end
    parts = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in events
        if "cuda" in str(e.device_type).lower() and begin <= e.time_range.start < end and not is_label(e.name)
    )
    busy = sum(b - a for a, b, _ in parts)
    return {
        "wall": end - begin,
        "before": parts[0][0] - begin,
        "busy": busy,
        "between": parts[-1][1] - parts[0][0] - busy,
        "after": end - parts[-1][1],
        "parts": [(name, a - begin, b - a) for a, b, name in parts],
    }


def main() -> None:
    words = sys.argv[1:]
    for second, dtype in zip(words[::2], words[1::2], strict=True) if words else CASES:
        trace(second, dtype)


if __name__ == "__main__":
    main()
