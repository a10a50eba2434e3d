"""What --tensorboard writes, read back with TensorBoard's own reader."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launch.running import TINY, fails, train
from tests.pool import pool

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="no tensorboard: see requirements-dev.txt"
)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    text = tmp_path_factory.mktemp("data") / "text.txt"
    text.write_text("Every rank keeps its shard, and every shard its four bits.\n" * 100)
    return [*TINY, "--data", str(text), "--steps", "6", "--lr", "2e-3", "--tensorboard"]


def read(out: Path) -> dict[str, dict[int, float]]:
    """tag -> step -> value"""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore

    found = EventAccumulator(str(out / "tensorboard"))
    found.Reload()
    tags = found.Tags()["scalars"]
    values: dict[str, dict[int, float]] = {}
    for tag in tags:
        events = found.Scalars(tag)
        values[tag] = {event.step: event.value for event in events}
        assert len(values[tag]) == len(events), f"{tag}: a step twice"
    return values


@pytest.mark.slow
@needs_tensorboard
def test_scalars_of_a_run_that_is_stopped_and_goes_on(options: list[str], tmp_path: Path) -> None:
    want: list[Any] = [*options, "--out", str(tmp_path), "--save-every", "2"]
    stopped = pool(2).run(train, want, 1, 3)[0]
    assert stopped["stopped"] == 3
    rest = pool(2).run(train, want)[0]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2  # one file a run: only the first rank writes
    found = read(tmp_path)
    assert set(found) == {"loss/train", "loss/validation", "lr", "ms/step", "ms/optimizer"}
    losses = stopped["losses"] + rest["losses"]
    assert found["loss/train"] == pytest.approx(dict(enumerate(losses, 1)), rel=1e-6)
    assert found["lr"] == pytest.approx({1: 1e-3, **dict.fromkeys(range(2, 7), 2e-3)}, rel=1e-6)
    assert set(found["loss/validation"]) == {2, 4, 6}  # not at the stop
    assert found["loss/validation"][6] == pytest.approx(rest["val_loss"], rel=1e-6)
    assert all(0 < found["ms/optimizer"][s] < found["ms/step"][s] for s in range(1, 7))
    times = [found["ms/step"][s] for s in range(4, 7)]
    assert sum(times) / 3 == pytest.approx(rest["step_ms"]["mean"], rel=1e-4)


@needs_tensorboard
def test_steps_that_are_done_again_are_shown_once(options: list[str], tmp_path: Path) -> None:
    want = [*options, "--out", str(tmp_path)]
    train([*want, "--save-at", "2"])  # as if it had been killed at its end
    again = train([*want, "--save-every", "0"])
    assert again["first_step"] == 2
    found = read(tmp_path)
    assert sorted(found["loss/train"]) == [1, 2, 3, 4, 5, 6]
    assert found["loss/validation"][6] == pytest.approx(again["val_loss"], rel=1e-6)


def without(arguments: list[str]) -> str:
    """What a rank that has no tensorboard says."""
    before = sys.modules.get("torch.utils.tensorboard")
    sys.modules["torch.utils.tensorboard"] = None  # type: ignore[assignment]
    try:
        return fails(arguments)
    finally:
        del sys.modules["torch.utils.tensorboard"]
        if before is not None:
            sys.modules["torch.utils.tensorboard"] = before


def test_without_tensorboard_all_ranks_say_so(options: list[str], tmp_path: Path) -> None:
    for said in pool(2).run(without, [*options, "--out", str(tmp_path)]):
        assert said == "--tensorboard needs the package tensorboard: pip install tensorboard"


def test_without_the_option_there_is_no_folder(options: list[str], tmp_path: Path) -> None:
    train([*options[:-1], "--steps", "1", "--out", str(tmp_path), "--save-every", "0"])
    assert not (tmp_path / "tensorboard").exists()
