"""The digest: the same for every sharding, another for every flipped bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import shard4bit
from shard4bit.checkpoint import digest as digests
from shard4bit.errors import CheckpointError
from shard4bit.placement import to_local
from tests.checkpoint.ranks import single_zoo
from tests.fsdp import models
from tests.fsdp.models import Toy, Zoo, optimizer_of
from tests.pool import pool


def trained(kind: str, layout: str) -> tuple[Any, Any]:
    model = models.sharded(Zoo(), layout)
    optimizer = optimizer_of(kind, model.parameters())
    models.train(model, optimizer, 2)
    return model, optimizer


def digest_of(kind: str, layout: str) -> str:
    return shard4bit.digest(*trained(kind, layout))


@pytest.mark.parametrize("kind", ["rank1", "block", "sgd"])
def test_independent_of_the_number_of_ranks(kind: str) -> None:
    expected = single_zoo(kind, 2)[1]
    assert len(expected) == 32 and int(expected, 16) >= 0
    layouts = [(2, "fsdp"), (2, "plain"), (2, "experts"), (3, "fsdp"), (4, "fsdp"), (4, "hsdp")]
    for world, layout in layouts:
        assert set(pool(world).run(digest_of, kind, layout)) == {expected}, (world, layout)
    assert single_zoo("rank1", 3)[1] != single_zoo("rank1", 2)[1] != single_zoo("block", 2)[1]


def flip(tensor: Tensor, byte: int, bit: int) -> None:
    to_local(tensor).view(-1).view(torch.uint8)[byte] ^= 1 << bit


def state(optimizer: Any, param: Tensor, key: str) -> Tensor:
    return optimizer.state[param][key]


#: changes that only the last rank makes
CHANGES: dict[str, Callable[[Any, Any], None]] = {
    "a bit of a code": lambda m, o: flip(state(o, m.odd, "exp_avg_codes"), 17, 6),
    "the last code": lambda m, o: flip(state(o, m.experts, "exp_avg_sq_codes"), -1, 4),
    "a bit of a statistic": lambda m, o: flip(state(o, m.tall, "exp_avg_absmax"), 5, 0),
    "a bit of a parameter": lambda m, o: flip(m.conv, 1003, 0),
    "the sign of a bias": lambda m, o: flip(m.bias, 3, 7),
    "a bit of an fp32 moment": lambda m, o: flip(state(o, m.bias, "exp_avg_sq"), 0, 0),
}


def digests_after(changes: list[str], layout: str) -> list[str]:
    """The digest before, with each change alone, and after all were undone (flips undo themselves)."""
    model, optimizer = trained("rank1", layout)
    last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
    out = [shard4bit.digest(model, optimizer)]
    for name in changes:
        if last:
            CHANGES[name](model, optimizer)
        out.append(shard4bit.digest(model, optimizer))
        if last:
            CHANGES[name](model, optimizer)
    return [*out, shard4bit.digest(model, optimizer)]


def test_every_flipped_bit_changes_it() -> None:
    names = list(CHANGES)
    for world in (2, 3):
        results = pool(world).run(digests_after, names, "fsdp")
        assert all(r == results[0] for r in results)
        first, *changed, last = results[0]
        assert first == last == single_zoo("rank1", 2)[1]
        assert len({first, *changed}) == 1 + len(names)


def test_steps_buffers_positions_and_names_count() -> None:
    model: Any = Toy()
    optimizer = optimizer_of("rank1", model.parameters())
    models.fit(model, optimizer, 0, 2)
    seen = {shard4bit.digest(model, optimizer)}

    def changed() -> None:
        digest = shard4bit.digest(model, optimizer)
        assert digest not in seen
        seen.add(digest)

    optimizer.state[model.hidden.weight]["step"] += 1
    changed()
    model.seen += 1
    changed()
    model.frozen.weight.data[3, 4] += 1
    changed()
    codes = optimizer.state[model.hidden.weight]["exp_avg_codes"]
    codes.copy_(codes.flip(0))  # the same bytes in other rows
    changed()
    weight = model.hidden.weight.data
    weight[:, [0, 1]] = weight[:, [1, 0]]
    changed()
    model.first.bias.data[0] = 0.0
    changed()
    model.first.bias.data[0] = -0.0
    changed()
    model.scratch += 1  # not persistent
    assert shard4bit.digest(model, optimizer) in seen
    assert shard4bit.digest(model) not in seen  # without the optimizer: another content
    swapped: Any = Zoo({"a": (2, 3), "b": (2, 3)})
    before = shard4bit.digest(swapped)
    a, b = swapped.a.data.clone(), swapped.b.data.clone()
    swapped.a.data, swapped.b.data = b, a
    assert shard4bit.digest(swapped) != before


def test_shapes_are_told_apart() -> None:
    values = torch.arange(6.0)
    digests = set()
    for shape in ((2, 3), (3, 2), (6,), (1, 6)):
        model: Any = Zoo({"a": shape})
        model.a.data.copy_(values.view(shape))
        digests.add(shard4bit.digest(model))
    assert len(digests) == 4


def failing_digest(bad: int) -> tuple[str, bool]:
    """A digest that fails on one rank; the error, and whether the next one is as before."""
    model, optimizer = trained("rank1", "fsdp")
    before, real = shard4bit.digest(model, optimizer), digests.piece_sum

    def fail(piece: Any) -> int:
        if dist.get_rank() == bad:
            raise MemoryError("no room")
        return real(piece)

    with mock.patch.object(digests, "piece_sum", fail), pytest.raises(CheckpointError) as caught:
        shard4bit.digest(model, optimizer)
    return str(caught.value), shard4bit.digest(model, optimizer) == before


@pytest.mark.parametrize("bad", [0, 1])
def test_a_failure_on_one_rank_reaches_all(bad: int) -> None:
    for text, same in pool(2).run(failing_digest, bad):
        assert f"rank {bad}" in text and "no room" in text
        assert same
