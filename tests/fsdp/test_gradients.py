"""Missing, non-finite and invalid gradients on some ranks; lazy binding."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from shard4bit.placement import to_local
from shard4bit.reference import ReferenceBackend
from tests.fsdp import models
from tests.fsdp.models import SHAPES, Arrays, Zoo, canonical, optimizer_of, same
from tests.fsdp.recorder import Recorder
from tests.fsdp.test_invariance_fsdp2 import close
from tests.pool import pool
from tests.test_oracle_agreement import same_bits

Missing = dict[str, tuple[int, ...]]  # parameter -> ranks without a gradient


def local_bytes(model: torch.nn.Module, optimizer: Any) -> dict[str, bytes]:
    """This rank's parameters and states as they lie in memory."""
    tensors = dict(model.named_parameters())
    for name, param in model.named_parameters():
        tensors |= {f"{name}/{k}": v for k, v in optimizer.state[param].items()}
    return {
        k: to_local(t).contiguous().view(-1).view(torch.uint8).numpy().tobytes() for k, t in tensors.items()
    }


# ---- missing -----------------------------------------------------------------------------------


def run_with_missing(kind: str, layout: str, missing: Missing) -> tuple[Arrays, list[str]]:
    """Three steps; in the second one, ``missing`` gradients are None on some ranks. Returns everything in
    whole, and the parameters of which that step changed anything on this rank."""
    model = models.sharded(Zoo(), layout)
    optimizer = optimizer_of(kind, model.parameters())
    rank, changed = dist.get_rank(), []
    for step in (1, 2, 3):
        models.force(model, step)
        if step == 2:
            for name, ranks in missing.items():
                if rank in ranks:
                    model.get_parameter(name).grad = None
            before = local_bytes(model, optimizer)
        optimizer.step()
        if step == 2:
            after = local_bytes(model, optimizer)
            changed = sorted({k.split("/")[0] for k in before if before[k] != after[k]})
    return canonical(model, optimizer), changed


def single_with_zeros(kind: str, world: int, missing: Missing) -> Arrays:
    """One process: where all ranks miss a gradient it is None, else zeros stand in those ranks' rows."""
    model = Zoo()
    optimizer = optimizer_of(kind, model.parameters())
    for step in (1, 2, 3):
        models.force(model, step)
        for name, ranks in missing.items() if step == 2 else ():
            param = model.get_parameter(name)
            if len(ranks) == world:
                param.grad = None
                continue
            assert param.grad is not None
            rows = torch.chunk(param.grad, world)
            for rank in ranks:
                if rank < len(rows):
                    rows[rank].zero_()
        optimizer.step()
    return canonical(model, optimizer)


@pytest.mark.parametrize("kind", ["rank1", "block", "sgd"])
def test_a_gradient_missing_everywhere_changes_nothing(kind: str) -> None:
    missing: Missing = {"odd": (0, 1, 2), "bias": (0, 1, 2), "wide": (0, 1, 2)}
    expected = single_with_zeros(kind, 3, missing)
    for found, changed in pool(3).run(run_with_missing, kind, "fsdp", missing):
        assert not set(changed) & set(missing)
        assert set(SHAPES) - set(missing) <= set(changed)  # a step count at least
        same(found, expected, kind)
        assert expected["state/odd/step"] == 2 and expected["state/tall/step"] == 3


@pytest.mark.parametrize("kind", ["rank1", "block", "sgd"])
@pytest.mark.parametrize("world", [2, 4])
def test_a_gradient_missing_on_some_ranks_is_zeros_there(world: int, kind: str) -> None:
    missing: Missing = {
        "odd": (1,),
        "conv": (0,),
        "bias": (world - 1,),
        "few": (0,),
        "three": tuple(range(1, world)),
        "wide": tuple(range(1, world)),  # the ranks that hold nothing of it
        "experts": (0,),
    }
    expected = single_with_zeros(kind, world, missing)
    for found, changed in pool(world).run(run_with_missing, kind, "fsdp", missing):
        assert changed == sorted(SHAPES)
        same(found, expected, (world, kind))
        assert all(found[f"state/{name}/step"] == 3 for name in SHAPES)


def test_a_gradient_on_an_empty_rank_alone_counts_as_zeros_elsewhere() -> None:
    missing: Missing = {"wide": (0,)}  # rank 0 holds all of it
    expected = single_with_zeros("rank1", 2, missing)
    for found, changed in pool(2).run(run_with_missing, "rank1", "fsdp", missing):
        assert "wide" in changed
        same(found, expected)


def test_hsdp_with_a_gradient_missing_on_the_same_shard_of_each_replica() -> None:
    missing: Missing = {"odd": (1, 3), "bias": (0, 2)}
    expected = single_with_zeros("rank1", 2, {"odd": (1,), "bias": (0,)})
    for found, _ in pool(4).run(run_with_missing, "rank1", "hsdp", missing):
        same(found, expected)


# ---- not finite --------------------------------------------------------------------------------

#: quiet NaNs of both signs, with payloads
NANS = {"plus": 0x7FC00001, "minus": 0xFFC12345}


def poison(grad: torch.Tensor, value: str) -> torch.Tensor:
    number = np.array([NANS[value]], np.uint32).view(np.float32) if value in NANS else [float(value)]
    grad[-1, -1] = torch.tensor(np.asarray(number, np.float32))[0]
    return grad


def run_poisoned(kind: str, layout: str, value: str) -> Arrays:
    model = models.sharded(Zoo(), layout)
    optimizer = optimizer_of(kind, model.parameters())
    for step in (1, 2, 3):
        models.force(model, step)
        if step == 2:
            grad = poison(models.gradient("odd", SHAPES["odd"], step), value)
            model.odd.grad = models.scatter(grad, model.odd)
        optimizer.step()
    return canonical(model, optimizer)


@pytest.mark.parametrize("value", ["plus", "minus", "inf", "-inf"])
@pytest.mark.parametrize("kind", ["rank1", "block"])
def test_not_finite_on_the_last_rank_is_seen_by_all(kind: str, value: str) -> None:
    expected = run_poisoned(kind, "plain", value)
    for found in pool(3).run(run_poisoned, kind, "fsdp", value):
        for key in expected:
            assert same_bits(found[key], expected[key]), key
        statistics = [k for k in found if k.startswith("state/odd/") and k.endswith(("max", "absmax"))]
        assert len(statistics) == (3 if kind == "rank1" else 2)
        for key in statistics:
            bad = found[key][~np.isfinite(found[key])]
            assert bad.size, key
            assert set(bad.view(np.uint32)) <= {0x7FC00000, 0x7F800000}, key
        if kind == "rank1" and value in NANS:
            assert np.isnan(found["state/odd/exp_avg_sq_col_max"][-1])
        clean = {k: v for k, v in expected.items() if "/odd" not in k}
        assert all(np.isfinite(v).all() for v in clean.values())


# ---- lazy binding ------------------------------------------------------------------------------


def construct() -> tuple[Any, ...]:
    model = models.sharded(Zoo(), "fsdp")
    with Recorder() as recorder:
        optimizer = optimizer_of("rank1", model.parameters())
    states, created = len(optimizer.state), recorder.created
    keys = set(optimizer.state_dict()["state"])
    return recorder.calls, states, created, keys


def test_constructing_neither_communicates_nor_allocates() -> None:
    for calls, states, created, keys in pool(2).run(construct):
        assert (calls, states, created) == ([], 0, 0)
        assert keys == set(range(len(SHAPES)))  # by state_dict, all are bound, without any gradient


# ---- invalid -----------------------------------------------------------------------------------


def spoil(param: Any, how: str) -> None:
    """Give a parameter a gradient that cannot be used."""
    local = param.to_local().detach()
    mesh, placements = param.device_mesh, param.placements
    around = {"shape": param.shape, "stride": param.stride(), "run_check": False}
    if how == "float64":
        param.grad_dtype = None
        param.grad = DTensor.from_local(local.double(), mesh, placements, **around)
    elif how == "sparse":
        param.grad._local_tensor = local.to_sparse()  # from_local cannot make it
    else:
        param.grad = DTensor.from_local(local[1:], mesh, placements, **around)


def failed_step(
    model: Any, optimizer: Any, broken: AbstractContextManager[Any]
) -> tuple[str, str, bool, Arrays]:
    """Step under ``broken``: the error, whether all is as before, and the states one good step later."""
    before = local_bytes(model, optimizer)
    error: Exception | None = None
    with broken:
        try:
            optimizer.step()
        except Exception as caught:
            error = caught
    unchanged = local_bytes(model, optimizer) == before
    models.train(model, optimizer, 1, first=2)
    return type(error).__name__, str(error), unchanged, canonical(model, optimizer)


def run_invalid(layout: str, how: str, rank: int, name: str) -> tuple[str, str, bool, Arrays]:
    """A good step, one that is invalid on one rank, another good one."""
    model = models.sharded(Zoo(), layout)
    optimizer = optimizer_of("rank1", model.parameters())
    models.train(model, optimizer, 1)
    models.force(model, 2)
    if dist.get_rank() == rank:
        spoil(model.get_parameter(name), how)
    return failed_step(model, optimizer, nullcontext())


@pytest.mark.parametrize("how, word", [("float64", "float64"), ("sparse", "sparse"), ("shape", "shape")])
@pytest.mark.parametrize("world, rank, name", [(2, 1, "odd"), (3, 0, "small")])
def test_an_invalid_gradient_fails_everywhere_and_changes_nothing(
    world: int, rank: int, name: str, how: str, word: str
) -> None:
    expected = models.forced_run("rank1", "plain", 2)
    outcomes = pool(world).run(run_invalid, "fsdp", how, rank, name)
    for here, (kind, text, unchanged, found) in enumerate(outcomes):
        assert kind == ("ValueError" if here == rank else "RuntimeError"), (here, text)
        assert (word if here == rank else "another rank") in text
        assert unchanged
        same(found, expected, here)


def fail_in_measure(kind: str, bad: int) -> tuple[str, str, bool, Arrays]:
    """A good step, one in which a rank runs out of memory half-way through measuring, another good one."""
    model = models.sharded(Zoo(), "fsdp")
    optimizer = optimizer_of(kind, model.parameters())
    models.train(model, optimizer, 1)
    models.force(model, 2)
    real = ReferenceBackend.measure

    def failing(self: Any, rule: Any, works: Any) -> None:
        if dist.get_rank() != bad:
            return real(self, rule, works)
        real(self, rule, works[:3])
        raise MemoryError("no memory left here")

    return failed_step(model, optimizer, mock.patch.object(ReferenceBackend, "measure", failing))


@pytest.mark.parametrize("kind", ["rank1", "factored"])
def test_a_rank_that_fails_while_measuring_stops_all(kind: str) -> None:
    expected = models.forced_run(kind, "plain", 2)
    for here, (name, text, unchanged, found) in enumerate(pool(3).run(fail_in_measure, kind, 1)):
        assert name == ("MemoryError" if here == 1 else "RuntimeError"), (here, text)
        assert ("no memory left here" if here == 1 else "another rank") in text
        assert unchanged
        (close if kind == "factored" else same)(found, expected, (kind, here))


def grid_with_invalid(bad: int) -> tuple[str, bool]:
    """Two groups a rank: the news of the failure must cross both."""
    model, mesh = cast(Any, Zoo({"w": (129, 301)})), models.mesh_of(2, 2)
    model.w = torch.nn.Parameter(distribute_tensor(model.w.data, mesh, [Shard(0), Shard(1)]))
    optimizer = optimizer_of("factored", model.parameters())
    models.train(model, optimizer, 1)
    models.force(model, 2)
    if dist.get_rank() == bad:
        spoil(model.w, "float64")
    before = local_bytes(model, optimizer)
    try:
        optimizer.step()
    except Exception as error:
        return type(error).__name__, local_bytes(model, optimizer) == before
    return "nothing", False


@pytest.mark.parametrize("bad", [0, 3])
def test_an_invalid_gradient_on_a_grid_fails_on_all_four(bad: int) -> None:
    for rank, (kind, unchanged) in enumerate(pool(4).run(grid_with_invalid, bad)):
        assert (kind, unchanged) == ("ValueError" if rank == bad else "RuntimeError", True)
