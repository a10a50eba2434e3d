"""Training, resuming and reducing on the GPUs of one node: python -m benchmarks.node --out DIR

Trains a Llama shape of 7 B parameters (--preset) in bf16 on real text, with torch's AdamW and with 4-bit
states, by every engine, on 8 and on 4 ranks; saves and loads; resumes on other numbers of ranks and by other
engines; times the reduce phase; trains the largest model that the memory planner lets fit. Each of these
cells is a row of DIR/node.csv, added as it ends. A call does what has no row yet and ends before its
--budget, with status 3 if there is more to do: run it again. --table DIR prints the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import node_plan
from benchmarks.node_plan import KINDS, SCALES, Cell
from benchmarks.node_rows import Row, Rows
from benchmarks.node_table import page
from benchmarks.node_worker import CURRENT, ERROR, numbers
from launch import folders
from launch.demo import ROOT, environment
from shard4bit.cli.memory import capacity
from shard4bit.cli.tables import size

MORE = 3  # status of a call that leaves something to do
MARGIN = 10  # seconds before the end of the budget at which ranks are ended
OOM = "OutOfMemoryError"
NAMES = ",".join(node_plan.MOMENTS)
PROBE = "import torch; print(torch.cuda.get_device_properties(0).total_memory)"


class Driver:
    """One call: chooses cells, starts ranks for them, and records what became of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.scale = options, SCALES[options.preset]
        self.rows, self.scratch = Rows(options.out), options.scratch or options.out / "scratch"
        self.deadline = time.time() + options.budget
        self.card = options.card or self.scale.card or int(python("-c", PROBE))
        self.every = node_plan.cells(options.plan, options.worlds)
        self.cells = [cell for cell in self.every if re.search(options.only, cell.key)]
        self.shown = self.rows.read()
        self.again = {key for key, row in self.rows.read().items() if row["status"] == "failed"}
        self.again = self.again if options.retry else set()
        self.scratch.mkdir(parents=True, exist_ok=True)
        (options.out / "logs").mkdir(parents=True, exist_ok=True)

    def run(self) -> int:
        """Do what there is time for; the status."""
        while group := self.next_group():
            left = self.deadline - time.time()
            need = self.scale.start + node_plan.expected(group[0], self.rows.read(), self.scale)
            if left < need:
                print(f"{len(set(self.todo()))} cells are left, {left:.0f} s too little for {group[0].key}")
                return MORE
            self.launch(group)
        print(f"done: {self.rows.path}")
        return 0

    # ---- what to do -----------------------------------------------------------------------------------

    def todo(self) -> Iterator[Cell]:
        """Cells without a row, but for those that cannot be done, which get one."""
        for cell in self.cells:
            rows = self.rows.read()
            if (cell.key in rows and cell.key not in self.again) or not self.wanted(cell, rows):
                continue
            planned = 0
            if cell.kind in ("train", "resume"):
                planned = node_plan.planned(cell, self.scale) + node_plan.reserve(self.card)
            if planned > self.card:
                self.record(cell, "does not fit", f"planned {size(planned)} of {size(self.card)}")
            elif cell.kind == "resume":
                yield from self.after_sources(cell, rows)
            else:
                yield cell

    def wanted(self, cell: Cell, rows: dict[str, dict[str, str]]) -> bool:
        """Whether a further attempt at the largest model is to be made: the one before was too large."""
        if cell.kind != "largest" or not cell.leg:
            return True
        before = rows.get(cell.key.rsplit("/", 1)[0] + f"/{cell.leg - 1}")
        return before is not None and OOM in before["note"]

    def after_sources(self, cell: Cell, rows: dict[str, dict[str, str]]) -> Iterator[Cell]:
        """A leg, or the earlier one that must be done (again) because its checkpoint is not there."""
        source = node_plan.source_of(cell, self.options.worlds)
        while source is not None and not self.has_checkpoint(source, rows):
            row = rows.get(source.key)
            if row and row["status"] != "ok" and source.key not in self.again:
                self.record(cell, "failed", f"{source.key} {row['status']}")
                return
            cell, source = source, node_plan.source_of(source, self.options.worlds)
        yield cell

    def has_checkpoint(self, leg: Cell, rows: dict[str, dict[str, str]]) -> bool:
        step = folders.step_name(node_plan.marks(leg, self.scale.steps)[2])
        return leg.key in rows and (self.scratch / leg.folder / folders.CANONICAL / step).is_dir()

    def next_group(self) -> list[Cell]:
        """The next cells that share their processes; none: all is done."""
        found = list(dict.fromkeys(self.todo()))  # several legs may wait for one
        return [cell for cell in found if cell.family == found[0].family]

    # ---- doing it -------------------------------------------------------------------------------------

    def launch(self, group: list[Cell]) -> None:
        """Start ranks for cells, wait, and record the one that failed, if one did."""
        first, before = group[0], self.rows.read()
        self.clean()
        log = self.options.out / "logs" / f"{time.strftime('%H%M%S')}-{first.folder}.txt"
        env = environment(first.world)
        if first.kind == "largest":  # of which fragments would be the end
            env.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        with log.open("w") as file:
            ranks = subprocess.Popen(self.command(group), cwd=ROOT, env=env, stdout=file, stderr=file)
            try:
                why = self.wait(ranks)
            finally:
                stop(ranks)
        self.show()
        self.again -= {key for key, row in self.rows.read().items() if row != before.get(key)}
        if ranks.returncode == 0 or why == "budget":
            return
        known, on = self.rows.read(), self.current().get("key")
        left = [cell for cell in group if cell.key not in known or cell.key in self.again]
        lost = [cell for cell in left if cell.key == on] or left  # none: they failed when all was done
        for cell in lost[:1]:
            self.record(cell, "failed", why or self.error(log))

    def command(self, group: list[Cell]) -> list[str]:
        want = self.options
        out = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        out += ["--nproc-per-node", str(group[0].world), "-m", "benchmarks.node_worker"]
        out += ["--cells", ",".join(cell.key for cell in group), "--worlds", ",".join(map(str, want.worlds))]
        out += ["--preset", want.preset, "--device", want.device, "--saves", want.saves]
        out += ["--card", str(self.card), "--out", str(want.out), "--scratch", str(self.scratch)]
        return [*out, "--deadline", str(self.deadline - MARGIN)]

    def wait(self, ranks: subprocess.Popen[bytes]) -> str:
        """Until they end, or must be ended: why, "" if they ended by themselves."""
        while ranks.poll() is None:
            time.sleep(0.3)
            self.show()
            if time.time() > self.deadline - MARGIN:
                return "budget"
            begin = self.current().get("begin", time.time())
            if time.time() - begin > self.scale.limit:
                return f"not done after {self.scale.limit:.0f} s"
        return ""

    def current(self) -> dict[str, Any]:
        """Key and start of the cell that is on."""
        try:
            return json.loads((self.scratch / CURRENT).read_text())
        except (OSError, ValueError):  # none, or one that is being written
            return {}

    def clean(self) -> None:
        """Remove what earlier cells left behind, but for checkpoints that others go on from."""
        for path in [self.scratch / CURRENT, *self.scratch.glob(ERROR.format("*"))]:
            path.unlink(missing_ok=True)
        for kind in ("train", "largest"):
            for folder in self.scratch.glob(f"{kind}-*"):
                shutil.rmtree(folder)

    def error(self, log: Path) -> str:
        """Of the rank that failed first, in a line; else the log's last one."""
        found = sorted(self.scratch.glob(ERROR.format("*")), key=lambda path: path.stat().st_mtime_ns)
        lines = (found[0] if found else log).read_text(errors="replace").strip().splitlines()
        return f"{lines[-1].strip()[:300]} ({log.name})" if lines else f"see {log.name}"

    def record(self, cell: Cell, status: str, note: str) -> None:
        """The row of a cell that was not done."""
        about: Row = {name: getattr(cell, name) for name in ("key", "kind", "world", "engine", "optimizer")}
        leg = {"chain": cell.chain, "leg": cell.leg if cell.chain else "", "seconds": 0}
        self.again.discard(cell.key)
        self.rows.append({**about, **leg, "status": status, "note": note})
        self.show()

    def show(self) -> None:
        """Print the rows that are new."""
        for key, row in self.rows.read().items():
            if row != self.shown.get(key):
                self.shown[key] = row
                names = ("tokens_per_s", "optimizer_ms", "reduce_ms", "loss_last", "off", "note")
                said = ", ".join(f"{name} {row[name]}" for name in names if row[name])
                print(f"{row['seconds']:>6} s  {key:34} {row['status']}  {said}", flush=True)


def stop(ranks: subprocess.Popen[bytes]) -> None:
    """End torchrun and with it its ranks."""
    if ranks.poll() is None:
        ranks.terminate()  # which it passes on
        with contextlib.suppress(subprocess.TimeoutExpired):
            ranks.wait(20)
        ranks.kill()
        ranks.wait()


def python(*arguments: str) -> str:
    """What Python prints, in a process that then gives back the GPU."""
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True).stdout


def words(text: str) -> list[str]:
    """ "train,reduce" as a list. Raises ValueError for what is no kind of cell."""
    found = text.split(",")
    if not set(found) <= set(KINDS):
        raise ValueError(text)
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="folder of node.csv and logs")
    where.add_argument("--table", type=Path, metavar="DIR", help="print the tables of such a folder")
    add("--budget", type=float, default=520, help="seconds that a call may take (default 520)")
    add("--plan", type=words, default=list(KINDS), help=f"of {','.join(KINDS)} (default: all)")
    add("--worlds", type=numbers, default=[8, 4], help="ranks to train on, powers of 2 (default 8,4)")
    add("--only", default="", metavar="REGEX", help="only cells whose key has this, such as 'train/8/fsdp'")
    add("--preset", choices=SCALES, default="7b")
    add("--device", choices=("auto", "cpu"), default="auto", help="auto: GPUs")
    add("--saves", default="adamw,rank1", help=f"trainings that also save and load: none, or of {NAMES}")
    add("--card", type=capacity, help="memory to plan for, such as 141GB (default: that of the GPU)")
    add("--scratch", type=Path, help="folder of checkpoints, which come and go (default: DIR/scratch)")
    add("--retry", action="store_true", help="do cells again that failed")
    add("--list", action="store_true", help="only print the keys of cells that have no row yet")
    options = parser.parse_args(argv)
    if any(n not in (1, 2, 4, 8) for n in options.worlds):
        parser.error(f"--worlds {options.worlds}: expected 8, 4, 2 or 1")
    if options.saves != "none" and not set(options.saves.split(",")) <= set(NAMES.split(",")):
        parser.error(f"--saves {options.saves}: expected none, or of {NAMES}")
    gpus = torch.cuda.device_count()
    if options.out and not options.list and options.device == "auto" and gpus < max(options.worlds):
        parser.error(f"{gpus} GPUs here: give --worlds of fewer ranks, or --device cpu and --preset tiny")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.table:
        print(page(Rows(options.table).read(), SCALES[options.preset]))
        return 0
    options.out, options.scratch = options.out.absolute(), options.scratch and options.scratch.absolute()
    if options.list:
        known = Rows(options.out).read()
        found = [cell.key for cell in node_plan.cells(options.plan, options.worlds) if cell.key not in known]
        print("\n".join(key for key in found if re.search(options.only, key)))
        return 0
    try:
        return Driver(options).run()
    except ValueError as error:
        print(f"benchmarks.node: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of stop()
    sys.exit(main())
