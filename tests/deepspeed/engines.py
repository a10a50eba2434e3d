"""Engines of real DeepSpeed on gloo, with gradients that are known: for functions that run in test pools."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shard4bit.state import Moment, state_key
from tests import simulate
from tests.fsdp import models
from tests.fsdp.models import ADAMW, SGD, SHAPES, Arrays, Zoo

HAVE = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(
    not HAVE, reason="needs DeepSpeed, which is not installed; 'make env' installs it"
)

#: precision -> what the configuration says
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}},
    "bf16+fp32": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "bf16 masters": {
        "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    },
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 0, "hysteresis": 1}},
}

#: known versions of DeepSpeed without what the newest one has
OLD = HAVE and tuple(map(int, version("deepspeed").split(".")[:2])) < (0, 19)


def has(stage: int, precision: str, **zero: Any) -> bool:
    """Whether the installed DeepSpeed has such a configuration."""
    missing = (
        precision == "bf16 masters" or "parameter_alignment" in zero or (stage == 0 and precision == "bf16")
    )
    return not (OLD and missing)


def needs(options: dict[str, Any]) -> None:
    """Skip a test whose options of ``config`` the installed DeepSpeed does not have (and does not refuse)."""
    if not has(options["stage"], options.get("precision", "fp32"), **options.get("zero", {})):
        pytest.skip(f"DeepSpeed {version('deepspeed')} lacks this configuration, which 0.19 has")


def entry(kind: str, **options: Any) -> dict[str, Any]:
    """The "optimizer" of a configuration: "sgd" or the name of a second moment."""
    if kind == "sgd":
        return {"type": "SGD4bit", "params": {**SGD, **options}}
    own = {**ADAMW, "betas": list(ADAMW["betas"]), "second_moment": kind, **options}
    return {"type": "AdamW4bit", "params": own}


def config(stage: int, kind: str = "rank1", precision: str = "fp32", **more: Any) -> dict[str, Any]:
    """A configuration as a JSON would give it; zero: what else "zero_optimization" says."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": entry(kind),
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 40_000, **more.pop("zero", {})},
        "gradient_clipping": 0.0,  # DeepSpeed 0.19 clips to 1.0 if it is not told
        "steps_per_print": 10**9,
        **PRECISIONS[precision],
        **more,
    }


def deepspeed() -> Any:
    """The module, without the operators that it would compile, and with shard4bit attached."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    import deepspeed as module

    import shard4bit.deepspeed  # noqa: F401

    module.ops.__compatible_ops__ = defaultdict(
        bool
    )  # gloo's collectives instead of some that need a compiler
    module.utils.logger.setLevel(logging.ERROR)
    module.get_accelerator().is_fp16_supported = lambda: True  # torch's CPU operators are good enough here
    if not module.comm.is_initialized():
        module.init_distributed("gloo", verbose=False)
    return module


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what DeepSpeed prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def engine_of(model: nn.Module, settings: dict[str, Any], **more: Any) -> Any:
    if "optimizer" not in more:
        more.setdefault("model_parameters", list(model.parameters()))
    with quiet():
        return deepspeed().initialize(model=model, config=settings, **more)[0]


# ---- known gradients --------------------------------------------------------------------------------


class Known(Zoo):
    """A Zoo whose loss has exactly the gradients of ``models.gradient``."""

    def forward(self, step: int) -> Tensor:
        named = list(self.named_parameters())
        whole = {n: models.gradient(n, tuple(p.shape), step).to(p.device) for n, p in named}
        return torch.stack([(p.float() * whole[n]).sum() for n, p in named]).sum()


def rounded(precision: str) -> torch.dtype:
    """What the gradients and the model's parameters are rounded to."""
    return {"fp32": torch.float32, "fp16": torch.float16}.get(precision, torch.bfloat16)


def train(engine: Any, steps: int, first: int = 1) -> None:
    """Steps with known gradients, rounded to the precision of the model.

    Their mean over 2 or 4 ranks is exact, but for subnormal numbers of fp16; else they are written into
    what the optimizer is about to use.
    """
    dtype = next(iter(engine.module.parameters())).dtype
    exact = dist.get_world_size() in (1, 2, 4) and dtype != torch.float16
    for step in range(first, first + steps):
        hook = None if exact else engine.basic_optimizer.register_step_pre_hook(forcing(step, dtype))
        engine.backward(engine(step))
        engine.step()
        if hook is not None:
            hook.remove()


def forcing(step: int, dtype: torch.dtype = torch.float32) -> Any:
    """A hook that writes the known gradients."""

    def hook(optimizer: Any, *_: Any) -> None:
        for bound in optimizer.bind():
            slab, grad = bound.placed.slab, bound.placed.grad()
            if slab.numel:
                start = slab.row_ranges[0][0] * slab.view.cols + slab.head
                whole = models.gradient(bound.placed.name, slab.view.shape, step).reshape(-1).to(dtype)
                grad.copy_(whole[start : start + slab.numel].view(grad.shape))

    return hook


# ---- canonical tensors ------------------------------------------------------------------------------


def parts(engine: Any) -> list[tuple[str, Any, Any, dict[str, Any], float]]:
    """Of this rank and each parameter: name, slab, elements, tensors of each moment, step count."""
    out = []
    for bound in engine.basic_optimizer.bind():
        moments = {
            m.name: (m.spec, {k: v.numpy().copy() for k, v in m.tensors.items()}) for m in bound.moments
        }
        data = bound.placed.data().float().numpy().copy()
        out.append((bound.placed.name, bound.placed.slab, data, moments, float(bound.step)))
    return out


def whole(ranks: list[list[tuple[str, Any, Any, dict[str, Any], float]]], shapes: Any = SHAPES) -> Arrays:
    """Canonical tensors, as ``models.canonical`` names them, from the parts of all ranks."""
    out: Arrays = {}
    for name, shape in shapes.items():
        found = [next(part for part in rank if part[0] == name) for rank in ranks]
        flat = np.full(int(np.prod(shape)), np.nan, np.float32)
        members: list[Any] = []
        for _, slab, data, moments, step in found:
            start = slab.row_ranges[0][0] * slab.view.cols + slab.head if slab.numel else 0
            flat[start : start + slab.numel] = data.reshape(-1)
            tensors = {m: {k: torch.from_numpy(v) for k, v in t.items()} for m, (_, t) in moments.items()}
            list_of = [Moment(m, spec, slab, tensors[m]) for m, (spec, _) in moments.items()]
            members.append(SimpleNamespace(slab=slab, moments=list_of))
            assert out.setdefault(f"state/{name}/step", np.float32(step)) == step, (name, step)
        out[f"model/{name}"] = flat.reshape(shape)
        for moment, (_, held) in found[0][3].items():
            for suffix in held:
                key = state_key(moment, suffix)
                out[f"state/{name}/{key}"] = simulate.assemble(members, key).numpy()
    return out


def reference(kind: str, steps: int, precision: str = "fp32") -> Arrays:
    """The run of one process with the weights and gradients that an engine of this precision has."""
    dtype = rounded(precision)
    model = Zoo(dtype=dtype if precision == "bf16 masters" else torch.float32)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(param.to(dtype))
    optimizer = models.optimizer_of(kind, model.parameters())
    for step in range(1, steps + 1):
        for name, param in model.named_parameters():
            param.grad = models.gradient(name, tuple(param.shape), step).to(dtype).to(param.dtype)
        optimizer.step()
    return models.canonical(model.float(), optimizer)


def same(found: Arrays, expected: Arrays, where: Any) -> None:
    """Equal names and bits; codes and statistics in any number of dimensions."""
    models.same({k: v.reshape(expected[k].shape) for k, v in found.items()}, expected, where)
