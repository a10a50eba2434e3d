"""What the demo shows at its end: the digests, the table and the picture of the loss curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

SMOOTHED_OVER = 20  # steps

Results = dict[str, Any]  # what launch.train writes with --results


def plural(count: int, noun: str) -> str:
    """For people: "1 rank", "2 ranks"."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def ranks_of(results: Results) -> str:
    """For people: "3 ranks (cpu, gloo)"."""
    return f"{plural(results['world_size'], 'rank')} ({results['device']}, {results['backend']})"


def digest_lines(saved: Results, restored: list[Results]) -> tuple[str, bool]:
    """The saved digest beside the restored ones, and whether all are equal."""
    checkpoint = saved["checkpoint"]
    lines = [
        f"After step {checkpoint['step']}: digest of all parameters and 4-bit states, validation loss",
        _digest_line("saved by", saved, checkpoint["digest"], checkpoint["val_loss"], ""),
    ]
    same = True
    for results in restored:
        equal = results["restored_digest"] == checkpoint["digest"]
        same &= equal
        verdict = "equal, bit for bit" if equal else "DIFFERENT"
        digest, loss = results["restored_digest"], results["val_loss"]
        lines.append(_digest_line("restored on", results, digest, loss, verdict))
    return "\n".join(lines), same


def _digest_line(verb: str, results: Results, digest: str, loss: float, verdict: str) -> str:
    return f"  {verb:11} {ranks_of(results):20} {digest}  {loss:.4f}  {verdict}".rstrip()


def continuation_line(whole: Results, resumed: Results) -> str:
    """How the losses of a resumed run compare with those of the run that was never interrupted."""
    first = resumed["first_step"]
    theirs = np.array(resumed["losses"])
    ours = np.array(whole["losses"][first : first + len(theirs)])
    return (
        f"Steps {first + 1} to {first + len(theirs)}, resumed on {ranks_of(resumed)}: mean loss "
        f"{theirs.mean():.4f}, uninterrupted {ours.mean():.4f},\n"
        f"largest difference at a step {np.abs(theirs - ours).max():.1e} nats/byte"
    )


def _last(losses: list[float]) -> float:
    return float(np.mean(losses[-SMOOTHED_OVER:]))


def table(ours: Results, theirs: Results) -> str:
    """Both optimizers side by side, and how many times less (or more) the 4-bit one takes."""
    count = min(SMOOTHED_OVER, len(ours["losses"]))
    rows = [
        ("training loss, first step (nats/byte)", ".3f", lambda r: r["losses"][0]),
        (f"training loss, last {count} steps (nats/byte)", ".3f", lambda r: _last(r["losses"])),
        ("validation loss (nats/byte)", ".3f", lambda r: r["val_loss"]),
        ("optimizer state (bytes/parameter)", ".3f", lambda r: r["state_bytes_per_parameter"]),
        ("checkpoint (MB)", ".2f", lambda r: r["checkpoint"]["bytes"] / 1e6),
        ("optimizer step, median (ms)", ".1f", lambda r: r["optimizer_step_ms"]["median"]),
        ("whole step, median (ms)", ".1f", lambda r: r["step_ms"]["median"]),
    ]
    lines = [f"{'':44}{'AdamW4bit':>12}{'torch AdamW':>14}{'ratio':>9}"]
    for label, style, value in rows:
        a, b = value(ours), value(theirs)
        lines.append(f"{label:44}{a:>12{style}}{b:>14{style}}{a / b:>9.2f}")
    return "\n".join(lines)


def _smooth(losses: list[float]) -> np.ndarray:
    """The mean over the steps around each one, fewer at the ends."""
    total = np.concatenate([[0.0], np.cumsum(losses)])
    middle = np.arange(len(losses))
    start = np.maximum(0, middle - SMOOTHED_OVER // 2)
    stop = np.minimum(len(losses), middle + SMOOTHED_OVER // 2 + 1)
    return (total[stop] - total[start]) / (stop - start)


def _draw_losses(axes: Any, ours: Results, theirs: Results, resumed: Results) -> None:
    for results, name, color, width in (
        (theirs, "torch AdamW, fp32 states", "tab:orange", 4.0),
        (ours, "AdamW4bit, 4-bit states", "tab:blue", 1.5),
    ):
        losses = results["losses"]
        steps = np.arange(1, len(losses) + 1)
        label = f"{name}: {results['state_bytes_per_parameter']:.2f} bytes/parameter"
        axes.plot(steps, losses, color=color, alpha=0.2, linewidth=0.8)
        axes.plot(steps, _smooth(losses), color=color, linewidth=width, label=label)
    first = resumed["first_step"]
    steps = np.arange(first + 1, first + 1 + len(resumed["losses"]))
    label = f"AdamW4bit, resumed on {resumed['world_size']} ranks (each step)"
    axes.plot(steps, resumed["losses"], "k.", markersize=4, label=label)
    axes.set_ylabel("training loss\n(nats per byte)")
    axes.legend(title=f"lines: mean of {SMOOTHED_OVER} steps; faint: each step")
    size = ours["parameters"] / 1e6
    axes.set_title(f"Byte-level GPT with {size:.2f} M parameters, trained on {ranks_of(ours)}")


def draw(ours: Results, theirs: Results, resumed: Results, path: Path) -> None:
    """Write a PNG: the loss curves of both optimizers and of the resumed run; their difference."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(
        2, 1, sharex=True, figsize=(9, 6.5), layout="constrained", height_ratios=(3, 1)
    )
    _draw_losses(top, ours, theirs, resumed)
    gap = _smooth(ours["losses"]) - _smooth(theirs["losses"])
    bottom.plot(np.arange(1, len(gap) + 1), gap, color="tab:blue", linewidth=1.2)
    bottom.axhline(0, color="black", linewidth=0.8)
    reach = max(0.1, 1.1 * float(np.abs(gap).max()))
    bottom.set_ylim(-reach, reach)
    bottom.set_ylabel("AdamW4bit\nminus AdamW\n(nats per byte)")
    bottom.set_xlabel("training step (dotted: checkpoint)")
    for axes in (top, bottom):
        axes.axvline(resumed["first_step"], color="black", linewidth=0.8, linestyle=":")
        axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
