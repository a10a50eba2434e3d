"""The benchmark of ZeRO steps runs, at a small size, and says what it leaves out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deepspeed.engines import needs_deepspeed

pytestmark = needs_deepspeed
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_at_a_small_size(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    argv = ["--scale", "32", "--steps", "1", "--optimizers", "rank1,block,factored,torch-fused,FusedAdam"]
    out = tmp_path / "out"
    env = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "CXX": "false",  # a compiler that fails, so that the operator does not build
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
    }
    command += ["-m", "benchmarks.zero_step", *argv, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((out / "zero_step.json").read_text())
    assert set(found["skipped"]) == {"FusedAdam"} and "SKIPPED FusedAdam: " in done.stdout
    rows = [row for row in (out / "zero_step.md").read_text().splitlines() if row.startswith("| ")]
    results = {(r["stage"], r["optimizer"]): r for r in found["results"]}
    names = ("rank1", "block", "factored", "torch-fused")
    assert list(results) == [(stage, name) for stage in (1, 2) for name in names] and len(rows) == 9
    for result in results.values():
        assert result["optimizer_wall_ms"] > 0 and result["step_wall_ms"] > 0
    for stage in (1, 2):
        assert results[stage, "torch-fused"]["state_mb"] > 2.5 * results[stage, "rank1"]["state_mb"]


@pytest.mark.slow
def test_sizes_of_files(tmp_path: Path) -> None:
    """The bounds that the documentation quotes hold from a quarter of GPT-2 small's dimensions on."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "benchmarks.deepspeed_files", "--scale", "4"]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = done.stdout.splitlines()
    rows = {
        line[:28].strip(): [float(x) for x in line[28:].split()] for line in printed if "masters  " in line
    }
    assert rows["AdamW, fp32 masters"] == pytest.approx([8.0, 12.0], rel=0.01)
    assert rows["AdamW4bit, fp32 masters"] == pytest.approx([1.1, 5.1], rel=0.05)
    assert sum("(at least " in line for line in printed) == 2
