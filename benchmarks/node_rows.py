"""The rows of benchmarks/node.py: DIR/node.csv, to which a row is added as a cell ends."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLUMNS = (
    *("key", "kind", "world", "engine", "optimizer", "chain", "leg", "status", "seconds", "note", "machine"),
    *("parameters", "tokens_per_s", "step_ms", "optimizer_ms", "loss_first", "loss_last", "off"),
    *("weights_b", "gradients_b", "master_b", "states_b", "peak_b", "reserved_b", "process_b", "planned_b"),
    *("save_s", "save_b", "load_s", "first", "save_at", "restored", "saved"),
    *("calls", "reduced_b", "reduce_ms", "details"),
)


class Rows:
    """The file. Of rows with one key the last counts."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "node.csv"

    def read(self) -> dict[str, dict[str, str]]:
        """By key, in the order in which cells ended. What a killed process left of a line is no row.

        Raises ValueError for a file of other columns.
        """
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        if lines and lines[0] != ",".join(COLUMNS):
            raise ValueError(f"{self.path} has other columns than this version's: give another --out")
        found = {}
        for line in lines[1:]:
            try:
                (cells,) = csv.reader([line], strict=True)
                json.loads(cells[-1])
            except (csv.Error, ValueError, IndexError):
                continue
            if len(cells) == len(COLUMNS):
                found[cells[0]] = dict(zip(COLUMNS, cells, strict=True))
        return found

    def append(self, row: Mapping[str, Any]) -> None:
        """A line, on the disk when this returns."""
        assert set(row) <= set(COLUMNS), set(row) - set(COLUMNS)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        new = not self.path.is_file() or self.path.stat().st_size == 0
        if new:
            writer.writeheader()
        elif not self.path.read_bytes().endswith(b"\n"):
            text.write("\n")  # after half a line
        writer.writerow({**row, "details": json.dumps(row.get("details", {}))})
        with self.path.open("a", newline="") as file:
            file.write(text.getvalue())
            file.flush()
            os.fsync(file.fileno())
