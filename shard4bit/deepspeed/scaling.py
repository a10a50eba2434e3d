"""fp16 at stage 0: DeepSpeed 0.19 divides the gradients by the loss scale, and its ``engine.backward`` does
not multiply the loss by it, whatever the optimizer. Here it is multiplied, where DeepSpeed does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from shard4bit.deepspeed import layout
from shard4bit.deepspeed.versions import unknown

#: engine -> whether its DeepSpeed scales the loss itself; not of engines that had no scale but 1 yet
_scales: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


@contextmanager
def scaled(engine: Any, loss: Any, factor: Callable[[], float]) -> Iterator[None]:
    """Within it, ``engine.backward`` of this loss has gradients times the scale that DeepSpeed divides by.

    factor: gives that of the loss in that call, but for the scale (1 / the steps of accumulation). What
    arrives at the loss is factor if DeepSpeed does not scale, and factor * scale if it does.
    """
    scale = layout.loss_scale(engine)
    if scale == 1.0 or not isinstance(loss, Tensor) or not loss.requires_grad:
        yield
        return
    expected = factor()

    def hook(grad: Tensor) -> Tensor:
        if engine not in _scales:  # waits for the device, once
            _scales[engine] = _already(float(grad) / expected, scale)
        return grad if _scales[engine] else grad * scale

    handle = loss.register_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _already(found: float, scale: float) -> bool:
    """Whether a gradient of the loss, found instead of 1, has been scaled. It is rounded to its precision."""
    if abs(found - 1.0) <= 1e-2 * min(1.0, abs(scale - 1.0)):
        return False
    if found == float("inf") or abs(found / scale - 1.0) <= 1e-2:
        return True
    raise unknown(f"engine.backward multiplies the loss by {found}, expected 1 or its scale, {scale}")
