"""``convert``: a training state from one form into another, tensor by tensor."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from shard4bit.checkpoint.manifest import NAME
from shard4bit.cli.formats import adamw, canonical, dcp, single
from shard4bit.cli.formats.package import Package, restated
from shard4bit.cli.tables import UsageError

FORMS = ("canonical", "adamw", "safetensors", "dcp")
_ENDINGS = {".pt": "adamw", ".pth": "adamw", ".bin": "adamw", ".safetensors": "safetensors"}


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a canonical checkpoint (or a directory of them), a DCP directory, a .pt file with the "
        "state_dict of torch's AdamW or SGD, or a .safetensors file that convert wrote",
    )
    parser.add_argument(
        "target", metavar="TARGET", help="what to write; for canonical the directory that gets step-…"
    )
    parser.add_argument("--to", choices=FORMS, help="form of TARGET (default: by its ending)")
    parser.add_argument(
        "--states",
        choices=("keep", "fp32", "4bit"),
        help="moments as they are, in fp32, or quantized (default: fp32 to .pt, 4bit from .pt, else keep)",
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


def run(options: argparse.Namespace) -> int:
    kind = source_form(options.source)
    form = options.to or _ENDINGS.get(Path(options.target).suffix)
    if form is None:
        raise UsageError(
            f"{options.target}: give --to {'|'.join(FORMS)}, or a target that ends in .pt or .safetensors"
        )
    if (options.model or options.names) and kind != "adamw":
        raise UsageError("--model and --names belong to a .pt file as the source")
    states = options.states or ("fp32" if form == "adamw" else "4bit" if kind == "adamw" else "keep")
    if form == "adamw" and states != "fp32":
        raise UsageError(f"--states {states}: torch's optimizers know fp32 states only")
    if form != "canonical" and os.path.lexists(options.target):
        raise UsageError(f"{options.target} exists already: remove it, or name another target")
    if not Path(options.target).absolute().parent.is_dir():
        raise UsageError(f"{options.target}: its directory does not exist")
    if options.step is not None and not 0 <= options.step < 10**10:
        raise UsageError(f"--step {options.step}: expected an integer in [0, 10^10)")
    specs = {o: getattr(options, o) for o in ("first_moment", "second_moment", "momentum_buffer")}
    package = _carried(restated(load(kind, options), states, specs), form)
    write = {"canonical": canonical, "adamw": adamw, "safetensors": single, "dcp": dcp}[form].write
    print(f"wrote {write(package, options.target)}: {_summary(package)}")
    return 0


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
    """Which of ``FORMS`` a path holds. Raises UsageError."""
    path = Path(source)
    if path.is_dir():
        return "dcp" if (path / dcp.METADATA).is_file() and not (path / NAME).is_file() else "canonical"
    if not path.is_file():
        raise UsageError(f"{source}: no such file or directory")
    if path.suffix not in _ENDINGS:
        raise UsageError(f"{source}: expected a directory, or a file that ends in {', '.join(_ENDINGS)}")
    return _ENDINGS[path.suffix]


def load(kind: str, options: argparse.Namespace) -> Package:
    if kind == "adamw":
        return adamw.read(options.source, options.model, options.names, options.step)
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
