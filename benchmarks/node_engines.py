"""Engines of benchmarks/node.py that launch/engines.py does not have: FSDP2 on meshes of two dimensions, and
FSDP2 that recomputes its blocks in backward.

The model is built on the meta device, sharded there, and filled parameter by parameter on the rank's device.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from launch import engines, llama
from launch.engines import Fsdp2


class Meshed(Fsdp2):
    """``fully_shard`` over the mesh that a subclass makes. tensor: ranks that share a sequence."""

    tensor = 1

    def _mesh(self, *sizes: int, names: tuple[str, ...]) -> DeviceMesh:
        world = self.ranks.world_size
        if world % 2 or world < 4:
            raise ValueError(f"{world} ranks with engine {self.name}: expected an even number from 4")
        return init_device_mesh(self.ranks.device.type, sizes, mesh_dim_names=names)

    def _prepared(self, model: Any) -> DeviceMesh:
        """What to shard over; ``model`` is made ready for it."""
        raise NotImplementedError

    def _build(self) -> tuple[Any, Any]:
        model: Any = self.recipe.empty()
        assert all(p.is_meta for p in model.parameters()), "a Llama shape"
        mesh = self._prepared(model)
        mixed = self.recipe.dtype != torch.float32
        policy = MixedPrecisionPolicy(self.recipe.dtype, torch.float32) if mixed else MixedPrecisionPolicy()
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        model.to_empty(device=self.ranks.device)
        for name, parameter in model.named_parameters():
            whole = torch.empty(parameter.shape, device=self.ranks.device)
            llama.fill(whole, name, self.recipe.seed, self.recipe.config.layers)
            parameter.detach().to_local().copy_(part_of(whole, parameter))
        return model, self._make_optimizer(model)


def part_of(whole: Tensor, parameter: DTensor) -> Tensor:
    """A rank's part of a parameter: the last dimension of the mesh cuts first (tensor parallelism), then
    FSDP cuts what is left."""
    mesh = parameter.device_mesh
    for dimension in reversed(range(mesh.ndim)):
        placement: Any = parameter.placements[dimension]
        if placement.is_replicate():
            continue
        parts = torch.chunk(whole, mesh.size(dimension), placement.dim)
        rank = mesh.get_local_rank(dimension)
        whole = parts[rank] if rank < len(parts) else whole.narrow(placement.dim, 0, 0)
    return whole


class Hsdp(Meshed):
    """Two copies of the model, each sharded over half of the ranks."""

    name = "hsdp"

    def _prepared(self, model: Any) -> DeviceMesh:
        return self._mesh(2, self.ranks.world_size // 2, names=("copies", "shards"))


class LocalHeads(llama.Attention):
    """Attention of the heads that this rank has, where llama.Attention counts on all of them: its last line
    gives the output the model's width."""

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        layers = (self.q, self.k, self.v)
        q, k, v = (layer(x).view(batch, time, -1, self.size).transpose(1, 2) for layer in layers)
        q, k = llama.rotate(q, self.config.theta), llama.rotate(k, self.config.theta)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return self.out(y.transpose(1, 2).reshape(batch, time, -1))


class TensorParallel(Meshed):
    """Pairs of ranks share the matrices, FSDP2 shards each half over the pairs. Norms are not split."""

    name = "tp"
    tensor = 2

    def _prepared(self, model: Any) -> DeviceMesh:
        mesh = self._mesh(self.ranks.world_size // 2, 2, names=("pairs", "pair"))
        pair = mesh["pair"]
        ends = {
            "tokens": RowwiseParallel(input_layouts=Replicate()),
            "head": ColwiseParallel(output_layouts=Replicate()),
        }
        parallelize_module(model, pair, ends)
        columns = ("attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up")
        plan: dict[str, Any] = {name: ColwiseParallel() for name in columns}
        plan |= {name: RowwiseParallel() for name in ("attention.out", "mlp.down")}
        for block in model.blocks:
            block.attention.__class__ = LocalHeads
            parallelize_module(block, pair, plan)
        return mesh["pairs"]


class Recomputing(Meshed):
    """FSDP2 over all ranks; backward computes a block again from its input."""

    name = "fsdp2-ac"

    def _prepared(self, model: Any) -> DeviceMesh:
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        return init_device_mesh(self.ranks.device.type, (self.ranks.world_size,))


def register() -> None:
    """Let ``launch.engines.build`` know these engines by name, in this process."""
    more = {engine.name: engine for engine in (Hsdp, TensorParallel, Recomputing)}
    engines.ENGINES = {**engines.ENGINES, **more}
