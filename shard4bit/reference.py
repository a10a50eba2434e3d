"""The back end in plain torch, for any device: the definition of what every other one must compute.

Works in chunks of rows, or of one long row, so that a step's memory is a few chunks and the statistics
of rows and columns, whatever the size of the model.
Only single-rounding IEEE operations touch values, so chunks, threads and cuts cannot change a bit
(sums of the factored moment excepted: they are taken in float64, whose error is far below an fp32 ulp).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from shard4bit.backend import Agreement, Work
from shard4bit.layout import Piece, block_pieces
from shard4bit.maths import normalize
from shard4bit.maths.mapping import codec, encode
from shard4bit.maths.packing import pack_codes, packed_window, unpack_values
from shard4bit.maths.rounding import draws, encode_drawn
from shard4bit.maths.update import Rule, lead
from shard4bit.spec import Factored, Full, QuantSpec
from shard4bit.state import Moment
from shard4bit.windows import Window, windows

CPU_CHUNK = 1 << 18  # elements; temporaries stay in a core's cache
GPU_CHUNK = 1 << 24


def _pieces(moment: Moment, window: Window) -> list[Piece]:
    cols = moment.slab.view.cols
    return block_pieces(window.col0, window.col1, cols, moment.quant.block_size)


def _rank1_scale(rows: Tensor, cols: Tensor, window: Window, col0: int) -> Tensor:
    """min(row, column) statistic (rows, columns) of a window."""
    return torch.minimum(
        rows[window.row0 : window.row1, None], cols[None, window.col0 - col0 : window.col1 - col0]
    )


def _dequantize(moment: Moment, window: Window) -> Tensor:
    """The stored moment's values (rows, columns) float32, in fresh memory."""
    spec, slab = moment.quant, moment.slab
    table = codec(spec, moment.tensors["codes"].device)
    codes = moment.matrix("codes")[window.row0 : window.row1]
    byte0 = packed_window(slab.col0, slab.col1, spec.bits)[0]
    values = unpack_values(codes, byte0, window.col0, window.col1, table)
    if spec.norm == "rank1":
        rows, cols = moment.vector("row_max"), moment.vector("col_max")
        return values.mul_(_rank1_scale(rows, cols, window, slab.col0))
    if spec.norm == "tensor":
        return values.mul_(moment.tensors["absmax"])
    absmax = moment.matrix("absmax")[window.row0 : window.row1]
    first = slab.units(spec.block_size)[0]
    return normalize.scale_blocks(values, absmax, _pieces(moment, window), window.col0, first)


def _old(moment: Moment, window: Window) -> Tensor:
    """The moment before this step: a live view where it is kept in fp32, else fresh memory."""
    if isinstance(moment.spec, Full):
        return window.elements(moment.vector(""))
    return _dequantize(moment, window)


class _Chunk:
    """The float32 parameter and gradient of one window of a work."""

    def __init__(self, work: Work, window: Window) -> None:
        self.target = window.elements(work.param.view(-1))
        if work.grad is None:
            self.grad = torch.zeros(window.shape, dtype=torch.float32, device=work.param.device)
        else:
            self.grad = window.elements(work.grad.view(-1)).float()
        if work.maximize:
            self.grad = -self.grad
        self.param = self.target.float()  # the live tensor itself when it is float32


def _needs_measure(i: int, work: Work) -> bool:
    """Whether apply cannot find the i-th moment's statistics by itself."""
    spec = work.moments[i].spec
    if isinstance(spec, QuantSpec) and spec.norm == "block":
        return any(share.moment == i for link in work.links for share in link.shares)
    return not isinstance(spec, Full)


def _fresh(i: int, work: Work) -> dict[str, Tensor]:
    """Zeroed statistics of the i-th new moment, for measure to fill."""
    if not _needs_measure(i, work):
        return {}
    moment = work.moments[i]
    slab, spec, device = moment.slab, moment.spec, work.param.device
    if isinstance(spec, Factored):
        shapes = {"row_sum": (slab.rows,), "col_sum": (slab.width,), "sum": (1,)}
        return {k: torch.zeros(s, dtype=torch.float64, device=device) for k, s in shapes.items()}
    if moment.quant.norm == "rank1":
        sizes: dict[str, tuple[int, ...]] = {"row_max": (slab.rows,), "col_max": (slab.width,)}
    elif moment.quant.norm == "tensor":
        sizes = {"absmax": (1,)}
    else:
        sizes = {"absmax": tuple(moment.matrix("absmax").shape)}
    return {k: torch.zeros(s, dtype=torch.float32, device=device) for k, s in sizes.items()}


def _raise_to(stat: Tensor, values: Tensor) -> None:
    """stat = max(stat, values) in place; NaN propagates."""
    torch.maximum(stat, values, out=stat)


def _measure_window(rule: Rule, work: Work, i: int, window: Window) -> None:
    """Add one window to the statistics of the i-th moment."""
    moment, fresh, col0 = work.moments[i], work.fresh[i], work.slab.col0
    columns = slice(window.col0 - col0, window.col1 - col0)
    rows = slice(window.row0, window.row1)
    chunk = _Chunk(work, window)
    if isinstance(moment.spec, Factored):
        squares = (chunk.grad * chunk.grad).double()
        fresh["row_sum"][rows] += squares.sum(1)
        fresh["col_sum"][columns] += squares.sum(0)
        fresh["sum"] += squares.sum()
        return
    new = rule.advance(i, _dequantize(moment, window), chunk.grad, chunk.param, work.scalars)
    if moment.quant.norm == "rank1":
        _raise_to(fresh["row_max"][rows], new.amax(1))
        _raise_to(fresh["col_max"][columns], new.amax(0))
    elif moment.quant.norm == "tensor":
        _raise_to(fresh["absmax"], new.abs().amax().view(1))
    else:
        first = work.slab.units(moment.quant.block_size)[0]
        for piece in _pieces(moment, window):
            if piece.cut:
                here = slice(piece.block - first, piece.block - first + piece.count)
                found = normalize.block_max(new, piece, window.col0)
                _raise_to(fresh["absmax"][rows, here], found)


def _new_means(moment: Moment, fresh: dict[str, Tensor], work: Work) -> None:
    """Advance a factored moment's means by the reduced sums of squares, in place (as Adafactor's)."""
    view, h = moment.slab.view, work.scalars
    counts = {"row": view.cols, "col": view.rows, "": view.numel}
    for name, count in counts.items():
        key, total = (f"{name}_mean", f"{name}_sum") if name else ("mean", "sum")
        mean = (fresh[total] / max(count, 1)).float().view(moment.tensors[key].shape)
        moment.tensors[key].mul_(h["beta2"]).add_(mean * h["rest2"])


def _factored_values(moment: Moment, window: Window) -> Tensor:
    """row_mean x col_mean / mean (rows, columns) of a window; zeros where the mean is 0."""
    mean, col0 = moment.tensors["mean"], moment.slab.col0
    rows = moment.vector("row_mean")[window.row0 : window.row1]
    ratio = torch.where(mean == 0, 0.0, rows / mean)
    cols = moment.vector("col_mean")[window.col0 - col0 : window.col1 - col0]
    return ratio[:, None] * cols[None, :]


def _store(moment: Moment, fresh: dict[str, Tensor], new: Tensor, window: Window, draw: int = 0) -> None:
    """Encode the new values (rows, columns) of one window; overwrites ``new``. draw: the step, where a second
    moment is rounded stochastically."""
    if not isinstance(moment.spec, QuantSpec):
        return
    spec, slab = moment.spec, moment.slab
    rows = slice(window.row0, window.row1)
    if spec.norm == "rank1":
        inv_rows, inv_cols = fresh["inv_row"][rows], fresh["inv_col"]
        columns = inv_cols[window.col0 - slab.col0 : window.col1 - slab.col0]
        new.mul_(torch.maximum(inv_rows[:, None], columns[None, :]))
    elif spec.norm == "tensor":
        new.mul_(normalize.inverse(fresh["absmax"]))
    else:
        _store_blocks(moment, fresh, new, window)
    byte0 = packed_window(slab.col0, slab.col1, spec.bits)[0]
    if draw and spec.mapping == "linear":
        pieces = slab.row_numbers(window.row0, window.row1)
        numbers = torch.cat([torch.arange(r.start, r.stop, device=new.device) for r in pieces])
        codes = encode_drawn(new, draws(numbers, window.col0, window.col1, draw), spec.bits)
    else:
        codes = encode(new, codec(spec, new.device))
    target = moment.matrix("codes")[rows]
    pack_codes(target, byte0, window.col0, window.col1, codes, spec.bits)


def _stored(moment: Moment, fresh: dict[str, Tensor], new: Tensor, window: Window) -> Tensor:
    """Encode the new values of one window, overwriting ``new``; returns them as they will be read again."""
    _store(moment, fresh, new, window)
    if moment.quant.norm == "tensor":  # its statistic is stored when every window is done
        moment = replace(moment, tensors=moment.tensors | {"absmax": fresh["absmax"]})
    return _dequantize(moment, window)


def _store_blocks(moment: Moment, fresh: dict[str, Tensor], new: Tensor, window: Window) -> None:
    """Set the blocks' absmax and normalize ``new`` by it, in place."""
    absmax, first = moment.matrix("absmax"), moment.slab.units(moment.quant.block_size)[0]
    rows, pieces = slice(window.row0, window.row1), _pieces(moment, window)
    for piece in pieces:
        here = slice(piece.block - first, piece.block - first + piece.count)
        if piece.cut:
            absmax[rows, here] = fresh["absmax"][rows, here]
        else:
            absmax[rows, here] = normalize.settle(normalize.block_max(new, piece, window.col0))
    block0, stop = pieces[0].block, pieces[-1].block + pieces[-1].count
    inverse = normalize.inverse(absmax[rows, block0 - first : stop - first])
    normalize.scale_blocks(new, inverse, pieces, window.col0, block0)


class ReferenceBackend:
    """See :class:`shard4bit.backend.Backend`."""

    counts = False  # scalars are Python's

    def capturing(self) -> bool:
        return False  # nothing that a graph could replay

    def measure(self, rule: Rule, works: Sequence[Work]) -> None:
        for work in works:
            work.fresh = [_fresh(i, work) for i in range(len(work.moments))]
            if work.grad is None and not work.links:
                continue
            for i, moment in enumerate(work.moments):
                if work.fresh[i]:
                    for window in _measured_windows(moment, work):
                        _measure_window(rule, work, i, window)

    def apply(self, rule: Rule, works: Sequence[Work], agreed: Agreement | None = None) -> None:
        if agreed is not None:
            agreed.settle()
        for work in works:
            if not work.active:
                continue
            for moment, fresh in zip(work.moments, work.fresh, strict=True):
                self._settle(moment, fresh, work)
            for window in windows(work.slab.rects(), work.moments, _limit(work)):
                self._apply_window(rule, work, window)
            for moment, fresh in zip(work.moments, work.fresh, strict=True):
                for stat in ("row_max", "col_max", "absmax"):
                    if stat in fresh and not (stat == "absmax" and moment.quant.norm == "block"):
                        moment.tensors[stat].copy_(fresh[stat].view(moment.tensors[stat].shape))

    def decode(self, moment: Moment) -> Tensor:
        slab = moment.slab
        device = next(iter(moment.tensors.values())).device
        out = torch.zeros(slab.numel, dtype=torch.float32, device=device)
        for window in windows(slab.rects(), [moment], CPU_CHUNK):
            if isinstance(moment.spec, Factored):
                values = _factored_values(moment, window)
            else:
                values = _old(moment, window)
            window.elements(out).copy_(values)
        return out

    @staticmethod
    def _settle(moment: Moment, fresh: dict[str, Tensor], work: Work) -> None:
        """Turn reduced raw statistics into stored ones."""
        if isinstance(moment.spec, Factored):
            _new_means(moment, fresh, work)
            return
        for stat in fresh.values():
            normalize.settle(stat)
        if isinstance(moment.spec, QuantSpec) and moment.spec.norm == "rank1":
            fresh["inv_row"] = normalize.inverse(fresh["row_max"])
            fresh["inv_col"] = normalize.inverse(fresh["col_max"])

    @staticmethod
    def _apply_window(rule: Rule, work: Work, window: Window) -> None:
        chunk = _Chunk(work, window)
        news = []
        for i, moment in enumerate(work.moments):
            if isinstance(moment.spec, Factored):
                news.append(_factored_values(moment, window))
            else:
                old = _old(moment, window)
                news.append(rule.advance(i, old, chunk.grad, chunk.param, work.scalars))
        if work.scalars["ahead"] and isinstance(work.moments[0].spec, QuantSpec):
            kept = _stored(work.moments[0], work.fresh[0], news[0].clone(), window)
            moving, unstored = [lead(news[0], kept, work.scalars["ahead"]), *news[1:]], 1
        else:
            moving, unstored = news, 0
        updated = rule.apply(chunk.param, chunk.grad, moving, work.scalars)
        if updated is not chunk.target:
            chunk.target.copy_(updated)
        rest = zip(work.moments, work.fresh, news, strict=True)
        for moment, fresh, new in islice(rest, unstored, None):
            _store(moment, fresh, new, window, int(work.scalars["draw"]))


def _limit(work: Work) -> int:
    return CPU_CHUNK if work.param.device.type == "cpu" else GPU_CHUNK


def _measured_windows(moment: Moment, work: Work) -> Iterator[Window]:
    """The windows that measure must read: all, or for blocks only the columns of cut blocks."""
    found = windows(work.slab.rects(), [moment], _limit(work))
    if not isinstance(moment.spec, QuantSpec) or moment.spec.norm != "block":
        yield from found
        return
    for window in found:
        if any(piece.cut for piece in _pieces(moment, window)):
            yield window
