"""fsdp.wrap, and training FSDP2 models of all sorts with real gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import shard4bit
from shard4bit.errors import LayoutError
from tests.fsdp import models
from tests.fsdp.models import Arrays, Toy, canonical, fit, same
from tests.pool import pool

OPTIONS: dict[str, Any] = {"lr": 5e-3, "weight_decay": 0.1}
ROUNDS = 50


def message(call: Any, kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


# ---- groups ------------------------------------------------------------------------------------


def by_patterns() -> tuple[list[dict[str, Any]], Arrays, Arrays]:
    """wrap's groups, and everything after a few steps with them and with groups made by hand."""
    model = models.shard_toy(Toy())
    optimizer = shard4bit.fsdp.wrap(
        model,
        shard4bit.AdamW4bit,
        no_decay=["*.bias", "norm.*"],
        full_precision=["first.weight"],
        **OPTIONS,
    )
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    fit(model, optimizer, 0, 3)
    other = models.shard_toy(Toy())
    named = dict(other.named_parameters())
    plain = [n for n in named if n.endswith(".bias") or n == "norm.weight"]
    rest = [n for n in named if n not in (*plain, "first.weight")]
    by_hand = shard4bit.AdamW4bit(
        [
            {"params": [named["first.weight"]], "quantize": False},
            {"params": [named[n] for n in plain], "weight_decay": 0.0},
            {"params": [named[n] for n in rest]},
        ],
        **OPTIONS,
    )
    fit(other, by_hand, 0, 3)
    return groups, canonical(model, optimizer), canonical(other, by_hand)


def test_groups_by_patterns() -> None:
    for groups, found, expected in pool(2).run(by_patterns):
        members = {frozenset(g["param_names"]): (g["weight_decay"], g["quantize"]) for g in groups}
        biases = {"first.bias", "norm.weight", "norm.bias", "hidden.bias", "frozen.bias", "last.bias"}
        assert members == {
            frozenset({"first.weight"}): (0.1, False),
            frozenset(biases): (0.0, True),
            frozenset({"hidden.weight", "frozen.weight", "last.weight"}): (0.1, True),
        }
        assert all(g["lr"] == 5e-3 for g in groups)
        same(found, expected)
        assert "state/first.weight/exp_avg" in found and "state/hidden.weight/exp_avg_codes" in found
        assert not any(k.startswith("state/frozen") for k in found)


def sgd_and_bare() -> tuple[str, list[str], str]:
    model = models.shard_toy(Toy())
    sgd = shard4bit.fsdp.wrap(model, shard4bit.SGD4bit, lr=0.1, momentum=0.8)
    (group,) = sgd.param_groups
    bad = message(lambda: shard4bit.fsdp.wrap(model, shard4bit.AdamW4bit, lr=-1.0), ValueError)
    return type(sgd).__name__, group["param_names"], bad


def test_without_patterns_and_with_bad_options() -> None:
    every = [n for n, _ in Toy().named_parameters()]
    for kind, names, bad in pool(2).run(sgd_and_bare):
        assert kind == "SGD4bit" and names == every
        assert "lr=-1" in bad


def refusals() -> list[str]:
    def wrap(model: nn.Module, **options: Any) -> Any:
        return lambda: shard4bit.fsdp.wrap(model, shard4bit.AdamW4bit, **options)

    model = models.shard_toy(Toy())
    return [
        message(wrap(model, no_decay=["*.bais"]), ValueError),
        message(wrap(model, full_precision=["*.bias", "nothing"]), ValueError),
        message(wrap(Toy()), LayoutError),
    ]


def test_refusals() -> None:
    for texts in pool(2).run(refusals):
        for text, words in zip(
            texts,
            [
                ("'*.bais'", "no parameter", "first.weight"),
                ("'nothing'",),
                ("not sharded", "fully_shard"),
            ],
            strict=True,
        ):
            assert all(w in text for w in words), text


def over_fsdp1() -> tuple[str, bool]:
    """A plain optimizer over FSDP1: the first step's error, and whether the parameters are as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(70, 90), nn.ReLU(), nn.Linear(90, 3))
    cpu = torch.device("cpu")
    model = FullyShardedDataParallel(inner, device_id=cpu)
    optimizer = shard4bit.AdamW4bit(model.parameters())
    model(torch.ones(4, 70)).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    text = message(optimizer.step, LayoutError)
    again = message(optimizer.state_dict, LayoutError)
    unchanged = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return text, unchanged and text == again and not any(optimizer.state.values())


def test_a_plain_optimizer_over_fsdp1_is_refused_on_all_ranks() -> None:
    for text, unchanged in pool(2).run(over_fsdp1):
        assert "FSDP1" in text and "shard4bit.fsdp.wrap" in text and "param_groups[0]" in text
        assert unchanged


# ---- training ----------------------------------------------------------------------------------


BF16 = torch.bfloat16
SHARDING: dict[str, dict[str, Any]] = {
    "mixed": {"mp_policy": MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)},
    "mixed reduce": {"mp_policy": MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=BF16)},
    "kept": {"reshard_after_forward": False},
    "reshards": {"reshard_after_forward": True},
}


def trained(how: str, kind: str, rounds: int) -> tuple[list[float], Arrays]:
    """This rank's losses and the model in whole. ``kind`` "torch" is torch's AdamW with fp32 moments."""
    if how == "meta":
        with torch.device("meta"):
            model = models.shard_toy(Toy())
        model.to_empty(device="cpu")
        _initialize(model)
    else:
        plain = Toy().to(BF16) if how == "bf16" else Toy()
        model = models.shard_toy(plain, **SHARDING.get(how, {}))
    optimizer: Any = torch.optim.AdamW(model.parameters(), **OPTIONS)
    if kind != "torch":
        optimizer = shard4bit.fsdp.wrap(model, shard4bit.AdamW4bit, second_moment=kind, **OPTIONS)
    return fit(model, optimizer, 0, rounds), canonical(model)


def _initialize(model: Any) -> None:
    """Values of an ordinary Toy for one that was made on the meta device."""
    ordinary = Toy()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            whole = dict([*ordinary.named_parameters(), *ordinary.named_buffers()])[name].detach()
            tensor.copy_(models.scatter(whole, tensor))


LEARNT: list[Any] = [("mixed", "rank1"), ("meta", "rank1")] + [
    pytest.param(how, kind, marks=pytest.mark.slow)
    for how, kind in (
        ("plain", "rank1"),
        ("plain", "block"),
        ("plain", "factored"),
        ("mixed reduce", "rank1"),
        ("bf16", "rank1"),
    )
]


@pytest.mark.parametrize("how, kind", LEARNT)
def test_the_loss_falls_as_with_fp32_moments(how: str, kind: str) -> None:
    reference = pool(2).run(trained, "plain" if how == "meta" else how, "torch", ROUNDS)
    for (losses, arrays), (theirs, _) in zip(pool(2).run(trained, how, kind, ROUNDS), reference, strict=True):
        first, last, expected = np.mean(losses[:5]), np.mean(losses[-10:]), np.mean(theirs[-10:])
        assert last < 0.5 * first, (first, last)
        assert last < 1.25 * expected + 0.02, (last, expected)
        assert arrays["model/hidden.weight"].dtype == (np.int16 if how == "bf16" else np.float32)


def test_resharding_after_forward_and_the_meta_device_change_nothing() -> None:
    plain, *others = (pool(2).run(trained, how, "rank1", 12) for how in ("plain", "kept", "reshards", "meta"))
    for other in others:
        for (losses, arrays), (expected, whole) in zip(other, plain, strict=True):
            assert losses == expected
            same(arrays, whole)


def on_meta() -> tuple[str, bool]:
    """An optimizer built before the model is materialized."""
    with torch.device("meta"):
        model = models.shard_toy(Toy())
    optimizer = shard4bit.fsdp.wrap(model, shard4bit.AdamW4bit, **OPTIONS)
    text = message(optimizer.state_dict, LayoutError)
    model.to_empty(device="cpu")
    _initialize(model)
    losses = fit(model, optimizer, 0, ROUNDS)
    return text, np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])


def test_the_meta_device_is_refused_until_the_model_is_real() -> None:
    for text, fell in pool(2).run(on_meta):
        assert "meta" in text and "to_empty" in text
        assert fell


def clipped() -> tuple[float, float, bool]:
    """Gradients clipped by torch; the learning rate a tensor."""
    model = models.shard_toy(Toy())
    optimizer = shard4bit.fsdp.wrap(model, shard4bit.AdamW4bit, lr=torch.tensor(5e-3))
    x, y = models.batch(0, dist.get_rank())
    (model(x) - y).square().mean().backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    whole = [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]  # type: ignore[attr-defined]
    clipped_norm = torch.cat([g.reshape(-1) for g in whole]).norm()
    before = canonical(model)
    optimizer.step()
    moved = canonical(model)["model/hidden.weight"].tobytes() != before["model/hidden.weight"].tobytes()
    total = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return float(total), float(clipped_norm), moved


def test_clipping_and_a_tensor_learning_rate() -> None:
    for norm, after, moved in pool(2).run(clipped):
        assert norm > 0.1 and after == pytest.approx(0.01, rel=1e-3)
        assert moved


def over_fsdp1_originals() -> str:
    """With use_orig_params=True the shards are ordinary 1-D parameters: they must not get fp32 moments."""
    model = FullyShardedDataParallel(Toy(), device_id=torch.device("cpu"), use_orig_params=True)
    return message(lambda: shard4bit.AdamW4bit(model.parameters()).step(), LayoutError)


def over_stale_parameters() -> tuple[str, str]:
    """An optimizer from before fully_shard, and one over a tensor of its own beside such a model."""
    model = Toy()
    optimizer = shard4bit.AdamW4bit(model.parameters())
    fully_shard(model)
    lone = nn.Parameter(torch.ones(next(model.parameters()).shape))
    lone.grad = torch.ones_like(lone)
    other = nn.Parameter(torch.ones(3, 5, 7, 11))
    shard4bit.AdamW4bit([lone, other]).step()  # not all have a sharded twin: no error
    return message(optimizer.step, LayoutError), message(optimizer.state_dict, LayoutError)


def sharded_after_a_step() -> tuple[list[str], int]:
    """The errors of two later steps, and how often a model that has no gradients is looked at."""
    model = Toy()
    optimizer = shard4bit.AdamW4bit(model.parameters())
    fit(model, optimizer, 0, 1)
    optimizer.zero_grad()
    with patch("shard4bit.optim.stepping.refuse_stale") as look:
        for _ in range(3):
            optimizer.step()
    other = Toy()
    late = shard4bit.AdamW4bit(other.parameters())
    fit(other, late, 0, 1)
    late.zero_grad()
    fully_shard(other)
    return [message(late.step, LayoutError) for _ in range(2)], look.call_count


def test_sharding_after_a_step_is_noticed_on_all_ranks() -> None:
    for texts, looks in pool(2).run(sharded_after_a_step):
        assert all("build it after fully_shard" in text for text in texts)
        assert looks == 1


def test_original_parameters_of_fsdp1_are_refused_on_all_ranks() -> None:
    for text in pool(2).run(over_fsdp1_originals):
        assert "FSDP1" in text and "shard4bit.fsdp.wrap" in text


def over_flattened_parameters() -> list[str]:
    """Built before FSDP1 has put the parameters into a flat one; the first step, and a later one."""
    out = []
    for steps in (0, 1):
        model = nn.Sequential(nn.Linear(80, 90), nn.Linear(90, 80))
        optimizer = shard4bit.AdamW4bit(model.parameters())
        for _ in range(steps):
            model(torch.ones(2, 80)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        wrapped(torch.ones(2, 80)).sum().backward()
        try:
            optimizer.step()
            out.append("no error")
        except ValueError as error:
            out.append(str(error))
    return out


def test_parameters_from_before_fsdp1_are_refused_on_all_ranks() -> None:
    for texts in pool(2).run(over_flattened_parameters):
        assert all("after FullyShardedDataParallel" in text for text in texts), texts


def test_parameters_from_before_sharding_are_refused_on_all_ranks() -> None:
    for texts in pool(2).run(over_stale_parameters):
        assert all("build it after fully_shard" in text for text in texts)


def test_zero_3_partitions_are_refused() -> None:
    param: Any = nn.Parameter(torch.empty(0))
    param.ds_id, param.ds_tensor = 0, torch.zeros(10)  # as deepspeed.zero.Init leaves them
    with pytest.raises(LayoutError, match="ZeRO stage 3"):
        shard4bit.AdamW4bit([param]).step()


def saved_after_evaluation(root: str) -> list[str]:
    """An evaluation leaves the root of an FSDP2 model gathered; its parameters are then not DTensors."""
    model = Toy()
    fully_shard(model)
    optimizer = shard4bit.fsdp.wrap(model, shard4bit.AdamW4bit)
    before = shard4bit.digest(model, optimizer)
    with torch.no_grad():
        model(torch.ones(4, 24))
    gathered = any(not isinstance(p, DTensor) for p in model.parameters())
    shard4bit.save(root, model, optimizer, step=0)
    with torch.no_grad():
        model(torch.ones(4, 24))
    shard4bit.load(root, model, optimizer)
    return [before, shard4bit.digest(model, optimizer), str(gathered)]


def test_saving_after_an_evaluation(tmp_path: Path) -> None:
    for before, after, gathered in pool(2).run(saved_after_evaluation, str(tmp_path)):
        assert gathered == "True"  # or this test shows nothing
        assert before == after
