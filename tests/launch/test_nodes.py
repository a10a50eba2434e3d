"""Several nodes, simulated on this one: two torchruns, DeepSpeed's hostfile, SLURM.

What only clusters have (ssh, pdsh, sbatch, scontrol, srun) are small scripts that do the same here."""

from __future__ import annotations

import os
import re
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.deepspeed.engines import needs_deepspeed
from tests.launch.running import ROOT, STEPS, Started, environment, into, read, train, until
from tests.pool import free_port, pool

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(280),
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="ranks are found by Linux's /proc"),
]


@pytest.fixture(scope="module")
def undisturbed(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results on two ranks that nobody touches."""
    out = ["--out", str(tmp_path_factory.mktemp("undisturbed")), "--save-every", "0"]
    return pool(2).run(train, [*options, *out])[0]


def check(results: dict[str, Any], want: dict[str, Any]) -> int:
    """A run's results are those wanted, bit for bit; the step that it started from."""
    first: int = results["first_step"]
    assert results["losses"] == want["losses"][first:] and results["losses"]
    assert results["digest"] == want["digest"] and results["world_size"] == 2
    return first


@pytest.mark.parametrize("fresh", [[], ["--fresh"]], ids=["default", "fresh"])
def test_torchrun_on_two_nodes_brings_a_killed_rank_back(
    fresh: list[str], options: list[str], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    where = {"NODES": "2", "HEAD": f"127.0.0.1:{free_port()}", "RANKS": "1"}
    command = ["bash", "launch/torchrun.sh", *options, *into(tmp_path), *fresh]
    first = Started(tmp_path / "log-0", *command, **where)
    second = Started(tmp_path / "log-1", *command, **where)
    with first, second:
        first.saves(tmp_path, 4)
        ranks = {**first.ranks(), **second.ranks()}
        assert set(ranks) == {0, 1}
        os.kill(ranks[1], signal.SIGKILL)
        assert (first.ends(), second.ends()) == (0, 0), first.said + second.said
    assert 4 <= check(read(tmp_path), undisturbed) < STEPS


def put(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)


SSH = """
echo "ssh $*" >>"$RECORD"
[[ $* == *" -I" ]] && echo "127.0.0.1 " # what `hostname -I` says there
exit 0
"""
#: Real ones start the words on every node by ssh, with its number for %n. DeepSpeed stops a run with a second
#: pdsh, whose pkill would end every DeepSpeed run of this machine: here only those that the first started.
PDSH = """
echo "pdsh $*" >>"$RECORD"
[[ $1 == -S && $2 == -f && $4 == -w ]] || exit 9
IFS=, read -ra nodes <<<"$5"; shift 5
if [[ $1 == "pkill -f "* ]]; then
    for pid in $(cat "$RECORD".pids); do
        kill -TERM $(pgrep -P $pid -f deepspeed.launcher.launch || echo $pid)
    done
    exit
fi
trap : INT TERM # DeepSpeed sends both; ranks behind a real ssh do not get them
for i in "${!nodes[@]}"; do
    words="$*"
    bash -c "export NODE=${nodes[i]}; ${words//%n/$i}" & pids+=($!)
done
echo "${pids[@]}" >"$RECORD".pids
status=0
for pid in "${pids[@]}"; do
    while kill -0 $pid 2>/dev/null; do wait $pid; status=$?; done
    worst=$((${worst:-0} | status))
done
exit $worst
"""


def hostfile(folder: Path) -> dict[str, str]:
    """The variables for deepspeed.sh on two nodes of one rank."""
    put(folder / "bin", "ssh", SSH)
    put(folder / "bin", "pdsh", PDSH)
    (folder / "hosts").write_text("node0 slots=1\nnode1 slots=1\n")
    path = f"{folder / 'bin'}{os.pathsep}{environment()['PATH']}"
    record = str(folder / "record")
    return {"HOSTFILE": str(folder / "hosts"), "PORT": str(free_port()), "PATH": path, "RECORD": record}


@needs_deepspeed
def test_deepspeed_with_a_hostfile(options: list[str], undisturbed: dict[str, Any], tmp_path: Path) -> None:
    command = ["bash", "launch/deepspeed.sh", *options, *into(tmp_path), "--engine", "zero1"]
    with Started(tmp_path / "log", *command, **hostfile(tmp_path)) as run:
        assert run.ends(200) == 0, run.said
    assert check(read(tmp_path), undisturbed) == 0
    record = (tmp_path / "record").read_text()
    assert "ssh node0 hostname -I" in record and "-w node0,node1 " in record
    assert f"cd {ROOT};" in record and "--node_rank=%n" in record and "--master_addr=127.0.0.1" in record


@needs_deepspeed
def test_a_stop_of_deepspeed_with_a_hostfile(
    options: list[str], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    command = ["bash", "launch/deepspeed.sh", *options, *into(tmp_path)]
    with Started(tmp_path / "log", *command, **hostfile(tmp_path)) as run:
        run.saves(tmp_path, 4)
        run.process.terminate()
        assert run.ends() == 1, run.said
        until(lambda: (tmp_path / "results.json").exists(), say=lambda: run.said)
        assert "stopped by SIGTERM after step" in run.said
    step = read(tmp_path)["stopped"]
    assert 4 <= step < STEPS
    assert check(pool(2).run(train, [*options, *into(tmp_path)])[0], undisturbed) == step


#: The real one queues the script, and runs a copy of it on the first node.
SBATCH = """
while [[ $1 == --* ]]; do export SLURM_JOB_NUM_NODES=$2; shift 2; done
cp "$1" "$RECORD".spool; shift
export SLURM_SUBMIT_DIR=$PWD SLURM_JOB_NODELIST="node[0-1]" SLURM_CPUS_PER_TASK=1
exec bash "$RECORD".spool "$@"
"""
SCONTROL = r"""
[[ $* == "show hostnames node[0-1]" ]] && printf '127.0.0.1\n127.0.0.1\n'
"""
SRUN = """
echo "cores $SRUN_CPUS_PER_TASK srun $*" >>"$RECORD"
for i in 0 1; do SLURM_NODEID=$i PMI_RANK=$i PMI_SIZE=2 "$@" & pids+=($!); done
worst=0
for pid in "${pids[@]}"; do wait $pid || worst=$?; done
exit $worst
"""


def job_id() -> int:
    """Of a job whose port, as slurm.sbatch computes it, is free."""
    for number in range(os.getpid() % 10_000, 20_000):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", 20_000 + number)):
                return number
    raise AssertionError("no free port")


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    for name, text in (("sbatch", SBATCH), ("scontrol", SCONTROL), ("srun", SRUN)):
        put(tmp_path / "bin", name, text)
    path = f"{tmp_path / 'bin'}{os.pathsep}{environment()['PATH']}"
    fixed = {"PATH": path, "RECORD": str(tmp_path / "record"), "RANKS": "1"}
    return {**fixed, "SLURM_JOB_ID": str(job_id())}


def test_slurm_runs_stops_and_queues_again(
    slurm: dict[str, str], options: list[str], undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    command = ["sbatch", "--nodes", "2", "launch/slurm.sbatch", *options, *into(tmp_path), "--fresh"]
    with Started(tmp_path / "log", *command, **slurm) as run:
        run.saves(tmp_path, 4)
        for pid in run.step():
            os.kill(pid, signal.SIGTERM)  # SLURM signals every process of a step
        assert run.ends() == 1, run.said
        assert "stopped by SIGTERM after step" in run.said
    step = read(tmp_path)["stopped"]
    assert 4 <= step < STEPS
    with Started(tmp_path / "log", *command, **slurm, SLURM_RESTART_COUNT="1") as run:
        assert run.ends() == 0, run.said
    assert check(read(tmp_path), undisturbed) == step
    record = (tmp_path / "record").read_text().splitlines()
    assert len(record) == 2 and "cores 1 srun torchrun --nnodes 2 --nproc-per-node 1 " in record[0]


def test_options_of_sbatch() -> None:
    """All are known, and none follows the first command, where sbatch would not see it."""
    text = (ROOT / "launch" / "slurm.sbatch").read_text()
    head, _, body = text.partition("\nset -euo pipefail\n")
    assert "#SBATCH" not in body
    names = re.findall(r"^#SBATCH --([a-z-]+)(?:=\S+)?$", head, re.M)
    known = (
        "job-name nodes ntasks-per-node gpus-per-node cpus-per-task exclusive output open-mode signal requeue"
    )
    assert len(names) == head.count("#SBATCH") and set(names) == set(known.split())
    assert "--signal=TERM@120" in head and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110" in body
