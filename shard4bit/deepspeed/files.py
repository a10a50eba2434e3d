"""DeepSpeed's own checkpoint files, read in one process without an engine. Tensors stay mapped files until
they are used."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shard4bit.deepspeed.versions import entry, unknown
from shard4bit.errors import CheckpointError
from shard4bit.placement import plain_name

_OPTIMIZER = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
_KEY = re.compile(r"(.*)\[(\d+):(\d+)\]@(\d+)/([^/]+)$")
_PARALLEL = re.compile(r"^mp_rank_(?!00_)\d+(_\d+)?_model_states\.pt$|^layer_\d+")
MODEL = "mp_rank_00_model_states.pt"
#: what DeepSpeed itself puts into the file of the model and that a training state has, or can do without;
#: all else is the user's client_state, or the learning-rate scheduler's
_USUAL = {
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "frozen_param_fragments"),
    *("shared_params", "data_sampler", "random_ltd", "sparse_tensor_module_names", "skipped_steps"),
    *("global_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_config", "ds_version"),
    "checkpoint_parallel_dimensions",
}


class Stretch(NamedTuple):
    """What one rank's file holds of one parameter: the flat elements [start, stop), which lie in its
    partition from ``at`` on, and its tensors of the state by their keys. flat: whether these are of a run of
    elements (ZeRO), or of the parameter in its own shape."""

    start: int
    stop: int
    at: int
    state: dict[str, Tensor]
    flat: bool = True


def load(path: Path, trusted: bool) -> Any:
    """A file of DeepSpeed's. It is a pickle: unless ``trusted``, only tensors, containers and DeepSpeed's own
    classes of data are accepted. Raises CheckpointError, and LayoutError for a DeepSpeed without these."""
    known = _known_classes()
    try:
        with torch.serialization.safe_globals(known):
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=not trusted, mmap=mapped)
    except FileNotFoundError:
        raise CheckpointError(
            f"there is no {path}: expected a directory that engine.save_checkpoint wrote"
        ) from None
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}); if it has "
            "objects of your own and you trust it, give trusted=True (--trusted), which lets it run any code"
        ) from error


def _known_classes() -> list[Any]:
    from collections import OrderedDict

    try:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils import fragment_address
    except ImportError as error:
        raise unknown(str(error)) from None
    return [OrderedDict, fragment_address, ZeroStageEnum, LossScaler, DynamicLossScaler]


def model_of(folder: Path, trusted: bool) -> dict[str, Any]:
    """The file of the model. Raises CheckpointError for what is not of data parallelism alone."""
    for path in sorted(folder.glob("*model_states.pt")):
        if _PARALLEL.match(path.name):
            raise CheckpointError(
                f"{path} is of a pipeline-, model- or expert-parallel run, which cannot be read"
            )
        if path.name.startswith("zero_pp_rank_"):
            raise CheckpointError(f"{path} is of ZeRO stage 3; expected a checkpoint of stage 0, 1 or 2")
    model = load(folder / MODEL, trusted)
    if not isinstance(model, Mapping) or not {"module", "global_steps", "ds_version"} <= set(model):
        raise CheckpointError(f"{folder / MODEL} was not written by engine.save_checkpoint")
    return dict(model)


def left_out(model: Mapping[str, Any]) -> list[str]:
    """What else the file of the model has, by name: the LR scheduler, and the user's client_state."""
    return sorted(key for key, value in model.items() if key not in _USUAL and value is not None)


def ranks(folder: Path, trusted: bool) -> list[dict[str, Any]]:
    """The "optimizer_state_dict" of every rank, in order; none at stage 0. Raises CheckpointError."""
    found: dict[int, Path] = {}
    for path in folder.glob("*optim_states.pt"):
        match = _OPTIMIZER.search(path.name)
        if match is None or int(match[2]):
            raise CheckpointError(f"{path} is of a model-parallel run, which cannot be read")
        found[int(match[1])] = path
    if not found:
        return []
    out = [load(found[rank], trusted)["optimizer_state_dict"] for rank in sorted(found)]
    if not all(isinstance(one.get("base_optimizer_state"), Mapping) for one in out):
        raise CheckpointError(f"{folder} has optimizer states of ZeRO stage 3, or an elastic checkpoint's")
    counts = entry(out[0], "partition_count")
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
    """Per parameter group, names and shapes of the trainable parameters, from the file of the model. (At
    stage 0 it has none.)"""
    return [{plain_name(n): tuple(s) for n, s in group.items()} for group in entry(model, "param_shapes")]


def tensors(model: Mapping[str, Any]) -> dict[str, Tensor]:
    """All that the file of the model has, by plain names: parameters in the engine's precision, buffers."""
    every = {**model["module"], **(model.get("frozen_param_fragments") or {})}
    return {plain_name(name): tensor for name, tensor in every.items() if isinstance(tensor, Tensor)}


def others(model: Mapping[str, Any], trained: Collection[str]) -> Iterator[tuple[str, Tensor, bool]]:
    """(name, tensor, whether it is a buffer) of what is not trained. A parameter under several names has the
    first, or the one that is trained."""
    every = tensors(model)
    buffers = {plain_name(name) for name in model.get("buffer_names") or ()}
    tied = {plain_name(name) for name in model.get("shared_params") or ()}
    seen = {_memory(every[name]) for name in trained if name in every}
    for name, tensor in every.items():
        if name in trained or name in tied:
            continue
        if name not in buffers and tensor.numel():
            if _memory(tensor) in seen:
                continue
            seen.add(_memory(tensor))
        yield name, tensor, name in buffers


def _memory(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape)
