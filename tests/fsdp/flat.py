"""FSDP1 models and forced gradients for tests that run inside the process pools."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffload,
    FullyShardedDataParallel,
    MixedPrecision,
    ShardingStrategy,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import shard4bit
from shard4bit.fsdp.layout import FlatSource
from shard4bit.optim.base import QuantizedOptimizer
from tests.fsdp import models
from tests.fsdp.models import SHAPES, Zoo


class Part(Zoo):
    """A Zoo with a forward that uses all of its parameters."""

    def forward(self, x: Tensor) -> Tensor:
        # (of what is flattened with an outer module's parameters none are here)
        sums = [p.float().sum() for p in self._parameters.values() if p is not None]
        return x * torch.stack(sums).sum() if sums else x


class Nest(Part):
    """The parameters of a Zoo in two blocks and at the top."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        names = list(SHAPES)
        super().__init__({n: SHAPES[n] for n in names[7:]}, dtype)
        self.first = Part({n: SHAPES[n] for n in names[:3]}, dtype)
        self.second = Part({n: SHAPES[n] for n in names[3:7]}, dtype)
        self.register_buffer("seen", torch.arange(3.0))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.first(x) + self.second(x)


def flattened(model: nn.Module, orig: bool, strategy: str = "FULL_SHARD", **options: Any) -> Any:
    """Shard by FSDP1, each Part by itself; options: ``mixed`` (bf16 compute, or a dtype), ``offload``, and
    FSDP1's own."""
    how: dict[str, Any] = {"device_id": models.Where.device, "auto_wrap_policy": ModuleWrapPolicy({Part})}
    if mixed := options.pop("mixed", False):
        dtype = torch.bfloat16 if mixed is True else mixed
        how["mixed_precision"] = MixedPrecision(param_dtype=dtype, reduce_dtype=torch.float32)
    if options.pop("offload", False):
        how["cpu_offload"] = CPUOffload(offload_params=True)
    if "HYBRID_SHARD" in strategy:
        how["device_mesh"] = models.mesh_of(2, torch.distributed.get_world_size() // 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(
            model,
            use_orig_params=orig,
            sharding_strategy=ShardingStrategy[strategy],
            **{**how, **options},
        )


def short(name: str) -> str:
    return name.rpartition(".")[2]


def force(model: nn.Module, step: int, missing: tuple[str, ...] = ()) -> None:
    """Give every parameter its part of the global gradient of this step."""
    for item in FlatSource(model).parameters():
        shape, slab = item.placed.slab.view.shape, item.placed.slab
        whole = models.gradient(short(item.name), shape, step).to(item.placed.data())
        if short(item.name) in missing:
            whole = torch.zeros_like(whole)
        row0 = slab.row_ranges[0][0] * slab.view.cols + slab.head if slab.numel else 0
        part = whole.reshape(-1)[row0 : row0 + slab.numel].view(slab.shape)
        if not item.placed.prefix:
            item.tensor.grad = part if part.numel() and short(item.name) not in missing else None
            continue
        if item.tensor.grad is None:
            item.tensor.grad = torch.zeros_like(item.tensor)
        found = item.placed.grad()
        assert found is not None
        found.copy_(part)


def train(model: nn.Module, optimizer: QuantizedOptimizer, steps: int, first: int = 1) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        force(model, step)
        optimizer.step()


def wrapped(kind: str, model: nn.Module, **options: Any) -> QuantizedOptimizer:
    """The optimizer of ``models.optimizer_of`` by ``fsdp.wrap``."""
    base = {**(models.SGD if kind == "sgd" else models.ADAMW), **options}
    if kind == "sgd":
        return shard4bit.fsdp.wrap(model, shard4bit.SGD4bit, **base)
    return shard4bit.fsdp.wrap(model, shard4bit.AdamW4bit, second_moment=kind, **base)
