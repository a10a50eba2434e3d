"""The checkpoint benchmarks run, at small sizes; the planner's limits hold at full size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import tests

HERE = Path(tests.__file__).parent.parent


def lines(module: str, *args: str, timeout: int = 250) -> list[list[str]]:
    """The cells of a benchmark's tables; it must end with status 0."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *args]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ") and " MB" in line]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_planner_at_a_small_size() -> None:
    rows = lines("checkpoint_plan", "--ranks", "8", "6")
    assert [row[0] for row in rows] == ["rows", "units", "flat"]
    assert all(row[-1].endswith(" files") for row in rows)


@pytest.mark.slow
def test_the_planner_for_1024_ranks() -> None:
    """The benchmark itself fails at 2 s of CPU time or 1 GB on any rank."""
    assert len(lines("checkpoint_plan")) == 3


@pytest.mark.slow
def test_the_speed_at_a_small_size() -> None:
    rows = lines("checkpoint_speed", "--layers", "1", "--repeat", "1")
    sizes = [float(row[1].split()[0].replace(",", "")) for row in rows]
    assert len(rows) == 10  # ours, copied, as many bytes, and AdamW's in two ways; then with parameters
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1) and sizes[2] == pytest.approx(sizes[0], rel=0.1)
    assert sizes[3] > 6 * sizes[0] and sizes[4] > 6 * sizes[0]
