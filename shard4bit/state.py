"""The data of a quantized state: which tensors one moment of one slab has, and their shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shard4bit.layout import Slab
from shard4bit.spec import Factored, Full, MomentSpec, QuantSpec


@dataclass(frozen=True)
class Part:
    """One tensor of a moment.

    ``role`` says which dimensions it has and so how a sharding of the parameter carries over:
    "full" (the parameter's), "units" (row dimensions, then groups of ``unit`` columns), "rows" (row
    dimensions), "cols" (column dimensions), "scalar" (none).
    """

    suffix: str
    role: str
    dtype: torch.dtype
    unit: int = 1

    def global_shape(self, slab: Slab) -> tuple[int, ...]:
        view = slab.view
        units = -(-view.cols // self.unit)
        return self._shape(view.shape, view.lead, view.trail, units)

    def local_shape(self, slab: Slab) -> tuple[int, ...]:
        first, stop = slab.units(self.unit)
        return self._shape(slab.shape, slab.lead, slab.trail, stop - first)

    def _shape(
        self, full: tuple[int, ...], lead: tuple[int, ...], trail: tuple[int, ...], units: int
    ) -> tuple[int, ...]:
        return {
            "full": full,
            "units": (*lead, units),
            "rows": lead,
            "cols": trail,
            "scalar": (),
        }[self.role]


def parts(spec: MomentSpec) -> tuple[Part, ...]:
    """The tensors of a moment stored as ``spec``."""
    if isinstance(spec, Full):
        return (Part("", "full", torch.float32),)
    if isinstance(spec, Factored):
        kinds = (("row_mean", "rows"), ("col_mean", "cols"), ("mean", "scalar"))
        return tuple(Part(suffix, role, torch.float32) for suffix, role in kinds)
    codes = Part("codes", "units", torch.uint8, 8 // spec.bits)
    if spec.norm == "rank1":
        rows, cols = (Part(f"{r[:3]}_max", r, torch.float32) for r in ("rows", "cols"))
        return codes, rows, cols
    if spec.norm == "tensor":
        return codes, Part("absmax", "scalar", torch.float32)
    return codes, Part("absmax", "units", torch.float32, spec.block_size)


def state_key(moment: str, suffix: str) -> str:
    """The key of a moment's tensor in ``optimizer.state[p]``; packed data never bears the plain name."""
    return f"{moment}_{suffix}" if suffix else moment


@dataclass
class Moment:
    """One moment of one slab: ``tensors`` by suffix, local, zero at first (which decodes to zeros)."""

    name: str
    spec: MomentSpec
    slab: Slab
    tensors: dict[str, Tensor]

    @staticmethod
    def zeros(name: str, spec: MomentSpec, slab: Slab, device: torch.device) -> Moment:
        tensors = {
            part.suffix: torch.zeros(part.local_shape(slab), dtype=part.dtype, device=device)
            for part in parts(spec)
        }
        return Moment(name, spec, slab, tensors)

    def matrix(self, suffix: str) -> Tensor:
        """A tensor of role "units" as (stored rows, units), sharing its memory."""
        tensor = self.tensors[suffix]
        return tensor.view(self.slab.rows, tensor.shape[-1])

    def vector(self, suffix: str) -> Tensor:
        """A tensor of role "rows", "cols" or "full" as a vector, sharing its memory."""
        return self.tensors[suffix].view(-1)

    @property
    def quant(self) -> QuantSpec:
        assert isinstance(self.spec, QuantSpec), self.spec
        return self.spec
