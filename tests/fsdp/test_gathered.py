"""Columns cut within blocks: state_dict() gathers the blocks' scales, load_state_dict() cuts them again, and
stock DCP reshards them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import shard4bit
from tests.fsdp import models
from tests.fsdp.models import Arrays, Zoo, full, optimizer_of, same
from tests.fsdp.test_variants import Net, sharded, tensor_parallel
from tests.pool import pool

STEPS = 2


def gradients(model: Any, step: int) -> None:
    """Global gradients that every rank makes for itself."""
    for name, param in model.named_parameters():
        whole = models.gradient(name, tuple(param.shape), step)
        if isinstance(param, DTensor):
            ranges = param.__create_chunk_list__()[0]  # type: ignore[attr-defined]
            window = tuple(slice(o, o + n) for o, n in zip(ranges.offsets, ranges.sizes, strict=True))
            whole = DTensor.from_local(
                whole[window].contiguous(), param.device_mesh, param.placements, run_check=False,
                shape=param.shape, stride=param.stride(),
            )  # fmt: skip
        param.grad = whole


def made(layout: str, kind: str, steps: int = STEPS) -> tuple[Any, Any]:
    """A Net in one process, under FSDP2, or under tensor parallelism and FSDP2."""
    model: Any = {"plain": lambda m: m, "fsdp": sharded, "tp": tensor_parallel}[layout](Net())
    optimizer = optimizer_of(kind, model.named_parameters())
    for step in range(1, 1 + steps):
        gradients(model, step)
        optimizer.step()
    return model, optimizer


def whole(state: Any) -> Arrays:
    return {f"{i}/{k}": full(v) for i, s in state["state"].items() for k, v in s.items()}


def single(kind: str) -> tuple[Arrays, str]:
    model, optimizer = made("plain", kind)
    return whole(optimizer.state_dict()), shard4bit.digest(model, optimizer)


def there_and_back(kind: str) -> tuple[Arrays, Arrays, str, str, list[str]]:
    """The state_dict of a parallel model in whole, that of an optimizer that loaded it, digests, and how the
    scales of the row-wise layer are placed."""
    model, optimizer = made("tp", kind)
    state = optimizer.state_dict()
    param = model.blocks[0].down.weight
    number = [n for n, _ in model.named_parameters()].index("blocks.0.down.weight")
    key = "momentum_buffer_absmax" if kind == "sgd" else "exp_avg_absmax"
    placed = [str(state["state"][number][key].placements)]
    assert not isinstance(optimizer.state[param][key], DTensor)
    target, fresh = made("tp", kind, steps=0)
    fresh.load_state_dict(state)
    with torch.no_grad():
        for ours, theirs in zip(target.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs)
    digests = shard4bit.digest(model, optimizer), shard4bit.digest(target, fresh)
    return whole(state), whole(fresh.state_dict()), *digests, placed


@pytest.mark.parametrize("kind", ["rank1", "block", "sgd"])
def test_a_state_dict_of_tensor_parallel_layers(kind: str) -> None:
    expected, digest = single(kind)
    for found, again, before, after, placed in pool(4).run(there_and_back, kind):
        same(found, expected, kind)
        same(again, expected, kind)
        assert before == after == digest
        assert placed == ["(Shard(dim=0), Replicate())"]


def save(layout: str, kind: str, path: str) -> str:
    model, optimizer = made(layout, kind)
    model_state, state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=path)
    return shard4bit.digest(model, optimizer)


def load(layout: str, kind: str, path: str) -> str:
    model, optimizer = made(layout, kind, steps=0)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(7.0)
    model_state, state = get_state_dict(model, optimizer)
    states = {"model": model_state, "optimizer": state}
    dcp.load(states, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    return shard4bit.digest(model, optimizer)


@pytest.mark.parametrize("before, after", [((4, "tp"), (3, "fsdp")), ((2, "fsdp"), (4, "tp"))], ids=str)
def test_stock_dcp_reshards_them(before: tuple[int, str], after: tuple[int, str], tmp_path: Path) -> None:
    path, (_, digest) = str(tmp_path / "dcp"), single("block")
    assert set(pool(before[0]).run(save, before[1], "block", path)) == {digest}
    assert set(pool(after[0]).run(load, after[1], "block", path)) == {digest}


def through_a_full_state_dict() -> tuple[str, str]:
    model, optimizer = made("tp", "rank1")
    model_state, state = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    target, fresh = made("tp", "rank1", steps=0)
    how = StateDictOptions(full_state_dict=True)
    set_state_dict(target, fresh, model_state_dict=model_state, optim_state_dict=state, options=how)
    return shard4bit.digest(model, optimizer), shard4bit.digest(target, fresh)


def test_a_full_state_dict() -> None:
    _, digest = single("rank1")
    for before, after in pool(4).run(through_a_full_state_dict):
        assert before == after == digest


def uneven(shape: tuple[int, int], ranks: int) -> tuple[Any, bool]:
    """Blocks on three ranks and more, empty ranks, and a NaN: absmax, and whether a load gives it back."""
    model: Any = Zoo({"w": shape})
    if dist.is_initialized():
        mesh = models.mesh_of(ranks)
        model.w = nn.Parameter(distribute_tensor(model.w.data, mesh, [Shard(1)], src_data_rank=None))
    optimizer = optimizer_of("block", model.parameters())
    models.force(model, 1)
    grad = models.gradient("w", shape, 1)
    grad[2, 3] = float("nan")
    model.w.grad = models.scatter(grad, model.w)
    optimizer.step()
    live = optimizer.state[model.w]["exp_avg_absmax"]
    state = optimizer.state_dict()
    found = state["state"][0]["exp_avg_absmax"]
    if not dist.is_initialized():
        return full(found), True
    assert found.placements == (Replicate(),)
    before = live.clone()
    live.fill_(3.0)
    optimizer.load_state_dict(state)
    return full(found), torch.equal(before.view(torch.int32), live.view(torch.int32))


@pytest.mark.parametrize("shape", [(41, 104), (1800, 8), (700, 6), (64, 776)])
def test_blocks_on_many_ranks(shape: tuple[int, int]) -> None:
    expected, _ = uneven(shape, 1)
    for found, again in pool(4).run(uneven, shape, 4):
        assert found.tobytes() == expected.tobytes() and again
