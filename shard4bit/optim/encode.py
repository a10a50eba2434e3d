"""Quantizing given values, once, to the bits that they have under any sharding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shard4bit.backend import Work, Works
from shard4bit.comm import Group, Reduction, make_link
from shard4bit.dispatch import backend_for
from shard4bit.layout import Neighbours, Slab
from shard4bit.maths.update import SGD
from shard4bit.spec import Factored, Full
from shard4bit.state import Moment

#: of the first step of SGD: its new buffer is the gradient itself
_COPY = SGD.scalars(dict.fromkeys(("lr", "momentum", "dampening", "weight_decay", "nesterov"), 0.0), 1)


def encode(
    moment: Moment,
    values: Tensor,
    neighbours: Sequence[tuple[Group, Neighbours]],
    device: torch.device,
    failure: BaseException | None = None,
) -> BaseException | None:
    """Store ``values`` (slab.numel,) float32 in a moment of this rank, in place; collective along
    ``neighbours``.

    It is one step of SGD on a parameter that is thrown away, with the values as the gradient, by the same
    measure, reduce and apply as any step. failure: this rank has no values, and takes part only to tell
    the others; where something is shared, it is raised here, and RuntimeError on the other ranks. Returns
    the failure where it could not be told yet.
    """
    if isinstance(moment.spec, Full):
        if failure is None:
            moment.tensors[""].copy_(values.view(moment.tensors[""].shape))
        return failure
    slab, works = moment.slab, Works()
    links = tuple(make_link(group, near, slab, [moment.spec]) for group, near in neighbours)
    work = Work(slab, [moment], torch.empty(0, device=device), [None], _COPY, links=links)
    works.append(work)
    backend = backend_for(device)
    if failure is None:
        try:
            if isinstance(moment.spec, Factored):
                work.fresh = [_sums(values, slab)]
            else:
                work.param = torch.zeros(slab.shape, dtype=torch.bfloat16, device=device)
                work.grad = values.view(slab.shape)
                backend.measure(SGD, works)
        except Exception as error:  # the other ranks must hear of it before it is raised
            failure = error
    if failure is not None and not links:
        return failure
    reduction = Reduction(works)
    reduction.run(failure)
    if isinstance(moment.spec, Factored):
        reduction.settle()
        _store_means(moment, work.fresh[0])
    else:
        backend.apply(SGD, works, reduction)
        reduction.settle()
    return None


def _sums(values: Tensor, slab: Slab) -> dict[str, Tensor]:
    """float64 sums of the values (numel,) over each stored row and column, and over all."""
    sizes = {"row_sum": slab.rows, "col_sum": slab.width, "sum": 1}
    out = {k: torch.zeros(n, dtype=torch.float64, device=values.device) for k, n in sizes.items()}
    for rect in slab.rects():
        window = values[rect.offset : rect.offset + rect.numel].view(-1, rect.width)
        rows = window.sum(1, dtype=torch.float64)
        out["row_sum"][rect.row0 : rect.row1] += rows
        out["col_sum"][rect.col0 - slab.col0 : rect.col1 - slab.col0] += window.sum(0, dtype=torch.float64)
        out["sum"] += rows.sum()
    return out


def _store_means(moment: Moment, sums: dict[str, Tensor]) -> None:
    view = moment.slab.view
    for name, count in (("row_", view.cols), ("col_", view.rows), ("", view.numel)):
        target = moment.tensors[f"{name}mean"]
        target.copy_((sums[f"{name}sum"] / max(count, 1)).float().view(target.shape))
