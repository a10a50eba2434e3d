"""Checkpoints read by docs/checkpoint-format.md alone: by the reader and the tables that it shows."""

from __future__ import annotations

import json
import math
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import shard4bit
from tests.docs.blocks import ROOT, blocks
from tests.pool import pool

PAGE = ROOT / "docs" / "checkpoint-format.md"
TABLES = {"`DE`, signed": ("DE", True), "`DE`, unsigned": ("DE", False)}
TABLES |= {"`DE-0`": ("DE-0", False), "`Linear`": ("Linear", False)}


@lru_cache
def reader() -> dict[str, Any]:
    """What the page's reader defines. It may import nothing but what the page says."""
    text = next(b.text for b in blocks(PAGE) if "class Checkpoint" in b.text)
    imported = set(re.findall(r"^(?:import|from) (\w+)", text, re.M))
    assert imported == {"json", "fractions", "pathlib", "numpy", "xxhash"}
    namespace: dict[str, Any] = {}
    exec(compile(text, str(PAGE), "exec"), namespace)
    return namespace


class Model(nn.Module):
    """Odd columns, a convolution, experts, a vector, a scalar, buffers, and a frozen matrix."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)

        def matrix(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator).to(dtype))

        self.odd, self.conv = matrix(65, 301), matrix(20, 12, 5, 5)
        self.experts, self.vector, self.small = matrix(6, 16, 96), matrix(150), matrix(3, 5)
        self.frozen = matrix(70, 70).requires_grad_(False)
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("mask", torch.arange(9) % 2 == 0)

    def loss(self) -> torch.Tensor:
        return sum((p.float() ** 2).sum() for p in self.parameters() if p.requires_grad)  # type: ignore


def train(model: Model, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model.loss().backward()
        for p in model.parameters():
            if p.grad is not None and step == 1:
                p.grad.neg_()
        optimizer.step()


def same(a: np.ndarray, b: torch.Tensor) -> bool:
    """Equal shapes and bits, but for the payload of a NaN."""
    want = b.detach().float().numpy() if b.is_floating_point() else b.numpy()
    if a.shape != want.shape or a.dtype != want.dtype:
        return False
    if a.dtype.kind != "f":
        return bool((a == want).all())
    both_nan = np.isnan(a) & np.isnan(want)
    bits = np.ascontiguousarray(a).view(np.uint32) == np.ascontiguousarray(want).view(np.uint32)
    return bool((bits | both_nan).all())


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "rank1": (shard4bit.AdamW4bit, {}),
    "block": (shard4bit.AdamW4bit, {"second_moment": "block"}),
    "factored": (shard4bit.AdamW4bit, {"second_moment": "factored"}),
    "8-bit": (shard4bit.AdamW4bit, shard4bit.spec.ADAMW_8BIT),
    "DE-0": (shard4bit.AdamW4bit, {"first_moment": "Tensor/DE", "second_moment": "B7/DE-0"}),
    "mixed": (shard4bit.AdamW4bit, {"first_moment": "fp32", "second_moment": "Rank-1/DE/8"}),
    "sgd": (shard4bit.SGD4bit, {"momentum_buffer": "B37/DE"}),
    "no state": (shard4bit.SGD4bit, {"momentum": 0}),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_page_reads_what_save_writes(kind: str, tmp_path: Path) -> None:
    make, options = OPTIMIZERS[kind]
    model = Model(torch.bfloat16 if kind == "rank1" else torch.float32)
    optimizer = make(model.parameters(), lr=1e-2, **options)
    train(model, optimizer)
    path = shard4bit.save(tmp_path, model, optimizer, step=12, extra={"ä": [1, None]})
    assert path.name == "step-0000000012"
    found = reader()["Checkpoint"](path)
    about = found.manifest
    assert (about["step"], about["world_size"], about["extra"]) == (12, 1, {"ä": [1, None]})
    assert about["content"] == {"parameters": True, "frozen": True, "optimizer": True}
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert about["groups"][0]["parameters"] == trained
    assert about["groups"][0]["options"]["lr"] == 1e-2
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert set(about["parameters"]) == set(values)
    for name, value in values.items():
        assert same(found.parameter(name), value), name
        facts = about["parameters"][name]
        assert ("moments" in facts) == value.requires_grad
        assert facts.get("step", 3) == 3
        for moment in facts.get("moments", {}):
            assert same(found.moment(name, moment), optimizer.moment(value, moment)), (name, moment)
    keys = {f"model/{n}" for n in values} | {k for k in about["tensors"] if k.startswith("state/")}
    assert set(about["tensors"]) == keys
    check_files(path, about)


def test_zero_and_nan_statistics_are_read(tmp_path: Path) -> None:
    model, rows = nn.Linear(130, 65, bias=False), torch.arange(65)[:, None]
    optimizer = shard4bit.AdamW4bit(model.parameters())
    grad = torch.randn(65, 130) * 10.0 ** (-rows / 2)  # its squares pass below the smallest normal number
    grad[3], grad[:, 4] = 0, 0
    for special in (0.0, float("nan")):
        grad[5, 6] = special
        model.weight.grad = grad.clone()
        optimizer.step()
        path = shard4bit.save(tmp_path, model, optimizer, step=int(special != 0))
        found = reader()["Checkpoint"](path)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert same(found.moment("weight", moment), optimizer.moment(model.weight, moment)), moment
        row_max = found.tensor("state/weight/exp_avg_sq_row_max")
        assert row_max[3] == 0 and (row_max == 0).sum() > 3
    assert row_max.view(np.uint32)[5] == 0x7FC00000


def check_files(path: Path, about: dict[str, Any]) -> None:
    """The files are safetensors, of the said sizes, with the said names, shapes and bytes."""
    files = [f"rank-{rank:05d}.safetensors" for rank in range(about["world_size"])]
    assert {p.name for p in path.iterdir()} == {"manifest.json", *files}
    pieces = [(k, t, p) for k, t in about["tensors"].items() for p in about["layouts"][t["layout"]]]
    for rank, (file, facts) in enumerate(zip(files, about["files"], strict=True)):
        raw = (path / file).read_bytes()
        assert len(raw) == facts["size"]
        metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
        sums = 0
        with safe_open(path / file, "pt") as opened:
            names = set(opened.keys())
            for key, info, piece in pieces:
                if piece[0] != rank:
                    continue
                r0, r1, c0, c1 = piece[1:]
                name = f"{key}[{r0}:{r1},{c0}:{c1}]"
                names.remove(name)
                tensor = opened.get_tensor(name)
                assert opened.get_slice(name).get_dtype() == info["dtype"]
                assert tuple(tensor.shape) == (r1 - r0, c1 - c0)
                data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
                assert data in raw
                step = max(1, int(metadata["chunk_bytes"]) // (len(data) // (r1 - r0)))
                sums += math.ceil((r1 - r0) / step)
            assert not names and len(metadata["xxh3"]) == 16 * sums


def sharded(folder: str) -> dict[str, np.ndarray]:
    """On a rank: train, save, and give the whole values as torch gathers them."""
    model = Model()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = shard4bit.AdamW4bit([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    train(model, optimizer)
    shard4bit.save(folder, model, optimizer, step=1)
    return {
        f"{name}/{moment}": optimizer.moment(p, moment).numpy()
        for name, p in model.named_parameters()
        for moment in ("exp_avg", "exp_avg_sq")
        if p.requires_grad
    }


def test_the_page_reads_what_several_ranks_wrote(tmp_path: Path) -> None:
    parts = pool(2).run(sharded, str(tmp_path))
    path = tmp_path / "step-0000000001"
    found = reader()["Checkpoint"](path)
    assert found.manifest["world_size"] == 2 and len(found.manifest["files"]) == 2
    for key in parts[0]:
        name, moment = key.split("/")
        whole = np.concatenate([part[key] for part in parts])  # FSDP2 shards the first dimension
        assert same(found.moment(name, moment), torch.from_numpy(whole)), key
    check_files(path, found.manifest)


def test_the_printed_tables_are_those_of_the_formula() -> None:
    rows: dict[str, list[float]] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")]
        if cells[0] in TABLES and len(cells) == 9:
            rows.setdefault(cells[0], []).extend(float(c) for c in cells[1:])
    assert set(rows) == set(TABLES)
    for title, values in rows.items():
        mapping, signed = TABLES[title]
        formula = reader()["table"](mapping, 4, signed)
        assert np.array_equal(np.array(values, np.float32), formula), title
