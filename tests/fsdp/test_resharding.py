"""Resharding is lossless from any number of ranks to any other; and what happens when a rank is lost."""

from __future__ import annotations

import datetime
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import shard4bit
from tests.checkpoint import ranks
from tests.fsdp import models
from tests.fsdp.flat import Nest, flattened, wrapped
from tests.fsdp.models import Toy, Zoo, optimizer_of
from tests.pool import Pool, pool

KINDS = ("rank1", "block", "sgd")


def save_all(root: str) -> list[str]:
    """Train and save one Zoo per kind on these ranks. The digests."""
    return [ranks.save_zoo(kind, "fsdp", f"{root}/{kind}")[1] for kind in KINDS]


def load_all(roots: list[str]) -> list[list[str]]:
    """For each root the digests of what it holds, loaded on these ranks."""
    out = []
    for root in roots:
        digests = []
        for kind in KINDS:
            model = ranks.blank("fsdp")
            optimizer = optimizer_of(kind, model.parameters())
            shard4bit.load(f"{root}/{kind}", model, optimizer)
            digests.append(shard4bit.digest(model, optimizer))
        out.append(digests)
    return out


@lru_cache
def expected() -> list[str]:
    return [ranks.single_zoo(kind, ranks.STEPS)[1] for kind in KINDS]


@pytest.mark.parametrize("most", [3, pytest.param(6, marks=pytest.mark.slow)])
def test_from_every_number_of_ranks_to_every_other(most: int, tmp_path: Path) -> None:
    """Of uneven shapes, some with ranks that hold nothing."""
    worlds = range(1, most + 1)
    roots = [str(tmp_path / str(world)) for world in worlds]
    for world, root in zip(worlds, roots, strict=True):
        assert pool(world).run(save_all, root) == [expected()] * world
    for world in worlds:
        assert pool(world).run(load_all, roots) == [[expected()] * most] * world


# ---- bad input ---------------------------------------------------------------------------------


def lose_a_rank(lost: int, seconds: float) -> tuple[str, float]:
    """A rank never calls step(); what the others get, and when. (In a group of its own, which breaks.)"""
    group = dist.new_group(timeout=datetime.timedelta(seconds=seconds))
    mesh = DeviceMesh.from_group(group, "cpu")
    model: Any = fully_shard(Zoo({"w": (129, 301)}), mesh=mesh)
    optimizer = optimizer_of("rank1", model.parameters())
    models.train(model, optimizer, 1)
    dist.barrier()
    begin, found = time.monotonic(), "nothing"
    if dist.get_rank() != lost:
        models.force(model, 2)
        try:
            optimizer.step()
        except RuntimeError as error:
            found = type(error).__name__
    return found, time.monotonic() - begin


def test_a_lost_rank_raises_within_the_timeout_of_the_group() -> None:
    own = Pool(3)  # a time-out may close the connections of other groups as well
    try:
        for rank, (found, taken) in enumerate(own.run(lose_a_rank, 1, 3.0)):
            assert (found != "nothing") == (rank != 1)
            assert taken < 20
    finally:
        own.close()


def errors_of(things: Any) -> list[str]:
    out = []
    for thing in things:
        with pytest.raises(ValueError) as caught:
            thing()
        out.append(f"{type(caught.value).__name__}: {caught.value}")
    return out


def bad_models(root: str) -> list[str]:
    """Parameters that the model lacks; a checkpoint with other names; optimizers that were not sharded."""
    model = models.shard_toy(Toy())
    optimizer = shard4bit.fsdp.wrap(model, shard4bit.AdamW4bit)
    shard4bit.save(root, model, optimizer, step=1)
    other = models.shard_toy(Toy(seed=1))
    renamed: Any = nn.Sequential()
    for name, child in Toy().named_children():
        renamed.add_module(f"my_{name}", child)
    renamed = fully_shard(renamed)
    return errors_of(
        [
            lambda: shard4bit.save(root, other, optimizer, step=2),
            lambda: shard4bit.digest(other, optimizer),
            lambda: shard4bit.load(root, renamed, shard4bit.fsdp.wrap(renamed, shard4bit.AdamW4bit)),
            lambda: shard4bit.load(root, renamed, shard4bit.AdamW4bit(renamed.parameters()), strict=True),
            lambda: shard4bit.fsdp.wrap(Toy(), shard4bit.AdamW4bit),
        ]
    )


def other_flat_models(root: str, orig: bool) -> list[str]:
    """An FSDP1 model's optimizer with other models: of the same names, of other names, under FSDP2."""
    model, other = (flattened(Nest(), orig) for _ in range(2))
    optimizer = wrapped("rank1", model)
    path = shard4bit.save(root, model, optimizer, step=1)
    renamed = nn.Module()
    renamed.my = Nest()
    renamed, zoo = flattened(renamed, orig), models.shard_toy(Toy())
    before = shard4bit.digest(other)
    out = errors_of(
        [
            lambda: shard4bit.save(root, other, optimizer, step=2),
            lambda: shard4bit.digest(other, optimizer),
            lambda: shard4bit.load(path, other, optimizer),
            lambda: shard4bit.save(root, renamed, optimizer, step=2),
            lambda: shard4bit.save(root, zoo, optimizer, step=2),
        ]
    )
    assert shard4bit.digest(other) == before
    return out


@pytest.mark.parametrize("orig", [True, False])
def test_optimizers_of_other_flat_models_are_refused(orig: bool, tmp_path: Path) -> None:
    for texts in pool(2).run(other_flat_models, str(tmp_path), orig):
        assert all("not in the model" in text for text in texts), texts


def spoilt_on_one_rank(way: str) -> str:
    """One rank's optimizer cannot be bound, before its first step or import: what each rank raises."""
    model = models.shard_toy(Toy())
    optimizer = shard4bit.AdamW4bit(model.parameters())
    source = torch.optim.AdamW(model.parameters())
    if dist.get_rank() == 1:
        optimizer.param_groups[0]["betas"] = (2.0, 0.9)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    begin = time.monotonic()
    try:
        optimizer.step() if way == "step" else shard4bit.import_state(optimizer, source)
    except (ValueError, RuntimeError) as error:
        assert time.monotonic() - begin < 20
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize("way", ["step", "import"])
def test_nobody_waits_for_a_rank_that_cannot_bind(way: str) -> None:
    texts = pool(2).run(spoilt_on_one_rank, way)
    assert texts[1].startswith("ValueError") and "betas" in texts[1], texts
    assert texts[0].startswith("RuntimeError") and "failed on another rank" in texts[0], texts


def test_errors_reach_every_rank(tmp_path: Path) -> None:
    words = ["not in the model", "not in the model", "my_first", "my_first", "not sharded"]
    for texts in pool(3).run(bad_models, str(tmp_path)):
        assert all(word in text for word, text in zip(words, texts, strict=True)), texts
    assert not (tmp_path / "step-0000000002").exists()


def bad_on_one_rank(root: str, bad: int) -> list[str]:
    """One rank's optimizer is over another model: save, digest and load must end everywhere."""
    model, other = models.shard_toy(Toy()), models.shard_toy(Toy(seed=1))
    shard4bit.save(f"{root}/good", model, shard4bit.AdamW4bit(model.parameters()), step=1)
    optimizer = shard4bit.AdamW4bit((other if dist.get_rank() == bad else model).parameters())
    assert torch.is_tensor(next(model.parameters()))
    return errors_of(
        [
            lambda: shard4bit.save(root, model, optimizer, step=2),
            lambda: shard4bit.digest(model, optimizer),
            lambda: shard4bit.load(f"{root}/good", model, optimizer),
        ]
    )


def test_an_error_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    for texts in pool(3).run(bad_on_one_rank, str(tmp_path), 2):
        assert all("not in the model" in text for text in texts), texts


class Renamed(nn.Module):
    """The parameters of a Nest under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Nest()


def other_names(root: str, orig: bool) -> tuple[list[str], bool]:
    """A checkpoint of FSDP1 with other names than the model's; errors, and whether all is as before."""
    model, other = flattened(Nest(), orig), flattened(Renamed(), orig)
    optimizer, theirs = wrapped("rank1", model), wrapped("rank1", other)
    shard4bit.save(root, model, optimizer, step=1)
    before = shard4bit.digest(other, theirs)
    said = errors_of(
        [
            lambda: shard4bit.load(root, other, theirs),
            lambda: shard4bit.load(root, other, theirs, strict=True),
        ]
    )
    return said, shard4bit.digest(other, theirs) == before


@pytest.mark.parametrize("orig", [True, False])
def test_other_names_under_fsdp1_are_refused_on_all_ranks(orig: bool, tmp_path: Path) -> None:
    for texts, unchanged in pool(2).run(other_names, str(tmp_path), orig):
        assert all("inner." in text for text in texts), texts
        assert unchanged
