"""An FSDP model as its optimizer and its checkpoints see it."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from shard4bit.fsdp.layout import FlatSource
from shard4bit.placement import Source


def is_fsdp1(model: nn.Module) -> bool:
    """Whether any part of it is sharded by FullyShardedDataParallel."""
    return any(isinstance(m, FullyShardedDataParallel) for m in model.modules())


def is_fsdp2(model: nn.Module) -> bool:
    """Whether any part of it is sharded by ``fully_shard``."""
    return any(isinstance(m, FSDPModule) for m in model.modules())


def source_of(model: nn.Module) -> Source:
    """The parameters of a model that may be sharded by either FSDP. Communicates nothing.

    Parameters that a forward without a backward (an evaluation) has left gathered are freed, so that
    their shards are seen.
    """
    if is_fsdp1(model):
        return FlatSource(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return Source(model)
