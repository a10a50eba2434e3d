"""ZeRO with overlap_comm on and off and known gradients: a program for two ranks. Prints digests as JSON."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
import torch.distributed as dist

import shard4bit
from tests.deepspeed import engines

CASES = [(stage, overlap) for stage in (1, 2) for overlap in (False, True)]


def digest(stage: int, overlap: bool) -> str:
    """Of a model trained for three steps in buckets so small that several are under way at once."""
    zero: dict[str, Any] = {"overlap_comm": overlap, "reduce_bucket_size": 5_000}
    engine = engines.engine_of(engines.Known(), engines.config(stage, zero=zero))
    engines.train(engine, 3)
    return shard4bit.digest(engine)


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cuda"
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    found = [digest(*case) for case in CASES]
    if dist.get_rank() == 0:
        print("\n" + json.dumps(found), flush=True)
    dist.barrier()
    os._exit(0)
