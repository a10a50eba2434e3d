"""Where parameters lie: from a parameter (plain tensor or DTensor), or a model, to the slabs that this rank
holds. Uses torch's public API only."""

from __future__ import annotations

import gc
import sys
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from shard4bit.comm import Group
from shard4bit.errors import LayoutError
from shard4bit.layout import Neighbours, Slab
from shard4bit.sharding import Sharding, is_dtensor, to_local
from shard4bit.state import Part

#: put into names by torch.compile, activation checkpointing and FSDP1
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


class Flat(Protocol):
    """A tensor that holds parameters, or parts of them, one after the other."""

    def grad(self) -> Tensor | None:
        """Its gradient, one-dimensional. Raises ValueError where that is not one of all it holds."""


@dataclass(frozen=True)
class Placed:
    """Where one parameter's elements are on this rank.

    data, grad: give this rank's elements (``slab.shape``) and their gradient (or None).
    neighbours: the process groups along which it is sharded, and how.
    wrap: makes of a local state tensor what ``optimizer.state`` shows (a DTensor, or the tensor itself).
    obstacle: (part) -> why state_dict() cannot give a part as a DTensor, or None.
    gather: (local, part) -> the DTensor that state_dict() gives of a part that ``wrap`` cannot show as one,
        or None where it can; collective. ungather: (such a tensor, part) -> this rank's part of it.
    address: gives a number that changes if the elements move; None: that is the optimizer's tensor's address.
    itself: whether ``data`` is the optimizer's tensor as it is.
    holder: the tensor whose ``grad`` is what ``grad`` gives (a DTensor's: its local part, if it has these
        ``placements``), if there is one: read without a call. guard: raises where it must not be read now.
    flat, at: what has the gradient with those of other parameters, and where in it the elements begin.
    prefix: of the state's keys, where one optimizer parameter holds several parameters.
    name: the parameter's own name in the model, where an engine's adapter knows it.
    options: what of its group's options this parameter has otherwise.
    """

    slab: Slab
    data: Callable[[], Tensor]
    grad: Callable[[], Tensor | None]
    neighbours: tuple[tuple[Group, Neighbours], ...] = ()
    wrap: Callable[[Tensor, Part], Tensor] = lambda local, part: local
    obstacle: Callable[[Part], str | None] = lambda part: None
    gather: Callable[[Tensor, Part], Tensor | None] = lambda local, part: None
    ungather: Callable[[Tensor, Part], Tensor] = lambda saved, part: saved
    address: Callable[[], int] | None = None
    itself: bool = False
    holder: Tensor | None = None
    placements: Any = None
    guard: Callable[[], None] | None = None
    flat: Flat | None = None
    at: int = 0
    prefix: str = ""
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def overriding(self, group: Mapping[str, Any]) -> Mapping[str, Any]:
        """The group as this parameter has it; later changes of the group show through."""
        return ChainMap(self.options, group) if self.options else group  # type: ignore[arg-type]


class Item(NamedTuple):
    """A parameter as checkpoints see it. tensor: what optimizers know it by, perhaps with others.
    kept: where an engine keeps it, if not as the tensor lies."""

    name: str
    tensor: Tensor
    trainable: bool
    kept: Placed | None = None

    @property
    def placed(self) -> Placed:
        """Where its elements are. Raises LayoutError, on all ranks, for what cannot be served."""
        return self.kept or place(self.tensor, self.name)


class Source:
    """A model as checkpoints see it: its parameters and persistent buffers by name. Engines that keep
    parameters elsewhere than in the model have their own."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        # plain names of what DistributedDataParallel modules hold begin so; inner ones first
        self.replicated = sorted(
            (
                plain_name(f"{name}.module." if name else "module.")
                for name, module in model.named_modules(remove_duplicate=False)
                if isinstance(module, torch.nn.parallel.DistributedDataParallel)
            ),
            key=len,
            reverse=True,
        )

    def plain(self, name: str) -> str:
        """A parameter's or buffer's name without what wrappers put into it."""
        name = plain_name(name)
        for start in self.replicated:
            if name.startswith(start):
                name = start.removesuffix("module.") + name.removeprefix(start)
        return name

    def parameters(self) -> list[Item]:
        """Every parameter, frozen ones too, a shared one under its first name."""
        return [
            Item(self.plain(name), param, param.requires_grad)
            for name, param in self.model.named_parameters()
        ]

    def buffers(self) -> dict[Tensor, list[str]]:
        """Those that belong into a checkpoint. One that is registered several times counts under the first
        name by which it is persistent; then its others follow."""
        out: dict[Tensor, list[str]] = {}
        for name, buffer in self.persistent():
            out.setdefault(buffer, []).append(self.plain(name))
        return out

    def persistent(self) -> list[tuple[str, Tensor]]:
        """Every persistent buffer by each of its full names."""
        known = set(map(self.plain, self.model.state_dict(keep_vars=True)))
        named = self.model.named_buffers(remove_duplicate=False)
        return [(name, buffer) for name, buffer in named if self.plain(name) in known]

    def loaded(self) -> None:
        """Called on all ranks after a checkpoint has been read into the parameters."""


def plain_name(name: str) -> str:
    """A parameter's name without the prefixes of wrappers that are known by their words. (``module.`` of
    DistributedDataParallel may be a model's own: ``Source.plain`` looks at the types.)"""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def place(param: Tensor, name: str = "a parameter") -> Placed:
    """Describe a parameter. Raises LayoutError, on all ranks, for what cannot be served."""
    _refuse_flattened(param, name)
    if is_dtensor(param):
        return _place_dtensor(param, name)

    def grad() -> Tensor | None:
        return param.grad

    return Placed(slab=Slab.whole(param.shape), data=param.detach, grad=grad, itself=True, holder=param)


def _refuse_flattened(param: Tensor, name: str) -> None:
    """Raise LayoutError for the flat shards of other engines."""
    fsdp1 = sys.modules.get("torch.distributed.fsdp")
    if fsdp1 is not None and (
        isinstance(param, fsdp1.FlatParameter) or getattr(param, "_fsdp_flattened", False)
    ):
        raise LayoutError(
            f"{name} is part of a flat parameter of FSDP1 (FullyShardedDataParallel), whose rows and columns "
            "a plain optimizer cannot see: make the optimizer with shard4bit.fsdp.wrap(model, ...)"
        )
    if hasattr(param, "ds_id") and hasattr(param, "ds_tensor"):
        raise LayoutError(
            f"{name} is partitioned by DeepSpeed ZeRO stage 3, which is not supported: use stage 1 or 2, or "
            "torch.distributed.fsdp.fully_shard (FSDP2)"
        )


def refuse_stale(params: Sequence[Tensor]) -> None:
    """Raise LayoutError if plain parameters were replaced by sharded ones after the optimizer was built: none
    belongs to a module any more, while for each a module holds a DTensor of its shape that is not ours, or
    FSDP1's flat parameter of such a one.

    Looks at all live modules once, and only where DTensors or FSDP are in use.
    """
    plain = {id(p): p for p in params if not is_dtensor(p)}
    if not plain or not {"torch.distributed.tensor", "torch.distributed.fsdp"} & sys.modules.keys():
        return
    modules = [m for m in gc.get_objects() if issubclass(type(m), torch.nn.Module)]
    held = {id(p): p for m in modules for p in m.parameters(recurse=False)}
    ours = set(map(id, params))
    others = [p for i, p in held.items() if i not in ours]
    shapes = {tuple(p.shape) for p in others if is_dtensor(p)}
    shapes |= {tuple(shape) for p in others for shape in getattr(p, "_shapes", ())}  # of FSDP1's flat ones
    if all(i not in held and tuple(p.shape) in shapes for i, p in plain.items()):
        shape = tuple(next(iter(plain.values())).shape)
        raise LayoutError(
            f"parameters, such as one of shape {shape}, were replaced by sharded ones after the optimizer "
            "was built: build it after fully_shard (or parallelize_module), from the model's new parameters, "
            "or by shard4bit.fsdp.wrap after FullyShardedDataParallel"
        )


def _place_dtensor(param: Any, name: str) -> Placed:
    sharding = Sharding(param, name)
    placements = sharding.placements

    def grad() -> Tensor | None:
        found = param.grad
        if found is None:
            return None
        if is_dtensor(found) and found.placements != placements:
            found = found.redistribute(param.device_mesh, placements)
        return to_local(found)

    return Placed(
        slab=sharding.slab,
        data=lambda: to_local(param),
        grad=grad,
        neighbours=sharding.neighbours(),
        wrap=sharding.wrap,
        obstacle=sharding.obstacle,
        gather=sharding.gather,
        ungather=sharding.ungather,
        address=lambda: to_local(param).data_ptr(),
        holder=param,
        placements=placements,
    )
