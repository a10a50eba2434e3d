"""The demo: train with 4-bit states, save, resume on other numbers of ranks, compare with AdamW.

python -m launch.demo --help lists the options; `make demo` runs it as it stands.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from launch import options, report
from launch.report import plural

ROOT = Path(__file__).resolve().parent.parent
STAGES = 5
RESUMED_STEPS = 20  # that the run resumed on 3 ranks trains on


class DemoError(RuntimeError):
    """A part of the demo that failed; the message is for people."""


@dataclass(frozen=True)
class Demo:
    """What all parts of the demo share. ranks: of the two trainings; gpus: that may be used.

    Parts with more ranks than there are GPUs run on the CPU.
    """

    ranks: int
    gpus: int
    steps: int
    out: Path
    common: tuple[str, ...]

    @property
    def save_at(self) -> int:
        """The step after which the trainings save: half way."""
        return (self.steps + 1) // 2

    def stage(self, number: int, title: str, name: str, ranks: int, *extra: str) -> report.Results:
        """Run launch.train in new processes under torchrun, and return the results it wrote.

        Its output goes where this process's goes. Raises DemoError if it fails or takes too long.
        """
        print(f"[{number}/{STAGES}] {title}", flush=True)
        path = self.out / f"{name}.json"
        place = ["--device", "cpu"] if self.gpus < ranks else []
        train = ["-m", "launch.train", *self.common, *place, *extra]
        begin = time.perf_counter()
        run_ranks(ranks, [*train, "--results", str(path)], limit=300 + 3 * self.steps)
        print(f"      {time.perf_counter() - begin:.0f} s\n", flush=True)
        return json.loads(path.read_text())


def environment(ranks: int) -> dict[str, str]:
    """The environment of the ranks: this checkout on the path, the cores shared out as threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", str(max(1, min(8, (cores or 1) // ranks))))
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    return env


def run_ranks(ranks: int, program: list[str], limit: float) -> None:
    """Run a program of Python's under torchrun on ``ranks`` ranks of this host.

    Raises DemoError if it fails or is not done after ``limit`` seconds.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), *program]
    child = subprocess.Popen(command, env=environment(ranks))
    try:
        status = child.wait(limit)
    except subprocess.TimeoutExpired:
        raise DemoError(f"not done after {limit:.0f} s: {' '.join(program)}") from None
    finally:
        if child.poll() is None:
            child.terminate()  # torchrun passes it on to the ranks
            try:
                child.wait(15)
            except subprocess.TimeoutExpired:
                child.kill()
    if status != 0:
        raise DemoError(f"status {status} on {plural(ranks, 'rank')}, see above: {' '.join(program)}")


def resume_ranks_note(demo: Demo, ranks: int) -> str:
    """What to say where a resumption uses the CPU although there are GPUs."""
    if 0 < demo.gpus < ranks:
        return f" (CPU and gloo: too few GPUs: {demo.gpus})"
    return ""


def train_and_resume(demo: Demo) -> tuple[report.Results, report.Results, list[report.Results]]:
    """Results of the trainings with AdamW4bit and AdamW, and of the three resumptions.

    The resumptions are: checked on 3 ranks, checked on 1 rank, trained on on 3 ranks.
    """
    for name in ("adamw4bit", "adamw"):
        shutil.rmtree(demo.out / name, ignore_errors=True)
    trainings = []
    for number, name, title in ((1, "adamw4bit", "AdamW4bit"), (2, "adamw", "torch.optim.AdamW")):
        text = f"{title}: {demo.steps} steps on {plural(demo.ranks, 'rank')}, checkpoint after {demo.save_at}"
        arguments = ["--optimizer", name, "--out", str(demo.out / name)]
        arguments += ["--steps", str(demo.steps), "--save-at", str(demo.save_at), "--fresh"]
        trainings.append(demo.stage(number, text, name, demo.ranks, *arguments))
    resume = ["--resume", str(demo.out / "adamw4bit" / "checkpoints")]
    resumed = []
    for number, ranks in ((3, 3), (4, 1)):
        note = resume_ranks_note(demo, ranks)
        text = f"fresh processes load that checkpoint on {plural(ranks, 'rank')}{note} and check it"
        resumed.append(demo.stage(number, text, f"check-{ranks}", ranks, *resume, "--check-only"))
    last = min(demo.steps, demo.save_at + RESUMED_STEPS)
    text = f"3 ranks train on from it{resume_ranks_note(demo, 3)}, to step {last}"
    resumed.append(demo.stage(5, text, "resumed-3", 3, *resume, "--steps", str(last), "--save-every", "0"))
    return trainings[0], trainings[1], resumed


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; leaves with status 2 and a line on stderr for wrong ones."""
    parser = options.Parser(
        prog="launch.demo",
        description=__doc__.splitlines()[0] if __doc__ else None,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, help="text file or folder (none: Python's standard library)")
    add("--steps", type=options.at_least(2), default=500, help="of each of the two trainings")
    add("--out", type=Path, default=Path("build/demo"), help="folder for everything it writes")
    add("--seed", type=options.at_least(0), default=0, help="of the weights and the data's order")
    add("--device", choices=("auto", "cpu"), default="auto", help="auto: all GPUs, if there are any")
    chosen = parser.parse_args(argv)
    if chosen.data is not None and not chosen.data.exists():
        parser.error(f"--data {chosen.data}: no such file or folder")
    return chosen


def main(argv: list[str] | None = None) -> int:
    """Run the whole demo; return 0, or 1 where something failed or a digest differs."""
    chosen = parse(argv)
    begin = time.perf_counter()
    gpus = torch.cuda.device_count() if chosen.device == "auto" else 0
    ranks = gpus or 2
    common = ["--seed", str(chosen.seed), "--batch", str(max(8, ranks))]
    common += ["--data", str(chosen.data)] if chosen.data else []
    demo = Demo(ranks, gpus, chosen.steps, chosen.out, tuple(common))
    chosen.out.mkdir(parents=True, exist_ok=True)
    place = f"{plural(gpus, 'GPU')}, NCCL" if gpus else "the CPU, gloo"
    text = chosen.data or "the sources of Python's standard library"
    print(f"shard4bit demo: a byte-level GPT learns {text}, on {place}\n", flush=True)
    try:
        ours, theirs, resumed = train_and_resume(demo)
    except DemoError as error:
        print(f"launch.demo: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("launch.demo: interrupted", file=sys.stderr)
        return 130
    digests, same = report.digest_lines(ours, resumed[:2])
    print(f"{digests}\n\n{report.continuation_line(ours, resumed[2])}\n\n{report.table(ours, theirs)}\n")
    picture = chosen.out / "loss.png"
    report.draw(ours, theirs, resumed[2], picture)
    print(f"Loss curves: {picture}   Results: {chosen.out}/*.json")
    print(f"Done in {time.perf_counter() - begin:.0f} s.")
    if not same:
        print("launch.demo: error: a restored digest differs from the saved one", file=sys.stderr)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
