"""The cells of benchmarks/node.py, as each of its ranks does them."""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks import node_plan
from benchmarks.accuracy.sharded import apart
from benchmarks.node_plan import SWEEP, Cell, Scale
from benchmarks.node_rows import Row, Rows
from benchmarks.sharded_step import Clock, give_gradients, optimizer_of, sharded
from launch import folders, measure, options
from launch.cluster import Cluster
from launch.data import rank_slice
from launch.scalars import Scalars
from launch.train import Run
from shard4bit import comm
from shard4bit.optim.summary import traffic

NEVER: Any = SimpleNamespace(signum=0)  # torchrun's SIGTERM ends a cell at once
NEAR = 0.05  # nats/byte that a curve of other ranks may be off; a run that starts anew is off by more
SIZES = (4, 1 << 16, 1 << 20, 1 << 22, 1 << 24)  # bytes of the vectors of the collective alone
REPEATS = 10


@dataclass(frozen=True)
class Place:
    """Where cells run. card: bytes of a GPU; most: ranks of the largest cells; saves: optimizers whose
    trainings end with a save and a load; scratch: for checkpoints."""

    ranks: Cluster
    scale: Scale
    rows: Rows
    scratch: Path
    card: int
    most: int
    saves: tuple[str, ...]


class NodeRun(Run):
    """launch.train's, also for ranks that share a sequence. digests: whether a save computes one."""

    digests = False

    def _loss(self, rows: np.ndarray) -> Tensor:
        """As Run's; of ranks that share a sequence each gives its part of that sequence's loss."""
        together = getattr(self.engine, "tensor", 1)
        rank, world = self.ranks.rank // together, self.ranks.world_size // together
        inputs, targets = rank_slice(rows, rank, world)
        logits = self.engine.logits(inputs.to(self.ranks.device))
        targets = targets.to(self.ranks.device)
        sums = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return sums / together

    def digest(self) -> str | None:
        return super().digest() if self.digests else None

    def losses(self, first: int, count: int) -> list[float]:
        """Of so many steps more."""
        return [self.ranks.sum(self.step(number)[0]).item() for number in range(first, first + count)]


class Job:
    """A cell on its ranks. Methods are collective and return what the row says."""

    def __init__(self, cell: Cell, place: Place) -> None:
        self.cell, self.place, self.ranks, self.scale = cell, place, place.ranks, place.scale
        self.out = place.scratch / cell.folder

    def run(self) -> Row:
        kinds = {"train": self.train, "resume": self.resume, "reduce": self.reduce, "largest": self.largest}
        return kinds[self.cell.kind]()

    # ---- trainings ------------------------------------------------------------------------------------

    def _start(self, *arguments: str, config: Any = None, batch: int | None = None) -> NodeRun:
        """The run of this cell, in an empty folder."""
        want, cell = self.scale, self.cell
        known = ["--preset", want.preset, "--context", str(want.context), "--precision", "bf16"]
        known += ["--batch", str(batch or want.batch), "--warmup", str(want.warmup)]
        known += ["--save-every", "0", "--out", str(self.out), *arguments]
        ours = cell.optimizer in node_plan.OURS
        chosen = ["adamw4bit", "--second-moment", cell.optimizer] if ours else ["adamw"]
        settings = options.parse([*known, "--optimizer", *chosen])
        settings.engine, settings.config = cell.engine, config or settings.config
        self.clear(self.out)
        run = NodeRun(settings, self.ranks)
        if not ours:
            fuse(run.engine.own_optimizer())
        return run

    def clear(self, folder: Path) -> None:
        """Remove a folder of checkpoints."""
        self.ranks.barrier()
        if self.ranks.is_first:
            shutil.rmtree(folder, ignore_errors=True)
        self.ranks.barrier()

    def _trained(self, run: NodeRun, first: int) -> tuple[dict[str, Any], Row]:
        """What Run.train found, and the row's figures of time and memory."""
        memory = Memory(run, self.ranks)
        found = run.train(first, NEVER, Scalars(None))
        tokens = run.settings.batch * run.context
        row: Row = {
            "step_ms": round(found["step_ms"]["median"], 3),
            "optimizer_ms": round(found["optimizer_step_ms"]["median"], 3),
            "tokens_per_s": round(tokens / found["step_ms"]["median"] * 1e3, 1),
            "parameters": run.engine.parameters,
            "loss_first": round(found["losses"][0], 5),
            "loss_last": round(found["losses"][-1], 5),
            **memory.row(),
        }
        return found, row

    def train(self) -> Row:
        run = self._start("--steps", str(self.scale.steps))
        found, row = self._trained(run, 0)
        row |= {"planned_b": node_plan.planned(self.cell, self.scale), "details": {"losses": found["losses"]}}
        if self.cell.optimizer in self.place.saves:
            row |= self._saved(run)
        return self._ended(run, row)

    def _saved(self, run: NodeRun) -> Row:
        """Save, go on, load, go on: the two must agree."""
        record = run.save(self.scale.steps)
        went = run.losses(self.scale.steps, 2)
        self.ranks.barrier()
        begin = time.perf_counter()
        run.store.load(run.root)
        self.ranks.synchronize()
        self.ranks.barrier()
        seconds = time.perf_counter() - begin
        again = run.losses(self.scale.steps, 2)
        self.clear(self.out)
        off = apart(went, again)[0]
        row: Row = {"save_s": round(record["seconds"], 2), "save_b": record["bytes"]}
        row |= {"load_s": round(seconds, 2), "off": f"{off:.1e}"}
        return row if off <= NEAR else {**row, "status": "failed", "note": "goes on otherwise after a load"}

    def _ended(self, run: NodeRun, row: Row) -> Row:
        if self.cell.engine.startswith("zero"):
            run.engine.model.destroy()
        return row

    def resume(self) -> Row:
        chain = node_plan.legs(self.cell.chain, [self.place.most])
        first, stop, save = node_plan.marks(self.cell, self.scale.steps)
        arguments = ["--steps", str(stop)] + (["--save-at", str(save)] if save else [])
        source = self.place.scratch / chain[self.cell.leg - 1].folder if first else None
        run = self._start(*arguments, *(["--resume", str(source / folders.CANONICAL)] if source else []))
        run.digests = True
        begin = time.perf_counter()
        found_step = run.resume()
        assert found_step == first, (self.cell, found_step)
        seconds = time.perf_counter() - begin
        restored = run.digest() if first else ""
        found, row = self._trained(run, first)
        saved = found["checkpoint"] or {}
        row |= {"restored": restored or "", "saved": saved.get("digest", ""), "first": first, "save_at": save}
        row |= {"details": {"losses": found["losses"]}}
        if source:
            before, whole = (self.place.rows.read()[leg.key] for leg in (chain[self.cell.leg - 1], chain[0]))
            curve = json.loads(whole["details"])["losses"][first:stop]
            off = apart(found["losses"], curve)[0]
            row |= {"load_s": round(seconds, 2), "off": f"{off:.1e}"}
            if restored != before["saved"]:
                row |= {"status": "failed", "note": f"restored another state than {before['saved']}"}
            elif not off <= NEAR:  # also NaN
                row |= {"status": "failed", "note": "the loss does not go on"}
            self.clear(source)
        if saved:
            row |= {"save_s": round(saved["seconds"], 2), "save_b": saved["bytes"]}
        return self._ended(run, row)

    def largest(self) -> Row:
        world = self.ranks.world_size
        card = int(self.place.card * node_plan.SMALLER**self.cell.leg)
        context = self.scale.context
        config = node_plan.largest_config(self.cell.optimizer, world, card, context)
        if config is None:
            return {"status": "does not fit", "note": "no shape fits such cards"}
        run = self._start("--steps", "3", config=config, batch=world)
        _, row = self._trained(run, 0)
        room = card - node_plan.reserve(card)
        shape = f"{config.layers} layers of width {config.width}, MLP {config.mlp}"
        return self._ended(run, {**row, "planned_b": room, "note": shape})

    # ---- the reduce phase -----------------------------------------------------------------------------

    def reduce(self) -> Row:
        clock = Clock(self.ranks.device)
        if self.cell.optimizer == SWEEP:
            points = [[size, self._alone(clock, size)] for size in SIZES]
            return {"details": {"points": points}}
        model = sharded("fsdp2", node_plan.shapes_of(self.scale.config), self.ranks.device)
        optimizer = optimizer_of(self.cell.optimizer, model)
        times: list[float] = []
        plain = comm.Reduction.run

        def timed(reduction: comm.Reduction, failure: BaseException | None = None) -> None:
            dist.barrier()  # what the other ranks are late is not the reduction's
            times.append(clock.measure(lambda: plain(reduction, failure))[0])

        steps: list[float] = []
        for number in range(2 * (REPEATS + 2)):
            give_gradients(model)
            if number % 2:
                with mock.patch.object(comm.Reduction, "run", timed):
                    optimizer.step()
            else:
                dist.barrier()
                steps.append(clock.measure(optimizer.step)[0])
        calls, size = traffic(optimizer.bind())
        here = statistics.median(times[2:])
        row: Row = {"calls": calls, "reduced_b": size, "reduce_ms": most_of([here], self.ranks)[0]}
        return {**row, "optimizer_ms": most_of([statistics.median(steps[2:])], self.ranks)[0]}

    def _alone(self, clock: Clock, size: int) -> float:
        vector = torch.zeros(size // 4, dtype=torch.int32, device=self.ranks.device)
        found = []
        for _ in range(REPEATS + 2):
            dist.barrier()
            found.append(clock.measure(lambda: dist.all_reduce(vector, dist.ReduceOp.MAX))[0])
        return most_of([statistics.median(found[2:])], self.ranks)[0]


class Memory:
    """Bytes of a run, by kind, on the rank that has most of each. Counts gradients in the first step."""

    def __init__(self, run: NodeRun, ranks: Cluster) -> None:
        self.run, self.cuda, self.gradients = run, ranks.device.type == "cuda", 0
        self.ranks, self.seen = ranks, set[int]()
        self.hook = run.engine.own_optimizer().register_step_pre_hook(self._count)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def _count(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for param in group["params"]:
                if id(param) not in self.seen and param.grad is not None:
                    self.seen.add(id(param))
                    self.gradients += local_bytes(param.grad)

    def row(self) -> Row:
        self.hook.remove()
        engine = self.run.engine
        model = engine.model.module if engine.name.startswith("zero") else engine.model
        held = {id(p): p for g in engine.own_optimizer().param_groups for p in g["params"]}
        found = {
            "weights_b": sum(map(local_bytes, model.parameters())),
            "gradients_b": self.gradients,
            "master_b": sum(map(local_bytes, held.values())) if engine.name.startswith("zero") else 0,
            "states_b": measure.local_state_bytes(engine.own_optimizer()),
        }
        if self.cuda:
            found |= {"peak_b": torch.cuda.max_memory_allocated()}
            found |= {"reserved_b": torch.cuda.max_memory_reserved()}
        else:
            found |= {"process_b": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        values = most_of([float(v) for v in found.values()], self.ranks)
        return {name: int(value) for name, value in zip(found, values, strict=True)}


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Let torch's AdamW step by its fused kernels, its fastest way; they take parameters of one mesh."""
    for group in list(optimizer.param_groups):
        group.update(fused=True, foreach=False)
        meshes: dict[Any, list[Tensor]] = {}
        for param in group["params"]:
            meshes.setdefault(getattr(param, "device_mesh", None), []).append(param)
        group["params"], *others = meshes.values()
        optimizer.param_groups.extend({**group, "params": params} for params in others)


def local_bytes(tensor: Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


def most_of(values: list[float], ranks: Cluster) -> list[float]:
    """The largest of each over the ranks. Collective."""
    found = torch.tensor(values, dtype=torch.float64, device=ranks.device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [round(value, 4) for value in found.tolist()]
