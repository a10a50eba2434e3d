"""Engines on a GPU. Several ranks share one, over gloo, and hold the bits of one CPU process; and one rank
trains over NCCL, by every engine, which a process alone goes on with."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch import options
from launch.cluster import Cluster
from launch.train import run
from tests.checkpoint import ranks
from tests.covering import covering
from tests.deepspeed.engines import HAVE
from tests.fsdp import models
from tests.fsdp import test_fsdp1 as fsdp1
from tests.fsdp.test_invariance_fsdp2 import CUTS, STEPS, check_cut, close, single
from tests.launch.running import Wish
from tests.pool import free_port, pool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CELLS = [(2, "fsdp"), (4, "fsdp"), (2, "experts"), (4, "experts"), (4, "hsdp")]


def use_gpu() -> None:
    """In a rank of a pool: models on the first GPU; a rank alone talks over NCCL, which takes one a GPU."""
    torch.cuda.set_device(0)
    models.use_device("cuda")
    if dist.get_world_size() == 1:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # DeepSpeed asks for them
        dist.destroy_process_group()
        dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)


gpu_pool = partial(pool, setup=use_gpu)


# ---- ranks that share a GPU --------------------------------------------------------------------


@pytest.mark.parametrize("kind, cell", covering(["rank1", "block", "factored", "sgd"], CELLS), ids=str)
def test_fsdp2_has_the_bits_of_a_cpu_process(kind: str, cell: tuple[int, str]) -> None:
    world, layout = cell
    for rank, found in enumerate(gpu_pool(world).run(models.forced_run, kind, layout, STEPS)):
        (close if kind == "factored" else models.same)(found, single(kind), (kind, cell, rank))


def test_bf16_parameters() -> None:
    for rank, found in enumerate(gpu_pool(2).run(models.forced_run, "rank1", "fsdp", STEPS, "bfloat16")):
        models.same(found, single("rank1", "bfloat16"), rank)


@pytest.mark.parametrize(
    "kind, case", covering(["rank1", "block"], [c for c in CUTS if c[1] != (3,)]), ids=str
)
def test_dtensors_cut_anywhere(kind: str, case: Any) -> None:
    check_cut(gpu_pool, kind, *case)


@pytest.mark.parametrize("orig", [True, False])
@pytest.mark.parametrize("kind, world", [("rank1", 2), ("block", 4), ("sgd", 2)])
def test_fsdp1_has_the_states_of_a_cpu_process(kind: str, world: int, orig: bool) -> None:
    """With real all-gathers and reduce-scatters, whose gradients are then replaced."""
    found = gpu_pool(world).run(fsdp1.digest_of, kind, orig, "FULL_SHARD", {})
    assert set(found) == {fsdp1.single(kind)}


@pytest.mark.parametrize("kind", ["rank1", "block"])
@pytest.mark.parametrize("before, after", [(4, 2), (2, 4)])
def test_other_ranks_go_on(kind: str, before: int, after: int, tmp_path: Path) -> None:
    """Saved on so many ranks, loaded on others and in this process, and a step after."""
    layouts = "experts", "fsdp"
    saved = gpu_pool(before).run(ranks.save_zoo, kind, layouts[0], str(tmp_path))
    path = str(tmp_path / f"step-{ranks.STEPS:010d}")
    alone = ranks.load_zoo(kind, "plain", path)
    for state, _, then in gpu_pool(after).run(ranks.load_zoo, kind, layouts[1], path):
        assert state[1] == saved[0][1] == alone[0][1]
        models.same(then, alone[2])


# ---- one rank over NCCL --------------------------------------------------------------------------

ENGINES = ["ddp", "fsdp1", "fsdp2", *(["zero1", "zero2"] if HAVE else [])]
SMALL = ["--context", "64", "--batch", "4", "--warmup", "2"]
SMALL += ["--layers", "2", "--heads", "2", "--width", "192"]


def train(engine: str, *arguments: str) -> dict[str, Any]:
    """launch.train's results, by one rank on the GPU."""
    place = Cluster(0, 1, torch.device("cuda", 0), "none" if engine == "single" else "nccl")
    stop: Any = Wish()
    return run(options.parse([*SMALL, *arguments, "--engine", engine]), place, stop)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_over_nccl(engine: str, precision: str, tmp_path: Path) -> None:
    """Train and save; one process restores the same bits and ends alike; and the other way round."""

    def on_gpu(engine: str, out: str, *more: str) -> dict[str, Any]:
        folder = ["--out", str(tmp_path / out), "--steps", "6", "--save-at", "3", "--precision", precision]
        return gpu_pool(1).run(train, engine, *folder, *more)[0]

    first, alone = on_gpu(engine, "first"), on_gpu("single", "alone")
    assert first["losses"] == pytest.approx(alone["losses"], rel=2e-2)
    assert first["losses"][-1] < first["losses"][0]
    for whole, other, out in ((first, "single", "first"), (alone, engine, "alone")):
        then = on_gpu(other, f"{out}-then", "--resume", str(tmp_path / out / "checkpoints"))
        assert then["first_step"] == 3 and then["restored_digest"] == whole["checkpoint"]["digest"]
        assert then["losses"] == pytest.approx(whole["losses"][3:], rel=2e-2)
