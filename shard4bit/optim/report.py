"""What 4 bits do to the moments: errors of the coming step, saturation, stale codes, ranges of scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shard4bit.backend import Work, Works
from shard4bit.comm import reduce
from shard4bit.maths.mapping import codec
from shard4bit.maths.packing import packed_window, unpack_codes
from shard4bit.optim.bound import Bound
from shard4bit.reference import ReferenceBackend
from shard4bit.spec import Full, QuantSpec
from shard4bit.state import Moment

Members = Sequence[tuple[Bound, Mapping[str, Any]]]

_REFERENCE = ReferenceBackend()  # serves every device; bit for bit what the kernels compute


@dataclass(frozen=True)
class MomentReport:
    """One moment of one parameter, of this rank's elements. Shares are in [0, 1]; None: does not apply.

    error: root mean square of (stored - exact), over that of exact, of the coming step.
    stale: share of elements whose exact moment moves in that step while their code stays.
    saturated: share of codes at an end of the table, that is of values next to their scale.
    smallest: share of codes of the least magnitude (0 for "DE", 1/16 of the scale for "Linear").
    scales: least (that is not 0) and largest scale or mean; zero_scales: share of scales that are 0.
    """

    parameter: str
    shape: tuple[int, ...]
    moment: str
    spec: str
    elements: int
    error: float | None = None
    stale: float | None = None
    saturated: float | None = None
    smallest: float | None = None
    scales: tuple[float, float] | None = None
    zero_scales: float | None = None


class Report(list[MomentReport]):
    """Rows of ``opt.report()``; printing it gives a table."""

    def as_json(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self]

    def __str__(self) -> str:
        head = ["parameter", "moment", "spec", "error", "stale", "saturated", "smallest", "scales"]
        rows = [head]
        for row in self:
            shares = [
                "-" if x is None else f"{100 * x:.2f} %"
                for x in (row.error, row.stale, row.saturated, row.smallest)
            ]
            scales = f"{row.scales[0]:.1e} to {row.scales[1]:.1e}" if row.scales else "-"
            rows.append([row.parameter, row.moment, row.spec, *shares, scales])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)


def report(members: Members, groups: Sequence[Mapping[str, Any]], predict: bool) -> Report:
    """See ``QuantizedOptimizer.report``. groups: the optimizer's, which may name parameters."""
    out, names = Report(), names_in(groups)
    if not predict:
        for bound, _ in members:
            out += [_static(bound, name_of(bound, names), m) for m in bound.moments]
        return out
    for bound, foreseen in predictions(members):
        for i, moment in enumerate(bound.moments):
            row = _static(bound, name_of(bound, names), moment)
            out.append(row if foreseen is None else _compared(row, moment, foreseen[i]))
    return out


def names_in(groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, str]:
    """Names of the tensors in the groups: their own where given, else their place."""
    out: dict[Tensor, str] = {}
    for number, group in enumerate(groups):
        places = [f"param_groups[{number}]['params'][{i}]" for i in range(len(group["params"]))]
        out |= dict(zip(group["params"], group.get("param_names") or places, strict=True))
    return out


def name_of(bound: Bound, names: Mapping[Tensor, str]) -> str:
    return bound.placed.name or names.get(bound.param, "")


def _static(bound: Bound, name: str, moment: Moment) -> MomentReport:
    """What the stored moment shows by itself."""
    row = MomentReport(name, bound.shape, moment.name, str(moment.spec), moment.slab.numel)
    if isinstance(moment.spec, Full) or moment.slab.numel == 0:
        return row
    if isinstance(moment.spec, QuantSpec):
        values = codec(moment.spec, moment.tensors["codes"].device).values.tolist()
        counts = torch.bincount(codes_of(moment).int(), minlength=len(values)).tolist()
        total = moment.slab.numel
        ends = counts[-1] + (counts[0] if moment.spec.signed else 0)
        least = min(map(abs, values))
        smallest = sum(n for n, value in zip(counts, values, strict=True) if abs(value) == least)
        row = replace(row, saturated=ends / total, smallest=smallest / total)
    scales = torch.cat([t.reshape(-1) for suffix, t in moment.tensors.items() if suffix != "codes"])
    used = scales[scales != 0]
    ends_of = (float(used.amin()), float(used.amax())) if used.numel() else (0.0, 0.0)
    return replace(row, scales=ends_of, zero_scales=1.0 - used.numel() / scales.numel())


def codes_of(moment: Moment) -> Tensor:
    """The codes (slab.numel,) uint8 of this rank's elements."""
    slab, bits = moment.slab, moment.quant.bits
    byte0, matrix = packed_window(slab.col0, slab.col1, bits)[0], moment.matrix("codes")
    parts = [
        unpack_codes(matrix[r.row0 : r.row1], byte0, r.col0, r.col1, bits).reshape(-1) for r in slab.rects()
    ]
    return torch.cat(parts) if parts else matrix.new_empty(0)


# ---- the coming step --------------------------------------------------------------------------------


@dataclass
class Foreseen:
    """A moment after the coming step. exact, stored: (slab.numel,) float32. old: what is stored now;
    new: what would be."""

    exact: Tensor
    stored: Tensor
    old: Tensor
    new: Moment


@torch.no_grad()
def predictions(members: Members) -> Iterator[tuple[Bound, list[Foreseen] | None]]:
    """The moments as the next ``step`` would make them from the gradients that are there; None for
    parameters that would not step. Changes nothing; one parameter's copies are alive at a time.

    Collective, at the first ``next``, as the step is. Raises what the step would raise.
    """
    failure: BaseException | None = None
    works: list[Work] = []
    try:
        for bound, group in members:
            works.append(_work(bound, group))
        for bound, work in zip([b for b, _ in members], works, strict=True):
            _REFERENCE.measure(bound.rule, Works([work]))
    except Exception as error:  # the other ranks must hear of it before it is raised
        failure = error
        works += [bound.work for bound, _ in members[len(works) :]]
    try:
        reduce([work for work in works if work.grad is not None or work.links], failure)
        for (bound, _), work in zip(members, works, strict=True):
            yield bound, _foreseen(bound, work) if work.active else None
    finally:
        for bound, _ in members:
            bound.release()


def _work(bound: Bound, group: Mapping[str, Any]) -> Work:
    """The step's work on one parameter, with memory of its own for what measure writes."""
    bound.refresh()
    grad = bound.placed.grad()
    if grad is not None:
        bound.take_gradient(grad)
    scalars = bound.rule.scalars(group, int(bound.step) + 1)
    mine = [bound.work.grad if grad is not None else None]
    active, maximize = grad is not None, group["maximize"]
    return replace(bound.work, grads=mine, at=0, scalars=scalars, maximize=maximize, active=active, fresh=[])


def _foreseen(bound: Bound, work: Work) -> list[Foreseen]:
    param = work.param.view(-1).float()
    grad = torch.zeros_like(param) if work.grad is None else work.grad.view(-1).float()
    if work.maximize:
        grad = -grad
    copies = [
        replace(m, tensors={suffix: t.clone() for suffix, t in m.tensors.items()}) for m in bound.moments
    ]
    olds = [_REFERENCE.decode(m) for m in bound.moments]
    exact = [bound.rule.advance(i, old.clone(), grad, param, work.scalars) for i, old in enumerate(olds)]
    # as in the step itself, on copies: the parameter's is thrown away
    _REFERENCE.apply(bound.rule, Works([replace(work, moments=copies, param=work.param.clone())]))
    return [
        Foreseen(x, _REFERENCE.decode(copy), old, copy)
        for x, copy, old in zip(exact, copies, olds, strict=True)
    ]


def _compared(row: MomentReport, moment: Moment, foreseen: Foreseen) -> MomentReport:
    if isinstance(moment.spec, Full) or moment.slab.numel == 0:
        return row
    exact = foreseen.exact.double()
    norm = float(exact.square().sum())
    error = (float((foreseen.stored.double() - exact).square().sum()) / norm) ** 0.5 if norm else 0.0
    stale = None
    if isinstance(moment.spec, QuantSpec):
        same = codes_of(moment) == codes_of(foreseen.new)
        stale = float((same & (foreseen.exact != foreseen.old)).double().mean())
    return replace(row, error=error, stale=stale)
