"""A small byte-level GPT: pre-norm decoder blocks with learned positions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.presets import GPTConfig

__all__ = ["GPT", "Block", "GPTConfig"]


class Attention(nn.Module):
    """Causal self-attention over (batch, time, width)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, time, width / heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, time, width))


class Block(nn.Module):
    """One pre-norm decoder block over (batch, time, width); the unit that FSDP shards."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width),
            nn.GELU(),
            nn.Linear(4 * config.width, config.width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Predicts the next byte; its initial weights follow torch's global seed."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.bytes = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=self._initial_std(name, parameter))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        if config.tied:
            self.head.weight = self.bytes.weight

    def _initial_std(self, name: str, weight: Tensor) -> float:
        if name.startswith(("bytes", "positions")):
            return 0.02 if self.config.tied else 0.5  # tied: it is the head's too
        if name.startswith("head"):
            return 0.02  # the first predictions are nearly uniform: a loss of ln 256 = 5.55
        residual = name.endswith(("attention.out.weight", "mlp.2.weight"))
        depth = 2 * self.config.layers if residual else 1  # keeps the sum of the branches in bounds
        return 1 / math.sqrt(weight.shape[1] * depth)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, time, vocabulary) of the byte after each of ``tokens`` (batch, time), int64.

        Raises ValueError where time exceeds the configured context.
        """
        time = tokens.shape[1]
        if time > self.config.context:
            raise ValueError(f"{time} bytes of context: expected at most {self.config.context}")
        x = self.bytes(tokens) + self.positions(torch.arange(time, device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
