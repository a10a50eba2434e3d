"""A checkpoint of every released version of the format, which must load for ever.

``python -m tests.checkpoint.test_fixtures`` writes the one of the present version, if it is not there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shard4bit
from shard4bit.checkpoint.manifest import VERSION
from shard4bit.checkpoint.verify import verify

FIXTURES = Path(__file__).parent / "fixtures"
STEP = 7


class Model(torch.nn.Module):
    """Quantized and small parameters, odd columns, a frozen one, and buffers."""

    def __init__(self, fill: float | None = None) -> None:
        super().__init__()
        shapes = {"odd": (65, 67), "conv": (16, 16, 5, 5), "bias": (9,), "frozen": (3, 4)}
        for name, shape in shapes.items():
            values = np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32)
            self.register_parameter(name, torch.nn.Parameter(torch.from_numpy(values)))
        self.frozen.requires_grad_(False)
        self.register_buffer("seen", torch.tensor(3))
        self.register_buffer("table", torch.arange(6).view(2, 3).bfloat16())
        if fill is not None:
            with torch.no_grad():
                for tensor in [*self.parameters(), *self.buffers()]:
                    tensor.fill_(fill)


def made(fill: float | None = None) -> tuple[Model, Any]:
    model = Model(fill)
    return model, shard4bit.AdamW4bit((p for p in model.parameters() if p.requires_grad), lr=0.01)


def extra() -> Any:
    return {"epoch": 2, "t": torch.arange(5.0), "inf": float("inf"), "pair": (1, 2), "steps": {3: 1}}


def write(root: Path) -> None:
    model, optimizer = made()
    for step in range(3):
        for p in model.parameters():
            if p.requires_grad:
                values = np.random.default_rng([step, p.numel()]).standard_normal(tuple(p.shape))
                p.grad = torch.from_numpy(values.astype(np.float32))
        optimizer.step()
    shard4bit.save(root, model, optimizer, step=STEP, extra=extra(), rng=True)
    (root / "digest.json").write_text(json.dumps({"digest": shard4bit.digest(model, optimizer)}) + "\n")


def versions() -> list[int]:
    return sorted(int(p.name[1:]) for p in FIXTURES.iterdir() if p.name.startswith("v"))


def test_every_version_has_one() -> None:
    assert versions() == list(range(1, VERSION + 1))


@pytest.mark.parametrize("version", versions() if FIXTURES.is_dir() else [])
def test_old_checkpoints_load(version: int) -> None:
    root = FIXTURES / f"v{version}"
    model, optimizer = made(fill=9)
    found = shard4bit.load(root, model, optimizer, rng=False)
    known = json.loads((root / "digest.json").read_text())["digest"]
    assert shard4bit.digest(model, optimizer) == known
    assert found.step == STEP and found.skipped == []
    expected = extra()
    assert torch.equal(found.extra.pop("t"), expected.pop("t"))
    assert found.extra == expected
    assert verify(root / f"step-{STEP:010d}") == []
    assert int(model.seen) == 3 and optimizer.param_groups[0]["lr"] == 0.01


if __name__ == "__main__":
    write(FIXTURES / f"v{VERSION}")
