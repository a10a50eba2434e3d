"""Several GPUs: one optimizer for parameters on two of them, and FSDP2 on two that one goes on with."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import shard4bit
from tests.deepspeed.engines import needs_deepspeed
from tests.gpu import overlap
from tests.gpu.test_kernels import compare, pair, set_grads
from tests.launch.running import call
from tests.pool import pool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]
STEPS, SAVED = 8, 4


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("second", ["rank1", "block"])
def test_parameters_on_two_gpus(second: str, current: int) -> None:
    """Each has its kernels' launches on its own GPU, whichever is the current one."""
    host, _, params, others = pair(torch.float32, lambda p: shard4bit.AdamW4bit(p, second_moment=second))
    spread = [torch.nn.Parameter(q.detach().to(f"cuda:{i % 2}")) for i, q in enumerate(others)]
    device = shard4bit.AdamW4bit(spread, second_moment=second)
    with torch.cuda.device(current):
        for step in range(4):
            set_grads(params, step, 1)
            set_grads(spread, step, 1)
            host.step()
            device.step()
            compare(host, device, params, spread, step)


def trained(ranks: int, out: Path, *options: str) -> dict[str, Any]:
    """The results of launch.train on so many GPUs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    common = ["--precision", "bf16", "--warmup", "2", "--steps", str(STEPS), "--save-at", str(SAVED)]
    results = out / f"results-{ranks}.json"
    command += ["-m", "launch.train", *common, "--out", str(out / str(ranks)), "--results", str(results)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")
    done = call(*command, *options, CUDA_VISIBLE_DEVICES=visible)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(results.read_text())


@pytest.mark.parametrize("second", ["rank1", "block"])
def test_fsdp2_goes_on_with_one_gpu(second: str, tmp_path: Path) -> None:
    """Over NCCL: train, save; one GPU restores the same bits and ends where two end, to the order of sums."""
    options = ["--second-moment", second]
    two = trained(2, tmp_path, "--engine", "fsdp2", *options)
    one = trained(
        1, tmp_path, "--engine", "single", "--resume", str(tmp_path / "2" / "checkpoints"), *options
    )
    assert two["world_size"] == 2 and one["world_size"] == 1
    assert one["first_step"] == SAVED and one["restored_digest"] == two["checkpoint"]["digest"]
    assert two["losses"][-1] < two["losses"][0]
    assert one["losses"] == pytest.approx(two["losses"][SAVED:], rel=1e-2)


@needs_deepspeed
def test_zero_overlapping_communication() -> None:
    """DeepSpeed then reduces on streams of its own: the bits of CPU ranks, overlapping or not."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")
    done = call(*command, "-m", "tests.gpu.overlap", CUDA_VISIBLE_DEVICES=visible)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = pool(2).run(overlap.digest, 1, False)[0]
    assert json.loads(done.stdout.splitlines()[-1]) == [expected] * len(overlap.CASES)
