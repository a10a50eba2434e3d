"""Histograms of moments, from an optimizer and from files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import shard4bit
from shard4bit import plot
from shard4bit.cli.main import main
from tests.cli.helpers import saved, trained
from tests.optim.helpers import fill_grads, model_of, run

pytest.importorskip("matplotlib")


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_moments_of_an_optimizer(tmp_path: Path) -> None:
    model = model_of()
    optimizer = shard4bit.AdamW4bit(model.named_parameters())
    with pytest.raises(ValueError, match="call it between backward and step"):
        plot.moments(optimizer, tmp_path / "a.png")
    run(model.parameters(), optimizer, range(2))
    fill_grads(model.parameters(), 3)
    before = shard4bit.digest(model, optimizer)
    assert plot.moments(optimizer, tmp_path / "a.png") == ["0.weight", "2.weight"]
    assert plot.moments(optimizer, tmp_path / "b.png", names=["2.*"]) == ["2.weight"]
    assert plot.moments(optimizer, tmp_path / "c.png", most=1) == ["0.weight"]
    assert shard4bit.digest(model, optimizer) == before
    assert all(is_png(tmp_path / f"{name}.png") for name in "abc")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "run", quantize=False)
    out = tmp_path / "x.png"
    argv = ["plot", str(path), str(out), "--tensor", "o*", "--spec", "B128/DE", "--spec", "B128/DE-0"]
    assert main(argv) == 0 and is_png(out)
    assert capsys.readouterr().out == f"wrote {out}: odd\n"
    assert main(["plot", str(path), str(out), "--tensor", "nothing"]) == 2
    assert "no quantizable parameter" in capsys.readouterr().err
    assert main(["plot", str(path), str(out), "--spec", "Q4"]) == 2
    assert "--spec Q4: expected one of" in capsys.readouterr().err


def test_requantized_is_what_the_optimizer_stores() -> None:
    model, optimizer = trained(quantize=False)
    values = optimizer.moment(model.odd, "exp_avg_sq")
    found = plot.requantized(values, "exp_avg_sq", ["rank1", "B128/DE", "B128/DE-0", "factored"])
    assert list(found) == ["Rank-1/Linear", "B128/DE", "B128/DE-0", "factored"]
    assert (found["B128/DE"] == 0).any() and not (found["B128/DE-0"] == 0).any()  # the zero point
    assert list(plot.requantized(values, "exp_avg", ["rank1", "B128/DE"])) == ["B128/DE"]
    twice = plot.requantized(found["Rank-1/Linear"].view(67, 301), "exp_avg_sq", ["rank1"])
    assert torch.allclose(twice["Rank-1/Linear"], found["Rank-1/Linear"], rtol=0.13)


def test_without_matplotlib(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "matplotlib" else real(n, *a))
    with pytest.raises(ValueError, match="drawing needs matplotlib: pip install matplotlib"):
        plot.draw({}, tmp_path / "x.png")
    assert main(["plot", str(tmp_path), str(tmp_path / "x.png")]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err
