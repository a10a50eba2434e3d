"""``convert``: from every form to every other and back, bit for bit where nothing is quantized anew."""

from __future__ import annotations

import itertools
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import shard4bit
from shard4bit.cli.main import main
from tests.cli.helpers import Small, saved, trained
from tests.covering import covering


def convert(*argv: object) -> None:
    assert main(["convert", *map(str, argv)]) == 0


def fresh(**options: Any) -> tuple[Small, Any]:
    """As ``trained``, before the first step, with other values."""
    model, optimizer = trained(steps=0, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.count.zero_()
    return model, optimizer


def digest_of(path: Path, **options: Any) -> str:
    model, optimizer = fresh(**options)
    shard4bit.load(path, model, optimizer)
    return shard4bit.digest(model, optimizer)


KINDS: dict[str, dict[str, Any]] = {
    "rank1": {},
    "factored": {"second_moment": "factored"},
    "8bit": dict(shard4bit.spec.ADAMW_8BIT),
    "sgd": {"momentum": 0.9},
}


@pytest.mark.parametrize("form, kind", covering(["safetensors", "dcp", "canonical"], KINDS))
def test_there_and_back_changes_no_bit(form: str, kind: str, tmp_path: Path) -> None:
    path, options = saved(tmp_path / "run", **KINDS[kind]), KINDS[kind]
    middle = tmp_path / {"safetensors": "all.safetensors", "dcp": "dcp", "canonical": "other"}[form]
    convert(path, middle, "--to", form)
    convert(middle, tmp_path / "back", "--to", "canonical")
    assert digest_of(tmp_path / "back", **options) == digest_of(path, **options)
    model, optimizer = fresh(**options)
    assert shard4bit.load(tmp_path / "back", model, optimizer).step == 3
    assert [g["lr"] for g in optimizer.param_groups] == [1e-2, 1e-2]
    assert optimizer.param_groups[1]["weight_decay"] == 0.0


@pytest.mark.parametrize("kind", ["rank1", "factored", "sgd"])
def test_to_torchs_own_optimizer(kind: str, tmp_path: Path) -> None:
    """Its values are ours, dequantized, and torch's optimizer goes on from it."""
    path = saved(tmp_path / "run", **KINDS[kind])
    convert(path, tmp_path / "state.pt")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    model, ours = trained(**KINDS[kind])
    groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in ours.param_groups]
    theirs: Any = torch.optim.SGD(groups) if kind == "sgd" else torch.optim.AdamW(groups)
    theirs.load_state_dict(state)
    assert theirs.param_groups[0]["lr"] == 1e-2 and theirs.param_groups[1]["weight_decay"] == 0
    for number, (name, p) in enumerate(
        [(n, dict(model.named_parameters())[n]) for n in ("odd", "conv", "bias")]
    ):
        for moment in ("momentum_buffer",) if kind == "sgd" else ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state["state"][number][moment], ours.moment(p, moment)), (name, moment)
        if kind != "sgd":
            assert float(state["state"][number]["step"]) == 3
    theirs.step()


def test_from_torchs_adamw(tmp_path: Path) -> None:
    """A plain AdamW's file and its model become what import_state makes of the same optimizer."""
    model, _ = trained(steps=0)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    theirs = torch.optim.AdamW(trainable.items(), lr=3e-3, betas=(0.8, 0.9))
    for _ in range(3):
        for p in trainable.values():
            p.grad = torch.randn_like(p)
        theirs.step()
    torch.save(theirs.state_dict(), tmp_path / "adamw.pt")
    save_file({n: t.detach() for n, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    convert(
        tmp_path / "adamw.pt",
        tmp_path / "run",
        "--to",
        "canonical",
        "--model",
        tmp_path / "model.safetensors",
    )
    ours = shard4bit.AdamW4bit(list(trainable.values()))
    shard4bit.import_state(ours, theirs)
    expected = shard4bit.digest(model, ours)
    other = Small()
    loaded = shard4bit.AdamW4bit([p for p in other.parameters() if p.requires_grad])
    found = shard4bit.load(tmp_path / "run", other, loaded)
    assert found.step == 3 and shard4bit.digest(other, loaded) == expected
    assert loaded.param_groups[0]["betas"] == (0.8, 0.9) and loaded.param_groups[0]["lr"] == 3e-3


def test_numbered_parameters_need_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Small()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    theirs = torch.optim.AdamW(trainable.values())
    for p in trainable.values():
        p.grad = torch.ones_like(p)
    theirs.step()
    torch.save({"optimizer": theirs.state_dict(), "epoch": 3}, tmp_path / "adamw.pt")
    argv = ["convert", str(tmp_path / "adamw.pt"), str(tmp_path / "run"), "--to", "canonical"]
    assert main(argv) == 2 and "give --names FILE" in capsys.readouterr().err
    (tmp_path / "names.json").write_text(json.dumps(list(trainable)))
    assert main([*argv, "--names", str(tmp_path / "names.json"), "--second-moment", "block"]) == 0
    ours = shard4bit.AdamW4bit(trainable.values(), second_moment="block")
    found = shard4bit.load(tmp_path / "run", model, ours)  # moments only: the model stays
    assert found.step == 1 and ours.param_groups[0]["second_moment"] == "B128/Linear"
    assert float(ours.moment(model.odd, "exp_avg")[0, 0]) == pytest.approx(0.1)


def test_fp32_and_back(tmp_path: Path) -> None:
    """Dequantizing loses nothing: the fp32 states are those that the 4-bit optimizer goes on with, and their
    own quantization gives the same values up to the codes' rounding."""
    path = saved(tmp_path / "run")
    convert(path, tmp_path / "fp32", "--to", "canonical", "--states", "fp32")
    model, optimizer = fresh(quantize=False)
    optimizer.param_groups[1]["quantize"] = False
    shard4bit.load(tmp_path / "fp32", model, optimizer)
    same, packed = trained()
    for name in ("odd", "conv", "bias"):
        for moment in ("exp_avg", "exp_avg_sq"):
            a = optimizer.moment(getattr(model, name), moment)
            assert torch.equal(a, packed.moment(getattr(same, name), moment)), (name, moment)
    convert(tmp_path / "fp32", tmp_path / "again", "--to", "canonical", "--states", "4bit")
    model, optimizer = fresh()
    shard4bit.load(tmp_path / "again", model, optimizer)
    assert optimizer.param_groups[0]["quantize"] is True
    for moment in ("exp_avg", "exp_avg_sq"):
        a, b = optimizer.moment(model.odd, moment), packed.moment(same.odd, moment)
        assert (a - b).norm() < 0.3 * b.norm(), moment


def test_groups_in_fp32_stay_so(tmp_path: Path) -> None:
    path = saved(tmp_path / "run", quantize=False)
    convert(path, tmp_path / "four", "--to", "canonical", "--states", "4bit")
    model, optimizer = fresh(quantize=False)
    shard4bit.load(tmp_path / "four", model, optimizer)
    assert [g["quantize"] for g in optimizer.param_groups] == [False, True]


def test_a_safetensors_file_is_a_models_file_too(tmp_path: Path) -> None:
    path = saved(tmp_path / "run", extra={"epoch": 4})
    convert(path, tmp_path / "all.safetensors")
    tensors = load_file(tmp_path / "all.safetensors")
    model, optimizer = trained()
    for name, value in model.state_dict().items():
        assert torch.equal(tensors[name], value), name
    state = optimizer.state[model.conv]
    for key in ("exp_avg_codes", "exp_avg_absmax", "exp_avg_sq_row_max"):
        assert torch.equal(tensors[f"optimizer.conv.{key}"], state[key]), key
    with safe_open(tmp_path / "all.safetensors", "pt") as file:
        about = json.loads(file.metadata()["shard4bit"])
    assert (about["step"], about["extra"]) == (3, {"epoch": 4})
    convert(tmp_path / "all.safetensors", tmp_path / "back", "--to", "canonical")
    assert shard4bit.load(tmp_path / "back", *fresh()).extra == {"epoch": 4}


def test_dcp_as_torch_reads_and_writes_it(tmp_path: Path) -> None:
    """dcp.load takes what convert wrote, convert what dcp.save wrote."""
    path = saved(tmp_path / "run")
    convert(path, tmp_path / "dcp", "--to", "dcp")
    model, optimizer = trained(steps=1)
    values, states = get_state_dict(model, optimizer)
    dcp.load({"model": values, "optimizer": states}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=values, optim_state_dict=states)
    assert shard4bit.digest(model, optimizer) == digest_of(path)
    values, states = get_state_dict(model, optimizer)
    dcp.save({"model": values, "optimizer": states}, checkpoint_id=tmp_path / "theirs", no_dist=True)
    convert(tmp_path / "theirs", tmp_path / "back", "--to", "canonical", "--step", "7")
    assert digest_of(tmp_path / "back") == digest_of(path)
    assert shard4bit.load(tmp_path / "back", *fresh()).step == 7


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["EVIL"],)


@pytest.mark.parametrize("form", ["dcp", "pt"])
def test_pickles_are_not_run(
    form: str, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    source = tmp_path / ("x.pt" if form == "pt" else "x")
    if form == "pt":
        torch.save({"state": {}, "param_groups": [], "more": Evil()}, source)
    else:
        source.mkdir()
        (source / ".metadata").write_bytes(pickle.dumps({"a": Evil()}))
    assert main(["convert", str(source), str(tmp_path / "run"), "--to", "canonical"]) == 2
    assert not (tmp_path / "evil").exists()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_what_does_not_travel_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "run", extra={"sampler": torch.arange(5), "epoch": 2})
    convert(path, tmp_path / "other", "--to", "canonical", "--step", "4")
    assert capsys.readouterr().err == ""
    found = shard4bit.load(tmp_path / "other", *fresh())
    assert found.extra["epoch"] == 2 and torch.equal(found.extra["sampler"], torch.arange(5))
    for target in ("all.safetensors", "state.pt"):
        convert(path, tmp_path / target)
        assert "left out, since only canonical checkpoints hold it: extra" in capsys.readouterr().err


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main(["convert", *map(str, argv)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_bad_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "run")
    for number, text in enumerate(("not a file of tensors", "")):
        (tmp_path / f"{number}.pt").write_text(text)
        (tmp_path / f"{number}.safetensors").write_text(text)
        assert "cannot be read" in refused(capsys, tmp_path / f"{number}.pt", tmp_path / "x", "--to", "dcp")
        said = refused(capsys, tmp_path / f"{number}.safetensors", tmp_path / "x", "--to", "dcp")
        assert "cannot be read as safetensors" in said
    torch.save({"weight": torch.ones(3)}, tmp_path / "model.pt")
    save_file({"weight": torch.ones(3)}, tmp_path / "model.safetensors")
    torch.save({"state": {0: {"sum": torch.ones(3)}}, "param_groups": [{"params": ["w"]}]}, tmp_path / "a.pt")
    cases: list[tuple[list[object], str]] = [
        ([path, tmp_path / "x"], "give --to canonical|adamw|safetensors|dcp|universal"),
        ([path, tmp_path / "0.pt"], "exists already"),
        ([path, tmp_path / "no" / "x.pt"], "its directory does not exist"),
        ([tmp_path / "nowhere", tmp_path / "x.pt"], "no such file or directory"),
        ([path, tmp_path / "x.pt", "--states", "4bit"], "torch's optimizers know fp32 states only"),
        ([path, tmp_path / "x.pt", "--model", "m"], "belong to a .pt file"),
        ([path, tmp_path / "x", "--to", "dcp", "--step", "-1"], "expected an integer in"),
        (
            [path, tmp_path / "x", "--to", "dcp", "--states", "4bit", "--second-moment", "B0/X"],
            "--second-moment",
        ),
        ([tmp_path / "model.pt", tmp_path / "x", "--to", "dcp"], "with 'state' and 'param_groups'"),
        ([tmp_path / "model.safetensors", tmp_path / "x", "--to", "dcp"], "is not of convert"),
        ([tmp_path / "a.pt", tmp_path / "x", "--to", "dcp"], "in none of its groups"),
    ]
    for argv, message in cases:
        assert message in refused(capsys, *argv), argv
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.pt").exists()


def test_forms_are_complete() -> None:
    """Every form is read and written."""
    from shard4bit.cli.convert import FORMS
    from shard4bit.cli.formats import adamw, canonical, dcp, single, zero

    assert len(FORMS) == 5
    for form, name in itertools.product((adamw, canonical, dcp, single, zero), ("read", "write")):
        assert callable(getattr(form, name))
