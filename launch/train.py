"""Train a language model on bytes of text, by any engine and optimizer, on any number of ranks.

python -m launch.train --help lists the options.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import shard4bit
from launch import checkpoints, cluster, engines, folders, measure, optimizers, options, scalars
from launch.cluster import Cluster
from launch.data import Corpus, global_batch, load_corpus, rank_slice
from launch.presets import family
from launch.progress import bar_of, describe
from launch.recipe import Recipe
from launch.scalars import Scalars
from launch.stopping import Stop, restarted

EVALUATION_ROWS = 256  # sequences of held-out text, the same ones in every evaluation


class Run:
    """A model, its optimizer and its data on the ranks of a cluster. Its methods are collective.

    Raises ValueError for options or data that do not fit each other.
    """

    def __init__(self, settings: argparse.Namespace, ranks: Cluster) -> None:
        self.settings = settings
        self.ranks = ranks
        # The same run, once more; the ranks of another node may not know it.
        self.again = ranks.any(restarted())
        if settings.fresh and not self.again:
            refused = options.not_fresh(settings.out)
            if ranks.any(ranks.is_first and refused is not None):
                raise ValueError(refused or "--fresh is refused by the first rank")
        blocked = options.make_folders(settings) if ranks.is_first else None
        if ranks.any(blocked is not None):
            raise ValueError(blocked or "the first rank cannot write there")
        self.context: int = settings.config.context
        self.corpus: Corpus = load_corpus(settings.data, self.context)
        choice = optimizers.choose(
            settings.optimizer,
            settings.lr,
            settings.second_moment,
            compensate=settings.compensate,
            rounding=settings.rounding,
        )
        recipe = Recipe(settings.config, settings.seed, settings.precision, choice)
        self.engine = engines.build(settings.engine, recipe, ranks)
        self.store = checkpoints.store_of(self.engine, ranks)
        self.root: Path = settings.out / self.store.folder
        self.identity = {
            "model": {"family": family(settings.config), **dataclasses.asdict(settings.config)},
            "data": self.corpus.source,
            "seed": settings.seed,
            "batch": settings.batch,
        }

    def _loss(self, rows: np.ndarray) -> Tensor:
        """The sum of the losses, in nats, over this rank's bytes of a global batch."""
        inputs, targets = rank_slice(rows, self.ranks.rank, self.ranks.world_size)
        logits = self.engine.logits(inputs.to(self.ranks.device))
        targets = targets.to(self.ranks.device)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    def lr(self, number: int) -> float:
        """The learning rate of a step."""
        return self.settings.lr * min(1.0, (number + 1) / self.settings.warmup)

    def step(self, number: int) -> tuple[Tensor, float, float]:
        """Do one step: this rank's loss in nats/byte, seconds in all, seconds of the optimizer.

        The losses of all ranks sum to the loss of the global batch.
        """
        want = self.settings
        begin = time.perf_counter()
        rows = global_batch(self.corpus.train, want.seed, number, want.batch, self.context)
        loss = self._loss(rows) / (want.batch * self.context)
        # Engines take the mean of the ranks' gradients; their sum is wanted, the slices being uneven.
        self.engine.backward(loss * self.ranks.world_size)
        self.engine.set_lr(self.lr(number))
        self.ranks.synchronize()
        middle = time.perf_counter()
        self.engine.step()
        self.ranks.synchronize()
        end = time.perf_counter()
        return loss.detach(), end - begin, end - middle

    @torch.no_grad()
    def evaluate(self) -> float:
        """The mean loss over held-out text, in nats/byte; the same text on any number of ranks."""
        batch = max(32, self.settings.batch)
        batches = -(-EVALUATION_ROWS // batch)
        total = torch.zeros((), dtype=torch.float64)
        for i in range(batches):
            rows = global_batch(self.corpus.validation, 0, i, batch, self.context)
            total += self._loss(rows).cpu()
        return self.ranks.sum(total).item() / (batches * batch * self.context)

    def digest(self) -> str | None:
        """Of parameters and optimizer states, where shard4bit knows how to compute it."""
        return shard4bit.digest(*self.engine.saved()) if self.engine.choice.ours else None

    def save(self, step: int) -> dict[str, Any]:
        """Write a checkpoint and describe it."""
        record: dict[str, Any] = {"step": step, "digest": self.digest()}
        begin = time.perf_counter()
        extra = {**self.identity, "engine": self.engine.extra()}
        path = self.store.save(self.root, step, extra, self.settings.keep_last)
        self.ranks.barrier()
        record |= {"path": str(path), "seconds": time.perf_counter() - begin}
        record["bytes"] = measure.folder_bytes(path)
        if self.ranks.is_first:
            tqdm.write(f"saved {path}" + (f"\n  digest {record['digest']}" if record["digest"] else ""))
        return record

    def resume(self) -> int:
        """Restore the newest checkpoint, if there is one, and return the number of steps it has done.

        It is sought in --resume, unless this run was started again and has checkpoints of its own by now.
        Raises shard4bit.CheckpointError, or ValueError where it is of another model or other data.
        """
        want = self.settings
        # all ranks do what the first one sees: another may see a folder later
        own = self.ranks.any(self.ranks.is_first and bool(folders.newest_first(self.root)))
        late = self.again and own and not want.check_only
        root = self.root if want.resume is None or late else want.resume
        if want.resume is None and not own:
            strange = folders.of_run(want.out, tuple(k for k in folders.KINDS if k != self.store.folder))
            if strange:
                raise ValueError(
                    f"{strange[0]} is of another kind of optimizer or engine: give another --out"
                )
            return 0
        try:
            step, extra = self.store.load(root)
        except ValueError as error:
            if root != self.root:
                raise
            raise ValueError(
                f"{error}; the run goes on from what --out has: give another --out to start anew"
            ) from error
        for key, value in self.identity.items():
            if extra.get(key) != value:
                raise ValueError(f"the checkpoint in {root} has {key} {extra.get(key)}, this run has {value}")
        ahead = [path.name for path in folders.newest_first(self.root)[:1]]
        saves = options.saves(want)
        if self.ranks.any(self.ranks.is_first and saves and ahead > [folders.step_name(step)]):
            raise ValueError(
                f"{root} ends at step {step}, but {self.root} goes beyond it: give another --out"
            )
        self._check_options(root)
        self.engine.restore(extra.get("engine", {}))
        if self.ranks.is_first:
            tqdm.write(f"resumed from {root}, step {step}")
        return step

    def _check_options(self, root: Path) -> None:
        """Raise ValueError where an option was given that loading has just replaced by the saved one."""
        for name in ("rounding", "compensate"):
            given = getattr(self.settings, name)
            saved = [group.get(name, given) for group in self.engine.own_optimizer().param_groups]
            other = next((value for value in saved if value != given), given)
            if given is not None and other != given:
                raise ValueError(
                    f"the checkpoint in {root} has {name}={other}, this run was given {name}={given}: leave "
                    "the option out to go on as before, or give another --out to start anew"
                )

    def train(self, first: int, stop: Stop, board: Scalars) -> dict[str, Any]:
        """Do the steps from ``first`` (counted from 0) to the last, or to a stop; saves on the way."""
        want = self.settings
        losses, whole, inner, saved, stopped = [], [], [], None, None
        title = f"{want.optimizer} on {describe(self.ranks)}"
        with bar_of(first, want.steps, title, shown=self.ranks.is_first) as bar:
            for number in range(first, want.steps):
                loss, seconds, optimizer_seconds = self.step(number)
                losses.append(loss)
                whole.append(seconds)
                inner.append(optimizer_seconds)
                if want.tensorboard:
                    board.step(number, self.ranks.sum(loss).item(), self.lr(number), seconds, inner[-1])
                if self.ranks.is_first and (number % 10 == 0 or number + 1 == want.steps):
                    shown = loss.item() * self.ranks.world_size
                    bar.set_postfix_str(f"loss ~{shown:.2f}", refresh=False)
                bar.update()
                stopping = self.ranks.any(stop.signum != 0)
                if stopping or self._due(number + 1):
                    saved = self.save(number + 1)
                    saved["val_loss"] = None if stopping else self.evaluate()
                    board.validation(number + 1, saved["val_loss"])
                if stopping:
                    stopped = number + 1
                    break
        return {
            "losses": self.ranks.sum(torch.stack(losses)).tolist() if losses else [],
            "step_ms": measure.summarize_times(whole),
            "optimizer_step_ms": measure.summarize_times(inner),
            "checkpoint": saved,
            "stopped": stopped,
        }

    def _due(self, done: int) -> bool:
        """Whether to save after so many steps."""
        every = self.settings.save_every
        return done == self.settings.save_at or bool(
            every and (done % every == 0 or done == self.settings.steps)
        )


def run(settings: argparse.Namespace, ranks: Cluster, stop: Stop) -> dict[str, Any]:
    """Do what the options ask for and return the results, the same on all ranks. Collective.

    Raises ValueError (shard4bit.CheckpointError is one) for what the user can mend.
    """
    job = Run(settings, ranks)
    results: dict[str, Any] = {
        "engine": job.engine.name,
        "optimizer": settings.optimizer,
        "second_moment": job.engine.choice.options.get("second_moment"),
        "precision": settings.precision,
        "world_size": ranks.world_size,
        "device": ranks.device.type,
        "backend": ranks.backend,
        "torch": torch.__version__,
        "parameters": job.engine.parameters,
        **job.identity,
    }
    first = job.resume()
    results["first_step"] = first
    results["restored_digest"] = job.digest() if first else None
    with scalars.writer(settings, ranks, first) as board:
        if not settings.check_only:
            results |= job.train(first, stop, board)
        if not results.get("stopped"):  # who is stopped has little time
            results["val_loss"] = job.evaluate()
            done = first if settings.check_only else max(first, settings.steps)
            board.validation(done, results["val_loss"])
    results["digest"] = job.digest()
    state_bytes = ranks.sum(torch.tensor(measure.local_state_bytes(job.engine.own_optimizer())))
    results["state_bytes"] = int(state_bytes)
    results["state_bytes_per_parameter"] = int(state_bytes) / results["parameters"]
    return results


def say(results: dict[str, Any], ranks: Cluster, stop: Stop) -> None:
    """The last line, for people."""
    if results.get("stopped"):
        why = signal.Signals(stop.signum).name if stop.signum else "a signal to another rank"
        print(f"{describe(ranks)}: stopped by {why} after step {results['stopped']}, which is saved")
    else:
        print(f"{describe(ranks)}: validation loss {results['val_loss']:.4f} nats/byte")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status (2 for a user's error)."""
    settings = options.parse(argv)
    stop = Stop()
    try:
        ranks = cluster.start(settings.device)
        results = run(settings, ranks, stop)
    except ValueError as error:
        if options.is_first_rank():
            print(f"launch.train: error: {error}", file=sys.stderr)
        return 2
    if ranks.is_first:
        say(results, ranks, stop)
        if settings.results is not None:
            settings.results.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1  # such as the loss of another rank: end now, so that the launcher can start all again
    cluster.leave(status)
