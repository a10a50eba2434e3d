"""torch's AdamW over FSDP1, its state taken over by ours and given back."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1

import shard4bit
from shard4bit.fsdp.layout import FlatSource
from tests.fsdp import flat, models
from tests.fsdp.flat import Nest, flattened, wrapped
from tests.pool import pool

STEPS = 3
MOMENTS = ("exp_avg", "exp_avg_sq")


def whole_states(model: Any, theirs: Any, orig: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Every parameter's moments in whole, by name: by FSDP's own function for flat parameters (which mixes
    the two moments up for original ones, with gloo, in torch 2.13), else put together from the ranks."""
    if not orig:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return FSDP1.full_optim_state_dict(model, theirs, rank0_only=False)["state"]
    mine = {
        item.name: {k: theirs.state[item.tensor][k] for k in MOMENTS}
        for item in FlatSource(model).parameters()
        if item.tensor in theirs.state
    }
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    out: dict[str, dict[str, torch.Tensor]] = {}
    for item in FlatSource(model).parameters():
        parts = [held[item.name] for held in every if item.name in held]
        out[item.name] = {
            k: torch.cat([p[k] for p in parts]).view(item.placed.slab.view.shape) for k in MOMENTS
        }
        out[item.name]["step"] = torch.tensor(float(STEPS))
    return out


def whole_parameters(model: Any) -> dict[str, torch.Tensor]:
    with FSDP1.summon_full_params(model, writeback=False):
        return {n.replace("_fsdp_wrapped_module.", ""): p.clone() for n, p in model.named_parameters()}


def stepped_by_torch(model: Any, optimizer: Any, force: Any) -> dict[str, torch.Tensor]:
    """The parameters after a step of torch's AdamW that goes on from what ``optimizer`` exports."""
    after = torch.optim.AdamW(model.parameters(), **models.ADAMW)
    after.load_state_dict(shard4bit.export_state(optimizer))
    force(model)
    after.step()
    return whole_parameters(model) if isinstance(model, FSDP1) else dict(model.named_parameters())


def taken_over(kind: str, orig: bool) -> tuple[str, str, list[float], float]:
    """Digests of the imported state under FSDP1 and in one process; the largest differences between what
    is exported and what was imported, over the largest value of each local tensor; and between the two's
    parameters after a step of torch's AdamW with what is exported."""
    model = flattened(Nest(), orig)
    theirs = torch.optim.AdamW(model.parameters(), **models.ADAMW)
    for step in range(1, STEPS + 1):
        flat.force(model, step)
        theirs.step()
        theirs.zero_grad()
    ours = wrapped(kind, model, lr=9.0)
    shard4bit.import_state(ours, theirs)
    assert ours.param_groups[0]["lr"] == models.ADAMW["lr"]
    states = whole_states(model, theirs, orig)
    values = whole_parameters(model)
    alone = Nest()
    with torch.no_grad():
        for name, param in alone.named_parameters():
            param.copy_(values[name].view(param.shape))
    single = models.optimizer_of(kind, list(alone.named_parameters()), lr=9.0)
    names = [n for n, _ in alone.named_parameters()]
    groups = [{**theirs.state_dict()["param_groups"][0], "params": names, "param_names": names}]
    shard4bit.import_state(single, {"state": states, "param_groups": groups})
    exported = shard4bit.export_state(ours)["state"]
    errors = [
        float((exported[i][key] - found[key]).abs().amax() / found[key].abs().amax())
        for i, found in theirs.state_dict()["state"].items()
        for key in (
            MOMENTS if kind == "block" else MOMENTS[:1]
        )  # (rank-1's scales come from other ranks too)
        if found and found[key].numel()
    ]
    digests = shard4bit.digest(model, ours), shard4bit.digest(alone, single)
    found = stepped_by_torch(model, ours, lambda m: flat.force(m, STEPS + 1))
    expected = stepped_by_torch(alone, single, force_alone)
    apart = max(float((found[n].view(p.shape) - p).abs().amax()) for n, p in expected.items())
    return *digests, errors, apart


def force_alone(model: Any) -> None:
    for name, param in model.named_parameters():
        param.grad = models.gradient(flat.short(name), tuple(param.shape), STEPS + 1)


@pytest.mark.parametrize("kind, orig", [("block", True), ("block", False), ("rank1", True), ("rank1", False)])
def test_torchs_state_over_fsdp1(kind: str, orig: bool) -> None:
    found = pool(3).run(taken_over, kind, orig)
    assert len({digest for ours, single, _, _ in found for digest in (ours, single)}) == 1
    assert all(error < 0.15 for _, _, errors, _ in found for error in errors)  # the DE table's widest gap
    assert all(errors for _, _, errors, _ in found)
    assert all(apart < 1e-6 for *_, apart in found), found


def in_two_groups(orig: bool) -> tuple[list[tuple[float, float]], str, str]:
    """What the groups have taken over; digests after a step that follows, under FSDP1 and in one process."""
    model = flattened(Nest(), orig)
    ours = wrapped("block", model, no_decay=["first.*"])
    rates = {0.0: 0.5, models.ADAMW["weight_decay"]: 0.25}  # by weight decay
    groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in ours.param_groups]
    theirs = torch.optim.AdamW([{**g, "lr": rates[g["weight_decay"]]} for g in groups], **models.ADAMW)
    for step in range(1, STEPS + 1):
        flat.force(model, step)
        theirs.step()
        theirs.zero_grad()
    shard4bit.import_state(ours, theirs)
    states, values = whole_states(model, theirs, orig), whole_parameters(model)
    alone = Nest()
    named = dict(alone.named_parameters())
    with torch.no_grad():
        for name, param in named.items():
            param.copy_(values[name].view(param.shape))
    bare = [n for n in named if n.startswith("first.")]
    parted = [[n for n in named if n not in bare], bare]
    single = models.optimizer_of(
        "block",
        [
            {"params": [(n, named[n]) for n in names], "weight_decay": decay, "lr": rates[decay]}
            for names, decay in zip(parted, (models.ADAMW["weight_decay"], 0.0), strict=True)
        ],
    )
    given = [{"params": names, "param_names": names} for names in parted]
    shard4bit.import_state(single, {"state": states, "param_groups": given}, hyperparameters=False)
    flat.train(model, ours, 1, first=STEPS + 1)
    force_alone(alone)
    single.step()
    taken = sorted((g["weight_decay"], g["lr"]) for g in ours.param_groups)
    return taken, shard4bit.digest(model, ours), shard4bit.digest(alone, single)


@pytest.mark.parametrize("orig", [True, False])
def test_torchs_two_groups_over_fsdp1(orig: bool) -> None:
    for taken, here, alone in pool(3).run(in_two_groups, orig):
        assert taken == [(0.0, 0.5), (models.ADAMW["weight_decay"], 0.25)]
        assert here == alone
