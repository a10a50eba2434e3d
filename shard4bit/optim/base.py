"""What all quantized optimizers share: lazy binding of states, the three-phase step, state_dict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shard4bit.backend import Work
from shard4bit.comm import Link, make_link, reduce
from shard4bit.dispatch import backend_for
from shard4bit.errors import LayoutError, StateError
from shard4bit.maths.update import Rule, Scalars
from shard4bit.optim import loading, validate
from shard4bit.placement import Placed, place, to_local
from shard4bit.spec import Full, MomentSpec, is_quantized, parse_spec
from shard4bit.state import Moment, parts, state_key


@dataclass
class Bound:
    """One parameter with its place, its state on this rank, and what it shares with other ranks."""

    param: Tensor
    placed: Placed
    rule: Rule
    moments: list[Moment]
    links: tuple[Link, ...]
    step: Tensor  # 0-d float32 on the CPU: updates so far

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole parameter's shape."""
        return self.placed.slab.view.shape


class QuantizedOptimizer(torch.optim.Optimizer):
    """Base of AdamW4bit and SGD4bit. Constructing communicates nothing and allocates no state.

    Layouts and states are bound at the first ``step``, ``state_dict``, ``load_state_dict`` or
    checkpoint, for every parameter that requires a gradient; on sharded parameters these calls are
    collective: every rank of the parameters' mesh makes them.
    """

    #: moment name -> the group's option that names its spec, and whether it is signed
    _spec_options: ClassVar[Mapping[str, tuple[str, bool]]]

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        self._bound: dict[Tensor, list[Bound]] = {}
        super().__init__(params, defaults)  # type: ignore[arg-type]

    # ---- what a subclass says -------------------------------------------------------------------

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        raise NotImplementedError

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for bad options; may normalize them."""
        raise NotImplementedError

    def _spec(self, moment: str, group: Mapping[str, Any], shape: tuple[int, ...]) -> MomentSpec:
        """How a moment of a parameter of this global shape is stored."""
        option, signed = self._spec_options[moment]
        if not group["quantize"] or not is_quantized(shape):
            return Full()
        return parse_spec(group[option], signed=signed, argument=option)

    # ---- torch.optim conventions ----------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options are checked, its state is bound when next needed."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            validate.no_unknown_keys(group, self.defaults)
            self._check_group(group)
            for param in group["params"]:
                validate.parameter(param)
        except ValueError:
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._bound = {}

    # ---- binding --------------------------------------------------------------------------------

    def _place(self, param: Tensor, name: str) -> list[Placed]:
        """Where a parameter lies; an engine's adapter may answer for several in one flat tensor."""
        return [place(param, name)]

    def bind(self) -> list[Bound]:
        """Make the layouts and states that are missing; collective on sharded parameters.

        Returns what is bound, in the order of the groups. Raises LayoutError, on all ranks, for
        parameters that cannot be served.
        """
        out = []
        for index, group in enumerate(self.param_groups):
            names = group.get("param_names") or [
                f"param_groups[{index}]['params'][{i}]" for i in range(len(group["params"]))
            ]
            for param, name in zip(group["params"], names, strict=True):
                if param.requires_grad and param not in self._bound:
                    self._bound[param] = [
                        self._bind(param, placed, group) for placed in self._place(param, name)
                    ]
                out += self._bound.get(param, [])
        return out

    def _bind(self, param: Tensor, placed: Placed, group: Mapping[str, Any]) -> Bound:
        slab, shape = placed.slab, placed.slab.view.shape
        rule, state = self._rule(group), self.state[param]
        device = placed.data().device
        if device.type == "meta":
            raise LayoutError(
                f"a parameter of shape {shape} is on the meta device: materialize the model "
                "(model.to_empty(device=...) and its initialization) before using the optimizer"
            )
        moments = [Moment.zeros(name, self._spec(name, group, shape), slab, device) for name in rule.moments]
        specs = [m.spec for m in moments]
        links = tuple(make_link(g, n, slab, specs) for g, n in placed.neighbours)
        step_key = placed.prefix + "step"
        step = state.setdefault(step_key, torch.zeros((), dtype=torch.float32))
        for moment in moments:
            for part in parts(moment.spec):
                key = placed.prefix + state_key(moment.name, part.suffix)
                if key in state:  # after unpickling or deepcopy
                    moment.tensors[part.suffix] = to_local(state[key])
                else:
                    state[key] = placed.wrap(moment.tensors[part.suffix], part)
        return Bound(param, placed, rule, moments, links, step)

    # ---- step -----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update. On sharded parameters it is collective: a skipped step must be skipped on all.

        closure: re-evaluates the model and returns the loss, which is returned.
        Raises ValueError for gradients that are sparse, complex, or elsewhere than their parameter;
        if one rank raises, the others raise RuntimeError.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.bind()
        failure: BaseException | None = None
        works: list[tuple[Bound, Work]] = []
        for group in self.param_groups:
            scalars = _PerStep(group)
            for param in group["params"]:
                for bound in self._bound.get(param, ()):
                    try:
                        self._check_rule(bound, group)
                        grad = _gradient(bound)
                    except ValueError as error:
                        failure, grad = failure or error, None
                    if grad is not None or bound.links:
                        works.append((bound, _work(bound, group, grad, scalars)))
        self._run(works, failure)
        return loss

    def _check_rule(self, bound: Bound, group: Mapping[str, Any]) -> None:
        lacking = set(self._rule(group).moments) - set(bound.rule.moments)
        if lacking:
            raise ValueError(
                f"a group's options now need {sorted(lacking)}, which its parameters were bound without "
                "(momentum was 0): build a new optimizer"
            )

    def _run(self, works: list[tuple[Bound, Work]], failure: BaseException | None) -> None:
        """measure -> reduce -> apply."""
        if failure is None:
            try:
                for rule, batch in _batches(works):
                    backend_for(batch[0].param.device).measure(rule, batch)
            except Exception as error:  # the other ranks must hear of it before it is raised
                failure = error
        reduce([work for _, work in works], failure)
        active = [(bound, work) for bound, work in works if work.active]
        for rule, batch in _batches(active):
            backend_for(batch[0].param.device).apply(rule, batch)
        for bound, work in active:
            bound.step += 1
            data = bound.placed.data()
            if work.param.data_ptr() != data.data_ptr():
                data.copy_(work.param)

    # ---- reading and state_dict -----------------------------------------------------------------

    def moment(self, param: Tensor, name: str) -> Tensor:
        """This rank's values of a moment ("exp_avg", ...), dequantized: float32, of the local shape.

        Raises ValueError if the parameter is not this optimizer's or has no such moment.
        """
        self.bind()
        for bound in self._bound.get(param, ()):
            for moment in bound.moments:
                if moment.name == name:
                    values = backend_for(bound.placed.data().device).decode(moment)
                    return values.view(bound.placed.slab.shape)
        raise ValueError(f"no moment {name!r} of such a parameter in this optimizer")

    def state_dict(self) -> dict[str, Any]:
        """torch's, with the packed states. Raises LayoutError, on all ranks, where a column cut does
        not allow the states of a DTensor to be DTensors."""
        for bound in self.bind():
            for moment in bound.moments:
                for part in parts(moment.spec):
                    why = bound.placed.obstacle(part)
                    if why is not None:
                        raise LayoutError(
                            f"{why}: the {part.suffix} of this state cannot be a DTensor, so "
                            "state_dict() cannot carry it; save it with shard4bit.save"
                        )
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave: states in place, options of the groups. All is checked first.

        Raises StateError (a ValueError) for states of another optimizer, spec or model, with nothing
        changed. (torch's own would cast codes and scales to the parameter's dtype.)
        """
        self.bind()
        state_dict = dict(state_dict)
        for hook in list(self._optimizer_load_state_dict_pre_hooks.values()):
            state_dict = hook(self, state_dict) or state_dict
        saved_groups = loading.checked_groups(self, state_dict)
        copies: list[tuple[Tensor, Tensor]] = []
        ids = [i for g in saved_groups for i in g["params"]]
        params = [p for g in self.param_groups for p in g["params"]]
        for saved_id, param in zip(ids, params, strict=True):
            if param in self._bound:
                found = state_dict["state"].get(saved_id)
                copies += loading.matched(self.state[param], found, f"parameter {saved_id}")
        for target, source in copies:
            target.copy_(source)
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            loading.adopt_options(group, saved)
        for post_hook in list(self._optimizer_load_state_dict_post_hooks.values()):
            post_hook(self)


class _PerStep:
    """A group's scalars by step count; parameters of one group mostly share it."""

    def __init__(self, group: Mapping[str, Any]) -> None:
        self.group = group
        self.known: dict[int, Scalars] = {}

    def at(self, rule: Rule, step: int) -> Scalars:
        if step not in self.known:
            self.known[step] = rule.scalars(self.group, step)
        return self.known[step]


def _gradient(bound: Bound) -> Tensor | None:
    """This rank's gradient, checked and dense."""
    grad = bound.placed.grad()
    if grad is None:
        return None
    data = bound.placed.data()
    validate.gradient(grad, data, f"parameter of shape {bound.shape}")
    for tensor in bound.moments[0].tensors.values() if bound.moments else ():
        if tensor.device != data.device:
            raise StateError(
                f"a parameter of shape {bound.shape} moved to {data.device} after its state was made on "
                f"{tensor.device}: move the model before building the optimizer"
            )
    return grad.contiguous()


def _work(bound: Bound, group: Mapping[str, Any], grad: Tensor | None, scalars: _PerStep) -> Work:
    return Work(
        slab=bound.placed.slab,
        moments=bound.moments,
        param=bound.placed.data().contiguous(),
        grad=grad,
        scalars=scalars.at(bound.rule, int(bound.step.item()) + 1),
        maximize=group["maximize"],
        links=bound.links,
        active=grad is not None,
    )


def _batches(works: list[tuple[Bound, Work]]) -> list[tuple[Rule, list[Work]]]:
    """Works by rule and device, in order."""
    out: dict[tuple[str, int, torch.device], tuple[Rule, list[Work]]] = {}
    for bound, work in works:
        key = (bound.rule.name, len(bound.rule.moments), work.param.device)
        out.setdefault(key, (bound.rule, []))[1].append(work)
    return list(out.values())
