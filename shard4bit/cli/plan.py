"""Bytes per rank, by integers: the layout code of the optimizer itself, without a model or a process group.

docs/memory.md states the formulas. Activations are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from shard4bit.checkpoint.files import CHUNK_BYTES
from shard4bit.cli.blocks import Blocks
from shard4bit.cli.models import Model
from shard4bit.cli.shards import BYTES, Everywhere, Held, Piece, Setup, held, in_order, shard_sizes
from shard4bit.cli.states import TENSORS, Moments, kept, once, state_bytes, state_tensors
from shard4bit.spec import ADAMW_8BIT

#: options of AdamW4bit by the name in tables; None: torch.optim.AdamW with fp32 states
OPTIMIZERS: dict[str, Moments] = {
    "AdamW, fp32 states": None,
    "AdamW, 8-bit states": (ADAMW_8BIT["first_moment"], ADAMW_8BIT["second_moment"]),
    "AdamW4bit, rank1": ("B128/DE", "rank1"),
    "AdamW4bit, block": ("B128/DE", "block"),
    "AdamW4bit, factored": ("B128/DE", "factored"),
}
CHUNK = 1 << 24  # elements that the torch reference, which serves 8 bits on GPUs, takes at a time


@dataclass(frozen=True)
class Allocated:
    """Bytes as ``torch.cuda.memory_allocated`` counts them. moments: with what the kernels keep."""

    weights: int = 0
    gradients: int = 0
    master: int = 0
    moments: int = 0


@dataclass(frozen=True)
class Usage:
    """Bytes on the fullest rank: of tensors (kernels: their tables and workspace, and the vectors that
    ranks reduce), of these as the allocator counts them, and the most that is in use in backward, in a step
    and in a save, as the allocator counts."""

    weights: int
    gradients: int
    master: int
    moments: int
    kernels: int
    allocated: Allocated
    backward: int
    step: int
    save: int

    @property
    def rounding(self) -> int:
        """What the allocator adds to the tensors."""
        found = self.allocated
        blocks = found.weights + found.gradients + found.master + found.moments
        tensors = self.weights + self.gradients + self.master + self.moments + self.kernels
        return blocks - tensors if blocks else 0

    @property
    def peak(self) -> int:
        return max(self.backward, self.step, self.save)


def usage(model: Model, setup: Setup, moments: Moments, most: int = 1 << 30) -> Usage:
    """Bytes on the rank that needs most; of at most ``most`` ranks looked at."""
    found = [(_on_rank(model, setup, moments, own), own) for own in held(model, setup, most)]
    fullest, own = max(found, key=lambda pair: (pair[0].peak, pair[0].moments))
    rounded = replace(fullest, allocated=_blocks(model, setup, moments, own, fullest))
    more = rounded.rounding
    return replace(
        rounded,
        backward=fullest.backward + more,
        step=fullest.step + more,
        save=fullest.save + more,
    )


# ---- tensors ------------------------------------------------------------------------------------------


def _on_rank(model: Model, setup: Setup, moments: Moments, own: Held) -> Usage:
    """Without the allocator's rounding."""
    param, grad = BYTES[setup.held], BYTES[setup.grads]
    state, beside = of_optimizer(own, moments)
    kernels = sum(beside.values())
    scratch = _scratch(setup, moments, own)
    total = _trainable(model)
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
        master = own.trainable * _copied(setup)
        working, during = _working(model, setup), gradients
    base = weights + master + state + kernels
    return Usage(
        weights=weights,
        gradients=gradients,
        master=master,
        moments=state,
        kernels=kernels,
        allocated=Allocated(),
        backward=base + gradients + working,
        step=base + max(gradients, during + scratch),
        save=base + gradients + CHUNK_BYTES,
    )


def _copied(setup: Setup) -> int:
    """Bytes of an element of master weights beside the weights, without ZeRO's; 0: there are none."""
    if setup.master is None or setup.is_fsdp or setup.master == setup.param:
        return 0
    return BYTES[setup.master]


def of_optimizer(own: Held, moments: Moments) -> tuple[int, dict[str, int]]:
    """Bytes of states, and by ``TENSORS`` of what is kept beside them."""
    state, beside = _sums(own.everywhere, moments)
    beside = dict(beside)
    shared = any(piece.near for piece, _ in (*own.pieces, *own.everywhere.pieces))
    for name, size in once(moments, shared=shared).items():
        beside[name] += size
    state += _add(beside, own.pieces, moments)
    if own.everywhere.pieces:  # which counted them, as empty ones
        state += _add(beside, [(piece.none, -times) for piece, times in own.pieces], moments)
    return state, beside


@lru_cache(maxsize=64)
def _sums(everywhere: Everywhere, moments: Moments) -> tuple[int, dict[str, int]]:
    beside = dict.fromkeys(TENSORS, 0)
    return _add(beside, everywhere.pieces, moments), beside


def _add(beside: dict[str, int], pieces: Iterable[tuple[Piece, int]], moments: Moments) -> int:
    """Add what pieces, so many of each, keep to ``beside``; returns the bytes of their states."""
    state = 0
    for piece, times in pieces:
        state += times * state_bytes(piece.slab, moments)
        for name, size in kept(piece.slab, piece.near, moments).items():
            beside[name] += times * size
    return state


@lru_cache(maxsize=4)
def _trainable(model: Model) -> int:
    return sum(p.numel for p in model.params if p.trainable)


@lru_cache(maxsize=4)
def _working(model: Model, setup: Setup) -> int:
    """What forward and backward hold beside weights and gradients: DDP's buckets; under FSDP two gathered
    layers, and the gradients of one before they are reduced, as computed and as reduced."""
    if setup.engine == "ddp":
        return _trainable(model) * BYTES[setup.param]
    if not setup.is_fsdp or setup.world == 1:
        return 0
    sizes = sorted((sum(p.numel for p in unit) for unit in model.units), reverse=True)
    gathered = sum(sizes[:2]) * BYTES[setup.param]
    return gathered + sizes[0] * (BYTES[setup.param] + BYTES[setup.grads])


def _scratch(setup: Setup, moments: Moments, own: Held) -> int:
    """Temporaries of the optimizer's step on a GPU."""
    largest = max((piece.slab.numel for piece, _ in own.pieces), default=0)
    if moments is None:  # torch: one more second moment (foreach), or two of the largest (DTensors)
        return 8 * largest if setup.engine == "fsdp2" else 4 * own.trainable
    if "/8" in moments[0]:  # the torch reference, chunk by chunk; it copies what is not fp32
        plain = setup.is_zero or setup.held == setup.grads == "fp32"
        return (5 if plain else 7) * 4 * min(largest, CHUNK)
    return 0


# ---- blocks -------------------------------------------------------------------------------------------


def _blocks(model: Model, setup: Setup, moments: Moments, own: Held, tensors: Usage) -> Allocated:
    """The allocator's blocks for a rank's tensors, made in this order in a process that has no others."""
    blocks = Blocks()
    if setup.is_zero:  # a flat vector of each
        return Allocated(
            weights=blocks.take(tensors.weights),
            master=blocks.take(tensors.master),
            gradients=blocks.take(tensors.gradients),
            moments=_moment_blocks(blocks, model, setup, moments, own),
        )
    sizes, copied = shard_sizes(model, setup), _copied(setup)
    reduced = [n for n, trained in sizes if trained]
    if setup.engine == "fsdp2":  # one reduce-scatter a layer, of whose result gradients are views
        own_part = dict(zip(model.params, sizes, strict=True))
        reduced = [sum(own_part[p][0] for p in unit if p.trainable) for unit in model.units]
    return Allocated(
        weights=blocks.all(n * BYTES[setup.held] for n, _ in sizes),
        master=blocks.all(n * copied for n, trained in sizes if trained),
        gradients=blocks.all(n * BYTES[setup.grads] for n in reduced),
        moments=_moment_blocks(blocks, model, setup, moments, own),
    )


def _moment_blocks(blocks: Blocks, model: Model, setup: Setup, moments: Moments, own: Held) -> int:
    states = sum(blocks.all(state_tensors(piece.slab, moments)) for piece in in_order(model, setup, own.rank))
    return states + blocks.all(of_optimizer(own, moments)[1].values())
