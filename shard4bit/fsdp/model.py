"""An FSDP2 model as its optimizer sees it."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule


def reshard(model: nn.Module) -> None:
    """Free parameters that a forward without a backward (an evaluation) has left gathered, so that
    ``model.named_parameters()`` gives the sharded ones. Communicates nothing."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
