"""The process pools themselves: a rank that dies is reported, and killed ones get a second try."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.pool import Pool, RankDied


def dies(how: str, marker: str) -> int:
    """Rank 1 ends before it answers; with "once", only in the first call."""
    if dist.get_rank() == 1 and not (how == "once" and Path(marker).exists()):
        Path(marker).touch()
        if how == "exit":
            os._exit(3)
        os.write(2, b"last words\n")
        os.kill(os.getpid(), signal.SIGABRT)
    return dist.get_rank()


def set_up() -> None:
    os.environ["SET_UP"] = "1"


def is_set_up() -> bool:
    return "SET_UP" in os.environ


def test_a_rank_that_dies(tmp_path: Path) -> None:
    pool = Pool(2, set_up)
    try:
        with pytest.warns(UserWarning, match="exit code -6") as caught:
            assert pool.run(dies, "once", str(tmp_path / "a")) == [0, 1]
        assert "last words" in str(caught[0].message)
        assert pool.run(is_set_up) == [True, True]  # also after the new start
        with pytest.raises(RankDied, match="rank 1 died in dies with exit code 3"):
            pool.run(dies, "exit", str(tmp_path / "b"))
    finally:
        pool.close()


def test_a_rank_that_always_dies(tmp_path: Path) -> None:
    pool = Pool(2)
    with pytest.warns(UserWarning), pytest.raises(RankDied, match="last words"):
        pool.run(dies, "always", str(tmp_path / "c"))
