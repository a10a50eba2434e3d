"""import_state and export_state on sharded parameters: the bits of one process, and no rank that waits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import shard4bit
from tests.fsdp import models
from tests.fsdp.models import SHAPES, Arrays, Zoo, canonical, optimizer_of, same
from tests.fsdp.recorder import Recorder
from tests.fsdp.test_invariance_fsdp2 import close
from tests.optim.torchao_like import bitsandbytes8, quantized, quantized8
from tests.pool import pool

Found = tuple[Arrays, str]


def moments(name: str, shape: tuple[int, ...], kind: str) -> dict[str, torch.Tensor]:
    """A whole parameter's moments in another optimizer's state."""
    if kind == "sgd":
        return {"momentum_buffer": models.gradient(name, shape, 5)}
    return {"exp_avg": models.gradient(name, shape, 5), "exp_avg_sq": models.gradient(name, shape, 6).abs()}


def source_of(model: Any, kind: str, form: str) -> Any:
    """A torch optimizer over the model's parameters whose moments are forced. form: how they are stored."""
    make: Any = torch.optim.SGD if kind == "sgd" else torch.optim.AdamW
    source = make(model.parameters(), lr=0.125, weight_decay=0.25)
    for name, param in model.named_parameters():
        state: dict[str, Any] = {} if kind == "sgd" else {"step": torch.tensor(7.0)}
        for key, whole in moments(name, tuple(param.shape), kind).items():
            mine = models.scatter(whole, param)
            if form == "whole":
                state[key] = whole
            elif form == "local":
                state[key] = mine.to_local() if isinstance(mine, DTensor) else mine
            else:
                state[key] = mine
        source.state[param] = state
    return source


def imported(kind: str, layout: str, form: str = "sharded") -> Found:
    model = models.sharded(Zoo(), layout)
    optimizer = optimizer_of(kind, model.parameters())
    source = source_of(model, kind, form)
    shard4bit.import_state(optimizer, source if form == "sharded" else source.state_dict())
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.125, 0.25)
    return canonical(model, optimizer), shard4bit.digest(model, optimizer)


CASES = [(2, "fsdp", "sharded"), (3, "fsdp", "whole"), (4, "fsdp", "local"), (4, "hsdp", "sharded")]
CASES += [(4, "experts", "sharded")]
OTHERS = [(kind, *CASES[i]) for kind in ("block", "factored", "sgd", "B2048/DE-0") for i in (0, 3)]


@pytest.mark.parametrize("kind, world, layout, form", [*(("rank1", *case) for case in CASES), *OTHERS])
def test_imported_bits_do_not_depend_on_the_sharding(kind: str, world: int, layout: str, form: str) -> None:
    expected, digest = imported(kind, "plain")
    assert expected["state/odd/step"] == (1 if kind == "sgd" else 7)
    for found, here in pool(world).run(imported, kind, layout, form):
        if kind == "factored":
            close(found, expected, (world, layout))
        else:
            same(found, expected, (kind, world, layout))
            assert here == digest


def on_a_grid(shape: tuple[int, int]) -> str:
    """A matrix whose columns are cut within blocks and bytes."""
    model: Any = Zoo({"w": shape})
    if dist.is_initialized():
        mesh = models.mesh_of(2, 2)
        cut = distribute_tensor(model.w.data, mesh, [Shard(0), Shard(1)], src_data_rank=None)
        model.w = nn.Parameter(cut)
    optimizer = optimizer_of("rank1", model.parameters())
    shard4bit.import_state(optimizer, source_of(model, "rank1", "sharded"))
    models.train(model, optimizer, 1)
    return shard4bit.digest(model, optimizer)


def test_columns_cut_anywhere() -> None:
    for shape in ((129, 301), (64, 300)):
        assert set(pool(4).run(on_a_grid, shape)) == {on_a_grid(shape)}


def low_bit(kind: str, whole: torch.Tensor, key: str, param: Any) -> dict[str, Any]:
    """A moment of a library that quantizes local shards, by blocks; so the whole is what the pieces say.

    kind: torchao's tensors are inside of DTensors; bitsandbytes has codes of local shards, or ("bnb8 whole")
    a state dict of the whole.
    """
    local = whole
    if isinstance(param, DTensor) and kind != "bnb8 whole":
        local = torch.chunk(whole, dist.get_world_size())[dist.get_rank()]
    if kind.startswith("bnb8"):
        return bitsandbytes8(local, 1 if key == "exp_avg" else 2)
    state: Any = (quantized if kind == "torchao4" else quantized8)(local, key == "exp_avg")
    if isinstance(param, DTensor):
        state = DTensor.from_local(state, param.device_mesh, param.placements, run_check=False)
        assert type(state.to_local()).__name__ == "LikeTorchao"
    return {key: state}


def of_library(kind: str) -> Found:
    shape = (64, 256)
    model: Any = models.sharded(Zoo({"w": shape}), "fsdp" if dist.is_initialized() else "plain")
    source = torch.optim.AdamW(model.parameters())
    state: dict[str, Any] = {"step": torch.tensor(2.0)}
    for key in moments("w", shape, "adamw"):
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(len(key)))
        state |= low_bit(kind, whole if key == "exp_avg" else whole.abs(), key, model.w)
    source.state[model.w] = state
    optimizer = optimizer_of("rank1", model.parameters())
    given: Any = source
    if kind == "bnb8 whole":
        given = {"state": {0: state}, "param_groups": [{"params": [0]}]}
    shard4bit.import_state(optimizer, given)
    return canonical(model, optimizer), shard4bit.digest(model, optimizer)


@pytest.mark.parametrize("kind", ["torchao4", "torchao8", "bnb8", "bnb8 whole"])
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_states_of_low_bit_libraries(kind: str, world: int) -> None:
    expected = of_library(kind)
    assert (np.diff(expected[0]["state/w/exp_avg_sq_row_max"]) != 0).all()
    for found, digest in pool(world).run(of_library, kind):
        same(found, expected[0])
        assert digest == expected[1]


# ---- export ------------------------------------------------------------------------------------


def exported(kind: str, layout: str) -> tuple[Arrays, Arrays, list[str]]:
    """What export_state gives, in whole; the same of torch's own optimizer that loaded it; tensor types."""
    model = models.sharded(Zoo(), layout)
    optimizer = optimizer_of(kind, model.parameters())
    models.train(model, optimizer, 2)
    state = shard4bit.export_state(optimizer)
    make: Any = torch.optim.SGD if kind == "sgd" else torch.optim.AdamW
    again = make(model.parameters(), lr=0.5)
    again.load_state_dict(state)
    models.force(model, 3)
    again.step()
    names = [n for n, _ in model.named_parameters()]
    whole = {f"{names[i]}/{k}": models.full(v) for i, s in state["state"].items() for k, v in s.items()}
    kinds = {type(v).__name__ for s in state["state"].values() for k, v in s.items() if k != "step"}
    return whole, canonical(model), sorted(kinds)


@pytest.mark.parametrize("kind", ["rank1", "sgd"])
@pytest.mark.parametrize("world, layout", [(2, "fsdp"), (4, "hsdp")])
def test_exported_states_are_those_of_one_process(kind: str, world: int, layout: str) -> None:
    expected, stepped, _ = exported(kind, "plain")
    for found, after, kinds in pool(world).run(exported, kind, layout):
        assert kinds == ["DTensor"]
        same(found, expected)
        for key, value in stepped.items():  # torch's own step, which may round otherwise
            np.testing.assert_allclose(after[key], value, rtol=1e-5, atol=1e-6)


# ---- failures and memory -----------------------------------------------------------------------


def import_with_one_bad(bad: int, how: str) -> tuple[str, str]:
    model = models.sharded(Zoo(), "fsdp")
    optimizer = optimizer_of("rank1", model.parameters())
    source = source_of(model, "rank1", "sharded")
    given: Any = source
    if dist.get_rank() == bad:
        if how == "keys":
            del source.state[model.odd]["exp_avg_sq"]
        elif how == "values":  # seen only when its turn comes, in the midst of the others' reductions
            source.state[model.few]["exp_avg_sq"].to_local().fill_(-1.0)
        else:
            given = "nothing"
    try:
        shard4bit.import_state(optimizer, given)
    except Exception as error:
        good = source_of(model, "rank1", "sharded")
        shard4bit.import_state(optimizer, good)
        return type(error).__name__, shard4bit.digest(model, optimizer)
    return "nothing", ""


@pytest.mark.parametrize("how", ["keys", "values", "argument"])
def test_a_rank_that_fails_stops_all(how: str) -> None:
    _, digest = imported("rank1", "plain")
    for rank, (kind, after) in enumerate(pool(3).run(import_with_one_bad, 1, how)):
        assert kind == ("StateError" if rank == 1 else "RuntimeError")
        assert after == digest  # and a good source can be imported afterwards


def measured() -> tuple[int, int]:
    model = models.sharded(Zoo(), "fsdp")
    optimizer = optimizer_of("rank1", model.parameters())
    source = source_of(model, "rank1", "sharded")
    optimizer.bind()
    with Recorder() as recorder:
        shard4bit.import_state(optimizer, source)
    return recorder.created, max(p.to_local().numel() for p in model.parameters())


def test_no_tensor_is_larger_than_a_ranks_part_of_a_parameter() -> None:
    for created, largest in pool(2).run(measured):
        assert created <= 1.02 * largest  # codes of rows of odd length are padded
    assert sum(np.prod(s) for s in SHAPES.values()) > 4 * largest
