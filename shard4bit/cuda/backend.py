"""The kernels behind the back-end interface: one launch a phase for all slabs of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shard4bit.backend import Agreement, Work, Works
from shard4bit.cuda import tables
from shard4bit.cuda.plan import (
    FIRST,
    FIRST_FIELDS,
    SECOND_FIELDS,
    Batch,
    BatchBuilder,
    describe_moment,
    describe_slab,
    kind_of_second,
    second_of,
)
from shard4bit.cuda.source import DTYPES, Config, decode_text, receive_text, scalars_text, vectors_text
from shard4bit.maths.update import Rule, Scalars
from shard4bit.reference import ReferenceBackend
from shard4bit.state import Moment

_GRAD, _ACTIVE = attrgetter("grad"), attrgetter("active")
_ADDRESS: Callable[[Any], int] = Tensor.data_ptr
WARPS = 8  # of a thread block; as in kernels/rows.cuh
_SCALARS = {
    "adamw": ("beta1", "rest1", "beta2", "rest2", "keep", "step_size", "root", "eps"),
    "sgd": ("momentum", "rest", "lr", "weight_decay", "nesterov"),
}


def _reader(works: Sequence[Work]) -> Callable[[], Sequence[Any]]:
    """Reads the gradients of works, out of the list that they share in one call."""
    source, places = works[0].grads, [work.at for work in works]
    if len(works) == 1 or any(work.grads is not source for work in works):
        return lambda: list(map(_GRAD, works))
    pick = itemgetter(*places)
    return lambda: pick(source)


def _is_tame(scalars: Scalars) -> bool:
    """Whether, for second moments of usual size, denominators are in [2^-50, 2^35] (see arith.cuh)."""
    return scalars["beta2"] >= 0.25 and scalars["root"] <= 2.0**14 and scalars["eps"] <= 2.0**14


def _pack_scalars(fields: Mapping[str, np.ndarray], at: int, work: Work, *, adamw: bool) -> None:
    """Fill a Hyper of kernels/slabs.cuh."""
    scalars = work.scalars
    row = [scalars[name] for name in _SCALARS["adamw" if adamw else "sgd"]]
    if adamw:
        fields["tame"][at] = _is_tame(scalars)
        if work.maximize:
            row[1] = -row[1]  # 1 - beta1: the only place where a gradient's sign counts
    fields["scalars"][at, : len(row)] = row
    fields["maximize"][at], fields["first"][at] = work.maximize, scalars.get("first", 0.0)
    fields["ahead"][at], fields["draw"][at] = scalars["ahead"], int(scalars["draw"])


_OPTIONS = {
    "adamw": ("beta1", "beta2", "eps", "weight_decay"),
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
}


def _recipe(work: Work, *, adamw: bool) -> Any:
    """A Recipe of kernels/scalars.cu, without the address of the step count."""
    record, options = np.zeros((), tables.RECIPE), work.options
    for field, name in zip("abcd", _OPTIONS["adamw" if adamw else "sgd"], strict=True):
        record[field] = options[name]
    if isinstance(options["lr"], Tensor):
        record["lr_at"], record["wide"] = options["lr"].data_ptr(), options["lr"].dtype == torch.float64
    else:
        record["lr"] = options["lr"]
    record["ahead"], record["maximize"] = options["ahead"], work.maximize
    record["stochastic"] = options["stochastic"] != 0.0
    return record


def _refuse_count(work: Work) -> None:
    """Of a work that no kernel serves."""
    if work.count is None:
        return
    specs = [str(m.spec) for m in work.moments]
    stored = f"moments stored as {specs}" if specs else "no momentum"
    raise ValueError(
        f"capturable=True with a parameter of shape {work.slab.view.shape} and {stored}, for which there "
        'is no kernel: expected "B128/DE" with "rank1", "block" or "factored" (AdamW4bit), a momentum in '
        '"B128/DE" (SGD4bit), or quantize=False'
    )


class KernelBackend:
    """See :class:`shard4bit.backend.Backend`. Works that no kernel serves go to the torch reference, but for
    those whose step count is on the device: these are refused."""

    counts = True

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime
        self.reference = ReferenceBackend()
        self.code_tables = runtime.upload(tables.code_tables())

    # ---- the interface --------------------------------------------------------------------------

    def measure(self, rule: Rule, works: Works) -> None:
        batches, others = self._planned(rule, works)
        for batch in batches:
            self._fill(batch, works.version)
            self._send(batch, batch.measuring)
        if others:
            self.reference.measure(rule, others)

    def apply(self, rule: Rule, works: Works, agreed: Agreement | None = None) -> None:
        batches, others = self._planned(rule, works)
        for batch in batches:
            if agreed is not None and agreed.places:
                self._agree(batch, works.version, agreed)
            self.runtime.queue(batch.applying)
        if others:
            self.reference.apply(rule, others, agreed)

    def decode(self, moment: Moment) -> Tensor:
        first, second = moment.spec == FIRST, kind_of_second(moment.spec)
        slab = moment.slab
        if not (first or second) or slab.numel == 0:
            return self.reference.decode(moment)
        slabs, tiles = np.zeros(1, tables.SLAB), tables.matrix_tiles(0, slab)
        describe_slab(slabs[0], slab)
        describe_moment(slabs[0], moment, FIRST_FIELDS if first else SECOND_FIELDS)
        slabs_at, tiles_at = self.runtime.upload(slabs), self.runtime.upload(tiles)
        out = torch.empty(slab.numel, dtype=torch.float32, device=self.runtime.device)
        args = (tiles_at.data_ptr(), slabs_at.data_ptr(), self.code_tables.data_ptr(), out.data_ptr())
        text = decode_text(None if first else second)
        self.runtime.queue([self.runtime.prepare(text, "decode", len(tiles), 32 * WARPS, args)])
        return out

    def capturing(self) -> bool:
        return bool(self.runtime.capturing())

    # ---- launches -------------------------------------------------------------------------------

    def _list_launches(self, batch: Batch) -> None:
        """What every step launches for a batch; nothing where there are no tiles."""
        self._list_sending(batch)
        slabs, live = batch.slabs_at.data_ptr(), batch.live_at.data_ptr()
        step = (live, batch.hypers, self.code_tables.data_ptr())
        measuring, applying, count = batch.measuring, batch.applying, len(batch.works)

        def add(into: list[Any], source: str, name: str, tiles: str, threads: int, *args: int) -> None:
            at, blocks = batch.tiles[tiles]
            if blocks:
                args = (at.data_ptr(), slabs, *args)
                into.append(self.runtime.prepare(source, name, blocks, threads, args))

        def add_scalars(into: list[Any], name: str, table: int) -> None:
            args = (live + batch.table.split, table, np.int32(count))
            into.append(self.runtime.prepare(scalars_text(), name, -(-count // 128), 128, args))

        if batch.zeroed.numel():
            zeros = batch.zeroed.data_ptr(), np.int64(batch.zeroed.numel())
            blocks, text = -(-batch.zeroed.numel() // 256), receive_text(batch.table.chunk)
            measuring.append(self.runtime.prepare(text, "clear", blocks, 256, zeros))
        if batch.counts is not None:
            add_scalars(measuring, f"{batch.config.rule.lower()}_scalars", batch.hypers)
        add(measuring, batch.config.text, "measure", "measure", 32 * WARPS, *step)
        if batch.config.second == "FACTORED":
            add(measuring, vectors_text(), "gather_sums", "vectors", 256)
            add(measuring, vectors_text(), "total", "totals", 256)
            add(applying, vectors_text(), "advance_means", "means", 256, live, batch.hypers)
        add(applying, batch.config.text, "apply", "apply", 32 * WARPS, *step)
        if batch.config.second == "RANK1":
            add(applying, vectors_text(), "commit", "vectors", 256, live)
        if batch.counts is not None:
            add_scalars(applying, "count_steps", live)

    def _list_sending(self, batch: Batch) -> None:
        """The launches that bring the table to the device: it is small, and an argument of them."""
        table = batch.table
        for at, chunk in table.chunks:
            words = min(table.chunk, table.size - at) // 4
            args = (chunk, batch.live_at.data_ptr() + at, np.int32(words))
            text, blocks = receive_text(table.chunk), -(-words // 256)
            batch.sending.append(self.runtime.prepare(text, "receive", blocks, 256, args))

    def _send(self, batch: Batch, launches: Sequence[Any] = ()) -> None:
        """Bring the table to the device, and go on with these."""
        used = batch.table.used(len(batch.leaders))
        self.runtime.queue([*batch.sending[:used], *launches])

    def _fill(self, batch: Batch, version: int) -> None:
        """Write addresses, activity and scalars (or what the device computes them from) of this step."""
        works, table, known = batch.works, batch.table, batch.version == version
        if not known:
            table.live["param"] = [w.param.data_ptr() for w in works]
            batch.leaders = self._leaders(batch) if batch.counts is None else works
            batch.read_grads = _reader(works)
        grads = batch.read_grads()
        try:
            addresses = list(map(_ADDRESS, grads))
        except TypeError:  # some have none
            addresses = [0 if grad is None else grad.data_ptr() for grad in grads]
        if addresses != batch.addresses:
            table.grads[:] = batch.addresses = addresses
        if batch.linked or not known:
            table.live["active"] = list(map(_ACTIVE, works))
            batch.version = version
        if batch.counts is None:
            for at, work in enumerate(batch.leaders):
                _pack_scalars(table.fields, at, work, adamw=batch.config.rule == "ADAMW")
        else:
            self._pack_recipes(batch)

    def _agree(self, batch: Batch, version: int, agreed: Agreement) -> None:
        """Bring the activity of this step up to date, on the device, without waiting for it."""
        if agreed.flags.device != batch.live_at.device:
            agreed.settle()
            self._fill(batch, version)
            self._send(batch)
            return
        if batch.agreement is None or batch.agreement[0] is not agreed:
            count, places = len(batch.works), [agreed.places.get(id(work), 0) for work in batch.works]
            at = self.runtime.upload(np.array(places, np.int32))
            args = (batch.live_at.data_ptr(), at.data_ptr(), agreed.flags.data_ptr(), np.int32(count))
            launch = self.runtime.prepare(vectors_text(), "agree", -(-count // 128), 128, args)
            batch.agreement = agreed, launch, at
        self.runtime.queue([batch.agreement[1]])

    def _leaders(self, batch: Batch) -> list[Work]:
        """One work for all of the same scalars; the others point to its record."""
        leaders = {(id(w.scalars), w.maximize): w for w in batch.works}
        number = {key: i for i, key in enumerate(leaders)}
        batch.table.live["hyper"] = [number[id(w.scalars), w.maximize] for w in batch.works]
        return list(leaders.values())

    def _pack_recipes(self, batch: Batch) -> None:
        """One record a work: which of them have taken the same number of steps, only the device knows."""
        batch.table.live["hyper"] = np.arange(len(batch.works))
        adamw, made = batch.config.rule == "ADAMW", {}
        for work in batch.works:
            key = id(work.options), work.maximize
            if key not in made:
                made[key] = _recipe(work, adamw=adamw)
        batch.table.records[:] = np.stack([made[id(w.options), w.maximize] for w in batch.works])
        batch.table.fields["count"][:] = batch.counts

    # ---- plans ----------------------------------------------------------------------------------

    def _planned(self, rule: Rule, works: Works) -> tuple[list[Batch], Works]:
        """The batches of these works (and those that no kernel serves), made when they first come."""
        if "kernels" not in works.cache:
            if self.runtime.capturing():
                raise ValueError(
                    "a capture of the first step with these gradients (which parameters have one, of which "
                    "dtype): take such a step before the capture, as torch's warm-up does"
                )
            works.cache["kernels"] = self._make_batches(rule, works)
        return works.cache["kernels"]

    def _make_batches(self, rule: Rule, works: Works) -> tuple[list[Batch], Works]:
        sorted_works: dict[tuple[str, str], dict[str, list[Work]]] = {}
        others = Works()
        for work in works:
            second = second_of(work)
            grad = work.grad.dtype if work.grad is not None else work.param.dtype
            if second is None:
                _refuse_count(work)
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
                self._list_launches(batches[-1])
        return batches, others
