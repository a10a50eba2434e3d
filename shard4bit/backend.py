"""The narrow interface between optimizers and the code that does the arithmetic on a device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from shard4bit.layout import Slab
from shard4bit.maths.update import Options, Rule, Scalars
from shard4bit.state import Moment


@dataclass
class Work:
    """One parameter's part of a step on this rank.

    param, grad: this rank's elements, dense, one shape (``slab.shape``); fp32, bf16 or fp16. ``grad``
        is None where this rank has none but another rank may have: it then counts as zeros.
    grads, at: the list that has ``grad``, and its place there. Works that step together share one, so that
        all are set and read at once.
    fresh: per moment, the statistics of the new moment by name, filled by ``measure`` and completed
        by the reduction: "row_max", "col_max", "absmax" (float32); "row_sum", "col_sum", "sum" (float64).
    links: what other ranks hold of the same rows, columns and blocks (see ``comm.Link``).
    active: whether the parameter steps; False only where no rank has a gradient.
    count, options: of an optimizer that can be captured, on a back end that ``counts``: the number of steps
        so far, 0-d float32 on the device, and what scalars follow from (``Rule.options``). The device then
        computes the scalars of step count + 1 itself, and ``apply`` counts active works.
    """

    slab: Slab
    moments: list[Moment]
    param: Tensor
    grads: list[Tensor | None]
    scalars: Scalars
    maximize: bool = False
    links: Sequence[Any] = ()
    active: bool = True
    fresh: list[dict[str, Tensor]] = field(default_factory=list)
    count: Tensor | None = None
    options: Options = field(default_factory=dict)
    at: int = 0

    @property
    def grad(self) -> Tensor | None:
        return self.grads[self.at]

    @grad.setter
    def grad(self, grad: Tensor | None) -> None:
        self.grads[self.at] = grad


class Works(list[Work]):
    """Works of one rule and device. The same list comes again while nothing but values changes; a back end
    may keep its tables for it in ``cache``.

    version: counted up by whoever gives a work another ``param``, ``maximize``, ``options``, ``grads`` or
    ``scalars`` (another list or mapping: what is in it may change at any time), or makes one without links
    active or not (with links, that may change at any time).
    """

    def __init__(self, works: Iterable[Work] = ()) -> None:
        super().__init__(works)
        self.cache: dict[str, Any] = {}
        self.version = 0


class Agreement(Protocol):
    """What the ranks of a step have agreed on between measure and apply: on the device before the host knows.

    flags: (1 + works with links,) float32, on their device: whether a rank failed, so that nothing may be
        applied anywhere; then of each work whether a rank has a gradient.
    places: of the works in it, by ``id``.
    """

    @property
    def flags(self) -> Tensor: ...

    @property
    def places(self) -> Mapping[int, int]: ...

    def settle(self) -> None:
        """Wait for it and set ``work.active``. Raises RuntimeError if another rank failed."""


class Backend(Protocol):
    """measure -> reduce -> apply. Implementations hold no state of the optimizer.

    counts: whether works may have their step ``count`` on the device.
    """

    counts: bool

    def capturing(self) -> bool:
        """Whether what it launches now is captured in a CUDA graph instead of being run."""

    def measure(self, rule: Rule, works: Works) -> None:
        """Fill ``work.fresh`` with the statistics that apply cannot know from one pass."""

    def apply(self, rule: Rule, works: Works, agreed: Agreement | None = None) -> None:
        """Update the parameters of active works and store their new moments under the reduced statistics.
        agreed: says which are active, if they have links; else they say it themselves."""

    def decode(self, moment: Moment) -> Tensor:
        """The moment's values, float32, dense (``slab.numel``,)."""
