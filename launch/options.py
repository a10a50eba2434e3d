"""The command line of launch/train.py. As a program it only checks it, in a moment and without torch:

python -m launch.options OPTIONS

Launchers run that first, so that what is wrong is said once and not by every rank.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import NoReturn

from launch import folders
from launch.mpi import is_first_rank
from launch.presets import PRESETS, GPTConfig, changed
from launch.stopping import restarted

ENGINES = ("auto", "single", "ddp", "fsdp1", "fsdp2", "zero1", "zero2")
OPTIMIZERS = ("adamw4bit", "sgd4bit", "adamw8bit", "adamw", "bnb-adamw8bit")
ROUNDINGS = ("auto", "nearest", "stochastic")
PRECISIONS = ("fp32", "bf16", "fp16")
OURS = OPTIMIZERS[:3]  # of shard4bit
SAVE_EVERY = 100
SGD_LR = 0.1


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
        description="Train a language model on bytes of text, on the ranks that torchrun, deepspeed or "
        "mpirun started or on none. A run goes on from its newest checkpoint; SIGTERM ends it with one.",
        epilog="Example: torchrun --standalone --nproc-per-node 2 -m launch.train --steps 100",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_training(parser)
    _add_checkpoints(parser)
    return parser


def _add_training(parser: Parser) -> None:
    add = parser.add_argument
    add("--preset", choices=tuple(PRESETS), default="small", help="the model; the next four change it")
    add("--context", type=at_least(1), help="bytes per sequence")
    add("--layers", type=at_least(1), help="decoder blocks")
    add("--heads", type=at_least(1), help="attention heads (GPT only)")
    add("--width", type=at_least(1), help="features per position (GPT only)")
    add("--engine", choices=ENGINES, default="auto", help="auto: fsdp2 where there are ranks, else single")
    add("--precision", choices=PRECISIONS, default="fp32", help="of the computations; weights stay in fp32")
    add("--optimizer", choices=OPTIMIZERS, default="adamw4bit", help="adamw is torch's")
    add("--second-moment", help="how adamw4bit stores its second moments (none: rank1)")
    add("--rounding", choices=ROUNDINGS, help="of adamw4bit's second moments (none: auto)")
    add(
        "--compensate",
        action=argparse.BooleanOptionalAction,
        help="make good in a step what rounding would do in later ones (none: as the optimizer)",
    )
    add("--steps", type=at_least(1), default=400, help="steps in all, resumed ones included")
    add("--batch", type=at_least(1), default=8, help="sequences per step over all ranks")
    add("--lr", type=float, help=f"learning rate after the warm-up (none: the preset's; sgd4bit: {SGD_LR})")
    add("--warmup", type=at_least(1), default=20, help="steps of linear warm-up")
    add("--seed", type=at_least(0), default=0, help="of the weights and the order of the data")
    add("--data", type=Path, help="text file or folder (none: Python's standard library)")
    add("--device", choices=("auto", "cpu"), default="auto", help="auto: GPUs where they suffice")
    # what the launchers of DeepSpeed and of old torch add; LOCAL_RANK says the same
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def _add_checkpoints(parser: Parser) -> None:
    add = parser.add_argument
    add("--out", type=Path, default=Path("build/train"), help="folder of the run: its checkpoints")
    add("--save-every", type=at_least(0), help=f"steps between checkpoints, 0: none (none: {SAVE_EVERY})")
    add("--save-at", type=at_least(1), help="save one checkpoint only, after this many steps")
    add("--keep-last", type=at_least(1), help="remove all but the newest so many checkpoints")
    add("--fresh", action="store_true", help="start anew; refused if --out has checkpoints")
    add("--resume", type=Path, help="go on from the newest checkpoint in this folder, not from --out's")
    add("--check-only", action="store_true", help="with --resume: load, digest, evaluate, end")
    add("--results", type=Path, help="write the results to this JSON file")
    add("--tensorboard", action="store_true", help="write losses, rate and times to --out/tensorboard")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options as a namespace; leaves with status 2 and one line on stderr for wrong ones.

    Adds ``config``, the shape of the model, and puts in what depends on other options.
    """
    parser = make_parser()
    options = parser.parse_args(argv)
    for wrong, message in _conflicts(options):
        if wrong:
            parser.error(message)
    preset = PRESETS[options.preset]
    sizes = {name: getattr(options, name) for name in ("context", "layers", "heads", "width")}
    if not isinstance(preset.config, GPTConfig) and (sizes["heads"] or sizes["width"]):
        parser.error(f"--preset {options.preset} has its own heads and width: change --layers or --context")
    try:
        options.config = changed(preset.config, sizes)
    except ValueError as error:
        parser.error(str(error))
    if options.lr is None:
        options.lr = SGD_LR if options.optimizer == "sgd4bit" else preset.lr
    if options.save_every is None:
        options.save_every = SAVE_EVERY if options.save_at is None else 0
    return options


def _conflicts(options: argparse.Namespace) -> list[tuple[bool, str]]:
    """(whether it applies, what is wrong)"""
    late = options.save_at is not None and options.save_at > options.steps
    both = options.save_at is not None and bool(options.save_every)
    given = {"--second-moment": options.second_moment, "--rounding": options.rounding}
    own = [name for name, value in given.items() if value is not None and options.optimizer != "adamw4bit"]
    theirs = options.compensate is not None and options.optimizer not in OURS
    return [
        (options.lr is not None and not options.lr > 0, f"--lr {options.lr}: expected a positive number"),
        (late, f"--save-at {options.save_at} lies after the last of --steps {options.steps}"),
        (both, "--save-at saves once, --save-every often: give one of them"),
        *((True, f"{name} is of adamw4bit, not of {options.optimizer}") for name in own),
        (theirs, f"--compensate is of {', '.join(OURS)}, not of {options.optimizer}"),
        (options.check_only and options.resume is None, "--check-only needs --resume"),
        (options.fresh and options.resume is not None, "--fresh starts anew, --resume goes on: give one"),
    ]


def not_fresh(out: Path) -> str | None:
    """Why --fresh is refused, if --out has checkpoints."""
    there = ", ".join(map(str, folders.of_run(out)))
    return f"--fresh overwrites nothing, and there is {there}: give another --out" if there else None


def saves(options: argparse.Namespace) -> bool:
    """Whether the run is to write checkpoints."""
    return bool(options.save_every or options.save_at) and not options.check_only


def make_folders(options: argparse.Namespace) -> str | None:
    """Make what the run will write into, now and not after the training; why that fails, if it does."""
    wanted = {"--out": options.out} if saves(options) or options.tensorboard else {}
    wanted |= {"--results": options.results.parent} if options.results is not None else {}
    for option, folder in wanted.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return f"{option}: {folder} cannot be made ({error.strerror}): give another place"
        if not os.access(folder, os.W_OK | os.X_OK):
            return f"{option}: {folder} cannot be written to: give another place, or mend its permissions"
    if options.results is not None and options.results.is_dir():
        return f"--results {options.results} is a folder: expected a file"
    return None


def _lacking(options: argparse.Namespace) -> list[str]:
    """The packages that a run with these options imports and that are not installed."""
    needed = ["torch", "numpy", "safetensors", "xxhash", "tqdm"]
    needed += ["deepspeed"] * (options.engine in ("zero1", "zero2"))
    needed += ["bitsandbytes"] * (options.optimizer == "bnb-adamw8bit")
    needed += ["tensorboard"] * options.tensorboard
    return [name for name in needed if importlib.util.find_spec(name) is None]


def _wrong(options: argparse.Namespace) -> str | None:
    """What else can be told before ranks start: names of specs, places, the launcher's variables."""
    for name in os.environ.get("LAUNCH_INTEGERS", "").split():  # those that the calling script reads
        least, text = int(name == "RANKS"), os.environ.get(name, "")
        if text and not (text.isascii() and text.isdigit() and int(text) >= least):
            return f"{name}={text}: expected a number from {least}"
    if options.second_moment is not None:
        from shard4bit.spec import parse_spec

        try:
            parse_spec(options.second_moment, signed=False, argument="--second-moment")
        except ValueError as error:
            return str(error)
    if options.data is not None and not options.data.exists():
        return f"--data {options.data}: no such file or folder"
    if options.resume is not None and not options.resume.is_dir() and not restarted():
        return f"--resume {options.resume}: no such folder"
    return not_fresh(options.out) if options.fresh and not restarted() else None


def main() -> None:
    """Check the command line, variables, places and what is installed here; leave with status 2 for what is
    wrong."""
    options = parse()
    parser = make_parser()
    lacking = _lacking(options)
    if lacking:
        parser.error(f"not installed in {sys.prefix}: {', '.join(lacking)}; run 'make env', or pip install")
    wrong = _wrong(options)
    if wrong:
        parser.error(wrong)


if __name__ == "__main__":
    main()
