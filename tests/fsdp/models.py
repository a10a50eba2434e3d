"""Models, forced gradients and canonical states for tests that run inside the process pools."""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import shard4bit
from shard4bit.optim.base import QuantizedOptimizer

#: uneven and empty shards on 2, 3 and 4 ranks; "few" and the biases keep fp32 moments
SHAPES: dict[str, tuple[int, ...]] = {
    "wide": (1, 5000),
    "three": (3, 2000),
    "odd": (129, 301),
    "tall": (301, 37),
    "bias": (301,),
    "few": (3,),
    "conv": (64, 16, 3, 3),
    "experts": (6, 16, 384),
    "small": (37, 5),
}

ADAMW: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01}

Arrays = dict[str, np.ndarray]


class Where:
    """The device that models of this process are made on."""

    device = torch.device("cpu")


def use_device(device: str) -> None:
    """Make the models that come on another device; the ranks of a pool may share a GPU so, over gloo."""
    Where.device = torch.device(device)


def optimizer_of(kind: str, params: Any, **options: Any) -> QuantizedOptimizer:
    """ "sgd", "nesterov", or the name of a second moment for AdamW4bit."""
    if kind == "sgd":
        return shard4bit.SGD4bit(params, **{**SGD, **options})
    if kind == "nesterov":
        return shard4bit.SGD4bit(params, **{**SGD, "dampening": 0.0, "nesterov": True, **options})
    return shard4bit.AdamW4bit(params, **{**ADAMW, "second_moment": kind, **options})


def rng_of(*seed: Any) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(seed).encode()))


def start(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(rng_of("start", name).standard_normal(shape).astype(np.float32))


def gradient(name: str, shape: tuple[int, ...], step: int) -> Tensor:
    """Many magnitudes, with zero rows, columns and blocks."""
    rng = rng_of("gradient", name, step)
    grad = rng.standard_normal(shape) * 10.0 ** rng.uniform(-20, 2, (shape[0],) + (1,) * (len(shape) - 1))
    grad *= 10.0 ** rng.uniform(-6, 0, shape)
    if shape[0] > 3:
        grad[step % shape[0]] = 0
    if len(shape) > 1:
        grad[..., (7 * step) % shape[-1]] = 0
        if step == 1:
            grad[..., :128] = 0
    return torch.from_numpy(grad.astype(np.float32))


class Zoo(nn.Module):
    """Parameters of awkward shapes; its gradients are set by hand."""

    def __init__(self, shapes: dict[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(start(name, shape).to(Where.device, dtype)))


def of_shape(parameter: nn.Parameter) -> Shard | None:
    """A ``shard_placement_fn``: experts by their second dimension."""
    return Shard(1) if parameter.ndim == 3 else None


@lru_cache
def mesh_of(*sizes: int) -> DeviceMesh:
    """A mesh over all ranks; kept, because every new one makes process groups."""
    names = tuple(f"d{i}" for i in range(len(sizes)))
    if Where.device.type == "cpu":
        return init_device_mesh("cpu", sizes, mesh_dim_names=names)
    ranks = torch.arange(dist.get_world_size()).view(sizes)
    groups = []  # of gloo: by itself a mesh of GPUs takes NCCL, which wants one for each rank
    for dim in range(len(sizes)):
        members = ranks.movedim(dim, -1).reshape(-1, sizes[dim]).tolist()
        groups.append(dist.new_subgroups_by_enumeration(members)[0])
    return DeviceMesh.from_group(groups, Where.device.type, mesh=ranks, mesh_dim_names=names)


def sharded(model: nn.Module, layout: str) -> Any:
    """Shard in place: "fsdp", "experts" (those by their second dimension), "hsdp" (2x2), or "plain"."""
    if layout == "plain":
        return model
    mesh = mesh_of(2, dist.get_world_size() // 2) if layout == "hsdp" else mesh_of(dist.get_world_size())
    return fully_shard(model, mesh=mesh, shard_placement_fn=of_shape if layout == "experts" else None)


def scatter(full: Tensor, like: Tensor) -> Tensor:
    """This rank's slice of a global tensor that every rank knows, placed as ``like``; no communication."""
    if not isinstance(like, DTensor):
        return full.to(like.device, copy=True)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def force(model: nn.Module, step: int) -> None:
    """Give every parameter its slice of the global gradient of this step."""
    for name, param in model.named_parameters():
        param.grad = scatter(gradient(name, tuple(param.shape), step).to(param.dtype), param)


def train(model: nn.Module, optimizer: QuantizedOptimizer, steps: int, first: int = 1) -> None:
    for step in range(first, first + steps):
        force(model, step)
        optimizer.step()


def full(tensor: Tensor) -> np.ndarray:
    """The whole tensor, as numpy; bf16 as its bits. Collective on DTensors."""
    with torch.no_grad():
        # from the host: in torch 2.11 gloo's functional all-gather of a GPU's tensors ends the process
        whole = tensor.cpu().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
    whole = whole.contiguous().cpu()
    return (whole.view(torch.int16) if whole.dtype == torch.bfloat16 else whole).numpy().copy()


def canonical(model: nn.Module, optimizer: QuantizedOptimizer | None = None) -> Arrays:
    """Every parameter, buffer and state in whole, by name. Collective."""
    out = {f"model/{n}": full(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    if optimizer is not None:
        optimizer.bind()
        for name, param in model.named_parameters():
            for key, value in optimizer.state.get(param, {}).items():
                out[f"state/{name}/{key}"] = full(value)
    return out


def forced_run(kind: str, layout: str, steps: int, dtype: str = "float32") -> Arrays:
    """Train a Zoo with forced gradients and return everything in whole. Runs on every rank of a pool."""
    model = sharded(Zoo(dtype=getattr(torch, dtype)), layout)
    optimizer = optimizer_of(kind, model.parameters())
    train(model, optimizer, steps)
    return canonical(model, optimizer)


class Shared(nn.Module):
    """One tensor that the first module keeps to itself and two others save."""

    def __init__(self, fill: int) -> None:
        super().__init__()
        buffer = torch.full((3,), fill)
        self.first, self.second, self.third = (nn.Linear(70, 80) for _ in range(3))
        self.first.register_buffer("cache", buffer, persistent=False)
        self.second.register_buffer("scale", buffer)
        self.third.register_buffer("scale", buffer)


class Toy(nn.Module):
    """A small network with real gradients, a frozen layer and a buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Linear(24, 193)
            self.norm = nn.LayerNorm(193)
            self.hidden = nn.Linear(193, 67)
            self.frozen = nn.Linear(67, 67)
            self.last = nn.Linear(67, 3)
        self.frozen.requires_grad_(False)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(torch.relu(self.norm(self.first(x))))
        return self.last(torch.relu(h + 0.1 * self.frozen(h)))


def shard_toy(model: Toy, **options: Any) -> Any:
    for layer in (model.first, model.hidden, model.frozen, model.last):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def batch(step: int, rank: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """A learnable problem: three smooth functions of 24 numbers; another batch on every rank."""
    rng = rng_of("batch", step, rank)
    x = rng.standard_normal((size, 24)).astype(np.float32)
    y = np.stack([np.sin(x[:, 0]) + x[:, 1], x[:, 2] * 0.5, np.tanh(x[:, 3:6].sum(1))], 1)
    return torch.from_numpy(x), torch.from_numpy(y.astype(np.float32))


def fit(model: Any, optimizer: QuantizedOptimizer, first: int, stop: int) -> list[float]:
    """Train on steps [first, stop) with real gradients; this rank's losses."""
    rank, losses = dist.get_rank() if dist.is_initialized() else 0, []
    for step in range(first, stop):
        x, y = batch(step, rank)
        dtype = next(iter(model.parameters())).dtype
        loss = (model(x.to(dtype)).float() - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.seen += 1
        losses.append(float(loss.detach()))
    return losses


def same(found: Arrays, expected: Arrays, where: Any = "") -> None:
    """Assert equal names, dtypes, shapes and bits (NaN payloads too)."""
    assert set(found) == set(expected), (where, set(found) ^ set(expected))
    for key, want in expected.items():
        got = found[key]
        assert (got.dtype, got.shape) == (want.dtype, want.shape), (where, key, got.dtype, got.shape)
        assert got.tobytes() == want.tobytes(), (where, key, int((got != want).sum()))
