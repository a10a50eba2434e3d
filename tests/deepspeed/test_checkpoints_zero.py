"""Checkpoints of engines: DeepSpeed's own on as many ranks, shard4bit's on any number of them."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shard4bit
from shard4bit.errors import CheckpointError, Shard4bitError, StateError
from tests.deepspeed import engines
from tests.deepspeed.engines import Known, config, engine_of, needs_deepspeed
from tests.deepspeed.test_training_zero import by_dimensions
from tests.fsdp import models
from tests.fsdp.models import Zoo
from tests.pool import pool

pytestmark = needs_deepspeed
STEPS = 2


def blank(**options: Any) -> Any:
    """An engine whose weights are all seven."""
    model = Known()
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(7.0)
    return built(model, **options)


def follows(engine: Any) -> bool:
    """Whether the model's parameters are what the optimizer has, rounded."""
    out = True
    for bound in engine.basic_optimizer.bind():
        slab, data = bound.placed.slab, bound.placed.data().reshape(-1)
        start = slab.row_ranges[0][0] * slab.view.cols + slab.head if slab.numel else 0
        param = engine.module.get_parameter(bound.placed.name).detach().reshape(-1)
        out &= torch.equal(param[start : start + slab.numel], data.to(param.dtype))
    return out


# ---- DeepSpeed's own files ----------------------------------------------------------------------------


def built(model: Any, groups: bool = False, own: Any = None, **options: Any) -> Any:
    """groups: of parameters, with options of their own; own: what else the optimizer's options are."""
    settings = config(**options)
    settings["optimizer"]["params"].update(own or {})
    return engine_of(model, settings, **({"model_parameters": by_dimensions(model)} if groups else {}))


def uninterrupted(root: str, options: dict[str, Any]) -> Any:
    engine = built(Known(), **options)
    engines.train(engine, STEPS)
    with engines.quiet():
        engine.save_checkpoint(root, tag="here", client_state={"epoch": 5})
    engines.train(engine, STEPS, STEPS + 1)
    return engines.parts(engine)


def resumed(root: str, options: dict[str, Any]) -> Any:
    engine = blank(**options)
    with engines.quiet():
        path, client = engine.load_checkpoint(root)
    assert path is not None and client["epoch"] == 5 and engine.global_steps == STEPS
    assert follows(engine)
    engines.train(engine, STEPS, STEPS + 1)
    return engines.parts(engine)


PATTERNS = {"no_decay": ["*bias", "few"], "quantize_exclude": ["odd"]}
WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 5}}


@pytest.mark.parametrize(
    "options",
    [
        {"stage": 0, "groups": True},
        pytest.param({"stage": 2, "groups": True, "precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param({"stage": 0, "own": PATTERNS}, marks=pytest.mark.slow),
        {"stage": 1, "own": PATTERNS},
        {"stage": 1, "scheduler": WARMUP, "world": 3},
        {"stage": 0},
        pytest.param({"stage": 0, "precision": "bf16"}, marks=pytest.mark.slow),
        {"stage": 1, "precision": "bf16+fp32"},
        {"stage": 2, "kind": "sgd"},
        {"stage": 2, "precision": "fp16", "zero": {"round_robin_gradients": True}},
        {"stage": 2, "kind": "factored", "precision": "bf16 masters"},
    ],
    ids=str,
)
def test_native_resume_is_bit_exact(options: dict[str, Any], tmp_path: Path) -> None:
    engines.needs(options)
    world = options.get("world", 2)
    options = {key: value for key, value in options.items() if key != "world"}
    expected = engines.whole(pool(world).run(uninterrupted, str(tmp_path), options))
    models.same(engines.whole(pool(world).run(resumed, str(tmp_path), options)), expected, options)
    if options["stage"] and not {"groups", "own"} & set(options):  # by which "odd" is in fp32
        check_files(tmp_path / "here", world)


def check_files(folder: Path, world: int) -> None:
    """States lie packed in DeepSpeed's files: no tensor of a quantized one has the size of its matrix."""
    files = sorted(folder.glob("*optim_states.pt"))
    assert len(files) == world
    for file in files:
        saved = torch.load(file, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]
        for key, tensor in saved["state"][0].items():
            name, _, what = key.rpartition("/")
            assert re.search(r"\[\d+:\d+\]@\d+$", name), key
            if what.endswith("codes"):
                assert tensor.dtype == torch.uint8
        stored = sum(t.numel() * t.element_size() for t in saved["state"][0].values())
        held = len(saved["state"]) and sum(_length(k) for k in saved["state"][0] if k.endswith("/step"))
        assert stored < 2.5 * held, (stored, held)


def _length(key: str) -> int:
    start, stop = key.rpartition("[")[2].partition("]")[0].split(":")
    return int(stop) - int(start)


def loads_natively(root: str, options: dict[str, Any]) -> None:
    engine = blank(**options)
    with engines.quiet():
        engine.load_checkpoint(root)


def test_native_checkpoints_of_another_layout_are_refused(tmp_path: Path) -> None:
    pool(2).run(uninterrupted, str(tmp_path), {"stage": 2})
    other = {"stage": 2, "zero": {"round_robin_gradients": True}}
    for outcome in pool(2).outcomes(loads_natively, str(tmp_path), other):
        assert outcome[0] == "error" and isinstance(outcome[1], StateError), outcome[:2]
        assert "the saved state lacks" in str(outcome[1])
    same = {"stage": 1, "zero": {"reduce_bucket_size": 1000, "overlap_comm": True}}  # who holds what
    assert all(outcome[0] == "ok" for outcome in pool(2).outcomes(loads_natively, str(tmp_path), same))
    for outcome in pool(3).outcomes(loads_natively, str(tmp_path), {"stage": 2}):
        assert outcome[0] == "error" and "dp world size" in str(outcome[1]).lower(), outcome[:2]


# ---- shard4bit's --------------------------------------------------------------------------------------


def saved(root: str, options: dict[str, Any]) -> Any:
    engine = built(Known(), **options)
    engines.train(engine, STEPS)
    shard4bit.save(root, engine, step=STEPS, extra={"steps": engine.global_steps})
    return shard4bit.digest(engine), engines.parts(engine)


def loaded(root: str, options: dict[str, Any], again: str | None = None) -> Any:
    """Digest after loading, parts after another step, and what else should hold."""
    engine = blank(**options)
    found = shard4bit.load(root, engine)
    assert found.step == STEPS and found.extra == {"steps": STEPS} and follows(engine)
    if again is not None:
        shard4bit.save(again, engine, step=STEPS, extra=found.extra)
    digest = shard4bit.digest(engine)
    engines.train(engine, 1, STEPS + 1)
    return digest, engines.parts(engine)


@cache
def expected(kind: str, steps: int, precision: str = "fp32") -> Any:
    return engines.reference(kind, steps, precision)


def fsdp2(root: str, kind: str, path: str | None) -> str:
    """Train under FSDP2 (or read ``path`` there) and save; the digest."""
    model = models.sharded(Zoo(), "fsdp")
    optimizer = models.optimizer_of(kind, model.parameters())
    if path is None:
        models.train(model, optimizer, STEPS)
    else:
        assert shard4bit.load(path, model, optimizer).step == STEPS
    shard4bit.save(root, model, optimizer, step=STEPS, extra={"steps": STEPS})
    return shard4bit.digest(model, optimizer)


def plain(path: str, kind: str) -> str:
    """The digest in one process."""
    model = Zoo()
    optimizer = models.optimizer_of(kind, model.parameters())
    shard4bit.load(path, model, optimizer)
    return shard4bit.digest(model, optimizer)


def circle(root: Path, kind: str, worlds: tuple[int, int, int], zero: dict[str, Any]) -> None:
    """FSDP2 -> ZeRO -> FSDP2 -> one process, each on another number of ranks."""
    first, second, third = worlds
    paths = [str(root / name) for name in "abc"]
    digest = pool(first).run(fsdp2, paths[0], kind, None)[0]
    under = pool(second).run(loaded, paths[0], {"stage": 2, "kind": kind, "zero": zero}, paths[1])
    back = pool(third).run(fsdp2, paths[2], kind, paths[1])
    assert {digest, *(d for d, _ in under), *back} == {digest}
    assert plain(paths[2], kind) == digest
    if kind != "factored":
        engines.same(engines.whole([parts for _, parts in under]), expected(kind, STEPS + 1), worlds)


def test_fsdp_to_zero_to_fsdp(tmp_path: Path) -> None:
    circle(tmp_path, "rank1", (2, 3, 2), {"round_robin_gradients": True})


@pytest.mark.parametrize(
    "worlds, options, other",
    [
        ((2, 3), {"stage": 2}, {"stage": 1}),
        ((3, 2), {"stage": 1, "kind": "block"}, {"stage": 0, "kind": "block"}),
        ((2, 3), {"stage": 1, "precision": "bf16+fp32"}, {"stage": 2, "precision": "bf16"}),
        ((3, 2), {"stage": 2, "precision": "bf16"}, {"stage": 0, "precision": "bf16"}),
        ((2, 3), {"stage": 0, "precision": "fp16"}, {"stage": 2, "precision": "fp16"}),
        ((2, 3), {"stage": 1, "precision": "bf16 masters"}, {"stage": 2, "precision": "bf16 masters"}),
        ((3, 2), {"stage": 1, "groups": True}, {"stage": 2, "groups": True}),
        ((2, 3), {"stage": 0, "groups": True}, {"stage": 1, "groups": True}),
    ],
    ids=str,
)
def test_canonical_on_other_ranks(
    worlds: tuple[int, int], options: dict[str, Any], other: dict[str, Any], tmp_path: Path
) -> None:
    engines.needs(options)
    engines.needs(other)
    before = pool(worlds[0]).run(saved, str(tmp_path), options)
    after = pool(worlds[1]).run(loaded, str(tmp_path), other)
    assert len({d for d, _ in before + after}) == 1
    kind, precision = options.get("kind", "rank1"), options.get("precision", "fp32")
    whole = engines.whole([parts for _, parts in after])
    want = grouped_reference(STEPS + 1) if "groups" in options else expected(kind, STEPS + 1, precision)
    engines.same(whole, want, (options, other))


def grouped_reference(steps: int) -> Any:
    """One process with the groups."""
    model = Zoo()
    optimizer = models.optimizer_of("rank1", by_dimensions(model))
    models.train(model, optimizer, steps)
    return models.canonical(model, optimizer)


def saved_while_training(root: str, options: dict[str, Any]) -> tuple[str, str]:
    """Digests of an engine when a save in the background began, and of another one that loads it."""
    engine = engine_of(Known(), config(**options))
    engines.train(engine, STEPS)
    digest = shard4bit.digest(engine)
    saving = shard4bit.save(root, engine, step=STEPS, asynchronous=True)
    engines.train(engine, 1, STEPS + 1)
    saving.wait()
    other = blank(**options)
    shard4bit.load(root, other)
    return digest, shard4bit.digest(other)


def test_a_save_in_the_background(tmp_path: Path) -> None:
    options = {"stage": 2, "precision": "bf16", "zero": {"round_robin_gradients": True}}
    results = pool(2).run(saved_while_training, str(tmp_path), options)
    assert len({digest for pair in results for digest in pair}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rank1", "block", "sgd", "factored"])
def test_canonical_in_every_pairing(kind: str, tmp_path: Path) -> None:
    for first in (1, 2, 3, 4):
        path = str(tmp_path / f"{kind}-{first}")
        digest = pool(first).run(saved, path, {"stage": 1 + first % 2, "kind": kind})[0][0]
        for second in (1, 2, 3, 4):
            for stage in (0, 1, 2):
                zero = {"round_robin_gradients": second % 2 == 1}
                found = pool(second).run(loaded, path, {"stage": stage, "kind": kind, "zero": zero})
                assert {d for d, _ in found} == {digest}, (first, second, stage)
    for worlds in ((1, 2, 3), (4, 3, 2), (3, 4, 1)):
        circle(tmp_path / "-".join(map(str, worlds)), kind, worlds, {})


def toy_run(root: str, stage: int, load: bool) -> Any:
    """A model with a frozen layer and buffers: saved after, or loaded before, two steps."""
    model: Any = models.Toy(seed=1 if load else 0)
    engine = engine_of(model, config(stage))
    if load:
        shard4bit.load(root, engine)
    for step in range(2, 4) if load else range(4):
        if step == 2 and not load:
            shard4bit.save(root, engine, step=2)
        x, y = models.batch(step, 0)
        engine.backward((engine(x) - y).square().mean())
        engine.step()
        model.seen += 1
    return shard4bit.digest(engine), int(model.seen)


@pytest.mark.parametrize("stage", [1, 2])
def test_frozen_layers_and_buffers(stage: int, tmp_path: Path) -> None:
    first = pool(2).run(toy_run, str(tmp_path), stage, False)
    again = pool(2).run(toy_run, str(tmp_path), stage, True)
    assert len(set(first + again)) == 1 and first[0][1] == 4


def two_values(root: str) -> str:
    """What a checkpoint of another model is answered with; nothing has changed then."""
    engine = engine_of(Known({"odd": (129, 301), "other": (3, 4)}), config(2))
    before = shard4bit.digest(engine)
    with pytest.raises(Shard4bitError) as caught:
        shard4bit.load(root, engine)
    assert shard4bit.digest(engine) == before
    dist.barrier()
    return str(caught.value)


def test_another_model_is_refused(tmp_path: Path) -> None:
    pool(2).run(saved, str(tmp_path), {"stage": 1})
    for message in pool(2).run(two_values, str(tmp_path)):
        assert "lacks" in message and "other" in message, message


def parts_of_an_engine(root: str, options: dict[str, Any]) -> list[str]:
    """What loading into parts of an engine is answered with; nothing has changed then."""
    engine = engine_of(Known(), config(**options))
    shard4bit.save(root, engine, step=STEPS)
    other = blank(**options)
    before = shard4bit.digest(other)
    said = []
    for given in ((other.module, other.basic_optimizer), (other.module,), (engine, other.basic_optimizer)):
        with pytest.raises(CheckpointError) as caught:
            shard4bit.load(root, *given)
        said.append(str(caught.value))
    assert shard4bit.digest(other) == before and follows(other)
    model = Known()  # that no engine has
    shard4bit.load(root, model)
    shard4bit.load(root, other, other.basic_optimizer)
    assert shard4bit.digest(other) == shard4bit.digest(engine) and follows(other)
    return said


@pytest.mark.parametrize("options", [{"stage": 0}, {"stage": 2, "precision": "bf16+fp32"}], ids=str)
def test_parts_of_an_engine_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    for said in pool(2).run(parts_of_an_engine, str(tmp_path), options):
        assert all("give the engine alone" in message for message in said), said
        assert said[0].startswith("the optimizer") and said[1].startswith("the model"), said
