"""The training state in DeepSpeed's files, native or universal: what there is, and each tensor when it is
asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shard4bit.deepspeed import assembly, files
from shard4bit.deepspeed.files import Stretch
from shard4bit.deepspeed.versions import entry
from shard4bit.errors import CheckpointError
from shard4bit.layout import Slab
from shard4bit.optim.adamw import AdamW4bit
from shard4bit.optim.sgd import SGD4bit
from shard4bit.spec import Full, MomentSpec
from shard4bit.state import Moment

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Param:
    """A trained parameter. step: its count of updates; specs: of its moments, by name. value, moment(name)
    give the whole tensors, on the CPU; they raise CheckpointError if the files do not have them."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    step: int
    specs: Mapping[str, MomentSpec]
    value: Callable[[], Tensor]
    moment: Callable[[str], Moment]


@dataclass(frozen=True)
class Saved:
    """groups: options, and their parameters; others: (name, tensor, whether it is a buffer) of what is not
    trained; step: the engine's; left: names of what else the files have; by_name: options of parameters that
    differ from their group's in the engine; model, shared: DeepSpeed's own dictionaries, of the model and of
    the first rank's optimizer, without the packed states."""

    kind: type[AdamW4bit] | type[SGD4bit]
    groups: list[tuple[dict[str, Any], list[Param]]]
    others: list[tuple[str, Tensor, bool]]
    step: int
    left: list[str] = field(default_factory=list)
    by_name: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)

    def params(self) -> list[Param]:
        return [param for _, members in self.groups for param in members]


def native(folder: str | Path, *, trusted: bool = False) -> Saved:
    """What ``engine.save_checkpoint`` wrote into ``folder`` (the one named by the tag) with our optimizer at
    ZeRO stage 0, 1 or 2. trusted: let the files' pickles run code. Raises CheckpointError for files that are
    missing or damaged, or of another optimizer, LayoutError for files of a DeepSpeed with others."""
    folder = Path(folder)
    model = files.model_of(folder, trusted)
    ranks = files.ranks(folder, trusted)
    states = [r["base_optimizer_state"] for r in ranks] or [_whole_state(folder, model)]
    kind: Any = AdamW4bit if "second_moment" in states[0]["param_groups"][0] else SGD4bit
    members = list(_flat(model, ranks) if ranks else _whole(model, states[0]))
    groups, own = [], states[0].get("by_name", {})
    for index, found in enumerate(members):
        options = {k: v for k, v in states[0]["param_groups"][index].items() if k not in _OURS}
        groups += [
            (o, [make(_specs(kind, o, make.shape)) for make in m]) for o, m in _split(found, options, own)
        ]
    shared = {k: v for k, v in ranks[0].items() if k not in _SHARDED} if ranks else {}
    shared["param_groups"] = states[0]["param_groups"]
    trained = {param.name for _, found in groups for param in found}
    others = list(files.others(model, trained))
    if not ranks:
        shared["ds_version"] = model["ds_version"]
        shapes = [{found.name: torch.Size(found.shape) for found in group} for group in members]
        model = {**model, "optimizer": None, "param_shapes": shapes}
    step = int(model["global_steps"])
    return Saved(kind, groups, others, step, files.left_out(model), own, model, shared)


_OURS = ("params", "param_names")
_SHARDED = ("base_optimizer_state", "param_slice_mappings", "single_partition_of_fp32_groups")


@dataclass(frozen=True)
class _Found:
    """A parameter whose specs are not known yet."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    held: list[Stretch]
    value: Callable[[], Tensor]

    def __call__(self, specs: Mapping[str, MomentSpec]) -> Param:
        def moment(key: str) -> Moment:
            return assembly.moment(self.name, self.shape, self.held, key, specs[key])

        step = int(self.held[0].state["step"])
        return Param(self.name, self.shape, self.dtype, step, specs, self.value, moment)


def _flat(model: Mapping[str, Any], ranks: list[dict[str, Any]]) -> Iterator[list[_Found]]:
    """Of each group, the parameters in the ranks' partitions."""
    for index, named in enumerate(files.shapes(model)):
        states = [r["base_optimizer_state"] for r in ranks]
        keys = [state["param_groups"][index]["params"][0] for state in states]
        stretches = [files.stretches(s["state"].get(key, {})) for s, key in zip(states, keys, strict=True)]
        masters = [entry(r, "single_partition_of_fp32_groups")[index] for r in ranks]
        out = []
        for name, shape in named.items():
            held = [of[name] for of in stretches if name in of]
            if len(held) != len(ranks):
                raise CheckpointError(
                    f"{name}: its states are in the files of {len(held)} of {len(ranks)} ranks"
                )
            assembly.check(name, shape, held)
            value = partial(assembly.elements, shape, held, masters)
            out.append(_Found(name, shape, masters[0].dtype, held, value))
        yield out


def _whole_state(folder: Path, model: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer's state_dict in the file of the model, of stage 0."""
    state = model.get("optimizer") or {}
    state = state.get("optimizer_state_dict", state)
    if "param_groups" not in state:
        raise CheckpointError(f"{folder} has no optimizer states of ZeRO stage 0, 1 or 2")
    if "names" not in state:
        raise CheckpointError(
            f"{folder} has no states of AdamW4bit or SGD4bit with the parameters' names: if an earlier "
            "shard4bit saved it at stage 0, load it with engine.load_checkpoint and use shard4bit.save"
        )
    return state


def _whole(model: Mapping[str, Any], state: Mapping[str, Any]) -> Iterator[list[_Found]]:
    """Of each group, the whole parameters of stage 0: their fp32 copies if there are any."""
    copies = (model["optimizer"] or {}).get("fp32_groups")
    weights = files.tensors(model)
    for index, (group, names) in enumerate(zip(state["param_groups"], state["names"], strict=True)):
        values = [weights[name] for name in names] if copies is None else copies[index]
        out = []
        for name, key, value in zip(names, group["params"], values, strict=True):
            if key in state["state"]:  # not of frozen ones
                shape = tuple(value.shape)
                held = [Stretch(0, Slab.whole(shape).view.numel, 0, state["state"][key], flat=False)]
                out.append(_Found(name, shape, value.dtype, held, value.detach))
        yield out


def _split(
    members: list[_Found], options: dict[str, Any], by_name: Mapping[str, Mapping[str, Any]]
) -> list[tuple[dict[str, Any], list[_Found]]]:
    """The group, divided where parameters have options of their own."""
    out: dict[str, tuple[dict[str, Any], list[_Found]]] = {}
    for member in members:
        own = {**options, **by_name.get(member.name, {})}
        out.setdefault(repr(sorted(own.items(), key=str)), (own, []))[1].append(member)
    return list(out.values())


def _specs(kind: Any, options: dict[str, Any], shape: tuple[int, ...]) -> dict[str, MomentSpec]:
    """How our optimizer with these options stores each moment of a parameter of this shape."""
    optimizer = kind([{"params": [nn.Parameter(torch.empty(0))], **options}])
    group = optimizer.param_groups[0]
    return {name: optimizer._spec(name, group, shape) for name in optimizer._rule(group).moments}


# ---- universal checkpoints ----------------------------------------------------------------------------


def universal(folder: str | Path, *, trusted: bool = False) -> Saved:
    """A universal checkpoint of AdamW, as ``deepspeed.checkpoint.ds_to_universal --inject_missing_state``
    writes it; its moments are fp32. Raises CheckpointError."""
    folder = Path(folder)
    model, about = (
        files.model_of(folder, trusted),
        files.load(folder / "zero" / "optimizer_state.pt", trusted),
    )
    if "param_groups" not in about:
        raise CheckpointError(f"{folder} is not a universal checkpoint of ZeRO stage 1 or 2")
    groups = []
    for named, saved in zip(files.shapes(model), about["param_groups"], strict=True):
        options = {key: saved[key] for key in ("lr", "betas", "eps", "weight_decay") if key in saved}
        groups.append((options, [_universal(folder, *item, trusted) for item in named.items()]))
    trained = {param.name for _, found in groups for param in found}
    others = list(files.others(model, trained))
    return Saved(AdamW4bit, groups, others, int(model["global_steps"]), files.left_out(model))


def _universal(folder: Path, name: str, shape: tuple[int, ...], trusted: bool) -> Param:
    place = folder / "zero" / name
    for key in ("exp_avg", "exp_avg_sq"):
        if not (place / f"{key}.pt").exists():
            raise CheckpointError(f"there is no {place / key}.pt: expected a universal checkpoint of AdamW")

    def read(key: str) -> Tensor:
        tensor = files.load(place / f"{key}.pt", trusted)["param"]
        if tensor.numel() != Slab.whole(shape).view.numel:
            raise CheckpointError(f"{place}: {key} has {tensor.numel()} elements, expected shape {shape}")
        return tensor.reshape(shape).float()

    def moment(key: str) -> Moment:
        whole = Slab.whole(shape)
        return Moment(key, Full(), whole, {"": read(key).reshape(whole.shape)})

    step = files.load(place / "step.pt", trusted) if (place / "step.pt").exists() else 0
    specs = {"exp_avg": Full(), "exp_avg_sq": Full()}
    return Param(name, shape, torch.float32, int(step), specs, partial(read, "fp32"), moment)
