"""Train a small GPT with AdamW4bit or torch's AdamW, on any number of ranks.

python -m launch.train --help lists the options.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict
from tqdm import tqdm

import shard4bit
import shard4bit.fsdp
from launch import cluster, measure, options
from launch.cluster import Cluster
from launch.data import Corpus, global_batch, load_corpus, rank_slice
from launch.model import GPT, GPTConfig

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
EVALUATION_ROWS = 256  # sequences of held-out text, the same ones in every evaluation


class Run:
    """A model, its optimizer and its data on the ranks of a cluster. Its methods are collective.

    Raises ValueError for options or data that do not fit each other.
    """

    def __init__(self, settings: argparse.Namespace, ranks: Cluster) -> None:
        self.settings = settings
        self.ranks = ranks
        self.corpus: Corpus = load_corpus(settings.data, settings.context)
        shape = {name: getattr(settings, name) for name in ("context", "layers", "heads", "width")}
        config = GPTConfig(**shape)
        torch.manual_seed(settings.seed)
        self.model = GPT(config)
        ranks.shard(self.model, self.model.blocks)
        self.optimizer: Any = self._make_optimizer()
        self.identity = {
            "model": dataclasses.asdict(config),
            "data": self.corpus.source,
            "seed": settings.seed,
            "batch": settings.batch,
        }

    def _make_optimizer(self) -> torch.optim.Optimizer:
        common: dict[str, Any] = {"lr": self.settings.lr, "betas": BETAS, "eps": 1e-8}
        common["weight_decay"] = WEIGHT_DECAY
        if self.settings.optimizer == "adamw":
            return torch.optim.AdamW(self.model.parameters(), **common)
        common["second_moment"] = self.settings.second_moment
        if self.ranks.backend == "none":
            return shard4bit.AdamW4bit(self.model.named_parameters(), **common)
        return shard4bit.fsdp.wrap(self.model, shard4bit.AdamW4bit, **common)

    def _loss(self, rows: np.ndarray) -> Tensor:
        """The sum of the losses, in nats, over this rank's bytes of a global batch."""
        inputs, targets = rank_slice(rows, self.ranks.rank, self.ranks.world_size)
        logits = self.model(inputs.to(self.ranks.device))
        targets = targets.to(self.ranks.device)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    def step(self, number: int) -> tuple[Tensor, float, float]:
        """Do one step: this rank's loss in nats/byte, seconds in all, seconds of the optimizer.

        The losses of all ranks sum to the loss of the global batch.
        """
        want = self.settings
        begin = time.perf_counter()
        rows = global_batch(self.corpus.train, want.seed, number, want.batch, want.context)
        loss = self._loss(rows) / (want.batch * want.context)
        # FSDP2 takes the mean of the ranks' gradients; their sum is wanted, the slices being uneven.
        (loss * self.ranks.world_size).backward()
        for group in self.optimizer.param_groups:
            group["lr"] = want.lr * min(1.0, (number + 1) / want.warmup)
        self.ranks.synchronize()
        middle = time.perf_counter()
        self.optimizer.step()
        self.ranks.synchronize()
        end = time.perf_counter()
        self.optimizer.zero_grad()
        return loss.detach(), end - begin, end - middle

    @torch.no_grad()
    def evaluate(self) -> float:
        """The mean loss over held-out text, in nats/byte; the same text on any number of ranks."""
        want = self.settings
        batch = max(32, want.batch)
        batches = -(-EVALUATION_ROWS // batch)
        total = torch.zeros((), dtype=torch.float64)
        for i in range(batches):
            rows = global_batch(self.corpus.validation, 0, i, batch, want.context)
            total += self._loss(rows).cpu()
        return self.ranks.sum(total).item() / (batches * batch * want.context)

    def digest(self) -> str | None:
        """Of parameters and optimizer states, where shard4bit knows how to compute it."""
        if self.settings.optimizer != "adamw4bit":
            return None
        return shard4bit.digest(self.model, self.optimizer)

    def save(self, step: int) -> dict[str, Any]:
        """Write a checkpoint (canonical, or torch's DCP for its AdamW) and describe it."""
        record: dict[str, Any] = {"step": step, "digest": self.digest()}
        begin = time.perf_counter()
        if self.settings.optimizer == "adamw4bit":
            root = self.settings.out / "checkpoints"
            path = shard4bit.save(root, self.model, self.optimizer, step=step, extra=self.identity)
        else:
            path = self.settings.out / f"dcp-{step:010d}"
            parameters, states = get_state_dict(self.model, self.optimizer)
            alone = self.ranks.backend == "none"
            content = {"model": parameters, "optimizer": states}
            dcp.save(content, checkpoint_id=path, no_dist=alone)
        self.ranks.barrier()
        record |= {"path": str(path), "seconds": time.perf_counter() - begin}
        record |= {"bytes": measure.folder_bytes(path), "val_loss": self.evaluate()}
        if self.ranks.is_first and record["digest"]:
            tqdm.write(f"saved {path}\n  digest {record['digest']}")
        return record

    def load(self, root: Path) -> int:
        """Restore the newest checkpoint under ``root`` and return the number of steps it has done.

        Raises shard4bit.CheckpointError, or ValueError where it is of another model or other data.
        """
        found = shard4bit.load(root, self.model, self.optimizer)
        for key, value in self.identity.items():
            if found.extra.get(key) != value:
                raise ValueError(
                    f"the checkpoint in {root} has {key} {found.extra.get(key)}, this run has {value}"
                )
        return found.step

    def train(self, first: int) -> dict[str, Any]:
        """Do the steps from ``first`` (counted from 0) to the last; saves on the way if asked to."""
        losses, whole, inner, saved = [], [], [], None
        title = f"{self.settings.optimizer} on {describe(self.ranks)}"
        with progress(first, self.settings.steps, title, shown=self.ranks.is_first) as bar:
            for number in range(first, self.settings.steps):
                loss, seconds, optimizer_seconds = self.step(number)
                losses.append(loss)
                whole.append(seconds)
                inner.append(optimizer_seconds)
                if self.ranks.is_first and (number % 10 == 0 or number + 1 == self.settings.steps):
                    shown = loss.item() * self.ranks.world_size
                    bar.set_postfix_str(f"loss ~{shown:.2f}", refresh=False)
                bar.update()
                if number + 1 == self.settings.save_at:
                    saved = self.save(number + 1)
        return {
            "losses": self.ranks.sum(torch.stack(losses)).tolist() if losses else [],
            "step_ms": measure.summarize_times(whole),
            "optimizer_step_ms": measure.summarize_times(inner),
            "checkpoint": saved,
        }


def describe(ranks: Cluster) -> str:
    """For people: "3 ranks (cpu, gloo)"."""
    plural = "" if ranks.world_size == 1 else "s"
    return f"{ranks.world_size} rank{plural} ({ranks.device.type}, {ranks.backend})"


def progress(first: int, last: int, title: str, *, shown: bool) -> tqdm:
    """A progress bar on stderr; in a log file it writes a line only now and then."""
    interval = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(
        total=last,
        initial=first,
        desc=title,
        unit="step",
        ncols=100,
        mininterval=interval,
        maxinterval=interval,
        disable=not shown,
    )


def run(settings: argparse.Namespace, ranks: Cluster) -> dict[str, Any]:
    """Do what the options ask for and return the results, the same on all ranks. Collective.

    Raises ValueError (shard4bit.CheckpointError is one) for what the user can mend.
    """
    job = Run(settings, ranks)
    results: dict[str, Any] = {
        "optimizer": settings.optimizer,
        "second_moment": settings.second_moment if settings.optimizer == "adamw4bit" else None,
        "world_size": ranks.world_size,
        "device": ranks.device.type,
        "backend": ranks.backend,
        "torch": torch.__version__,
        "parameters": measure.parameter_count(job.model),
        **job.identity,
    }
    first = 0
    if settings.resume is not None:
        first = job.load(settings.resume)
        results["restored_digest"] = job.digest()
    results["first_step"] = first
    if not settings.check_only:
        results |= job.train(first)
    results["val_loss"] = job.evaluate()
    results["digest"] = job.digest()
    state_bytes = ranks.sum(torch.tensor(measure.local_state_bytes(job.optimizer)))
    results["state_bytes"] = int(state_bytes)
    results["state_bytes_per_parameter"] = int(state_bytes) / results["parameters"]
    return results


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status (2 for a user's error)."""
    settings = options.parse(argv)
    ranks = cluster.start(settings.device)
    try:
        results = run(settings, ranks)
    except ValueError as error:
        if ranks.is_first:
            print(f"launch.train: error: {error}", file=sys.stderr)
        return 2
    if ranks.is_first:
        print(f"{describe(ranks)}: validation loss {results['val_loss']:.4f} nats/byte")
        if settings.results is not None:
            settings.results.parent.mkdir(parents=True, exist_ok=True)
            settings.results.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    cluster.leave(main())
