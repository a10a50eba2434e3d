"""Where FSDP1 keeps parameters: pieces of flat tensors. The one file that reads private parts of FSDP
(``torch.distributed.fsdp._flat_param`` of torch 2.11 to 2.13)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from shard4bit.comm import Group, TorchGroup
from shard4bit.errors import LayoutError
from shard4bit.layout import Neighbours, Slab
from shard4bit.placement import Item, Placed, Source, plain_name
from shard4bit.state import Part


class FlatSource(Source):
    """A model with FullyShardedDataParallel modules.

    With ``use_orig_params=True`` a parameter is known by itself, otherwise by its flat parameter, which
    holds several. options: parameter name -> what of its group's options it has otherwise.
    Raises LayoutError for what cannot be described.
    """

    def __init__(self, model: nn.Module, options: Mapping[str, dict[str, Any]] | None = None) -> None:
        super().__init__(model)
        self.items: list[Item] = []
        self.handles: list[Any] = []
        self.originals: dict[Tensor, Tensor] = {}  # buffers that FSDP1 has cast, and what stands for them
        for prefix, module in model.named_modules():
            handle = module._handle if isinstance(module, FullyShardedDataParallel) else None
            if handle is not None:
                _refuse_summoned(handle)
                self.handles.append(handle)
                self.items += self._items(handle, prefix + "." if prefix else "", options or {})
        for name, param in model.named_parameters():
            if not _is_flattened(param):  # ignored by FSDP
                self.items.append(Item(self.plain(name), param, param.requires_grad))

    def _items(self, handle: Any, prefix: str, options: Mapping[str, dict[str, Any]]) -> list[Item]:
        """The original parameters of one flat parameter."""
        flat = handle.flat_param
        stops = list(accumulate(flat._numels_with_padding))
        starts = [a for a, padding in zip([0, *stops], flat._is_padding_mask, strict=False) if not padding]
        out, gradient = [], _FlatGradient(handle)
        for index, (fqn, start) in enumerate(zip(flat._fqns, starts, strict=True)):
            name = self.plain(prefix + fqn)
            place = _Place(handle, index, start, name, gradient)
            tensor = flat if flat._params is None else flat._params[index]
            out.append(Item(name, tensor, tensor.requires_grad, place.placed(options.get(name, {}))))
        return out

    def parameters(self) -> list[Item]:
        return self.items

    def persistent(self) -> list[tuple[str, Tensor]]:
        # (model.state_dict() would gather every parameter)
        out, dtypes = [], _dtypes_before_casts(self.model)
        for prefix, module in self.model.named_modules(remove_duplicate=False):
            for name, buffer in module.named_buffers(prefix, recurse=False, remove_duplicate=False):
                if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                    out.append((name, self._original(buffer, dtypes.get(buffer, buffer.dtype))))
        return out

    def _original(self, buffer: Tensor, dtype: torch.dtype) -> Tensor:
        """The buffer itself, or, if FSDP1 has cast it, a copy of ``dtype``, which ``loaded`` writes back."""
        if buffer.dtype == dtype:
            return buffer
        if buffer not in self.originals:  # (which may have several names)
            self.originals[buffer] = buffer.detach().to(dtype)
        return self.originals[buffer]

    def loaded(self) -> None:
        for buffer, original in self.originals.items():
            buffer.detach().copy_(original)
        for handle in self.handles:  # free what is still gathered of the old values
            begun = hasattr(handle.flat_param, "_local_shard")  # by a first forward
            if begun and handle.uses_sharded_strategy and not handle.needs_unshard():
                handle.reshard(True)

    def layout(self) -> Callable[[Tensor, str], list[Placed]]:
        """For ``QuantizedOptimizer.set_layout``."""
        known: dict[Tensor, list[Placed]] = {}
        for item in self.items:
            known.setdefault(item.tensor, []).append(item.placed)

        def answer(param: Tensor, name: str) -> list[Placed]:
            if param not in known:
                raise LayoutError(
                    f"{name} of shape {tuple(param.shape)} is no parameter of the model that "
                    "shard4bit.fsdp.wrap was given"
                )
            return known[param]

        return answer


def _dtypes_before_casts(model: nn.Module) -> dict[Tensor, torch.dtype]:
    """Of buffers: what they have before a first forward, which casts them if ``MixedPrecision`` has a
    buffer_dtype. (Programs load before it and save after it.)"""
    out = {}
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            known = {plain_name(name): dtype for name, dtype in module._buffer_name_to_orig_dtype.items()}
            for name, buffer in module.named_buffers():  # (an inner module comes later, and decides)
                cast = buffer.dtype == module.mixed_precision.buffer_dtype
                out[buffer] = known.get(plain_name(name), buffer.dtype) if cast else buffer.dtype
    return out


def _refuse_summoned(handle: Any) -> None:
    """Raise LayoutError inside summon_full_params, where the shards lie idle: what it shows are copies, which
    it writes over the shards at its end, and which a load would free."""
    if handle._training_state.name == "SUMMON_FULL_PARAMS":
        raise LayoutError(
            "the parameters are gathered by FSDP1's summon_full_params, which writes over their shards at "
            "its end: build the optimizer, step, save, load and digest outside of it"
        )


def _is_flattened(param: Tensor) -> bool:
    return bool(getattr(param, "_fsdp_flattened", False))


class _FlatGradient:
    """Of a flat parameter."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def check(self) -> None:
        _refuse_summoned(self.handle)

    def grad(self) -> Tensor | None:
        flat = self.handle.flat_param
        if flat.grad is not None and flat.grad.shape != flat._sharded_size:
            raise ValueError(
                f"the flat parameter of {', '.join(flat._fqns[:3])} has a gradient of shape "
                f"{tuple(flat.grad.shape)}, its shard {tuple(flat._sharded_size)}: the last backward before "
                "a step must be outside of no_sync()"
            )
        return flat.grad


class _Place:
    """One original parameter within a flat one."""

    def __init__(self, handle: Any, index: int, start: int, name: str, gradient: _FlatGradient) -> None:
        flat = handle.flat_param
        self.flat, self.name, self.shape = flat, name, tuple(flat._shapes[index])
        self.flat_gradient = gradient
        self.param = None if flat._params is None else flat._params[index]
        self.sharded = handle.uses_sharded_strategy
        self._refuse_odd(flat, index)
        length = flat._sharded_size.numel()  # of every rank's shard, padding included
        numel = Slab.whole(self.shape).view.numel
        self.neighbours: tuple[tuple[Group, Neighbours], ...] = ()
        self.slab, self.offset = Slab.whole(self.shape), start
        if self.sharded:
            edges = [min(max(k * length - start, 0), numel) for k in range(handle.world_size + 1)]
            first, stop = edges[handle.rank], edges[handle.rank + 1]
            self.slab = Slab.run(self.shape, first, stop)
            self.offset = start + first - handle.rank * length if first < stop else 0
            info = flat._shard_param_infos[index]
            assert (info.numel_in_shard or 0) == stop - first, (name, info, first, stop)
            assert first == stop or info.offset_in_shard == self.offset, (name, info, first, stop)
            group = TorchGroup(handle.process_group)
            self.neighbours = ((group, Neighbours("run", tuple(edges))),)

    def _refuse_odd(self, flat: Any, index: int) -> None:
        stride = torch.empty(self.shape, device="meta").stride()
        if not torch.empty_strided(self.shape, flat._strides[index], device="meta").is_contiguous():
            raise LayoutError(
                f"{self.name} of shape {self.shape} has strides {tuple(flat._strides[index])}, and FSDP1 "
                f"flattens it in that order: expected {stride}; make it contiguous before wrapping"
            )
        if flat._param_extensions[index] is not None:
            raise LayoutError(
                f"{self.name} is a DTensor flattened by FSDP1: use tensor parallelism with "
                "torch.distributed.fsdp.fully_shard (FSDP2)"
            )

    def placed(self, options: dict[str, Any]) -> Placed:
        return Placed(
            slab=self.slab,
            data=self._data,
            grad=self._grad,
            neighbours=self.neighbours,
            obstacle=self._obstacle,
            holder=self.param if self.slab.numel else None,
            guard=self.flat_gradient.check,
            flat=self.flat_gradient if self.param is None else None,
            at=self.offset,
            prefix="" if self.param is not None else f"{self.name}/",
            name=self.name,
            options=options,
        )

    def _data(self) -> Tensor:
        local = getattr(self.flat, "_local_shard", self.flat)  # set at the first forward
        return local.detach()[self.offset : self.offset + self.slab.numel].view(self.slab.shape)

    def _grad(self) -> Tensor | None:
        self.flat_gradient.check()
        if self.param is not None:
            grad = self.param.grad
            return grad.view(-1) if grad is not None and self.slab.numel == 0 else grad
        grad = self.flat_gradient.grad()
        return None if grad is None else grad[self.offset :][: self.slab.numel].view(self.slab.shape)

    def _obstacle(self, part: Part) -> str:
        return (
            f"{self.name} is part of a flat parameter of FSDP1 (FullyShardedDataParallel), whose "
            "optim_state_dict cannot carry packed states"
        )
