"""SGD with a 4-bit momentum buffer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from shard4bit.maths.update import PLAIN_SGD, SGD, Rule, ahead_of
from shard4bit.optim import validate
from shard4bit.optim.base import QuantizedOptimizer
from shard4bit.spec import MomentSpec, parse_spec


class SGD4bit(QuantizedOptimizer):
    """SGD whose momentum buffer is stored in 4 bits (Li, Chen, Zhu, NeurIPS 2023, algorithm 2).

    Args:
        params: parameters, (name, parameter) pairs, or groups; as for :class:`AdamW4bit`.
        lr: learning rate, a float or a one-element tensor.
        momentum: in [0, 1]; 0 keeps no state.
        dampening, nesterov, weight_decay, maximize: as in ``torch.optim.SGD``.
        momentum_buffer: "B128/DE" or another signed quantizer.
        quantize: False keeps an fp32 buffer.
        compensate: let the step make good what rounding the buffer would do to the parameters in later steps
            (``maths.update.lead``; momentum < 1); not in the paper.
        capturable: as for :class:`AdamW4bit`; on a GPU with momentum only.

    Raises ValueError for options of a wrong type or range; at a step, where ``capturable`` cannot be had.
    """

    _spec_options = {"momentum_buffer": ("momentum_buffer", True)}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        momentum_buffer: str | MomentSpec = "B128/DE",
        quantize: bool = True,
        maximize: bool = False,
        compensate: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "momentum_buffer": momentum_buffer,
            "quantize": quantize,
            "maximize": maximize,
            "compensate": compensate,
            "capturable": capturable,
        }
        self._check_group(defaults)
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        validate.number(group, "lr", 0.0, 1e6, open_end=False)
        validate.number(group, "momentum", 0.0, 1.0, open_end=False)
        validate.number(group, "dampening", 0.0, 1.0, open_end=False)
        validate.number(group, "weight_decay", 0.0, 1e6, open_end=False)
        for option in ("nesterov", "quantize", "maximize", "compensate"):
            validate.boolean(group, option)
        validate.capturable(group)
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov=True with momentum={group['momentum']} and dampening={group['dampening']}: "
                "expected a positive momentum and no dampening"
            )
        ahead_of(group, float(group["momentum"]))
        option, signed = self._spec_options["momentum_buffer"]
        group[option] = str(parse_spec(group[option], signed=signed, argument=option))

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return SGD if group["momentum"] else PLAIN_SGD
