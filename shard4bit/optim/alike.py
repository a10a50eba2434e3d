"""Whether a step finds parameters and gradients as the last one found them."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from shard4bit.optim.bound import Bound
from shard4bit.sharding import is_dtensor, local_parts

_DTYPE = attrgetter("dtype")
_GUARDS: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)


class Likeness:
    """What parameters and their gradients were like when each was last looked at.

    anchors: the parameters' addresses; signature: the gradients' dtypes, None where there was none.
    """

    def __init__(self, bounds: Sequence[Bound]) -> None:
        self.addresses = [bound.address for bound in bounds]
        # tensors whose address it is, or of whose local part: read by ``map`` of C functions, without a call
        # from Python each
        own = all(bound.placed.address is None for bound in bounds)
        self.sharded = all(is_dtensor(bound.param) for bound in bounds)
        self.places = [bound.param for bound in bounds] if own or self.sharded else None
        self.numels = [bound.placed.slab.numel for bound in bounds]
        self.anchors: list[int | None] = []
        self.signature: list[torch.dtype | None] = []
        self.guards: Any = None  # of gradients that were found alike

    def take(self, bounds: Sequence[Bound]) -> bool:
        """Take what a look has found. Returns whether the signature is another."""
        before, self.guards = self.signature, None
        self.anchors = [bound.anchor for bound in bounds]
        self.signature = [None if b.work.grad is None else b.work.grad.dtype for b in bounds]
        return self.signature != before

    def lasts(self, grads: list[Tensor | None]) -> bool:
        """Whether parameters lie where they were, and have gradients of the same kind as at the last look:
        then another, which takes several times longer, would find nothing. (That a gradient is on its
        parameter's device and of its shape, torch and the engines see to.)"""
        try:
            if self._read_addresses() != self.anchors:
                return False
            if self.guards is not None and self.guards.check(*grads):
                return True
            if None in self.signature:
                return self._some_alike(grads)
            alike = (
                list(map(_DTYPE, grads)) == self.signature
                and all(map(Tensor.is_contiguous, grads))  # type: ignore[arg-type]
                and list(map(Tensor.numel, grads)) == self.numels  # type: ignore[arg-type]
            )
            if alike and self.guards is None:
                self.guards = _guards_of(grads)
            return alike
        except (AttributeError, RuntimeError):  # of a missing gradient; of a sparse one, say
            return False

    def _some_alike(self, grads: list[Tensor | None]) -> bool:
        """The same where some parameters have no gradient."""
        return [None if g is None else g.dtype for g in grads] == self.signature and all(
            g is None or (g.is_contiguous() and g.numel() == n)
            for g, n in zip(grads, self.numels, strict=True)
        )

    def _read_addresses(self) -> list[int]:
        if self.places is not None:
            return list(map(Tensor.data_ptr, local_parts(self.places) if self.sharded else self.places))
        return [address() for address in self.addresses]


def _guards_of(grads: Sequence[Any]) -> Any:
    """What compares other gradients with these in one call of C++, which asks for more than ``lasts`` does:
    the same type, dtype, device, sizes and strides. It holds none of them. None where torch lacks it."""
    try:
        return _GUARDS.TensorGuards(*grads, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    except (AttributeError, TypeError, ValueError):
        return None
