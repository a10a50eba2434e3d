"""Run an experiment, or what is left of it: python -m benchmarks.accuracy.run scratch --budget 540

One row per run is appended to OUT/EXPERIMENT.csv; a second call goes on where the first one stopped.
Seeds are the outer loop, so that pairs are complete early. Exits with status 3 if runs are left over.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import fetch, store
from benchmarks.accuracy.arms import BASELINE
from benchmarks.accuracy.experiments import EXPERIMENTS
from benchmarks.accuracy.train import OutOfTimeError, Task, run_cell

TOY_SEEDS = 2
LEFT_OVER = 3  # exit status

_worker: dict[str, Any] = {}  # a worker's settings, its task by learning rate, and its longest run


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("experiment", choices=EXPERIMENTS)
    add("--arms", help="separated by semicolons; default: those of the experiment (see arms.py)")
    add("--seeds", type=int, help="how many")
    add("--first-seed", type=int, default=0, help="fresh seeds for a confirmation")
    add("--lr", type=float, help="instead of the recipe's")
    add("--tune", help="comma-separated learning rates: the 32-bit arm alone, into EXPERIMENT-tune.csv")
    add("--budget", type=float, default=float("inf"), help="seconds from now after which to have stopped")
    add("--workers", type=int, default=1, help="processes; worker i uses GPU i modulo their number")
    add("--toy", action="store_true", help="tiny model, made-up data, two seeds: proves that it runs")
    add("--device", choices=("auto", "cpu"), default="auto")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: where it pays)")
    add("--out", type=Path, help="folder of the CSV (default: benchmarks/accuracy/results; toy: build/)")
    add("--dry-run", action="store_true", help="list the runs that are left and the time they may take")
    return parser.parse_args(argv)


def cells(want: argparse.Namespace) -> list[dict[str, Any]]:
    """The wanted runs, in order."""
    experiment = EXPERIMENTS[want.experiment]
    recipe = experiment.toy_recipe if want.toy else experiment.recipe
    settings = experiment.settings(toy=want.toy)
    count = want.seeds or (TOY_SEEDS if want.toy else 1 if want.tune else experiment.seeds)
    arms = [BASELINE] if want.tune else (want.arms.split(";") if want.arms else list(experiment.arms))
    rates = [float(x) for x in want.tune.split(",")] if want.tune else [want.lr or recipe.lr]
    return [
        {
            "experiment": want.experiment,
            "arm": arm,
            "seed": want.first_seed + i,
            "lr": rate,
            "settings": settings,
        }
        for i in range(count)
        for rate in rates
        for arm in arms
    ]


def path_of(want: argparse.Namespace) -> Path:
    folder = want.out or (fetch.ROOT / "build" / "accuracy" / "toy" if want.toy else store.RESULTS)
    return folder / f"{want.experiment}{'-tune' if want.tune else ''}.csv"


def place(number: int) -> torch.device:
    """The device of a worker."""
    count = torch.cuda.device_count()
    return torch.device("cuda", number % count) if count else torch.device("cpu")


def start_worker(want: argparse.Namespace, numbers: Any) -> None:
    """In a new process, or in this one for a single worker."""
    number = 0
    if numbers is not None:
        with numbers.get_lock():
            number = numbers.value
            numbers.value += 1
    device = torch.device("cpu") if want.device == "cpu" else place(number)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // want.workers))
    _worker.clear()
    _worker.update(want=want, device=device, longest=0.0)


def task_at(lr: float) -> Task:
    """This worker's task, made once; its recipe with the learning rate of the run."""
    want = _worker["want"]
    if "task" not in _worker:
        experiment = EXPERIMENTS[want.experiment]
        _worker["task"] = experiment.task(_worker["device"], toy=want.toy, compiled=want.compile)
    task: Task = _worker["task"]
    task.recipe = replace(task.recipe, lr=lr)
    return task


def work(cell: dict[str, Any], deadline: float) -> dict[str, Any] | None:
    """A run's row; None where the time left may not be enough."""
    begin = time.monotonic()
    if begin + _worker["longest"] > deadline:
        return None
    try:
        row = run_cell(task_at(cell["lr"]), cell["arm"], cell["seed"], deadline)
    except OutOfTimeError:
        return None
    _worker["longest"] = max(_worker["longest"], time.monotonic() - begin)
    device: torch.device = _worker["device"]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {**cell, **row, "device": name, "torch": torch.__version__}


def results(todo: list[dict[str, Any]], want: argparse.Namespace, deadline: float) -> Any:
    """(cell, function that gives its row or raises) as they end."""
    if want.workers == 1:
        start_worker(want, None)
        for cell in todo:
            yield cell, lambda cell=cell: work(cell, deadline)
        return
    context = multiprocessing.get_context("spawn")
    numbers = context.Value("i", 0)
    with ProcessPoolExecutor(want.workers, context, start_worker, (want, numbers)) as pool:
        futures = {pool.submit(work, cell, deadline): cell for cell in todo}
        for future in as_completed(futures):
            yield futures[future], future.result


def main(argv: list[str] | None = None) -> int:
    begin, want = time.monotonic(), parse(argv)
    path, wanted = path_of(want), cells(want)
    todo = store.missing(store.read(path), wanted)
    estimate = EXPERIMENTS[want.experiment].seconds * len(todo)
    print(f"{path.name}: {len(wanted) - len(todo)} of {len(wanted)} runs are there already", flush=True)
    if want.dry_run:
        for cell in todo:
            print(f"  {cell['arm']}  seed {cell['seed']}  lr {cell['lr']:g}")
        print(f"{len(todo)} runs, about {estimate:.0f} s on one H100, one after another")
        return 0
    left = failed = 0
    for cell, outcome in results(todo, want, begin + want.budget):
        try:
            row = outcome()
        except Exception:
            failed += 1
            print(
                f"{cell['arm']} seed {cell['seed']} FAILED\n{traceback.format_exc()}",
                file=sys.stderr,
                flush=True,
            )
            continue
        if row is None:
            left += 1
            continue
        store.append(path, row)
        figures = {m.column: row.get(m.column, "-") for m in EXPERIMENTS[want.experiment].metrics}
        shown = "  ".join(f"{k} {v}" for k, v in figures.items())
        state = "DIVERGED" if row["diverged"] else shown
        print(
            f"{time.monotonic() - begin:6.0f} s  {row['arm']:<18} seed {row['seed']}  {state}  "
            f"{row['step_ms']} ms/step, {row['seconds']} s",
            flush=True,
        )
    print(f"{left} runs left over, {failed} failed; {time.monotonic() - begin:.0f} s", flush=True)
    return 1 if failed else LEFT_OVER if left else 0


if __name__ == "__main__":
    sys.exit(main())
