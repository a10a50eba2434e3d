"""States of other optimizers: which of their tensors is which moment, and their values.

Read by their keys and attributes, so that torchao and bitsandbytes need not be installed. Sources: torch's
``optim/adamw.py`` and ``optim/sgd.py``; torchao 0.18 ``optim/subclass_{4bit,8bit,fp8}.py``; bitsandbytes
0.50.2 ``optim/optimizer.py`` and ``functional.py`` (``dequantize_blockwise``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shard4bit.errors import StateError

BNB_BLOCK = 256  # elements of a block of bitsandbytes' 8-bit states
BNB_NESTED = "__bnb_optimizer_quant_state__"  # where its state_dict() puts the quantized tensors


@dataclass(frozen=True)
class Foreign:
    """A moment as another optimizer stores it.

    data: float (torch), a torchao subclass (``codes``, ``scale`` and, unless fp8, ``qmap``), or uint8
        codes of bitsandbytes. A DTensor where torch and torchao have one.
    qmap, absmax: (256,) and (blocks,) float32; of bitsandbytes only.
    """

    data: Tensor
    qmap: Tensor | None = None
    absmax: Tensor | None = None

    def values(self, local: Tensor) -> Tensor:
        """float32 values of ``local``, which is ``data`` or this rank's part of it; of its shape."""
        if hasattr(local, "codes") and hasattr(local, "scale"):
            return _torchao(local)
        if self.qmap is not None and self.absmax is not None:
            return _bitsandbytes(local, self.qmap, self.absmax)
        return local.detach().float()


def _torchao(tensor: Any) -> Tensor:
    """Blocks of the flat tensor times their scales; of two 4-bit codes in a byte the high one is first."""
    codes, scale, shape = tensor.codes, tensor.scale, tensor.shape
    qmap = getattr(tensor, "qmap", None)
    if qmap is None:  # fp8: the codes are numbers
        values = codes.float()
    else:
        codes = codes.view(-1)
        if 2 * codes.numel() == math.prod(shape):
            codes = torch.stack([codes >> 4, codes & 15], -1).view(-1)
        values = torch.index_select(qmap, 0, codes.int())
    return values.view(len(scale), -1).mul_(scale[:, None]).view(shape)


def _bitsandbytes(codes: Tensor, qmap: Tensor, absmax: Tensor) -> Tensor:
    """Blocks of 256 elements of the flat tensor times their absmax; the last may be short."""
    values = torch.index_select(qmap.float(), 0, codes.reshape(-1).int())
    whole = values.numel() // BNB_BLOCK
    values[: whole * BNB_BLOCK].view(whole, BNB_BLOCK).mul_(absmax[:whole, None])
    if len(absmax) > whole:
        values[whole * BNB_BLOCK :].mul_(absmax[whole])
    return values.view(codes.shape)


def read(state: Mapping[str, Any] | None, names: Sequence[str], what: str) -> tuple[int, dict[str, Foreign]]:
    """(steps so far, moments by our names) of one parameter's state; none where it never had a gradient.

    names: the moments wanted. what: the parameter, for errors. Raises StateError for states that are not
    of AdamW, or of SGD.
    """
    if not state:
        return 0, {}
    state = {**state, **state.get(BNB_NESTED, {})}
    if any(key.endswith("_codes") for key in state):
        raise StateError(
            f"{what}: this is a state of shard4bit: use load_state_dict, or import what "
            "shard4bit.export_state makes of it"
        )
    if "max_exp_avg_sq" in state:
        raise StateError(f"{what}: a state with amsgrad, which has no counterpart here (max_exp_avg_sq)")
    found = _bitsandbytes_state(state, names, what) if "state1" in state else {n: state.get(n) for n in names}
    if list(found) == ["momentum_buffer"] and found["momentum_buffer"] is None and "exp_avg" not in state:
        return 0, {}  # torch's SGD before its first step
    lacking = [name for name, value in found.items() if value is None]
    if lacking:
        raise StateError(
            f"{what}: expected {lacking}, got a state with {sorted(map(str, state))[:6]}: import AdamW's "
            "states into AdamW4bit and SGD's into SGD4bit"
        )
    moments = {
        name: v if isinstance(v, Foreign) else Foreign(v) for name, v in found.items() if v is not None
    }
    for name, moment in moments.items():
        if not isinstance(moment.data, Tensor):
            raise StateError(f"{what}: {name} is a {type(moment.data).__name__}, expected a tensor")
    return _step(state, "exp_avg" in names, what), moments


def _bitsandbytes_state(
    state: Mapping[str, Any], names: Sequence[str], what: str
) -> dict[str, Foreign | None]:
    if "state2" in state and len(names) == 1:
        raise StateError(f"{what}: a bitsandbytes state with two moments, expected momentum only")
    out: dict[str, Foreign | None] = {}
    for number, name in enumerate(names, 1):
        data = state.get(f"state{number}")
        qmap, absmax = state.get(f"qmap{number}"), state.get(f"absmax{number}")
        if isinstance(data, Tensor) and data.dtype == torch.uint8 and (qmap is None or absmax is None):
            raise StateError(
                f"{what}: 8-bit codes of bitsandbytes without qmap{number} and absmax{number}: expected its "
                "block-wise states"
            )
        out[name] = None if data is None else Foreign(data, qmap, absmax)
    return out


def _step(state: Mapping[str, Any], needed: bool, what: str) -> int:
    """The step count; torch's SGD has none, and all that counts there is that it has begun."""
    value = state.get("step", None if needed else 1)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value != int(value):
        raise StateError(f"{what}: step is {value!r}, expected a number of updates")
    return int(value)


def options(group: Mapping[str, Any], known: Sequence[str], what: str) -> dict[str, Any]:
    """Of another optimizer's group, the options that ours has too, as plain values.

    known: our options. Raises StateError for options that change what is computed and that we lack.
    """
    out: dict[str, Any] = {}
    for key in (*known, "initial_lr"):
        if key in group:
            value = group[key]
            out[key] = float(value) if isinstance(value, Tensor) else value
    if "momentum" in known and "momentum" not in group and "betas" in group:
        out["momentum"] = float(group["betas"][0])  # bitsandbytes' SGD
    if "betas" in out:
        out["betas"] = tuple(out["betas"][:2])
    coupled = group.get("decoupled_weight_decay", True) is False and "betas" in known
    if coupled and out.get("weight_decay"):
        raise StateError(
            f"{what}: weight_decay={out['weight_decay']} of torch.optim.Adam is added to the gradient, ours "
            "is AdamW's: import with hyperparameters=False and set it here"
        )
    if group.get("amsgrad"):
        raise StateError(f"{what}: amsgrad=True has no counterpart here: import with hyperparameters=False")
    return out
