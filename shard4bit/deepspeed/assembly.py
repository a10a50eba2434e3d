"""Whole tensors from the ranks' stretches of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from shard4bit.deepspeed.files import Stretch
from shard4bit.errors import CheckpointError
from shard4bit.layout import Slab
from shard4bit.spec import MomentSpec
from shard4bit.state import Moment, Part, parts, state_key

_CPU = torch.device("cpu")


def check(name: str, shape: tuple[int, ...], held: Iterable[Stretch]) -> None:
    """Raise CheckpointError if elements of a parameter are missing or doubled."""
    edges = sorted((s.start, s.stop) for s in held if s.stop > s.start)
    starts, stops = [a for a, _ in edges], [b for _, b in edges]
    if [*starts, Slab.whole(shape).view.numel] != [0, *stops]:
        raise CheckpointError(f"{name} of shape {shape} is not whole: the files have its elements {edges}")


def elements(shape: tuple[int, ...], held: Sequence[Stretch], partitions: Sequence[Tensor]) -> Tensor:
    """A whole parameter from the ranks' partitions (flat) of its group."""
    whole = torch.empty(Slab.whole(shape).view.numel, dtype=partitions[0].dtype)
    for stretch, partition in zip(held, partitions, strict=True):
        whole[stretch.start : stretch.stop] = partition.detach()[stretch.at :][: stretch.stop - stretch.start]
    return whole.view(shape)


def moment(name: str, shape: tuple[int, ...], held: Iterable[Stretch], key: str, spec: MomentSpec) -> Moment:
    """A whole moment ("exp_avg", ...) of a parameter. Raises CheckpointError for tensors of other specs."""
    whole = Moment.zeros(key, spec, Slab.whole(shape), _CPU)
    for stretch in held:
        slab = Slab.run(shape, stretch.start, stretch.stop) if stretch.flat else whole.slab
        for part in parts(spec):
            local = stretch.state.get(state_key(key, part.suffix))
            if local is None or tuple(local.shape) != part.local_shape(slab) or local.dtype != part.dtype:
                got = "nothing" if local is None else f"{local.dtype} {tuple(local.shape)}"
                raise CheckpointError(
                    f"{name}: {state_key(key, part.suffix)} of [{stretch.start}, {stretch.stop}) is {got}, "
                    f"expected {part.dtype} {part.local_shape(slab)}"
                )
            if slab.numel or part.role == "scalar":
                _copy(whole, part, slab, local)
    return whole


def _copy(moment: Moment, part: Part, slab: Slab, local: Tensor) -> None:
    """Put a run's tensor into the whole parameter's. Bytes, blocks and rows that a cut divides are in two
    runs: bytes have their other nibble zero, the others are the same in both."""
    whole = moment.tensors[part.suffix]
    if part.role == "scalar":
        whole.copy_(local)
    elif part.role == "cols":
        whole.view(-1).copy_(local.view(-1))
    elif part.role == "rows":
        row0, row1 = slab.row_ranges[0]
        whole.view(-1)[row0:row1] = local.view(-1)
    elif part.role == "full":
        start = slab.row_ranges[0][0] * slab.view.cols + slab.head
        whole.view(-1)[start : start + slab.numel] = local.view(-1)
    else:
        matrix, own = whole.view(slab.view.rows, -1), local.view(slab.rows, -1)
        row0 = slab.row_ranges[0][0]
        for rect in slab.rects():
            rows, units = (
                slice(row0 + rect.row0, row0 + rect.row1),
                slice(rect.col0 // part.unit, -(-rect.col1 // part.unit)),
            )
            new = own[rect.row0 : rect.row1, units]
            if part.dtype == torch.uint8 and part.unit > 1:
                matrix[rows, units] |= new
            else:
                matrix[rows, units] = new
