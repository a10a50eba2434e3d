"""Results as CSV: one row per run, appended as it ends, so that a run that was cut off is resumed."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"

COLUMNS = (
    "experiment",
    "arm",
    "seed",
    "lr",
    "settings",
    "diverged",
    "steps",
    "val_loss",
    "accuracy",
    "bleu",
    "movies",
    "products",
    "news",
    "tweets",
    "train_loss",
    "peak_loss",
    "parameters",
    "weights",
    "order",
    "step_ms",
    "seconds",
    "device",
    "torch",
    "curve",
)

Row = dict[str, str]
Key = tuple[str, int, float, str]


def key(row: dict[str, Any]) -> Key:
    """What makes a run: arm, seed, learning rate, fingerprint of the other settings."""
    return str(row["arm"]), int(row["seed"]), float(row["lr"]), str(row["settings"])


def read(path: Path) -> list[Row]:
    """All whole rows; a last row that a kill cut short is left out. Raises ValueError for other columns."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: columns {reader.fieldnames}, expected {COLUMNS}")
        return [row for row in reader if row["curve"] is not None]


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row. Raises ValueError for columns that are not in COLUMNS, or not known for every run."""
    unknown = set(row) - set(COLUMNS)
    if unknown:
        raise ValueError(f"columns {sorted(unknown)}: expected some of {COLUMNS}")
    path.parent.mkdir(parents=True, exist_ok=True)
    repair(path)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def write(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """A table of its own columns, whole, in the place of what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def repair(path: Path) -> None:
    """Cut off a last line that was not ended."""
    if not path.is_file():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])
        if path.stat().st_size == 0:
            path.unlink()


def missing(rows: Iterable[Row], wanted: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The wanted cells (arm, seed, lr, settings) that have no row yet, in their order."""
    done = {key(row) for row in rows}
    return [cell for cell in wanted if key(cell) not in done]
