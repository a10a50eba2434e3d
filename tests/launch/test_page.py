"""docs/launching.md says what is there: its commands, and tables of all options and variables."""

from __future__ import annotations

import argparse
import re
import shlex

import pytest

from launch.options import make_parser, parse
from tests.docs.blocks import blocks
from tests.launch.running import ROOT

PAGE = ROOT / "docs" / "launching.md"
TEXT = PAGE.read_text(encoding="utf-8")
SCRIPTS = sorted((ROOT / "launch").glob("*.s[hb]*"))
COMMANDS = [line for b in blocks(PAGE) if b.tag == "text" for line in b.text.splitlines() if line]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands(line: str) -> None:
    words = shlex.split(line)
    while "=" in words[0]:
        name = words.pop(0).split("=")[0]
        assert any(f"${{{name}:-" in script.read_text() for script in SCRIPTS), name
    assert words.pop(0) in ("bash", "sbatch")
    while words[0].startswith("--"):
        words = words[2:]
    assert ROOT / words.pop(0) in SCRIPTS
    parse(words)


def test_all_options_are_in_the_table() -> None:
    rows = re.findall(r"^\| (`--.*)$", TEXT, re.M)
    named = {word for row in rows for word in re.findall(r"--[a-z-]+", row)}
    actions = [a for a in make_parser()._actions if a.help != argparse.SUPPRESS]
    options = {name for a in actions for name in a.option_strings if name.startswith("--")}
    assert named == options - {"--help"}


def test_all_variables_are_in_the_table() -> None:
    assert len(SCRIPTS) == 4
    rows = set(re.findall(r"`([A-Z_]+)`", "\n".join(re.findall(r"^\| `[A-Z].*$", TEXT, re.M))))
    read = set()
    for script in SCRIPTS:
        read |= set(re.findall(r"\$\{([A-Z][A-Z_]+):-", script.read_text()))
    python = {"PYTHONPATH", "VIRTUAL_ENV"}
    slurm = {name for name in read if name.startswith("SLURM_")}
    assert read - python - slurm <= rows
    for name in rows:
        used = any(name in path.read_text() for path in [*SCRIPTS, *ROOT.glob("tests/launch/*.py")])
        assert used, f"{name} is read by nothing"
