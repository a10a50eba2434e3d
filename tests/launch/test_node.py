"""benchmarks/node: the choice of cells, its engines, and calls that go on from each other."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import node, node_engines, node_plan
from benchmarks.node_cell import NodeRun
from benchmarks.node_plan import SCALES, Cell
from benchmarks.node_rows import Rows
from launch import engines, options
from launch.cluster import Cluster
from tests.deepspeed.engines import needs_deepspeed
from tests.launch.running import ROOT, environment
from tests.pool import pool

TINY = SCALES["tiny"]


# ---- the driver ----------------------------------------------------------------------------------------


def driver(out: Path, *more: str) -> node.Driver:
    out.mkdir(exist_ok=True)
    return node.Driver(node.parse(["--out", str(out), "--preset", "tiny", "--device", "cpu", *more]))


def keys(found: node.Driver) -> list[str]:
    return [cell.key for cell in found.todo()]


def test_what_does_not_fit_is_recorded_and_not_done(tmp_path: Path) -> None:
    adamw, rank1 = (Cell("train", 4, "fsdp2", name) for name in ("adamw", "rank1"))
    between = (node_plan.planned(adamw, TINY) + node_plan.planned(rank1, TINY)) // 2
    call = driver(tmp_path, "--card", str(between), "--only", "train/4/fsdp2/(adamw|rank1)")
    assert keys(call) == [rank1.key]
    row = call.rows.read()[adamw.key]
    assert row["status"] == "does not fit" and row["note"].startswith("planned ")
    assert keys(driver(tmp_path, "--only", adamw.key, "--retry")) == []


def test_a_leg_waits_for_the_checkpoint_before_it(tmp_path: Path) -> None:
    call = driver(tmp_path, "--plan", "resume", "--only", "fsdp2/[0-3]$")
    first, second, *_ = node_plan.legs("fsdp2", [8, 4])
    assert [cell.key for cell in call.next_group()] == [first.key]
    call.rows.append({"key": first.key, "status": "ok"})
    assert [cell.key for cell in call.next_group()] == [first.key]  # its checkpoint is gone
    (call.scratch / first.folder / "checkpoints" / "step-0000000010").mkdir(parents=True)
    assert [cell.key for cell in call.next_group()] == [second.key]
    call.record(second, "failed", "lost")
    assert keys(call) == [] and call.rows.read()[node_plan.legs("fsdp2", [8])[3].key]["status"] == "failed"


def test_a_smaller_model_is_tried_only_after_too_large_a_one(tmp_path: Path) -> None:
    call = driver(tmp_path, "--plan", "largest", "--only", "rank1")
    (first,) = call.todo()
    call.record(first, "failed", "torch.OutOfMemoryError: CUDA out of memory")
    (second,) = call.todo()
    assert (second.leg, second.optimizer) == (1, "rank1")
    call.record(second, "failed", "RuntimeError: something else")
    assert keys(call) == []


def worker(call: node.Driver, text: str) -> Any:
    """A program in place of the ranks; the cell that it is on is the second of its group."""
    start = f"import json, time; path = {str(call.scratch)!r} + '/'; "
    start += "open(path + 'current.json', 'w').write(json.dumps({'key': KEY, 'begin': time.time()})); "

    def command(group: list[Cell]) -> list[str]:
        return [sys.executable, "-c", start.replace("KEY", repr(group[1].key)) + text]

    return mock.patch.object(call, "command", command)


def test_a_failing_rank_a_slow_cell_and_the_end_of_the_budget(tmp_path: Path) -> None:
    call = driver(tmp_path, "--only", "train/4/fsdp2")
    group = call.next_group()
    assert len(group) == 4
    with worker(call, "open(path + 'error-3.txt', 'w').write('a\\nValueError: it'); raise SystemExit(1)"):
        call.launch(group)
    assert list(call.rows.read()) == [group[1].key]
    assert "ValueError: it" in call.rows.read()[group[1].key]["note"]
    slow = call.next_group()
    assert group[1] not in slow
    with worker(call, "time.sleep(60)"), mock.patch.object(call, "scale", replace(TINY, limit=0.5)):
        call.launch(slow)
    assert call.rows.read()[slow[1].key]["note"].startswith("not done after")
    call.deadline = time.time() + node.MARGIN + 1
    with worker(call, "time.sleep(60)"):
        call.launch([slow[0], slow[2]])
    assert len(call.rows.read()) == 2  # the budget is no failure
    assert call.run() == node.MORE
    again = driver(tmp_path, "--only", "train/4/fsdp2", "--retry")
    assert len(again.next_group()) == 4


# ---- the engines ---------------------------------------------------------------------------------------


def curves(out: str) -> dict[str, tuple[list[float], str | None, str | None]]:
    """By engine: three losses, the digest of the weights at the start, and that of the end."""
    import torch.distributed as dist

    ranks = Cluster(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), "gloo")
    found = {}
    with mock.patch.object(engines, "ENGINES", engines.ENGINES):
        node_engines.register()
        for name in ("fsdp2", "hsdp", "tp", "fsdp2-ac"):
            arguments = ["--preset", "llama-tiny", "--layers", "1", "--context", "16", "--batch", "4"]
            settings = options.parse([*arguments, "--warmup", "2", "--device", "cpu", "--out", out])
            settings.engine = name
            run = NodeRun(settings, ranks)
            run.digests = True
            start = run.digest()
            found[name] = run.losses(0, 3), start, run.digest()
    return found


@pytest.mark.slow
def test_engines_of_two_dimensions_train_the_same_model(tmp_path: Path) -> None:
    every = pool(4).run(curves, str(tmp_path))
    found = every[0]
    assert all(other == found for other in every)
    assert len({start for _, start, _ in found.values()}) == 1  # weights do not depend on the sharding
    losses, start, end = found["fsdp2"]
    assert start != end and losses[2] < losses[0] - 0.1
    assert found["fsdp2-ac"] == found["fsdp2"]  # computed again, the same
    for name in ("hsdp", "tp"):  # sums in another order
        assert found[name][0] == pytest.approx(losses, abs=1e-3)


def test_part_of_a_mesh_needs_four_ranks() -> None:
    engine = object.__new__(node_engines.Hsdp)
    engine.ranks = Cluster(0, 2, torch.device("cpu"), "gloo")
    with pytest.raises(ValueError, match="expected an even number from 4"):
        engine._mesh(2, 1, names=("a", "b"))


# ---- whole calls ---------------------------------------------------------------------------------------


def call_node(out: Path, *more: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "benchmarks.node", "--preset", "tiny", "--device", "cpu"]
    command += ["--out", str(out), *more]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode in (0, node.MORE), done.stdout + done.stderr
    return done.returncode, done.stdout


@pytest.mark.slow
def test_two_calls_and_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = ["--worlds", "2", "--only", "^(train/2/fsdp2/rank1|reduce/2/fsdp2/(rank1|block|factored))"]
    tiny = ["--preset", "tiny", "--device", "cpu"]
    assert node.main([*only, *tiny, "--out", str(tmp_path), "--budget", "20"]) == node.MORE
    assert capsys.readouterr().out.startswith("4 cells are left") and not Rows(tmp_path).read()
    status, said = call_node(tmp_path, *only)
    assert status == 0 and said.count(" ok ") == 4, said
    row = Rows(tmp_path).read()["train/2/fsdp2/rank1"]
    assert row["off"] == "0.0e+00" and float(row["loss_last"]) < float(row["loss_first"]) - 0.5
    parameters = int(row["parameters"])
    assert int(row["weights_b"]) == int(row["gradients_b"]) == pytest.approx(2 * parameters, rel=0.01)
    assert 0.5 * parameters < int(row["states_b"]) < 0.6 * parameters
    assert node.main([*only, *tiny, "--out", str(tmp_path)]) == 0
    assert " ok " not in capsys.readouterr().out
    assert node.main(["--preset", "tiny", "--table", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "| 2 | FSDP2 | rank1 | " in said and "Model: ms = " in said and "| 1,024 ranks, model |" in said


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.timeout(900)  # several calls of up to 280 s on a slow machine
def test_chains_the_largest_model_and_adamw_on_four_ranks(tmp_path: Path) -> None:
    plan = ["--worlds", "4", "--only", "resume|largest.*rank1|train/4/(tp|zero1)/adamw", "--budget", "270"]
    status = node.MORE
    while status == node.MORE:  # a call at least ends one cell
        before = len(Rows(tmp_path).read())
        status, said = call_node(tmp_path, *plan)
        assert len(Rows(tmp_path).read()) > before, said
    rows = Rows(tmp_path).read()
    assert [row["status"] for row in rows.values()] == ["ok"] * 11, rows
    for chain in node_plan.CHAINS:
        legs = [rows[leg.key] for leg in node_plan.legs(chain, [4])]
        assert [leg["restored"] for leg in legs[1:]] == [leg["saved"] for leg in legs[:-1]]
        assert all(len(leg["restored"]) == 32 for leg in legs[1:])
        assert all(len(json.loads(leg["details"])["losses"]) >= 2 for leg in legs)
        assert all(float(leg["off"]) < 0.02 for leg in legs[1:])
    for name in ("tp", "zero1"):
        row = rows[f"train/4/{name}/adamw"]
        assert row["off"] == "0.0e+00" and int(row["save_b"]) > 12 * int(row["parameters"])
    assert not list((tmp_path / "scratch").glob("*-[0-2]")), "checkpoints that nobody needs"
