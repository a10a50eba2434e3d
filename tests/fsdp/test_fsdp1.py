"""FSDP1 in all its variants: flat parameters whose states are those of the original parameters."""

from __future__ import annotations

from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

import shard4bit
from shard4bit.checkpoint.manifest import read_manifest
from shard4bit.fsdp.wrap import chosen
from tests import oracle
from tests.covering import covering
from tests.fsdp import flat, models
from tests.fsdp.flat import Nest, Part, flattened, wrapped
from tests.fsdp.models import SHAPES, Shared
from tests.fsdp.recorder import Recorder, all_reduces
from tests.pool import pool

STEPS = 3
X = torch.ones(2, 2)
NO_DECAY = {"no_decay": ["*bias", "*few", "first.odd"], "full_precision": ["second.*"]}


def single_model(kind: str, steps: int, **options: Any) -> tuple[Any, Any]:
    """A Nest in one process with the optimizer of the same groups as ``wrap`` makes."""
    model = Nest()
    patterns = {k: options.pop(k, ()) for k in ("no_decay", "full_precision")}
    names = [n for n, _ in model.named_parameters()]
    wanted = chosen(names, **patterns)
    groups: dict[str, dict[str, Any]] = {}
    for name, param in model.named_parameters():
        group = groups.setdefault(repr(wanted[name]), {"params": [], **wanted[name]})
        group["params"].append(param)
    optimizer = models.optimizer_of(kind, list(groups.values()), **options)
    for step in range(1, steps + 1):
        for name, param in model.named_parameters():
            param.grad = models.gradient(flat.short(name), tuple(param.shape), step)
        optimizer.step()
    return model, optimizer


@cache
def single(kind: str, steps: int = STEPS, patterns: bool = False) -> str:
    return shard4bit.digest(*single_model(kind, steps, **(NO_DECAY if patterns else {})))


def trained(
    kind: str, orig: bool, strategy: str, options: dict[str, Any], steps: int = STEPS
) -> tuple[Any, Any]:
    """Real forwards and backwards, whose gradients are then replaced by the global ones."""
    wrapping = {k: options[k] for k in options if k in NO_DECAY}
    model = flattened(Nest(), orig, strategy, **{k: v for k, v in options.items() if k not in NO_DECAY})
    optimizer = wrapped(kind, model, **wrapping)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model(X.to(models.Where.device)).sum().backward()
        flat.force(model, step)
        optimizer.step()
    return model, optimizer


def digest_of(kind: str, orig: bool, strategy: str, options: dict[str, Any]) -> str:
    return shard4bit.digest(*trained(kind, orig, strategy, options))


STRATEGIES = ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"]
CASES = [(2, s) for s in STRATEGIES] + [(3, "FULL_SHARD"), (4, "FULL_SHARD"), (4, "HYBRID_SHARD")]


@pytest.mark.parametrize(
    "how, case", covering(product(["rank1", "block", "sgd"], [True, False]), CASES), ids=str
)
def test_states_are_those_of_one_process(how: tuple[str, bool], case: tuple[int, str]) -> None:
    (kind, orig), (world, strategy) = how, case
    assert set(pool(world).run(digest_of, kind, orig, strategy, {})) == {single(kind)}


@pytest.mark.parametrize("orig", [True, False])
def test_groups_by_name_inside_flat_parameters(orig: bool) -> None:
    assert single("rank1", patterns=True) != single("rank1")
    assert set(pool(3).run(digest_of, "rank1", orig, "FULL_SHARD", NO_DECAY)) == {
        single("rank1", patterns=True)
    }


@pytest.mark.parametrize("orig", [True, False])
def test_bf16_compute_keeps_fp32_parameters(orig: bool) -> None:
    assert set(pool(2).run(digest_of, "rank1", orig, "FULL_SHARD", {"mixed": True})) == {single("rank1")}


# ---- saving and resuming --------------------------------------------------------------------------


#: what words in an engine's name stand for
WORDS: dict[str, dict[str, Any]] = {
    "hybrid": {"strategy": "HYBRID_SHARD"},
    "grad-op": {"strategy": "SHARD_GRAD_OP"},
    "no-shard": {"strategy": "NO_SHARD"},
    "bf16": {"mixed": True},
    "by-size": {"auto_wrap_policy": partial(size_based_auto_wrap_policy, min_num_params=30_000)},
}


def model_of(kind: str, engine: str, steps: int) -> tuple[Any, Any]:
    """Trained for so many steps; with 0 steps, its values are others than a fresh one's."""
    if engine == "single":
        return single_model(kind, steps, **NO_DECAY)
    if engine.startswith("fsdp1"):
        how = {**NO_DECAY, **{k: v for word, own in WORDS.items() if word in engine for k, v in own.items()}}
        return trained(kind, engine.endswith("orig"), how.pop("strategy", "FULL_SHARD"), how, steps)
    model: Any = Nest()
    for part in (model.first, model.second, model):
        fully_shard(part)
    optimizer = wrapped(kind, model, **NO_DECAY)
    for step in range(1, steps + 1):
        named = model.named_parameters()
        for name, param in named:
            whole = models.gradient(flat.short(name), tuple(param.shape), step)
            param.grad = models.scatter(whole, param)
        optimizer.step()
    return model, optimizer


def saved(kind: str, engine: str, root: str) -> str:
    model, optimizer = model_of(kind, engine, STEPS)
    shard4bit.save(root, model, optimizer, step=STEPS, extra={"engine": engine})
    return shard4bit.digest(model, optimizer)


def loaded(kind: str, engine: str, root: str) -> tuple[str, str, float]:
    """The digest after loading, after one more step, and a group's learning rate."""
    model, optimizer = model_of(kind, engine, 0)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(3.0)
    for group in optimizer.param_groups:
        group["lr"] = 9.0
    found = shard4bit.load(root, model, optimizer)
    assert found.step == STEPS
    digest = shard4bit.digest(model, optimizer)
    named = {} if engine.startswith("fsdp1") else dict(model.named_parameters())
    if named:
        for name, param in named.items():
            whole = models.gradient(flat.short(name), tuple(param.shape), STEPS + 1)
            param.grad = models.scatter(whole, param)
    else:
        flat.force(model, STEPS + 1)
    optimizer.step()
    return digest, shard4bit.digest(model, optimizer), optimizer.param_groups[0]["lr"]


ENGINES = ["fsdp1-orig", "fsdp1-flat", "fsdp2", "single"]
PAIRS = [
    (4, "fsdp1-orig", 3, "fsdp2"),
    (4, "fsdp1-flat", 3, "fsdp2"),
    (3, "fsdp2", 4, "fsdp1-flat"),
    (2, "fsdp2", 3, "fsdp1-orig"),
    (3, "fsdp1-flat", 1, "single"),
    (1, "single", 3, "fsdp1-orig"),
    (2, "fsdp1-orig", 3, "fsdp1-flat"),
    (3, "fsdp1-flat", 2, "fsdp1-flat"),
    (4, "fsdp1-hybrid-flat", 2, "fsdp1-orig"),
    (3, "fsdp1-grad-op-flat", 2, "fsdp1-no-shard-orig"),
    (2, "fsdp1-no-shard-flat", 3, "fsdp1-by-size-flat"),
    (3, "fsdp1-by-size-orig", 2, "fsdp1-bf16-flat"),
    *(
        pytest.param(*pair, marks=pytest.mark.slow)
        for pair in (
            (2, "fsdp1-bf16-orig", 3, "fsdp2"),
            (3, "fsdp1-by-size-flat", 2, "fsdp2"),
            (2, "fsdp1-no-shard-orig", 1, "single"),
            (3, "fsdp2", 2, "fsdp1-grad-op-orig"),
            (3, "fsdp2", 4, "fsdp1-by-size-orig"),
            (1, "single", 2, "fsdp1-no-shard-flat"),
            (1, "single", 3, "fsdp1-bf16-orig"),
            (2, "fsdp1-grad-op-orig", 4, "fsdp1-hybrid-orig"),
        )
    ),
]


def on(world: int, function: Any, *args: Any) -> list[Any]:
    return [function(*args)] if world == 1 else pool(world).run(function, *args)


@pytest.mark.parametrize("before, engine, after, new_engine", PAIRS)
def test_across_engines_and_ranks(
    before: int, engine: str, after: int, new_engine: str, tmp_path: Path
) -> None:
    expected = single("rank1", patterns=True)
    assert set(on(before, saved, "rank1", engine, str(tmp_path))) == {expected}
    for digest, further, lr in on(after, loaded, "rank1", new_engine, str(tmp_path)):
        assert digest == expected and further == single("rank1", STEPS + 1, patterns=True)
        assert lr == models.ADAMW["lr"]


@pytest.mark.parametrize("kind", ["block", "factored", "sgd"])
def test_other_optimizers_across_engines(kind: str, tmp_path: Path) -> None:
    written = set(pool(4).run(saved, kind, "fsdp1-flat", str(tmp_path)))
    assert len(written) == 1
    for world, engine in ((3, "fsdp1-orig"), (2, "fsdp2"), (1, "single")):
        assert {found[0] for found in on(world, loaded, kind, engine, str(tmp_path))} == written


def resumed_after_evaluation(root: str) -> tuple[float, float]:
    """An evaluation leaves gathered parameters behind; a load must be seen by the next evaluation."""
    model, optimizer = trained("rank1", False, "SHARD_GRAD_OP", {})
    with torch.no_grad():
        before = float(model(X).sum())
    shard4bit.save(root, model, optimizer, step=1)
    model(X).sum().backward()
    flat.force(model, STEPS + 1)
    optimizer.step()
    with torch.no_grad():
        other = float(model(X).sum())
    shard4bit.load(root, model, optimizer)
    with torch.no_grad():
        after = float(model(X).sum())
    assert other != before
    return before, after


def test_an_evaluation_sees_what_was_loaded(tmp_path: Path) -> None:
    for before, after in pool(2).run(resumed_after_evaluation, str(tmp_path)):
        assert after == before


def with_frozen(orig: bool, root: str) -> tuple[str, str, int]:
    """A frozen block in a flat parameter of its own; digests before saving and after loading elsewhere."""
    inner = Nest()
    inner.first.requires_grad_(False)
    model = flattened(inner, orig)
    optimizer = wrapped("rank1", model)
    flat.train(model, optimizer, STEPS)
    shard4bit.save(root, model, optimizer, step=1)
    alone = Nest()
    alone.first.requires_grad_(False)
    plain = [p for p in alone.parameters() if p.requires_grad]
    other = models.optimizer_of("rank1", plain)
    for param in alone.parameters():
        torch.nn.init.zeros_(param)
    shard4bit.load(root, alone, other)
    return shard4bit.digest(model, optimizer), shard4bit.digest(alone, other), len(plain)


@pytest.mark.parametrize("orig", [True, False])
def test_a_frozen_block(orig: bool, tmp_path: Path) -> None:
    for before, after, count in pool(2).run(with_frozen, orig, str(tmp_path)):
        assert before == after and count == len(SHAPES) - 3


def shared_buffers(root: str, orig: bool) -> tuple[list[str], str, str]:
    """Checkpoints of FSDP1 and of a plain model read by the other, and one with a buffer under each of its
    names, as FSDP1's once were; names of the buffers, what was skipped, and the buffers' values."""
    plain: Any = Shared(1)
    flat = flattened(Shared(2), orig)
    first = shard4bit.save(root, flat, step=1)
    skipped = shard4bit.load(first, plain).skipped
    names = sorted(k for k in read_manifest(first).tensors if k.endswith(("scale", "cache")))
    values = [plain.third.scale.tolist()]
    skipped += shard4bit.load(shard4bit.save(root, Shared(3), step=2), flat).skipped
    values.append(flat.third.scale.tolist())
    apart: Any = Shared(4)
    apart.third.scale = apart.third.scale.clone()
    skipped += shard4bit.load(shard4bit.save(root, apart, step=3), flat).skipped
    return names, str(skipped), str([*values, flat.third.scale.tolist()])


@pytest.mark.parametrize("orig", [True, False])
def test_shared_buffers_have_the_names_of_other_engines(orig: bool, tmp_path: Path) -> None:
    for names, skipped, values in pool(2).run(shared_buffers, str(tmp_path), orig):
        assert names == ["model/second.scale"] and skipped == "[]"
        assert values == str([[n] * 3 for n in (2, 3, 4)])


# ---- bad input ------------------------------------------------------------------------------------


def raised(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refusals(orig: bool) -> dict[str, str]:
    model, optimizer = trained("rank1", orig, "FULL_SHARD", {})
    out = {
        "state_dict": raised(optimizer.state_dict),
        "optim_state_dict": raised(lambda: FSDP1.optim_state_dict(model, optimizer)),
        "get_optimizer_state_dict": raised(lambda: get_optimizer_state_dict(model, optimizer)),
        "plain": raised(lambda: shard4bit.AdamW4bit(model.parameters(), lr=1.0).step()),
        "pattern": raised(lambda: wrapped("rank1", model, no_decay=["*.bais"])),
        "string": raised(lambda: wrapped("rank1", model, no_decay="*.bias")),
    }
    other = flattened(Part({"odd": SHAPES["odd"]}), orig)
    stranger = wrapped("rank1", model)
    stranger.add_param_group({"params": list(other.named_parameters())})
    out["stranger"] = raised(stranger.step)
    with model.no_sync():
        model(X).sum().backward()
    out["no_sync"] = raised(optimizer.step)
    odd: Any = torch.nn.Linear(70, 70)
    odd.weight = torch.nn.Parameter(odd.weight.t())
    out["strides"] = raised(lambda: wrapped("rank1", flattened(odd, orig)))
    return out


@pytest.mark.parametrize("orig", [True, False])
def test_refusals_on_all_ranks(orig: bool) -> None:
    for found in pool(2).run(refusals, orig):
        for key in ("state_dict", "optim_state_dict", "get_optimizer_state_dict"):
            assert found[key].startswith("LayoutError") and "shard4bit.save" in found[key], found[key]
        assert found["plain"].startswith("LayoutError") and "shard4bit.fsdp.wrap" in found["plain"]
        assert "matches no parameter of the optimizer" in found["pattern"]
        assert "such as ['*.bias']" in found["string"]
        assert "no parameter of the model" in found["stranger"]
        assert found["no_sync"] != "nothing" and "timed out" not in found["no_sync"]
        assert "make it contiguous" in found["strides"]


def states_of_torchs_calls(orig: bool, strategy: str) -> list[str]:
    model, optimizer = trained("rank1", orig, strategy, {}, 1)
    before = shard4bit.digest(model, optimizer)
    calls: list[Any] = [
        optimizer.state_dict,
        lambda: FSDP1.optim_state_dict(model, optimizer),
        lambda: get_optimizer_state_dict(model, optimizer),
    ]
    out = [raised(call) for call in calls]
    assert shard4bit.digest(model, optimizer) == before
    return out


@pytest.mark.parametrize(
    "case, orig",
    covering([(2, s) for s in STRATEGIES] + [(4, "HYBRID_SHARD"), (4, "_HYBRID_SHARD_ZERO2")], [True, False]),
    ids=str,
)
def test_torchs_calls_are_refused_by_every_strategy(case: tuple[int, str], orig: bool) -> None:
    world, strategy = case
    for texts in pool(world).run(states_of_torchs_calls, orig, strategy):
        for text in texts:
            assert text.startswith("LayoutError") and "shard4bit.save" in text, text


# ---- communication --------------------------------------------------------------------------------


def calls_of_a_step() -> tuple[list[tuple[str, str, int]], list[tuple[str, list[int]]]]:
    model, optimizer = trained("rank1", False, "FULL_SHARD", {})
    flat.force(model, STEPS + 1)
    with all_reduces() as calls, Recorder() as recorder:
        optimizer.step()
    return recorder.calls, calls


def shared_values(world: int) -> int:
    """int32 values that ranks must exchange: a flag per rank and parameter; of matrices that are cut, the
    maxima of columns, of cut rows (second moment) and of cut blocks (first moment)."""
    names = list(SHAPES)
    values = 1 + len(names)
    for unit in (names[7:], names[:3], names[3:7]):
        sizes = [oracle.matrix_shape(SHAPES[n])[0] * oracle.matrix_shape(SHAPES[n])[1] for n in unit]
        length, start = -(-sum(sizes) // world), 0
        for name, size in zip(unit, sizes, strict=True):
            _, cols = oracle.matrix_shape(SHAPES[name])
            cuts = [k * length - start for k in range(1, world) if 0 < k * length - start < size]
            if cuts and oracle.is_quantized(SHAPES[name]):
                rows = {c // cols for c in cuts if c % cols}
                blocks = {(c // cols, c % cols // 128) for c in cuts if c % cols % 128}
                values += cols + len(rows) + len(blocks)
            start += size
    return values


@pytest.mark.parametrize("world", [2, 3])
def test_one_all_reduce_a_step_of_what_is_cut(world: int) -> None:
    for recorded, calls in pool(world).run(calls_of_a_step):
        assert calls == [("MAX", list(range(world)))]
        assert recorded == [("allreduce_", "int32", 4 * shared_values(world))]
