"""The kernels behind the back-end interface: one launch a phase for all slabs of a step."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from shard4bit.backend import Work, Works
from shard4bit.cuda import tables
from shard4bit.cuda.plan import Batch, BatchBuilder, second_of
from shard4bit.cuda.source import DTYPES, Config, vectors_text
from shard4bit.maths.update import Rule, Scalars
from shard4bit.reference import ReferenceBackend
from shard4bit.state import Moment

WARPS = 8  # of a thread block; as in kernels/rows.cuh
_SCALARS = {
    "adamw": ("beta1", "rest1", "beta2", "rest2", "keep", "step_size", "root", "eps"),
    "sgd": ("momentum", "rest", "lr", "weight_decay", "nesterov"),
}


def _is_tame(scalars: Scalars) -> bool:
    """Whether, for second moments of usual size, denominators are in [2^-50, 2^35] (see arith.cuh)."""
    return scalars["beta2"] >= 0.25 and scalars["root"] <= 2.0**14 and scalars["eps"] <= 2.0**14


def _pack_scalars(record: Any, work: Work, *, adamw: bool) -> None:
    """Fill a Hyper of kernels/slabs.cuh."""
    scalars, names = work.scalars, _SCALARS["adamw" if adamw else "sgd"]
    record["scalars"][: len(names)] = [scalars[name] for name in names]
    record["maximize"], record["first"] = work.maximize, scalars.get("first", 0.0)
    record["ahead"] = scalars["ahead"]
    if adamw:
        record["tame"] = _is_tame(scalars)
        if work.maximize:
            record["scalars"][1] *= -1  # 1 - beta1: the only place where a gradient's sign counts


class KernelBackend:
    """See :class:`shard4bit.backend.Backend`. Works that no kernel serves go to the torch reference."""

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime
        self.reference = ReferenceBackend()
        self.code_tables = runtime.upload(tables.code_tables())

    # ---- the interface --------------------------------------------------------------------------

    def measure(self, rule: Rule, works: Works) -> None:
        batches, others = self._planned(rule, works)
        for batch in batches:
            self._upload(batch)
            measured = batch.tiles["measure"]
            if batch.zeroed.numel():
                batch.zeroed.zero_()
            if measured[1]:
                self._step_kernel(batch, "measure", measured)
            if batch.config.second == "FACTORED":
                self._vectors("gather_sums", batch, "vectors", live=False)
                numbers, count = batch.tiles["totals"]
                if count:
                    args = (numbers.data_ptr(), batch.slabs_at.data_ptr())
                    self.runtime.launch(vectors_text(), "total", count, 256, args)
        if others:
            self.reference.measure(rule, others)

    def apply(self, rule: Rule, works: Works) -> None:
        batches, others = self._planned(rule, works)
        for batch in batches:
            if [w.active for w in batch.works] != batch.active:  # the reduction changed it
                self._upload(batch)
            if batch.config.second == "FACTORED":
                self._vectors("advance_means", batch, "means", hyper=True)
            if batch.tiles["apply"][1]:
                self._step_kernel(batch, "apply", batch.tiles["apply"])
            if batch.config.second == "RANK1":
                self._vectors("commit", batch, "vectors")
        if others:
            self.reference.apply(rule, others)

    def decode(self, moment: Moment) -> Tensor:
        return self.reference.decode(moment)

    # ---- launches -------------------------------------------------------------------------------

    def _step_kernel(self, batch: Batch, name: str, tiles: tuple[Tensor, int]) -> None:
        at, count = tiles
        live = batch.live_at.data_ptr()
        args = (
            at.data_ptr(),
            batch.slabs_at.data_ptr(),
            live,
            live + batch.live.nbytes,
            self.code_tables.data_ptr(),
        )
        self.runtime.launch(batch.config.text, name, count, 32 * WARPS, args)

    def _vectors(
        self, name: str, batch: Batch, which: str, *, live: bool = True, hyper: bool = False
    ) -> None:
        at, count = batch.tiles[which]
        args: tuple[Any, ...] = (at.data_ptr(), batch.slabs_at.data_ptr())
        if live:
            args += (batch.live_at.data_ptr(),)
        if hyper:
            args += (batch.live_at.data_ptr() + batch.live.nbytes,)
        if count:
            self.runtime.launch(vectors_text(), name, count, 256, args)

    def _upload(self, batch: Batch) -> None:
        """Addresses, activity and scalars of this step, in one copy."""
        works, live = batch.works, batch.live
        live["param"] = [w.param.data_ptr() for w in works]
        live["grad"] = [0 if w.grad is None else w.grad.data_ptr() for w in works]
        active = [w.active for w in works]
        if active != batch.active:
            live["active"] = batch.active = active
        hypers = {(id(w.scalars), w.maximize): w for w in works}
        if len(hypers) == 1:
            live["hyper"] = 0
        else:
            number = {key: i for i, key in enumerate(hypers)}
            live["hyper"] = [number[id(w.scalars), w.maximize] for w in works]
        packed = np.zeros(len(hypers), tables.HYPER)
        for record, work in zip(packed, hypers.values(), strict=True):
            _pack_scalars(record, work, adamw=batch.config.rule == "ADAMW")
        self.runtime.upload(np.concatenate([live.view(np.uint8), packed.view(np.uint8)]), batch.live_at)

    # ---- plans ----------------------------------------------------------------------------------

    def _planned(self, rule: Rule, works: Works) -> tuple[list[Batch], Works]:
        """The batches of these works (and those that no kernel serves), made when they first come."""
        if "kernels" not in works.cache:
            works.cache["kernels"] = self._make_batches(rule, works)
        return works.cache["kernels"]

    def _make_batches(self, rule: Rule, works: Works) -> tuple[list[Batch], Works]:
        sorted_works: dict[tuple[str, str], dict[str, list[Work]]] = {}
        others = Works()
        for work in works:
            second = second_of(work)
            grad = work.grad.dtype if work.grad is not None else work.param.dtype
            if second is None:
                others.append(work)
            else:
                dtypes = (DTYPES[work.param.dtype], DTYPES[grad])
                sorted_works.setdefault(dtypes, {}).setdefault(second, []).append(work)
        batches = []
        for (param, grad_name), by_second in sorted_works.items():
            flat = by_second.pop("", [])
            if flat:  # every kernel serves fp32 moments: let them join another launch
                default = "NONE" if rule.name == "sgd" else "RANK1"
                by_second.setdefault(next(iter(by_second), default), []).extend(flat)
            for second, members in by_second.items():
                config = Config(param, grad_name, rule.name.upper(), second)
                batches.append(BatchBuilder(self.runtime, config, members).build())
        return batches, others
