"""Parameter shapes of the models that the benchmarks use."""

from __future__ import annotations

Shapes = list[tuple[int, ...]]


def gpt2_small() -> Shapes:
    """GPT-2 small (124 M, tied head): 12 layers, 768 wide, 50257 tokens, 1024 positions."""
    width, layers = 768, 12
    shapes: Shapes = [(50257, width), (1024, width)]
    for _ in range(layers):
        shapes += [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
        shapes += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [*shapes, (width,), (width,)]


def llama(layers: int = 22, width: int = 2048, kv: int = 256, mlp: int = 5632, vocab: int = 32000) -> Shapes:
    """A Llama-style model; the defaults have 1.1 B parameters."""
    shapes: Shapes = [(vocab, width)]
    for _ in range(layers):
        shapes += [(width, width), (kv, width), (kv, width), (width, width)]
        shapes += [(mlp, width), (mlp, width), (width, mlp), (width,), (width,)]
    return [*shapes, (width,), (vocab, width)]


def llama_7b() -> Shapes:
    return llama(layers=32, width=4096, kv=4096, mlp=11008)


def lora(rank: int = 8) -> Shapes:
    """Adapters of rank 8 on the attention matrices of the 1.1 B model."""
    out: Shapes = []
    for rows, cols in [(2048, 2048), (256, 2048), (256, 2048), (2048, 2048)] * 22:
        out += [(rank, cols), (rows, rank)]
    return out
