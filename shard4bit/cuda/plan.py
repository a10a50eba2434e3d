"""Plans: what a list of works needs on the device, made once - tables, tiles and workspace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shard4bit.backend import Agreement, Work
from shard4bit.cuda import tables
from shard4bit.cuda.source import Config
from shard4bit.layout import Slab
from shard4bit.spec import Factored, Full, MomentSpec, QuantSpec
from shard4bit.state import Moment

_SECONDS = {"rank1": "RANK1", "block": "BLOCKED"}


def second_of(work: Work) -> str | None:
    """How the kernels treat a work's second moment: one of ``source.SECONDS``, "" where every one does
    (fp32 moments), or None where no kernel serves the work (the ablation's quantizers, 8 bits)."""
    specs = [m.spec for m in work.moments]
    if not specs or len(specs) > 2:
        return None
    if all(isinstance(s, Full) for s in specs):
        return ""
    if specs[0] != FIRST:
        return None
    return "NONE" if len(specs) == 1 else kind_of_second(specs[1])


def kind_of_second(spec: MomentSpec) -> str | None:
    """How the kernels treat a second moment: one of ``source.SECONDS``, or None where none serves it."""
    if isinstance(spec, Factored):
        return "FACTORED"
    if isinstance(spec, QuantSpec) and spec == QuantSpec(norm=spec.norm, mapping="linear", signed=False):
        return _SECONDS.get(spec.norm)
    return None


CHUNK_ARGUMENTS = 16  # bytes of the other arguments of ``receive``

#: the first moment that the kernels serve
FIRST = QuantSpec(signed=True)

#: suffixes of a moment's tensors -> their fields in the slab table
FIRST_FIELDS = {"codes": "m_codes", "absmax": "m_absmax"}
SECOND_FIELDS = {
    "codes": "v_codes",
    "absmax": "v_row",
    "row_max": "v_row",
    "col_max": "v_col",
    "row_mean": "v_row",
    "col_mean": "v_col",
    "mean": "v_mean",
}


def describe_slab(record: Any, slab: Slab) -> None:
    """Fill the integers of a Slab of kernels/slabs.cuh."""
    for field in ("numel", "head", "tail", "rows", "col0", "col1"):
        record[field] = getattr(slab, field)
    record["cols"], record["all_rows"] = slab.view.cols, slab.view.rows
    if slab.row_ranges:
        record["row0"] = slab.row_ranges[0][0] & 0xFFFFFFFF


def describe_moment(record: Any, moment: Moment, fields: Mapping[str, str]) -> None:
    """Fill the addresses of a quantized moment's tensors."""
    for suffix, tensor in moment.tensors.items():
        record[fields[suffix]] = tensor.data_ptr()


class Table:
    """What steps send, as bytes on the host: a Live of each work, and behind them its Hypers or Recipes.

    live, records: views of both; grads, fields: views of columns, made once because a step writes them.
    chunks: (offset, bytes) of what one launch takes along, all of one size: the last one may go on behind the
    table's end.
    """

    def __init__(self, works: int, record: np.dtype, chunk: int) -> None:
        self.split = works * tables.LIVE.itemsize
        self.size, self.chunk = self.split + works * record.itemsize, chunk
        whole = np.zeros(-(-self.size // chunk) * chunk, np.uint8)
        self.chunks = [(at, whole[at : at + chunk]) for at in range(0, len(whole), chunk)]
        self.live = whole[: self.split].view(tables.LIVE)
        self.records = whole[self.split : self.size].view(record)
        self.grads = self.live["grad"]
        self.fields = {name: self.records[name] for name in record.names or ()}

    def used(self, records: int) -> int:
        """Chunks that a step with so many records needs."""
        return -(-(self.split + records * self.records.itemsize) // self.chunk)


@dataclass
class Batch:
    """Works of one kernel configuration, with their tables on the device."""

    config: Config
    works: list[Work]
    slabs_at: Tensor
    live_at: Tensor  # the table
    table: Table
    hypers: int  # address of the Hypers
    counts: np.ndarray | None  # address of each work's step count, where the device has it
    linked: bool  # whether a reduction may change the activity of a work
    tiles: dict[str, tuple[Tensor, int]]
    zeroed: Tensor  # workspace that measure starts from zero
    keep: list[Tensor]  # memory that the tables point to
    agreement: tuple[Agreement, Any, Tensor] | None  # last applied, its launch, places of the works in it
    version: int  # of the works, when the table was last filled
    read_grads: Callable[[], Sequence[Tensor | None]]
    addresses: list[int]  # of the gradients, as the table has them
    leaders: list[Work]  # one for each record that is sent
    sending: list[Any]  # launches, prepared, the same in every step, as the memory stays: one a chunk
    measuring: list[Any]
    applying: list[Any]


class BatchBuilder:
    """Makes a batch: workspace, slab table and tiles."""

    def __init__(self, runtime: Any, config: Config, works: list[Work]) -> None:
        self.runtime, self.config, self.works = runtime, config, works
        self.slabs = np.zeros(len(works), tables.SLAB)
        self.sizes: dict[str, int] = {"zeroed": 0, "parts": 0, "sums": 0, "shared": 0}
        self.claims: list[tuple[int, str, str, int]] = []  # slab, pool, field, offset

    def claim(self, number: int, pool: str, field: str, count: int) -> tuple[str, int, int]:
        """Reserve ``count`` elements of a pool of workspace for a field of a slab."""
        start = self.sizes[pool]
        self.sizes[pool] = start + -(-count // 4) * 4
        self.claims.append((number, pool, field, start))
        return pool, start, count

    def build(self) -> Batch:
        views: list[tuple[Work, int, str, tuple[str, int, int], tuple[int, ...]]] = []
        kinds: dict[str, list[np.ndarray]] = {k: [] for k in ("measure", "apply", "vectors", "means")}
        totals = []
        for number, work in enumerate(self.works):
            self._describe(number, work)
            if work.slab.numel == 0 and not work.links:
                continue
            if isinstance(work.moments[0].spec, Full):
                kinds["apply"].append(tables.flat_tiles(number, work.slab))
                continue
            kinds["apply"].append(tables.matrix_tiles(number, work.slab))
            views += self._statistics(number, work)
            if self.config.second in ("RANK1", "FACTORED"):
                kinds["measure"].append(tables.matrix_tiles(number, work.slab))
                vectors = [
                    tables.vector_tiles(number, work.slab.rows, tables.ROWS),
                    tables.vector_tiles(number, work.slab.width, tables.COLS),
                ]
                kinds["vectors"] += vectors
                kinds["means"] += [*vectors, tables.vector_tiles(number, 1, tables.MEAN)]
                totals.append(number)
            kinds["measure"].append(tables.shared_block_tiles(number, work.slab))
        pools = self._allocate()
        for number, pool, field, start in self.claims:
            self.slabs[number][field] = pools[pool].data_ptr() + start * pools[pool].element_size()
        for work, moment, name, (pool, start, count), shape in views:
            work.fresh[moment][name] = pools[pool][start : start + count].view(shape)
        numbers = self._number_rows()
        tiles = {}
        for kind, found in kinds.items():
            joined = tables.joined(found)
            tiles[kind] = (self.runtime.upload(joined), len(joined))
        tiles["totals"] = (self.runtime.upload(np.array(totals, dtype=np.int32)), len(totals))
        counts = [work.count for work in self.works if work.count is not None]
        assert len(counts) in (0, len(self.works))
        chunk = (self.runtime.room - CHUNK_ARGUMENTS) // 4 * 4
        table = Table(len(self.works), tables.RECIPE if counts else tables.HYPER, chunk)
        live_at = self._bytes(table.size)
        computed = self._bytes(len(self.works) * tables.HYPER.itemsize if counts else 0)
        return Batch(
            config=self.config,
            works=self.works,
            slabs_at=self.runtime.upload(self.slabs),
            live_at=live_at,
            table=table,
            hypers=computed.data_ptr() if counts else live_at.data_ptr() + table.split,
            counts=np.array([c.data_ptr() for c in counts], np.uint64) if counts else None,
            linked=any(work.links for work in self.works),
            tiles=tiles,
            zeroed=pools["zeroed"],
            keep=[*pools.values(), *numbers, computed, *counts],
            agreement=None,
            version=-1,
            read_grads=list,
            addresses=[],
            leaders=[],
            sending=[],
            measuring=[],
            applying=[],
        )

    def _bytes(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8, device=self.runtime.device)

    def _allocate(self) -> dict[str, Tensor]:
        dtypes = {"sums": torch.float64}
        return {
            pool: torch.zeros(size, dtype=dtypes.get(pool, torch.float32), device=self.runtime.device)
            for pool, size in self.sizes.items()
        }

    def _number_rows(self) -> list[Tensor]:
        """For slabs whose stored rows are not one range of the whole's, the number of each on the device."""
        out = []
        for record, work in zip(self.slabs, self.works, strict=True):
            if len(work.slab.row_ranges) > 1:
                pieces = work.slab.row_numbers(0, work.slab.rows)
                numbers = np.concatenate([np.arange(r.start, r.stop, dtype=np.int64) for r in pieces])
                numbers = numbers.astype(np.uint32)
                out.append(self.runtime.upload(numbers))
                record["numbers"] = out[-1].data_ptr()
        return out

    def _describe(self, number: int, work: Work) -> None:
        record, moments = self.slabs[number], work.moments
        describe_slab(record, work.slab)
        if isinstance(moments[0].spec, Full):
            record["kind"] = tables.FP32_MOMENTS
            for moment, field in zip(moments, ("m_codes", "v_codes"), strict=False):
                record[field] = moment.tensors[""].data_ptr()
        else:
            for moment, fields in zip(moments, (FIRST_FIELDS, SECOND_FIELDS), strict=False):
                describe_moment(record, moment, fields)

    def _statistics(self, number: int, work: Work) -> list[Any]:
        """Workspace for the statistics of a work's new moments, and how ``work.fresh`` shows it."""
        slab, out = work.slab, []
        work.fresh = [{} for _ in work.moments]
        shared = {(s.moment, s.stat) for link in work.links for s in link.shares}
        for moment, field in enumerate(("new_m_absmax", "new_v_absmax")):
            if (moment, "absmax") in shared:
                shape = tuple(work.moments[moment].matrix("absmax").shape)
                spot = self.claim(number, "shared", field, shape[0] * shape[1])
                out.append((work, moment, "absmax", spot, shape))
        if self.config.second == "RANK1":
            for field, name, count in (
                ("new_row", "row_max", slab.rows),
                ("new_col", "col_max", slab.width),
            ):
                spot = self.claim(number, "zeroed", field, count)
                out.append((work, 1, name, spot, (count,)))
        elif self.config.second == "FACTORED":
            for field, name, count in (
                ("new_row", "row_sum", slab.rows),
                ("new_col", "col_sum", slab.width),
                ("new_sum", "sum", 1),
            ):
                out.append((work, 1, name, self.claim(number, "sums", field, count), (count,)))
            groups = -(-slab.col1 // tables.TILE_COLS) - slab.col0 // tables.TILE_COLS
            self.claim(number, "parts", "part_row", groups * slab.rows)
            self.claim(number, "parts", "part_col", -(-slab.rows // tables.TILE_ROWS) * slab.width)
        return out
