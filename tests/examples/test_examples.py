"""Every example, in fresh processes: train and save, resume, and end where the training would have ended."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.docs.blocks import blocks
from tests.launch.running import ROOT, call

NEEDS = {
    "accelerate_train": ("accelerate", "transformers"),
    "hf_trainer": ("accelerate", "transformers"),
    "lightning_train": ("lightning", "transformers"),
}
CASES = [(example, engine) for example in NEEDS for engine in ("fsdp2", "fsdp1", "zero1", "zero2")]


def needs(example: str, engine: str) -> None:
    for package in (*NEEDS[example], *(["deepspeed"] if engine.startswith("zero") else [])):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: see requirements-dev.txt")


def ran(example: str, *options: str, ranks: int = 2) -> dict[str, Any]:
    """What an example printed at its end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = call(*command, f"examples/{example}.py", *options, limit=250, HF_HUB_OFFLINE="1")
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"losses"')]
    assert done.returncode == 0 and len(lines) == 1, done.stdout[-3000:] + done.stderr[-5000:]
    return json.loads(lines[0])


@pytest.mark.slow
@pytest.mark.timeout(600)  # on a busy machine
@pytest.mark.parametrize("example, engine", CASES)
def test_resumed_training_ends_alike(example: str, engine: str, tmp_path: Path) -> None:
    needs(example, engine)
    common = ["--engine", engine, "--folder", str(tmp_path)]
    whole = ran(example, *common)
    resumed = ran(example, *common, "--resume")
    assert whole["step"] == resumed["step"] == 6
    assert whole["losses"][-3:] == resumed["losses"][-3:]
    assert whole["digest"] == resumed["digest"] and whole["lr"] == resumed["lr"]
    assert whole["losses"][-1] < whole["losses"][0] - 0.5


def test_the_page_lets_trainer_fill_in_what_it_compares() -> None:
    """Trainer raises where these differ from its arguments, whose defaults are others."""
    page = blocks(ROOT / "docs" / "integrations.md")
    settings = json.loads([b.text for b in page if b.tag == "json"][-1])
    compared = {k: v for k, v in settings.items() if k.startswith(("train_", "gradient_"))}
    compared |= {k: settings["optimizer"]["params"][k] for k in ("lr", "weight_decay")}
    assert len(compared) == 5 and set(compared.values()) == {"auto"}


@pytest.mark.slow
def test_frameworks_and_engines_agree(tmp_path: Path) -> None:
    """The same batches, options and clipping: accelerate and Lightning train alike with FSDP1 and FSDP2,
    which they would not with stale parameters, other groups or another scheduler."""
    losses = []
    for example, engine in (("accelerate_train", "fsdp1"), ("lightning_train", "fsdp2")):
        needs(example, engine)
        losses.append(ran(example, "--engine", engine, "--folder", str(tmp_path))["losses"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.slow
def test_fsdp1s_own_format_is_refused_and_the_way_out_named(tmp_path: Path) -> None:
    needs("accelerate_train", "fsdp1")
    text = (ROOT / "examples" / "accelerate_train.py").read_text(encoding="utf-8")
    own = 'if engine == "fsdp1":  # its own format'
    assert text.count(own) == 1
    program = tmp_path / "own.py"
    program.write_text(text.replace(own, "if False:  # its own format"), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = call(*command, str(program), "--engine", "fsdp1", "--folder", str(tmp_path))
    assert done.returncode != 0
    assert "optim_state_dict cannot carry packed states" in done.stderr and "shard4bit.save(" in done.stderr
