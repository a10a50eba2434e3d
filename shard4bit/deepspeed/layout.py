"""What we know of DeepSpeed's insides: which parameters a flat partition of ZeRO holds, and where its engine
can be met. The only file that reads them; each is checked, and LayoutError names the versions that fit."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shard4bit.comm import Group, TorchGroup
from shard4bit.deepspeed.flat import EngineLayout, Run, run_of, state_prefix
from shard4bit.deepspeed.versions import read, unknown
from shard4bit.layout import Neighbours, Slab
from shard4bit.placement import Placed, place, plain_name

#: DeepSpeed's wrappers of our optimizer -> their lists, per parameter group, of the model's parameters, of
#: the flat buffer that these are views of (or None), and of the tensor or tensors that we update
WRAPPERS: Mapping[str, tuple[str, str | None, str]] = {
    "DeepSpeedZeroOptimizer": ("bit16_groups", "bit16_groups_flat", "single_partition_of_fp32_groups"),
    "BF16_Optimizer": ("bf16_groups", "bf16_groups_flat", "fp32_groups_flat_partition"),
    "FP16_UnfusedOptimizer": ("fp16_groups", None, "fp32_groups"),
}
_BUILDERS = ("_configure_zero_optimizer", "_configure_fp16_optimizer", "_configure_bf16_optimizer")
_MARK = "_shard4bit_attached"
_SAMPLES = 4096


# ---- where the engine is met ------------------------------------------------------------------------


def attach(
    prepare: Callable[[Any, Any], None],
    building: Callable[[Any], AbstractContextManager[None]],
    finish: Callable[[Any], None],
    scaling: Callable[[Any, Any, Callable[[], float]], AbstractContextManager[None]],
) -> None:
    """Have every engine call ``prepare(engine, optimizer)`` when it has its basic optimizer, build its own
    optimizer around that within ``building(optimizer)``, call ``finish(engine)`` when all is built, and go
    backward within ``scaling(engine, loss, a function of what it multiplies the loss by)``.
    Done once; later calls change nothing.

    This may come in the midst of an engine's initialization, when it asks for an optimizer by name: only
    methods that are called after that are replaced.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine

    if _MARK in vars(DeepSpeedEngine):
        return
    names = ("_do_optimizer_sanity_check", "_configure_lr_scheduler", "backward", *_BUILDERS)
    check, schedule, back, *builders = (read(DeepSpeedEngine, name) for name in names)
    arguments = _signature(back)

    @functools.wraps(check)
    def checking(engine: Any, basic_optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        prepare(engine, basic_optimizer)
        return check(engine, basic_optimizer, *args, **kwargs)

    @functools.wraps(schedule)
    def scheduling(engine: Any, *args: Any, **kwargs: Any) -> Any:
        finish(engine)
        return schedule(engine, *args, **kwargs)

    @functools.wraps(back)
    def backward(engine: Any, loss: Any, *args: Any, **kwargs: Any) -> Any:
        def factor() -> float:
            given = arguments.bind(engine, loss, *args, **kwargs).arguments
            steps = read(engine, "gradient_accumulation_steps")()
            return 1.0 / steps if given.get("scale_wrt_gas", True) else 1.0

        with scaling(engine, loss, factor):
            return back(engine, loss, *args, **kwargs)

    def built_within(build: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(build)
        def wrapped(engine: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            with building(optimizer):
                return build(engine, optimizer, *args, **kwargs)

        return wrapped

    DeepSpeedEngine._do_optimizer_sanity_check = checking
    DeepSpeedEngine._configure_lr_scheduler = scheduling
    DeepSpeedEngine.backward = backward
    for name, build in zip(_BUILDERS, builders, strict=True):
        setattr(DeepSpeedEngine, name, built_within(build))
    setattr(DeepSpeedEngine, _MARK, True)


def _signature(method: Any) -> inspect.Signature:
    """Of what DeepSpeed's decorators, which do not say so, call."""
    cells = [cell.cell_contents for cell in getattr(method, "__closure__", None) or ()]
    return inspect.signature(next(filter(inspect.isfunction, cells), method))


def accept(optimizer: type) -> None:
    """Let ZeRO take this class of optimizers without ``zero_allow_untested_optimizer``."""
    from deepspeed.runtime.zero import utils

    accepted = read(utils, "ZERO_SUPPORTED_OPTIMIZERS")
    if optimizer not in accepted:
        accepted.append(optimizer)


# ---- the engine's parameters ------------------------------------------------------------------------


def names_of(engine: Any) -> dict[Tensor, str]:
    """The names that DeepSpeed has for the model's parameters, without prefixes of wrappers."""
    return {param: plain_name(name) for param, name in read(engine, "param_names").items()}


def engine_layout(
    engine: Any, optimizer: torch.optim.Optimizer, options: Mapping[str, Mapping[str, Any]]
) -> EngineLayout:
    """Read where the parameters are, after DeepSpeed has built its own optimizer around ours.

    options: name -> what of its group's options a parameter has otherwise. Communicates nothing. Raises
    LayoutError if anything is not as it should be.
    """
    names, wrapper, out = names_of(engine), read(engine, "optimizer"), EngineLayout()
    if wrapper is optimizer:  # fp32 without ZeRO
        for group in optimizer.param_groups:
            for param in group["params"]:
                name = names[param]
                own = replace(place(param, name), name=name, options=dict(options.get(name, {})))
                out.add(param, [own], None)
        return out
    kind = type(wrapper).__name__
    if kind not in WRAPPERS or read(wrapper, "optimizer") is not optimizer:
        raise unknown(f"it wraps the optimizer in {kind}, not in one of {', '.join(WRAPPERS)}")
    params_name, flat_name, masters_name = WRAPPERS[kind]
    every, masters = read(wrapper, params_name), read(wrapper, masters_name)
    if not len(every) == len(masters) == len(optimizer.param_groups):
        raise unknown(f"{kind}.{params_name} and .{masters_name} do not match the parameter groups")
    for i, group in enumerate(optimizer.param_groups):
        members = [(names[p], p) for p in every[i]]
        if flat_name is None:
            _add_copies(out, members, masters[i], group, options)
        else:
            buffer, process_group = read(wrapper, flat_name)[i], read(wrapper, "real_dp_process_group")[i]
            _add_flat(out, members, buffer, masters[i], group, process_group, options)
    return out


def _add_copies(
    out: EngineLayout,
    members: Sequence[tuple[str, Tensor]],
    copies: Sequence[Tensor],
    group: Mapping[str, Any],
    options: Mapping[str, Mapping[str, Any]],
) -> None:
    """fp32 copies of whole parameters (stage 0 in bf16 or fp16)."""
    same = len(members) == len(copies) == len(group["params"])
    if not same or any(a is not b for a, b in zip(copies, group["params"], strict=True)):
        raise unknown("the fp32 copies of the parameters are not those of the optimizer's groups")
    for (name, param), copy in zip(members, copies, strict=True):
        if copy.shape != param.shape:
            raise unknown(f"the fp32 copy of {name} has shape {tuple(copy.shape)}, not {tuple(param.shape)}")
        own = replace(place(copy, name), name=name, options=dict(options.get(name, {})))
        out.add(copy, [own], None)


def _add_flat(
    out: EngineLayout,
    members: Sequence[tuple[str, Tensor]],
    buffer: Tensor,
    flat: Tensor,
    group: Mapping[str, Any],
    process_group: dist.ProcessGroup | None,
    options: Mapping[str, Mapping[str, Any]],
) -> None:
    """This rank's flat partition of a parameter group.

    buffer: all the group's parameters one after the other, with gaps, of which they are views.
    """
    process_group = process_group or dist.group.WORLD
    assert process_group is not None
    rank, world, part = dist.get_rank(process_group), dist.get_world_size(process_group), flat.numel()
    if len(group["params"]) != 1 or group["params"][0] is not flat or part * world != buffer.numel():
        raise unknown("a parameter group does not hold an equal part of its flat buffer")
    offsets = [_offset(name, param, buffer) for name, param in members]
    ends = [o + p.numel() for o, (_, p) in zip(offsets, members, strict=True)]
    order = sorted(zip(offsets, ends, strict=True))
    if any(end > start for (_, end), (start, _) in zip(order, order[1:], strict=False)):
        raise unknown("parameters overlap in their flat buffer")
    _check_copy(flat, buffer[rank * part : (rank + 1) * part])
    ours = TorchGroup(process_group)
    placed, partition = [], _Partition(flat)
    for (name, param), offset in zip(members, offsets, strict=True):
        run = run_of(offset, param.numel(), part, rank, world)
        neighbours = ((ours, Neighbours("run", run.edges)),) if world > 1 else ()
        own = options.get(name, {})
        placed.append(_placed(partition, name, tuple(param.shape), run, neighbours, own))
    out.add(flat, placed, ours if world > 1 else None)


def _offset(name: str, param: Tensor, buffer: Tensor) -> int:
    """Where a parameter begins in the buffer that it is a view of, in elements."""
    distance, size = param.data_ptr() - buffer.data_ptr(), buffer.element_size()
    inside = distance >= 0 and distance // size + param.numel() <= buffer.numel()
    if not inside or distance % size or param.dtype != buffer.dtype or not param.is_contiguous():
        raise unknown(f"{name} is not a view of its group's flat buffer")
    return distance // size


def _check_copy(flat: Tensor, part: Tensor) -> None:
    """Some elements of the partition must be those of the parameters: it is a copy of this rank's part."""
    stride = max(1, flat.numel() // _SAMPLES)
    ours, theirs = flat.detach()[::stride].to(part.dtype), part.detach()[::stride].to(flat.device)
    if not bool(((ours == theirs) | (theirs != theirs)).all()):
        raise unknown("a flat partition is not a copy of this rank's part of the parameters")


class _Partition:
    """This rank's flat partition of a parameter group, for all that it holds."""

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat

    def grad(self) -> Tensor | None:
        return self.flat.grad


def _placed(
    partition: _Partition,
    name: str,
    shape: tuple[int, ...],
    run: Run,
    neighbours: tuple[tuple[Group, Neighbours], ...],
    options: Mapping[str, Any],
) -> Placed:
    here = slice(run.at, run.at + run.stop - run.start)
    assert prod(shape) >= run.stop, (name, shape, run)

    def grad() -> Tensor | None:
        found = partition.grad()
        return None if found is None else found[here]

    return Placed(
        slab=Slab.run(shape, run.start, run.stop),
        data=lambda: partition.flat.detach()[here],
        grad=grad,
        neighbours=neighbours,
        prefix=state_prefix(name, run),
        name=name,
        options=dict(options),
        flat=partition,
        at=run.at,
    )


def loss_scale(engine: Any) -> float:
    """What gradients are divided by in an engine with fp32 copies of whole parameters; 1 in others, whose
    own optimizers scale the loss."""
    wrapper = read(engine, "optimizer")
    if type(wrapper).__name__ != "FP16_UnfusedOptimizer":
        return 1.0
    return float(read(getattr(wrapper, "loss_scale_config", wrapper), "cur_scale"))  # the wrapper's: 0.16.9


def publish(wrapper: Any, optimizer: torch.optim.Optimizer) -> None:
    """Bring what our optimizer updates into the model's own parameters, on all ranks. Collective."""
    kind = type(wrapper).__name__
    if wrapper is optimizer:
        return
    if WRAPPERS[kind][1] is not None:
        read(wrapper, "update_lp_params")()
        return
    params_name, _, masters_name = WRAPPERS[kind]
    with torch.no_grad():
        for params, copies in zip(read(wrapper, params_name), read(wrapper, masters_name), strict=True):
            for param, copy in zip(params, copies, strict=True):
                param.copy_(copy)
