"""The one form in the middle: named tensors with their specs, each loaded when it is asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shard4bit.cli.tables import UsageError
from shard4bit.layout import Slab
from shard4bit.optim.encode import encode
from shard4bit.reference import ReferenceBackend
from shard4bit.spec import Full, MomentSpec, is_quantized, parse_spec
from shard4bit.state import Moment, parts

CPU = torch.device("cpu")
#: moment -> the option that names its spec, and whether it is signed
MOMENTS = {
    "exp_avg": ("first_moment", True),
    "exp_avg_sq": ("second_moment", False),
    "momentum_buffer": ("momentum_buffer", True),
}
OPTIONS = ("lr", "betas", "eps", "weight_decay", "maximize", "momentum", "dampening", "nesterov")


@dataclass(frozen=True)
class Stored:
    """A moment of a whole parameter. load: gives it, on the CPU."""

    spec: MomentSpec
    load: Callable[[], Moment]


@dataclass(frozen=True)
class Entry:
    """A parameter or buffer. value: gives its tensor, of ``shape`` and ``dtype`` (None: not in the source).
    moments, step: of those that an optimizer has."""

    name: str
    shape: tuple[int, ...]
    value: Callable[[], Tensor] | None = None
    dtype: torch.dtype = torch.float32
    moments: Mapping[str, Stored] = field(default_factory=dict)
    step: int | None = None


@dataclass(frozen=True)
class Other:
    """A matrix (rows, columns) of no parameter."""

    shape: tuple[int, int]
    dtype: torch.dtype
    load: Callable[[], Tensor]


@dataclass(frozen=True)
class Package:
    """groups: ``{"parameters": names, "options": {...}}`` of each parameter group; extra: the manifest's
    JSON. others: further tensors of a canonical checkpoint by key, of ``extra`` and random numbers."""

    step: int
    entries: list[Entry]
    groups: list[dict[str, Any]]
    extra: Any = None
    others: Mapping[str, Other] = field(default_factory=dict)

    @property
    def is_sgd(self) -> bool:
        return any("momentum_buffer" in entry.moments for entry in self.entries)


def natural(name: str) -> list[Any]:
    """A key that sorts layer 10 after layer 2."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def blank(name: str, spec: MomentSpec, shape: tuple[int, ...]) -> Moment:
    """A moment of a whole parameter, of zeros."""
    return Moment.zeros(name, spec, Slab.whole(shape), CPU)


def filled(name: str, spec: MomentSpec, shape: tuple[int, ...], get: Callable[[str], Tensor]) -> Moment:
    """A moment from its tensors by suffix, of any shapes with the right numbers of elements.

    Raises ValueError for a tensor of another size or dtype.
    """
    moment = Moment(name, spec, Slab.whole(shape), {})
    for part in parts(spec):
        tensor, wanted = get(part.suffix), part.local_shape(moment.slab)
        if part.suffix == "" and tensor.is_floating_point():
            tensor = tensor.float()
        if tensor.numel() != torch.Size(wanted).numel() or tensor.dtype != part.dtype:
            raise ValueError(
                f"{name} of shape {shape}: {part.suffix or 'values'} is {tensor.dtype} "
                f"{tuple(tensor.shape)}, expected {part.dtype} {wanted}"
            )
        moment.tensors[part.suffix] = tensor.contiguous().view(wanted)
    return moment


def values(moment: Moment) -> Tensor:
    """A moment's values, float32, in the parameter's shape."""
    return ReferenceBackend().decode(moment).view(moment.slab.view.shape)


@torch.no_grad()
def _encoded(stored: Stored, name: str, spec: MomentSpec) -> Moment:
    source = stored.load()
    target = blank(name, spec, source.slab.view.shape)
    encode(target, ReferenceBackend().decode(source), (), CPU)
    return target


def restated(package: Package, states: str, options: Mapping[str, str]) -> Package:
    """The package with moments as ``states`` says: "keep", "fp32" or "4bit" (specs by ``options``; of
    tensors that the optimizer would quantize).

    Groups with quantize=False stay in fp32. A moment whose spec stays is not touched. Raises UsageError for
    specs that do not exist.
    """
    if states == "keep":
        return package
    whole = {n for g in package.groups if g["options"].get("quantize") is False for n in g["parameters"]}
    if states == "4bit" and all(whole >= set(g["parameters"]) for g in package.groups):
        whole = set()  # all in fp32: made so by a conversion, or an optimizer with quantize=False
    entries = []
    for entry in package.entries:
        moments = {}
        for name, stored in entry.moments.items():
            spec = (
                _spec(name, entry.shape, options) if states == "4bit" and entry.name not in whole else Full()
            )
            changed = Stored(spec, partial(_encoded, stored, name, spec))
            moments[name] = stored if spec == stored.spec else changed
        entries.append(replace(entry, moments=moments))
    used = {o: str(_spec(m, (4097, 2), options)) for m, (o, _) in MOMENTS.items() if m in _names(package)}
    groups = []
    for group in package.groups:
        quantize = states == "4bit" and not whole.intersection(group["parameters"])
        groups.append({**group, "options": {**group["options"], **used, "quantize": quantize}})
    return replace(package, entries=entries, groups=groups)


def _names(package: Package) -> set[str]:
    return {name for entry in package.entries for name in entry.moments}


def _spec(moment: str, shape: tuple[int, ...], options: Mapping[str, str]) -> MomentSpec:
    if not is_quantized(shape):
        return Full()
    option, signed = MOMENTS[moment]
    try:
        return parse_spec(options[option], signed=signed, argument=f"--{option.replace('_', '-')}")
    except ValueError as error:
        raise UsageError(str(error)) from None
