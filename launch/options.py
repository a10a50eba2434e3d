"""The command line of launch/train.py."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from launch.cluster import is_first_rank
from launch.model import GPTConfig


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors only rank 0 prints."""

    def error(self, message: str) -> NoReturn:
        """Print the message and leave with status 2."""
        if is_first_rank():
            print(f"{self.prog}: error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def at_least(low: int):
    """A converter of option values to integers that are no less than ``low``."""

    def convert(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{value}: expected at least {low}")
        return value

    convert.__name__ = "integer"
    return convert


def make_parser() -> Parser:
    """All options, with their defaults."""
    parser = Parser(
        prog="launch.train",
        description="Train a byte-level GPT; under torchrun it is sharded over the ranks (FSDP2).",
        epilog="Example: torchrun --standalone --nproc-per-node 2 -m launch.train --steps 100",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, default = parser.add_argument, GPTConfig()
    add("--optimizer", choices=("adamw4bit", "adamw"), default="adamw4bit", help="which AdamW")
    add("--second-moment", default="rank1", help="how adamw4bit stores its second moments")
    add("--steps", type=at_least(1), default=400, help="steps in all, resumed ones included")
    add("--batch", type=at_least(1), default=8, help="sequences per step over all ranks")
    add("--context", type=at_least(1), default=default.context, help="bytes per sequence")
    add("--layers", type=at_least(1), default=default.layers, help="decoder blocks")
    add("--heads", type=at_least(1), default=default.heads, help="attention heads")
    add("--width", type=at_least(1), default=default.width, help="features per position")
    add("--lr", type=float, default=2e-3, help="learning rate after the warm-up")
    add("--warmup", type=at_least(1), default=20, help="steps of linear warm-up")
    add("--seed", type=at_least(0), default=0, help="of the weights and the order of the data")
    add("--data", type=Path, help="text file or folder (none: Python's standard library)")
    add("--device", choices=("auto", "cpu"), default="auto", help="auto: GPUs where they suffice")
    add("--out", type=Path, default=Path("build/train"), help="folder for checkpoints")
    add("--save-at", type=at_least(1), help="save a checkpoint after this many steps")
    add("--resume", type=Path, help="go on from the newest checkpoint in this folder")
    add("--check-only", action="store_true", help="with --resume: load, digest, evaluate, end")
    add("--results", type=Path, help="write the results to this JSON file")
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options as a namespace; leaves with status 2 and one line on stderr for wrong ones."""
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.lr <= 0:
        parser.error(f"--lr {options.lr}: expected a positive number")
    if options.save_at is not None and options.save_at > options.steps:
        parser.error(f"--save-at {options.save_at} lies after the last of --steps {options.steps}")
    if options.check_only and options.resume is None:
        parser.error("--check-only needs --resume")
    if options.resume is not None and options.optimizer != "adamw4bit":
        parser.error("--resume reads checkpoints of --optimizer adamw4bit only")
    return options
