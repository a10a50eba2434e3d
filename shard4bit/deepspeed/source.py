"""A DeepSpeed engine as checkpoints see it: the optimizer's own weights (fp32 masters, where it has some) by
the names of the model's parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from shard4bit.deepspeed import layout, versions
from shard4bit.deepspeed.attach import engines, layout_of, optimizer_of
from shard4bit.errors import CheckpointError
from shard4bit.optim.base import QuantizedOptimizer
from shard4bit.placement import Item, Source, plain_name


def of(engine: Any) -> tuple[Source, QuantizedOptimizer]:
    """The engine's parameters and our optimizer. Raises LayoutError if it has none of ours."""
    return ZeroSource(engine), optimizer_of(engine)


def refuse_parts(model: Any, optimizer: QuantizedOptimizer | None) -> None:
    """Raise CheckpointError for an engine's module or optimizer in place of the engine: what is read into
    them does not reach the engine's other copy of the weights, which wins at its next step."""
    known = engines()
    given = set(model.parameters()) if isinstance(model, nn.Module) and model not in known else set()
    for engine in known:
        if model is engine:
            continue
        theirs = optimizer is not None and optimizer is optimizer_of(engine)
        if theirs or not given.isdisjoint(layout.names_of(engine)):
            raise CheckpointError(
                f"the {'optimizer' if theirs else 'model'} belongs to a DeepSpeed engine, which has its own "
                "weights: give the engine alone, load(path, engine). Weights alone are loaded into the model "
                "before deepspeed.initialize"
            )


class ZeroSource(Source):
    """Of one engine."""

    def __init__(self, engine: Any) -> None:
        super().__init__(versions.read(engine, "module"))
        self.engine, self.layout = engine, layout_of(engine)

    def parameters(self) -> list[Item]:
        out = []
        for full_name, param in self.model.named_parameters():
            name = plain_name(full_name)
            tensor: Tensor | None = self.layout.tensors.get(name)
            if tensor is None:  # frozen, or not given to the optimizer: whole on every rank
                out.append(Item(name, param, param.requires_grad))
            else:
                trainable = param.requires_grad or tensor is not param
                out.append(Item(name, tensor, trainable, self.layout.placed(name)))
        return out

    def loaded(self) -> None:
        """Bring the weights that were read into the model's parameters. Collective."""
        layout.publish(versions.read(self.engine, "optimizer"), optimizer_of(self.engine))
