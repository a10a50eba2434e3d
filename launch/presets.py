"""The shapes of the models that launch.train knows by name. Plain data: nothing of torch is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT: about 1 M parameters as it stands.

    context: the longest sequence, in bytes. layers: decoder blocks. width: features per position,
    a multiple of heads. tied: whether the output head shares the byte embedding's weight.
    vocabulary: rows of the embedding; text is bytes, so only the first 256 are ever used.
    Raises ValueError for sizes that do not fit each other.
    """

    context: int = 128
    layers: int = 2
    heads: int = 4
    width: int = 192
    tied: bool = False
    vocabulary: int = 256

    def __post_init__(self) -> None:
        _check_sizes(self, ("context", "layers", "heads", "width"))


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama decoder: 1.1 B parameters as it stands (TinyLlama's).

    context: the longest sequence. layers: decoder blocks. heads: of the queries, a multiple of kv_heads,
    those of keys and values (fewer: grouped queries). width: features per position, a multiple of
    2 * heads. mlp: features inside the gated MLP. theta: base of the rotary positions.
    Raises ValueError for sizes that do not fit each other.
    """

    context: int = 2048
    layers: int = 22
    heads: int = 32
    kv_heads: int = 4
    width: int = 2048
    mlp: int = 5632
    vocabulary: int = 32000
    theta: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _check_sizes(self, ("context", "layers", "heads", "kv_heads", "width", "mlp"))
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads}: expected a multiple of kv_heads={self.kv_heads}")
        if self.width // self.heads % 2:
            raise ValueError(f"width={self.width}: expected an even number of features for each head")


Config = GPTConfig | LlamaConfig


def _check_sizes(config: Config, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)}: expected a positive integer")
    if config.width % config.heads:
        raise ValueError(f"width={config.width}: expected a multiple of heads={config.heads}")


@dataclass(frozen=True)
class Preset:
    """A shape and the learning rate of AdamW that suits it."""

    config: Config
    lr: float


PRESETS: Mapping[str, Preset] = {
    "small": Preset(GPTConfig(), 2e-3),  # 1 M
    "gpt2-small": Preset(GPTConfig(1024, 12, 12, 768, tied=True, vocabulary=50257), 6e-4),  # 124 M
    "llama-tiny": Preset(LlamaConfig(128, 4, 4, 2, 192, 512, vocabulary=256), 2e-3),  # 2 M
    "llama-160m": Preset(LlamaConfig(2048, 12, 12, 12, 768, 3072), 6e-4),  # 162 M
    "llama-1.1b": Preset(LlamaConfig(), 4e-4),  # 1,100 M
    "llama-7b": Preset(LlamaConfig(2048, 32, 32, 32, 4096, 11008), 3e-4),  # 6,738 M
}


def family(config: Config) -> str:
    """ "gpt" or "llama"."""
    return "gpt" if isinstance(config, GPTConfig) else "llama"


def changed(config: Config, sizes: Mapping[str, Any]) -> Config:
    """The shape with other sizes; those that are None stay. Raises ValueError where they do not fit."""
    return dataclasses.replace(config, **{name: size for name, size in sizes.items() if size is not None})
