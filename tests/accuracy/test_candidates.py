"""benchmarks/accuracy/candidates: its baseline against the library, and the rounding by its definition."""

from __future__ import annotations

import csv
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks.accuracy import anatomy, histograms
from benchmarks.accuracy.anatomy import Witness, rows_of
from benchmarks.accuracy.candidates import (
    ABLATED,
    CANDIDATES,
    EXACT,
    TABLES,
    Candidate,
    CandidateAdamW,
    Quantizer,
    scales_of,
    uniform,
)
from shard4bit import AdamW4bit
from shard4bit.maths.packing import unpack_codes
from shard4bit.maths.update import ADAMW
from shard4bit.spec import ADAMW_PAPER

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
CPU = torch.device("cpu")


def made(count: int = 3) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(70 + i, 300)) for i in range(count)] + [
        torch.nn.Parameter(torch.randn(50))
    ]


@pytest.mark.parametrize("second", ["rank1", *ABLATED])
def test_the_paper_is_the_library_bit_for_bit(second: str) -> None:
    ours, theirs = made(), made()
    library = AdamW4bit(ours, second_moment=second, **ADAMW_PAPER, **OPTIONS)
    candidate = CandidateAdamW(theirs, ABLATED.get(second, CANDIDATES["paper"]), **OPTIONS)
    for step in range(6):
        torch.manual_seed(step)
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p) * torch.rand(p.shape[-1])
            q.grad = p.grad.clone()
        library.step()
        candidate.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(library.moment(p, name), candidate.state[q][name])


@pytest.mark.parametrize("name", TABLES)
def test_tables_rise_to_one_in_sixteen_entries(name: str) -> None:
    entries = TABLES[name]
    assert len(entries) == 16 and list(entries) == sorted(entries) and entries[-1] == 1.0
    assert len(set(entries)) == (15 if name == "de-0" else 16)


@pytest.mark.parametrize("scale", ["block", "rank1", "both"])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("rounding", ["stochastic", pytest.param("sequence", marks=pytest.mark.slow)])
def test_stochastic_rounding_is_right_on_average(table: str, scale: str, rounding: str) -> None:
    """And each value goes to one of its neighbours. (Below its smallest entry a table cannot be right.)"""
    torch.manual_seed(1)
    values = torch.randn(4, 200) if min(TABLES[table]) < 0 else torch.rand(4, 200)
    quantizer, draws = Quantizer(table, scale, rounding), 300
    rounds = torch.stack([quantizer(values, torch.tensor(key)) for key in range(draws)]).double()
    size = scales_of(values, scale)[0].double()
    inside = values >= TABLES[table][0] * size
    error = ((rounds.mean(0) - values) / size)[inside]
    widest = max(b - a for a, b in pairwise(TABLES[table]))
    assert inside.double().mean() > 0.8 and error.abs().max() < 5 * widest / 2 / draws**0.5
    assert all(len(rounds[:, i, j].unique()) <= 2 for i in range(4) for j in range(0, 200, 17))


def test_random_numbers_are_by_place_and_uniform() -> None:
    one, other = (uniform((64, 1000), torch.tensor(key), CPU) for key in (5, 6))
    assert torch.equal(one, uniform((64, 1000), torch.tensor(5), CPU)) and not torch.equal(one, other)
    assert torch.equal(uniform((3, 1000), torch.tensor(5), CPU), one[:3])
    assert one.min() >= 0 and one.max() < 1
    for numbers in (one, other, (one - other) % 1):
        counts = torch.histc(numbers, 50, 0, 1)
        expected = numbers.numel() / 50
        assert ((counts - expected) ** 2 / expected).sum() < 90  # chi-square, 49 degrees: p = 0.0003
    assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 0.02


@pytest.mark.slow
def test_compensated_parameters_arrive_where_exact_ones_do() -> None:
    """Once gradients have ended and the moments have run out, parameters lie where those with an exact first
    moment do, however coarse its rounding was; not compensated, they do not. (eps rules the denominator, so
    that the second moment plays no part; gradients come late, when the bias correction has ended.)"""
    options = {**OPTIONS, "eps": 1e3, "weight_decay": 0.0, "lr": 1.0}
    ends = {}
    for name in ("exact", "paper", "compensated"):
        candidate = Candidate(EXACT, EXACT) if name == "exact" else CANDIDATES[name]
        (param,) = params = made(1)[:1]
        optimizer = CandidateAdamW(params, candidate, **options)
        torch.manual_seed(3)
        for step in range(500):
            param.grad = torch.randn_like(param) if 150 <= step < 180 else torch.zeros_like(param)
            optimizer.step()
        ends[name] = param.detach() - made(1)[0].detach()
    far = (ends["paper"] - ends["exact"]).norm() / ends["exact"].norm()
    near = (ends["compensated"] - ends["exact"]).norm() / ends["exact"].norm()
    assert near < 0.02 < 0.1 < far, (near, far)


def codes(optimizer: AdamW4bit, param: torch.Tensor, moment: str) -> torch.Tensor:
    """uint8 (rows, columns) of a matrix, a copy."""
    packed = optimizer.state[param][f"{moment}_codes"].view(param.shape[0], -1)
    return unpack_codes(packed, 0, 0, param.shape[1], 4)


def test_anatomy_changes_nothing() -> None:
    """And the share of stale codes is what the next step shows, by the library's codes of both states."""
    params = made()
    model = torch.nn.ParameterList(params)
    optimizer = CandidateAdamW(params, CANDIDATES["paper"], **OPTIONS)
    twins, witness = made(), Witness()
    plain = [torch.zeros_like(p) for p in params[:3]]
    library = AdamW4bit(twins, **ADAMW_PAPER, **OPTIONS)
    for step in range(4):
        for p, twin in zip(params, twins, strict=True):
            p.grad = torch.randn_like(p) * 0.1**step  # moments decay
            twin.grad = p.grad.clone()
        if step < 3:
            for p, own in zip(params[:3], plain, strict=True):
                own.mul_(0.9).add_(p.grad, alpha=0.1)
            witness.note(optimizer, model, scales=step == 2)
            optimizer.step()
            library.step()
    before = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in params}
    rows = rows_of(optimizer, model, witness)
    for p in params:
        assert all(torch.equal(before[p][k], v) for k, v in optimizer.state[p].items())
    assert [r["moment"] for r in rows] == ["exp_avg", "exp_avg_sq"] and rows[0]["elements"] == 71 * 900
    assert all(0 < r["error"] < 0.5 and 0 < r["direction"] < 1 for r in rows)
    kept = torch.cat([library.moment(p, "exp_avg") for p in twins[:3]])
    own = torch.cat(plain)
    assert rows[0]["drift"] == pytest.approx(float((kept - own).norm() / own.norm()), rel=0.02)
    assert rows[0]["growth"] == pytest.approx(float(kept.abs().sum() / own.abs().sum()) - 1, abs=1e-3)
    before = {m: [codes(library, p, m) for p in twins[:3]] for m in ADAMW.moments}
    library.step()
    for row in rows:
        now = [codes(library, p, row["moment"]) for p in twins[:3]]
        same = sum(int((a == b).sum()) for a, b in zip(before[row["moment"]], now, strict=True))
        assert 0.05 < row["stale"] == pytest.approx(same / row["elements"], abs=1e-3)


@pytest.mark.slow
def test_anatomy_of_a_toy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "anatomy.csv"
    assert anatomy.main(["--toy", "--every", "20", "--arms", "v exact", "--out", str(out)]) == 0
    lines = out.read_text().splitlines()
    assert lines[0] == ",".join(anatomy.COLUMNS) and len(lines) == 5  # of four kinds of layers
    printed = capsys.readouterr().out
    assert "| v exact | head | exp_avg |" in printed
    assert anatomy.main(["--table", "--out", str(out)]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.slow
def test_histograms_of_a_toy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The zero point shows where a map has one, and only there."""
    out, figure = tmp_path / "histograms.csv", tmp_path / "figures" / "ablation.png"
    assert histograms.main(["--toy", "--out", str(out), "--figure", str(figure)]) == 0
    assert figure.stat().st_size > 10_000
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert {r["spec"] for r in rows} == set(histograms.SPECS[:5]) | {"Rank-1/Linear"}
    for row in rows:
        has_zero = row["spec"].endswith("/DE")
        assert (float(row["worst"]) > 100) == has_zero, row
        assert float(row["zeros"]) == 0 or has_zero, row
    assert "| blocks.mlp | B2048/DE |" in capsys.readouterr().out
