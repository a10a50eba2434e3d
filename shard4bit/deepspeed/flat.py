"""Where an engine keeps its parameters: plain integers, and the answer to a ``QuantizedOptimizer``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from shard4bit.comm import Group
from shard4bit.errors import LayoutError
from shard4bit.placement import Placed


@dataclass(frozen=True)
class Run:
    """One rank's part of a parameter: the flat elements [start, stop) of it, kept in the rank's partition
    from ``at`` on. edges: the boundaries between all ranks, in elements of the parameter."""

    start: int
    stop: int
    at: int
    edges: tuple[int, ...]


def run_of(offset: int, numel: int, part: int, rank: int, world: int) -> Run:
    """The part of a parameter at ``offset`` of a buffer that ``world`` ranks divide in equal parts."""
    edges = tuple(min(max(k * part - offset, 0), numel) for k in range(world + 1))
    start, stop = edges[rank], edges[rank + 1]
    return Run(start, stop, max(offset - rank * part, 0) if start < stop else 0, edges)


def state_prefix(name: str, run: Run) -> str:
    """What stands before the keys of a parameter's state: which part it is, and where that lies in the
    partition, so that a state of another cut is never taken for this one."""
    return f"{name}[{run.start}:{run.stop}]@{run.at}/"


@dataclass
class EngineLayout:
    """Where an engine keeps the trainable parameters that our optimizer updates.

    held: tensor in the optimizer's groups -> its parameters; tensors, groups: by the parameter's name, the
    tensor that holds it and the process group that divides that (None: every rank has the whole).
    """

    held: dict[Tensor, list[Placed]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    groups: dict[str, Group | None] = field(default_factory=dict)
    _by_name: dict[str, Placed] = field(default_factory=dict)

    def place(self, tensor: Tensor, name: str) -> list[Placed]:
        """For ``QuantizedOptimizer.set_layout``."""
        if tensor not in self.held:
            raise LayoutError(
                f"{name} was put into the optimizer after deepspeed.initialize, which does not see it: put "
                "every parameter into the optimizer, or model_parameters, before"
            )
        return self.held[tensor]

    def placed(self, name: str) -> Placed:
        """Of a parameter by name."""
        return self._by_name[name]

    def add(self, tensor: Tensor, placed: Sequence[Placed], group: Group | None) -> None:
        self.held[tensor] = list(placed)
        for one in placed:
            self.tensors[one.name], self.groups[one.name] = tensor, group
            self._by_name[one.name] = one
