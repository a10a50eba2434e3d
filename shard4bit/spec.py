"""How a moment is stored: frozen, self-validating descriptions and their names.

Names follow the tables of Li, Chen, Zhu (arXiv 2309.01507): normalization "/" mapping, "B128/DE",
"Rank-1/Linear", "B2048/DE-0"; a third part gives the bits when they are not 4, as in "B2048/DE/8".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

QUANTIZE_ABOVE = 4096  # elements; smaller tensors keep fp32 moments (the paper's threshold)

_MAPPINGS = {"de": "DE", "de0": "DE-0", "linear": "Linear"}
_NORMS = ("block", "rank1", "tensor")


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """A quantizer: normalization, mapping and code width.

    norm: "block" (absmax of each ``block_size`` columns of a row), "rank1" (row and column maxima;
        unsigned only) or "tensor" (one absmax).
    mapping: "de" (dynamic exponent), "de0" (its zero replaced; unsigned) or "linear" (unsigned, no zero).
    bits: 4 or 8. signed: True for first moments and momentum, False for second moments.
    Raises ValueError for any other combination.
    """

    norm: str = "block"
    mapping: str = "de"
    signed: bool
    bits: int = 4
    block_size: int = 128

    def __post_init__(self) -> None:
        if self.norm not in _NORMS:
            raise ValueError(f"norm={self.norm!r}: expected one of {_NORMS}")
        if not isinstance(self.mapping, str) or self.mapping not in _MAPPINGS:
            raise ValueError(f"mapping={self.mapping!r}: expected one of {tuple(_MAPPINGS)}")
        if type(self.bits) is not int or self.bits not in (4, 8):
            raise ValueError(f"bits={self.bits!r}: expected 4 or 8")
        if not isinstance(self.signed, bool):
            raise ValueError(f"signed={self.signed!r}: expected True or False")
        if type(self.block_size) is not int or self.block_size < 1:
            raise ValueError(f"block_size={self.block_size!r}: expected a positive integer")
        if self.signed and (self.norm == "rank1" or self.mapping != "de"):
            raise ValueError(
                f"{self}: a signed moment needs norm 'block' or 'tensor' and mapping 'de'; "
                "rank-1, DE-0 and Linear are for non-negative tensors"
            )
        if self.norm != "block":  # of no meaning: specs of one name are equal
            object.__setattr__(self, "block_size", 128)

    def __str__(self) -> str:
        norm = {"block": f"B{self.block_size}", "rank1": "Rank-1", "tensor": "Tensor"}[self.norm]
        return f"{norm}/{_MAPPINGS[self.mapping]}" + ("" if self.bits == 4 else f"/{self.bits}")


@dataclass(frozen=True)
class Factored:
    """A second moment kept as fp32 means of rows and columns (4-bit Factor; after Adafactor)."""

    def __str__(self) -> str:
        return "factored"


@dataclass(frozen=True)
class Full:
    """A moment kept as it is, in fp32."""

    def __str__(self) -> str:
        return "fp32"


MomentSpec = QuantSpec | Factored | Full

#: Quantizers of the paper's ablation and the 8-bit baseline (Dettmers et al. 2022), by name.
FIRST_MOMENTS = ("B128/DE", "B2048/DE", "Tensor/DE", "B2048/DE/8", "fp32")
SECOND_MOMENTS = (
    "Rank-1/Linear",
    "Rank-1/DE-0",
    "Rank-1/DE",
    "B128/Linear",
    "B128/DE",
    "B128/DE-0",
    "B2048/Linear",
    "B2048/DE",
    "B2048/DE-0",
    "Tensor/Linear",
    "Tensor/DE",
    "B2048/DE/8",
    "factored",
    "fp32",
)
_ALIASES = {"rank1": "Rank-1/Linear", "block": "B128/Linear"}

#: Keyword arguments for AdamW4bit that make it algorithm 1 of the paper, to the letter.
ADAMW_PAPER: dict[str, Any] = {"compensate": False, "rounding": "nearest"}

#: Keyword arguments for AdamW4bit that make it the 8-bit baseline. (It loses nothing that compensation, which
#: takes the torch reference a chunk of memory, could make good.)
ADAMW_8BIT: dict[str, Any] = {
    "first_moment": "B2048/DE/8",
    "second_moment": "B2048/DE/8",
    "compensate": False,
}

_PATTERN = re.compile(r"(?:B(\d+)|(Rank-1)|(Tensor))/(DE|DE-0|Linear)(?:/(\d+))?")


@lru_cache(maxsize=256)
def _parse(name: str, signed: bool) -> MomentSpec | None:
    if name == "fp32":
        return Full()
    if name == "factored":
        return None if signed else Factored()
    found = _PATTERN.fullmatch(_ALIASES.get(name, name) if not signed else name)
    if found is None:
        return None
    block, rank1, tensor, mapping, bits = found.groups()
    return QuantSpec(
        norm="rank1" if rank1 else "tensor" if tensor else "block",
        mapping={title: key for key, title in _MAPPINGS.items()}[mapping],
        signed=signed,
        bits=int(bits or 4),
        block_size=int(block) if block else 128,
    )


def parse_spec(value: str | MomentSpec, *, signed: bool, argument: str) -> MomentSpec:
    """The spec that ``value`` names. ``argument`` is the option's name, for the error.

    Raises ValueError for unknown names and for specs of the other sign.
    """
    listed = FIRST_MOMENTS if signed else ("rank1", "block", *SECOND_MOMENTS)
    if isinstance(value, QuantSpec | Full | Factored):
        wrong_sign = isinstance(value, QuantSpec) and value.signed != signed
        if wrong_sign or (signed and isinstance(value, Factored)):
            kind = "signed (a first moment)" if signed else "unsigned (a second moment)"
            raise ValueError(f"{argument}={value}: expected a quantizer that is {kind}")
        return value
    spec = _parse(value, signed) if isinstance(value, str) else None
    if spec is None:
        raise ValueError(
            f"{argument}={value!r}: expected a QuantSpec or a name such as {', '.join(listed)} "
            "(any block size: B<n>/...)"
        )
    return spec


def is_quantized(shape: tuple[int, ...]) -> bool:
    """Whether a parameter of this *global* shape has quantized moments (unless its group says no)."""
    numel = 1
    for dim in shape:
        numel *= dim
    return len(shape) >= 2 and numel > QUANTIZE_ABOVE
