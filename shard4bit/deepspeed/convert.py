"""Between DeepSpeed's checkpoints and a training state in one process, which ``shard4bit.save`` can write."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shard4bit.deepspeed import files, saved
from shard4bit.deepspeed.saved import Param, Saved
from shard4bit.errors import CheckpointError
from shard4bit.optim.base import QuantizedOptimizer
from shard4bit.optim.exchange import import_state
from shard4bit.optim.loading import OWN_OPTIONS
from shard4bit.reference import ReferenceBackend


@dataclass(frozen=True)
class Training:
    """A training state on the CPU. model: only parameters (fp32 masters) and buffers, by their names; step:
    the engine's count of steps."""

    model: nn.Module
    optimizer: QuantizedOptimizer
    step: int


def read_native(folder: str | Path, *, trusted: bool = False) -> Training:
    """What ``engine.save_checkpoint`` wrote into ``folder`` (the one named by the tag) at ZeRO stage 0, 1 or
    2 with our optimizer, put together. Nothing is re-quantized.

    trusted: let the files' pickles run code. Raises CheckpointError for files that are missing, or of
    another optimizer.
    """
    found = saved.native(folder, trusted=trusted)
    model, groups = _model(found)
    options: Any = [{**options, "params": p} for (options, _), p in zip(found.groups, groups, strict=True)]
    optimizer = found.kind(options)
    params = {param.name: param for param in found.params()}
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    for bound in optimizer.bind():
        param = params[names[bound.param]]
        for moment in bound.moments:
            for suffix, tensor in param.moment(moment.name).tensors.items():
                moment.tensors[suffix].copy_(tensor)
        bound.step.fill_(float(param.step))
    return Training(model, optimizer, found.step)


def read_universal(folder: str | Path, *, trusted: bool = False, **options: Any) -> Training:
    """A universal checkpoint of AdamW (what ``deepspeed.checkpoint.ds_to_universal --inject_missing_state``
    wrote), its moments quantized once.

    options: of AdamW4bit; what is not given of lr, betas, eps and weight_decay is the checkpoint's.
    Raises CheckpointError.
    """
    found = saved.universal(folder, trusted=trusted)
    model, groups = _model(found)
    given: Any = [{**own, "params": p, **options} for (own, _), p in zip(found.groups, groups, strict=True)]
    optimizer = saved.AdamW4bit(given)
    states = {number: _fp32_state(param) for number, param in enumerate(found.params())}
    numbers, described = iter(states), []
    for group in optimizer.param_groups:
        described.append({"params": [next(numbers) for _ in group["params"]], "betas": group["betas"]})
    import_state(optimizer, {"state": states, "param_groups": described}, hyperparameters=False)
    return Training(model, optimizer, found.step)


def _fp32_state(param: Param) -> dict[str, Tensor]:
    moments = {key: param.moment(key).tensors[""].view(param.shape) for key in param.specs}
    return {**moments, "step": torch.tensor(float(param.step))}


def _model(found: Saved) -> tuple[nn.Module, list[list[tuple[str, nn.Parameter]]]]:
    """Modules with what was saved, and of each group the parameters by name."""
    out = nn.Module()
    groups = [
        [(p.name, _put(out, p.name, nn.Parameter(p.value().clone()))) for p in ps] for _, ps in found.groups
    ]
    for name, tensor, is_buffer in found.others:
        own = tensor.clone()  # not the mapped file
        _put(out, name, own if is_buffer else nn.Parameter(own, requires_grad=False))
    return out, groups


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


def write_universal(
    folder: str | Path,
    target: str | Path,
    *,
    trusted: bool = False,
    each: Callable[[list[Param]], Iterable[Param]] = iter,
) -> Saved:
    """Turn a native checkpoint (see ``read_native``) into a universal one of DeepSpeed's in ``target`` (a new
    directory, named by a tag), with the moments dequantized to fp32, for ``"checkpoint": {"load_universal":
    true}`` of DeepSpeed's AdamW (or of SGD) at ZeRO stage 1 or 2. The name of the directory is written into
    "latest_universal" beside it, at the end. Memory: of the largest parameter and its moments.

    each: goes through the parameters, for a bar of progress. Returns what was found.
    Raises CheckpointError, FileExistsError.
    """
    target = Path(target)
    found = saved.native(folder, trusted=trusted)
    if target.exists():
        raise FileExistsError(f"{target} exists already")
    target.parent.mkdir(parents=True, exist_ok=True)
    hidden = target.with_name(f".{target.name}.part")
    try:
        _write_universal(found, hidden, each)
        hidden.rename(target)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    (target.parent / "latest_universal").write_text(target.name)
    return found


def _write_universal(found: Saved, folder: Path, each: Callable[[list[Param]], Iterable[Param]]) -> None:
    zero = folder / "zero"
    zero.mkdir(parents=True)
    for param in each(found.params()):
        if Path(param.name).name != param.name or param.name == "..":
            raise CheckpointError(f"{param.name!r} is no name of a parameter: the source is not DeepSpeed's")
        place = zero / param.name
        place.mkdir()
        torch.save({"param": param.value().detach().float().clone()}, place / "fp32.pt")
        for name in param.specs:
            values = ReferenceBackend().decode(param.moment(name)).view(param.shape)
            torch.save({"param": values.clone()}, place / f"{name}.pt")
        torch.save(torch.tensor(float(param.step)), place / "step.pt")
    foreign = (*OWN_OPTIONS, "param_names")
    groups = [{k: v for k, v in g.items() if k not in foreign} for g in found.shared["param_groups"]]
    torch.save({**found.shared, "param_groups": groups}, zero / "optimizer_state.pt")
    torch.save(found.model, folder / files.MODEL)
