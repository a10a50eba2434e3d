"""What benchmarks/node.py runs: its cells, the time that each may take, and what the memory planner says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from benchmarks.shapes import Shapes, llama
from launch.llama import Llama
from launch.presets import PRESETS, LlamaConfig
from shard4bit.cli.memory import largest
from shard4bit.cli.models import Model, Param
from shard4bit.cli.plan import OPTIMIZERS, usage
from shard4bit.cli.shards import Setup
from shard4bit.cli.states import Moments

KINDS = ("train", "reduce", "resume", "largest")
ENGINES = ("fsdp2", "hsdp", "tp", "fsdp1", "zero1", "zero2")
OURS = ("rank1", "block", "factored")
MOMENTS: Mapping[str, Moments] = {
    "adamw": None,
    **{name: OPTIMIZERS[f"AdamW4bit, {name}"] for name in OURS},
}
SWEEP = "all-reduce"  # in place of an optimizer: the collective alone
#: (one part in so many of the ranks, engine) of the legs of a chain of resumptions
CHAINS: Mapping[str, tuple[tuple[int, str], ...]] = {
    "fsdp2": ((1, "fsdp2"), (2, "fsdp2"), (4, "fsdp2"), (1, "fsdp2")),
    "mixed": ((1, "tp"), (4, "fsdp1"), (2, "zero2"), (1, "hsdp")),
}
GB = 10**9
ATTEMPTS, SMALLER = 3, 0.95  # at the largest model: plans for so many cards, each smaller by this factor
RESERVED = 4 * GB, 0.03  # bytes, and a share of the card: CUDA's context, NCCL's buffers, fragments


@dataclass(frozen=True)
class Scale:
    """Sizes. preset: of launch.train; context: tokens of a sequence; batch: sequences of a step over all
    ranks; steps: of a training; warmup: those in which the learning rate rises. card: bytes of the GPUs that
    are planned for, 0: of those that are there. expect, start, limit: seconds that a cell may be expected to
    take before one was measured, that processes take to start, and after which a cell is given up."""

    preset: str
    context: int
    batch: int = 8
    steps: int = 20
    warmup: int = 20
    card: int = 0
    expect: float = 120
    start: float = 40
    limit: float = 400

    @property
    def config(self) -> LlamaConfig:
        config = PRESETS[self.preset].config
        assert isinstance(config, LlamaConfig)
        return replace(config, context=self.context)


SCALES = {
    "7b": Scale("llama-7b", 2048),
    "tiny": Scale("llama-tiny", 64, card=60_000_000, expect=20, limit=240),
}


@dataclass(frozen=True)
class Cell:
    """One measurement. chain, leg: the place of a resumption in its chain, of which the first leg only saves;
    of the largest model the attempt."""

    kind: str
    world: int
    engine: str
    optimizer: str
    chain: str = ""
    leg: int = 0

    @property
    def key(self) -> str:
        names = (self.kind, self.world, self.engine, self.optimizer)
        return "/".join(map(str, (*names, self.chain, self.leg) if self.chain else names))

    @property
    def folder(self) -> str:
        """A name for its files."""
        return self.key.replace("/", "-")

    @property
    def family(self) -> tuple[Any, ...]:
        """Cells of one family share their processes."""
        alone = self.key if self.kind in ("resume", "largest") else ""
        return self.world, self.engine.startswith("zero"), alone


def legs(chain: str, worlds: Sequence[int]) -> list[Cell]:
    """The legs of a chain in order, each on 2 ranks at least; none where there are never 4."""
    most = max(worlds)
    parts = CHAINS[chain] if most >= 4 else ()
    return [
        Cell("resume", max(2, most // n), engine, "rank1", chain, i) for i, (n, engine) in enumerate(parts)
    ]


def cells(kinds: Sequence[str], worlds: Sequence[int]) -> list[Cell]:
    """All cells of these kinds, most wanted ones first. worlds: numbers of ranks to train on."""
    most = max(worlds)
    found = list(_training(most)) if "train" in kinds else []
    if "reduce" in kinds:
        counts = [n for n in (8, 4, 2) if n <= most]
        found += [Cell("reduce", n, "fsdp2", name) for n in counts for name in (*OURS, SWEEP)]
    if "resume" in kinds:
        found += [leg for chain in CHAINS for leg in legs(chain, worlds)]
    if "largest" in kinds:
        tries = range(ATTEMPTS)
        found += [Cell("largest", most, "fsdp2-ac", name, "attempt", i) for name in MOMENTS for i in tries]
    if "train" in kinds:
        found += [cell for n in sorted(set(worlds) - {most}, reverse=True) for cell in _training(n)]
    return found


def _training(world: int) -> Iterator[Cell]:
    engines = [e for e in ENGINES if world >= 4 or e not in ("hsdp", "tp")]
    return (Cell("train", world, engine, name) for engine in engines for name in MOMENTS)


def marks(cell: Cell, steps: int) -> tuple[int, int, int]:
    """(first step, last step, step after which it saves, 0: not) of a leg, of a training of ``steps``."""
    saves = [steps // 2, 3 * steps // 4, 7 * steps // 8, 0]
    first = saves[cell.leg - 1] if cell.leg else 0
    return first, steps if cell.leg in (0, 3) else saves[cell.leg], saves[cell.leg]


def source_of(cell: Cell, worlds: Sequence[int]) -> Cell | None:
    """The leg from whose checkpoint a leg goes on."""
    return legs(cell.chain, worlds)[cell.leg - 1] if cell.kind == "resume" and cell.leg else None


def expected(cell: Cell, rows: Mapping[str, Mapping[str, str]], scale: Scale) -> float:
    """Seconds: the most that one of its kind and optimizer took so far, and more on fewer ranks."""
    known = [
        float(row["seconds"]) * max(1, int(row["world"]) / cell.world)
        for row in rows.values()
        if row["status"] == "ok"
        and (row["kind"], row["optimizer"] == "adamw") == (cell.kind, cell.optimizer == "adamw")
    ]
    return min(scale.limit, 1.2 * max(known)) if known else scale.expect


# ---- memory -------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def model_of(config: LlamaConfig) -> Model:
    """For the planner."""
    with torch.device("meta"):
        found = Llama(config)
    return Model("", tuple(Param(name, tuple(p.shape)) for name, p in found.named_parameters()))


def shapes_of(config: LlamaConfig) -> Shapes:
    inner = config.kv_heads * config.width // config.heads
    return llama(config.layers, config.width, inner, config.mlp, config.vocabulary)


def setup_of(engine: str, world: int) -> Setup:
    """As launch.train builds it in bf16. HSDP shards within one of its two copies of the model; a tensor
    parallel rank holds about what one of as many FSDP ranks does."""
    if engine.startswith("zero"):
        return Setup(engine, world, "bf16", "fp32", "fp32")
    kind = engine if engine == "fsdp1" else "fsdp2"
    return Setup(kind, world // 2 if engine == "hsdp" else world, "bf16", None, "fp32")


def activations(config: LlamaConfig, tokens: int, *, split: int = 1, recompute: bool = False) -> int:
    """Bytes that a rank's backward finds of ``tokens`` tokens, in bf16, about.

    split: tensor parallel ranks. recompute: a block's input is all that is kept of it.
    """
    h, kv, m = config.width, config.kv_heads * config.width // config.heads, config.mlp
    heads = (3 * h + 2 * kv) // split  # queries, what attention gives and the same put together; keys, values
    norms = 2 * (2 * h + 2 * 2 * h)  # each: what goes in and comes out, and both in fp32 (fused norms: less)
    block = 2 * (norms + heads + 4 * m // split)  # and gate, silu of it, up, their product
    kept = config.layers * 2 * h + block if recompute else config.layers * block
    return tokens * (kept + 16 * config.vocabulary)  # logits in bf16 and fp32, their softmax, gradients


def reserve(card: int) -> int:
    """Bytes of a card that a plan leaves alone; of one that only a test has, none."""
    return int(RESERVED[0] + RESERVED[1] * card) if card > 16 * GB else 0


def planned(cell: Cell, scale: Scale) -> int:
    """Bytes on the fullest rank of a training, activations included, without the reserve."""
    split = 2 if cell.engine == "tp" else 1
    tokens = -(-scale.batch * split // cell.world) * scale.context
    found = usage(model_of(scale.config), setup_of(cell.engine, cell.world), MOMENTS[cell.optimizer])
    return found.peak + activations(scale.config, tokens, split=split)


def largest_config(optimizer: str, world: int, card: int, context: int) -> LlamaConfig | None:
    """The largest Llama shape that FSDP2 on ``world`` such cards trains on a sequence a rank, recomputing
    blocks in backward; None if there is none. card: bytes."""
    setup, room = setup_of("fsdp2", world), card - reserve(card)
    left, found = room, None
    for _ in range(4):  # the activations are those of the shape found before
        model = largest(setup, left, MOMENTS[optimizer]) if left > 0 else None
        if model is None:
            return None
        found = config_of(model, context)
        left = room - activations(found, context, recompute=True)
    return found


def config_of(model: Model, context: int) -> LlamaConfig:
    """Of a shape that the planner's ``of_size`` made."""
    shapes = {param.name: param.shape for param in model.params}
    vocabulary, width = shapes["model.embed_tokens.weight"]
    mlp = shapes["model.layers.0.mlp.gate_proj.weight"][0]
    heads = width // 128
    return LlamaConfig(context, heads, heads, heads, width, mlp, vocabulary)
