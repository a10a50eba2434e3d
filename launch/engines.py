"""What shards a model and steps its optimizer: one class an engine, all with the same few methods.

The master weights are fp32 everywhere; ``precision`` says what is computed with.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import shard4bit.fsdp
from launch import scaling
from launch.cluster import Cluster
from launch.recipe import Recipe


class Single:
    """One process; computes under autocast. The other engines change what they must.

    model, optimizer: what was built. parameters: how many the whole model has. Raises ValueError for a
    recipe that this engine cannot follow.
    """

    name = "single"
    sharded = False

    def __init__(self, recipe: Recipe, ranks: Cluster) -> None:
        self.recipe, self.ranks = recipe, ranks
        self.choice = recipe.choice
        if self.choice.engines and self.name not in self.choice.engines:
            raise ValueError(
                f"this optimizer does not work with --engine {self.name}: use one of "
                f"{', '.join(self.choice.engines)}, or adamw8bit, which works with all"
            )
        self._check_ranks()
        self.parameters = recipe.parameters()
        self.scaler: Any = None
        self.model, self.optimizer = self._build()

    # ---- what engines change ----

    def _check_ranks(self) -> None:
        if self.ranks.world_size > 1:
            raise ValueError(
                f"--engine single is for one process, not {self.ranks.world_size}: use ddp or fsdp2"
            )

    def _build(self) -> tuple[Any, Any]:
        model = self.recipe.whole(self.ranks.device)
        self.scaler = self._scaler(torch.amp.GradScaler)
        return model, self.choice.make(model.named_parameters(), **self.choice.options)

    def _scaler(self, kind: Any) -> Any:
        """fp16 loses small gradients, so the loss is scaled up for it; the other precisions need nothing."""
        return kind(self.ranks.device.type) if self.recipe.precision == "fp16" else None

    def _computing(self) -> contextlib.AbstractContextManager[Any]:
        dtype = self.recipe.dtype
        return torch.autocast(self.ranks.device.type, dtype, enabled=dtype != torch.float32)

    # ---- what the training program calls ----

    def logits(self, tokens: Tensor) -> Tensor:
        """The model's logits (batch, time, vocabulary), fp32. Collective."""
        with self._computing():
            return self.model(tokens).float()

    def backward(self, loss: Tensor) -> None:
        """Gradients of a loss: of the mean over the ranks. Collective."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self) -> None:
        """One step of the optimizer, unless fp16 has overflowed on any rank; then gradients are dropped."""
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()

    def set_lr(self, lr: float) -> None:
        """Of every parameter group."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def saved(self) -> tuple[Any, ...]:
        """The model and optimizer as shard4bit.save, load and digest take them."""
        return self.model, self.optimizer

    def own_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that holds the states."""
        return self.optimizer

    def extra(self) -> dict[str, Any]:
        """What else a checkpoint must hold, as JSON: the state of the loss scaler."""
        return {} if self.scaler is None else scaling.saved(self.scaler.state_dict())

    def restore(self, extra: Mapping[str, Any]) -> None:
        """Take up what ``extra`` of any engine returned."""
        if self.scaler is not None:
            scaling.for_torch(extra, self.scaler)


class Ddp(Single):
    """DistributedDataParallel: every rank holds all."""

    name = "ddp"

    def _check_ranks(self) -> None:
        if self.ranks.backend == "none":
            raise ValueError(
                f"--engine {self.name} needs ranks: start them with torchrun, deepspeed or mpirun "
                "(docs/launching.md)"
            )

    def _build(self) -> tuple[Any, Any]:
        model = self.recipe.whole(self.ranks.device)
        places = [self.ranks.device] if self.ranks.device.type == "cuda" else None
        self.scaler = self._scaler(torch.amp.GradScaler)  # gradients are the same on all ranks
        optimizer = self.choice.make(model.named_parameters(), **self.choice.options)
        return nn.parallel.DistributedDataParallel(model, device_ids=places), optimizer


class Fsdp2(Ddp):
    """``fully_shard``: each block and the rest, parameters as DTensors."""

    name = "fsdp2"
    sharded = True

    def _build(self) -> tuple[Any, Any]:
        model = self.recipe.empty()
        empty = any(p.is_meta for p in model.parameters())
        if not empty:
            model.to(self.ranks.device)
        mesh = init_device_mesh(self.ranks.device.type, (self.ranks.world_size,))
        mixed = self.recipe.dtype != torch.float32
        policy = MixedPrecisionPolicy(self.recipe.dtype, torch.float32) if mixed else MixedPrecisionPolicy()
        blocks: Any = model.blocks
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        # The root would stay whole after a forward without a backward, as in an evaluation.
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        if empty:
            model.to_empty(device=self.ranks.device)
            self.recipe.fill(model)
        self.scaler = self._scaler(torch.amp.GradScaler)  # of DTensors its verdict is that of all ranks
        return model, self._make_optimizer(model)

    def _make_optimizer(self, model: nn.Module) -> Any:
        if self.choice.ours:
            kind: Any = self.choice.make
            return shard4bit.fsdp.wrap(model, kind, **self.choice.options)
        return self.choice.make(model.parameters(), **self.choice.options)

    def _computing(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()  # FSDP casts


class Fsdp1(Fsdp2):
    """FullyShardedDataParallel: flat parameters of each block and of the rest."""

    name = "fsdp1"

    def _build(self) -> tuple[Any, Any]:
        model, dtype = self.recipe.empty(), self.recipe.dtype
        names = {module: name for name, module in model.named_modules()}

        def draw(module: nn.Module) -> None:
            """Give a module of the meta device memory and weights, but not the modules inside it."""
            module.to_empty(device=self.ranks.device, recurse=False)
            self.recipe.fill(module, names[module], recurse=False)

        blocks: Any = model.blocks
        mixed = MixedPrecision(param_dtype=dtype, reduce_dtype=torch.float32)
        flat = FSDP(
            model,
            auto_wrap_policy=ModuleWrapPolicy({type(blocks[0])}),
            mixed_precision=mixed if dtype != torch.float32 else None,
            param_init_fn=draw if any(p.is_meta for p in model.parameters()) else None,
            device_id=self.ranks.device,
            use_orig_params=True,
        )
        self.scaler = self._scaler(ShardedGradScaler)
        return flat, self._make_optimizer(flat)


class Zero2(Ddp):
    """DeepSpeed ZeRO stage 2. It computes, scales and steps by itself, by a configuration as in its JSON."""

    name = "zero2"
    stage = 2

    def _build(self) -> tuple[Any, Any]:
        if self.choice.json is None:
            raise ValueError(f"this optimizer has no name in DeepSpeed's configuration: --engine {self.name}")
        deepspeed = _deepspeed(self.ranks)
        model = self.recipe.whole(self.ranks.device)
        with contextlib.redirect_stdout(sys.stderr):
            engine = deepspeed.initialize(
                model=model, model_parameters=list(model.parameters()), config=self.configuration()
            )[0]
        return engine, engine.optimizer

    def configuration(self) -> dict[str, Any]:
        """What a DeepSpeed JSON file would say."""
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in self.choice.options.items()}
        if not self.choice.ours:
            options["torch_adam"] = True  # DeepSpeed's own would be compiled first
        precisions: dict[str, dict[str, Any]] = {
            "fp32": {},
            "bf16": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
            "fp16": {"fp16": {"enabled": True}},
        }
        return {
            "train_micro_batch_size_per_gpu": 1,  # not used: launch.train cuts the batch itself
            "optimizer": {"type": self.choice.json, "params": options},
            "zero_optimization": {"stage": self.stage},
            "gradient_clipping": 0.0,  # DeepSpeed 0.19 clips to 1.0 if it is not told
            "steps_per_print": 10**9,
            **precisions[self.recipe.precision],
        }

    def _computing(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss)

    def step(self) -> None:
        self.model.step()

    def saved(self) -> tuple[Any, ...]:
        return (self.model,)

    def own_optimizer(self) -> torch.optim.Optimizer:
        return self.model.basic_optimizer

    def extra(self) -> dict[str, Any]:
        if self.recipe.precision != "fp16":
            return {}
        return scaling.saved(vars(self.optimizer.loss_scaler))

    def restore(self, extra: Mapping[str, Any]) -> None:
        if self.recipe.precision == "fp16":
            scaling.for_deepspeed(extra, self.optimizer.loss_scaler)


class Zero1(Zero2):
    """DeepSpeed ZeRO stage 1."""

    name = "zero1"
    stage = 1


def _deepspeed(ranks: Cluster) -> Any:
    """The module, with shard4bit's optimizers known to it. Raises ValueError where it is not installed."""
    if ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError:
        raise ValueError(
            "--engine zero1 and zero2 need DeepSpeed: DS_BUILD_OPS=0 pip install deepspeed==0.19.8"
        ) from None
    import shard4bit.deepspeed  # noqa: F401

    deepspeed.utils.logger.setLevel(logging.WARNING)
    if ranks.device.type == "cpu":
        deepspeed.ops.__compatible_ops__ = {}  # its collectives for CPUs would be compiled first: use gloo's
    deepspeed.init_distributed(
        dist_backend=ranks.backend, verbose=False
    )  # over the process group that is there
    return deepspeed


ENGINES: Mapping[str, type[Single]] = {
    engine.name: engine for engine in (Single, Ddp, Fsdp1, Fsdp2, Zero1, Zero2)
}


def build(name: str, recipe: Recipe, ranks: Cluster) -> Single:
    """The engine called ``name``; "auto" is fsdp2 where there are ranks, and single otherwise."""
    if name == "auto":
        name = "single" if ranks.backend == "none" else "fsdp2"
    return ENGINES[name](recipe, ranks)
