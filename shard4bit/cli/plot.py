"""``plot``: histograms of the moments in a file or checkpoint, as they are and as codes would hold them."""

from __future__ import annotations

import argparse
from fnmatch import fnmatchcase

from shard4bit import plot
from shard4bit.cli import convert
from shard4bit.cli.formats.package import values
from shard4bit.cli.tables import UsageError, progress
from shard4bit.spec import FIRST_MOMENTS, SECOND_MOMENTS, is_quantized

DEFAULT = ("B128/DE", "rank1")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="what convert reads: a checkpoint, a .pt file, ...")
    parser.add_argument("target", metavar="TARGET", help="the figure, .png or .pdf")
    parser.add_argument("--tensor", action="append", metavar="PATTERN", help="names, such as 'layers.0.*'")
    parser.add_argument(
        "--spec",
        action="append",
        metavar="SPEC",
        help=f"quantizers to compare (default: {', '.join(DEFAULT)}); known are {', '.join(SECOND_MOMENTS)}",
    )
    parser.add_argument("--most", type=int, default=4, metavar="N", help="parameters to draw (default 4)")
    parser.add_argument("--model", metavar="FILE", help="as for convert")
    parser.add_argument("--names", metavar="FILE", help="as for convert")
    parser.set_defaults(step=None)


def run(options: argparse.Namespace) -> int:
    plot.needs_matplotlib()
    specs, patterns = options.spec or DEFAULT, options.tensor or ["*"]
    known = {"rank1", "block", *FIRST_MOMENTS, *SECOND_MOMENTS}
    for spec in specs:
        if spec not in known and not spec.startswith("B"):
            raise UsageError(f"--spec {spec}: expected one of {', '.join(sorted(known))}, or B<n>/...")
    package = convert.load(convert.source_form(options.source), options)
    entries = [
        entry
        for entry in package.entries
        if entry.moments and is_quantized(entry.shape) and any(fnmatchcase(entry.name, p) for p in patterns)
    ][: options.most]
    if not entries:
        raise UsageError(
            f"{options.source} has no quantizable parameter with a state that matches {patterns}"
        )
    rows: dict[str, plot.Panels] = {}
    for entry in progress(entries, "quantizing"):
        for name, stored in entry.moments.items():
            found = values(stored.load())
            title = f"as it is ({stored.spec})"
            rows[f"{entry.name}, {name}"] = {title: found.view(-1), **plot.requantized(found, name, specs)}
    plot.draw(rows, options.target)
    print(f"wrote {options.target}: {', '.join(entry.name for entry in entries)}")
    return 0
