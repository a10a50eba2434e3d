"""What torch's CUDA caching allocator counts for tensors of given bytes: blocks, which may be larger.

By the rules of c10/cuda/CUDACachingAllocator.cpp of torch 2.11 in their default settings
(PYTORCH_CUDA_ALLOC_CONF unset); ``torch.cuda.memory_allocated`` adds up the sizes of blocks.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

KIB, MIB = 1 << 10, 1 << 20
UNIT = KIB // 2  # of every block
SMALL = MIB  # up to here blocks are cut from segments of 2 MiB
SMALL_SEGMENT = 2 * MIB
LARGE = 10 * MIB  # below it blocks are cut from segments of 20 MiB; others get segments of their own,
LARGE_SEGMENT = 20 * MIB
LARGE_UNIT = 2 * MIB  # in multiples of this


class Blocks:
    """An allocator from which nothing is given back: each request takes the smallest free block that
    holds it, or a new segment, and what is left of a block stays with it where it is too small to serve
    as another."""

    def __init__(self) -> None:
        self._free: dict[bool, list[int]] = {True: [], False: []}  # small or not -> sizes, ascending

    def take(self, size: int) -> int:
        """Bytes of the block for a tensor of ``size`` bytes; an empty tensor has none."""
        if size == 0:
            return 0
        need = -(-size // UNIT) * UNIT
        small = need <= SMALL
        free = self._free[small]
        at = bisect_left(free, need)
        block = free.pop(at) if at < len(free) else _segment(need)
        rest = block - need
        if rest < UNIT if small else rest <= SMALL:
            return block
        insort(free, rest)
        return need

    def all(self, sizes: Iterable[int]) -> int:
        """Bytes of the blocks for tensors of ``sizes`` bytes, in this order."""
        return sum(map(self.take, sizes))


def _segment(need: int) -> int:
    if need <= SMALL:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if need < LARGE else -(-need // LARGE_UNIT) * LARGE_UNIT
