"""Bytes of optimizer state per parameter: python -m benchmarks.memory

Counts every state tensor (numel x element size) of real optimizers over meta-shaped models, then, by
integers alone, what one of many FSDP ranks holds. Exits with status 1 if a figure is over its bound.
"""

from __future__ import annotations

import platform
import sys
from math import prod

import torch

import shard4bit
from benchmarks.shapes import Shapes, gpt2_small, llama, llama_7b, lora
from shard4bit.layout import Slab
from shard4bit.sharding import chunk_edges
from shard4bit.spec import Full, MomentSpec, is_quantized, parse_spec
from shard4bit.state import parts

KINDS = ("rank1", "block", "factored")
BOUNDS = {"GPT-2 small": (1.05, 1.075, 0.55), "Llama 1.1 B": (1.04, 1.065, 0.54)}


def measured(shapes: Shapes, kind: str) -> float:
    """Bytes per parameter of a live optimizer's state (each shape once, counted as often as it occurs)."""
    total = 0
    for shape in set(shapes):
        param = torch.nn.Parameter(torch.empty(shape))
        optimizer = shard4bit.AdamW4bit([param], second_moment=kind)
        optimizer.bind()
        held = sum(t.numel() * t.element_size() for t in optimizer.state[param].values())
        total += shapes.count(shape) * held
    return total / sum(map(prod, shapes))


def on_a_rank(shapes: Shapes, kind: str, world: int, rank: int = 0) -> float:
    """Bytes of state per held parameter on one of ``world`` FSDP2 ranks (dim-0 shards), by integers."""
    held = state = 0
    for shape in shapes:
        edges = chunk_edges(0, shape[0], world)
        slab = Slab.box(shape, [(edges[rank], edges[rank + 1]), *((0, d) for d in shape[1:])])
        held += slab.numel
        for option, signed in (("B128/DE", True), (kind, False)):
            spec: MomentSpec = Full()
            if is_quantized(shape):
                spec = parse_spec(option, signed=signed, argument="benchmark")
            for part in parts(spec):
                state += prod(part.local_shape(slab)) * part.dtype.itemsize
        state += 4  # the step count
    return state / held


def main() -> int:
    print(f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}")
    models = {
        "GPT-2 small": gpt2_small(),
        "Llama 1.1 B": llama(),
        "Llama 7 B": llama_7b(),
        "LoRA rank 8 (1.1 B)": lora(),
    }
    print("\nstate bytes per parameter, one process (AdamW in fp32: 8)")
    print(f"{'model':<22}{'parameters':>12}" + "".join(f"{k:>10}" for k in KINDS))
    over = []
    for name, shapes in models.items():
        figures = [
            measured(shapes, kind) if "7 B" not in name else on_a_rank(shapes, kind, 1) for kind in KINDS
        ]
        print(f"{name:<22}{sum(map(prod, shapes)) / 1e6:>10.1f} M" + "".join(f"{f:>10.4f}" for f in figures))
        for kind, figure, bound in zip(KINDS, figures, BOUNDS.get(name, ()), strict=False):
            if figure > bound:
                over.append(f"{name} {kind}: {figure:.4f} > {bound}")
    for kind in KINDS:
        print(f"\nstate bytes per held parameter on rank 0 of FSDP2, {kind}")
        worlds = (1, 8, 16, 64, 256, 1024)
        print(f"{'ranks':<22}" + "".join(f"{w:>10}" for w in worlds))
        for name, shapes in models.items():
            figures = [on_a_rank(shapes, kind, w) for w in worlds]
            print(f"{name:<22}" + "".join(f"{f:>10.3f}" for f in figures))
    for line in over:
        print("over its bound:", line)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
