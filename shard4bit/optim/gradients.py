"""The gradients of all parameters, read in as few calls as can be: every step begins with it, and the GPU has
nothing to do meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, itemgetter
from typing import Any

from torch import Tensor

from shard4bit.placement import Flat, Placed
from shard4bit.sharding import local_parts

_GRAD, _PLACEMENTS = attrgetter("grad"), attrgetter("placements")

Found = list[Tensor | None]
Member = tuple[int, Placed]  # with its number among all


class Gradients:
    """This rank's gradients of a list of parameters. guards: called once, not for each parameter."""

    def __init__(self, placed: Sequence[Placed]) -> None:
        self.count = len(placed)
        self.guards = list(dict.fromkeys(p.guard for p in placed if p.guard is not None))
        kinds: dict[Any, list[Member]] = {}
        for member in enumerate(placed):
            kinds.setdefault(_kind(member[1]), []).append(member)
        self.parts = [(_place([i for i, _ in found]), _reader(found)) for found in kinds.values()]

    def read(self) -> tuple[Found, BaseException | None]:
        """Every parameter's gradient, None where there is none, and the first error."""
        out: Found = [None] * self.count
        failure: BaseException | None = None
        for guard in self.guards:
            try:
                guard()
            except Exception as error:  # the other ranks must hear of it before it is raised
                failure = failure or error
        for place, reader in self.parts:
            try:
                found = reader()
            except Exception as error:
                failure = failure or error
                continue
            if isinstance(place, slice):
                out[place] = found
            else:
                for i, grad in zip(place, found, strict=True):
                    out[i] = grad
        return out, failure


def _kind(placed: Placed) -> Any:
    """What is alike can be read together; a flat tensor with all that it holds."""
    if placed.flat is not None:
        return placed.flat
    return placed.holder is not None, placed.placements is not None


def _place(numbers: list[int]) -> slice | list[int]:
    whole = slice(numbers[0], numbers[-1] + 1)
    return whole if numbers == list(range(whole.start, whole.stop)) else numbers


def _reader(members: list[Member]) -> Callable[[], Sequence[Tensor | None]]:
    every = [placed for _, placed in members]
    first = every[0]
    if first.flat is not None:
        return _Cut(first.flat, every)
    if first.holder is None:
        return lambda: [placed.grad() for placed in every]
    holders = [placed.holder for placed in every]
    if first.placements is None:
        return lambda: list(map(_GRAD, holders))
    return _Local(holders, every)


class _Local:
    """Gradients that are DTensors, sharded as their parameters are if nobody sharded them otherwise."""

    def __init__(self, holders: list[Any], every: list[Placed]) -> None:
        self.holders, self.every = holders, every
        self.placements = [placed.placements for placed in every]

    def __call__(self) -> Sequence[Tensor | None]:
        grads = list(map(_GRAD, self.holders))
        try:
            if list(map(_PLACEMENTS, grads)) == self.placements:
                return local_parts(grads)
        except AttributeError:  # of a missing gradient, say
            pass
        return [placed.grad() for placed in self.every]


class _Cut:
    """Pieces of one flat gradient, by one call."""

    def __init__(self, flat: Flat, every: list[Placed]) -> None:
        self.flat, self.nothing = flat, [None] * len(every)
        self.sizes: list[int] = []
        numbers, at = {}, 0
        for i in sorted(range(len(every)), key=lambda i: (every[i].at, every[i].slab.numel)):
            size = every[i].slab.numel
            if size:
                self.sizes.append(every[i].at - at)  # what is nobody's, or nothing
                at = every[i].at + size
            numbers[i] = len(self.sizes)
            self.sizes.append(size)
        self.stop = at
        wanted = [numbers[i] for i in range(len(every))]
        self.pick: Any = itemgetter(*wanted) if len(wanted) > 1 else lambda pieces: (pieces[wanted[0]],)
        shapes = [placed.slab.shape for placed in every]
        self.shapes = None if all(len(shape) == 1 for shape in shapes) else shapes

    def __call__(self) -> Sequence[Tensor | None]:
        grad = self.flat.grad()
        if grad is None:
            return self.nothing
        pieces = self.pick(grad.split([*self.sizes, grad.numel() - self.stop]))
        if self.shapes is None:
            return pieces
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]
