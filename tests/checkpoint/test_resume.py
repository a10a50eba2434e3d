"""Save, new processes, load: as if nothing had happened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import tests
from tests.checkpoint import ranks
from tests.fsdp.models import same
from tests.pool import free_port, pool

STEPS, SAVED_AT = 50, 25


def launch(world: int, *args: str) -> None:
    """``python -m tests.checkpoint.resume`` in fresh processes, as torchrun starts them."""
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.checkpoint.resume", *args]
    root = Path(tests.__file__).parent.parent
    running = [
        subprocess.Popen(
            command,
            cwd=root,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, output in zip(running, outputs, strict=True):
        assert process.returncode == 0, output


def test_fresh_processes_continue_bit_for_bit(tmp_path: Path) -> None:
    """25 steps, a checkpoint, 25 steps in new processes: equal to 50 steps on the same 2 ranks."""
    root = str(tmp_path / "checkpoints")
    whole = pool(2).run(ranks.train_toy, "fsdp", "rank1", STEPS, root, SAVED_AT)
    launch(2, root, "rank1", str(STEPS), str(tmp_path / "out"))
    for rank, (expected, losses) in enumerate(whole):
        found = dict(np.load(tmp_path / f"out-{rank}.npz"))
        assert found.pop("losses").tolist() == losses[SAVED_AT:]
        same(found, expected, rank)
        assert expected["state/hidden.weight/step"] == STEPS
        assert expected["model/seen"] == STEPS
        assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])  # a run that learns
