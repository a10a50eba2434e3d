"""The first step of a fresh process: python -m benchmarks.first_step

Seconds of the 1.1 B Llama-style model's first ``step()``, and of importing the library and making the
optimizer, beside torch's own start (its import, CUDA, parameters, gradients, its own AdamW). Each
case runs twice in processes of their own: with an empty cache of kernels, and with what that run left.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

CASES = [("rank1", "bf16"), ("block", "bf16")]


def run_case(second: str, dtype: str) -> dict[str, float]:
    begin = time.perf_counter()
    import torch

    from benchmarks.shapes import llama

    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    params = [torch.nn.Parameter(torch.randn(s, device="cuda", dtype=kind) * 0.02) for s in llama()]
    for p in params:
        p.grad = torch.randn_like(p)
    torch.optim.AdamW(params)  # loads what torch loads for any optimizer
    torch.cuda.synchronize()
    started = time.perf_counter()
    import shard4bit

    optimizer = shard4bit.AdamW4bit(params, second_moment=second)
    imported = time.perf_counter()
    optimizer.step()
    torch.cuda.synchronize()
    end = time.perf_counter()
    return {"start": started - begin, "import": imported - started, "step": end - imported}


def main() -> int:
    if len(sys.argv) == 3:
        print("RESULT", json.dumps(run_case(*sys.argv[1:])), flush=True)
        return 0
    print("| second moment | dtype | kernels | torch's start s | import s | first step s |", flush=True)
    print("|---|---|---|---:|---:|---:|", flush=True)
    for second, dtype in CASES:
        with tempfile.TemporaryDirectory() as cache:
            for state in ("cold", "warm"):
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.first_step", second, dtype],
                    env={**os.environ, "CUPY_CACHE_DIR": cache, "CUDA_CACHE_PATH": f"{cache}/driver"},
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                (line,) = (x for x in done.stdout.splitlines() if x.startswith("RESULT"))
                row = json.loads(line.split(maxsplit=1)[1])
                figures = " | ".join(f"{row[k]:.2f}" for k in ("start", "import", "step"))
                print(f"| {second} | {dtype} | {state} | {figures} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
