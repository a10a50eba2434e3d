"""Candidates for closing the gap (experiment 7): AdamW whose moments are rounded after every step to what a
quantizer could hold in 4 bits. The values are kept in fp32, so that a quantizer is a few lines; it saves no
memory and is not for use. "paper" gives the same bits as AdamW4bit's paper options (tests/accuracy).

A quantizer divides a matrix by scales, moves each quotient to a neighbouring entry of a table of 16, and
multiplies again. What stays the same for all: which tensors are quantized, and the formulas of the moments.

A *compensated* first moment is rounded before the parameters move, and they move by what it keeps less: an
error e of m would, over the steps to come, move them by lr beta1 / (1 - beta1) e / (root of v) too far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from shard4bit.layout import matrix_view
from shard4bit.maths.mapping import table
from shard4bit.maths.normalize import inverse, settle
from shard4bit.maths.update import ADAMW, lead
from shard4bit.spec import is_quantized

BLOCK = 128
_NF = (0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0)  # normal quantiles, as QLoRA's NF4
_NF_BELOW = (0.0911, 0.1848, 0.2844, 0.3949, 0.5251, 0.6962, 1.0)
#: name -> the entries, rising
TABLES: dict[str, tuple[float, ...]] = {
    "de": table("de", 4, True),
    "linear": table("linear", 4, False),
    "sqrt": tuple((k / 16) ** 2 for k in range(1, 17)),  # linear in the root of v
    "log": tuple(10 ** (-3 * (15 - k) / 15) for k in range(16)),  # three decades
    "normal": (*(-x for x in reversed(_NF_BELOW)), *_NF),
    "unsigned de": table("de", 4, False),
    "de-0": table("de0", 4, False),
}


@dataclass(frozen=True)
class Quantizer:
    """table: one of TABLES. scale: "block" (of 128), "block2048", "rank1" or "both" (the smaller of
    "block"'s and "rank1"'s). rounding: "nearest";
    "stochastic", up with the probability that makes the mean exact; "sequence", the same with numbers that
    are spread evenly over steps, rows and columns instead of random ones; "dither", nearest after adding half
    a step times a uniform number in (-1, 1)."""

    table: str
    scale: str
    rounding: str = "nearest"

    def __call__(self, values: Tensor, key: Tensor) -> Tensor:
        """(rows, columns) float32 as stored and read again. key: 0-d int64, of the random numbers."""
        return self.by_entries(values, key, entries_of(self.table, values.device))

    def by_entries(self, values: Tensor, key: Tensor, entries: Tensor) -> Tensor:
        """The same with the table given, which a captured step cannot bring to its device."""
        scale, inverted = scales_of(values, self.scale)
        return entries[self._codes(values * inverted, entries, key)] * scale

    def _codes(self, x: Tensor, entries: Tensor, key: Tensor) -> Tensor:
        if self.rounding == "nearest":
            return nearest(x, entries)
        above = torch.searchsorted(entries, x, right=True).clamp_(1, len(entries) - 1)
        low, high = entries[above - 1], entries[above]
        part = ((x - low) / (high - low)).clamp_(0, 1)
        chance = (spread if self.rounding == "sequence" else uniform)(x.shape, key, x.device)
        if self.rounding == "dither":
            return above - 1 + (part + chance - 0.5 > 0.5).long()
        return above - 1 + (chance < part).long()


@lru_cache
def entries_of(name: str, device: torch.device) -> Tensor:
    """A table, float32 (16,)."""
    return torch.tensor(TABLES[name], dtype=torch.float64).float().to(device)


def nearest(x: Tensor, entries: Tensor) -> Tensor:
    """Numbers of the entries nearest to x; 0 for NaN."""
    mids = ((entries[1:].double() + entries[:-1].double()) / 2).float()
    return torch.bucketize(torch.where(x.isnan(), -torch.inf, x), mids)


def scales_of(values: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Scales of every element, and their reciprocals (each rounded once)."""
    size = values.abs()
    found: list[Tensor] = []
    if kind != "rank1":
        block = 2048 if kind == "block2048" else BLOCK
        blocks = torch.nn.functional.pad(size, (0, -size.shape[1] % block)).unflatten(1, (-1, block))
        found.append(settle(blocks.amax(2)).repeat_interleave(block, 1)[:, : size.shape[1]])
    if kind in ("rank1", "both"):
        found += [settle(size.amax(1))[:, None], settle(size.amax(0))[None, :]]
    scale, inverted = found[0], inverse(found[0])
    for other in found[1:]:
        scale, inverted = torch.minimum(scale, other), torch.maximum(inverted, inverse(other))
    return scale.expand(values.shape), inverted.expand(values.shape)


def uniform(shape: Iterable[int], key: Tensor, device: torch.device) -> Tensor:
    """Numbers in [0, 1) of 24 bits by coordinate: a function of the key and the place alone."""
    rows, cols = shape
    x = torch.arange(rows * cols, device=device, dtype=torch.int64).view(rows, cols)
    x = (x + key * _signed(0xD1B54A32D192ED03)) * _signed(0x9E3779B97F4A7C15)  # then as splitmix64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return (_shifted(x ^ _shifted(x, 31), 40)).float() * 2.0**-24


def spread(shape: Iterable[int], key: Tensor, device: torch.device) -> Tensor:
    """Numbers in [0, 1) by row, column and step: the additive recurrence "R3" (Roberts 2018), whose steps are
    the powers of 1 / 1.2207..., the root of x^4 = x + 1. key: its low 28 bits are the step."""
    step, row, col = (round(2**32 * 1.2207440846057596**-k) - 2**32 for k in (1, 2, 3))  # int32, for Triton
    rows, cols = (torch.arange(n, device=device, dtype=torch.int64) for n in shape)
    x = (key & ((1 << 28) - 1)) * step + rows[:, None] * row + cols * col
    return ((x & 0xFFFFFFFF) >> 8).float() * 2.0**-24


def _shifted(x: Tensor, count: int) -> Tensor:
    """Right, without the sign."""
    return (x >> count) & ((1 << (64 - count)) - 1)


def _signed(number: int) -> int:
    """Of 64 bits, as int64 has it."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number


@dataclass(frozen=True)
class Candidate:
    """Quantizers of both moments. compensate: the share of the first one's error that the step makes good."""

    first: Quantizer
    second: Quantizer
    compensate: float = 0.0


M, V = Quantizer("de", "block"), Quantizer("linear", "rank1")
RANDOM_M, RANDOM_V = Quantizer("de", "block", "stochastic"), Quantizer("linear", "rank1", "stochastic")
ROOT_V = Quantizer("sqrt", "rank1", "stochastic")
SPREAD_V = Quantizer("linear", "rank1", "sequence")
NORMAL_M = Quantizer("normal", "block")
EXACT = Quantizer("exact", "")
CANDIDATES: dict[str, Candidate] = {
    "paper": Candidate(M, V),
    "m exact": Candidate(EXACT, V),
    "v exact": Candidate(M, EXACT),
    "stochastic m": Candidate(RANDOM_M, V),
    "stochastic v": Candidate(M, RANDOM_V),
    "stochastic both": Candidate(RANDOM_M, RANDOM_V),
    "dither both": Candidate(Quantizer("de", "block", "dither"), Quantizer("linear", "rank1", "dither")),
    "sqrt v": Candidate(M, Quantizer("sqrt", "rank1")),
    "log v": Candidate(M, Quantizer("log", "rank1")),
    "sqrt v, stochastic": Candidate(RANDOM_M, ROOT_V),
    "log v, stochastic": Candidate(RANDOM_M, Quantizer("log", "rank1", "stochastic")),
    "v by both scales": Candidate(M, Quantizer("linear", "both")),
    "v by both, stochastic": Candidate(RANDOM_M, Quantizer("linear", "both", "stochastic")),
    "normal m": Candidate(NORMAL_M, V),
    "m by both scales": Candidate(Quantizer("de", "both"), V),
    "compensated": Candidate(M, V, 1.0),
    "compensated, v exact": Candidate(M, EXACT, 1.0),
    "compensated by half": Candidate(M, V, 0.5),
    "compensated, stochastic v": Candidate(M, RANDOM_V, 1.0),
    "compensated, sequence v": Candidate(M, SPREAD_V, 1.0),
    "compensated, sequence sqrt v": Candidate(M, Quantizer("sqrt", "rank1", "sequence"), 1.0),
    "compensated, stochastic log v": Candidate(M, Quantizer("log", "rank1", "stochastic"), 1.0),
    "compensated, stochastic v by both": Candidate(M, Quantizer("linear", "both", "stochastic"), 1.0),
    "compensated, stochastic block v": Candidate(M, Quantizer("linear", "block", "stochastic"), 1.0),
    "compensated, sqrt v": Candidate(M, Quantizer("sqrt", "rank1"), 1.0),
    "compensated, stochastic sqrt v": Candidate(M, ROOT_V, 1.0),
    "compensated normal m": Candidate(NORMAL_M, V, 1.0),
    "compensated normal m, stochastic sqrt v": Candidate(NORMAL_M, ROOT_V, 1.0),
    "compensated stochastic m": Candidate(RANDOM_M, V, 1.0),
}
#: Second moments of the paper's Table 1 for which there are no kernels: the library's bits, but faster on a
#: GPU than its reference.
ABLATED: dict[str, Candidate] = {
    f"{norm}/{mapping}": Candidate(M, Quantizer(entries, scale))
    for norm, scale in (("B2048", "block2048"), ("B128", "block"), ("Rank-1", "rank1"))
    for mapping, entries in (("DE", "unsigned de"), ("DE-0", "de-0"))
}


def _plainly(quantizer: Quantizer, values: Tensor, key: Tensor, entries: Tensor) -> Tensor:
    return quantizer.by_entries(values, key, entries)


_compiled = torch.compile(_plainly, dynamic=False)
torch._dynamo.config.recompile_limit = 200  # one graph a shape and quantizer


class CandidateAdamW(torch.optim.Optimizer):
    """AdamW of a candidate. ``seed`` and the parameter's number key the random numbers.

    On a GPU, steps after the first are a captured one, replayed: gradients have to stay where they are.
    """

    def __init__(self, params: Any, candidate: Candidate, seed: int = 0, **options: Any) -> None:
        self.quantizers, self.seed = (candidate.first, candidate.second), seed
        self.compensate, self.count = candidate.compensate, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        super().__init__(params, {"weight_decay": 0.0, "quantize": True, **options})

    def scalars(self, group: dict[str, Any]) -> dict[str, float]:
        """Of the step that ``count`` counts. "ahead": see ``shard4bit.maths.update.lead``."""
        wanted = {**group, "compensate": self.compensate > 0}
        found = dict(ADAMW.scalars(wanted, self.count))
        return found | {"ahead": self.compensate * found["ahead"]}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        assert closure is None
        self.count += 1
        scalars = [self.scalars(group) for group in self.param_groups]
        if not self.param_groups[0]["params"][0].is_cuda:
            self._update(scalars, torch.tensor(self.count))
        else:
            self._update_on_gpu(scalars)

    def _update_on_gpu(self, scalars: list[dict[str, float]]) -> None:
        values = torch.tensor([list(s.values()) for s in scalars])
        grads = [p.grad.data_ptr() for group in self.param_groups for p in group["params"]]
        if self.count == 1:
            self.values, self.number = values.cuda(), torch.ones((), dtype=torch.int64).cuda()
            self.places = [
                dict(zip(s, row, strict=True)) for s, row in zip(scalars, self.values, strict=True)
            ]
            self._update(self.places, self.number)
            return
        if self.graph is None:
            self.graph, self.grads = torch.cuda.CUDAGraph(), grads
            with torch.cuda.graph(self.graph):
                self._update(self.places, self.number)
        assert grads == self.grads, "gradients have moved since the step was captured"
        self.values.copy_(values)
        self.number.fill_(self.count)
        self.graph.replay()

    def _update(self, scalars: Sequence[Mapping[str, Any]], count: Tensor) -> None:
        """scalars: of each group, numbers or 0-d tensors; count: 0-d int64."""
        number = 0
        for group, values in zip(self.param_groups, scalars, strict=True):
            for param in group["params"]:
                number += 1
                if param.grad is not None:
                    quantized = group["quantize"] and is_quantized(tuple(param.shape))
                    self._update_one(param, values, quantized, count, number)

    def _update_one(
        self, param: Tensor, h: Mapping[str, Any], quantized: bool, count: Tensor, number: int
    ) -> None:
        state = self.state[param]
        if not state:
            state.update({name: torch.zeros_like(param, dtype=torch.float32) for name in ADAMW.moments})
        grad, value = param.grad.float(), param.float()  # type: ignore[union-attr]
        news = [ADAMW.advance(i, state[name], grad, value, h) for i, name in enumerate(ADAMW.moments)]
        moved, kept = list(news), news
        if quantized:
            keys = [count ^ _signed(((self.seed * 2 + i) << 44) ^ (number << 28)) for i in range(2)]
            kept = [self.read_back(i, new, key) for i, (new, key) in enumerate(zip(news, keys, strict=True))]
            if self.compensate:
                moved[0] = lead(news[0], kept[0], h["ahead"])
        param.copy_(ADAMW.apply(value, grad, moved, h))
        for name, values in zip(ADAMW.moments, kept, strict=True):
            state[name].copy_(values)

    def read_back(self, index: int, new: Tensor, key: Tensor) -> Tensor:
        """A moment as stored and read again; the moment itself where it is exact."""
        quantizer = self.quantizers[index]
        if quantizer.table == "exact":
            return new
        view = matrix_view(tuple(new.shape))
        run = _compiled if new.is_cuda else _plainly  # one launch instead of forty
        entries = entries_of(quantizer.table, new.device)
        return run(quantizer, new.view(view.rows, view.cols), key, entries).view(new.shape)
