"""One call that makes the right optimizer for an FSDP model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from shard4bit.errors import LayoutError
from shard4bit.fsdp.layout import FlatSource
from shard4bit.fsdp.model import is_fsdp1, is_fsdp2, source_of
from shard4bit.optim.base import QuantizedOptimizer
from shard4bit.optim.patterns import checked, overrides
from shard4bit.optim.validate import PARAM_DTYPES
from shard4bit.placement import Item

Opt = TypeVar("Opt", bound=QuantizedOptimizer)
Options = dict[str, Any]


def wrap(
    model: nn.Module,
    optimizer: Callable[..., Opt],
    *,
    no_decay: Sequence[str] = (),
    full_precision: Sequence[str] = (),
    **options: Any,
) -> Opt:
    """The optimizer for a model sharded by ``fully_shard`` (FSDP2) or FullyShardedDataParallel (FSDP1).

    Frozen parameters are in its groups, and take part once they are unfrozen.

    optimizer: ``AdamW4bit``, ``SGD4bit`` or another class of shard4bit; ``options`` are its own.
    no_decay, full_precision: shell patterns of parameter names ("*.bias", "*embed*") that get no weight
        decay, or fp32 moments; also of parameters inside FSDP1's flat ones.
    Raises LayoutError for a model that is not sharded; ValueError for a pattern that matches no parameter.
    """
    if not (is_fsdp1(model) or is_fsdp2(model)):
        raise LayoutError(
            "this model is not sharded: call torch.distributed.fsdp.fully_shard on it first, or build "
            "the optimizer directly from model.parameters() (one process, or DistributedDataParallel)"
        )
    # frozen ones too, which may be unfrozen later (what never can, such as packed weights, is left out)
    items = [i for i in source_of(model).parameters() if i.trainable or i.tensor.dtype in PARAM_DTYPES]
    wanted = chosen([item.name for item in items], no_decay, full_precision)
    groups, mixed = grouped(items, wanted)
    made = optimizer(groups, **options)
    if is_fsdp1(model):
        made.set_layout(FlatSource(model, {name: wanted[name] for name in mixed}).layout())
    return made


def chosen(
    names: Sequence[str], no_decay: Sequence[str], full_precision: Sequence[str]
) -> dict[str, Options]:
    """The options of each parameter by the two lists of patterns."""
    rules: dict[str, tuple[Sequence[str], Options]] = {
        "no_decay": (checked("no_decay", no_decay), {"weight_decay": 0.0}),
        "full_precision": (checked("full_precision", full_precision), {"quantize": False}),
    }
    return overrides(names, rules)


def grouped(items: Sequence[Item], wanted: dict[str, Options]) -> tuple[list[Options], list[str]]:
    """Parameter groups, with names, and the parameters whose options no group can give: they share a flat
    tensor with others of other options."""
    held: dict[Tensor, list[Item]] = {}
    for item in items:
        held.setdefault(item.tensor, []).append(item)
    groups: dict[str, tuple[Options, list[tuple[str, Tensor]]]] = {}
    mixed: list[str] = []
    for tensor, members in held.items():
        name, options = members[0].name, wanted[members[0].name]
        if any(wanted[m.name] != options for m in members):
            mixed += [m.name for m in members if wanted[m.name]]
            options = {}
        if len(members) > 1:
            name += f" and {len(members) - 1} more"
        groups.setdefault(repr(options), (options, []))[1].append((name, tensor))
    return [{"params": params, **options} for options, params in groups.values()], mixed
