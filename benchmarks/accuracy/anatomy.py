"""What rounding does to the moments during a training: python -m benchmarks.accuracy.anatomy --arms "paper"

Trains the byte model of `gap` with candidates and looks, every so many steps, at what the rounding of the
coming step does, by kind of layer. Writes results/anatomy.csv and prints its means as a Markdown table.

For each moment: the relative error (norm of the error by norm of the moment); the relative error of the
step's direction m / root of v if this moment were read back before it is used; the share of stale entries
(the exact value moves, the stored one does not); the shares stored at the table's smallest size and at its
largest.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy import store
from benchmarks.accuracy.arms import make_optimizer
from benchmarks.accuracy.candidates import TABLES, CandidateAdamW, Quantizer, scales_of
from benchmarks.accuracy.experiments import EXPERIMENTS
from benchmarks.accuracy.train import train
from shard4bit.layout import matrix_view
from shard4bit.maths.update import ADAMW, Scalars
from shard4bit.spec import is_quantized

FIGURES = ("error", "direction", "stale", "smallest", "largest")
COLUMNS = ("arm", "seed", "step", "kind", "moment", "elements", *FIGURES)
EPS = 1e-30


def relative(error: Tensor, exact: Tensor) -> float:
    return float(error.norm() / exact.norm().clamp(min=EPS))


def direction_of(moments: Sequence[Tensor], scalars: Scalars) -> Tensor:
    """Of a step, but for its size."""
    return moments[0] / (moments[1].sqrt() * scalars["root"] + scalars["eps"])


def figures(quantizer: Quantizer, old: Tensor, exact: Tensor, kept: Tensor) -> dict[str, float]:
    """Of one moment of one parameter, all but its effect on the direction."""
    view = matrix_view(tuple(exact.shape))
    size = kept.abs().view(view.rows, view.cols)
    scale = scales_of(exact.view(view.rows, view.cols), quantizer.scale)[0]
    least = min(abs(x) for x in TABLES[quantizer.table]) * scale
    return {
        "error": relative(kept - exact, exact),
        "stale": float(((kept == old) & (exact != old)).float().mean()),
        "smallest": float((size <= least).float().mean()),
        "largest": float((size >= scale).float().mean()),
    }


def look_at(optimizer: CandidateAdamW, param: Tensor, group: dict[str, Any]) -> dict[str, dict[str, float]]:
    """moment -> FIGURES of a quantized parameter whose gradient is there. Changes nothing."""
    scalars, grad = ADAMW.scalars(group, optimizer.count + 1), param.grad.float()  # type: ignore[union-attr]
    olds = [optimizer.state[param][name] for name in ADAMW.moments]
    exact = [ADAMW.advance(i, old.clone(), grad, grad, scalars) for i, old in enumerate(olds)]
    direction = direction_of(exact, scalars)
    out, key = {}, torch.tensor(optimizer.count, device=param.device)
    for i, (name, quantizer) in enumerate(zip(ADAMW.moments, optimizer.quantizers, strict=True)):
        if quantizer.table == "exact":
            continue
        kept = optimizer.read_back(i, exact[i], key)
        other = direction_of([kept if j == i else x for j, x in enumerate(exact)], scalars)
        out[name] = figures(quantizer, olds[i], exact[i], kept)
        out[name]["direction"] = relative(other - direction, direction)
    return out


def kind_of(name: str) -> str:
    """Of a layer: the parameter's name without its number."""
    return ".".join(part for part in name.removesuffix(".weight").split(".") if not part.isdigit())


def rows_of(optimizer: CandidateAdamW, model: nn.Module) -> list[dict[str, Any]]:
    """One row a moment and kind of layer, means over its elements."""
    groups = {p: g for g in optimizer.param_groups for p in g["params"]}
    found: dict[tuple[str, str], list[tuple[int, dict[str, float]]]] = {}
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.grad is not None and is_quantized(tuple(param.shape)):
                for moment, values in look_at(optimizer, param, groups[param]).items():
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

    def look(step: int) -> None:
        if step and step % every == 0:
            rows.extend({"arm": arm, "seed": seed, "step": step, **r} for r in rows_of(optimizer, model))

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
    want = parser.parse_args(argv)
    rows = [r for arm in want.arms.split(";") for r in study(arm, want.seed, want.every, toy=want.toy)]
    want.out.parent.mkdir(parents=True, exist_ok=True)
    with want.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.5f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
