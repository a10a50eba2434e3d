"""AdamW with 4-bit moments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from shard4bit.maths.update import ADAMW, Rule
from shard4bit.optim import validate
from shard4bit.optim.base import QuantizedOptimizer
from shard4bit.spec import MomentSpec, parse_spec


class AdamW4bit(QuantizedOptimizer):
    """AdamW whose moments are stored in 4 bits (Li, Chen, Zhu, NeurIPS 2023, algorithm 1 and section 4), and
    whose steps make good the bias of that (``compensate``, ``rounding``; docs/decisions/0021-defaults.md).

    Args:
        params: parameters, (name, parameter) pairs, or groups. Plain tensors and DTensors, fp32, bf16 or
            fp16; arithmetic is in fp32.
        lr: learning rate, a float or a one-element tensor.
        betas: decay rates of the two moments, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled, times lr.
        second_moment: "rank1" (row and column maxima, linear map; the paper's), "block" (blocks of 128),
            "factored" (fp32 row and column means; the paper's 4-bit Factor), or any name or QuantSpec of
            ``shard4bit.spec``.
        first_moment: "B128/DE" (the paper's) or another signed quantizer.
        quantize: False keeps fp32 moments; meant for single parameter groups.
        maximize: ascend instead of descend.
        compensate: let the step make good what rounding the first moment would do to the parameters in later
            steps (``maths.update.lead``); False: the paper's.
        rounding: of the second moment's codes: "nearest" (the paper's); "stochastic", right on average, by
            numbers that follow from the step and an element's row and column (``maths.rounding``), for a
            linear map ("rank1", "block"); "auto": stochastic with a linear map, else to the nearest.
        capturable: ``step()`` can be captured in a CUDA graph, after a step outside of it, and a replay is a
            step, bit for bit: the step counts lie on the parameters' device, and an lr in a tensor there
            (float32 or float64) is read there. For all groups alike; on the CPU it changes nothing.

    Every other option may be given per group. Matrices (two or more dimensions) of more than 4096 elements
    are quantized; all else keeps fp32 moments. Parameters in bf16 or fp16 without fp32 master weights round
    small updates away, here as in every optimizer.

    Raises ValueError for options of a wrong type or range; at a step, where ``capturable`` cannot be had
    (several devices, states without kernels, captures of sharded parameters).
    """

    _spec_options = {"exp_avg": ("first_moment", True), "exp_avg_sq": ("second_moment", False)}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        second_moment: str | MomentSpec = "rank1",
        first_moment: str | MomentSpec = "B128/DE",
        quantize: bool = True,
        maximize: bool = False,
        compensate: bool = True,
        rounding: str = "auto",
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "second_moment": second_moment,
            "first_moment": first_moment,
            "quantize": quantize,
            "maximize": maximize,
            "compensate": compensate,
            "rounding": rounding,
            "capturable": capturable,
        }
        self._check_group(defaults)
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        validate.number(group, "lr", 0.0, 1e6, open_end=False)
        validate.betas(group)
        validate.number(group, "eps", 0.0, 1.0, open_end=False)
        validate.number(group, "weight_decay", 0.0, 1e6, open_end=False)
        for option, signed in self._spec_options.values():
            group[option] = str(parse_spec(group[option], signed=signed, argument=option))
        for option in ("quantize", "maximize", "compensate"):
            validate.boolean(group, option)
        validate.rounding(group)
        validate.capturable(group)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return ADAMW
