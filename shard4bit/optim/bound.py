"""A parameter with its place and state on this rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shard4bit.backend import Work
from shard4bit.comm import Link
from shard4bit.errors import StateError
from shard4bit.maths.update import Rule
from shard4bit.optim import validate
from shard4bit.placement import Placed
from shard4bit.state import Moment


@dataclass
class Bound:
    """One parameter with its place, its state on this rank, and what it shares with other ranks."""

    param: Tensor
    placed: Placed
    rule: Rule
    moments: list[Moment]
    links: tuple[Link, ...]
    step: Tensor  # 0-d float32, an element of the optimizer's one vector: updates so far
    row: int  # of that vector
    work: Work
    entries: dict[str, Tensor]  # of ``optimizer.state``, but for the step count
    own: bool = False  # whether ``work.param`` is the parameter's own memory, not a dense copy
    anchor: int | None = None  # the address of that memory when ``work.param`` was made
    accepted: Any = None  # (dtype, shape, device, layout) of the last gradient that was checked

    def __post_init__(self) -> None:
        self.address: Callable[[], int] = self.placed.address or self.param.data_ptr

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole parameter's shape."""
        return self.placed.slab.view.shape

    def shown(self) -> dict[str, Tensor]:
        """What ``optimizer.state`` has of it, in that order."""
        return {self.placed.prefix + "step": self.step, **self.entries}

    @property
    def lies(self) -> bool:
        """Whether ``work.param`` still is this rank's elements, dense."""
        param = self.work.param
        return (
            self.anchor is not None
            and self.address() == self.anchor
            and param.is_contiguous()
            and param.shape == self.placed.slab.shape
        )

    def refresh(self) -> None:
        """Make ``work.param`` this rank's elements as they are now, dense. Raises StateError where the state
        does not fit them."""
        data = self.placed.data()
        if data.shape != self.placed.slab.shape:
            raise StateError(
                f"a parameter of shape {self.shape} has a part of shape {tuple(data.shape)} here, its state "
                f"was made for {self.placed.slab.shape}: build a new optimizer for parameters of other shapes"
            )
        for moment in self.moments:
            for tensor in moment.tensors.values():
                if tensor.device != data.device:
                    raise StateError(
                        f"a parameter of shape {self.shape} is on {data.device}, its state on "
                        f"{tensor.device}: move the model before building the optimizer, or move both"
                    )
        self.accepted = None
        self.work.param = data.contiguous()
        self.own = self.work.param is data
        if self.own and self.placed.itself and data.shape == self.param.shape:
            self.work.param = self.param  # an alias would keep memory that the parameter gave up
        self.anchor = self.address() if self.own else None

    def take_gradient(self, grad: Tensor) -> None:
        """Check a gradient and make it ``work.grad``, dense. Raises ValueError."""
        kind = (grad.dtype, grad.shape, grad.device, grad.layout)
        if kind != self.accepted:
            validate.gradient(grad, self.work.param, f"parameter of shape {self.shape}")
            self.accepted = kind
        self.work.grad = grad if grad.is_contiguous() else grad.contiguous()

    def release(self) -> None:
        """Hold neither the gradient nor a dense copy of the parameter until the next step."""
        self.work.grad = None
        if not self.own:
            self.work.param = self.placed.data()
