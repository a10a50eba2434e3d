"""Which back end serves a device."""

from __future__ import annotations

import importlib.util
import warnings
from functools import lru_cache

import torch

from shard4bit.backend import Backend
from shard4bit.reference import ReferenceBackend

_REFERENCE = ReferenceBackend()


class SlowPathWarning(UserWarning):
    """CUDA tensors are served by the torch reference."""


def backend_for(device: torch.device) -> Backend:
    """The back end for tensors on ``device``: kernels for CUDA where cupy is installed, else the torch
    reference (with one warning for CUDA tensors)."""
    return _for_cuda(device) if device.type == "cuda" else _REFERENCE


@lru_cache(maxsize=64)
def _for_cuda(device: torch.device) -> Backend:
    if importlib.util.find_spec("cupy") is None:
        _warn_once(torch.version.cuda or "")
        return _REFERENCE
    from shard4bit.cuda.backend import KernelBackend
    from shard4bit.cuda.runtime import CupyRuntime

    return KernelBackend(CupyRuntime(device))


@lru_cache(maxsize=1)
def _warn_once(version: str) -> None:
    extra = "cuda12" if version.startswith("12") else "cuda13"
    warnings.warn(
        "cupy is not installed: shard4bit updates CUDA tensors through its slow torch reference; "
        f"pip install 'shard4bit[{extra}]' brings the fused kernels",
        SlowPathWarning,
        stacklevel=2,
    )
