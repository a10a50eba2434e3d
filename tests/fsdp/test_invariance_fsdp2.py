"""FSDP2 and DTensors on real process groups: every sharding gives the bits of one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import shard4bit
from shard4bit.errors import LayoutError
from tests import oracle
from tests.covering import covering
from tests.fsdp import models
from tests.fsdp.models import ADAMW, SGD, SHAPES, Arrays, Zoo, canonical, optimizer_of, same
from tests.pool import Pool, pool
from tests.test_oracle_agreement import same_bits

STEPS = 4
WORLDS = [2, 3, 4]
FACTORED_RTOL = 4 * 2.0**-23


@cache
def single(kind: str, dtype: str = "float32") -> Arrays:
    """The run of one process, without any process group."""
    return models.forced_run(kind, "plain", STEPS, dtype)


def close(found: Arrays, expected: Arrays, where: Any) -> None:
    """For factored second moments: sums come in another order, so means differ by a few ulps."""
    exact = [k for k in expected if "exp_avg_sq" not in k and "model/" not in k]
    means = [k for k in expected if k.endswith("_mean")]
    assert exact and means
    same({k: found[k] for k in exact}, {k: expected[k] for k in exact}, where)
    for key in means:
        np.testing.assert_allclose(found[key], expected[key], rtol=FACTORED_RTOL, atol=0, err_msg=key)
    for key in (k for k in expected if k.startswith("model/")):
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-5, atol=1e-7, err_msg=key)


@pytest.mark.parametrize("kind", ["rank1", "block", "sgd", "nesterov"])
def test_one_process_equals_the_oracle(kind: str) -> None:
    found = single(kind)
    for name, shape in SHAPES.items():
        big = oracle.is_quantized(shape)
        first = oracle.Spec(norm="block", mapping="de", signed=True) if big else None
        second = oracle.Spec(norm="rank1" if kind == "rank1" else "block", mapping="linear") if big else None
        reference: Any = oracle.OracleAdamW(shape, first, second)
        hyper: dict[str, Any] = ADAMW
        if kind in ("sgd", "nesterov"):
            reference, hyper = oracle.OracleSGD(shape, first), {**SGD, "nesterov": False}
            if kind == "nesterov":
                hyper = {**SGD, "dampening": 0.0, "nesterov": True}
        matrix = oracle.matrix_shape(shape)
        param = models.start(name, shape).numpy().reshape(matrix)
        for step in range(1, STEPS + 1):
            grad = models.gradient(name, shape, step).numpy().reshape(matrix)
            param = reference.step(param, grad, **hyper)
        assert same_bits(found[f"model/{name}"], param), name
        for key, value in reference.state.items():
            if key != "step":
                assert same_bits(found[f"state/{name}/{key}"], np.asarray(value)), (name, key)


@pytest.mark.parametrize("kind, world", covering(["rank1", "block", "factored", "sgd", "nesterov"], WORLDS))
def test_fsdp2_equals_one_process(kind: str, world: int) -> None:
    for rank, found in enumerate(pool(world).run(models.forced_run, kind, "fsdp", STEPS)):
        (close if kind == "factored" else same)(found, single(kind), (kind, world, rank))


@pytest.mark.parametrize("kind", ["rank1", "block"])
@pytest.mark.parametrize("world, layout", [(2, "experts"), (4, "experts"), (4, "hsdp")])
def test_experts_by_their_second_dimension_and_hsdp(world: int, layout: str, kind: str) -> None:
    for rank, found in enumerate(pool(world).run(models.forced_run, kind, layout, STEPS)):
        same(found, single(kind), (kind, layout, rank))


def test_hsdp_factored_and_sgd() -> None:
    for kind in ("factored", "sgd"):
        for rank, found in enumerate(pool(4).run(models.forced_run, kind, "hsdp", STEPS)):
            (close if kind == "factored" else same)(found, single(kind), (kind, rank))


@pytest.mark.parametrize("world", [2, 3])
def test_bf16_parameters(world: int) -> None:
    for rank, found in enumerate(pool(world).run(models.forced_run, "rank1", "fsdp", STEPS, "bfloat16")):
        same(found, single("rank1", "bfloat16"), (world, rank))


# ---- DTensors made directly --------------------------------------------------------------------

PLACEMENTS = {
    "R": Replicate(),
    "0": Shard(0),
    "1": Shard(1),
    "2": Shard(2),
    "s": _StridedShard(0, split_factor=2),
}


def placed_run(kind: str, shape: tuple[int, ...], mesh: tuple[int, ...], placements: str) -> Any:
    """Train one DTensor. Returns what of it is whole (by full_tensor), the state's local tensors that
    are no DTensors, this rank's flat element numbers, and what state_dict() raised."""
    device_mesh, sharding = models.mesh_of(*mesh), [PLACEMENTS[p] for p in placements]
    model: Any = Zoo({"w": shape})
    model.w = nn.Parameter(distribute_tensor(model.w.data, device_mesh, sharding, src_data_rank=None))
    optimizer = optimizer_of(kind, model.parameters())
    models.train(model, optimizer, STEPS)
    state = optimizer.state[model.w]
    local = {k: v.cpu().numpy().copy() for k, v in state.items() if not isinstance(v, DTensor)}
    whole = {k: v for k, v in canonical(model, optimizer).items() if k.split("/")[-1] not in local}
    numbers = torch.arange(model.w.numel()).view(shape)
    mine = distribute_tensor(numbers, device_mesh, sharding, src_data_rank=None).to_local().cpu().numpy()
    error: Exception | None = None
    try:
        optimizer.state_dict()
    except Exception as caught:
        error = caught
    return whole, local, mine, error


def check_local(key: str, local: np.ndarray, mine: np.ndarray, cols: int, expected: np.ndarray) -> None:
    """A rank's codes or absmax against the global ones, element by element of what it holds."""
    expected = expected.reshape(-1, expected.shape[-1])
    if mine.size == 0:
        assert local.size == 0, key
        return
    rows, columns = np.unique(mine // cols), np.unique(mine % cols)
    unit = 2 if key.endswith("codes") else 128
    first = columns[0] // unit
    found, want = local.reshape(len(rows), -1), expected[rows]
    assert found.shape[1] == columns[-1] // unit + 1 - first, key
    if unit == 2:
        for column in columns:
            shift = 4 * (column % 2)
            got = found[:, column // 2 - first] >> shift & 15
            assert np.array_equal(got, want[:, column // 2] >> shift & 15), (key, column)
    else:
        assert found.tobytes() == want[:, first : first + found.shape[1]].tobytes(), key


#: shape, mesh, placements, parts that are no DTensors there
CUTS = [
    ((64, 512), (2,), "1", ()),
    ((64, 1024), (4,), "1", ()),
    ((40, 300), (2,), "1", ("absmax",)),  # 150: a block is cut, a byte is not
    ((40, 301), (2,), "1", ("codes", "absmax")),  # 151: a byte is cut
    ((33, 770), (4,), "1", ("codes", "absmax")),  # 193, 386, 579
    ((8, 11008), (4,), "1", ("absmax",)),  # 2752: as a projection of 11008 columns on four ranks
    ((50, 100), (4,), "1", ("codes", "absmax")),  # one block on four ranks
    ((2000, 3), (4,), "1", ("codes", "absmax")),  # an empty rank
    ((64, 16, 3, 3), (2,), "1", ("absmax",)),
    ((6, 16, 384), (3,), "2", ()),
    ((6, 16, 384), (2,), "2", ("absmax",)),
    ((6, 16, 384), (4,), "1", ()),
    ((64, 512), (2, 2), "01", ()),
    ((129, 301), (2, 2), "01", ("codes", "absmax")),
    ((129, 301), (2, 2), "10", ("codes", "absmax")),
    ((3, 1700), (2, 2), "01", ("absmax",)),
    ((129, 301), (2, 2), "00", ()),
    ((41, 300), (2, 2), "R1", ("absmax",)),
    ((41, 300), (2, 2), "1R", ("absmax",)),
    ((41, 300), (2, 2), "RR", ()),
]


def check_cut(
    pool_of: Callable[[int], Pool],
    kind: str,
    shape: tuple[int, ...],
    mesh: tuple[int, ...],
    placements: str,
    plain: tuple[str, ...],
) -> None:
    """What ranks of such a pool hold of a parameter, and what state_dict() says, against one process."""
    model = Zoo({"w": shape})
    reference = optimizer_of(kind, model.parameters())
    models.train(model, reference, STEPS)
    expected = canonical(model, reference)
    cols = oracle.matrix_shape(shape)[1]
    results = pool_of(int(np.prod(mesh))).run(placed_run, kind, shape, mesh, placements)
    for rank, (whole, local, mine, error) in enumerate(results):
        where = (rank, mine.shape)
        assert {k.rsplit("_")[-1] for k in local} - {"step"} == set(plain), where
        assert "model/w" in whole
        same(whole, {k: expected[k] for k in whole}, where)
        for key, value in local.items():
            if key == "step":
                assert value == STEPS
            else:
                check_local(key, value, mine, cols, expected[f"state/w/{key}"])
        if "codes" in plain:
            assert isinstance(error, LayoutError) and "shard4bit.save" in str(error), where
            assert "param_groups[0]" in str(error), where
        else:
            assert error is None, where


@pytest.mark.parametrize("shape, mesh, placements, plain", CUTS)
@pytest.mark.parametrize("kind", ["rank1", "block"])
def test_dtensors_cut_anywhere(
    kind: str, shape: tuple[int, ...], mesh: tuple[int, ...], placements: str, plain: tuple[str, ...]
) -> None:
    check_cut(pool, kind, shape, mesh, placements, plain)


def by_columns(root: str, save: bool) -> str:
    """A projection on four ranks by columns, trained and saved, or loaded. Its digest."""
    model: Any = Zoo({"w": (8, 11008)})
    cut_ones = distribute_tensor(model.w.data, models.mesh_of(4), [Shard(1)], src_data_rank=None)
    model.w = nn.Parameter(cut_ones if save else torch.zeros_like(cut_ones))
    optimizer = optimizer_of("rank1", model.parameters())
    if save:
        models.train(model, optimizer, STEPS)
        shard4bit.save(root, model, optimizer, step=STEPS)
    else:
        shard4bit.load(root, model, optimizer)
    return shard4bit.digest(model, optimizer)


def by_rows(root: str) -> str:
    model = models.sharded(Zoo({"w": (8, 11008)}), "fsdp")
    optimizer = optimizer_of("rank1", model.parameters())
    shard4bit.load(root, model, optimizer)
    return shard4bit.digest(model, optimizer)


def test_a_projection_by_columns_is_saved_and_loaded(tmp_path: Path) -> None:
    model = Zoo({"w": (8, 11008)})
    reference = optimizer_of("rank1", model.parameters())
    models.train(model, reference, STEPS)
    expected = shard4bit.digest(model, reference)
    ours, alone = str(tmp_path / "ours"), str(tmp_path / "alone")
    shard4bit.save(alone, model, reference, step=STEPS)
    assert set(pool(4).run(by_columns, ours, True)) == {expected}
    assert set(pool(4).run(by_columns, alone, False)) == {expected}
    assert set(pool(3).run(by_rows, ours)) == {expected}


def test_factored_statistics_of_column_cuts() -> None:
    for shape, mesh, placements in (((40, 301), (2,), "1"), ((129, 301), (2, 2), "01")):
        model = Zoo({"w": shape})
        reference = optimizer_of("factored", model.parameters())
        models.train(model, reference, STEPS)
        expected = canonical(model, reference)
        for whole, local, mine, _ in pool(len(mesh) * 2).run(placed_run, "factored", shape, mesh, placements):
            for key in ("row_mean", "col_mean", "mean"):
                key = f"state/w/exp_avg_sq_{key}"
                np.testing.assert_allclose(whole[key], expected[key], rtol=FACTORED_RTOL, atol=0)
            check_local("codes", local["exp_avg_codes"], mine, 301, expected["state/w/exp_avg_codes"])


def refused(shape: tuple[int, ...], mesh: tuple[int, ...], placements: str) -> str:
    """The message of the LayoutError that binding raises."""
    device_mesh, sharding = models.mesh_of(*mesh), [PLACEMENTS[p] for p in placements]
    param = DTensor.from_local(torch.zeros(shape), device_mesh, [Replicate()] * len(mesh), run_check=False)
    param = param.redistribute(device_mesh, sharding)
    with pytest.raises(LayoutError) as caught:
        optimizer_of("rank1", [("the.name", nn.Parameter(param))]).bind()
    return str(caught.value)


@pytest.mark.parametrize(
    "shape, mesh, placements",
    [
        ((300, 4, 5), (4,), "2"),  # columns in strides; the last rank is empty and must refuse as well
        ((300, 4, 5), (2, 2), "12"),
        ((300, 3, 7), (2, 2), "12"),  # one rank has a single stride
        ((41, 300), (2, 2), "11"),  # columns cut twice
        ((70, 80), (4,), "s"),  # rows in strides, of which DTensor says that they are contiguous
        ((70, 80), (2, 2), "0s"),
    ],
)
def test_columns_that_cannot_be_served_are_refused_on_all_ranks(
    shape: tuple[int, ...], mesh: tuple[int, ...], placements: str
) -> None:
    for message in pool(4).run(refused, shape, mesh, placements):
        assert "the.name" in message and "shard" in message, message


# ---- tensor parallel and FSDP2 together --------------------------------------------------------


class Block(nn.Module):
    """Column-wise then row-wise linear layers, as tensor parallelism cuts them, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(96, 514), nn.Linear(514, 96), nn.LayerNorm(96)
        with torch.no_grad():
            for name, param in self.named_parameters():
                param.copy_(models.start(name, tuple(param.shape)))


def parallel_run(kind: str, tensor_parallel: int) -> Arrays:
    mesh = models.mesh_of(4 // tensor_parallel, tensor_parallel)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    model: Any = parallelize_module(Block(), mesh["d1"], plan)
    model = models.fully_shard(model, mesh=mesh["d0"])
    optimizer = optimizer_of(kind, model.parameters())
    for step in range(1, STEPS + 1):
        for name, param in model.named_parameters():
            whole = models.gradient(name, tuple(param.shape), step)
            param.grad = DTensor.from_local(
                cut(whole, param), param.device_mesh, param.placements, run_check=False,
                shape=whole.shape, stride=whole.stride(),
            )  # fmt: skip
        optimizer.step()
    assert len({p.device_mesh.ndim for p in model.parameters()}) == 2  # the norm has no "d1"
    assert not any(p.placements == (Shard(0), Shard(0)) for p in model.parameters())  # strided instead
    return canonical(model)


def cut(whole: torch.Tensor, param: Any) -> torch.Tensor:
    """A rank's slice: DTensor cuts tensor parallelism first, then FSDP what is left."""
    by_mesh = list(zip(param.placements, param.device_mesh.mesh_dim_names, strict=True))
    for placement, name in sorted(by_mesh, key=lambda pair: pair[1], reverse=True):
        if placement.is_replicate():
            continue
        mesh = param.device_mesh[name]
        parts = torch.chunk(whole, mesh.size(), placement.dim)
        rank = mesh.get_local_rank()
        whole = parts[rank] if rank < len(parts) else whole.narrow(placement.dim, 0, 0)
    return whole.contiguous()


@pytest.mark.parametrize("kind", ["rank1", "block", "sgd"])
def test_tensor_parallel_under_fsdp2(kind: str) -> None:
    model = Block()
    reference = optimizer_of(kind, model.parameters())
    models.train(model, reference, STEPS)
    for found in pool(4).run(parallel_run, kind, 2):
        same(found, canonical(model), kind)
