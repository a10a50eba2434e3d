"""What the examples share: a small Llama from a config (nothing is downloaded), text, and what they print."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from launch.data import global_batch, load_corpus

CONTEXT = 32


def arguments(doc: str, engines: list[str]) -> argparse.ArgumentParser:
    """The options of every example; torchrun or another launcher starts the ranks."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--engine", choices=engines, default=engines[0])
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of the whole training")
    parser.add_argument("--save-at", type=int, default=3, help="write a checkpoint after this step")
    parser.add_argument("--folder", default="build/examples", help="for checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --folder")
    return parser


def own_folder(options: argparse.Namespace, name: str) -> str:
    """Of this example and engine; emptied by rank 0 unless a checkpoint of it is to be read."""
    folder = f"{options.folder}/{name}-{options.engine}"
    if not options.resume and os.environ.get("RANK", "0") == "0":
        shutil.rmtree(folder, ignore_errors=True)
    return folder


def small_llama(seed: int = 0) -> torch.nn.Module:
    """A Llama over bytes, of 0.2 M parameters, the same on every rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def decay_groups(model: torch.nn.Module, decay: float = 0.1) -> list[dict[str, object]]:
    """Two named groups: weight decay for all but norms."""
    named = list(model.named_parameters())
    return [
        {"params": [(n, p) for n, p in named if "norm" not in n], "weight_decay": decay},
        {"params": [(n, p) for n, p in named if "norm" in n], "weight_decay": 0.0},
    ]


def halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """A schedule: the learning rate is halved every second step."""
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)


def prepare_deepspeed() -> None:
    """Before a configuration names AdamW4bit: not needed where shard4bit is installed, and there are GPUs."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed's own switch
    import deepspeed

    import shard4bit.deepspeed  # noqa: F401

    if not torch.cuda.is_available():  # its collectives for CPUs would be compiled first: use gloo's
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)


def treat_cpu_as_gpu(engine: str) -> bool:
    """accelerate shards on accelerators alone; on the CPU it leaves FSDP and DeepSpeed out without a word. So
    let it take the CPU, with gloo, for one. Returns whether it does: not where there are GPUs."""
    if torch.cuda.is_available():
        return False
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    state = PartialState(cpu=True)
    zero = engine.startswith("zero")
    state.distributed_type = DistributedType.DEEPSPEED if zero else DistributedType.MULTI_GPU
    state.device = torch.device("cpu")
    return True


class Bytes(Dataset):
    """Stretches of the sources of Python's standard library; item i is a function of i alone."""

    def __init__(self, length: int = 512, seed: int = 0) -> None:
        text = load_corpus(None, CONTEXT).train
        self.rows = torch.from_numpy(global_batch(np.asarray(text), seed, 0, length, CONTEXT))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index, :CONTEXT]
        return {"input_ids": row, "labels": row}


def report(losses: list[float], digest: str, **more: object) -> None:
    """One line of JSON from rank 0. The digest is of parameters and 4-bit states, on all ranks."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps({"losses": [round(x, 6) for x in losses], "digest": digest, **more}), flush=True)
