"""What a step communicates: one all-reduce per group and operation, and never a whole parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from shard4bit.placement import to_local
from shard4bit.reference import CPU_CHUNK
from tests import oracle
from tests.fsdp import models
from tests.fsdp.flat import Nest, flattened, force, wrapped
from tests.fsdp.flat import train as flat_train
from tests.fsdp.models import SHAPES, Zoo, optimizer_of
from tests.fsdp.recorder import Recorder, all_reduces
from tests.pool import pool

#: on two ranks each part is larger than a chunk of the reference back end (2^18 elements)
BIG = {"big": (600, 1024), "long": (700, 1000), "bias": (1000,)}

Report = tuple[list[tuple[str, str, int]], list[tuple[str, list[int]]], tuple[int, int]]


def report(model: nn.Module, kind: str) -> Report:
    """Collectives and the largest tensors of a second step (the first one binds)."""
    optimizer = optimizer_of(kind, model.parameters())
    models.train(model, optimizer, 1)
    models.force(model, 2)
    with all_reduces() as calls, Recorder() as recorder:
        optimizer.step()
    return recorder.calls, calls, (recorder.largest, recorder.created)


def zoo(kind: str, layout: str, big: bool = False) -> Report:
    return report(models.sharded(Zoo(BIG if big else SHAPES), layout), kind)


def grid(kind: str, shape: tuple[int, int], placements: str, sizes: tuple[int, ...]) -> Report:
    kinds = {"R": Replicate(), "0": Shard(0), "1": Shard(1)}
    model: Any = Zoo({"w": shape})
    sharding = [kinds[p] for p in placements]
    model.w = nn.Parameter(
        distribute_tensor(model.w.data, models.mesh_of(*sizes), sharding, src_data_rank=None)
    )
    return report(model, kind)


def columns(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(oracle.matrix_shape(s)[1] for s in shapes.values() if oracle.is_quantized(s))


def expected(kind: str, shapes: dict[str, tuple[int, ...]], ranks: list[int]) -> Any:
    """By DESIGN: a flag per rank and per parameter, and the column statistics of matrices."""
    flags, quantized = 1 + len(shapes), [s for s in shapes.values() if oracle.is_quantized(s)]
    maxima = flags + (columns(shapes) if kind == "rank1" else 0)
    calls, reduced = [("allreduce_", "int32", 4 * maxima)], [("MAX", ranks)]
    if kind == "factored":
        calls.append(("allreduce_", "float64", 8 * (columns(shapes) + len(quantized))))
        reduced.append(("SUM", ranks))
    return calls, reduced


@pytest.mark.parametrize("kind", ["rank1", "block", "factored", "sgd"])
@pytest.mark.parametrize("world", [2, 4])
def test_fsdp2_reduces_once_per_operation(world: int, kind: str) -> None:
    for calls, reduced, _ in pool(world).run(zoo, kind, "fsdp"):
        assert (calls, reduced) == expected(kind, SHAPES, list(range(world)))


@pytest.mark.parametrize("kind", ["rank1", "factored"])
def test_hsdp_reduces_within_a_replica(kind: str) -> None:
    for rank, (calls, reduced, _) in enumerate(pool(4).run(zoo, kind, "hsdp")):
        assert (calls, reduced) == expected(kind, SHAPES, [0, 1] if rank < 2 else [2, 3])


def test_plain_tensors_and_one_process_reduce_nothing() -> None:
    for calls, reduced, _ in pool(2).run(zoo, "rank1", "plain"):
        assert (calls, reduced) == ([], [])
    for calls, reduced, _ in pool(1).run(zoo, "rank1", "fsdp"):
        assert (calls, reduced) == ([], [])
    for calls, reduced, _ in pool(2).run(grid, "rank1", (64, 512), "R", (2,)):
        assert (calls, reduced) == ([], [])


def test_a_grid_reduces_once_on_each_side() -> None:
    rows, cols = (65, 64), (150, 150)  # of (129, 300) on 2x2
    for rank, (calls, reduced, _) in enumerate(pool(4).run(grid, "rank1", (129, 300), "01", (2, 2))):
        i, j = divmod(rank, 2)
        along_rows = 2 + cols[j]  # col_max
        along_cols = 2 + rows[i] * 1 + rows[i]  # absmax of the one cut block, row_max
        assert calls == [
            ("allreduce_", "int32", 4 * along_rows),
            ("allreduce_", "int32", 4 * along_cols),
        ]
        assert reduced == [("MAX", [j, j + 2]), ("MAX", [2 * i, 2 * i + 1])]


def test_aligned_columns_share_row_maxima_only() -> None:
    for calls, _, _ in pool(2).run(grid, "rank1", (64, 512), "1", (2,)):
        assert calls == [("allreduce_", "int32", 4 * (2 + 64))]
    for calls, _, _ in pool(2).run(grid, "block", (64, 512), "1", (2,)):
        assert calls == [("allreduce_", "int32", 4 * 2)]
    for calls, _, _ in pool(2).run(grid, "block", (64, 300), "1", (2,)):
        assert calls == [("allreduce_", "int32", 4 * (2 + 64 + 64))]  # both moments' cut block


@pytest.mark.parametrize("kind", ["rank1", "block", "factored", "sgd"])
def test_no_whole_parameter_in_a_step(kind: str) -> None:
    matrices = [torch.Size(s).numel() for s in BIG.values() if oracle.is_quantized(s)]
    for calls, _, (largest, created) in pool(2).run(zoo, kind, "fsdp", True):
        assert largest == max(matrices) // 2  # views of this rank's part
        assert created <= CPU_CHUNK < min(matrices) // 2
        assert sum(size for _, _, size in calls) < 4 * min(matrices) // 20


def control() -> list[Any]:
    """What the recorder sees of ordinary communication; an empty entry would blind the tests above."""
    model = models.sharded(Zoo({"w": (8, 100)}), "fsdp")
    x, world = torch.ones(6), dist.get_world_size()
    other = (dist.get_rank() + 1) % 2
    things = [
        lambda: dist.all_reduce(x.clone()),
        lambda: dist.all_gather([torch.empty(6) for _ in range(world)], x),
        lambda: dist.all_gather_into_tensor(torch.empty(12), x),
        lambda: dist.broadcast(x.clone(), 0),
        lambda: dist.reduce_scatter_tensor(torch.empty(3), x.clone()),
        lambda: dist.all_to_all_single(torch.empty(6), x),
        lambda: dist.send(x, other) if other else dist.recv(torch.empty(6), other),
        lambda: dist.all_gather_object([None] * world, 3),
        lambda: dist.broadcast_object_list([3], 0),
        lambda: dist.barrier(),
        lambda: model.w.full_tensor(),
        lambda: model.w.redistribute(placements=[Shard(1)]),
    ]
    seen: list[Any] = []
    for thing in things:
        with Recorder() as recorder:
            thing()
        seen.append(len(recorder.calls))
    with Recorder() as recorder:
        model.w.full_tensor()
    return [*seen, recorder.created]


def test_the_recorder_sees_communication_and_whole_tensors() -> None:
    for *seen, created in pool(2).run(control):
        assert all(seen), seen
        assert created == 800


def printed(kind: str, layout: str, shape: tuple[int, int] | None) -> tuple[list[Any], str, int, str]:
    """The collectives of binding and printing and of a step; what is printed; bytes of this rank's state."""
    model: Any = Zoo({"w": shape}) if shape else models.sharded(Zoo(), layout)
    if shape:
        cut = distribute_tensor(model.w.data, models.mesh_of(2, 2), [Shard(0), Shard(1)], src_data_rank=None)
        model.w = nn.Parameter(cut)
    optimizer = optimizer_of(kind, model.parameters())
    before = repr(optimizer)
    assert not optimizer.state  # nothing is bound
    models.train(model, optimizer, 1)
    models.force(model, 2)
    with Recorder() as quiet:
        text = repr(optimizer)
    assert quiet.calls == []
    with Recorder() as recorder:
        optimizer.step()
    local = [to_local(t) for s in optimizer.state.values() for t in s.values()]
    return recorder.calls, text, sum(t.numel() * t.element_size() for t in local), before


@pytest.mark.parametrize("kind", ["rank1", "block", "factored", "sgd"])
@pytest.mark.parametrize("world, layout, shape", [(3, "fsdp", None), (4, "hsdp", None), (4, "", (129, 301))])
def test_printing_tells_what_a_step_communicates(
    kind: str, world: int, layout: str, shape: tuple[int, int] | None
) -> None:
    for calls, text, held, before in pool(world).run(printed, kind, layout, shape):
        plural = "" if len(calls) == 1 else "s"
        moved = sum(size for _, _, size in calls)
        assert f"communication of a step: {moved:,} bytes in {len(calls)} all-reduce{plural}\n" in text + "\n"
        assert f"state on this rank: {held:,} bytes" in text
        assert f"state on this rank: {held:,} bytes" in before and before.count("\n") == text.count("\n")
        assert f"communication of a step: {moved:,} bytes in {len(calls)} all-reduce" in before


def printed_flat(kind: str, orig: bool, dtype: str) -> tuple[list[Any], str, int, str]:
    """As ``printed``, of FSDP1."""
    model = flattened(Nest(getattr(torch, dtype)), orig)
    optimizer = wrapped(kind, model)
    before = repr(optimizer)
    assert not optimizer.state  # nothing is bound
    flat_train(model, optimizer, 1)
    force(model, 2)
    with Recorder() as recorder:
        optimizer.step()
    held = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
    return recorder.calls, repr(optimizer), held, before


@pytest.mark.parametrize("kind, orig, dtype", [("rank1", True, "float32"), ("block", False, "bfloat16")])
def test_printing_tells_it_of_flat_parameters(kind: str, orig: bool, dtype: str) -> None:
    quantized = [s for s in SHAPES.values() if oracle.is_quantized(s)]
    counted = f"{len(quantized)} parameters, {sum(torch.Size(s).numel() for s in quantized):,} elements"
    for calls, text, held, before in pool(3).run(printed_flat, kind, orig, dtype):
        moved = sum(size for _, _, size in calls)
        for said in (text, before):
            assert counted in said, said
            assert f"state on this rank: {held:,} bytes" in said, said
            assert f"communication of a step: {moved:,} bytes in {len(calls)} all-reduce" in said, said
            assert ("WARNING" in said) == (dtype == "bfloat16")
