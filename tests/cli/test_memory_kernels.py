"""What is planned beside states, against what the kernel back end and the reduction really make (on the CPU,
with kernels that do nothing): to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import shard4bit
from benchmarks.step_host import Silent
from shard4bit.cli.models import Model, Param, from_config
from shard4bit.cli.plan import of_optimizer, usage
from shard4bit.cli.shards import Setup, held
from shard4bit.cuda.backend import KernelBackend
from shard4bit.maths.mapping import codec
from shard4bit.spec import QuantSpec
from tests.cli.helpers import Layer, bytes_of, give_gradients, module_of, optimizer_of
from tests.cli.test_memory import QUANTIZED, config
from tests.covering import covering
from tests.cuda.runtime import served_by
from tests.deepspeed import engines
from tests.fsdp.models import mesh_of
from tests.pool import pool

#: rows and columns beside tiles of 256 and of 4,096, blocks of 128, packs of four; vectors and small matrices
SHAPES = [(33, 640), (300, 5001), (4100, 2), (1, 5000), (2, 5, 7, 60), (513, 769), (64, 64), (77,), (20000,)]


def kept_by(optimizer: Any) -> int:
    """Bytes that a step of an optimizer leaves on the device, states and gradients not counted."""
    backend = KernelBackend(Silent())
    with served_by(backend):
        optimizer.step()
    plan = optimizer._plan()
    tensors = [backend.code_tables]
    for _, works in plan.batches:
        batches, others = works.cache["kernels"]
        for batch in batches:
            tensors += [*batch.keep, *(at for at, _ in batch.tiles.values()), batch.slabs_at, batch.live_at]
        specs = {m.spec for work in others for m in work.moments if isinstance(m.spec, QuantSpec)}
        codecs = [codec(spec, torch.device("cpu")) for spec in specs]
        tensors += [t for found in codecs for t in (found.values, found.mids)]
        tensors += [t for work in others for fresh in work.fresh for t in fresh.values()]
    for group in plan.reduction.groups:
        tensors += [group.maxima.values, group.sums.values]
    return bytes_of(tensors)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return from_config(config(tmp_path_factory.mktemp("config")))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_one_process(name: str, dtype: str) -> None:
    params = tuple(Param(f"p{i}.weight", shape) for i, shape in enumerate([*SHAPES, *SHAPES[:3]]))
    whole = Model("", params)
    module = module_of(whole, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    give_gradients(module)
    found = kept_by(optimizer_of(module.parameters(), QUANTIZED[name]))
    assert usage(whole, Setup("single", param=dtype), QUANTIZED[name]).kernels == found


@pytest.mark.parametrize("name, shape", covering(QUANTIZED, SHAPES), ids=str)
def test_one_parameter(name: str, shape: tuple[int, ...]) -> None:
    whole = Model("", (Param("p", shape),))
    module = module_of(whole)
    give_gradients(module)
    found = kept_by(optimizer_of(module.parameters(), QUANTIZED[name]))
    quantized = len(shape) > 1 and torch.Size(shape).numel() > 4096
    unused = 2 * 4 * 511 if "8-bit" in name and not quantized else 0  # the maps of 8 bits
    assert usage(whole, Setup("single"), QUANTIZED[name]).kernels == found + unused


def test_torchs_own_keeps_nothing(model: Model) -> None:
    assert usage(model, Setup("single"), None).kernels == 0


# ---- ranks ------------------------------------------------------------------------------------------


def planned(model: Model, setup: Setup, moments: Any) -> list[int]:
    return [sum(of_optimizer(own, moments)[1].values()) for own in held(model, setup)]


def on_fsdp2(model: Model, kinds: list[Any]) -> list[int]:
    out = []
    for moments in kinds:
        module, mesh = module_of(model), mesh_of(torch.distributed.get_world_size())
        for part in module.modules():
            if isinstance(part, Layer):
                fully_shard(part, mesh=mesh)
        fully_shard(module, mesh=mesh)
        give_gradients(module)
        out.append(kept_by(optimizer_of(module.parameters(), moments)))
    return out


def on_fsdp1(model: Model, kinds: list[Any]) -> list[int]:
    """Without gradients: a rank may lack any of them, and still takes part."""
    out = []
    for first, second in kinds:
        module: Any = FullyShardedDataParallel(
            module_of(model),
            use_orig_params=True,
            device_id=torch.device("cpu"),
            auto_wrap_policy=ModuleWrapPolicy({Layer}),
        )
        options = {"first_moment": first, "second_moment": second}
        out.append(kept_by(shard4bit.fsdp.wrap(module, shard4bit.AdamW4bit, **options)))
    return out


def on_zero(model: Model, kinds: list[Any], stage: int) -> list[tuple[int, int]]:
    """And the bytes of states."""
    out = []
    for first, second in kinds:
        settings = engines.config(stage)
        settings["optimizer"]["params"] |= {"first_moment": first, "second_moment": second}
        optimizer = engines.engine_of(module_of(model), settings).basic_optimizer
        states = [t for b in optimizer.bind() for m in b.moments for t in m.tensors.values()]
        out.append((kept_by(optimizer), bytes_of(states)))
    return out


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_of_fsdp2(model: Model, world: int) -> None:
    """On the first rank, which holds most."""
    found = pool(world).run(on_fsdp2, model, list(QUANTIZED.values()))[0]
    setup = Setup("fsdp2", world, param="bf16", master="fp32")
    assert found == [usage(model, setup, moments).kernels for moments in QUANTIZED.values()]


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_of_fsdp1(model: Model, world: int) -> None:
    """On every rank, those without any of a parameter too."""
    found = pool(world).run(on_fsdp1, model, list(QUANTIZED.values()))
    setup = Setup("fsdp1", world, param="fp32", master="fp32")
    for number, moments in enumerate(QUANTIZED.values()):
        assert [rank[number] for rank in found] == planned(model, setup, moments)


@engines.needs_deepspeed
@pytest.mark.parametrize(("world", "stage"), [(2, 1), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_ranks_of_zero(model: Model, world: int, stage: int) -> None:
    """On every rank; states to the byte, too."""
    found = pool(world).run(on_zero, model, list(QUANTIZED.values()), stage)
    setup = Setup(f"zero{stage}", world, param="fp32", master="fp32")
    for number, moments in enumerate(QUANTIZED.values()):
        assert [rank[number][0] for rank in found] == planned(model, setup, moments)
        states = [of_optimizer(own, moments)[0] for own in held(model, setup)]
        assert [rank[number][1] for rank in found] == states
