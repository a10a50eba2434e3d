"""The canonical tensors of a model and its optimizer, by name: what is saved, loaded and digested."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shard4bit.checkpoint.manifest import Manifest
from shard4bit.checkpoint.pieces import DTYPES, Piece, Rect
from shard4bit.errors import CheckpointError
from shard4bit.layout import Slab
from shard4bit.optim.base import Bound, QuantizedOptimizer
from shard4bit.placement import Placed, place
from shard4bit.state import Moment, Part, parts, state_key

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # torch.compile, activation checkpointing
_FULL = Part("", "full", torch.float32)


def checked_json(extra: Any) -> Any:
    try:
        return json.loads(json.dumps(extra, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"extra must be JSON: {error}") from None


class Inventory:
    """Of one rank. Raises CheckpointError for a model and an optimizer that do not belong together."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: QuantizedOptimizer | None,
        *,
        parameters: bool,
        frozen: bool,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise CheckpointError(f"expected a torch.nn.Module, got {type(model).__name__}")
        if optimizer is not None and not isinstance(optimizer, QuantizedOptimizer):
            raise CheckpointError(
                f"expected an optimizer of shard4bit, got {type(optimizer).__name__}; save others with "
                "torch.distributed.checkpoint"
            )
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        if "torch.distributed.fsdp" in sys.modules:
            from shard4bit.fsdp.model import reshard

            reshard(model)
        self.optimizer = optimizer
        self.names: dict[Tensor, str] = {p: _plain(n) for n, p in model.named_parameters()}
        self.bound: dict[str, Bound] = {}
        for bound in optimizer.bind() if optimizer is not None else []:
            if bound.param not in self.names:
                raise CheckpointError(
                    f"the optimizer has a parameter of shape {bound.shape} that is not in the model: "
                    "build the optimizer after sharding the model, with model.parameters()"
                )
            self.bound[self.names[bound.param]] = bound
        self.tensors: dict[str, tuple[Placed, Tensor]] = {}
        if parameters:
            for param, name in self.names.items():
                if frozen or param.requires_grad:
                    self.tensors[name] = (self._placed(name, param), param)
        if parameters and frozen:
            persistent = {_plain(name) for name in model.state_dict(keep_vars=True)}
            for name, buffer in model.named_buffers():
                if _plain(name) in persistent:
                    self.tensors[_plain(name)] = (place(buffer, name), buffer)
        self._copies: list[tuple[Tensor, Tensor]] = []  # live tensors that are not dense, dense copies

    def _placed(self, name: str, param: Tensor) -> Placed:
        return self.bound[name].placed if name in self.bound else place(param, name)

    def pieces(self, *, whole_units: bool) -> Iterator[Piece]:
        """This rank's pieces. ``whole_units``: with blocks that a column cut divides, which several
        ranks hold alike; otherwise they belong to the rank that has their first column."""
        for name, (placed, tensor) in self.tensors.items():
            if tensor.dtype not in DTYPES:
                raise CheckpointError(
                    f"{name} has dtype {tensor.dtype}, which a checkpoint cannot hold; register a buffer "
                    "that need not be saved with persistent=False"
                )
            yield from _pieces(f"model/{name}", placed.slab, self._dense(placed.data()), _FULL, whole_units)
        for name, bound in self.bound.items():
            for moment in bound.moments:
                for part in parts(moment.spec):
                    key = f"state/{name}/{state_key(moment.name, part.suffix)}"
                    data, slab = moment.tensors[part.suffix], bound.placed.slab
                    if part.suffix == "codes" and not whole_units:
                        data = _completed(data, bound, part.unit)
                    yield from _pieces(key, slab, data, part, whole_units)

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
        for name, (placed, _) in self.tensors.items():
            out[name] = {"shape": list(placed.slab.view.shape)}
        for name, bound in self.bound.items():
            out[name] = {
                "shape": list(bound.shape),
                "step": int(bound.step.item()),
                "moments": {m.name: str(m.spec) for m in bound.moments},
            }
        return out

    def groups(self) -> list[dict[str, Any]]:
        """Parameter names and options of the optimizer's groups, as JSON."""
        out = []
        for group in self.optimizer.param_groups if self.optimizer is not None else []:
            options = {
                key: float(value) if isinstance(value, Tensor) else value
                for key, value in group.items()
                if key not in ("params", "param_names")
            }
            names = [self.names[p] for p in group["params"] if p in self.names]
            out.append({"parameters": names, "options": checked_json(options)})
        return out

    def check_groups(self, saved: list[dict[str, Any]]) -> None:
        """Raise ValueError unless the saved groups are of our parameters and have options that we take."""
        if self.optimizer is None:
            return
        theirs = [g["parameters"] for g in saved]
        ours = [g["parameters"] for g in self.groups()]
        if theirs != ours:
            raise CheckpointError(
                f"the checkpoint has parameter groups of {[len(g) for g in theirs]} parameters, this "
                f"optimizer of {[len(g) for g in ours]} or in another order: build the same groups, or "
                "load with hyperparameters=False"
            )
        for group, other in zip(self.optimizer.param_groups, saved, strict=True):
            self.optimizer._check_group({**group, **other["options"]})

    def adopt(self, manifest: Manifest, hyperparameters: bool) -> None:
        """After the pieces were filled: take step counts and options."""
        for data, dense in self._copies:
            data.copy_(dense)
        for bound in self.bound.values():
            for moment in bound.moments:
                if "codes" in moment.tensors:
                    _clear_others(moment)
        for name, bound in self.bound.items():
            known = manifest.parameters.get(name, {})
            if "step" in known:
                bound.step.fill_(float(known["step"]))
        if self.optimizer is None or not hyperparameters:
            return
        for group, saved in zip(self.optimizer.param_groups, manifest.groups, strict=True):
            for key, value in saved["options"].items():
                if isinstance(group.get(key), Tensor):  # perhaps one that several groups share
                    group[key] = torch.full_like(group[key], value)
                else:
                    group[key] = tuple(value) if isinstance(value, list) else value


def _plain(name: str) -> str:
    """A parameter's name without the prefixes of wrappers."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _completed(codes: Tensor, bound: Bound, unit: int) -> Tensor:
    """Codes whose bytes that a column cut divides have both nibbles (a copy, if there are such bytes).
    Collective on the ranks that share them."""
    slab = bound.placed.slab
    for group, neighbours in bound.placed.neighbours:
        if neighbours.kind != "cols" or not (cut := neighbours.cut_units(slab.view, unit)):
            continue
        first, stop = slab.units(unit)
        here = [(i, byte - first) for i, byte in enumerate(cut) if first <= byte < stop]
        matrix = codes.clone().view(slab.rows, -1)
        shared = torch.zeros(len(cut), slab.rows, dtype=torch.float64, device=codes.device)
        for i, column in here:
            shared[i] = matrix[:, column].double()
        group.all_reduce(shared, maximum=False)  # the nibbles of other ranks are 0: the sum is their union
        for i, column in here:
            matrix[:, column] = shared[i].to(torch.uint8)
        codes = matrix.view(codes.shape)
    return codes


def _clear_others(moment: Moment) -> None:
    """Set nibbles that belong to other ranks to 0, after whole bytes were loaded."""
    slab, bits = moment.slab, moment.quant.bits
    if bits == 8 or slab.rows == 0 or slab.width == 0:
        return
    codes = moment.matrix("codes")
    if slab.col0 % 2:
        codes[:, 0] &= 0xF0
    if slab.col1 % 2:
        codes[:, -1] &= 0x0F


def _pieces(key: str, slab: Slab, data: Tensor, part: Part, whole_units: bool) -> Iterator[Piece]:
    """One rank's tensor of a parameter as rectangles of contiguous rows."""
    view, unit = slab.view, part.unit
    first, stop = slab.units(unit)
    if slab.flat:
        raise CheckpointError(f"{key} lies in a flat partition, which cannot be saved yet")
    if unit != 1 and not whole_units and slab.col0 % unit:
        first += 1  # the rank to the left writes the block or byte that the cut divides
    if part.role in ("full", "units"):
        shape = (view.rows, -(-view.cols // unit))
        if 0 in shape:
            yield Piece(key, shape, Rect(0, shape[0], 0, shape[1]), data.new_empty(shape))
            return
        matrix = data.reshape(slab.rows, -1) if data.numel() else data.new_empty(slab.rows, stop - first)
        matrix = matrix[:, matrix.shape[1] - (stop - first) :]
        for stored, row, count in slab.row_pieces():
            rect = Rect(row, row + count, first, stop)
            if rect.area:
                yield Piece(key, shape, rect, matrix[stored : stored + count])
    elif part.role == "rows":
        for stored, row, count in slab.row_pieces():
            rows = data.view(-1, 1)[stored : stored + count]
            yield Piece(key, (view.rows, 1), Rect(row, row + count, 0, 1), rows)
    elif part.role == "cols":
        if slab.width:
            yield Piece(key, (1, view.cols), Rect(0, 1, slab.col0, slab.col1), data.view(1, -1))
    else:
        yield Piece(key, (1, 1), Rect(0, 1, 0, 1), data.view(1, 1))
