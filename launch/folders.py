"""The folders of a run's checkpoints. The standard library only."""

from __future__ import annotations

from pathlib import Path

CANONICAL = "checkpoints"  # shard4bit's, read by every engine on any number of ranks
TORCH = "checkpoints-torch"  # DCP's, of optimizers that are not ours
DEEPSPEED = "checkpoints-deepspeed"  # DeepSpeed's, likewise
KINDS = (CANONICAL, TORCH, DEEPSPEED)


def step_name(step: int) -> str:
    """The name of a step's checkpoint: "step-0000000100"."""
    return f"step-{step:010d}"


def newest_first(root: Path) -> list[Path]:
    """The checkpoints under a folder, which need not exist."""
    return sorted(root.glob("step-" + "[0-9]" * 10), reverse=True)


def of_run(out: Path, kinds: tuple[str, ...] = KINDS) -> list[Path]:
    """The newest checkpoint of each kind that a run's folder has."""
    return [path for kind in kinds for path in newest_first(out / kind)[:1]]
