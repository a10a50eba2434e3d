"""The models of the experiments in plain torch: GPT, encoder-decoder, ViT, BERT (to load MiniLM into)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Transformer. context: positions. tied: the head shares the token embedding's weight.

    embedding: standard deviation of a language model's token embedding at the start (GPT-2's: 0.02).
    """

    layers: int
    width: int
    heads: int
    context: int
    vocabulary: int = 256
    tied: bool = True
    dropout: float = 0.0
    embedding: float = 0.02


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021): x (..., time, size); turns (2, time, size / 2) float32, cosine and
    sine."""
    low, high = x.float().chunk(2, -1)
    cos, sin = turns
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention of ``x`` (batch, time, width) on itself or on ``memory`` (batch, other, width).

    Where it is causal, positions are rotary: with learned ones, a language model of this size stays at the
    loss of pairs of bytes for half of its 600 steps.
    """

    turns: Tensor

    def __init__(self, shape: Shape, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal, self.dropout = shape.heads, causal, shape.dropout
        half = shape.width // shape.heads // 2
        rates = 10000.0 ** (-torch.arange(half) / half)
        angles = torch.arange(shape.context)[:, None] * rates
        turns = torch.stack([angles.cos(), angles.sin()]) if causal else None
        self.register_buffer("turns", turns, persistent=False)
        self.query = nn.Linear(shape.width, shape.width)
        self.both = nn.Linear(shape.width, 2 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """mask: (batch, 1, 1, other) bool, True where ``memory`` may be attended to."""
        keys, values = self.both(x if memory is None else memory).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.query(x), keys, values))
        if self.causal:
            turns = self.turns[:, : x.shape[1]]
            q, k = rotate(q, turns), rotate(k, turns)
        drop = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal, dropout_p=drop)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm block; with ``cross`` a decoder's, which also attends to the encoder's output."""

    def __init__(self, shape: Shape, *, causal: bool = False, cross: bool = False) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(shape.width), Attention(shape, causal=causal)
        self.norm3, self.cross = (nn.LayerNorm(shape.width), Attention(shape)) if cross else (None, None)
        self.norm2 = nn.LayerNorm(shape.width)
        self.mlp = nn.Sequential(
            nn.Linear(shape.width, 4 * shape.width), nn.GELU(), nn.Linear(4 * shape.width, shape.width)
        )
        self.drop = nn.Dropout(shape.dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, memory: Tensor | None = None, seen: Tensor | None = None
    ) -> Tensor:
        """mask: of ``x`` on itself; seen: of ``memory``."""
        x = x + self.drop(self.attention(self.norm1(x), mask=mask))
        if self.cross is not None and self.norm3 is not None:
            x = x + self.drop(self.cross(self.norm3(x), memory, seen))
        return x + self.drop(self.mlp(self.norm2(x)))


def initialize(model: nn.Module, layers: int, std: float = 0.02) -> None:
    """GPT-2's: normal with ``std``, less for what writes to the residual stream; zero biases."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            residual = name.endswith(("attention.out.weight", "cross.out.weight", "mlp.2.weight"))
            nn.init.normal_(parameter, std=std / math.sqrt(2 * layers) if residual else std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


class GPT(nn.Module):
    """A decoder-only language model with rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape, causal=True) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        initialize(self, shape.layers)
        nn.init.normal_(self.tokens.weight, std=shape.embedding)
        if shape.tied:
            self.head.weight = self.tokens.weight

    def forward(self, rows: Tensor) -> Tensor:
        """The mean loss in nats per token over ``rows`` (batch, time + 1), int64."""
        x = self.tokens(rows[:, :-1])
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


class Translator(nn.Module):
    """An encoder-decoder; one embedding for sources, targets and the head. Token 0 is padding."""

    def __init__(self, shape: Shape, smoothing: float = 0.1) -> None:
        super().__init__()
        self.smoothing = smoothing
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.places = nn.ModuleList(nn.Embedding(shape.context, shape.width) for _ in range(2))
        self.encoder = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.decoder = nn.ModuleList(Block(shape, causal=True, cross=True) for _ in range(shape.layers))
        self.norms = nn.ModuleList(nn.LayerNorm(shape.width) for _ in range(2))
        self.drop = nn.Dropout(shape.dropout)
        initialize(self, shape.layers)

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, time, width) of sources (batch, time), and the mask of what is not padding."""
        mask = (source != 0)[:, None, None, :]
        x = self.drop(self.tokens(source) + self.places[0].weight[: source.shape[1]])
        for block in self.encoder:
            x = block(x, mask)
        return self.norms[0](x), mask

    def decode(self, target: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Logits (batch, time, vocabulary) of the token after each of ``target`` (batch, time)."""
        x = self.drop(self.tokens(target) + self.places[1].weight[: target.shape[1]])
        for block in self.decoder:
            x = block(x, None, memory, mask)
        return F.linear(self.norms[1](x), self.tokens.weight)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Sum of the losses in nats over the targets (batch, time + 1), and their number, (2,) float32."""
        logits = self.decode(target[:, :-1], *self.encode(source))
        goal = target[:, 1:].flatten()
        smoothing = self.smoothing if self.training else 0.0
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), goal, ignore_index=0, reduction="sum", label_smoothing=smoothing
        )
        return torch.stack([loss, (goal != 0).sum().float()])


class ViT(nn.Module):
    """A small vision Transformer for grey images (batch, side, side) of float32."""

    def __init__(self, shape: Shape, side: int = 28, patch: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.patch, count = patch, (side // patch) ** 2
        self.tokens = nn.Linear(patch * patch, shape.width)
        self.positions = nn.Embedding(count, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm, self.head = nn.LayerNorm(shape.width), nn.Linear(shape.width, classes)
        initialize(self, shape.layers)
        nn.init.normal_(self.tokens.weight, std=patch**-1.0)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes)."""
        patches = images.unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch)
        x = self.tokens(patches.flatten(3).flatten(1, 2)) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class BertLayer(nn.Module):
    """A post-norm encoder layer with BERT's names."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        width, eps = shape.width, 1e-12
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.attention_out, self.attention_norm = nn.Linear(width, width), nn.LayerNorm(width, eps)
        self.up, self.down, self.norm = (
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
            nn.LayerNorm(width, eps),
        )
        self.drop = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        split = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(*split, attn_mask=mask).transpose(1, 2).flatten(2)
        x = self.attention_norm(x + self.drop(self.attention_out(y)))
        return self.norm(x + self.drop(self.down(F.gelu(self.up(x)))))


class Bert(nn.Module):
    """BERT's encoder, the mean over the words, and a new linear head. Token 0 is padding."""

    #: our names of a layer's parts -> the checkpoint's
    NAMES = {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "attention_out": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "norm": "output.LayerNorm",
    }

    def __init__(self, shape: Shape, classes: int = 2) -> None:
        super().__init__()
        self.words = nn.Embedding(shape.vocabulary, shape.width)
        self.places = nn.Embedding(shape.context, shape.width)
        self.kinds = nn.Embedding(2, shape.width)
        self.norm, self.drop = nn.LayerNorm(shape.width, 1e-12), nn.Dropout(shape.dropout)
        self.layers = nn.ModuleList(BertLayer(shape) for _ in range(shape.layers))
        self.head = nn.Linear(shape.width, classes)
        initialize(self, shape.layers)

    def pretrained(self, weights: dict[str, Tensor]) -> None:
        """Copy a checkpoint's weights (its names, any float dtype); the head keeps its own."""
        names = {
            "words": "word_embeddings",
            "places": "position_embeddings",
            "kinds": "token_type_embeddings",
        }
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                first, rest = name.split(".", 1)
                if first == "layers":
                    number, part, kind = rest.split(".")
                    key = f"encoder.layer.{number}.{self.NAMES[part]}.{kind}"
                elif first != "head":
                    key = f"embeddings.{names.get(first, 'LayerNorm')}.{rest}"
                else:
                    continue
                parameter.copy_(weights[key])

    def features(self, words: Tensor) -> Tensor:
        """(batch, width) of word pieces (batch, time)."""
        seen = words != 0
        x = self.words(words) + self.places.weight[: words.shape[1]] + self.kinds.weight[0]
        x = self.drop(self.norm(x))
        for layer in self.layers:
            x = layer(x, seen[:, None, None, :])
        return (x * seen[..., None]).sum(1) / seen.sum(1, keepdim=True)

    def forward(self, words: Tensor) -> Tensor:
        """Logits (batch, classes)."""
        return self.head(self.drop(self.features(words)))
