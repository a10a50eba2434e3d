"""Writes foreign.safetensors: states as torchao and bitsandbytes make them, and their own values of them.

Run it where torchao 0.18.0 and bitsandbytes 0.50.2 are installed: ``python tests/golden/make_foreign.py``.
Keys: "<optimizer>/<parameter>/<entry>"; a torchao tensor's attributes follow a dot. The metadata has, per
quantized moment, the SHA-256 of the float32 bytes of the library's own dequantization.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

#: "odd" is no multiple of a block: bitsandbytes quantizes it, torchao does not; "bias" is too small
SHAPES = {"even": (48, 96), "odd": (65, 67), "bias": (7,)}
STEPS = 3


def parameters(kind: str) -> dict[str, torch.nn.Parameter]:
    shapes = {n: s for n, s in SHAPES.items() if n != "odd" or kind.startswith("bnb")}
    return {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}


def train(optimizer: torch.optim.Optimizer, params: dict[str, torch.nn.Parameter]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        for param in params.values():
            scale = 10.0 ** rng.uniform(-3, 0, (param.shape[0],) + (1,) * (param.ndim - 1))
            grad = rng.standard_normal(tuple(param.shape)) * scale
            param.grad = torch.from_numpy(grad.astype(np.float32))
        optimizer.step()


def digest(values: torch.Tensor) -> str:
    return hashlib.sha256(values.float().contiguous().numpy().tobytes()).hexdigest()


def main() -> None:
    import bitsandbytes as bnb
    import torchao.optim as ao

    makers: dict[str, Any] = {
        "torchao4": lambda p: ao.AdamW4bit(p, lr=1e-2),
        "torchao8": lambda p: ao.AdamW8bit(p, lr=1e-2),
        "torchaofp8": lambda p: ao.AdamWFp8(p, lr=1e-2),
        "bnb8": lambda p: bnb.optim.AdamW8bit(p, lr=1e-2),
        "bnbsgd8": lambda p: bnb.optim.SGD8bit(p, lr=1e-2, momentum=0.9),
    }
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, str] = {}
    for kind, make in makers.items():
        params = parameters(kind)
        optimizer = make(list(params.values()))
        train(optimizer, params)
        for name, param in params.items():
            state = optimizer.state[param]
            for key, value in state.items():
                where = f"{kind}/{name}/{key}"
                if hasattr(value, "dequantize") and hasattr(value, "codes"):
                    for part in value.tensor_attrs:
                        tensors[f"{where}.{part}"] = getattr(value, part).clone()
                    values[where] = digest(value.dequantize())
                else:
                    tensors[where] = torch.as_tensor(value).clone()
                if key.startswith("state") and value.dtype == torch.uint8:
                    qmap, absmax = state[f"qmap{key[-1]}"], state[f"absmax{key[-1]}"]
                    dense = bnb.functional.dequantize_blockwise(
                        value, absmax=absmax, code=qmap, blocksize=256
                    )
                    values[where] = digest(dense)
    path = Path(__file__).with_name("foreign.safetensors")
    save_file(tensors, path, metadata={"values": json.dumps(values)})
    print(len(tensors), "tensors,", path.stat().st_size, "bytes,", len(values), "dequantized")


if __name__ == "__main__":
    main()
