"""Ranks that mpirun started, as torch.distributed expects them: in the environment.

launch.train calls ``join`` itself. For a program that knows nothing of MPI:
mpirun -n 4 python -m launch.mpi program.py options
"""

from __future__ import annotations

import os
import runpy
import socket
import sys
from typing import Any

#: what each MPI's mpirun sets: (rank, number of ranks), for MPICH and its kin, and for Open MPI
MARKS = (("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))


def started() -> tuple[int, int] | None:
    """(rank, number of ranks) by mpirun's own variables; None if there is no mpirun."""
    for rank, size in MARKS:
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    return None


def is_first_rank() -> bool:
    """Whether this process is rank 0, or nobody started ranks; needs no process group."""
    mark = started()
    return int(os.environ.get("RANK", mark[0] if mark else 0)) == 0


def join() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT where they are missing.

    Does nothing outside mpirun, or where torchrun (under srun, say) has set all. Collective otherwise.
    Raises ValueError if mpi4py is missing, or of another MPI than mpirun, or if what is set differs.
    """
    mark = started()
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if mark is None or all(name in os.environ for name in needed):
        return
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, but no MPI
        why = str(error).splitlines()[0]
        raise ValueError(f"mpirun needs mpi4py and its MPI ({why}): pip install mpi4py mpich") from None
    world = MPI.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    if (rank, size) != mark:
        raise ValueError(
            f"mpirun says rank {mark[0]} of {mark[1]}, mpi4py rank {rank} of {size}: they are of different "
            "MPIs; use the mpirun of the MPI that mpi4py finds"
        )
    host = world.Split_type(MPI.COMM_TYPE_SHARED)
    alone = host.Get_size() == size
    address, port = world.bcast(_meeting_place(alone) if rank == 0 else None, root=0)
    ours = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": host.Get_rank()}
    ours |= {"LOCAL_WORLD_SIZE": host.Get_size()}
    wrong = [n for n, value in ours.items() if os.environ.setdefault(n, str(value)) != str(value)]
    if any(world.allgather(bool(wrong))):
        found = ", ".join(f"{n}={os.environ[n]}" for n in wrong) or "something on another rank"
        raise ValueError(f"{found} is set, but mpirun says otherwise: unset it")
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, port


def _meeting_place(alone: bool) -> tuple[str, str]:
    """Rank 0's address and a port of it: as set, or this host and one that is free now."""
    address = os.environ.get("MASTER_ADDR") or ("127.0.0.1" if alone else socket.gethostname())
    with socket.socket() as s:
        s.bind(("", 0))
        return address, os.environ.get("MASTER_PORT") or str(s.getsockname()[1])


def leave() -> None:
    """Tell mpirun that this process ends as it should, where it was joined. Collective."""
    module: Any = sys.modules.get("mpi4py.MPI")
    if module is not None and module.Is_initialized() and not module.Is_finalized():
        module.Finalize()


def main() -> None:
    """Set the environment, then run the program that the command line names, as Python would."""
    if len(sys.argv) < 2 or not os.path.isfile(sys.argv[1]):
        sys.exit("launch.mpi: error: expected a program: mpirun -n 4 python -m launch.mpi program.py options")
    try:
        join()
    except ValueError as error:
        sys.exit(f"launch.mpi: error: {error}")
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
