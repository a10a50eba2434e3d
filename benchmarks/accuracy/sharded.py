"""Experiment 6: one training by one process, FSDP2 and ZeRO-2: python -m benchmarks.accuracy.sharded

Runs launch.train with the same seed and data by each engine, with AdamW of torch and AdamW4bit, and prints
how far the loss curves are from the single process's. "halves" is the single process again, adding up its
gradients in two halves: what the order of sums does to an optimizer without any sharding. (4-bit states are
equal for equal gradients; where gradients differ in their last bits a code may flip.) A run that has left its
JSON in --out is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

ENGINES = ("single", "halves", "fsdp2", "zero2")
OPTIMIZERS = ("adamw", "adamw4bit")
ROOT = Path(__file__).resolve().parents[2]


def train(engine: str, optimizer: str, options: argparse.Namespace, rest: list[str]) -> list[float]:
    """The losses of a run, in nats/byte a step."""
    name = f"{optimizer}-{engine}"
    results = options.out / f"{name}.json"
    if not results.is_file():
        alone = engine in ("single", "halves")
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(options.ranks),
        ]
        program = "benchmarks.accuracy.halves" if engine == "halves" else "launch.train"
        command = [*([sys.executable] if alone else launcher), "-m", program]
        command += ["--engine", "single" if alone else engine]
        command += ["--optimizer", optimizer, "--steps", str(options.steps), "--save-every", "0", "--fresh"]
        command += ["--out", str(options.out / name), "--results", str(results.absolute()), *rest]
        subprocess.run(command, cwd=ROOT, check=True)
    found: dict[str, Any] = json.loads(results.read_text())
    return found["losses"]


def apart(one: list[float], other: list[float]) -> tuple[float, float]:
    """(largest, mean of the last tenth) distance of two curves."""
    distances = [abs(a - b) for a, b in zip(one, other, strict=True)]
    last = distances[-max(1, len(distances) // 10) :]
    return max(distances), sum(last) / len(last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="of FSDP2 and ZeRO-2")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("build/accuracy/sharded"))
    options, rest = parser.parse_known_args()  # the rest goes to launch.train: --preset gpt2-small ...
    options.out.mkdir(parents=True, exist_ok=True)
    print("| optimizer | engine | final loss | largest distance | over the last tenth |")
    print("|---|---|---:|---:|---:|", flush=True)
    for optimizer in OPTIMIZERS:
        curves = {engine: train(engine, optimizer, options, rest) for engine in ENGINES}
        for engine, losses in curves.items():
            most, late = apart(losses, curves["single"])
            tqdm.write(f"| {optimizer} | {engine} | {losses[-1]:.4f} | {most:.2e} | {late:.2e} |")


if __name__ == "__main__":
    main()
