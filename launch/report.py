"""What the demo shows at its end: the digests, the table and the picture of the loss curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

SMOOTHED_OVER = 20  # steps

Results = dict[str, Any]  # what launch.train writes with --results


def ranks_of(results: Results) -> str:
    """For people: "3 ranks (cpu, gloo)"."""
    count = results["world_size"]
    name = "1 rank " if count == 1 else f"{count} ranks"
    return f"{name} ({results['device']}, {results['backend']})"


def digest_lines(saved: Results, restored: list[Results]) -> tuple[str, bool]:
    """The saved digest beside the restored ones, and whether all are equal."""
    digest = saved["checkpoint"]["digest"]
    step = saved["checkpoint"]["step"]
    lines = [
        f"Digests of all parameters and 4-bit states after step {step}",
        f"  saved by    {ranks_of(saved)}  {digest}",
    ]
    same = True
    for results in restored:
        equal = results["restored_digest"] == digest
        same &= equal
        verdict = "equal, bit for bit" if equal else "DIFFERENT"
        lines.append(f"  restored on {ranks_of(results)}  {results['restored_digest']}  {verdict}")
    return "\n".join(lines), same


def continuation_line(whole: Results, resumed: Results) -> str:
    """How the losses of a resumed run compare with those of the run that was never interrupted."""
    first = resumed["first_step"]
    theirs = np.array(resumed["losses"])
    ours = np.array(whole["losses"][first : first + len(theirs)])
    return (
        f"Steps {first + 1} to {first + len(theirs)}, resumed on {ranks_of(resumed)}: losses within "
        f"{np.abs(theirs - ours).max():.4f}\nnats/byte of the uninterrupted run "
        f"(mean {theirs.mean():.4f}, uninterrupted {ours.mean():.4f})"
    )


def _last(losses: list[float]) -> float:
    return float(np.mean(losses[-SMOOTHED_OVER:]))


def table(ours: Results, theirs: Results) -> str:
    """Both optimizers side by side, and how many times less (or more) the 4-bit one takes."""
    count = min(SMOOTHED_OVER, len(ours["losses"]))
    rows = [
        (f"training loss, last {count} steps (nats/byte)", ".3f", lambda r: _last(r["losses"])),
        ("validation loss (nats/byte)", ".3f", lambda r: r["val_loss"]),
        ("optimizer state (bytes/parameter)", ".3f", lambda r: r["state_bytes_per_parameter"]),
        ("checkpoint (MB)", ".2f", lambda r: r["checkpoint"]["bytes"] / 1e6),
        ("optimizer step, median (ms)", ".1f", lambda r: r["optimizer_step_ms"]["median"]),
        ("whole step, median (ms)", ".1f", lambda r: r["step_ms"]["median"]),
    ]
    lines = [f"{'':40}{'AdamW4bit':>12}{'torch AdamW':>14}{'ratio':>9}"]
    for label, style, value in rows:
        a, b = value(ours), value(theirs)
        lines.append(f"{label:40}{a:>12{style}}{b:>14{style}}{a / b:>9.2f}")
    return "\n".join(lines)


def _smooth(losses: list[float]) -> np.ndarray:
    """The mean over the last steps up to each one."""
    total = np.concatenate([[0.0], np.cumsum(losses)])
    stop = np.arange(1, len(losses) + 1)
    start = np.maximum(0, stop - SMOOTHED_OVER)
    return (total[stop] - total[start]) / (stop - start)


def draw(ours: Results, theirs: Results, resumed: Results, path: Path) -> None:
    """Write the loss curves of both optimizers, and of the resumed run, to a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.2), layout="constrained")
    for results, name, color in (
        (theirs, "torch AdamW, fp32 states", "tab:gray"),
        (ours, "AdamW4bit, 4-bit states", "tab:blue"),
    ):
        losses = results["losses"]
        steps = np.arange(1, len(losses) + 1)
        size = results["state_bytes_per_parameter"]
        label = f"{name} ({size:.2f} bytes/parameter)"
        axes.plot(steps, losses, color=color, alpha=0.2, linewidth=0.8)
        axes.plot(steps, _smooth(losses), color=color, linewidth=1.8, label=label)
    first = resumed["first_step"]
    steps = np.arange(first + 1, first + 1 + len(resumed["losses"]))
    label = f"AdamW4bit, resumed on {resumed['world_size']} ranks (each step)"
    axes.plot(steps, resumed["losses"], "o", color="tab:orange", markersize=3, label=label)
    axes.axvline(first, color="black", linewidth=0.8, linestyle=":", label="checkpoint")
    axes.set_xlabel("training step")
    axes.set_ylabel("training loss (nats per byte)")
    size = ours["parameters"] / 1e6
    axes.set_title(f"Byte-level GPT, {size:.2f} M parameters, {ranks_of(ours)}")
    axes.grid(alpha=0.25)
    axes.legend(title=f"thick: mean of {SMOOTHED_OVER} steps, faint: each step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
