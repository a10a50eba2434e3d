"""Wrong arguments and missing tools: one line and status 2, before any rank is started."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.folders import step_name
from tests.launch.running import ROOT, call, until

SHELLS = ["torchrun.sh", "deepspeed.sh", "mpirun.sh", "slurm.sbatch"]
OWN = {  # the commands that each needs
    "torchrun.sh": ["torchrun"],
    "deepspeed.sh": ["deepspeed"],
    "mpirun.sh": ["mpirun"],
    "slurm.sbatch": ["scontrol", "srun", "torchrun"],
}


class Bare:
    """A copy of launch/ without an environment beside it, and a PATH with only what is put there."""

    def __init__(self, folder: Path) -> None:
        shutil.copytree(ROOT / "launch", folder / "launch", ignore=shutil.ignore_patterns("__pycache__"))
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        for tool in ("bash", "dirname", "env"):
            found = shutil.which(tool)
            assert found is not None
            (self.bin / tool).symlink_to(found)

    def put(self, name: str, text: str = "echo started $0 >&2\nexit 7") -> None:
        (self.bin / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (self.bin / name).chmod(0o755)

    def python(self, *flags: str) -> None:
        self.put("python", f'exec "{sys.executable}" {" ".join(flags)} "$@"')

    def run(self, script: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        slurm = {"SLURM_SUBMIT_DIR": str(self.folder)} if script.endswith("sbatch") else {}
        return subprocess.run(
            [str(self.bin / "bash"), f"launch/{script}", *arguments],
            env={"PATH": str(self.bin), "HOME": str(self.folder), **slurm, **more},
            cwd=self.folder, capture_output=True, text=True, timeout=60,
        )  # fmt: skip


@pytest.fixture
def bare(tmp_path: Path) -> Bare:
    return Bare(tmp_path)


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done
    assert done.stderr.count("\n") == 1 and not done.stdout, done
    assert "error: " in done.stderr and all(word in done.stderr for word in words), done


@pytest.mark.parametrize("script", SHELLS)
def test_the_shell_reads_it(script: str) -> None:
    done = subprocess.run(
        ["bash", "-n", ROOT / "launch" / script], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("script", "tool"), [(s, tool) for s in SHELLS for tool in ["python", *OWN[s]]])
def test_missing_tools(script: str, tool: str, bare: Bare) -> None:
    bare.python()
    for other in OWN[script]:
        bare.put(other)
    (bare.bin / tool).unlink()
    refused(bare.run(script), f"launch/{script}: error: {tool} is not on PATH")


@pytest.mark.parametrize("script", SHELLS)
def test_missing_packages(script: str, bare: Bare) -> None:
    bare.python("-S")  # without its packages
    for tool in OWN[script]:
        bare.put(tool)
    if script == "mpirun.sh":
        refused(bare.run(script), "mpirun needs mpi4py: pip install mpi4py")
    else:
        refused(bare.run(script), "not installed in ", "torch, numpy, safetensors")


@pytest.mark.parametrize("script", SHELLS)
def test_wrong_arguments(script: str, bare: Bare) -> None:
    bare.python()
    for tool in OWN[script]:
        bare.put(tool)
    if script == "mpirun.sh":
        pytest.importorskip("mpi4py", reason="mpirun.sh asks for mpi4py first")
    refused(bare.run(script, "--frobnicate"), "launch.train: error: unrecognized arguments: --frobnicate")
    (bare.folder / "old" / "checkpoints" / step_name(1)).mkdir(parents=True)
    refused(bare.run(script, "--out", "old", "--fresh"), "--fresh overwrites nothing")
    helped = bare.run(script, "--help")
    assert helped.returncode == 0 and "--save-every" in helped.stdout and "started" not in helped.stderr


@pytest.mark.parametrize("script", SHELLS)
def test_wrong_numbers_of_ranks(script: str, bare: Bare) -> None:
    bare.python()
    for tool in OWN[script]:
        bare.put(tool)
    if script == "mpirun.sh":
        pytest.importorskip("mpi4py", reason="mpirun.sh asks for mpi4py first")
    for wrong in ("abc", "0", "-1", "1.5", *(["gpu"] if script in ("deepspeed.sh", "mpirun.sh") else [])):
        refused(bare.run(script, RANKS=wrong), f"RANKS={wrong}: expected a number from 1")
    assert "started" in bare.run(script, RANKS="3", SLURM_JOB_NODELIST="", SLURM_JOB_ID="1").stderr
    if script == "torchrun.sh":
        assert "started" in bare.run(script, RANKS="gpu").stderr


def test_what_is_checked_before_ranks_are_started(tmp_path: Path) -> None:
    for options, message in (
        (["--second-moment", "rank2"], "--second-moment='rank2': expected"),
        (["--data", "nowhere"], "--data nowhere: no such file"),
        (["--resume", "nowhere"], "--resume nowhere: no such folder"),
    ):
        refused(call(sys.executable, "-m", "launch.options", *options), message)


def test_wrong_variables(bare: Bare) -> None:
    bare.python()
    for tool in ("torchrun", "deepspeed", "srun", "scontrol"):
        bare.put(tool)
    refused(bare.run("torchrun.sh", NODES="2"), "NODES=2 needs HEAD")
    refused(bare.run("torchrun.sh", RESTARTS="x"), "RESTARTS=x: expected a number from 0")
    refused(bare.run("deepspeed.sh", HOSTFILE="nowhere"), "HOSTFILE=nowhere: no such file")
    example = "launch/hostfile.example"
    refused(bare.run("deepspeed.sh", HOSTFILE=example), "pdsh is not on PATH")
    refused(bare.run("slurm.sbatch", SLURM_SUBMIT_DIR=""), "this is for sbatch")
    refused(bare.run("slurm.sbatch", SLURM_SUBMIT_DIR=str(bare.bin)), "has no launch/train.py")


@pytest.mark.parametrize(
    ("options", "package"),
    [
        (["--optimizer", "bnb-adamw8bit"], "bitsandbytes"),
        (["--engine", "zero1"], "deepspeed"),
        (["--tensorboard"], "tensorboard"),
    ],
)
def test_packages_that_only_some_options_need(options: list[str], package: str, tmp_path: Path) -> None:
    """In an environment that has all of the others."""
    site = tmp_path / "sitecustomize.py"
    site.write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        f"u.find_spec = lambda name, *rest: None if name == {package!r} else find(name, *rest)\n"
    )
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    refused(
        call(sys.executable, "-m", "launch.options", *options, PYTHONPATH=path), "not installed in", package
    )
    others = call(sys.executable, "-m", "launch.options", PYTHONPATH=path)
    assert (others.returncode, others.stderr) == (0, "")


def test_mpi_joins_only_a_program(tmp_path: Path) -> None:
    for words in ([], [str(tmp_path / "nowhere.py")]):
        done = call(sys.executable, "-m", "launch.mpi", *words)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert "expected a program" in done.stderr


#: The deepspeed command, its helper and a rank: they meet signals as DeepSpeed's do.
DEEPSPEED = """
import pathlib, signal, subprocess, sys, time
kind, folder = (sys.argv[1:3] if sys.argv[1] in ("helper", "rank") else ("command", sys.argv[-1]))
if kind == "rank":
    def save(*_):
        time.sleep(1)
        pathlib.Path(folder, "saved").touch()
        sys.exit(0)
    signal.signal(signal.SIGTERM, save)
    pathlib.Path(folder, "ready").touch()
    time.sleep(30)
if kind == "command" or not pathlib.Path(folder, "early").exists():
    child = subprocess.Popen([sys.executable, __file__, "helper" if kind == "command" else "rank", folder])
    if kind == "helper":
        def end(*_):
            child.terminate()
            sys.exit(1)
        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, end)
    sys.exit(max(0, child.wait()))
pathlib.Path(folder, "ready").touch()
time.sleep(30)
"""


@pytest.mark.parametrize("early", [False, True], ids=["ranks", "early"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_of_deepspeed(number: signal.Signals, early: bool, bare: Bare) -> None:
    """To its whole process group, as a terminal's Ctrl-C: the ranks save, then the script ends with 0; where
    there is no rank yet, with another status."""
    bare.python()
    (bare.folder / "deepspeed.py").write_text(DEEPSPEED)
    bare.put("deepspeed", f'exec "{sys.executable}" deepspeed.py "$@"')
    for tool in ("pgrep", "pkill"):
        (bare.bin / tool).symlink_to(str(shutil.which(tool)))
    if early:
        (bare.folder / "early").touch()
    run = subprocess.Popen(
        [str(bare.bin / "bash"), "launch/deepspeed.sh", "--out", str(bare.folder)],
        env={"PATH": str(bare.bin), "HOME": str(bare.folder)}, cwd=bare.folder, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    until((bare.folder / "ready").exists, 60)
    os.killpg(run.pid, number)
    assert (run.wait(30) == 0) != early
    assert (bare.folder / "saved").exists() != early
