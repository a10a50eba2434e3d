"""DeepSpeed's checkpoints: the native ones of our optimizers, and universal ones. Needs DeepSpeed."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from shard4bit.cli import found as names
from shard4bit.cli.formats.package import Entry, Package, Stored, natural
from shard4bit.cli.tables import UsageError, progress
from shard4bit.optim.loading import RUN_OPTIONS

if TYPE_CHECKING:
    from shard4bit.deepspeed.saved import Param

KINDS = ("native", "universal")


def read(path: str, step: int | None, trusted: bool) -> Package:
    """Raises UsageError without DeepSpeed, CheckpointError for files that are damaged or of others."""
    kind, folder = _found(path)
    _library(path)
    from shard4bit.deepspeed import saved

    state = (saved.native if kind == "native" else saved.universal)(folder, trusted=trusted)
    if state.left:
        print(f"left out, since only DeepSpeed's files hold it: {', '.join(state.left)}", file=sys.stderr)
    entries = [_entry(param) for param in state.params()]
    entries += [
        Entry(name, tuple(tensor.shape), partial(_given, tensor), tensor.dtype)
        for name, tensor, _ in state.others
    ]
    whole = {} if kind == "native" else {"quantize": False}
    groups = []
    for options, params in state.groups:
        kept = {k: v for k, v in {**options, **whole}.items() if k not in RUN_OPTIONS}
        groups.append({"parameters": [p.name for p in params], "options": json.loads(json.dumps(kept))})
    entries.sort(key=lambda entry: natural(entry.name))
    return Package(state.step if step is None else step, entries, groups)


def _entry(param: Param) -> Entry:
    moments = {name: Stored(spec, partial(param.moment, name)) for name, spec in param.specs.items()}
    return Entry(param.name, param.shape, param.value, param.dtype, moments, param.step)


def _given(tensor: Tensor) -> Tensor:
    return tensor


def write(source: str, target: str, trusted: bool) -> str:
    """A universal checkpoint of a native one; what was written, in words. Raises as ``read``."""
    _, folder = _found(source)
    _library(source)
    from shard4bit.deepspeed import convert

    state = convert.write_universal(folder, target, trusted=trusted, each=partial(progress, label="decoding"))
    lost = {key for own in state.by_name.values() for key in own} - {"quantize"}
    if lost:
        print(
            f"left out: {', '.join(sorted(lost))} of single parameters (no_decay), which DeepSpeed's "
            "optimizers do not know: give them groups of their own",
            file=sys.stderr,
        )
    moments = sorted({name for param in state.params() for name in param.specs})
    return f"{target}: {len(state.params())} parameters with fp32 {', '.join(moments)}, step {state.step}"


def _found(path: str) -> tuple[str, Path]:
    found = names.deepspeed(Path(path))
    assert found is not None, path
    return found


def _library(path: str) -> None:
    """Import the adapter, without what DeepSpeed says to stdout meanwhile."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import shard4bit.deepspeed  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"{path} is a checkpoint of DeepSpeed's, which it takes to read it: {error}"
        ) from None
    finally:
        logging.disable(before)
