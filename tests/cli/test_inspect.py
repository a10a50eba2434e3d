"""``inspect`` and ``verify``: what they say, of good checkpoints and of damaged ones."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shard4bit.cli import tables
from shard4bit.cli.main import main
from tests.cli.helpers import saved
from tests.docs.blocks import ROOT


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 3 and 12 of one training."""
    folder = tmp_path_factory.mktemp("run")
    saved(folder)
    saved(folder, step=12, extra={"epoch": 4, "sampler": torch.arange(5)})
    return folder


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = main(list(argv))
    out = capsys.readouterr()
    return status, out.out, out.err


def test_inspect_for_programs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = said(capsys, "inspect", str(root / "step-0000000003"), "--json")
    found = json.loads(out)
    assert status == 0
    assert (found["step"], found["world_size"], found["extra"]) == (3, 1, None)
    tensors = {t["name"]: t for t in found["tensors"]}
    assert set(tensors) == {"odd", "conv", "bias", "frozen", "brain", "count"}
    odd = tensors["odd"]
    assert (odd["shape"], odd["dtype"], odd["bytes"], odd["step"]) == ([67, 301], "F32", 4 * 67 * 301, 3)
    assert odd["moments"]["exp_avg"] == {"spec": "B128/DE", "bytes": 67 * 151 + 4 * 67 * 3}
    assert odd["moments"]["exp_avg_sq"] == {"spec": "Rank-1/Linear", "bytes": 67 * 151 + 4 * (67 + 301)}
    assert tensors["bias"]["moments"]["exp_avg_sq"] == {"spec": "fp32", "bytes": 600}
    assert tensors["frozen"]["moments"] == {} and tensors["frozen"]["step"] is None
    assert tensors["brain"]["dtype"] == "BF16"
    assert [g["parameters"] for g in found["groups"]] == [["odd", "conv"], ["bias", "brain"]]
    assert found["groups"][1]["options"]["weight_decay"] == 0.0
    (file,) = found["files"]
    size = (root / "step-0000000003" / file).stat().st_size
    assert found["files"][file] == {"bytes": size, "tensors": _parts(found)}


def _parts(found: dict[str, Any]) -> int:
    """Tensors in the one file: values, and the parts of each moment."""
    of = {"fp32": 1, "B128/DE": 2, "Rank-1/Linear": 3}
    return sum(1 + sum(of[m["spec"]] for m in t["moments"].values()) for t in found["tensors"])


def test_inspect_for_people(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest one of a root; plain text in a pipe."""
    status, out, err = said(capsys, "inspect", str(root))
    assert status == 0 and not err and "\x1b" not in out
    assert out.startswith(f"{root / 'step-0000000012'}\nstep 12, saved by 1 rank, format version 1, ")
    assert re.search(r"^odd +67 x 301 +F32 +exp_avg B128/DE, exp_avg_sq Rank-1/Linear +4.* 3$", out, re.M)
    assert "Parameter group 1: 2 parameters" in out and "weight_decay   0.0" in out
    assert "rank-00000.safetensors" in out and "extra/0" in out
    assert '"epoch": 4' in out


def test_inspect_on_a_terminal(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "160")
    status, out, _ = said(capsys, "inspect", str(root))
    assert status == 0 and "┃" in out and "67 x 301" in out and "rank-00000.safetensors" in out


def test_verify_a_whole_one(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = said(capsys, "verify", str(root))
    assert status == 0 and "step-0000000012: whole" in out
    status, out, _ = said(capsys, "verify", str(root), "--json")
    assert status == 0 and json.loads(out)["faults"] == []


def test_verify_a_damaged_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path)
    file = path / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-7] ^= 16
    file.write_bytes(data)
    status, out, _ = said(capsys, "verify", str(tmp_path))
    assert status == 1 and ": 1 fault\n" in out and "rank-00000.safetensors is damaged" in out
    status, out, _ = said(capsys, "verify", str(path), "--json")
    assert status == 1 and len(json.loads(out)["faults"]) == 1
    file.write_bytes(data[:-1])
    assert said(capsys, "verify", str(path))[0] == 1
    assert said(capsys, "inspect", str(path))[0] == 1
    file.unlink()
    status, out, _ = said(capsys, "verify", str(path))
    assert status == 1 and "missing" in out


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_places_without_a_checkpoint(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = said(capsys, command, str(tmp_path / "nowhere"))
    assert status == 2 and "no such directory" in err and len(err.splitlines()) == 1
    status, _, err = said(capsys, command, str(tmp_path))
    assert status == 1 and "holds no complete checkpoint" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: COMMAND"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["inspect"], "required: DIR"),
        (["verify", "a", "b"], "unrecognized arguments: b"),
    ],
)
def test_bad_usage_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = said(capsys, *argv)
    assert status == 2 and not out and message in err and len(err.splitlines()) == 1


def test_as_a_program(root: Path) -> None:
    """With a process of its own, an early end of the pipe, and nothing on stderr."""
    command = f"{sys.executable} -m shard4bit inspect {root} | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == (f"{root / 'step-0000000012'}\n", "")


def test_sizes_and_counts() -> None:
    sizes = {
        0: "0 B",
        999: "999 B",
        1000: "1.00 kB",
        999_949: "999.9 kB",
        999_960: "1.00 MB",
        8 * 10**10: "80.00 GB",
    }
    assert {n: tables.size(n) for n in sizes} == sizes
    counts = {7e9: "7.00 B", 999: "999", 12_345: "12.35 k", 1.5e12: "1.50 T", 999_600: "1.00 M"}
    assert {n: tables.count(n) for n in counts} == counts


def test_progress_is_quiet_in_a_pipe(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    assert list(tables.progress(range(5), "counting")) == list(range(5))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(tables.progress(range(5), "counting")) == list(range(5))
    assert "counting [" in capsys.readouterr().err
