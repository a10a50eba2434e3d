"""Who writes what, decided by rank 0 with integers.

A rank announces its rectangles as a few distinct patterns and, for every tensor, the number of one: a
model of a thousand tensors is usually cut in a handful of ways. Rank 0 compares ranks and checks cover
once per distinct way ("layout"), so that its work hardly grows with the number of tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from shard4bit.checkpoint.pieces import Piece, Rect, check_cover, check_unique
from shard4bit.checkpoint.ranks import at_first, from_first, to_first, together, world
from shard4bit.errors import CheckpointError

#: (dtype, (rows, columns)) of a tensor
Kind = tuple[str, tuple[int, int]]


@dataclass
class Holding:
    """What one rank has. tensors: key -> (kind, number of a pattern); patterns: rectangles as bytes of
    int64 (n, 4), without empty ones."""

    tensors: dict[str, tuple[Kind, int]] = field(default_factory=dict)
    patterns: list[bytes] = field(default_factory=list)


@dataclass
class Announcement:
    """A holding in terms of rank 0's table of tensors. numbers: per tensor of the table the pattern, or -1
    (int32); others: tensors that are not in the table."""

    numbers: np.ndarray
    others: dict[str, tuple[Kind, int]]
    patterns: list[bytes]


@dataclass
class Share:
    """What one rank writes. numbers: per tensor of the table its layout (int32); others: the same for
    tensors that are not in the table; rects: layout -> this rank's rectangles (n, 4)."""

    numbers: np.ndarray
    others: dict[str, int]
    rects: dict[int, np.ndarray]


@dataclass
class Plan:
    """On rank 0. tensors: key -> (kind, layout). layouts: (n, 5) each: rank, row0, row1, col0, col1,
    sorted by place, tiling the tensor."""

    tensors: dict[str, tuple[Kind, int]] = field(default_factory=dict)
    layouts: list[np.ndarray] = field(default_factory=list)


def holding(rects: Iterable[tuple[str, Kind, Rect]]) -> Holding:
    """Of (key, kind, rectangle)."""
    flat: dict[str, tuple[Kind, list[int]]] = {}
    for key, kind, r in rects:
        numbers = flat.setdefault(key, (kind, []))[1]
        if r.row0 < r.row1 and r.col0 < r.col1:
            numbers += (r.row0, r.row1, r.col0, r.col1)
    out, known = Holding(), dict[tuple[int, ...], int]()
    for key, (kind, numbers) in flat.items():
        number = known.setdefault(tuple(numbers), len(known))
        if number == len(out.patterns):
            out.patterns.append(np.array(numbers, np.int64).tobytes())
        out.tensors[key] = (kind, number)
    return out


def announce(held: Holding, table: dict[str, Kind], rank: int) -> Announcement:
    """Raises CheckpointError if a tensor is of another kind than in the table."""
    numbers, others = np.full(len(table), -1, np.int32), {}
    places = {key: i for i, key in enumerate(table)}
    for key, (kind, number) in held.tensors.items():
        if key not in table:
            others[key] = (kind, number)
            continue
        _same_kind(key, kind, table[key], rank)
        numbers[places[key]] = number
    return Announcement(numbers, others, held.patterns)


def _same_kind(key: str, ours: Kind, theirs: Kind, rank: int) -> None:
    if ours != theirs:
        raise CheckpointError(
            f"rank {rank} has {key} as {ours[0]} {ours[1]}, another rank as {theirs[0]} {theirs[1]}: all "
            "ranks must hold the same model"
        )


def arrange(table: dict[str, Kind], said: Sequence[Announcement]) -> Plan:
    """Of equal rectangles on several ranks the lowest rank's is written. Raises CheckpointError if ranks
    disagree about a tensor or if a tensor is not covered exactly."""
    kinds, known, patterns = dict(table), dict[bytes, int](), list[np.ndarray]()
    for rank, one in enumerate(said):
        for key, (kind, _) in one.others.items():
            _same_kind(key, kind, kinds.setdefault(key, kind), rank)
    places = {key: i for i, key in enumerate(kinds)}
    held = np.full((len(kinds), len(said)), -1, np.int32)  # tensor, rank -> pattern
    for rank, one in enumerate(said):
        translation = np.empty(len(one.patterns) + 1, np.int32)
        translation[-1] = -1
        for i, raw in enumerate(one.patterns):
            translation[i] = known.setdefault(raw, len(known))
            if len(known) > len(patterns):
                patterns.append(np.frombuffer(raw, np.int64).reshape(-1, 4))
        held[: len(table), rank] = translation[one.numbers]
        for key, (_, number) in one.others.items():
            held[places[key], rank] = translation[number]
    plan, seen = Plan(), dict[tuple[bytes, tuple[int, int]], int]()
    for (key, kind), row in zip(kinds.items(), held, strict=True):
        number = seen.setdefault((row.tobytes(), kind[1]), len(seen))
        if number == len(plan.layouts):
            plan.layouts.append(_layout(key, kind[1], row, patterns))
        plan.tensors[key] = (kind, number)
    return plan


def _layout(key: str, shape: tuple[int, int], row: np.ndarray, patterns: list[np.ndarray]) -> np.ndarray:
    """(n, 5) of the distinct rectangles, each with the lowest rank that has it."""
    ranks = np.flatnonzero(row >= 0)
    found = [patterns[row[rank]] for rank in ranks]
    rects = np.concatenate(found) if found else np.zeros((0, 4), np.int64)
    holders = np.repeat(ranks, [len(f) for f in found])
    order = np.lexsort((holders, rects[:, 3], rects[:, 1], rects[:, 2], rects[:, 0]))
    both = np.column_stack([holders, rects])[order]
    new = np.ones(len(both), bool)
    new[1:] = (both[1:, 1:] != both[:-1, 1:]).any(axis=1)
    both = both[new]
    check_cover(key, shape, both[:, 1:])
    return both


def shares(plan: Plan, said: Sequence[Announcement]) -> list[Share]:
    """What rank 0 tells each rank."""
    numbers = np.array([n for _, n in plan.tensors.values()], np.int32)[: len(said[0].numbers)]
    out = [Share(numbers, {k: plan.tensors[k][1] for k in one.others}, {}) for one in said]
    for number, layout in enumerate(plan.layouts):
        by_rank = layout[np.argsort(layout[:, 0], kind="stable")]
        ranks, starts = np.unique(by_rank[:, 0], return_index=True)
        for rank, rects in zip(ranks.tolist(), np.split(by_rank[:, 1:], starts[1:]), strict=False):
            out[rank].rects[number] = rects
    return out


def owned(share: Share, table: dict[str, Kind], keys: Iterable[str]) -> set[tuple[str, Rect]]:
    """The rectangles of a rank's own tensors that it writes."""
    places = {key: i for i, key in enumerate(table)}
    made = {number: [Rect(*r) for r in rects.tolist()] for number, rects in share.rects.items()}
    out = set()
    for key in keys:
        number = int(share.numbers[places[key]]) if key in places else share.others[key]
        out |= {(key, rect) for rect in made.get(number, ())}
    return out


def agree(what: str, pieces: Sequence[Piece]) -> tuple[set[tuple[str, Rect]], Plan]:
    """What this rank writes of its pieces; and, on rank 0, the plan of all. Collective.

    Raises CheckpointError on every rank if ranks disagree or a tensor is not covered exactly.
    """
    rank, _ = world()

    def own() -> Holding:
        check_unique(pieces)
        return holding((p.key, (p.dtype, p.shape), p.rect) for p in pieces)

    held = together(what, own)
    table = at_first(what, lambda: {key: kind for key, (kind, _) in held.tensors.items()})
    said = to_first(together(what, lambda: announce(held, table, rank)))
    plan, given = Plan(), list[Share]()

    def decide() -> None:
        nonlocal plan, given
        plan = arrange(table, said)
        given = shares(plan, said)

    at_first(what, decide)
    share = from_first(given)
    return together(what, lambda: owned(share, table, held.tensors)), plan
