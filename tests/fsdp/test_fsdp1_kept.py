"""What FSDP1 keeps otherwise than other layouts do, and checkpoints must not show: buffers that it casts,
groups of options that its flat parameters split, parameters that it has gathered."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import MixedPrecision, fully_shard

import shard4bit
from shard4bit.checkpoint.manifest import read_manifest
from shard4bit.errors import CheckpointError
from shard4bit.inventory import Inventory
from tests.fsdp import models
from tests.fsdp.flat import Nest, Part, flattened, wrapped
from tests.pool import pool

BF16 = torch.bfloat16

# ---- buffers that MixedPrecision casts --------------------------------------------------------------


def with_buffers(orig: bool, forward: bool) -> tuple[Any, Any, Any]:
    """A model whose buffers FSDP1 casts at the first forward, its optimizer, and one of them."""
    inner = Nest()
    inner.seen.fill_(0.1)
    inner.first.register_buffer("ema", torch.full((2, 2), 0.3))
    model = flattened(inner, orig, mixed_precision=MixedPrecision(buffer_dtype=BF16))
    if forward:
        model(torch.ones(2, 2))
    assert inner.seen.dtype == (BF16 if forward else torch.float32)
    return model, wrapped("rank1", model), inner


def buffers_saved_and_loaded(orig: bool, root: str) -> list[bool]:
    fresh, optimizer, inner = with_buffers(orig, forward=False)
    model, other, cast = with_buffers(orig, forward=True)
    early, late = (
        shard4bit.save(root, m, o, step=n) for n, (m, o) in enumerate([(fresh, optimizer), (model, other)])
    )
    with patch("shard4bit.fsdp.layout._dtypes_before_casts", return_value={}):
        cast_ones = shard4bit.save(root, model, other, step=2)  # as it was written before
    exact, rounded = torch.full((3,), 0.1), torch.full((3,), 0.1).to(BF16)
    out = []
    for path in (late, cast_ones):
        inner.seen.zero_()
        shard4bit.load(path, fresh, optimizer)
        out += [torch.equal(inner.seen, rounded.float()), inner.seen.dtype == torch.float32]
        out += [shard4bit.digest(fresh, optimizer) == shard4bit.digest(model, other)]
    for path in (early, late, cast_ones):
        cast.seen.zero_()
        shard4bit.load(path, model, other)
        out += [torch.equal(cast.seen, rounded), cast.seen.dtype == BF16]
    alone: Any = Nest()
    alone.first.register_buffer("ema", torch.zeros(2, 2))
    for path, value in ((early, exact), (late, rounded.float())):
        shard4bit.load(path, alone)
        out += [torch.equal(alone.seen, value), float(alone.first.ema[0, 0]) != 0]
    return out


@pytest.mark.parametrize("orig", [True, False])
def test_buffers_before_and_after_the_first_forward(orig: bool, tmp_path: Path) -> None:
    for found in pool(2).run(buffers_saved_and_loaded, orig, str(tmp_path)):
        assert all(found), found


# ---- groups that flat parameters split --------------------------------------------------------------


class Block(Part):
    """A norm first, so that the first parameter of its flat one has other options than the group."""

    def __init__(self) -> None:
        super().__init__({"scale": (90,), "weight": (90, 90)})


class Deep(Part):
    def __init__(self) -> None:
        super().__init__({"last_scale": (90,), "last_bias": (90,)})
        self.blocks = nn.ModuleList([Block(), Block()])


LAYOUTS = ["fsdp1 nested", "fsdp1 one flat", "fsdp1 originals", "fsdp2", "single"]
SPLIT = {"no_decay": ["*scale", "*bias"]}


def of_layout(layout: str) -> tuple[Any, Any]:
    model: Any = Deep()
    if layout == "single":
        decayed = {True: [], False: []}  # type: ignore[var-annotated]
        for name, param in model.named_parameters():
            decayed[name.endswith("weight")].append(param)
        groups = [{"params": decayed[True]}, {"params": decayed[False], "weight_decay": 0.0}]
        return model, models.optimizer_of("rank1", groups)
    if layout == "fsdp2":
        model = fully_shard(model)
    elif layout == "fsdp1 one flat":
        model = FSDP1(model, device_id=models.Where.device)
    else:
        model = flattened(model, layout == "fsdp1 originals")
    return model, wrapped("rank1", model, **SPLIT)


def decays(model: Any, optimizer: Any) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of every parameter."""
    groups = Inventory(model, optimizer, parameters=True, frozen=True).groups()
    return {n: (g["options"]["lr"], g["options"]["weight_decay"]) for g in groups for n in g["parameters"]}


def from_layout_to_layout(root: str) -> tuple[list[list[int]], list[bool], list[str]]:
    """How many parameters the groups of each layout's checkpoint have; whether each layout has the options of
    what it loads; and what is said when the options of parameters in one group differ."""
    sizes, right = [], []
    made = {layout: of_layout(layout) for layout in LAYOUTS}
    old = patch.object(Inventory, "groups", groups_as_they_were)
    paths = []
    for number, (layout, how) in enumerate([*((x, nullcontext()) for x in LAYOUTS), (LAYOUTS[0], old)]):
        model, optimizer = made[layout]
        for group in optimizer.param_groups:
            group["lr"] = 0.5 + number
        with how:
            paths.append(shard4bit.save(root, model, optimizer, step=number))
        sizes.append(sorted(len(g["parameters"]) for g in read_manifest(paths[-1]).groups))
    for model, optimizer in made.values():
        for number, path in enumerate(paths):
            for group in optimizer.param_groups:
                group["lr"] = 9.0 + len(group["params"])  # groups of ours may differ before
            shard4bit.load(path, model, optimizer)
            found = decays(model, optimizer)
            right.append(
                len(found) == 6
                and all(v == (0.5 + number, 0.1 * n.endswith("weight")) for n, v in found.items())
            )
    model, optimizer = made["single"]
    names = [n for n, _ in model.named_parameters()]
    optimizer.param_groups[1]["weight_decay"] = 0.3
    uneven = shard4bit.save(root, model, optimizer, step=9)
    joined = models.optimizer_of("rank1", list(model.parameters()))
    said = []
    for other, theirs in ((model, joined), made["fsdp1 one flat"]):
        try:
            shard4bit.load(uneven, other, theirs)
            said.append(str(decays(other, theirs)[names[0]]))
        except CheckpointError as error:
            said.append(str(error))
    return sizes, right, said


def groups_as_they_were(inventory: Inventory) -> list[dict[str, Any]]:
    """What was split off stays apart, as in checkpoints written before."""
    return [
        {
            "parameters": names,
            "options": {k: v for k, v in {**group, **own}.items() if k in known},
        }
        for group, own, names in inventory._groups()
        for known in [inventory.optimizer.defaults]
    ]


def test_every_layout_reads_the_groups_of_the_others(tmp_path: Path) -> None:
    for sizes, right, said in pool(2).run(from_layout_to_layout, str(tmp_path)):
        assert sizes == [[2, 4]] * len(LAYOUTS) + [[2, 2, 2]]
        assert all(right), right
        assert "groups of [2, 4]" in said[0] and "[6]" in said[0], said
        assert said[1] == str((5.5, 0.3)), said


# ---- parameters that summon_full_params has gathered ------------------------------------------------


def within_summon(orig: bool, strategy: str, root: str) -> tuple[list[str], bool]:
    """What each call says, and whether all is as before."""
    model = flattened(Nest(), orig, strategy)
    optimizer = wrapped("rank1", model)
    model(torch.ones(2, 2)).sum().backward()
    optimizer.step()
    path = shard4bit.save(root, model, optimizer, step=1)
    model(torch.ones(2, 2)).sum().backward()
    before, said = shard4bit.digest(model, optimizer), []
    for what in (model, model.second):  # all of it, and a part
        with FSDP1.summon_full_params(what, recurse=what is model):
            for call in (
                lambda: shard4bit.load(path, model, optimizer),
                lambda: shard4bit.save(root, model, optimizer, step=2),
                lambda: shard4bit.digest(model, optimizer),
                lambda: wrapped("rank1", model),
                optimizer.step,
            ):
                try:
                    said.append(f"nothing: {call()}")
                except Exception as error:
                    said.append(f"{type(error).__name__}: {error}")
    digests = [shard4bit.digest(model, optimizer)]
    optimizer.step()
    shard4bit.load(path, model, optimizer)
    digests.append(shard4bit.digest(model, optimizer))
    return said, digests == [before, before]


@pytest.mark.parametrize(
    "orig, strategy", [(False, "FULL_SHARD"), (True, "SHARD_GRAD_OP"), (True, "NO_SHARD")]
)
def test_calls_within_summon_full_params(orig: bool, strategy: str, tmp_path: Path) -> None:
    for said, same in pool(2).run(within_summon, orig, strategy, str(tmp_path)):
        assert all("outside of it" in text for text in said), said
        assert same
