"""What all quantized optimizers share: lazy binding of states, the three-phase step, state_dict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any, ClassVar

import torch
from torch import Tensor

from shard4bit.backend import Work
from shard4bit.comm import make_link
from shard4bit.dispatch import backend_for
from shard4bit.errors import LayoutError, StateError
from shard4bit.log import log
from shard4bit.maths.update import Rule
from shard4bit.optim import loading, validate
from shard4bit.optim.bound import Bound
from shard4bit.optim.capture import Counts
from shard4bit.optim.gathering import check_shown, gathered, ungathered
from shard4bit.optim.held import Held, check_specs, put, replaced
from shard4bit.optim.report import Report, report
from shard4bit.optim.stepping import StepPlan, keep_compiler_out, refuse_first
from shard4bit.optim.summary import summary
from shard4bit.optim.together import on_all
from shard4bit.placement import Placed, is_dtensor, place, refuse_stale
from shard4bit.spec import Full, MomentSpec, is_quantized, parse_spec
from shard4bit.state import Moment


class QuantizedOptimizer(torch.optim.Optimizer):
    """Base of AdamW4bit and SGD4bit. Constructing communicates nothing and allocates no state.

    Layouts and states are bound at the first ``step``, ``state_dict``, ``load_state_dict`` or
    checkpoint, for every parameter that requires a gradient; on sharded parameters these calls are
    collective: every rank of the parameters' mesh makes them.
    """

    #: moment name -> the group's option that names its spec, and whether it is signed
    _spec_options: ClassVar[Mapping[str, tuple[str, bool]]]

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        self._given: set[int] = set()  # identities of the parameters that the caller put in
        self._forget()
        super().__init__(params, defaults)  # type: ignore[arg-type]

    def _forget(self) -> None:
        """Nothing is bound; states in ``self.state`` will be taken up again."""
        keep_compiler_out(QuantizedOptimizer)
        self._bound: dict[Tensor, list[Bound]] = {}
        self._counts = Counts(captured=vars(self).get("_counts", Counts()).captured)
        self._plans: list[StepPlan] = []
        self._stepped = False  # a first step is everybody's first
        self._held = Held()

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
            validate.same("capturable", group, self.param_groups[0])
            for param in group["params"]:
                validate.parameter(param)
        except ValueError:
            self.param_groups.pop()
            raise
        self._given.update(map(id, group["params"]))

    def __repr__(self) -> str:
        try:
            return f"{type(self).__name__} (\n{summary(self)}\n)"
        except Exception:  # of options that were spoilt since they were checked: step() will say so
            return super().__repr__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("capturable", False)
        self._forget()

    # ---- binding --------------------------------------------------------------------------------

    def set_layout(self, layout: Callable[[Tensor, str], list[Placed]]) -> None:
        """For adapters of engines: which parameters of the model (one or several) a tensor in the groups
        holds, and where. What was bound is forgotten, states are kept.

        layout: (tensor, its name in the groups) -> at least one Placed.
        """
        self._forget()
        self._layout: Callable[[Tensor, str], list[Placed]] = layout

    def _place(self, param: Tensor, name: str) -> list[Placed]:
        layout = self.__dict__.get("_layout")  # not there after unpickling
        return [place(param, name)] if layout is None else layout(param, name)

    @torch.inference_mode(False)  # what is made in that mode could not be changed outside of it
    def bind(self, frozen: Set[Tensor] = frozenset()) -> list[Bound]:
        """Make the layouts and states that are missing; collective on sharded parameters.

        frozen: parameters to bind although they require no gradient; those with a state always are.
        Returns what is bound, in the order of the groups. Raises LayoutError, on all ranks, for parameters
        that cannot be served; ValueError for options or states changed by hand that do not fit.
        """
        self._follow_state()
        out = []
        params = [p for group in self.param_groups for p in group["params"]]
        known = self.__dict__.get("_layout") is not None  # to an adapter, which sees to that itself
        if not known and any(p.requires_grad and p not in self._bound for p in params):
            refuse_stale(params)
            validate.not_replaced(params, self.__dict__.get("_given"))  # (not there after unpickling)
            self._drop_replaced(params)
        for index, group in enumerate(self.param_groups):
            unnamed = [f"param_groups[{index}]['params'][{i}]" for i in range(len(group["params"]))]
            names = group.get("param_names") or unnamed
            self._check_group(group)  # which may have been changed since it was added
            for param, name in zip(group["params"], names, strict=True):
                wanted = param.requires_grad or param in frozen or self.state.get(param)
                alone = not (known or is_dtensor(param))  # else other ranks may lack the gradient
                if (wanted or alone and param.grad is not None) and param not in self._bound:
                    self._bound[param] = [
                        self._bind(param, placed, group) for placed in self._place(param, name)
                    ]
                bounds = self._bound.get(param, [])
                check_specs(bounds, group, self._spec)
                out += bounds
        if len(self._counts.vector) != sum(map(len, self._bound.values())):
            self._gather_steps()
        self._held.take(self.state)
        return out

    def _follow_state(self) -> None:
        """Forget what users took out of ``self.state``, or put other tensors in the place of."""
        for param in [p for p, bounds in self._bound.items() if replaced(bounds, self.state.get(p))]:
            del self._bound[param]
            self._counts.vector, self._plans = torch.zeros(0), []  # made anew, with what takes its place

    def _drop_replaced(self, params: list[Tensor]) -> None:
        """Forget what left the groups before any step: accelerate has read a state_dict by then (FSDP2)."""
        gone = self._bound.keys() - set(params)
        if not any(bound.step for param in gone for bound in self._bound[param]):
            for param in gone:
                del self._bound[param], self.state[param]
            self._counts.vector = torch.zeros(0)  # gathered anew for what takes their place
        elif len(gone) == len(self._bound) and all(map(is_dtensor, params)):
            raise LayoutError("sharded parameters replaced those with states: shard before steps and loads")

    def _gather_steps(self) -> None:
        """Of all that is bound. Plans hold the earlier vector."""
        every = [bound for found in self._bound.values() for bound in found]
        self._counts.gather(every, self.param_groups[0]["capturable"])
        self._plans.clear()
        for bound in every:
            self.state[bound.param][bound.placed.prefix + "step"] = bound.step
        log.info("%s: states of %d parameters made", type(self).__name__, len(every))

    def _bind(self, param: Tensor, placed: Placed, group: Mapping[str, Any]) -> Bound:
        slab, shape = placed.slab, placed.slab.view.shape
        group = placed.overriding(group)
        rule = self._rule(group)
        device = placed.data().device
        if device.type == "meta":
            raise LayoutError(
                f"a parameter of shape {shape} is on the meta device: materialize the model "
                "(model.to_empty(device=...) and its initialization) before using the optimizer"
            )
        moments = [Moment.zeros(name, self._spec(name, group, shape), slab, device) for name in rule.moments]
        specs = [m.spec for m in moments]
        links = tuple(make_link(g, n, slab, specs) for g, n in placed.neighbours)
        state = self.state[param]
        step = state.setdefault(placed.prefix + "step", torch.zeros((), dtype=torch.float32))
        entries = put(moments, state, placed)
        work = Work(slab, moments, placed.data(), None, {}, links=links)
        return Bound(param, placed, rule, moments, links, step, -1, work, entries)

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
        self._uncompiled_update()
        return loss

    def _update(self) -> None:
        self._plan().run()

    _uncompiled_update = _update  # until keep_compiler_out

    def _plan(self) -> StepPlan:
        """The plan of the parameters now in the groups (ZeRO steps one group at a time)."""
        for plan in self._plans if self._held.stands(self.state) else ():
            if plan.serves(self.param_groups):
                return plan
        refuse_first(self.param_groups)
        if self._stepped:
            self.bind()
        else:
            on_all(self, self.bind)
            self._stepped = True
        if len(self._plans) >= 16:  # of groups put together in ever new ways
            self._plans.clear()
        self._plans.append(
            StepPlan(self.param_groups, self._bound, self._counts, self._rule, list(self._plans))
        )
        return self._plans[-1]

    # ---- reading and state_dict -----------------------------------------------------------------

    def moment(self, param: Tensor | str, name: str) -> Tensor:
        """This rank's values of a moment ("exp_avg", ...), dequantized: float32, of the local shape.

        param: the parameter, or its name where an engine's adapter knows it (flat parameters).
        Raises ValueError if the parameter is not this optimizer's or has no such moment.
        """
        every = self.bind()
        for bound in every:
            if not (bound.placed.name == param if isinstance(param, str) else bound.param is param):
                continue
            for moment in bound.moments:
                if moment.name == name:
                    values = backend_for(bound.placed.data().device).decode(moment)
                    return values.view(bound.placed.slab.shape)
        raise ValueError(f"no moment {name!r} of such a parameter in this optimizer")

    def report(self, *, predict: bool = True) -> Report:
        """What quantization does to each moment of this rank's elements: rows, and a table when printed.

        predict: with the errors and stale codes of the coming step, from the gradients that are there; call
        it between backward and step, on sharded parameters on all ranks (it communicates as a step does).
        False: only what the stored states show, without communication once they are bound.
        """
        return report(self._plan().members, self.param_groups, predict)

    def state_dict(self) -> dict[str, Any]:
        """torch's, with the packed states. Collective where columns are cut within blocks. Raises
        LayoutError, on all ranks, where a column cut does not allow codes to be DTensors."""
        check_shown(self.bind())
        out = super().state_dict()
        out["state"] = {i: dict(entry) for i, entry in out["state"].items()}  # to be edited without harm
        number = {p: i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        for param, entries in gathered(self.bind()).items():
            out["state"][number[param]].update(entries)
        return out

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave: states in place, options of the groups. All is checked first.

        Raises StateError (a ValueError) for states of another optimizer, spec or model, with nothing
        changed. (torch's own would cast codes and scales to the parameter's dtype.)
        """
        self.bind()
        state_dict = loading.shallow_copy(state_dict)
        for hook in list(self._optimizer_load_state_dict_pre_hooks.values()):
            state_dict = hook(self, state_dict) or state_dict
        saved_groups = loading.checked_groups(self, state_dict)
        ids = [i for g in saved_groups for i in g["params"]]
        params = [p for g in self.param_groups for p in g["params"]]
        found = {p: state_dict["state"].get(i) for i, p in zip(ids, params, strict=True)}
        frozen = {p for p in params if found[p] and p not in self._bound}
        self.bind(frozen)
        copies: list[tuple[Tensor, Tensor]] = []
        try:
            for saved_id, param in zip(ids, params, strict=True):
                if param in self._bound:
                    saved = ungathered(self._bound[param], found[param])
                    copies += loading.matched(self.state[param], saved, f"parameter {saved_id}")
        except StateError:
            for param in frozen:
                del self._bound[param], self.state[param]
            self.bind()
            raise
        for target, source in copies:
            target.copy_(source)
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            loading.adopt_options(group, saved)
        for post_hook in list(self._optimizer_load_state_dict_post_hooks.values()):
            post_hook(self)
