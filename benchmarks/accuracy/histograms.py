"""What the ablation's quantizers make of trained second moments: python -m benchmarks.accuracy.histograms

Trains the ablation's model with 32-bit AdamW and rounds its second moments once, by each quantizer of the
ablation. Draws h(v) = 1 / (sqrt(v) + 1e-6) before and after, as the paper's Figure 3, of the embedding and of
a layer in the middle; writes results/histograms.csv, of every kind of layer, and prints it as a table.

Columns: the share of elements that become 0 ("zeros"); the mean of h after by the mean of h before ("step"),
by how much updates would grow; the largest such quotient of one element ("worst").
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy import store
from benchmarks.accuracy.anatomy import kind_of
from benchmarks.accuracy.arms import ABLATION, BASELINE, STABLE, make_optimizer
from benchmarks.accuracy.experiments import EXPERIMENTS
from benchmarks.accuracy.fetch import ROOT
from benchmarks.accuracy.train import train
from shard4bit import plot
from shard4bit.spec import is_quantized

SPECS = [arm for arm in ABLATION if arm not in (BASELINE, "factored") and not arm.endswith(STABLE)]
COLUMNS = ("kind", "spec", "elements", "zeros", "step", "worst")
NAME = "exp_avg_sq"


def trained(seed: int, *, toy: bool) -> dict[str, Tensor]:
    """The quantizable parameters' second moments after a run, on the CPU, by name."""
    device = torch.device("cuda" if torch.cuda.is_available() and not toy else "cpu")
    task = EXPERIMENTS["ablation"].task(device, toy=toy)
    task.begin(seed)
    assert task.model is not None
    optimizer = make_optimizer(BASELINE, task.model, **task.recipe.options())
    train(task, optimizer, seed, float("inf"))
    return {
        name: optimizer.state[param][NAME].float().cpu()
        for name, param in task.model.named_parameters()
        if is_quantized(tuple(param.shape))
    }


def h(v: Tensor) -> Tensor:
    return 1.0 / (v.double().sqrt() + 1e-6)


def rows_of(moments: dict[str, Tensor]) -> list[dict[str, Any]]:
    """One row a kind of layer and quantizer."""
    found: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
    for name, exact in moments.items():
        for spec, stored in plot.requantized(exact, NAME, SPECS).items():
            found.setdefault((kind_of(name), spec), []).append((exact.flatten(), stored.flatten()))
    out = []
    for (kind, spec), pairs in found.items():
        exact, stored = (torch.cat(side) for side in zip(*pairs, strict=True))
        before, after = h(exact), h(stored)
        out.append(
            {
                "kind": kind,
                "spec": spec,
                "elements": exact.numel(),
                "zeros": float((stored == 0).double().mean()),
                "step": float(after.mean() / before.mean()),
                "worst": float((after / before).max()),
            }
        )
    return out


def draw(moments: dict[str, Tensor], path: Path) -> None:
    """Of the first parameter, which is the embedding, and of one in the middle."""
    names = list(moments)
    rows = {
        f"{name}, {NAME}": {"exact": moments[name]} | plot.requantized(moments[name], NAME, SPECS)
        for name in (names[0], names[len(names) // 2])
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    plot.draw(rows, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--toy", action="store_true", help="tiny model, made-up data, on the CPU")
    parser.add_argument("--out", type=Path, default=store.RESULTS / "histograms.csv")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "figures" / "ablation.png")
    want = parser.parse_args(argv)
    moments = trained(want.seed, toy=want.toy)
    rows = rows_of(moments)
    store.write(want.out, COLUMNS, rows)
    print("| layer | second moment | zeros | step | worst |\n|---|---|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['kind']} | {row['spec']} | {row['zeros']:.2%} | {row['step']:.3g} | {row['worst']:.3g} |"
        )
    draw(moments, want.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
