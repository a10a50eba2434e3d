"""Tables (Markdown) and curves (SVG) of the results: python -m benchmarks.accuracy.tables --plots FOLDER"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accuracy import store
from benchmarks.accuracy.arms import BASELINE
from benchmarks.accuracy.experiments import EXPERIMENTS, Experiment, Metric
from benchmarks.accuracy.stats import compare
from benchmarks.accuracy.store import Row

SMOOTH = 5  # points of a curve
SPOILT = 0.3  # by how many nats above the baseline a run that did not diverge has come to grief

Runs = dict[str, dict[int, Row]]  # arm -> seed -> row


def runs_of(rows: Sequence[Row]) -> Runs:
    """Rows by arm and seed.

    Raises ValueError for rows of several settings or learning rates, for a run that is there twice, and
    for arms of one seed that did not start from the same weights with the same order of data.
    """
    kinds = {(row["settings"], row["lr"], row["device"]) for row in rows}
    if len(kinds) > 1:
        raise ValueError(f"rows of several (settings, lr, device): {sorted(kinds)}; keep one kind in a file")
    out: Runs = {}
    start: dict[int, tuple[str, str]] = {}
    for row in rows:
        arm, seed, pair = row["arm"], int(row["seed"]), (row["weights"], row["order"])
        if seed in out.setdefault(arm, {}):
            raise ValueError(f"{arm} seed {seed} is there twice")
        if start.setdefault(seed, pair) != pair:
            raise ValueError(f"{arm} seed {seed} has other weights or data than the arms before: not paired")
        out[arm][seed] = row
    return out


def values(runs: dict[int, Row], metric: Metric) -> dict[int, float]:
    """seed -> value, of the runs that ended and have one."""
    return {s: float(r[metric.column]) for s, r in runs.items() if r["diverged"] == "0" and r[metric.column]}


def diverged(runs: dict[int, Row]) -> int:
    return sum(row["diverged"] == "1" for row in runs.values())


def line(arm: str, runs: Runs, metric: Metric) -> list[str]:
    """An arm's cells of the table."""
    own, base = values(runs[arm], metric), values(runs.get(BASELINE, {}), metric)
    count, digits = len(runs[arm]), metric.digits
    failed = diverged(runs[arm])
    mean = f"{statistics.fmean(own.values()):.{digits}f}" if own else "-"
    if len(own) > 1:
        mean += f" ± {statistics.stdev(own.values()):.{digits}f}"
    cells = [arm, f"{failed} of {count}", mean]
    both = sorted(set(own) & set(base))
    if arm == BASELINE or len(both) < 2:
        return [*cells, "", "", "", ""]
    found = compare([own[s] for s in both], [base[s] for s in both], metric.delta)
    verdict = found.verdict if not failed else "diverges"
    return [
        *cells,
        f"{found.mean:+.{digits}f} ({found.pairs})",
        f"{found.low:+.{digits}f} to {found.high:+.{digits}f}",
        f"{found.boot_low:+.{digits}f} to {found.boot_high:+.{digits}f}",
        f"p = {found.p:.3f}: {verdict}",
    ]


def table(experiment: Experiment, rows: Sequence[Row], metric: Metric) -> str:
    """The Markdown table of a metric; means are over the runs that did not diverge."""
    runs = runs_of(rows)
    known = [a for a in experiment.arms if a in runs]
    head = ["arm", "diverged", f"{metric.unit}, mean ± sd", f"minus {BASELINE} (pairs)", "90 % t interval"]
    head += ["90 % bootstrap", f"equivalence, Δ = {metric.delta:g}"]
    lines = [head, ["---"] * len(head)]
    lines += [line(arm, runs, metric) for arm in [*known, *sorted(set(runs) - set(known))]]
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def together(sets: Sequence[Runs], metric: Metric) -> str:
    """The Markdown table of an experiment that ran several times, each run against the baseline's of its own
    time: how many diverged, how many are spoilt, and the median of the others' differences."""
    lines = [
        ["arm", "diverged", "spoilt", f"{metric.unit} of the others minus {BASELINE}, median"],
        ["---"] * 4,
    ]
    for arm in sets[0]:
        if arm == BASELINE:
            continue
        every = [runs.get(arm, {}) for runs in sets]
        failed, count = sum(map(diverged, every)), sum(map(len, every))
        pairs = [
            (values(own, metric), values(runs[BASELINE], metric))
            for own, runs in zip(every, sets, strict=True)
        ]
        found = [own[s] - base[s] for own, base in pairs for s in sorted(set(own) & set(base))]
        others = [d for d in found if d <= SPOILT]
        median = f"{statistics.median(others):+.{metric.digits}f}" if others else "-"
        lines.append(
            [arm, f"{failed} of {count}", str(len(found) - len(others)), f"{median} ({len(others)})"]
        )
    return markdown(lines)


def points(curve: str) -> tuple[list[int], list[float]]:
    """Steps and losses of a row's curve."""
    pairs = [p.split(":") for p in curve.split()]
    return [int(a) for a, _ in pairs], [float(b) for _, b in pairs]


def gaps(arm: dict[int, Row], base: dict[int, Row]) -> tuple[list[int], list[float]]:
    """Steps, and the training loss of an arm minus the baseline's at the same batches: means over the seeds
    of both and over SMOOTH points of the curves."""
    pairs = [(points(arm[s]["curve"]), points(base[s]["curve"])) for s in sorted(set(arm) & set(base))]
    length = min((min(len(a[0]), len(b[0])) for a, b in pairs), default=0)
    each = [statistics.fmean(a[1][i] - b[1][i] for a, b in pairs) for i in range(length)]
    spans = range(SMOOTH, length + 1)
    return [pairs[0][0][0][i - 1] for i in spans], [statistics.fmean(each[i - SMOOTH : i]) for i in spans]


def plot(experiment: Experiment, rows: Sequence[Row], path: Path) -> None:
    """Training losses of all runs, a colour for each arm; and what the arms differ by from the baseline."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "shard4bit"  # the same file from the same data
    from matplotlib import pyplot

    figure, (axes, other) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    every, last = runs_of(rows), list[float]()
    for number, (arm, runs) in enumerate(every.items()):
        style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
        for i, row in enumerate(runs.values()):
            axes.plot(*points(row["curve"]), linewidth=0.8, label=arm if i == 0 else None, **style)
        if arm != BASELINE:
            steps, gap = gaps(runs, every.get(BASELINE, {}))
            other.plot(steps, gap, linewidth=1.2, **style)
            last += gap[-1:]
    other.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="step", ylabel="training loss (nats)", title=experiment.title)
    other.set(xlabel="step", ylabel=f"minus {BASELINE}'s, mean over seeds (nats)")
    if last:  # what is left at the end counts; the beginning may leave the frame
        reach = 3 * max(map(abs, last))
        other.set_ylim(-reach, reach)
    axes.legend(fontsize="x-small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=store.RESULTS, help="folder of the CSV files")
    parser.add_argument("--plots", type=Path, help="write EXPERIMENT.svg into this folder")
    want = parser.parse_args(argv)
    for name, experiment in EXPERIMENTS.items():
        rows = store.read(want.results / f"{name}.csv")
        if not rows:
            continue
        print(f"## {experiment.title}\n\n{rows[0]['device']}, torch {rows[0]['torch']}, lr {rows[0]['lr']}, ")
        print(f"{int(rows[0]['parameters']) / 1e6:.1f} M parameters\n")
        for metric in experiment.metrics:
            print(table(experiment, rows, metric) + "\n")
        if again := store.read(want.results / f"{name}-again.csv"):
            metric = experiment.metrics[0]
            print(f"The same runs once more:\n\n{table(experiment, again, metric)}\n")
            print(f"Both:\n\n{together([runs_of(rows), runs_of(again)], metric)}\n")
        if want.plots:
            plot(experiment, rows, want.plots / f"{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
