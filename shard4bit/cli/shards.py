"""How a model is trained, and which part of it a rank then holds: by the layout code of the optimizer itself,
without a model or a process group."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from shard4bit.cli.models import Model, Param
from shard4bit.cli.tables import UsageError
from shard4bit.layout import Neighbours, Slab
from shard4bit.sharding import chunk_edges

ENGINES = ("single", "ddp", "fsdp2", "fsdp1", "zero1", "zero2")
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Setup:
    """How a model is trained. Dtypes are names of ``BYTES``; ``master`` None: no copy in another dtype.

    bucket: elements of ZeRO's ``reduce_bucket_size``.
    Raises UsageError for what the engine cannot do.
    """

    engine: str
    world: int = 1
    param: str = "fp32"
    grad: str | None = None
    master: str | None = None
    bucket: int = 500_000_000

    def __post_init__(self) -> None:
        if self.world < 1:
            raise UsageError(f"--world-size {self.world}: expected at least 1")
        if self.engine == "single" and self.world != 1:
            raise UsageError(
                "--engine single is one process; ddp, fsdp1, fsdp2, zero1 and zero2 take --world-size"
            )
        if self.is_zero and self.master is None:
            raise UsageError("ZeRO keeps master weights: leave --master-dtype fp32")
        fixed = self.held if self.is_fsdp else self.param
        if not self.is_zero and self.grad not in (None, fixed):
            raise UsageError(
                f"--grad-dtype {self.grad} with --engine {self.engine}: torch keeps gradients in the dtype "
                f"of the parameter, here {fixed}; only ZeRO has another (data_types.grad_accum_dtype)"
            )

    @property
    def is_zero(self) -> bool:
        return self.engine.startswith("zero")

    @property
    def is_fsdp(self) -> bool:
        return self.engine.startswith("fsdp")

    @property
    def is_flat(self) -> bool:
        """Whether ranks hold runs of flat vectors."""
        return self.is_zero or self.engine == "fsdp1"

    @property
    def held(self) -> str:
        """The dtype of the weights that a rank keeps (FSDP: its shards are the masters)."""
        return (self.master or self.param) if self.is_fsdp else self.param

    @property
    def grads(self) -> str:
        return self.grad or self.held


class Piece(NamedTuple):
    """A rank's part of a trainable parameter. near: how ranks divide that; None: this rank has all of it."""

    slab: Slab
    near: Neighbours | None

    @property
    def none(self) -> Piece:
        """The same of a rank that holds nothing of it, and still takes part in its steps."""
        return Piece(Slab.run(self.slab.view.shape, 0, 0), self.near)


@dataclass(frozen=True)
class Held:
    """What one rank keeps. pieces: those that are not empty, each with the number of its likes.
    everywhere: every parameter as a rank without any of it has it, where such ranks exist.
    elements, trainable: how many it keeps with padding, of all parameters and of the trainable ones."""

    rank: int
    pieces: list[tuple[Piece, int]]
    everywhere: Everywhere
    elements: int
    trainable: int


@dataclass(frozen=True, eq=False)
class Everywhere:
    """Of all ranks alike; known by itself, so that sums over it can be remembered."""

    pieces: tuple[tuple[Piece, int], ...] = ()


NOWHERE = Everywhere()


@lru_cache(maxsize=4)
def held(model: Model, setup: Setup, most: int = 1 << 30) -> tuple[Held, ...]:
    """What ranks hold of weights and states: of equal ranks and of DTensors' shards the fullest, of others
    all, or ``most`` evenly spaced ones."""
    if not setup.is_flat:
        # torch.chunk gives the first rank the most of everything
        return (_first_shards(model, setup),)
    return tuple(_runs(Counter(_flats(model, setup)), setup, most))


def in_order(model: Model, setup: Setup, rank: int) -> Iterator[Piece]:
    """A rank's part of every trainable parameter, empty ones too, in the order of the optimizer. (Of ranks
    whose parts differ in DTensors, the first.)"""
    if not setup.is_flat:
        for param in model.params:
            if param.trainable:
                yield _first_shard(param, setup)
        return
    for flat in _flats(model, setup):
        yield from _cut(flat, setup.world, rank)


def shard_sizes(model: Model, setup: Setup) -> list[tuple[int, bool]]:
    """Elements of the tensors that keep a rank's weights, and whether they are trained; without ZeRO's."""
    if setup.is_flat:
        flats = _flats(model, setup)
        return [(flat.length(setup.world), flat.trained) for flat in flats]
    return [(_first_shard(param, setup).slab.numel, param.trainable) for param in model.params]


# ---- DTensors -----------------------------------------------------------------------------------------


def _first_shard(param: Param, setup: Setup) -> Piece:
    """The first rank's part of a parameter, cut along its first dimension if at all."""
    shape, cut = param.shape, setup.is_fsdp and setup.world > 1 and param.shape
    if not cut:
        return Piece(Slab.whole(shape), None)
    rows = chunk_edges(0, shape[0], setup.world)[1]
    return Piece(Slab.box(shape, [(0, rows), *((0, d) for d in shape[1:])]), Neighbours("rows"))


def _first_shards(model: Model, setup: Setup) -> Held:
    pieces: list[tuple[Piece, int]] = []
    elements = 0
    for (shape, trainable), times in Counter((p.shape, p.trainable) for p in model.params).items():
        piece = _first_shard(Param("", shape), setup)
        elements += times * piece.slab.numel
        if trainable:
            pieces.append((piece, times))
    return Held(0, pieces, NOWHERE, elements, sum(piece.slab.numel * times for piece, times in pieces))


# ---- flat vectors -------------------------------------------------------------------------------------


class Flat(NamedTuple):
    """(shape, or None for padding; elements; trainable) of what a flat vector holds, in order."""

    parts: tuple[tuple[tuple[int, ...] | None, int, bool], ...]

    @property
    def trained(self) -> bool:
        return any(trainable for _, _, trainable in self.parts)

    @property
    def starts(self) -> list[int]:
        """Of the parts, and where the last one ends."""
        return [0, *accumulate(n for _, n, _ in self.parts)]

    def length(self, world: int) -> int:
        """Elements of each of ``world`` equal parts."""
        return -(-sum(n for _, n, _ in self.parts) // world)


def _flats(model: Model, setup: Setup) -> list[Flat]:
    """FSDP1: one a layer, and one for the rest. ZeRO: one."""
    if setup.is_fsdp:
        return [_aligned(unit, BYTES[setup.param]) for unit in model.units]
    flat = [(p.shape, p.numel, True) for p in model.params if p.trainable]
    pad = -sum(n for _, n, _ in flat) % (2 * setup.world)  # DeepSpeed's nccl_start_alignment_factor
    return [Flat((*flat, (None, pad, False)))]


def _aligned(unit: Iterable[Param], itemsize: int) -> Flat:
    """An FSDP1 flat parameter with use_orig_params=True: every parameter starts at 16 bytes."""
    align, total = 16 // itemsize, 0
    parts: list[tuple[tuple[int, ...] | None, int, bool]] = []
    for param in unit:
        if total % align:
            parts.append((None, align - total % align, False))
            total += align - total % align
        parts.append((param.shape, param.numel, param.trainable))
        total += param.numel
    return Flat(tuple(parts))


def _runs(flats: Counter[Flat], setup: Setup, most: int) -> Iterator[Held]:
    """Flat vectors, each with the number of its likes, cut into equal parts."""
    world = setup.world
    sizes = [(flat.length(world) * times, flat.trained) for flat, times in flats.items()]
    elements, trainable = sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)
    everywhere = NOWHERE
    if world > 1:
        every = [(piece.none, times) for flat, times in flats.items() for piece in _cut(flat, world, 0)]
        everywhere = Everywhere(tuple(every))
    starts = [flat.starts for flat in flats]
    for rank in sorted({k * (world - 1) // max(1, min(most, world) - 1) for k in range(min(most, world))}):
        pieces: list[tuple[Piece, int]] = []
        for (flat, times), found in zip(flats.items(), starts, strict=True):
            length = flat.length(world)
            first = bisect_right(found, rank * length) - 1
            inside = _cut(flat, world, rank, found, first)
            pieces += [(piece, times) for piece in inside if piece.slab.numel]
        yield Held(rank, pieces, everywhere, elements, trainable)


def _cut(
    flat: Flat, world: int, rank: int, starts: list[int] | None = None, first: int | None = None
) -> Iterator[Piece]:
    """A rank's parts of a flat vector's trainable parameters, empty ones too. first: skip what is before
    this part of it, and what is after the rank's."""
    starts, length = starts or flat.starts, flat.length(world)
    for i in range(first or 0, len(flat.parts)):
        (shape, numel, trainable), start = flat.parts[i], starts[i]
        if first is not None and start >= (rank + 1) * length:
            return
        if shape is None or not trainable:
            continue
        if world == 1:
            yield Piece(Slab.whole(shape), None)
            continue
        edges = [k * length - start for k in range(start // length + 1, -(-(start + numel) // length))]
        begin, end = (min(max(k * length - start, 0), numel) for k in (rank, rank + 1))
        yield Piece(Slab.run(shape, begin, end), Neighbours("run", tuple(edges)))
