"""Blocks of CUDA's caching allocator: its rules in small, and what a GPU counted."""

from __future__ import annotations

import json
import random

import pytest

from benchmarks.shapes import llama
from shard4bit.cli.blocks import MIB, Blocks
from shard4bit.cli.main import main
from shard4bit.cli.models import Model, Param, of_size
from shard4bit.cli.plan import OPTIMIZERS, usage
from shard4bit.cli.shards import ENGINES, Setup

KIB = 1 << 10

#: MB of weights, gradients, moments (with what the kernels keep), at most in a step and in a save, counted by
#: torch.cuda.memory_allocated on an H100 for the 1.1 B model (docs/memory.md; torch 2.11, 2026-11-23)
COUNTED = {
    ("fp32", "AdamW, fp32 states"): (4400.2, 4400.2, 8800.4, 22001.0, 17600.8),
    ("fp32", "AdamW, 8-bit states"): (4400.2, 4400.2, 2343.5, 11479.4, 11143.9),
    ("fp32", "AdamW4bit, rank1"): (4400.2, 4400.2, 1158.8, 9959.2, 9959.2),
    ("fp32", "AdamW4bit, block"): (4400.2, 4400.2, 1186.1, 9986.5, 9986.5),
    ("fp32", "AdamW4bit, factored"): (4400.2, 4400.2, 638.3, 9438.7, 9438.7),
    ("bf16", "AdamW, 8-bit states"): (2202.2, 2202.2, 2343.5, 7217.6, 6747.8),
    ("bf16", "AdamW4bit, rank1"): (2202.2, 2202.2, 1146.0, 5550.4, 5550.4),
    ("bf16", "AdamW4bit, block"): (2202.2, 2202.2, 1173.0, 5577.4, 5577.4),
    ("bf16", "AdamW4bit, factored"): (2202.2, 2202.2, 632.1, 5036.4, 5036.4),
}


@pytest.mark.parametrize(
    ("sizes", "blocks"),
    [
        ([0], [0]),
        ([1, 512, 513], [512, 512, 1024]),
        ([MIB, MIB], [MIB, MIB]),  # of one segment of 2 MiB
        ([MIB + 1], [MIB + 512]),  # of a segment of 20 MiB
        ([9 * MIB, 10 * MIB], [9 * MIB, 11 * MIB]),  # in what is left of it: 1 MiB is not worth a block
        ([10 * MIB - 512, 9 * MIB + 512 * KIB], [10 * MIB - 512, 10 * MIB + 512]),
        ([10 * MIB, 9 * MIB + 512 * KIB], [10 * MIB, 9 * MIB + 512 * KIB]),  # 10 MiB has its own segment
        ([9 * MIB, 9 * MIB, 3 * MIB], [9 * MIB, 9 * MIB, 3 * MIB]),
        ([9 * MIB, 9 * MIB + 1, 3 * MIB], [9 * MIB, 9 * MIB + 512, 3 * MIB]),
        ([9 * MIB, 9 * MIB, MIB + 1], [9 * MIB, 9 * MIB, 2 * MIB]),  # the rest of 1 MiB stays with it
        ([11 * MIB], [12 * MIB]),  # a segment of its own, and a rest of 1 MiB
        ([11 * MIB - 1], [12 * MIB]),  # asked for are whole 512 bytes
        ([11 * MIB - 512, 2 * MIB], [11 * MIB - 512, 2 * MIB]),  # the rest is more than 1 MiB: split
        ([12 * MIB], [12 * MIB]),
    ],
)
def test_rules(sizes: list[int], blocks: list[int]) -> None:
    allocator = Blocks()
    assert [allocator.take(size) for size in sizes] == blocks
    assert Blocks().all(sizes) == sum(blocks)


def test_the_smallest_free_block_is_taken() -> None:
    allocator = Blocks()
    allocator.all([9 * MIB, 4 * MIB])  # 7 MiB are left of the segment
    assert allocator.take(17 * MIB - 512) == 17 * MIB - 512  # leaves 1 MiB + 512 of its own
    assert allocator.take(MIB + 512) == MIB + 512  # fits into the latter to the byte
    assert allocator.take(6 * MIB) == 7 * MIB


def test_no_rest_is_larger_than_a_mebibyte() -> None:
    draw = random.Random(3)
    sizes = [int(2 ** draw.uniform(0, 28)) for _ in range(3000)]
    allocator = Blocks()
    for size in sizes:
        block = allocator.take(size)
        assert block % 512 == 0 and 0 <= block - size < (512 if size <= MIB else MIB + 512)


@pytest.mark.parametrize(("dtype", "name"), COUNTED)
def test_what_a_gpu_counted(dtype: str, name: str) -> None:
    """Tensors to the last digit; a save's 4 MiB of staging were not seen on the device."""
    model = Model("", tuple(Param(f"{i}.weight", shape) for i, shape in enumerate(llama())))
    plan = usage(model, Setup("single", param=dtype), OPTIMIZERS[name])
    held = plan.allocated
    found = [x / 1e6 for x in (held.weights, held.gradients, held.moments, plan.step, plan.save - 4 * MIB)]
    assert found == pytest.approx(COUNTED[dtype, name], abs=0.1)


@pytest.mark.parametrize("engine", ENGINES)
def test_blocks_of_ranks_hold_their_tensors(engine: str) -> None:
    """Every tensor is in a block, none twice; blocks have at most 1 MiB and a unit more."""
    model, world = of_size(2e8), 1 if engine == "single" else 4
    setup = Setup(engine, world, param="bf16", master="fp32")
    for moments in OPTIMIZERS.values():
        plan = usage(model, setup, moments)
        tensors = {
            "weights": plan.weights,
            "gradients": plan.gradients,
            "master": plan.master,
            "moments": plan.moments + plan.kernels,
        }
        for what, size in tensors.items():
            count = {"moments": 6}.get(what, 1) * len(model.params) + 20
            assert 0 <= getattr(plan.allocated, what) - size <= count * (MIB + 512), what
        assert plan.save == sum(tensors.values()) + plan.rounding + 4 * MIB


def test_the_command_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["memory", "--params", "3e7"]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["bytes"]["AdamW, 8-bit states"]
    tensors = sum(found[k] for k in ("weights", "gradients", "master", "moments", "kernels"))
    assert found["rounding"] == sum(found["allocated"].values()) - tensors > 0
    assert all(isinstance(x, int) for x in (found["rounding"], *found["allocated"].values()))
    assert main(argv) == 0
    text = capsys.readouterr().out
    columns = "moments kernels rounding peak backward peak step peak save"
    assert columns in " ".join(text.split()) and "Rounding: by CUDA's caching allocator." in text
