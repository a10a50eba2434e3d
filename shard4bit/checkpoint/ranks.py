"""Agreement between ranks: exchange of plain objects, and errors that reach everyone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from shard4bit.errors import CheckpointError

T = TypeVar("T")


def world() -> tuple[int, int]:
    """(rank, world size); (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def exchange(value: T) -> list[T]:
    """Every rank's value, in the order of ranks."""
    rank, size = world()
    if size == 1:
        return [value]
    out: list[Any] = [None] * size
    dist.all_gather_object(out, value)
    return out


def together(what: str, work: Callable[[], T]) -> list[T]:
    """Run ``work`` on every rank and exchange the results.

    If it raises on any rank, it raises on all: there its own error, elsewhere a CheckpointError that
    repeats it.
    """
    error: Exception | None = None
    result: Any = None
    try:
        result = work()
    except Exception as caught:  # told to the others before it is raised
        error = caught
    results = exchange((result, None if error is None else f"{type(error).__name__}: {error}"))
    if isinstance(error, CheckpointError):
        raise error
    failed = [(rank, text) for rank, (_, text) in enumerate(results) if text is not None]
    if failed:
        rank, text = failed[0]
        raise CheckpointError(f"{what} failed on rank {rank}: {text}") from error
    return [value for value, _ in results]
