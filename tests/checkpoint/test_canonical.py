"""shard4bit.save and load: any number of ranks to any other, bit for bit."""

from __future__ import annotations

import json
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import shard4bit
from shard4bit.errors import CheckpointError
from tests import oracle
from tests.checkpoint import ranks
from tests.checkpoint.ranks import STEPS, Found
from tests.covering import covering
from tests.fsdp import models
from tests.fsdp.models import SHAPES, Arrays, Shared, Toy, Zoo, canonical, optimizer_of, same
from tests.fsdp.test_invariance_fsdp2 import close
from tests.pool import pool

ALONE = (0, "plain")  # this very process, without a process group


@cache
def single(kind: str, steps: int) -> Found:
    return ranks.single_zoo(kind, steps)


def on(world: int, function: Any, *args: Any) -> list[Any]:
    return pool(world).run(function, *args) if world else [function(*args)]


def manifest_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_bytes())


# ---- any number of ranks to any other ----------------------------------------------------------

PAIRS = [
    (ALONE, (2, "fsdp")),
    ((1, "fsdp"), (4, "fsdp")),
    ((2, "fsdp"), (3, "fsdp")),
    ((3, "fsdp"), (4, "hsdp")),
    ((4, "fsdp"), (1, "fsdp")),
    ((4, "fsdp"), (2, "experts")),
    ((4, "hsdp"), (2, "fsdp")),
    ((2, "experts"), ALONE),
    ((2, "plain"), (3, "fsdp")),
    ((3, "fsdp"), (2, "plain")),
]


@pytest.mark.parametrize("kind, pair", covering(["rank1", "block", "factored", "sgd"], PAIRS), ids=str)
def test_any_number_of_ranks_to_any_other(kind: str, pair: Any, tmp_path: Path) -> None:
    before, after = pair
    saved = on(before[0], ranks.save_zoo, kind, before[1], str(tmp_path))
    arrays, digest = saved[0]
    if kind != "factored":  # whose sums depend a little on the sharding
        same(arrays, single(kind, STEPS)[0])
        assert digest == single(kind, STEPS)[1]
    assert len({d for _, d in saved}) == 1
    for state, loaded, further in on(after[0], ranks.load_zoo, kind, after[1], str(tmp_path)):
        same(state[0], arrays, (kind, before, after))
        assert state[1] == digest
        assert (loaded.step, loaded.skipped) == (STEPS, [])
        assert loaded.extra == {"layout": before[1], "list": [1, None]}
        assert loaded.path == tmp_path / f"step-{STEPS:010d}"
        check = close if kind == "factored" else same
        check(further, single(kind, STEPS + 1)[0], (kind, before, after))


@pytest.mark.parametrize("world, layout", [(3, "fsdp"), (4, "hsdp"), (2, "plain"), (2, "experts")])
def test_files_hold_every_byte_once(world: int, layout: str, tmp_path: Path) -> None:
    """Read with the safetensors library alone: the pieces make up the canonical tensors, without copies
    of what replicas share."""
    arrays, _ = pool(world).run(ranks.save_zoo, "rank1", layout, str(tmp_path))[0]
    path = tmp_path / f"step-{STEPS:010d}"
    manifest = manifest_of(path)
    names = [f"rank-{rank:05d}.safetensors" for rank in range(world)]
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", *names]
    assert manifest["world_size"] == len(manifest["files"]) == world
    pieces: dict[str, list[tuple[list[int], np.ndarray]]] = {}
    for name in names:
        with safe_open(path / name, "numpy") as file:
            for key in file.keys():  # noqa: SIM118
                tensor, window = key[:-1].split("[")
                numbers = [int(n) for part in window.split(",") for n in part.split(":")]
                pieces.setdefault(tensor, []).append((numbers, file.get_tensor(key)))
    expected = {k: v for k, v in arrays.items() if not k.endswith("/step")}
    assert set(pieces) == set(expected)
    for key, whole in expected.items():
        rows, cols = oracle.matrix_shape(SHAPES[key.split("/")[1]])
        units = max(r1 for (_, _, _, r1), _ in pieces[key])
        shape = (max(r for (_, r, _, _), _ in pieces[key]), units)
        assert shape[0] in (rows, 1) and whole.size == shape[0] * shape[1], key
        seen, count = np.zeros(shape, whole.dtype), np.zeros(shape, int)
        for (row0, row1, col0, col1), values in pieces[key]:
            seen[row0:row1, col0:col1] = values
            count[row0:row1, col0:col1] += 1
        assert (count == 1).all(), key
        assert seen.tobytes() == whole.tobytes(), key
    sizes = [Path(path / n).stat().st_size for n in names]
    assert sizes == [about["size"] for about in manifest["files"]]
    if layout == "plain":  # rank 0 has it all
        assert sizes[1] < 200 < sizes[0]
    if layout == "hsdp":  # the first replica has it all
        assert max(sizes[2:]) < 200 < min(sizes[:2])


def test_the_manifest_says_what_is_there(tmp_path: Path) -> None:
    pool(2).run(ranks.save_zoo, "rank1", "fsdp", str(tmp_path))
    manifest = manifest_of(tmp_path / f"step-{STEPS:010d}")
    assert manifest["parameters"]["odd"] == {
        "shape": [129, 301],
        "step": STEPS,
        "moments": {"exp_avg": "B128/DE", "exp_avg_sq": "Rank-1/Linear"},
    }
    assert manifest["parameters"]["bias"]["moments"] == {"exp_avg": "fp32", "exp_avg_sq": "fp32"}
    (group,) = manifest["groups"]
    assert group["parameters"] == list(SHAPES)
    assert group["options"]["lr"] == models.ADAMW["lr"]
    assert manifest["tensors"]["state/odd/exp_avg_codes"]["shape"] == [129, 151]
    assert manifest["tensors"]["state/experts/exp_avg_sq_row_max"]["shape"] == [96, 1]


def cut_columns(root: str, shape: tuple[int, int], placements: list[int], load: bool) -> Any:
    """Train and save, or load, a matrix whose columns are cut; the digests then and a step later."""
    mesh = models.mesh_of(dist.get_world_size()) if len(placements) == 1 else models.mesh_of(2, 2)
    model: Any = Zoo({"w": shape}) if not load else ranks.blank("plain", {"w": shape})
    sharding = [Shard(p) for p in placements]
    model.w = nn.Parameter(distribute_tensor(model.w.data, mesh, sharding, src_data_rank=None))
    optimizer = optimizer_of("block", model.parameters())
    if load:
        shard4bit.load(root, model, optimizer)
    else:
        models.train(model, optimizer, STEPS)
        shard4bit.save(root, model, optimizer, step=STEPS)
    local = optimizer.state[model.w]["exp_avg_codes"]
    before = local.to_local() if isinstance(local, DTensor) else local
    digest, codes = shard4bit.digest(model, optimizer), before.numpy().tobytes()
    models.train(model, optimizer, 1, first=STEPS + 1)
    return digest, shard4bit.digest(model, optimizer), codes


@pytest.mark.parametrize(
    "shape, world, placements",
    [
        ((41, 300), 2, [1]),  # cut at 150: within a block
        ((41, 300), 4, [0, 1]),
        ((41, 301), 2, [1]),  # at 151: within a byte of codes
        ((129, 301), 4, [0, 1]),
        ((33, 770), 4, [1]),
        ((2000, 3), 4, [1]),  # two bytes on three ranks, and an empty rank
    ],
)
def test_blocks_and_bytes_cut_between_ranks(
    shape: tuple[int, int], world: int, placements: list[int], tmp_path: Path
) -> None:
    """state_dict() cannot carry such cuts, the canonical checkpoint can."""
    model = Zoo({"w": shape})
    optimizer = optimizer_of("block", model.parameters())
    models.train(model, optimizer, STEPS)
    expected = [shard4bit.digest(model, optimizer)]
    models.train(model, optimizer, 1, first=STEPS + 1)
    expected.append(shard4bit.digest(model, optimizer))
    saved = pool(world).run(cut_columns, str(tmp_path), shape, placements, False)
    loaded = pool(world).run(cut_columns, str(tmp_path), shape, placements, True)
    for (*before, codes), (*after, again) in zip(saved, loaded, strict=True):
        assert before == after == expected
        assert again == codes  # the neighbours' nibbles are 0 as before
    fresh = ranks.blank("plain", {"w": shape})
    same_again = optimizer_of("block", fresh.parameters())
    shard4bit.load(tmp_path, fresh, same_again)
    assert shard4bit.digest(fresh, same_again) == expected[0]


def failing_with_cut_bytes(root: str) -> tuple[str, bool]:
    """One rank's argument is bad while others must exchange halves of bytes: no rank may wait for it."""
    model: Any = Zoo({"w": (41, 301)})
    model.w = nn.Parameter(distribute_tensor(model.w.data, models.mesh_of(2), [Shard(1)], src_data_rank=None))
    optimizer = optimizer_of("block", model.parameters())
    models.train(model, optimizer, 1)
    before = shard4bit.digest(model, optimizer)
    extra = object() if dist.get_rank() == 1 else None
    with pytest.raises(CheckpointError) as caught:
        shard4bit.save(root, model, optimizer, step=1, extra=extra)
    return str(caught.value), shard4bit.digest(model, optimizer) == before


def test_a_bad_argument_on_one_rank_with_cut_bytes(tmp_path: Path) -> None:
    for text, unchanged in pool(2).run(failing_with_cut_bytes, str(tmp_path)):
        assert "extra must be JSON" in text
        assert unchanged
    assert not list(tmp_path.iterdir())


# ---- options -----------------------------------------------------------------------------------


def groups_of(model: nn.Module, lr: Any, decay: float) -> Any:
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    others = [p for n, p in model.named_parameters() if not n.endswith("bias")]
    return shard4bit.AdamW4bit(
        [{"params": others}, {"params": biases, "weight_decay": 0.0, "betas": (0.5, 0.6)}],
        lr=lr,
        weight_decay=decay,
    )


def test_hyperparameters_are_restored_or_kept(tmp_path: Path) -> None:
    model = Toy()
    optimizer = groups_of(model, 0.02, 0.3)
    models.fit(model, optimizer, 0, 2)
    optimizer.param_groups[1]["lr"] = 0.04  # as a scheduler would
    shard4bit.save(tmp_path, model, optimizer, step=2)

    fresh = Toy(1)
    again = groups_of(fresh, torch.tensor(0.5), 0.9)
    assert again.param_groups[0]["lr"] is again.param_groups[1]["lr"]  # one tensor, from the defaults
    shard4bit.load(tmp_path, fresh, again)
    rates = [g["lr"] for g in again.param_groups]
    assert all(isinstance(r, torch.Tensor) for r in rates)
    assert [float(r) for r in rates] == pytest.approx([0.02, 0.04])
    assert [g["weight_decay"] for g in again.param_groups] == [0.3, 0.0]
    assert again.param_groups[1]["betas"] == (0.5, 0.6)

    other = Toy(1)
    kept = groups_of(other, 0.5, 0.9)
    shard4bit.load(tmp_path, other, kept, hyperparameters=False)
    assert [g["lr"] for g in kept.param_groups] == [0.5, 0.5]
    assert [g["weight_decay"] for g in kept.param_groups] == [0.9, 0.0]
    assert shard4bit.digest(other, kept) == shard4bit.digest(fresh, again)
    assert shard4bit.digest(fresh, again) == shard4bit.digest(model, optimizer)


def test_options_of_every_sort_that_optimizers_take(tmp_path: Path) -> None:
    model = Zoo({"b": (5,)})
    optimizer = optimizer_of("rank1", model.parameters(), lr=np.float32(0.25))
    group = optimizer.param_groups[0]
    group |= {"betas": (torch.tensor(0.5), np.float64(0.75)), "weight_decay": Fraction(1, 8)}
    group |= {"note": {"layer": np.int64(3), "scales": (torch.tensor([2]), None, True, "x")}}
    path = shard4bit.save(tmp_path, model, optimizer, step=1)
    options = manifest_of(path)["groups"][0]["options"]
    assert (options["lr"], options["betas"], options["weight_decay"]) == (0.25, [0.5, 0.75], 0.125)
    assert options["note"] == {"layer": 3, "scales": [2, None, True, "x"]}
    fresh = Zoo({"b": (5,)})
    again = optimizer_of("rank1", fresh.parameters(), lr=1.0)
    shard4bit.load(tmp_path, fresh, again)
    found = again.param_groups[0]
    assert (found["lr"], found["betas"], found["weight_decay"]) == (0.25, (0.5, 0.75), 0.125)


def test_without_parameters_or_frozen_ones(tmp_path: Path) -> None:
    model: Any = Toy()
    optimizer = optimizer_of("rank1", model.parameters())
    models.fit(model, optimizer, 0, 3)
    model.scratch += 5
    whole = canonical(model, optimizer)

    def loaded_from(name: str) -> Arrays:
        fresh = Toy(1)
        again = optimizer_of("rank1", fresh.parameters())
        assert shard4bit.load(tmp_path / name, fresh, again).skipped == []
        return canonical(fresh, again)

    untouched = canonical(Toy(1))
    shard4bit.save(tmp_path / "all", model, optimizer, step=3)
    found = loaded_from("all")
    assert found.pop("model/scratch").tolist() == [0, 0]  # not persistent
    same(found, {k: v for k, v in whole.items() if k != "model/scratch"})
    assert found["model/seen"] == 3

    shard4bit.save(tmp_path / "states", model, optimizer, step=3, parameters=False)
    found = loaded_from("states")
    same({k: v for k, v in found.items() if k.startswith("model/")}, untouched)
    states = {k: v for k, v in whole.items() if k.startswith("state/")}
    same({k: v for k, v in found.items() if k.startswith("state/")}, states)

    for strict in (True, False):
        with pytest.raises(CheckpointError, match="nothing to load; give it the optimizer"):
            shard4bit.load(tmp_path / "states", Toy(1), strict=strict)

    shard4bit.save(tmp_path / "trained", model, optimizer, step=3, frozen=False)
    found = loaded_from("trained")
    still = [k for k in untouched if "frozen" in k or k in ("model/seen", "model/scratch")]
    assert len(still) == 4
    same({k: found[k] for k in still}, {k: untouched[k] for k in still})
    same({k: found[k] for k in whole if k not in still}, {k: whole[k] for k in whole if k not in still})

    shard4bit.save(tmp_path / "model", model, step=3)
    fresh = Toy(1)
    shard4bit.load(tmp_path / "model", fresh)
    found = canonical(fresh)
    assert found.pop("model/scratch").tolist() == [0, 0]
    expected = {k: v for k, v in whole.items() if k.startswith("model/") and k != "model/scratch"}
    same(found, expected)


def test_not_strict_loads_what_both_have_and_names_the_rest(tmp_path: Path) -> None:
    shapes = {"a": (70, 80), "b": (5,), "gone": (90, 60)}
    model = Zoo(shapes)
    optimizer = optimizer_of("rank1", model.parameters())
    models.train(model, optimizer, 2)
    shard4bit.save(tmp_path, model, optimizer, step=2)
    fresh = ranks.blank("plain", {"a": (70, 80), "b": (5,), "new": (4, 4)})
    again = optimizer_of("rank1", fresh.parameters())
    loaded = shard4bit.load(tmp_path, fresh, again, strict=False, hyperparameters=False)
    codes = ["codes", "absmax"], ["codes", "row_max", "col_max"]
    gone = [f"state/gone/exp_avg_{c}" for c in codes[0]] + [f"state/gone/exp_avg_sq_{c}" for c in codes[1]]
    new = ["model/new", "state/new/exp_avg", "state/new/exp_avg_sq"]
    assert sorted(loaded.skipped) == sorted(["model/gone", *gone, *new])
    found, expected = canonical(fresh, again), canonical(model, optimizer)
    both = [k for k in expected if k in found]
    assert len(both) == 2 + 6 + 3
    same({k: found[k] for k in both}, {k: expected[k] for k in both})
    assert (found["model/new"] == 7).all() and found["state/new/step"] == 0


def test_not_strict_without_an_optimizer_in_the_checkpoint(tmp_path: Path) -> None:
    model = Zoo({"a": (70, 80)})
    shard4bit.save(tmp_path, model, step=0)
    fresh = ranks.blank("plain", {"a": (70, 80)})
    optimizer = optimizer_of("rank1", fresh.parameters())
    loaded = shard4bit.load(tmp_path, fresh, optimizer, strict=False)
    same(canonical(fresh), canonical(model))
    assert loaded.step == 0


def test_the_newest_complete_checkpoint_is_found(tmp_path: Path) -> None:
    model: Any = Zoo({"b": (5,)})
    for step in (2, 30, 100):
        model.b.data.fill_(step)
        shard4bit.save(tmp_path, model, step=step)
    (tmp_path / "step-0000000100" / "manifest.json").unlink()
    (tmp_path / "step-0000000999").mkdir()
    (tmp_path / "step-notes").mkdir()
    loaded = shard4bit.load(tmp_path, model)
    assert loaded.step == 30 and (model.b == 30).all()
    loaded = shard4bit.load(tmp_path / "step-0000000002", model)
    assert loaded.step == 2 and (model.b == 2).all()


# ---- models of all sorts -----------------------------------------------------------------------


def wrapped_by_ddp(root: str) -> list[tuple[str, list[str], bool]]:
    """Checkpoints of models with DistributedDataParallel somewhere, read by plain ones and the other way;
    a module's own name "module" stays."""

    def plain() -> nn.Module:
        inner = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))
        return nn.ModuleDict({"module": inner, "other": nn.Linear(3, 3)})

    def nested() -> nn.Module:
        out: Any = plain()
        out["module"] = checkpoint_wrapper(DistributedDataParallel(checkpoint_wrapper(out["module"])))
        return out

    makers = {
        "outside": lambda: DistributedDataParallel(plain()),
        "compiled": lambda: torch.compile(DistributedDataParallel(plain()), backend="eager"),
        "inside of compiled": lambda: DistributedDataParallel(torch.compile(plain(), backend="eager")),
        "nested": nested,
    }
    out = []
    for step, (what, make) in enumerate(makers.items()):
        model, fresh = make(), plain()
        optimizer = optimizer_of("rank1", model.parameters())
        again = optimizer_of("rank1", fresh.parameters())
        mean_of(model).fill_(0.25)
        path = shard4bit.save(root, model, optimizer, step=2 * step)
        skipped = shard4bit.load(path, fresh, again).skipped
        path = shard4bit.save(root, fresh, again, step=2 * step + 1)
        skipped += shard4bit.load(path, model, optimizer).skipped
        same_digest = shard4bit.digest(fresh, again) == shard4bit.digest(model, optimizer)
        out.append((what, skipped, same_digest and bool((mean_of(fresh) == 0.25).all())))
    return out


def test_distributed_data_parallel_leaves_no_name(tmp_path: Path) -> None:
    for found in pool(2).run(wrapped_by_ddp, str(tmp_path)):
        assert [(skipped, fine) for _, skipped, fine in found] == [([], True)] * 4, found
    parameters = manifest_of(tmp_path / "step-0000000000")["parameters"]
    assert {"module.0.weight", "other.weight"} <= set(parameters)


class Zebra(nn.Module):
    """Layouts in memory, wrappers, tied weights, buffers of other dtypes, and empty tensors."""

    def __init__(self, fill: float | None = None) -> None:
        super().__init__()
        inner = nn.Sequential(nn.Conv2d(16, 64, 3), nn.BatchNorm2d(64))
        self.wrapped = checkpoint_wrapper(inner)
        self.conv = nn.Conv2d(16, 64, 3)
        self.conv.weight.data = self.conv.weight.data.to(memory_format=torch.channels_last)
        self.turned = nn.Parameter(torch.randn(90, 70).t())
        self.embed, self.head = nn.Embedding(100, 60), nn.Linear(60, 100, bias=False)
        self.head.weight = self.embed.weight
        self.brain = nn.Parameter(torch.randn(80, 64).bfloat16())
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("none", torch.zeros(0, 3))
        self.register_buffer("nothing", torch.zeros(3, 0))
        self.register_buffer("table", torch.rand(3, 4, dtype=torch.float64).t())
        self.register_buffer("strided", torch.rand(8, 6)[::2, ::3])
        if fill is not None:
            with torch.no_grad():
                for tensor in [*self.parameters(), *self.buffers()]:
                    tensor.fill_(fill)


def mean_of(model: nn.Module) -> torch.Tensor:
    """The running mean of a model's batch norm."""
    return next(b for n, b in model.named_buffers() if n.endswith("running_mean"))


def test_every_sort_of_tensor_is_restored(tmp_path: Path) -> None:
    model = Zebra()
    optimizer = optimizer_of("rank1", model.parameters())
    for step in (1, 2):
        for name, param in model.named_parameters():
            param.grad = torch.empty_like(param)
            param.grad.copy_(models.gradient(name, tuple(param.shape), step))
        optimizer.step()
    mean_of(model).fill_(0.25)
    assert not model.conv.weight.is_contiguous() and not model.turned.is_contiguous()
    shard4bit.save(tmp_path, model, optimizer, step=2)
    fresh = Zebra(fill=1)
    again = optimizer_of("rank1", fresh.parameters())
    shard4bit.load(tmp_path, fresh, again)
    same(canonical(fresh, again), canonical(model, optimizer))
    assert shard4bit.digest(fresh, again) == shard4bit.digest(model, optimizer)
    assert sum("embed" in k or "head" in k for k in canonical(model)) == 1


def test_wrapped_and_plain_models_share_checkpoints(tmp_path: Path) -> None:
    def make(wrapped: bool) -> nn.Module:
        inner = nn.Sequential(nn.Linear(70, 80), nn.BatchNorm1d(80))
        if not wrapped:
            return nn.Sequential(inner)
        return torch.compile(nn.Sequential(checkpoint_wrapper(inner)))  # type: ignore[return-value]

    for wrapped in (False, True):
        model, fresh = make(wrapped), make(not wrapped)
        mean_of(model).fill_(0.25)
        optimizer = optimizer_of("rank1", model.parameters())
        again = optimizer_of("rank1", fresh.parameters())
        shard4bit.save(tmp_path, model, optimizer, step=int(wrapped))
        assert shard4bit.load(tmp_path, fresh, again).skipped == []
        assert shard4bit.digest(fresh, again) == shard4bit.digest(model, optimizer)
        for ours, theirs in zip(fresh.parameters(), model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(mean_of(fresh), mean_of(model))


def test_a_buffer_that_is_registered_several_times(tmp_path: Path) -> None:
    path = shard4bit.save(tmp_path, Shared(1), step=1)
    tensors = manifest_of(path)["tensors"]
    assert [name for name in tensors if "cache" in name or "scale" in name] == ["model/second.scale"]
    fresh: Any = Shared(2)
    assert shard4bit.load(path, fresh).skipped == []
    assert fresh.first.cache.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("view", "overlaps"),
    [
        (lambda x: x[:1].expand(8), True),
        (lambda x: x.unfold(0, 4, 2), True),
        (lambda x: x[:0].expand(5, 0), False),
        (lambda x: x[:1].expand(1, 1), False),
        (lambda x: x.view(6, 4).t()[::3], False),
        (lambda x: x.view(2, 3, 4).permute(2, 0, 1)[1:3], False),
    ],
)
def test_memory_that_elements_share_is_refused(view: Any, overlaps: bool, tmp_path: Path) -> None:
    def model(fill: float, buffer: torch.Tensor) -> nn.Module:
        out = Zoo({"a": (4, 4)})
        out.register_buffer("cache", buffer)
        for tensor in (out.a, buffer):
            tensor.data.fill_(fill)
        return out

    dense = model(1, view(torch.zeros(24)).clone().contiguous())
    path = shard4bit.save(tmp_path, dense, step=1)
    odd = model(2, view(torch.zeros(24)))
    if not overlaps:
        assert shard4bit.load(path, odd).skipped == []
        assert shard4bit.digest(odd) == shard4bit.digest(dense)
        return
    before = shard4bit.digest(odd)
    for call in (lambda: shard4bit.load(path, odd), lambda: shard4bit.save(tmp_path, odd, step=2)):
        with pytest.raises(CheckpointError, match=r"cache of shape .* share memory.*clone\(\)"):
            call()
    assert shard4bit.digest(odd) == before and len(list(tmp_path.iterdir())) == 1


# ---- continuing --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rank1", "block", "factored", "sgd"])
def test_continuing_equals_the_uninterrupted_run(kind: str, tmp_path: Path) -> None:
    whole = pool(2).run(ranks.train_toy, "fsdp", kind, 8, str(tmp_path), 4)
    resumed = pool(2).run(ranks.resume_toy, "fsdp", kind, 8, str(tmp_path))
    for (expected, losses), (found, tail) in zip(whole, resumed, strict=True):
        same(found, expected, kind)
        assert tail == losses[4:] and len(set(losses)) == 8
        assert expected["state/first.weight/step"] == 8
