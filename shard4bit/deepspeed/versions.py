"""What of DeepSpeed is not as in the versions that we know: the errors that name these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shard4bit.errors import LayoutError

KNOWN_VERSIONS = ("0.16.9", "0.19.8")


def unknown(what: str) -> LayoutError:
    """The error for insides that are not as expected."""
    import deepspeed

    return LayoutError(
        f"DeepSpeed {deepspeed.__version__} is unlike the versions that shard4bit knows "
        f"({', '.join(KNOWN_VERSIONS)}): {what}. Install one of these, or a newer shard4bit"
    )


def read(owner: Any, name: str) -> Any:
    """An attribute of DeepSpeed's; LayoutError, with the known versions, if it is not there."""
    try:
        return getattr(owner, name)
    except AttributeError:
        kind = owner if isinstance(owner, type) else type(owner)
        raise unknown(f"{kind.__name__} has no {name}") from None


def later(owner: Any, name: str, default: Any) -> Any:
    """Likewise, of what the oldest version that we know does not have: the default there."""
    import deepspeed

    return getattr(owner, name, default) if deepspeed.__version__ == KNOWN_VERSIONS[0] else read(owner, name)


def entry(saved: Mapping[str, Any], key: str) -> Any:
    """Likewise, an entry of DeepSpeed's files."""
    if saved.get(key) is None:
        raise unknown(f"its files have no {key!r}")
    return saved[key]
