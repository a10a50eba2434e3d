"""Bytes of DeepSpeed's optimizer files per parameter: python -m benchmarks.deepspeed_files

Trains one step of a model of GPT-2 small's shapes (124 M parameters, bf16, ZeRO stage 2) with DeepSpeed's
AdamW and with AdamW4bit, saves with engine.save_checkpoint, and counts a rank's file. Under torchrun it does
so on several ranks. --scale 8 divides the shapes, for a trial. Exits with status 1 if a ratio is under its
bound.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
from collections import defaultdict
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.shapes import Shapes, gpt2_small

MASTERS = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # name -> optimizer, what "bf16" says
    "AdamW, fp32 masters": ({"type": "AdamW", "params": {"torch_adam": True}}, {}),
    "AdamW4bit, fp32 masters": ({"type": "AdamW4bit"}, {}),
    "AdamW, bf16 masters": ({"type": "AdamW", "params": {"torch_adam": True}}, MASTERS),
    "AdamW4bit, bf16 masters": ({"type": "AdamW4bit"}, MASTERS),
}
BOUNDS = [  # (numerator, denominator, column, at least)
    ("AdamW, fp32 masters", "AdamW4bit, fp32 masters", 0, 7.0),
    ("AdamW, fp32 masters", "AdamW4bit, fp32 masters", 1, None),
    ("AdamW, fp32 masters", "AdamW4bit, bf16 masters", 1, 3.5),
    ("AdamW, bf16 masters", "AdamW4bit, bf16 masters", 1, None),
]


class Model(nn.Module):
    """Parameters of the given shapes, and a loss that reaches all of them."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.all = nn.ParameterList(nn.Parameter(torch.full(shape, 0.02)) for shape in shapes)

    def forward(self) -> Tensor:
        return torch.stack([(p.float() * 1e-3).square().sum() for p in self.all]).sum()


def measured(shapes: Shapes, optimizer: dict[str, Any], bf16: dict[str, Any], root: Path) -> tuple[int, int]:
    """(bytes of the states in a rank's optimizer file, bytes of the file)."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": optimizer,
        "bf16": {"enabled": True, **bf16},
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    model = Model(shapes)
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    engine.backward(engine())
    engine.step()
    engine.save_checkpoint(str(root), tag="here")
    file = next(root.glob(f"here/*zero_pp_rank_{engine.global_rank}_mp*optim_states.pt"))
    saved = torch.load(file, weights_only=False, map_location="cpu")["optimizer_state_dict"]
    states = saved["base_optimizer_state"]["state"].values()
    tensors = [t for state in states for t in state.values() if isinstance(t, Tensor)]
    engine.destroy()
    return sum(t.numel() * t.element_size() for t in tensors), file.stat().st_size


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=int, default=1, help="what large dimensions are divided by")
    scale = parser.parse_args().scale
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_PORT", "29511")
    import deepspeed

    import shard4bit.deepspeed  # noqa: F401

    deepspeed.ops.__compatible_ops__ = defaultdict(bool)  # compile nothing
    rank, world, shapes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), gpt2_small()
    shapes = [tuple(max(1, n // scale) for n in shape) for shape in shapes]
    held = sum(map(prod, shapes)) / world
    found: dict[str, tuple[float, float]] = {}
    for name, (optimizer, bf16) in CASES.items():
        shared = [tempfile.mkdtemp(prefix="deepspeed-files-") if rank == 0 else ""]
        deepspeed.init_distributed(verbose=False)
        torch.distributed.broadcast_object_list(shared)
        states, size = measured(shapes, optimizer, bf16, Path(shared[0]))
        found[name] = states / held, size / held
        torch.distributed.barrier()
        if rank == 0:
            shutil.rmtree(shared[0])
    if rank:
        return 0
    print(
        f"DeepSpeed {deepspeed.__version__}, torch {torch.__version__}, {platform.machine()}, {world} rank(s)"
    )
    print(f"{'bytes per held parameter':28}  states    file")
    for name, (states, size) in found.items():
        print(f"{name:28}  {states:6.3f}  {size:6.3f}")
    failed = False
    for above, below, column, bound in BOUNDS:
        ratio = found[above][column] / found[below][column]
        failed |= bound is not None and ratio < bound
        what = ("states", "file")[column]
        print(f"{what}: {above} / {below} = {ratio:.2f}" + (f" (at least {bound})" if bound else ""))
    return int(failed)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # gloo now and then aborts in an ordinary exit
