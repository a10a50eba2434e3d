"""The demo on 2 ranks with few steps, in test pools and as a user runs it; messages of wrong options."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch import demo
from tests.launch.running import train
from tests.pool import pool

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str, limit: float = 200) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=limit,
    )


@pytest.fixture
def few_steps(tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("Every rank keeps its shard, and every shard its four bits.\n" * 200)
    return ["--device", "cpu", "--data", str(text), "--steps", "6", "--out", str(tmp_path / "demo")]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_demo_saves_resumes_and_compares(tmp_path: Path, few_steps: list[str]) -> None:
    done = python("-m", "launch.demo", *few_steps)
    assert done.returncode == 0, done.stdout + done.stderr
    look(tmp_path / "demo", done.stdout)


def in_pools(ranks: int, program: list[str], limit: float) -> None:
    """What ``launch.demo.run_ranks`` does, on ranks that have started already."""
    assert program[:2] == ["-m", "launch.train"] and limit > 0
    results = pool(ranks).run(train, program[2:])[0]
    Path(program[program.index("--results") + 1]).write_text(json.dumps(results))


def test_demo_in_pools(
    tmp_path: Path, few_steps: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "run_ranks", in_pools)
    assert demo.main(few_steps) == 0
    look(tmp_path / "demo", capsys.readouterr().out)


def look(out: Path, printed: str) -> None:
    """At what a demo of six steps wrote and printed."""
    kinds = ("adamw4bit", "adamw", "check-3", "check-1", "resumed-3")
    results = {name: json.loads((out / f"{name}.json").read_text()) for name in kinds}
    ours, theirs = results["adamw4bit"], results["adamw"]
    for training in (ours, theirs):
        assert training["world_size"] == 2
        assert len(training["losses"]) == 6
        assert training["losses"][-1] < training["losses"][0] - 0.1
        assert training["checkpoint"]["bytes"] > 0
    assert 1.0 < ours["state_bytes_per_parameter"] < 1.5
    assert 8.0 <= theirs["state_bytes_per_parameter"] < 8.1
    assert ours["checkpoint"]["bytes"] < 0.5 * theirs["checkpoint"]["bytes"]

    saved = ours["checkpoint"]
    for name, ranks in (("check-3", 3), ("check-1", 1), ("resumed-3", 3)):
        assert results[name]["world_size"] == ranks
        assert results[name]["restored_digest"] == saved["digest"]
        assert results[name]["first_step"] == saved["step"] == 3
    for name in ("check-3", "check-1"):
        assert results[name]["val_loss"] == pytest.approx(saved["val_loss"], abs=1e-4)
    assert results["resumed-3"]["losses"] == pytest.approx(ours["losses"][3:], abs=1e-3)

    digests = re.findall(r"(?:saved by|restored on) .*?([0-9a-f]{32,})", printed)
    assert digests == [saved["digest"]] * 3
    assert printed.count("equal, bit for bit") == 2
    assert "optimizer state (bytes/parameter)" in printed
    picture = (out / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["--optimizer", "sgd"], "invalid choice: 'sgd'"),
        (["--steps", "0"], "0: expected at least 1"),
        (["--steps", "5", "--save-at", "6"], "--save-at 6 lies after the last"),
        (["--check-only"], "--check-only needs --resume"),
        (
            ["--rounding", "stochastic", "--optimizer", "sgd4bit"],
            "--rounding is of adamw4bit, not of sgd4bit",
        ),
        (
            ["--compensate", "--optimizer", "adamw"],
            "--compensate is of adamw4bit, sgd4bit, adamw8bit, not of adamw",
        ),
        (
            ["--second-moment", "block", "--optimizer", "sgd4bit"],
            "--second-moment is of adamw4bit, not of sgd4bit",
        ),
    ],
)
def test_wrong_options_give_one_clear_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from launch.options import parse

    with pytest.raises(SystemExit) as left:
        parse(options)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_data_that_is_not_there_stops_the_demo_at_once(tmp_path: Path) -> None:
    done = python("-m", "launch.demo", "--data", str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert "nowhere: no such file or folder" in done.stderr
    assert "[1/5]" not in done.stdout


def test_a_digest_that_differs_is_said_and_told() -> None:
    from launch.report import digest_lines

    run = {"world_size": 2, "device": "cpu", "backend": "gloo", "val_loss": 2.0}
    saved = {**run, "checkpoint": {"step": 3, "digest": "ab", "val_loss": 2.0}}
    good, bad = ({**run, "restored_digest": digest} for digest in ("ab", "ac"))
    assert digest_lines(saved, [good, good])[1]
    text, same = digest_lines(saved, [good, bad])
    assert not same and "DIFFERENT" in text.splitlines()[-1]
