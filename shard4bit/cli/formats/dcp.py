"""A directory of ``torch.distributed.checkpoint``: ``{"model": ..., "optimizer": ...}`` as
``get_state_dict`` gives them. Its pickles are read without running anything in them."""

from __future__ import annotations

import inspect
import io
import json
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shard4bit.checkpoint.pieces import DTYPES
from shard4bit.cli.formats.package import MOMENTS, OPTIONS, Entry, Package, Stored, filled, natural
from shard4bit.cli.tables import Bar, UsageError
from shard4bit.layout import Slab
from shard4bit.optim.adamw import AdamW4bit
from shard4bit.optim.loading import OWN_OPTIONS, RUN_OPTIONS, SPEC_OPTIONS
from shard4bit.optim.sgd import SGD4bit
from shard4bit.spec import Full, MomentSpec, parse_spec
from shard4bit.state import parts, state_key

METADATA = ".metadata"
_KEYS = re.compile(
    r"^(?:.*?\.)?state\.(?P<name>.+)\.(?P<key>(?P<moment>exp_avg_sq|exp_avg|momentum_buffer)"
    r"(?:_(?P<suffix>codes|absmax|row_max|col_max|row_mean|col_mean|mean))?|step)$"
)
_GROUPS = re.compile(r"^(?:.*?\.)?param_groups\.(?P<group>.+)\.(?P<option>\w+)$")
#: what the metadata of torch 2.11 to 2.13 is made of; nothing here can be called to any effect
_ALLOWED = {
    "torch": {"Size", *(str(dtype).removeprefix("torch.") for dtype in DTYPES)},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
        *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
    "collections": {"OrderedDict"},
}


class _Unpickler(pickle.Unpickler):
    """Refuses everything but the metadata's own classes."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class _Directory:
    """Tensors and objects of a DCP directory by key, each read when it is asked for."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        try:
            with open(self.path / METADATA, "rb") as file:
                metadata = _Unpickler(file).load()
            self.tensors = {k: v for k, v in metadata.state_dict_metadata.items() if hasattr(v, "chunks")}
            self.objects = set(metadata.state_dict_metadata) - set(self.tensors)
            self.places: dict[str, list[tuple[Any, Any]]] = {}
            for index, info in metadata.storage_data.items():
                self.places.setdefault(index.fqn, []).append((index, info))
        except Exception as error:  # a damaged pickle may raise anything
            raise UsageError(
                f"{self.path / METADATA} cannot be used: {type(error).__name__} {error}"
            ) from None

    def _pieces(self, key: str) -> Iterator[tuple[Any, Any]]:
        """(offset in the tensor, value) of what the files hold of a key."""
        for index, info in self.places.get(key, ()):
            file = self.path / info.relative_path
            if Path(info.relative_path).name != info.relative_path or getattr(
                info, "transform_descriptors", None
            ):
                raise UsageError(
                    f"{key} lies in {info.relative_path!r}, compressed or outside of {self.path}"
                )
            try:
                with open(file, "rb") as opened:
                    opened.seek(info.offset)
                    data = io.BytesIO(opened.read(info.length))
                yield index.offset, torch.load(data, map_location="cpu", weights_only=True)
            except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
                raise UsageError(f"{file} ({key}) cannot be read: {str(error).splitlines()[0]}") from None

    def tensor(self, key: str) -> Tensor:
        about = self.tensors[key]
        out, filled_ = torch.empty(about.size, dtype=about.properties.dtype), 0
        for offset, part in self._pieces(key):
            target = out
            for dim, (start, length) in enumerate(zip(offset or (), part.shape, strict=False)):
                target = target.narrow(dim, start, length)
            target.copy_(part)
            filled_ += part.numel()
        if filled_ != out.numel():
            raise UsageError(f"{self.path} holds {filled_} of the {out.numel()} elements of {key}")
        return out

    def object(self, key: str) -> Any:
        return next(value for _, value in self._pieces(key))


def read(path: str, step: int | None) -> Package:
    """Raises UsageError for a directory without a model's or an optimizer's tensors."""
    source = _Directory(path)
    states: dict[str, dict[str, Any]] = {}
    for key in source.tensors:
        found = _KEYS.match(key)
        if found:
            states.setdefault(found["name"], {})[found["key"]] = key
    groups = _groups(source, set(states))
    options = {name: group["options"] for group in groups for name in group["parameters"]}
    used = {key for keys in states.values() for key in keys.values()}
    values = _model_keys([key for key in source.tensors if key not in used], set(states))
    if not states and not values:
        raise UsageError(f"{path} holds neither a model nor the state of AdamW or SGD")
    entries = [
        _entry(source, name, values.get(name), states.get(name, {}), options.get(name, {}))
        for name in sorted({*values, *states}, key=natural)
    ]
    counts = [entry.step or 0 for entry in entries]
    return Package(max(counts, default=0) if step is None else step, entries, groups)


def _model_keys(keys: list[str], names: set[str]) -> dict[str, str]:
    """Names of the model's tensors -> keys, without what stands before all of them ("model.")."""
    heads = {key.partition(".")[0] for key in keys}
    common = next(iter(heads)) + "." if len(heads) == 1 else ""
    if common and not any(key in names for key in keys):
        return {key.removeprefix(common): key for key in keys}
    return {key: key for key in keys}


def _groups(source: _Directory, stated: set[str]) -> list[dict[str, Any]]:
    """The parameter groups, of parameters that have a state: as they were, or by equal options where there
    is one for each name (flattened optimizer states)."""
    found: dict[str, dict[str, Any]] = {}
    for key in source.objects:
        place = _GROUPS.match(key)
        if place:
            found.setdefault(place["group"], {})[place["option"]] = source.object(key)
    known = {*OPTIONS, *OWN_OPTIONS}
    out: dict[str, dict[str, Any]] = {}
    for group in sorted(found, key=natural):
        options = {k: v for k, v in found[group].items() if k in known}
        plain = json.loads(json.dumps(options, default=float))  # tensors as numbers, tuples as lists
        names = [name for name in found[group].get("params", [group]) if name in stated]
        key = group if "params" in found[group] else json.dumps(plain, sort_keys=True)
        if names:
            out.setdefault(key, {"parameters": [], "options": plain})["parameters"] += names
    return list(out.values())


def _entry(
    source: _Directory, name: str, value: str | None, keys: Mapping[str, str], options: Mapping[str, Any]
) -> Entry:
    plain = next((keys[m] for m in MOMENTS if m in keys), None)
    shaped = value or plain
    if shaped is None:
        raise UsageError(
            f"{source.path} has a packed state of {name} but not the parameter, so not its shape"
        )
    shape = tuple(source.tensors[shaped].size)
    moments = {}
    for moment in MOMENTS:
        own = [
            key for key in keys if (found := _KEYS.match(f"state.{name}.{key}")) and found["moment"] == moment
        ]
        if own:
            spec = _spec(source, name, moment, own, options)
            get = partial(_part, source, keys, moment)
            moments[moment] = Stored(spec, partial(filled, moment, spec, shape, get))
    step = int(source.tensor(keys["step"])) if "step" in keys else None
    if value is None:
        return Entry(name, shape, moments=moments, step=step)
    about = source.tensors[value].properties.dtype
    return Entry(name, shape, partial(source.tensor, value), about, moments, step)


def _spec(
    source: _Directory, name: str, moment: str, keys: list[str], options: Mapping[str, Any]
) -> MomentSpec:
    if moment in keys:
        return Full()
    option, signed = MOMENTS[moment]
    spec = parse_spec(options.get(option, ""), signed=signed, argument=f"{source.path}: {option} of {name}")
    wanted = {state_key(moment, part.suffix) for part in parts(spec)}
    if wanted != set(keys):
        raise UsageError(f"{source.path} has {sorted(keys)} of {name}, expected {sorted(wanted)}")
    return spec


def _part(source: _Directory, keys: Mapping[str, str], moment: str, suffix: str) -> Tensor:
    return source.tensor(keys[state_key(moment, suffix)])


# ---- writing ------------------------------------------------------------------------------------------


def write(package: Package, path: str) -> str:
    """Write a new directory, tensor by tensor, for ``dcp.load`` into what ``get_state_dict`` gives."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.planner import WriteItem

    loads: dict[str, Callable[[], Tensor]] = {}
    tree = _tree(package, loads)

    class Planner(DefaultSavePlanner):
        """Plans with tensors without memory, and loads each when it is written."""

        def resolve_data(self, write_item: WriteItem) -> Any:
            load = loads.get(write_item.index.fqn)
            bar.to(len(done), len(loads))
            done.append(write_item)
            return super().resolve_data(write_item) if load is None else load()

    done: list[Any] = []
    os.mkdir(path)
    with Bar("writing") as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that one process saves alone
        # a file a tensor: torch keeps all tensors of a file until the file is done
        writer = dcp.FileSystemWriter(path, single_file_per_rank=False)
        dcp.save(tree, storage_writer=writer, planner=Planner(), no_dist=True)
    return path


def _tree(package: Package, loads: dict[str, Callable[[], Tensor]]) -> dict[str, Any]:
    """The nest that is saved, of tensors on the meta device; ``loads`` takes what gives each, by key."""

    def lazy(key: str, shape: tuple[int, ...], dtype: torch.dtype, load: Callable[[], Tensor]) -> Tensor:
        loads[key] = load
        return torch.empty(shape, dtype=dtype, device="meta")

    model, state = {}, {}
    for entry in package.entries:
        if entry.value is not None:
            model[entry.name] = lazy(f"model.{entry.name}", entry.shape, entry.dtype, entry.value)
        own: dict[str, Any] = {}
        for name, stored in entry.moments.items():
            for part in parts(stored.spec):
                key = state_key(name, part.suffix)
                shape = part.local_shape(Slab.whole(entry.shape))
                full = f"optimizer.state.{entry.name}.{key}"
                own[key] = lazy(full, shape, part.dtype, partial(_of, stored, part.suffix))
        if entry.step is not None:
            own["step"] = torch.tensor(float(entry.step))
        if own:
            state[entry.name] = own
    groups = [
        {
            **dict.fromkeys(RUN_OPTIONS, False),
            **_defaults(AdamW4bit if "betas" in g["options"] else SGD4bit),  # where the source does not say
            **{k: tuple(v) if isinstance(v, list) else v for k, v in g["options"].items()},
            "params": g["parameters"],
        }
        for g in package.groups
    ]
    return {"model": model, "optimizer": {"state": state, "param_groups": groups}}


def _defaults(kind: type) -> dict[str, Any]:
    """What an optimizer does beside storing, if it is not told otherwise."""
    known = inspect.signature(kind).parameters
    return {name: known[name].default for name in OWN_OPTIONS if name in known and name not in SPEC_OPTIONS}


def _of(stored: Stored, suffix: str) -> Tensor:
    return stored.load().tensors[suffix]
