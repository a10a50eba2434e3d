"""Shell patterns of parameter names: which options some parameters have otherwise than their group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any


def checked(argument: str, patterns: Any) -> tuple[str, ...]:
    """The patterns; ValueError if they are no list of strings."""
    if isinstance(patterns, str):
        raise ValueError(f"{argument}={patterns!r}: expected a list of patterns, such as [{patterns!r}]")
    if not isinstance(patterns, list | tuple) or not all(isinstance(p, str) for p in patterns):
        raise ValueError(f'{argument}={patterns!r}: expected a list of patterns, such as ["*.bias"]')
    return tuple(patterns)


def overrides(
    names: Sequence[str], rules: Mapping[str, tuple[Sequence[str], Mapping[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Per name, the options of all rules of which a pattern matches it.

    rules: argument -> (patterns, options). Raises ValueError for a pattern that matches no name.
    """
    out: dict[str, dict[str, Any]] = {name: {} for name in names}
    for argument, (patterns, options) in rules.items():
        for pattern in patterns:
            matching = [name for name in names if fnmatchcase(name, pattern)]
            if not matching:
                raise ValueError(
                    f"{argument}: the pattern {pattern!r} matches no parameter of the optimizer; names are "
                    f"such as {list(names[:3])}"
                )
            for name in matching:
                out[name].update(options)
    return out
