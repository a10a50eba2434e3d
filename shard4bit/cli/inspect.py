"""``inspect``: what a checkpoint holds."""

from __future__ import annotations

import argparse
import json
from math import prod
from pathlib import Path
from typing import Any

from shard4bit.checkpoint.manifest import NAME, VERSION, Manifest
from shard4bit.cli.found import open_checkpoint, state_keys, tensor_bytes
from shard4bit.cli.tables import Table, count, show, size


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory", metavar="DIR", help="a checkpoint, or a directory of them (then the newest)"
    )
    parser.add_argument("--json", action="store_true", help="for programs; bytes and shapes as integers")


def run(options: argparse.Namespace) -> int:
    directory, manifest = open_checkpoint(options.directory)
    facts = describe(directory, manifest)
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        show(_tables(facts))
    return 0


def describe(directory: Path, manifest: Manifest) -> dict[str, Any]:
    """All that ``inspect`` shows, as JSON."""
    keys, tensors = state_keys(manifest), []
    for name, fact in manifest.parameters.items():
        values = manifest.tensors.get(f"model/{name}")
        moments = {
            moment: {
                "spec": spec,
                "bytes": sum(
                    tensor_bytes(manifest.tensors[key])
                    for key in keys[name]
                    if _belongs(key.rpartition("/")[2], moment, fact["moments"])
                ),
            }
            for moment, spec in fact.get("moments", {}).items()
        }
        tensors.append(
            {
                "name": name,
                "shape": fact["shape"],
                "dtype": values.dtype if values else None,
                "bytes": tensor_bytes(values) if values else 0,
                "step": fact.get("step"),
                "moments": moments,
            }
        )
    known = {f"model/{name}" for name in manifest.parameters} | {k for found in keys.values() for k in found}
    others = {k: tensor_bytes(info) for k, info in manifest.tensors.items() if k not in known}
    return {
        "path": str(directory),
        "step": manifest.step,
        "format_version": VERSION,
        "world_size": manifest.world_size,
        "content": manifest.content,
        "files": _files(manifest),
        "manifest_bytes": (directory / NAME).stat().st_size,
        "groups": manifest.groups,
        "tensors": tensors,
        "other_tensors": others,
        "extra": manifest.extra,
    }


def _belongs(key: str, moment: str, moments: dict[str, str]) -> bool:
    """Whether a state's key is of this moment ("exp_avg_sq_codes" is not of "exp_avg")."""
    fitting = [m for m in moments if key == m or key.startswith(m + "_")]
    return bool(fitting) and max(fitting, key=len) == moment


def _files(manifest: Manifest) -> dict[str, dict[str, int]]:
    """Bytes of every file, and how many tensors have a part in it."""
    holders: dict[str, int] = dict.fromkeys(manifest.files, 0)
    for info in manifest.tensors.values():
        for file in {entry.file for entry in info.entries}:
            holders[file] += 1
    return {name: {"bytes": bytes_, "tensors": holders[name]} for name, bytes_ in manifest.files.items()}


def _tables(facts: dict[str, Any]) -> list[Table | str]:
    files, content = facts["files"], [name for name, there in facts["content"].items() if there]
    total = sum(f["bytes"] for f in files.values()) + facts["manifest_bytes"]
    ranks = f"{facts['world_size']} rank{'s' if facts['world_size'] != 1 else ''}"
    out: list[Table | str] = [
        f"{facts['path']}\nstep {facts['step']}, saved by {ranks}, format version {facts['format_version']}, "
        f"{size(total)} with {', '.join(content) or 'nothing'}"
    ]
    out.append(_tensor_table(facts["tensors"]))
    out.append(_total(facts["tensors"]))
    if facts["other_tensors"]:
        rows = [[key, size(bytes_)] for key, bytes_ in facts["other_tensors"].items()]
        out.append(Table("Other tensors", ["key", "bytes"], rows))
    rows = [[name, size(f["bytes"]), str(f["tensors"])] for name, f in files.items()]
    out.append(Table("Files", ["file", "bytes", "tensors"], rows))
    for number, group in enumerate(facts["groups"]):
        title = f"Parameter group {number}: {len(group['parameters'])} parameters"
        rows = [[key, json.dumps(value)] for key, value in group["options"].items()]
        out.append(Table(title, ["option", "value"], rows, left=2))
    out.append(f"extra: {json.dumps(facts['extra'], ensure_ascii=False)}")
    return out


def _tensor_table(tensors: list[dict[str, Any]]) -> Table:
    table = Table(
        "Tensors", ["name", "shape", "dtype", "states", "bits", "bytes", "state bytes", "step"], left=4
    )
    for fact in tensors:
        numel, moments = prod(fact["shape"]), fact["moments"]
        bits = " + ".join(f"{8 * m['bytes'] / numel:.2f}" for m in moments.values()) if numel else ""
        table.rows.append(
            [
                fact["name"],
                " x ".join(map(str, fact["shape"])) or "scalar",
                fact["dtype"] or "-",
                ", ".join(f"{name} {m['spec']}" for name, m in moments.items()) or "-",
                bits or "-",
                size(fact["bytes"]),
                size(sum(m["bytes"] for m in moments.values())),
                "-" if fact["step"] is None else str(fact["step"]),
            ]
        )
    return table


def _total(tensors: list[dict[str, Any]]) -> str:
    numel = sum(prod(t["shape"]) for t in tensors)
    stated = sum(prod(t["shape"]) for t in tensors if t["moments"])
    states = sum(m["bytes"] for t in tensors for m in t["moments"].values())
    text = (
        f"{len(tensors)} tensors, {count(numel)} elements, {size(sum(t['bytes'] for t in tensors))} of values"
    )
    if stated:
        text += f", {size(states)} of states ({states / stated:.3f} bytes per element that has some)"
    return text
