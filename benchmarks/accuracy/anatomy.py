"""What rounding does to the moments during a training: python -m benchmarks.accuracy.anatomy --arms "paper"

Trains the byte model of `gap` with candidates and looks, every so many steps, at what the rounding of the
coming step does, by kind of layer. Writes results/anatomy.csv and prints its means as a Markdown table.

For each moment: the relative error (norm of the error by norm of the moment); the relative error of the
step's direction m / root of v if this moment were read back before it is used; the share of stale codes (the
exact value moves, its code does not); the shares stored at the table's smallest size and at its largest. And
what all roundings so far have led to, against moments of the same gradients that were never rounded: the
relative error ("drift"), and by how much the sum of sizes is larger ("growth").
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy import store
from benchmarks.accuracy.arms import make_optimizer
from benchmarks.accuracy.candidates import (
    TABLES,
    CandidateAdamW,
    Quantizer,
    entries_of,
    nearest,
    scales_of,
)
from benchmarks.accuracy.experiments import EXPERIMENTS
from benchmarks.accuracy.train import train
from shard4bit.layout import matrix_view
from shard4bit.maths.normalize import inverse
from shard4bit.maths.update import ADAMW, Scalars
from shard4bit.spec import is_quantized

FIGURES = ("error", "direction", "stale", "smallest", "largest", "drift", "growth")
COLUMNS = ("arm", "seed", "step", "kind", "moment", "elements", *FIGURES)
EPS = 1e-30

ByMoment = dict[tuple[Tensor, int], Tensor]  # by parameter and number of the moment


def relative(error: Tensor, exact: Tensor) -> float:
    return float(error.norm() / exact.norm().clamp(min=EPS))


def direction_of(moments: Sequence[Tensor], scalars: Scalars) -> Tensor:
    """Of a step, but for its size."""
    return moments[0] / (moments[1].sqrt() * scalars["root"] + scalars["eps"])


def scale_of(quantizer: Quantizer, exact: Tensor) -> Tensor:
    """Of every element, (rows, columns)."""
    view = matrix_view(tuple(exact.shape))
    return scales_of(exact.view(view.rows, view.cols), quantizer.scale)[0]


def codes_of(quantizer: Quantizer, kept: Tensor, scale: Tensor) -> Tensor:
    """Of values that were stored with this scale."""
    return nearest(kept.view(scale.shape) * inverse(scale), entries_of(quantizer.table, kept.device))


def figures(
    quantizer: Quantizer, before: Tensor, old: Tensor, exact: Tensor, kept: Tensor
) -> dict[str, float]:
    """Of one moment of one parameter in the coming step, all but its effect on the direction. before: the
    scale of ``old``."""
    scale = scale_of(quantizer, exact)
    size = kept.abs().view(scale.shape)
    same = codes_of(quantizer, kept, scale) == codes_of(quantizer, old, before)
    least = min(abs(x) for x in TABLES[quantizer.table]) * scale
    return {
        "error": relative(kept - exact, exact),
        "stale": float((same & (exact != old).view(scale.shape)).float().mean()),
        "smallest": float((size <= least).float().mean()),
        "largest": float((size >= scale).float().mean()),
    }


def coming(optimizer: CandidateAdamW, param: Tensor, group: dict[str, Any]) -> tuple[Scalars, list[Tensor]]:
    """The scalars of the coming step, and both moments before they are rounded. Changes nothing."""
    scalars, grad = ADAMW.scalars(group, optimizer.count + 1), param.grad.float()  # type: ignore[union-attr]
    state = optimizer.state.get(param) or {name: torch.zeros_like(grad) for name in ADAMW.moments}
    olds = [state[name] for name in ADAMW.moments]
    return scalars, [ADAMW.advance(i, old.clone(), grad, grad, scalars) for i, old in enumerate(olds)]


def quantized(optimizer: CandidateAdamW, model: nn.Module) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """(name, parameter, its group) of those with a gradient and moments to round."""
    groups = {p: g for g in optimizer.param_groups for p in g["params"]}
    for name, param in model.named_parameters():
        if param.grad is not None and is_quantized(tuple(param.shape)):
            yield name, param, groups[param]


class Witness:
    """What a look needs of the steps before. Calls come between backward and step, and change nothing.

    scales: with which the last noted step stored; unrounded: the moments of all noted gradients.
    """

    def __init__(self) -> None:
        self.scales: ByMoment = {}
        self.unrounded: ByMoment = {}

    @torch.no_grad()
    def note(self, optimizer: CandidateAdamW, model: nn.Module, *, scales: bool) -> None:
        """Of the coming step; to be called before each. scales: whether the next one will be looked at."""
        for _, param, group in quantized(optimizer, model):
            grad = param.grad.float()  # type: ignore[union-attr]
            scalars = ADAMW.scalars(group, optimizer.count + 1)
            exact = coming(optimizer, param, group)[1] if scales else []
            for i, quantizer in enumerate(optimizer.quantizers):
                if quantizer.table == "exact":
                    continue
                own = self.unrounded.setdefault((param, i), torch.zeros_like(grad))
                ADAMW.advance(i, own, grad, grad, scalars)
                if scales:
                    self.scales[param, i] = scale_of(quantizer, exact[i])


def since_the_start(old: Tensor, unrounded: Tensor) -> dict[str, float]:
    whole = unrounded.abs().sum().clamp(min=EPS)
    return {"drift": relative(old - unrounded, unrounded), "growth": float(old.abs().sum() / whole) - 1.0}


def look_at(
    optimizer: CandidateAdamW, param: Tensor, group: dict[str, Any], witness: Witness
) -> dict[str, dict[str, float]]:
    """moment -> FIGURES of a quantized parameter whose gradient is there. Changes nothing."""
    scalars, exact = coming(optimizer, param, group)
    olds = [optimizer.state[param][name] for name in ADAMW.moments]
    direction = direction_of(exact, scalars)
    out, key = {}, torch.tensor(optimizer.count, device=param.device)
    for i, (name, quantizer) in enumerate(zip(ADAMW.moments, optimizer.quantizers, strict=True)):
        if quantizer.table == "exact":
            continue
        kept = optimizer.read_back(i, exact[i], key)
        other = direction_of([kept if j == i else x for j, x in enumerate(exact)], scalars)
        out[name] = figures(quantizer, witness.scales[param, i], olds[i], exact[i], kept)
        out[name] |= since_the_start(olds[i], witness.unrounded[param, i])
        out[name]["direction"] = relative(other - direction, direction)
    return out


def kind_of(name: str) -> str:
    """Of a layer: the parameter's name without its number."""
    return ".".join(part for part in name.removesuffix(".weight").split(".") if not part.isdigit())


@torch.no_grad()
def rows_of(optimizer: CandidateAdamW, model: nn.Module, witness: Witness) -> list[dict[str, Any]]:
    """One row a moment and kind of layer, means over its elements."""
    found: dict[tuple[str, str], list[tuple[int, dict[str, float]]]] = {}
    for name, param, group in quantized(optimizer, model):
        for moment, values in look_at(optimizer, param, group, witness).items():
            found.setdefault((kind_of(name), moment), []).append((param.numel(), values))
    out = []
    for (kind, moment), looks in found.items():
        elements = sum(n for n, _ in looks)
        means = {f: sum(n * v[f] for n, v in looks) / elements for f in FIGURES}
        out.append({"kind": kind, "moment": moment, "elements": elements, **means})
    return out


def study(arm: str, seed: int, every: int, *, toy: bool) -> list[dict[str, Any]]:
    """Rows of one run of `gap`'s model."""
    device = torch.device("cuda" if torch.cuda.is_available() and not toy else "cpu")
    task = EXPERIMENTS["gap"].task(device, toy=toy)
    task.begin(seed)
    model = task.model
    assert model is not None
    optimizer = make_optimizer(arm, model, **task.recipe.options())
    if not isinstance(optimizer, CandidateAdamW):
        raise ValueError(f"arm {arm!r} is none of candidates.py")
    rows: list[dict[str, Any]] = []
    witness = Witness()

    def look(step: int) -> None:
        if step and step % every == 0:
            found = rows_of(optimizer, model, witness)
            rows.extend({"arm": arm, "seed": seed, "step": step, **r} for r in found)
        witness.note(optimizer, model, scales=(step + 1) % every == 0)

    train(task, optimizer, seed, float("inf"), look)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: means over the looks."""
    lines = [
        "| arm | layer | moment | " + " | ".join(FIGURES) + " |",
        "|---|---|---|" + "---:|" * len(FIGURES),
    ]
    keys = dict.fromkeys((r["arm"], r["kind"], r["moment"]) for r in rows)
    for key in keys:
        mine = [r for r in rows if (r["arm"], r["kind"], r["moment"]) == key]
        cells = [f"{statistics.fmean(float(r[f]) for r in mine):.3f}" for f in FIGURES]
        lines.append("| " + " | ".join([*key, *cells]) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", default="paper", help="names of candidates.py, separated by semicolons")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=100, help="steps between looks")
    parser.add_argument("--toy", action="store_true", help="tiny model, made-up data, on the CPU")
    parser.add_argument("--out", type=Path, default=store.RESULTS / "anatomy.csv")
    parser.add_argument(
        "--table", action="store_true", help="print the table of what --out holds; run nothing"
    )
    want = parser.parse_args(argv)
    if want.every < 2:
        parser.error(f"--every {want.every}: expected 2 or more")
    if want.table:
        with want.out.open(newline="") as file:
            print(table(list(csv.DictReader(file))))
        return 0
    rows = [r for arm in want.arms.split(";") for r in study(arm, want.seed, want.every, toy=want.toy)]
    shown = ({k: f"{v:.5f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    store.write(want.out, COLUMNS, shown)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
