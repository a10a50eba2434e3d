"""The `deepspeed` launcher, in fresh processes (torchrun: test_hook.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deepspeed.engines import needs_deepspeed
from tests.pool import free_port

pytestmark = [needs_deepspeed]
ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import argparse, collections, json, os, sys
import torch, deepspeed, shard4bit.deepspeed
deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)  # compile nothing
parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int)
parser.add_argument("folder")
parser = deepspeed.add_config_arguments(parser)
args = parser.parse_args()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(80, 90), torch.nn.ReLU(), torch.nn.Linear(90, 3))
engine, *_ = deepspeed.initialize(args=args, model=model, model_parameters=model.parameters())
for step in range(4):
    if step == 2:
        path = shard4bit.save(args.folder, engine, step=2)
    torch.manual_seed(step * 10 + engine.global_rank)
    engine.backward(engine(torch.randn(16, 80)).square().mean())
    engine.step()
end = shard4bit.digest(engine)
found = shard4bit.load(args.folder, engine)
for step in range(2, 4):
    torch.manual_seed(step * 10 + engine.global_rank)
    engine.backward(engine(torch.randn(16, 80)).square().mean())
    engine.step()
with open(os.path.join(args.folder, f"rank-{engine.global_rank}.json"), "w") as out:
    json.dump([found.step, end, shard4bit.digest(engine), engine.world_size], out)
torch.distributed.barrier()
os._exit(0)
"""


@pytest.mark.slow
def test_the_launcher_of_deepspeed(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PROGRAM)
    settings = {
        "train_micro_batch_size_per_gpu": 16,
        "optimizer": {"type": "AdamW4bit", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": 1, "round_robin_gradients": True},
        "bf16": {"enabled": False},
    }
    (tmp_path / "ds_config.json").write_text(json.dumps(settings))
    strip = ("RANK", "LOCAL_", "WORLD", "MASTER")
    env = {k: v for k, v in os.environ.items() if not k.startswith(strip)}
    own = os.path.dirname(sys.executable)
    env |= {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": own + os.pathsep + env.get("PATH", ""),
    }
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
    ]
    done = subprocess.run(
        [*command, "train.py", str(tmp_path), "--deepspeed", "--deepspeed_config", "ds_config.json"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    files = sorted(tmp_path.glob("rank-*.json"))
    assert len(files) == 2, done.stdout[-3000:] + done.stderr[-5000:]
    for file in files:
        step, end, again, world = json.loads(file.read_text())
        assert step == 2 and world == 2 and end == again
