"""How a DTensor is sharded: the slab that this rank holds, its neighbours, and the DTensors that carry its
state. Uses torch's public API only."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import prod
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from shard4bit.comm import Group, TorchGroup
from shard4bit.errors import LayoutError
from shard4bit.layout import Neighbours, Range, Slab, matrix_view
from shard4bit.state import Part

_LOCAL = attrgetter("_local_tensor")


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a DTensor, without importing them (which takes half a second)."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def to_local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; a plain tensor itself."""
    # (to_local() gives the same, but takes microseconds, which every step would pay for every parameter)
    return tensor._local_tensor if is_dtensor(tensor) else tensor.detach()  # type: ignore[attr-defined]


def local_parts(tensors: Sequence[Any]) -> list[Tensor]:
    """The same of many DTensors, without a call from Python for each. Raises AttributeError for others."""
    return list(map(_LOCAL, tensors))


class Sharding:
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
        self._check_strides()
        self._check_columns()
        self.slab = Slab.box(param.shape, self.ranges)
        assert tuple(to_local(param).shape) == self.slab.shape, (name, self.slab)

    def _check_strides(self) -> None:
        """Refuse strided shards but FSDP2's over tensor parallelism, whose mesh dimensions to the right cut
        the strides again. (Of others, DTensor reports a contiguous piece that is not theirs.)"""
        for mesh_dim, placement in enumerate(self.placements):
            factor = getattr(placement, "split_factor", None)
            if factor is None or self.mesh.size(mesh_dim) == 1:
                continue
            right = [j for j in range(mesh_dim + 1, self.mesh.ndim) if self._sharded_dim(j) == placement.dim]
            if prod(self.mesh.size(j) for j in right) != factor:
                raise LayoutError(
                    f"{self.name} of shape {self.view.shape} has placements {self.placements}, which give a "
                    "rank elements in strides: expected one contiguous piece a rank; shard it by Shard"
                )

    def _check_columns(self) -> None:
        """Refuse what would not give every rank one window of columns, by a rule that holds on all ranks
        alike, those with an empty part too."""
        view = self.view
        dims = [self._sharded_dim(mesh_dim) for mesh_dim in range(self.mesh.ndim)]
        cut = [mesh_dim for mesh_dim in range(self.mesh.ndim) if self._cuts_columns(mesh_dim)]
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
            if dim is None or self.mesh.size(mesh_dim) == 1:
                continue  # not cut along this dimension
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
        edges = self._cut_units(part)
        if edges is None or part.dtype != torch.uint8:
            return None
        return (
            f"the columns of {self.name} are cut at {edges}, which are not multiples of {part.unit} in even "
            f"steps: the {part.suffix} of its state cannot be a DTensor"
        )

    def _cut_units(self, part: Part) -> tuple[int, ...] | None:
        """The column edges, if they do not cut the units as Shard would."""
        for _, neighbours in self.neighbours() if part.role == "units" else ():
            if neighbours.kind != "cols":
                continue
            edges, cols = neighbours.edges, self.view.cols
            units = [-(-e // part.unit) for e in edges]
            even = tuple(units) == chunk_edges(units[0], units[-1], len(units) - 1)
            if not even or any(e % part.unit and e != cols for e in edges):
                return edges
        return None

    def gather(self, local: Tensor, part: Part) -> Tensor | None:
        """All units of this rank's rows, replicated over the ranks that cut the columns."""
        if self._cut_units(part) is None:
            return None
        first, stop = self.slab.units(part.unit)
        shape = part.global_shape(self.slab)
        whole = torch.zeros((*self.slab.lead, shape[-1]), dtype=local.dtype, device=local.device)
        if whole.numel() and stop > first:
            whole[..., first:stop] = local
        for group, neighbours in self.neighbours():
            if neighbours.kind == "cols":  # they agree about blocks that several of them hold
                group.all_reduce(whole.view(torch.int32), maximum=True)
        return self._dtensor(whole, shape, self._gathered_placements(part))

    def ungather(self, saved: Tensor, part: Part) -> Tensor:
        first, stop = self.slab.units(part.unit)
        if self._cut_units(part) is None or tuple(saved.shape) != part.global_shape(self.slab):
            return saved
        from torch.distributed.tensor import distribute_tensor

        placements = self._gathered_placements(part)
        if is_dtensor(saved):
            saved = saved.redistribute(self.mesh, placements)  # type: ignore[attr-defined]
        else:
            saved = distribute_tensor(saved, self.mesh, placements, src_data_rank=None)
        return to_local(saved)[..., first:stop]

    def wrap(self, local: Tensor, part: Part) -> Tensor:
        """A DTensor over ``local`` (sharing its memory) with the parameter's mesh."""
        if self._cut_units(part) is not None:
            return local
        return self._dtensor(local, part.global_shape(self.slab), self._state_placements(part))

    def _dtensor(self, local: Tensor, shape: tuple[int, ...], placements: Sequence[Any]) -> Tensor:
        from torch.distributed.tensor import DTensor

        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
        )

    def _gathered_placements(self, part: Part) -> Sequence[Any]:
        from torch.distributed.tensor import Replicate

        pairs = enumerate(self._state_placements(part))
        return [Replicate() if self._cuts_columns(mesh_dim) else p for mesh_dim, p in pairs]

    def _cuts_columns(self, mesh_dim: int) -> bool:
        dim = self._sharded_dim(mesh_dim)
        return dim is not None and dim >= self.view.split

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
