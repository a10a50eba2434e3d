"""What --tensorboard writes: scalars, by the first rank, under --out."""

from __future__ import annotations

import argparse
import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from launch.cluster import Cluster

FOLDER = "tensorboard"
FLUSH = 30  # seconds after which a killed run has written what it knew


class Scalars:
    """Writes nothing where ``board``, a SummaryWriter of torch, is None. Steps are counted from 1."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._validated = -1

    def _add(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            if self._board is not None:
                self._board.add_scalar(name, value, step)

    def step(self, number: int, loss: float, lr: float, seconds: float, optimizer_seconds: float) -> None:
        """What is known after step ``number``, counted from 0."""
        times = {"ms/step": 1e3 * seconds, "ms/optimizer": 1e3 * optimizer_seconds}
        self._add(number + 1, {"loss/train": loss, "lr": lr, **times})

    def validation(self, step: int, loss: float | None) -> None:
        """The loss of held-out text after so many steps, if it was computed."""
        if loss is not None and step != self._validated:
            self._validated = step
            self._add(step, {"loss/validation": loss})


@contextlib.contextmanager
def writer(settings: argparse.Namespace, ranks: Cluster, first: int) -> Iterator[Scalars]:
    """Scalars of a run that starts after ``first`` steps; TensorBoard forgets what an earlier one said of
    later steps. Raises ValueError, on all ranks, where tensorboard is not installed on the first."""
    make: Any = None
    if settings.tensorboard and ranks.is_first:
        with contextlib.suppress(ImportError):
            make = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    if settings.tensorboard and not ranks.any(make is not None):
        raise ValueError("--tensorboard needs the package tensorboard: pip install tensorboard")
    if make is None:
        yield Scalars(None)
        return
    with make(str(settings.out / FOLDER), purge_step=first + 1, flush_secs=FLUSH) as board:
        yield Scalars(board)
