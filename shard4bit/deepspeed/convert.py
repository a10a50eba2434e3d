"""Between DeepSpeed's checkpoints and a training state in one process, which ``shard4bit.save`` can write."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shard4bit.deepspeed import files
from shard4bit.deepspeed.files import Stretch
from shard4bit.errors import CheckpointError
from shard4bit.layout import Slab
from shard4bit.optim.adamw import AdamW4bit
from shard4bit.optim.base import QuantizedOptimizer
from shard4bit.optim.exchange import import_state
from shard4bit.optim.sgd import SGD4bit
from shard4bit.state import Moment, Part, parts, state_key


@dataclass(frozen=True)
class Training:
    """A training state on the CPU. model: only parameters (fp32 masters) and buffers, by their names; step:
    the engine's count of steps."""

    model: nn.Module
    optimizer: QuantizedOptimizer
    step: int


def read_native(folder: str | Path, *, trusted: bool = False) -> Training:
    """What ``engine.save_checkpoint`` wrote into ``folder`` (the one named by the tag) at ZeRO stage 1 or 2
    with our optimizer, put together. Nothing is re-quantized.

    trusted: let the files' pickles run code. Raises CheckpointError for files that are missing, or of
    another optimizer.
    """
    folder = Path(folder)
    model, ranks = files.load(folder / files.MODEL, trusted), files.ranks(folder, trusted)
    states = [rank["base_optimizer_state"] for rank in ranks]
    out, groups = nn.Module(), []
    held: dict[str, list[Stretch]] = {}
    for index, named in enumerate(files.shapes(model)):
        keys = [state["param_groups"][index]["params"][0] for state in states]
        found = [files.stretches(s["state"].get(key, {})) for s, key in zip(states, keys, strict=True)]
        members = []
        for name, shape in named.items():
            held[name] = [stretches[name] for stretches in found if name in stretches]
            masters = [r["single_partition_of_fp32_groups"][index] for r in ranks]
            value = _elements(name, shape, held[name], masters)
            members.append((name, _put(out, name, nn.Parameter(value))))
        options = {k: v for k, v in states[0]["param_groups"][index].items() if k != "params"}
        groups += _groups(members, options, states[0].get("by_name", {}))
    _put_others(out, model)
    kind: Any = AdamW4bit if "second_moment" in groups[0] else SGD4bit
    optimizer = kind(groups)
    names: dict[Tensor, str] = {param: name for name, param in out.named_parameters()}
    for bound in optimizer.bind():
        _assemble(names[bound.param], bound.moments, held[names[bound.param]])
        bound.step.fill_(float(held[names[bound.param]][0].state["step"]))
    return Training(out, optimizer, int(model["global_steps"]))


def _elements(
    name: str, shape: tuple[int, ...], held: Iterable[Stretch], partitions: Iterable[Tensor]
) -> Tensor:
    """A whole parameter from the ranks' partitions of its group."""
    pieces = [(s, p) for s, p in zip(held, partitions, strict=True) if s.stop > s.start]
    edges = sorted((s.start, s.stop) for s, _ in pieces)
    numel = Slab.whole(shape).view.numel
    if [a for a, _ in edges] != [0, *(b for _, b in edges[:-1])] or edges[-1][1] != numel:
        raise CheckpointError(f"{name} of shape {shape} is not whole: the files have its elements {edges}")
    whole = torch.empty(numel, dtype=pieces[0][1].dtype)
    for stretch, partition in pieces:
        whole[stretch.start : stretch.stop] = partition.detach()[stretch.at :][: stretch.stop - stretch.start]
    return whole.view(shape)


def _groups(
    members: list[tuple[str, Tensor]], options: dict[str, Any], by_name: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The group, divided where parameters have options of their own."""
    out: dict[str, dict[str, Any]] = {}
    for name, param in members:
        own = {**options, **by_name.get(name, {})}
        out.setdefault(repr(sorted(own.items(), key=str)), {**own, "params": []})["params"].append(
            (name, param)
        )
    return list(out.values())


def _put(module: nn.Module, name: str, tensor: Any) -> Any:
    """Register a parameter or buffer under a dotted name."""
    *path, last = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(last, tensor)
    else:
        module.register_buffer(last, tensor)
    return tensor


def _put_others(module: nn.Module, model: Mapping[str, Any]) -> None:
    for name, tensor, is_buffer in files.others(model):
        _put(module, name, tensor if is_buffer else nn.Parameter(tensor, requires_grad=False))


# ---- states -------------------------------------------------------------------------------------------


def _assemble(name: str, moments: Iterable[Moment], held: Iterable[Stretch]) -> None:
    """Fill whole moments from the ranks' stretches of them."""
    for stretch in held:
        slab = Slab.run(next(iter(moments)).slab.view.shape, stretch.start, stretch.stop)
        for moment in moments:
            for part in parts(moment.spec):
                key = state_key(moment.name, part.suffix)
                local = stretch.state.get(key)
                if local is None or tuple(local.shape) != part.local_shape(slab) or local.dtype != part.dtype:
                    got = "nothing" if local is None else f"{local.dtype} {tuple(local.shape)}"
                    raise CheckpointError(
                        f"{name}: {key} of [{stretch.start}, {stretch.stop}) is {got}, expected {part.dtype} "
                        f"{part.local_shape(slab)}"
                    )
                if slab.numel or part.role == "scalar":
                    _copy(moment, part, slab, local)


def _copy(moment: Moment, part: Part, slab: Slab, local: Tensor) -> None:
    """Put a run's tensor into the whole parameter's. Bytes, blocks and rows that a cut divides are in two
    runs: bytes have their other nibble zero, the others are the same in both."""
    whole = moment.tensors[part.suffix]
    if part.role == "scalar":
        whole.copy_(local)
    elif part.role == "cols":
        whole.view(-1).copy_(local.view(-1))
    elif part.role == "rows":
        row0, row1 = slab.row_ranges[0]
        whole.view(-1)[row0:row1] = local.view(-1)
    elif part.role == "full":
        start = slab.row_ranges[0][0] * slab.view.cols + slab.head
        whole.view(-1)[start : start + slab.numel] = local.view(-1)
    else:
        matrix, own = whole.view(slab.view.rows, -1), local.view(slab.rows, -1)
        row0 = slab.row_ranges[0][0]
        for rect in slab.rects():
            rows, units = (
                slice(row0 + rect.row0, row0 + rect.row1),
                slice(rect.col0 // part.unit, -(-rect.col1 // part.unit)),
            )
            new = own[rect.row0 : rect.row1, units]
            if part.dtype == torch.uint8 and part.unit > 1:
                matrix[rows, units] |= new
            else:
                matrix[rows, units] = new


# ---- universal checkpoints ----------------------------------------------------------------------------


def write_universal(folder: str | Path, target: str | Path, *, trusted: bool = False) -> None:
    """Turn such a checkpoint into a universal one of DeepSpeed's in ``target`` (a new directory, named by a
    tag), with the moments dequantized to fp32, for ``"checkpoint": {"load_universal": true}`` of DeepSpeed's
    AdamW (or of SGD). The name of the directory is written into "latest_universal" beside it.

    Raises CheckpointError, FileExistsError.
    """
    folder, target = Path(folder), Path(target)
    training = read_native(folder, trusted=trusted)
    zero = target / "zero"
    zero.mkdir(parents=True)
    names: dict[Tensor, str] = {param: name for name, param in training.model.named_parameters()}
    for bound in training.optimizer.bind():
        place = zero / names[bound.param]
        place.mkdir()
        torch.save({"param": bound.param.detach().float()}, place / "fp32.pt")
        for moment in bound.moments:
            values = training.optimizer.moment(bound.param, moment.name)
            torch.save({"param": values.clone()}, place / f"{moment.name}.pt")
        torch.save(bound.step.clone(), place / "step.pt")
    kept = files.ranks(folder, trusted)[0]
    sharded = ("base_optimizer_state", "param_slice_mappings", "single_partition_of_fp32_groups")
    about = {key: value for key, value in kept.items() if key not in sharded}
    foreign = ("second_moment", "first_moment", "momentum_buffer", "quantize")
    groups = kept["base_optimizer_state"]["param_groups"]
    about["param_groups"] = [{k: v for k, v in group.items() if k not in foreign} for group in groups]
    torch.save(about, zero / "optimizer_state.pt")
    for path in folder.glob("*model_states.pt"):
        shutil.copy(path, target / path.name)
    (target.parent / "latest_universal").write_text(target.name)


def read_universal(folder: str | Path, *, trusted: bool = False, **options: Any) -> Training:
    """A universal checkpoint of AdamW (what ``deepspeed.checkpoint.ds_to_universal`` wrote), its moments
    quantized once.

    options: of AdamW4bit; what is not given of lr, betas, eps and weight_decay is the checkpoint's.
    Raises CheckpointError.
    """
    folder = Path(folder)
    model, about = files.load(folder / files.MODEL, trusted), _about(folder, trusted)
    out, groups = nn.Module(), []
    states: dict[int, dict[str, Any]] = {}
    for named, saved in zip(files.shapes(model), about["param_groups"], strict=True):
        members = []
        for name, shape in named.items():
            found = _universal_state(folder / "zero" / name, shape, trusted)
            members.append((name, _put(out, name, nn.Parameter(found.pop("fp32")))))
            states[len(states)] = found
        known = {key: saved[key] for key in ("lr", "betas", "eps", "weight_decay") if key in saved}
        groups.append({"params": members, **known, **options})
    _put_others(out, model)
    optimizer = AdamW4bit(groups)
    numbers, described = iter(range(len(states))), []
    for group in optimizer.param_groups:
        described.append({"params": [next(numbers) for _ in group["params"]], "betas": group["betas"]})
    import_state(optimizer, {"state": states, "param_groups": described}, hyperparameters=False)
    return Training(out, optimizer, int(model["global_steps"]))


def _about(folder: Path, trusted: bool) -> dict[str, Any]:
    about = files.load(folder / "zero" / "optimizer_state.pt", trusted)
    if "param_groups" not in about:
        raise CheckpointError(f"{folder} is not a universal checkpoint of ZeRO stage 1 or 2")
    return about


def _universal_state(place: Path, shape: tuple[int, ...], trusted: bool) -> dict[str, Any]:
    """fp32, exp_avg, exp_avg_sq and step of one parameter."""
    out: dict[str, Any] = {}
    for key in ("fp32", "exp_avg", "exp_avg_sq"):
        tensor = files.load(place / f"{key}.pt", trusted)["param"]
        if tensor.numel() != Slab.whole(shape).view.numel:
            raise CheckpointError(f"{place}: {key} has {tensor.numel()} elements, expected shape {shape}")
        out[key] = tensor.reshape(shape).float()
    step = files.load(place / "step.pt", trusted) if (place / "step.pt").exists() else 0
    out["step"] = torch.as_tensor(float(step))
    return out
