"""save, load and digest: the only place where optimizers, checkpoints and engines meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from shard4bit.checkpoint import store
from shard4bit.checkpoint.digest import digest as _digest
from shard4bit.checkpoint.manifest import Manifest
from shard4bit.checkpoint.pieces import Piece
from shard4bit.checkpoint.ranks import together, world
from shard4bit.errors import CheckpointError
from shard4bit.inventory import Inventory, checked_json
from shard4bit.optim.base import QuantizedOptimizer


@dataclass(frozen=True)
class Loaded:
    """What ``load`` found. path: the checkpoint; step, extra: as given to ``save``; skipped: names of
    tensors that only one side has (with strict=False)."""

    path: Path
    step: int
    extra: Any
    skipped: list[str] = field(default_factory=list)


def save(
    root: str | Path,
    model: nn.Module,
    optimizer: QuantizedOptimizer | None = None,
    *,
    step: int,
    extra: Any = None,
    parameters: bool = True,
    frozen: bool = True,
) -> Path:
    """Write the canonical checkpoint ``root/step-%010d`` and return its path. Collective.

    The quantized states are written as they are. Every rank writes what it holds into one safetensors
    file; the directory appears under its name only when it is complete.

    extra: JSON of the caller's. parameters=False: the optimizer's state only. frozen=False: leave out
    parameters that require no gradient, and buffers.
    Raises CheckpointError on every rank if any rank fails; nothing is left that could be taken for a
    checkpoint.
    """
    root = Path(root)

    def collect() -> tuple[Inventory, Manifest]:
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 10**10:
            raise CheckpointError(f"step={step!r}: expected an integer in [0, 10^10)")
        if not parameters and optimizer is None:
            raise CheckpointError("parameters=False without an optimizer leaves nothing to save")
        inventory = Inventory(model, optimizer, parameters=parameters, frozen=frozen)
        about = Manifest(
            step=step,
            world_size=world()[1],
            tensors={},
            files={},
            parameters=inventory.facts(),
            groups=inventory.groups(),
            content={
                "parameters": parameters,
                "frozen": frozen,
                "optimizer": optimizer is not None,
            },
            extra=checked_json(extra),
        )
        return inventory, about

    inventory, about = _everywhere("preparing to save", collect)
    return store.write(root, _own_pieces(inventory), about)


def load(
    path: str | Path,
    model: nn.Module,
    optimizer: QuantizedOptimizer | None = None,
    *,
    hyperparameters: bool = True,
    strict: bool = True,
) -> Loaded:
    """Restore a model and its optimizer from ``path``, a checkpoint or a directory of them (then the
    newest complete one), on any number of ranks. Collective.

    hyperparameters=False keeps the optimizer's own lr, weight decay, ... strict=False loads what both
    sides have and names the rest in ``Loaded.skipped``.
    Raises CheckpointError on every rank, with nothing changed, for a checkpoint that is missing, damaged
    or of another model or spec.
    """
    directory, manifest = store.find(Path(path))

    def match() -> tuple[Inventory, list[Piece], list[str]]:
        inventory = Inventory(
            model,
            optimizer if manifest.content["optimizer"] or strict else None,
            parameters=manifest.content["parameters"],
            frozen=manifest.content["frozen"],
        )
        pieces = list(inventory.pieces(whole_units=True))
        skipped = _compare(manifest, inventory, pieces, strict)
        if optimizer is not None and hyperparameters:
            inventory.check_groups(manifest.groups)
        return inventory, [p for p in pieces if p.key in manifest.tensors], skipped

    inventory, pieces, skipped = _everywhere(f"matching {directory} with the model", match)
    store.read_into(directory, manifest, pieces)
    inventory.adopt(manifest, hyperparameters)
    return Loaded(directory, manifest.step, manifest.extra, skipped)


def digest(model: nn.Module, optimizer: QuantizedOptimizer | None = None) -> str:
    """A hex digest of parameters, buffers and quantized states (with their step counts), from the live
    tensors, the same for every sharding and number of ranks; one flipped bit changes it. Collective.
    """

    def collect() -> tuple[Inventory, list[str]]:
        inventory = Inventory(model, optimizer, parameters=True, frozen=True)
        return inventory, [f"{k} {v['shape']} {v.get('step')}" for k, v in inventory.facts().items()]

    inventory, facts = _everywhere("preparing a digest", collect)
    return _digest(_own_pieces(inventory), facts)


def _own_pieces(inventory: Inventory) -> list[Piece]:
    """What this rank holds. Ranks exchange halves of cut bytes here, so all must have come this far."""
    return _everywhere("collecting tensors", lambda: list(inventory.pieces(whole_units=False)))


def _everywhere(what: str, work: Any) -> Any:
    """``work()`` of this rank; if it raises on any rank, it raises on all."""
    kept: list[Any] = []
    together(what, lambda: kept.append(work()))
    return kept[0]


def _compare(manifest: Manifest, inventory: Inventory, pieces: list[Piece], strict: bool) -> list[str]:
    """Names on one side only; CheckpointError for other shapes, dtypes or specs, and when strict."""
    for name, fact in inventory.facts().items():
        known: Mapping[str, Any] = manifest.parameters.get(name, {})
        for what in ("shape", "moments"):
            if what in known and what in fact and known[what] != fact[what]:
                raise CheckpointError(
                    f"{name}: the checkpoint has {what} {known[what]}, this model and optimizer "
                    f"{fact[what]}; build them as they were when it was saved"
                )
    for piece in pieces:
        info = manifest.tensors.get(piece.key)
        if info is not None and (info.shape, info.dtype) != (piece.shape, piece.dtype):
            raise CheckpointError(
                f"{piece.key}: the checkpoint has {info.dtype} {info.shape}, this model "
                f"{piece.dtype} {piece.shape}"
            )
    ours, theirs = inventory.keys(), set(manifest.tensors)
    if inventory.optimizer is None:  # the model alone
        theirs = {key for key in theirs if not key.startswith("state/")}
    missing, extra = sorted(ours - theirs), sorted(theirs - ours)
    if strict and (missing or extra):
        raise CheckpointError(
            f"the checkpoint lacks {_some(missing)} and has {_some(extra)} that this model and optimizer "
            "lack; strict=False loads what both have"
        )
    return missing + extra


def _some(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
