"""Every engine trains alike: losses, digests, precisions, optimizers, and what does not go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch import scaling
from tests.deepspeed.engines import HAVE, deepspeed, needs_deepspeed
from tests.launch.running import SMALL, TINY, fails, train
from tests.pool import pool

SHARDED = ["ddp", "fsdp1", "fsdp2", *(["zero1", "zero2"] if HAVE else [])]
NEVER = ["--save-every", "0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    text = tmp_path_factory.mktemp("data") / "text.txt"
    text.write_text("Every rank keeps its shard, and every shard its four bits.\n" * 100)
    return ["--data", str(text)]


def on_two(*arguments: str) -> dict[str, Any]:
    return pool(2).run(train, list(arguments))[0]


@pytest.mark.parametrize(
    "model",
    [
        TINY,
        [*SMALL, "--preset", "llama-tiny", "--layers", "1"],
        [*TINY, "--compensate", "--rounding", "stochastic"],
    ],
    ids=["gpt", "llama", "stochastic"],
)
def test_engines_agree(model: list[str], data: list[str], tmp_path: Path) -> None:
    """Losses do not depend on engine or ranks; and on two ranks, whose gradients are summed exactly in one
    way, all engines hold the same bits of weights and states."""
    common = [*model, *data, *NEVER, "--steps", "3", "--out", str(tmp_path)]
    alone = train([*common, "--engine", "single"])
    found = {engine: on_two(*common, "--engine", engine) for engine in SHARDED}
    assert alone["losses"][-1] < alone["losses"][0]
    for engine, results in found.items():
        assert (results["engine"], results["world_size"]) == (engine, 2)
        assert results["losses"] == pytest.approx(alone["losses"], abs=1e-4), engine
        assert results["val_loss"] == pytest.approx(alone["val_loss"], abs=1e-3), engine
        assert results["parameters"] == alone["parameters"]
    assert len({results["digest"] for results in found.values()}) == 1, found


def test_auto_engine(data: list[str], tmp_path: Path) -> None:
    common = [*TINY, *data, *NEVER, "--steps", "1", "--out", str(tmp_path)]
    assert train(common)["engine"] == "single"
    assert on_two(*common)["engine"] == "fsdp2"


HALVES = [(e, "bf16") for e in ("single", *SHARDED)] + [
    (e, "fp16") for e in ("single", "ddp", "fsdp1", "fsdp2")
]


@pytest.mark.parametrize(("engine", "precision"), HALVES)
def test_half_precisions(engine: str, precision: str, data: list[str], tmp_path: Path) -> None:
    common = [*TINY, *data, *NEVER, "--steps", "3", "--out", str(tmp_path), "--engine", engine]
    exact = train([*common[:-1], "single"])["losses"]
    rough = [*common, "--precision", precision]
    results = train(rough) if engine == "single" else on_two(*rough)
    assert results["losses"] == pytest.approx(exact, abs=0.1)
    assert results["losses"] != pytest.approx(exact, abs=1e-6)  # it was not fp32
    assert results["losses"][-1] < results["losses"][0]


#: of the engines that are alike, one here; all in `make test-all`
OPTIMIZERS = [
    pytest.param(optimizer, engine, marks=[pytest.mark.slow] if engine in ("ddp", "fsdp1", "zero1") else [])
    for optimizer in ("sgd4bit", "adamw8bit", "adamw")
    for engine in ["single", *SHARDED]
]


@pytest.mark.parametrize("optimizer, engine", OPTIMIZERS)
def test_optimizers(engine: str, optimizer: str, data: list[str], tmp_path: Path) -> None:
    common = [*TINY, *data, *NEVER, "--steps", "2", "--out", str(tmp_path)]
    arguments = [*common, "--engine", engine, "--optimizer", optimizer]
    results = train(arguments) if engine == "single" else on_two(*arguments)
    assert results["losses"][1] < results["losses"][0]
    low, high = {"sgd4bit": (0.5, 0.7), "adamw8bit": (2.0, 2.2), "adamw": (8.0, 8.3)}[optimizer]
    copies = 2 if engine == "ddp" else 1
    assert low < results["state_bytes_per_parameter"] / copies < high
    assert (results["digest"] is None) == (optimizer == "adamw")


@pytest.mark.parametrize(
    ("arguments", "ranks", "message"),
    [
        (["--engine", "ddp"], 1, "--engine ddp needs ranks"),
        (["--engine", "zero2"], 1, "--engine zero2 needs ranks"),
        (["--engine", "single"], 2, "is for one process, not 2"),
        (["--batch", "1"], 2, "a batch of 1 sequences for 2 ranks"),
        (["--optimizer", "bnb-adamw8bit"], 1, "needs the package bitsandbytes"),
        (["--data", "nowhere"], 1, "nowhere: no such file"),
    ],
)
def test_what_does_not_go_together(
    arguments: list[str], ranks: int, message: str, data: list[str], tmp_path: Path
) -> None:
    want = [*TINY, *data, *NEVER, "--steps", "1", "--out", str(tmp_path), *arguments]
    for found in [fails(want)] if ranks == 1 else pool(2).run(fails, want):
        assert message in found and "\n" not in found


def test_deepspeed_missing_gives_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from launch.cluster import Cluster
    from launch.engines import _deepspeed

    monkeypatch.setitem(__import__("sys").modules, "deepspeed", None)
    with pytest.raises(ValueError, match="need DeepSpeed: DS_BUILD_OPS=0 pip install"):
        _deepspeed(Cluster(0, 1, torch.device("cpu"), "gloo"))


def fails_as_shipped(want: list[str]) -> str:
    """With the accelerator as DeepSpeed has it, whatever other tests in this process told it (engines.py)."""
    from deepspeed.accelerator import get_accelerator

    vars(get_accelerator()).pop("is_fp16_supported", None)
    return fails(want)


@needs_deepspeed
def test_zero_with_fp16_on_the_cpu_is_refused_in_one_line(data: list[str], tmp_path: Path) -> None:
    want = [*TINY, *data, *NEVER, "--steps", "1", "--out", str(tmp_path), "--engine", "zero2"]
    for found in pool(2).run(fails_as_shipped, [*want, "--precision", "fp16"]):
        assert "fp16" in found and "\n" not in found


def scalers() -> tuple[Any, Any]:
    import torch
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    own = {"min_scale": 1, "delayed_shift": 2, "consecutive_hysteresis": False}
    theirs = DynamicLossScaler(init_scale=2.0**20, scale_window=1000, **own)
    return torch.amp.GradScaler("cpu", init_scale=2.0**10), theirs


TORCHS = {"scale": 512.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
ZEROS = {"cur_scale": 512.0, "cur_iter": 2017, "last_overflow_iter": 9, "cur_hysteresis": 1, "min_scale": 1}
SAVED = [  # what a checkpoint may have, and the steps since the scale last changed
    pytest.param({**TORCHS, "_growth_tracker": 7}, 7, id="torch's, of old"),
    pytest.param(ZEROS, 2007, id="deepspeed's, of old"),
    pytest.param({"loss_scale": {"scale": 512.0, "clean": 7, "later": 1}}, 7, id="any"),
]


@needs_deepspeed
@pytest.mark.parametrize(("state", "clean"), SAVED)
def test_the_loss_scaler_goes_from_engine_to_engine(state: dict[str, Any], clean: int) -> None:
    ours, theirs = scalers()
    known = set(vars(theirs))
    scaling.for_torch(state, ours)
    scaling.for_deepspeed(state, theirs)
    assert ours.state_dict() == {**TORCHS, "_growth_tracker": clean % 2000}
    assert (theirs.cur_scale, theirs.cur_iter - theirs.last_overflow_iter - 1) == (512.0, clean)
    assert theirs.cur_hysteresis == (1 if state is ZEROS else 2) and set(vars(theirs)) == known
    again, other = scalers()
    scaling.for_torch(scaling.saved(vars(theirs)), again)
    scaling.for_deepspeed(scaling.saved(vars(theirs)), other)
    assert again.state_dict() == ours.state_dict()
    assert scaling.saved(vars(other)) == scaling.saved(vars(theirs))
    for strange in ({}, {"else": 1}):
        scaling.for_torch(strange, again)
        scaling.for_deepspeed(strange, other)
    assert again.state_dict() == ours.state_dict()


def with_fp16(want: list[str]) -> dict[str, Any]:
    deepspeed()  # with torch's CPU operators for fp16
    return train(want)


@needs_deepspeed
def test_fp16_goes_on_with_another_engine(data: list[str], tmp_path: Path) -> None:
    want = [*TINY, *data, "--out", str(tmp_path), "--save-every", "1", "--precision", "fp16"]
    for first, engine in enumerate(("zero2", "fsdp2", "zero2")):
        step = ["--engine", engine, "--steps", str(first + 1)]
        assert pool(2).run(with_fp16, [*want, *step])[0]["first_step"] == first
