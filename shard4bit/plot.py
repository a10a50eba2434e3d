"""Histograms of moments before and after quantization, after Figure 3 of the paper: the zero point of a
second moment's map shows as a bar far to the right, where h(v) = 1 / (sqrt(v) + 1e-6) is largest.

Needs matplotlib, which is loaded when something is drawn.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shard4bit.errors import Shard4bitError
from shard4bit.layout import Slab
from shard4bit.optim.base import QuantizedOptimizer
from shard4bit.optim.encode import encode
from shard4bit.optim.report import name_of, names_in, predictions
from shard4bit.reference import ReferenceBackend
from shard4bit.spec import Full, parse_spec
from shard4bit.state import Moment

#: of one moment of one parameter: panel title -> values, before quantization first
Panels = Mapping[str, Tensor]

BINS, MOST = 120, 1 << 22  # elements of a tensor that are looked at, evenly spaced


def moments(
    optimizer: QuantizedOptimizer, path: str | Path, *, names: Sequence[str] = ("*",), most: int = 4
) -> list[str]:
    """Draw the moments that the next ``step`` would make, exact and as their codes would hold them, to
    ``path`` (.png, .pdf, ...). Returns the names of the parameters drawn: the first ``most`` quantized ones
    that match the shell patterns ``names``.

    Call it between backward and step; on sharded parameters on all ranks, and with another path on each
    (it shows a rank's own elements). Changes nothing. Raises ValueError without matplotlib, or where
    nothing is to be drawn.
    """
    needs_matplotlib()
    rows: dict[str, Panels] = {}
    drawn: list[str] = []
    known = names_in(optimizer.param_groups)
    for bound, foreseen in predictions(optimizer._plan().members):
        name = name_of(bound, known)
        wanted = len(drawn) < most and any(fnmatchcase(name, pattern) for pattern in names)
        if foreseen is None or not wanted or all(isinstance(m.spec, Full) for m in bound.moments):
            continue
        drawn.append(name)
        for moment, seen in zip(bound.moments, foreseen, strict=True):
            rows[f"{name}, {moment.name}"] = {
                "exact": _sample(seen.exact),
                f"stored as {moment.spec}": _sample(seen.stored),
            }
    if not rows:
        raise Shard4bitError(
            f"nothing to draw: no quantized parameter with a gradient matches {list(names)}; call it between "
            "backward and step"
        )
    draw(rows, path)
    return drawn


def requantized(values: Tensor, moment: str, specs: Sequence[str]) -> dict[str, Tensor]:
    """``values`` (any shape, float32) as each of ``specs`` would hold them, by spec; those that do not suit
    this moment are left out."""
    out: dict[str, Tensor] = {}
    for text in specs:
        try:
            spec = parse_spec(text, signed=moment != "exp_avg_sq", argument="--spec")
        except ValueError:
            continue
        target = Moment.zeros(moment, spec, Slab.whole(values.shape), values.device)
        encode(target, values.reshape(-1), (), values.device)
        out[str(spec)] = ReferenceBackend().decode(target)
    return out


def _sample(values: Tensor) -> Tensor:
    """At most MOST of the values, on the host."""
    flat = values.reshape(-1)
    return flat[:: -(-flat.numel() // MOST) or 1].cpu()


def needs_matplotlib() -> None:
    """Raise Shard4bitError, with what to install, where it is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise Shard4bitError("drawing needs matplotlib: pip install matplotlib, or 'shard4bit[cli]'")


def draw(rows: Mapping[str, Panels], path: str | Path) -> None:
    """Write a figure of one row a moment and one histogram a panel, all on log10 scales."""
    needs_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wide = max(len(panels) for panels in rows.values())
    figure: Any = Figure(figsize=(3.6 * wide, 2.6 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), wide, squeeze=False)
    for line, (title, panels) in zip(grid, rows.items(), strict=True):
        second = title.endswith("exp_avg_sq")
        shown = {name: _scaled(values, second) for name, values in panels.items()}
        ends = torch.cat([values for values in shown.values() if values.numel()] or [torch.zeros(1)])
        edges = torch.linspace(float(ends.amin()) - 0.05, float(ends.amax()) + 0.05, BINS + 1)
        for axes, (name, values) in zip(line, shown.items(), strict=False):
            zeros = 100 * (panels[name] == 0).double().mean() if panels[name].numel() else 0.0
            axes.hist(values.numpy(), bins=edges.tolist(), density=True, color="tab:blue")
            note = f" ({zeros:.2g} % are 0{'' if second else ', left out'})" if zeros else ""
            axes.set_title(f"{title}\n{name}{note}", fontsize=8)
            axes.set_xlabel("log10 1 / (sqrt(v) + 1e-6)" if second else "log10 |m|", fontsize=8)
            axes.tick_params(labelsize=7)
        for axes in line[len(shown) :]:
            axes.set_visible(False)
    figure.savefig(path, dpi=120)


def _scaled(values: Tensor, second: bool) -> Tensor:
    """What is counted, without what is not finite."""
    if second:
        out = -(values.double().clamp(min=0).sqrt() + 1e-6).log10()
    else:
        out = values[values != 0].double().abs().log10()
    return out[out.isfinite()].float()
