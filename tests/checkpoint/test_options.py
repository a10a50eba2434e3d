"""What save and load take beside a model: background saves, keep_last, extra, random numbers; and what
happens to the leftovers of dead saves."""

from __future__ import annotations

import logging
import math
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

import shard4bit
import tests
from shard4bit import inventory
from shard4bit.checkpoint import background, store, upkeep
from shard4bit.checkpoint.verify import verify
from shard4bit.errors import CheckpointError
from tests.fsdp import models
from tests.fsdp.models import Zoo, optimizer_of
from tests.pool import pool

SHAPES: dict[str, tuple[int, ...]] = {"a": (129, 301), "b": (70, 80), "bias": (301,), "tiny": (1,)}


def made(steps: int = 1, layout: str = "plain") -> tuple[Any, Any]:
    model = models.sharded(Zoo(SHAPES), layout)
    optimizer = optimizer_of("rank1", model.parameters())
    models.train(model, optimizer, steps)
    return model, optimizer


def steps_in(root: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in root.iterdir() if p.name.startswith("step-"))


# ---- in the background -------------------------------------------------------------------------


def train_on(root: str, collectives: int) -> tuple[str, str, list[float], bool]:
    """Save in the background and train on at once, with collectives of training in between; the digests
    at the time of saving and of loading, the sums of those collectives, whether it really overlapped."""
    model, optimizer = made(2, "fsdp")
    before, real, gate = shard4bit.digest(model, optimizer), store.write_file, threading.Event()

    def slow(*args: Any) -> Any:
        gate.wait(30)
        return real(*args)

    with mock.patch.object(store, "write_file", slow):
        saving = shard4bit.save(root, model, optimizer, step=2, asynchronous=True)
        overlapped = not saving.done()
        sums = []
        for number in range(collectives):
            if number == collectives // 2:
                gate.set()  # the thread's collectives now run among ours
            value = torch.tensor([float(number)])
            dist.all_reduce(value)
            sums.append(value.item())
        models.train(model, optimizer, 3, first=20)  # every tensor changes
        assert saving.wait() == saving.result() == Path(root) / "step-0000000002" and saving.done()
    fresh, again = made(1, "fsdp")
    shard4bit.load(root, fresh, again)
    return before, shard4bit.digest(fresh, again), sums, overlapped


def test_training_goes_on_during_a_save(tmp_path: Path) -> None:
    for before, after, sums, overlapped in pool(2).run(train_on, str(tmp_path), 40):
        assert before == after
        assert sums == [2.0 * n for n in range(40)]
        assert overlapped
    assert os.listdir(tmp_path) == ["step-0000000002"]
    assert verify(tmp_path / "step-0000000002") == []


def failing_behind(root: str, bad: int, ask: bool) -> tuple[list[str], bool, list[str]]:
    """A save in the background that fails on one rank; the errors that come, whether a later save works,
    and what lies in root meanwhile."""
    model, optimizer = made(1, "fsdp")
    real = store.write_file

    def full(*args: Any) -> Any:
        if dist.get_rank() == bad:
            raise OSError(28, "No space left on device")
        return real(*args)

    texts = []
    with mock.patch.object(store, "write_file", full):
        saving = shard4bit.save(root, model, optimizer, step=1, asynchronous=True)
        background.settle()
    dist.barrier()  # rank 0 may still be removing it
    left = os.listdir(root)
    dist.barrier()
    with pytest.raises(CheckpointError) as caught:
        saving.wait() if ask else shard4bit.save(root, model, optimizer, step=2)
    texts.append(str(caught.value))
    path = shard4bit.save(root, model, optimizer, step=3, asynchronous=True).wait()
    return texts, path.is_dir(), left


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("ask", [True, False])
def test_an_error_in_the_background_reaches_every_rank(bad: int, ask: bool, tmp_path: Path) -> None:
    for texts, saved, left in pool(2).run(failing_behind, str(tmp_path), bad, ask):
        assert all(f"rank {bad}" in t and "No space left" in t for t in texts)
        assert saved and left == []
    assert steps_in(tmp_path) == [3]


def test_one_save_in_flight(tmp_path: Path) -> None:
    """A second save, a load and a digest wait for the first."""
    model, optimizer = made()
    real, order = store.write_file, []

    def slow(*args: Any) -> Any:
        time.sleep(0.2)
        order.append(args[0].parent.name[:16])
        return real(*args)

    with mock.patch.object(store, "write_file", slow):
        first = shard4bit.save(tmp_path, model, optimizer, step=1, asynchronous=True)
        with pytest.raises(TimeoutError):
            first.wait(timeout=0.01)
        assert "being written" in repr(first)
        second = shard4bit.save(tmp_path, model, optimizer, step=2, asynchronous=True)
        assert first.done() and "done" in repr(first)
        assert shard4bit.load(tmp_path, model, optimizer).step == 2
        assert second.done() and order == [".step-0000000001", ".step-0000000002"]


def test_the_copy_is_let_go(tmp_path: Path) -> None:
    model, optimizer = made()
    saving = shard4bit.save(tmp_path, model, optimizer, step=1, asynchronous=True)
    saving.wait()
    assert saving._work is None


SCRIPT = """
import sys, time, torch, shard4bit
from unittest import mock
from shard4bit.checkpoint import store
real = store.write_file
def slow(*args):
    time.sleep(0.5)
    return real(*args)
store.write_file = slow
model = torch.nn.Linear(96, 96)
optimizer = shard4bit.AdamW4bit(model.parameters())
shard4bit.save(sys.argv[1], model, optimizer, step=1, asynchronous=True)
if sys.argv[2] == "raise":
    raise SystemExit(3)
"""


@pytest.mark.parametrize("how", [pytest.param("end", marks=pytest.mark.slow), "raise"])
def test_an_interpreter_that_exits_finishes_the_save(how: str, tmp_path: Path) -> None:
    root = Path(tests.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path), how], cwd=root, timeout=60)
    assert done.returncode == (3 if how == "raise" else 0)
    assert os.listdir(tmp_path) == ["step-0000000001"]
    assert verify(tmp_path / "step-0000000001") == []


# ---- ranks that disagree -----------------------------------------------------------------------

DIFFERENT: list[dict[str, Any]] = [
    {"asynchronous": True},
    {"step": 2},
    {"rng": True},
    {"frozen": False},
    {"parameters": False},
]


def disagreeing(root: str) -> tuple[list[str], bool]:
    """The error for each of DIFFERENT, given on the last rank alone, and whether a later save works."""
    model, optimizer = made(1, "fsdp")
    texts = []
    for other in DIFFERENT:
        given = {"step": 1, **(other if dist.get_rank() == 1 else {})}
        with pytest.raises(CheckpointError) as caught:
            shard4bit.save(root, model, optimizer, **given)
        texts.append(str(caught.value))
    return texts, shard4bit.save(root, model, optimizer, step=1, asynchronous=True).wait().is_dir()


def test_ranks_that_give_other_arguments(tmp_path: Path) -> None:
    for texts, saved in pool(2).run(disagreeing, str(tmp_path)):
        for text, other in zip(texts, DIFFERENT, strict=True):
            key, value = next(iter(other.items()))
            assert "rank 1 step=" in text and text.count(f"{key}=") == 2, text
            assert f"{key}={value}" in text.split("rank 1")[1] and "the same on every rank" in text
        assert saved
    assert steps_in(tmp_path) == [1]


# ---- keep_last ---------------------------------------------------------------------------------


def test_old_ones_are_removed_after_the_new_one_is_there(tmp_path: Path) -> None:
    model, optimizer = made()
    for step in (1, 2, 3, 40):
        shard4bit.save(tmp_path, model, optimizer, step=step)
    foreign = [tmp_path / "step-0000000000", tmp_path / "step-notes", tmp_path / "step-00000000001"]
    for path in foreign:
        path.mkdir()
        (path / "manifest.json").write_text("{}")
    (tmp_path / "step-0000000009").symlink_to(tmp_path / "step-0000000002")
    real, seen = store.remove_old, []

    def remove(root: Path, final: Path, keep: int) -> None:
        seen.append(final.is_dir() and (tmp_path / "step-0000000002").is_dir())
        real(root, final, keep)

    with mock.patch.object(store, "remove_old", remove):
        shard4bit.save(tmp_path, model, optimizer, step=20, keep_last=2)
    assert seen == [True]
    kept = {p.name for p in tmp_path.iterdir()}
    assert kept == {
        *(p.name for p in foreign),
        "step-0000000003",
        "step-0000000009",  # a link is nobody's checkpoint
        "step-0000000020",
        "step-0000000040",  # later than this step: another run's, perhaps
    }
    shard4bit.save(tmp_path, model, optimizer, step=21, keep_last=1, asynchronous=True).wait()
    assert not (tmp_path / "step-0000000003").exists() and not (tmp_path / "step-0000000020").exists()


def test_a_failed_save_removes_nothing(tmp_path: Path) -> None:
    model, optimizer = made()
    for step in (1, 2):
        shard4bit.save(tmp_path, model, optimizer, step=step)
    with mock.patch.object(os, "rename", side_effect=OSError(5, "broken")), pytest.raises(CheckpointError):
        shard4bit.save(tmp_path, model, optimizer, step=3, keep_last=1)
    assert steps_in(tmp_path) == [1, 2]
    with pytest.raises(CheckpointError, match="keep_last=0"):
        shard4bit.save(tmp_path, model, optimizer, step=3, keep_last=0)


def test_what_cannot_be_removed_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = made()
    shard4bit.save(tmp_path, model, optimizer, step=1)
    with (
        mock.patch.object(upkeep, "_remove", side_effect=OSError(13, "denied")),
        caplog.at_level(logging.WARNING),
    ):
        shard4bit.save(tmp_path, model, optimizer, step=2, keep_last=1)
    assert steps_in(tmp_path) == [1, 2]
    assert "denied" in caplog.text


# ---- leftovers ---------------------------------------------------------------------------------


def test_leftovers_of_the_surely_dead_are_removed(tmp_path: Path) -> None:
    model, optimizer = made()
    here, elsewhere = upkeep.machine(), "0123abcd"
    names = {
        "dead": f".step-0000000001-{here}-00000001",
        "alive": f".step-0000000001-{here}-00000002",
        "dead at once": f".step-0000000001-{here}-00000003",
        "elsewhere": f".step-0000000001-{elsewhere}-00000004",
        "long quiet": f".step-0000000001-{elsewhere}-00000005",
        "foreign": ".step-notes",
    }
    for what, name in names.items():
        (tmp_path / name).mkdir()
        if what != "dead at once":
            (tmp_path / name / "rank-00000.safetensors").write_text("x")
    old = time.time() - upkeep.QUIET_SECONDS - 10
    for path in (tmp_path / names["long quiet"] / "rank-00000.safetensors", tmp_path / names["long quiet"]):
        os.utime(path, (old, old))
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("x")
    (tmp_path / f".step-0000000001-{here}-00000006").symlink_to(outside)
    program = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), 2); print(1, flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / names["alive"])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"1\n"
        shard4bit.save(tmp_path, model, optimizer, step=1)
    finally:
        holder.kill()
        holder.wait()
    left = {what for what, name in names.items() if (tmp_path / name).exists()}
    assert left == {"alive", "elsewhere", "foreign"}
    assert (outside / "file").exists()


# ---- extra -------------------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    if isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.equal(b)
    if isinstance(b, float) and math.isnan(b):
        return math.isnan(a)
    if isinstance(b, dict):
        return type(a) is type(b) and set(a) == set(b) and all(same(a[k], b[k]) for k in b)
    if isinstance(b, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


EXTRAS: list[Any] = [
    None,
    {"ä": [1, None, True, 2.5, "x\ud800"], "": {}, "big": 10**300},
    [math.inf, -math.inf, math.nan, -0.0, (1, (2,)), ()],
    {3: 1, (1, 2): "x", None: [{5.5: 1}]},
    {"$tensor": 1},
    {"milestones": Counter({4: 1, 2: 3}), "words": Counter("abba"), "none": Counter(), "$counter": [[1, 2]]},
    {"$tensor": [0, []], "other": 1},
    {"a": torch.arange(24.0).view(2, 3, 4).bfloat16(), "b": [torch.tensor(7), torch.zeros(0, 3)]},
    [torch.tensor([True, False]), torch.arange(6).view(2, 3).t(), {"x": torch.tensor([], dtype=torch.int8)}],
]


@pytest.mark.parametrize("extra", EXTRAS, ids=range(len(EXTRAS)))
def test_extra_comes_back_as_it_was(extra: Any, tmp_path: Path) -> None:
    model = Zoo({"b": (5,)})
    path = shard4bit.save(tmp_path, model, step=1, extra=extra)
    loaded = shard4bit.load(tmp_path, model)
    assert same(loaded.extra, extra), loaded.extra
    assert loaded.skipped == [] and verify(path) == []


def on_ranks(root: str) -> Any:
    model, optimizer = made(1, "fsdp")
    extra = {"rank": dist.get_rank(), "t": torch.full((3,), dist.get_rank())}
    shard4bit.save(root, model, optimizer, step=1, extra=extra)
    return shard4bit.load(root, model, optimizer).extra


def test_the_first_ranks_extra_counts(tmp_path: Path) -> None:
    for extra in pool(3).run(on_ranks, str(tmp_path)):
        assert same(extra, {"rank": 0, "t": torch.zeros(3, dtype=torch.int64)})


SCHEDULERS: dict[str, Any] = {
    "multistep": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4]),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20, cycle_momentum=False),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, [lambda s: 0.9**s]),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, total_iters=3), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        [3],
    ),
    "multistep in a sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, total_iters=2),
            torch.optim.lr_scheduler.MultiStepLR(o, [2, 4]),
        ],
        [2],
    ),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_go_on(kind: str, tmp_path: Path) -> None:
    def rates(count: int, optimizer: Any, scheduler: Any) -> list[float]:
        out = []
        for _ in range(count):
            optimizer.step()
            scheduler.step(1.0) if kind == "plateau" else scheduler.step()
            out.append(optimizer.param_groups[0]["lr"])
        return out

    def start() -> tuple[Any, Any, Any]:
        model = Zoo({"b": (5,)})
        optimizer = optimizer_of("rank1", model.parameters(), lr=0.5)
        return model, optimizer, SCHEDULERS[kind](optimizer)

    model, optimizer, scheduler = start()
    rates(3, optimizer, scheduler)
    shard4bit.save(tmp_path, model, optimizer, step=3, extra={"scheduler": scheduler.state_dict()})
    expected = rates(4, optimizer, scheduler)
    model, optimizer, scheduler = start()
    scheduler.load_state_dict(shard4bit.load(tmp_path, model, optimizer).extra["scheduler"])
    assert rates(4, optimizer, scheduler) == expected


class Scaled(torch.nn.Linear):
    """As layers of fp8 libraries are."""

    def get_extra_state(self) -> Any:
        return {"scale": 2.0}

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("nothing was saved")


def test_extra_states_of_modules_are_said_to_be_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory, "_warned", set())
    model = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Sequential(Scaled(5, 5)))
    for step in range(3):
        shard4bit.save(tmp_path, model, step=step)
    shard4bit.load(tmp_path, model)
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) == 1 and "get_extra_state() of modules gives: 1.0; save it in extra" in said[0]


# ---- random numbers ----------------------------------------------------------------------------


def draws() -> list[float]:
    values = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.standard_normal()]
    return [*values, torch.rand(1).item(), torch.randn(1).item()]


def seeded(root: str) -> list[float]:
    """Save between draws; those after it."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    random.seed(rank), np.random.seed(rank), torch.manual_seed(rank)
    draws()  # leaves half a pair of Gaussians behind
    shard4bit.save(root, Zoo({"b": (5,)}), step=1, rng=True)
    return draws()


def reseeded(root: str, use: bool) -> tuple[list[float], list[str], bool]:
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    loaded = shard4bit.load(root, Zoo({"b": (5,)}), rng=use)
    return draws(), loaded.skipped, loaded.rng


def test_random_numbers_go_on(tmp_path: Path) -> None:
    first = pool(2).run(seeded, str(tmp_path))
    assert first[0] != first[1]
    for expected, (found, skipped, used) in zip(
        first, pool(2).run(reseeded, str(tmp_path), True), strict=True
    ):
        assert found == expected and skipped == [] and used
    untouched = pool(2).run(reseeded, str(tmp_path), False)
    assert untouched[0] == untouched[1] and not untouched[0][2]
    for found, skipped, used in [*pool(3).run(reseeded, str(tmp_path), True), reseeded(str(tmp_path), True)]:
        assert found == untouched[0][0] and not used
        assert skipped == ["rng/numpy", "rng/python", "rng/torch"]
