"""``convert``: a training state from one form into another, tensor by tensor."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from shard4bit.checkpoint.manifest import NAME
from shard4bit.cli import found
from shard4bit.cli.formats import adamw, canonical, dcp, single, zero
from shard4bit.cli.formats.package import Entry, Package, restated
from shard4bit.cli.tables import Bar, UsageError

FORMS = ("canonical", "adamw", "safetensors", "dcp", "universal")
_ENDINGS = {".pt": "adamw", ".pth": "adamw", ".bin": "adamw", ".safetensors": "safetensors"}
_EXACT = ("adamw", "universal")  # sources whose moments are fp32


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a canonical checkpoint (or a directory of them), a DCP directory, a .pt file with the "
        "state_dict of torch's AdamW or SGD, a .safetensors file that convert wrote, or of DeepSpeed: the "
        "directory of engine.save_checkpoint with 4-bit states, or a universal checkpoint of AdamW",
    )
    parser.add_argument(
        "target", metavar="TARGET", help="what to write; for canonical the directory that gets step-…"
    )
    parser.add_argument("--to", choices=FORMS, help="form of TARGET (default: by its ending)")
    parser.add_argument(
        "--states",
        choices=("keep", "fp32", "4bit"),
        help="moments as they are, in fp32, or quantized (default: fp32 to .pt and universal, 4bit from "
        "these, else keep)",
    )
    parser.add_argument("--first-moment", default="B128/DE", metavar="SPEC", help="for --states 4bit")
    parser.add_argument("--second-moment", default="rank1", metavar="SPEC", help="for --states 4bit")
    parser.add_argument("--momentum-buffer", default="B128/DE", metavar="SPEC", help="the same, of SGD")
    parser.add_argument("--model", metavar="FILE", help="safetensors of the model, beside a .pt file")
    parser.add_argument(
        "--names", metavar="FILE", help="JSON list of parameter names, for a .pt file without"
    )
    parser.add_argument(
        "--step", type=int, help="of the result (default: the source's, or the largest count)"
    )
    parser.add_argument(
        "--trusted",
        action="store_true",
        help="let the pickles of a DeepSpeed checkpoint run code, for objects of your own in client_state",
    )


def run(options: argparse.Namespace) -> int:
    kind = source_form(options.source)
    form = options.to or _ENDINGS.get(Path(options.target).suffix)
    if form is None:
        raise UsageError(
            f"{options.target}: give --to {'|'.join(FORMS)}, or a target that ends in .pt or .safetensors"
        )
    _check(options, kind, form)
    if form == "universal":
        print(f"wrote {zero.write(options.source, options.target, options.trusted)}")
        return 0
    states = options.states or ("fp32" if form == "adamw" else "4bit" if kind in _EXACT else "keep")
    specs = {o: getattr(options, o) for o in ("first_moment", "second_moment", "momentum_buffer")}
    package = _carried(restated(load(kind, options), states, specs), form)
    write = {"canonical": _canonical, "adamw": adamw.write, "safetensors": single.write, "dcp": dcp.write}[
        form
    ]
    print(f"wrote {write(package, options.target)}: {_summary(package)}")
    return 0


def _check(options: argparse.Namespace, kind: str, form: str) -> None:
    """Raise UsageError for options that do not go together."""
    if (options.model or options.names) and kind != "adamw":
        raise UsageError("--model and --names belong to a .pt file as the source")
    if options.trusted and kind not in zero.KINDS:
        raise UsageError(
            "--trusted belongs to a checkpoint of DeepSpeed's as the source; no other form needs it"
        )
    if form in ("adamw", "universal") and options.states not in (None, "fp32"):
        whose = "torch's" if form == "adamw" else "DeepSpeed's"
        raise UsageError(f"--states {options.states}: {whose} optimizers know fp32 states only")
    if form == "universal" and kind != "native":
        raise UsageError(
            "--to universal takes a checkpoint that engine.save_checkpoint wrote: that has what DeepSpeed "
            "keeps beside weights and states. Load this one into an engine (shard4bit.load) and save it there"
        )
    if form == "universal" and options.step is not None:
        raise UsageError("--step: a universal checkpoint keeps DeepSpeed's own counts of steps")
    if form != "canonical" and os.path.lexists(options.target):
        raise UsageError(f"{options.target} exists already: remove it, or name another target")
    if not Path(options.target).absolute().parent.is_dir():
        raise UsageError(f"{options.target}: its directory does not exist")
    if options.step is not None and not 0 <= options.step < 10**10:
        raise UsageError(f"--step {options.step}: expected an integer in [0, 10^10)")


def _canonical(package: Package, path: str) -> str:
    """``canonical.write`` with a bar, which moves when the writer asks for another parameter."""
    seen: set[str] = set()
    with Bar("writing") as bar:

        def shown(entry: Entry, load: Callable[[], Tensor]) -> Tensor:
            seen.add(entry.name)
            bar.to(len(seen), len(package.entries))
            return load()

        entries = [
            entry if entry.value is None else replace(entry, value=partial(shown, entry, entry.value))
            for entry in package.entries
        ]
        return canonical.write(replace(package, entries=entries), path)


def _carried(package: Package, form: str) -> Package:
    """The package with what the form can hold; says on stderr what is left out."""
    lost = [] if form == "canonical" else sorted(package.others)
    extra = package.extra
    if extra is not None and (form in ("adamw", "dcp") or any(key.startswith("extra/") for key in lost)):
        lost, extra = ["extra", *lost], None
    if lost:
        print(f"left out, since only canonical checkpoints hold it: {', '.join(lost)}", file=sys.stderr)
    return replace(package, extra=extra, others={} if form != "canonical" else package.others)


def source_form(source: str) -> str:
    """Which of ``FORMS`` a path holds, or "native" (DeepSpeed's). Raises UsageError."""
    path = Path(source)
    if path.is_dir():
        if (of_deepspeed := found.deepspeed(path)) is not None:
            return of_deepspeed[0]
        return "dcp" if (path / dcp.METADATA).is_file() and not (path / NAME).is_file() else "canonical"
    if not path.is_file():
        raise UsageError(f"{source}: no such file or directory")
    if path.suffix not in _ENDINGS:
        raise UsageError(f"{source}: expected a directory, or a file that ends in {', '.join(_ENDINGS)}")
    return _ENDINGS[path.suffix]


def load(kind: str, options: argparse.Namespace) -> Package:
    if kind == "adamw":
        return adamw.read(options.source, options.model, options.names, options.step)
    if kind in zero.KINDS:
        return zero.read(options.source, options.step, getattr(options, "trusted", False))  # plot has none
    if kind == "dcp":
        return dcp.read(options.source, options.step)
    package = canonical.read(options.source) if kind == "canonical" else single.read(options.source)
    if options.step is None:
        return package
    return replace(package, step=options.step)


def _summary(package: Package) -> str:
    stated = sum(1 for entry in package.entries if entry.moments)
    specs = sorted({str(s.spec) for entry in package.entries for s in entry.moments.values()})
    with_states = f"{stated} with states ({', '.join(specs) or 'none'})"
    return f"{len(package.entries)} tensors, {with_states}, step {package.step}"
