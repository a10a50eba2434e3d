"""Agreement between ranks: exchange of plain objects, and errors that reach everyone.

All of it goes through a gloo group of its own. So it needs no GPU, does not fall under the short timeout
of training's collectives, and a save in the background cannot get between these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from shard4bit.errors import CheckpointError

T = TypeVar("T")

#: how long a rank waits for the slowest to write its file
TIMEOUT = timedelta(hours=2)

_made: tuple[Any, Any] | None = None  # the default group, and our group beside it


def world() -> tuple[int, int]:
    """(rank, world size); (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def own_group() -> Any:
    """The gloo group of all ranks; the first call makes it, collectively."""
    global _made
    default = dist.group.WORLD
    if _made is None or _made[0] is not default:
        _made = (default, dist.new_group(backend="gloo", timeout=TIMEOUT))
    return _made[1]


def _talk(call: Callable[[Any], None]) -> None:
    """A collective; CheckpointError if another rank has gone."""
    try:
        call(own_group())
    except (RuntimeError, ValueError) as error:  # torch's DistError and its kin are RuntimeErrors
        raise CheckpointError(f"lost contact with the other ranks: {error}") from None


def exchange(value: T) -> list[T]:
    """Every rank's value, in the order of ranks."""
    size = world()[1]
    if size == 1:
        return [value]
    out: list[Any] = [None] * size
    _talk(lambda group: dist.all_gather_object(out, value, group=group))
    return out


def to_first(value: T) -> list[T]:
    """Every rank's value on rank 0; an empty list elsewhere."""
    rank, size = world()
    if size == 1:
        return [value]
    out: list[Any] | None = [None] * size if rank == 0 else None
    _talk(lambda group: dist.gather_object(value, out, dst=0, group=group))
    return out or []


def from_first(values: Sequence[T]) -> T:
    """This rank's of ``values``, which rank 0 has for all ranks (others give anything)."""
    rank, size = world()
    if size == 1:
        return values[0]
    out: list[Any] = [None]
    given = list(values) if rank == 0 else None
    _talk(lambda group: dist.scatter_object_list(out, given, src=0, group=group))
    return out[0]


def together(what: str, work: Callable[[], T], *, alike: str = "") -> T:
    """``work()`` on every rank; its own result.

    If it raises on any rank, it raises on all: there its own CheckpointError, elsewhere one that repeats
    it. So it does if ranks differ in ``alike``, the arguments that all must give.
    """
    error, result = _caught(work)
    said = exchange((None if error is None else f"{type(error).__name__}: {error}", alike))
    result = _settled(what, error, [text for text, _ in said], result)
    for rank, (_, theirs) in enumerate(said):
        if theirs != said[0][1]:
            raise CheckpointError(
                f"{what}: rank 0 gave {said[0][1]}, rank {rank} {theirs}; give the same on every rank"
            )
    return result


def at_first(what: str, work: Callable[[], T]) -> T:
    """``work()`` on rank 0; its result, or its error, on every rank."""
    rank, size = world()
    error, result = _caught(work) if rank == 0 else (None, None)
    text = None if error is None else f"{type(error).__name__}: {error}"
    if size > 1:
        box: list[Any] = [text, result]
        _talk(lambda group: dist.broadcast_object_list(box, src=0, group=group))
        text, result = box
    return _settled(what, error, [text], result)


def _caught(work: Callable[[], T]) -> tuple[Exception | None, Any]:
    try:
        return None, work()
    except Exception as caught:  # told to the others before it is raised
        return caught, None


def _settled(what: str, error: Exception | None, texts: Sequence[str | None], result: Any) -> Any:
    """The result, or CheckpointError if any rank has a text."""
    if isinstance(error, CheckpointError):
        raise error
    failed = [(rank, text) for rank, text in enumerate(texts) if text is not None]
    if failed:
        rank, text = failed[0]
        raise CheckpointError(f"{what} failed on rank {rank}: {text}") from error
    return result
