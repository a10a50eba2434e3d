"""JSON from files that may be hostile: parsed within limits, without duplicate keys or numbers that JSON
does not know."""

from __future__ import annotations

import json
from typing import Any


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in out if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:200]!r} appears twice")
    return out


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def parse(raw: bytes) -> Any:
    """Raises ValueError for anything but JSON."""
    try:
        return json.loads(raw, object_pairs_hook=_unique, parse_constant=_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def count(value: Any) -> int:
    """A non-negative integer that fits 62 bits; ValueError for anything else."""
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError(f"expected a count, got {str(value)[:100]!r}")
    return value


def hexadecimal(value: Any) -> str:
    """16 lower-case hex digits; ValueError for anything else."""
    if not isinstance(value, str) or len(value) != 16 or set(value) - set("0123456789abcdef"):
        raise ValueError(f"expected a checksum, got {str(value)[:100]!r}")
    return value


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a string, got {str(value)[:100]!r}")
    return value
