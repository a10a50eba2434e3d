"""launch.train in one process that adds up a step's gradient in two halves, as two ranks would.

python -m benchmarks.accuracy.halves --engine single ...: what another order of sums does without sharding.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from launch import cluster, train


class Halves(train.Run):
    """A run whose batches go through the model in two parts, of as many sequences as two ranks would get."""

    def _loss(self, rows: np.ndarray) -> Tensor:
        if not torch.is_grad_enabled():  # an evaluation
            return super()._loss(rows)
        half = len(rows) // 2
        first = super()._loss(rows[:half])
        self.engine.backward(first / (self.settings.batch * self.context))
        return first.detach() + super()._loss(rows[half:])


if __name__ == "__main__":
    train.Run = Halves  # type: ignore[misc]  # what main() runs
    cluster.leave(train.main())
