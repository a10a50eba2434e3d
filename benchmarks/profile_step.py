"""A few steps of one configuration, to be run under a profiler: python -m benchmarks.profile_step block bf16

For example: ncu --kernel-name regex:"apply|measure" --launch-skip 2 --launch-count 2 --section SpeedOfLight
--section WarpStateStats --section ComputeWorkloadAnalysis python -m benchmarks.profile_step rank1 bf16
"""

from __future__ import annotations

import sys


def main() -> None:
    import torch

    import shard4bit
    from benchmarks.shapes import llama

    second, dtype = sys.argv[1:3]
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    params = [torch.nn.Parameter(torch.randn(s, device="cuda", dtype=kind) * 0.02) for s in llama(layers=8)]
    optimizer = shard4bit.AdamW4bit(params, lr=1e-4, betas=(0.9, 0.95), second_moment=second)
    for _ in range(4):
        for p in params:
            p.grad = torch.randn_like(p) * 1e-3
        optimizer.step()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
