"""4-bit optimizer states for sharded training: AdamW4bit, SGD4bit, save, load.

Importing this does nothing else: attributes are loaded when first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "AdamW4bit": "optim.adamw",
    "SGD4bit": "optim.sgd",
    "QuantSpec": "spec",
    "save": "api",
    "load": "api",
    "digest": "api",
    "import_state": "optim.exchange",
    "export_state": "optim.exchange",
    "CheckpointError": "errors",
    "LayoutError": "errors",
    "Shard4bitError": "errors",
    "StateError": "errors",
}
_SUBMODULES = ("fsdp", "plot", "spec")

__all__ = [
    "AdamW4bit",
    "CheckpointError",
    "LayoutError",
    "QuantSpec",
    "SGD4bit",
    "Shard4bitError",
    "StateError",
    "digest",
    "export_state",
    "fsdp",
    "import_state",
    "load",
    "plot",
    "save",
    "spec",
]

if TYPE_CHECKING:
    from shard4bit import fsdp, plot, spec
    from shard4bit.api import digest, load, save
    from shard4bit.errors import CheckpointError, LayoutError, Shard4bitError, StateError
    from shard4bit.optim.adamw import AdamW4bit
    from shard4bit.optim.exchange import export_state, import_state
    from shard4bit.optim.sgd import SGD4bit
    from shard4bit.spec import QuantSpec


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(f"shard4bit.{_WHERE[name]}"), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"shard4bit.{name}")
    else:
        raise AttributeError(f"module 'shard4bit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
