"""Where a run's checkpoints are, and how they are written and read: shard4bit's own, or for optimizers of
others torch's (DCP) and DeepSpeed's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import shard4bit
from launch import folders
from launch.cluster import Cluster
from launch.engines import Single, Zero2
from launch.folders import newest_first, step_name

Extra = dict[str, Any]
RUN = "run.json"  # beside the tensors of others' formats: step and extra


class Canonical:
    """shard4bit's format: read by every engine on any number of ranks."""

    folder = folders.CANONICAL

    def __init__(self, engine: Single, ranks: Cluster) -> None:
        self.engine, self.ranks = engine, ranks

    def save(self, root: Path, step: int, extra: Extra, keep_last: int | None) -> Path:
        """Write ``root/step-...``, remove all but the newest ``keep_last``, and return it. Collective."""
        return shard4bit.save(root, *self.engine.saved(), step=step, extra=extra, keep_last=keep_last)

    def load(self, root: Path) -> tuple[int, Extra]:
        """Restore the newest under ``root``: the step, and the extra that was saved. Collective.

        Raises ValueError for what is damaged or of another model or optimizer.
        """
        found = shard4bit.load(root, *self.engine.saved())
        return found.step, found.extra


class Dcp(Canonical):
    """torch.distributed.checkpoint, written aside and renamed, because DCP leaves half of one if it dies."""

    folder = folders.TORCH
    content = ".metadata"  # what one of this format has beside RUN

    def save(self, root: Path, step: int, extra: Extra, keep_last: int | None) -> Path:
        final, hidden = root / step_name(step), root / f".{step_name(step)}"
        if self.ranks.is_first:
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir(parents=True)
        self.ranks.barrier()
        self._write(hidden)
        self.ranks.barrier()
        if self.ranks.is_first:
            (hidden / RUN).write_text(json.dumps({"step": step, "extra": extra}) + "\n")
            hidden.rename(final)
            for old in newest_first(root)[keep_last:] if keep_last else []:
                shutil.rmtree(old)
        self.ranks.barrier()
        return final

    def load(self, root: Path) -> tuple[int, Extra]:
        path, run, wrong = self._found(root)
        if self.ranks.any(wrong is not None):
            raise ValueError(wrong or f"another rank cannot read {root}: all must see it")
        self._read(path)
        return run["step"], run["extra"]

    def _found(self, root: Path) -> tuple[Path, dict[str, Any], str | None]:
        """The checkpoint that ``root`` is, or the newest in it; its RUN; or what is wrong with them."""
        path = root if (root / RUN).exists() else next(iter(newest_first(root)), None)
        if path is None:
            return root, {}, f"there is no checkpoint in {root}: expected an --out's {self.folder}"
        if not (path / RUN).exists() or not (path / self.content).exists():
            lacking = f"expected {RUN} and {self.content} in it, as in those of an --out's {self.folder}"
            return path, {}, f"{path} is of another kind of optimizer or engine, or damaged: {lacking}"
        try:
            run = json.loads((path / RUN).read_text())
            return path, {"step": run["step"], "extra": run["extra"]}, None
        except (OSError, ValueError, TypeError, KeyError) as error:
            return path, {}, f"{path / RUN} is damaged: {type(error).__name__}: {error}"

    def _tensors(self) -> dict[str, Any]:
        parameters, states = get_state_dict(*self.engine.saved())
        return {"model": parameters, "optimizer": states}

    def _write(self, path: Path) -> None:
        dcp.save(self._tensors(), checkpoint_id=path, no_dist=self.ranks.backend == "none")

    def _read(self, path: Path) -> None:
        content = self._tensors()
        try:
            dcp.load(content, checkpoint_id=path, no_dist=self.ranks.backend == "none")
        except dcp.CheckpointException as error:  # a BaseException, of many lines
            raise ValueError(
                f"{path} is damaged or of another model or optimizer: {_cause(error)}"
            ) from error
        model, optimizer = self.engine.saved()
        set_state_dict(
            model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"]
        )


class DeepSpeedFiles(Dcp):
    """DeepSpeed's files, which only the same number of ranks and stage can read."""

    folder = folders.DEEPSPEED
    content = "files"

    def _write(self, path: Path) -> None:
        self.engine.model.save_checkpoint(str(path), tag=self.content, save_latest=False)

    def _read(self, path: Path) -> None:
        self.engine.model.load_checkpoint(str(path), tag=self.content)


def _cause(error: dcp.CheckpointException) -> str:
    """In one line, what went wrong on the first rank that failed."""
    failure = next(iter(error.failures.values()))[0]
    return f"{type(failure).__name__}: {failure}".splitlines()[0]


def store_of(engine: Single, ranks: Cluster) -> Canonical:
    """What writes and reads the checkpoints of an engine and its optimizer."""
    if engine.choice.ours:
        return Canonical(engine, ranks)
    return (DeepSpeedFiles if isinstance(engine, Zero2) else Dcp)(engine, ranks)
