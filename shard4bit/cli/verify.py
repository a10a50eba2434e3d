"""``verify``: every byte and every number of a checkpoint."""

from __future__ import annotations

import argparse
import json

from shard4bit.checkpoint.verify import verify
from shard4bit.cli.found import directory_of
from shard4bit.cli.tables import Bar, size


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory", metavar="DIR", help="a checkpoint, or a directory of them (then the newest)"
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def run(options: argparse.Namespace) -> int:
    directory = directory_of(options.directory)
    total = sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
    with Bar(f"checking {directory.name}") as bar:
        faults = verify(directory, progress=bar.to)
    if options.json:
        print(json.dumps({"path": str(directory), "bytes": total, "faults": faults}, indent=2))
    elif faults:
        print(f"{directory}: {len(faults)} fault{'s' if len(faults) > 1 else ''}")
        for fault in faults:
            print(f"  {fault}")
    else:
        print(
            f"{directory}: whole, {size(total)}; every checksum agrees, every tensor is covered exactly once"
        )
    return 1 if faults else 0
