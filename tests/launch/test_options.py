"""--fresh, --resume, --keep-last and --check-only, on one rank and where ranks know different things."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from launch.folders import newest_first, step_name
from tests.launch.running import ROOT, TINY, call, fails, train
from tests.pool import pool

AGAIN = "TORCHELASTIC_RESTART_COUNT"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    text = tmp_path_factory.mktemp("data") / "text.txt"
    text.write_text("Every rank keeps its shard, and every shard its four bits.\n" * 100)
    return [*TINY, "--data", str(text)]


def test_keep_last(base: list[str], tmp_path: Path) -> None:
    train([*base, "--out", str(tmp_path), "--steps", "5", "--save-every", "1", "--keep-last", "2"])
    assert [p.name for p in newest_first(tmp_path / "checkpoints")] == [step_name(5), step_name(4)]


def test_fresh_overwrites_nothing(base: list[str], tmp_path: Path) -> None:
    want = [*base, "--out", str(tmp_path), "--steps", "1", "--fresh"]
    assert train(want)["first_step"] == 0
    before = (tmp_path / "checkpoints" / step_name(1) / "manifest.json").stat().st_mtime_ns
    assert str(tmp_path / "checkpoints" / step_name(1)) in fails(want)
    assert (tmp_path / "checkpoints" / step_name(1) / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", [AGAIN, pytest.param("SLURM_RESTART_COUNT", marks=pytest.mark.slow)])
def test_fresh_and_resume_are_of_the_first_start(
    name: str, base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, out = tmp_path / "first", ["--out", str(tmp_path / "second")]
    train([*base, "--out", str(first), "--steps", "2", "--save-at", "2"])
    resume = [*base, *out, "--resume", str(first / "checkpoints"), "--save-every", "1"]
    assert train([*resume, "--steps", "3"])["first_step"] == 2
    assert "goes beyond it: give another --out" in fails([*resume, "--steps", "4"])
    monkeypatch.setenv(name, "1")
    assert train([*resume, "--steps", "4"])["first_step"] == 3
    assert train([*base, *out, "--fresh", "--steps", "5"])["first_step"] == 4
    assert train([*resume, "--steps", "5", "--check-only"])["first_step"] == 2
    nothing = ["--out", str(tmp_path / "third"), "--steps", "3"]
    assert train([*base, "--resume", str(first / "checkpoints"), *nothing])["first_step"] == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rounding", "nearest"], "has rounding=stochastic, this run was given rounding=nearest"),
        (["--no-compensate"], "has compensate=True, this run was given compensate=False"),
    ],
)
def test_options_that_the_checkpoint_has_otherwise(
    given: list[str], message: str, base: list[str], tmp_path: Path
) -> None:
    want = [*base, "--out", str(tmp_path), "--save-every", "1"]
    train([*want, "--rounding", "stochastic", "--compensate", "--steps", "1"])
    said = fails([*want, *given, "--steps", "2"])
    assert message in said and "leave the option out" in said
    assert train([*want, "--rounding", "stochastic", "--steps", "2"])["first_step"] == 1
    assert train([*want, "--steps", "3"])["first_step"] == 2


def test_another_second_moment_needs_another_folder(base: list[str], tmp_path: Path) -> None:
    want = [*base, "--out", str(tmp_path), "--save-every", "1"]
    train([*want, "--steps", "1"])
    assert "give another --out to start anew" in fails([*want, "--steps", "2", "--second-moment", "block"])


def test_what_cannot_be_written_is_noticed_before_training(base: list[str], tmp_path: Path) -> None:
    file, free = tmp_path / "file", tmp_path / "free"
    file.write_text("")
    never = ["--save-every", "0", "--steps", "1"]
    for options, message in (
        (["--steps", "1", "--out", str(file / "run")], "cannot be made"),
        ([*never, "--out", str(free), "--results", str(file / "a" / "b.json")], "--results: "),
        ([*never, "--out", str(free), "--results", str(tmp_path)], "expected a file"),
    ):
        assert message in fails([*base, *options, "--data", "nowhere"])
    for said in pool(2).run(fails, [*base, "--steps", "1", "--out", str(file)]):
        assert "cannot be" in said or "first rank" in said
    assert not free.exists()


def test_wrong_folders_of_torchs_checkpoints(base: list[str], tmp_path: Path) -> None:
    ours, theirs, none = tmp_path / "ours", tmp_path / "theirs", tmp_path / "none"
    train([*base, "--out", str(ours), "--steps", "1"])
    adamw = [*base, "--optimizer", "adamw", "--save-every", "1"]
    train([*adamw, "--out", str(theirs), "--steps", "1"])
    want = [*adamw, "--out", str(tmp_path / "new"), "--steps", "2", "--resume"]
    assert f"there is no checkpoint in {none}" in fails([*want, str(none)])
    assert f"there is no checkpoint in {theirs}" in fails([*want, str(theirs)])
    assert "of another kind of optimizer" in fails([*want, str(ours / "checkpoints")])
    step = theirs / "checkpoints-torch" / step_name(1)
    assert train([*want, str(step)])["first_step"] == 1
    (step / "run.json").write_text("[]")
    assert "is damaged" in fails([*want, str(step.parent)])


def on_a_later_node(arguments: list[str]) -> Any:
    """A run that only rank 1's torchrun has started again."""
    if dist.get_rank() == 1:
        os.environ[AGAIN] = "1"
    try:
        return train(arguments)["first_step"]
    except ValueError as error:
        return str(error)
    finally:
        os.environ.pop(AGAIN, None)


def test_all_ranks_take_the_same_checkpoint(base: list[str], tmp_path: Path) -> None:
    first, second = tmp_path / "first", ["--out", str(tmp_path / "second")]
    pool(2).run(train, [*base, "--out", str(first), "--steps", "1", "--save-at", "1"])
    resume = ["--resume", str(first / "checkpoints")]
    pool(2).run(train, [*base, *second, *resume, "--steps", "2"])
    assert pool(2).run(on_a_later_node, [*base, *second, *resume, "--steps", "3"]) == [2, 2]
    assert pool(2).run(on_a_later_node, [*base, *second, "--fresh", "--steps", "4"]) == [3, 3]
    refused = pool(2).run(fails, [*base, *second, "--fresh", "--steps", "4"])
    assert all("--fresh overwrites nothing" in words for words in refused)


def test_fresh_is_refused_before_ranks_are_started(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / step_name(1)).mkdir(parents=True)
    command = [sys.executable, "-m", "launch.options", "--out", str(tmp_path), "--fresh"]
    done = call(*command)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--fresh overwrites nothing" in done.stderr
    assert call(*command, SLURM_RESTART_COUNT="1").returncode == 0


TWICE = """
import signal, sys
from launch.stopping import PATIENCE, Stop
stop = Stop()
signal.raise_signal(signal.SIGINT)
signal.raise_signal(signal.SIGTERM)
print(signal.Signals(stop.signum).name, flush=True)
stop._since -= PATIENCE
signal.raise_signal(signal.SIGTERM)
print("not reached")
"""


def test_a_second_signal_ends_the_process_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", TWICE], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "SIGINT\n", done.stderr
    assert done.returncode == -signal.SIGTERM
