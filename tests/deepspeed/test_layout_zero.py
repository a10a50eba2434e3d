"""Where engines keep parameters: the integers, what is read of DeepSpeed's insides, and reading states."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shard4bit
from shard4bit.errors import LayoutError
from tests.deepspeed import engines
from tests.deepspeed.engines import Known, config, engine_of, needs_deepspeed
from tests.fsdp import models
from tests.fsdp.models import SHAPES, Zoo
from tests.pool import pool

pytestmark = needs_deepspeed
ROOT = Path(__file__).resolve().parents[2]

# ---- integers -----------------------------------------------------------------------------------------


def test_runs_of_all_ranks_are_the_parameters() -> None:
    from shard4bit.deepspeed.flat import run_of

    rng = np.random.default_rng(0)
    for _ in range(300):
        world, part = int(rng.integers(1, 6)), int(rng.integers(1, 40))
        offset, taken = 0, set()
        while True:
            offset += int(rng.integers(0, 4))  # a gap
            numel = int(rng.integers(1, 50))
            if offset + numel > world * part:
                break
            runs = [run_of(offset, numel, part, rank, world) for rank in range(world)]
            assert {run.edges for run in runs} == {runs[0].edges} and runs[0].edges[0] == 0
            covered = []
            for rank, run in enumerate(runs):
                assert (run.start, run.stop) == run.edges[rank : rank + 2]
                covered += range(run.start, run.stop)
                for i in range(run.start, run.stop):
                    place = rank * part + run.at + i - run.start
                    assert place == offset + i and 0 <= run.at + i - run.start < part
                    taken.add(place)
            assert covered == list(range(numel))
            offset += numel


# ---- insides ------------------------------------------------------------------------------------------


def broken(what: str) -> None:
    """Build an engine of a DeepSpeed of which one thing is otherwise."""
    engines.deepspeed()
    from deepspeed.runtime import engine as runtime
    from deepspeed.runtime.zero import stage_1_and_2 as zero

    from shard4bit.deepspeed import layout

    cls = zero.DeepSpeedZeroOptimizer
    after = cls._enable_universal_checkpoint  # called at the end of its initialization

    def changed(change: Callable[[Any], None]) -> Callable[[Any], None]:
        def method(self: Any) -> None:
            after(self)
            change(self)

        return method

    def shift(self: Any) -> None:
        self.bit16_groups_flat[0] = self.bit16_groups_flat[0].clone()

    def swap(self: Any) -> None:
        self.single_partition_of_fp32_groups[0].data.mul_(3)

    def shrink(self: Any) -> None:
        self.bit16_groups_flat[0] = self.bit16_groups_flat[0][:-2]

    patches: dict[str, Any] = {
        "no list": lambda: setattr(
            cls, "_enable_universal_checkpoint", changed(lambda s: delattr(s, "bit16_groups_flat"))
        ),
        "no views": lambda: setattr(cls, "_enable_universal_checkpoint", changed(shift)),
        "no copy": lambda: setattr(cls, "_enable_universal_checkpoint", changed(swap)),
        "other size": lambda: setattr(cls, "_enable_universal_checkpoint", changed(shrink)),
        "other wrapper": lambda: setattr(cls, "__name__", "ZeroOptimizerV2"),
        "no names": lambda: delattr(runtime.DeepSpeedEngine, "param_names"),
    }
    try:
        if what == "no method":
            layout.read(runtime.DeepSpeedEngine, "_configure_everything")
        if what == "no names":
            layout.names_of(runtime.DeepSpeedEngine)
        patches[what]()
        engine_of(Known(), config(2))
    finally:
        cls._enable_universal_checkpoint = after
        cls.__name__ = "DeepSpeedZeroOptimizer"


INSIDES = [
    ("no list", "DeepSpeedZeroOptimizer has no bit16_groups_flat"),
    ("no views", "is not a view of its group's flat buffer"),
    ("no copy", "is not a copy of this rank's part"),
    ("other size", "does not hold an equal part"),
    ("other wrapper", "wraps the optimizer in ZeroOptimizerV2"),
    ("no method", "DeepSpeedEngine has no _configure_everything"),
    ("no names", "DeepSpeedEngine has no param_names"),
]


@pytest.mark.parametrize("what, message", INSIDES, ids=[what for what, _ in INSIDES])
def test_other_insides_are_noticed(what: str, message: str) -> None:
    for outcome in pool(2).outcomes(broken, what):
        assert outcome[0] == "error" and isinstance(outcome[1], LayoutError), outcome[:2]
        assert message in str(outcome[1]) and "(0.16.9, 0.19.8)" in str(outcome[1]), outcome[1]


class Otherwise:
    """An engine without one of its attributes."""

    def __init__(self, engine: Any, lacks: str) -> None:
        self._engine, self._lacks = engine, lacks

    def __getattr__(self, name: str) -> Any:
        if name == self._lacks:
            raise AttributeError(name)
        return getattr(self._engine, name)


def without(names: list[str]) -> list[str]:
    """What is said to engines, each without one of the attributes that the refusals ask for."""
    from shard4bit.deepspeed import attach

    engine, said = engine_of(Known(), config(0)), []
    attach.refuse(Otherwise(engine, ""), engine.basic_optimizer)
    for name in names:
        with pytest.raises(LayoutError) as caught:
            attach.refuse(Otherwise(engine, name), engine.basic_optimizer)
        said.append(str(caught.value))
    return said


ASKED = [
    "zero_optimization_stage", "zero_offload_optimizer", "zero_elastic_checkpoint",
    "load_universal_checkpoint", "has_moe_layers", "pipeline_parallelism", "mp_world_size", "param_names",
]  # fmt: skip
LATER = ["zenflow", "autotp_size", "torch_autocast_enabled"]  # not in the oldest version


def test_no_refusal_is_dropped_silently() -> None:
    names = [*ASKED, *(() if engines.OLD else LATER)]
    for said in pool(2).run(without, names):
        for name, message in zip(names, said, strict=True):
            assert f"Otherwise has no {name}" in message and "(0.16.9, 0.19.8)" in message, message


def versions() -> tuple[str, tuple[str, ...]]:
    from shard4bit.deepspeed.versions import KNOWN_VERSIONS

    return engines.deepspeed().__version__, KNOWN_VERSIONS


def test_the_installed_version_is_a_known_one() -> None:
    installed, known = pool(2).run(versions)[0]
    assert installed in known


UNKNOWN = """
import warnings
import deepspeed, torch
from deepspeed.runtime.engine import DeepSpeedEngine
del DeepSpeedEngine._configure_lr_scheduler
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import shard4bit.deepspeed
print([str(w.message) for w in caught if "0.16.9, 0.19.8" in str(w.message)])
try:
    torch.optim.AdamW4bit([torch.zeros(3)])
except shard4bit.LayoutError as error:
    print(error)
"""


def test_a_deepspeed_that_cannot_be_attached_to() -> None:
    """Importing warns, because FSDP's users may have such a DeepSpeed; asking for an optimizer raises."""
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", UNKNOWN]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=100)
    warning, error = done.stdout.splitlines()[-2:]
    for text in (warning, error):
        assert "DeepSpeedEngine has no _configure_lr_scheduler" in text, done.stdout + done.stderr


def attached_once() -> bool:
    engines.deepspeed()
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS as accepted

    import shard4bit.deepspeed.attach

    before = DeepSpeedEngine._do_optimizer_sanity_check, list(accepted)
    shard4bit.deepspeed.attach.install()
    return before == (DeepSpeedEngine._do_optimizer_sanity_check, list(accepted))


def test_installing_twice_changes_nothing() -> None:
    assert pool(2).run(attached_once) == [True, True]


def added_late() -> str:
    engine = engine_of(Known(), config(2))
    engine.basic_optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(4))]})
    with pytest.raises(LayoutError) as caught:
        engine.basic_optimizer.bind()
    return str(caught.value)


def test_parameters_that_are_added_late_are_refused() -> None:
    assert all("after deepspeed.initialize" in message for message in pool(2).run(added_late))


# ---- reading ------------------------------------------------------------------------------------------


def read_all(stage: int, zero: dict[str, Any]) -> Any:
    engine = engine_of(Known(), config(stage, zero=zero))
    engines.train(engine, 2)
    whole = {}
    for name in SHAPES:
        for moment in ("exp_avg", "exp_avg_sq"):
            values = shard4bit.deepspeed.full_moment(engine, name, moment)
            again = shard4bit.deepspeed.full_moment(engine, engine.module.get_parameter(name), moment)
            assert torch.equal(values, again)
            part, start = shard4bit.deepspeed.local_moment(engine, name, moment)
            assert torch.equal(part, values.reshape(-1)[start : start + len(part)])
            whole[f"{name}/{moment}"] = values.numpy().copy()
    errors = []
    for name, moment in (("od", "exp_avg"), ("odd", "momentum"), (torch.zeros(3), "exp_avg")):
        with pytest.raises(ValueError) as caught:
            shard4bit.deepspeed.full_moment(engine, name, moment)
        errors.append(str(caught.value))
    return whole, errors


@pytest.mark.parametrize("world, stage, zero", [(2, 0, {}), (3, 2, {"round_robin_gradients": True})])
def test_moments_of_parameters(world: int, stage: int, zero: dict[str, Any]) -> None:
    model = Zoo()
    optimizer = models.optimizer_of("rank1", model.parameters())
    models.train(model, optimizer, 2)
    expected = {
        f"{name}/{moment}": optimizer.moment(param, moment).numpy()
        for name, param in model.named_parameters()
        for moment in ("exp_avg", "exp_avg_sq")
    }
    for found, errors in pool(world).run(read_all, stage, zero):
        models.same(found, expected, (world, stage))
        assert "has no 'od'" in errors[0] and "'momentum'" in errors[1] and "shape (3,)" in errors[2]
