"""benchmarks/accuracy/sharded: distances by hand, and one run of each engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.accuracy.sharded import apart
from tests.deepspeed.engines import needs_deepspeed
from tests.launch.running import ROOT, TINY, environment


def test_distances() -> None:
    one = [1.0] * 20
    assert apart(one, one) == (0.0, 0.0)
    assert apart(one, [1.5, *[1.0] * 17, 0.75, 1.0]) == (0.5, 0.125)


@pytest.mark.slow
@needs_deepspeed
def test_all_engines_and_no_second_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.accuracy.sharded", "--steps", "4", "--out", str(tmp_path)]
    tables = []
    for _ in range(2):
        done = subprocess.run(
            [*command, *TINY], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stderr[-3000:]
        tables.append([line for line in done.stdout.splitlines() if line.startswith("| ")])
        assert len(list(tmp_path.glob("*.json"))) == 8
    assert tables[0] == tables[1] and len(tables[0]) == 9
    assert all(float(row.split("|")[4]) < 1e-3 for row in tables[0][1:])
