"""Importing shard4bit: quick, quiet, and nothing that is not needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import shard4bit

ROOT = Path(__file__).resolve().parents[1]

IMPORT = """
import json, sys, time
import torch
before, events = set(sys.modules), []
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink", "os.truncate", "shutil.")

def record(event, args):
    written = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if written or event.startswith(CHANGES):
        events.append([event, str(args[0])])

sys.addaudithook(record)
start = time.perf_counter()
import shard4bit
taken = time.perf_counter() - start
names, listed, loaded = sorted(set(sys.modules) - before), dir(shard4bit), sorted(vars(shard4bit))
{more}
modules = sorted(sys.modules)
keys = ("taken", "names", "listed", "loaded", "events", "modules")
print(json.dumps({key: globals()[key] for key in keys}))
"""


def in_fresh_process(more: str = "") -> dict[str, Any]:
    """What an import of shard4bit (then ``more``) does in a new interpreter that has torch already."""
    command = [sys.executable, "-B", "-c", IMPORT.replace("{more}", more)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def fresh() -> dict[str, Any]:
    return in_fresh_process()


def test_import_takes_less_than_two_milliseconds(fresh: dict[str, Any]) -> None:
    """Beyond torch's own import; in one of five processes, because other programs take turns."""
    taken = [fresh["taken"]]
    while len(taken) < 5 and min(taken) >= 0.002:
        taken.append(in_fresh_process()["taken"])
    assert min(taken) < 0.002, taken


HEAVY = ("torch.distributed.tensor", "torch.distributed.checkpoint", "torch.distributed.fsdp")
OPTIONAL = ("cupy", "deepspeed", "safetensors", "xxhash", "matplotlib")


def test_import_loads_nothing_else_and_writes_nothing(fresh: dict[str, Any]) -> None:
    assert fresh["names"] == ["shard4bit"]
    assert fresh["events"] == []
    assert not [n for n in fresh["modules"] if n.startswith((*HEAVY, *OPTIONAL))]


def test_dir_lists_what_is_not_loaded_yet(fresh: dict[str, Any]) -> None:
    assert set(shard4bit.__all__) <= set(fresh["listed"]) and fresh["listed"] == sorted(fresh["listed"])
    assert not set(shard4bit.__all__) & set(fresh["loaded"])


USE = """
for package, adamw, sgd in ((torch.optim, "AdamW", "SGD"), (shard4bit, "AdamW4bit", "SGD4bit")):
    before = set(sys.modules)
    p = torch.nn.Parameter(torch.ones(70, 80))
    for optimizer in (getattr(package, adamw)([p]), getattr(package, sgd)([p])):
        p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
names = sorted(set(sys.modules) - before)
"""


def test_use_on_plain_tensors_loads_what_torchs_own_optimizers_load() -> None:
    """DTensor, DCP and FSDP take half a second each. (torch 2.13 loads them with the dynamo wrappers of
    its own methods, so they are counted after torch's optimizers have been used.)"""
    found = in_fresh_process(USE)
    assert {"shard4bit.optim.adamw", "shard4bit.optim.sgd"} <= set(found["names"])
    assert not [n for n in found["names"] if n.startswith((*HEAVY, *OPTIONAL))]
    assert not [n for n in found["modules"] if n.startswith(OPTIONAL)]


def test_the_probe_sees_what_it_looks_for() -> None:
    """DTensor and a written file are noticed."""
    found = in_fresh_process("import torch.distributed.tensor, os; open(os.devnull, 'w').close()")
    assert "torch.distributed.tensor" in found["modules"]
    assert [e for e in found["events"] if e[0] == "open"]


def test_public_names() -> None:
    assert set(shard4bit.__all__) <= set(dir(shard4bit))
    assert sorted(shard4bit.__all__) == list(shard4bit.__all__)
    for name in shard4bit.__all__:
        value = getattr(shard4bit, name)
        assert value is getattr(shard4bit, name)
        assert value.__doc__, name
    from shard4bit.optim.adamw import AdamW4bit
    from shard4bit.spec import QuantSpec

    assert shard4bit.AdamW4bit is AdamW4bit and shard4bit.QuantSpec is QuantSpec


@pytest.mark.parametrize("name", ["AdamW", "adamw4bit", "nothing", "_private"])
def test_unknown_attributes(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module 'shard4bit' has no attribute '{name}'"):
        getattr(shard4bit, name)
    assert not hasattr(shard4bit, name)


def test_errors_are_value_errors() -> None:
    for error in (shard4bit.LayoutError, shard4bit.StateError, shard4bit.CheckpointError):
        assert issubclass(error, shard4bit.Shard4bitError) and issubclass(error, ValueError)


def test_version_is_that_of_the_package() -> None:
    text = (ROOT / "setup.py").read_text()
    assert f'version="{shard4bit.__version__}"' in text
