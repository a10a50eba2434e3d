"""What to train: the model's shape and weights, the precision of the computations, the optimizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from launch import llama
from launch.model import GPT
from launch.optimizers import Choice
from launch.presets import Config, GPTConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Recipe:
    """What to build: a model's shape, the seed of its weights, the precision ("fp32", "bf16" or "fp16") of
    its computations, and its optimizer."""

    config: Config
    seed: int
    precision: str
    choice: Choice

    @property
    def dtype(self) -> torch.dtype:
        """Of the computations."""
        return DTYPES[self.precision]

    def empty(self) -> nn.Module:
        """The model, on the meta device if its weights can be drawn shard by shard, else with its weights."""
        if isinstance(self.config, GPTConfig):
            torch.manual_seed(self.seed)
            return GPT(self.config)
        with torch.device("meta"):
            return llama.Llama(self.config)

    def fill(self, model: nn.Module, prefix: str = "", recurse: bool = True) -> None:
        """Give a model that was empty, or the part of it called ``prefix``, its weights."""
        if not isinstance(self.config, GPTConfig):
            for name, parameter in model.named_parameters(prefix, recurse):
                llama.fill(parameter, name, self.seed, self.config.layers)

    def parameters(self) -> int:
        """How many the whole model has."""
        with torch.device("meta"):
            model = GPT(self.config) if isinstance(self.config, GPTConfig) else llama.Llama(self.config)
        return sum(p.numel() for p in model.parameters())

    def whole(self, device: torch.device) -> nn.Module:
        """The model with its weights, not sharded, on a device."""
        model = self.empty()
        if any(p.is_meta for p in model.parameters()):
            model.to_empty(device=device)
            self.fill(model)
        return model.to(device)
