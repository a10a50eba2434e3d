"""One call that makes the right optimizer for an FSDP model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from shard4bit.errors import LayoutError
from shard4bit.optim.base import QuantizedOptimizer

Opt = TypeVar("Opt", bound=QuantizedOptimizer)


def wrap(
    model: nn.Module,
    optimizer: Callable[..., Opt],
    *,
    no_decay: Sequence[str] = (),
    full_precision: Sequence[str] = (),
    **options: Any,
) -> Opt:
    """The optimizer for a model sharded by ``fully_shard`` (FSDP2).

    optimizer: ``AdamW4bit``, ``SGD4bit`` or another class of shard4bit; ``options`` are its own.
    no_decay, full_precision: shell patterns of parameter names ("*.bias", "*embed*") that get no weight
        decay, or fp32 moments.
    Raises LayoutError for a model that is not sharded, or by FSDP1; ValueError for a pattern that matches
    no parameter.
    """
    if any(isinstance(m, FullyShardedDataParallel) for m in model.modules()):
        raise LayoutError(
            "this model is sharded by FSDP1 (FullyShardedDataParallel), which is not supported yet: "
            "shard it with torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    if not any(isinstance(m, FSDPModule) for m in model.modules()):
        raise LayoutError(
            "this model is not sharded: call torch.distributed.fsdp.fully_shard on it first, or build "
            "the optimizer directly from model.parameters()"
        )
    return optimizer(grouped(model, no_decay, full_precision), **options)


def grouped(model: nn.Module, no_decay: Sequence[str], full_precision: Sequence[str]) -> list[dict[str, Any]]:
    """Parameter groups, with names, of the trainable parameters by the two lists of patterns."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for pattern in (*no_decay, *full_precision):
        if not any(fnmatchcase(name, pattern) for name, _ in named):
            raise ValueError(
                f"the pattern {pattern!r} matches no trainable parameter; names are such as "
                f"{[name for name, _ in named[:3]]}"
            )
    groups: dict[tuple[bool, bool], list[tuple[str, Tensor]]] = {}
    for name, param in named:
        plain = any(fnmatchcase(name, p) for p in no_decay)
        full = any(fnmatchcase(name, p) for p in full_precision)
        groups.setdefault((plain, full), []).append((name, param))
    out: list[dict[str, Any]] = []
    for (plain, full), members in groups.items():
        group: dict[str, Any] = {"params": members}
        if plain:
            group["weight_decay"] = 0.0
        if full:
            group["quantize"] = False
        out.append(group)
    return out
