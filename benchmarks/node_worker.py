"""A rank of benchmarks/node.py: does the cells that it is given, one after another, under torchrun.

The first rank adds a row to node.csv as each cell ends, and says in ``current`` which one is on. A rank that
fails leaves its error and ends, and with it all ranks.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
import traceback
from importlib import metadata
from pathlib import Path

import torch

from benchmarks import node_engines, node_plan
from benchmarks.node_cell import Job, Place
from benchmarks.node_plan import KINDS, SCALES, Cell
from benchmarks.node_rows import Row, Rows
from launch import cluster
from launch.cluster import Cluster

CURRENT = "current.json"  # key and start of the cell that is on
ERROR = "error-{}.txt"
LEFT = 1 << 28  # bytes of GPU memory that a cell may leave behind; above it the next one gets new processes


def machine(ranks: Cluster) -> str:
    """What the row's figures come from."""
    if ranks.device.type == "cuda":
        kind = torch.cuda.get_device_name(ranks.device)
    else:
        kind = f"process on a CPU ({platform.machine()})"
    try:
        zero = f", DeepSpeed {metadata.version('deepspeed')}"
    except metadata.PackageNotFoundError:
        zero = ""
    return f"{ranks.world_size} x {kind}, torch {torch.__version__}{zero}"


def one(cell: Cell, place: Place, scratch: Path) -> Row:
    """The row of a cell. Collective."""
    begin = time.time()
    if place.ranks.is_first:
        (scratch / CURRENT).write_text(json.dumps({"key": cell.key, "begin": begin}))
    row = Job(cell, place).run()
    about = {name: getattr(cell, name) for name in ("key", "kind", "world", "engine", "optimizer", "chain")}
    about |= {"leg": cell.leg if cell.chain else "", "machine": machine(place.ranks), "status": "ok"}
    return {**about, "seconds": round(time.time() - begin, 1), **row}


def left_behind() -> bool:
    """Whether the last cell still holds memory of the GPU."""
    gc.collect()
    if not torch.cuda.is_available():
        return False
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() > LEFT


def work(options: argparse.Namespace, place: Place) -> None:
    """Do the cells, as long as there is time for another. Collective."""
    every = {cell.key: cell for cell in node_plan.cells(KINDS, options.worlds)}
    for key in options.cells.split(","):
        cell = every[key]
        need = node_plan.expected(cell, place.rows.read(), place.scale)
        late = place.ranks.is_first and time.time() + need > options.deadline
        if place.ranks.any(left_behind() or late):
            return
        row = one(cell, place, options.scratch)
        if place.ranks.is_first:
            place.rows.append(row)
            (options.scratch / CURRENT).unlink()
        place.ranks.barrier()


def numbers(text: str) -> list[int]:
    """ "8,4" as a list. Raises ValueError."""
    return [int(word) for word in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cells", required=True, help="keys, with commas between them")
    parser.add_argument("--worlds", required=True, type=numbers)
    parser.add_argument("--preset", choices=SCALES, required=True)
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--saves", default="", help="optimizers, with commas between them")
    parser.add_argument("--card", type=int, required=True, help="bytes of a GPU")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True, help="seconds since 1970")
    options = parser.parse_args()
    node_engines.register()
    ranks = cluster.start(options.device)
    scale, rows = SCALES[options.preset], Rows(options.out)
    saves = tuple(options.saves.split(","))
    place = Place(ranks, scale, rows, options.scratch, options.card, max(options.worlds), saves)
    try:
        work(options, place)
    except Exception:
        (options.scratch / ERROR.format(ranks.rank)).write_text(traceback.format_exc())
        raise
    return 0


if __name__ == "__main__":
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1  # not by the interpreter's way out, which waits for other ranks
    cluster.leave(status)
