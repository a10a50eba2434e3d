"""Stand-ins for states of torchao and bitsandbytes, not installed here: same attributes, same nesting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LikeTorchao(Tensor):
    """``codes``, ``scale`` and, unless fp8, ``qmap`` behind the look of a float tensor."""

    codes: Tensor
    scale: Tensor
    qmap: Tensor

    @staticmethod
    def __new__(cls, parts: dict[str, Tensor], shape: Any) -> LikeTorchao:
        made: Any = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.parts = parts
        for name, value in parts.items():
            setattr(made, name, value)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].parts, args[0].shape)
        if func in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            assert tuple(args[1]) == tuple(args[0].shape)
            return cls(args[0].parts, args[0].shape)
        raise NotImplementedError(f"{func} would read a quantized tensor as a float one")


def quantized(values: Tensor, signed: bool) -> LikeTorchao:
    """4-bit blocks of 128 over a coarse table, enough to stand for torchao's."""
    qmap = torch.linspace(-1 if signed else 0.0625, 1, 16)
    blocks = values.reshape(-1, 128)
    scale = blocks.abs().amax(1).clamp(min=1e-12)
    codes = (blocks / scale[:, None]).reshape(-1, 1).sub(qmap).abs().argmin(1).to(torch.uint8)
    packed = codes[0::2] << 4 | codes[1::2]
    return LikeTorchao({"codes": packed, "scale": scale, "qmap": qmap}, values.shape)


def _in_bytes(values: Tensor, signed: bool, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes of a byte, scales of blocks of the flat values, their table)."""
    qmap = torch.linspace(-1 if signed else 0, 1, 256)
    blocks = values.reshape(-1, block)
    scale = blocks.abs().amax(1).clamp(min=1e-12)
    codes = (blocks / scale[:, None]).reshape(-1, 1).sub(qmap).abs().argmin(1).to(torch.uint8)
    return codes, scale, qmap


def quantized8(values: Tensor, signed: bool) -> LikeTorchao:
    """Like torchao's 8-bit states: blocks of 256."""
    codes, scale, qmap = _in_bytes(values, signed, 256)
    return LikeTorchao({"codes": codes, "scale": scale, "qmap": qmap}, values.shape)


def bitsandbytes8(values: Tensor, number: int) -> dict[str, Tensor]:
    """Moment ``number`` (1 or 2) as in a state of bitsandbytes' AdamW8bit: blocks of 256."""
    codes, scale, qmap = _in_bytes(values, number == 1, 256)
    return {f"state{number}": codes.view(values.shape), f"absmax{number}": scale, f"qmap{number}": qmap}
