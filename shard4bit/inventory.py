"""The canonical tensors of a model and its optimizer, by name: what is saved, loaded and digested."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shard4bit.checkpoint.manifest import Manifest
from shard4bit.checkpoint.pieces import DTYPES, Piece
from shard4bit.errors import CheckpointError
from shard4bit.log import log
from shard4bit.optim.base import QuantizedOptimizer
from shard4bit.optim.bound import Bound
from shard4bit.optim.loading import RUN_OPTIONS
from shard4bit.placement import Placed, Source, place
from shard4bit.rectangles import clear_others, completed, rectangles
from shard4bit.state import Part, parts, state_key

Options = dict[str, Any]
_warned: set[str] = set()  # modules whose extra state was said to be left out
_FULL = Part("", "full", torch.float32)


def _storable(value: Any, where: str) -> Any:
    """An option as JSON: numbers of any sort and tensors of one element as plain numbers."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, str):
        return str.__str__(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    if isinstance(value, list | tuple):
        return [_storable(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str.__str__(k): _storable(v, f"{where}[{k!r}]") for k, v in value.items()}
    raise CheckpointError(
        f"a checkpoint cannot hold the option {where}={str(value)[:100]} of type {type(value).__name__}: "
        "expected finite numbers, strings, None, and lists or maps by strings of these; convert it, or keep "
        "it outside of the optimizer's param_groups"
    )


def some(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _overlaps(data: Tensor) -> bool:
    """Whether elements share memory (or interleave in a way that no ordinary view does)."""
    reach = 0
    for stride, size in sorted((t, n) for t, n in zip(data.stride(), data.shape, strict=True) if n > 1):
        if stride <= reach:
            return data.numel() > 0
        reach += stride * (size - 1)
    return False


def _source(model: Any, optimizer: QuantizedOptimizer | None) -> tuple[Source, QuantizedOptimizer | None]:
    """The model as its engine sees it, and the optimizer."""
    engine = getattr(sys.modules.get("deepspeed"), "DeepSpeedEngine", None)
    if isinstance(engine, type) and isinstance(model, engine):
        from shard4bit.deepspeed import source as zero

        return zero.of(model)
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if "torch.distributed.fsdp" in sys.modules:
        from shard4bit.fsdp.model import source_of

        return source_of(model), optimizer
    return Source(model), optimizer


class Inventory:
    """Of one rank. Raises CheckpointError for a model and an optimizer that do not belong together."""

    def __init__(
        self,
        model: Any,
        optimizer: QuantizedOptimizer | None,
        *,
        parameters: bool,
        frozen: bool,
    ) -> None:
        if optimizer is not None and not isinstance(optimizer, QuantizedOptimizer):
            raise CheckpointError(
                f"expected an optimizer of shard4bit, got {type(optimizer).__name__}; save others with "
                "torch.distributed.checkpoint"
            )
        self.source, self.optimizer = _source(model, optimizer)
        items = self.source.parameters()
        names = {item.tensor: item.name for item in items}
        self.bound: dict[str, Bound] = {}
        self.names: dict[Tensor, list[str]] = {}  # of the parameters that a tensor in the groups holds
        for bound in self.optimizer.bind() if self.optimizer is not None else []:
            name = bound.placed.name or names.get(bound.param)
            if name is None or bound.param not in names:  # (a name may be another model's)
                raise CheckpointError(
                    f"the optimizer has a parameter of shape {bound.shape} that is not in the model: "
                    "build the optimizer after sharding the model, with model.parameters()"
                )
            self.bound[name] = bound
            self.names.setdefault(bound.param, []).append(name)
        self.tensors: dict[str, Placed] = {}
        self.aliases: set[str] = set()  # further names of buffers that are in ``tensors``
        if parameters:
            for item in items:
                if frozen or item.trainable:
                    bound_to = self.bound.get(item.name)
                    self.tensors[item.name] = item.placed if bound_to is None else bound_to.placed
        if parameters and frozen:
            for buffer, (name, *others) in self.source.buffers().items():
                self.tensors[name] = place(buffer, name)
                self.aliases |= set(others)
        self._copies: list[tuple[Tensor, Tensor]] = []  # live tensors that are not dense, dense copies

    def pieces(self, *, whole_units: bool) -> Iterator[Piece]:
        """This rank's pieces. ``whole_units``: with blocks that a column cut divides, which several
        ranks hold alike; otherwise they belong to the rank that has their first column."""
        for name, placed in self.tensors.items():
            data = placed.data()
            if data.dtype not in DTYPES:
                raise CheckpointError(
                    f"{name} has dtype {data.dtype}, which a checkpoint cannot hold; register a buffer "
                    "that need not be saved with persistent=False"
                )
            yield from rectangles(f"model/{name}", placed.slab, self._dense(data), _FULL, whole_units)
        for name, bound in self.bound.items():
            for moment in bound.moments:
                for part in parts(moment.spec):
                    key = f"state/{name}/{state_key(moment.name, part.suffix)}"
                    data, slab = moment.tensors[part.suffix], bound.placed.slab
                    if part.suffix == "codes" and not whole_units:
                        data = completed(data, bound.placed, part.unit)
                    yield from rectangles(key, slab, data, part, whole_units)

    def check_memory(self) -> None:
        """Raise CheckpointError for tensors that could not be filled from a checkpoint."""
        for name, placed in self.tensors.items():
            data = placed.data()
            if _overlaps(data):
                raise CheckpointError(
                    f"{name} of shape {tuple(data.shape)} and strides {data.stride()} has elements that "
                    "share memory, as expand() makes them, and cannot be loaded: register a clone() of it, "
                    "or a buffer with persistent=False"
                )

    def warn_of_extra_states(self) -> None:
        """Name, once, the modules whose ``get_extra_state`` a checkpoint leaves out."""
        own = nn.Module.get_extra_state
        modules = self.source.model.named_modules()
        names = [name or "the model" for name, m in modules if type(m).get_extra_state is not own]
        names = [name for name in map(self.source.plain, names) if name not in _warned]
        if names:
            _warned.update(names)
            log.warning(
                "a checkpoint leaves out what get_extra_state() of modules gives: %s; save it in extra and "
                "give it to set_extra_state() after load",
                some(names),
            )

    def _dense(self, data: Tensor) -> Tensor:
        """The tensor itself if it is contiguous, else a copy, which ``adopt`` writes back."""
        if data.is_contiguous():
            return data
        self._copies.append((data, data.contiguous()))
        return self._copies[-1][1]

    def keys(self) -> set[str]:
        """All tensors, also those of which this rank holds nothing."""
        keys = {f"model/{name}" for name in self.tensors}
        for name, bound in self.bound.items():
            for moment in bound.moments:
                keys |= {f"state/{name}/{state_key(moment.name, p.suffix)}" for p in parts(moment.spec)}
        return keys

    def facts(self) -> dict[str, Any]:
        """Per parameter or buffer: shape, and of quantized ones the step count and the moments' specs."""
        out: dict[str, Any] = {}
        for name, placed in self.tensors.items():
            out[name] = {"shape": list(placed.slab.view.shape)}
        for name, bound in self.bound.items():
            out[name] = {
                "shape": list(bound.shape),
                "step": int(bound.step.item()),
                "moments": {m.name: str(m.spec) for m in bound.moments},
            }
        return out

    def _groups(self) -> list[tuple[Options, Options, list[str]]]:
        """(group of the optimizer, what its parameters have otherwise, their names); a group whose flat
        tensors hold parameters of several options counts as several."""
        out = []
        for group in self.optimizer.param_groups if self.optimizer is not None else []:
            kinds: dict[str, tuple[dict[str, Any], list[str]]] = {}
            for name in (n for p in group["params"] for n in self.names.get(p, ())):
                options = self.bound[name].placed.options
                kinds.setdefault(repr(sorted(options.items())), (options, []))[1].append(name)
            out += [(group, *kind) for kind in kinds.values()] or [(group, {}, [])]
        return out

    def groups(self) -> list[dict[str, Any]]:
        """Parameter names and options of the optimizer's groups, as JSON. What was split off a group of flat
        tensors joins a group of equal options: other layouts have them in one."""
        out: list[tuple[bool, dict[str, Any]]] = []
        places = {id(g): i for i, g in enumerate(self.optimizer.param_groups if self.optimizer else [])}
        for group, own, names in self._groups():
            options = {
                key: _storable(value, f"param_groups[{places[id(group)]}][{key!r}]")
                for key, value in {**group, **own}.items()
                if key not in ("params", "param_names", *RUN_OPTIONS)
            }
            made = {"parameters": names, "options": options}
            alike = (e for split, e in out if (own or split) and e["options"] == made["options"])
            known = next(alike, None) if names else None
            if known is None:
                out.append((bool(own), made))
            else:
                known["parameters"] += names
        return [made for _, made in out]

    def _paired(self, saved: list[dict[str, Any]]) -> list[tuple[Options, Options, Options]]:
        """(group, what its parameters have otherwise, saved options). The order of groups and parameters is
        not compared, nor how flat tensors split groups and what joins saved ones of equal options: engines
        that flatten have their own."""
        ours, out = self._groups(), []
        number = {name: i for i, s in enumerate(saved) for name in s["parameters"]}
        empty = [s["options"] for s in saved if not s["parameters"]]
        taken: set[int | None] = set()  # saved groups whose parameters are in one of ours, not split off it
        fit = set(number) == {name for *_, names in ours for name in names}
        for group, own, names in ours:
            found = {number.get(name) for name in names}
            options = [saved[i]["options"] for i in found if i is not None]
            fit = fit and all(o == options[0] for o in options) and (bool(own) or not found & taken)
            taken |= set() if own else found
            if not names and empty:  # (of frozen parameters)
                options = [min(empty, key=lambda o: sum(bool(group.get(k) != v) for k, v in o.items()))]
                empty.remove(options[0])
            out += [(group, own, o) for o in options[:1]]
        if not fit:
            raise CheckpointError(
                f"the checkpoint has parameter groups of {[len(g['parameters']) for g in saved]} "
                f"parameters, this optimizer of {[len(n) for _, _, n in ours]} or of others: build the "
                "same groups, or load with hyperparameters=False"
            )
        return out

    def check_groups(self, saved: list[dict[str, Any]]) -> None:
        """Raise ValueError unless the saved groups are of our parameters and have options that we take."""
        if self.optimizer is None:
            return
        seen: dict[int, dict[str, Any]] = {}
        for group, own, options in self._paired(saved):
            self.optimizer._check_group({**group, **options})
            shared, known = {k: v for k, v in options.items() if k not in own}, seen.setdefault(id(group), {})
            if any(known.setdefault(key, value) != value for key, value in shared.items()):
                raise CheckpointError(
                    "the checkpoint has parameters of different options that this model keeps in one flat "
                    "parameter; load with hyperparameters=False"
                )

    def adopt(self, manifest: Manifest, hyperparameters: bool) -> None:
        """After the pieces were filled: take step counts and options."""
        for data, dense in self._copies:
            data.copy_(dense)
        for bound in self.bound.values():
            for moment in bound.moments:
                if "codes" in moment.tensors:
                    clear_others(moment)
        for name, bound in self.bound.items():
            known = manifest.parameters.get(name, {})
            if "step" in known:
                bound.step.fill_(float(known["step"]))
        self.source.loaded()
        if self.optimizer is None or not hyperparameters:
            return
        for group, own, options in self._paired(manifest.groups):
            for key, value in options.items():
                target = own if key in own else group
                if isinstance(target.get(key), Tensor):  # perhaps one that several groups share
                    target[key] = torch.full_like(target[key], value)
                else:
                    target[key] = tuple(value) if isinstance(value, list) else value
