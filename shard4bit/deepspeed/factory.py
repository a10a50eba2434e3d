"""The optimizers by the names and options of a DeepSpeed configuration."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from shard4bit.deepspeed import attach
from shard4bit.optim import adamw, patterns, sgd
from shard4bit.optim.base import QuantizedOptimizer

Opt = TypeVar("Opt", bound=QuantizedOptimizer)

#: what is given by patterns of parameter names -> the options that it stands for
BY_NAME: Mapping[str, Mapping[str, Any]] = {
    "quantize_exclude": {"quantize": False},
    "no_decay": {"weight_decay": 0.0},
}


def AdamW4bit(params: Iterable[Any], **options: Any) -> adamw.AdamW4bit:
    """``shard4bit.AdamW4bit`` for ``deepspeed.initialize``, by the "params" of the JSON.

    options: those of ``shard4bit.AdamW4bit``, and lists of shell patterns of parameter names:
        quantize_exclude (fp32 moments) and no_decay (no weight decay).
    Raises ValueError for unknown options, naming the nearest right one, and for wrong values.
    """
    return _make(adamw.AdamW4bit, params, options)


def SGD4bit(params: Iterable[Any], **options: Any) -> sgd.SGD4bit:
    """``shard4bit.SGD4bit`` likewise."""
    return _make(sgd.SGD4bit, params, options)


def _make(kind: type[Opt], params: Iterable[Any], options: Mapping[str, Any]) -> Opt:
    known = [*list(inspect.signature(kind).parameters)[1:], *BY_NAME]
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{kind.__name__} has no option {key!r}: {hint}It has {', '.join(known)}")
    by_name = {key: patterns.checked(key, options.get(key, ())) for key in BY_NAME}
    own: dict[str, Any] = {k: v for k, v in options.items() if k not in BY_NAME}
    if isinstance(own.get("betas"), list):
        own["betas"] = tuple(own["betas"])
    attach.install()
    made = kind(params, **own)
    attach.rules_of[made] = {key: (given, BY_NAME[key]) for key, given in by_name.items()}
    return made
