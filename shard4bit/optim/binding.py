"""Layouts and states of parameters: made lazily, and made anew where users changed something."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any, ClassVar

import torch
from torch import Tensor

from shard4bit.backend import Work
from shard4bit.comm import make_link
from shard4bit.errors import LayoutError
from shard4bit.log import log
from shard4bit.maths.update import Rule
from shard4bit.optim import validate
from shard4bit.optim.bound import Bound
from shard4bit.optim.capture import Counts
from shard4bit.optim.held import Held, check_specs, put, replaced
from shard4bit.optim.stepping import StepPlan
from shard4bit.placement import Placed, is_dtensor, place, refuse_stale
from shard4bit.spec import Full, MomentSpec, is_quantized, parse_spec
from shard4bit.state import Moment


class Binding(torch.optim.Optimizer):
    """An optimizer that knows of each of its parameters where it is, and its state on this rank."""

    #: moment name -> the group's option that names its spec, and whether it is signed
    _spec_options: ClassVar[Mapping[str, tuple[str, bool]]]
    _given: set[int]  # identities of the parameters that the caller put in; not there after unpickling

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

    # ---- states ---------------------------------------------------------------------------------

    _shown: bool  # whether ``state`` has been given to anybody, who may change it at any time then

    @property
    def state(self) -> Any:
        """torch's: parameter -> its tensors by name. Once anybody has asked for it, every step looks whether
        they still are those that it works on."""
        self._shown = True
        return self._states

    @state.setter
    def state(self, state: Any) -> None:
        self._shown = "state" in vars(self)  # the first one is of torch's own constructor
        vars(self)["state"] = state

    @property
    def _states(self) -> Any:
        return vars(self)["state"]

    def _forget(self) -> None:
        """Nothing is bound; states in ``self.state`` will be taken up again."""
        self._bound: dict[Tensor, list[Bound]] = {}
        self._counts = Counts(captured=vars(self).get("_counts", Counts()).captured)
        self._plans: list[StepPlan] = []
        self._stepped = False  # a first step is everybody's first
        self._held = Held()

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

    def _places(self, param: Tensor) -> list[Placed]:
        """The same, for those who may ask before anything is bound; nothing where a parameter cannot be
        served, which binding says, on all ranks alike."""
        try:
            return self._place(param, "a parameter")
        except Exception:
            return []

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
                wanted = param.requires_grad or param in frozen or self._states.get(param)
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
        self._held.take(self._states)
        return out

    def _follow_state(self) -> None:
        """Forget what users took out of ``self.state``, or put other tensors in the place of."""
        for param in [p for p, bounds in self._bound.items() if replaced(bounds, self._states.get(p))]:
            del self._bound[param]
            self._counts.vector, self._plans = torch.zeros(0), []  # made anew, with what takes its place

    def _drop_replaced(self, params: list[Tensor]) -> None:
        """Forget what left the groups before any step: accelerate has read a state_dict by then (FSDP2)."""
        gone = self._bound.keys() - set(params)
        if not any(bound.step for param in gone for bound in self._bound[param]):
            for param in gone:
                del self._bound[param], self._states[param]
            self._counts.vector = torch.zeros(0)  # gathered anew for what takes their place
        elif len(gone) == len(self._bound) and all(map(is_dtensor, params)):
            raise LayoutError("sharded parameters replaced those with states: shard before steps and loads")

    def _gather_steps(self) -> None:
        """Of all that is bound. Plans hold the earlier vector."""
        every = [bound for found in self._bound.values() for bound in found]
        self._counts.gather(every, self.param_groups[0]["capturable"])
        self._plans.clear()
        for bound in every:
            self._states[bound.param][bound.placed.prefix + "step"] = bound.step
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
        state = self._states[param]
        step = state.setdefault(placed.prefix + "step", torch.zeros((), dtype=torch.float32))
        entries = put(moments, state, placed)
        work = Work(slab, moments, placed.data(), [None], {}, links=links)
        return Bound(param, placed, rule, moments, links, step, -1, work, entries)
