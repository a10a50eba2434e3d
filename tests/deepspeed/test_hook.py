"""The hook that torch calls: cheap, silent, and it never keeps torch from being imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest

from tests.deepspeed.engines import needs_deepspeed

ROOT = Path(__file__).resolve().parents[2]
SITE = "import sysconfig; print(sysconfig.get_path('purelib'))"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shard4bit's wheel, built from a copy of the sources, offline."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "shard4bit_hook.py"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "shard4bit", source / "shard4bit", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", str(folder), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("shard4bit-*.whl"))


@pytest.fixture
def installed(wheel: Path, tmp_path: Path) -> Path:
    """A folder with the wheel's files as pip lays them out."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    return tmp_path / "site"


def python(site: Path | None, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code with the installed wheel (and without this checkout) on the path."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "SHARD4BIT_HOOK")}
    env |= {"PYTHONPATH": "" if site is None else str(site), **variables}
    own = f"import sys; sys.path[:] = [p for p in sys.path if p != {str(ROOT)!r} or p == {str(site)!r}]\n"
    command = [sys.executable, "-c", own + code]
    return subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=100)


PROBE = """
import json, sys, time
start = sys.modules.get("shard4bit_hook")
import torch
ours = sorted(n for n in sys.modules if n.startswith("shard4bit"))
names = [hasattr(torch.optim, n) for n in ("AdamW4bit", "SGD4bit")]
hook = sys.modules.get("shard4bit_hook")
times = []
for _ in range(5 if hook else 0):
    for n in hook.NAMES:
        delattr(torch.optim, n) if hasattr(torch.optim, n) else None
    del sys.modules["shard4bit_hook"]
    start = time.perf_counter()
    import shard4bit_hook
    shard4bit_hook.install()
    times.append(time.perf_counter() - start)
print(json.dumps([ours, names, times, "deepspeed" in sys.modules]))
"""


def test_it_is_called_and_loads_nothing_else(installed: Path, record_property: pytest.RecordProperty) -> None:
    """It takes a fraction of the 2 ms that it may: the fastest of five loads is reported, and checked."""
    done = python(installed, PROBE)
    assert done.returncode == 0, done.stderr
    modules, names, times, deepspeed = json.loads(done.stdout)
    assert modules == ["shard4bit_hook"] and names == [True, True] and not deepspeed
    record_property("hook_milliseconds", min(times) * 1e3)
    print(f"hook: {min(times) * 1e3:.3f} ms")
    assert min(times) < 0.002, times


@pytest.mark.parametrize(
    "variable, module", [("SHARD4BIT_HOOK", True), ("TORCH_DEVICE_BACKEND_AUTOLOAD", False)]
)
def test_switches_turn_it_off(variable: str, module: bool, installed: Path) -> None:
    done = python(installed, PROBE.replace("range(5 if hook else 0)", "range(0)"), **{variable: "0"})
    modules, names, _, _ = json.loads(done.stdout)
    assert names == [False, False] and modules == (["shard4bit_hook"] if module else [])


def test_a_name_of_torchs_own_is_left_alone() -> None:
    code = (
        "import sys, types; sys.modules['torch.optim'] = m = types.ModuleType('o'); m.AdamW4bit = 1\n"
        "import shard4bit_hook as h; h.install(); print(m.AdamW4bit, m.SGD4bit.__name__)"
    )
    done = python(ROOT, code)
    assert done.stdout == "1 SGD4bit\n", done.stderr


BROKEN = {
    "the package is gone": lambda site: shutil.rmtree(site / "shard4bit"),
    "its __init__ is damaged": lambda site: (site / "shard4bit" / "__init__.py").write_text("def ("),
    "the adapter is gone": lambda site: shutil.rmtree(site / "shard4bit" / "deepspeed"),
    "torch.optim refuses": lambda site: (site / "sitecustomize.py").write_text(
        "import sys, builtins\nclass M(type(sys)):\n"
        "    def __setattr__(self, name, value):\n"
        "        if name == 'AdamW4bit': raise RuntimeError\n"
        "        super().__setattr__(name, value)\n"
        "real = builtins.__import__\n"
        "def patched(name, *args, **kwargs):\n"
        "    if name == 'shard4bit_hook': sys.modules['torch.optim'].__class__ = M\n"
        "    return real(name, *args, **kwargs)\n"
        "builtins.__import__ = patched\n"
        "import importlib as i\n"
        "whole = i.import_module\n"
        "def module(name, *args):\n"
        "    if name == 'shard4bit_hook': sys.modules['torch.optim'].__class__ = M\n"
        "    return whole(name, *args)\n"
        "i.import_module = module\n"
    ),
}


@pytest.mark.parametrize(
    "how",
    [
        how if "gone" in how or "refuses" in how else pytest.param(how, marks=pytest.mark.slow)
        for how in BROKEN
    ],
)
def test_torch_is_imported_whatever_is_broken(how: str, installed: Path) -> None:
    """And using what is broken says what is missing."""
    BROKEN[how](installed)
    done = python(
        installed, "import torch; print(hasattr(torch.optim, 'AdamW4bit')); torch.optim.AdamW4bit([])"
    )
    assert done.stdout.strip() == ("False" if how == "torch.optim refuses" else "True"), done.stderr
    assert done.returncode == 1
    if how in ("the package is gone", "the adapter is gone"):
        assert "ModuleNotFoundError: No module named 'shard4bit" in done.stderr


def test_pip_removes_the_hook_after_its_announcement(wheel: Path) -> None:
    """pip removes what it installed in the order of paths, and installs in the order of the archive. So
    whenever it is interrupted, the entry point exists only while the module does that it names."""
    names = [i.filename for i in zipfile.ZipFile(wheel).infolist()]
    tops = sorted({name.split("/")[0] + ("/" if "/" in name else "") for name in names})
    info = next(t for t in tops if t.endswith(".dist-info/"))
    assert tops.index(info) < tops.index("shard4bit_hook.py")
    announcement = names.index(info + "entry_points.txt")
    assert names.index("shard4bit_hook.py") < announcement


def test_the_entry_point(wheel: Path) -> None:
    parser = ConfigParser()
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith("entry_points.txt"))
        parser.read_string(archive.read(name).decode())
    assert dict(parser["torch.backends"]) == {"shard4bit": "shard4bit_hook:install"}
    assert "torch" not in (ROOT / "shard4bit_hook.py").read_text().split("import os")[1].split("def")[0]


# ---- the whole promise --------------------------------------------------------------------------------

UNMODIFIED = """
import collections, json, os, sys
import torch, deepspeed
deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)  # compile nothing
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(80, 90), torch.nn.ReLU(), torch.nn.Linear(90, 3))
engine, optimizer, _, _ = deepspeed.initialize(
    model=model, model_parameters=model.parameters(), config=sys.argv[1])
losses = []
for step in range(20):
    torch.manual_seed(step % 4)
    x = torch.randn(16, 80)
    loss = (engine(x.to(engine.module[0].weight.dtype)).float() - x[:, :3]).square().mean()
    engine.backward(loss)
    engine.step()
    losses.append(float(loss.detach()))
states = [v for s in engine.basic_optimizer.state.values() for v in s.values()]
packed = sum(v.numel() for v in states if v.dtype == torch.uint8)
torch.distributed.barrier()
if engine.global_rank == 0:
    kind = type(engine.basic_optimizer).__name__
    print(json.dumps([losses[0], losses[-1], packed, kind, engine.zero_optimization_stage()]))
sys.stdout.flush()
os._exit(0)
"""


def fresh_environment(wheel: Path, folder: Path) -> Path:
    """A new virtual environment with the wheel installed by pip; torch and DeepSpeed are this one's."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    site = subprocess.run(
        [str(python), "-c", SITE], capture_output=True, text=True, check=True
    ).stdout.strip()
    own = [p for p in sys.path if p.endswith("-packages")]
    Path(site, "others.pth").write_text("\n".join(own) + "\n")
    pip = [
        str(python),
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--disable-pip-version-check",
    ]
    subprocess.run([*pip, str(wheel)], check=True)
    return python


PARAMS = {"lr": 0.01, "betas": [0.9, 0.95], "no_decay": ["*.bias"]}
MASTERS = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


@needs_deepspeed
@pytest.mark.parametrize(
    "stage, kind, options, more",
    [
        (2, "AdamW4bit", PARAMS, {}),
        pytest.param(0, "SGD4bit", {"lr": 0.1}, {"bf16": {"enabled": True}}, marks=pytest.mark.slow),
        pytest.param(1, "AdamW4bit", PARAMS, MASTERS, marks=pytest.mark.slow),
    ],
    ids=["zero2", "stage 0", "BF16_Optimizer"],
)
def test_json_alone_in_a_fresh_environment(
    wheel: Path, tmp_path: Path, stage: int, kind: str, options: dict[str, Any], more: dict[str, Any]
) -> None:
    """The installed wheel, a script in which its name does not occur, and a JSON: by torchrun, 2 ranks."""
    python = fresh_environment(wheel, tmp_path / "env")
    assert "shard4bit" not in UNMODIFIED
    (tmp_path / "train.py").write_text(UNMODIFIED)
    settings = {
        "train_micro_batch_size_per_gpu": 16,
        "optimizer": {"type": kind, "params": options},
        "zero_optimization": {"stage": stage},
        **more,
    }
    (tmp_path / "ds_config.json").write_text(json.dumps(settings))
    first, last, packed, *which = by_torchrun(python, tmp_path)
    assert which == [kind, stage] and packed >= 80 * 90 / 2 and last < first


def by_torchrun(python: Path, folder: Path) -> list[Any]:
    """What train.py in the folder prints."""
    env = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("PYTHONPATH", "RANK", "LOCAL_", "WORLD", "MASTER"))
    }
    env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [str(python), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "train.py", "ds_config.json"],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=250,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("[") and "4bit" in line]
    assert lines, done.stdout[-3000:] + done.stderr[-6000:]
    found: list[Any] = json.loads(lines[-1])
    return found
