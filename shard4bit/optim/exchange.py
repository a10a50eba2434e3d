"""States to and from other optimizers: ``import_state`` quantizes theirs once, ``export_state`` gives ours
as torch's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from shard4bit.comm import Group
from shard4bit.dispatch import backend_for
from shard4bit.errors import LayoutError, StateError
from shard4bit.layout import Slab
from shard4bit.optim import foreign
from shard4bit.optim.base import QuantizedOptimizer
from shard4bit.optim.bound import Bound
from shard4bit.optim.encode import encode
from shard4bit.optim.loading import OWN_OPTIONS, RUN_OPTIONS
from shard4bit.optim.matching import match, options_of
from shard4bit.optim.together import on_all
from shard4bit.placement import is_dtensor, to_local
from shard4bit.spec import Full
from shard4bit.state import parts

_FULL = parts(Full())[0]
_TORCHS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


@torch.no_grad()
def import_state(
    optimizer: QuantizedOptimizer,
    source: torch.optim.Optimizer | Mapping[str, Any],
    *,
    hyperparameters: bool = True,
) -> None:
    """Take over the moments and step counts of another optimizer; on sharded parameters collective.

    source: torch's AdamW (Adam) or SGD, torchao's AdamW4bit, AdamW8bit or AdamWFp8, or bitsandbytes' 8-bit
        ones, over the very same parameters; or its state_dict (parameters are then matched by name where
        both optimizers have names, else by position). Its tensors are sharded as the parameters are, or
        whole on every rank.
    hyperparameters: take lr, betas, weight_decay, ... too; the groups must then be the same.

    Moments are dequantized and quantized once, parameter by parameter. The result is that of the whole
    moments, whatever the sharding. Raises StateError (a ValueError) with nothing changed for states of
    other parameters or of other rules; if one rank raises, the others raise RuntimeError.
    """
    failure: BaseException | None = None
    states: dict[Tensor, Any] = {}
    adopted: list[dict[str, Any]] = []
    try:
        matching = match(optimizer, source)
        states = matching.states
        if hyperparameters:
            adopted = options_of(optimizer, matching)
    except Exception as error:  # the other ranks must hear of it before it is raised
        failure = error
    bounds = on_all(optimizer, lambda: optimizer.bind({p for p, state in states.items() if state}))
    plan: list[tuple[int, dict[str, foreign.Foreign]]] = [(0, {})] * len(bounds)
    if failure is None:
        try:
            plan = [_planned(bound, states.get(bound.param)) for bound in bounds]
        except Exception as error:
            failure = error
    steps = _agree(bounds, [step for step, _ in plan], failure)
    for bound, step, (_, moments) in zip(bounds, steps, plan, strict=True):
        failure = _take(bound, moments, failure)
        bound.step.fill_(step)
    _agree(bounds, [0] * len(bounds), failure)
    for group, options in zip(optimizer.param_groups, adopted, strict=bool(adopted)):
        for key, value in options.items():
            group[key] = torch.full_like(group[key], value) if isinstance(group.get(key), Tensor) else value


# ---- one parameter ----------------------------------------------------------------------------------


def _planned(bound: Bound, state: Any) -> tuple[int, dict[str, foreign.Foreign]]:
    what = f"parameter {bound.placed.name or ''} of shape {bound.shape}".replace("  ", " ")
    step, moments = foreign.read(state, bound.rule.moments, what)
    for name, moment in moments.items():
        data, whole = moment.data, bound.placed.slab.view.shape
        held = tuple(bound.param.shape) if is_dtensor(data) else tuple(to_local(bound.param).shape)
        if tuple(data.shape) not in (whole, held):
            raise StateError(f"{what}: {name} has shape {tuple(data.shape)} in the source")
    return step, moments


def _take(
    bound: Bound, moments: Mapping[str, foreign.Foreign], failure: BaseException | None
) -> BaseException | None:
    """Store the source's moments; zeros where it has none. Returns this rank's first error."""
    slab, device = bound.placed.slab, bound.placed.data().device
    for moment in bound.moments:
        values = torch.zeros(0)
        if failure is None:
            try:
                if moment.name in moments:
                    values = _own_values(bound, moments[moment.name]).to(device)
                else:
                    values = torch.zeros(slab.numel, device=device)
                if moment.name == "exp_avg_sq" and bool((values < 0).any()):
                    raise StateError(
                        f"exp_avg_sq of a parameter of shape {bound.shape} is negative somewhere"
                    )
            except Exception as error:  # encode tells the other ranks
                failure = error
        failure = encode(moment, values, bound.placed.neighbours, device, failure)
    return failure


def _own_values(bound: Bound, moment: foreign.Foreign) -> Tensor:
    """This rank's values (slab.numel,) float32. Collective if the source is sharded otherwise."""
    data, param, slab = moment.data, bound.param, bound.placed.slab
    if is_dtensor(data):
        if not is_dtensor(param):
            data = data.full_tensor()  # type: ignore[attr-defined]
        elif (data.device_mesh, data.placements) != (param.device_mesh, param.placements):  # type: ignore[attr-defined]
            data = data.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
        data = to_local(data)
    values = moment.values(data)
    if tuple(values.shape) == slab.view.shape:
        return _cut(values, slab)
    start, stop = _window(bound)
    return values.reshape(-1)[start:stop]


def _cut(whole: Tensor, slab: Slab) -> Tensor:
    """A slab's elements (numel,) of a whole parameter's tensor."""
    if slab.is_whole or slab.numel == 0:
        return whole.reshape(-1)[: slab.numel]
    matrix = whole.reshape(slab.view.rows, slab.view.cols)
    rows = torch.cat([matrix[a:b, slab.col0 : slab.col1] for a, b in slab.row_ranges]).reshape(-1)
    return rows[slab.head : rows.numel() - slab.tail]


def _window(bound: Bound) -> tuple[int, int]:
    """[start, stop) of a parameter's elements in the tensor of the groups that holds it, which is flat
    where it holds several."""
    own, whole = bound.placed.data(), to_local(bound.param)
    if own.numel() in (0, whole.numel()):
        return 0, own.numel()
    start = (own.data_ptr() - whole.data_ptr()) // whole.element_size()
    if not 0 <= start <= whole.numel() - own.numel():
        raise LayoutError(f"a parameter of shape {bound.shape} does not lie in the tensor that holds it")
    return start, start + own.numel()


def _agree(bounds: list[Bound], steps: list[int], failure: BaseException | None) -> list[int]:
    """The largest step count of each parameter over the ranks that share it; raises if any rank failed."""
    members: dict[Group, list[int]] = {}
    for number, bound in enumerate(bounds):
        for group, _ in bound.placed.neighbours:
            members.setdefault(group, []).append(number)
    elsewhere = False
    for group, numbers in members.items():
        failed = failure is not None or elsewhere
        vector = torch.tensor(
            [float(failed), *(float(steps[n]) for n in numbers)],
            device=bounds[numbers[0]].placed.data().device,
        )
        group.all_reduce(vector, maximum=True)
        flag, *largest = vector.tolist()
        elsewhere |= bool(flag)
        for number, step in zip(numbers, largest, strict=True):
            steps[number] = int(step)
    if failure is not None:
        raise failure
    if elsewhere:
        raise RuntimeError("importing the state failed on another rank; see that rank's error")
    return steps


# ---- export -----------------------------------------------------------------------------------------


@torch.no_grad()
def export_state(optimizer: QuantizedOptimizer) -> dict[str, Any]:
    """Ours as a state_dict of ``torch.optim.AdamW`` (or ``SGD``) over the same parameters.

    Moments are dequantized: float32, sharded as the parameters are (DTensors where these are). Needs 8
    bytes a parameter (4 for SGD). Raises LayoutError for a flat tensor of FSDP1 that holds parameters of
    several weight decays, of which torch has one.
    """
    of: dict[Tensor, list[Bound]] = {}
    for bound in optimizer.bind():
        of.setdefault(bound.param, []).append(bound)
        others = sorted(set(bound.placed.options) - set(OWN_OPTIONS))
        if others:
            raise LayoutError(
                f"{bound.placed.name} has {others} other than its flat tensor's group, which torch cannot "
                "express: wrap the model with use_orig_params=True"
            )
    states, groups, number = {}, [], 0
    for group in optimizer.param_groups:
        for i, param in enumerate(group["params"], number):
            if param in of:
                states[i] = _exported(param, of[param])
        numbers = list(range(number, number + len(group["params"])))
        number += len(numbers)
        torchs = _TORCHS[optimizer._rule(group).name]([torch.zeros(1)]).param_groups[0]
        taken = {k: v for k, v in group.items() if k not in (*OWN_OPTIONS, *RUN_OPTIONS)}
        groups.append({**torchs, **taken, "params": numbers})
    return {"state": states, "param_groups": groups}


def _exported(param: Tensor, bounds: list[Bound]) -> dict[str, Any]:
    steps = max(float(bound.step) for bound in bounds)
    out: dict[str, Any] = {}
    names = list(bounds[0].rule.moments)
    if "exp_avg" in names:
        out["step"] = torch.tensor(steps, dtype=torch.float32)
    elif not names or steps == 0:  # torch's SGD has no buffer yet
        return {"momentum_buffer": None}
    for index, name in enumerate(names):
        values = [backend_for(b.placed.data().device).decode(b.moments[index]) for b in bounds]
        if len(bounds) == 1 and values[0].numel() == to_local(param).numel():
            placed = bounds[0].placed
            out[name] = placed.wrap(values[0].view(placed.slab.shape), _FULL)
            continue
        flat = torch.zeros_like(to_local(param), dtype=torch.float32)
        for bound, found in zip(bounds, values, strict=True):
            start, stop = _window(bound)
            flat.view(-1)[start:stop] = found
        out[name] = flat
    return out
