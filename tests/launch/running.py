"""Runs of launch.train for tests: on the ranks of a pool, and as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--device", "cpu", "--context", "16", "--batch", "4", "--warmup", "2"]
TINY = [*SMALL, "--layers", "1", "--heads", "2", "--width", "96"]


def environment(**more: str) -> dict[str, str]:
    """This process's without what launchers set, with the checkout on the path and one thread a rank."""
    ours = {
        k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PMI_", "OMPI_", "TORCHELASTIC"))
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        ours.pop(name, None)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PATH": binaries, "CUDA_VISIBLE_DEVICES": ""}
    return {**ours, **fixed, "DS_ACCELERATOR": "cpu", **more}


def call(*command: str, limit: float = 200, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment(**more), cwd=ROOT, capture_output=True, text=True, timeout=limit
    )


class Wish:
    """A Stop whose signal arrives when this rank has been asked ``after`` times."""

    def __init__(self, after: float = float("inf")) -> None:
        self.after, self.asked = after, 0

    @property
    def signum(self) -> int:
        self.asked += 1
        return 15 if self.asked >= self.after else 0


def train(arguments: list[str], stop_rank: int = -1, after: float = float("inf")) -> dict[str, Any]:
    """launch.train's results, on the ranks of the pool that calls this or, outside of one, alone."""
    import torch
    import torch.distributed as dist

    from launch import options
    from launch.cluster import Cluster
    from launch.train import run

    torch.set_num_threads(1)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    os.environ.setdefault("LOCAL_RANK", str(rank))  # DeepSpeed asks for it
    ranks = Cluster(rank, world, torch.device("cpu"), "gloo" if world > 1 else "none")
    stop: Any = Wish(after if rank == stop_rank else float("inf"))
    return run(options.parse(arguments), ranks, stop)


def fails(arguments: list[str]) -> str:
    """The message of the ValueError that a run ends with."""
    try:
        train(arguments)
    except ValueError as error:
        return str(error)
    raise AssertionError("it did not fail")
