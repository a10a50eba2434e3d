"""``python -m tests.checkpoint.resume ROOT KIND STEPS OUT``: one rank of a run that goes on from a
checkpoint. The launcher's environment variables say which rank; the result goes into OUT-RANK.npz."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tests.checkpoint.ranks import resume_toy


def main(root: str, kind: str, steps: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found, losses = resume_toy("fsdp", kind, int(steps), root)
    arrays: Any = {**found, "losses": np.array(losses)}
    np.savez(f"{out}-{dist.get_rank()}.npz", **arrays)
    dist.barrier()
    os._exit(0)  # gloo sometimes aborts in an ordinary exit


if __name__ == "__main__":
    main(*sys.argv[1:])
