"""save, load and digest: the only place where optimizers, checkpoints and engines meet."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from shard4bit.checkpoint import extra as _extra
from shard4bit.checkpoint import rng as _rng
from shard4bit.checkpoint import store
from shard4bit.checkpoint.digest import digest as _digest
from shard4bit.checkpoint.manifest import Manifest
from shard4bit.checkpoint.pieces import DTYPES, Piece
from shard4bit.checkpoint.ranks import together, world
from shard4bit.errors import CheckpointError
from shard4bit.inventory import Inventory, some
from shard4bit.log import log
from shard4bit.optim.base import QuantizedOptimizer

#: (dtype in a checkpoint, dtype of a buffer): casts that change no value
_EXACT = {("BF16", "F32"), ("F16", "F32"), ("BF16", "F64"), ("F16", "F64"), ("F32", "F64")}


@dataclass(frozen=True)
class Loaded:
    """What ``load`` found. path: the checkpoint; step, extra: as given to ``save``; skipped: names of
    tensors that only one side has (with strict=False), and of random number generators that could not be
    restored; rng: whether any were."""

    path: Path
    step: int
    extra: Any
    skipped: list[str] = field(default_factory=list)
    rng: bool = False


@overload
def save(
    root: str | Path,
    model: Any,
    optimizer: QuantizedOptimizer | None = None,
    *,
    step: int,
    extra: Any = None,
    parameters: bool = True,
    frozen: bool = True,
    rng: bool = False,
    asynchronous: Literal[False] = False,
    keep_last: int | None = None,
) -> Path: ...
@overload
def save(
    root: str | Path,
    model: Any,
    optimizer: QuantizedOptimizer | None = None,
    *,
    step: int,
    extra: Any = None,
    parameters: bool = True,
    frozen: bool = True,
    rng: bool = False,
    asynchronous: Literal[True],
    keep_last: int | None = None,
) -> store.Saving: ...
def save(
    root: str | Path,
    model: Any,
    optimizer: QuantizedOptimizer | None = None,
    *,
    step: int,
    extra: Any = None,
    parameters: bool = True,
    frozen: bool = True,
    rng: bool = False,
    asynchronous: bool = False,
    keep_last: int | None = None,
) -> Path | store.Saving:
    """Write the canonical checkpoint ``root/step-%010d`` and return its path. Collective.

    The quantized states are written as they are. Every rank writes what it holds into one safetensors
    file; the directory appears under its name only when it is complete.

    extra: the caller's, from JSON's types, tuples and tensors; the first rank's counts. parameters=False:
    the optimizer's state only. frozen=False: leave out parameters that require no gradient, and buffers.
    rng=True: with the states of every rank's random number generators. asynchronous=True: return when the
    rank's share is copied to host memory, with a handle to ``wait()`` on, while a thread writes; a save,
    load or digest waits for the one in flight. keep_last=N: once this one is published, remove all but
    the newest N of the checkpoints up to this step.
    Raises CheckpointError on every rank if any rank fails (in the background: by ``wait()``, or by the
    next save) or ranks give other arguments; nothing is left that could be taken for a checkpoint.
    """
    root = Path(root)
    rank, world_size = world()

    def collect() -> tuple[Inventory, Manifest, list[Piece]]:
        store.raise_unseen()
        _check_numbers(step, keep_last)
        inventory = Inventory(model, optimizer, parameters=parameters, frozen=frozen)
        if not parameters and inventory.optimizer is None:
            raise CheckpointError("parameters=False without an optimizer leaves nothing to save")
        inventory.check_memory()
        if parameters and rank == 0:
            inventory.warn_of_extra_states()
        json, tensors = _extra.encode(extra)
        others = _extra.pieces(tensors) if rank == 0 else []
        others += _rng.pieces(rank, world_size) if rng else []
        about = Manifest(
            step=step,
            world_size=world_size,
            tensors={},
            files={},
            parameters=inventory.facts(),
            groups=inventory.groups(),
            content={
                "parameters": parameters,
                "frozen": frozen,
                "optimizer": inventory.optimizer is not None,
            },
            extra=json,
        )
        return inventory, about, others

    store.settle()
    # other steps would be lost in rank 0's, and a rank that waits for a thread would not meet the others
    alike = f"{step=}, {asynchronous=}, {parameters=}, {frozen=}, {rng=}"
    inventory, about, others = together("preparing to save", collect, alike=alike)
    write = store.write_later if asynchronous else store.write
    return write(root, _own_pieces(inventory) + others, about, keep_last=keep_last)


def load(
    path: str | Path,
    model: Any,
    optimizer: QuantizedOptimizer | None = None,
    *,
    hyperparameters: bool = True,
    strict: bool = True,
    rng: bool = True,
) -> Loaded:
    """Restore a model and its optimizer from ``path``, a checkpoint or a directory of them (then the
    newest complete one), on any number of ranks. Collective.

    hyperparameters=False keeps the optimizer's own lr, weight decay, ... strict=False loads what both
    sides have and names the rest in ``Loaded.skipped``. Random number generators are restored if the
    checkpoint has their states and the number of ranks is that which saved; rng=False leaves them.
    Raises CheckpointError on every rank, with nothing changed, for a checkpoint that is missing, damaged
    or of another model or spec, and for parts of a DeepSpeed engine in place of the engine.
    """
    store.settle()
    directory, manifest = store.find(Path(path))
    with_groups = hyperparameters and manifest.content["optimizer"]
    others = together(f"reading {directory}", lambda: _extra.wanted(manifest))
    states, unused = together(f"reading {directory}", lambda: _rng.wanted(manifest, rng, *world()))

    def match() -> tuple[Inventory, list[Piece], list[str], list[tuple[Tensor, Tensor]]]:
        if "shard4bit.deepspeed.attach" in sys.modules:  # there may be engines
            from shard4bit.deepspeed import source

            source.refuse_parts(model, optimizer)
        inventory = Inventory(
            model,
            optimizer if manifest.content["optimizer"] or strict else None,
            parameters=manifest.content["parameters"],
            frozen=manifest.content["frozen"],
        )
        inventory.check_memory()
        pieces, wider = _widening(manifest, inventory, list(inventory.pieces(whole_units=True)))
        skipped = _compare(manifest, inventory, pieces, strict)
        if with_groups:
            inventory.check_groups(manifest.groups)
        _extra.decode(manifest.extra, {p.key: p.data for p in others})  # its errors before any change
        return inventory, [p for p in pieces if p.key in manifest.tensors], skipped, wider

    inventory, pieces, skipped, wider = together(f"matching {directory} with the model", match)
    store.read_into(directory, manifest, pieces + others + states)
    for data, saved in wider:
        data.copy_(saved)
    inventory.adopt(manifest, with_groups)
    _rng.restore({p.key: p.data[0] for p in states})
    extra = _extra.decode(manifest.extra, {p.key: p.data for p in others})
    log.info("loaded %s of step %d, saved by %d ranks", directory, manifest.step, manifest.world_size)
    return Loaded(directory, manifest.step, extra, skipped + unused, bool(states))


def digest(model: Any, optimizer: QuantizedOptimizer | None = None) -> str:
    """A hex digest of parameters, buffers and quantized states (with their step counts), from the live
    tensors, the same for every sharding and number of ranks; one flipped bit changes it. Collective.
    """

    def collect() -> tuple[Inventory, list[str]]:
        inventory = Inventory(model, optimizer, parameters=True, frozen=True)
        return inventory, [f"{k} {v['shape']} {v.get('step')}" for k, v in inventory.facts().items()]

    store.settle()
    inventory, facts = together("preparing a digest", collect)
    return _digest(_own_pieces(inventory), facts)


def _check_numbers(step: Any, keep_last: Any) -> None:
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 10**10:
        raise CheckpointError(f"step={step!r}: expected an integer in [0, 10^10)")
    if keep_last is not None and (type(keep_last) is not int or keep_last < 1):
        raise CheckpointError(f"keep_last={keep_last!r}: expected None or a number from 1")


def _own_pieces(inventory: Inventory) -> list[Piece]:
    """What this rank holds. Ranks exchange halves of cut bytes here, so all must have come this far."""
    return together("collecting tensors", lambda: list(inventory.pieces(whole_units=False)))


def _widening(
    manifest: Manifest, inventory: Inventory, pieces: list[Piece]
) -> tuple[list[Piece], list[tuple[Tensor, Tensor]]]:
    """The pieces, with those of buffers that were saved in a narrower dtype (FSDP1 casts them while it
    trains) in that one; and the pairs (wider tensor, what is read) of these."""
    parameters = {f"model/{item.name}" for item in inventory.source.parameters()}
    wider: list[tuple[Tensor, Tensor]] = []
    for number, piece in enumerate(pieces):
        info = manifest.tensors.get(piece.key)
        if info is None or not piece.key.startswith("model/") or piece.key in parameters:
            continue
        if (info.dtype, piece.dtype) in _EXACT:
            dtype = next(d for d, name in DTYPES.items() if name == info.dtype)
            wider.append((piece.data, torch.empty_like(piece.data, dtype=dtype)))
            pieces[number] = replace(piece, data=wider[-1][1])
    return pieces, wider


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
    ours = inventory.keys()
    theirs = {key for key in manifest.tensors if not key.startswith(("extra/", "rng/"))}
    if inventory.optimizer is None:  # the model alone
        theirs = {key for key in theirs if not key.startswith("state/")}
    # FSDP1's first checkpoints have a shared buffer under each of its names
    theirs -= {f"model/{name}" for name in inventory.aliases}
    if inventory.optimizer is None and not manifest.content["parameters"]:
        raise CheckpointError(
            "the checkpoint has an optimizer's state alone (parameters=False), and load got no optimizer: "
            "there is nothing to load; give it the optimizer, or take a checkpoint with parameters"
        )
    missing, extra = sorted(ours - theirs), sorted(theirs - ours)
    if strict and (missing or extra):
        raise CheckpointError(
            f"the checkpoint lacks {some(missing)} and has {some(extra)} that this model and optimizer "
            "lack; strict=False loads what both have"
        )
    return missing + extra
