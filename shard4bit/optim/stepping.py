"""One step of an optimizer: gather gradients, measure -> reduce -> apply, count. What stays the same from
step to step is kept, because a model may have thousands of small parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor

from shard4bit.backend import Work, Works
from shard4bit.comm import Reduction
from shard4bit.dispatch import backend_for
from shard4bit.errors import LayoutError
from shard4bit.maths.update import Rule
from shard4bit.optim import capture
from shard4bit.optim.alike import Likeness
from shard4bit.optim.bound import Bound
from shard4bit.optim.capture import Counts
from shard4bit.optim.gradients import Gradients
from shard4bit.optim.loading import SPEC_OPTIONS
from shard4bit.placement import refuse_stale


def _specs(group: Mapping[str, Any]) -> list[Any]:
    """What a group says about how states are stored."""
    return [group.get(option) for option in SPEC_OPTIONS]


def capturing(device: torch.device) -> bool:
    """Whether a step of parameters on ``device`` would now be captured in a CUDA graph, not run."""
    if torch.cuda.is_initialized():  # without making a back end, which a capture does not allow
        if torch.cuda.is_current_stream_capturing():
            return True
        if device.index == torch.cuda.current_device():
            return False
    try:
        return backend_for(device).capturing()
    except Exception:  # the step will meet it again, and tell the other ranks
        return False


def refuse_first(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError if a capture is going on, in which no states may be made."""
    if any(capturing(param.device) for group in groups for param in group["params"][:1]):
        raise ValueError(
            "a capture of the first step with these parameters: take one or more steps before the capture, "
            "as torch's warm-up does"
        )


def keep_compiler_out(cls: Any) -> None:
    """Make a compiled training loop call the optimizer's update as it is instead of tracing it: tables of
    addresses and raw launches are nothing to trace. (When the first optimizer is made, not on import,
    because it imports torch._dynamo, for a second; torch's own constructor does so too.)"""
    if cls._uncompiled_update is cls._update:
        cls._uncompiled_update = torch.compiler.disable(cls._update)


@dataclass
class Kind:
    """Parameters of one group and rule. shared: the scalars of them all, if they have taken as many steps."""

    group: Mapping[str, Any]
    rule: Rule
    members: list[tuple[Work, int]] = field(default_factory=list)  # with its row in the step counts
    shared: dict[str, float] | None = None
    maximize: bool = False


class StepPlan:
    """The steps of the parameters of a list of groups.

    bound: where they are, by parameter, of those that are bound; counts: the step counts; rule_of: the rule
    that a group's options ask for now; others: the optimizer's other plans.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        bound: Mapping[Tensor, Sequence[Bound]],
        counts: Counts,
        rule_of: Callable[[Mapping[str, Any]], Rule],
        others: Sequence[StepPlan] = (),
    ) -> None:
        self.groups, self.params = list(groups), [list(g["params"]) for g in groups]
        self.asked = list(map(_specs, groups))
        self.unbound = [p for params in self.params for p in params if p not in bound]  # frozen ones
        self.waiting = [p for p in self.unbound if p.grad is None]  # (others were left out in spite of one)
        self.members = members = [
            (b, b.placed.overriding(g)) for g in groups for p in g["params"] for b in bound.get(p, ())
        ]
        self.bounds = [b for b, _ in members]
        self.counts, self.steps, self.rule_of = counts, counts.vector, rule_of
        self.left = torch.zeros(0)  # the counts as this plan left them
        self.even: int | None = None  # each of these, if they are equal; else ``each`` has them
        self.each: list[float] = []
        self.device = self.bounds[0].work.param.device if members else torch.device("cpu")
        self.capturing = self.on_device = False  # of the step; the latter: see ``Counts.on_device``
        kinds: dict[tuple[int, int], Kind] = {}
        for b, group in members:
            key = (id(group), id(b.rule))
            kinds.setdefault(key, Kind(group, b.rule)).members.append((b.work, b.row))
        self.kinds = list(kinds.values())
        self.grads: list[Tensor | None] = [None] * len(members)  # of a step, while it runs
        works = [b.work for b in self.bounds]
        self.linked = [work for work in works if work.links]  # a reduction may change their activity
        self.gradients = Gradients([b.placed for b in self.bounds])
        self.seen = Likeness(self.bounds)
        # plans of the same parameters: when one steps, what the others know of the works is out of date
        mine = set(map(id, self.bounds))
        self.rivals = [plan for plan in others if not mine.isdisjoint(map(id, plan.bounds))]
        for rival in self.rivals:
            rival.rivals.append(self)
        self.outdated, self.idle = True, False  # idle: no gradients in the last step, and that is all right
        self.taking: list[Bound] = []
        self.batches: list[tuple[Rule, Works]] = []
        self.reduction = Reduction([])

    def serves(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether these are its groups, of the same specs, and their parameters, and none that it lacks
        requires a gradient or has one by now. (Whether one that it has requires one still is no matter: it
        steps if it has a gradient.)"""
        return (
            len(groups) == len(self.groups)
            and all(map(is_, groups, self.groups))
            and list(map(_specs, groups)) == self.asked
            and all(
                len(group["params"]) == len(params) and all(map(is_, group["params"], params))
                for group, params in zip(groups, self.params, strict=True)
            )
            and not any(p.requires_grad for p in self.unbound)
            and not any(p.grad is not None for p in self.waiting)
        )

    def run(self) -> None:
        self.capturing = capturing(self.device)
        if self.capturing:
            self.counts.check_capture(backend_for(self.device), self.bounds)
        try:
            self._run()
        finally:
            self.grads[:] = [None] * len(self.grads)
            for bound in self.bounds:
                if not bound.own:
                    bound.release()
        if self.capturing:
            rates = [kind.group["lr"] for kind in self.kinds]
            self.counts.captured.append((self.batches, self.steps, rates))

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
            backend_for(batch[0].param.device).apply(rule, batch, self.reduction)
        self.reduction.settle()  # the device goes on meanwhile
        self._finish()

    def _gather(self) -> BaseException | None:
        """Bring every work up to date. Returns the first error instead of raising it."""
        known, self.outdated = not self.outdated, False
        for rival in self.rivals:
            rival.outdated = True
        grads, failure = self.gradients.read()
        if failure is None and not self.linked:
            failure = self._stale(grads)
        if known and self.seen.lasts(grads):
            self.grads[:] = grads
            for work in self.linked:
                work.active = work.grad is not None
        else:
            failure = self._look(grads, failure)
        try:
            self.on_device = self.counts.on_device(backend_for(self.device))
            if self.on_device:
                self._describe()
            else:
                self._scale(known=known)
        except Exception as error:
            failure = failure or error
        return failure

    def _stale(self, grads: Sequence[Tensor | None]) -> BaseException | None:
        """The error, if no parameter has a gradient because a model was sharded after the optimizer's first
        step. (The look at all modules is for the first of such steps only.)"""
        if any(grad is not None for grad in grads):
            self.idle = False
        elif not self.idle:
            try:
                refuse_stale([bound.param for bound in self.bounds])
            except LayoutError as error:
                return error
            self.idle = True
        return None

    def _look(self, grads: list[Tensor | None], failure: BaseException | None) -> BaseException | None:
        """Check every parameter and gradient, and sort them anew if need be. Returns the first error."""
        for i, (bound, grad) in enumerate(zip(self.bounds, grads, strict=True)):
            bound.work.grads, bound.work.at = self.grads, i  # after a rival's step they are in its list
            try:
                if not bound.lies:
                    bound.refresh()
                if grad is not None:
                    bound.take_gradient(grad)
            except Exception as error:  # the other ranks must hear of it before it is raised
                failure, grad = failure or error, None
            bound.work.active = grad is not None
        self._changed()
        if self.seen.take(self.bounds):
            self._sort()
        return failure

    def _scale(self, *, known: bool) -> None:
        """Give every work the scalars of its group and step count. known: they have those of this plan's last
        step. Raises ValueError."""
        even = self._even_count()
        for kind in self.kinds:
            group, rule = kind.group, kind.rule
            self._check_rule(rule, group)
            if even is not None and known and kind.shared is not None and kind.maximize == group["maximize"]:
                kind.shared.update(rule.scalars(group, even + 1))  # all works see it
                continue
            made: dict[int, dict[str, float]] = {}
            for work, row in kind.members:
                count = int(self.each[row]) if even is None else even
                if count not in made:
                    made[count] = dict(rule.scalars(group, count + 1))
                work.scalars = made[count]
                work.maximize = group["maximize"]
            kind.shared, kind.maximize = made[even] if even is not None else None, group["maximize"]
            self._changed()

    def _even_count(self) -> int | None:
        """The steps that every parameter has taken, if it is one number."""
        if not torch.equal(self.steps, self.left):  # other plans, or users, changed it
            self.left, self.each = self.steps.clone(), self.steps.tolist()
            self.even = int(self.each[0]) if self.each.count(self.each[0]) == len(self.each) else None
        return self.even

    def _describe(self) -> None:
        """Give every work what the device computes its scalars from. Raises ValueError."""
        for kind in self.kinds:
            group, rule = kind.group, kind.rule
            self._check_rule(rule, group)
            lr = capture.rate(group["lr"], self.device, capturing=self.capturing)
            options = {**rule.options(group), "lr": lr}
            for work, _ in kind.members:
                work.options, work.maximize = options, group["maximize"]
        self._changed()

    def _changed(self) -> None:
        """Works have other parameters' memory or other mappings of scalars than before."""
        for _, works in self.batches:
            works.version += 1

    def _check_rule(self, rule: Rule, group: Mapping[str, Any]) -> None:
        self.counts.check_group(group)
        lacking = set(self.rule_of(group).moments) - set(rule.moments)
        if lacking:
            raise ValueError(
                f"a group's options now need {sorted(lacking)}, which its parameters were bound without "
                "(momentum was 0): build a new optimizer"
            )

    def _sort(self) -> None:
        """Batches of one rule and device of the parameters that take part: those with a gradient, and
        those of which another rank may have one."""
        self.taking = [b for b in self.bounds if b.work.grad is not None or b.links]
        by_kind: dict[tuple[str, int, torch.device], tuple[Rule, Works]] = {}
        for bound in self.taking:
            kind = (bound.rule.name, len(bound.rule.moments), bound.work.param.device)
            by_kind.setdefault(kind, (bound.rule, Works()))[1].append(bound.work)
        self.batches = list(by_kind.values())
        self.reduction = Reduction([bound.work for bound in self.taking])

    def _finish(self) -> None:
        """Count the step and write back what is not dense."""
        stepped = [] if self.on_device else [b.row for b in self.taking if b.work.active]
        if len(stepped) == len(self.steps):
            self.steps.add_(1.0)
            if self.even is not None:
                self.left.add_(1.0)
                self.even += 1
        elif stepped:
            self.steps[torch.tensor(stepped)] += 1.0
        for bound in self.taking:
            if not bound.own and bound.work.active:
                data = bound.placed.data()
                if data.data_ptr() != bound.work.param.data_ptr():
                    data.copy_(bound.work.param)
