"""What ``capturable=True`` asks for: step counts on the device, and steps that a CUDA graph can replay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shard4bit.backend import Backend
from shard4bit.optim import validate
from shard4bit.optim.bound import Bound


@dataclass
class Counts:
    """The step counts of an optimizer.

    vector: (parameters,) float32; on the parameters' device if the optimizer is capturable, else on the CPU.
    captured: what captured steps point to; kept as long as the optimizer, since a graph does not keep it.
    """

    vector: Tensor = field(default_factory=lambda: torch.zeros(0))
    capturable: bool = False
    captured: list[Any] = field(default_factory=list)

    def gather(self, bounds: Sequence[Bound], capturable: bool) -> None:
        """Make the counts of all parameters elements of one vector, so that a step reads and advances it at
        once. Raises ValueError if they would have to lie on several devices."""
        devices = sorted({str(b.placed.data().device) for b in bounds}) if capturable else ["cpu"]
        if len(devices) > 1:
            raise ValueError(
                f"capturable=True with parameters on {' and '.join(devices)}: build one optimizer a device"
            )
        self.vector = torch.stack([bound.step.cpu() for bound in bounds]).to(devices[0])
        self.capturable = capturable
        for row, bound in enumerate(bounds):
            bound.row, bound.step = row, self.vector[row]
            bound.work.count = bound.step if capturable else None

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError for a group whose option was changed after the counts were made."""
        if group.get("capturable", False) != self.capturable:
            raise ValueError(
                f"a parameter group has capturable={group.get('capturable')}, the step counts were made with "
                f"capturable={self.capturable}: give it to the optimizer's constructor, for all groups"
            )

    def on_device(self, backend: Backend) -> bool:
        """Whether the back end computes scalars and counts. Raises ValueError where it would have to."""
        if self.capturable and not backend.counts and self.vector.device.type != "cpu":
            raise ValueError(
                f"capturable=True on {self.vector.device} needs the kernels: install cupy "
                "(shard4bit[cuda12] or shard4bit[cuda13]), or build the optimizer with capturable=False"
            )
        return self.capturable and backend.counts

    def check_capture(self, backend: Backend, bounds: Sequence[Bound]) -> None:
        """Raise ValueError for a step that is being captured and that a graph would not replay. (The other
        ranks cannot be told: what would tell them would be captured. But all ranks capture, or none.)"""
        if not self.capturable:
            raise ValueError(
                "step() is captured in a CUDA graph, which would replay this step's count and learning rate "
                "for ever: build the optimizer with capturable=True"
            )
        if not (backend.counts and backend.capturing()):
            raise ValueError(
                f"step() is captured in a CUDA graph, but the parameters are on {self.vector.device}, where "
                "nothing is captured: expected them on the graph's GPU (and cupy installed)"
            )
        if any(bound.links for bound in bounds):
            raise ValueError(
                "step() is captured in a CUDA graph, but parameters are sharded, and the host reads what "
                "their ranks agree on: capture forward and backward only, and step outside of the graph"
            )


def rate(lr: Any, device: torch.device, *, capturing: bool) -> float | Tensor:
    """A learning rate as a number, or as the tensor on ``device`` that kernels read. Raises ValueError."""
    validate.rate(lr)
    if not isinstance(lr, Tensor):
        return float(lr)
    if lr.device == device:
        return lr
    if capturing or lr.device.type != "cpu":
        raise ValueError(
            f"lr is a tensor on {lr.device}, which a captured step on {device} cannot read: expected one on "
            f"{device}, such as lr.to({str(device)!r})"
        )
    return float(lr)
