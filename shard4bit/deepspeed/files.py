"""DeepSpeed's own checkpoint files, read and written in one process without an engine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shard4bit.errors import CheckpointError
from shard4bit.placement import plain_name

_OPTIMIZER = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
_KEY = re.compile(r"(.*)\[(\d+):(\d+)\]@(\d+)/([^/]+)$")
MODEL = "mp_rank_00_model_states.pt"


class Stretch(NamedTuple):
    """What one rank's file holds of one parameter: the flat elements [start, stop), which lie in its
    partition from ``at`` on, and its tensors of the state by their keys."""

    start: int
    stop: int
    at: int
    state: dict[str, Tensor]


def load(path: Path, trusted: bool) -> Any:
    """A file of DeepSpeed's. It is a pickle: unless ``trusted``, only tensors, containers and DeepSpeed's own
    classes of data are accepted. Raises CheckpointError."""
    try:
        with torch.serialization.safe_globals(_known_classes()):
            return torch.load(path, map_location="cpu", weights_only=not trusted)
    except FileNotFoundError:
        raise CheckpointError(
            f"there is no {path}: expected a directory that engine.save_checkpoint wrote"
        ) from None
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}); if it has "
            "objects of your own and you trust it, pass trusted=True, which lets it run any code"
        ) from error


def _known_classes() -> list[Any]:
    from collections import OrderedDict

    from deepspeed.runtime.fp16 import loss_scaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils import fragment_address

    return [
        OrderedDict,
        fragment_address,
        ZeroStageEnum,
        loss_scaler.LossScaler,
        loss_scaler.DynamicLossScaler,
    ]


def ranks(folder: Path, trusted: bool) -> list[dict[str, Any]]:
    """The "optimizer_state_dict" of every rank, in order. Raises CheckpointError."""
    found: dict[int, Path] = {}
    for path in folder.glob("*optim_states.pt"):
        match = _OPTIMIZER.search(path.name)
        if match is None or int(match[2]):
            raise CheckpointError(f"{path} is of a model-parallel run, which cannot be read")
        found[int(match[1])] = path
    if not found:
        raise CheckpointError(
            f"{folder} has no optimizer states of ZeRO stage 1 or 2 (those of stage 0 have no names): load "
            "it with engine.load_checkpoint, then use shard4bit.save"
        )
    out = [load(found[rank], trusted)["optimizer_state_dict"] for rank in sorted(found)]
    counts = out[0]["partition_count"]
    count = counts[0] if isinstance(counts, list) else counts
    if sorted(found) != list(range(count)):
        raise CheckpointError(f"{folder} was written by {count} ranks and has the files of {sorted(found)}")
    return out


def stretches(state: Mapping[str, Tensor]) -> dict[str, Stretch]:
    """The parameters of one partition by name. Raises CheckpointError for a state of another optimizer."""
    out: dict[str, Stretch] = {}
    for key, tensor in state.items():
        match = _KEY.match(key)
        if match is None:
            raise CheckpointError(
                f"the optimizer's state has {key!r}: expected one of AdamW4bit or SGD4bit under ZeRO stage 1 "
                "or 2"
            )
        name, start, stop, at, what = match.groups()
        known = out.setdefault(name, Stretch(int(start), int(stop), int(at), {}))
        known.state[what] = tensor
    return out


def shapes(model: Mapping[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    """Per parameter group, names and shapes of the trainable parameters, from the file of the model."""
    return [{plain_name(n): tuple(s) for n, s in group.items()} for group in model["param_shapes"]]


def others(model: Mapping[str, Any]) -> Iterator[tuple[str, Tensor, bool]]:
    """(name, tensor, whether it is a buffer) of what is not trained."""
    trained = {name for group in shapes(model) for name in group}
    buffers = {plain_name(name) for name in model.get("buffer_names") or ()}
    tied = {plain_name(name) for name in model.get("shared_params") or ()}
    for full_name, tensor in {**model["module"], **(model.get("frozen_param_fragments") or {})}.items():
        name = plain_name(full_name)
        if name not in trained and name not in tied and isinstance(tensor, Tensor):
            yield name, tensor, name in buffers
