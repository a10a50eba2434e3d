"""What a run shows of itself while it trains."""

from __future__ import annotations

import sys

from tqdm import tqdm

from launch.cluster import Cluster


def describe(ranks: Cluster) -> str:
    """For people: "3 ranks (cpu, gloo)"."""
    plural = "" if ranks.world_size == 1 else "s"
    return f"{ranks.world_size} rank{plural} ({ranks.device.type}, {ranks.backend})"


def bar_of(first: int, last: int, title: str, *, shown: bool) -> tqdm:
    """A progress bar on stderr; in a log file it writes a line only now and then."""
    interval = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(
        total=last,
        initial=first,
        desc=title,
        unit="step",
        ncols=100,
        mininterval=interval,
        maxinterval=interval,
        disable=not shown,
    )
