"""Meeting DeepSpeed's engines: what they need to know of our optimizers, and what we refuse of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from shard4bit.deepspeed import layout, scaling, versions
from shard4bit.deepspeed.layout import EngineLayout
from shard4bit.errors import LayoutError
from shard4bit.optim import patterns
from shard4bit.optim.adamw import AdamW4bit
from shard4bit.optim.base import QuantizedOptimizer
from shard4bit.optim.sgd import SGD4bit

#: of optimizers with name patterns: argument -> (patterns, the options that they stand for)
rules_of: WeakKeyDictionary[QuantizedOptimizer, Mapping[str, Any]] = WeakKeyDictionary()
_layouts: WeakKeyDictionary[Any, EngineLayout] = WeakKeyDictionary()
_pending: WeakKeyDictionary[QuantizedOptimizer, dict[str, dict[str, Any]]] = WeakKeyDictionary()


def install() -> None:
    """Make DeepSpeed take our optimizers. Idempotent.

    Raises ImportError without DeepSpeed, LayoutError for one whose insides are not as expected.
    """
    try:
        import deepspeed  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(f'{error}; DeepSpeed comes with pip install "shard4bit[deepspeed]"') from error
    for kind in (AdamW4bit, SGD4bit):
        layout.accept(kind)
    layout.attach(_prepare, _building, _finish, _scaling)


def layout_of(engine: Any) -> EngineLayout:
    """Where an engine keeps its parameters. Raises LayoutError if it was not met at its initialization."""
    found = _layouts.get(engine)
    if found is None:
        raise LayoutError(
            "this DeepSpeed engine has no optimizer of shard4bit, or was initialized before shard4bit was "
            "imported: name AdamW4bit in its configuration, or import shard4bit.deepspeed before "
            "deepspeed.initialize"
        )
    return found


def optimizer_of(engine: Any) -> QuantizedOptimizer:
    """Our optimizer of an engine. Raises LayoutError if it has none."""
    layout_of(engine)
    return versions.read(engine, "basic_optimizer")


def engines() -> list[Any]:
    """The live engines with an optimizer of ours."""
    return list(_layouts)


# ---- initialize -------------------------------------------------------------------------------------


def _prepare(engine: Any, optimizer: Any) -> None:
    """Before DeepSpeed builds its own optimizer around ours."""
    if not isinstance(optimizer, QuantizedOptimizer):
        return
    refuse(engine, optimizer)
    names = layout.names_of(engine)
    members = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    layout.accept(type(optimizer))
    _pending[optimizer] = patterns.overrides([names[p] for p in members], rules_of.get(optimizer, {}))


@contextmanager
def _building(optimizer: Any) -> Iterator[None]:
    """Steps of ours do nothing while DeepSpeed builds its own optimizer: at stage 0 with bf16 or fp16 it
    makes one with zero gradients then, which would decay the weights and count."""
    if not isinstance(optimizer, QuantizedOptimizer):
        yield
        return
    earlier = vars(optimizer).get("step")  # of a learning-rate scheduler, if any
    optimizer.step = lambda closure=None: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        if earlier is None:
            del optimizer.step
        else:
            optimizer.step = earlier  # type: ignore[method-assign]


def _finish(engine: Any) -> None:
    """When that is built."""
    if not _pending:
        return
    optimizer = versions.read(engine, "basic_optimizer")
    if isinstance(optimizer, QuantizedOptimizer) and optimizer in _pending:
        found = layout.engine_layout(engine, optimizer, _pending.pop(optimizer))
        optimizer.set_layout(found.place)
        _layouts[engine] = found
        own = {p.name: dict(p.options) for held in found.held.values() for p in held if p.options}
        whole = all(placed.prefix == "" for held in found.held.values() for placed in held)

        def described(ours: Any, state: dict[str, Any]) -> dict[str, Any]:
            """With what reading the file without an engine needs. (In a partition, keys have the names.)"""
            names = [[found.held[p][0].name for p in group["params"]] for group in ours.param_groups]
            return {**state, **({"by_name": own} if own else {}), **({"names": names} if whole else {})}

        optimizer.register_state_dict_post_hook(described)


@contextmanager
def _scaling(engine: Any, loss: Any, factor: Callable[[], float]) -> Iterator[None]:
    """Around ``engine.backward``."""
    if engine not in _layouts:
        yield
        return
    with scaling.scaled(engine, loss, factor):
        yield


# ---- what is refused --------------------------------------------------------------------------------


def refuse(engine: Any, optimizer: QuantizedOptimizer) -> None:
    """Raise LayoutError for configurations in which 4-bit states would be wrong, slow or unsavable."""
    for applies, what, instead in _refusals(engine, optimizer):
        if applies:
            raise LayoutError(f"{type(optimizer).__name__} does not work with {what}: {instead}")
    names = layout.names_of(engine)
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param not in names:
                raise LayoutError(
                    f"the optimizer has a parameter of shape {tuple(param.shape)} that is not the model's: "
                    "give deepspeed.initialize the model's own parameters"
                )


def _refusals(engine: Any, optimizer: QuantizedOptimizer) -> list[tuple[bool, str, str]]:
    """(whether it applies, what it is, what to do instead)."""

    def asked(name: str) -> Any:
        return versions.read(engine, name)()

    offload = asked("zero_offload_optimizer")
    device = "none" if offload is None else versions.read(offload, "device")
    autocast = versions.later(engine, "torch_autocast_enabled", bool)()
    return [
        (
            asked("zero_optimization_stage") >= 3,
            "ZeRO stage 3, which hides the shapes of the parameters",
            'use "stage": 2, or torch.distributed.fsdp.fully_shard (FSDP2) with shard4bit.fsdp.wrap',
        ),
        (
            bool(versions.later(engine, "zenflow", False)),
            "ZenFlow, which steps parts of the parameters on its own",
            'leave "zenflow" out of "zero_optimization"',
        ),
        (
            str(getattr(device, "value", device)) != "none",
            f"offload_optimizer to {getattr(device, 'value', device)}",
            'leave "offload_optimizer" out: 4-bit states take about a byte per parameter and stay on the GPU',
        ),
        (
            bool(asked("zero_elastic_checkpoint")),
            "elastic_checkpoint, which would cut packed states as if they were flat",
            'leave "elastic_checkpoint" out; shard4bit.save and shard4bit.load change the number of ranks',
        ),
        (
            bool(asked("load_universal_checkpoint")),
            '"load_universal", which gives the optimizer fp32 moments',
            "leave it out; shard4bit.save and shard4bit.load change the number of ranks",
        ),
        (
            bool(versions.read(engine, "has_moe_layers"))
            or any(g.get("moe") for g in optimizer.param_groups),
            "mixture-of-experts layers of DeepSpeed, whose experts differ between ranks",
            "use torch.distributed.fsdp.fully_shard (FSDP2) for such models",
        ),
        (
            bool(versions.read(engine, "pipeline_parallelism")),
            "pipeline parallelism",
            "use ZeRO stage 1 or 2 without PipelineModule",
        ),
        (
            _tensor_parallel(engine),
            "tensor parallelism of DeepSpeed (mpu, autotp_size), where a parameter is not whole",
            "use ZeRO alone, or DTensors with torch.distributed.fsdp.fully_shard (FSDP2)",
        ),
        (
            bool(autocast) and asked("torch_autocast_dtype") == torch.float16,
            "torch_autocast in float16, whose gradient scaler skips steps on single ranks",
            'use bfloat16 there, or "fp16": {"enabled": true}',
        ),
    ]


def _tensor_parallel(engine: Any) -> bool:
    sizes = versions.read(engine, "mp_world_size"), versions.later(engine, "autotp_size", int)()
    return any(size > 1 for size in sizes)
