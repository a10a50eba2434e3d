"""What a piece of code communicates and allocates, seen below every Python API: at torch's dispatcher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COMMUNICATION = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "symm_mem")


class Recorder(TorchDispatchMode):
    """calls: (operation, dtype, bytes) of every collective, send and receive.
    largest: elements of the largest tensor of this rank that any operation returned; created: of those
    among them that are not views of their inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str, int]] = []
        self.largest = self.created = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # let the DTensor desugar: its local operations come here again
        if func.namespace in COMMUNICATION:
            tensors = [leaf for leaf in tree_leaves(args[0]) if isinstance(leaf, Tensor)]
            dtypes = "+".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))
            self.calls.append((func._opname, dtypes, sum(t.nbytes for t in tensors)))
        out = func(*args, **(kwargs or {}))
        known = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.largest = max(self.largest, leaf.numel())
                if _storage(leaf) not in known:
                    self.created = max(self.created, leaf.numel())
        return out


def _storage(tensor: Tensor) -> int:
    return 0 if isinstance(tensor, DTensor) else tensor.untyped_storage()._cdata


@contextmanager
def all_reduces() -> Iterator[list[tuple[str, list[int]]]]:
    """(operation, ranks of the group) of the calls of ``torch.distributed.all_reduce``."""
    log: list[tuple[str, list[int]]] = []
    real = dist.all_reduce

    def recorded(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, **rest: Any) -> Any:
        name = "MAX" if op == dist.ReduceOp.MAX else "SUM" if op == dist.ReduceOp.SUM else str(op)
        log.append((name, dist.get_process_group_ranks(group or dist.group.WORLD)))
        return real(tensor, op, group, **rest)

    with mock.patch.object(dist, "all_reduce", recorded):
        yield log
