"""The Markdown of benchmarks/node.py: its rows as tables, and the model of the reduce phase."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.node_plan import MOMENTS, OURS, SWEEP, Scale, model_of
from benchmarks.node_reduce import FORMULA, Point, at, fit
from shard4bit.cli.tables import count, size

Found = Mapping[str, str]
FAR = (16, 64, 256, 1024)  # ranks that the model is asked about


def engine_name(row: Found) -> str:
    """ "TP 2 x FSDP2 4" for "tp" on 8 ranks."""
    half = int(row["world"]) // 2
    names = {"hsdp": f"HSDP 2x{half}", "tp": f"TP 2 x FSDP2 {half}", "fsdp2-ac": "FSDP2"}
    names |= {"zero1": "ZeRO-1", "zero2": "ZeRO-2"}
    return names.get(row["engine"], row["engine"].upper())


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Markdown; all but the first ``left`` columns are figures."""
    rule = ["---" if i < left else "---:" for i in range(len(columns))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows))


def number(text: str, digits: int = 1) -> str:
    return f"{float(text):,.{digits}f}" if text else "–"


def held(text: str) -> str:
    """Bytes for people."""
    return size(int(text)) if text and text != "0" else "–"


def moved(row: Found, what: str) -> str:
    """ "34.0 GB, 12.3 s" of a save or a load."""
    if not row[f"{what}_s"]:
        return "–"
    return (f"{held(row['save_b'])}, " if what == "save" else "") + f"{number(row[f'{what}_s'])} s"


def page(rows: Mapping[str, Found], scale: Scale) -> str:
    """All tables, as far as there are rows."""
    every = list(rows.values())
    parts = ["; ".join(_machines({row["machine"] for row in every if row["machine"]}))]
    for kind, make in (("train", _training), ("resume", _chains), ("largest", _largest)):
        found = [row for row in every if row["kind"] == kind]
        done = [row for row in found if row["tokens_per_s"]]
        parts += [make(done)] if done else []
        parts += [f"- {row['key']}: {row['status']}, {row['note']}" for row in found if row["status"] != "ok"]
    parts += _reduce([row for row in every if row["kind"] == "reduce" and row["status"] == "ok"], scale)
    return "\n\n".join(filter(None, parts))


def _machines(names: set[str]) -> list[str]:
    """ "2, 4, 8 x H200, torch ..." of those that differ in their number only."""
    counts: dict[str, list[int]] = {}
    for name in names:
        number, rest = name.split(" x ", 1)
        counts.setdefault(rest, []).append(int(number))
    return [f"{', '.join(map(str, sorted(found)))} x {rest}" for rest, found in sorted(counts.items())]


def _memory(row: Found) -> list[str]:
    kinds = [held(row[f"{kind}_b"]) for kind in ("weights", "gradients", "master", "states")]
    return [*kinds, held(row["peak_b"]), held(row["planned_b"])]


def _training(rows: Sequence[Found]) -> str:
    columns = (
        "ranks",
        "engine",
        "optimizer",
        "tokens/s",
        "step, ms",
        "optimizer, ms",
        "weights",
        "gradients",
    )
    columns += ("master", "states", "peak", "planned", "save", "load", "loss")
    lines = [
        [
            *(row["world"], engine_name(row), row["optimizer"], number(row["tokens_per_s"], 0)),
            *(number(row["step_ms"]), number(row["optimizer_ms"]), *_memory(row)),
            *(moved(row, "save"), moved(row, "load"), number(row["loss_last"], 4)),
        ]
        for row in sorted(rows, key=lambda row: -int(row["world"]))
    ]
    return table(columns, lines, left=3)


def _chains(rows: Sequence[Found]) -> str:
    columns = ("chain", "ranks", "engine", "steps", "digest restored", "digest saved", "loss off by")
    lines = []
    for row in sorted(rows, key=lambda row: (row["chain"], int(row["leg"]))):
        first = int(row["first"])
        last = first + len(json.loads(row["details"])["losses"])
        steps = f"{first} to {last}" + (f", saved at {row['save_at']}" if row["saved"] else "")
        names = [row["chain"], row["world"], engine_name(row), steps]
        digests = [row[kind][:12] or "–" for kind in ("restored", "saved")]
        lines.append([*names, *digests, row["off"] or "–", moved(row, "save"), moved(row, "load")])
    return table((*columns, "save", "load"), lines, left=6)


def _largest(rows: Sequence[Found]) -> str:
    columns = ("ranks", "optimizer", "shape", "parameters", "tokens/s", "weights", "gradients", "states")
    lines = []
    for row in rows:
        weights, gradients, _, states, peak, planned = _memory(row)
        names = [row["world"], row["optimizer"], row["note"], count(int(row["parameters"]))]
        figures = [number(row["tokens_per_s"], 0), weights, gradients, states, peak, planned]
        lines.append([*names, *figures, number(row["loss_last"], 2)])
    return table((*columns, "peak", "planned", "loss"), lines, left=3)


def _reduce(rows: Sequence[Found], scale: Scale) -> list[str]:
    alone = [row for row in rows if row["optimizer"] == SWEEP]
    phases = [row for row in rows if row["optimizer"] != SWEEP]
    parts = []
    if phases:
        worlds = sorted({int(row["world"]) for row in phases})
        parts.append(_phases(phases, worlds, scale))
    if alone:
        curves = {int(row["world"]): dict(json.loads(row["details"])["points"]) for row in alone}
        columns = ["all-reduce alone", *(f"{n} ranks, ms" for n in sorted(curves))]
        sizes = sorted(set.union(*(set(points) for points in curves.values())))
        lines = [
            [held(str(b)), *(number(str(curves[n].get(b, "")), 3) for n in sorted(curves))] for b in sizes
        ]
        parts.append(table(columns, lines))
    return parts


def _phases(rows: Sequence[Found], worlds: list[int], scale: Scale) -> str:
    """Measured, and beyond that modelled where there are enough measurements."""
    points = {
        (row["optimizer"], int(row["world"])): Point(
            int(row["world"]), int(row["calls"]), int(row["reduced_b"]), float(row["reduce_ms"])
        )
        for row in rows
    }
    line = fit(list(points.values())) if len(points) >= 3 else None
    far = [n for n in FAR if n > max(worlds)] if line else []
    columns = ["reduce phase", "all-reduces", "bytes", *(f"{n} ranks, ms" for n in worlds)]
    columns += [f"{n:,} ranks, model" for n in far]
    lines = []
    for name in OURS:
        mine = [points[name, n] for n in worlds if (name, n) in points]
        if not mine:
            continue
        cells = [name, str(mine[-1].calls), f"{mine[-1].size:,}"]
        cells += [f"{points[name, n].ms:.3f}" if (name, n) in points else "–" for n in worlds]
        model = model_of(scale.config)
        lines.append([*cells, *(f"{line(at(model, n, MOMENTS[name])):.3f}" for n in far if line)])
    said = f"Model: {FORMULA} with {line}." if line else "Too few measurements for a model."
    return f"{table(columns, lines)}\n\n{said}"
