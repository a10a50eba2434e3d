"""Bytes per rank, by integers: the layout code of the optimizer itself, without a model or a process group.

docs/memory.md states the formulas. Activations are not counted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from math import prod
from typing import Any

from shard4bit.checkpoint.files import CHUNK_BYTES
from shard4bit.cli.models import Model
from shard4bit.cli.tables import UsageError
from shard4bit.layout import Slab
from shard4bit.sharding import chunk_edges
from shard4bit.spec import ADAMW_8BIT, Factored, Full, MomentSpec, QuantSpec, is_quantized, parse_spec
from shard4bit.state import parts

ENGINES = ("single", "ddp", "fsdp2", "fsdp1", "zero1", "zero2")
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
#: options of AdamW4bit by the name in tables; None: torch.optim.AdamW with fp32 states
OPTIMIZERS: dict[str, tuple[str, str] | None] = {
    "AdamW, fp32 states": None,
    "AdamW, 8-bit states": (ADAMW_8BIT["first_moment"], ADAMW_8BIT["second_moment"]),
    "AdamW4bit, rank1": ("B128/DE", "rank1"),
    "AdamW4bit, block": ("B128/DE", "block"),
    "AdamW4bit, factored": ("B128/DE", "factored"),
}
TILE = 256  # rows and columns of the CUDA kernels' tiles, whose partial sums "factored" keeps
CHUNK = 1 << 24  # elements that the torch reference, which serves 8 bits on GPUs, takes at a time


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
    def held(self) -> str:
        """The dtype of the weights that a rank keeps (FSDP: its shards are the masters)."""
        return (self.master or self.param) if self.is_fsdp else self.param

    @property
    def grads(self) -> str:
        return self.grad or self.held


@dataclass(frozen=True)
class Usage:
    """Bytes on the fullest rank. backward, step, save: the most that is in use then."""

    weights: int
    gradients: int
    master: int
    moments: int
    backward: int
    step: int
    save: int

    @property
    def peak(self) -> int:
        return max(self.backward, self.step, self.save)


@cache
def specs(moments: tuple[str, str] | None, shape: tuple[int, ...]) -> tuple[MomentSpec, MomentSpec]:
    """The specs of a parameter's moments as AdamW4bit takes them; None: both fp32."""
    if moments is None or not is_quantized(shape):
        return Full(), Full()
    first, second = moments
    return (
        parse_spec(first, signed=True, argument="first_moment"),
        parse_spec(second, signed=False, argument="second_moment"),
    )


@cache
def state_bytes(slab: Slab, moments: tuple[str, str] | None) -> int:
    """Bytes of both moments of a rank's part of a parameter (the step count lies on the host)."""
    return sum(
        prod(part.local_shape(slab)) * part.dtype.itemsize
        for spec in specs(moments, slab.view.shape)
        for part in parts(spec)
    )


@cache
def workspace(slab: Slab, moments: tuple[str, str] | None) -> int:
    """Bytes of new statistics between measure and apply, which the kernels keep from step to step."""
    total = 0
    for spec in specs(moments, slab.view.shape):
        if isinstance(spec, QuantSpec) and spec.norm == "rank1":
            total += 4 * (slab.rows + slab.width)
        elif isinstance(spec, Factored):
            total += 8 * (slab.rows + slab.width + 1)
            total += 4 * (-(-slab.width // TILE) * slab.rows + -(-slab.rows // TILE) * slab.width)
    return total


# ---- what a rank holds --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """A rank's slabs of trainable parameters, each with the number of its likes, and how many elements the
    rank keeps with padding: of all parameters, and of the trainable ones."""

    slabs: list[tuple[Slab, int]]
    elements: int
    trainable: int


@lru_cache(maxsize=4)
def held(model: Model, setup: Setup, most: int = 1 << 30) -> tuple[Held, ...]:
    """What ranks hold of weights and states: of equal ranks and of DTensors' shards the fullest, of others
    all, or ``most`` evenly spaced ones."""
    if setup.engine in ("single", "ddp", "fsdp2"):
        # torch.chunk gives the first rank the most of everything
        return (_first_shards(model, setup.world if setup.is_fsdp else 1),)
    if setup.engine == "fsdp1":
        units = Counter(tuple((p.shape, p.trainable) for p in unit) for unit in model.units)
        flats = [(list(_aligned(unit, BYTES[setup.param])), times) for unit, times in units.items()]
        return tuple(_runs(flats, setup.world, most))
    flat: Flat = [(p.shape, p.numel, True) for p in model.params if p.trainable]
    pad = -sum(n for _, n, _ in flat) % (2 * setup.world)  # DeepSpeed's nccl_start_alignment_factor
    return tuple(_runs([([*flat, (None, pad, False)], 1)], setup.world, most))


def _first_shards(model: Model, world: int) -> Held:
    slabs: list[tuple[Slab, int]] = []
    elements = 0
    for (shape, trainable), times in Counter((p.shape, p.trainable) for p in model.params).items():
        ends = [chunk_edges(0, shape[0], world)[1], *shape[1:]] if shape else []
        slab = Slab.box(shape, [(0, end) for end in ends])
        elements += times * slab.numel
        if trainable:
            slabs.append((slab, times))
    return Held(slabs, elements, sum(slab.numel * times for slab, times in slabs))


#: (shape or None for padding, elements, trainable) in the order of a flat vector
Flat = list[tuple[tuple[int, ...] | None, int, bool]]


def _aligned(unit: tuple[tuple[tuple[int, ...], bool], ...], itemsize: int) -> Iterator[Any]:
    """An FSDP1 flat parameter with use_orig_params=True: every parameter starts at 16 bytes."""
    align, total = 16 // itemsize, 0
    for shape, trainable in unit:
        if total % align:
            yield None, align - total % align, False
            total += align - total % align
        yield shape, prod(shape), trainable
        total += prod(shape)


def _runs(flats: list[tuple[Flat, int]], world: int, most: int) -> Iterator[Held]:
    """Flat vectors, each with the number of its likes, cut into ``world`` equal parts."""
    starts = [[0, *accumulate(n for _, n, _ in flat)] for flat, _ in flats]
    lengths = [-(-found[-1] // world) for found in starts]
    counts = [times * length for (_, times), length in zip(flats, lengths, strict=True)]
    trained = [any(trainable for _, _, trainable in flat) for flat, _ in flats]
    trainable = sum(n for n, yes in zip(counts, trained, strict=True) if yes)
    for rank in sorted({k * (world - 1) // max(1, min(most, world) - 1) for k in range(min(most, world))}):
        slabs: list[tuple[Slab, int]] = []
        for (flat, times), found, length in zip(flats, starts, lengths, strict=True):
            slabs += [(slab, times) for slab in _between(flat, found, rank * length, (rank + 1) * length)]
        yield Held(slabs, sum(counts), trainable)


def _between(flat: Flat, starts: list[int], begin: int, end: int) -> Iterator[Slab]:
    """The parts of trainable parameters within elements [begin, end) of a flat vector."""
    for i in range(bisect_right(starts, begin) - 1, len(flat)):
        if starts[i] >= end:
            break
        shape, numel, trainable = flat[i]
        first, stop = max(0, begin - starts[i]), min(numel, end - starts[i])
        if shape is not None and trainable and first < stop:
            yield Slab.run(shape, first, stop)


# ---- what it costs ------------------------------------------------------------------------------------


def usage(model: Model, setup: Setup, moments: tuple[str, str] | None, most: int = 1 << 30) -> Usage:
    """Bytes on the rank that needs most; of at most ``most`` ranks looked at."""
    found = [_on_rank(model, setup, moments, own) for own in held(model, setup, most)]
    return max(found, key=lambda u: (u.peak, u.moments))


def _on_rank(model: Model, setup: Setup, moments: tuple[str, str] | None, own: Held) -> Usage:
    param, grad = BYTES[setup.held], BYTES[setup.grads]
    state = sum(times * state_bytes(slab, moments) for slab, times in own.slabs)
    scratch = _scratch(setup, moments, own)
    kept = sum(times * workspace(slab, moments) for slab, times in own.slabs)
    total = sum(p.numel for p in model.params if p.trainable)
    if setup.is_zero:
        assert setup.master is not None
        weights, master = model.numel * param, own.trainable * BYTES[setup.master]
        if setup.engine == "zero2":
            gradients, working = own.trainable * grad, min(setup.bucket, total) * param
        elif setup.grads == "fp32" and setup.param != "fp32":  # DeepSpeed's BF16_Optimizer
            gradients, working = total * grad, total * param
        else:
            gradients, working = total * grad, min(setup.bucket, total) * param
        during = own.trainable * (BYTES[setup.master] + (0 if grad == BYTES[setup.master] else grad))
    else:
        weights, gradients = own.elements * param, own.trainable * grad
        master = own.trainable * BYTES[setup.master] if setup.master and not setup.is_fsdp else 0
        if setup.master == setup.param:
            master = 0
        working, during = _working(model, setup), gradients
    base = weights + master + state + kept
    return Usage(
        weights=weights,
        gradients=gradients,
        master=master,
        moments=state,
        backward=base + gradients + working,
        step=base + max(gradients, during + scratch),
        save=base + gradients + CHUNK_BYTES,
    )


def _working(model: Model, setup: Setup) -> int:
    """What forward and backward hold beside weights and gradients: DDP's buckets; under FSDP two gathered
    layers, and the gradients of one before they are reduced, as computed and as reduced."""
    if setup.engine == "ddp":
        return sum(p.numel for p in model.params if p.trainable) * BYTES[setup.param]
    if not setup.is_fsdp or setup.world == 1:
        return 0
    sizes = sorted((sum(p.numel for p in unit) for unit in model.units), reverse=True)
    gathered = sum(sizes[:2]) * BYTES[setup.param]
    return gathered + sizes[0] * (BYTES[setup.param] + BYTES[setup.grads])


def _scratch(setup: Setup, moments: tuple[str, str] | None, own: Held) -> int:
    """Temporaries of the optimizer's step on a GPU."""
    largest = max((slab.numel for slab, _ in own.slabs), default=0)
    if moments is None:  # torch: one more second moment (foreach), or two of the largest (DTensors)
        return 8 * largest if setup.engine == "fsdp2" else 4 * own.trainable
    if "/8" in moments[0]:  # the torch reference, chunk by chunk; it copies what is not fp32
        plain = setup.is_zero or setup.held == setup.grads == "fp32"
        return (5 if plain else 7) * 4 * min(largest, CHUNK)
    return 0
