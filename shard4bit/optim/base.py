"""What all quantized optimizers share: torch's conventions, the three-phase step, state_dict."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from shard4bit.dispatch import backend_for
from shard4bit.errors import StateError
from shard4bit.optim import loading, validate
from shard4bit.optim.binding import Binding
from shard4bit.optim.gathering import check_shown, gathered, ungathered
from shard4bit.optim.report import Report, report
from shard4bit.optim.stepping import StepPlan, keep_compiler_out, refuse_first
from shard4bit.optim.summary import summary
from shard4bit.optim.together import on_all


class QuantizedOptimizer(Binding):
    """Base of AdamW4bit and SGD4bit. Constructing communicates nothing and allocates no state.

    Layouts and states are bound at the first ``step``, ``state_dict``, ``load_state_dict`` or
    checkpoint, for every parameter that requires a gradient; on sharded parameters these calls are
    collective: every rank of the parameters' mesh makes them.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        keep_compiler_out(QuantizedOptimizer)
        self._given = set()
        self._forget()
        super().__init__(params, defaults)  # type: ignore[arg-type]

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
        keep_compiler_out(QuantizedOptimizer)
        self._shown = True  # ``copy.copy``'s original has these states as well
        self._forget()

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
        stands = not self._shown or self._held.stands(self._states)
        for plan in self._plans if stands else ():
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
                    copies += loading.matched(self._states[param], saved, f"parameter {saved_id}")
        except StateError:
            for param in frozen:
                del self._bound[param], self._states[param]
            self.bind()
            raise
        for target, source in copies:
            target.copy_(source)
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            loading.adopt_options(group, saved)
        for post_hook in list(self._optimizer_load_state_dict_post_hooks.values()):
            post_hook(self)
