"""Messages through logging: who says what, and that nobody does unasked."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shard4bit
from shard4bit.log import log
from tests.pool import pool


def heard(level: int, folder: str) -> list[str]:
    """What a rank logs while it steps, saves and loads."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    log.addHandler(handler)
    log.setLevel(level)
    try:
        torch.manual_seed(0)
        model = torch.nn.Linear(80, 90)
        optimizer = shard4bit.AdamW4bit(model.parameters())
        model(torch.ones(2, 80)).sum().backward()
        optimizer.step()
        shard4bit.save(folder, model, optimizer, step=1)
        shard4bit.load(folder, model, optimizer)
        log.warning("a warning of this rank")
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
    return out.getvalue().splitlines()


def test_the_first_rank_speaks_for_all(tmp_path: Path) -> None:
    first, second = pool(2).run(heard, logging.INFO, str(tmp_path))
    assert all(line.startswith("rank 0: ") for line in first)
    text = "\n".join(first)
    assert "states of 2 parameters" in text and f"saved {tmp_path}" in text and "of step 1" in text
    assert second == ["rank 1: a warning of this rank"]


def test_every_rank_is_heard_when_debugging(tmp_path: Path) -> None:
    _, second = pool(2).run(heard, logging.DEBUG, str(tmp_path))
    assert any("loaded" in line for line in second) and all(line.startswith("rank 1: ") for line in second)


def test_one_process_has_no_rank(tmp_path: Path) -> None:
    assert any(line.startswith("saved ") for line in heard(logging.INFO, str(tmp_path)))


@pytest.mark.parametrize(
    "setup", ["", pytest.param("import logging; logging.basicConfig()", marks=pytest.mark.slow)]
)
def test_silent_unless_asked(tmp_path: Path, setup: str) -> None:
    program = f"""{setup}
import torch, shard4bit
model = torch.nn.Linear(80, 90)
optimizer = shard4bit.AdamW4bit(model.parameters())
model(torch.ones(2, 80)).sum().backward()
optimizer.step()
shard4bit.save({str(tmp_path)!r}, model, optimizer, step=1)"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
