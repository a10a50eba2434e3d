"""The kernels' source: files of kernels/ joined into one text per configuration.

CuPy's cache knows the text it compiles but not what that text includes, so headers are written into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import torch

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
SECONDS = ("RANK1", "BLOCKED", "FACTORED", "NONE")
HEADERS = ("arith.cuh", "dtypes.cuh", "codes.cuh", "slabs.cuh")


@dataclass(frozen=True)
class Config:
    """One compilation of step.cu. param, grad: F32, BF16 or F16; rule: ADAMW or SGD; second: one of
    SECONDS."""

    param: str
    grad: str
    rule: str
    second: str

    @property
    def text(self) -> str:
        return _step_text(self)


@lru_cache(maxsize=128)
def _step_text(config: Config) -> str:
    return _defines(config) + _joined(*HEADERS, "rules.cuh", "rows.cuh", "measure.cuh", "step.cu")


def _defines(config: Config) -> str:
    return (
        f"#define PARAM {config.param}\n#define GRAD {config.grad}\n"
        f"#define ADAMW 0\n#define SGD 1\n#define RULE {config.rule}\n"
        + "".join(f"#define {name} {i}\n" for i, name in enumerate(SECONDS))
        + f"#define SECOND {config.second}\n"
    )


@lru_cache(maxsize=8)
def decode_text(second: str | None) -> str:
    """The source of the kernel that decodes a second moment of this kind, or (None) a first moment."""
    config = Config("F32", "F32", "ADAMW", second or "NONE")
    return (
        f"#define FIRST {int(second is None)}\n"
        + _defines(config)
        + _joined(*HEADERS, "rows.cuh", "decode.cu")
    )


def vectors_text() -> str:
    """The source of the small kernels on vectors."""
    return _joined(*HEADERS, "vectors.cu")


@lru_cache(maxsize=8)
def receive_text(chunk: int) -> str:
    """The source of the kernels that a step begins with. chunk: bytes of a table that one launch brings."""
    return f"#define CHUNK {chunk}\n" + _joined("arith.cuh", "receive.cu")


def scalars_text() -> str:
    """The source of the kernels that compute a step's scalars on the device, and count."""
    return _joined(*HEADERS, "scalars.cu")


@lru_cache(maxsize=8)
def _joined(*names: str) -> str:
    folder = files("shard4bit.cuda") / "kernels"
    texts = [(folder / name).read_text() for name in names]
    return "\n".join(text.replace("#pragma once\n", "") for text in texts)
