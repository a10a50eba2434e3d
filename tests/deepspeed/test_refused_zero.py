"""Kinds of parallelism of DeepSpeed's in which a parameter is not whole, or differs between ranks of ZeRO:
all are refused by ``deepspeed.initialize``, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import shard4bit
from shard4bit.errors import LayoutError
from tests.deepspeed import engines
from tests.deepspeed.engines import OLD, Known, config, engine_of, needs_deepspeed
from tests.pool import pool

pytestmark = needs_deepspeed


def pipeline(stage: int) -> None:
    engines.deepspeed()
    from deepspeed.pipe import PipelineModule

    layers = [nn.Linear(96, 96) for _ in range(4)]
    engine_of(PipelineModule(layers, num_stages=2, loss_fn=nn.MSELoss()), config(stage))


class Megatron:
    """What DeepSpeed asks of a library with tensor parallelism: of all ranks, without data parallelism."""

    def __init__(self) -> None:
        self.one = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size()

    def get_model_parallel_group(self) -> Any:
        return dist.group.WORLD

    def get_data_parallel_rank(self) -> int:
        return 0

    def get_data_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_group(self) -> Any:
        return self.one

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_src_rank = get_data_parallel_rank


def mpu(stage: int) -> None:
    engines.deepspeed()
    from deepspeed.utils import groups

    try:
        engine_of(Known(), config(stage), mpu=Megatron())
    finally:  # what the process keeps of it would change the engines of later tests
        groups.mpu = None


class Attention(nn.Module):
    """Layers with names that DeepSpeed divides between ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(96, 96), nn.Linear(96, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.q_proj(x))


class LlamaDecoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.self_attn(x)


def autotp(stage: int) -> None:
    deepspeed = engines.deepspeed()
    from deepspeed.utils import groups

    before = dict(vars(groups))
    try:
        tensor_parallel = {"autotp_size": 2, "preset_model": "llama"}
        engine_of(nn.Sequential(LlamaDecoderLayer()), config(stage, tensor_parallel=tensor_parallel))
    finally:
        vars(groups).update(before)
        deepspeed.comm.barrier()


def experts(given: str) -> None:
    engines.deepspeed()
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    model = nn.Sequential(nn.Linear(8, 8), MoE(8, nn.Linear(8, 8), num_experts=2, ep_size=2))
    settings = config(2, precision="bf16")
    if given == "groups":
        groups = split({"params": list(model.parameters()), "name": "all"})
        engine_of(model, settings, model_parameters=groups)
    else:
        del settings["optimizer"]
        engine_of(model, settings, optimizer=lambda groups: shard4bit.AdamW4bit(groups, lr=1e-3))


CASES: list[tuple[Callable[[Any], None], Any, str, str]] = [
    (pipeline, 0, "pipeline parallelism", "without PipelineModule"),
    (pipeline, 1, "pipeline parallelism", "without PipelineModule"),
    (mpu, 0, "tensor parallelism", "FSDP2"),
    (mpu, 2, "tensor parallelism", "FSDP2"),
    (autotp, 1, "tensor parallelism", "FSDP2"),
    (experts, "groups", "mixture-of-experts", "FSDP2"),
    (experts, "callable", "mixture-of-experts", "FSDP2"),
]


@pytest.mark.parametrize(
    "make, argument, what, instead", CASES, ids=[f"{c[0].__name__}-{c[1]}" for c in CASES]
)
def test_refused_at_initialize(make: Callable[[Any], None], argument: Any, what: str, instead: str) -> None:
    if make is autotp and OLD:
        pytest.skip("DeepSpeed before 0.19 has no AutoTP preset_model, so there is nothing to refuse")
    for outcome in pool(2).outcomes(make, argument):
        assert outcome[0] == "error" and isinstance(outcome[1], LayoutError), outcome[1:]
        assert what in str(outcome[1]) and instead in str(outcome[1]), outcome[1]


STAGE_3: list[dict[str, Any]] = [
    {"stage": 3, "offload_param": {"device": "cpu"}},
    {"stage": 3, "offload_optimizer": {"device": "cpu"}},
    {"stage": 3, "zero_hpz_partition_size": 2},
]


def with_zero(zero: dict[str, Any]) -> None:
    engine_of(Known(), {**config(0), "zero_optimization": zero, "zero_force_ds_cpu_optimizer": False})


@pytest.mark.parametrize("zero", STAGE_3, ids=lambda zero: list(zero)[1])
def test_stage_3_in_every_guise(zero: dict[str, Any]) -> None:
    for outcome in pool(2).outcomes(with_zero, zero):
        assert outcome[0] == "error" and isinstance(outcome[1], LayoutError), outcome[1:]
        assert "ZeRO stage 3" in str(outcome[1]) and '"stage": 2' in str(outcome[1]), outcome[1]


@pytest.mark.parametrize("device", ["cpu", "nvme"])
@pytest.mark.parametrize("stage", [1, 2])
def test_offloading(stage: int, device: str) -> None:
    zero = {"stage": stage, "offload_optimizer": {"device": device, "nvme_path": "/nowhere"}}
    for outcome in pool(2).outcomes(with_zero, zero):
        assert outcome[0] == "error" and isinstance(outcome[1], LayoutError), outcome[1:]
        assert f"offload_optimizer to {device}" in str(outcome[1]), outcome[1]


def offloading(client: bool) -> None:
    """As users would write it, without ``zero_force_ds_cpu_optimizer``."""
    model = Known()
    settings = {**config(1), "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    more = {"optimizer": shard4bit.AdamW4bit(model.parameters())} if client else {}
    if client:
        del settings["optimizer"]
    engine_of(model, settings, **more)


@pytest.mark.parametrize("client", [False, True])
def test_offloading_without_further_options(client: bool) -> None:
    """DeepSpeed's own error comes first for a client's optimizer."""
    for kind, error, _ in pool(2).outcomes(offloading, client):
        assert kind == "error"
        if client:
            assert "ZeRO-Offload with a client provided optimizer" in str(error), error
        else:
            assert isinstance(error, LayoutError) and "offload_optimizer to cpu" in str(error), error


BF16: dict[str, Any] = {"enabled": True, "bf16_master_weights_and_grads": True}
FP16: dict[str, Any] = {"enabled": True, "fp16_master_weights_and_grads": True}
THEIRS: list[tuple[int, dict[str, Any], str]] = [
    (0, engines.PRECISIONS["bf16+fp32"], "unsupported mix"),
    (0, engines.PRECISIONS["bf16 masters"], "only supported with ZeRO Stage 1, 2, or 3"),
    (1, {"bf16": BF16}, "CPUAdam"),
    (0, {"fp16": FP16}, "only supported with ZeRO Stage 1, 2, or 3"),
    (2, {"fp16": FP16}, "CPUAdam"),
]


def made(stage: int, more: dict[str, Any]) -> None:
    engine_of(Known(), config(stage, **more))


@pytest.mark.skipif(OLD, reason="DeepSpeed before 0.19 has not all of these options")
@pytest.mark.parametrize("stage, more, words", THEIRS, ids=str)
def test_what_deepspeed_itself_refuses(stage: int, more: dict[str, Any], words: str) -> None:
    """Of the table in docs/deepspeed.md: an error, never a run that is silently wrong."""
    for outcome in pool(2).outcomes(made, stage, more):
        assert outcome[0] == "error", (stage, more)
        assert words in str(outcome[1]), outcome[1:]


def without_sync() -> str:
    engine = engine_of(Known(), config(2))
    with pytest.raises(AssertionError) as caught, engine.no_sync():
        pass
    return str(caught.value)


def test_no_sync_at_stage_2_is_deepspeeds_error() -> None:
    assert all("incompatible with gradient partitioning" in message for message in pool(2).run(without_sync))


def afterwards() -> Any:
    """The refusals left nothing behind that changes another engine."""
    engine = engine_of(Known(), config(2))
    engines.train(engine, 2)
    return engines.parts(engine)


def test_engines_after_refused_ones() -> None:
    engines.same(engines.whole(pool(2).run(afterwards)), engines.reference("rank1", 2), "afterwards")
