"""``memory``: bytes per rank of a training, and the largest model that fits a card."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict
from typing import Any

from shard4bit.cli.models import Model, find_model, of_size
from shard4bit.cli.plan import OPTIMIZERS, usage
from shard4bit.cli.shards import BYTES, ENGINES, Setup
from shard4bit.cli.states import Moments
from shard4bit.cli.tables import Table, UsageError, count, show, size

NOT_COUNTED = (
    "Kernels: their tables and workspace, and what ranks reduce. Rounding: by CUDA's caching allocator.\n"
    "Not counted: activations, CUDA context, NCCL's buffers, the allocator's fragments."
)
_COLUMNS = ("weights", "gradients", "master", "moments", "kernels", "rounding", "backward", "step", "save")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        nargs="?",
        metavar="SOURCE",
        help="config.json of Hugging Face, its directory, or a checkpoint",
    )
    parser.add_argument("--params", type=number, help="instead: a Llama-like model of this size, such as 7e9")
    parser.add_argument("--engine", choices=ENGINES, default="single")
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="data-parallel ranks")
    parser.add_argument(
        "--param-dtype",
        choices=BYTES,
        help="what forward computes in (default: bf16 under FSDP and ZeRO, else fp32)",
    )
    parser.add_argument("--grad-dtype", choices=BYTES, help="of gradients at the step, under ZeRO")
    parser.add_argument(
        "--master-dtype",
        choices=("none", *BYTES),
        help="weights that the optimizer updates, where they are others (default: fp32 under FSDP and ZeRO)",
    )
    parser.add_argument(
        "--bucket",
        type=number,
        default=5e8,
        metavar="ELEMENTS",
        help="ZeRO's reduce_bucket_size (default 5e8)",
    )
    parser.add_argument(
        "--card", type=capacity, metavar="80GB", help="also the largest Llama-like model that fits"
    )
    parser.add_argument("--json", action="store_true", help="integers, for programs")


def number(text: str) -> float:
    value = float(text)  # argparse turns a ValueError into its own error
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def capacity(text: str) -> int:
    """Bytes of "80GB", "80GiB" or "8e10"."""
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([kMGT]?)(i?)B?", text.strip(), re.I)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected bytes, such as 80GB or 80GiB")
    power = " kmgt".index(found[2].lower() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def setup_of(options: argparse.Namespace) -> Setup:
    """The engine's usual dtypes where none are given."""
    engine = options.engine
    sharded = engine not in ("single", "ddp")
    master = options.master_dtype or ("fp32" if sharded else "none")
    return Setup(
        engine,
        options.world_size,
        options.param_dtype or ("bf16" if sharded else "fp32"),
        options.grad_dtype,
        None if master == "none" else master,
        int(options.bucket),
    )


def run(options: argparse.Namespace) -> int:
    setup = setup_of(options)
    if options.source is None and options.params is None and options.card is None:
        raise UsageError("give a config.json, a checkpoint, --params (such as 7e9) or --card (such as 80GB)")
    asked = options.source is not None or options.params is not None
    model = find_model(options.source, options.params) if asked else None
    figures = {name: usage(model, setup, moments) for name, moments in OPTIMIZERS.items()} if model else {}
    fitting = (
        {name: largest(setup, options.card, m) for name, m in OPTIMIZERS.items()} if options.card else {}
    )
    if options.json:
        print(json.dumps(_plain(model, setup, figures, fitting), indent=2))
        return 0
    parts: list[Table | str] = [_heading(model, setup)]
    if model:
        rows = [[name, *(size(getattr(u, c)) for c in _COLUMNS)] for name, u in figures.items()]
        titles = [*_COLUMNS[:6], *(f"peak {c}" for c in _COLUMNS[6:])]
        parts.append(Table("Bytes on the fullest rank", ["optimizer", *titles], rows))
    if options.card:
        rows = []
        for name, fit in fitting.items():
            peak = size(usage(fit, setup, OPTIMIZERS[name]).peak) if fit else "-"
            rows.append([name, count(fit.numel) if fit else "none", peak])
        title = f"Largest Llama-like model on cards of {size(options.card)}"
        parts.append(Table(title, ["optimizer", "parameters", "peak"], rows))
    show([*parts, NOT_COUNTED + _hints(setup)])
    return 0


def _heading(model: Model | None, setup: Setup) -> str:
    ranks = "1 rank" if setup.world == 1 else f"{setup.world} ranks"
    dtypes = f"weights {setup.held}, gradients {setup.grads}"
    if setup.is_fsdp and setup.held != setup.param:
        dtypes += f" (the shards are the master weights; computes in {setup.param})"
    elif setup.master and setup.master != setup.param or setup.is_zero:
        dtypes += f", master {setup.master}"
    lines = [model.about] if model else []
    return "\n".join([*lines, f"{setup.engine}, {ranks}: {dtypes}"])


def _hints(setup: Setup) -> str:
    if setup.is_fsdp:
        return "\nBackward: an estimate; two layers gathered, one layer's gradients before they are reduced."
    if setup.is_zero:
        return "\nBackward: with one reduction bucket. All parameters in one group."
    return "\nBackward: with DDP's gradient buckets." if setup.engine == "ddp" else ""


def largest(setup: Setup, card: int, moments: Moments) -> Model | None:
    """The largest model of ``of_size`` whose peak fits into ``card`` bytes, to about 0.5 %."""

    def peak(params: float) -> int:
        return usage(of_size(params), setup, moments, most=16).peak

    low, high = 1e6, min(1e14, card * setup.world * 2.0)  # half a byte a parameter is less than any needs
    at_low = peak(low)
    if at_low > card:
        return None
    at_high = peak(high)
    for _ in range(40):  # nearly linear, so that interpolation gets there in a few steps
        if high / low < 1.005:
            break
        share = (card - at_low) / (at_high - at_low)
        middle = low + (high - low) * min(max(share, 0.003), 0.997)
        found = peak(middle)
        if found <= card:
            low, at_low = middle, found
            if found > 0.997 * card:
                break
        else:
            high, at_high = middle, found
    while usage(of_size(low), setup, moments).peak > card:  # a rank that was not looked at
        low *= 0.999
    return of_size(low)


def _plain(model: Model | None, setup: Setup, figures: Any, fitting: Any) -> dict[str, Any]:
    return {
        "model": model and {"about": model.about, "parameters": model.numel},
        "setup": asdict(setup),
        "bytes": {
            name: {**asdict(found), "rounding": found.rounding, "peak": found.peak}
            for name, found in figures.items()
        },
        "largest": {name: found and found.numel for name, found in fitting.items()},
    }
