"""The parser, and how errors become one line and an exit status."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from shard4bit.cli.tables import UsageError
from shard4bit.errors import Shard4bitError

COMMANDS = {
    "inspect": "what a checkpoint holds",
    "verify": "check every byte of a checkpoint",
    "memory": "bytes per rank of a training, and the largest model that fits a card",
    "convert": "between canonical checkpoints, AdamW state files, safetensors, DCP and DeepSpeed directories",
    "plot": "histograms of moments as they are and as their codes hold them",
}
OK, FAULT, USAGE = 0, 1, 2


class _Parser(argparse.ArgumentParser):
    """argparse's, with one line for an error instead of the usage before it."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The parser of all commands, whose help shows the options of each."""
    top = _Parser(
        prog="python -m shard4bit",
        description="Exit status: 0, 1 for faults found, 2 for bad usage.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    usages = []
    for name, about in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about)
        importlib.import_module(f"shard4bit.cli.{name}").add(command)
        usages.append(command.format_usage().removeprefix("usage: "))
    top.epilog = "\n".join(usages)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    try:
        options = parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    name = f"python -m shard4bit {options.command}"
    try:
        return int(importlib.import_module(f"shard4bit.cli.{options.command}").run(options))
    except UsageError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return USAGE
    except Shard4bitError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return FAULT
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
