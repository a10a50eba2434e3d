"""Draw the figures of docs/how-it-works.md: python tools/make_figures.py

codes.png: the values that 4 bits can take. moments.png: the moments of one matrix of the small GPT after 200
steps of torch's AdamW on the sources of Python's standard library, as they are and as quantizers would hold
them, after Figure 3 of the paper. Takes some minutes on a CPU, and matplotlib.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "figures"
WORK = ROOT / "build" / "figures"
STEPS = 200
TENSOR = "blocks.1.mlp.2.weight"
#: quantizers; the first moment is drawn as those that suit it would hold it
SPECS = ("B128/DE", "B128/DE-0", "B128/Linear", "rank1")


def codes(path: Path) -> None:
    """Each table as ticks on a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from shard4bit.maths.mapping import table

    rows = {
        "first moment: DE, signed": table("de", 4, True),
        "second moment: Linear": table("linear", 4, False),
        "(the ablation's DE, with zero)": table("de", 4, False),
        "(the ablation's DE-0)": table("de0", 4, False),
    }
    figure = Figure(figsize=(8, 2.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for height, values in enumerate(reversed(list(rows.values()))):
        axes.plot(list(values), [height] * len(values), "|", markersize=18, color="tab:blue")
    axes.set_yticks(range(len(rows)), list(reversed(rows)))
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("value / scale")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)


def moments(path: Path) -> None:
    """Train, then draw from the checkpoint."""
    shutil.rmtree(WORK, ignore_errors=True)
    train = [sys.executable, "-m", "launch.train", "--engine", "single", "--optimizer", "adamw"]
    train += ["--device", "cpu", "--steps", str(STEPS), "--save-at", str(STEPS), "--out", str(WORK)]
    subprocess.run(train, cwd=ROOT, check=True)
    source = next(WORK.rglob("step-*"))
    draw = [sys.executable, "-m", "shard4bit", "plot", str(source), str(path), "--tensor", TENSOR]
    subprocess.run([*draw, *(word for spec in SPECS for word in ("--spec", spec))], cwd=ROOT, check=True)


def main() -> None:
    sys.path.insert(0, str(ROOT))
    FOLDER.mkdir(exist_ok=True)
    codes(FOLDER / "codes.png")
    moments(FOLDER / "moments.png")


if __name__ == "__main__":
    main()
