"""benchmarks/accuracy: statistics against tables of Student's t, pairing, resuming, one toy run of a task."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.accuracy import run, store, tables, tokens
from benchmarks.accuracy.arms import make_optimizer
from benchmarks.accuracy.experiments import EXPERIMENTS
from benchmarks.accuracy.stats import compare, t_below, t_quantile
from benchmarks.accuracy.train import Epochs, OutOfTimeError, run_cell

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 6.313752), (2, 2.919986), (3, 2.353363), (6, 1.943180), (15, 1.753050)]
)
def test_t_is_that_of_the_tables(freedom: int, quantile: float) -> None:
    """Printed tables of the 95 % points, to six digits."""
    assert t_quantile(0.95, freedom) == pytest.approx(quantile, abs=2e-6)
    assert t_below(-quantile, freedom) == pytest.approx(0.05, abs=1e-6)
    assert t_below(0.0, freedom) == 0.5


def test_comparison_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t(0.95; 2) = 2.919986."""
    found = compare([2, 4, 6], [1, 2, 3], delta=4.0)
    half = 2.919986 / math.sqrt(3)
    assert (found.pairs, found.mean) == (3, 2.0)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), abs=1e-5)
    assert found.p == pytest.approx(t_below(-2 * math.sqrt(3), 2)) and found.verdict == "equivalent"
    assert 1 <= found.boot_low <= 2 <= found.boot_high <= 3


@pytest.mark.parametrize(
    ("delta", "verdict"), [(4.0, "equivalent"), (3.0, "inconclusive"), (0.2, "not equivalent")]
)
def test_verdicts(delta: float, verdict: str) -> None:
    assert compare([2, 4, 6], [1, 2, 3], delta).verdict == verdict
    assert (compare([2, 4, 6], [1, 2, 3], delta).p < 0.05) == (verdict == "equivalent")


def test_too_few_pairs() -> None:
    with pytest.raises(ValueError, match="two or more pairs"):
        compare([1.0], [1.0], 1.0)


def test_order_of_data() -> None:
    """An epoch has every example once; it follows the seed and the epoch, and needs no history."""
    epochs = Epochs(20, 6)
    first = [epochs(3, s) for s in range(3)]
    assert len(set(np.concatenate(first).tolist())) == 18
    assert np.array_equal(Epochs(20, 6)(3, 2), first[2])
    assert not np.array_equal(epochs(3, 3), first[0]) and not np.array_equal(epochs(4, 0), first[0])


def test_arms_are_paired() -> None:
    """Same weights and data whatever ran before on the task; a repeated run gives the same figures."""
    task = EXPERIMENTS["scratch"].task(CPU, toy=True)
    object.__setattr__(task.recipe, "steps", 3)
    rows = [run_cell(task, arm, seed) for arm, seed in (("fp32", 0), ("rank1", 0), ("fp32", 1), ("fp32", 0))]
    pairs = [(r["weights"], r["order"]) for r in rows]
    assert pairs[0] == pairs[1] == pairs[3] and len({*pairs[2], *pairs[0]}) == 4
    assert rows[0]["val_loss"] == rows[3]["val_loss"] != rows[1]["val_loss"]
    with pytest.raises(OutOfTimeError):
        run_cell(task, "fp32", 0, deadline=0.0)
    object.__setattr__(task.recipe, "steps", 40)


def test_names_of_arms_are_options() -> None:
    model = torch.nn.Linear(80, 70)
    common: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    assert make_optimizer("fp32 beta1=0.8", model, **common).defaults["betas"] == (0.8, 0.95)
    made = make_optimizer("block compensated", model, **common)
    assert made.defaults["compensate"] is True and made.defaults["second_moment"] == "B128/Linear"
    for wrong in ("fp32+emb32", "fp32 beta1=0.8+emb32"):
        with pytest.raises(ValueError, match="keeps every moment in fp32 already"):
            make_optimizer(wrong, model, **common)


def row(arm: str, seed: int, loss: float, **more: Any) -> dict[str, Any]:
    known = {"experiment": "scratch", "arm": arm, "seed": seed, "lr": 0.001, "settings": "s", "diverged": 0}
    return {
        **known,
        "val_loss": loss,
        "weights": seed,
        "order": seed,
        "curve": "1:2",
        "device": "CPU",
        "parameters": 1,
        **more,
    }


def test_rows_resume_after_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "scratch.csv"
    for seed in range(2):
        store.append(path, row("fp32", seed, 1.0))
    path.write_bytes(path.read_bytes()[:-9])  # a kill in the middle of the second row
    assert [r["seed"] for r in store.read(path)] == ["0"]
    wanted = [row("fp32", 0, 0), row("fp32", 1, 0), row("fp32", 0, 0, settings="other")]
    assert store.missing(store.read(path), wanted) == wanted[1:]
    store.append(path, row("fp32", 1, 1.0))
    assert [r["seed"] for r in store.read(path)] == ["0", "1"]
    with pytest.raises(ValueError, match="unknown|columns"):
        store.append(path, {"other": 1})


def test_run_skips_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["vision", "--toy", "--device", "cpu", "--seeds", "1", "--out", str(tmp_path)]
    assert run.main([*words, "--arms", "fp32", "--budget", "0"]) == run.LEFT_OVER
    assert not (tmp_path / "vision.csv").exists()
    assert run.main([*words, "--arms", "fp32"]) == 0
    assert run.main([*words, "--arms", "fp32;rank1", "--dry-run"]) == 0
    assert "1 of 2 runs are there already" in capsys.readouterr().out
    assert len(store.read(tmp_path / "vision.csv")) == 1


def test_table(tmp_path: Path) -> None:
    path = tmp_path / "scratch.csv"
    for seed, (base, own) in enumerate([(1, 2), (2, 4), (3, 6)]):
        store.append(path, row("fp32", seed, base))
        store.append(path, row("rank1", seed, own))
    store.append(path, row("B2048/DE", 0, float("nan"), diverged=1, val_loss=""))
    rows = store.read(path)
    text = tables.table(EXPERIMENTS["scratch"], rows, EXPERIMENTS["scratch"].metrics[0])
    assert "| rank1 | 0 of 3 | 4.0000 ± 2.0000 | +2.0000 (3) |" in text
    assert "inconclusive" not in text.splitlines()[2] and "| B2048/DE | 1 of 1 | - |" in text
    with pytest.raises(ValueError, match="not paired"):
        tables.runs_of([*rows, {**rows[0], "arm": "block", "weights": "x"}])
    with pytest.raises(ValueError, match="several"):
        tables.runs_of([*rows, {**rows[0], "arm": "block", "settings": "x"}])


def test_table_of_runs_that_ran_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tables, "EXPERIMENTS", {"scratch": EXPERIMENTS["scratch"]})
    for name, shift in (("scratch", 0.0), ("scratch-again", 0.5)):
        for seed in range(2):
            store.append(tmp_path / f"{name}.csv", row("fp32", seed, 3.0 + shift))
            store.append(tmp_path / f"{name}.csv", row("rank1", seed, 3.0 + shift * (1 + seed) + 0.1 * seed))
        store.append(tmp_path / f"{name}.csv", row("block", 0, float("nan"), diverged=1, val_loss=""))
    assert tables.main(["--results", str(tmp_path)]) == 0
    both = capsys.readouterr().out.partition("Both:")[2]
    # minus fp32: 0 and 0.1; the second time 0, and 0.6, which is too much to be noise
    assert "| rank1 | 0 of 4 | 1 | +0.0000 (3) |" in both
    assert "| block | 2 of 2 | 0 | - (0) |" in both and "fp32 |" not in both.splitlines()[4]


def test_padding_and_pieces() -> None:
    ragged = tokens.flat([np.array([5, 6, 7]), np.array([8])])
    assert tokens.padded(ragged["ids"], ragged["ends"], 2, 0).tolist() == [[5, 6], [8, 0]]
    alphabet = tokens.byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256)) and alphabet["Ġ"] == 32
