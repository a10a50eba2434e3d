"""Which back end serves a device."""

from __future__ import annotations

import torch

from shard4bit.backend import Backend
from shard4bit.reference import ReferenceBackend

_REFERENCE = ReferenceBackend()


def backend_for(device: torch.device) -> Backend:
    """The back end for tensors on ``device``: so far the torch reference, on every device."""
    return _REFERENCE
