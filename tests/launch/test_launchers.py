"""What the launchers start ends with the bits of an undisturbed run, after a lost rank or a stop too."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.deepspeed.engines import needs_deepspeed
from tests.launch.running import STEPS, Started, call, environment, into, read, train
from tests.pool import free_port, pool

pytestmark = [
    pytest.mark.timeout(280),
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="ranks are found by Linux's /proc"),
]
MPIRUN = shutil.which("mpirun", path=environment()["PATH"])
needs_mpirun = pytest.mark.skipif(MPIRUN is None, reason="no mpirun: see requirements-dev.txt")


@pytest.fixture(scope="module")
def undisturbed(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results on two ranks that nobody touches; by mpirun where it is installed."""
    out = tmp_path_factory.mktemp("undisturbed")
    done = call("bash", f"launch/{'mpirun' if MPIRUN else 'torchrun'}.sh", *options, *into(out, every=0))
    assert done.returncode == 0, done.stdout + done.stderr
    return read(out)


def check(results: dict[str, Any], want: dict[str, Any], first: int = 0) -> None:
    """Results from step ``first`` on are those that are wanted, bit for bit."""
    assert results["first_step"] == first
    assert results["losses"] == want["losses"][first:] and results["losses"]
    assert results["digest"] == want["digest"]
    assert results["world_size"] == want["world_size"]


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [[], ["--fresh"]], ids=["default", "fresh"])
def test_torchrun_brings_a_killed_rank_back(
    fresh: list[str], options: list[str], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    command = ["bash", "launch/torchrun.sh", *options, *into(tmp_path), *fresh]
    with Started(tmp_path / "log", *command) as run:
        run.saves(tmp_path, 4)
        os.kill(run.ranks()[1], signal.SIGKILL)
        assert run.ends() == 0, run.said
        results = read(tmp_path)
        assert f"resumed from {tmp_path / 'checkpoints'}, step {results['first_step']}" in run.said
    assert 4 <= results["first_step"] < STEPS
    check(results, undisturbed, results["first_step"])


#: launcher, its variables, and its status after a stop: torchrun reports the signal itself
STOPPED = [
    pytest.param(["python", "-m", "launch.train"], 0, id="alone"),
    pytest.param(["bash", "launch/torchrun.sh"], 1, id="torchrun", marks=pytest.mark.slow),
    pytest.param(["bash", "launch/mpirun.sh"], 0, id="mpirun", marks=[pytest.mark.slow, needs_mpirun]),
    pytest.param(
        ["bash", "launch/deepspeed.sh"], 0, id="deepspeed", marks=[pytest.mark.slow, needs_deepspeed]
    ),
]


@pytest.mark.parametrize(("launcher", "status"), STOPPED)
def test_sigterm_saves_and_the_next_run_goes_on(
    launcher: list[str],
    status: int,
    options: list[str],
    undisturbed: dict[str, Any],
    tmp_path: Path,
) -> None:
    command = [*launcher, *options, *into(tmp_path, every=0), "--save-at", "3"]
    with Started(tmp_path / "log", *command, PORT=str(free_port())) as run:
        run.saves(tmp_path, 3)
        run.process.terminate()
        assert run.ends() == status, run.said
        assert "stopped by SIGTERM after step" in run.said
    stopped = read(tmp_path)["stopped"]
    assert 3 < stopped < STEPS
    assert read(tmp_path)["checkpoint"]["step"] == stopped
    again = [*options, "--out", str(tmp_path), "--save-every", "0"]
    if launcher[0] == "python":
        want = train([*options, "--out", str(tmp_path / "whole"), "--save-every", "0"])
        check(train(again), want, stopped)
    else:
        check(pool(2).run(train, again)[0], undisturbed, stopped)


@needs_mpirun
def test_mpirun_makes_ranks(undisturbed: dict[str, Any]) -> None:
    """What the tests of the other launchers compare with."""
    assert (undisturbed["world_size"], undisturbed["backend"]) == (2, "gloo")
    assert (undisturbed["engine"], len(undisturbed["losses"])) == ("fsdp2", STEPS)
    assert undisturbed["losses"][-1] < undisturbed["losses"][0] - 1
    assert len(undisturbed["digest"]) == 32


@pytest.mark.slow
@needs_mpirun
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_mpirun_gives_the_bits_of_torchrun(ranks: int, options: list[str], tmp_path: Path) -> None:
    for launcher in ("mpirun", "torchrun"):
        command = ["bash", f"launch/{launcher}.sh", *options, *into(tmp_path / launcher, every=0)]
        done = call(*command, RANKS=str(ranks))
        assert done.returncode == 0, done.stdout + done.stderr
    results = read(tmp_path / "mpirun")
    assert results["world_size"] == ranks
    check(results, read(tmp_path / "torchrun"))


OPENMPI = os.environ.get("OPENMPI_ENV", "")


@pytest.mark.slow
@pytest.mark.skipif(
    not (Path(OPENMPI) / "bin" / "mpirun").exists() or not OPENMPI,
    reason="OPENMPI_ENV names no environment with Open MPI: see docs/launching.md",
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_open_mpi(ranks: int, options: list[str], tmp_path: Path) -> None:
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    path = f"{OPENMPI}/bin{os.pathsep}{os.environ['PATH']}"
    theirs = {"VIRTUAL_ENV": OPENMPI, "PATH": path, "MPIARGS": "--oversubscribe --bind-to none", **root}
    for launcher, more in (("mpirun", theirs), ("torchrun", {})):
        command = ["bash", f"launch/{launcher}.sh", *options, *into(tmp_path / launcher, every=0)]
        done = call(*command, RANKS=str(ranks), **more)  # type: ignore[arg-type]
        assert done.returncode == 0, done.stdout + done.stderr
    check(read(tmp_path / "mpirun"), read(tmp_path / "torchrun"))


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("engine", ["fsdp2", "zero2"])
def test_the_deepspeed_launcher(
    engine: str, options: list[str], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    command = ["bash", "launch/deepspeed.sh", *options, *into(tmp_path, every=0), "--engine", engine]
    done = call(*command, PORT=str(free_port()))
    assert done.returncode == 0, done.stdout + done.stderr
    check(read(tmp_path), undisturbed)
