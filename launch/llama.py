"""A plain Llama decoder: RMSNorm, rotary positions, gated MLP, grouped queries.

It can be built on the meta device, sharded there, and get its weights afterwards: each parameter's are
drawn from a generator of its own, seeded by its name, so they are the same for every sharding.
"""

from __future__ import annotations

import math
import zlib
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from launch.presets import LlamaConfig


@lru_cache(maxsize=4)
def _rotations(time: int, half: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (time, half) fp32, of the angle by which a pair of features is turned."""
    speeds = theta ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    angles = torch.arange(time, device=device, dtype=torch.float32)[:, None] * speeds
    return angles.cos(), angles.sin()


def rotate(x: Tensor, theta: float) -> Tensor:
    """Turn the feature pairs (i, i + half) of (batch, heads, time, features) by their positions.

    In fp32, whatever x is: bf16 cannot tell late positions apart.
    """
    half = x.shape[-1] // 2
    cos, sin = _rotations(x.shape[-2], half, theta, x.device)
    a, b = x[..., :half].float(), x[..., half:].float()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention over (batch, time, width) with fewer key and value heads than queries."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.size = config.width // config.heads
        inner = config.kv_heads * self.size
        self.q = nn.Linear(config.width, config.width, bias=False)
        self.k = nn.Linear(config.width, inner, bias=False)
        self.v = nn.Linear(config.width, inner, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = (
            layer(x).view(batch, time, -1, self.size).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        q, k = rotate(q, self.config.theta), rotate(k, self.config.theta)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return self.out(y.transpose(1, 2).reshape(batch, time, width))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.mlp, bias=False)
        self.up = nn.Linear(config.width, config.mlp, bias=False)
        self.down = nn.Linear(config.mlp, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One pre-norm decoder block over (batch, time, width); the unit that FSDP shards."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.norm2 = nn.RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Llama(nn.Module):
    """Predicts the next token; its weights are whatever memory holds until ``fill`` is called."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, time, vocabulary) of the token after each of ``tokens`` (batch, time), int64.

        Raises ValueError where time exceeds the configured context.
        """
        if tokens.shape[1] > self.config.context:
            raise ValueError(f"{tokens.shape[1]} tokens: expected at most {self.config.context}")
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def fill(parameter: Tensor, name: str, seed: int, layers: int) -> None:
    """Set the weights that a parameter of this name has at the start, or those of this rank's shard.

    Of a sharded parameter every rank draws the whole, one parameter at a time, and keeps its part: ranks
    need not talk, and the weights do not depend on their number (they do on the kind of device).
    """
    shape, device = parameter.shape, parameter.device
    if len(shape) == 1:
        whole = torch.ones(shape, device=device)
    else:
        generator = torch.Generator(device).manual_seed(seed % 2**31 * 2**32 + zlib.crc32(name.encode()))
        deep = name.endswith(("attention.out.weight", "mlp.down.weight"))  # ends of the residual branches
        std = 0.02 / math.sqrt(2 * layers) if deep else 0.02
        whole = torch.empty(shape, device=device).normal_(std=std, generator=generator)
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(part.to_local())
        else:
            parameter.copy_(whole)
