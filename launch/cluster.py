"""The ranks of a run: which device each uses, how they talk, and how they end."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from launch import mpi
from launch.mpi import is_first_rank

TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True)
class Cluster:
    """This process's place among the ranks; ``backend`` is "none" where nobody started ranks."""

    rank: int
    world_size: int
    device: torch.device
    backend: str

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that prints and writes files."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, float64 on the CPU. Collective."""
        total = values.detach().to(self.device, torch.float64)
        if self.backend != "none":
            dist.all_reduce(total)
        return total.cpu()

    def barrier(self) -> None:
        """Wait for all ranks. Collective."""
        if self.backend != "none":
            dist.barrier()

    def synchronize(self) -> None:
        """Wait until this rank's GPU, if it uses one, has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def any(self, flag: bool) -> bool:
        """Whether a flag is set on any rank. Collective."""
        return bool(self.sum(torch.tensor(float(flag))).item())


def start(device: str = "auto") -> Cluster:
    """Join the ranks that torchrun, deepspeed or mpirun started, or run alone where none of them did.

    device: "auto" takes one GPU per rank over NCCL, and the CPU over gloo where this host has fewer
    GPUs than ranks (with a warning if it has some); "cpu" always takes the CPU.
    Raises ValueError if mpirun's ranks cannot be joined.
    """
    mpi.join()
    # LOCAL_SIZE is what the deepspeed launcher calls it
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    gpus = torch.cuda.device_count() if device == "auto" else 0
    on_gpu = gpus >= local_ranks
    if 0 < gpus < local_ranks and is_first_rank():
        print(f"WARNING: {local_ranks} ranks but only {gpus} GPU(s) here:", file=sys.stderr)
        print("WARNING: ALL RANKS FALL BACK TO THE CPU AND GLOO; this is slow.", file=sys.stderr)
    place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else None
    if place is not None:
        torch.cuda.set_device(place)
    if "WORLD_SIZE" not in os.environ:
        return Cluster(0, 1, place or torch.device("cpu"), "none")
    backend = "nccl" if place is not None else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, device_id=place)
    return Cluster(dist.get_rank(), dist.get_world_size(), place or torch.device("cpu"), backend)


def leave(status: int) -> None:
    """End this process at once with ``status``, after the other ranks where it is 0.

    Skips the interpreter's own way out, where gloo's threads now and then abort a finished process.
    """
    if status == 0 and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if status == 0:
        mpi.leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
