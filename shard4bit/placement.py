"""From a parameter (plain tensor or DTensor) to the slab that this rank holds, its neighbours, and
the DTensors that carry its state. Uses torch's public API only."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shard4bit.comm import Group, TorchGroup
from shard4bit.errors import LayoutError
from shard4bit.layout import Neighbours, Range, Slab, matrix_view
from shard4bit.state import Part

#: put into names by torch.compile, activation checkpointing and FSDP1
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


@dataclass(frozen=True)
class Placed:
    """Where one parameter's elements are on this rank.

    data, grad: give this rank's elements (``slab.shape``) and their gradient (or None).
    neighbours: the process groups along which it is sharded, and how.
    wrap: makes of a local state tensor what ``optimizer.state`` shows (a DTensor, or the tensor itself).
    obstacle: (part) -> why a part cannot be shown as a DTensor, or None.
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
    prefix: str = ""
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)


class Item(NamedTuple):
    """A parameter as checkpoints see it. tensor: what optimizers know it by, perhaps with others."""

    name: str
    tensor: Tensor
    placed: Placed
    trainable: bool


class Source:
    """A model as checkpoints see it: its parameters and persistent buffers by name. Engines that keep
    parameters elsewhere than in the model have their own."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def parameters(self) -> list[Item]:
        """Every parameter, frozen ones too, a shared one under its first name."""
        return [
            Item(plain_name(name), param, place(param, plain_name(name)), param.requires_grad)
            for name, param in self.model.named_parameters()
        ]

    def buffers(self) -> list[tuple[str, Tensor]]:
        """Those that belong into a checkpoint."""
        persistent = set(self.model.state_dict(keep_vars=True))
        return [(plain_name(n), buffer) for n, buffer in self.model.named_buffers() if n in persistent]

    def loaded(self) -> None:
        """Called on all ranks after a checkpoint has been read into the parameters."""


def plain_name(name: str) -> str:
    """A parameter's name without the prefixes of wrappers."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a DTensor, without importing them (which takes half a second)."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def to_local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; a plain tensor itself."""
    with torch.no_grad():
        return tensor.to_local() if is_dtensor(tensor) else tensor.detach()  # type: ignore[attr-defined]


def place(param: Tensor, name: str = "a parameter") -> Placed:
    """Describe a parameter. Raises LayoutError, on all ranks, for what cannot be served."""
    _refuse_flattened(param, name)
    if is_dtensor(param):
        return _place_dtensor(param, name)

    def grad() -> Tensor | None:
        return param.grad

    return Placed(slab=Slab.whole(param.shape), data=param.detach, grad=grad)


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
    """Raise LayoutError if plain parameters were replaced by DTensors after the optimizer was built: none
    belongs to a module any more, while for each a module holds a DTensor of its shape that is not ours.

    Looks at all live modules once, and only where DTensors are in use.
    """
    plain = {id(p): p for p in params if not is_dtensor(p)}
    if not plain or sys.modules.get("torch.distributed.tensor") is None:
        return
    modules = [m for m in gc.get_objects() if issubclass(type(m), torch.nn.Module)]
    held = {id(p): p for m in modules for p in m.parameters(recurse=False)}
    ours = set(map(id, params))
    shapes = {tuple(p.shape) for i, p in held.items() if i not in ours and is_dtensor(p)}
    if all(i not in held and tuple(p.shape) in shapes for i, p in plain.items()):
        shape = tuple(next(iter(plain.values())).shape)
        raise LayoutError(
            f"parameters, such as one of shape {shape}, were replaced by sharded ones after the optimizer "
            "was built: build it after fully_shard (or parallelize_module), from the model's new parameters"
        )


def _place_dtensor(param: Any, name: str) -> Placed:
    sharding = _Sharding(param, name)

    def grad() -> Tensor | None:
        found = param.grad
        if found is None:
            return None
        if is_dtensor(found) and found.placements != param.placements:
            found = found.redistribute(param.device_mesh, param.placements)
        return to_local(found)

    return Placed(
        slab=sharding.slab,
        data=lambda: to_local(param),
        grad=grad,
        neighbours=sharding.neighbours(),
        wrap=sharding.wrap,
        obstacle=sharding.obstacle,
    )


class _Sharding:
    """A DTensor's mesh dimensions, sorted into those that shard its rows and those that shard its
    columns."""

    def __init__(self, param: Any, name: str) -> None:
        self.mesh, self.placements, self.name = param.device_mesh, param.placements, name
        chunks = param.__create_chunk_list__()
        if len(chunks) != 1 or any(p.is_partial() for p in self.placements):
            raise LayoutError(
                f"{name} has placements {self.placements} on {self.mesh}: expected Shard and Replicate "
                "with one contiguous piece a rank"
            )
        sizes, offsets = chunks[0].sizes, chunks[0].offsets
        ends = zip(offsets, sizes, param.shape, strict=True)
        self.ranges: list[Range] = [(min(o, d), min(o, d) + n) for o, n, d in ends]
        self.view = matrix_view(param.shape)
        self._check_columns()
        self.slab = Slab.box(param.shape, self.ranges)
        assert tuple(to_local(param).shape) == self.slab.shape, (name, self.slab)

    def _check_columns(self) -> None:
        """Refuse what would not give every rank one window of columns, by a rule that holds on all ranks
        alike, those with an empty part too."""
        view = self.view
        dims = [self._sharded_dim(mesh_dim) for mesh_dim in range(self.mesh.ndim)]
        cut = [mesh_dim for mesh_dim, dim in enumerate(dims) if dim is not None and dim >= view.split]
        strided = any(not self.placements[mesh_dim].is_shard() for mesh_dim in cut)
        gaps = any(size > 1 for mesh_dim in cut for size in view.shape[view.split : dims[mesh_dim]])
        if len(cut) > 1 or strided or gaps:
            raise LayoutError(
                f"{self.name} of shape {view.shape}, with placements {self.placements}, has its columns "
                f"(dimensions {tuple(range(view.split, len(view.shape)))}) cut twice or in strides: shard "
                f"a dimension before them, or only dimension {view.split}, by one mesh dimension"
            )

    def _sharded_dim(self, mesh_dim: int) -> int | None:
        """The tensor dimension that a mesh dimension of more than one rank shards."""
        placement = self.placements[mesh_dim]
        if placement.is_replicate() or self.mesh.size(mesh_dim) == 1:
            return None
        return placement.dim % len(self.view.shape)

    def neighbours(self) -> tuple[tuple[Group, Neighbours], ...]:
        out: list[tuple[Group, Neighbours]] = []
        for mesh_dim in range(self.mesh.ndim):
            dim = self._sharded_dim(mesh_dim)
            if dim is None:
                continue
            group = TorchGroup(self.mesh.get_group(mesh_dim))
            if dim < self.view.split:
                out.append((group, Neighbours("rows")))
            else:
                out.append((group, Neighbours("cols", self._column_edges(mesh_dim, dim))))
        return tuple(out)

    def _column_edges(self, mesh_dim: int, dim: int) -> tuple[int, ...]:
        """Global column boundaries between the ranks of the mesh dimension that cuts the columns."""
        edges = chunk_edges(0, self.view.shape[dim], self.mesh.size(mesh_dim))
        return tuple(e * prod(self.view.shape[dim + 1 :]) for e in edges)

    def obstacle(self, part: Part) -> str | None:
        if part.role != "units":
            return None
        for _, neighbours in self.neighbours():
            if neighbours.kind != "cols":
                continue
            edges, cols = neighbours.edges, self.view.cols
            units = [-(-e // part.unit) for e in edges]
            even = tuple(units) == chunk_edges(units[0], units[-1], len(units) - 1)
            if not even or any(e % part.unit and e != cols for e in edges):
                return (
                    f"the columns of {self.name} are cut at {edges}, which are not multiples of "
                    f"{part.unit} in even steps: the {part.suffix} of its state cannot be a DTensor"
                )
        return None

    def wrap(self, local: Tensor, part: Part) -> Tensor:
        """A DTensor over ``local`` (sharing its memory) with the parameter's mesh."""
        from torch.distributed.tensor import DTensor

        if self.obstacle(part) is not None:
            return local
        shape = part.global_shape(self.slab)
        return DTensor.from_local(
            local,
            self.mesh,
            self._state_placements(part),
            run_check=False,
            shape=torch.Size(shape),
            stride=torch.empty(shape, device="meta").stride(),
        )

    def _state_placements(self, part: Part) -> Sequence[Any]:
        from torch.distributed.tensor import Replicate, Shard

        split = self.view.split
        out: list[Any] = []
        for mesh_dim, placement in enumerate(self.placements):
            dim = self._sharded_dim(mesh_dim)
            if part.role == "full":
                out.append(placement)
            elif dim is None or part.role == "scalar":
                out.append(Replicate())
            elif dim < split:
                out.append(placement if part.role in ("units", "rows") else Replicate())
            elif part.role == "cols":
                out.append(Shard(dim - split))
            else:
                out.append(Shard(split) if part.role == "units" else Replicate())
        return out


def chunk_edges(start: int, stop: int, parts: int) -> tuple[int, ...]:
    """Boundaries of [start, stop) cut as torch.chunk and DTensor's Shard do."""
    step = -(-(stop - start) // parts)
    return tuple(min(start + k * step, stop) for k in range(parts + 1))
