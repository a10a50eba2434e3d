"""benchmarks/node: its plan, its model of the reduce phase, its rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import node_plan
from benchmarks.node_plan import KINDS, MOMENTS, OURS, SCALES
from benchmarks.node_reduce import Fit, Point, at, fit
from benchmarks.node_rows import COLUMNS, Rows
from launch.llama import Llama
from launch.presets import LlamaConfig
from shard4bit.cli.plan import usage

# ---- the plan ------------------------------------------------------------------------------------------


def test_every_cell_once_and_legs_that_follow_each_other() -> None:
    cells = node_plan.cells(KINDS, [8, 4])
    assert len({cell.key for cell in cells}) == len({cell.folder for cell in cells}) == len(cells)
    trained = {(cell.world, cell.engine, cell.optimizer) for cell in cells if cell.kind == "train"}
    names = ("fsdp2", "hsdp", "tp", "fsdp1", "zero1", "zero2")
    assert trained == {(n, e, o) for n in (8, 4) for e in names for o in MOMENTS}
    for chain in node_plan.CHAINS:
        legs = node_plan.legs(chain, [8, 4])
        assert {leg.world for leg in legs} == {8, 4, 2} and legs[0].world == legs[-1].world == 8
        marks = [node_plan.marks(leg, 20) for leg in legs]
        assert [first for first, _, _ in marks[1:]] == [saves for _, _, saves in marks[:-1]]
        assert all(saves <= last and first < last for first, last, saves in marks)
        assert marks[0][:2] == (0, 20) and marks[-1] == (marks[-2][2], 20, 0)


def saved(config: LlamaConfig, tokens: int) -> int:
    """Bytes that autograd keeps of a forward and its loss."""
    model = Llama(config).bfloat16()
    torch.nn.init.ones_(model.norm.weight)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows = torch.zeros(tokens // config.context, config.context, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = F.cross_entropy(model(rows).float().flatten(0, 1), rows.flatten())
    del loss
    return sum(kept.values())


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_activations_are_what_autograd_keeps(kv_heads: int) -> None:
    config = LlamaConfig(64, 2, 8, kv_heads, 512, 1376, vocabulary=64)
    assert node_plan.activations(config, 128) == pytest.approx(saved(config, 128), rel=0.05)


@pytest.mark.parametrize("optimizer", ["adamw", "rank1"])
def test_the_largest_model_fits_and_a_larger_one_does_not(optimizer: str) -> None:
    card, context = 141 * 10**9, 2048
    config = node_plan.largest_config(optimizer, 8, card, context)
    assert config is not None

    def needs(shape: LlamaConfig) -> int:
        found = usage(node_plan.model_of(shape), node_plan.setup_of("fsdp2", 8), MOMENTS[optimizer]).peak
        return found + node_plan.activations(shape, context, recompute=True)

    room = card - node_plan.reserve(card)
    assert 0.98 * room < needs(config) <= 1.001 * room
    assert needs(replace(config, layers=config.layers + 2)) > room
    with torch.device("meta"):
        count = sum(p.numel() for p in Llama(config).parameters())
    bytes_each = {"adamw": 16, "rank1": 9}[optimizer]  # fp32 weights and gradients, and the states
    assert 0.85 < count * bytes_each / (8 * room) < 1


# ---- the reduce phase ----------------------------------------------------------------------------------


def test_the_model_of_the_reduce_phase() -> None:
    truth = Fit(0.02, 0.005, 1 / 300e6)  # 300 GB/s
    points = [
        Point(n, calls, size, truth(Point(n, calls, size)))
        for n in (2, 4, 8)
        for calls, size in ((1, 1168), (1, 4588688), (2, 9178016))
    ]
    found = fit(points)
    assert (found.a, found.b, found.c) == pytest.approx((truth.a, truth.b, truth.c))
    by_hand = 2 * (0.02 + 0.005 * 10) + 2 * 1023 / 1024 * 9178016 / 300e9 * 1e3
    assert found(Point(1024, 2, 9178016)) == pytest.approx(by_hand)
    assert "300 GB/s" in str(found)


def test_no_constant_of_the_model_is_negative() -> None:
    faster = [Point(n, 1, size, 1 / n + size / 1e6) for n in (2, 4, 8) for size in (4, 10**6)]
    found = fit(faster)
    assert found.b == 0 and found.a > 0 and found.c > 0 and found.error > 0.1
    with pytest.raises(ValueError, match="2 measurements"):
        fit(faster[:2])


def test_bytes_that_are_reduced() -> None:
    config = SCALES["tiny"].config
    inner = config.kv_heads * config.width // config.heads
    cols = config.layers * (6 * config.width + config.mlp) + 2 * config.width
    tensors = 9 * config.layers + 3
    assert inner * config.width > 4096
    rank1, block, factored = (at(node_plan.model_of(config), 1024, MOMENTS[name]) for name in OURS)
    assert (rank1.calls, rank1.size) == (1, 4 * (1 + tensors + cols))
    assert (block.calls, block.size) == (1, 4 * (1 + tensors))
    assert factored.calls == 2 and factored.size == block.size + 8 * (cols + 7 * config.layers + 2)


# ---- rows ----------------------------------------------------------------------------------------------


def test_rows_survive_a_killed_process(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "new")
    assert rows.read() == {}
    rows.append({"key": "a", "note": 'said "x, y"', "details": {"losses": [1.5]}})
    rows.append({"key": "b"})
    with rows.path.open("a") as file:
        file.write('c,train,8,"half')
    rows.append({"key": "a", "status": "ok"})
    found = rows.read()
    assert list(found) == ["a", "b"] and found["a"]["status"] == "ok" and found["b"]["details"] == "{}"
    with pytest.raises(AssertionError):
        rows.append({"kye": "a"})
    rows.path.write_text(",".join(COLUMNS[1:]) + "\n")
    with pytest.raises(ValueError, match="other columns"):
        rows.read()
