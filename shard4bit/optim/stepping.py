"""One step of an optimizer: gather gradients, measure -> reduce -> apply, count. What stays the same from
step to step is kept, because a model may have thousands of small parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shard4bit.backend import Work, Works
from shard4bit.comm import Link, Reduction
from shard4bit.dispatch import backend_for
from shard4bit.errors import StateError
from shard4bit.maths.update import Rule, Scalars
from shard4bit.optim import validate
from shard4bit.placement import Placed
from shard4bit.state import Moment


@dataclass
class Bound:
    """One parameter with its place, its state on this rank, and what it shares with other ranks."""

    param: Tensor
    placed: Placed
    rule: Rule
    moments: list[Moment]
    links: tuple[Link, ...]
    step: Tensor  # 0-d float32 on the CPU, an element of the optimizer's one vector: updates so far
    row: int  # of that vector
    work: Work
    pointer: int = 0  # of ``work.param``, if that is the parameter's own memory
    anchor: int = 0  # of the optimizer's tensor when ``work.param`` was made; 0: cannot be known
    accepted: Any = None  # (dtype, shape, device, layout) of the last gradient that was checked

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole parameter's shape."""
        return self.placed.slab.view.shape

    def refresh(self) -> None:
        """Make ``work.param`` this rank's elements as they are now, dense."""
        data = self.placed.data()
        for moment in self.moments:
            for tensor in moment.tensors.values():
                if tensor.device != data.device:
                    raise StateError(
                        f"a parameter of shape {self.shape} moved to {data.device} after its state was made "
                        f"on {tensor.device}: move the model before building the optimizer"
                    )
        self.accepted = None
        self.work.param = data.contiguous()
        self.pointer = data.data_ptr() if self.work.param is data else 0
        self.anchor = self.param.data_ptr() if self.pointer else 0

    def take_gradient(self, grad: Tensor) -> None:
        """Check a gradient and make it ``work.grad``, dense. Raises ValueError."""
        kind = (grad.dtype, grad.shape, grad.device, grad.layout)
        if kind != self.accepted:
            validate.gradient(grad, self.work.param, f"parameter of shape {self.shape}")
            self.accepted = kind
        self.work.grad = grad if grad.is_contiguous() else grad.contiguous()

    def release(self) -> None:
        """Hold neither the gradient nor a dense copy of the parameter until the next step."""
        self.work.grad = None
        if self.pointer == 0:
            self.work.param = self.placed.data()


class StepPlan:
    """The steps of one list of parameters.

    members: (parameter, group) in order; steps: the vector of step counts; rule_of: the rule that a
    group's options ask for now.
    """

    def __init__(
        self,
        members: Sequence[tuple[Bound, Mapping[str, Any]]],
        steps: Tensor,
        rule_of: Callable[[Mapping[str, Any]], Rule],
    ) -> None:
        self.members = members
        self.steps, self.rule_of = steps, rule_of
        self.rows = torch.tensor([b.row for b, _ in members], dtype=torch.long)
        self.signature: list[Any] = []
        self.taking: list[Bound] = []
        self.batches: list[tuple[Rule, Works]] = []
        self.reduction = Reduction([])

    def run(self) -> None:
        try:
            self._run()
        finally:
            for bound, _ in self.members:
                bound.release()

    def _run(self) -> None:
        failure = self._gather()
        if failure is None:
            try:
                for rule, batch in self.batches:
                    backend_for(batch[0].param.device).measure(rule, batch)
            except Exception as error:  # the other ranks must hear of it before it is raised
                failure = error
        self.reduction.run(failure)
        for rule, batch in self.batches:
            backend_for(batch[0].param.device).apply(rule, batch)
        self._finish()

    def _gather(self) -> BaseException | None:
        """Bring every work up to date. Returns the first error instead of raising it."""
        failure: BaseException | None = None
        counts = self.steps.tolist()
        scalars: dict[tuple[int, int], dict[float, Scalars]] = {}
        signature: list[Any] = []
        known: dict[float, Scalars] = {}
        last: tuple[Any, Any] = (None, None)
        for bound, group in self.members:
            work, grad = bound.work, None
            try:
                grad = bound.placed.grad()
                if bound.anchor == 0 or bound.param.data_ptr() != bound.anchor:
                    bound.refresh()
                if grad is not None:
                    bound.take_gradient(grad)
                if group is not last[0] or bound.rule is not last[1]:
                    self._check_rule(bound, group)
                    last = (group, bound.rule)
                    known = scalars.setdefault((id(group), id(bound.rule)), {})
                count = counts[bound.row]
                if count not in known:
                    known[count] = bound.rule.scalars(group, int(count) + 1)
                work.scalars, work.maximize = known[count], group["maximize"]
            except Exception as error:  # the other ranks must hear of it before it is raised
                failure, grad = failure or error, None
            work.active = grad is not None
            signature.append(None if work.grad is None else work.grad.dtype)
        if signature != self.signature:
            self._sort(signature)
        return failure

    def _check_rule(self, bound: Bound, group: Mapping[str, Any]) -> None:
        lacking = set(self.rule_of(group).moments) - set(bound.rule.moments)
        if lacking:
            raise ValueError(
                f"a group's options now need {sorted(lacking)}, which its parameters were bound without "
                "(momentum was 0): build a new optimizer"
            )

    def _sort(self, signature: list[Any]) -> None:
        """Batches of one rule and device of the parameters that take part: those with a gradient, and
        those of which another rank may have one."""
        self.signature = signature
        self.taking = [b for b, _ in self.members if b.work.grad is not None or b.links]
        by_kind: dict[tuple[str, int, torch.device], tuple[Rule, Works]] = {}
        for bound in self.taking:
            kind = (bound.rule.name, len(bound.rule.moments), bound.work.param.device)
            by_kind.setdefault(kind, (bound.rule, Works()))[1].append(bound.work)
        self.batches = list(by_kind.values())
        self.reduction = Reduction([bound.work for bound in self.taking])

    def _finish(self) -> None:
        """Count the step and write back what is not dense."""
        stepped = [b.row for b in self.taking if b.work.active]
        if len(stepped) == len(self.steps):
            self.steps.add_(1.0)
        elif stepped:
            self.steps[torch.tensor(stepped)] += 1.0
        for bound in self.taking:
            if bound.pointer == 0 and bound.work.active:
                data = bound.placed.data()
                if data.data_ptr() != bound.work.param.data_ptr():
                    data.copy_(bound.work.param)
