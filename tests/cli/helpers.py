"""Models from shapes, checkpoints to look at, and what ranks of a pool measure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import shard4bit
from benchmarks.memory_plan import optimizer_of
from shard4bit.cli.models import Model
from shard4bit.placement import to_local
from tests.fsdp.models import mesh_of

#: a small decoder with a tied head: 0.5 M parameters
CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 132,
    "intermediate_size": 344,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 701,
    "tie_word_embeddings": True,
}


class Layer(nn.Module):
    """A node of the tree of names that ends in a number: what FSDP wraps."""


def module_of(model: Model, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Modules with these parameters, without a forward."""
    root = nn.Module()
    for param in model.params:
        *path, last = param.name.split(".")
        at = root
        for name in path:
            if name not in dict(at.named_children()):
                at.add_module(name, Layer() if name.isdigit() else nn.Module())
            at = at.get_submodule(name)
        value = torch.randn(param.shape, dtype=dtype) * 0.02
        at.register_parameter(last, nn.Parameter(value, requires_grad=param.trainable))
    return root


def give_gradients(module: nn.Module) -> None:
    for p in module.parameters():
        p.grad = torch.randn_like(p) * 1e-3


def bytes_of(tensors: Any) -> int:
    return sum(to_local(t).numel() * t.element_size() for t in tensors)


def measured(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """This rank's bytes after a step."""
    give_gradients(module)
    optimizer.step()
    state: list[Tensor] = [t for s in optimizer.state.values() for k, t in s.items() if k != "step"]
    params = [p for p in module.parameters() if p.requires_grad]
    return {
        "weights": bytes_of(module.parameters()),
        "gradients": bytes_of(p.grad for p in params if p.grad is not None),
        "moments": bytes_of(state),
    }


def on_fsdp2(model: Model, kinds: Sequence[tuple[str, str] | None]) -> list[dict[str, int]]:
    """On a rank of a pool: what it holds with each optimizer."""
    return [_on_fsdp2(model, moments) for moments in kinds]


def _on_fsdp2(model: Model, moments: tuple[str, str] | None) -> dict[str, int]:
    module, mesh = module_of(model), mesh_of(torch.distributed.get_world_size())
    for part in module.modules():
        if isinstance(part, Layer):
            fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return measured(module, optimizer_of(module.parameters(), moments))


def on_fsdp1(model: Model, kinds: Sequence[tuple[str, str]]) -> list[dict[str, int]]:
    """The same under FSDP1; the states alone, which need no gradient."""
    return [_on_fsdp1(model, *moments) for moments in kinds]


def _on_fsdp1(model: Model, first: str, second: str) -> dict[str, int]:
    module: Any = FullyShardedDataParallel(
        module_of(model),
        use_orig_params=True,
        device_id=torch.device("cpu"),
        auto_wrap_policy=ModuleWrapPolicy({Layer}),
    )
    optimizer = shard4bit.fsdp.wrap(module, shard4bit.AdamW4bit, first_moment=first, second_moment=second)
    tensors = [t for bound in optimizer.bind() for m in bound.moments for t in m.tensors.values()]
    return {"weights": bytes_of(module.parameters()), "moments": bytes_of(tensors)}


class Small(nn.Module):
    """Matrices that are quantized, others that are not, a convolution, a frozen matrix and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def matrix(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator))

        self.odd, self.conv, self.bias = matrix(67, 301), matrix(20, 12, 5, 5), matrix(150)
        self.frozen = matrix(70, 70).requires_grad_(False)
        self.brain = nn.Parameter(torch.randn(80, 64, generator=generator).bfloat16())
        self.register_buffer("count", torch.tensor(7))


def trained(steps: int = 3, **options: Any) -> tuple[Small, Any]:
    model = Small()
    make = shard4bit.SGD4bit if "momentum" in options else shard4bit.AdamW4bit
    groups = [
        {"params": [model.odd, model.conv], **options},
        {"params": [model.bias, model.brain], "weight_decay": 0.0},
    ]
    optimizer = make(groups, lr=1e-2)
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
    return model, optimizer


def saved(folder: Path, step: int = 3, extra: Any = None, **options: Any) -> Path:
    model, optimizer = trained(**options)
    return Path(shard4bit.save(folder, model, optimizer, step=step, extra=extra))
