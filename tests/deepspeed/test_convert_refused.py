"""What ``python -m shard4bit convert`` answers to directories of DeepSpeed's that it cannot take."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from shard4bit.cli.main import main
from tests.deepspeed.engines import needs_deepspeed
from tests.deepspeed.test_convert_command import same_packages, trained
from tests.pool import pool

pytestmark = needs_deepspeed


def said(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    """Exit status and the only line on stderr."""
    status = main([str(arg) for arg in argv])
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1, captured
    return status, captured.err


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool(2).run(trained, str(tmp_path), {"stage": 1}, {}, {"mine": Path("of/mine")})
    native, ours, out = tmp_path / "native", tmp_path / "ours", tmp_path / "out"
    for argv, message in [
        ((ours, out, "--to", "universal"), "takes a checkpoint that engine.save_checkpoint wrote"),
        ((ours, out, "--to", "dcp", "--trusted"), "--trusted belongs to a checkpoint of DeepSpeed's"),
        (
            (native, out, "--to", "universal", "--states", "4bit"),
            "DeepSpeed's optimizers know fp32 states only",
        ),
        ((native, out, "--to", "universal", "--step", "4"), "keeps DeepSpeed's own counts"),
        ((native, ours, "--to", "universal"), "exists already"),
    ]:
        status, line = said(capsys, "convert", *argv)
        assert status == 2 and message in line, line
    status, line = said(capsys, "inspect", native)
    assert status == 2 and f"{native / 'here'} is a native checkpoint of DeepSpeed's" in line
    status, line = said(capsys, "convert", native, out, "--to", "canonical")
    assert status == 1 and "--trusted" in line and not out.exists()
    assert main(["convert", str(native), str(out), "--to", "canonical", "--trusted"]) == 0
    assert "mine" in capsys.readouterr().err
    same_packages(out, ours)
    beside = ours / "latest"  # of a training that saves both
    beside.write_text("here")
    assert f"name one, {ours}/(here | step-…)" in said(capsys, "convert", ours, out, "--to", "dcp")[1]
    assert main(["verify", str(ours)]) == 0 and capsys.readouterr().out
    (native / "latest").write_text("gone")
    assert "'gone', which is not there" in said(capsys, "convert", native, out, "--to", "dcp")[1]
    (native / "latest_universal").write_text("there")
    assert f"name one, {native}/(gone | there)" in said(capsys, "convert", native, out, "--to", "dcp")[1]


@pytest.mark.parametrize(
    "name, message",
    [
        ("mp_rank_01_model_states.pt", "pipeline-, model- or expert-parallel run"),
        ("layer_00-model_states.pt", "pipeline-, model- or expert-parallel run"),
        ("zero_pp_rank_0_mp_rank_00_model_states.pt", "is of ZeRO stage 3"),
        ("mp_rank_00_model_states.pt", "cannot be read"),
    ],
)
def test_files_of_other_runs(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(b"not a file of torch's")
    status, line = said(capsys, "convert", tmp_path, tmp_path / "out", "--to", "canonical")
    assert status == 1 and message in line, line


@pytest.mark.parametrize(
    "optimizer, message",
    [
        (None, "no optimizer states of ZeRO"),
        ({"state": {}, "param_groups": [{}]}, "with the parameters' names"),
    ],
)
def test_stage_0_of_others(
    optimizer: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"module": {}, "global_steps": 1, "ds_version": "0.19.8"}
    torch.save({**known, "optimizer": optimizer}, tmp_path / "mp_rank_00_model_states.pt")
    status, line = said(capsys, "convert", tmp_path, tmp_path / "out", "--to", "canonical")
    assert status == 1 and message in line, line


def test_another_programs_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"module": {}}, tmp_path / "mp_rank_00_model_states.pt")
    status, line = said(capsys, "convert", tmp_path, tmp_path / "out", "--to", "canonical")
    assert status == 1 and "was not written by engine.save_checkpoint" in line, line


def test_a_deepspeed_without_its_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import deepspeed

    monkeypatch.delattr(deepspeed.utils, "fragment_address")
    (tmp_path / "mp_rank_00_model_states.pt").write_bytes(b"")
    status, line = said(capsys, "convert", tmp_path, tmp_path / "out", "--to", "canonical")
    assert status == 1 and "fragment_address" in line and "0.16.9, 0.19.8" in line, line


def test_a_damaged_file_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool(2).run(trained, str(tmp_path), {"stage": 2}, {})
    file = next((tmp_path / "native" / "here").glob("*rank_1_*optim_states.pt"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    before = sorted(tmp_path.iterdir())
    for form in ("canonical", "universal"):
        status, line = said(capsys, "convert", tmp_path / "native", tmp_path / "out", "--to", form)
        assert status == 1 and f"{file} cannot be read" in line, line
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["../outside", "/outside", ".."])
def test_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    """In a native checkpoint that somebody else made; nothing is written, inside or outside."""
    from shard4bit.deepspeed import convert
    from shard4bit.deepspeed.saved import Param, Saved
    from shard4bit.errors import CheckpointError
    from shard4bit.optim.adamw import AdamW4bit

    values = torch.zeros(2, 2)
    param = Param(name, (2, 2), torch.float32, 1, {}, lambda: values, lambda key: pytest.fail(key))
    found = Saved(AdamW4bit, [({}, [param])], [], 1, shared={"param_groups": []})
    with mock.patch.object(convert.saved, "native", return_value=found), pytest.raises(CheckpointError):
        convert.write_universal(tmp_path, tmp_path / "in" / "target")
    assert list(tmp_path.rglob("*")) == [tmp_path / "in"]


@pytest.mark.parametrize(
    "file, key",
    [
        ("*optim_states.pt", "partition_count"),
        ("*optim_states.pt", "single_partition_of_fp32_groups"),
        ("*model_states.pt", "param_shapes"),
    ],
)
def test_files_of_another_deepspeed(
    file: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They lack what we read of them."""
    pool(2).run(trained, str(tmp_path), {"stage": 1}, {})
    for path in (tmp_path / "native" / "here").glob(file):
        saved = torch.load(path, weights_only=False)
        del saved.get("optimizer_state_dict", saved)[key]
        torch.save(saved, path)
    status, line = said(capsys, "convert", tmp_path / "native", tmp_path / "out", "--to", "canonical")
    assert status == 1 and f"its files have no '{key}'" in line and "(0.16.9, 0.19.8)" in line
